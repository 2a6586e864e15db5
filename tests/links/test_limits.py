"""Links at the limits of the API and of the process: very many of them, and no descriptor left."""
from __future__ import annotations

import json
import os
import resource

import pytest
from support.link_steps import (
    ask,
    fetch,
    footprint,
    leave,
    link,
    links,
    met,
    offer,
    rank_table,
    server,
    until,
    wait_links,
    withdraw,
)
from support.peer import engine_options

from llm_datadist import LLMStatusCode, RegisterMemStatus
from llm_datadist.status import LLMParamInvalidError

S = LLMStatusCode
MAX_COMMUNICATORS = 512
TABLE = json.dumps(rank_table([server("0", (0, 0), (1, 1))]))
RANKS = {1: 0, 2: 1}


def ask_for(node, count):
    for number in range(count):
        ask(node, f"many {number}", RANKS, TABLE)


def met_all(node, count):
    return set(met(node, *[f"many {number}" for number in range(count)]))


def leave_all(node, count):
    leave(node, *[f"many {number}" for number in range(count)])


def test_512_communicators(peers):
    pair = peers.start(1, engine_options(listen=False)), peers.start(2, engine_options(listen=False))
    for process in pair:
        process.call(offer)
    for process in pair:                                # what the first link starts, such as the data server, stays
        process.call(ask, "first", RANKS, TABLE)
    assert [process.call(met, "first") for process in pair] == [[RegisterMemStatus.OK]] * 2
    for process in pair:
        process.call(leave, "first")
        assert process.call(wait_links, []) == []
    before = [process.call(footprint)["fds"] for process in pair]
    for process in pair:
        process.call(ask_for, MAX_COMMUNICATORS)
    for process in pair:
        assert process.call(met_all, MAX_COMMUNICATORS) == {RegisterMemStatus.OK}
        assert len(process.call(links)) == MAX_COMMUNICATORS
        with pytest.raises(LLMParamInvalidError, match="512"):
            process.call(ask, "one more", RANKS, TABLE)
    assert pair[0].call(fetch, 2) and pair[1].call(fetch, 1)
    for process in pair:
        process.call(leave_all, MAX_COMMUNICATORS)
    for process, old in zip(pair, before):
        assert process.call(wait_links, []) == []
        assert until(lambda process=process, old=old: process.call(footprint)["fds"] == old)
    for process in pair:
        process.call(ask, "room again", RANKS, TABLE)
    assert [process.call(met, "room again") for process in pair] == [[RegisterMemStatus.OK]] * 2
    for process in pair:
        process.call(withdraw)


def with_few_files(node, spare, function, *args):
    """Call while this process may open only so many more descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    taken = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1 + spare, hard))
        while len(os.listdir("/proc/self/fd")) - 1 <= highest:          # fill the gaps below the highest one
            taken.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        pass
    try:
        for _ in range(min(spare, len(taken))):
            os.close(taken.pop())
        return function(node, *args)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in taken:
            os.close(fd)


@pytest.fixture(scope="module")
def processes(module_peers):
    """An owner that offers something, and a reader."""
    pair = module_peers.start(1), module_peers.start(2)
    pair[0].call(offer)
    yield pair
    pair[0].call(withdraw)


@pytest.mark.parametrize("spare", range(12))
def test_no_descriptor_for_a_link(pair, spare):
    """Wherever it fails, the code says so and nothing is left; with room the same call succeeds."""
    owner, reader = pair
    before = reader.call(footprint)["fds"]
    code, _ = reader.call(with_few_files, spare, link, (1, owner.address))
    assert code is S.LLM_LINK_FAILED or (code is S.LLM_SUCCESS and spare)
    if code is not S.LLM_SUCCESS:
        assert reader.call(links) == [] and owner.call(wait_links, []) == []
        assert until(lambda: reader.call(footprint)["fds"] == before)
        assert reader.call(link, (1, owner.address))[0] is S.LLM_SUCCESS
    assert reader.call(fetch, 1)


def keep_few_files(node, spare):
    """Leave so few descriptors until `free_files`."""
    node.kept["limit"] = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + spare, node.kept["limit"][1]))


def free_files(node):
    resource.setrlimit(resource.RLIMIT_NOFILE, node.kept.pop("limit"))


@pytest.mark.parametrize("spare", range(0, 8, 2))
def test_no_descriptor_at_the_peer(pair, spare):
    """The one that is linked to has none left: whoever links is told, and a later link works."""
    owner, reader = pair
    owner.call(keep_few_files, spare)
    code, _ = reader.call(link, (1, owner.address), timeout_ms=500)
    owner.call(free_files)
    assert code in (S.LLM_SUCCESS, S.LLM_LINK_FAILED, S.LLM_TIMEOUT)
    if code is not S.LLM_SUCCESS:
        assert reader.call(links) == [] and owner.call(wait_links, []) == []
        assert reader.call(link, (1, owner.address))[0] is S.LLM_SUCCESS
    assert reader.call(fetch, 1)
