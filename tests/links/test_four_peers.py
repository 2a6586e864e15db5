"""A worker thread per peer links to it, pulls from it and unlinks again, while the others do the same."""
from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.link_steps import DESC, NUM_BLOCKS, addrs_of, byte_of, cluster, free, links, offer, withdraw
from support.peer import engine_options, engine_options_v1

from llm_datadist import BlocksCacheKey, LLMRole, LLMStatusCode
from llm_datadist.caches.tensor_view import TensorView

PEERS = (11, 12, 13, 14)
PULLS = 40
OK = (LLMStatusCode.LLM_SUCCESS, [LLMStatusCode.LLM_SUCCESS])


def pull_scattered(manager, peer, cache, number):
    """Pull some blocks to others, and return how many bytes are wrong: pulled ones, and ones to be left alone."""
    chosen = [(number + i) % NUM_BLOCKS for i in range(1 + number % (NUM_BLOCKS - 1))]
    views = [TensorView(addr, DESC.data_type, tuple(DESC.shape), cache).numpy().view("u1") for addr in addrs_of(cache)]
    for view in views:
        view[:] = 0
    manager.pull_blocks(BlocksCacheKey(peer), cache, [(block + 1) % NUM_BLOCKS for block in chosen], chosen)
    return sum(int((view[block] != (byte_of(peer) if block in chosen else 0)).sum())
               for view in views for block in range(NUM_BLOCKS))


def work_with_each(node, addresses):
    """Return per peer what linking said, the wrong bytes of all pulls, and what unlinking said."""
    together = threading.Barrier(len(addresses))

    def work(peer):
        target = cluster(peer, addresses[peer])
        cache = node.cache_manager.allocate_blocks_cache(DESC)
        together.wait(30)
        linked = node.dist.link_clusters([target], 10000)
        wrong = sum(pull_scattered(node.cache_manager, peer, cache, number) for number in range(PULLS))
        unlinked = node.dist.unlink_clusters([target], 10000)
        free(node, cache)
        return linked, wrong, unlinked

    with ThreadPoolExecutor(len(addresses)) as pool:
        return list(pool.map(work, addresses))


@pytest.mark.parametrize("remote_accessible", [False, True])
def test_link_pull_unlink_in_four_threads(peers, remote_accessible):
    options = engine_options(remote_accessible=remote_accessible)
    owners = {cluster_id: peers.start(cluster_id, options) for cluster_id in PEERS}
    here = peers.here(1, options)
    for owner in owners.values():
        owner.call(offer)
    addresses = {cluster_id: owner.address for cluster_id, owner in owners.items()}
    for _ in range(3):
        assert here.call(work_with_each, addresses) == [(OK, 0, OK)] * len(PEERS)
        assert here.call(links) == []
    for owner in owners.values():
        owner.call(withdraw)


def pull_from_all(node, peers_):
    """The same for peers that are linked, and return the wrong bytes of each."""
    def work(peer):
        cache = node.cache_manager.allocate_blocks_cache(DESC)
        try:
            return sum(pull_scattered(node.cache_manager, peer, cache, number) for number in range(PULLS))
        finally:
            free(node, cache)

    with ThreadPoolExecutor(len(peers_)) as pool:
        return list(pool.map(work, peers_))


def test_pull_from_four_prompts_of_the_first_generation(peers):
    prompts = [peers.start(cluster_id, engine_options_v1(), role=LLMRole.PROMPT) for cluster_id in PEERS]
    here = peers.here(1, engine_options_v1(listen=False), role=LLMRole.DECODER)
    for prompt in prompts:
        prompt.call(offer)
        peers.link(here, prompt)
    assert here.call(pull_from_all, PEERS) == [0] * len(PEERS)
    for prompt in prompts:
        peers.unlink(here, prompt)
        prompt.call(withdraw)
