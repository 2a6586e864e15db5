"""``llm-datadist metrics``: what engines of this user count, for Prometheus: over HTTP, or as a text file.

Names, units and labels are in ``docs/observability.md``. The engines do nothing for it: each scrape reads records.
"""
from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from typing import Any

from llm_datadist.observe.layout import BUCKET_BOUNDS_NS

from .extra import MissingExtra, require, seconds
from .snapshot import Sample, Watch

PREFIX = "llm_datadist"
# Upper bounds of the exported buckets, in ns: powers of two that are bounds of recorded ones, 1 us to 69 s.
BOUNDS_NS = tuple(1 << exponent for exponent in range(10, 37))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--listen", default="127.0.0.1:9464", metavar="HOST:PORT",
                        help="where to answer scrapes (default 127.0.0.1:9464; port 0 lets the system choose)")
    parser.add_argument("--textfile", metavar="PATH", help="write this file instead, for a node exporter")
    parser.add_argument("--interval", type=seconds, metavar="S",
                        help="write the file anew every so many seconds, until interrupted (default: once)")


def run(args: argparse.Namespace) -> int:
    """Export until interrupted.

    Returns
    -------
    int
        0, or 2 when an option is wrong or the package that exports is missing.
    """
    try:
        client = require("prometheus_client", "metrics")
    except MissingExtra as missing:
        print(missing, file=sys.stderr)
        return 2
    registry = client.CollectorRegistry()
    registry.register(Collector())
    try:
        if args.textfile:
            return _write_files(client, registry, args.textfile, args.interval)
        return _serve(client, registry, args.listen)
    except OSError as error:
        print(f"metrics: {args.textfile or args.listen}: {error.strerror or error}", file=sys.stderr)
        return 2


def _write_files(client: Any, registry: Any, path: str, interval_s: float | None) -> int:
    while True:
        client.write_to_textfile(path, registry)
        if interval_s is None:
            return 0
        time.sleep(interval_s)


def _serve(client: Any, registry: Any, listen: str) -> int:
    host, _, port = listen.rpartition(":")
    host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not host or not (port.isascii() and port.isdigit() and int(port) < 65536):
        print(f"--listen {listen}: host:port expected, an IPv6 address in brackets", file=sys.stderr)
        return 2
    server, thread = client.start_http_server(int(port), host, registry)
    try:
        bound = server.server_address
        print(f"metrics at http://{f'[{host}]' if ':' in host else host}:{bound[1]}/metrics", flush=True)
        thread.join()
    finally:
        server.shutdown()
        server.server_close()
    return 0


class Collector:
    """A collector of ``prometheus_client`` that looks at the engines whenever it is asked."""

    def collect(self) -> Iterator[Any]:
        """Yield the families of metrics."""
        core = require("prometheus_client.core", "metrics")
        with Watch() as watch:
            samples = watch.look()
            yield from _engines(core, samples)
            yield from _peers(core, samples)

    def describe(self) -> list[Any]:
        """Nothing is known before engines are looked at."""
        return []


def _labels(sample: Sample) -> list[str]:
    return [str(sample.record.cluster_id), sample.head["role"]]


def _engines(core: Any, samples: list[Sample]) -> Iterator[Any]:
    labels = ["cluster", "role"]

    def gauge(name: str, text: str, more: tuple[str, ...] = ()) -> Any:
        return core.GaugeMetricFamily(f"{PREFIX}_{name}", text, labels=[*labels, *more])

    info = gauge("engine_info", "1 for each engine that runs", ("pid", "provider"))
    start = gauge("engine_start_time_seconds", "when the engine was initialised, since the epoch")
    caches = gauge("caches", "caches that are held", ("kind",))
    cache_bytes = gauge("cache_bytes", "bytes of the caches that are held", ("kind",))
    keys = gauge("keys", "keys that nobody pulled or removed yet")
    requests = gauge("held_requests", "requests that blocks are held for, each under a key of its own")
    oldest = gauge("oldest_key_age_seconds", "age of the cache of the oldest key; 0 without keys")
    pool = gauge("pool_bytes", "size of a pool", ("pool",))
    used = gauge("pool_used_bytes", "bytes of the caches in a pool, without what rounding to pages takes", ("pool",))
    events = core.CounterMetricFamily(f"{PREFIX}_trace_events", "events recorded", labels=labels)
    lost = core.CounterMetricFamily(f"{PREFIX}_trace_events_lost", "events overwritten or dropped", labels=labels)
    for sample in samples:
        base, record = _labels(sample), sample.record
        info.add_metric([*base, str(record.pid), record.provider], 1)
        start.add_metric(base, (record.start_ns + record.wall_offset_ns) / 1e9)
        for kind, owned in (("owned", True), ("registered", False)):
            held = [cache for cache in sample.caches if cache.owned == owned]
            caches.add_metric([*base, kind], len(held))
            cache_bytes.add_metric([*base, kind], sum(cache.bytes for cache in held))
        keys.add_metric(base, sum(len(cache.keys) for cache in sample.caches))
        requests.add_metric(base, sample.head["held_requests"])
        oldest.add_metric(base, max((cache.age_s for cache in sample.caches if cache.keys), default=0.0))
        for name, size, host in (("device", record.device_pool_bytes, False), ("host", record.host_pool_bytes, True)):
            if size:
                pool.add_metric([*base, name], size)
                used.add_metric([*base, name], sum(
                    cache.bytes for cache in sample.caches if cache.owned and cache.host == host))
        events.add_metric(base, sample.head["events"])
        lost.add_metric(base, sample.head["events_lost"])
    yield from (info, start, caches, cache_bytes, keys, requests, oldest, pool, used, events, lost)


def _peers(core: Any, samples: list[Sample]) -> Iterator[Any]:
    labels = ["cluster", "role", "peer"]
    links = core.GaugeMetricFamily(f"{PREFIX}_links", "links to a peer", labels=labels)
    opened = core.CounterMetricFamily(f"{PREFIX}_links_opened", "links that were made", labels=labels)
    broken = core.CounterMetricFamily(f"{PREFIX}_links_broken", "links that broke", labels=labels)
    failures = core.CounterMetricFamily(
        f"{PREFIX}_operation_failures", "operations that failed", labels=[*labels, "operation"])
    num_bytes = core.CounterMetricFamily(
        f"{PREFIX}_operation_bytes", "bytes that operations moved", labels=[*labels, "operation"])
    spans = core.HistogramMetricFamily(
        f"{PREFIX}_operation_seconds", "how long operations took", labels=[*labels, "operation"])
    for sample in samples:
        for peer in sample.peers:
            if peer.cluster_id is None and not any(op.count for op in peer.operations.values()):
                continue
            base = [*_labels(sample), "" if peer.cluster_id is None else str(peer.cluster_id)]
            links.add_metric(base, peer.num_links)
            opened.add_metric(base, peer.num_opened)
            broken.add_metric(base, peer.num_broken)
            for name, op in peer.operations.items():
                if op.count:
                    failures.add_metric([*base, name], op.failures)
                    num_bytes.add_metric([*base, name], op.bytes)
                    spans.add_metric([*base, name], cumulative(op.buckets.tolist()), op.total_ns / 1e9)
    yield from (links, opened, broken, failures, num_bytes, spans)


def cumulative(buckets: list[int]) -> list[tuple[str, int]]:
    """Recorded buckets as exported ones: upper bound in seconds as text, and how many were at most that long."""
    found, total, index = [], 0, 0
    for bound_ns in BOUNDS_NS:
        while index < len(buckets) and BUCKET_BOUNDS_NS[index] <= bound_ns:
            total += buckets[index]
            index += 1
        found.append((repr(bound_ns / 1e9), total))
    return [*found, ("+Inf", sum(buckets))]
