"""Which rows and figures a run measures: presets, and sweeps from the command line."""
from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from .case import ALL_BLOCKS, DEFAULT_STREAMS, PAGED_TENSORS, Case, sweep
from .figures import FIGURES

KIB, MIB = 1 << 10, 1 << 20
_MOST_DEFAULT_THREADS = 4


@dataclass(frozen=True)
class Plan:
    """Rows and figures of one run.

    Attributes
    ----------
    cases : sequence of Case
    figures : sequence of str
        Names of `FIGURES`.
    seconds : float
        To spend on sampling each of them.
    skipped : sequence of str
        What was asked for and cannot be measured, with the reason.
    """

    cases: Sequence[Case]
    figures: Sequence[str] = ()
    seconds: float = 1.5
    skipped: Sequence[str] = ()


def default_threads() -> int:
    """Return how many threads the host provider would copy with here."""
    return min(_MOST_DEFAULT_THREADS, len(os.sched_getaffinity(0)))


def paged(path: str, memory: str, block_bytes: int, run_blocks: int, group: str, threads: int) -> Case:
    """Return a pull of 32 blocks in each of 122 tensors."""
    return Case("pull_blocks", path, memory, block_bytes, 32, run_blocks, PAGED_TENSORS, 1, threads, DEFAULT_STREAMS,
                group)


def large(path: str, memory: str, group: str, threads: int) -> Case:
    """Return a pull of 256 MiB in one run."""
    return Case("pull_cache", path, memory, 256 * MIB, 1, ALL_BLOCKS, 1, 1, threads, DEFAULT_STREAMS, group)


def preset(name: str, threads: int, streams: int = DEFAULT_STREAMS) -> Plan:
    """Return a preset: "quick" takes about half a minute, "goals" measures all that `goals` has a limit for.

    Raises ValueError for a number of threads or connections that is not allowed.
    """
    if name == "quick":
        cases = [
            paged("shm", "pool", 16 * KIB, 1, "pool", threads), paged("shm", "pool", 64 * KIB, 8, "pool", threads),
            large("shm", "pool", "pool", threads),
            paged("cma", "registered", 64 * KIB, 1, "registered", threads),
            paged("tcp", "pool", 64 * KIB, 1, "tcp", threads),
            Case("pull_key", "shm", "pool", 256 * KIB, 1, ALL_BLOCKS, 8, 1, threads, DEFAULT_STREAMS),
            replace(paged("shm", "pool", 16 * KIB, 1, "", threads), operation="push_blocks"),
        ]
        plan = Plan(cases, ("latency", "release", "plan", "allocate"), 1.0)
    else:
        cases = [paged("shm", "pool", size * KIB, run, "pool", threads) for size in (16, 64, 128) for run in (1, 8)]
        cases += [large("shm", "pool", "pool", threads)]
        cases += [paged("cma", "registered", size * KIB, 1, "registered", threads) for size in (16, 64, 128)]
        cases += [paged("cma", "registered", 64 * KIB, 8, "registered", threads),
                  large("cma", "registered", "registered", threads)]
        cases += [paged("tcp", "pool", size * KIB, 1, "tcp", threads) for size in (16, 64, 128)]
        cases += [large("tcp", "pool", "tcp", threads)]
        # What one exchange costs, with and without a key to release. No goal: most of it is the kernel waking threads.
        cases += [Case(operation, "tcp", "pool", 4 * KIB, 1, ALL_BLOCKS, 1, 1, threads, DEFAULT_STREAMS)
                  for operation in ("pull_blocks", "pull_key")]
        plan = Plan(cases, tuple(FIGURES), 3.0)
    plan = replace(plan, cases=[replace(case, num_streams=streams) for case in plan.cases])
    for case in plan.cases:
        case.check()
    return plan


def from_axes(axes: Mapping[str, Sequence]) -> Plan:
    """Return the sweep over every combination of `axes`, which are fields of `Case`."""
    base = Case("pull_blocks", "shm", "pool", 64 * KIB, 32, 1, PAGED_TENSORS, 1, default_threads(), DEFAULT_STREAMS)
    cases, skipped = [], []
    for case, reason in sweep(base, axes):
        if reason:
            skipped.append(f"{case.label}: {reason}")
        else:
            case.check()
            cases.append(case)
    return Plan(cases, skipped=skipped)
