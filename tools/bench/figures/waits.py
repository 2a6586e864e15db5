"""Waits that end by their deadline: how late they return, and how much processor time they take."""
from __future__ import annotations

import contextlib
import os
import resource
import signal
import time
from collections.abc import Callable
from time import perf_counter_ns as clock

from llm_datadist import BlocksCacheKey
from llm_datadist.status import LLMTimeoutError

from .. import engine as engines
from ..channel import Channel
from ..native.stopwatch import wait_in_vain
from ..rows import Rig
from ..statistics import median, quantile, slope
from . import median_value, value
from .latency import block_case

_LIMITS_US = (1000, 2000, 4000, 8000)
_SPIN_STEP_US, _MOST_SPIN_US, _NUM_SPINS = 5, 400, 9
_PULL_MS = 30
_NUM_WAITS = 75
_LEAST_PULLS = 20


def late_and_busy(peers: list[Channel], seconds: float, on_progress: Callable[[float], None]) -> list[dict]:
    """Time out in the core's own wait, and in pulls from a peer that is stopped."""
    values = _core_waits(on_progress)
    return values + _pulls(peers[0], seconds, on_progress)


def _core_waits(on_progress: Callable[[float], None]) -> list[dict]:
    """The wait of a provider that only answers "not yet": it spins for a while and then naps between looks."""
    late_us: list[float] = []
    asleep_us: list[float] = []
    busy_us: dict[int, list[float]] = {limit_us: [] for limit_us in _LIMITS_US}
    for number in range(_NUM_WAITS):
        for limit_us in _LIMITS_US:
            before, busy = clock(), time.thread_time_ns()
            wait_in_vain(limit_us * 1000)
            busy_us[limit_us].append((time.thread_time_ns() - busy) / 1e3)
            late_us.append((clock() - before) / 1e3 - limit_us)
            before = clock()
            time.sleep(limit_us / 1e6)
            asleep_us.append((clock() - before) / 1e3 - limit_us)
        on_progress(0.5 * number / _NUM_WAITS)
    _, per_us = slope([(limit_us, median(busy)) for limit_us, busy in busy_us.items()])
    return [
        value("core_late_p99_us", quantile(late_us, 0.99), "us", late_us, "a wait that polls, after its limit"),
        value("sleep_late_p99_us", quantile(asleep_us, 0.99), "us", asleep_us,
              "a plain sleep of the same length, in turn: what the machine adds"),
        value("core_spin_us", _longest_spin(), "us", (), "the longest such wait that never sleeps"),
        value("core_poll_percent", 100 * per_us, "%", (), "of a processor, while it naps and looks"),
    ]


def _longest_spin() -> float:
    """Return the longest limit, in microseconds, that usually passes without this thread giving up its processor."""
    longest = 0
    for limit_us in range(_SPIN_STEP_US, _MOST_SPIN_US + 1, _SPIN_STEP_US):
        slept = []
        for _ in range(_NUM_SPINS):
            before = resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
            wait_in_vain(limit_us * 1000)
            slept.append(resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw - before)
        if median(slept) == 0:
            longest = limit_us
    return float(longest)


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
