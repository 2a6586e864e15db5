"""Figures that are no row of a sweep: latencies, bookkeeping, links and waits.

Each is measured by a function that gets the peers it asked for, and returns a list of values. A value has a name, a
unit, the number, and the samples it is the median (or the quantile) of; smaller is better for all of them.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..channel import Channel
from ..statistics import median, thin

_KEPT_SAMPLES = 400


@dataclass(frozen=True)
class Figure:
    """A measurement of its own.

    Attributes
    ----------
    text : str
        What it is, for people.
    module : str
        Module of this package whose `measure` does it; imported in the measuring process only.
    function : str
        Its name there: ``function(peers, seconds, on_progress)`` returns a list of values.
    path : str
        Data path of the session.
    num_peers : int
    """

    text: str
    module: str
    function: str
    path: str = "shm"
    num_peers: int = 1

    def measure(self, peers: Sequence[Channel], seconds: float, on_progress: Callable[[float], None]) -> dict:
        """Return {"values": [...]}."""
        from importlib import import_module

        function = getattr(import_module(f"{__name__}.{self.module}"), self.function)
        return {"values": function(list(peers), seconds, on_progress)}


FIGURES = {
    "latency": Figure("one 4 KiB block by pull_blocks, pool memory", "latency", "one_block"),
    "release": Figure("4 KiB by request key, released by the pull, pool memory", "latency", "by_key"),
    "plan": Figure("fixed cost of pull_blocks: facade and plan", "overhead", "pull_blocks_cost"),
    "allocate": Figure("allocate and deallocate 122 tensors with 2 keys", "overhead", "allocate_cost", num_peers=0),
    "record": Figure("counting an operation, and recording an event", "overhead", "record_cost", num_peers=0),
    "checksum": Figure("pull with checksums against without, pool memory", "checksums", "with_and_without"),
    "keys": Figure("10^6 live keys against 10^2", "keys", "many_keys", num_peers=2),
    "owner": Figure("owner's interpreter spinning in pure Python against idle", "owner", "busy_owner"),
    "owner_tcp": Figure("the same over TCP, where the owner answers", "owner", "busy_owner_tcp", path="tcp"),
    "isolation": Figure("pulls over TCP beside a reader that stands still or is dead", "isolation",
                        "stopped_and_dead_readers", path="tcp"),
    "link": Figure("linking, and 512 links", "links", "many_links", num_peers=8),
    "wait": Figure("time-outs: how late, and how much processor time they take", "waits", "late_and_busy", path="tcp"),
}


def value(name: str, number: float, unit: str, samples: Sequence[float] = (), note: str = "") -> dict:
    """Describe one number of a figure; `samples` in the same unit."""
    return {"name": name, "value": number, "unit": unit, "note": note, "samples": thin(samples, _KEPT_SAMPLES)}


def median_value(name: str, samples: Sequence[float], unit: str, note: str = "") -> dict:
    """Describe the median of samples."""
    return value(name, median(samples), unit, samples, note)
