"""Taking samples: an operation and its references in turn, so that each is compared with its neighbour in time."""
from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from .statistics import median, quantile

# Does something a number of times and returns the nanoseconds of each.
Sampler = Callable[[int], "list[int]"]

_CHUNK_NS = 3_000_000
_MAX_CHUNK = 2000
_WARM_UP = 3
_MIN_ROUNDS, _MAX_ROUNDS = 5, 400
_MAX_LATENCIES = 200_000


@dataclass
class Samples:
    """What `interleave` saw.

    Attributes
    ----------
    rounds : list of dict
        Per round: name to median nanoseconds; "op" is the operation, the others are references.
    latencies : list of int
        Nanoseconds of every single operation.
    """

    rounds: list[dict[str, float]] = field(default_factory=list)
    latencies: list[int] = field(default_factory=list)

    def best_reference(self) -> str:
        """Return the name of the reference with the least median, or "" without any."""
        names = [name for name in self.rounds[0] if name != "op"]
        return min(names, key=lambda name: median([each[name] for each in self.rounds]), default="")

    def ratios(self, reference: str) -> list[float]:
        """Return reference time / operation time of every round: how much of the reference's rate was reached."""
        return [each[reference] / each["op"] for each in self.rounds]

    def excess(self, reference: str) -> list[float]:
        """Return operation time - reference time of every round, nanoseconds."""
        return [each["op"] - each[reference] for each in self.rounds]

    def latency(self, q: float) -> float:
        """Return a quantile of the single operations, nanoseconds."""
        return quantile(self.latencies, q)


def interleave(
    operation: Sampler, references: Mapping[str, Sampler], seconds: float,
    on_progress: Callable[[float], None] = lambda fraction: None, most_per_chunk: int = _MAX_CHUNK,
) -> Samples:
    """Measure an operation and its references in turn for about `seconds`, at least a few rounds.

    The order within a round alternates. Garbage collection waits meanwhile.
    """
    samples = Samples()
    samplers = {"op": operation, **references}
    chunks = {}
    with collection_paused():
        for name, sampler in samplers.items():
            took = max(1.0, median(sampler(min(_WARM_UP, most_per_chunk))))
            chunks[name] = int(max(1, min(_CHUNK_NS // took, _MAX_CHUNK)))
        chunks["op"] = min(chunks["op"], most_per_chunk)
        start = time.monotonic()
        while len(samples.rounds) < _MAX_ROUNDS:
            passed = time.monotonic() - start
            if passed >= seconds and len(samples.rounds) >= _MIN_ROUNDS:
                break
            on_progress(min(passed / seconds, len(samples.rounds) / _MIN_ROUNDS, 1.0))
            order = list(samplers) if len(samples.rounds) % 2 == 0 else list(samplers)[::-1]
            found = {}
            for name in order:
                took = samplers[name](chunks[name])
                found[name] = median(took)
                if name == "op" and len(samples.latencies) < _MAX_LATENCIES:
                    samples.latencies += took
            samples.rounds.append(found)
    return samples


def repeat(call: Callable[[], object]) -> Sampler:
    """Turn a call into a sampler that times it from outside."""
    clock = time.perf_counter_ns

    def sample(count: int) -> list[int]:
        took = []
        for _ in range(count):
            before = clock()
            call()
            took.append(clock() - before)
        return took

    return sample


def repeat_timed(call: Callable[[], int]) -> Sampler:
    """Turn a call that returns its own nanoseconds into a sampler."""
    return lambda count: [call() for _ in range(count)]


@contextlib.contextmanager
def collection_paused():
    """Keep the garbage collector from running into a measurement."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
