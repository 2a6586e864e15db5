"""The two sides of tests about keys: an owner that allocates by name, and a pull of one slot."""
from __future__ import annotations

from typing import Any, List, Sequence, Tuple

from support.peer import Node, Process
from transfers.caches import PAGE_BYTES, Named, Spec, contents, deallocate, drop_all, invoke, make

from llm_datadist import CacheDesc, CacheKey, CacheKeyByIdAndIndex, DataType

NONE = 2**64 - 1
MODEL = 4
SLOT_BYTES = 64
PADDING = CacheKey(7, NONE)         # the cluster id counts only where a key selects a link


def req(number: int, model: int = MODEL) -> CacheKey:
    """A request key to bind."""
    return CacheKey(7, number, model)


def prefix(number: int) -> CacheKey:
    """A prefix key to bind."""
    return CacheKey(7, NONE, MODEL, number)


class Owner:
    """The owning process, reduced to allocations by name and to what it holds."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.cluster_id = process.cluster_id

    def allocate(self, name: Any, keys: Sequence[Any] = (), num_tensors: int = 2, num_slots: int = 3,
                 is_blocks: bool = False) -> int:
        """Allocate a cache of one page per tensor and return its id; every byte of slot s is s + 1."""
        return self.process.call(_allocate, name, keys, num_tensors, num_slots, is_blocks)

    def deallocate(self, name: Any) -> None:
        """Give up the handle; its addresses are gone at once."""
        self.process.call(_deallocate, name)

    def addrs(self, name: Any) -> List[int]:
        """Tensor addresses of a cache."""
        return self.process.call(_addrs, name)

    def remove(self, key: CacheKey) -> None:
        """``remove_cache_key``."""
        self.process.call(invoke, "remove_cache_key", key)

    def held(self) -> Tuple[int, int, int]:
        """Caches, keys, pages in use; nothing may be pinned between calls."""
        stats = self.process.settled()
        assert stats["pins"] == 0
        pool = stats["device_pool"]
        return stats["caches"], stats["keys"], (pool["bytes"] - pool["free_bytes"]) // PAGE_BYTES

    def key(self, key: CacheKey) -> CacheKey:
        """The same key for a pull."""
        return CacheKey(self.cluster_id, key.req_id, key.model_id, key.prefix_id)

    def by_id(self, cache_id: int, slot: int = 0) -> CacheKeyByIdAndIndex:
        """The key of a slot by id, for a pull."""
        return CacheKeyByIdAndIndex(self.cluster_id, cache_id, slot)


def content(slot: int, num_tensors: int = 2) -> List[bytes]:
    """What a pull of a slot must bring."""
    return [bytes([slot + 1]) * SLOT_BYTES] * num_tensors


def pull(process: Process, key: Any, method: str = "pull_cache", num_tensors: int = 2, blocks: Any = ((), (0,)),
         **kwargs: Any) -> List[bytes]:
    """Pull one slot or block into a cache of `num_tensors` that exists only for this, and return its bytes."""
    process.call(make, "target", Spec(num_tensors, 1, (SLOT_BYTES,), is_blocks=method == "pull_blocks", seed=99))
    try:
        process.call(invoke, method, key, Named("target"), *(blocks if method == "pull_blocks" else ()), **kwargs)
        return process.call(contents, "target")
    finally:
        process.call(drop_all)


def _allocate(node: Node, name: Any, keys: Sequence[Any], num_tensors: int, num_slots: int, is_blocks: bool) -> int:
    desc = CacheDesc(num_tensors, [num_slots, SLOT_BYTES], DataType.DT_UINT8)
    manager = node.cache_manager
    cache = manager.allocate_blocks_cache(desc, keys[0] if keys else None) if is_blocks else \
        manager.allocate_cache(desc, keys)
    for tensor in cache.tensors():
        for slot in range(num_slots):
            tensor[slot] = slot + 1
    node.kept["plain", name] = cache
    return cache.cache_id


def _deallocate(node: Node, name: Any) -> None:
    cache = node.kept["plain", name]
    deallocate(node.cache_manager, cache)
    assert not (cache.tensor_addrs if hasattr(cache, "tensor_addrs") else cache.per_device_tensor_addrs)


def _addrs(node: Node, name: Any) -> List[int]:
    return node.kept["plain", name].tensor_addrs
