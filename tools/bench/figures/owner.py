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
    """Pull through shared memory with the owner's interpreter idle and spinning in turn, by blocks and by key."""
    return _compare(peers, "shm", {"blocks": block_case(), "key": _key_case("shm")}, seconds, on_progress)


def busy_owner_tcp(peers: list[Channel], seconds: float, on_progress: Callable[[float], None]) -> list[dict]:
    """The same over TCP, where the owner's service thread answers every pull."""
    return _compare(peers, "tcp", {"key": _key_case("tcp")}, seconds, on_progress)


def _key_case(path: str) -> Case:
    return Case("pull_key", path, "pool", BLOCK_BYTES, 1, ALL_BLOCKS, 1, 1, 1, 1)


def _compare(
    peers: list[Channel], path: str, cases: dict[str, Case], seconds: float, on_progress: Callable[[float], None]
) -> list[dict]:
    values = []
    for number, (name, case) in enumerate(cases.items()):
        with Rig(case, peers) as rig:
            sampler = repeat(single_block_call(rig)) if case.is_paged else rig.sample
            idle, busy = _alternate(
                peers[0], sampler, seconds / len(cases),
                lambda fraction, number=number: on_progress((number + fraction) / len(cases)))
        for q in (0.5, 0.99):
            ratio = quantile(busy, q) / quantile(idle, q)
            values.append(value(f"{name}_p{q * 100:.0f}_ratio", ratio, "", (), (
                f"{quantile(busy, q) / 1e3:.1f} us over {path} while the owner spins, {quantile(idle, q) / 1e3:.1f} us "
                f"while it idles; {os.cpu_count()} processors")))
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
