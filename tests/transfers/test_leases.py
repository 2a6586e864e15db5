"""Request keys that expire, the report of what is held, and waiting until nothing is to be pulled any more."""
from __future__ import annotations

import ctypes
import logging
import threading
import time

import pytest
from support.link_steps import link, until
from support.peer import engine_options
from transfers.pair import PATHS_VARIABLE
from transfers.tasks import Gate

from llm_datadist import (
    CacheDesc,
    CacheKey,
    CacheKeyByIdAndIndex,
    DataType,
    LLMException,
    LLMParamInvalidError,
    LLMStatusCode,
    TransferConfig,
)

S = LLMStatusCode
DESC = CacheDesc(2, [2, 1024], DataType.DT_INT32)
TWO_LAYERS = CacheDesc(4, [2, 1024], DataType.DT_INT32)
NUM_BYTES = 2 * 2 * 4096


class Kept(logging.Handler):
    """Keeps the records of the package."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.texts = []

    def emit(self, record):
        self.texts.append(record.getMessage())


def watch(node):
    """Keep what is logged from now on."""
    node.kept["log"] = Kept()
    logging.getLogger("LLM_DATADIST").addHandler(node.kept["log"])
    logging.getLogger("LLM_DATADIST").setLevel(logging.WARNING)


def logged(node, word):
    return [text for text in node.kept["log"].texts if word in text]


def put(node, keys, value=1, deallocates=True, desc=DESC, **lease):
    """A cache of our own with these keys, filled; its id."""
    cache = node.cache_manager.allocate_cache(desc, keys, **lease)
    for addr in cache.tensor_addrs:
        ctypes.memset(addr, value, NUM_BYTES // 2)
    cache_id = cache.cache_id
    if deallocates:
        node.cache_manager.deallocate_cache(cache)
    else:
        node.kept[cache_id] = cache
    return cache_id


def give_back(node, cache_id):
    node.cache_manager.deallocate_cache(node.kept.pop(cache_id))


def pull(node, key):
    """Pull one slot: the code, and the bytes that came."""
    cache = node.cache_manager.allocate_cache(DESC)
    try:
        for addr in cache.tensor_addrs:
            ctypes.memset(addr, 0xEE, NUM_BYTES // 2)
        node.cache_manager.pull_cache(key, cache)
        return S.LLM_SUCCESS, set().union(*(set(ctypes.string_at(addr, 4096)) for addr in cache.tensor_addrs))
    except LLMException as error:
        return error.status_code, set()
    finally:
        node.cache_manager.deallocate_cache(cache)


def counts(node):
    found = node.dist.stats()
    return found["caches"], found["keys"], found["expired_keys"]


def wait_counts(node, wanted):
    until(lambda: counts(node) == wanted)
    return counts(node)


def reports(node, min_age_s=0.0):
    return node.dist.leaks(min_age_s)


@pytest.fixture(params=["shm", "tcp"])
def pair(peers, request):
    owner, reader = (peers.start(cluster_id, engine_options(), env={PATHS_VARIABLE: request.param})
                     for cluster_id in (1, 2))
    owner.call(watch)
    assert reader.call(link, (1, owner.address))[0] is S.LLM_SUCCESS
    return owner, reader


def test_a_key_that_nobody_pulls_releases_itself(pair):
    owner, reader = pair
    free_bytes = owner.stats()["device_pool"]["free_bytes"]
    cache_id = owner.call(put, [CacheKey(1, 7, model_id=3), CacheKey(1, 8)], cache_key_lease_ms=50)
    assert owner.call(wait_counts, (0, 0, 2)) == (0, 0, 2)
    assert owner.stats()["device_pool"]["free_bytes"] == free_bytes
    assert reader.call(pull, CacheKey(1, 8)) == (S.LLM_KV_CACHE_NOT_EXIST, set())
    assert until(lambda: len(owner.call(logged, "lease")) == 2)
    first, second = owner.call(logged, "lease")
    assert f"req_id=7, model_id=3 of cache {cache_id} ({NUM_BYTES} bytes)" in first and "req_id=8" in second
    age_s = float(first.split(" s after")[0].rpartition(" ")[2])
    assert age_s >= 0.05


def test_what_is_pulled_in_time_does_not_expire(pair):
    owner, reader = pair
    owner.call(put, [CacheKey(1, 7)], 5, cache_key_lease_ms=600000)
    owner.call(put, [CacheKey(1, 8)], 6, cache_key_lease_ms=1)
    assert reader.call(pull, CacheKey(1, 7)) == (S.LLM_SUCCESS, {5})
    assert owner.call(wait_counts, (0, 0, 1)) == (0, 0, 1)
    assert len(owner.call(logged, "req_id=7")) == 0


def test_a_handle_outlives_the_lease_of_its_keys(pair):
    owner, reader = pair
    cache_id = owner.call(put, [CacheKey(1, 7)], 5, deallocates=False, cache_key_lease_ms=20)
    assert owner.call(wait_counts, (1, 0, 1)) == (1, 0, 1)
    assert reader.call(pull, CacheKey(1, 7)) == (S.LLM_KV_CACHE_NOT_EXIST, set())
    assert reader.call(pull, CacheKeyByIdAndIndex(1, cache_id, 0)) == (S.LLM_SUCCESS, {5})
    owner.call(give_back, cache_id)
    assert owner.call(wait_counts, (0, 0, 1)) == (0, 0, 1)       # over TCP, a pull's pin goes within a moment


def test_prefix_keys_stay(pair):
    owner, reader = pair
    key = CacheKey(1, 2**64 - 1, 0, 9)
    cache_id = owner.call(put, [key, CacheKey(1, 7)], 5, cache_key_lease_ms=20)
    assert owner.call(wait_counts, (1, 1, 1)) == (1, 1, 1)
    assert reader.call(pull, key) == (S.LLM_SUCCESS, {5})
    assert [row["cache_id"] for row in owner.call(reports)] == [cache_id]
    owner.call(remove, key)
    assert owner.call(wait_counts, (0, 0, 1)) == (0, 0, 1)       # over TCP, a pull's pin goes within a moment


def remove(node, key):
    node.cache_manager.remove_cache_key(key)


def send_through_a_gate(node, cluster_id, addrs):
    gate = Gate(1)
    cache_id = put(node, [CacheKey(1, 7)], 5, deallocates=False, desc=TWO_LAYERS, cache_key_lease_ms=800)
    task = node.cache_manager.transfer_cache_async(node.kept[cache_id], gate, [TransferConfig(cluster_id, addrs)])
    gate.reached.wait(30)
    node.kept["gate"] = gate, task, cache_id


def open_gate(node):
    gate, task, cache_id = node.kept.pop("gate")
    gate.open.set()
    result = task.synchronize(30000)
    give_back(node, cache_id)
    return result


def addrs_of_new(node):
    cache = node.kept["dst"] = node.cache_manager.allocate_cache(TWO_LAYERS)
    return list(cache.tensor_addrs)


def drop_dst(node):
    node.cache_manager.deallocate_cache(node.kept.pop("dst"))


def pull_until_gone(node, first, count):
    """Pull keys one after the other as they come; how often which outcome."""
    outcomes = {}
    for req_id in range(first, first + count):
        code, found = pull(node, CacheKey(1, req_id))
        outcome = code, tuple(found)
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
    return outcomes


def put_many(node, first, count):
    for req_id in range(first, first + count):
        put(node, [CacheKey(1, req_id)], 5, cache_key_lease_ms=1 + req_id % 40)


def test_keys_expire_while_others_are_pulled(pair):
    """Each pull finds the whole cache or no key: what a reader touches is not freed under it, nor reused."""
    owner, reader = pair
    rounds, count = 20, 20
    pulled = 0
    for first in range(0, rounds * count, count):
        owner.call(put_many, first, count)
        outcomes = reader.call(pull_until_gone, first, count)
        assert set(outcomes) <= {(S.LLM_SUCCESS, (5,)), (S.LLM_KV_CACHE_NOT_EXIST, ())}
        pulled += outcomes.get((S.LLM_SUCCESS, (5,)), 0)
    wanted = (0, 0, rounds * count - pulled)
    assert owner.call(wait_counts, wanted) == wanted
    assert 0 < pulled < rounds * count


@pytest.mark.parametrize("lease_ms, kind", [(-1, ValueError), (2**32, ValueError), ("5", TypeError), (1.5, TypeError)])
def test_a_lease_that_is_none(peers, lease_ms, kind):
    here = peers.here(1)
    with pytest.raises(kind):
        here.node.cache_manager.allocate_cache(DESC, [CacheKey(1, 7)], cache_key_lease_ms=lease_ms)
    assert here.node.dist.stats()["caches"] == 0


def test_the_option_holds_for_every_allocation_that_says_nothing(peers):
    owner = peers.start(1, engine_options(llm_CacheKeyLeaseMs="30"))
    owner.call(put, [CacheKey(1, 7)])
    cache_id = owner.call(put, [CacheKey(1, 8)], cache_key_lease_ms=0)
    assert owner.call(wait_counts, (1, 1, 1)) == (1, 1, 1)
    (row,) = owner.call(reports)
    assert (row["cache_id"], row["names"], row["lease_s"]) == (cache_id, ["req_id=8"], None)
    owner.call(remove, CacheKey(1, 8))


def test_a_lease_ends_after_the_transfer_that_needs_the_cache(peers):
    """Its keys stay as long as something is read from it."""
    remote = {"remote_accessible": False}
    owner, reader = peers.start(1, engine_options(**remote)), peers.start(2, engine_options(**remote))
    owner.call(watch)
    assert reader.call(link, (1, owner.address))[0] is S.LLM_SUCCESS
    owner.call(send_through_a_gate, 2, reader.call(addrs_of_new))
    assert owner.call(put, [CacheKey(1, 9)], cache_key_lease_ms=1000)
    assert owner.call(wait_counts, (1, 1, 1)) == (1, 1, 1)          # the later lease has ended, the earlier has not
    assert owner.call(open_gate) is S.LLM_SUCCESS
    assert owner.call(wait_counts, (0, 0, 2)) == (0, 0, 2)
    reader.call(drop_dst)


# ----------------------------------------------------------------------------------------------- report and drain

def test_the_report_says_what_is_held_how_old_it_is_and_for_whom(pair):
    owner, reader = pair
    cache_id = owner.call(put, [CacheKey(1, 7)], cache_key_lease_ms=600000)
    (row,) = owner.call(reports)
    assert (row["cache_id"], row["bytes"], row["names"], row["handle"], row["peers"]) \
        == (cache_id, NUM_BYTES, ["req_id=7"], False, [2])
    assert 0 <= row["age_s"] < 60 and 500 < row["lease_s"] <= 600
    assert owner.call(reports, 3600.0) == []
    assert reader.call(pull, CacheKey(1, 7))[0] is S.LLM_SUCCESS
    assert until(lambda: owner.call(reports) == [])


def drain(node, timeout_ms):
    return node.dist.drain(timeout_ms)


def test_drain_waits_for_those_who_are_to_come(pair):
    owner, reader = pair
    owner.call(put, [CacheKey(1, 7)], 5)
    draining = owner.begin(drain, 20000)
    assert reader.call(pull, CacheKey(1, 7)) == (S.LLM_SUCCESS, {5})
    assert draining() == []
    assert owner.call(counts) == (0, 0, 0)


def test_drain_tells_what_is_left(pair):
    owner, _ = pair
    assert owner.call(drain, 0) == []
    cache_id = owner.call(put, [CacheKey(1, 7)], 5)
    (row,) = owner.call(drain, 20)
    assert (row["cache_id"], row["names"]) == (cache_id, ["req_id=7"])
    owner.call(remove, CacheKey(1, 7))
    assert owner.call(drain, 0) == []


def test_drain_ends_with_the_leases(pair):
    owner, _ = pair
    owner.call(put, [CacheKey(1, 7)], 5, cache_key_lease_ms=50)
    assert owner.call(drain, 20000) == []
    assert owner.call(counts) == (0, 0, 1)


def finalize_with(node, drain_ms):
    """Finalize while somebody else removes the key, or nobody does; what was logged."""
    import warnings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        node.dist.finalize(drain_ms)
    return logged(node, "finalized with")


def remove_later(node, key):
    def act():
        time.sleep(0.05)
        node.cache_manager.remove_cache_key(key)
    threading.Thread(target=act).start()


def test_finalize_drains(peers):
    owner = peers.start(1)
    owner.call(watch)
    owner.call(put, [CacheKey(1, 7)], 5)
    owner.call(remove_later, CacheKey(1, 7))
    assert owner.call(finalize_with, 20000) == []


def test_finalize_tells_what_was_left(peers):
    owner = peers.start(1)
    owner.call(watch)
    cache_id = owner.call(put, [CacheKey(1, 7)], 5)
    (text,) = owner.call(finalize_with, 10)
    assert f"cache {cache_id}" in text and "req_id=7" in text


@pytest.mark.parametrize("drain_ms", [-1, 2**32])
def test_a_drain_of_no_length(peers, drain_ms):
    here = peers.here(1)
    with pytest.raises(ValueError):
        here.node.dist.finalize(drain_ms)
    with pytest.raises(ValueError):
        here.node.dist.drain(drain_ms)


@pytest.mark.parametrize("option", ["-1", "1.5", "2147483648"])
def test_an_option_that_is_no_lease(peers, option):
    with pytest.raises(LLMParamInvalidError, match=r"llm\.CacheKeyLeaseMs"):
        peers.here(1, engine_options(llm_CacheKeyLeaseMs=option))
