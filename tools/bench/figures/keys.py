"""What a million live keys change.

The same calls are timed while the engines hold a hundred keys and while they hold a million: pulls by key (the owner's
table is looked up), removals and deallocations. In the core alone, where no call hides it, random keys of a large table
miss the processor's caches; that ratio is reported next to the one users see.
"""
from __future__ import annotations

import itertools
from collections.abc import Callable
from time import perf_counter_ns as clock

import numpy as np

from llm_datadist import CacheDesc, CacheKey, DataType, LLMDataDist
from llm_datadist.core.stopwatch import TableStopwatch

from ..case import ALL_BLOCKS, Case
from ..channel import Channel
from ..measure import collection_paused
from ..rows import Rig
from ..statistics import median
from . import median_value, value

MANY, FEW = 1_000_000, 100
KEYS_PER_CACHE = 2
SLOT_BYTES = 2048
_FIRST_HELD = 1 << 40
_CHUNK = 500
_CORE_CHUNK = 40


def many_keys(peers: list[Channel], seconds: float, on_progress: Callable[[float], None]) -> list[dict]:
    """Time the same operations with few and with many live keys, in both processes."""
    found: dict[str, dict[int, list[float]]] = {}
    case = Case("pull_key", "shm", "pool", SLOT_BYTES, 1, ALL_BLOCKS, 1, 1, 1, 1)
    # Few, many, few: what drifts between the phases shows up as a difference of the two outer ones and cancels out.
    phases = (FEW, MANY, FEW)
    for number, live in enumerate(phases):
        with Rig(case, peers, page_shift=12, held_caches=live // KEYS_PER_CACHE) as rig:
            peers[0].send(command="hold", count=live // KEYS_PER_CACHE, first_id=_FIRST_HELD, slot_bytes=SLOT_BYTES)
            _hold(rig.engine, live // KEYS_PER_CACHE)
            peers[0].receive()
            with collection_paused():
                rounds = max(3, int(seconds * 2))
                for step in range(rounds):
                    for name, samples in _round(rig).items():
                        found.setdefault(name, {}).setdefault(live, []).extend(samples)
                    on_progress((number + (step + 1) / rounds) / (len(phases) + 1))
    values = []
    for name, by_count in found.items():
        few, many = median(by_count[FEW]), median(by_count[MANY])
        values.append(value(f"{name}_ratio", many / few, "", [each / few for each in by_count[MANY]],
                            f"{many / 1e3:.2f} us with {MANY} keys, {few / 1e3:.2f} us with {FEW}"))
    return values + _core(seconds)


def _hold(engine: LLMDataDist, num_caches: int) -> None:
    """Take `num_caches` caches of two keys each, and keep the keys only."""
    manager, desc = engine.cache_manager, CacheDesc(1, [KEYS_PER_CACHE, SLOT_BYTES], DataType.DT_INT8)
    for index in range(num_caches):
        first = _FIRST_HELD + KEYS_PER_CACHE * index
        manager.deallocate_cache(manager.allocate_cache(desc, [CacheKey(0, first), CacheKey(0, first + 1)]))


_ids = itertools.count(1)


def _round(rig: Rig) -> dict[str, list[int]]:
    """Time one operation after the other, some hundred times; the numbers of live caches and keys are kept."""
    manager, desc = rig.engine.cache_manager, CacheDesc(1, [KEYS_PER_CACHE, SLOT_BYTES], DataType.DT_INT8)
    took: dict[str, list[int]] = {"resolve": rig.sample(_CHUNK), "remove": [], "deallocate": []}
    for _ in range(_CHUNK):
        key = CacheKey(0, next(_ids))
        cache = manager.allocate_cache(desc, [key])
        before = clock()
        manager.remove_cache_key(key)
        between = clock()
        manager.deallocate_cache(cache)
        took["deallocate"].append(clock() - between)
        took["remove"].append(between - before)
    return took


def _core(seconds: float) -> list[dict]:
    """The same in the core alone: random live keys, no interpreter between two operations."""
    watches = {live: TableStopwatch(live // KEYS_PER_CACHE) for live in (FEW, MANY)}
    key_bytes = watches[MANY].table.stats()["key_bytes"] / MANY
    rng = np.random.default_rng(8)
    took: dict[str, dict[int, list[float]]] = {}
    for _ in range(max(50, int(seconds * 200))):
        for live, watch in watches.items():
            chosen = rng.permutation(watch.num_caches)[:_CORE_CHUNK] if live == FEW else rng.integers(
                0, watch.num_caches, _CORE_CHUNK)
            chosen = np.unique(chosen).astype(np.int64)
            rng.shuffle(chosen)
            for name in ("resolve", "remove_keys", "deallocate", "allocate"):
                took.setdefault(name, {}).setdefault(live, []).append(getattr(watch, name)(chosen))
    for watch in watches.values():
        watch.close()
    values = [value("bytes_per_key", key_bytes, "B", (), f"in the core, with {MANY} keys")]
    for name, by_count in took.items():
        few = median(by_count[FEW])
        values.append(value(f"core_{name}_ratio", median(by_count[MANY]) / few, "",
                            [each / few for each in by_count[MANY]],
                            f"{median(by_count[MANY]):.0f} ns with {MANY} keys at random, {few:.0f} ns with {FEW}"))
    values.append(median_value("core_resolve_ns", took["resolve"][MANY], "ns", f"one look-up among {MANY} keys"))
    return values
