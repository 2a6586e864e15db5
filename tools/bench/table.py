"""What the terminal shows: one line per row as soon as it is measured, figures, goals."""
from __future__ import annotations

from collections.abc import Mapping, Sequence

ROW_HEADER = (
    f"{'':>8}{'of':>7}  {'':<22}{'p50':>10}{'p90':>10}{'p99':>10}{'CPU':>8}\n"
    f"{'GB/s':>8}{'bound':>7}  {'bound':<22}{'us':>10}{'us':>10}{'us':>10}{'s/GB':>8}  bytes  what"
)


def row_line(row: Mapping) -> str:
    """Return the line of a row."""
    fraction = f"{row['fraction']:.2f}" if row.get("fraction") is not None else "-"
    reference = row.get("reference") or "-"
    return (
        f"{row['gb_per_s']:>8.2f}{fraction:>7}  {reference:<22}{number(row['p50_us']):>10}{number(row['p90_us']):>10}"
        f"{number(row['p99_us']):>10}{row['cpu_s_per_gb']:>8.3f}  {verdict(row):<5}  {row['label']}"
    )


def verdict(row: Mapping) -> str:
    """Return "same" or "WRONG"."""
    return "same" if row["wrong_bytes"] == 0 else "WRONG"


def figure_lines(figure: Mapping) -> list[str]:
    """Return the lines of a figure."""
    lines = [figure["text"]]
    for value in figure["values"]:
        note = f"  {value['note']}" if value["note"] else ""
        lines.append(f"  {value['name']:<24}{number(value['value']):>10} {value['unit']:<4}{note}")
    return lines


def goal_lines(goals: Sequence[Mapping]) -> list[str]:
    """Return the table of goals that were measured."""
    lines = []
    for goal in goals:
        if goal["measured"]:
            lines.append(f"{reached_text(goal):<12}{goal['text']}")
            lines.append(f"{'':<12}{goal['measured']}   (goal: {goal['goal']})")
    return lines


def reached_text(goal: Mapping) -> str:
    """Return one word."""
    return {True: "reached", False: "NOT REACHED", None: "not measured"}[goal["reached"]]


def number(value: float) -> str:
    """Return four significant digits without an exponent."""
    if value != value:
        return "-"
    if abs(value) >= 1000:
        return f"{value:.0f}"
    if abs(value) >= 100:
        return f"{value:.1f}"
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.3f}"
