"""The calls that faults meet, run in either process, and what they leave in memory.

An owner offers a key; a reader pulls it into one destination, or sends layers of its own memory to the owner. Each call
answers with a status code; the test compares the destination itself.
"""
from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any, List, Optional, Tuple

import numpy as np
from support.link_steps import link, unlink
from transfers.caches import addrs_of, bytes_at
from transfers.tasks import Recorder

from llm_datadist import (
    CacheDesc,
    CacheKey,
    CancelScope,
    DataType,
    LLMException,
    LLMStatusCode,
    TransferConfig,
)

OWNER, READER = 1, 2
TENSORS, TENSOR_BYTES = 2, 24 << 10
DESC = CacheDesc(TENSORS, [1, TENSOR_BYTES], DataType.DT_UINT8)
UNTOUCHED = 0xA5                                # what a destination is filled with


def wanted(seed: int) -> bytes:
    """Bytes of one tensor."""
    return np.random.default_rng(seed).bytes(TENSOR_BYTES)


# ------------------------------------------------------------------------------------------------------- the owner

def offer(node: Any, number: int) -> List[int]:
    """Bind a cache with the bytes of `number` to a request key, its only hold; its addresses."""
    cache = node.cache_manager.allocate_cache(DESC, [CacheKey(node.dist.cluster_id, number)])
    addrs = list(addrs_of(cache))
    for tensor, addr in enumerate(addrs):
        bytes_at(addr, TENSOR_BYTES)[:] = np.frombuffer(wanted(number + tensor), np.uint8)
    node.cache_manager.deallocate_cache(cache)
    return addrs


def withdraw(node: Any, number: int) -> None:
    """Remove the key, if it is there."""
    node.cache_manager.remove_cache_key(CacheKey(node.dist.cluster_id, number))


# ------------------------------------------------------------------------------------------------------ the reader

def prepare(node: Any) -> List[int]:
    """Allocate the destination of pulls, which is the source of transfers as well; its addresses."""
    node.kept["target"] = node.cache_manager.allocate_cache(DESC)
    return list(addrs_of(node.kept["target"]))


def put_away(node: Any) -> None:
    """Give it back."""
    node.cache_manager.deallocate_cache(node.kept.pop("target"))


def fill(node: Any, number: Optional[int] = None) -> None:
    """Fill it with the bytes of a number, or with `UNTOUCHED`."""
    for tensor, addr in enumerate(addrs_of(node.kept["target"])):
        fresh = UNTOUCHED if number is None else np.frombuffer(wanted(number + tensor), np.uint8)
        bytes_at(addr, TENSOR_BYTES)[:] = fresh


def holds(node: Any, number: Optional[int]) -> bool:
    """Whether it has the bytes of a number, or is untouched."""
    return memory_holds(node, addrs_of(node.kept["target"]), number)


def memory_holds(node: Any, addrs: List[int], number: Optional[int]) -> bool:
    """The same of any memory of the process."""
    return all(bytes_at(addr, TENSOR_BYTES).tobytes()
               == (bytes([UNTOUCHED]) * TENSOR_BYTES if number is None else wanted(number + tensor))
               for tensor, addr in enumerate(addrs))


def code_of(function: Any, *args: Any, **kwargs: Any) -> LLMStatusCode:
    """Call, and say with which status that ended."""
    try:
        function(*args, **kwargs)
    except LLMException as error:
        return error.status_code
    return LLMStatusCode.LLM_SUCCESS


def pull(node: Any, number: int) -> LLMStatusCode:
    """One exchange."""
    return code_of(node.cache_manager.pull_cache, CacheKey(OWNER, number), node.kept["target"])


def pull_until(node: Any, number: int, limit_s: float = 0.1) -> LLMStatusCode:
    """One exchange that another thread cancels after a time."""
    scope, over = CancelScope(), threading.Event()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: over.wait(limit_s) or scope.cancel())
        try:
            with scope:
                return pull(node, number)
        finally:
            over.set()


def pull_by_steps(node: Any, number: int) -> LLMStatusCode:
    """Layers by range, which is resolve, get, release."""
    layers = {"src_layer_range": range(1), "dst_layer_range": range(1)}
    return code_of(node.cache_manager.pull_cache, CacheKey(OWNER, number), node.kept["target"], **layers)


def send(node: Any, addrs: List[int]) -> LLMStatusCode:
    """Send the target to memory of the owner, in the background, and wait."""
    task = node.cache_manager.transfer_cache_async(node.kept["target"], Recorder(),
                                                   [TransferConfig(OWNER, addrs, range(1))])
    return task.synchronize()


def link_to(node: Any, address: Tuple[str, int], timeout_ms: int) -> LLMStatusCode:
    """Link, and answer with the code of that cluster."""
    return link(node, (OWNER, address), timeout_ms=timeout_ms)[1][0]


def unlink_from(node: Any, timeout_ms: int) -> LLMStatusCode:
    """Unlink."""
    return unlink(node, (OWNER,), timeout_ms=timeout_ms)[1][0]


def fill_memory(node: Any, addrs: List[int], number: int) -> None:
    """Fill any memory of the process with the bytes of a number."""
    for tensor, addr in enumerate(addrs):
        bytes_at(addr, TENSOR_BYTES)[:] = np.frombuffer(wanted(number + tensor), np.uint8)
