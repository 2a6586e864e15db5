"""Pulls from 1 byte to 256 MiB: contiguous and paged, in pools and in private memory, on each path."""
import numpy as np
import pytest
from support.peer import Peers
from transfers.caches import Named, Spec, invoke
from transfers.pair import linked_pair

from llm_datadist import BlocksCacheKey, CacheDesc, CacheKeyByIdAndIndex, DataType

MIB = 1 << 20
PAGE = 16 << 10                 # bytes of a block, where there are that many
SIZES = [1, 17, 4095, 4097, 65537, MIB, 3 * MIB + 5, 16 * MIB]
BIG = 256 * MIB


@pytest.fixture(scope="module", params=["shm", "tcp", "cma"])
def pair(request):
    """A pair on each path, with room for the biggest cache."""
    with Peers() as peers:
        yield linked_pair(peers, False, request.param, device_pool=BIG + MIB, timeout_ms=60000)


def pattern(num_bytes, salt):
    """Bytes that tell their place; other than a repeated page, no shifted or swapped part of it looks right."""
    words = np.arange(salt, salt + num_bytes // 8 + 1, dtype=np.uint64)
    words *= np.uint64(0x9E3779B97F4A7C15)
    return words.view(np.uint8)[:num_bytes]


class Large:
    """A cache of one tensor with the pattern in it, which no test copies around to look at."""

    def __init__(self, node, num_slots, stride, is_blocks, is_registered, key, salt):
        desc = CacheDesc(1, [num_slots, stride], DataType.DT_UINT8)
        manager = node.cache_manager
        keys = [key] if key is not None else []
        self.tensor = np.empty(num_slots * stride + 1, np.uint8)[1:] if is_registered else None
        if is_registered:
            addrs = [self.tensor.ctypes.data]
            self.cache = manager.register_blocks_cache(desc, addrs, key) if is_blocks else \
                manager.register_cache(desc, addrs)
        elif is_blocks:
            self.cache = manager.allocate_blocks_cache(desc, *keys)
        else:
            self.cache = manager.allocate_cache(desc)
        if not is_registered:
            self.tensor = self.cache.tensors()[0].reshape(-1)
        self.tensor[:] = pattern(self.tensor.size, salt)

    def give_back(self, node):
        self.tensor = None
        if self.cache.is_registered:
            node.cache_manager.unregister_cache(self.cache.cache_id)
        elif self.cache.is_blocks_cache:
            node.cache_manager.deallocate_blocks_cache(self.cache)
        else:
            node.cache_manager.deallocate_cache(self.cache)


def make(node, *args):
    node.kept["large"] = Large(node, *args)
    return node.kept["large"].cache.cache_id


def give_back(node):
    if "large" in node.kept:
        node.kept.pop("large").give_back(node)


def arrived(node, dst_blocks, src_blocks, stride, num_bytes, salt):
    """Whether blocks of the tensor here are those of the pattern of `num_bytes` there, in the order of the lists."""
    tensor = node.kept["large"].tensor.reshape(-1, stride)
    expected = pattern(num_bytes, salt).reshape(-1, stride)
    return all(np.array_equal(tensor[dst], expected[src]) for dst, src in zip(dst_blocks, src_blocks))


def is_untouched(node, salt):
    """Whether the whole tensor is still the pattern."""
    tensor = node.kept["large"].tensor
    return np.array_equal(tensor, pattern(tensor.size, salt))


def move(pair, num_bytes, is_paged, is_registered):
    stride = min(PAGE, num_bytes) if is_paged else num_bytes
    count = num_bytes // stride
    key = BlocksCacheKey(pair.there.cluster_id, 1) if is_paged else None
    try:
        cache_id = pair.there.call(make, count, stride, is_paged, is_registered, key, 1)
        pair.here.call(make, count, stride, is_paged, is_registered, None, 10**9)
        if is_paged:
            src = np.random.default_rng(num_bytes).permutation(count)
            dst = np.arange(count)[::-1]
            pair.here.call(invoke, "pull_blocks", key, Named("large"), src, dst)
        else:
            src = dst = [0]
            pair.here.call(invoke, "pull_cache", CacheKeyByIdAndIndex(pair.there.cluster_id, cache_id), Named("large"))
        assert pair.here.call(arrived, dst, src, stride, count * stride, 1)
        assert pair.there.call(is_untouched, 1)
    finally:
        pair.here.call(give_back)
        pair.there.call(give_back)


@pytest.mark.parametrize("is_registered", [False, True], ids=["pool", "registered"])
@pytest.mark.parametrize("is_paged", [False, True], ids=["contiguous", "paged"])
@pytest.mark.parametrize("num_bytes", SIZES)
def test_sizes(pair, num_bytes, is_paged, is_registered):
    move(pair, num_bytes, is_paged, is_registered)


# Private memory over the path that copies it directly, pools over the others.
@pytest.mark.parametrize("is_paged", [False, True], ids=["contiguous", "paged"])
def test_256_mib(pair, is_paged):
    move(pair, BIG, is_paged, pair.path == "cma")


# --------------------------------------------------------------------------------------------------- many of a kind

def test_many_tensors(pair):
    """More than fit into one message of most protocols; none of them at an even step."""
    spec = Spec(3000, 2, (24,), is_registered=True)
    with pair.scene() as scene:
        made, source = scene.make(pair.there, "src", spec)
        _, target = scene.make(pair.here, "dst", spec._replace(seed=1))
        pair.here.call(invoke, "pull_cache", CacheKeyByIdAndIndex(pair.there.cluster_id, made.cache_id, 1),
                       Named("dst"), 1)
        for to, of in zip(target.tensors, source.tensors):
            to[24:] = of[24:]
        scene.check()


def test_many_blocks(pair):
    """20000 pairs that do not merge."""
    count, stride = 20000, 40
    key = BlocksCacheKey(pair.there.cluster_id, 2)
    blocks = np.arange(count)
    shuffled = np.random.default_rng(0).permutation(count)
    with pair.scene() as scene:
        _, source = scene.make(pair.there, "src", Spec(2, count, (stride,), is_blocks=True, keys=(key,)))
        _, target = scene.make(pair.here, "dst", Spec(2, count, (stride,), is_blocks=True, seed=1))
        pair.here.call(invoke, "pull_blocks", key, Named("dst"), blocks, shuffled)
        for to, of in zip(target.tensors, source.tensors):
            np.frombuffer(to, np.uint8).reshape(count, stride)[shuffled] = np.frombuffer(of, np.uint8).reshape(
                count, stride)
        scene.check()


def test_large_blocks_that_repeat(pair):
    """Copies that would run side by side, to one and the same block: the last of the list counts."""
    stride, count = MIB // 2, 24
    key = BlocksCacheKey(pair.there.cluster_id, 3)
    src, dst = np.arange(count), np.array([0, 1] * (count // 2))
    try:
        pair.there.call(make, count, stride, True, False, key, 1)
        pair.here.call(make, 3, stride, True, False, None, 10**9)
        for _ in range(3):
            pair.here.call(invoke, "pull_blocks", key, Named("large"), src, dst)
            assert pair.here.call(arrived, [0, 1], [count - 2, count - 1], stride, count * stride, 1)
    finally:
        pair.here.call(give_back)
        pair.there.call(give_back)


def test_many_caches(pair):
    """Caches registered one after the other while the link is up, each of them pulled; some go in between."""
    with pair.scene() as scene:
        _, target = scene.make(pair.here, "dst", Spec(1, 1, (50,)))
        for number in range(150):
            spec = Spec(1, 1, (50,), is_registered=number % 3 != 0, seed=number)
            made, source = scene.make(pair.there, number, spec)
            pair.here.call(invoke, "pull_cache", CacheKeyByIdAndIndex(pair.there.cluster_id, made.cache_id),
                           Named("dst"))
            target.tensors[0][:] = source.tensors[0]
            if number % 4 == 0:
                scene.forget(number)
        scene.check()
