"""Steps of tests about links: what the processes of ``peer.py`` are asked to do.

Every engine may offer one small blocks cache whose bytes say which cluster it is; `fetch` reads that of another
cluster, which shows that a link works.
"""
from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

from support.peer import Child

from llm_datadist import (
    BlocksCacheKey,
    CacheDesc,
    DataType,
    KvCache,
    LLMClusterInfo,
    LLMException,
    LLMStatusCode,
    RegisterMemStatus,
)

Address = Tuple[str, int]
Codes = Tuple[LLMStatusCode, List[LLMStatusCode]]

NUM_TENSORS = 2
NUM_BLOCKS = 4
BLOCK_BYTES = 1024
DESC = CacheDesc(NUM_TENSORS, [NUM_BLOCKS, BLOCK_BYTES // 4], DataType.DT_FLOAT)
ALL_BLOCKS = list(range(NUM_BLOCKS))

# A pull by this path needs the owner's threads, so that one that stands still holds it up.
TCP_ONLY = {"LLM_DATADIST_HOST_PATHS": "tcp"}

SETTLE_S = 10.0                 # how long something that happens in the background may take


def until(condition: Callable[[], Any], limit_s: float = SETTLE_S) -> Any:
    """Return the first true value of `condition`, or its last value when the time is up."""
    deadline = time.monotonic() + limit_s
    while True:
        value = condition()
        if value or time.monotonic() >= deadline:
            return value
        time.sleep(0.005)


def stop(pid: int) -> None:
    """Have a process stand still, every thread of it, until it gets SIGCONT."""
    os.kill(pid, signal.SIGSTOP)
    assert until(lambda: all(state == "T" for state in _thread_states(pid)))


@contextlib.contextmanager
def stopped(child: Child) -> Iterator[None]:
    """A process of which no thread runs for a while."""
    try:
        stop(child.pid)
        yield
    finally:
        child.signal(signal.SIGCONT)


def _thread_states(pid: int) -> List[str]:
    states = []
    for task in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{task}/stat", encoding="utf-8", errors="replace") as stat:
            states.append(stat.read().rpartition(")")[2].split()[0])
    return states


# ------------------------------------------------------------------------------------------------------- clusters

def cluster(cluster_id: Optional[int], *remote: Address,
            local: Sequence[Address] = (("127.0.0.1", 0),)) -> LLMClusterInfo:
    """Description of a peer."""
    info = LLMClusterInfo()
    if cluster_id is not None:
        info.remote_cluster_id = cluster_id
    for ip, port in local:
        info.append_local_ip_info(ip, port)
    for ip, port in remote:
        info.append_remote_ip_info(ip, port)
    return info


def link(node: Any, *targets: Tuple[int, Address], timeout_ms: int = 10000) -> Codes:
    """``link_clusters`` to each (cluster id, address)."""
    return node.dist.link_clusters([cluster(*target) for target in targets], timeout_ms)


def unlink(node: Any, *targets: Tuple[Any, ...], timeout_ms: int = 10000, force: bool = False) -> Codes:
    """``unlink_clusters`` from each (cluster id,) or (cluster id, address)."""
    return node.dist.unlink_clusters([cluster(*target) for target in targets], timeout_ms, force)


def link_in_threads(node: Any, target: Tuple[int, Address], num_threads: int) -> List[LLMStatusCode]:
    """Call `link` for the same peer from many threads at once."""
    with ThreadPoolExecutor(num_threads) as pool:
        return [codes[0] for _, codes in pool.map(lambda _: link(node, target), range(num_threads))]


def link_each_in_a_thread(node: Any, targets: Sequence[Tuple[int, Address]]) -> List[LLMStatusCode]:
    """Call `link` for each peer from a thread of its own."""
    with ThreadPoolExecutor(len(targets)) as pool:
        return [overall for overall, _ in pool.map(lambda target: link(node, target), targets)]


def links(node: Any) -> List[Tuple[int, str, str]]:
    """What links there are, as sorted (cluster id, origin, state)."""
    return sorted((row["cluster_id"], row["origin"], row["state"]) for row in node.dist.links())


def wait_links(node: Any, wanted: List[Tuple[int, str, str]]) -> List[Tuple[int, str, str]]:
    """Wait until the links are as wanted, and return what they are."""
    until(lambda: links(node) == wanted)
    return links(node)


def drop_links(node: Any) -> None:
    """End all links of `link_clusters` on this side."""
    ids = {row["cluster_id"] for row in node.dist.links() if row["origin"] != "comm"}
    if ids:
        node.dist.unlink_clusters([cluster(cluster_id) for cluster_id in ids], 10000, True)


# ----------------------------------------------------------------------------------------------------------- data

def byte_of(cluster_id: int) -> int:
    """What fills the cache that this cluster offers."""
    return cluster_id % 251 + 1


def addrs_of(cache: Any) -> List[int]:
    """Addresses of the tensors of a cache of either generation."""
    return cache.per_device_tensor_addrs[0] if isinstance(cache, KvCache) else cache.tensor_addrs


def free(node: Any, cache: Any) -> None:
    """Give a blocks cache of either generation back."""
    if isinstance(cache, KvCache):
        node.cache_manager.deallocate_cache(cache)
    else:
        node.cache_manager.deallocate_blocks_cache(cache)


def offer(node: Any, model_id: int = 0) -> None:
    """Keep a blocks cache for others to read."""
    cache = node.cache_manager.allocate_blocks_cache(DESC, BlocksCacheKey(node.dist.cluster_id, model_id))
    for addr in addrs_of(cache):
        ctypes.memset(addr, byte_of(node.dist.cluster_id), NUM_BLOCKS * BLOCK_BYTES)
    node.kept["offer", model_id] = cache


def withdraw(node: Any, model_id: int = 0) -> None:
    """Give the cache of `offer` back."""
    free(node, node.kept.pop(("offer", model_id)))


def fetch(node: Any, cluster_id: int, model_id: int = 0) -> bool:
    """Read what a cluster offers, and tell whether the bytes are right."""
    cache = node.cache_manager.allocate_blocks_cache(DESC)
    try:
        for addr in addrs_of(cache):
            ctypes.memset(addr, 0, NUM_BLOCKS * BLOCK_BYTES)
        node.cache_manager.pull_blocks(BlocksCacheKey(cluster_id, model_id), cache, ALL_BLOCKS, ALL_BLOCKS)
        wanted = bytes([byte_of(cluster_id)]) * (NUM_BLOCKS * BLOCK_BYTES)
        return all(ctypes.string_at(addr, len(wanted)) == wanted for addr in addrs_of(cache))
    finally:
        free(node, cache)


def fetch_code(node: Any, cluster_id: int, model_id: int = 0) -> LLMStatusCode:
    """`fetch`, as a status code; LLM_UNKNOWN_ERROR for wrong bytes."""
    try:
        return LLMStatusCode.LLM_SUCCESS if fetch(node, cluster_id, model_id) else LLMStatusCode.LLM_UNKNOWN_ERROR
    except LLMException as error:
        return error.status_code


# --------------------------------------------------------------------------------------------------- rank tables

def rank_table(servers: Sequence[Dict[str, Any]], version: str = "1.0", **more: Any) -> Dict[str, Any]:
    """A rank table of servers of `server`."""
    return {"version": version, "status": "completed", "server_count": str(len(servers)),
            "server_list": list(servers), **more}


def server(server_id: str, *devices: Tuple[int, int], host_ip: Optional[str] = None,
           device_ip: str = "192.0.2.{}") -> Dict[str, Any]:
    """A server with devices of (device id, rank); the addresses of devices lead nowhere."""
    entry: Dict[str, Any] = {"server_id": server_id, "device": [
        {"device_id": str(device), "device_ip": device_ip.format(rank + 1), "rank_id": str(rank),
         "super_device_id": str(rank)} for device, rank in devices]}
    if host_ip is not None:
        entry["host_ip"] = host_ip
    return entry


def ask(node: Any, name: str, members: Dict[int, int], table: str) -> int:
    """Call ``link``, and keep its id under the name."""
    node.kept["comm", name] = node.dist.link(name, members, table)
    return node.kept["comm", name]


def met(node: Any, *names: str, within_s: float = 20.0) -> List[RegisterMemStatus]:
    """Poll until no communicator is PREPARING any more; return the statuses."""
    def statuses() -> List[RegisterMemStatus]:
        return [node.dist.query_register_mem_status(node.kept["comm", name]) for name in names]

    until(lambda: RegisterMemStatus.PREPARING not in statuses(), within_s)
    return statuses()


def leave(node: Any, *names: str) -> None:
    """``unlink`` each communicator."""
    for name in names:
        node.dist.unlink(node.kept.pop(("comm", name)))


# ------------------------------------------------------------------------------------------ what a process holds

def footprint(node: Any) -> Dict[str, Any]:
    """How many descriptors, threads and mappings this process has, and the free bytes of its pool."""
    with open("/proc/self/maps", encoding="ascii") as maps:
        num_maps = sum(1 for _ in maps)
    return {"fds": len(os.listdir("/proc/self/fd")), "threads": len(os.listdir("/proc/self/task")), "maps": num_maps,
            "free_bytes": node.dist.stats()["device_pool"]["free_bytes"]}
