"""The key index at scale: searches stay short, memory stays small, and churn loses nothing."""
import random

import pytest

from llm_datadist.status import LLMNotFoundError
from llm_datadist_probes.table import CacheTable, PagePool

KEY_REQ, KEY_PREFIX, KEY_BLOCKS, KEY_BY_ID = range(4)
BASE = 1 << 40


def pool_of(num_pages):
    return PagePool(BASE, num_pages << 9, 9)


@pytest.mark.parametrize("pattern", ["counting", "strided", "high bits", "models", "random"])
def test_searches_stay_short(pattern):
    """Ids come from clients: none of their habits may cluster."""
    count, batch = 100_000, 1000
    rng = random.Random(3)
    names = {
        "counting": lambda i: (i, 0),
        "strided": lambda i: (i * 4096, 0),
        "high bits": lambda i: (i << 44, 0),
        "models": lambda i: (5, i),
        "random": lambda i: (rng.getrandbits(64) & ~1, i),
    }[pattern]
    table, pool = CacheTable(), pool_of(count // batch)
    for start in range(0, count, batch):
        keys = [(slot, KEY_REQ, *names(start + slot)) for slot in range(batch)]
        table.allocate(pool, 1, batch, 1, keys)
    stats = table.stats()
    assert stats["num_keys"] == count
    assert stats["max_probe"] <= 16
    assert stats["key_bytes"] <= 140 * count            # with the copies for peers
    table.clear()


def test_million_keys():
    """Constant searches at 10**6 keys, every key found, and no trace left when all are gone."""
    count, batch = 1_000_000, 10_000
    table, pool = CacheTable(), pool_of(count // batch)
    ids = {}
    for start in range(0, count, batch):
        keys = [(slot, KEY_REQ, start + slot, 3) for slot in range(batch)]
        ids[start], _ = table.allocate(pool, 1, batch, 1, keys)
    stats = table.stats()
    assert stats["num_keys"] == count and stats["max_probe"] <= 20
    assert stats["key_bytes"] <= 128 * count
    for id in range(0, count, 997):
        pin = table.resolve(KEY_REQ, id, 3)
        assert (pin.cache_id, pin.batch_index) == (ids[id - id % batch], id % batch)
        table.unpin(pin)
    for absent in ((KEY_REQ, count, 3), (KEY_REQ, 5, 2), (KEY_PREFIX, 5, 3)):
        with pytest.raises(LLMNotFoundError):
            table.resolve(*absent)
    for cache_id in ids.values():
        table.deallocate(cache_id)
    assert table.stats()["num_deferred"] == len(ids) and pool.free_bytes == 0
    for id in random.Random(5).sample(range(count), count):
        table.remove_key(KEY_REQ, id, 3)
    stats = table.stats()
    assert stats["num_keys"] == stats["num_owned"] == stats["max_probe"] == 0
    assert pool.runs() == [(0, count // batch, False)]


def test_churn_leaves_no_tombstones():
    """A table that lives long stays as fast and as small as a new one with as many keys."""
    table, pool = CacheTable(), pool_of(2000)
    rng = random.Random(11)
    bound, next_id = {}, 0
    size = None
    for step in range(60_000):
        if len(bound) < 1000 or (rng.random() < 0.5 and len(bound) < 1500):
            bound[next_id] = table.allocate(pool, 1, 1, 1, [(0, KEY_PREFIX, next_id, 0)])[0]
            next_id += 1
        else:
            id = rng.choice(list(bound)) if step % 50 == 0 else next(iter(bound))
            table.remove_key(KEY_PREFIX, id, 0)
            table.deallocate(bound.pop(id))
        if step == 10_000:
            size = table.stats()["key_bytes"]
    stats = table.stats()
    assert stats["num_keys"] == stats["num_owned"] == len(bound)
    assert size <= stats["key_bytes"] <= 1.05 * size and stats["max_probe"] <= 16
    for id in range(next_id):
        try:
            pin = table.resolve(KEY_PREFIX, id)
        except LLMNotFoundError:
            assert id not in bound
        else:
            assert pin.cache_id == bound[id]
            table.unpin(pin)
    table.clear()
    assert pool.free_bytes == 2000 << 9


def test_handles_go_stale():
    """A handle kept across the end of its key never touches the key that follows in its place."""
    table, pool = CacheTable(), pool_of(8)
    first, _ = table.allocate(pool, 2, 1, 1, [(0, KEY_REQ, 1, 0)])
    old = table.resolve(KEY_REQ, 1)
    table.remove_key(KEY_REQ, 1, 0)
    table.take((old.key[0], old.key[1] + 1), 0, 2)              # an entry that is free
    second, _ = table.allocate(pool, 2, 1, 1, [(0, KEY_REQ, 1, 0)])
    new = table.resolve(KEY_REQ, 1)
    assert old.key != new.key and old.key[0] == new.key[0]      # the entry is used again, the generation is not
    index, generation = new.key
    for stale in (old.key, (index, generation + 1), (index, generation + 2), (index + 1, generation), (2**31, 1),
                  (index, 0)):
        table.take(stale, 0, 2)
        assert table.stats()["num_keys"] == 1
    table.take(new.key, 0, 2)
    assert table.stats()["num_keys"] == 0
    for pin in (old, new):
        table.unpin(pin)
    table.deallocate(first)
    table.deallocate(second)
    assert table.stats()["num_owned"] == 0


def test_forged_handles_take_nothing():
    """A handle may come from a peer: a forged one must drop neither an id nor the key of a registered cache."""
    table, pool = CacheTable(), pool_of(8)
    cache_id, _ = table.allocate(pool, 2, 1, 1, [(0, KEY_PREFIX, 1, 0)])
    registered = table.register([4096, 8192], 1, 1, [(0, KEY_REQ, 1, 0)])
    for index in range(8):
        for generation in range(6):
            table.take((index, generation), 0, 2)
    assert table.stats()["num_keys"] == 2
    for key in ((KEY_REQ, 1), (KEY_PREFIX, 1), (KEY_BY_ID, cache_id), (KEY_BY_ID, registered)):
        table.unpin(table.resolve(*key))
    table.remove_key(KEY_PREFIX, 1, 0)
    table.unregister(registered)
    table.deallocate(cache_id)
    assert table.stats()["num_owned"] == 0
