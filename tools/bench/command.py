"""``llm-datadist bench``: measure transfers and compare every one with what the machine does itself."""
from __future__ import annotations

import argparse
import os
import sys

from .native import NotBuiltError, require

_EPILOG = """\
examples:
  llm-datadist bench                                          the quick preset, about half a minute
  llm-datadist bench --preset goals --json run.json --html run.html
  llm-datadist bench --block-size 16K,64K,1M --blocks 32 --run 1,8,all --path shm,cma,tcp
  llm-datadist bench --listen 10.0.0.1:26100                  on one host, and on another:
  llm-datadist bench --connect 10.0.0.1:26100 --path tcp --block-size 64K
  llm-datadist bench compare before.json after.json --fail-on-regression
  llm-datadist bench report run.json --markdown docs/performance.md
  llm-datadist bench vllm                                     vLLM with this package and with its own connector
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    from . import output
    from .compare import DEFAULT_THRESHOLD

    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    actions = parser.add_subparsers(dest="action", metavar="compare|report|vllm")
    comparing = actions.add_parser("compare", help="say what changed between two results beyond noise")
    comparing.add_argument("before", help="JSON of one run")
    comparing.add_argument("after", help="JSON of another")
    comparing.add_argument("--threshold", type=float, default=DEFAULT_THRESHOLD, metavar="F",
                           help="smaller changes never count (%(default)s)")
    comparing.add_argument("--all", action="store_true", help="show what is within noise, too")
    comparing.add_argument("--fail-on-regression", action="store_true", help="exit status 1 when something is worse")
    reporting = actions.add_parser("report", help="write reports of a result that was measured before")
    reporting.add_argument("result", help="JSON of a run")
    output.add_arguments(reporting)
    serving = actions.add_parser("vllm", help="measure this package's connector in vLLM beside vLLM's own")
    _add_vllm_arguments(serving)

    parser.add_argument("--preset", choices=("quick", "goals"), help="a fixed set of rows and figures")
    sweep = parser.add_argument_group("sweep", "comma-separated values; every combination is measured")
    sweep.add_argument("--operation", metavar="NAMES",
                       help="pull_blocks, pull_cache, pull_key, push_blocks, push_cache")
    sweep.add_argument("--path", metavar="NAMES", help="shm, cma, tcp")
    sweep.add_argument("--memory", metavar="NAMES", help="pool, registered")
    sweep.add_argument("--block-size", metavar="SIZES", help="bytes of a block (of a slot), e.g. 16K,1M")
    sweep.add_argument("--blocks", metavar="NUMBERS", help="blocks per tensor")
    sweep.add_argument("--run", metavar="NUMBERS", dest="run_length", help="blocks in a row on both sides, or all")
    sweep.add_argument("--tensors", metavar="NUMBERS", help="tensors per cache")
    sweep.add_argument("--links", metavar="NUMBERS", help="peers at the same time")
    sweep.add_argument("--threads", metavar="NUMBERS", help="copying threads")
    sweep.add_argument("--streams", metavar="NUMBERS", help="TCP connections per link")
    parser.add_argument("--figures", metavar="NAMES", help="figures besides the rows: names, all or none")
    parser.add_argument("--seconds", type=float, metavar="S", help="sampling time per row and figure")
    hosts = parser.add_mutually_exclusive_group()
    hosts.add_argument("--listen", metavar="IP:PORT", help="own the caches for a run on another host")
    hosts.add_argument("--connect", metavar="IP:PORT", help="use the caches of a host that listens; path tcp only")
    parser.add_argument("--corrupt", type=int, metavar="ROW",
                        help="diagnostic: damage one byte of this row's result; the run must notice and fail")
    output.add_arguments(parser)


def _add_vllm_arguments(parser: argparse.ArgumentParser) -> None:
    from llm_datadist.tools.vllm import bench

    bench.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run the benchmark.

    Returns
    -------
    int
        0: measured; 1: bytes were wrong, a row failed, or (compare) something is worse; 2: bad options, or an
        installation that cannot measure.
    """
    from .results import ResultError

    try:
        if args.action == "compare":
            return _compare(args)
        if args.action == "report":
            return _report(args)
        if args.action == "vllm":
            from llm_datadist.tools.vllm import bench

            return bench.run(args)
        if args.listen is not None:
            require()
            from .listen import listen

            return listen(*_address(args.listen))
        return _measure(args)
    except (NotBuiltError, ResultError, OSError, ValueError) as error:
        print(f"llm-datadist bench: {error}", file=sys.stderr)
        return 2


def _compare(args: argparse.Namespace) -> int:
    from . import compare, results

    changes, lonely = compare.compare(
        results.read_json(args.before), results.read_json(args.after), args.threshold)
    print("\n".join(compare.lines(changes, lonely, args.all)))
    return 1 if args.fail_on_regression and any(each.verdict == "worse" for each in changes) else 0


def _report(args: argparse.Namespace) -> int:
    from . import output, results

    if not output.check(args):
        raise ValueError(f"report: nothing to write: name at least one of {', '.join(results.FILE_OPTIONS)}")
    return 0 if output.write(args, results.read_json(args.result)) else 1


def _measure(args: argparse.Namespace) -> int:
    require()
    from . import output, table
    from .plan import default_threads

    output.check(args)
    plan = _plan(args)
    remote = _address(args.connect) if args.connect is not None else None
    if remote is not None:
        plan = _only_remote(plan)
    if not plan.cases and not plan.figures:
        raise ValueError("there is nothing to measure; " + ("; ".join(plan.skipped) or "every row was excluded"))
    if args.corrupt is not None and not 0 <= args.corrupt < len(plan.cases):
        raise ValueError(f"--corrupt {args.corrupt}: there are rows 0 to {len(plan.cases) - 1}")
    for line in plan.skipped:
        print(f"not measured: {line}")
    print(f"{default_threads()} copying threads by default, {len(os.sched_getaffinity(0))} processors, "
          f"load average {os.getloadavg()[0]:.1f}")
    if plan.cases:
        print(table.ROW_HEADER)
    return measure_and_report(plan, args, remote, args.corrupt)


def measure_and_report(plan, args: argparse.Namespace, remote=None, corrupt: int | None = None) -> int:
    """Carry out a plan, print as it goes, write the files; return the exit status."""
    from . import output, table
    from .progress import Progress
    from .run import Runner

    runner = Runner(
        remote, corrupt,
        on_row=lambda row: print(table.row_line(row), flush=True),
        on_figure=lambda figure: print("\n" + "\n".join(table.figure_lines(figure)), flush=True),
        on_failure=lambda name, text: print(f"FAILED: {name}\n{text}", file=sys.stderr, flush=True),
    )
    with Progress(len(plan.cases) + len(plan.figures)) as progress:
        result = runner.run(plan, progress)
    lines = table.goal_lines(result["goals"])
    if lines:
        print("\n" + "\n".join(lines))
    wrong = [row for row in result["rows"] if row["wrong_bytes"]]
    for row in wrong:
        print(f"{row['label']}: {row['wrong_bytes']} wrong bytes, the first at {row['first_wrong']}", file=sys.stderr)
    written = output.write(args, result)
    return 0 if written and not wrong and not runner.failures else 1


def _plan(args: argparse.Namespace):
    from dataclasses import replace

    from .case import DEFAULT_STREAMS
    from .plan import default_threads, from_axes, preset

    axes = _axes(args)
    is_sweep = bool(axes.keys() - {"num_threads", "num_streams"})
    if is_sweep and args.preset:
        raise ValueError("--preset goes with --threads and --streams, and with no other option of a sweep")
    if is_sweep:
        plan = from_axes(axes)
    else:
        threads, streams = axes.get("num_threads", [default_threads()]), axes.get("num_streams", [DEFAULT_STREAMS])
        if len(threads) > 1 or len(streams) > 1:
            raise ValueError("a preset takes one number of threads and one of streams")
        plan = preset(args.preset or "quick", threads[0], streams[0])
    if args.figures is not None:
        plan = replace(plan, figures=_figures(args.figures))
    if args.seconds is not None:
        if not 0 < args.seconds <= 3600:
            raise ValueError(f"--seconds {args.seconds:g}: must be above 0 and at most 3600")
        plan = replace(plan, seconds=args.seconds)
    return plan


def _axes(args: argparse.Namespace) -> dict[str, list]:
    """Return the values of the sweep's options by field of `Case`."""
    from .case import ALL_BLOCKS, parse_size

    axes: dict[str, list] = {}
    for option, name, parse in (
        ("operation", "operation", str), ("path", "path", str), ("memory", "memory", str),
        ("block_size", "block_bytes", parse_size), ("blocks", "num_blocks", int),
        ("run_length", "run_blocks", lambda text: ALL_BLOCKS if text == "all" else int(text)),
        ("tensors", "num_tensors", int), ("links", "num_links", int), ("threads", "num_threads", int),
        ("streams", "num_streams", int),
    ):
        text = getattr(args, option)
        if text is None:
            continue
        try:
            axes[name] = [parse(word.strip()) for word in text.split(",")]
        except ValueError as error:
            raise ValueError(f"--{option.replace('_', '-')} {text!r}: {error}") from None
    return axes


def _figures(text: str) -> tuple[str, ...]:
    from .figures import FIGURES

    if text in ("all", "none"):
        return tuple(FIGURES) if text == "all" else ()
    names = tuple(word.strip() for word in text.split(","))
    for name in names:
        if name not in FIGURES:
            raise ValueError(f"--figures {name!r}: unknown; known: {', '.join(FIGURES)}, all, none")
    return names


def _only_remote(plan):
    """Keep what can be measured between hosts."""
    from dataclasses import replace

    kept = [case for case in plan.cases if case.path == "tcp"]
    skipped = [f"{case.label}: needs both processes on one host" for case in plan.cases if case.path != "tcp"]
    skipped += [f"{name}: measured on one host only" for name in plan.figures]
    return replace(plan, cases=kept, figures=(), skipped=[*plan.skipped, *skipped])


def _address(text: str) -> tuple[str, int]:
    ip, _, port = text.rpartition(":")
    if not ip or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{text!r} is no IP:PORT")
    return ip, int(port)
