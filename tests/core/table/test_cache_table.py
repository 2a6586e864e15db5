"""Operations of the cache table one by one, their errors and deadlines, and many threads at once."""
import random
import sys
import threading
import time

import pytest

from llm_datadist.status import (
    LLMException,
    LLMMemoryError,
    LLMNotFoundError,
    LLMParamInvalidError,
    LLMStatusCode,
    LLMTimeoutError,
)
from llm_datadist_probes.table import CacheTable, PagePool

KEY_REQ, KEY_PREFIX, KEY_BLOCKS, KEY_BY_ID = range(4)
BLOCKS, HOST, REMOTE, LAST_WINS = 1, 2, 4, 8
NO_ID = 2**64 - 1
BASE, PAGE, NUM_PAGES = 1 << 40, 512, 64


@pytest.fixture
def pool():
    return PagePool(BASE, NUM_PAGES * PAGE, 9)


@pytest.fixture
def table(pool):
    """A table that a test leaves without pins; whatever else is in it goes back to the pool."""
    table = CacheTable()
    yield table
    table.clear(timeout_ms=0)
    stats = table.stats()
    assert not any(value for name, value in stats.items() if name != "key_bytes"), stats
    assert pool.runs() == [(0, NUM_PAGES, False)]


def used_pages(pool):
    return NUM_PAGES - pool.free_bytes // PAGE


def alive(table, cache_id):
    try:
        table.unpin(table.pin_local(cache_id))
    except LLMNotFoundError:
        return False
    return True


# Allocation and keys.

def test_allocate_describes_the_cache(table, pool):
    cache_id, addrs = table.allocate(pool, 4, 3, 1000, [(2, KEY_REQ, 9, 1)], HOST | REMOTE)
    assert cache_id == 1 and addrs == [BASE + i * 1024 for i in range(4)] and used_pages(pool) == 8
    pin = table.resolve(KEY_REQ, 9, 1)
    assert pin._replace(key=None) == (1, 0, pin.generation, 4, 3, 1000, 333, 1024, tuple(addrs), 2, None, KEY_REQ, 0, 0,
                                      True, False, True, True)
    assert pin.key is not None
    table.unpin(pin)


def test_ids_count_up_over_both_sorts(table, pool):
    assert table.allocate(pool, 1, 1, 1)[0] == 1
    assert table.register([4096], 1, 1) == 2
    table.deallocate(1)
    table.unregister(2)
    assert table.allocate(pool, 1, 1, 1)[0] == 3    # never used twice


@pytest.mark.parametrize("num_tensors, num_slots, tensor_bytes", [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_sizes_of_zero_are_refused(table, pool, num_tensors, num_slots, tensor_bytes):
    with pytest.raises(LLMParamInvalidError, match="at least 1"):
        table.allocate(pool, num_tensors, num_slots, tensor_bytes)
    with pytest.raises(LLMParamInvalidError, match="at least 1"):
        table.register([4096] * num_tensors, num_slots, tensor_bytes)


def test_allocate_without_a_pool(table):
    with pytest.raises(LLMParamInvalidError, match="no device memory pool"):
        table.allocate(None, 1, 1, 1)
    with pytest.raises(LLMParamInvalidError, match="no host memory pool"):
        table.allocate(None, 1, 1, 1, flags=HOST)


@pytest.mark.parametrize("keys, flags, message", [
    ([(0, KEY_REQ, 1, 0), (1, KEY_REQ, 2, 0), (2, KEY_REQ, 3, 0)], 0, "3 keys .* batch size of 2"),
    ([(2, KEY_REQ, 77, 0)], 0, "req_id 77 .* slot 2"),
    ([(2**32 - 1, KEY_REQ, 77, 0)], 0, "slot 4294967295"),
    ([(0, KEY_PREFIX, 5, 3), (1, KEY_PREFIX, 5, 3)], 0, "prefix_id 5 of model 3 was given twice"),
    ([(1, KEY_REQ, 5, 3), (1, KEY_REQ, 6, 3)], 0, "two keys .* slot 1"),
    ([(0, KEY_BLOCKS, NO_ID, 0)], 0, "blocks key cannot be bound to a contiguous"),
    ([(0, KEY_BY_ID, 1, 0)], 0, "unknown key"),
    ([(0, KEY_REQ, 1, 0)], BLOCKS, "req_id key cannot be bound to a blocks"),
    ([(1, KEY_BLOCKS, NO_ID, 0)], BLOCKS, "slot 1"),
    ([(0, KEY_BLOCKS, NO_ID, 0), (1, KEY_BLOCKS, NO_ID, 1)], BLOCKS, "2 keys .* batch size of 1"),
])
def test_wrong_keys_change_nothing(table, pool, keys, flags, message):
    for create in (lambda: table.allocate(pool, 1, 2, 64, keys, flags),
                   lambda: table.register([4096], 2, 64, keys, flags)):
        with pytest.raises(LLMParamInvalidError, match=message):
            create()
        assert table.stats()["num_keys"] == 0 and table.snapshot() == [] and pool.free_bytes == NUM_PAGES * PAGE
    assert table.allocate(pool, 1, 2, 64)[0] == 1


def test_duplicate_in_a_list_last_wins_in_the_first_generation(table, pool):
    keys = [(0, KEY_REQ, 5, 0), (1, KEY_REQ, 6, 0), (2, KEY_REQ, 5, 0)]
    cache_id, _ = table.allocate(pool, 1, 3, 64, keys, LAST_WINS)
    assert table.stats()["num_keys"] == 2
    pin = table.resolve(KEY_REQ, 5)
    assert pin.batch_index == 2
    table.unpin(pin)
    pin = table.resolve(KEY_BY_ID, cache_id, 0, 0)
    assert pin.key is None and pin.key_kind == KEY_BY_ID        # slot 0 lost its key
    table.unpin(pin)


def test_same_number_in_other_spaces_is_another_key(table, pool):
    keys = [(0, KEY_REQ, 5, 0), (1, KEY_PREFIX, 5, 0), (2, KEY_REQ, 5, 1), (3, KEY_REQ, NO_ID, 0)]
    table.allocate(pool, 1, 4, 64, keys)
    blocks, _ = table.allocate(pool, 1, 4, 64, [(0, KEY_BLOCKS, NO_ID, 0)], BLOCKS)
    for slot, *key in keys:
        pin = table.resolve(*key)
        assert pin.batch_index == slot
        table.unpin(pin)
    pin = table.resolve(KEY_BLOCKS, NO_ID, 0)
    assert pin.cache_id == blocks
    table.unpin(pin)


@pytest.mark.parametrize("owner", ["allocated", "registered"])
@pytest.mark.parametrize("kind, id, flags", [(KEY_REQ, 5, 0), (KEY_PREFIX, 5, 0), (KEY_BLOCKS, NO_ID, BLOCKS)])
def test_allocate_refuses_a_bound_key(table, pool, owner, kind, id, flags):
    keys = [(0, kind, id, 4)]
    if owner == "allocated":
        first, _ = table.allocate(pool, 1, 2, 64, keys, flags)
    else:
        first = table.register([4096], 2, 64, keys, flags)
    used = used_pages(pool)
    with pytest.raises(LLMParamInvalidError, match=f"{id} of model 4 is bound to cache {first}"):
        table.allocate(pool, 1, 2, 64, keys, flags)
    if not flags:
        with pytest.raises(LLMParamInvalidError):               # a good key before the bad one is undone
            table.allocate(pool, 1, 2, 64, [(0, kind, 6, 4), (1, kind, id, 4)], flags)
    assert table.stats()["num_keys"] == 1 and used_pages(pool) == used
    table.remove_key(kind, id, 4)
    table.allocate(pool, 1, 2, 64, keys, flags)


def test_register_keeps_bound_keys_and_moves_blocks_keys(table, pool):
    owner, _ = table.allocate(pool, 1, 2, 64, [(0, KEY_REQ, 5, 0)])
    later = table.register([4096], 2, 64, [(0, KEY_REQ, 5, 0), (1, KEY_REQ, 6, 0)])
    for id, expected in ((5, owner), (6, later)):
        pin = table.resolve(KEY_REQ, id)
        assert pin.cache_id == expected
        table.unpin(pin)
    blocks = [table.allocate(pool, 1, 2, 64, [(0, KEY_BLOCKS, NO_ID, 0)], BLOCKS)[0]]
    for _ in range(2):
        blocks.append(table.register([8192], 2, 64, [(0, KEY_BLOCKS, NO_ID, 0)], BLOCKS))
        pin = table.resolve(KEY_BLOCKS, NO_ID)
        assert pin.cache_id == blocks[-1]
        table.unpin(pin)
    table.unregister(blocks[1])                                 # it lost the key, so the key stays
    table.unpin(table.resolve(KEY_BLOCKS, NO_ID))
    table.unregister(blocks[2])
    with pytest.raises(LLMNotFoundError):                       # ... and goes with the newest; no older one is revived
        table.resolve(KEY_BLOCKS, NO_ID)


def test_out_of_memory_binds_nothing(table, pool):
    with pytest.raises(LLMMemoryError, match=r"65 tensors of 512 bytes.*largest run has 32768") as caught:
        table.allocate(pool, 65, 1, PAGE, [(0, KEY_REQ, 1, 0)])
    assert caught.value.status_code == LLMStatusCode.LLM_OUT_OF_MEMORY
    assert table.stats()["num_keys"] == 0
    table.allocate(pool, 64, 1, PAGE, [(0, KEY_REQ, 1, 0)])


@pytest.mark.parametrize("addrs, message", [
    ([4096, 0], "address 1 is 0x0"), ([2**64 - 63], "address 0 is 0xffffffffffffffc1"),
])
def test_register_refuses_impossible_addresses(table, addrs, message):
    with pytest.raises(LLMParamInvalidError, match=message):
        table.register(addrs, 1, 64)
    table.register([2**64 - 64], 1, 64)                         # the very end of the address space is a place


# References.

def test_memory_returns_with_handle_and_last_key(table, pool):
    cache_id, _ = table.allocate(pool, 2, 2, 64, [(0, KEY_REQ, 1, 0), (1, KEY_PREFIX, 2, 0)])
    table.deallocate(cache_id)
    table.deallocate(cache_id)                                  # no-op, however often
    assert used_pages(pool) == 2 and table.stats()["num_deferred"] == 1
    assert alive(table, cache_id)                               # deferred caches stay reachable by id
    table.remove_key(KEY_REQ, 1, 0)
    table.remove_key(KEY_REQ, 1, 0)
    assert used_pages(pool) == 2
    table.remove_key(KEY_PREFIX, 2, 0)
    assert used_pages(pool) == 0 and not alive(table, cache_id)
    table.deallocate(cache_id)


def test_keys_may_go_first(table, pool):
    cache_id, _ = table.allocate(pool, 2, 2, 64, [(0, KEY_REQ, 1, 0)])
    table.remove_key(KEY_REQ, 1, 0)
    assert used_pages(pool) == 2
    other, _ = table.allocate(pool, 1, 1, 64, [(0, KEY_REQ, 1, 0)])     # the key is free again
    table.deallocate(cache_id)
    assert used_pages(pool) == 1
    table.unpin(table.resolve(KEY_REQ, 1))
    assert alive(table, other)


def test_blocks_caches_are_not_kept_by_their_key(table, pool):
    cache_id, _ = table.allocate(pool, 2, 8, 64, [(0, KEY_BLOCKS, NO_ID, 0)], BLOCKS)
    table.deallocate(cache_id)
    assert used_pages(pool) == 0
    with pytest.raises(LLMNotFoundError):
        table.resolve(KEY_BLOCKS, NO_ID)
    table.allocate(pool, 2, 8, 64, [(0, KEY_BLOCKS, NO_ID, 0)], BLOCKS)


@pytest.mark.parametrize("flags, keys", [(0, [(0, KEY_REQ, 1, 0)]), (BLOCKS, [(0, KEY_BLOCKS, NO_ID, 0)])])
def test_a_pin_keeps_the_memory(table, pool, flags, keys):
    cache_id, _ = table.allocate(pool, 2, 2, 64, keys, flags)
    pin, again = table.resolve(*keys[0][1:]), table.pin_local(cache_id)
    table.deallocate(cache_id)
    table.remove_key(*keys[0][1:])
    assert used_pages(pool) == 2 and table.stats()["num_deferred"] == 1
    assert not alive(table, cache_id)                           # nobody new gets in
    table.unpin(pin)
    assert used_pages(pool) == 2
    table.unpin(again)
    assert used_pages(pool) == 0
    table.unpin(again)                                          # stale: nothing happens
    reused, _ = table.allocate(pool, 2, 2, 64)
    hold = table.pin_local(reused)
    table.unpin(pin)                                            # same slot, older generation
    assert hold.slot == pin.slot and table.stats()["num_pins"] == 1
    table.unpin(hold)


def test_retired_by_a_pull_and_freed_by_its_pin(table, pool):
    cache_id, _ = table.allocate(pool, 2, 1, 64, [(0, KEY_REQ, 1, 0)])
    first, second = table.resolve(KEY_REQ, 1), table.resolve(KEY_REQ, 1)
    table.deallocate(cache_id)
    table.take(first.key, 0, 2)
    table.unpin(first)
    assert used_pages(pool) == 2                                # the second pull of the same key still reads
    table.take(second.key, 0, 2)
    table.unpin(second)
    assert used_pages(pool) == 0


@pytest.mark.parametrize("num_tensors", [2, 61, 64, 65, 130])
def test_layered_pulls_release_when_all_tensors_were_taken(num_tensors):
    pool, table = PagePool(BASE, 4 * num_tensors * PAGE, 9), CacheTable()
    cache_id, _ = table.allocate(pool, num_tensors, 2, 64, [(0, KEY_REQ, 1, 0), (1, KEY_REQ, 2, 0)])
    pin, other = table.resolve(KEY_REQ, 1), table.resolve(KEY_REQ, 2)
    order = [*range(num_tensors)]
    random.Random(num_tensors).shuffle(order)
    for tensor in order[:-1]:
        table.take(pin.key, tensor, 1)
        table.take(pin.key, tensor, 1)                          # overlaps count once
    table.take(pin.key, 0, 0)
    assert table.stats()["num_keys"] == 2
    table.take(other.key, order[-1], 1)                         # per key, not per cache
    assert table.stats()["num_keys"] == 2
    table.take(pin.key, order[-1], 1)
    assert table.stats()["num_keys"] == 1
    table.take(other.key, 0, num_tensors)
    for held in (pin, other):
        table.unpin(held)
    table.deallocate(cache_id)
    assert table.stats()["num_owned"] == 0 and pool.free_bytes == 4 * num_tensors * PAGE


def test_removal_forgets_what_was_taken(table, pool):
    cache_id, _ = table.allocate(pool, 3, 1, 64, [(0, KEY_REQ, 1, 0)])
    pin = table.resolve(KEY_REQ, 1)
    table.take(pin.key, 0, 2)
    table.unpin(pin)
    table.remove_key(KEY_REQ, 1, 0)
    table.deallocate(cache_id)
    table.allocate(pool, 3, 1, 64, [(0, KEY_REQ, 1, 0)])
    pin = table.resolve(KEY_REQ, 1)
    table.take(pin.key, 2, 1)
    assert table.stats()["num_keys"] == 1
    table.take(pin.key, 0, 2)
    assert table.stats()["num_keys"] == 0
    table.unpin(pin)


@pytest.mark.parametrize("first, count", [(0, 4), (3, 1), (4, 0), (2**32 - 1, 2), (1, 2**32 - 1)])
def test_take_outside_the_cache(table, pool, first, count):
    table.allocate(pool, 3, 1, 64, [(0, KEY_REQ, 1, 0)])
    pin = table.resolve(KEY_REQ, 1)
    with pytest.raises(LLMParamInvalidError):
        table.take(pin.key, first, count)
    assert table.stats()["num_keys"] == 1
    table.unpin(pin)


def test_what_a_pull_releases(table, pool):
    """By key or by id, only req keys of owned contiguous caches."""
    owned, _ = table.allocate(pool, 1, 4, 64, [(0, KEY_REQ, 1, 0), (1, KEY_PREFIX, 2, 0)])
    registered = table.register([4096], 2, 64, [(0, KEY_REQ, 3, 0)])
    blocks, _ = table.allocate(pool, 1, 4, 64, [(0, KEY_BLOCKS, NO_ID, 0)], BLOCKS)
    for key, kind, releases in [
        ((KEY_REQ, 1), KEY_REQ, True), ((KEY_BY_ID, owned, 0, 0), KEY_REQ, True),
        ((KEY_PREFIX, 2), KEY_PREFIX, False), ((KEY_BY_ID, owned, 0, 1), KEY_PREFIX, False),
        ((KEY_BY_ID, owned, 0, 2), KEY_BY_ID, False), ((KEY_BY_ID, owned, 0, 3), KEY_BY_ID, False),
        ((KEY_REQ, 3), KEY_REQ, False), ((KEY_BY_ID, registered, 0, 0), KEY_REQ, False),
        ((KEY_BLOCKS, NO_ID), KEY_BLOCKS, False), ((KEY_BY_ID, blocks), KEY_BLOCKS, False),
    ]:
        pin = table.resolve(*key)
        assert (pin.key is not None, pin.key_kind) == (releases, kind), key
        table.take(pin.key, 0, 1 if releases and key[0] == KEY_BY_ID else 0)
        table.unpin(pin)
    assert table.stats()["num_keys"] == 3                       # the pull by id took the req key
    table.remove_key(KEY_REQ, 3, 0)
    assert alive(table, registered)                             # unbound, not freed


@pytest.mark.parametrize("key, message", [
    ((KEY_REQ, 8, 2), "no cache is bound to req_id 8 of model 2"),
    ((KEY_PREFIX, 1, 0), "prefix_id 1 of model 0"),
    ((KEY_BLOCKS, NO_ID, 9), "blocks .* of model 9"),
    ((KEY_BY_ID, 99), "no cache 99"),
    ((KEY_BY_ID, 0), "no cache 0"),
    ((KEY_BY_ID, 2**64 - 1), "no cache -1"),
    ((KEY_BY_ID, 1, 0, 2), "batch index 2 of cache 1 .* is 2"),
    ((KEY_BY_ID, 1, 0, 2**64 - 1), "batch index 18446744073709551615 of cache 1"),
    ((KEY_BY_ID, 2, 0, 1), "batch index 1 of cache 2 .* is 1"),
    ((4, 1, 0), "unknown 1"),
])
def test_resolve_names_what_is_missing(table, pool, key, message):
    table.allocate(pool, 1, 2, 64, [(0, KEY_REQ, 1, 0)])
    table.allocate(pool, 1, 8, 64, (), BLOCKS)
    with pytest.raises(LLMNotFoundError, match=message) as caught:
        table.resolve(*key)
    assert caught.value.status_code == LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
    assert table.stats()["num_pins"] == 0


def test_remove_key_of_an_id_is_refused(table, pool):
    cache_id, _ = table.allocate(pool, 1, 1, 64)
    with pytest.raises(LLMParamInvalidError, match="kind is 3"):
        table.remove_key(KEY_BY_ID, cache_id, 0)
    assert alive(table, cache_id)


# Ranges.

def test_pin_range_finds_tensors_wherever_they_lie(table, pool):
    table.allocate(pool, 3, 1, 700)                             # equal steps of 1024
    scattered = [90_000, 50_000, 70_000, 70_050]                # no step, two overlap
    other = table.register(scattered, 1, 100)
    for addr, num_bytes, expected in [
        (BASE, 700, (1, 0, 0)), (BASE + 699, 1, (1, 0, 699)), (BASE + 2048 + 5, 10, (1, 2, 5)),
        (90_000, 100, (other, 0, 0)), (50_099, 1, (other, 1, 99)), (70_060, 90, (other, 3, 10)),
    ]:
        pin = table.pin_range(addr, num_bytes)
        assert (pin.cache_id, pin.tensor, pin.offset) == expected
        table.unpin(pin)
    for addr, num_bytes in [
        (BASE - 1, 2), (BASE, 701), (BASE + 700, 1), (BASE + 1023, 2), (BASE + 2048 + 700, 1), (BASE + 3072, 1),
        (49_999, 1), (50_100, 1), (60_000, 1), (89_999, 2), (70_000, 101), (BASE, 0), (0, 1), (2**64 - 1, 2),
        (BASE, 2**64 - 1),
    ]:
        with pytest.raises(LLMParamInvalidError, match=f"{num_bytes} bytes at {addr:#x}"):
            table.pin_range(addr, num_bytes)


def test_pin_range_ignores_retired_caches(table, pool):
    cache_id, addrs = table.allocate(pool, 1, 1, 64)
    pin = table.pin_range(addrs[0], 64)
    table.deallocate(cache_id)
    with pytest.raises(LLMParamInvalidError):
        table.pin_range(addrs[0], 64)
    table.unpin(pin)


def test_step_needs_equal_rising_distances(table):
    for addrs, step in [([4096], 0), ([4096, 8192], 4096), ([4096, 8192, 12288], 4096), ([8192, 4096], 0),
                        ([4096, 8192, 8200], 0), ([4096, 4096], 0), ([4096, 8192, 4096, 8192], 0)]:
        pin = table.pin_local(table.register(addrs, 1, 64))
        assert pin.step == step
        table.unpin(pin)


# Registered caches.

def test_unregister_waits_for_pins(table):
    cache_id = table.register([4096], 1, 64, [(0, KEY_REQ, 1, 0)])
    pin = table.resolve(KEY_REQ, 1)
    with pytest.raises(LLMTimeoutError, match=f"cache {cache_id} is read or written by 1 transfers"):
        table.unregister(cache_id, timeout_ms=0)
    with pytest.raises(LLMNotFoundError):                       # nobody new gets in meanwhile
        table.resolve(KEY_REQ, 1)
    with pytest.raises(LLMTimeoutError):
        table.unregister(cache_id, timeout_ms=0)
    done = []
    waiters = [threading.Thread(target=lambda: done.append(table.unregister(cache_id, timeout_ms=60_000)))
               for _ in range(3)]
    for waiter in waiters:
        waiter.start()
    time.sleep(0.05)                                            # let them block; passing does not depend on it
    assert done == [] and table.stats()["num_registered"] == 1
    table.unpin(pin)
    for waiter in waiters:
        waiter.join()
    assert done == [None] * 3 and table.stats()["num_registered"] == 0
    table.unregister(cache_id)


def test_the_wrong_end_is_a_no_op(table, pool):
    owned, _ = table.allocate(pool, 1, 1, 64)
    registered = table.register([4096], 1, 64)
    table.unregister(owned)
    table.deallocate(registered)
    for unknown in (-1, 0, 3, 2**63 - 1):
        table.deallocate(unknown)
        table.unregister(unknown)
    assert alive(table, owned) and alive(table, registered)


# Deadlines.

def test_a_busy_table_ends_in_timeouts_that_change_nothing(table, pool):
    cache_id, _ = table.allocate(pool, 1, 1, 64, [(0, KEY_REQ, 1, 0)])
    registered = table.register([4096], 1, 64)
    calls = [
        lambda: table.allocate(pool, 1, 1, 64, timeout_ms=5), lambda: table.register([4096], 1, 64, timeout_ms=5),
        lambda: table.deallocate(cache_id, timeout_ms=5), lambda: table.unregister(registered, timeout_ms=5),
        lambda: table.remove_key(KEY_REQ, 1, 0, timeout_ms=5), lambda: table.clear(timeout_ms=5),
    ]
    with table.hold():
        for call in calls:
            with pytest.raises(LLMTimeoutError, match="busy") as caught:
                call()
            assert caught.value.status_code == LLMStatusCode.LLM_TIMEOUT
    stats = table.stats()
    assert (stats["num_owned"], stats["num_registered"], stats["num_keys"], stats["num_deferred"]) == (1, 1, 1, 0)
    for call in calls[:-1]:
        call()


def test_a_wait_for_the_table_ends_with_the_hold(table, pool):
    cache_id, _ = table.allocate(pool, 1, 1, 64)
    started = threading.Event()

    def free():
        started.set()
        table.deallocate(cache_id, timeout_ms=60_000)

    thread = threading.Thread(target=free)
    with table.hold():
        thread.start()
        assert started.wait(60)
        time.sleep(0.02)                                        # other threads run: the waiter gave up the GIL
    thread.join()
    assert used_pages(pool) == 0


# The end.

def test_clear_frees_all_and_waits_for_pins(pool):
    table = CacheTable()
    ids = [table.allocate(pool, 1, 2, 64, [(0, KEY_REQ, i, 0), (1, KEY_PREFIX, i, 0)])[0] for i in range(5)]
    table.register([4096], 1, 64, [(0, KEY_REQ, 100, 0)])
    table.deallocate(ids[0])
    pin = table.resolve(KEY_REQ, 3)
    with pytest.raises(LLMTimeoutError, match=f"1 caches .* cache {pin.cache_id} by 1 transfers"):
        table.clear(timeout_ms=0)
    stats = table.stats()
    assert (stats["num_owned"], stats["num_registered"], stats["num_keys"]) == (1, 0, 0) and used_pages(pool) == 1
    waiter = threading.Thread(target=table.clear, kwargs={"timeout_ms": 60_000})
    waiter.start()
    table.unpin(pin)
    waiter.join()
    stats = table.stats()
    assert not any(value for name, value in stats.items() if name != "key_bytes")
    assert pool.runs() == [(0, NUM_PAGES, False)]
    table.clear()


def test_a_table_dropped_with_caches_in_it(pool):
    table = CacheTable()
    for i in range(40):
        table.allocate(pool, 1, 1, 64, [(0, KEY_REQ, i, 0)])
    pin = table.resolve(KEY_REQ, 1)
    table.take(pin.key, 0, 0)                                   # a bitmap to free as well
    del table
    with pytest.raises(TypeError):
        CacheTable().__init__(1)


# Threads.

@pytest.fixture
def restless():
    """Switch threads after microseconds, not milliseconds, so that they meet in the middle of things."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def test_threads_pull_remove_and_deallocate_at_once(restless):
    """Owners allocate and deallocate, pullers race for the keys; at the end nothing is left and nothing was torn."""
    pool, table = PagePool(BASE, 4096 * PAGE, 9), CacheTable()
    num_rounds, num_owners = 600, 2
    released = [0] * 3                                          # by puller; owners go on until all had some
    failures, finished = [], threading.Event()
    live = {}                                                   # key id -> cache id, while its owner has the handle

    def guarded(work):
        def run(*args):
            try:
                work(*args)
            except BaseException as error:
                failures.append(error)
                finished.set()
                raise
        return run

    @guarded
    def own(owner):
        rng, held, i, more = random.Random(owner), [], 0, True
        while more or held:
            more = not finished.is_set() and (i < num_rounds or min(released) < 20)
            if more:
                id = i * num_owners + owner
                keys = [(0, KEY_REQ, id, 0), (1, KEY_PREFIX, id, 0)]
                cache_id, _ = table.allocate(pool, 3, 2, 600, keys, timeout_ms=60_000)
                live[id] = cache_id
                held.append((id, cache_id))
                i += 1
            while len(held) > 8 or (held and not more):
                id, cache_id = held.pop(rng.randrange(len(held)))
                del live[id]
                steps = [(table.deallocate, cache_id), (table.remove_key, KEY_REQ, id, 0),
                         (table.remove_key, KEY_PREFIX, id, 0)]
                for call, *args in rng.sample(steps, 3):
                    call(*args, timeout_ms=60_000)

    @guarded
    def pull(puller):
        rng = random.Random(100 + puller)
        while not finished.is_set():
            ids = list(live.copy().items())                     # the copy is made in one piece
            if not ids:
                time.sleep(0.0001)
                continue
            id, cache_id = rng.choice(ids)
            kind = rng.choice((KEY_REQ, KEY_PREFIX, KEY_BY_ID))
            try:
                pin = table.resolve(kind, cache_id if kind == KEY_BY_ID else id)
            except LLMNotFoundError:
                continue
            assert pin.cache_id == cache_id and len(set(pin.addrs)) == 3 and pin.tensor_bytes == 600
            for tensor in rng.sample(range(3), 3):
                table.take(pin.key, tensor, 1)
            released[puller] += pin.key is not None
            row = [row for row in table.snapshot() if row["cache_id"] == cache_id]
            assert row and row[0]["pins"] >= 1                  # pinned caches stay, whatever their owner does
            table.unpin(pin)

    owners = [threading.Thread(target=own, args=(i,)) for i in range(num_owners)]
    pullers = [threading.Thread(target=pull, args=(i,)) for i in range(len(released))]
    for thread in owners + pullers:
        thread.start()
    for thread in owners:
        thread.join()
    finished.set()
    for thread in pullers:
        thread.join()
    assert not failures and min(released) >= 20
    stats = table.stats()
    assert not any(value for name, value in stats.items() if name != "key_bytes"), stats
    assert pool.runs() == [(0, 4096, False)]


def test_one_of_many_threads_binds_a_key(restless):
    pool, table = PagePool(BASE, 64 * PAGE, 9), CacheTable()

    def bind(id, barrier, outcomes):
        barrier.wait()
        try:
            outcomes.append(table.allocate(pool, 2, 1, 64, [(0, KEY_REQ, id, 0)], timeout_ms=60_000)[0])
        except LLMException as error:
            outcomes.append(error.status_code)

    for id in range(30):
        barrier, outcomes = threading.Barrier(4), []
        threads = [threading.Thread(target=bind, args=(id, barrier, outcomes)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(outcomes) == 4 and outcomes.count(LLMStatusCode.LLM_PARAM_INVALID) == 3
        assert table.stats()["num_owned"] == 1 and pool.free_bytes == 62 * PAGE
        table.clear()
