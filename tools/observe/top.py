"""``llm-datadist top``: a live view of every engine of this user on this host; the engines do nothing for it."""
from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from typing import Any

from .extra import MissingExtra, console, require, seconds
from .snapshot import Watch, describe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--interval", type=seconds, default=1.0, metavar="S",
                        help="seconds between two looks, which rates are taken over (default 1)")
    parser.add_argument("--once", action="store_true", help="look twice, print once, and end")
    parser.add_argument("--json", action="store_true", help="one JSON document per look, on a line of its own")


def run(args: argparse.Namespace) -> int:
    """Print what is there, until interrupted.

    Returns
    -------
    int
        0, or 1 where ``--once`` found no engine, 2 without what the view needs.
    """
    if args.json:
        for engines in _looks(args.interval, args.once):
            print(json.dumps({"time_s": time.time(), "engines": engines}), flush=True)
        return 0 if engines or not args.once else 1
    try:
        out = console()
        live = require("rich.live", "top").Live(console=out, auto_refresh=False, screen=False)
    except MissingExtra as missing:
        print(missing, file=sys.stderr)
        return 2
    if args.once:
        (engines,) = _looks(args.interval, True)
        out.print(view(engines))
        return 0 if engines else 1
    with live:
        for engines in _looks(args.interval, False):
            live.update(view(engines), refresh=True)
    return 0


def _looks(interval_s: float, once: bool) -> Iterator[list[dict[str, Any]]]:
    with Watch() as watch:
        before = {sample.identity: sample for sample in watch.look()}
        while True:
            time.sleep(interval_s)
            samples = watch.look()
            yield [describe(sample, before.get(sample.identity) if interval_s else None) for sample in samples]
            if once:
                return
            before = {sample.identity: sample for sample in samples}


def view(engines: list[dict[str, Any]]) -> Any:
    """Everything as tables: one row per engine, and one per peer and operation."""
    group = require("rich.console", "top").Group
    make = require("rich.table", "top").Table
    if not engines:
        return "no engine of this user runs on this host"
    top = make(title="engines", title_justify="left")
    for name in ("cluster", "role", "pid", "listens", "up", "links", "caches", "keys", "held", "oldest key", "pool",
                 "traced"):
        top.add_column(name, justify="left" if name in ("role", "listens") else "right")
    links = make(title="links", title_justify="left")
    for name in ("cluster", "peer", "state", "operation", "per s", "MB/s", "p50 us", "p99 us", "count", "failed"):
        links.add_column(name, justify="left" if name in ("state", "operation") else "right")
    for engine in engines:
        oldest = engine["oldest_key"]
        top.add_row(
            str(engine["cluster_id"]), engine["role"], str(engine["pid"]), engine["listener"] or "-",
            duration(engine["uptime_s"]), str(engine["links"]),
            f"{engine['caches']} ({megabytes(engine['cache_bytes'])})", str(engine["keys"]),
            str(engine["held_requests"]),
            f"{duration(oldest['age_s'])} {oldest['kind']} {oldest['id']}" if oldest else "-",
            _pool_text(engine), f"{engine['events']} events" if engine["tracing"] else "-")
        for peer in engine["peers"]:
            who = str(peer["cluster_id"]) if peer["cluster_id"] is not None else "not linked"
            state = peer["state"] + (f" ({peer['broken']} broke)" if peer["broken"] else "")
            for name, op in peer["operations"].items():
                links.add_row(
                    str(engine["cluster_id"]), who, state, name, _number(op["rate_per_s"]),
                    _number(op["bytes_per_s"] / 1e6 if op["bytes_per_s"] is not None else None),
                    f"{op['p50_us']:.1f}", f"{op['p99_us']:.1f}", str(op["count"]), str(op["failures"]))
                who = state = ""
            if not peer["operations"]:
                links.add_row(str(engine["cluster_id"]), who, state, "-", *[""] * 6)
    return group(top, links)


def _pool_text(engine: dict[str, Any]) -> str:
    parts = []
    for name in ("device_pool", "host_pool"):
        pool = engine[name]
        if pool:
            parts.append(f"{100 * pool['used_bytes'] / pool['bytes']:.0f} % of {megabytes(pool['bytes'])}")
    return ", ".join(parts) or "-"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def megabytes(count: int) -> str:
    """Bytes for people."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def duration(span_s: float) -> str:
    """A span for people."""
    if span_s < 60:
        return f"{span_s:.1f} s"
    if span_s < 3600:
        return f"{span_s / 60:.1f} min"
    return f"{span_s / 3600:.1f} h"
