"""Handles of caches: `Cache` of the cache manager, `KvCache` of the kv cache manager.

A handle holds the cache id, the descriptor, the tensor addresses and its manager. Managers make handles; they give
the addresses as a list or as a callable that makes the list when it is first asked for, because most callers never
look at it. What a handle needs of a manager is `CacheOwner`.
"""
from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any, Callable, Generic, List, Optional, Protocol, Sequence, TypeVar, Union

from llm_datadist.caches.descriptors import CacheDesc, Placement
from llm_datadist.caches.tensor_view import TensorView
from llm_datadist.status import LLMNotEnabledError, LLMNotFoundError, LLMParamInvalidError
from llm_datadist.utils.calls import public_call
from llm_datadist.utils.utils import check_inner, check_isinstance

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Cache", "KvCache", "CPU_CACHE_ID"]

CPU_CACHE_ID = -1

_A = TypeVar("_A")


class CacheOwner(Protocol):
    """What a handle asks of its manager."""

    @property
    def is_host_addressable(self) -> bool:
        """Whether the CPU can read and write memory of placement DEVICE."""
        ...

    @property
    def pool_memory(self) -> object:
        """What keeps the memory of the pools in place as long as it is referenced."""
        ...

    def is_initialized(self) -> bool:
        """Whether the engine is up."""
        ...

    def deallocate_cache(self, cache: Any) -> None:
        """Free `cache`; called by the finaliser of a `KvCache`."""
        ...


class _Addresses(Generic[_A]):
    """Addresses that are listed when first asked for, and gone after deallocation."""

    __slots__ = ("_source",)

    def __init__(self, source: Union[Sequence[_A], Callable[[], List[_A]]]) -> None:
        self._source = source

    def get(self) -> List[_A]:
        source = self._source
        if isinstance(source, list):
            return source
        # Two threads may both make the list; either result is right, and clear() must not be undone.
        made = source() if callable(source) else list(source)
        if self._source is source:
            self._source = made
        return self.get()

    def clear(self) -> None:
        self._source = []


def _views(cache: object, desc: CacheDesc, addresses: List[int], manager: Optional[CacheOwner]) -> List[TensorView]:
    if not addresses:
        raise LLMNotFoundError(f"{cache} has no memory: it was deallocated")
    if desc.placement != Placement.HOST and not (manager is not None and manager.is_host_addressable):
        raise LLMNotEnabledError(f"{cache} lies in device memory, which the CPU cannot address")
    if manager is not None and not manager.is_initialized():
        raise LLMNotFoundError(f"{cache} has no memory: its engine was finalized")
    owner = cache, manager.pool_memory if manager is not None else None
    return [TensorView(address, desc.data_type, tuple(desc.shape), owner) for address in addresses]


def _check_cpu_desc(cache_desc: CacheDesc) -> None:
    check_isinstance("cache_desc", cache_desc, CacheDesc)
    if cache_desc.placement != Placement.HOST:
        raise LLMParamInvalidError(
            f"cache_desc.placement={cache_desc.placement} is not allowed; a cpu cache has placement HOST")


def _check_count(name: str, addresses: List[int], cache_desc: CacheDesc) -> None:
    if len(addresses) != cache_desc.num_tensors:
        raise LLMParamInvalidError(
            f"{name} has {len(addresses)} addresses, but cache_desc.num_tensors={cache_desc.num_tensors}")


class Cache:
    """Handle of a cache, made by `CacheManager`.

    Parameters
    ----------
    cache_id : int
        Id in this process, at least 1; -1 for a cpu cache.
    cache_desc : CacheDesc
        The caller's descriptor.
    tensor_addrs : sequence of int, shape (num_tensors,), or a callable that returns a list
        First byte of each tensor.
    cache_manager : CacheManager, optional
        The maker; None for a cpu cache.
    is_registered : bool
        Whether the memory is the caller's.
    is_blocks_cache : bool
        Whether ``shape[0]`` counts blocks rather than batch slots.

    Notes
    -----
    There is no finaliser: dropping a handle frees nothing.
    """

    def __init__(
        self, cache_id: int, cache_desc: CacheDesc, tensor_addrs: Union[Sequence[int], Callable[[], List[int]]],
        cache_manager: Optional[CacheOwner], is_registered: bool, is_blocks_cache: bool,
    ) -> None:
        self._cache_id = cache_id
        self._cache_desc = cache_desc
        self._addresses = _Addresses(tensor_addrs)
        self._cache_manager = cache_manager
        self._is_registered = is_registered
        self._is_blocks_cache = is_blocks_cache

    @classmethod
    @public_call
    def create_cpu_cache(cls, cache_desc: CacheDesc, addrs: List[int]) -> "Cache":
        """Wrap the caller's host memory, for ``swap_blocks`` alone.

        Parameters
        ----------
        cache_desc : CacheDesc
            Descriptor with placement HOST.
        addrs : list of int, shape (num_tensors,)
            First byte of each tensor.

        Returns
        -------
        Cache
            A blocks cache with id -1.

        Raises
        ------
        TypeError
            `cache_desc` or `addrs` has another type.
        LLMParamInvalidError
            The placement is not HOST, or the number of addresses is not ``num_tensors``.
        """
        _check_cpu_desc(cache_desc)
        check_isinstance("addrs", addrs, list, int, allow_none=False)
        _check_count("addrs", addrs, cache_desc)
        return cls(CPU_CACHE_ID, cache_desc, addrs, None, False, True)

    @property
    def cache_id(self) -> int:
        """Id in this process; -1 for a cpu cache."""
        return self._cache_id

    @property
    def cache_desc(self) -> CacheDesc:
        """The caller's descriptor."""
        return self._cache_desc

    @property
    def tensor_addrs(self) -> List[int]:
        """First byte of each tensor; empty after deallocation."""
        return self._addresses.get()

    @property
    def manager(self) -> Optional[object]:
        """The manager that made the handle; None for a cpu cache."""
        return self._cache_manager

    @property
    def is_registered(self) -> bool:
        """Whether the memory is the caller's."""
        return self._is_registered

    @property
    def is_blocks_cache(self) -> bool:
        """Whether ``shape[0]`` counts blocks rather than batch slots."""
        return self._is_blocks_cache

    def tensor_views(self) -> List[TensorView]:
        """Return one zero-copy view per tensor, for NumPy and DLPack.

        Raises
        ------
        LLMNotFoundError
            The cache was deallocated, or its engine finalised.
        LLMNotEnabledError
            The memory is on a device that the CPU cannot address.
        LLMParamInvalidError
            The elements are strings, or an address is not positive.
        """
        return _views(self, self._cache_desc, self.tensor_addrs, self._cache_manager)

    def tensors(self) -> "List[np.ndarray[Any, Any]]":
        """Return one writable zero-copy array per tensor, of shape ``cache_desc.shape``; BF16 as its bits, uint16.

        Raises
        ------
        LLMNotFoundError
            The cache was deallocated, or its engine finalised.
        LLMNotEnabledError
            The memory is on a device that the CPU cannot address.
        LLMParamInvalidError
            The elements are strings, or an address is not positive.

        Notes
        -----
        An array keeps the memory it shows in place, also after the engine was finalised; once the cache is deallocated
        the memory may be another's.
        """
        return [view.numpy() for view in self.tensor_views()]

    def _forget_memory(self) -> None:
        """Empty the addresses; the manager calls it when it deallocates."""
        self._addresses.clear()

    def __repr__(self) -> str:
        return (f"Cache(cache_id = {self._cache_id}, device_tensor_addrs = {len(self.tensor_addrs)}, "
                f"is_blocks_cache = {self._is_blocks_cache})")


_PerDevice = List[List[int]]


class KvCache:
    """Handle of a cache, made by `KvCacheManager`.

    Parameters
    ----------
    cache_id : int
        Id in this process, at least 1; -1 for a cpu cache.
    cache_desc : CacheDesc
        The caller's descriptor.
    per_device_tensor_addrs : list of list of int, shape (num_devices, num_tensors), or a callable that returns one
        First byte of each tensor on each device.
    kv_cache_manager : KvCacheManager, optional
        The maker; None for a cpu cache.
    is_blocks_cache : bool
        Whether ``shape[0]`` counts blocks rather than batch slots.

    Notes
    -----
    Collecting a handle that was not deallocated deallocates it, if its manager is still initialised. That never
    raises, and does nothing at interpreter exit or in a forked child.
    """

    def __init__(
        self, cache_id: int, cache_desc: CacheDesc,
        per_device_tensor_addrs: Union[_PerDevice, Callable[[], _PerDevice]],
        kv_cache_manager: Optional[CacheOwner], is_blocks_cache: bool = False,
    ) -> None:
        self._cache_id = cache_id
        self._cache_desc = cache_desc
        self._addresses = _Addresses(per_device_tensor_addrs)
        self._is_blocks_cache = is_blocks_cache
        self._kv_cache_manager = kv_cache_manager
        self._pid = os.getpid()
        self._is_valid = True

    @classmethod
    @public_call
    def create_cpu_cache(cls, cache_desc: CacheDesc, addrs: Union[List[int], List[List[int]]]) -> "KvCache":
        """Wrap the caller's host memory, for ``swap_blocks`` alone.

        Parameters
        ----------
        cache_desc : CacheDesc
            Descriptor with placement HOST.
        addrs : list of int, shape (num_tensors,), or list of list of int, shape (num_devices, num_tensors)
            First byte of each tensor; a flat list is that of one device.

        Returns
        -------
        KvCache
            A cache with id -1.

        Raises
        ------
        TypeError
            `cache_desc` or `addrs`, or an element of it, has another type.
        LLMParamInvalidError
            The placement is not HOST, `addrs` is empty or mixes numbers and lists, or the number of addresses is not
            ``num_tensors``.
        """
        _check_cpu_desc(cache_desc)
        check_isinstance("addrs", addrs, list, [int, list], allow_none=False)
        num_lists = sum(isinstance(element, list) for element in addrs)
        if not addrs or num_lists not in (0, len(addrs)):
            raise LLMParamInvalidError(f"addrs={addrs} is not allowed; its elements should be consistent, numbers "
                                       "alone or lists alone, and at least one")
        per_device: Any = addrs if num_lists else [addrs]
        for device, device_addrs in enumerate(per_device):
            check_inner(f"addrs[{device}]", device_addrs, int)
            _check_count(f"addrs[{device}]", device_addrs, cache_desc)
        return cls(CPU_CACHE_ID, cache_desc, per_device, None, True)

    @property
    def cache_id(self) -> int:
        """Id in this process; -1 for a cpu cache."""
        return self._cache_id

    @property
    def cache_desc(self) -> CacheDesc:
        """The caller's descriptor."""
        return self._cache_desc

    @property
    def per_device_tensor_addrs(self) -> List[List[int]]:
        """First byte of each tensor on each device; empty after deallocation."""
        return self._addresses.get()

    @property
    def manager(self) -> Optional[object]:
        """The manager that made the handle; None for a cpu cache."""
        return self._kv_cache_manager

    @property
    def is_blocks_cache(self) -> bool:
        """Whether ``shape[0]`` counts blocks rather than batch slots."""
        return self._is_blocks_cache

    def tensor_views(self, device_index: int = 0) -> List[TensorView]:
        """Return one zero-copy view per tensor of a device, for NumPy and DLPack.

        Parameters
        ----------
        device_index : int
            Index into `per_device_tensor_addrs`.

        Raises
        ------
        LLMNotFoundError
            The cache was deallocated, or its engine finalised.
        LLMNotEnabledError
            The memory is on a device that the CPU cannot address.
        LLMParamInvalidError
            There is no such device, the elements are strings, or an address is not positive.
        """
        per_device = self.per_device_tensor_addrs
        if per_device and not 0 <= device_index < len(per_device):
            raise LLMParamInvalidError(
                f"device_index={device_index} is not allowed; it must be in [0, {len(per_device)})")
        return _views(self, self._cache_desc, per_device[device_index] if per_device else [], self._kv_cache_manager)

    def tensors(self, device_index: int = 0) -> "List[np.ndarray[Any, Any]]":
        """Return one writable zero-copy array per tensor of a device, of shape ``cache_desc.shape``.

        Parameters
        ----------
        device_index : int
            Index into `per_device_tensor_addrs`.

        Raises
        ------
        LLMNotFoundError
            The cache was deallocated, or its engine finalised.
        LLMNotEnabledError
            The memory is on a device that the CPU cannot address.
        LLMParamInvalidError
            There is no such device, the elements are strings, or an address is not positive.

        Notes
        -----
        BF16 is shown as its bits, uint16. An array keeps this handle from being collected, and the memory in place,
        also after the engine was finalised; once the cache is deallocated the memory may be another's.
        """
        return [view.numpy() for view in self.tensor_views(device_index)]

    def _forget_memory(self) -> None:
        """Empty the addresses and disarm the finaliser; the manager calls it when it deallocates."""
        self._is_valid = False
        self._addresses.clear()

    def __del__(self) -> None:
        # A handle whose constructor failed has no fields; a forked child must not touch its parent's engine.
        manager: Optional[CacheOwner] = self.__dict__.get("_kv_cache_manager")
        if manager is None or not self._is_valid or sys.is_finalizing() or os.getpid() != self._pid:
            return
        try:
            if manager.is_initialized():
                manager.deallocate_cache(self)
        except Exception:  # nobody is there to catch it, and the pool is freed with the engine at the latest
            pass

    def __repr__(self) -> str:
        return f"KvCache(cache_id = {self._cache_id}, num_devices = {len(self.per_device_tensor_addrs)})"


AnyCache = Union[Cache, KvCache]
