"""What a call costs apart from moving bytes: the facade, the plan, and taking and giving memory."""
from __future__ import annotations

import itertools
from collections.abc import Callable
from time import perf_counter_ns as clock

import numpy as np

from llm_datadist import BlocksCacheKey, CacheDesc, CacheKey, DataType

from .. import engine as engines
from ..case import PAGED_TENSORS
from ..channel import Channel
from ..measure import Sampler, interleave, repeat, repeat_timed
from ..native.bound import CopyBound
from ..native.stopwatch import time_parse, time_plan, time_record
from ..rows import Rig
from ..statistics import median, slope
from . import median_value, value
from .latency import block_case

_COUNTS = (1, 512, 4096)           # 4096 blocks of 16 tokens are a long prompt
_RECORD_ROUNDS, _RECORDS = 51, 200_000
_KINDS = {"list": np.ndarray.tolist, "int64": np.ascontiguousarray}


def pull_blocks_cost(peers: list[Channel], seconds: float, on_progress: Callable[[float], None]) -> list[dict]:
    """Pull runs of blocks of one byte, so that block lists cost and bytes do not, and fit a line through the counts.

    The copy of so many bytes is measured as well and taken off. What the facade costs alone is the difference between
    calling it and calling the engine below it.
    """
    most = max(_COUNTS)
    with Rig(block_case(block_bytes=1, num_blocks=most), peers) as rig:
        manager, engine, cache = rig.engine.cache_manager, rig.engine._engine, rig.memories[0].cache
        key = BlocksCacheKey(1, engines.BLOCKS_MODEL_ID)
        remote = (2, 2**64 - 1, engines.BLOCKS_MODEL_ID, 0)     # what the facade makes of that key
        samplers: dict[str, Sampler] = {}
        for count in _COUNTS:
            row = np.array([[rig.ends[0].twin[0], rig.ends[0].local[0], count]], dtype=np.uint64)
            bound = CopyBound(row, 1)
            samplers[f"copy {count}"] = repeat_timed(lambda bound=bound: bound.run("memcpy"))
            for kind, convert in _KINDS.items():
                blocks = convert(np.arange(count, dtype=np.int64))
                samplers[f"{kind} {count}"] = repeat(
                    lambda blocks=blocks: manager.pull_blocks(key, cache, blocks, blocks))
        one = [0]
        engine_call = repeat(lambda: engine.pull_blocks(1, remote, cache.cache_id, one, one, release=True))
        samplers["engine"] = engine_call
        operation = samplers.pop("list 1")
        samples = interleave(operation, samplers, seconds, on_progress)
    rounds = [{"list 1": each["op"], **each} for each in samples.rounds]
    found = []
    for kind in _KINDS:
        per_block = [
            slope([(count, each[f"{kind} {count}"] - each[f"copy {count}"]) for count in _COUNTS])[1] for each in rounds
        ]
        found.append(median_value(f"per_block_{kind}_ns", per_block, "ns", f"from a pair of {kind} block lists"))
    parse = median([time_parse(one, 200) for _ in range(50)])
    plan = median([time_plan(1, 4096, 64, one, one, 200)[0] for _ in range(50)])
    facade = [each["op"] - each["engine"] for each in rounds]
    found += [
        value("fixed_us", (median(facade) + 2 * parse + plan) / 1e3, "us",
              [(each + 2 * parse + plan) / 1e3 for each in facade],
              "facade, taking in two lists and planning one block; lookup, pin and copy come on top"),
        median_value("facade_us", [each / 1e3 for each in facade], "us", "calling the facade minus calling the engine"),
        median_value("call_us", [(each["op"] - each["copy 1"]) / 1e3 for each in rounds], "us",
                     "the whole call for one block of one byte"),
    ]
    scattered = np.random.default_rng(1).permutation(32)
    plan_ns, num_descs = time_plan(PAGED_TENSORS, 16384, 64, scattered, scattered[::-1].copy(), 20)
    found.append(value("plan_per_desc_ns", plan_ns / num_descs, "ns", (),
                       f"planning {num_descs} scattered descriptors, in the core"))
    return found


def allocate_cost(peers: list[Channel], seconds: float, on_progress: Callable[[float], None]) -> list[dict]:
    """Allocate and deallocate a cache of 122 tensors with two keys; removing the keys, which frees it, is apart."""
    engine, _ = engines.open_engine(engines.WORKER_CLUSTER_ID, 64 << 20, False, None)
    try:
        manager = engine.cache_manager
        desc = CacheDesc(PAGED_TENSORS, [2, 4096], DataType.DT_INT8)
        ids = itertools.count(1)
        removals: list[int] = []

        def sample(count: int) -> list[int]:
            took = []
            for _ in range(count):
                keys = [CacheKey(0, next(ids)), CacheKey(0, next(ids))]
                before = clock()
                manager.deallocate_cache(manager.allocate_cache(desc, keys))
                took.append(clock() - before)
                before = clock()
                for key in keys:
                    manager.remove_cache_key(key)
                removals.append((clock() - before) // 2)
            return took

        samples = interleave(sample, {}, seconds, on_progress)
    finally:
        engine.finalize()
    return [
        median_value("pair_us", [each["op"] / 1e3 for each in samples.rounds], "us", "allocate and deallocate"),
        median_value("remove_key_us", [each / 1e3 for each in removals], "us", "remove_cache_key, of one key"),
    ]


def record_cost(peers: list[Channel], seconds: float, on_progress: Callable[[float], None]) -> list[dict]:
    """Count an operation and record an event, in the core, over and over."""
    rounds = []
    for number in range(_RECORD_ROUNDS):
        rounds.append(time_record(_RECORDS))
        on_progress((number + 1) / _RECORD_ROUNDS)
    texts = {"count": "one operation in a counter and a histogram", "off": "an event while events are off",
             "event": "an event, its look at the clock included", "clock": "a look at the clock alone"}
    return [median_value(f"{name}_ns", [each[name] for each in rounds], "ns", text) for name, text in texts.items()]
