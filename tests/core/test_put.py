"""A put holds a cache of this process; only its own process lets go of it."""
from __future__ import annotations

import gc
import os

from link_steps import until

from llm_datadist import CacheDesc, DataType
from llm_datadist.core.put import RemotePut

DESC = CacheDesc(1, [1, 64], DataType.DT_UINT8)


def pins(engine):
    """Pins of the only cache."""
    (row,) = engine.caches()
    return row["pins"]


def test_a_forked_child_that_drops_a_put_leaves_the_cache_pinned(peers):
    here, other = peers.here(1), peers.start(2)
    peers.link(here, other)
    engine = here.node.dist._require_engine()
    cache = here.node.cache_manager.allocate_cache(DESC)
    put = RemotePut(engine, 2, cache.cache_id)
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
            cycle = [RemotePut(engine, cluster_id, cache.cache_id)]
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
