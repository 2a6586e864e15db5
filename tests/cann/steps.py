"""What the processes of these tests are asked to do."""
from __future__ import annotations

import ctypes
import os
import signal
import threading
from typing import Any, Dict, List, Optional, Tuple

import numpy as np
from support.link_steps import cluster, until
from support.strict import Call, Strict

from llm_datadist import CacheDesc, CacheKey, CacheKeyByIdAndIndex, DataType, LLMException

SIZE = 1 << 16


def strict_noted(node: Any, name: str) -> int:
    """A number the stand-in keeps."""
    return Strict().noted(name)


def strict_live(node: Any) -> Dict[str, int]:
    """What the stand-in counts."""
    return Strict().live()


def strict_calls(node: Any) -> List[Call]:
    """The calls the stand-in has seen."""
    return Strict().calls()


def fail(node: Any, function: str, nth: int, code: int) -> None:
    """Make a call fail."""
    Strict().fail(function, nth, code)


def register(node: Any, name: str, byte: int, key: bool = False, num_bytes: int = SIZE, offset: int = 0) -> None:
    """Register a cache of one tensor of one slot, in memory of this process that is kept under the name."""
    memory = np.full(num_bytes + offset, byte, np.uint8)
    cache = node.cache_manager.register_cache(
        CacheDesc(1, [1, num_bytes], DataType.DT_UINT8), [memory.ctypes.data + offset],
        [CacheKey(node.dist.cluster_id, 1)] if key else [])
    node.kept[name] = cache, memory


def register_again(node: Any, name: str, other: str, num_bytes: int) -> None:
    """Register the first bytes of memory that is kept, as another cache."""
    _, memory = node.kept[name]
    cache = node.cache_manager.register_cache(CacheDesc(1, [1, num_bytes], DataType.DT_UINT8), [memory.ctypes.data])
    node.kept[other] = cache, memory


def unregister(node: Any, name: str) -> None:
    """Withdraw a registered cache, and keep its memory."""
    cache, memory = node.kept.pop(name)
    node.cache_manager.unregister_cache(cache.cache_id)
    node.kept["memory of " + name] = None, memory


def allocate(node: Any, name: str, byte: int, key: bool = False, num_bytes: int = SIZE) -> int:
    """Allocate a cache of one tensor of one slot; its id."""
    keys = [CacheKey(node.dist.cluster_id, 1)] if key else []
    cache = node.cache_manager.allocate_cache(CacheDesc(1, [1, num_bytes], DataType.DT_UINT8), keys)
    ctypes.memset(cache.tensor_addrs[0], byte, num_bytes)
    node.kept[name] = cache, None
    return cache.cache_id


def deallocate(node: Any, *names: str) -> None:
    """Give caches back, with the key `allocate` bound, if it is there still."""
    for name in names:
        cache, _ = node.kept.pop(name)
        node.cache_manager.deallocate_cache(cache)
    node.cache_manager.remove_cache_key(CacheKey(node.dist.cluster_id, 1))


def bytes_of(node: Any, name: str) -> set:
    """The values of the bytes of a cache."""
    cache, _ = node.kept[name]
    return set(ctypes.string_at(cache.tensor_addrs[0], cache.cache_desc.size))


def pull(node: Any, cluster_id: int, name: str, cache_id: Optional[int] = None) -> set:
    """Pull the peer's cache, by its key or id, into ours, and return the values of its bytes."""
    cache, _ = node.kept[name]
    key: Any = CacheKey(cluster_id, 1) if cache_id is None else CacheKeyByIdAndIndex(cluster_id, cache_id)
    node.cache_manager.pull_cache(key, cache)
    return bytes_of(node, name)


def pull_error(node: Any, cluster_id: int, name: str) -> Tuple[str, Any, str]:
    """Pull, and return the code, the provider's code and the text of the error; "" for success."""
    try:
        pull(node, cluster_id, name)
    except LLMException as error:
        return error.status_code.name, error.provider_code, str(error)
    return "", None, ""


def pull_from_many_threads(node: Any, cluster_id: int, names: List[str], cache_id: int) -> List[set]:
    """Pull into several caches at once, each from a thread that has no context."""
    found: Dict[str, set] = {}
    threads = [threading.Thread(target=lambda name=name: found.update({name: pull(node, cluster_id, name, cache_id)}))
               for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[name] for name in names]


def link_error(node: Any, cluster_id: int, address: Any, timeout_ms: int = 10000) -> Tuple[str, str]:
    """Link; the code, and what the log says."""
    import logging
    lines: List[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())     # type: ignore[method-assign]
    logger = logging.getLogger("LLM_DATADIST")
    logger.addHandler(handler)
    try:
        overall, _ = node.dist.link_clusters([cluster(cluster_id, address)], timeout_ms)
    finally:
        logger.removeHandler(handler)
    return overall.name, "\n".join(lines)


def interrupted_pull(node: Any, cluster_id: int, name: str) -> str:
    """Pull until Ctrl-C comes; what was raised, and how many batches the stand-in had moved by then."""
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        return pull_error(node, cluster_id, name)[0] or "nothing"
    except KeyboardInterrupt:
        return f"KeyboardInterrupt after {Strict().noted('moved')}"
    finally:
        timer.join()


def until_moved(node: Any, count: int) -> bool:
    """Wait until the stand-in has moved so many batches."""
    return bool(until(lambda: Strict().noted("moved") >= count, 20.0))


def until_unpinned(node: Any) -> int:
    """Wait until nothing is pinned; how many pins there are."""
    until(lambda: node.dist.stats()["pins"] == 0, 20.0)
    return node.dist.stats()["pins"]


def until_no_clients(node: Any) -> int:
    """Wait until the stand-in has no client; how many there are."""
    until(lambda: Strict().noted("clients") == 0, 20.0)
    return Strict().noted("clients")


def fetched(node: Any, cluster_id: int) -> bool:
    """Fetch what a cluster offers by `link_steps.offer`; whether the bytes are right."""
    from support.link_steps import fetch
    return fetch(node, cluster_id)
