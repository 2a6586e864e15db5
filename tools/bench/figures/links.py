"""How long links take to make, and what they hold."""
from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable
from time import perf_counter_ns as clock

from llm_datadist import BlocksCacheKey, CacheDesc, DataType

from .. import engine as engines
from ..channel import Channel
from ..statistics import quantile
from . import median_value, value

NUM_LINKS = 512
_SINGLE_SHARE = 0.5
_POOL_BYTES = 1 << 20
_BLOCK_BYTES = 4096
_MODEL_ID = 1


def many_links(peers: list[Channel], seconds: float, on_progress: Callable[[float], None]) -> list[dict]:
    """Link and unlink one peer over and over; then link 512 engines in few processes, and pull once over each.

    Memory is what the kernel counts as resident of this process, before the links, with them, and after the pulls.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    per_peer = NUM_LINKS // len(peers)
    engine, _ = engines.open_engine(engines.WORKER_CLUSTER_ID, 8 << 20, False, None)
    try:
        clusters = []
        for index, peer in enumerate(peers):
            first = 1 + index * per_peer
            ip = peer.ask("hello")["ip"]
            ports = peer.ask("crowd", first_cluster_id=first, count=per_peer, pool_bytes=_POOL_BYTES,
                             block_bytes=_BLOCK_BYTES, model_id=_MODEL_ID)["ports"]
            clusters += [engines.cluster(first + number, ip, port) for number, port in enumerate(ports)]
            on_progress(0.4 * (index + 1) / len(peers))
        single = _single(engine, clusters[0], seconds * _SINGLE_SHARE)
        on_progress(0.6)
        return [*single, *_crowd(engine, clusters)]
    finally:
        engine.finalize()
        for peer in peers:
            peer.ask("crowd", first_cluster_id=0, count=0, pool_bytes=0, block_bytes=0, model_id=0)


def _single(engine, cluster, seconds: float) -> list[dict]:
    link_ms, unlink_ms = [], []
    until = time.monotonic() + seconds
    while len(link_ms) < 20 or time.monotonic() < until:
        before = clock()
        engines.link(engine, [cluster])
        between = clock()
        engines.unlink(engine, [cluster])
        link_ms.append((between - before) / 1e6)
        unlink_ms.append((clock() - between) / 1e6)
    return [
        median_value("link_ms", link_ms, "ms", "link_clusters of one peer, p50"),
        value("link_p99_ms", quantile(link_ms, 0.99), "ms"),
        median_value("unlink_ms", unlink_ms, "ms", "unlink_clusters of one peer, p50"),
    ]


def _crowd(engine, clusters: list) -> list[dict]:
    manager = engine.cache_manager
    cache = manager.allocate_blocks_cache(CacheDesc(1, [1, _BLOCK_BYTES], DataType.DT_INT8))
    before_bytes, before = _resident_bytes(), clock()
    engines.link(engine, clusters, timeout_ms=30_000)
    took_s = (clock() - before) / 1e9
    linked_bytes = _resident_bytes()
    for cluster in clusters:
        manager.pull_blocks(BlocksCacheKey(cluster.remote_cluster_id, _MODEL_ID), cache, [0], [0])
    pulled_bytes = _resident_bytes()
    files = len(os.listdir("/proc/self/fd"))
    manager.deallocate_blocks_cache(cache)
    number = len(clusters)
    return [
        value("crowd_s", took_s, "s", (), f"one link_clusters call with {number} clusters"),
        value("crowd_resident_kib", (linked_bytes - before_bytes) / number / 1024, "KiB", (), "per link, once linked"),
        value("crowd_pulled_kib", (pulled_bytes - before_bytes) / number / 1024, "KiB", (),
              "per link, after a pull over each: the peer's memory is mapped by then"),
        value("crowd_files", files / number, "", (), f"open files per link, all {files} of this process counted"),
    ]


def _resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as source:
        return int(source.read().split()[1]) * resource.getpagesize()

