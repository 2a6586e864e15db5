"""Files that both commands write, and how they say what went wrong."""
from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping

from . import chart, report, results

_WRITERS = {
    "--json": (results.write_json, "everything, samples included"),
    "--csv": (results.write_csv, "one line per row and per value"),
    "--html": (report.write_html, "one self-contained report"),
    "--markdown": (report.write_markdown, "tables; a file with marker comments keeps what is around them"),
    "--png": (lambda path, result: chart.write_png(path, result["rows"]), "bars of all rows; needs matplotlib"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options that name files."""
    group = parser.add_argument_group("files")
    for option in results.FILE_OPTIONS:
        group.add_argument(option, metavar="FILE", help=_WRITERS[option][1])


def write(args: argparse.Namespace, result: Mapping) -> bool:
    """Write the files that were asked for; False when one could not be written, and standard error says why."""
    good = True
    for option in results.FILE_OPTIONS:
        writer, path = _WRITERS[option][0], getattr(args, option[2:])
        if path is None:
            continue
        try:
            writer(path, result)
        except chart.ChartError as error:
            print(f"{path} was not written: {error}", file=sys.stderr)
        except OSError as error:
            print(f"{path} was not written: {error.strerror}", file=sys.stderr)
            good = False
    return good
