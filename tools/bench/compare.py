"""What changed between two runs beyond noise.

Rows are compared by the fraction of the machine's own rate they reached, where there is one: a machine that was slower
all along cancels out. Otherwise, and for figures, by time. A change counts when the bootstrap interval of the ratio of
medians excludes 1, and the change is larger than a threshold and than twice the error that the samples' spread gives.
"""
from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from llm_datadist.tools.tables import columns

from .statistics import change, median, spread
from .table import number

DEFAULT_THRESHOLD = 0.05


@dataclass(frozen=True)
class Change:
    """One thing that both runs measured.

    Attributes
    ----------
    name : str
    what : str
        What is compared: "fraction of bound" (more is better) or a unit of time or size (less is better).
    before, after : float
        Medians.
    ratio, low, high : float
        after / before, and its bootstrap interval.
    verdict : str
        "better", "worse", or "" when it is within noise.
    """

    name: str
    what: str
    before: float
    after: float
    ratio: float
    low: float
    high: float
    verdict: str


def compare(before: Mapping, after: Mapping, threshold: float = DEFAULT_THRESHOLD) -> tuple[list[Change], list[str]]:
    """Return the changes of everything that both results have, and the names of what only one of them has."""
    first, second = dict(_series(before)), dict(_series(after))
    changes = [
        _judge(name, first[name], second[name], threshold)
        for name in first if name in second and first[name].what == second[name].what
    ]
    return changes, sorted(first.keys() ^ second.keys())


@dataclass(frozen=True)
class _Series:
    label: str
    what: str
    more_is_better: bool
    samples: list


def _series(result: Mapping) -> Iterator[tuple[str, _Series]]:
    for row in result["rows"]:
        samples = row["samples"]
        if samples.get("fraction"):
            yield row["key"], _Series(row["label"], "fraction of bound", True, samples["fraction"])
        else:
            micro = [each / 1e3 for each in samples["op_ns"]]
            yield row["key"], _Series(row["label"], "us", False, micro)
    for figure in result["figures"]:
        for value in figure["values"]:
            name = f"{figure['figure']}.{value['name']}"
            samples = value["samples"] or [value["value"]]
            yield name, _Series(name, value["unit"], False, samples)


def _judge(name: str, before: _Series, after: _Series, threshold: float) -> Change:
    ratio, low, high = change(before.samples, after.samples)
    verdict = ""
    if len(before.samples) > 1 and len(after.samples) > 1 and not math.isnan(ratio):
        noise = max(_relative_spread(series.samples) for series in (before, after))
        needed = max(threshold, min(2 * noise / math.sqrt(min(len(before.samples), len(after.samples))), 1.0))
        if abs(ratio - 1) > needed and not low <= 1 <= high:
            verdict = "better" if (ratio > 1) == before.more_is_better else "worse"
    return Change(before.label, before.what, median(before.samples), median(after.samples), ratio, low, high, verdict)


def _relative_spread(samples: list) -> float:
    middle = median(samples)
    return spread(samples) / abs(middle) if middle else 0.0


def lines(changes: list[Change], lonely: list[str], everything: bool) -> list[str]:
    """Return the text: what changed, or with `everything` all that was compared."""
    shown = [each for each in changes if everything or each.verdict]
    text = []
    if shown:
        rows = [("what", "unit", "before", "after", "change", "99 % interval", "")]
        rows += [(each.name, each.what, number(each.before), number(each.after), _percent(each.ratio),
                  f"{_percent(each.low)} .. {_percent(each.high)}", each.verdict) for each in shown]
        text += columns(rows)
    better, worse = (sum(each.verdict == word for each in changes) for word in ("better", "worse"))
    same = len(changes) - better - worse
    text.append(f"{len(changes)} compared: {better} better, {worse} worse, {same} within noise")
    if lonely:
        text.append(f"{len(lonely)} measured by one run only")
    return text


def _percent(ratio: float) -> str:
    return "-" if math.isnan(ratio) else f"{100 * (ratio - 1):+.1f} %"
