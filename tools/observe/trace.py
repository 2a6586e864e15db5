"""``llm-datadist trace``: run a command, and put what all its engines did on one time line, which Perfetto opens.

Each engine that the command or its children start keeps its events in a file of a folder meanwhile, so that those of a
process that was killed are there, too.
"""
from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from llm_datadist.observe.records import folder_records
from llm_datadist.observe.timeline import Recording, write_trace

_VARIABLE = "LLM_DATADIST_TRACE"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("-o", "--output", default="trace.json.gz", metavar="PATH",
                        help="the trace; compressed if its name ends in .gz (default trace.json.gz)")
    parser.add_argument("--folder", action="append", default=[], metavar="PATH",
                        help=f"add what engines left in this folder, which {_VARIABLE} named there; repeatable, "
                             "for example once for each host, and then COMMAND may be missing")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND",
                        help="what to run, with its arguments")


def run(args: argparse.Namespace) -> int:
    """Run the command and write the trace.

    Returns
    -------
    int
        The exit status of the command; 2 when nothing was traced or the file cannot be written.
    """
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command and not args.folder:
        print("trace: a command is needed: llm-datadist trace -o trace.json.gz -- python serve.py", file=sys.stderr)
        return 2
    missing = [folder for folder in args.folder if not os.path.isdir(folder)]
    if missing:
        print(f"trace: --folder {missing[0]}: no such folder", file=sys.stderr)
        return 2
    try:
        with open(args.output, "wb"):
            pass                                    # what cannot be written is said now, not after the run
    except OSError as error:
        print(f"trace: --output {args.output}: {error.strerror}", file=sys.stderr)
        return 2
    status = 0
    with own_folder("trace") as own:
        if command:
            status = run_command("trace", command, _VARIABLE, own)
            if status == 127:
                return status
        return _write(args.output, [own, *args.folder]) or status


@contextmanager
def own_folder(tool: str) -> Iterator[str]:
    """A folder for what engines write meanwhile, in memory where that is to be had; gone afterwards."""
    own = tempfile.mkdtemp(prefix=f"llm-datadist-{tool}-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)
    try:
        yield own
    finally:
        shutil.rmtree(own, ignore_errors=True)


def run_command(tool: str, command: list[str], variable: str, folder: str) -> int:
    """Run a command with `variable` set to `folder`, and return its exit status; 127 where there is no such command."""
    try:
        process = subprocess.Popen(command, env={**os.environ, variable: folder})
    except OSError as error:
        print(f"{tool}: {command[0]}: {error.strerror}", file=sys.stderr)
        return 127
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)       # the terminal tells the command as well: its end counts
    try:
        status = process.wait()
    finally:
        signal.signal(signal.SIGINT, before)
    return status if status >= 0 else 128 - status


def _write(output: str, folders: list[str]) -> int:
    records = [record for folder in folders for record in folder_records(folder)]
    recordings = [Recording.of(record) for record in records]
    for record in records:
        record.close()
    if not any(len(recording.events) for recording in recordings):
        os.unlink(output)
        print("trace: no engine of llm_datadist was initialised, so there is nothing to show", file=sys.stderr)
        return 2
    recordings.sort(key=lambda each: (each.role != "prompt", each.cluster_id))
    result = write_trace(output, recordings)
    lost = f"; {result['lost']} earlier events were lost" if result["lost"] else ""
    print(f"{output}: {result['events']} events of {result['engines']} engines, {result['flows']} arrows{lost}; open "
          "it at https://ui.perfetto.dev", file=sys.stderr)
    return 0
