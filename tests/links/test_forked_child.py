"""A process that is killed is gone for its peers, also while a child that it forked lives on."""
from __future__ import annotations

import contextlib
import os
import signal
import threading
import time

import pytest
from support.link_steps import until
from support.peer import engine_options

from llm_datadist import CacheDesc, CacheKeyByIdAndIndex, DataType, LLMException

NUM_BYTES = 64 << 20
DESC = CacheDesc(1, [1, NUM_BYTES], DataType.DT_UINT8)
OWNER, READER = 1, 2


def fork_a_sleeper(_):
    """Leave a child that sleeps, and return its process id."""
    child = os.fork()
    if child == 0:
        time.sleep(600)
        os._exit(0)
    return child


def pull_for_ever(node, cache_id):
    """Pull in a thread until the process ends."""
    manager = node.cache_manager
    cache = manager.allocate_cache(DESC)

    def run():
        with contextlib.suppress(LLMException):
            while True:
                manager.pull_cache(CacheKeyByIdAndIndex(OWNER, cache_id), cache)

    threading.Thread(target=run, daemon=True).start()


@pytest.mark.parametrize("shared_table", ["1", "0"])
def test_a_reader_that_is_killed_pins_nothing_though_its_child_lives(peers, shared_table):
    env = {"LLM_DATADIST_SHARED_TABLE": shared_table}
    here = peers.here(OWNER, engine_options(device_pool=NUM_BYTES), env=env)
    reader = peers.start(READER, engine_options(device_pool=NUM_BYTES), env=env)
    peers.link(reader, here)
    cache = here.node.cache_manager.allocate_cache(DESC)
    sleeper = reader.call(fork_a_sleeper)
    try:
        reader.call(pull_for_ever, cache.cache_id)
        assert until(lambda: here.stats()["pins"])
        reader.kill()
        assert until(lambda: not here.stats()["pins"] and not here.stats()["links"])
        os.kill(sleeper, 0)
    finally:
        os.kill(sleeper, signal.SIGKILL)
    here.node.cache_manager.deallocate_cache(cache)
    assert here.stats()["device_pool"]["free_bytes"] == NUM_BYTES


def test_a_fork_leaves_the_links_of_the_parent_as_they_are(peers):
    here = peers.here(READER, engine_options(device_pool=NUM_BYTES))
    owner = peers.start(OWNER, engine_options(device_pool=NUM_BYTES))
    peers.link(here, owner)
    manager = here.node.cache_manager
    cache_id = owner.call(_allocate)
    cache = manager.allocate_cache(DESC)
    for _ in range(3):
        child = os.fork()
        if child == 0:
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        manager.pull_cache(CacheKeyByIdAndIndex(OWNER, cache_id), cache)
    manager.deallocate_cache(cache)
    owner.call(_deallocate)


def _allocate(node):
    node.kept["cache"] = node.cache_manager.allocate_cache(DESC)
    return node.kept["cache"].cache_id


def _deallocate(node):
    node.cache_manager.deallocate_cache(node.kept.pop("cache"))
