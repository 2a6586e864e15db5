"""A put holds a cache of this process; only its own process lets go of it."""
from __future__ import annotations

import gc
import os

from support.link_steps import until
from support.peer import engine_options

from llm_datadist import CacheDesc, DataType, LLMException
from llm_datadist.core.engine.engine import KEY_BY_ID
from llm_datadist.core.engine.layer_push import LayerPush

DESC = CacheDesc(1, [1, 64], DataType.DT_UINT8)
MAX_LEASES = 16384                  # of one link


def pins(engine):
    """Pins of the only cache."""
    (row,) = engine.caches()
    return row["pins"]


def test_a_forked_child_that_drops_a_put_leaves_the_cache_pinned(peers):
    here, other = peers.here(1), peers.start(2)
    peers.link(here, other)
    engine = here.node.dist._require_engine()
    cache = here.node.cache_manager.allocate_cache(DESC)
    put = LayerPush(engine, 2, cache.cache_id)
    child = os.fork()
    if child == 0:
        put.close()
        del put
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert pins(engine) == 1
    put.close()
    assert pins(engine) == 0
    here.node.cache_manager.deallocate_cache(cache)


def list_links_while_puts_are_collected(node, cluster_id):
    """List the links with a garbage collection, which drops a put, after any number of new objects."""
    engine = node.dist._require_engine()
    cache = node.cache_manager.allocate_cache(DESC)
    before = gc.get_threshold()
    try:
        for num_objects in range(1, 40):
            gc.collect()
            gc.disable()
            cycle = [LayerPush(engine, cluster_id, cache.cache_id)]
            cycle.append(cycle)
            del cycle
            gc.set_threshold(gc.get_count()[0] + num_objects)
            gc.enable()
            (link,) = engine.links()
            assert link["cluster_id"] == cluster_id
    finally:
        gc.set_threshold(*before)
        gc.enable()
    gc.collect()
    assert until(lambda: pins(engine) == 0)
    node.cache_manager.deallocate_cache(cache)


def test_links_can_be_listed_while_a_put_is_collected(peers):
    lister, other = peers.start(1), peers.start(2)
    peers.link(lister, other)
    lister.call(list_links_while_puts_are_collected, 2)


def hold_leases(node, cluster_id, peer_id, count):
    """Aim at a cache of the peer many times; return the text of the refusal, or None, and give everything back."""
    engine = node.dist._require_engine()
    cache = node.cache_manager.allocate_cache(DESC)
    puts, text = [], None
    try:
        for _ in range(count):
            puts.append(LayerPush(engine, cluster_id, cache.cache_id))
            puts[-1].aim_at_key((KEY_BY_ID, peer_id, 0, 0), 1)
    except LLMException as error:
        text = str(error)
    for put in puts:
        put.close()
    node.cache_manager.deallocate_cache(cache)
    return text


def test_a_peer_cannot_take_leases_without_end(peers):
    options = engine_options(remote_accessible=True)
    here, other = peers.here(1, options), peers.start(2, options)
    peers.link(other, here)
    cache = here.node.cache_manager.allocate_cache(DESC)
    text = other.call(hold_leases, 1, cache.cache_id, MAX_LEASES + 1)
    assert f"no room for another lease, {MAX_LEASES} are out" in text
    assert other.call(hold_leases, 1, cache.cache_id, 1) is None
    assert here.stats()["pins"] == 0
    here.node.cache_manager.deallocate_cache(cache)
