"""What this package aims at, and whether a run reached it.

A goal on rows looks at every row of a group; its worst fraction of the machine's own rate decides. A goal on a figure
looks at one of its values. What a run did not measure has no verdict.
"""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Goal:
    """One line of the table.

    Attributes
    ----------
    text : str
        What is measured.
    group : str
        Rows it looks at, with `least` as fraction of their reference; or "".
    figure : str
        Figure it looks at; or "".
    limits : dict of str to float
        Values of the figure that must be no larger.
    """

    text: str
    group: str = ""
    least: float = 0.0
    figure: str = ""
    limits: Mapping[str, float] = field(default_factory=dict)


GOALS = (
    Goal("pool memory on one host, against the best local copy of the same descriptors with the same threads",
         group="pool", least=0.90),
    Goal("registered private memory on one host, against raw process_vm_readv with the same threads",
         group="registered", least=0.90),
    Goal("TCP on loopback, against raw sockets with the same connections and sizes", group="tcp", least=0.85),
    Goal("one 4 KiB block, Python call to return, pool memory, above the copy", figure="latency",
         limits={"above_copy_us": 4.0, "p99_over_p50": 3.0}),
    Goal("pull by request key, pool memory, release included, above the copy", figure="release",
         limits={"above_copy_us": 6.0}),
    Goal("fixed cost of pull_blocks: facade and plan, and per block", figure="plan",
         limits={"fixed_us": 2.0, "per_block_list_ns": 10.0, "per_block_int64_ns": 2.0}),
    Goal("allocate and deallocate a cache of 122 tensors with 2 keys", figure="allocate", limits={"pair_us": 6.0}),
    Goal("counting an operation, and recording an event", figure="record",
         limits={"count_ns": 30.0, "event_ns": 100.0}),
    Goal("resolve, remove and deallocate with 10^6 live keys against 10^2", figure="keys",
         limits={"resolve_ratio": 1.3, "remove_ratio": 1.3, "deallocate_ratio": 1.3, "bytes_per_key": 128.0}),
    Goal("owner's interpreter spinning in pure Python: p99 of a pull against idle", figure="owner",
         limits={"blocks_p99_ratio": 1.2, "key_p99_ratio": 1.2}),
    Goal("a reader that stands still, or is dead: time of other readers' pulls, by that without", figure="isolation",
         limits={"stopped_ratio": 1.1, "dead_ratio": 1.1}),
    Goal("link on one host; 512 links", figure="link",
         limits={"link_ms": 10.0, "crowd_s": 5.0, "crowd_resident_kib": 64.0}),
    Goal("wait: how late a time-out returns, and how long it spins before it sleeps", figure="wait",
         limits={"core_late_p99_us": 1000.0, "pull_late_p99_us": 1000.0, "core_spin_us": 50.0}),
)


def judge(rows: Sequence[Mapping], figures: Sequence[Mapping]) -> list[dict]:
    """Return one dict per goal: text, goal, measured, reached (True, False, or None when it was not measured)."""
    return [_judge_rows(goal, rows) if goal.group else _judge_figure(goal, figures) for goal in GOALS]


def _judge_rows(goal: Goal, rows: Sequence[Mapping]) -> dict:
    fractions = [row["fraction"] for row in rows if row["group"] == goal.group and row.get("fraction") is not None]
    verdict = {"text": goal.text, "goal": f">= {goal.least:.2f}", "measured": "", "reached": None}
    if fractions:
        worst, best = min(fractions), max(fractions)
        verdict["measured"] = f"{worst:.2f}" if len(fractions) == 1 else f"{worst:.2f} to {best:.2f}"
        verdict["reached"] = worst >= goal.least
        if not verdict["reached"]:
            missed = sum(fraction < goal.least for fraction in fractions)
            verdict["measured"] += f"; {missed} of {len(fractions)} rows below"
    return verdict


def _judge_figure(goal: Goal, figures: Sequence[Mapping]) -> dict:
    values = {
        value["name"]: value for figure in figures if figure["figure"] == goal.figure for value in figure["values"]}
    wanted, measured, reached = [], [], []
    for name, limit in goal.limits.items():
        found = values.get(name)
        unit = f" {found['unit']}" if found and found["unit"] else ""
        wanted.append(f"{name} <= {limit:g}{unit}")
        if found is not None and not math.isnan(found["value"]):
            measured.append(f"{name} {found['value']:.3g}{unit}")
            reached.append(found["value"] <= limit)
    return {
        "text": goal.text, "goal": ", ".join(wanted), "measured": ", ".join(measured),
        "reached": all(reached) if len(reached) == len(goal.limits) else None,
    }
