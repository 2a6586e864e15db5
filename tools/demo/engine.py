"""How both sides of the demo open, link and count their engine."""
from __future__ import annotations

import socket

from llm_datadist import LLMClusterInfo, LLMConfig, LLMDataDist, LLMRole, LLMStatusCode

from . import workload

ADDRESS = "127.0.0.1"
_LINK_TIMEOUT_MS = 10_000


def open_engine(
    role: LLMRole, cluster_id: int, settings: workload.Settings, num_slots: int, port: int | None = None
) -> LLMDataDist:
    """Return an initialised engine with a pool for one paged cache and `num_slots` contiguous ones.

    Raises
    ------
    LLMException
        The engine could not start; with `port`, possibly because somebody else took it. Nothing is left behind.
    """
    config = LLMConfig()
    config.device_id = 0
    config.enable_cache_manager = True
    config.sync_kv_timeout = settings.sync_timeout_ms
    config.mem_pool_cfg = settings.pool_config(num_slots)
    if port is not None:
        config.listen_ip_info = f"{ADDRESS}:{port}"
    options = config.generate_options()
    options["llm.Provider"] = "host"        # the model computes in NumPy: its caches must be host memory
    engine = LLMDataDist(role, cluster_id)
    engine.init(options)
    return engine


def free_port() -> int:
    """Return a loopback port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((ADDRESS, 0))
        return probe.getsockname()[1]


def link(engine: LLMDataDist, cluster_id: int, port: int) -> None:
    """Link to a cluster that listens on this host; raise RuntimeError with the status code when it fails."""
    _check("link", *engine.link_clusters([_cluster(cluster_id, port)], _LINK_TIMEOUT_MS))


def unlink(engine: LLMDataDist, cluster_id: int, port: int) -> None:
    """Undo `link` on both sides."""
    _check("unlink", *engine.unlink_clusters([_cluster(cluster_id, port)], _LINK_TIMEOUT_MS))


def counts(engine: LLMDataDist) -> dict[str, int]:
    """Return what the engine still holds: caches, keys, pins, and bytes of its pool in use."""
    stats = engine.stats()
    pool = stats["device_pool"]
    held = {name: int(stats[name]) for name in ("caches", "keys", "pins")}
    held["pool_bytes"] = int(pool["bytes"]) - int(pool["free_bytes"])
    return held


def _cluster(cluster_id: int, port: int) -> LLMClusterInfo:
    cluster = LLMClusterInfo()
    cluster.remote_cluster_id = cluster_id
    cluster.append_local_ip_info(ADDRESS, 0)
    cluster.append_remote_ip_info(ADDRESS, port)
    return cluster


def _check(operation: str, overall: LLMStatusCode, per_cluster: list[LLMStatusCode]) -> None:
    if overall != LLMStatusCode.LLM_SUCCESS:
        raise RuntimeError(f"{operation} failed: {overall!s}, per cluster {[str(code) for code in per_cluster]}")
