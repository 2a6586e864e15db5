"""Memory of the `CacheManager`: every row of the API's error tables on it, and its effect in one process.

Bytes that move are compared in ``transfers/``; here a refused call leaves all of them, and everything else, alone.
"""
import gc
import threading

import numpy as np
import pytest
from support.engines import (
    BLOCKS,
    BY_ID,
    BYTES,
    CLUSTER,
    KEY,
    NO_ID,
    NOT_INT64,
    NOT_UINT32,
    NOT_UINT64,
    PREFIX,
    SLOT_BYTES,
    SLOTS,
    TENSORS,
    Synchronizer,
    desc,
    refused,
    rows,
)
from support.peer import engine_options, finalize
from transfers.caches import bytes_at

from llm_datadist import (
    BlocksCacheKey,
    Cache,
    CacheDesc,
    CacheKey,
    CacheKeyByIdAndIndex,
    MemInfo,
    Memtype,
    Placement,
    TransferConfig,
)
from llm_datadist.status import LLMMemoryError

HOST = Placement.HOST


@pytest.fixture
def bench(benches):
    return benches("pools")


# --------------------------------------------------------------------------------------------------------- allocation

@pytest.mark.parametrize("engine, call, kind", rows(
    (lambda b: b.m.allocate_cache("desc"), "TE"),
    (lambda b: b.m.allocate_cache(None), "AE"),
    (lambda b: b.m.allocate_cache(desc(), CacheKey(1, 1)), "TE"),
    (lambda b: b.m.allocate_cache(desc(), None), "TE"),
    (lambda b: b.m.allocate_cache(desc(), {CacheKey(1, 1)}), "TE"),
    (lambda b: b.m.allocate_cache(desc(), [CacheKey(1, 1), None]), "TE"),
    (lambda b: b.m.allocate_cache(desc(), [BlocksCacheKey(1)]), "TE"),
    (lambda b: b.m.allocate_cache(desc(), [CacheKeyByIdAndIndex(1, 1)]), "TE"),
    (lambda b: b.m.allocate_cache(desc(num_tensors=0)), "PI"),
    (lambda b: b.m.allocate_cache(desc(shape=[1] * 32)), "PI"),
    (lambda b: b.m.allocate_cache(desc(shape=[2, 0])), "PI"),
    (lambda b: b.m.allocate_cache(desc(shape=[2**40, 2**40])), "PI"),
    (lambda b: b.m.allocate_cache(CacheDesc(1, [2, 2], None)), "PI"),
    (lambda b: b.m.allocate_cache(desc()), "PI", "bare"),
    (lambda b: b.m.allocate_cache(desc(placement=HOST)), "PI", "bare"),
    (lambda b: b.m.allocate_cache(desc(placement=HOST)), "PI", "device only"),
    (lambda b: b.m.allocate_cache(desc(), [CacheKey(1, i) for i in range(SLOTS + 1)]), "PI"),
    (lambda b: b.m.allocate_cache(desc(), [CacheKey(1, NO_ID)] * (SLOTS + 1)), "PI"),
    (lambda b: b.m.allocate_cache(desc(), [CacheKey(1, 5), CacheKey(2, 5)]), "PI"),
    (lambda b: b.m.allocate_cache(desc(), [CacheKey(1, 5), CacheKey(1, 6), CacheKey(1, 5)]), "PI"),
    (lambda b: b.m.allocate_cache(desc(), [PREFIX, PREFIX]), "PI"),
    (lambda b: b.m.allocate_cache(desc(shape=[1, 2 << 20])), "OUT_OF_MEMORY"),
    (lambda b: b.m.allocate_cache(desc(shape=[1, 2 << 20], placement=HOST), [CacheKey(1, 1)]), "OUT_OF_MEMORY"),
    (lambda b: b.m.allocate_cache(desc(num_tensors=2**32 - 1)), "PI"),
    (lambda b: b.m.allocate_cache(desc(shape=[1, 2**62])), "OUT_OF_MEMORY"),
    (lambda b: b.m.allocate_blocks_cache("desc"), "TE"),
    (lambda b: b.m.allocate_blocks_cache(None), "AE"),
    (lambda b: b.m.allocate_blocks_cache(desc(), CacheKey(1, 1)), "TE"),
    (lambda b: b.m.allocate_blocks_cache(desc(), [BlocksCacheKey(1)]), "TE"),
    (lambda b: b.m.allocate_blocks_cache(desc(num_tensors=0)), "PI"),
    (lambda b: b.m.allocate_blocks_cache(desc(shape=[1] * 32)), "PI"),
    (lambda b: b.m.allocate_blocks_cache(desc()), "PI", "bare"),
    (lambda b: b.m.allocate_blocks_cache(desc(placement=HOST)), "PI", "device only"),
    (lambda b: b.m.allocate_blocks_cache(desc(), BlocksCacheKey(1, None)), "PI"),
    (lambda b: b.m.allocate_blocks_cache(desc(), BlocksCacheKey(1, -1)), "PI"),
    (lambda b: b.m.allocate_blocks_cache(desc(), BlocksCacheKey(1, 2**64)), "PI"),
    (lambda b: b.m.allocate_blocks_cache(desc(shape=[1, 2 << 20]), BLOCKS), "OUT_OF_MEMORY"),
))
def test_allocation_refuses(benches, assert_raises, engine, call, kind):
    refused(benches, assert_raises, engine, call, kind)


@pytest.mark.parametrize("key", [CacheKey(1, 5), CacheKey(1, 5, 9), CacheKey(1, 7, 0, 5), CacheKey(1, NO_ID, 9, 5)])
def test_a_bound_key_is_refused_until_it_is_removed(bench, assert_raises, key):
    cache = bench.m.allocate_cache(desc(), [CacheKey(1, NO_ID), key])
    with bench.unchanged():
        assert_raises("PI", bench.m.allocate_cache, desc(), [CacheKey(2, 3), key])
    bench.m.remove_cache_key(key)
    again = bench.m.allocate_cache(desc(), [key])
    bench.m.remove_cache_key(key)
    for each in (cache, again):
        bench.m.deallocate_cache(each)


def test_a_bound_blocks_key_is_refused(bench, assert_raises):
    cache = bench.m.allocate_blocks_cache(desc(), BlocksCacheKey(1, 4))
    with bench.unchanged():
        assert_raises("PI", bench.m.allocate_blocks_cache, desc(), BlocksCacheKey(2, 4))
    other = bench.m.allocate_blocks_cache(desc(), BlocksCacheKey(1, 5))
    for each in (cache, other):
        bench.m.deallocate_blocks_cache(each)


def test_keys_of_different_kinds_and_models_are_different(bench):
    keys = [CacheKey(1, 5), CacheKey(1, 5, 1), CacheKey(1, 0, 0, 5), CacheKey(1, 0, 1, 5)]
    with bench.unchanged():
        cache = bench.m.allocate_cache(desc(shape=[4, 8]), keys)
        assert bench.dist.stats()["keys"] == 4
        bench.m.deallocate_cache(cache)
        assert bench.dist.stats()["keys"] == 4
        for key in keys:
            bench.m.remove_cache_key(key)


def test_padding_keys_bind_nothing(bench):
    with bench.unchanged():
        cache = bench.m.allocate_cache(desc(), [CacheKey(1, NO_ID)] * SLOTS)
        assert bench.dist.stats()["keys"] == 0
        bench.m.deallocate_cache(cache)


def test_cache_ids_count_up_over_both_ways_to_make_a_cache(bench):
    first = bench.m.allocate_cache(desc())
    second = bench.m.register_cache(desc(), bench.addrs())
    third = bench.m.allocate_blocks_cache(desc())
    assert 0 < first.cache_id < second.cache_id < third.cache_id
    bench.m.deallocate_cache(first)
    bench.m.unregister_cache(second.cache_id)
    bench.m.deallocate_blocks_cache(third)


def test_the_descriptor_of_the_caller_is_left_alone(bench):
    mine = desc()
    text = repr(mine)
    blocks = bench.m.allocate_blocks_cache(mine)
    slots = bench.m.allocate_cache(mine)
    assert repr(mine) == text and slots.cache_desc is mine
    assert (blocks.is_blocks_cache, slots.is_blocks_cache) == (True, False)
    bench.m.deallocate_blocks_cache(blocks)
    bench.m.deallocate_cache(slots)


@pytest.mark.parametrize("placement", [Placement.DEVICE, Placement.HOST])
def test_an_allocated_cache_is_memory(bench, placement):
    cache = bench.m.allocate_cache(desc(placement=placement))
    assert len(cache.tensor_addrs) == TENSORS and all(address % 64 == 0 for address in cache.tensor_addrs)
    assert repr(cache) == (f"Cache(cache_id = {cache.cache_id}, device_tensor_addrs = {TENSORS}, "
                           f"is_blocks_cache = False)")
    for index, tensor in enumerate(cache.tensors()):
        tensor[:] = index
        assert bytes_at(cache.tensor_addrs[index], SLOTS * SLOT_BYTES).tolist() == [index] * SLOTS * SLOT_BYTES
    del tensor
    bench.m.deallocate_cache(cache)


def test_exhaustion_takes_nothing_and_the_pool_serves_again(bench):
    one = CacheDesc(1, [1, 64 << 10], BYTES)
    with bench.unchanged():
        taken = []
        with pytest.raises(LLMMemoryError):
            while True:
                taken.append(bench.m.allocate_cache(one))
        assert bench.dist.stats()["device_pool"]["free_bytes"] < 64 << 10
        for cache in taken:
            bench.m.deallocate_cache(cache)


def test_dropping_a_handle_frees_nothing(bench):
    before = bench.dist.stats()["caches"]
    cache_id = bench.m.allocate_cache(desc()).cache_id
    gc.collect()
    assert bench.dist.stats()["caches"] == before + 1
    bench.m.deallocate_cache(Cache(cache_id, desc(), [], bench.m, False, False))
    assert bench.dist.stats()["caches"] == before


# ------------------------------------------------------------------------------------------------------- deallocation

@pytest.mark.parametrize("engine, call, kind", rows(
    (lambda b: b.m.deallocate_cache(1), "TE"),
    (lambda b: b.m.deallocate_cache(None), "AE"),
    (lambda b: b.m.deallocate_cache(b.blocks), "PI"),
    (lambda b: b.m.deallocate_cache(b.cpu), "PI"),
    (lambda b: b.m.deallocate_blocks_cache(1), "TE"),
    (lambda b: b.m.deallocate_blocks_cache(None), "AE"),
    (lambda b: b.m.deallocate_blocks_cache(b.slots), "PI"),
    (lambda b: b.m.deallocate_blocks_cache(b.registered), "NOT_ENABLED", "bare"),
    (lambda b: b.m.deallocate_cache(Cache(1, desc(), [1] * 4, b.m, False, False)), "NOT_ENABLED", "bare"),
    (lambda b: b.m.remove_cache_key(1), "TE"),
    (lambda b: b.m.remove_cache_key(None), "AE"),
    (lambda b: b.m.remove_cache_key(BLOCKS), "TE"),
    (lambda b: b.m.remove_cache_key(BY_ID), "TE"),
    (lambda b: b.m.remove_cache_key(KEY), "NOT_ENABLED", "bare"),
))
def test_deallocation_refuses(benches, assert_raises, engine, call, kind):
    refused(benches, assert_raises, engine, call, kind)


def test_deallocate_twice_and_of_the_unknown(bench):
    with bench.unchanged():
        cache = bench.m.allocate_cache(desc())
        bench.m.deallocate_cache(cache)
        assert cache.tensor_addrs == []
        bench.m.deallocate_cache(cache)
        bench.m.deallocate_cache(Cache(10**6, desc(), [1] * TENSORS, bench.m, False, False))
        blocks = bench.m.allocate_blocks_cache(desc(), BLOCKS)
        bench.m.deallocate_blocks_cache(blocks)
        bench.m.deallocate_blocks_cache(blocks)
        assert blocks.tensor_addrs == []


def test_deallocate_of_a_registered_cache_only_empties_the_handle(bench):
    cache = bench.m.register_cache(desc(), bench.addrs())
    held = bench.dist.stats()["registered_caches"]
    bench.m.deallocate_cache(cache)
    assert cache.tensor_addrs == [] and bench.dist.stats()["registered_caches"] == held
    bench.m.unregister_cache(cache.cache_id)
    assert bench.dist.stats()["registered_caches"] == held - 1


@pytest.mark.parametrize("engine", ["pools", "bare"])
def test_deallocate_of_a_cpu_cache_has_nothing_to_free(benches, engine):
    bench = benches(engine)
    cpu = Cache.create_cpu_cache(desc(placement=HOST), bench.addrs())
    with bench.unchanged():
        bench.m.deallocate_blocks_cache(cpu)
        assert cpu.tensor_addrs == []
        bench.m.deallocate_blocks_cache(cpu)


def test_a_deallocated_cache_stays_while_a_key_is_bound(bench):
    with bench.unchanged():
        keys = [CacheKey(1, 11), CacheKey(1, NO_ID, 0, 12)]
        cache = bench.m.allocate_cache(desc(), keys)
        bench.m.deallocate_cache(cache)
        assert bench.dist.stats()["deferred_caches"] == 1
        bench.m.deallocate_cache(cache)
        bench.m.remove_cache_key(keys[0])
        assert (bench.dist.stats()["deferred_caches"], bench.dist.stats()["keys"]) == (1, 1)
        bench.m.remove_cache_key(keys[1])


def test_remove_cache_key_after_deallocation_and_of_the_unknown(bench):
    with bench.unchanged():
        cache = bench.m.allocate_cache(desc(), [CacheKey(1, 21)])
        bench.m.remove_cache_key(CacheKey(99, 21))              # whatever cluster it names
        bench.m.deallocate_cache(cache)
        bench.m.remove_cache_key(CacheKey(1, 21))
        bench.m.remove_cache_key(CacheKey(1, 10**9))
        bench.m.remove_cache_key(CacheKey(1, NO_ID))


def test_a_blocks_cache_goes_with_its_key(bench):
    with bench.unchanged():
        bench.m.deallocate_blocks_cache(bench.m.allocate_blocks_cache(desc(), BlocksCacheKey(1, 8)))
        assert bench.dist.stats()["keys"] == 0


# ------------------------------------------------------------------------------------------------------- registration

@pytest.mark.parametrize("register", ["register_cache", "register_blocks_cache"])
@pytest.mark.parametrize("arguments, kind", [
    (lambda b: ("desc", b.addrs()), "TE"), (lambda b: (None, b.addrs()), "AE"),
    (lambda b: (desc(), None), "TE"), (lambda b: (desc(), tuple(b.addrs())), "TE"), (lambda b: (desc(), 4096), "TE"),
    (lambda b: (desc(), ["1", "2", "3", "4"]), "TE"), (lambda b: (desc(), [1.0, 2.0, 3.0, 4.0]), "TE"),
    (lambda b: (desc(), [None] * 4), "TE"), (lambda b: (desc(), list(np.array(b.addrs()))), "TE"),
    (lambda b: (desc(), list(np.array(b.addrs(), np.float64))), "TE"), (lambda b: (desc(), [np.bool_(True)] * 4), "TE"),
    (lambda b: (desc(), b.addrs(), "key"), "TE"),
    (lambda b: (desc(), []), "PI"), (lambda b: (desc(), b.addrs(3)), "PI"), (lambda b: (desc(), b.addrs(5)), "PI"),
    (lambda b: (desc(), [*b.addrs(3), 0]), "PI"), (lambda b: (desc(), [*b.addrs(3), -1]), "PI"),
    (lambda b: (desc(), [*b.addrs(3), 2**64]), "PI"),
    (lambda b: (desc(num_tensors=0), []), "PI"), (lambda b: (desc(shape=[1] * 32), b.addrs()), "PI"),
    (lambda b: (desc(shape=[3, -1]), b.addrs()), "PI"),
])
@pytest.mark.parametrize("engine", ["pools", "bare"])
def test_registration_refuses(benches, assert_raises, engine, register, arguments, kind):
    refused(benches, assert_raises, engine, lambda b: getattr(b.m, register)(*arguments(b)), kind)


@pytest.mark.parametrize("engine, call, kind", rows(
    (lambda b: b.m.register_cache(desc(), b.addrs(), None), "TE"),
    (lambda b: b.m.register_cache(desc(), b.addrs(), [BLOCKS]), "TE"),
    (lambda b: b.m.register_cache(desc(), b.addrs(), (), "yes"), "TE"),
    (lambda b: b.m.register_cache(desc(), b.addrs(), remote_accessible=1), "TE"),
    (lambda b: b.m.register_cache(desc(), b.addrs(), [CacheKey(1, i) for i in range(SLOTS + 1)]), "PI"),
    (lambda b: b.m.register_blocks_cache(desc(), b.addrs(), KEY), "TE"),
    (lambda b: b.m.register_blocks_cache(desc(), b.addrs(), [BLOCKS]), "TE"),
    (lambda b: b.m.register_blocks_cache(desc(), b.addrs(), None, 0), "TE"),
    (lambda b: b.m.register_blocks_cache(desc(), b.addrs(), BlocksCacheKey(1, None)), "PI"),
    (lambda b: b.m.register_blocks_cache(desc(), b.addrs(), BlocksCacheKey(1, -3)), "PI"),
    (lambda b: b.m.register_blocks_cache(desc(), b.addrs(), BlocksCacheKey(1, 2**64)), "PI"),
    *((lambda b, value=value: b.m.unregister_cache(value), kind) for value, kind in NOT_INT64),
))
def test_registration_refuses_more(benches, assert_raises, engine, call, kind):
    refused(benches, assert_raises, engine, call, kind)


@pytest.mark.parametrize("placement", [Placement.DEVICE, Placement.HOST])
@pytest.mark.parametrize("engine", ["pools", "remote", "bare"])
def test_remote_accessible_follows_placement_and_link(benches, monkeypatch, assert_raises, engine, placement):
    bench = benches(engine)
    engine_of = bench.dist._require_engine()
    told = []

    class Recorder:
        def __getattr__(self, name):
            return getattr(engine_of, name)

        def register(self, *arguments):
            assert arguments[3] is (placement is HOST)
            told.append(arguments[6])
            return engine_of.register(*arguments)

    monkeypatch.setattr(bench.m, "_llm_engine", Recorder())
    monkeypatch.setattr(bench.m, "_linked", False)

    def made(remote_accessible=None):
        cache = bench.m.register_cache(desc(placement=placement), bench.addrs(), (), remote_accessible)
        bench.m.unregister_cache(cache.cache_id)
        return told[-1]

    with bench.unchanged():
        assert made() is (placement is Placement.DEVICE)
        assert made(True) is True and made(False) is False
        bench.m.set_is_call_linked()
        assert made() is False and made(False) is False
        assert_raises("PI", made, True)


def test_a_registered_key_stays_with_its_first_cache(bench):
    with bench.unchanged():
        first = bench.m.register_cache(desc(), bench.addrs(), [CacheKey(1, 31)])
        second = bench.m.register_cache(desc(), bench.addrs(), [CacheKey(1, 31), CacheKey(1, 32)])
        keys = {row["cache_id"]: row["keys"] for row in bench.dist._require_engine().caches()}
        assert (keys[first.cache_id], keys[second.cache_id]) == (1, 1)
        for cache in (first, second):
            bench.m.unregister_cache(cache.cache_id)


def test_a_registered_blocks_key_moves_to_the_newest_cache(bench):
    with bench.unchanged():
        caches = [bench.m.register_blocks_cache(desc(), bench.addrs(), BlocksCacheKey(1, 33)) for _ in range(2)]
        keys = {row["cache_id"]: row["keys"] for row in bench.dist._require_engine().caches()}
        assert [keys[cache.cache_id] for cache in caches] == [0, 1]
        for cache in caches:
            bench.m.unregister_cache(cache.cache_id)


def test_unregister_of_the_unknown_and_of_an_allocated_cache(bench):
    with bench.unchanged():
        for cache_id in (0, -1, 10**6, 2**63 - 1, -2**63, bench.slots.cache_id, bench.blocks.cache_id):
            bench.m.unregister_cache(cache_id)


class Owner:
    """Holds memory, and says when it is gone."""

    def __init__(self, gone):
        self.array = np.zeros((SLOTS, SLOT_BYTES), np.uint8)
        self.gone = gone

    @property
    def __array_interface__(self):
        return self.array.__array_interface__

    def __del__(self):
        self.gone.append(True)


def test_objects_that_hold_memory_are_kept_until_unregistered(bench):
    gone = []
    with bench.unchanged():
        cache = bench.m.register_cache(desc(num_tensors=1), [Owner(gone)])
        gc.collect()
        assert gone == [] and len(cache.tensor_addrs) == 1
        cache.tensors()[0][:] = 5
        bench.m.unregister_cache(cache.cache_id)
        gc.collect()
        assert gone == [True]


def test_register_needs_no_pool(benches):
    bench = benches("bare")
    with bench.unchanged():
        cache = bench.m.register_cache(desc(), bench.addrs(), [KEY])
        assert cache.is_registered and cache.cache_id >= 1
        bench.m.unregister_cache(cache.cache_id)


# --------------------------------------------------------------------------------------------------- local operations

def copy(**kwargs):
    """A copy_cache that is right but for `kwargs`."""
    return lambda b: b.m.copy_cache(**{"dst": b.slots, "src": b.host_slots, **kwargs})


@pytest.mark.parametrize("engine, call, kind", rows(
    (copy(dst="cache"), "TE"), (copy(src="cache"), "TE"), (copy(dst=None), "AE"), (copy(src=None), "AE"),
    *((copy(dst_batch_index=value), kind) for value, kind in NOT_UINT32),
    *((copy(src_batch_index=value), kind) for value, kind in NOT_UINT32),
    *((copy(offset=value), kind) for value, kind in NOT_UINT64),
    *((copy(size=value), kind) for value, kind in NOT_INT64), (copy(size=0), "PI"), (copy(size=-2), "PI"),
    *((copy(req_id=value), kind) for value, kind in NOT_UINT64 if value is not None),
    (lambda b: b.m.copy_cache(b.blocks, b.slots), "PI"), (lambda b: b.m.copy_cache(b.slots, b.blocks), "PI"),
    (lambda b: b.m.copy_cache(b.cpu, b.slots), "PI"),
    (copy(dst_batch_index=SLOTS), "PI"), (copy(src_batch_index=2**32 - 1), "PI"), (copy(offset=SLOT_BYTES), "PI"),
    (copy(offset=2**64 - 1), "PI"), (copy(size=SLOT_BYTES + 1), "PI"), (copy(offset=1, size=SLOT_BYTES), "PI"),
    (copy(size=2**63 - 1), "PI"),
    (lambda b: b.m.copy_cache(b.slots, Cache(10**6, desc(), [], b.m, False, False)), "NOT_EXIST"),
    (lambda b: b.m.copy_cache(Cache(10**6, desc(), [], b.m, False, False), b.slots), "NOT_EXIST"),
    (lambda b: b.m.copy_blocks("cache", {0: [1]}), "TE"), (lambda b: b.m.copy_blocks(None, {0: [1]}), "AE"),
    (lambda b: b.m.copy_blocks(b.blocks, None), "AE"), (lambda b: b.m.copy_blocks(b.blocks, [(0, 1)]), "TE"),
    (lambda b: b.m.copy_blocks(b.blocks, {"0": [1]}), "TE"), (lambda b: b.m.copy_blocks(b.blocks, {0: 1}), "TE"),
    (lambda b: b.m.copy_blocks(b.blocks, {0: (1,)}), "TE"), (lambda b: b.m.copy_blocks(b.blocks, {0: ["1"]}), "TE"),
    (lambda b: b.m.copy_blocks(b.blocks, {0: [None]}), "TE"), (lambda b: b.m.copy_blocks(b.blocks, {None: [1]}), "TE"),
    (lambda b: b.m.copy_blocks(b.slots, {0: [1]}), "PI"),
    (lambda b: b.m.copy_blocks(b.blocks, {0: [1, SLOTS]}), "PI"),
    (lambda b: b.m.copy_blocks(b.blocks, {SLOTS: []}), "PI"),
    (lambda b: b.m.copy_blocks(b.blocks, {0: [1], 1: [-1]}), "PI"),
    (lambda b: b.m.copy_blocks(b.blocks, {-1: [1]}), "PI"),
    (lambda b: b.m.copy_blocks(b.blocks, {0: [2**70]}), "PI"),
    (lambda b: b.m.copy_blocks(b.cpu, {0: [1]}), "NOT_EXIST"),
    (lambda b: b.m.swap_blocks("cache", b.blocks, {0: 0}), "TE"), (lambda b: b.m.swap_blocks(b.cpu, 1, {0: 0}), "TE"),
    (lambda b: b.m.swap_blocks(None, b.blocks, {0: 0}), "AE"), (lambda b: b.m.swap_blocks(b.cpu, None, {0: 0}), "AE"),
    (lambda b: b.m.swap_blocks(b.cpu, b.blocks, None), "AE"),
    (lambda b: b.m.swap_blocks(b.cpu, b.blocks, [(0, 0)]), "TE"),
    (lambda b: b.m.swap_blocks(b.cpu, b.blocks, {"0": 0}), "TE"),
    (lambda b: b.m.swap_blocks(b.cpu, b.blocks, {0: [0]}), "TE"),
    (lambda b: b.m.swap_blocks(b.cpu, b.blocks, {0: None}), "TE"),
    (lambda b: b.m.swap_blocks(b.cpu, b.slots, {0: 0}), "PI"),
    (lambda b: b.m.swap_blocks(b.host_slots, b.blocks, {}), "PI"),
    (lambda b: b.m.swap_blocks(b.cpu, b.blocks, {SLOTS: 0}), "PI"),
    (lambda b: b.m.swap_blocks(b.cpu, b.blocks, {0: 1, 1: SLOTS}), "PI"),
    (lambda b: b.m.swap_blocks(b.cpu, b.blocks, {-1: 0}), "PI"),
    (lambda b: b.m.swap_blocks(b.cpu, b.blocks, {0: -1}), "PI"),
    (lambda b: b.m.swap_blocks(b.cpu, b.blocks, {0: 2**70}), "PI"),
    (lambda b: b.m.swap_blocks(b.cpu, b.host_blocks, {0: 0}), "PI"),
    (lambda b: b.m.swap_blocks(b.registered, b.blocks, {0: 0}), "PI"),
    (lambda b: b.m.swap_blocks(b.blocks, b.blocks, {0: 1}), "PI"),
    (lambda b: b.m.swap_blocks(cpu(b, shape=[SLOTS, 8]), b.blocks, {0: 0}), "PI"),
    (lambda b: b.m.swap_blocks(cpu(b, num_tensors=2), b.blocks, {0: 0}), "PI"),
    (lambda b: b.m.swap_blocks(cpu(b, addrs=[0] * 4), b.blocks, {0: 0}), "PI"),
    (lambda b: b.m.swap_blocks(b.blocks, cpu(b, addrs=[*b.addrs(3), 0]), {}), "PI"),
    (lambda b: b.m.swap_blocks(b.blocks, cpu(b, addrs=[*b.addrs(3), -8]), {0: 0}), "PI"),
    (lambda b: b.m.swap_blocks(b.blocks, cpu(b, addrs=[*b.addrs(3), 2**64]), {0: 0}), "PI"),
))
def test_local_operations_refuse(benches, assert_raises, engine, call, kind):
    refused(benches, assert_raises, engine, call, kind)


def cpu(bench, num_tensors=TENSORS, shape=(SLOTS, SLOT_BYTES), addrs=None):
    """A cpu cache."""
    return Cache.create_cpu_cache(desc(num_tensors, shape, HOST), bench.addrs(num_tensors) if addrs is None else addrs)


def test_empty_maps_move_nothing(bench):
    with bench.unchanged():
        bench.m.copy_blocks(bench.blocks, {})
        bench.m.copy_blocks(bench.blocks, {0: []})
        bench.m.swap_blocks(bench.cpu, bench.blocks, {})


def test_copy_and_swap_take_what_the_api_names(bench):
    """Any placement for a copy; registered, allocated and cpu caches for a swap."""
    target = bench.m.allocate_cache(desc(placement=HOST))
    bench.m.copy_cache(target, bench.slots, 1, 2, offset=4, size=8, req_id=NO_ID)
    for mine, theirs in zip(target.tensors(), bench.slots.tensors()):
        assert (mine[1, 4:12] == theirs[2, 4:12]).all()
    del mine, theirs
    bench.m.deallocate_cache(target)
    room = bench.m.allocate_blocks_cache(desc())
    for source in (bench.cpu, bench.host_blocks):
        bench.m.swap_blocks(source, room, {0: 2})
        expected = [bytes_at(address, SLOT_BYTES).tolist() for address in source.tensor_addrs]
        assert [tensor[2].tolist() for tensor in room.tensors()] == expected
    out = cpu(bench)
    bench.m.swap_blocks(bench.registered, out, {1: 0})
    assert [bytes_at(address, SLOT_BYTES).tolist() for address in out.tensor_addrs] == [
        bytes_at(address + SLOT_BYTES, SLOT_BYTES).tolist() for address in bench.registered.tensor_addrs]
    bench.m.deallocate_blocks_cache(room)


@pytest.mark.parametrize("end", ["src", "dst"])
def test_swap_of_what_is_gone(bench, assert_raises, end):
    gone = bench.m.allocate_blocks_cache(desc())
    stale = Cache(gone.cache_id, gone.cache_desc, gone.tensor_addrs, bench.m, False, True)     # a copy of the handle
    registered = bench.m.register_blocks_cache(desc(), bench.addrs())
    bench.m.deallocate_blocks_cache(gone)
    bench.m.unregister_cache(registered.cache_id)
    for cache in (gone, stale, registered):
        ends = (cache, bench.cpu) if end == "src" else (bench.cpu, cache)
        with bench.unchanged():
            assert_raises("NOT_EXIST", bench.m.swap_blocks, *ends, {0: 0})


def test_a_descriptor_that_was_changed_does_not_widen_a_swap(bench, assert_raises):
    """The descriptor is the caller's own: what was allocated bounds the copy."""
    mine = desc()
    cache = bench.m.allocate_blocks_cache(mine)
    mine.update_dim(0, 1000)
    big = cpu(bench, shape=[1000, SLOT_BYTES], addrs=bench.addrs(num_bytes=1000 * SLOT_BYTES))
    with bench.unchanged():
        assert_raises("PI", bench.m.swap_blocks, big, cache, {0: 999})
    bench.m.deallocate_blocks_cache(cache)


@pytest.mark.parametrize("mem_infos", [
    None, 1, "info", (), [], [None], (MemInfo(Memtype.MEM_TYPE_DEVICE, 1, 1),),
    [MemInfo(Memtype.MEM_TYPE_DEVICE, 1, 1), 1],
    MemInfo(Memtype.MEM_TYPE_HOST, 1, 1), MemInfo(None, 1, 1), MemInfo(Memtype.MEM_TYPE_DEVICE, 0, 1),
    MemInfo(Memtype.MEM_TYPE_DEVICE, None, 1), MemInfo(Memtype.MEM_TYPE_DEVICE, -1, 1),
    MemInfo(Memtype.MEM_TYPE_DEVICE, 1, 0), MemInfo(Memtype.MEM_TYPE_DEVICE, 1, -1),
    MemInfo(Memtype.MEM_TYPE_DEVICE, 1, None), [MemInfo(Memtype.MEM_TYPE_DEVICE, 1, 1), MemInfo(None, 1, 1)],
], ids=str)
def test_remap_refuses_everything_alike(bench, assert_raises, mem_infos):
    with bench.unchanged():
        assert_raises("PI", bench.m.remap_registered_memory, mem_infos)


def test_remap_needs_a_link(bench, assert_raises):
    info = MemInfo(Memtype.MEM_TYPE_DEVICE, 4096, 1)
    for infos in (info, [info], [info, info]):
        with bench.unchanged():
            assert_raises("NOT_YET_LINK", bench.m.remap_registered_memory, infos)


# --------------------------------------------------------------------------------------------------------- life cycle

ALL_CALLS = [
    lambda m, c: m.allocate_cache(desc()), lambda m, c: m.allocate_blocks_cache(desc()),
    lambda m, c: m.deallocate_cache(c["slots"]), lambda m, c: m.deallocate_blocks_cache(c["blocks"]),
    lambda m, c: m.remove_cache_key(KEY), lambda m, c: m.register_cache(desc(num_tensors=1), [4096]),
    lambda m, c: m.register_blocks_cache(desc(num_tensors=1), [4096]), lambda m, c: m.unregister_cache(1),
    lambda m, c: m.pull_cache(KEY, c["slots"]), lambda m, c: m.pull_blocks(BLOCKS, c["blocks"], [0], [0]),
    lambda m, c: m.copy_cache(c["slots"], c["slots"], 0, 1), lambda m, c: m.copy_blocks(c["blocks"], {0: [1]}),
    lambda m, c: m.swap_blocks(c["blocks"], c["host"], {0: 0}),
    lambda m, c: m.transfer_cache_async(c["slots"], Synchronizer(), [TransferConfig(7, [1] * TENSORS)]),
    lambda m, c: m.remap_registered_memory(MemInfo(Memtype.MEM_TYPE_DEVICE, 1, 1)),
]


def test_a_manager_of_a_finalised_engine_fails(benches, peers, assert_raises):
    benches.close()
    here = peers.here(CLUSTER, engine_options(device_pool=1 << 20, host_pool=1 << 20, listen=False))
    manager = here.node.cache_manager
    made = {"slots": manager.allocate_cache(desc()), "blocks": manager.allocate_blocks_cache(desc()),
            "host": manager.allocate_blocks_cache(desc(placement=HOST))}
    assert manager.is_initialized()
    finalize(here.node.dist)
    assert not manager.is_initialized()
    for call in ALL_CALLS:
        assert_raises("FAILED", call, manager, made)


def test_a_handle_of_an_earlier_engine_names_no_cache_of_the_next(benches, peers, assert_raises):
    benches.close()
    here = peers.here(CLUSTER, engine_options(device_pool=1 << 20, listen=False))
    dist = here.node.dist
    old_slots, old_blocks = dist.cache_manager.allocate_cache(desc()), dist.cache_manager.allocate_blocks_cache(desc())
    finalize(dist)
    dist.init(engine_options(device_pool=1 << 20, host_pool=1 << 20, listen=False))
    manager = dist.cache_manager
    slots, blocks = manager.allocate_cache(desc()), manager.allocate_blocks_cache(desc())
    assert (slots.cache_id, blocks.cache_id) == (old_slots.cache_id, old_blocks.cache_id)
    host = manager.allocate_blocks_cache(desc(placement=HOST))
    for call in (lambda: manager.copy_cache(old_slots, slots), lambda: manager.copy_blocks(old_blocks, {0: [1]}),
                 lambda: manager.swap_blocks(old_blocks, host, {0: 0}), lambda: manager.pull_cache(KEY, old_slots),
                 lambda: manager.pull_blocks(BLOCKS, old_blocks, [0], [0])):
        assert_raises("NOT_EXIST", call)
    manager.deallocate_cache(old_slots)
    manager.deallocate_blocks_cache(old_blocks)
    assert dist.stats()["caches"] == 3
    manager.deallocate_cache(slots)
    for cache in (blocks, host):
        manager.deallocate_blocks_cache(cache)


def test_threads_allocate_and_deallocate_at_once(bench):
    failures = []

    def work(number):
        try:
            for turn in range(30):
                key = CacheKey(1, 1000 * number + turn)
                cache = bench.m.allocate_cache(desc(), [key])
                cache.tensors()[0][:] = number
                assert (cache.tensors()[0] == number).all()
                bench.m.copy_cache(cache, cache, 0, 1)
                bench.m.remove_cache_key(key)
                bench.m.deallocate_cache(cache)
        except BaseException as error:
            failures.append(error)

    with bench.unchanged():
        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
