"""`KvCacheManager`: the memory calls of the first generation of the API, on the same engine as the second."""
from __future__ import annotations

from typing import TYPE_CHECKING, Callable, Dict, List, Optional, Sequence, Tuple, Union

from llm_datadist.caches.descriptors import CacheDesc, Placement
from llm_datadist.caches.handles import CPU_CACHE_ID, KvCache
from llm_datadist.caches.keys import BlocksCacheKey, CacheKey, CacheKeyByIdAndIndex
from llm_datadist.configs import LLMRole
from llm_datadist.managers.base import (
    PULL_KEYWORDS,
    PULL_SLOT_KEYWORDS,
    KeySpec,
    ManagerBase,
    PullOptions,
    PullSlotOptions,
    block_pairs,
    blocks_key_specs,
    check_desc,
    check_pull_key,
    check_same_elements,
    check_size,
    check_tensors_per_layer,
    cluster_of,
    key_specs,
    layers_of_pull,
    layers_to_fill,
    remote_key,
)
from llm_datadist.managers.task import CacheTask, transfer_cache_async
from llm_datadist.managers.transfer_config import LayerSynchronizer, TransferConfig
from llm_datadist.status import LLMException, LLMParamInvalidError, LLMStatusCode
from llm_datadist.utils import log
from llm_datadist.utils.calls import public_call
from llm_datadist.utils.utils import check_dict, check_int32, check_int64, check_isinstance, check_uint32, check_uint64

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from llm_datadist.caches.tensor import Tensor
    from llm_datadist.core.engine.engine import Engine

__all__ = ["KvCacheManager"]

_Keys = Union[Tuple[CacheKey, ...], List[CacheKey]]


def _offset(name: str, value: Optional[int]) -> Optional[int]:
    """An offset of a pull in bytes; None when it was not given."""
    if value is not None:
        check_int64(name, value)
        if value < 0:
            raise ValueError(f"{name}={value} is not allowed; it must not be negative")
    return value


def _check_device(name: str, cache: KvCache) -> None:
    if cache.cache_id == CPU_CACHE_ID or cache.cache_desc.placement == Placement.HOST:
        raise LLMParamInvalidError(f"{name}={cache} is on HOST, which is not allowed here")


class KvCacheManager(ManagerBase):
    """Caches of one process of role PROMPT, DECODER or MIX.

    Obtained from ``LLMDataDist.kv_cache_manager``. A DECODER pulls, a PROMPT binds keys and sends layers.

    Parameters
    ----------
    llm_engine : Engine
        The engine of the `LLMDataDist`.
    role : LLMRole
        Role of the process; follows ``switch_role``.
    """

    def __init__(self, llm_engine: "Engine", role: LLMRole) -> None:
        super().__init__(llm_engine)
        self._role = role

    def _switch_role(self, role: LLMRole) -> None:
        self._role = role

    def _require_role(self, operation: str, *roles: LLMRole) -> None:
        if self._role not in roles:
            allowed = " or ".join(str(role) for role in roles)
            raise LLMParamInvalidError(f"{operation} is not allowed for {self._role}, only for {allowed}")

    # ---------------------------------------------------------------------------------------------- allocation

    @public_call
    def allocate_cache(self, cache_desc: CacheDesc, cache_keys: _Keys = ()) -> KvCache:
        """Take a contiguous cache of device memory.

        Parameters
        ----------
        cache_desc : CacheDesc
            ``num_tensors`` tensors of ``shape``, placement DEVICE.
        cache_keys : sequence of CacheKey, at most ``shape[0]``
            The i-th key is bound to batch slot i; of equal keys the last counts. PROMPT only.

        Returns
        -------
        KvCache
            Its memory is kept until it is deallocated and every key was pulled or removed.

        Raises
        ------
        TypeError
            An argument has another type.
        LLMParamInvalidError
            Keys in another role, placement HOST, an empty descriptor, more keys than slots, or a key bound already.
        LLMMemoryError
            LLM_DEVICE_OUT_OF_MEMORY: the pool has no room. Nothing was taken.
        """
        check_isinstance("cache_desc", cache_desc, CacheDesc)
        check_isinstance("cache_keys", cache_keys, (list, tuple), CacheKey)
        if cache_keys:
            self._require_role("allocate_cache with keys", LLMRole.PROMPT)
        return self._new_cache(cache_desc, lambda: key_specs(cache_desc, cache_keys), False)

    @public_call
    def allocate_blocks_cache(
        self, cache_desc: CacheDesc, blocks_cache_key: Optional[BlocksCacheKey] = None,
    ) -> KvCache:
        """Take a blocks cache of device memory.

        Parameters
        ----------
        cache_desc : CacheDesc
            ``num_tensors`` tensors of ``shape``, placement DEVICE; ``shape[0]`` is the number of blocks.
        blocks_cache_key : BlocksCacheKey, optional
            The key by which peers find it. Not for DECODER.

        Returns
        -------
        KvCache

        Raises
        ------
        TypeError
            An argument has another type.
        LLMParamInvalidError
            A key for DECODER, placement HOST, an empty descriptor, or a key bound already.
        LLMMemoryError
            LLM_DEVICE_OUT_OF_MEMORY: the pool has no room.
        """
        check_isinstance("cache_desc", cache_desc, CacheDesc)
        check_isinstance("blocks_cache_key", blocks_cache_key, BlocksCacheKey)
        if blocks_cache_key is not None:
            self._require_role("allocate_blocks_cache with a key", LLMRole.PROMPT, LLMRole.MIX)
        return self._new_cache(cache_desc, lambda: blocks_key_specs(blocks_cache_key), True)

    def _new_cache(self, cache_desc: CacheDesc, specs: Callable[[], List[KeySpec]], is_blocks: bool) -> KvCache:
        if cache_desc.placement == Placement.HOST:
            raise LLMParamInvalidError("cache_desc.placement=Placement.HOST is not allowed; allocate on DEVICE")
        check_desc(cache_desc)
        cache_id, addrs = self._allocate(cache_desc, specs(), is_blocks)
        return KvCache(cache_id, cache_desc, lambda: [list(addrs)], self, is_blocks)

    def deallocate_cache(self, cache: KvCache) -> None:
        """Drop the handle of a cache; the memory goes when no key is left and no transfer uses it.

        Parameters
        ----------
        cache : KvCache
            Contiguous or blocks. Its addresses become empty at once. One that was deallocated already is left as it is.

        Raises
        ------
        TypeError
            `cache` is no KvCache.
        LLMParamInvalidError
            It is on HOST.
        LLMTimeoutError
            LLM_WAIT_PROCESS_TIMEOUT: the cache table was busy longer than ``sync_kv_timeout``; nothing changed.

        Notes
        -----
        Never waits for a peer: a transfer in flight keeps the bytes until it ends.
        """
        check_isinstance("cache", cache, KvCache)
        _check_device("cache", cache)
        self._require_initialized()
        self._deallocate_here(cache)
        cache._forget_memory()

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
        LLMParamInvalidError
            The role is not PROMPT.
        LLMTimeoutError
            LLM_WAIT_PROCESS_TIMEOUT: the cache table was busy longer than ``sync_kv_timeout``; nothing changed.
        """
        check_isinstance("cache_key", cache_key, CacheKey)
        self._require_role("remove_cache_key", LLMRole.PROMPT)
        self._require_initialized()
        self._remove_key(cache_key)

    # -------------------------------------------------------------------------------------------------- pulls

    def pull_cache(
        self, cache_key: Union[CacheKey, CacheKeyByIdAndIndex], kv_cache: KvCache, batch_index: int = 0,
        size: int = -1, **kwargs: "Unpack[PullSlotOptions]",
    ) -> None:
        """Read one batch slot of a PROMPT's contiguous cache and wait until it is here. DECODER only.

        Parameters
        ----------
        cache_key : CacheKey or CacheKeyByIdAndIndex
            The source: its ``cluster_id`` selects the link.
        kv_cache : KvCache
            The destination, contiguous.
        batch_index : int
            Destination slot, uint32.
        size : int
            Bytes per tensor; -1 takes the destination's stride, less ``dst_cache_offset``.
        src_cache_offset, dst_cache_offset : int, optional
            Bytes to leave out at the start of either slot. Given, even as 0, they keep the key from being released.
        src_layer_range, dst_layer_range : range, optional
            Layers, step 1, of equal length. Default: all.
        tensor_num_per_layer : int, default 2
            Tensors per layer.

        Raises
        ------
        TypeError, ValueError
            An argument has another type, or is outside its integer range.
        LLMParamInvalidError
            Another role, or sizes, slots, layers or layouts do not fit. Nothing moved.
        LLMNotFoundError
            LLM_KV_CACHE_NOT_EXIST: no such key or cache. Nothing moved.
        LLMLinkError
            LLM_NOT_YET_LINK: no link, or one that broke and could not be made anew in time.
        LLMTimeoutError
            LLM_WAIT_PROCESS_TIMEOUT: ``sync_kv_timeout`` passed. The destination is undefined, nothing lands any more.

        Notes
        -----
        A successful pull by request key releases the key on the owner, once all of its tensors were taken.
        """
        try:
            self._pull_cache(cache_key, kv_cache, batch_index, size, kwargs)
            if log.logger.level <= log.DEBUG:
                log.debug("pulled %s into slot %s of %s", cache_key, batch_index, kv_cache)
        except LLMException as error:
            error._complete(operation="pull_cache")
            log.debug("pull_cache of %s failed: %s", cache_key, error)
            if error.peer is not None:
                error._complete(layers=layers_to_fill(error, kv_cache.cache_desc, kwargs))
            raise

    def _pull_cache(self, cache_key: Union[CacheKey, CacheKeyByIdAndIndex], kv_cache: KvCache, batch_index: int,
                    size: int, kwargs: PullSlotOptions) -> None:
        self._check_keywords("pull_cache", kwargs, PULL_SLOT_KEYWORDS)
        self._require_role("pull_cache", LLMRole.DECODER)
        check_isinstance("cache_key", cache_key, [CacheKey, CacheKeyByIdAndIndex])
        check_isinstance("kv_cache", kv_cache, KvCache)
        check_uint32("batch_index", batch_index)
        check_size(size)
        _check_device("kv_cache", kv_cache)
        src_offset = _offset("src_cache_offset", kwargs.get("src_cache_offset"))
        dst_offset = _offset("dst_cache_offset", kwargs.get("dst_cache_offset"))
        tensors_per_layer = check_tensors_per_layer(kwargs.get("tensor_num_per_layer", 2))
        if isinstance(cache_key, CacheKey):
            check_pull_key(cache_key)
        src_tensors, dst_tensors = layers_of_pull(kv_cache.cache_desc, tensors_per_layer, kwargs)
        self._require_initialized()
        self._llm_engine.pull_cache(
            cluster_of(cache_key), remote_key(cache_key), self._id_of(kv_cache), batch_index, size, src_tensors,
            dst_tensors, src_offset or 0, dst_offset or 0, release=src_offset is None and dst_offset is None)

    def pull_blocks(
        self, prompt_cache_key: BlocksCacheKey, decoder_kv_cache: KvCache, prompt_blocks: List[int],
        decoder_blocks: List[int], **kwargs: "Unpack[PullOptions]",
    ) -> None:
        """Read blocks of a PROMPT's blocks cache into ours and wait until they are here. DECODER only.

        Parameters
        ----------
        prompt_cache_key : BlocksCacheKey
            The source.
        decoder_kv_cache : KvCache
            The destination, a blocks cache.
        prompt_blocks, decoder_blocks : list of int, shape (n,), n >= 1
            Blocks, paired by position.
        src_layer_range, dst_layer_range : range, optional
            Layers, step 1, of equal length. Default: all.
        tensor_num_per_layer : int, default 2
            Tensors per layer.

        Raises
        ------
        TypeError, ValueError
            An argument has another type, or a block number is negative.
        LLMParamInvalidError
            Another role, lists that are empty or of different lengths, or blocks, sizes or layouts that do not fit.
        LLMNotFoundError, LLMLinkError, LLMTimeoutError
            As for `pull_cache`.
        """
        try:
            self._pull_blocks(prompt_cache_key, decoder_kv_cache, prompt_blocks, decoder_blocks, kwargs)
            if log.logger.level <= log.DEBUG:
                log.debug("pulled %s blocks of %s into %s", len(decoder_blocks), prompt_cache_key, decoder_kv_cache)
        except LLMException as error:
            error._complete(operation="pull_blocks")
            log.debug("pull_blocks of %s failed: %s", prompt_cache_key, error)
            if error.peer is not None:
                error._complete(blocks=decoder_blocks,
                                layers=layers_to_fill(error, decoder_kv_cache.cache_desc, kwargs))
            raise

    def _pull_blocks(self, prompt_cache_key: BlocksCacheKey, decoder_kv_cache: KvCache, prompt_blocks: List[int],
                     decoder_blocks: List[int], kwargs: PullOptions) -> None:
        self._check_keywords("pull_blocks", kwargs, PULL_KEYWORDS)
        self._require_role("pull_blocks", LLMRole.DECODER)
        check_isinstance("prompt_cache_key", prompt_cache_key, BlocksCacheKey)
        check_isinstance("decoder_kv_cache", decoder_kv_cache, KvCache)
        check_isinstance("prompt_blocks", prompt_blocks, list, allow_none=False)       # elements: where they are read
        check_isinstance("decoder_blocks", decoder_blocks, list, allow_none=False)
        _check_device("decoder_kv_cache", decoder_kv_cache)
        if not prompt_blocks or len(prompt_blocks) != len(decoder_blocks):
            raise LLMParamInvalidError(f"prompt_blocks has {len(prompt_blocks)} entries and decoder_blocks "
                                       f"{len(decoder_blocks)}; they must be equally many, at least one")
        tensors_per_layer = check_tensors_per_layer(kwargs.get("tensor_num_per_layer", 2))
        src_tensors, dst_tensors = layers_of_pull(decoder_kv_cache.cache_desc, tensors_per_layer, kwargs)
        cluster_id, key = cluster_of(prompt_cache_key), remote_key(prompt_cache_key)
        self._require_initialized()
        self._llm_engine.pull_blocks(
            cluster_id, key, self._id_of(decoder_kv_cache), prompt_blocks, decoder_blocks, src_tensors, dst_tensors,
            release=False)

    @public_call
    def transfer_cache_async(
        self, src_cache: KvCache, layer_synchronizer: LayerSynchronizer,
        transfer_configs: Union[List[TransferConfig], Tuple[TransferConfig, ...]],
        src_block_indices: Optional[Sequence[int]] = None, dst_block_indices: Optional[Sequence[int]] = None,
        dst_block_memory_size: Optional[int] = None,
    ) -> CacheTask:
        """Write a cache to DECODERs in the background, each layer as soon as it is complete. PROMPT only.

        Parameters
        ----------
        src_cache : KvCache
            The source, with two tensors per layer.
        layer_synchronizer : LayerSynchronizer
            Asked once per layer that a config wants, in ascending order, on a thread of ours.
        transfer_configs : sequence of TransferConfig
            One destination each. A ``src_layer_range`` of None is set to all layers.
        src_block_indices, dst_block_indices : sequence of int, optional
            Both: blocks to blocks, paired by position.
        dst_block_memory_size : int, optional
            Bytes of a destination block.

        Returns
        -------
        CacheTask
            Reports the transfer; failures are its results, not exceptions.

        Raises
        ------
        TypeError, ValueError
            An argument has another type, or is outside its integer range.
        LLMParamInvalidError
            Another role, a batch slot to be cut into blocks, or arguments that contradict each other or the source.
        """
        self._require_role("transfer_cache_async", LLMRole.PROMPT)
        check_isinstance("src_cache", src_cache, KvCache, allow_none=False)
        _check_device("src_cache", src_cache)
        self._require_initialized()
        return transfer_cache_async(
            self._llm_engine, self._id_of(src_cache), src_cache, layer_synchronizer, transfer_configs,
            src_block_indices, dst_block_indices, dst_block_memory_size, config_types=(TransferConfig,),
            cuts_slots=False, timeout_code=LLMStatusCode.LLM_WAIT_PROCESS_TIMEOUT)

    # ---------------------------------------------------------------------------------------- local operations

    @public_call
    def copy_cache(
        self, dst: KvCache, src: KvCache, dst_batch_index: int = 0, src_batch_index: int = 0, offset: int = 0,
        size: int = -1, req_id: Optional[int] = None,
    ) -> None:
        """Copy one batch slot to another within this process.

        Parameters
        ----------
        dst, src : KvCache
            Caches with equally many tensors.
        dst_batch_index, src_batch_index : int
            Slots, uint32.
        offset : int
            Bytes to leave out at the start of both slots, uint64.
        size : int
            Bytes per tensor; -1 takes the rest of the source slot.
        req_id : int, optional
            For logs.

        Raises
        ------
        TypeError, ValueError
            An argument has another type, or is outside its integer range.
        LLMParamInvalidError
            A cache on HOST, or slots, offset or size do not fit. Nothing moved.
        LLMNotFoundError
            LLM_KV_CACHE_NOT_EXIST: a cache was freed.
        """
        check_isinstance("dst", dst, KvCache)
        check_isinstance("src", src, KvCache)
        check_uint32("dst_batch_index", dst_batch_index)
        check_uint32("src_batch_index", src_batch_index)
        check_uint64("offset", offset)
        check_size(size)
        check_isinstance("req_id", req_id, int)
        _check_device("dst", dst)
        _check_device("src", src)
        if self._strict:
            check_same_elements("copy_cache", src.cache_desc, dst.cache_desc)
        self._require_initialized()
        self._llm_engine.copy_cache(self._id_of(dst), self._id_of(src), dst_batch_index, src_batch_index, offset, size)

    @public_call
    def copy_blocks(self, cache: KvCache, copy_block_info: Dict[int, List[int]]) -> None:
        """Copy blocks to other blocks of the same cache.

        Parameters
        ----------
        cache : KvCache
            Its ``shape[0]`` counts blocks.
        copy_block_info : dict of int to list of int
            Each source block and its destinations, carried out in this order; uint64.

        Raises
        ------
        TypeError, ValueError
            An argument has another type, or a block number is no uint64.
        LLMParamInvalidError
            A cache on HOST, or a block number outside it. Nothing moved.
        LLMNotFoundError
            LLM_KV_CACHE_NOT_EXIST: the cache was freed.
        """
        check_isinstance("cache", cache, KvCache)
        check_dict("copy_block_info", copy_block_info, int, list, int)
        for source, destinations in copy_block_info.items():
            check_uint64("copy_block_info key", source)
            for destination in destinations:
                check_uint64(f"copy_block_info[{source}]", destination)
        _check_device("cache", cache)
        src, dst = block_pairs("copy_block_info", copy_block_info, cache.cache_desc.shape[0], self._strict)
        self._require_initialized()
        self._llm_engine.copy_blocks(self._id_of(cache), src, dst)

    @public_call
    def swap_blocks(self, src: KvCache, dst: KvCache, src_to_dst: Dict[int, int]) -> None:
        """Copy blocks between a HOST and a DEVICE cache; despite the name, one way.

        Parameters
        ----------
        src, dst : KvCache
            One on HOST (``KvCache.create_cpu_cache``) and one on DEVICE, with equal block bytes and ``num_tensors``.
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
            LLM_KV_CACHE_NOT_EXIST: a cache was deallocated.
        """
        check_isinstance("src", src, KvCache)
        check_isinstance("dst", dst, KvCache)
        check_dict("src_to_dst", src_to_dst, int, int)
        self._swap(src, _first_device(src), dst, _first_device(dst), src_to_dst)

    @public_call
    def get_cache_tensors(self, cache: KvCache, tensor_index: int = 0) -> "List[Tensor]":
        """Return one tensor of a cache per device, aliasing its memory.

        Parameters
        ----------
        cache : KvCache
            A cache on DEVICE.
        tensor_index : int
            In ``[0, num_tensors)``, int32.

        Raises
        ------
        TypeError, ValueError
            An argument has another type, or is outside its integer range.
        LLMParamInvalidError
            A cache on HOST, or `tensor_index` outside it.
        LLMNotFoundError
            LLM_KV_CACHE_NOT_EXIST: the cache was deallocated.
        """
        from llm_datadist.caches.tensor import Tensor, register_memory

        check_isinstance("cache", cache, KvCache)
        check_int32("tensor_index", tensor_index)
        _check_device("cache", cache)
        if not 0 <= tensor_index < cache.cache_desc.num_tensors:
            raise LLMParamInvalidError(
                f"tensor_index={tensor_index} is not allowed; it must be in [0, {cache.cache_desc.num_tensors})")
        self._require_initialized()
        desc = cache.cache_desc
        view = cache.tensor_views()[tensor_index]
        return [Tensor.from_tensor_tuple((register_memory(view.address, cache), desc.data_type.value, desc.shape))]


def _first_device(cache: KvCache) -> List[int]:
    addrs = cache.per_device_tensor_addrs
    return addrs[0] if addrs else []
