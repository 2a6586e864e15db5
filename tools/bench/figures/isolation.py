"""What a process that stands still, or is dead, costs those that work with the same owner."""
from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

from llm_datadist import BlocksCacheKey

from .. import engine as engines
from ..case import ALL_BLOCKS, Case
from ..channel import Channel
from ..measure import collection_paused, repeat
from ..rows import Rig
from ..statistics import median
from . import median_value

_COUNT = 40
_LEAST_ROUNDS = 7
_CASE = Case("pull_blocks", "tcp", "pool", 1 << 20, 64, ALL_BLOCKS, 1, 1, 1, 1)
_MEASURED = 8                                   # blocks of a pull that is measured; the other reader pulls all


def stopped_and_dead_readers(
    peers: list[Channel], seconds: float, on_progress: Callable[[float], None]
) -> list[dict]:
    """Pull over TCP while another reader of the owner stands still in the middle of a pull, and once it was killed.

    A ratio is the time with it by the time right before, when that reader is linked and idle.
    """
    ratios: dict[str, list[float]] = {"stopped": [], "dead": []}
    with Rig(_CASE, peers) as rig:
        manager, cache = rig.engine.cache_manager, rig.memories[0].cache
        key, blocks = BlocksCacheKey(1, engines.BLOCKS_MODEL_ID), list(range(_MEASURED))
        sampler = repeat(lambda: manager.pull_blocks(key, cache, blocks, blocks))
        sampler(_COUNT)
        address = peers[0].ask("hello")["ip"], rig.clusters[0].remote_ip_info_list[0][1]
        start = time.monotonic()
        while len(ratios["dead"]) < _LEAST_ROUNDS or time.monotonic() - start < seconds:
            with collection_paused(), _Reader(*address) as other:
                idle = median(sampler(_COUNT))
                other.stop_in_a_pull(peers[0])
                ratios["stopped"].append(median(sampler(_COUNT)) / idle)
                other.kill()
                ratios["dead"].append(median(sampler(_COUNT)) / idle)
            on_progress(min(1.0, (time.monotonic() - start) / seconds))
    texts = {"stopped": "a reader stands still in the middle of a pull", "dead": "that reader was killed"}
    return [
        median_value(f"{name}_ratio", found, "", f"pull of {_MEASURED} MiB over TCP while {texts[name]}, by the time "
                     "while it is idle") for name, found in ratios.items()]


class _Reader:
    """A process of its own that is linked to the owner, and pulls again and again once it is told to."""

    def __init__(self, ip: str, port: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import read; read({ip!r}, {port!r})"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._wait("linked")

    def _wait(self, word: str) -> None:
        line = self._process.stdout.readline().decode().strip()
        if line != word:
            raise RuntimeError(f"the other reader said {line!r}, not {word!r}")

    def stop_in_a_pull(self, owner: Channel) -> None:
        """Stop it while the owner has its cache pinned."""
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()
        self._wait("pulling")
        for _ in range(200):
            os.kill(self._process.pid, signal.SIGSTOP)
            if owner.ask("pins")["pins"]:
                return
            os.kill(self._process.pid, signal.SIGCONT)
            time.sleep(0.005)
        raise RuntimeError("the other reader was never met in the middle of a pull")

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *_exception) -> None:
        self.kill()
        self._process.stdin.close()
        self._process.stdout.close()


def read(ip: str, port: int) -> None:
    """What the other process does."""
    engine, _ = engines.open_engine(engines.WORKER_CLUSTER_ID + 1, engines.pool_bytes(_CASE, 1), False, None)
    engines.link(engine, [engines.cluster(1, ip, port)])
    memory = engines.Memory(engine, _CASE, keys=False)
    key, blocks = BlocksCacheKey(1, engines.BLOCKS_MODEL_ID), list(range(_CASE.num_blocks))
    engine.cache_manager.pull_blocks(key, memory.cache, blocks, blocks)
    print("linked", flush=True)
    sys.stdin.readline()
    print("pulling", flush=True)
    while True:
        engine.cache_manager.pull_blocks(key, memory.cache, blocks, blocks)
