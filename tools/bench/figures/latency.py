"""Latency of the smallest useful pulls, above the copy itself."""
from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np

from llm_datadist import BlocksCacheKey

from .. import engine as engines
from ..case import ALL_BLOCKS, Case
from ..channel import Channel
from ..measure import Sampler, Samples, interleave, repeat
from ..native.bound import CopyBound
from ..rows import Rig
from ..statistics import quantile
from . import median_value, value

BLOCK_BYTES = 4096
_NUM_BLOCKS = 512


def block_case(block_bytes: int = BLOCK_BYTES, num_blocks: int = _NUM_BLOCKS, path: str = "shm") -> Case:
    """Return a case of one tensor whose blocks are pulled one at a time."""
    return Case("pull_blocks", path, "pool", block_bytes, num_blocks, ALL_BLOCKS, 1, 1, 1, 1)


def single_block_call(rig: Rig) -> Callable[[], None]:
    """Return a call that pulls one block, the next one each time."""
    manager, cache = rig.engine.cache_manager, rig.memories[0].cache
    key = BlocksCacheKey(1, engines.BLOCKS_MODEL_ID)
    lists = itertools.cycle([[block] for block in range(rig.case.num_blocks)])

    def pull() -> None:
        blocks = next(lists)
        manager.pull_blocks(key, cache, blocks, blocks)

    return pull


def copies(rows: np.ndarray) -> Sampler:
    """Return a sampler of single-threaded copies of these descriptors, one after the other."""
    bound = CopyBound(np.ascontiguousarray(rows, dtype=np.uint64), 1)

    def sample(count: int) -> list[int]:
        found: list[int] = []
        while len(found) < count:
            found += bound.run_each()
        return found[:count]

    return sample


def one_block(peers: list[Channel], seconds: float, on_progress: Callable[[float], None]) -> list[dict]:
    """Pull single blocks of 4 KiB, different ones, against copying them within this process."""
    with Rig(block_case(), peers) as rig:
        offsets = np.arange(rig.case.num_blocks) * BLOCK_BYTES
        rows = np.stack([
            offsets + rig.ends[0].twin[0], offsets + rig.ends[0].local[0], np.full(len(offsets), BLOCK_BYTES)], axis=1)
        samples = interleave(repeat(single_block_call(rig)), {"copy": copies(rows)}, seconds, on_progress)
    return _values(samples)


def by_key(peers: list[Channel], seconds: float, on_progress: Callable[[float], None]) -> list[dict]:
    """Pull caches of 4 KiB by request key; each pull takes its key, and the owner frees the cache."""
    case = Case("pull_key", "shm", "pool", BLOCK_BYTES, 1, ALL_BLOCKS, 1, 1, 1, 1)
    with Rig(case, peers) as rig:
        row = [[rig.ends[0].twin[0], rig.ends[0].local[0], BLOCK_BYTES]] * _NUM_BLOCKS
        samples = interleave(
            rig.sample, {"copy": copies(np.array(row, dtype=np.uint64))}, seconds, on_progress, rig.most_keys)
    return _values(samples)


def _values(samples: Samples) -> list[dict]:
    micro = [each / 1e3 for each in samples.latencies]
    p50, p99 = quantile(micro, 0.5), quantile(micro, 0.99)
    return [
        median_value("above_copy_us", [each / 1e3 for each in samples.excess("copy")], "us", "p50 minus the bare copy"),
        value("p50_us", p50, "us", micro),
        value("p99_us", p99, "us"),
        value("p99_over_p50", p99 / p50, ""),
        median_value("copy_us", [each["copy"] / 1e3 for each in samples.rounds], "us", "memcpy of the same bytes"),
    ]
