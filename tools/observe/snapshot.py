"""What the engines of this user do at one moment, and between two, as plain dicts."""
from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import Any

from llm_datadist.observe.records import Cache, Operation, Peer, Record, find_records


@dataclass
class Sample:
    """One look at one engine."""

    record: Record
    taken_s: float
    head: dict[str, Any]
    peers: list[Peer]
    caches: list[Cache]

    @classmethod
    def of(cls, record: Record) -> Sample:
        """Read a record."""
        caches = [cache for cache in record.caches() if not cache.is_pulled]
        return cls(record, time.monotonic(), record.head(), record.peers(), caches)

    @property
    def identity(self) -> tuple[int | None, int]:
        """Tells engines apart that have followed each other in one process."""
        return self.record.pid, self.record.start_ns


class Watch:
    """The engines that are there, looked at again and again; a context manager."""

    def __init__(self) -> None:
        self._records: list[Record] = []

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_error: object) -> None:
        for record in self._records:
            record.close()

    def look(self) -> list[Sample]:
        """Sample every engine; those that have come since are found, and those that have gone are left out."""
        for record in self._records:
            record.close()
        self._records = find_records()
        samples = []
        for record in self._records:
            with contextlib.suppress(OSError, ValueError, IndexError):
                samples.append(Sample.of(record))
        return samples


def describe(sample: Sample, before: Sample | None = None) -> dict[str, Any]:
    """One engine for people and programs; rates are those since `before`, None without it."""
    record, caches = sample.record, sample.caches
    elapsed_s = sample.taken_s - before.taken_s if before else None
    earlier = {peer.cluster_id: peer for peer in before.peers} if before else {}
    keys = [(cache.age_s, key) for cache in caches for key in cache.keys]
    return {
        "cluster_id": record.cluster_id, "pid": record.pid, "role": sample.head["role"], "provider": record.provider,
        "listener": sample.head["listener"],
        "uptime_s": (time.clock_gettime_ns(time.CLOCK_MONOTONIC) - record.start_ns) / 1e9,
        "tracing": sample.head["tracing"], "events": sample.head["events"], "events_lost": sample.head["events_lost"],
        "device_pool": _pool(record.device_pool_bytes, caches, False),
        "host_pool": _pool(record.host_pool_bytes, caches, True),
        "caches": len(caches), "cache_bytes": sum(cache.bytes for cache in caches), "keys": len(keys),
        "oldest_key": _oldest(keys), "held_requests": sample.head["held_requests"],
        "links": sum(peer.num_links for peer in sample.peers),
        "peers": [_peer(peer, earlier.get(peer.cluster_id), elapsed_s) for peer in sample.peers
                  if peer.cluster_id is not None or any(op.count for op in peer.operations.values())],
    }


def _pool(size: int, caches: list[Cache], host: bool) -> dict[str, int] | None:
    if not size:
        return None
    return {"bytes": size, "used_bytes": sum(cache.bytes for cache in caches if cache.owned and cache.host == host)}


def _oldest(keys: list[tuple[float, dict[str, Any]]]) -> dict[str, Any] | None:
    if not keys:
        return None
    age_s, key = max(keys, key=lambda found: found[0])
    return {"age_s": age_s, **key}


def _peer(peer: Peer, before: Peer | None, elapsed_s: float | None) -> dict[str, Any]:
    return {
        "cluster_id": peer.cluster_id, "links": peer.num_links, "state": peer.state if peer.num_links else "gone",
        "address": peer.address or None, "opened": peer.num_opened, "broken": peer.num_broken,
        "reason": peer.reason or None,
        "operations": {
            name: _operation(op, before.operations[name] if before else None, elapsed_s)
            for name, op in peer.operations.items() if op.count},
    }


def _operation(op: Operation, before: Operation | None, elapsed_s: float | None) -> dict[str, Any]:
    recent = op.since(before)
    shown = recent if elapsed_s and recent.count else op        # quantiles of what happened lately, if anything did
    return {
        "count": op.count, "failures": op.failures, "bytes": op.bytes,
        "rate_per_s": recent.count / elapsed_s if elapsed_s else None,
        "bytes_per_s": recent.bytes / elapsed_s if elapsed_s else None,
        "mean_us": op.total_ns / op.count / 1e3, "p50_us": shown.quantile_us(0.5), "p99_us": shown.quantile_us(0.99),
    }
