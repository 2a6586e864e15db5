"""Processes whose engines run over the stand-in for CANN; see ``support/strict.py``."""
from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, Iterator, Optional

import pytest
from support.peer import Child, Peers, engine_options
from support.strict import build, comm_res, environment


@pytest.fixture(scope="session")
def toolkit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home of the stand-in."""
    return build(tmp_path_factory.mktemp("toolkit") / "cann")


class Machines:
    """Starts processes over the stand-in."""

    def __init__(self, peers: Peers, home: Path) -> None:
        self.peers = peers
        self.home = home

    def start(self, cluster_id: int, kind: Optional[str] = "device-hccs", *, options: Optional[Dict[str, str]] = None,
              home: Optional[Path] = None, strange: bool = True, **env: str) -> Child:
        """Start a process with an engine; `kind` None: no endpoints are named; `strange`: called by strangers."""
        chosen = engine_options() if options is None else dict(options)
        chosen.pop("llm.LocalCommRes", None)
        if kind is not None:
            chosen["llm.LocalCommRes"] = comm_res(kind)
        return self.peers.start(cluster_id, chosen, env=self.env(home, strange, **env))

    def env(self, home: Optional[Path] = None, strange: bool = True, **env: str) -> Dict[str, str]:
        """Variables of a process."""
        return environment(home or self.home, LDD_TEST_STRICT="cann" if strange else "", **env)

    def pair(self, kind: Optional[str] = "device-hccs", **how: Any) -> Any:
        """Two linked processes: the one that asked for the link, and the other."""
        here, there = self.start(2, kind, **how), self.start(1, kind, **how)
        self.peers.link(here, there)
        return here, there


@pytest.fixture
def machines(peers: Peers, toolkit: Path) -> Iterator[Machines]:
    """Processes over the stand-in, for one test."""
    yield Machines(peers, toolkit)
