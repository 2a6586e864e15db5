"""The shared table between real processes: exact releases, exact pins, and never a byte of another cache."""
import contextlib
import ctypes
import random
import threading
import time

import numpy as np
import pytest

from llm_datadist import BlocksCacheKey, CacheDesc, CacheKey, DataType, LLMException, LLMStatusCode

WORDS = 2048                        # of a tensor: several copies of a cache line, small enough to go round quickly
TENSORS = 3
DESC = CacheDesc(TENSORS, [1, WORDS], DataType.DT_UINT32)
OWNER = 1


def offer(node, first, count):
    """Allocate one cache per key, filled with the key's number, and drop the handle."""
    for number in range(first, first + count):
        cache = node.cache_manager.allocate_cache(DESC, [CacheKey(OWNER, number, 0)])
        for tensor in cache.tensors():
            tensor[:] = number
        node.cache_manager.deallocate_cache(cache)


def pull_all(node, first, count, seed):
    """Pull keys in a random order; return how many came, and check that each brought its own bytes alone."""
    order = list(range(first, first + count))
    random.Random(seed).shuffle(order)
    cache = node.cache_manager.allocate_cache(DESC)
    views, came = cache.tensors(), 0
    for number in order:
        for tensor in views:
            tensor[:] = 0
        try:
            node.cache_manager.pull_cache(CacheKey(OWNER, number, 0), cache)
        except LLMException as error:
            assert error.status_code == LLMStatusCode.LLM_KV_CACHE_NOT_EXIST, error
            continue
        came += 1
        for tensor in views:
            assert (tensor == number).all(), (number, np.unique(tensor))
    node.cache_manager.deallocate_cache(cache)
    return came


def stats(node):
    """What the process holds."""
    return node.dist.stats()


def test_pulls_and_releases_ask_nobody(peers):
    owner, here = peers.start(OWNER), peers.here(2)
    peers.link(here, owner)
    owner.call(offer, 0, 5)
    assert here.call(pull_all, 0, 5, 1) == 5
    counts = owner.call(stats)
    assert (counts["keys"], counts["caches"], counts["pins"], counts["requests"]) == (0, 0, 0, 0)


def test_a_released_key_is_gone_for_everybody_at_once(peers):
    owner, here, other = peers.start(OWNER), peers.here(2), peers.start(3)
    peers.link(here, owner)
    peers.link(other, owner)
    owner.call(offer, 0, 1)
    assert here.call(pull_all, 0, 1, 1) == 1
    # The owner has not looked at its table since, and yet:
    assert other.call(pull_all, 0, 1, 1) == 0
    owner.call(offer, 0, 1)                         # the same key can be bound again
    assert other.call(pull_all, 0, 1, 1) == 1
    assert owner.call(stats)["caches"] == 0


def test_more_releases_than_a_lane_holds(peers):
    owner, here = peers.start(OWNER), peers.here(2)
    peers.link(here, owner)
    owner.call(offer, 0, 700)
    assert here.call(pull_all, 0, 700, 1) == 700
    counts = owner.call(stats)
    assert (counts["keys"], counts["caches"]) == (0, 0)
    assert counts["device_pool"]["free_bytes"] == counts["device_pool"]["bytes"]


def churn(node, rounds, keys, seed):
    """Allocate, overwrite, deallocate and remove as fast as possible, so that memory is reused under the readers."""
    numbers = random.Random(seed)
    manager = node.cache_manager
    for _ in range(rounds):
        number = numbers.randrange(keys)
        try:
            cache = manager.allocate_cache(DESC, [CacheKey(OWNER, number, 0)])
        except LLMException as error:
            assert error.status_code == LLMStatusCode.LLM_PARAM_INVALID, error     # still bound: take it back
            manager.remove_cache_key(CacheKey(OWNER, number, 0))
            continue
        for tensor in cache.tensors():
            tensor[:] = number
        manager.deallocate_cache(cache)
    for number in range(keys):
        manager.remove_cache_key(CacheKey(OWNER, number, 0))


def chase(node, rounds, keys, seed):
    """Pull whatever is there, half-filled or not."""
    numbers = random.Random(seed)
    cache = node.cache_manager.allocate_cache(DESC)
    came = 0
    for _ in range(rounds):
        try:
            node.cache_manager.pull_cache(CacheKey(OWNER, numbers.randrange(keys), 0), cache)
            came += 1
        except LLMException as error:
            assert error.status_code == LLMStatusCode.LLM_KV_CACHE_NOT_EXIST, error
    node.cache_manager.deallocate_cache(cache)
    return came


@pytest.mark.parametrize("shared", ["1", "0"])
def test_churn_leaves_exact_counts(peers, shared):
    environ = {"LLM_DATADIST_SHARED_TABLE": shared}
    owner = peers.start(OWNER, env=environ)
    readers = [peers.start(number, env=environ) for number in (2, 3)]
    for reader in readers:
        peers.link(reader, owner)
    results = {}
    threads = [threading.Thread(target=lambda r=reader: results.update({r: r.call(chase, 1500, 8, id(r))}))
               for reader in readers]
    for thread in threads:
        thread.start()
    owner.call(churn, 1500, 8, 5)
    for thread in threads:
        thread.join()
    assert len(results) == 2
    counts = owner.call(stats)
    assert (counts["keys"], counts["caches"], counts["pins"]) == (0, 0, 0)
    assert counts["device_pool"]["free_bytes"] == counts["device_pool"]["bytes"]


def test_two_readers_race_for_the_same_keys(peers):
    """Each key releases exactly once, whoever comes first; both may have read it."""
    owner, readers = peers.start(OWNER), [peers.start(number) for number in (2, 3)]
    for reader in readers:
        peers.link(reader, owner)
    owner.call(offer, 0, 400)
    results = []
    threads = [threading.Thread(target=lambda r=reader, s=seed: results.append(r.call(pull_all, 0, 400, s)))
               for seed, reader in enumerate(readers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2 and sum(results) >= 400
    counts = owner.call(stats)
    assert (counts["keys"], counts["caches"], counts["pins"]) == (0, 0, 0)


BLOCKS = CacheDesc(4, [64, 1 << 16], DataType.DT_UINT8)


def offer_blocks(node, value):
    """A blocks cache full of one value; the last one goes."""
    old = node.kept.pop("blocks", None)
    if old is not None:
        node.cache_manager.deallocate_blocks_cache(old)
    cache = node.kept["blocks"] = node.cache_manager.allocate_blocks_cache(BLOCKS, BlocksCacheKey(OWNER))
    for tensor in cache.tensors():
        tensor[:] = value
    return cache.cache_id


def drop_blocks(node):
    """Free the cache of `offer_blocks`."""
    node.cache_manager.deallocate_blocks_cache(node.kept.pop("blocks"))


def pull_for_ever(node):
    """Pull all blocks until killed."""
    cache = node.cache_manager.allocate_blocks_cache(BLOCKS)
    every = list(range(64))

    def run():
        while True:
            node.cache_manager.pull_blocks(BlocksCacheKey(OWNER), cache, every, every)

    threading.Thread(target=run, daemon=True).start()


def test_a_killed_reader_keeps_nothing(peers):
    owner, here = peers.here(OWNER), peers.start(2)
    here.leftovers_allowed = True
    peers.link(here, owner)
    owner.call(offer_blocks, 7)
    here.call(pull_for_ever)
    time.sleep(0.05)                                # somewhere in the middle of a pull, most of the time
    here.kill()
    owner.call(drop_blocks)
    limit = time.monotonic() + 10
    while owner.call(stats)["device_pool"]["free_bytes"] != owner.call(stats)["device_pool"]["bytes"]:
        assert time.monotonic() < limit, owner.call(stats)
        time.sleep(0.01)
    assert owner.call(stats)["pins"] == 0


# ---------------------------------------------------------------------------------------- what a linked peer may do

def overwrite(node, name, pattern, from_byte=0):
    """Fill a mapping of this process that it may write, which a peer or the engine itself has made."""
    found = 0
    with open("/proc/self/maps", encoding="ascii") as maps:
        for line in maps:
            if f"llm_datadist-{name}" in line and "rw-s" in line:
                first, last = (int(number, 16) for number in line.split()[0].split("-"))
                for at in range(first + from_byte, last, 1 << 20):
                    ctypes.memmove(at, pattern * (1 << 18), min(1 << 20, last - at))
                found += 1
    return found


def test_marks_of_a_peer_hide_no_key_from_others(peers):
    """Whatever it writes there, others pull every key once, and nothing stays with the owner."""
    owner, here, other = peers.start(OWNER), peers.here(2), peers.start(3)
    for reader in (here, other):
        peers.link(reader, owner)
        owner.call(offer, 0, 1)
        assert reader.call(pull_all, 0, 1, 1) == 1
    for first, pattern in ((0, b"\xff\xff\xff\x7f"), (1000, b"\x01\x00\x00\x00"), (2000, b"\xff\xff\xff\xff")):
        owner.call(offer, first, 50)
        assert here.call(overwrite, "marks", pattern, 64) == 2      # its own engine's, and the owner's
        assert other.call(pull_all, first, 50, 1) == 50
        assert other.call(pull_all, first, 50, 1) == 0
    counts = owner.settled()
    assert (counts["keys"], counts["caches"], counts["pins"]) == (0, 0, 0)


def test_a_lane_full_of_nonsense_releases_nothing(peers):
    """A ring of entries that were never keys, and a hazard on nothing: both go with the link."""
    owner, here = peers.start(OWNER), peers.here(2)
    peers.link(here, owner)
    owner.call(offer, 0, 20)
    assert here.call(pull_all, 0, 1, 1) == 1
    for pattern in (b"\xff\xff\xff\xff", b"\x01\x00\x00\x00", b"\x07\x00\x00\x00"):
        assert here.call(overwrite, "lane", pattern) == 1
        assert owner.call(stats)["caches"] >= 18    # an entry (1, 1) may name a key
    peers.unlink(here, owner)
    owner.call(churn, 1, 20, 1)
    counts = owner.settled()
    assert (counts["keys"], counts["caches"], counts["pins"]) == (0, 0, 0)


def test_an_owner_whose_table_is_overwritten_keeps_its_counts(peers):
    """It acts on its own records; a reader finds nothing, or asks, or is refused, and lives."""
    owner, here = peers.start(OWNER), peers.here(2)
    peers.link(here, owner)
    owner.call(offer, 0, 30)
    assert here.call(pull_all, 0, 1, 1) == 1
    for pattern in (b"\xff\xff\xff\xff", b"\x01\x00\x00\x00"):
        assert owner.call(overwrite, "table", pattern, 32) == 1
        for number in range(1, 30):
            with contextlib.suppress(LLMException):
                here.call(pull_all, number, 1, 1)
    peers.unlink(here, owner)
    owner.call(churn, 1, 30, 1)
    counts = owner.settled()
    assert (counts["keys"], counts["caches"], counts["pins"]) == (0, 0, 0)
    assert counts["device_pool"]["free_bytes"] == counts["device_pool"]["bytes"]
