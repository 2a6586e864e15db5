"""The wall clock jumps by a day, there and back, while calls wait: none of them ends earlier or later for that.

Needs libfaketime, as Debian's package of that name installs it, or at the path in LDD_LIBFAKETIME.
"""
from __future__ import annotations

import glob
import os
import threading
import time

import pytest
from support.link_steps import fetch_code, link, offer, stopped, until, withdraw
from support.peer import engine_options

from llm_datadist import CacheDesc, CacheKey, DataType, LLMStatusCode

S = LLMStatusCode
DAY_S = 24 * 3600
LIBRARY = os.environ.get("LDD_LIBFAKETIME") or next(iter(glob.glob("/usr/lib/*/faketime/libfaketime.so.1")), None)

pytestmark = pytest.mark.skipif(LIBRARY is None, reason="libfaketime is not installed")


@pytest.fixture
def clock(tmp_path):
    """What the file says is added to the wall clock of processes that were started with `env`."""
    class Clock:
        def __init__(self):
            self.path = tmp_path / "offset"
            self.env = {"LD_PRELOAD": LIBRARY, "FAKETIME_TIMESTAMP_FILE": str(self.path),
                        "FAKETIME_DONT_FAKE_MONOTONIC": "1", "FAKETIME_NO_CACHE": "1", "LLM_DATADIST_HOST_PATHS": "tcp"}

        def set(self, offset_s):
            new = self.path.with_suffix(".new")         # read at any moment: never half of it
            new.write_text(f"{offset_s:+d}\n")
            os.replace(new, self.path)

    clock = Clock()
    clock.set(0)
    return clock


def wall_offset_s(node):
    """How far the wall clock of this process is from that of the machine, whose file system tells it."""
    path = os.environ["FAKETIME_TIMESTAMP_FILE"] + f".{os.getpid()}"
    with open(path, "w"):
        real = os.stat(path).st_mtime
    return time.time() - real


def jump(clock, stop):
    """A day forth, a day back, again and again."""
    while not stop.is_set():
        for offset_s in (DAY_S, 0, -DAY_S, 0):
            clock.set(offset_s)
            stop.wait(0.02)


def lease(node):
    cache = node.cache_manager.allocate_cache(CacheDesc(2, [1, 1024], DataType.DT_INT32),
                                              [CacheKey(node.dist.cluster_id, 7)], cache_key_lease_ms=600000)
    node.cache_manager.deallocate_cache(cache)


def remove(node):
    node.cache_manager.remove_cache_key(CacheKey(node.dist.cluster_id, 7))


def timed_fetch(node, cluster_id):
    start = time.monotonic()
    return fetch_code(node, cluster_id), time.monotonic() - start


def test_jumps_of_the_wall_clock_change_nothing(peers, clock):
    owner, reader = (peers.start(cluster_id, engine_options(timeout_ms=400), env=clock.env) for cluster_id in (1, 2))
    clock.set(DAY_S)
    assert abs(abs(reader.call(wall_offset_s)) - DAY_S) < 3600
    for process in (owner, reader):
        process.call(offer)
    assert reader.call(link, (1, owner.address))[0] is S.LLM_SUCCESS
    owner.call(lease)
    stop = threading.Event()
    jumping = threading.Thread(target=jump, args=(clock, stop))
    jumping.start()
    try:
        for _ in range(20):
            assert reader.call(fetch_code, 1) is S.LLM_SUCCESS
        with stopped(owner):
            code, elapsed_s = reader.call(timed_fetch, 1)
            assert code is S.LLM_TIMEOUT and 0.4 <= elapsed_s < DAY_S
        assert until(lambda: reader.call(fetch_code, 1) is S.LLM_SUCCESS)
        assert owner.stats()["expired_keys"] == 0           # ten minutes are not over
    finally:
        stop.set()
        jumping.join()
        clock.set(0)
    owner.call(remove)
    for process in (owner, reader):
        process.call(withdraw)
