"""Transfers from many threads at once, in both directions of one link: right bytes, and exact counts at the end."""
import threading

import pytest
from support.peer import Peers
from transfers.caches import Named, Spec, contents, drop, invoke, make
from transfers.pair import linked_pair
from transfers.refusal import NOT_EXIST
from transfers.tasks import transfer

from llm_datadist import BlocksCacheKey, CacheKey, CacheKeyByIdAndIndex, LLMStatusCode, TransferConfig
from llm_datadist.status import LLMException

THREADS, ROUNDS = 4, 15
SPEC = Spec(4, 3, (700,))


@pytest.fixture(scope="module", params=["shm", "cma", "tcp"])
def pair(request):
    with Peers() as peers:
        yield linked_pair(peers, False, request.param)


def in_threads(function, count=THREADS):
    """Run ``function(0) ... function(count - 1)`` at once; the first exception is raised here."""
    errors = []

    def run(number):
        try:
            function(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def pull_from_threads(node, cluster_id, cache_ids, contents_there):
    """Pull every cache from every thread, round by round, each thread into a cache of its own."""
    def run(number):
        name = f"mine {number}"
        make(node, name, SPEC._replace(num_slots=1, seed=number))
        for turn in range(ROUNDS):
            which = (number + turn) % len(cache_ids)
            slot = turn % SPEC.num_slots
            invoke(node, "pull_cache", CacheKeyByIdAndIndex(cluster_id, cache_ids[which], slot), Named(name))
            expected = [tensor[slot * SPEC.stride:(slot + 1) * SPEC.stride] for tensor in contents_there[which]]
            assert contents(node, name) == expected, (number, turn)
        drop(node, name)

    in_threads(run)


def test_pulls_in_both_directions(pair):
    sources = {}
    for process in (pair.here, pair.there):
        specs = [SPEC._replace(seed=process.cluster_id % 1000 + number, is_registered=number % 2 == 1)
                 for number in range(3)]
        ids = [process.call(make, f"source {number}", spec).cache_id for number, spec in enumerate(specs)]
        sources[process] = (process.cluster_id, ids, [spec.fill() for spec in specs])
    try:
        finish = pair.there.begin(pull_from_threads, *sources[pair.here])
        pair.here.call(pull_from_threads, *sources[pair.there])
        finish()
        for process in (pair.here, pair.there):
            assert process.settled()["pins"] == 0
    finally:
        for process in (pair.here, pair.there):
            for number in range(3):
                process.call(drop, f"source {number}")


def test_every_kind_at_once(pair):
    """Pulls, block pulls and layer-wise transfers over one link, each into its own memory."""
    key = BlocksCacheKey(pair.there.cluster_id, 1)
    slots = pair.there.call(make, "slots", SPEC)
    pair.there.call(make, "blocks", SPEC._replace(is_blocks=True, keys=(key,), seed=1))
    receiver = pair.there.call(make, "receiver", SPEC._replace(seed=2))
    pair.here.call(make, "sender", SPEC._replace(seed=3))
    pair.here.call(make, "for slots", SPEC._replace(seed=4))
    pair.here.call(make, "for blocks", SPEC._replace(is_blocks=True, seed=5))

    def work(number):
        for turn in range(ROUNDS):
            slot = turn % 3
            if number == 0:
                pair.here.call(invoke, "pull_cache", CacheKeyByIdAndIndex(pair.there.cluster_id, slots.cache_id, slot),
                               Named("for slots"), slot)
            elif number == 1:
                pair.here.call(invoke, "pull_blocks", key, Named("for blocks"), [slot, 0], [slot, 0])
            else:
                addrs = [addr + slot * SPEC.stride for addr in receiver.addrs]
                outcome = pair.here.call(transfer, "sender", [TransferConfig(pair.there.cluster_id, addrs, None, slot)])
                assert outcome.code is LLMStatusCode.LLM_SUCCESS

    try:
        in_threads(work, 3)
        assert pair.here.call(contents, "for slots") == SPEC.fill()
        assert pair.here.call(contents, "for blocks") == SPEC._replace(seed=1).fill()
        assert pair.there.call(contents, "receiver") == SPEC._replace(seed=3).fill()
        assert pair.here.settled()["pins"] == pair.there.settled()["pins"] == 0
    finally:
        for name in ("sender", "for slots", "for blocks"):
            pair.here.call(drop, name)
        for name in ("slots", "blocks", "receiver"):
            pair.there.call(drop, name)


def test_each_key_is_released_once(pair):
    """Threads race for the same keys: every key has at least one winner, and the deallocated cache is gone after."""
    count = 30
    keys = tuple(CacheKey(pair.there.cluster_id, number) for number in range(count))
    spec = Spec(2, count, (100,), keys=keys)
    expected = spec.fill()
    pair.there.call(make, "raced for", spec)
    pair.there.call(deallocate_now, "raced for")
    won = [0] * count

    def race(number):
        name = f"won {number}"
        pair.here.call(make, name, Spec(2, 1, (100,), seed=number))
        for turn in range(count):
            which = (turn + number * 7) % count
            try:
                pair.here.call(invoke, "pull_cache", keys[which], Named(name))
            except LLMException as error:
                assert error.status_code is NOT_EXIST
                continue
            won[which] += 1
            assert pair.here.call(contents, name) == [tensor[which * 100:which * 100 + 100] for tensor in expected]
        pair.here.call(drop, name)

    in_threads(race)
    assert all(won)
    stats = pair.there.settled()
    assert (stats["caches"], stats["keys"], stats["pins"]) == (2, 0, 0)     # the guards of what was raced for
    pair.there.call(drop, "raced for")


def deallocate_now(node, name):
    held = node.kept[name]
    held.guards[:] = held.guards[:2]
    node.cache_manager.deallocate_cache(held.cache)
