"""`CacheManager`: pulls, pushes and layer-wise transfers of the second generation of the API."""
from __future__ import annotations

from typing import TYPE_CHECKING, List, Mapping, Optional, Sequence, Set, Tuple, Union

from llm_datadist.caches.handles import Cache
from llm_datadist.caches.held_blocks import HeldBlocksKey
from llm_datadist.caches.keys import BlocksCacheKey, CacheKey, CacheKeyByIdAndIndex
from llm_datadist.managers.base import (
    PULL_HELD_KEYWORDS,
    PULL_KEYWORDS,
    PullBlocksOptions,
    PullOptions,
    TensorRange,
    check_equal_lengths,
    check_pull_key,
    check_size,
    check_tensors_per_layer,
    cluster_of,
    layers_left,
    layers_of_pull,
    layers_to_fill,
    packed_pull_key,
    remote_key,
    tensors_of,
)
from llm_datadist.managers.held_blocks import HeldBlocks
from llm_datadist.managers.memory import CacheMemory
from llm_datadist.managers.task import CacheTask, transfer_cache_async
from llm_datadist.managers.transfer_config import (
    LayerSynchronizer,
    TransferConfig,
    TransferWithCacheKeyConfig,
    check_layer_range,
)
from llm_datadist.status import LLMException, LLMParamInvalidError
from llm_datadist.utils import log
from llm_datadist.utils.calls import public_call
from llm_datadist.utils.utils import check_int64, check_isinstance, check_uint32

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from llm_datadist.core.engine.engine import Engine

__all__ = ["CacheManager"]

_Blocks = Sequence[int]

UINT32_MAX = 2**32 - 1


class CacheManager(HeldBlocks, CacheMemory):
    """Caches of one process, and the transfers to and from those of linked processes.

    Obtained from ``LLMDataDist.cache_manager``. Every method may be called from any thread and releases the GIL
    while it works. Transfers on one link take turns; different links run in parallel.

    Parameters
    ----------
    llm_engine : Engine
        The engine of the `LLMDataDist`.
    """

    def __init__(self, llm_engine: "Engine") -> None:
        super().__init__(llm_engine)
        self._remote_accessible = bool(llm_engine.options.remote_cache_accessible)
        self._plain_pull_keys = ((CacheKeyByIdAndIndex,) if self._remote_accessible
                                 else (CacheKey, CacheKeyByIdAndIndex))

    # -------------------------------------------------------------------------------------------------- pulls

    def pull_cache(
        self, cache_key: Union[CacheKey, CacheKeyByIdAndIndex], cache: Cache, batch_index: int = 0, size: int = -1,
        **kwargs: "Unpack[PullOptions]",
    ) -> None:
        """Read one batch slot of a peer's contiguous cache and wait until it is here.

        Parameters
        ----------
        cache_key : CacheKey or CacheKeyByIdAndIndex
            The source: its ``cluster_id`` selects the link. In remote-accessible mode by id only.
        cache : Cache
            The destination, contiguous.
        batch_index : int
            Destination slot, uint32.
        size : int
            Bytes per tensor; -1 takes the destination's stride.
        src_layer_range, dst_layer_range : range, optional
            Layers, step 1, of equal length. Default: all.
        tensor_num_per_layer : int, default 2
            Tensors per layer.

        Raises
        ------
        TypeError, ValueError
            An argument has another type, or is outside its integer range.
        LLMParamInvalidError
            Sizes, slots, layers or layouts do not fit, or the cluster is this one. Nothing moved.
        LLMNotFoundError
            LLM_KV_CACHE_NOT_EXIST: no such key or cache at the peer, or no such local cache. Nothing moved.
        LLMLinkError
            LLM_NOT_YET_LINK: no link, or one that broke and could not be made anew in time.
        LLMTimeoutError
            ``sync_kv_timeout`` passed. The destination is undefined, nothing lands any more; the next call makes the
            link anew.

        Notes
        -----
        In two-sided mode a successful pull by request key releases the key on the owner, once all of its tensors
        were taken. Releases the GIL.
        """
        try:
            # The usual call, whose arguments need no more than a look; what it means is checked in compiled code.
            if (not kwargs and type(cache) is Cache and type(cache_key) in self._plain_pull_keys
                    and type(batch_index) is int and 0 <= batch_index <= UINT32_MAX and type(size) is int and size == -1
                    and not cache._is_blocks_cache and cache._cache_manager is self and self._initialized):
                cluster_id, key = cache_key._packed or packed_pull_key(cache_key)
                self._llm_engine.pull_cache(cluster_id, key, cache._cache_id, batch_index, -1, None, None, 0, 0,
                                            not self._remote_accessible)
            else:
                self._pull_cache(cache_key, cache, batch_index, size, kwargs)
            if log.logger.level <= log.DEBUG:
                log.debug("pulled %s into slot %s of %s", cache_key, batch_index, cache)
        except LLMException as error:
            error._complete(operation="pull_cache")
            log.debug("pull_cache of %s failed: %s", cache_key, error)
            if error.peer is not None:
                error._complete(layers=layers_to_fill(error, cache.cache_desc, kwargs))
            raise

    def _pull_cache(
        self, cache_key: Union[CacheKey, CacheKeyByIdAndIndex], cache: Cache, batch_index: int, size: int,
        kwargs: PullOptions,
    ) -> None:
        """Check everything, and pull."""
        self._check_keywords("pull_cache", kwargs, PULL_KEYWORDS)
        check_isinstance("cache_key", cache_key,
                         CacheKeyByIdAndIndex if self._remote_accessible else [CacheKey, CacheKeyByIdAndIndex])
        check_isinstance("cache", cache, Cache)
        check_uint32("batch_index", batch_index)
        check_size(size)
        if cache.is_blocks_cache:
            raise LLMParamInvalidError(f"{cache} is a blocks cache; use pull_blocks")
        src_tensors, dst_tensors = self._pull_layers(cache_key, cache, kwargs)
        self._require_initialized()
        self._llm_engine.pull_cache(
            cluster_of(cache_key), remote_key(cache_key), self._id_of(cache), batch_index, size, src_tensors,
            dst_tensors, release=not self._remote_accessible)

    @staticmethod
    def _pull_layers(cache_key: Union[CacheKey, CacheKeyByIdAndIndex, BlocksCacheKey, HeldBlocksKey],
                     dst_cache: Cache, kwargs: PullOptions) -> Tuple[TensorRange, TensorRange]:
        """Check the rest of what both pulls take, and return the tensors of source and destination."""
        tensors_per_layer = check_tensors_per_layer(kwargs.get("tensor_num_per_layer", 2))
        if isinstance(cache_key, CacheKey):
            check_pull_key(cache_key)
        return layers_of_pull(dst_cache.cache_desc, tensors_per_layer, kwargs)

    def pull_blocks(
        self, src_cache_key: Union[CacheKey, CacheKeyByIdAndIndex, BlocksCacheKey, HeldBlocksKey], dst_cache: Cache,
        src_blocks: _Blocks = (), dst_blocks: _Blocks = (), **kwargs: "Unpack[PullBlocksOptions]",
    ) -> None:
        """Read blocks of a peer's cache into blocks of ours and wait until they are here.

        Parameters
        ----------
        src_cache_key : BlocksCacheKey, HeldBlocksKey, CacheKey or CacheKeyByIdAndIndex
            A blocks cache, blocks of one that are held for a request, or a batch slot of a contiguous one that is cut
            into blocks in order.
        dst_cache : Cache
            The destination, a blocks cache.
        src_blocks : sequence of int, shape (n,)
            Source blocks; empty unless the source is a blocks cache. Lists, tuples, ``array``, NumPy integers and
            buffers of 32 or 64 bit integers are taken as they are.
        dst_blocks : sequence of int, shape (n,), n >= 1
            Destination blocks, each once, paired by position. A contiguous source gives block i its bytes
            ``[i*B, min((i+1)*B, stride))``.
        src_layer_range, dst_layer_range : range, optional
            Layers, step 1, of equal length. Default: all.
        tensor_num_per_layer : int, default 2
            Tensors per layer.
        release : bool, default True
            With a `HeldBlocksKey`: whether this is the last pull that needs it, whose success ends it.

        Raises
        ------
        TypeError, ValueError
            An argument has another type, or a block number is negative.
        LLMParamInvalidError
            Lengths differ, a block number is outside its cache or is the destination twice, block sizes or layouts
            differ. Nothing moved.
        LLMNotFoundError
            As for `pull_cache`. Also when the owner withdrew a `HeldBlocksKey` during the pull: what was read may be
            another request's.
        LLMLinkError, LLMTimeoutError
            As for `pull_cache`.
        """
        try:
            # The usual call, whose arguments need no more than a look; what it means is checked in compiled code.
            if (not kwargs and type(src_cache_key) is BlocksCacheKey and type(dst_cache) is Cache
                    and type(src_blocks) in _plain_blocks and type(dst_blocks) in _plain_blocks
                    and len(src_blocks) and len(dst_blocks)
                    and dst_cache._is_blocks_cache and dst_cache._cache_manager is self and self._initialized):
                cluster_id, key = src_cache_key._packed or packed_pull_key(src_cache_key)
                self._llm_engine.pull_blocks(cluster_id, key, dst_cache._cache_id, src_blocks, dst_blocks)
            else:
                self._pull_blocks(src_cache_key, dst_cache, src_blocks, dst_blocks, kwargs)
            if log.logger.level <= log.DEBUG:
                log.debug("pulled %s blocks of %s into %s", len(dst_blocks), src_cache_key, dst_cache)
        except LLMException as error:
            error._complete(operation="pull_blocks")
            log.debug("pull_blocks of %s failed: %s", src_cache_key, error)
            if error.peer is not None:
                error._complete(blocks=dst_blocks, layers=layers_to_fill(error, dst_cache.cache_desc, kwargs))
            raise

    def _pull_blocks(
        self, src_cache_key: Union[CacheKey, CacheKeyByIdAndIndex, BlocksCacheKey, HeldBlocksKey], dst_cache: Cache,
        src_blocks: _Blocks, dst_blocks: _Blocks, kwargs: PullBlocksOptions,
    ) -> None:
        """Check everything, and pull."""
        held = isinstance(src_cache_key, HeldBlocksKey)
        self._check_keywords("pull_blocks", kwargs, PULL_HELD_KEYWORDS if held else PULL_KEYWORDS)
        check_isinstance("src_cache_key", src_cache_key,
                         [CacheKey, CacheKeyByIdAndIndex, BlocksCacheKey, HeldBlocksKey])
        check_isinstance("dst_cache", dst_cache, Cache)
        if not dst_cache.is_blocks_cache:
            raise LLMParamInvalidError(f"{dst_cache} is a contiguous cache; use pull_cache")
        _check_blocks("src_blocks", src_blocks)
        _check_blocks("dst_blocks", dst_blocks)
        if len(dst_blocks) == 0:
            raise LLMParamInvalidError("dst_blocks is empty; it must name at least one block")
        if isinstance(src_cache_key, (BlocksCacheKey, HeldBlocksKey)) != (len(src_blocks) != 0):
            raise LLMParamInvalidError(f"src_blocks has {len(src_blocks)} entries; it must name blocks of a blocks "
                                       "cache, and be empty when src_cache_key names a contiguous one")
        src_tensors, dst_tensors = self._pull_layers(src_cache_key, dst_cache, kwargs)
        cluster_id, key = cluster_of(src_cache_key), remote_key(src_cache_key)
        release = not self._remote_accessible
        if held:
            release = check_isinstance("release", kwargs.get("release", True), bool, allow_none=False)
        self._require_initialized()
        self._llm_engine.pull_blocks(
            cluster_id, key, self._id_of(dst_cache), src_blocks, dst_blocks, src_tensors, dst_tensors, release)

    # -------------------------------------------------------------------------------------------------- pushes

    @public_call
    def push_cache(
        self, dst_cache_key: CacheKeyByIdAndIndex, src_cache: Cache, src_batch_index: int = 0,
        src_layer_range: Optional[range] = None, dst_layer_range: Optional[range] = None, size: int = -1,
        tensor_num_per_layer: int = 2,
    ) -> None:
        """Write one batch slot into a peer's contiguous cache, layer by layer, and wait until it is there.

        Parameters
        ----------
        dst_cache_key : CacheKeyByIdAndIndex
            The destination slot; its stride must be the source's.
        src_cache : Cache
            The source, contiguous.
        src_batch_index : int
            Source slot, uint32.
        src_layer_range, dst_layer_range : range, optional
            Layers, step 1, of equal length. Default: all of the source.
        size : int
            Must be -1, one whole stride.
        tensor_num_per_layer : int
            Tensors per layer, uint32.

        Raises
        ------
        TypeError, ValueError
            An argument has another type, or is outside its integer range.
        LLMParamInvalidError
            Remote-accessible mode is off, or slots, layers, strides or layouts do not fit.
        LLMNotFoundError, LLMLinkError, LLMTimeoutError
            As for `pull_cache`; layers before the failing one are written.
        """
        check_isinstance("dst_cache_key", dst_cache_key, CacheKeyByIdAndIndex, allow_none=False)
        check_isinstance("src_cache", src_cache, Cache, allow_none=False)
        check_uint32("src_batch_index", src_batch_index)
        self._check_push(src_layer_range, dst_layer_range, tensor_num_per_layer)
        check_int64("size", size)
        if size != -1:
            raise LLMParamInvalidError(f"size={size} is not allowed; a push writes one whole stride, -1")
        if src_cache.is_blocks_cache:
            raise LLMParamInvalidError(f"{src_cache} is a blocks cache; use push_blocks")
        src, dst = self._push_layers(src_cache, src_layer_range, dst_layer_range, tensor_num_per_layer)
        self._require_initialized()
        try:
            self._llm_engine.push_cache(
                cluster_of(dst_cache_key), remote_key(dst_cache_key), self._id_of(src_cache), src_batch_index, src, dst,
                tensor_num_per_layer)
        except LLMException as error:
            error._complete(layers=layers_left(error, dst, tensor_num_per_layer))
            raise

    @public_call
    def push_blocks(
        self, dst_cache_key: BlocksCacheKey, src_cache: Cache, src_blocks: _Blocks = (), dst_blocks: _Blocks = (),
        src_layer_range: Optional[range] = None, dst_layer_range: Optional[range] = None,
        tensor_num_per_layer: int = 2,
    ) -> None:
        """Write blocks into a peer's blocks cache, layer by layer, and wait until they are there.

        Parameters
        ----------
        dst_cache_key : BlocksCacheKey
            The destination.
        src_cache : Cache
            The source, a blocks cache with blocks of the same size.
        src_blocks, dst_blocks : sequence of int, shape (n,), n >= 1
            Blocks, paired by position.
        src_layer_range, dst_layer_range : range, optional
            Layers, step 1, of equal length. Default: all of the source.
        tensor_num_per_layer : int
            Tensors per layer, uint32.

        Raises
        ------
        TypeError, ValueError
            An argument has another type, or a block number is negative.
        LLMParamInvalidError
            Remote-accessible mode is off, lengths differ, a block is the destination twice, or blocks, layers, sizes
            or layouts do not fit.
        LLMNotFoundError, LLMLinkError, LLMTimeoutError
            As for `pull_cache`; layers before the failing one are written.
        """
        check_isinstance("dst_cache_key", dst_cache_key, BlocksCacheKey, allow_none=False)
        check_isinstance("src_cache", src_cache, Cache, allow_none=False)
        _check_blocks("src_blocks", src_blocks)
        _check_blocks("dst_blocks", dst_blocks)
        self._check_push(src_layer_range, dst_layer_range, tensor_num_per_layer)
        if not src_cache.is_blocks_cache:
            raise LLMParamInvalidError(f"{src_cache} is a contiguous cache; use push_cache")
        if len(dst_blocks) == 0 or len(src_blocks) == 0:
            raise LLMParamInvalidError("src_blocks and dst_blocks must each name at least one block")
        src, dst = self._push_layers(src_cache, src_layer_range, dst_layer_range, tensor_num_per_layer)
        cluster_id, key = cluster_of(dst_cache_key), remote_key(dst_cache_key)
        self._require_initialized()
        try:
            self._llm_engine.push_blocks(
                cluster_id, key, self._id_of(src_cache), src_blocks, dst_blocks, src, dst, tensor_num_per_layer)
        except LLMException as error:
            error._complete(blocks=dst_blocks, layers=layers_left(error, dst, tensor_num_per_layer))
            raise

    def _check_push(self, src_layers: Optional[range], dst_layers: Optional[range], tensors_per_layer: int) -> None:
        if not self._remote_accessible:
            raise LLMParamInvalidError("pushes need option llm.EnableRemoteCacheAccessible='1'")
        check_layer_range("src_layer_range", src_layers)
        check_layer_range("dst_layer_range", dst_layers)
        check_tensors_per_layer(tensors_per_layer)

    @staticmethod
    def _push_layers(src_cache: Cache, src: Optional[range], dst: Optional[range],
                     tensors_per_layer: int) -> Tuple[TensorRange, TensorRange]:
        num_tensors = src_cache.cache_desc.num_tensors
        if src is None and dst is None and num_tensors % tensors_per_layer:
            return (0, num_tensors), (0, num_tensors)       # whole caches, also those of no whole number of layers
        every = range(num_tensors // tensors_per_layer)
        src, dst = every if src is None else src, every if dst is None else dst
        check_equal_lengths(src, dst)
        return (tensors_of("src_layer_range", src, tensors_per_layer),
                tensors_of("dst_layer_range", dst, tensors_per_layer))

    @public_call
    def transfer_cache_async(
        self, src_cache: Cache, layer_synchronizer: LayerSynchronizer,
        transfer_configs: Union[List[TransferConfig], Tuple[TransferConfig, ...], List[TransferWithCacheKeyConfig],
                                Tuple[TransferWithCacheKeyConfig, ...]],
        src_block_indices: Optional[_Blocks] = None, dst_block_indices: Optional[_Blocks] = None,
        dst_block_memory_size: Optional[int] = None, tensor_num_per_layer: int = 2,
    ) -> CacheTask:
        """Write a cache to peers in the background, each layer as soon as the synchroniser says it is complete.

        Parameters
        ----------
        src_cache : Cache
            The source, on DEVICE.
        layer_synchronizer : LayerSynchronizer
            Asked once per layer that a config wants, in ascending order, on a thread of ours.
        transfer_configs : sequence of TransferConfig, or of TransferWithCacheKeyConfig in remote-accessible mode
            One destination each. A ``src_layer_range`` of None is set to all layers.
        src_block_indices, dst_block_indices : sequence of int, optional
            Both: blocks to blocks, paired by position. Only the latter: a batch slot cut into blocks.
        dst_block_memory_size : int, optional
            Bytes of a destination block; needed for a batch slot cut into blocks.
        tensor_num_per_layer : int, default 2
            Tensors per layer, uint32.

        Returns
        -------
        CacheTask
            Reports the transfer; failures are its results, not exceptions.

        Raises
        ------
        TypeError, ValueError
            An argument has another type, or is outside its integer range.
        LLMParamInvalidError
            The arguments contradict each other or the source.
        """
        check_isinstance("src_cache", src_cache, Cache, allow_none=False)
        self._require_initialized()
        return transfer_cache_async(
            self._llm_engine, self._id_of(src_cache), src_cache, layer_synchronizer, transfer_configs,
            src_block_indices, dst_block_indices, dst_block_memory_size, tensor_num_per_layer,
            config_types=(TransferConfig, TransferWithCacheKeyConfig) if self._remote_accessible else (TransferConfig,))


_plain_blocks: Set[type] = {list, tuple}            # types that _check_blocks lets through, as they are met


def _check_blocks(name: str, blocks: _Blocks) -> None:
    """Lists and tuples of the API, and whatever offers integers in order; they are checked one by one when read."""
    if isinstance(blocks, (list, tuple, range)):
        return
    is_ordered = hasattr(blocks, "__len__") and hasattr(blocks, "__getitem__") and not isinstance(blocks, Mapping)
    if not is_ordered or isinstance(blocks, (str, bytes, bytearray)):
        raise TypeError(f"{name} only support list or tuple of int, or a buffer of integers, "
                        f"but got {type(blocks).__name__}")
    _plain_blocks.add(type(blocks))
