"""Memory registered in unusual ways: twice, overlapping, inside a pool, again elsewhere, or not there at all."""
import ctypes
import mmap
import os
from typing import Any, NamedTuple

import numpy as np
import pytest
from support import reference
from support.peer import Peers
from transfers.caches import GUARD, Named, Spec, bytes_at, drop_all, invoke, make
from transfers.pair import linked_pair
from transfers.refusal import INVALID, NOT_EXIST, refused

from llm_datadist import BlocksCacheKey, CacheDesc, CacheKey, CacheKeyByIdAndIndex, DataType, LLMStatusCode
from llm_datadist.status import LLMException

SIZE = 10000


@pytest.fixture(scope="module", params=["shm", "cma", "tcp"])
def pair(request):
    with Peers() as peers:
        yield linked_pair(peers, True, request.param)


@pytest.fixture(autouse=True)
def nothing_is_left(pair):
    yield
    for process in (pair.here, pair.there):
        if process.is_running:
            process.call(forget_all)


class Plain(NamedTuple):
    """A cache whose memory is the business of the test."""

    cache: Any
    memory: Any


def register(node, name, addr, num_bytes, memory=None):
    """Register one tensor of bytes at `addr`."""
    cache = node.cache_manager.register_cache(CacheDesc(1, [1, num_bytes], DataType.DT_UINT8), [addr])
    node.kept[name] = Plain(cache, memory)
    return cache.cache_id


def forget(node, name):
    node.cache_manager.unregister_cache(node.kept.pop(name).cache.cache_id)


def forget_all(node):
    for name in [name for name, kept in node.kept.items() if isinstance(kept, Plain)]:
        forget(node, name)
    node.kept.pop("buffer", None)
    drop_all(node)


def buffer(node, seed=0):
    """Make a buffer of known bytes and return its address."""
    node.kept["buffer"] = np.frombuffer(np.random.default_rng(seed).bytes(SIZE), np.uint8).copy()
    return node.kept["buffer"].ctypes.data


def buffer_bytes(node):
    return node.kept["buffer"].tobytes()


def pull(pair, cache_id, num_bytes):
    """Pull a cache there into private memory here and return its bytes."""
    memory = np.full(num_bytes + 2, GUARD, np.uint8)
    pair.here.call(register, "pulled", memory.ctypes.data + 1, num_bytes)
    try:
        pair.here.call(invoke, "pull_cache", CacheKeyByIdAndIndex(pair.there.cluster_id, cache_id), Named("pulled"))
    finally:
        pair.here.call(forget, "pulled")
    assert memory[0] == memory[-1] == GUARD
    return memory[1:-1].tobytes()


def test_the_path_is_the_one_asked_for(pair):
    """What the other tests of this directory say about paths rests on this."""
    made = pair.there.call(make, "src", Spec(1, 1, (SIZE,)))
    pull(pair, made.cache_id, SIZE)
    shared = memory_files(os.getpid()) & memory_files(pair.there.pid)
    watched = any("pidfd" in os.readlink(f"/proc/self/fd/{fd}") for fd in open_files())
    assert (bool(shared), watched) == {"shm": (True, True), "cma": (False, True), "tcp": (False, False)}[pair.path]


def memory_files(pid):
    """Inodes of the provider's memory that a process has mapped."""
    with open(f"/proc/{pid}/maps") as maps:
        return {line.split()[4] for line in maps if "memfd:llm_datadist " in line}


def open_files():
    return [fd for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}") or
            os.path.islink(f"/proc/self/fd/{fd}")]


def test_the_same_memory_twice(pair):
    """Either cache goes without the other."""
    addr = pair.there.call(buffer)
    content = pair.there.call(buffer_bytes)
    first, second = (pair.there.call(register, name, addr, SIZE) for name in ("first", "second"))
    assert pull(pair, first, SIZE) == pull(pair, second, SIZE) == content
    pair.there.call(forget, "first")
    refused(NOT_EXIST, pull, pair, first, SIZE, names=first)
    assert pull(pair, second, SIZE) == content


def test_memory_that_overlaps(pair):
    """Shifted, contained, and adjacent; whatever goes first takes nothing from the others."""
    addr = pair.there.call(buffer)
    content = pair.there.call(buffer_bytes)
    spans = {"whole": (0, SIZE), "head": (0, 5000), "middle": (1, 7001), "tail": (5000, SIZE)}
    ids = {name: pair.there.call(register, name, addr + begin, end - begin) for name, (begin, end) in spans.items()}
    for gone in ("whole", "middle", "head"):
        for name in ids:
            begin, end = spans[name]
            assert pull(pair, ids[name], end - begin) == content[begin:end]
        pair.there.call(forget, gone)
        del ids[gone]
    assert pull(pair, ids["tail"], SIZE - 5000) == content[5000:]


def test_memory_of_a_pool_registered_again(pair):
    """An engine that cuts its own pieces out of a cache it allocated."""
    made = pair.there.call(make, "src", Spec(1, 1, (SIZE,)))
    content = Spec(1, 1, (SIZE,)).fill()[0]
    piece = pair.there.call(register, "piece", made.addrs[0] + 77, 1000)
    assert pull(pair, piece, 1000) == content[77:1077]
    assert pull(pair, made.cache_id, SIZE) == content
    pair.there.call(forget, "piece")
    assert pull(pair, made.cache_id, SIZE) == content


def test_the_same_addresses_again_with_other_sizes(pair):
    """A buffer that is registered, withdrawn and registered anew while the peer keeps its view of it."""
    addr = pair.there.call(buffer)
    content = pair.there.call(buffer_bytes)
    for number, (begin, end) in enumerate([(0, 100), (0, SIZE), (50, 60), (0, 100), (0, SIZE), (SIZE - 1, SIZE)]):
        cache_id = pair.there.call(register, number, addr + begin, end - begin)
        assert pull(pair, cache_id, end - begin) == content[begin:end]
        pair.there.call(forget, number)


def test_other_memory_at_the_same_address(pair):
    """Unmapped and mapped again: the bytes are those that are there now."""
    addr = pair.there.call(map_at, None, b"a")
    for letter in (b"a", b"b", b"c"):
        assert pair.there.call(map_at, addr, letter) == addr
        cache_id = pair.there.call(register, letter, addr, SIZE)
        assert pull(pair, cache_id, SIZE) == letter * SIZE
        pair.there.call(forget, letter)


def map_at(node, addr, letter):
    """Map fresh pages, at `addr` in place of what is there, fill them, and return where they are."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    fixed = 0x10 if addr else 0
    got = libc.mmap(addr, 3 * mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE,
                    mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | fixed, -1, 0)
    assert got not in (None, ctypes.c_void_p(-1).value)
    bytes_at(got, SIZE)[:] = letter[0]
    return got


def test_a_blocks_key_moves_to_the_newest_registration(pair):
    """And goes with it: the older cache does not get it back."""
    key = BlocksCacheKey(pair.there.cluster_id, 6)
    spec = Spec(1, 4, (64,), is_blocks=True, is_registered=True, keys=(key,))
    with pair.scene() as scene:
        _, target = scene.make(pair.here, "dst", Spec(1, 4, (64,), is_blocks=True, seed=9))
        for seed, name in enumerate(("old", "new")):
            _, source = scene.make(pair.there, name, spec._replace(seed=seed))
            pair.here.call(invoke, "pull_blocks", key, Named("dst"), [1], [seed])
            reference.copy_blocks(target, [seed], source, [1])
            scene.check()
        scene.forget("new")
        refused(NOT_EXIST, pair.here.call, invoke, "pull_blocks", key, Named("dst"), [1], [2])
        scene.check()


def test_a_request_key_stays_with_its_first_registration(pair):
    """Also when the second cache goes; with the first, the key is gone."""
    key = CacheKey(pair.there.cluster_id, 8)
    spec = Spec(1, 2, (64,), is_registered=True, keys=(key,))
    with pair.scene() as scene:
        _, source = scene.make(pair.there, "first", spec)
        scene.make(pair.there, "second", spec._replace(seed=1))
        _, target = scene.make(pair.here, "dst", Spec(1, 1, (64,), is_blocks=True, seed=9))
        for _ in range(2):
            pair.here.call(invoke, "pull_blocks", key, Named("dst"), [], [0])
            reference.cut_slot(target, [0], source, 0)
            scene.check()
            if pair.there.stats()["registered_caches"] == 2:
                scene.forget("second")
        scene.forget("first")
        refused(NOT_EXIST, pair.here.call, invoke, "pull_blocks", key, Named("dst"), [], [0])


# --------------------------------------------------------------------------------------------- memory that is not there

@pytest.mark.parametrize("where", ["page 1", "kernel", "hole"])
def test_source_that_is_not_there(pair, where):
    """The pull fails, the owner lives, and the next pull makes the link anew."""
    if where == "hole":
        cache_id = pair.there.call(register_hole, 256 << 10)
        num_bytes = 256 << 10
    else:
        cache_id = pair.there.call(register, "bad", 4096 if where == "page 1" else 2**63 + 4096, SIZE)
        num_bytes = SIZE
    made = pair.there.call(make, "good", Spec(1, 1, (SIZE,)))
    refused(LLMStatusCode.LLM_FAILED, pull, pair, cache_id, num_bytes)
    assert pull(pair, made.cache_id, SIZE) == Spec(1, 1, (SIZE,)).fill()[0]


def register_hole(node, num_bytes):
    """Register memory of which the second half may not be touched."""
    memory = mmap.mmap(-1, num_bytes)
    addr = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    _protect(addr + num_bytes // 2, num_bytes // 2, 0)
    return register(node, "bad", addr, num_bytes, memory)


def test_destination_that_may_only_be_read(pair):
    """The caller is told, and lives; nothing was written."""
    made = pair.there.call(make, "src", Spec(1, 1, (SIZE,)))
    try:
        assert pair.here.call(pull_into_read_only, pair.there.cluster_id, made.cache_id) in (LLMStatusCode.LLM_FAILED,
                                                                                            INVALID)
    finally:
        pair.link_again()
    assert pull(pair, made.cache_id, SIZE) == Spec(1, 1, (SIZE,)).fill()[0]


def pull_into_read_only(node, cluster_id, cache_id):
    memory = mmap.mmap(-1, SIZE)
    addr = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    register(node, "read only", addr, SIZE, memory)
    _protect(addr, len(memory), mmap.PROT_READ)
    try:
        node.cache_manager.pull_cache(CacheKeyByIdAndIndex(cluster_id, cache_id), node.kept["read only"].cache)
    except LLMException as error:
        assert memory[:] == bytes(SIZE)
        return error.status_code


def _protect(addr, num_bytes, protection):
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    assert libc.mprotect(addr, num_bytes, protection) == 0


def test_destination_that_is_not_there(pair):
    """Nothing is mapped at the address: the caller is told, and lives."""
    made = pair.there.call(make, "src", Spec(1, 1, (SIZE,)))
    pair.here.call(register, "nowhere", 4096, SIZE)
    try:
        with pytest.raises(LLMException) as caught:
            pair.here.call(invoke, "pull_cache", CacheKeyByIdAndIndex(pair.there.cluster_id, made.cache_id),
                           Named("nowhere"))
        assert caught.value.status_code in (LLMStatusCode.LLM_FAILED, INVALID)
    finally:
        pair.link_again()
    assert pull(pair, made.cache_id, SIZE) == Spec(1, 1, (SIZE,)).fill()[0]
