"""Tables of texts: by ``rich`` on a terminal where that is installed, plainly aligned elsewhere."""
from __future__ import annotations

import sys
from collections.abc import Sequence


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Align texts in columns, two spaces apart; the first is flush left."""
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    return [
        "  ".join(f"{text:<{width}}" if index == 0 else f"{text:>{width}}"
                  for index, (text, width) in enumerate(zip(row, widths))).rstrip()
        for row in rows
    ]


def show(rows: Sequence[Sequence[str]]) -> None:
    """Print a table, the first row of which has its titles."""
    if sys.stdout.isatty():
        try:
            from rich.console import Console
            from rich.table import Table
        except ImportError:
            pass
        else:
            table = Table()
            for index, title in enumerate(rows[0]):
                table.add_column(title, justify="right" if index else "left", overflow="fold")
            for row in rows[1:]:
                table.add_row(*row)
            Console(markup=False, highlight=False).print(table)
            return
    print("\n".join(columns(rows)))
