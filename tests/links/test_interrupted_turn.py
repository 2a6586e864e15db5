"""Ctrl-C while another thread's transfer keeps the link."""
from __future__ import annotations

import signal
import threading

from support.link_steps import ALL_BLOCKS, DESC, TCP_ONLY, stopped, until
from support.peer import engine_options

from llm_datadist import BlocksCacheKey, LLMException, LLMRole


def offer(node):
    """Keep a blocks cache that others can pull."""
    node.kept["cache"] = node.cache_manager.allocate_blocks_cache(DESC, BlocksCacheKey(1))


def withdraw(node):
    """Give it back."""
    node.cache_manager.deallocate_blocks_cache(node.kept.pop("cache"))


def wait_for_a_turn(node, owner_id):
    """Pull in two threads from a cluster that is stopped; return how the main one ended, and if the other runs."""
    manager = node.cache_manager
    cache = manager.allocate_blocks_cache(DESC)

    def pull():
        manager.pull_blocks(BlocksCacheKey(owner_id), cache, ALL_BLOCKS, ALL_BLOCKS)

    first = threading.Thread(target=lambda: _ignore(pull))
    first.start()
    engine = node.dist._require_engine()
    assert until(lambda: engine.links()[0]["running"])
    try:
        signal.signal(signal.SIGUSR1, signal.default_int_handler)
        threading.Timer(0.2, signal.pthread_kill, (threading.main_thread().ident, signal.SIGUSR1)).start()
        pull()
        ended = "nothing"
    except BaseException as error:
        ended = type(error).__name__
    node.kept["first"], node.kept["cache"] = first, cache
    return ended, first.is_alive()


def end_first(node):
    """Wait for the other thread, and clean up."""
    node.kept.pop("first").join()
    node.cache_manager.deallocate_blocks_cache(node.kept.pop("cache"))


def _ignore(call):
    try:
        call()
    except LLMException:
        pass


def test_a_thread_that_waits_for_its_turn_can_be_interrupted(peers):
    owner = peers.child(TCP_ONLY)
    owner.open(1, engine_options(), LLMRole.MIX)
    reader = peers.child(TCP_ONLY)
    reader.open(2, engine_options(timeout_ms=120000), LLMRole.MIX)
    peers.link(reader, owner)
    owner.call(offer)
    with stopped(owner):
        assert reader.call(wait_for_a_turn, 1) == ("KeyboardInterrupt", True)
    reader.call(end_first)
    owner.call(withdraw)
