"""What a million live keys change.

Two peers take turns, one that holds a hundred keys and one that holds a million: pulls by key from either (the owner's
table is looked up), and removals and deallocations in either. In the core alone, where no call hides it, random keys of
a large table miss the processor's caches; that ratio is reported next to the one users see.
"""
from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..case import ALL_BLOCKS, Case
from ..channel import Channel
from ..measure import collection_paused
from ..native.stopwatch import TableStopwatch
from ..rows import Rig
from ..statistics import median
from . import median_value, value

MANY, FEW = 1_000_000, 100
KEYS_PER_CACHE = 2
SLOT_BYTES = 2048
_FIRST_HELD = 1 << 40
_CHUNK = 250
_CORE_CHUNK = 40
_LEAST_ROUNDS = 8


def many_keys(peers: list[Channel], seconds: float, on_progress: Callable[[float], None]) -> list[dict]:
    """Time the same operations with few and with many live keys, in turn."""
    sides = (FEW, MANY)
    found: dict[str, dict[int, list[float]]] = {}
    case = Case("pull_key", "shm", "pool", SLOT_BYTES, 1, ALL_BLOCKS, 1, len(sides), 1, 1)
    with Rig(case, peers, page_shift=12, held_caches=MANY // KEYS_PER_CACHE) as rig:
        for peer, live in zip(peers, sides):
            peer.ask("hold", count=live // KEYS_PER_CACHE, first_id=_FIRST_HELD, slot_bytes=SLOT_BYTES)
        rounds = max(_LEAST_ROUNDS, int(seconds * 8))
        with collection_paused():
            for step in range(rounds + 1):
                for link, live in enumerate(sides) if step % 2 else reversed(list(enumerate(sides))):
                    took = peers[link].ask("churn", count=_CHUNK, slot_bytes=SLOT_BYTES)
                    took["resolve"] = rig.sample_link(link, _CHUNK)
                    if step:                    # the first round touches what is new
                        for name in ("resolve", "remove", "deallocate"):
                            found.setdefault(name, {}).setdefault(live, []).append(median(took[name]))
                on_progress(step / (rounds + 1))
    values = []
    for name, by_count in found.items():
        few, many = median(by_count[FEW]), median(by_count[MANY])
        ratios = [m / f for m, f in zip(by_count[MANY], by_count[FEW])]
        values.append(median_value(f"{name}_ratio", ratios, "",
                                   f"{many / 1e3:.2f} us with {MANY} keys, {few / 1e3:.2f} us with {FEW}"))
    return values + _core(seconds)


def _core(seconds: float) -> list[dict]:
    """The same in the core alone: random live keys, no interpreter between two operations."""
    watches = {live: TableStopwatch(live // KEYS_PER_CACHE) for live in (FEW, MANY)}
    key_bytes = watches[MANY].stats()["key_bytes"] / MANY
    rng = np.random.default_rng(8)
    took: dict[str, dict[int, list[float]]] = {}
    for _ in range(max(50, int(seconds * 200))):
        for live, watch in watches.items():
            chosen = rng.permutation(watch.num_caches)[:_CORE_CHUNK] if live == FEW else rng.integers(
                0, watch.num_caches, _CORE_CHUNK)
            chosen = np.unique(chosen).astype(np.int64)
            rng.shuffle(chosen)
            for name in ("resolve", "remove_keys", "deallocate", "allocate"):
                took.setdefault(name, {}).setdefault(live, []).append(getattr(watch, name)(chosen))
    for watch in watches.values():
        watch.close()
    values = [value("bytes_per_key", key_bytes, "B", (), f"in the core, with {MANY} keys")]
    for name, by_count in took.items():
        few = median(by_count[FEW])
        values.append(value(f"core_{name}_ratio", median(by_count[MANY]) / few, "",
                            [each / few for each in by_count[MANY]],
                            f"{median(by_count[MANY]):.0f} ns with {MANY} keys at random, {few:.0f} ns with {FEW}"))
    values.append(median_value("core_resolve_ns", took["resolve"][MANY], "ns", f"one look-up among {MANY} keys"))
    return values
