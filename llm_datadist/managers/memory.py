"""Memory of the second generation of the API: allocation, registration, and copies within the process."""
from __future__ import annotations

from typing import TYPE_CHECKING, Any, Callable, Dict, List, Optional, Tuple, Union

from llm_datadist.caches.descriptors import CacheDesc, MemInfo, Memtype, Placement
from llm_datadist.caches.handles import CPU_CACHE_ID, Cache
from llm_datadist.caches.keys import BlocksCacheKey, CacheKey
from llm_datadist.caches.tensor_addresses import resolve_addresses
from llm_datadist.managers.base import (
    KeySpec,
    ManagerBase,
    block_pairs,
    blocks_key_specs,
    check_desc,
    check_same_elements,
    check_size,
    described,
    key_specs,
)
from llm_datadist.status import LLMLinkError, LLMParamInvalidError, LLMStatusCode
from llm_datadist.utils.calls import public_call
from llm_datadist.utils.utils import check_dict, check_int64, check_isinstance, check_uint32, check_uint64

if TYPE_CHECKING:
    from llm_datadist.core.engine.engine import Engine

__all__ = ["CacheMemory"]

_Keys = Union[Tuple[CacheKey, ...], List[CacheKey]]


class CacheMemory(ManagerBase):
    """The caches of one process: the part of `CacheManager` that needs no peer.

    Parameters
    ----------
    llm_engine : Engine
        The engine of the `LLMDataDist`.
    """

    def __init__(self, llm_engine: "Engine") -> None:
        super().__init__(llm_engine)
        self._linked = False
        self._owners: Dict[int, List[Any]] = {}     # what registered memory belongs to, until it is unregistered

    def set_is_call_linked(self) -> None:
        """Note that ``link`` was called: memory registered from now on is not remote accessible by default."""
        self._linked = True

    # ---------------------------------------------------------------------------------------------- allocation

    @public_call
    def allocate_cache(self, cache_desc: CacheDesc, cache_keys: _Keys = (), *,
                       cache_key_lease_ms: Optional[int] = None) -> Cache:
        """Take a contiguous cache from the pool of its placement.

        Parameters
        ----------
        cache_desc : CacheDesc
            ``num_tensors`` tensors of ``shape``; ``shape[0]`` is the number of batch slots.
        cache_keys : sequence of CacheKey, at most ``shape[0]``
            The i-th key is bound to batch slot i. A padding key (``req_id`` 2**64 - 1) leaves its slot unbound.
        cache_key_lease_ms : int, optional
            Milliseconds, uint32, after which keys with a ``req_id`` that nobody pulled release themselves; 0: never.
            None: as option ``llm.CacheKeyLeaseMs`` says, by default never. A pull that runs then may finish.

        Returns
        -------
        Cache
            Its memory, not initialised, is kept until the handle is deallocated and every key was pulled or removed.

        Raises
        ------
        TypeError
            An argument has another type.
        ValueError
            `cache_key_lease_ms` does not fit uint32.
        LLMParamInvalidError
            No pool is configured, the descriptor is empty, there are more keys than slots, a key occurs twice or is
            bound to another cache. Nothing was taken.
        LLMMemoryError
            LLM_OUT_OF_MEMORY: the pool has no room. Nothing was taken.
        """
        check_isinstance("cache_desc", cache_desc, CacheDesc)
        check_isinstance("cache_keys", cache_keys, (list, tuple), CacheKey)
        check_desc(cache_desc)
        if cache_key_lease_ms is not None:
            check_uint32("cache_key_lease_ms", cache_key_lease_ms)
        cache_id, addrs = self._allocate(cache_desc, key_specs(cache_desc, cache_keys), False, cache_key_lease_ms)
        return Cache(cache_id, cache_desc, addrs, self, False, False)

    def deallocate_cache(self, cache: Cache) -> None:
        """Drop the handle of a contiguous cache; the memory goes when no key is left and no transfer uses it.

        Parameters
        ----------
        cache : Cache
            From `allocate_cache`. Its ``tensor_addrs`` become empty at once. One that was deallocated already, or
            that is registered, is left as it is.

        Raises
        ------
        TypeError
            `cache` is no Cache.
        LLMParamInvalidError
            It is a blocks cache.
        LLMNotEnabledError
            No pool is configured.
        LLMTimeoutError
            The cache table was busy longer than ``sync_kv_timeout``; nothing changed.

        Notes
        -----
        Never waits for a peer: a transfer in flight keeps the bytes until it ends.
        """
        check_isinstance("cache", cache, Cache)
        if cache._is_blocks_cache:
            raise LLMParamInvalidError(f"{cache} is a blocks cache; use deallocate_blocks_cache",
                                       operation="deallocate_cache")
        self._deallocate(cache, "deallocate_cache")

    def _deallocate(self, cache: Cache, operation: str) -> None:
        if cache._cache_id == CPU_CACHE_ID:
            cache._forget_memory()
            return
        self._require_pool(operation)
        if not cache._is_registered:
            self._deallocate_here(cache)
        cache._forget_memory()

    @public_call
    def allocate_blocks_cache(self, cache_desc: CacheDesc, blocks_cache_key: Optional[BlocksCacheKey] = None) -> Cache:
        """Take a blocks cache from the pool of its placement.

        Parameters
        ----------
        cache_desc : CacheDesc
            ``num_tensors`` tensors of ``shape``; ``shape[0]`` is the number of blocks.
        blocks_cache_key : BlocksCacheKey, optional
            The key by which peers find it; one blocks cache per ``model_id``.

        Returns
        -------
        Cache

        Raises
        ------
        TypeError
            An argument has another type.
        LLMParamInvalidError
            No pool is configured, the descriptor is empty, or the key is bound to another cache.
        LLMMemoryError
            LLM_OUT_OF_MEMORY: the pool has no room. Nothing was taken.
        """
        check_isinstance("cache_desc", cache_desc, CacheDesc)
        check_isinstance("blocks_cache_key", blocks_cache_key, BlocksCacheKey)
        check_desc(cache_desc)
        cache_id, addrs = self._allocate(cache_desc, blocks_key_specs(blocks_cache_key), True)
        return Cache(cache_id, cache_desc, addrs, self, False, True)

    def deallocate_blocks_cache(self, cache: Cache) -> None:
        """Free a blocks cache and drop its key; a transfer in flight keeps the bytes until it ends.

        Parameters
        ----------
        cache : Cache
            From `allocate_blocks_cache`; one that was deallocated already, registered or made by
            ``Cache.create_cpu_cache`` has nothing to free.

        Raises
        ------
        TypeError
            `cache` is no Cache.
        LLMParamInvalidError
            It is a contiguous cache.
        LLMNotEnabledError
            No pool is configured.
        LLMTimeoutError
            The cache table was busy longer than ``sync_kv_timeout``; nothing changed.
        """
        check_isinstance("cache", cache, Cache)
        if not cache.is_blocks_cache:
            raise LLMParamInvalidError(f"{cache} is a contiguous cache; use deallocate_cache",
                                       operation="deallocate_blocks_cache")
        self._deallocate(cache, "deallocate_blocks_cache")

    def remove_cache_key(self, cache_key: CacheKey) -> None:
        """Unbind a key on this side; its cache goes when nothing else holds it. An unknown key is a no-op.

        Parameters
        ----------
        cache_key : CacheKey
            ``cluster_id`` is ignored.

        Raises
        ------
        TypeError
            `cache_key` is no CacheKey.
        LLMNotEnabledError
            No pool is configured.
        LLMTimeoutError
            The cache table was busy longer than ``sync_kv_timeout``; nothing changed.
        """
        check_isinstance("cache_key", cache_key, CacheKey)
        self._require_pool("remove_cache_key")
        self._remove_key(cache_key)

    # -------------------------------------------------------------------------------------------- registration

    @public_call
    def register_cache(
        self, cache_desc: CacheDesc, addrs: List[Any], cache_keys: _Keys = (),
        remote_accessible: Optional[bool] = None,
    ) -> Cache:
        """Describe memory of the caller as a contiguous cache.

        Parameters
        ----------
        cache_desc : CacheDesc
            What lies there.
        addrs : list, length ``num_tensors``
            First byte of each tensor, not 0; or an object that holds exactly one tensor (``data_ptr()``,
            ``__array_interface__``, writable buffer, ``__dlpack__``), which is kept alive until
            the cache is unregistered.
        cache_keys : sequence of CacheKey, at most ``shape[0]``
            The i-th key is bound to batch slot i. A key that is bound elsewhere stays there.
        remote_accessible : bool, optional
            Whether peers may read and write it directly. Default: placement DEVICE, and not once ``link`` was called.

        Returns
        -------
        Cache
            The memory stays the caller's: it is never freed, and pulls never release its keys.

        Raises
        ------
        TypeError
            An argument has another type.
        LLMParamInvalidError
            The number of addresses is not ``num_tensors``, an address is 0, an object has another size, there are
            more keys than slots, or ``remote_accessible=True`` after ``link``.
        """
        check_isinstance("cache_desc", cache_desc, CacheDesc)
        check_isinstance("cache_keys", cache_keys, (list, tuple), CacheKey, allow_none=False)
        return self._register(cache_desc, addrs, lambda: key_specs(cache_desc, cache_keys), remote_accessible, False)

    @public_call
    def register_blocks_cache(
        self, cache_desc: CacheDesc, addrs: List[Any], blocks_cache_key: Optional[BlocksCacheKey] = None,
        remote_accessible: Optional[bool] = None,
    ) -> Cache:
        """Describe memory of the caller as a blocks cache.

        Parameters
        ----------
        cache_desc : CacheDesc
            What lies there; ``shape[0]`` is the number of blocks.
        addrs : list, length ``num_tensors``
            As for `register_cache`.
        blocks_cache_key : BlocksCacheKey, optional
            The key by which peers find it. One that is bound already moves to this cache.
        remote_accessible : bool, optional
            As for `register_cache`.

        Returns
        -------
        Cache

        Raises
        ------
        TypeError
            An argument has another type.
        LLMParamInvalidError
            As for `register_cache`.
        """
        check_isinstance("cache_desc", cache_desc, CacheDesc)
        check_isinstance("blocks_cache_key", blocks_cache_key, BlocksCacheKey)
        return self._register(cache_desc, addrs, lambda: blocks_key_specs(blocks_cache_key), remote_accessible, True)

    def _register(self, cache_desc: CacheDesc, addrs: List[Any], specs: Callable[[], List[KeySpec]],
                  remote_accessible: Optional[bool], is_blocks: bool) -> Cache:
        check_isinstance("addrs", addrs, list, allow_none=False)
        check_isinstance("remote_accessible", remote_accessible, bool)
        if self._linked and remote_accessible:
            raise LLMParamInvalidError("remote_accessible=True is not allowed once link() was called")
        if not addrs:
            raise LLMParamInvalidError("addrs=[] is not allowed; it must hold one address per tensor")
        tensor_bytes = check_desc(cache_desc)
        addresses, owners = resolve_addresses("addrs", addrs, tensor_bytes)
        if len(addresses) != cache_desc.num_tensors:
            raise LLMParamInvalidError(
                f"addrs has {len(addresses)} addresses, but cache_desc.num_tensors={cache_desc.num_tensors}")
        for index, address in enumerate(addresses):
            if not 0 < address < 2**64:
                raise LLMParamInvalidError(f"addrs[{index}]={address} is not allowed; an address is positive, 64 bits")
        if remote_accessible is None:
            remote_accessible = cache_desc.placement == Placement.DEVICE and not self._linked
        self._require_initialized()
        cache_id = self._llm_engine.register(
            addresses, cache_desc.shape[0], tensor_bytes, cache_desc.placement == Placement.HOST, is_blocks, specs(),
            remote_accessible, *described(cache_desc))
        if owners:
            self._owners[cache_id] = owners
        return Cache(cache_id, cache_desc, addresses, self, True, is_blocks)

    @public_call
    def unregister_cache(self, cache_id: int) -> None:
        """Withdraw a registered cache; afterwards no peer touches its memory. An unknown id is a no-op.

        Parameters
        ----------
        cache_id : int
            Of a registered cache, int64.

        Raises
        ------
        TypeError, ValueError
            `cache_id` is no int64.
        LLMTimeoutError
            Peers still read or write it after ``sync_kv_timeout``. No new transfer starts; call again.
        """
        check_int64("cache_id", cache_id)
        self._require_initialized()
        self._llm_engine.unregister(cache_id)
        self._owners.pop(cache_id, None)

    @public_call
    def remap_registered_memory(self, mem_infos: Union[MemInfo, List[MemInfo]]) -> None:
        """Map registered device memory anew after the device was repaired. Reserved; checks its arguments.

        Parameters
        ----------
        mem_infos : MemInfo or list of MemInfo
            Device memory: address not 0, size positive.

        Raises
        ------
        LLMParamInvalidError
            Anything about the argument is wrong, its type included.
        LLMLinkError
            LLM_NOT_YET_LINK: there is no link.
        """
        infos = [mem_infos] if isinstance(mem_infos, MemInfo) else mem_infos
        if not isinstance(infos, list) or not infos or not all(isinstance(info, MemInfo) for info in infos):
            raise LLMParamInvalidError(
                f"mem_infos={mem_infos!r} is not allowed; it must be a MemInfo, or a list of them that is not empty")
        for info in infos:
            if info.mem_type is not Memtype.MEM_TYPE_DEVICE or (info.addr or 0) <= 0 or (info.size or 0) <= 0:
                raise LLMParamInvalidError(
                    f"{info} is not allowed; it must be device memory, its address and size positive")
        self._require_initialized()
        if self._llm_engine.num_links() == 0:
            raise LLMLinkError(f"remap_registered_memory failed, error code is {LLMStatusCode.LLM_NOT_YET_LINK}, "
                               "there is no link.", status_code=LLMStatusCode.LLM_NOT_YET_LINK,
                               operation="remap_registered_memory")

    # ---------------------------------------------------------------------------------------- local operations

    @public_call
    def copy_cache(
        self, dst: Cache, src: Cache, dst_batch_index: int = 0, src_batch_index: int = 0, offset: int = 0,
        size: int = -1, req_id: Optional[int] = None,
    ) -> None:
        """Copy one batch slot to another within this process.

        Parameters
        ----------
        dst, src : Cache
            Contiguous caches with equally many tensors, of any placement.
        dst_batch_index, src_batch_index : int
            Slots, uint32.
        offset : int
            Bytes to leave out at the start of both slots, uint64.
        size : int
            Bytes per tensor; -1 takes the rest of the source slot.
        req_id : int, optional
            For logs, uint64.

        Raises
        ------
        TypeError, ValueError
            An argument has another type, or is outside its integer range.
        LLMParamInvalidError
            A blocks cache, or slots, offset or size do not fit. Nothing moved.
        LLMNotFoundError
            LLM_KV_CACHE_NOT_EXIST: a cache was freed.
        """
        check_isinstance("dst", dst, Cache)
        check_isinstance("src", src, Cache)
        check_uint32("dst_batch_index", dst_batch_index)
        check_uint32("src_batch_index", src_batch_index)
        check_uint64("offset", offset)
        check_size(size)
        if req_id is not None:
            check_uint64("req_id", req_id)
        if dst.is_blocks_cache or src.is_blocks_cache:
            raise LLMParamInvalidError("copy_cache takes contiguous caches; use copy_blocks or swap_blocks")
        if self._strict:
            check_same_elements("copy_cache", src.cache_desc, dst.cache_desc)
        self._require_initialized()
        self._llm_engine.copy_cache(
            self._id_of(dst), self._id_of(src), dst_batch_index, src_batch_index, offset, size)

    @public_call
    def copy_blocks(self, cache: Cache, copy_block_info: Dict[int, List[int]]) -> None:
        """Copy blocks to other blocks of the same cache.

        Parameters
        ----------
        cache : Cache
            A blocks cache.
        copy_block_info : dict of int to list of int
            Each source block and its destinations, carried out in this order: a later copy sees earlier ones.

        Raises
        ------
        TypeError
            An argument has another type.
        LLMParamInvalidError
            A contiguous cache, or a block number outside it. Nothing moved.
        LLMNotFoundError
            LLM_KV_CACHE_NOT_EXIST: the cache was freed.
        """
        check_isinstance("cache", cache, Cache)
        check_dict("copy_block_info", copy_block_info, int, list, int)
        if not cache.is_blocks_cache:
            raise LLMParamInvalidError(f"{cache} is a contiguous cache; use copy_cache")
        src, dst = block_pairs("copy_block_info", copy_block_info, cache.cache_desc.shape[0], self._strict)
        self._require_initialized()
        self._llm_engine.copy_blocks(self._id_of(cache), src, dst)

    @public_call
    def swap_blocks(self, src_cache: Cache, dst_cache: Cache, src_to_dst: Dict[int, int]) -> None:
        """Copy blocks between a HOST and a DEVICE cache; despite the name, one way.

        Parameters
        ----------
        src_cache, dst_cache : Cache
            Blocks caches, one on HOST and one on DEVICE, with equal block bytes and ``num_tensors``.
        src_to_dst : dict of int to int
            Source block to destination block.

        Raises
        ------
        TypeError
            An argument has another type.
        LLMParamInvalidError
            The caches do not fit each other, a block number is outside its cache, or a cpu cache has an address that
            is not positive. Nothing moved.
        LLMNotFoundError
            LLM_KV_CACHE_NOT_EXIST: a cache was deallocated or unregistered.
        """
        check_isinstance("src_cache", src_cache, Cache)
        check_isinstance("dst_cache", dst_cache, Cache)
        check_dict("src_to_dst", src_to_dst, int, int)
        if not src_cache.is_blocks_cache or not dst_cache.is_blocks_cache:
            raise LLMParamInvalidError("swap_blocks takes blocks caches")
        self._swap(src_cache, src_cache.tensor_addrs, dst_cache, dst_cache.tensor_addrs, src_to_dst)
