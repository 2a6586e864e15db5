"""Waits that end by their deadline: how late they return, and how much processor time they take."""
from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Callable
from time import perf_counter_ns as clock

from llm_datadist import BlocksCacheKey
from llm_datadist.core.wait import TableProbe
from llm_datadist.status import LLMTimeoutError

from .. import engine as engines
from ..channel import Channel
from ..rows import Rig
from ..statistics import median, quantile, slope
from . import median_value, value
from .latency import block_case

_LIMITS_MS = (0, 1, 2, 4, 8)
_PULL_MS = 30
_NUM_WAITS = 75
_LEAST_PULLS = 20


def late_and_busy(peers: list[Channel], seconds: float, on_progress: Callable[[float], None]) -> list[dict]:
    """Time out in the core's own wait, and in pulls from a peer that is stopped."""
    values = _core_waits(on_progress)
    return values + _pulls(peers[0], seconds, on_progress)


def _core_waits(on_progress: Callable[[float], None]) -> list[dict]:
    """The wait of a provider that only answers "not yet": ``strnlen(client, 0)`` does, in the place of its query.

    It spins for a while and then naps between looks, so its processor time grows with the limit, and what it takes
    whatever the limit, less that of a wait with no time at all, is the spinning.
    """
    library = ctypes.CDLL(None)
    probe = TableProbe(caps=0, query=ctypes.cast(library.strnlen, ctypes.c_void_p).value)
    client = ctypes.create_string_buffer(1)
    late_us: list[float] = []
    busy_us: dict[int, list[float]] = {limit_ms: [] for limit_ms in _LIMITS_MS}
    for number in range(_NUM_WAITS):
        for limit_ms in _LIMITS_MS:
            before, busy = clock(), time.thread_time_ns()
            with contextlib.suppress(LLMTimeoutError):
                probe.wait(ctypes.addressof(client), 0, limit_ms * 1_000_000)
            busy_us[limit_ms].append((time.thread_time_ns() - busy) / 1e3)
            if limit_ms:
                late_us.append((clock() - before) / 1e3 - limit_ms * 1e3)
        on_progress(0.5 * number / _NUM_WAITS)
    nothing_us = median(busy_us.pop(0))
    spin_us, per_ms = slope([(limit_ms, median(busy) - nothing_us) for limit_ms, busy in busy_us.items()])
    return [
        value("core_late_p99_us", quantile(late_us, 0.99), "us", late_us, "a wait that polls, after its limit"),
        value("core_spin_us", max(0.0, spin_us), "us", (), "processor time that does not depend on the limit"),
        value("core_poll_percent", per_ms / 10, "%", (), "of a processor, from then on"),
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
                with contextlib.suppress(LLMTimeoutError):
                    manager.pull_blocks(key, cache, blocks, blocks)
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
