"""Linked pairs of processes, kept for a whole module, which uses one of these fixtures."""
from __future__ import annotations

import pytest
from support.peer import Peers
from transfers.pair import PATHS, linked_pair


def _mode(remote_accessible: bool) -> str:
    return "remote_accessible" if remote_accessible else "two_sided"


@pytest.fixture(scope="module", params=[(mode, path) for mode in (False, True) for path in PATHS],
                ids=lambda param: f"{_mode(param[0])}-{param[1]}")
def pair(request):
    """A pair of each mode, on each path."""
    with Peers() as peers:
        yield linked_pair(peers, *request.param)


@pytest.fixture(scope="module", params=PATHS)
def remote_accessible_pair(request):
    """A pair in remote-accessible mode, on each path."""
    with Peers() as peers:
        yield linked_pair(peers, True, request.param)


# Over shm keys are looked up and released in the owner's memory, over tcp by asking it.
ASKING = ("shm", "tcp")


@pytest.fixture(scope="module", params=[(mode, path) for mode in (False, True) for path in ASKING],
                ids=lambda param: f"{_mode(param[0])}-{param[1]}")
def mode_pair(request):
    """A pair of each mode, for either way to ask the owner."""
    with Peers() as peers:
        yield linked_pair(peers, *request.param)


@pytest.fixture(scope="module", params=ASKING)
def two_sided_pair(request):
    """A pair in two-sided mode, for either way to ask the owner."""
    with Peers() as peers:
        yield linked_pair(peers, False, request.param)


@pytest.fixture
def scene(mode_pair):
    """Caches of one test, gone and unpinned at its end."""
    with mode_pair.scene() as scene:
        yield scene
        for process in (mode_pair.here, mode_pair.there):
            assert process.settled()["pins"] == 0
