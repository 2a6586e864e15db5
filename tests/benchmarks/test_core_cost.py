"""Core: cache table against the number of live keys, pool, block lists, plan, wait."""
import ctypes
import itertools

import numpy as np
import pytest

from llm_datadist.tools.bench.native.stopwatch import TableStopwatch, time_parse, time_plan, time_pool
from llm_datadist_probes.transfer import TableProbe

LIBC = ctypes.CDLL(None)
BATCH = 50


@pytest.fixture(scope="module", params=[100, 10_000, 1_000_000], ids=lambda count: f"{count}keys")
def watch(request):
    """A table that holds that many keys, two a cache."""
    watch = TableStopwatch(request.param // 2)
    yield watch
    watch.close()


def chosen(watch):
    """Batches of caches, at random."""
    rng = np.random.default_rng(3)
    while True:
        yield rng.permutation(min(watch.num_caches, 1 << 16))[:BATCH].astype(np.int64)


@pytest.mark.parametrize("operation", ["resolve", "remove_keys", "deallocate", "allocate"])
def test_table(benchmark, watch, operation):
    """`BATCH` of them a round; the others keep the table as it was."""
    batches = chosen(watch)
    benchmark.extra_info.update(keys=2 * watch.num_caches, operations=BATCH * (2 if operation == "remove_keys" else 1))
    if operation == "resolve":
        benchmark.pedantic(watch.resolve, setup=lambda: ((next(batches),), {}), rounds=500)
        return
    steps = ["remove_keys", "deallocate", "allocate"]
    before, after = steps[:steps.index(operation)], steps[steps.index(operation) + 1:]
    held = []

    def setup():
        if held:
            for step in after:
                getattr(watch, step)(held[0])
        held[:] = [next(batches)]
        for step in before:
            getattr(watch, step)(held[0])
        return (held[0],), {}

    benchmark.pedantic(getattr(watch, operation), setup=setup, rounds=300)
    for step in after:
        getattr(watch, step)(held[0])


@pytest.mark.parametrize("tensors", [1, 122])
def test_pool(benchmark, tensors):
    benchmark.extra_info["operations"] = 1000
    benchmark(time_pool, tensors, 1 << 20, 16, 1000)


@pytest.mark.parametrize("kind", ["list", "tuple", "int64", "int32"])
@pytest.mark.parametrize("count", [1, 4096])
def test_block_list(benchmark, kind, count):
    makers = {"list": list, "tuple": tuple}
    blocks = makers[kind](range(count)) if kind in makers else np.arange(count, dtype=kind)
    benchmark.extra_info["operations"] = 100
    benchmark(time_parse, blocks, 100)


@pytest.mark.parametrize("run", [1, 8, 0], ids=["scattered", "runs of 8", "one run"])
def test_plan(benchmark, run):
    """32 blocks in each of 122 tensors."""
    rng = np.random.default_rng(1)
    blocks = np.arange(32) if run == 0 else (
        rng.permutation(40 // run)[: 32 // run, None] * run + np.arange(run)).ravel()
    benchmark.extra_info["operations"] = 100
    benchmark(time_plan, 122, 16384, 40, blocks, blocks[::-1].copy() if run == 1 else blocks, 100)


@pytest.mark.parametrize("looks", [1, 20])
def test_wait(benchmark, looks):
    """A wait whose batch is complete at the first or the twentieth look, the looks being Python's."""
    kind = ctypes.CFUNCTYPE(ctypes.c_uint32, ctypes.c_void_p, ctypes.c_void_p, ctypes.POINTER(ctypes.c_int))
    states = itertools.cycle([0] * (looks - 1) + [1])

    @kind
    def query(client, handle, state):
        state[0] = next(states)
        return 0

    probe = TableProbe(caps=0, query=ctypes.cast(query, ctypes.c_void_p).value)
    benchmark(probe.wait, 1, 2, 1_000_000_000)
