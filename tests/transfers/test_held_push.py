"""Blocks that are held for one request and written under their key, layer by layer, while a model would run."""
from __future__ import annotations

import threading

import pytest
from support.link_steps import until
from support.peer import engine_options
from transfers.test_held_blocks import BLOCK_BYTES, BLOCKS, OWNER, PATHS, READER, drop, hold, make, unhold, wait_events

from llm_datadist import (
    CacheDesc,
    DataType,
    HeldBlocksKey,
    KeyOutcome,
    LayerSynchronizer,
    LLMStatusCode,
    TransferWithCacheKeyConfig,
)
from llm_datadist.status import LLMNotFoundError, LLMParamInvalidError

TENSORS = 2


def content(node, blocks):
    """The first and last byte of blocks of each tensor of the owner."""
    return [[(int(array[block][0]), int(array[block][-1])) for block in blocks] for array in node.kept["arrays"]]


class Steps(LayerSynchronizer):
    """Layers that are complete when the test says so."""

    def __init__(self, all_at_once=False):
        self.ready = [threading.Event() for _ in range(TENSORS)]
        if all_at_once:
            for event in self.ready:
                event.set()

    def synchronize_layer(self, layer_index, timeout_in_millis):
        return self.ready[layer_index].wait(30)


class Pair:
    """An owner in a process of its own, whose blocks are written, and the source here."""

    def __init__(self, peers):
        options = engine_options(remote_accessible=True)
        self.owner = peers.start(OWNER, options)
        self.here = peers.here(READER, options)
        peers.link(self.here, self.owner)
        self.owner.call(make)
        self.manager = self.here.node.cache_manager
        self.cache = self.manager.allocate_blocks_cache(
            CacheDesc(TENSORS, [BLOCKS, BLOCK_BYTES], DataType.DT_UINT8))
        for tensor, array in enumerate(self.cache.tensors()):
            for block in range(BLOCKS):
                array[block] = 128 + 16 * tensor + block

    def push(self, request, steps=None, src=(3, 5), dst=(0, 1), generation=0, release=True):
        layers = range(TENSORS)
        config = TransferWithCacheKeyConfig(HeldBlocksKey(OWNER, request, generation), layers, layers, release=release)
        return self.manager.transfer_cache_async(self.cache, steps or Steps(True), [config], list(src), list(dst),
                                                 tensor_num_per_layer=1)

    def check(self, src=(3, 5), dst=(0, 1)):
        expected = [[(128 + 16 * tensor + block,) * 2 for block in src] for tensor in range(TENSORS)]
        assert self.owner.call(content, list(dst)) == expected

    def close(self):
        self.manager.deallocate_blocks_cache(self.cache)
        if self.owner.is_running:
            assert self.owner.stats()["pins"] == 0
            self.owner.call(drop)


@pytest.fixture
def pair(peers):
    made = Pair(peers)
    yield made
    made.close()


@pytest.mark.parametrize("path", PATHS)
def test_a_push_ends_the_key_and_the_owner_learns_of_it(monkeypatch, peers, path):
    monkeypatch.setenv("LLM_DATADIST_HOST_PATHS", path)
    pair = Pair(peers)
    pair.owner.call(hold, 7, 2)
    assert pair.push(7, generation=2).synchronize(30_000) == LLMStatusCode.LLM_SUCCESS
    pair.check()
    assert pair.owner.call(wait_events) == [(7, 2, KeyOutcome.PULLED)]
    late = pair.push(7, generation=2, src=[1], dst=[2])
    assert late.synchronize(30_000) == LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
    assert isinstance(late.exception(), LLMNotFoundError)
    assert pair.owner.call(content, [2]) == [[(2, 2)], [(18, 18)]]
    pair.close()


def test_several_pushes_may_share_a_key(pair):
    pair.owner.call(hold, 7)
    assert pair.push(7, src=[3], dst=[0], release=False).synchronize(30_000) == LLMStatusCode.LLM_SUCCESS
    assert pair.owner.stats()["holds"] == 1
    assert pair.push(7, src=[5], dst=[1]).synchronize(30_000) == LLMStatusCode.LLM_SUCCESS
    pair.check()
    assert pair.owner.call(wait_events) == [(7, 0, KeyOutcome.PULLED)]


def test_a_lease_that_ends_during_a_push_waits_for_it(pair):
    """And refuses newcomers: so an owner that wants its blocks back knows when nobody writes any more."""
    pair.owner.call(hold, 7)
    steps = Steps()
    task = pair.push(7, steps)
    steps.ready[0].set()
    assert until(lambda: task.progress == [(1, 2)])
    pair.owner.call(hold, 7, 0, 0)
    assert pair.owner.stats()["holds"] == 1
    steps.ready[1].set()
    assert task.synchronize(30_000) == LLMStatusCode.LLM_SUCCESS
    pair.check()
    assert pair.owner.call(wait_events) == [(7, 0, KeyOutcome.PULLED)]


def test_a_withdrawn_key_fails_the_push(pair):
    pair.owner.call(hold, 7)
    steps = Steps()
    task = pair.push(7, steps)
    steps.ready[0].set()
    assert until(lambda: task.progress == [(1, 2)])
    assert pair.owner.call(unhold, 7)
    steps.ready[1].set()
    assert task.synchronize(30_000) == LLMStatusCode.LLM_KV_CACHE_NOT_EXIST


def test_a_push_that_is_cancelled_leaves_the_key(pair):
    pair.owner.call(hold, 7)
    steps = Steps()
    task = pair.push(7, steps)
    steps.ready[0].set()
    assert until(lambda: task.progress == [(1, 2)])
    assert task.cancel()
    steps.ready[1].set()
    assert pair.owner.stats()["holds"] == 1
    assert pair.push(7).synchronize(30_000) == LLMStatusCode.LLM_SUCCESS
    pair.check()
    assert pair.owner.call(wait_events) == [(7, 0, KeyOutcome.PULLED)]


def start_push(node, cluster_id, request):
    """Half of a push, in the process that dies."""
    cache = node.cache_manager.allocate_blocks_cache(CacheDesc(TENSORS, [BLOCKS, BLOCK_BYTES], DataType.DT_UINT8))
    steps = Steps()
    steps.ready[0].set()
    layers = range(TENSORS)
    config = TransferWithCacheKeyConfig(HeldBlocksKey(cluster_id, request), layers, layers)
    node.kept["task"] = node.cache_manager.transfer_cache_async(cache, steps, [config], [0], [1],
                                                                tensor_num_per_layer=1)
    assert until(lambda: node.kept["task"].progress == [(1, 2)])


def test_a_peer_that_dies_while_it_writes_is_an_event(peers):
    options = engine_options(remote_accessible=True)
    owner, writer = peers.start(OWNER, options), peers.start(READER, options)
    peers.link(writer, owner)
    owner.call(make)
    owner.call(hold, 7)
    writer.call(start_push, OWNER, 7)
    writer.kill()
    assert owner.call(wait_events) == [(7, 0, KeyOutcome.LOST)]
    owner.call(drop)


def test_what_does_not_fit_is_refused(pair):
    with pytest.raises(LLMParamInvalidError, match="tensor_num_per_layer"):
        pair.manager.transfer_cache_async(pair.cache, Steps(True), [], tensor_num_per_layer=0)
    with pytest.raises(LLMParamInvalidError, match="a layer has 3 tensors"):
        pair.manager.transfer_cache_async(pair.cache, Steps(True), [], tensor_num_per_layer=3)
    with pytest.raises(TypeError, match="release"):
        TransferWithCacheKeyConfig(HeldBlocksKey(OWNER, 1), range(1), range(1), release=1)
    config = TransferWithCacheKeyConfig(HeldBlocksKey(OWNER, 1), range(1), range(1))
    config.src_batch_index = 1
    with pytest.raises(LLMParamInvalidError, match="src_batch_index=1"):
        pair.manager.transfer_cache_async(pair.cache, Steps(True), [config], [0], [0])
