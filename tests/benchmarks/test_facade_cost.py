"""Facade: per call and per block, through a real link to another process."""
import numpy as np
import pytest

from llm_datadist import BlocksCacheKey, CacheDesc, CacheKey, DataType

OWNER, HERE = 1, 2
MODEL_ID, NUM_BLOCKS = 5, 4096


def allocate_blocks(node, keyed):
    """A cache of one tensor with blocks of one byte: block lists cost, bytes do not."""
    key = BlocksCacheKey(0, MODEL_ID) if keyed else None
    desc = CacheDesc(1, [NUM_BLOCKS, 1], DataType.DT_INT8)
    node.kept["cache"] = node.cache_manager.allocate_blocks_cache(desc, key)


def deallocate_blocks(node):
    node.cache_manager.deallocate_blocks_cache(node.kept.pop("cache"))


@pytest.fixture(scope="module")
def here(module_peers):
    """The engine of this process, linked to one that owns a cache of blocks."""
    owner, here = module_peers.start(OWNER), module_peers.here(HERE)
    module_peers.link(here, owner)
    owner.call(allocate_blocks, True)
    here.call(allocate_blocks, False)
    yield here
    here.call(deallocate_blocks)
    owner.call(deallocate_blocks)


@pytest.mark.parametrize("convert", [list, tuple, np.int64, np.int32], ids=["list", "tuple", "int64", "int32"])
@pytest.mark.parametrize("count", [1, NUM_BLOCKS])
def test_pull_blocks(benchmark, here, count, convert):
    blocks = np.arange(count, dtype=convert) if convert in (np.int64, np.int32) else convert(range(count))
    manager, cache = here.node.cache_manager, here.node.kept["cache"]
    benchmark.extra_info["blocks"] = count
    benchmark(manager.pull_blocks, BlocksCacheKey(OWNER, MODEL_ID), cache, blocks, blocks)


def test_allocate_and_deallocate(benchmark, here):
    manager, desc = here.node.cache_manager, CacheDesc(122, [2, 4096], DataType.DT_INT8)
    ids = iter(range(1, 1 << 40))

    def keys():
        return ([CacheKey(0, next(ids)), CacheKey(0, next(ids))],), {}

    def pair(cache_keys):
        manager.deallocate_cache(manager.allocate_cache(desc, cache_keys))
        for key in cache_keys:
            manager.remove_cache_key(key)

    benchmark.pedantic(pair, setup=keys, rounds=3000)


def test_cache_key(benchmark):
    benchmark(CacheKey, 1, 2, 3)
