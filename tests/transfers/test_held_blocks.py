"""Blocks that are held for one request: pulled under their key, and what the owner is told of its end."""
from __future__ import annotations

import os
import select
import signal
import threading
import time

import numpy as np
import pytest
from support.link_steps import stopped, until
from support.peer import engine_options

from llm_datadist import (
    BlocksCacheKey,
    CacheDesc,
    DataType,
    HeldBlocksKey,
    KeyEvent,
    KeyOutcome,
    LLMException,
    LLMStatusCode,
)
from llm_datadist.status import LLMLinkError, LLMNotFoundError, LLMParamInvalidError

OWNER, READER = 1, 2
BLOCKS, BLOCK_BYTES, TENSORS = 8, 1 << 20, 2     # so that a pull takes longer than what is around it
PATHS = ["shm", "cma", "tcp"]


def desc():
    return CacheDesc(TENSORS, [BLOCKS, BLOCK_BYTES], DataType.DT_UINT8)


# These run in the owner.

def make(node, registered=True):
    manager = node.cache_manager
    if registered:
        arrays = [np.zeros([BLOCKS, BLOCK_BYTES], np.uint8) for _ in range(TENSORS)]
        node.kept["arrays"] = arrays
        cache = manager.register_blocks_cache(desc(), [array.ctypes.data for array in arrays], BlocksCacheKey(OWNER))
    else:
        cache = manager.allocate_blocks_cache(desc(), BlocksCacheKey(OWNER))
        arrays = cache.tensors()
    for tensor, array in enumerate(arrays):
        for block in range(BLOCKS):
            array[block] = 16 * tensor + block
    node.kept["cache"] = cache


def drop(node):
    cache = node.kept.pop("cache")
    if cache.is_registered:
        node.cache_manager.unregister_cache(cache.cache_id)
    else:
        node.cache_manager.deallocate_blocks_cache(cache)


def hold(node, request, generation=0, lease_ms=None):
    node.cache_manager.hold_blocks(node.kept["cache"], HeldBlocksKey(OWNER, request, generation), lease_ms)


def unhold(node, request, generation=0):
    return node.cache_manager.drop_blocks(HeldBlocksKey(OWNER, request, generation))


def wait_events(node, count=1, timeout_s=10):
    """Events in order, once there are `count`; the descriptor says when to look."""
    manager, events = node.cache_manager, []
    deadline = time.monotonic() + timeout_s
    poller = select.poll()
    poller.register(manager.key_event_fd(), select.POLLIN)
    while len(events) < count and poller.poll(max(0, deadline - time.monotonic()) * 1000):
        taken = manager.take_key_events()
        assert taken, "the descriptor was readable, but there was no event"
        events += taken
    assert not poller.poll(0), "all events are taken, but the descriptor is readable"
    return [(event.key.req_id, event.key.generation, event.outcome) for event in events]


def is_readable(node):
    poller = select.poll()
    poller.register(node.cache_manager.key_event_fd(), select.POLLIN)
    return bool(poller.poll(0))


class Pair:
    """An owner in a process of its own, and the reader's cache here."""

    def __init__(self, peers, **options):
        self.owner = peers.start(OWNER, engine_options(**options))
        self.here = peers.here(READER, engine_options(**options))
        peers.link(self.here, self.owner)
        self.owner.call(make)
        self.manager = self.here.node.cache_manager
        self.cache = self.manager.allocate_blocks_cache(desc())

    def pull(self, request, generation=0, src=(3, 5), dst=(0, 1), **kwargs):
        self.manager.pull_blocks(HeldBlocksKey(OWNER, request, generation), self.cache, list(src), list(dst), **kwargs)

    def check(self, src=(3, 5), dst=(0, 1)):
        for tensor, array in enumerate(self.cache.tensors()):
            for there, here in zip(src, dst):
                assert (array[here] == 16 * tensor + there).all()

    def close(self):
        self.manager.deallocate_blocks_cache(self.cache)
        if self.owner.is_running:
            assert self.owner.stats()["holds"] == 0
            self.owner.call(drop)


@pytest.fixture
def pair(peers):
    made = Pair(peers)
    yield made
    made.close()


def not_held(call, *args, **kwargs):
    with pytest.raises(LLMNotFoundError) as caught:
        call(*args, **kwargs)
    assert caught.value.status_code is LLMStatusCode.LLM_KV_CACHE_NOT_EXIST


# ------------------------------------------------------------------------------------------------ how keys end

@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("remote_accessible", [False, True])
def test_a_pull_ends_the_key_and_the_owner_learns_of_it(monkeypatch, peers, path, remote_accessible):
    monkeypatch.setenv("LLM_DATADIST_HOST_PATHS", path)
    pair = Pair(peers, remote_accessible=remote_accessible)
    pair.owner.call(hold, 7, 1)
    assert pair.owner.stats()["holds"] == 1
    assert not pair.owner.call(is_readable)
    pair.pull(7, 1)
    pair.check()
    assert pair.owner.call(wait_events) == [(7, 1, KeyOutcome.PULLED)]
    not_held(pair.pull, 7, 1)
    pair.close()


def test_blocks_of_a_pool_are_held_too(peers):
    pair = Pair(peers)
    pair.owner.call(drop)
    pair.owner.call(make, registered=False)
    pair.owner.call(hold, 7)
    pair.pull(7)
    pair.check()
    assert pair.owner.call(wait_events) == [(7, 0, KeyOutcome.PULLED)]
    pair.close()


def test_several_pulls_may_share_a_key(pair):
    pair.owner.call(hold, 7)
    pair.pull(7, src=[1], dst=[0], release=False)
    pair.pull(7, src=[2], dst=[1], release=False)
    assert pair.owner.stats()["pins"] == 0
    assert not pair.owner.call(is_readable)
    pair.pull(7, src=[3], dst=[2])
    pair.check([1, 2, 3], [0, 1, 2])
    assert pair.owner.call(wait_events) == [(7, 0, KeyOutcome.PULLED)]


def test_a_reader_lets_go_without_reading(pair):
    pair.owner.call(hold, 7)
    pair.manager.release_blocks(HeldBlocksKey(OWNER, 7))
    assert pair.owner.call(wait_events) == [(7, 0, KeyOutcome.RELEASED)]
    not_held(pair.manager.release_blocks, HeldBlocksKey(OWNER, 7))


def test_a_key_expires_and_a_late_pull_is_refused(pair):
    pair.owner.call(hold, 7, 0, 20)
    assert pair.owner.call(wait_events) == [(7, 0, KeyOutcome.EXPIRED)]
    before = [array.copy() for array in pair.cache.tensors()]
    not_held(pair.pull, 7)
    assert all((old == new).all() for old, new in zip(before, pair.cache.tensors()))


def test_a_late_pull_is_refused_before_the_owner_has_looked(pair):
    pair.owner.call(hold, 7, 0, 1)
    time.sleep(0.05)
    not_held(pair.pull, 7)
    assert pair.owner.call(wait_events) == [(7, 0, KeyOutcome.EXPIRED)]


def test_the_lease_of_a_key_can_be_renewed_and_given_later(pair):
    pair.owner.call(hold, 7)
    pair.owner.call(hold, 7, 0, 60_000)
    pair.owner.call(hold, 8, 0, 1)
    pair.owner.call(hold, 7, 0, 30)
    events = pair.owner.call(wait_events, 2)
    assert events == [(8, 0, KeyOutcome.EXPIRED), (7, 0, KeyOutcome.EXPIRED)]


def test_a_withdrawn_key_is_in_no_event(pair):
    pair.owner.call(hold, 7)
    assert pair.owner.call(unhold, 7)
    assert not pair.owner.call(unhold, 7)
    not_held(pair.pull, 7)
    assert pair.owner.call(wait_events, timeout_s=0) == []


def test_generations_of_a_request_are_different_keys(pair):
    pair.owner.call(hold, 7, 1)
    pair.pull(7, 1)
    pair.owner.call(hold, 7, 2)
    not_held(pair.pull, 7, 1)
    pair.pull(7, 2, src=[6, 7])
    pair.check([6, 7])
    assert pair.owner.call(wait_events, 2) == [(7, 1, KeyOutcome.PULLED), (7, 2, KeyOutcome.PULLED)]


def test_a_refused_pull_leaves_the_key(pair):
    pair.owner.call(hold, 7)
    with pytest.raises(LLMParamInvalidError):
        pair.pull(7, src=[BLOCKS], dst=[0])
    assert pair.owner.stats()["pins"] == 0
    pair.pull(7)
    assert pair.owner.call(wait_events) == [(7, 0, KeyOutcome.PULLED)]


def test_a_cache_that_is_gone_cannot_be_pulled_by_its_keys(pair):
    pair.owner.call(hold, 7)
    pair.owner.call(drop)
    not_held(pair.pull, 7)
    pair.owner.call(make)
    not_held(pair.pull, 7)                          # ids are never reused
    assert pair.owner.call(unhold, 7)


# ------------------------------------------------------------------------------- peers that end, or are at it

@pytest.mark.parametrize("path", PATHS)
def test_the_key_that_a_dying_reader_reads_is_lost(monkeypatch, peers, path):
    """The reader's process is stopped while it reads, and ended there."""
    monkeypatch.setenv("LLM_DATADIST_HOST_PATHS", path)
    owner = peers.start(OWNER, engine_options())
    reader = peers.start(READER, engine_options())
    peers.link(reader, owner)
    owner.call(make)
    for request in (7, 8):
        owner.call(hold, request)
    reader.call(read_for_ever, 7)
    assert until(lambda: stands_still_reading(reader, owner))
    reader.kill()
    assert owner.call(wait_events) == [(7, 0, KeyOutcome.LOST)]
    assert until(lambda: owner.stats()["pins"] == 0)
    assert owner.call(unhold, 8)                    # nobody was reading that
    owner.call(drop)


def read_for_ever(node, request):
    cache = node.cache_manager.allocate_blocks_cache(desc())
    blocks = list(range(BLOCKS))

    def read():
        while True:
            node.cache_manager.pull_blocks(HeldBlocksKey(OWNER, request), cache, blocks, blocks, release=False)

    threading.Thread(target=read, daemon=True).start()


def stands_still_reading(reader, owner):
    """Stop the reader; let it go on when it was between two pulls."""
    with stopped(reader):
        if owner.stats()["pins"]:
            reader.signal(signal.SIGKILL)
            return True
    return False


def test_a_reader_that_is_at_it_when_its_lease_ends_may_finish(peers):
    owner = peers.start(OWNER, engine_options())
    reader = peers.start(READER, engine_options())
    peers.link(reader, owner)
    owner.call(make)
    owner.call(hold, 7)
    reader.call(read_for_ever, 7)
    assert until(lambda: expires_while_read(reader, owner))
    assert owner.call(wait_events) == [(7, 0, KeyOutcome.EXPIRED)]
    reader.kill()
    owner.call(drop)


def expires_while_read(reader, owner):
    with stopped(reader):
        if not owner.stats()["pins"]:
            return False
        owner.call(hold, 7, 0, 1)
        assert owner.call(wait_events, timeout_s=0.1) == []
        assert owner.stats()["holds"] == 1
    return True


def test_a_key_withdrawn_while_it_is_read_fails_the_pull(peers):
    owner = peers.start(OWNER, engine_options())
    reader = peers.start(READER, engine_options())
    peers.link(reader, owner)
    owner.call(make)
    owner.call(hold, 7)
    reader.call(read_until_refused, 7)
    assert until(lambda: withdrawn_while_read(reader, owner))
    assert reader.call(refusal) == LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
    assert owner.call(wait_events, timeout_s=0) == []
    owner.call(drop)


def read_until_refused(node, request):
    cache = node.cache_manager.allocate_blocks_cache(desc())
    blocks = list(range(BLOCKS))

    def read():
        try:
            while True:
                node.cache_manager.pull_blocks(HeldBlocksKey(OWNER, request), cache, blocks, blocks, release=False)
        except LLMException as error:
            node.kept["refusal"] = error.status_code
            node.cache_manager.deallocate_blocks_cache(cache)

    node.kept["thread"] = threading.Thread(target=read, daemon=True)
    node.kept["thread"].start()


def refusal(node):
    node.kept["thread"].join(10)
    return node.kept["refusal"]


def withdrawn_while_read(reader, owner):
    with stopped(reader):
        return bool(owner.stats()["pins"]) and owner.call(unhold, 7)


def test_many_keys_and_threads(pair):
    """Every key ends in exactly one event, whoever wins."""
    count = 200
    for request in range(count):
        pair.owner.call(hold, request, 5, 60_000)

    def read(first):
        for request in range(first, count, 4):
            pair.pull(request, 5, src=[request % BLOCKS], dst=[first])

    threads = [threading.Thread(target=read, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    events = pair.owner.call(wait_events, count)
    assert sorted(events) == [(request, 5, KeyOutcome.PULLED) for request in range(count)]


# ------------------------------------------------------------------------------------------ what is not allowed

def test_wrong_arguments(pair, assert_raises):
    key, cache, manager = HeldBlocksKey(READER, 1), pair.cache, pair.manager
    assert_raises("TE", manager.hold_blocks, None, key)
    assert_raises("TE", manager.hold_blocks, cache, BlocksCacheKey(READER))
    assert_raises("TE", manager.hold_blocks, cache, key, "1")
    assert_raises("VE", manager.hold_blocks, cache, key, -1)
    assert_raises("PI", manager.hold_blocks, cache, HeldBlocksKey(OWNER, 1))
    assert_raises("PI", manager.drop_blocks, HeldBlocksKey(OWNER, 1))
    assert_raises("TE", manager.drop_blocks, 1)
    assert_raises("TE", manager.release_blocks, BlocksCacheKey(OWNER))
    assert_raises("TE", pair.pull, 1, release=1)
    assert_raises("PI", pair.pull, 1, src=(), dst=(0,))
    assert_raises("VE", HeldBlocksKey, -1, 0)
    assert_raises("TE", HeldBlocksKey, 0, 0, None)
    contiguous = manager.allocate_cache(CacheDesc(1, [1, 16], DataType.DT_UINT8))
    assert_raises("PI", manager.hold_blocks, contiguous, key)
    manager.deallocate_cache(contiguous)
    other = manager.allocate_blocks_cache(CacheDesc(1, [1, 16], DataType.DT_UINT8))
    manager.hold_blocks(cache, key)
    assert_raises("PI", manager.hold_blocks, other, key)
    manager.drop_blocks(key)
    manager.deallocate_blocks_cache(other)
    assert_raises("NOT_EXIST", manager.hold_blocks, other, key)
    assert pair.here.stats()["holds"] == 0


def test_without_a_link(peers):
    here = peers.here(READER, engine_options())
    with pytest.raises(LLMLinkError) as caught:
        here.node.cache_manager.release_blocks(HeldBlocksKey(OWNER, 1))
    assert caught.value.status_code is LLMStatusCode.LLM_NOT_YET_LINK


def test_after_finalize(peers):
    here = peers.here(READER, engine_options())
    manager = here.node.cache_manager
    fd = manager.key_event_fd()
    os.fstat(fd)
    here.finalize()
    with pytest.raises(LLMException):
        manager.take_key_events()


def test_keys_and_events_are_values():
    assert HeldBlocksKey(1, 2, 3) == HeldBlocksKey(1, 2, 3) != HeldBlocksKey(1, 2, 4)
    assert len({HeldBlocksKey(1, 2, 3), HeldBlocksKey(1, 2, 3)}) == 1
    assert repr(HeldBlocksKey(1, 2, 3)) == "HeldBlocksKey(cluster_id=1, req_id=2, generation=3)"
    event = KeyEvent(HeldBlocksKey(1, 2), KeyOutcome.LOST)
    assert str(event.outcome) == "KeyOutcome.LOST"
