"""A result for readers: one self-contained HTML file, and Markdown for the documentation."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from . import chart
from .table import number, reached_text, verdict

BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
_ROW_TITLES = ("what", "GB/s", "of the bound", "bound", "p50 us", "p90 us", "p99 us", "CPU s/GB", "bytes")
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; width: 100%; font-size: 13px; } td, th { padding: 3px 8px; text-align: right; }
td:first-child, th:first-child { text-align: left; } tr { border-bottom: 1px solid #8884; }
.missed { color: #c53030; font-weight: 600; } .met { color: #2f855a; }
@media (prefers-color-scheme: dark) { body { background: #16181d; color: #e6e6e6; } }
"""


def write_html(path: str, result: Mapping) -> None:
    """Write everything but the samples into one file that loads nothing else."""
    parts = [
        "<!doctype html>", '<html lang="en"><head><meta charset="utf-8">', "<title>llm-datadist bench</title>",
        f"<style>{_STYLE}</style></head><body>", "<h1>llm-datadist bench</h1>",
        f"<p>{escape(_where(result))}</p><p><code>{escape(result['command'])}</code></p>",
    ]
    goals = [goal for goal in result["goals"] if goal["measured"]]
    if goals:
        parts.append("<h2>Goals</h2>")
        parts.append(_html_table(("what", "goal", "measured", ""), [
            (goal["text"], goal["goal"], goal["measured"], reached_text(goal)) for goal in goals]))
    if result["rows"]:
        parts += ["<h2>Transfers</h2>", chart.div(result["rows"]), _html_table(_ROW_TITLES, _row_cells(result["rows"]))]
    if result["figures"]:
        parts.append("<h2>Figures</h2>")
    for figure in result["figures"]:
        parts.append(f"<h3>{escape(figure['text'])}</h3>")
        parts.append(_html_table(("value", "", "unit", "note"), _value_cells(figure)))
    for failure in result["failures"]:
        parts.append(f"<h3 class='missed'>failed: {escape(failure['name'])}</h3><pre>{escape(failure['text'])}</pre>")
    Path(path).write_text("\n".join([*parts, "</body></html>"]) + "\n", encoding="utf-8")


def write_markdown(path: str, result: Mapping) -> None:
    """Write the figures as Markdown.

    A file that has the two marker comments keeps everything around them; another one is made anew.
    """
    target = Path(path)
    content = f"{BEGIN}\n\n{markdown(result)}\n{END}"
    if target.exists():
        text = target.read_text(encoding="utf-8")
        before, begin, rest = text.partition(BEGIN)
        _, end, after = rest.partition(END)
        if begin and end:
            target.write_text(before + content + after, encoding="utf-8")
            return
    target.write_text(f"# Performance\n\n{content}\n", encoding="utf-8")


def markdown(result: Mapping) -> str:
    """Return the tables of a result."""
    parts = [_where(result), "", f"`{result['command']}`", ""]
    goals = [goal for goal in result["goals"] if goal["measured"]]
    if goals:
        parts += _markdown_table(("What", "Goal", "Measured", "Reached"), [
            (goal["text"], goal["goal"], goal["measured"], {True: "yes", False: "**no**", None: "-"}[goal["reached"]])
            for goal in goals])
    if result["rows"]:
        parts += ["### Transfers", "", *_markdown_table(_ROW_TITLES, _row_cells(result["rows"]))]
    if result["figures"]:
        parts += ["### Figures", ""]
    for figure in result["figures"]:
        parts += [f"{figure['text'][0].upper()}{figure['text'][1:]}:", ""]
        parts += _markdown_table(("Value", "", "Unit", "Note"), _value_cells(figure))
    if result["failures"]:
        parts += ["Failed: " + ", ".join(failure["name"] for failure in result["failures"]), ""]
    return "\n".join(parts)


def _where(result: Mapping) -> str:
    machine, load = result["machine"], result["load"]
    commit = f", commit {machine['commit']}" if machine.get("commit") else ""
    return (
        f"{machine['cpu']}, {machine['cpus']} processors, {machine['memory_gib']:g} GiB, Linux {machine['kernel']} "
        f"{machine['architecture']}, {machine['python']}, llm-datadist {machine['version']}{commit}; "
        f"{result['started']}, {result['seconds']:g} s, load average {load['before'][0]:g} before and "
        f"{load['after'][0]:g} after."
    )


def _row_cells(rows: Sequence[Mapping]) -> list[tuple[str, ...]]:
    return [
        (row["label"], f"{row['gb_per_s']:.2f}", f"{row['fraction']:.2f}" if row.get("fraction") is not None else "-",
         row.get("reference") or "-", number(row["p50_us"]), number(row["p90_us"]), number(row["p99_us"]),
         f"{row['cpu_s_per_gb']:.3f}", verdict(row)) for row in rows
    ]


def _value_cells(figure: Mapping) -> list[tuple[str, ...]]:
    return [(value["name"], number(value["value"]), value["unit"], value["note"]) for value in figure["values"]]


def _html_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    classes = {"NOT REACHED": "missed", "WRONG": "missed", "reached": "met"}
    head = "".join(f"<th>{escape(title)}</th>" for title in titles)
    body = "".join(
        "<tr>" + "".join(
            f'<td class="{classes[cell]}">{escape(cell)}</td>' if cell in classes else f"<td>{escape(cell)}</td>"
            for cell in row
        ) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _markdown_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [line(titles), "|" + "---|" * len(titles), *[line(row) for row in rows], ""]
