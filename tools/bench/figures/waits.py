"""Waits that end by their deadline: how late they return, and how much processor time they take."""
from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable
from time import perf_counter_ns as clock

from llm_datadist import BlocksCacheKey, LLMTimeoutError
from llm_datadist.core.wait import TableProbe

from .. import engine as engines
from ..channel import Channel
from ..rows import Rig
from ..statistics import quantile
from . import median_value, value
from .latency import block_case

_WAIT_MS = 5
_PULL_MS = 30
_NUM_WAITS = 300
_LEAST_PULLS = 20


def late_and_busy(peers: list[Channel], seconds: float, on_progress: Callable[[float], None]) -> list[dict]:
    """Time out in the core's own wait, and in pulls from a peer that is stopped."""
    values = _core_waits(on_progress)
    return values + _pulls(peers[0], seconds, on_progress)


def _core_waits(on_progress: Callable[[float], None]) -> list[dict]:
    """The wait of a provider that only answers "not yet": ``strnlen(client, 0)`` does, in the place of its query."""
    library = ctypes.CDLL(None)
    probe = TableProbe(caps=0, query=ctypes.cast(library.strnlen, ctypes.c_void_p).value)
    client = ctypes.create_string_buffer(1)
    late_us, busy_us = [], []
    for number in range(_NUM_WAITS):
        before, busy = clock(), time.thread_time_ns()
        try:
            probe.wait(ctypes.addressof(client), 0, _WAIT_MS * 1_000_000)
        except LLMTimeoutError:
            pass
        busy_us.append((time.thread_time_ns() - busy) / 1e3)
        late_us.append((clock() - before) / 1e3 - _WAIT_MS * 1e3)
        if number % 50 == 0:
            on_progress(0.5 * number / _NUM_WAITS)
    return [
        value("core_late_p99_us", quantile(late_us, 0.99), "us", late_us, f"after a wait of {_WAIT_MS} ms, polling"),
        median_value("core_busy_us", busy_us, "us", "processor time of such a wait"),
    ]


def _pulls(peer: Channel, seconds: float, on_progress: Callable[[float], None]) -> list[dict]:
    late_us, busy_us = [], []
    pid = peer.ask("hello")["pid"]
    with Rig(block_case(path="tcp"), [peer], timeout_ms=_PULL_MS) as rig:
        manager, cache = rig.engine.cache_manager, rig.memories[0].cache
        key = BlocksCacheKey(1, engines.BLOCKS_MODEL_ID)
        blocks = list(range(rig.case.num_blocks))
        until = time.monotonic() + seconds
        while len(late_us) < _LEAST_PULLS or time.monotonic() < until:
            manager.pull_blocks(key, cache, blocks, blocks)         # the connections are there and warm
            os.kill(pid, signal.SIGSTOP)
            try:
                before, busy = clock(), time.thread_time_ns()
                try:
                    manager.pull_blocks(key, cache, blocks, blocks)
                except LLMTimeoutError:
                    busy_us.append((time.thread_time_ns() - busy) / 1e3)
                    late_us.append((clock() - before) / 1e3 - _PULL_MS * 1e3)
            finally:
                os.kill(pid, signal.SIGCONT)
            engines.unlink(rig.engine, rig.clusters, force=True)
            engines.link(rig.engine, rig.clusters)
            on_progress(0.5 + 0.5 * min(1.0, 1 - (until - time.monotonic()) / seconds))
    return [
        value("pull_late_p99_us", quantile(late_us, 0.99), "us", late_us,
              f"pulls over TCP from a stopped peer, limit {_PULL_MS} ms, {len(late_us)} of them"),
        median_value("pull_late_us", late_us, "us", "the same, p50"),
        median_value("pull_busy_us", busy_us, "us", "processor time of such a pull"),
    ]
