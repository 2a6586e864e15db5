"""Files that both commands write, checked before anything is measured, and how they say what went wrong."""
from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping

from . import chart, report, results

_WRITERS = {
    "--json": (results.write_json, "everything, samples included"),
    "--csv": (results.write_csv, "one line per row and per value"),
    "--html": (report.write_html, "one self-contained report; needs plotly"),
    "--markdown": (report.write_markdown, "tables; a file with marker comments keeps what is around them"),
    "--png": (lambda path, result: chart.write_png(path, result["rows"]), "bars of all rows; needs matplotlib"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options that name files."""
    group = parser.add_argument_group("files")
    for option in results.FILE_OPTIONS:
        group.add_argument(option, metavar="FILE", help=_WRITERS[option][1])


def check(args: argparse.Namespace) -> int:
    """Refuse what could not be written after the run; return how many files there will be.

    Raises
    ------
    ValueError
        A path that cannot be written, or a format that nothing here can draw; the text names the option.
    """
    wanted = [option for option in results.FILE_OPTIONS if getattr(args, option[2:]) is not None]
    for option in wanted:
        path = getattr(args, option[2:])
        folder = os.path.dirname(path) or "."
        if os.path.isdir(path):
            raise ValueError(f"{option} {path}: this is a folder")
        if not os.path.isdir(folder):
            raise ValueError(f"{option} {path}: there is no folder {folder}")
        if not os.access(path if os.path.exists(path) else folder, os.W_OK):
            raise ValueError(f"{option} {path}: permission denied")
    for option, require in (("--png", chart.require), ("--html", chart.require_plotly)):
        if option in wanted:
            try:
                require()
            except chart.ChartError as error:
                raise ValueError(f"{option}: {error}") from None
    return len(wanted)


def write(args: argparse.Namespace, result: Mapping) -> bool:
    """Write the files that were asked for; False when one could not be written, and standard error says why."""
    good = True
    for option in results.FILE_OPTIONS:
        writer, path = _WRITERS[option][0], getattr(args, option[2:])
        if path is None:
            continue
        try:
            writer(path, result)
        except OSError as error:
            print(f"{path} was not written: {error.strerror}", file=sys.stderr)
            good = False
    return good
