"""Registered tensors that follow each other in memory: each is a region of its own, and no piece may span two."""
import numpy as np
import pytest
from support.peer import engine_options

from llm_datadist import BlocksCacheKey, CacheDesc, DataType, TransferConfig
from llm_datadist.managers.transfer_config import LayerSynchronizer

NUM_TENSORS, NUM_BLOCKS, BLOCK_BYTES = 4, 4, 64 << 10
DESC = CacheDesc(NUM_TENSORS, [NUM_BLOCKS, BLOCK_BYTES], DataType.DT_UINT8)
OWNER, READER = 1, 2


class Ready(LayerSynchronizer):
    def synchronize_layer(self, layer_index, timeout_in_millis):
        return True


def register(node, seed, cluster_id):
    """One allocation that holds all tensors without a gap."""
    memory = np.random.default_rng(seed).integers(0, 256, (NUM_TENSORS, NUM_BLOCKS, BLOCK_BYTES), dtype=np.uint8)
    node.kept["memory"] = memory
    node.kept["cache"] = node.cache_manager.register_blocks_cache(
        DESC, [tensor.ctypes.data for tensor in memory], BlocksCacheKey(cluster_id))
    return [int(tensor.ctypes.data) for tensor in memory]


def content(node):
    return node.kept["memory"].copy()


def pull_all(node):
    every = list(range(NUM_BLOCKS))
    node.cache_manager.pull_blocks(BlocksCacheKey(OWNER), node.kept["cache"], every, every)


def put_all(node, addrs):
    every = list(range(NUM_BLOCKS))
    task = node.cache_manager.transfer_cache_async(
        node.kept["cache"], Ready(), [TransferConfig(OWNER, addrs)], every, every)
    return task.synchronize(20000)


def drop(node):
    node.cache_manager.unregister_cache(node.kept.pop("cache").cache_id)


@pytest.mark.parametrize("path", ["shm", "cma", "tcp"])
@pytest.mark.parametrize("remote_accessible", [False, True])
def test_whole_caches_either_way(peers, path, remote_accessible):
    env = {"LLM_DATADIST_HOST_PATHS": path}
    options = engine_options(remote_accessible=remote_accessible)
    owner, reader = peers.start(OWNER, options, env=env), peers.start(READER, options, env=env)
    addrs = owner.call(register, 1, OWNER)
    reader.call(register, 2, READER)
    peers.link(reader, owner)
    expected = owner.call(content)
    reader.call(pull_all)
    assert (reader.call(content) == expected).all()
    reader.call(fill, 7)
    assert reader.call(put_all, addrs) == 0
    assert (owner.call(content) == 7).all()
    for process in (reader, owner):
        process.call(drop)


def fill(node, value):
    node.kept["memory"][:] = value
