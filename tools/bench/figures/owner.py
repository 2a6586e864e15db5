"""Whether a peer that is busy in Python makes its readers wait."""
from __future__ import annotations

import os
import time
from collections.abc import Callable

from ..case import ALL_BLOCKS, Case
from ..channel import Channel
from ..measure import collection_paused, repeat
from ..rows import Rig
from ..statistics import quantile
from . import value
from .latency import BLOCK_BYTES, block_case, single_block_call

_CHUNK = 1000
_MOST_ROUNDS = 60


def busy_owner(peers: list[Channel], seconds: float, on_progress: Callable[[float], None]) -> list[dict]:
    """Pull with the owner's interpreter idle and spinning in turn, by blocks and by request key."""
    values = []
    by_key = Case("pull_key", "shm", "pool", BLOCK_BYTES, 1, ALL_BLOCKS, 1, 1, 1, 1)
    over_tcp = Case("pull_key", "tcp", "pool", BLOCK_BYTES, 1, ALL_BLOCKS, 1, 1, 1, 1)
    for number, (name, case) in enumerate((("blocks", block_case()), ("key", by_key), ("tcp", over_tcp))):
        with Rig(case, peers) as rig:
            sampler = repeat(single_block_call(rig)) if case.is_paged else rig.sample
            idle, busy = _alternate(
                peers[0], sampler, seconds / 3, lambda fraction, number=number: on_progress((number + fraction) / 3))
        for q in (0.5, 0.99):
            ratio = quantile(busy, q) / quantile(idle, q)
            values.append(value(f"{name}_p{q * 100:.0f}_ratio", ratio, "", (), (
                f"{quantile(busy, q) / 1e3:.1f} us while the owner spins, {quantile(idle, q) / 1e3:.1f} us while it "
                f"idles; {os.cpu_count()} processors")))
    return values


def _alternate(peer: Channel, sampler, seconds: float, on_progress) -> tuple[list[int], list[int]]:
    found: dict[bool, list[int]] = {False: [], True: []}
    sampler(_CHUNK // 10)
    start = time.monotonic()
    with collection_paused():
        for number in range(_MOST_ROUNDS):
            if number >= 6 and time.monotonic() - start > seconds:
                break
            on_progress(min(1.0, (time.monotonic() - start) / seconds))
            for on in (False, True) if number % 2 == 0 else (True, False):
                peer.ask("spin", on=on)
                found[on] += sampler(_CHUNK)
                peer.ask("spin", on=False)
    return found[False], found[True]
