"""Pictures of a result: by plotly for the report, and a PNG by matplotlib."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

_TITLE = "llm-datadist bench: rate of each row beside the bound of its path"
_UNIT = "GB/s; the line marks what the machine does itself"
_COLOURS = {"shm": "#2b6cb0", "cma": "#2f855a", "tcp": "#b7791f"}


class ChartError(RuntimeError):
    """There is nothing to draw with; the text says what to install."""


def div(rows: Sequence[Mapping]) -> str:
    """Return `figure` for a page that loads nothing, with the script that draws it."""
    return figure(rows).to_html(full_html=False, include_plotlyjs=True, config={"displaylogo": False})


def figure(rows: Sequence[Mapping]) -> Any:
    """Return a chart of plotly: a bar per row, and a mark at the machine's own rate.

    Raises
    ------
    ChartError
        Plotly is not installed.
    """
    require_plotly()
    from plotly import graph_objects

    labels = [escape(row["label"]) for row in rows]
    fractions = [f"{row['gb_per_s']:.1f}" + (f" ({row['fraction']:.2f})" if row.get("fraction") is not None else "")
                 for row in rows]
    bars = graph_objects.Bar(
        x=[row["gb_per_s"] for row in rows], y=labels, orientation="h", text=fractions, textposition="auto",
        marker_color=[_COLOURS.get(row["path"], "#666") for row in rows], name="measured")
    bound = [(reference_rate(row), label) for row, label in zip(rows, labels) if reference_rate(row)]
    marks = graph_objects.Scatter(
        x=[rate for rate, _ in bound], y=[label for _, label in bound], mode="markers", name="bound of its path",
        marker={"symbol": "line-ns-open", "size": 16, "color": "#c53030", "line": {"width": 3}})
    drawn = graph_objects.Figure([bars, marks])
    drawn.update_layout(
        title=_TITLE, xaxis_title=_UNIT, height=140 + 26 * len(rows), template="plotly_white",
        yaxis={"autorange": "reversed", "automargin": True}, legend={"orientation": "h", "y": -0.15})
    return drawn


def reference_rate(row: Mapping) -> float:
    """Return the rate of the row's reference, GB/s; 0 without one."""
    return row["references"][row["reference"]] if row.get("reference") else 0.0


def require_plotly() -> None:
    """Raise ChartError without what draws for a page."""
    try:
        import plotly  # noqa: F401
    except ImportError:
        raise ChartError("a chart needs plotly: pip install 'llm-datadist[tools]'") from None


def require() -> None:
    """Raise ChartError without what draws a PNG."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise ChartError("a PNG needs matplotlib: pip install 'llm-datadist[bench]'") from None


def write_png(path: str, rows: Sequence[Mapping]) -> None:
    """Write the same picture as PNG; raises ChartError without matplotlib."""
    require()
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.use("Agg")
    figure = Figure(figsize=(12, 1.2 + 0.32 * max(1, len(rows))), layout="constrained")
    axes = figure.subplots()
    places = range(len(rows))
    axes.barh(places, [row["gb_per_s"] for row in rows], height=0.6,
              color=[_COLOURS.get(row["path"], "#666") for row in rows])
    for place, row in zip(places, rows):
        if reference_rate(row):
            axes.plot([reference_rate(row)] * 2, [place - 0.4, place + 0.4], color="#c53030", linewidth=2)
    axes.set_yticks(list(places), [row["label"] for row in rows])
    axes.margins(y=0.02)
    axes.invert_yaxis()
    axes.set_title(_TITLE)
    axes.set_xlabel(_UNIT)
    for place, row in zip(places, rows):
        fraction = f" ({row['fraction']:.2f})" if row.get("fraction") is not None else ""
        end = max(row["gb_per_s"], reference_rate(row))
        axes.annotate(f" {row['gb_per_s']:.1f}{fraction}", (end, place), va="center")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110)
