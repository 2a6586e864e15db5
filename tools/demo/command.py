"""``llm-datadist demo``: prefill in one process, decode in another, tokens checked against a single process."""
from __future__ import annotations

import argparse
import os
import sys

# The matrices are small: more BLAS threads cost more than they give, and would take the core the other process needs.
_BLAS_THREAD_SETTINGS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--text", metavar="FILE", help="UTF-8 text the prompts are cut from (default: one that ships)")
    parser.add_argument("--requests", type=int, default=8, metavar="N", help="prompts in the batch (%(default)s)")
    parser.add_argument("--min-prompt", type=int, default=17, metavar="N", help="shortest prompt, tokens (%(default)s)")
    parser.add_argument("--max-prompt", type=int, default=700, metavar="N", help="longest prompt, tokens (%(default)s)")
    parser.add_argument("--new-tokens", type=int, default=32, metavar="N", help="tokens to generate (%(default)s)")
    parser.add_argument("--block-tokens", type=int, default=16, metavar="N", help="tokens per block (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and prompts (%(default)s)")
    parser.add_argument("--layers", type=int, default=6, metavar="N", help="(%(default)s)")
    parser.add_argument("--heads", type=int, default=8, metavar="N", help="(%(default)s)")
    parser.add_argument("--head-size", type=int, default=32, metavar="N", help="even (%(default)s)")
    parser.add_argument("--timeout", type=float, default=300, metavar="S", help="limit of the run, s (%(default)s)")
    parser.add_argument(
        "--corrupt", type=int, metavar="REQUEST",
        help="diagnostic: flip one byte of this request's pulled cache; the run must notice and fail",
    )


def run(args: argparse.Namespace) -> int:
    """Run the demo.

    Returns
    -------
    int
        0 when all tokens and bytes agree and nothing is left; 1 when not, or when a process failed; 2 for bad options.
    """
    for name in _BLAS_THREAD_SETTINGS:
        os.environ.setdefault(name, "1")    # read when NumPy is first imported, here and in the prefill process
    from . import decode, workload
    from .report import Report

    try:
        settings = _settings(args, workload)
    except (OSError, ValueError) as error:
        print(f"llm-datadist demo: {error}", file=sys.stderr)
        return 2
    report = Report()
    report.header(settings, args.text or "the one that ships with the demo")
    try:
        outcome = decode.run(settings, report, args.timeout, args.corrupt)
    except decode.PrefillError as error:
        report.end()
        print(error, file=sys.stderr)
        return 1
    report.summary(outcome)
    return 0 if outcome.good else 1


def _settings(args: argparse.Namespace, workload):
    if args.text is None:
        text = workload.default_text()
    else:
        with open(args.text, encoding="utf-8") as source:
            text = source.read()
    if args.corrupt is not None and not 0 <= args.corrupt < args.requests:
        raise ValueError(f"--corrupt {args.corrupt}: there are requests 0 to {args.requests - 1}")
    model = workload.ModelConfig(args.layers, args.heads, args.head_size, args.seed)
    prompts = workload.cut_prompts(text, args.requests, args.min_prompt, args.max_prompt, args.seed)
    return workload.Settings(model, prompts, args.new_tokens, args.block_tokens)
