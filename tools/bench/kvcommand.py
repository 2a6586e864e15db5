"""``llm-datadist kvbench``: what moving the KV cache of one request takes, for known models."""
from __future__ import annotations

import argparse
import os
import sys

from .native import NotBuiltError, require

_DEFAULT_MODELS = "llama-3-8b,qwen2.5-7b,deepseek-v3"
_TITLES = ("model", "tokens", "KiB/token", "MiB", "path", "ms p50", "ms p99", "GB/s", "of the bound", "bytes")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    from . import output
    from .case import DEFAULT_STREAMS
    from .models import DEFAULT_BLOCK_TOKENS, MODELS

    parser.add_argument("--model", metavar="NAMES", action="append",
                        help=f"comma-separated, or all; repeatable; known: {', '.join(MODELS)} ({_DEFAULT_MODELS})")
    parser.add_argument("--tokens", metavar="NUMBERS", default="1024", help="prompt lengths (%(default)s)")
    parser.add_argument("--path", metavar="NAMES", default="shm,cma,tcp", help="(%(default)s)")
    parser.add_argument("--block-tokens", type=int, default=DEFAULT_BLOCK_TOKENS, metavar="N",
                        help="tokens per block (%(default)s)")
    parser.add_argument("--run", dest="run_length", default="1", metavar="N",
                        help="blocks in a row on both sides, or all (%(default)s)")
    parser.add_argument("--tensor-parallel", type=int, default=1, metavar="N",
                        help="measure what one of N ranks moves (%(default)s)")
    parser.add_argument("--threads", type=int, metavar="N", help="copying threads")
    parser.add_argument("--streams", type=int, default=DEFAULT_STREAMS, metavar="N",
                        help="TCP connections (%(default)s)")
    parser.add_argument("--seconds", type=float, default=1.5, metavar="S", help="sampling time per row (%(default)s)")
    output.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run the benchmark.

    Returns
    -------
    int
        0: measured; 1: bytes were wrong or a row failed; 2: bad options, or an installation that cannot measure.
    """
    try:
        return _measure(args)
    except (NotBuiltError, ValueError) as error:
        print(f"llm-datadist kvbench: {error}", file=sys.stderr)
        return 2


def _measure(args: argparse.Namespace) -> int:
    require()
    from llm_datadist.tools.tables import show

    from . import output
    from .progress import Progress
    from .run import Runner

    output.check(args)
    plan, requests = _plan(args)
    print(f"{plan.cases[0].num_threads} copying threads, {len(os.sched_getaffinity(0))} processors, "
          f"load average {os.getloadavg()[0]:.1f}")
    runner = Runner(on_failure=lambda name, text: print(f"FAILED: {name}\n{text}", file=sys.stderr, flush=True))
    with Progress(len(plan.cases)) as progress:
        result = runner.run(plan, progress)
    table = [_TITLES]
    result["rows"] = [
        {**row, "model": model, "tokens": tokens, "label": f"{model}, {tokens} tokens, {row['path']}"}
        for row in result["rows"] for model, tokens in requests[row["key"]]]
    table += [_cells(row) for row in result["rows"]]
    show(table)
    written = output.write(args, result)
    return 0 if written and not runner.failures and not any(row["wrong_bytes"] for row in result["rows"]) else 1


def _cells(row: dict) -> tuple[str, ...]:
    from .table import number, verdict

    fraction = f"{row['fraction']:.2f}" if row.get("fraction") is not None else "-"
    return (
        row["model"], str(row["tokens"]), f"{row['num_bytes'] / row['tokens'] / 1024:.1f}",
        f"{row['num_bytes'] / 2**20:.1f}", row["path"], number(row["p50_us"] / 1e3), number(row["p99_us"] / 1e3),
        f"{row['gb_per_s']:.2f}", fraction, verdict(row),
    )


def _plan(args: argparse.Namespace):
    """Return the plan, and by the key of the row the (model, tokens) that it stands for: some move the same."""
    from .case import ALL_BLOCKS, Case
    from .models import MODELS
    from .plan import Plan, default_threads

    wanted = [name.strip() for text in args.model or [_DEFAULT_MODELS] for name in text.split(",")]
    names = list(MODELS) if "all" in wanted else list(dict.fromkeys(wanted))
    run_blocks = ALL_BLOCKS if args.run_length == "all" else _numbers("--run", args.run_length)[0]
    for option, number in (("--block-tokens", args.block_tokens), ("--tensor-parallel", args.tensor_parallel)):
        if number < 1:
            raise ValueError(f"{option} {number}: must be at least 1")
    if not 0 < args.seconds <= 3600:
        raise ValueError(f"--seconds {args.seconds:g}: must be above 0 and at most 3600")
    lengths = _numbers("--tokens", args.tokens)
    cases: list[Case] = []
    requests: dict[str, list[tuple[str, int]]] = {}
    for path in (word.strip() for word in args.path.split(",")):
        for name in names:
            if name not in MODELS:
                raise ValueError(f"--model {name!r}: unknown; known: {', '.join(MODELS)}, all")
            model = MODELS[name].shard(args.tensor_parallel)
            for tokens in lengths:
                case = Case(
                    "pull_blocks", path, "pool", model.tensor_token_bytes * args.block_tokens,
                    -(-tokens // args.block_tokens), run_blocks, model.num_tensors, 1,
                    args.threads or default_threads(), args.streams, group=f"{name} {tokens}")
                case.check()
                if case.key not in requests:
                    cases.append(case)
                requests.setdefault(case.key, []).append((name, tokens))
    return Plan(cases, seconds=args.seconds), requests


def _numbers(option: str, text: str) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() and int(word) for word in words):
        raise ValueError(f"{option} {text!r}: positive integers expected, separated by commas")
    return [int(word) for word in words]
