"""``llm-datadist record``: run a command, and write down the calls of all its engines, for ``llm-datadist replay``."""
from __future__ import annotations

import argparse
import os
import sys

from llm_datadist.tools.observe.recording import merge, write
from llm_datadist.tools.observe.trace import own_folder, run_command

_VARIABLE = "LLM_DATADIST_RECORD"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("-o", "--output", default="calls.jsonl", metavar="PATH",
                        help="the recording (default calls.jsonl)")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND",
                        help="what to run, with its arguments")


def run(args: argparse.Namespace) -> int:
    """Run the command and write the recording.

    Returns
    -------
    int
        The exit status of the command; 2 when nothing was recorded or the file cannot be written.
    """
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        print("record: a command is needed: llm-datadist record -o calls.jsonl -- python serve.py", file=sys.stderr)
        return 2
    try:
        with open(args.output, "wb"):
            pass                                    # what cannot be written is said now, not after the run
    except OSError as error:
        print(f"record: --output {args.output}: {error.strerror}", file=sys.stderr)
        return 2
    with own_folder("record") as folder:
        status = run_command("record", command, _VARIABLE, folder)
        if status == 127:
            os.unlink(args.output)
            return status
        recording = merge(folder)
    if not recording.engines:
        os.unlink(args.output)
        print("record: no engine of llm_datadist was initialised, so there is nothing to replay", file=sys.stderr)
        return 2
    write(args.output, recording)
    print(f"{args.output}: {len(recording.calls)} calls of {len(recording.engines)} engines; llm-datadist replay "
          f"{args.output} performs them again", file=sys.stderr)
    return status
