"""Caches of a test in one process: made from a spec, filled with known bytes, surrounded by guard bytes.

The functions run where the caches are, see ``peer.py``; a test names a cache it made by a `Named`.
"""
from __future__ import annotations

import ctypes
import random
from typing import Any, List, NamedTuple, Optional, Tuple, Union

import numpy as np
from support.peer import Node
from support.reference import Model

from llm_datadist import BlocksCacheKey, CacheDesc, CacheKey, DataType, Placement

GUARD = 0xA5
PAGE_BYTES = 4096               # of the pools of `engine_options`


class Spec(NamedTuple):
    """What a cache looks like. ``slot_shape`` is the shape of one slot or block."""

    num_tensors: int
    num_slots: int
    slot_shape: Tuple[int, ...]
    data_type: DataType = DataType.DT_UINT8
    is_blocks: bool = False
    is_registered: bool = False
    on_host: bool = False
    keys: Tuple[Union[CacheKey, BlocksCacheKey], ...] = ()
    remote_accessible: Optional[bool] = None
    seed: int = 0

    @property
    def desc(self) -> CacheDesc:
        """The descriptor."""
        return CacheDesc(self.num_tensors, [self.num_slots, *self.slot_shape], self.data_type,
                         placement=Placement.HOST if self.on_host else Placement.DEVICE)

    @property
    def stride(self) -> int:
        """Bytes of one slot or block."""
        return self.tensor_bytes // self.num_slots

    @property
    def tensor_bytes(self) -> int:
        """Bytes of one tensor."""
        return self.desc.size

    def fill(self) -> List[bytes]:
        """The bytes each tensor holds at first."""
        generator = np.random.default_rng(self.seed)
        return [generator.bytes(self.tensor_bytes) for _ in range(self.num_tensors)]

    def model(self) -> Model:
        """The same as a model."""
        return Model(self.fill(), self.num_slots)


class Made(NamedTuple):
    """What `make` tells the test."""

    cache_id: int
    addrs: List[int]


class Named(NamedTuple):
    """Stands for a cache of the process in the arguments of `invoke`."""

    name: str


class _Held:
    """A cache with its memory and guards."""

    def __init__(self, cache: Any, addrs: List[int], spec: Spec, guards: List[np.ndarray], owned: List[Any]) -> None:
        self.cache = cache
        self.addrs = addrs
        self.spec = spec
        self.guards = guards
        self.owned = owned          # buffer of a registered cache, or the caches that stand around an allocated one

    def tensors(self) -> List[np.ndarray]:
        return [bytes_at(addr, self.spec.tensor_bytes) for addr in self.addrs]


def bytes_at(addr: int, num_bytes: int) -> np.ndarray:
    """Memory as an array, zero-copy."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * num_bytes).from_address(addr))


def addrs_of(cache: Any) -> List[int]:
    """First byte of each tensor, of a handle of either generation."""
    return cache.tensor_addrs if hasattr(cache, "tensor_addrs") else (cache.per_device_tensor_addrs or [[]])[0]


def make(node: Node, name: str, spec: Spec) -> Made:
    """Make and fill a cache."""
    held = _register(node, spec) if spec.is_registered else _allocate(node, spec)
    node.kept[name] = held
    for guard in held.guards:
        guard[:] = GUARD
    for tensor, content in zip(held.tensors(), spec.fill()):
        tensor[:] = np.frombuffer(content, np.uint8)
    return Made(held.cache.cache_id, held.addrs)


def _register(node: Node, spec: Spec) -> _Held:
    """Lay tensors at odd places of private memory, in no order, with guards between them."""
    lay = random.Random(spec.seed)
    gaps = [lay.randrange(1, 80) for _ in range(spec.num_tensors + 1)]
    order = lay.sample(range(spec.num_tensors), spec.num_tensors)
    buffer = np.empty(sum(gaps) + spec.num_tensors * spec.tensor_bytes, np.uint8)
    base = buffer.ctypes.data
    addrs, guards, at = [0] * spec.num_tensors, [], 0
    for gap, tensor in zip(gaps, order):
        guards.append(buffer[at:at + gap])
        addrs[tensor] = base + at + gap
        at += gap + spec.tensor_bytes
    guards.append(buffer[at:])
    manager = node.cache_manager
    if spec.is_blocks:
        cache = manager.register_blocks_cache(spec.desc, addrs, spec.keys[0] if spec.keys else None,
                                              spec.remote_accessible)
    else:
        cache = manager.register_cache(spec.desc, addrs, spec.keys, spec.remote_accessible)
    return _Held(cache, addrs, spec, guards, [buffer])


def _allocate(node: Node, spec: Spec) -> _Held:
    """Take a cache from a pool, and one page before and after it; what pages hold beyond a tensor is a guard, too."""
    manager = node.cache_manager
    page = Spec(1, 1, (PAGE_BYTES,), on_host=spec.on_host).desc
    before = manager.allocate_cache(page)
    if spec.is_blocks:
        cache = manager.allocate_blocks_cache(spec.desc, spec.keys[0] if spec.keys else None)
    else:
        cache = manager.allocate_cache(spec.desc, spec.keys)
    after = manager.allocate_cache(page)
    addrs = addrs_of(cache)
    guards = [bytes_at(addrs_of(around)[0], PAGE_BYTES) for around in (before, after)]
    # The pool of the first generation has smaller pages.
    page_bytes = 512 if node.dist._require_engine().options.generation == 1 else PAGE_BYTES
    tail = -spec.tensor_bytes % page_bytes
    guards += [bytes_at(addr + spec.tensor_bytes, tail) for addr in addrs if tail]
    return _Held(cache, addrs, spec, guards, [before, after])


def contents(node: Node, name: str) -> List[bytes]:
    """The bytes of every tensor; fails when a guard was overwritten."""
    held = node.kept[name]
    for index, guard in enumerate(held.guards):
        wrong = np.flatnonzero(guard != GUARD)
        assert wrong.size == 0, f"{wrong.size} bytes around cache {name!r} changed, first {wrong[0]} of guard {index}"
    return [tensor.tobytes() for tensor in held.tensors()]


def drop(node: Node, name: str) -> None:
    """Give a cache back, its keys included."""
    held = node.kept.pop(name)
    held.guards.clear()
    manager = node.cache_manager
    if held.spec.is_registered:
        manager.unregister_cache(held.cache.cache_id)
        return
    deallocate(manager, held.cache)
    for key in held.spec.keys:
        if isinstance(key, CacheKey):
            manager.remove_cache_key(key)
    for cache in held.owned:
        manager.deallocate_cache(cache)


def deallocate(manager: Any, cache: Any) -> None:
    """``deallocate_cache`` or ``deallocate_blocks_cache``, as the handle needs."""
    is_blocks = cache.is_blocks_cache and hasattr(manager, "deallocate_blocks_cache")
    (manager.deallocate_blocks_cache if is_blocks else manager.deallocate_cache)(cache)


def drop_all(node: Node) -> None:
    """Give back every cache that `make` left here."""
    for name in [name for name, kept in node.kept.items() if isinstance(kept, _Held)]:
        drop(node, name)


def invoke(node: Node, method: str, *args: Any, **kwargs: Any) -> Any:
    """Call a method of the manager; a `Named` becomes the cache it names."""
    args = tuple(node.kept[arg.name].cache if isinstance(arg, Named) else arg for arg in args)
    return getattr(node.cache_manager, method)(*args, **kwargs)
