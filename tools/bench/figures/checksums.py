"""What it costs to hold what was pulled against checksums of its source."""
from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import contextmanager
from typing import Iterator

from ..case import ALL_BLOCKS, PAGED_TENSORS, Case
from ..channel import Channel
from ..measure import collection_paused
from ..rows import Rig
from ..statistics import median
from . import median_value
from .latency import block_case

_VARIABLE = "LLM_DATADIST_CHECKSUM"
_MIN_ROUNDS = 3


@contextmanager
def _checksums(value: str) -> Iterator[None]:
    before = os.environ.get(_VARIABLE)
    os.environ[_VARIABLE] = value
    try:
        yield
    finally:
        del os.environ[_VARIABLE]
        if before is not None:
            os.environ[_VARIABLE] = before


def with_and_without(peers: list[Channel], seconds: float, on_progress: Callable[[float], None]) -> list[dict]:
    """Pull with checksums and without, in turn: an engine of each for a round, since it is an option of the engine.

    A ratio is the time with checksums by the time without.
    """
    cases = {
        "paged": Case("pull_blocks", "shm", "pool", 16384, 64, ALL_BLOCKS, PAGED_TENSORS, 1, 1, 1),
        "one_block": block_case(num_blocks=1),
    }
    found: list[dict] = []
    for name, case in cases.items():
        took: dict[str, list[float]] = {"0": [], "1": []}
        spent = 0.0
        while spent < seconds / len(cases) or len(took["1"]) < _MIN_ROUNDS:
            for value in ("0", "1") if len(took["1"]) % 2 else ("1", "0"):
                with _checksums(value), Rig(case, peers) as rig, collection_paused():
                    count = 30 if name == "paged" else 2000
                    rig.sample(count // 10)
                    samples = rig.sample(count)
                took[value].append(median(samples))
                spent += sum(samples) / 1e9
            on_progress(min(1.0, (len(found) / 3 + spent / seconds) / len(cases)))
        ratios = [with_ / without for with_, without in zip(took["1"], took["0"])]
        found += [
            median_value(f"{name}_ratio", ratios, "", f"{case.label}: time with checksums by time without"),
            median_value(f"{name}_us", [each / 1e3 for each in took["1"]], "us", "with checksums"),
            median_value(f"{name}_without_us", [each / 1e3 for each in took["0"]], "us", "without"),
        ]
    return found
