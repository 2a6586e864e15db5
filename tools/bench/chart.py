"""Pictures of a result: an SVG drawn here, for the report, and a PNG by matplotlib where that is installed."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

WIDTH = 960
_LABEL_WIDTH, _BAR_HEIGHT, _GAP, _TOP, _RIGHT = 430, 16, 8, 34, 70
_COLOURS = {"shm": "#2b6cb0", "cma": "#2f855a", "tcp": "#b7791f"}


class ChartError(RuntimeError):
    """There is nothing to draw with; the text says what to install."""


def svg(rows: Sequence[Mapping]) -> str:
    """Return a bar per row, in GB/s, with a mark at the machine's own rate. Empty without rows."""
    if not rows:
        return ""
    most = max(max(row["gb_per_s"], reference_rate(row)) for row in rows)
    scale = (WIDTH - _LABEL_WIDTH - _RIGHT) / most
    height = _TOP + len(rows) * (_BAR_HEIGHT + _GAP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        'font-family="system-ui, sans-serif" font-size="12">',
        f'<text x="{_LABEL_WIDTH}" y="14" fill="currentColor">GB/s; the line marks what the machine does itself</text>',
    ]
    for tick in _ticks(most):
        x = _LABEL_WIDTH + tick * scale
        parts.append(f'<line x1="{x:.1f}" y1="{_TOP - 6}" x2="{x:.1f}" y2="{height}" stroke="#8884"/>')
        parts.append(f'<text x="{x:.1f}" y="{_TOP - 8}" text-anchor="middle" fill="#888">{tick:g}</text>')
    for index, row in enumerate(rows):
        y = _TOP + index * (_BAR_HEIGHT + _GAP)
        length, middle = row["gb_per_s"] * scale, y + _BAR_HEIGHT - 4
        fraction = f" ({row['fraction']:.2f})" if row.get("fraction") is not None else ""
        parts.append(
            f'<text x="{_LABEL_WIDTH - 8}" y="{middle}" text-anchor="end" fill="currentColor">{escape(row["label"])}'
            f'</text><rect x="{_LABEL_WIDTH}" y="{y}" width="{length:.1f}" height="{_BAR_HEIGHT}" '
            f'fill="{_COLOURS.get(row["path"], "#666")}"/>')
        end = length
        if reference_rate(row):
            x = _LABEL_WIDTH + reference_rate(row) * scale
            end = max(end, x - _LABEL_WIDTH)
            parts.append(f'<line x1="{x:.1f}" y1="{y - 2}" x2="{x:.1f}" y2="{y + _BAR_HEIGHT + 2}" '
                         'stroke="#c53030" stroke-width="2"/>')
        parts.append(f'<text x="{_LABEL_WIDTH + end + 5:.1f}" y="{middle}" fill="currentColor">'
                     f'{row["gb_per_s"]:.1f}{fraction}</text>')
    return "\n".join([*parts, "</svg>"])


def reference_rate(row: Mapping) -> float:
    """Return the rate of the row's reference, GB/s; 0 without one."""
    return row["references"][row["reference"]] if row.get("reference") else 0.0


def require() -> None:
    """Raise ChartError without what draws a PNG."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise ChartError("a PNG needs matplotlib: pip install 'llm-datadist[bench]'") from None


def write_png(path: str, rows: Sequence[Mapping]) -> None:
    """Write the picture of `svg` as PNG; raises ChartError without matplotlib."""
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
    axes.set_title("llm-datadist bench: rate of each row beside the bound of its path")
    axes.set_xlabel("GB/s; the line marks what the machine does itself")
    for place, row in zip(places, rows):
        fraction = f" ({row['fraction']:.2f})" if row.get("fraction") is not None else ""
        end = max(row["gb_per_s"], reference_rate(row))
        axes.annotate(f" {row['gb_per_s']:.1f}{fraction}", (end, place), va="center")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110)


def _ticks(most: float) -> list[float]:
    """Round numbers from 0 to about `most`, four to eight of them."""
    step = 10.0 ** -3
    while most / step > 8:
        step *= 2.5 if f"{step:e}".startswith("2") else 2
    return [index * step for index in range(int(most / step) + 1)]
