"""Two linked engines, and caches on both sides that are compared with what they must contain."""
from __future__ import annotations

import time
from typing import Any, Dict, List, Tuple

from support.peer import Peers, Process, engine_options
from transfers.caches import Made, Spec, contents, drop, drop_all, make

PATHS = ("shm", "cma", "tcp")
PATHS_VARIABLE = "LLM_DATADIST_HOST_PATHS"
HERE, THERE = 2, 2**63 + 1          # cluster ids; any uint64 will do


class Pair:
    """Two linked engines: `here`, which asked for the link, and `there`, which listens.

    Attributes
    ----------
    remote_accessible : bool
        The mode of both.
    path : str
        How bytes go between them.
    """

    def __init__(self, peers: Peers, remote_accessible: bool, path: str, here: Process, there: Process) -> None:
        self.peers = peers
        self.remote_accessible = remote_accessible
        self.path = path
        self.here = here
        self.there = there

    def ends(self, reverse: bool) -> Tuple[Process, Process]:
        """The process that calls, and its peer; a link serves both directions."""
        return (self.there, self.here) if reverse else (self.here, self.there)

    def link_again(self) -> None:
        """Replace a link that broke, once the owner has let go of what it held for it."""
        self.peers.unlink(self.here, self.there)
        deadline = time.monotonic() + 10
        while self.there.stats()["pins"] and time.monotonic() < deadline:
            time.sleep(0.002)
        assert self.there.stats()["pins"] == 0
        self.peers.link(self.here, self.there)

    def scene(self) -> "Scene":
        """Caches for one example."""
        return Scene(self)


class Scene:
    """Caches of one example, dropped at its end, with what they must contain."""

    def __init__(self, pair: Pair) -> None:
        self._pair = pair
        self._models: Dict[str, Tuple[Process, Any]] = {}

    def make(self, process: Process, name: str, spec: Spec) -> Tuple[Made, Any]:
        """Make a cache, and its model, which the example changes as the call must change the cache."""
        made = process.call(make, name, spec)
        model = spec.model()
        self._models[name] = (process, model)
        return made, model

    def forget(self, name: str) -> None:
        """Drop one cache before the end."""
        process, _ = self._models.pop(name)
        process.call(drop, name)

    def lose(self, name: str) -> None:
        """Expect nothing of a cache any more."""
        del self._models[name]

    def check(self) -> None:
        """Compare every cache with its model, byte for byte."""
        for name, (process, model) in self._models.items():
            found: List[bytes] = process.call(contents, name)
            for index, (tensor, expected) in enumerate(zip(found, model.contents())):
                if tensor != expected:
                    at = next(i for i in range(len(expected)) if tensor[i] != expected[i])
                    raise AssertionError(f"tensor {index} of {name!r} differs at byte {at} of {len(expected)} (stride "
                                         f"{model.stride}): {tensor[at:at + 16].hex()}, not "
                                         f"{expected[at:at + 16].hex()}")

    def __enter__(self) -> "Scene":
        return self

    def __exit__(self, *_: Any) -> None:
        for process in (self._pair.here, self._pair.there):
            if process.is_running:
                process.call(drop_all)


def linked_pair(peers: Peers, remote_accessible: bool, path: str, **options: Any) -> Pair:
    """Start and link two engines; a repeated destination block is not refused, so that what it leaves is compared."""
    options = {"llm_Strict": "0", **options}
    env = {PATHS_VARIABLE: path}
    there = peers.start(THERE, engine_options(remote_accessible=remote_accessible, host_pool=16 << 20, **options),
                        env=env)
    here = peers.here(HERE, engine_options(remote_accessible=remote_accessible, host_pool=16 << 20, **options),
                      env=env)
    peers.link(here, there)
    return Pair(peers, remote_accessible, path, here, there)
