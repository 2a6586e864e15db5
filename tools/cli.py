"""The ``llm-datadist`` console entry: one subcommand per tool.

A subcommand is a module with ``add_arguments(parser)`` and ``run(args) -> int`` (the exit status). It is imported only
when it is asked for, so that a tool with heavy needs costs the others nothing.
"""
from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from llm_datadist import __version__

COMMANDS = {
    "ascend-check": ("llm_datadist.tools.ascend_check", "check transfers between processes on this machine's devices"),
    "bench": ("llm_datadist.tools.bench.command", "measure transfers against what the machine does itself"),
    "demo": ("llm_datadist.tools.demo.command", "run prefill and decode of a model in two processes and check it"),
    "doctor": ("llm_datadist.tools.doctor", "say which provider is used, why not another, and what this host allows"),
    "kvbench": ("llm_datadist.tools.bench.kvcommand", "measure moving the KV cache of a request, for known models"),
    "leaks": ("llm_datadist.tools.observe.leaks", "list caches and keys that are held for long, and who can pull them"),
    "metrics": ("llm_datadist.tools.observe.metrics", "export what engines count, for Prometheus"),
    "ping": ("llm_datadist.tools.ping", "say whether a cluster answers at an address, and how soon"),
    "record": ("llm_datadist.tools.observe.record", "run a command and write down the calls of its engines"),
    "replay": ("llm_datadist.tools.observe.replay", "perform recorded calls again, and compare outcomes and times"),
    "top": ("llm_datadist.tools.observe.top", "watch the engines of this host: links, rates, latencies, caches, keys"),
    "trace": ("llm_datadist.tools.observe.trace", "run a command and write what its engines did for Perfetto"),
    "vllm-demo": ("llm_datadist.tools.vllm.command", "let two vLLM servers share requests through this package"),
    "version": ("llm_datadist.tools.version", "print versions"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the subcommand that `argv` (default: the command line) names and return its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="llm-datadist", description="Tools of llm_datadist, which moves KV caches between processes."
    )
    parser.add_argument("--version", action="version", version=f"llm-datadist {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (module_name, summary) in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        if arguments[:1] == [name]:
            module = importlib.import_module(module_name)
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    args = parser.parse_args(arguments)
    try:
        status = args.run(args)
        sys.stdout.flush()                      # while a reader that is gone can still be told from other errors
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read our output has seen enough; flushing the rest at exit must not complain a second time.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
