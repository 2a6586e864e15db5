"""An owner that finalises while a peer reads its memory: the peer fails, or has what was there before."""
from __future__ import annotations

import signal

import numpy as np
from support.link_steps import stopped, until
from support.peer import engine_options
from transfers.caches import addrs_of, bytes_at

from llm_datadist import CacheDesc, CacheKeyByIdAndIndex, DataType, LLMException

NUM_BYTES = 256 << 20
DESC = CacheDesc(1, [1, NUM_BYTES], DataType.DT_UINT8)
BEFORE, AFTER = 7, 9


def pull_for_ever(node, owner_id, cache_id):
    """Pull until that fails; return whether any pull before that brought bytes of afterwards."""
    manager = node.cache_manager
    cache = manager.allocate_cache(DESC)
    pulled = bytes_at(addrs_of(cache)[0], NUM_BYTES)
    is_wrong = False
    try:
        while not is_wrong:
            manager.pull_cache(CacheKeyByIdAndIndex(owner_id, cache_id), cache)
            is_wrong = bool((pulled[::4096] != BEFORE).any())
    except LLMException:
        pass
    manager.deallocate_cache(cache)
    return is_wrong


def test_no_pull_succeeds_with_what_the_owner_wrote_after_it_finalized(peers):
    reader = peers.start(2, engine_options(device_pool=NUM_BYTES, timeout_ms=20000))
    here = peers.here(1, engine_options(device_pool=0, timeout_ms=300))
    peers.link(reader, here)
    manager = here.node.cache_manager
    memory = np.full(NUM_BYTES, BEFORE, np.uint8)
    cache = manager.register_cache(DESC, [memory.ctypes.data], [])
    finish = reader.begin(pull_for_ever, 1, cache.cache_id)
    # Stop it while it reads: it holds the cache, and cannot say whether it is done.
    def stop_while_reading():
        if until(lambda: here.stats()["pins"]):
            reader.signal(signal.SIGSTOP)
            if here.stats()["pins"]:
                return True
            reader.signal(signal.SIGCONT)
        return False

    assert until(stop_while_reading)
    with stopped(reader):
        here.finalize()
        memory[:] = AFTER
    assert finish() is False
