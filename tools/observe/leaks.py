"""``llm-datadist leaks``: caches and keys that have been held for long, by age and size, and who could still pull them.

The exit status is for scripts: 0 when nothing is older than the limit, 1 when something is, 2 when an option is wrong.
"""
from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from .extra import MissingExtra, console, require, seconds
from .snapshot import Sample, Watch
from .top import duration, megabytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--older-than", type=seconds, default=60.0, metavar="S",
                        help="seconds that a cache may be held (default 60)")
    parser.add_argument("--cluster", type=int, action="append", metavar="ID", help="this cluster alone; repeatable")
    parser.add_argument("--limit", type=int, default=20, metavar="N",
                        help="rows for each engine (default 20, 0 for all)")
    parser.add_argument("--by", choices=("age", "size"), default="age", help="which come first (default age)")
    parser.add_argument("--open", action="store_true",
                        help="also caches that were not deallocated and have no key, such as those of a decode process")
    parser.add_argument("--json", action="store_true", help="machine-readable output")


def run(args: argparse.Namespace) -> int:
    """Print what is held for too long.

    Returns
    -------
    int
        0 when nothing is, 1 when something is.
    """
    with Watch() as watch:
        found = [leaks_of(sample, args.older_than, args.by, args.open) for sample in watch.look()
                 if not args.cluster or sample.record.cluster_id in args.cluster]
    found = [engine for engine in found if engine["held"]]
    if args.json:
        print(json.dumps({"older_than_s": args.older_than, "engines": found}, indent=2))
    else:
        try:
            _print(found, args)
        except MissingExtra as missing:
            print(missing, file=sys.stderr)
            return 2
    return 1 if found else 0


def leaks_of(sample: Sample, older_than_s: float, by: str = "age", with_open: bool = False) -> dict[str, Any]:
    """What one engine holds for longer: owned caches with a key, and with `with_open` those of a handle alone."""
    held = [cache for cache in sample.caches
            if cache.owned and cache.age_s > older_than_s and (cache.keys or with_open)]
    held.sort(key=lambda cache: -(cache.age_s if by == "age" else cache.bytes))
    return {
        "cluster_id": sample.record.cluster_id, "pid": sample.record.pid, "role": sample.head["role"],
        "pullers": [peer.cluster_id for peer in sample.peers if peer.num_links and peer.cluster_id is not None],
        "bytes": sum(cache.bytes for cache in held),
        "held": [{"cache_id": cache.cache_id, "bytes": cache.bytes, "age_s": cache.age_s, "open": cache.is_open,
                  "keys": cache.keys, "place": cache.place} for cache in held],
    }


def _print(found: list[dict[str, Any]], args: argparse.Namespace) -> None:
    if not found:
        print(f"nothing is held for more than {duration(args.older_than)}")
        return
    make = require("rich.table", "leaks").Table
    out = console()
    for engine in found:
        pullers = ", ".join(str(each) for each in engine["pullers"]) or "nobody: no cluster is linked"
        rows = engine["held"][: args.limit or None]
        out.print(f"cluster {engine['cluster_id']} (pid {engine['pid']}): {len(engine['held'])} caches, "
                  f"{megabytes(engine['bytes'])}; can pull: {pullers}", highlight=False)
        table = make()
        has_places = any(row["place"] for row in rows)      # where events are recorded
        for name in ("cache", "age", "size", "handle", "keys", *(["allocated at"] if has_places else [])):
            table.add_column(name, justify="right" if name in ("cache", "age", "size") else "left")
        for row in rows:
            keys = ", ".join(f"{key['kind']} {key['id']}" + (f" of model {key['model_id']}" if key["model_id"] else "")
                             for key in row["keys"])
            table.add_row(str(row["cache_id"]), duration(row["age_s"]), megabytes(row["bytes"]),
                          "open" if row["open"] else "deallocated", keys or "-",
                          *([row["place"] or "-"] if has_places else []))
        out.print(table)
        if len(rows) < len(engine["held"]):
            out.print(f"... and {len(engine['held']) - len(rows)} more: --limit 0 shows them")
