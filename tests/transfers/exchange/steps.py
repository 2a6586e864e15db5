"""Steps of pulls that are one exchange, run in any process, and keys that all of these tests use."""
import contextlib

import numpy as np
from support.peer import engine_options
from transfers.caches import Named, Spec, addrs_of, bytes_at, invoke
from transfers.owner import MODEL, NONE
from transfers.pair import HERE, PATHS_VARIABLE, THERE, Pair

from llm_datadist import BlocksCacheKey, CacheDesc, CacheKey, CacheKeyByIdAndIndex, DataType

KIB, MIB = 1 << 10, 1 << 20
SMALL, LARGE = 96, 150 * KIB        # strides; all tensors of a LARGE one need several streams
TCP = {PATHS_VARIABLE: "tcp"}


def connect(pair):
    """Have the data path connected by a first pull, whatever steps that takes."""
    with pair.scene() as scene:
        made, _ = scene.make(pair.there, "first", Spec(1, 1, (8,)))
        scene.make(pair.here, "into", Spec(1, 1, (8,)))
        pair.here.call(invoke, "pull_cache", CacheKeyByIdAndIndex(THERE, made.cache_id), Named("into"))
    return pair


def linked(peers, path="tcp", remote_accessible=False):
    """Two linked children: a process has room for one engine, and several pairs of this module live at once."""
    env = {PATHS_VARIABLE: path}
    options = engine_options(host_pool=16 * MIB, remote_accessible=remote_accessible, llm_Strict="0")
    there, here = (peers.start(number, options, env=env) for number in (THERE, HERE))
    peers.link(here, there)
    return Pair(peers, remote_accessible, path, here, there)


@contextlib.contextmanager
def asking(process, exactly):
    """The owner is asked exactly so much over the control connection."""
    before = process.stats()["requests"]
    yield
    assert process.stats()["requests"] - before == exactly


def request_key(number=1):
    return CacheKey(THERE, number, MODEL)


PREFIX_KEY = CacheKey(THERE, NONE, MODEL, 3)
BLOCKS_KEY = BlocksCacheKey(THERE, MODEL)


def offer(node, key, num_tensors, tensor_bytes, seed):
    """Bind a cache to a request key, its only hold, and return its id."""
    cache = node.cache_manager.allocate_cache(CacheDesc(num_tensors, [1, tensor_bytes], DataType.DT_UINT8), [key])
    for number, addr in enumerate(addrs_of(cache)):
        bytes_at(addr, tensor_bytes)[:] = wanted(tensor_bytes, seed + number)
    node.cache_manager.deallocate_cache(cache)
    return cache.cache_id


def wanted(num_bytes, seed):
    """Bytes that differ for every seed and at every alignment."""
    return np.resize((np.arange(251) * 3 + seed * 37).astype(np.uint8), num_bytes)


def prepare(node, num_tensors, tensor_bytes):
    """Allocate what `take` pulls into."""
    desc = CacheDesc(num_tensors, [1, tensor_bytes], DataType.DT_UINT8)
    node.kept["target"] = node.cache_manager.allocate_cache(desc)


def take(node, key, seed):
    """Pull a key that was offered, and say whether all bytes are right."""
    cache = node.kept["target"]
    node.cache_manager.pull_cache(key, cache)
    tensor_bytes = cache.cache_desc.size
    return all(np.array_equal(bytes_at(addr, tensor_bytes), wanted(tensor_bytes, seed + number))
               for number, addr in enumerate(addrs_of(cache)))


def put_away(node):
    node.cache_manager.deallocate_cache(node.kept.pop("target"))


def holds(stats):
    """Caches, keys, pins and bytes an owner holds."""
    pool = stats["device_pool"]
    return stats["caches"], stats["keys"], stats["pins"], pool["bytes"] - pool["free_bytes"]


NOTHING = (0, 0, 0, 0)


def meet(owner, reader):
    """Connect the data path of a reader."""
    owner.call(offer, request_key(), 1, 8, 0)
    reader.call(prepare, 1, 8)
    assert reader.call(take, request_key(), 0)
    reader.call(put_away)
    assert holds(owner.settled()) == NOTHING
