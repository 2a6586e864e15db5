"""Pulls over TCP that are one exchange: within a moment nothing is left, and what fails has taken nothing."""
import contextlib
import threading

import pytest
from support.link_steps import stopped, until
from support.peer import Peers, engine_options
from transfers.caches import PAGE_BYTES, addrs_of, bytes_at, invoke
from transfers.exchange.steps import (
    KIB,
    MIB,
    NOTHING,
    TCP,
    asking,
    holds,
    meet,
    offer,
    prepare,
    put_away,
    request_key,
    take,
    wanted,
)
from transfers.pair import THERE
from transfers.refusal import NOT_EXIST, refused

from llm_datadist import CacheDesc, CacheKeyByIdAndIndex, DataType, LLMStatusCode
from llm_datadist.status import LLMException, LLMTimeoutError

# ------------------------------------------------------------------------------------- nothing is left within a moment

@pytest.mark.parametrize("num_tensors, tensor_bytes, times", [(2, 96, 300), (2, 2 * MIB, 100)])
def test_nothing_is_left_once_a_pull_is_settled(two_sided, num_tensors, tensor_bytes, times):
    """Key and pin go together: with the last pin nothing is held."""
    pair = two_sided
    pair.here.call(prepare, num_tensors, tensor_bytes)
    assert holds(pair.there.settled()) == NOTHING
    for number in range(times):
        pair.there.call(offer, request_key(), num_tensors, tensor_bytes, number)
        assert holds(pair.there.stats())[:3] == (1, 1, 0)
        correct = pair.here.call(take, request_key(), number)
        assert holds(pair.there.settled()) == NOTHING
        assert correct
    pair.here.call(put_away)


def test_key_is_free_once_a_pull_is_settled(two_sided):
    """The owner binds it again, and there is room: the pool holds no second cache of this size."""
    pair = two_sided
    pair.here.call(prepare, 1, 40 * MIB)
    for number in range(20):
        pair.there.call(offer, request_key(), 1, 40 * MIB, number)
        assert pair.here.call(take, request_key(), number)
        pair.there.settled()
    refused(NOT_EXIST, pair.here.call, take, request_key(), 0)
    pair.here.call(put_away)


@pytest.mark.parametrize("tensor_bytes, times", [(96, 200), (2 * MIB, 60)])
def test_nothing_is_left_of_two_readers(crowd, tensor_bytes, times):
    _, owner, readers = crowd
    for reader in readers:
        reader.call(prepare, 2, tensor_bytes)
    with asking(owner, 0):
        for turn in range(times):
            for number in range(2):
                owner.call(offer, request_key(number), 2, tensor_bytes, turn + number)
            finishes = [reader.begin(take, request_key(number), turn + number)
                        for number, reader in enumerate(readers)]
            correct = [finish() for finish in finishes]
            assert holds(owner.settled()) == NOTHING
            assert correct == [True, True]
    for reader in readers:
        reader.call(put_away)


def take_many(node, keys, seeds):
    return [take(node, key, seed) for key, seed in zip(keys, seeds)]


def test_many_keys_of_two_readers(crowd):
    """Each takes its own keys as fast as it can, both from the same owner."""
    _, owner, readers = crowd
    count, tensor_bytes = 100, 300 * KIB
    for reader in readers:
        reader.call(prepare, 1, tensor_bytes)
    keys = [request_key(number) for number in range(2 * count)]
    for number, key in enumerate(keys):
        owner.call(offer, key, 1, tensor_bytes, number)
    assert owner.stats()["keys"] == 2 * count
    finishes = [reader.begin(take_many, keys[start::2], range(start, 2 * count, 2))
                for start, reader in enumerate(readers)]
    assert [finish() for finish in finishes] == [[True] * count] * 2
    assert holds(owner.settled()) == NOTHING
    for reader in readers:
        reader.call(put_away)


# --------------------------------------------------------------------------------- readers and owners that stand still

WEIGHT = 96 * MIB                   # of a cache: bytes that are on their way for a while


@contextlib.contextmanager
def halfway(owner, reader, begin):
    """Have `begin` start a pull again and again until its reader stands still in the middle of it; how to end that."""
    for _ in range(50):
        finish = begin()
        until(lambda: owner.stats()["pins"])
        with stopped(reader):
            if owner.stats()["pins"]:
                yield finish
                return
        finish()
    raise AssertionError("every pull was over at once")


@pytest.fixture
def weighty(crowd):
    """The crowd of `crowd`, whose first reader is to pull a cache of some weight, by a key that starts anew."""
    peers, owner, readers = crowd
    readers[0].call(prepare, 2, WEIGHT // 2)

    def begin():
        owner.call(offer, request_key(), 2, WEIGHT // 2, 5)
        return readers[0].begin(take, request_key(), 5)

    yield peers, owner, readers, begin


def comes_to_hold(owner, *wanted):
    """Wait until the owner has noticed that a reader is gone, and perhaps what that one asked for last."""
    return until(lambda: holds(owner.stats()) == wanted)


def test_reader_killed_in_the_middle_has_taken_nothing(weighty):
    _, owner, (reader, other), begin = weighty
    with halfway(owner, reader, begin) as finish:
        reader.kill()
        with pytest.raises(Exception, match="ended"):
            finish()
    assert comes_to_hold(owner, 1, 1, 0, WEIGHT)
    other.call(prepare, 2, WEIGHT // 2)
    assert other.call(take, request_key(), 5)
    assert holds(owner.settled()) == NOTHING
    other.call(put_away)


def test_reader_that_stands_still_gets_all_of_it_later(weighty):
    """Nobody gives up on it, and the key is its own until it is through."""
    _, owner, (reader, other), begin = weighty
    with halfway(owner, reader, begin) as finish:
        assert holds(owner.stats()) == (1, 1, 1, WEIGHT)
    assert finish()
    assert holds(owner.settled()) == NOTHING
    other.call(prepare, 2, WEIGHT // 2)
    refused(NOT_EXIST, other.call, take, request_key(), 5)
    for process in (reader, other):
        process.call(put_away)


def test_two_readers_of_one_key_in_the_middle(weighty):
    """Whoever found it before it was taken gets it; whoever comes later does not."""
    _, owner, (reader, other), begin = weighty
    other.call(prepare, 2, WEIGHT // 2)
    with halfway(owner, reader, begin) as finish:
        assert other.call(take, request_key(), 5)
        assert comes_to_hold(owner, 1, 0, 1, WEIGHT)
        refused(NOT_EXIST, other.call, take, request_key(), 5)
    assert finish()
    assert holds(owner.settled()) == NOTHING
    for process in (reader, other):
        process.call(put_away)


@pytest.fixture
def impatient():
    """An owner in a child, and two readers of which the first gives up soon."""
    with Peers() as peers:
        owner = peers.start(THERE, engine_options(), env=TCP)
        reader = peers.here(21, engine_options(timeout_ms=300), env=TCP)
        other = peers.start(22, engine_options(), env=TCP)
        for process in (reader, other):
            peers.link(process, owner)
            meet(owner, process)
        yield peers, owner, reader, other


@pytest.mark.parametrize("num_tensors, tensor_bytes", [(2, 96), (2, 2 * MIB)])
def test_reader_that_gives_up_has_taken_nothing(impatient, num_tensors, tensor_bytes):
    """Though the owner finds the request in its socket when it wakes up; what was taken before stays taken."""
    peers, owner, reader, other = impatient
    owner.call(offer, request_key(1), num_tensors, tensor_bytes, 1)
    owner.call(offer, request_key(2), num_tensors, tensor_bytes, 2)
    reader.call(prepare, num_tensors, tensor_bytes)
    assert reader.call(take, request_key(1), 1)
    with stopped(owner):
        with pytest.raises(LLMTimeoutError):
            reader.call(take, request_key(2), 2)
        reader.call(overwrite)
    assert comes_to_hold(owner, 1, 1, 0, num_tensors * max(tensor_bytes, PAGE_BYTES))
    other.call(prepare, num_tensors, tensor_bytes)
    assert other.call(take, request_key(2), 2)
    assert comes_to_hold(owner, *NOTHING)
    refused(NOT_EXIST, other.call, take, request_key(1), 1)
    assert reader.call(is_overwritten)
    peers.unlink(reader, owner)
    peers.link(reader, owner)
    owner.call(offer, request_key(2), num_tensors, tensor_bytes, 3)
    assert reader.call(take, request_key(2), 3)
    for process in (reader, other):
        process.call(put_away)


def overwrite(node):
    cache = node.kept["target"]
    for addr in addrs_of(cache):
        bytes_at(addr, cache.cache_desc.size)[:] = 0xEE


def is_overwritten(node):
    cache = node.kept["target"]
    return all(bool((bytes_at(addr, cache.cache_desc.size) == 0xEE).all()) for addr in addrs_of(cache))


def test_owner_killed_in_the_middle(peers):
    """The reader is told, and the link is gone."""
    owner = peers.start(THERE, engine_options(device_pool=WEIGHT), env=TCP)
    reader = peers.here(21, engine_options(device_pool=WEIGHT), env=TCP)
    peers.link(reader, owner)
    meet(owner, reader)
    owner.call(offer, request_key(), 2, WEIGHT // 2, 5)
    reader.call(prepare, 2, WEIGHT // 2)
    errors = []

    def pull():
        try:
            reader.call(take, request_key(), 5)
        except LLMException as error:
            errors.append(error)

    with stopped(owner):
        thread = threading.Thread(target=pull)
        thread.start()
        owner.kill()
    thread.join()
    assert [error.status_code for error in errors] in ([LLMStatusCode.LLM_NOT_YET_LINK], [LLMStatusCode.LLM_FAILED],
                                                       [LLMStatusCode.LLM_LINK_FAILED])
    refused(LLMStatusCode.LLM_NOT_YET_LINK, reader.call, take, request_key(), 5)
    reader.call(put_away)


# ------------------------------------------------------------------------------------------ an owner that takes away

def test_key_removed_in_the_middle(weighty):
    """The bytes stay until they are through, and a key that is bound again meanwhile is not the one that was taken."""
    _, owner, (reader, other), begin = weighty
    with halfway(owner, reader, begin) as finish:
        owner.call(invoke, "remove_cache_key", request_key())
        assert holds(owner.stats()) == (1, 0, 1, WEIGHT)
        owner.call(offer, request_key(), 2, 4096, 9)
        assert holds(owner.stats()) == (2, 1, 1, WEIGHT + 8192)
    assert finish()
    assert holds(owner.settled()) == (1, 1, 0, 8192)
    other.call(prepare, 2, 4096)
    assert other.call(take, request_key(), 9)
    assert holds(owner.settled()) == NOTHING
    for process in (reader, other):
        process.call(put_away)


def allocate(node, num_tensors, tensor_bytes, seed):
    """A cache without a key, held by its handle."""
    cache = node.cache_manager.allocate_cache(CacheDesc(num_tensors, [1, tensor_bytes], DataType.DT_UINT8))
    for number, addr in enumerate(addrs_of(cache)):
        bytes_at(addr, tensor_bytes)[:] = wanted(tensor_bytes, seed + number)
    node.kept["held"] = cache
    return CacheKeyByIdAndIndex(THERE, cache.cache_id, 0)


def deallocate(node):
    node.cache_manager.deallocate_cache(node.kept.pop("held"))


def test_deallocated_in_the_middle(crowd):
    """At once gone for everybody else; its memory when the bytes are through."""
    _, owner, (reader, other) = crowd
    for process in (reader, other):
        process.call(prepare, 2, WEIGHT // 2)
    key = owner.call(allocate, 2, WEIGHT // 2, 6)
    with halfway(owner, reader, lambda: reader.begin(take, key, 6)) as finish:
        owner.call(deallocate)
        assert holds(owner.stats())[1:] == (0, 1, WEIGHT)
        refused(NOT_EXIST, other.call, take, key, 6)
    assert finish()
    assert holds(owner.settled()) == NOTHING
    refused(NOT_EXIST, reader.call, take, key, 6)
    for process in (reader, other):
        process.call(put_away)


def test_unregistered_in_the_middle(crowd):
    """The call waits for the reader; from then on the memory is the caller's, and was read before."""
    _, owner, (reader, _) = crowd
    reader.call(prepare, 2, WEIGHT // 2)
    memory = [wanted(WEIGHT // 2, 7 + number) for number in range(2)]
    desc = CacheDesc(2, [1, WEIGHT // 2], DataType.DT_UINT8)
    manager = owner.node.cache_manager
    cache = manager.register_cache(desc, [tensor.ctypes.data for tensor in memory])
    key = CacheKeyByIdAndIndex(THERE, cache.cache_id, 0)
    faults = []

    def unregister():
        try:
            manager.unregister_cache(cache.cache_id)
            for tensor in memory:
                tensor[:] = 0xEE
        except BaseException as error:
            faults.append(error)

    thread = threading.Thread(target=unregister)
    with halfway(owner, reader, lambda: reader.begin(take, key, 7)) as finish:
        thread.start()
        assert until(lambda: is_withdrawn(owner))
        assert thread.is_alive() and owner.stats()["registered_caches"] == 1
    assert finish()
    thread.join()
    assert faults == []
    assert holds(owner.settled()) == NOTHING
    reader.call(put_away)


def is_withdrawn(owner):
    """Whether the cache has no handle any more: nobody finds it."""
    return any(not row["handle"] for row in owner.node.dist._require_engine().caches())
