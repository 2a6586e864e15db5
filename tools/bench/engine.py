"""How the processes of a benchmark open an engine and make their caches."""
from __future__ import annotations

import json
import socket

from llm_datadist import (
    BlocksCacheKey,
    Cache,
    CacheDesc,
    DataType,
    LLMClusterInfo,
    LLMConfig,
    LLMDataDist,
    LLMException,
    LLMRole,
    LLMStatusCode,
)

from .case import Case
from .memory import PrivateMemory

WORKER_CLUSTER_ID = 1_000_000
BLOCKS_MODEL_ID = 3
LINK_TIMEOUT_MS = 10_000
SYNC_TIMEOUT_MS = 60_000
PAGE_SHIFT = 16
_PORT_ATTEMPTS = 5
_MIN_POOL_BYTES = 1 << 20


def limit_paths(path: str, num_threads: int, num_streams: int) -> dict[str, str]:
    """Return the environment that restricts a process to a data path."""
    return {
        "LLM_DATADIST_HOST_PATHS": path, "LLM_DATADIST_COPY_THREADS": str(num_threads),
        "LLM_DATADIST_TCP_STREAMS": str(num_streams),
    }


def open_engine(
    cluster_id: int, pool_bytes: int, remote_accessible: bool, listen_ip: str | None,
    timeout_ms: int = SYNC_TIMEOUT_MS, page_shift: int = PAGE_SHIFT,
) -> tuple[LLMDataDist, int]:
    """Return an initialised engine of the host provider, and its port (0 without `listen_ip`)."""
    for attempt in range(_PORT_ATTEMPTS):
        port = free_port(listen_ip) if listen_ip is not None else 0
        listen = f"{listen_ip}:{port}" if listen_ip is not None else None
        engine = LLMDataDist(LLMRole.MIX, cluster_id)
        try:
            engine.init(options(pool_bytes, remote_accessible, listen, timeout_ms, page_shift))
        except LLMException:
            if listen_ip is None or attempt == _PORT_ATTEMPTS - 1:
                raise
        else:
            return engine, port
    raise AssertionError("not reached")


def options(
    pool_bytes: int, remote_accessible: bool, listen: str | None, timeout_ms: int = SYNC_TIMEOUT_MS,
    page_shift: int = PAGE_SHIFT,
) -> dict[str, str]:
    """Return the options of an engine; `listen` is "ip:port"."""
    config = LLMConfig()
    config.device_id = 0
    config.enable_cache_manager = True
    config.enable_remote_cache_accessible = remote_accessible
    config.sync_kv_timeout = timeout_ms
    config.mem_pool_cfg = json.dumps({"memory_size": max(pool_bytes, _MIN_POOL_BYTES), "page_shift": page_shift})
    if listen is not None:
        config.listen_ip_info = listen
    generated = config.generate_options()
    generated["llm.Provider"] = "host"          # the patterns are written and read by the CPU
    return generated


def free_port(ip: str) -> int:
    """Return a port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((ip, 0))
        return probe.getsockname()[1]


def cluster(cluster_id: int, ip: str, port: int) -> LLMClusterInfo:
    """Name a peer for ``link_clusters``."""
    info = LLMClusterInfo()
    info.remote_cluster_id = cluster_id
    info.append_local_ip_info("127.0.0.1" if ip.startswith("127.") else "0.0.0.0", 0)
    info.append_remote_ip_info(ip, port)
    return info


def link(engine: LLMDataDist, clusters: list[LLMClusterInfo], timeout_ms: int = LINK_TIMEOUT_MS) -> None:
    """Link to peers; raises RuntimeError with the codes when one fails."""
    overall, each = engine.link_clusters(clusters, timeout_ms)
    if overall != LLMStatusCode.LLM_SUCCESS:
        raise RuntimeError(f"link failed: {overall!s}, per cluster {[str(code) for code in each]}")


def unlink(engine: LLMDataDist, clusters: list[LLMClusterInfo], force: bool = False) -> None:
    """Unlink from peers; raises RuntimeError with the codes when one fails."""
    overall, each = engine.unlink_clusters(clusters, LINK_TIMEOUT_MS, force)
    if overall != LLMStatusCode.LLM_SUCCESS and not force:
        raise RuntimeError(f"unlink failed: {overall!s}, per cluster {[str(code) for code in each]}")


def pool_bytes(case: Case, num_caches: int) -> int:
    """Return the pool size for that many caches of a case, page rounding included."""
    if case.memory == "registered":
        return _MIN_POOL_BYTES
    page_bytes = 1 << PAGE_SHIFT
    tensor_bytes = -(-case.block_bytes * case.capacity // page_bytes) * page_bytes
    return num_caches * case.num_tensors * tensor_bytes + (1 << 20)


def describe(case: Case) -> CacheDesc:
    """Return the descriptor of a case's cache."""
    return CacheDesc(case.num_tensors, [case.capacity, case.block_bytes], DataType.DT_INT8)


class Memory:
    """One cache of a case, from the pool or registered, until `close`."""

    def __init__(self, engine: LLMDataDist, case: Case, keys: bool) -> None:
        self._manager = engine.cache_manager
        self._private: PrivateMemory | None = None
        desc = describe(case)
        key = BlocksCacheKey(0, BLOCKS_MODEL_ID) if keys and case.is_paged else None
        if case.memory == "registered":
            self._private = PrivateMemory(case.num_tensors, desc.size)
            if case.is_paged:
                self.cache: Cache = self._manager.register_blocks_cache(desc, self._private.addrs, key)
            else:
                self.cache = self._manager.register_cache(desc, self._private.addrs)
        elif case.is_paged:
            self.cache = self._manager.allocate_blocks_cache(desc, key)
        else:
            self.cache = self._manager.allocate_cache(desc)
        self.addrs = list(self.cache.tensor_addrs)

    def close(self) -> None:
        """Give the cache and its memory back."""
        if self._private is not None:
            self._manager.unregister_cache(self.cache.cache_id)
            self._private.close()
        elif self.cache.is_blocks_cache:
            self._manager.deallocate_blocks_cache(self.cache)
        else:
            self._manager.deallocate_cache(self.cache)
