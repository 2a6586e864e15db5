"""What both cache managers do alike: keys, ranges, and the calls into the engine.

A manager of either generation checks arguments by the rules of its own API and hands numbers to the one engine.
"""
from __future__ import annotations

from typing import TYPE_CHECKING, Any, Dict, List, Mapping, Optional, Sequence, Set, Tuple, TypedDict, Union

from llm_datadist.caches.descriptors import CacheDesc, Placement
from llm_datadist.caches.handles import CPU_CACHE_ID, Cache, KvCache
from llm_datadist.caches.held_blocks import HeldBlocksKey
from llm_datadist.caches.keys import INVALID_ID, BlocksCacheKey, CacheKey, CacheKeyByIdAndIndex, is_valid_id
from llm_datadist.managers.leases import LeaseLog
from llm_datadist.status import (
    LLMException,
    LLMNotEnabledError,
    LLMNotFoundError,
    LLMParamInvalidError,
    LLMStatusCode,
)
from llm_datadist.utils import log
from llm_datadist.utils.calls import refuse_unknown
from llm_datadist.utils.utils import check_int64, check_isinstance, check_uint32

if TYPE_CHECKING:
    from llm_datadist.core.engine.engine import Engine
    from llm_datadist.observe.places import Places

__all__ = ["ManagerBase", "PullBlocksOptions", "PullOptions", "PullSlotOptions"]

KEY_REQ, KEY_PREFIX, KEY_BLOCKS, KEY_BY_ID, KEY_HOLD = range(5)
MAX_DIMS = 31
MAX_TENSORS = 2**32

AnyKey = Union[CacheKey, CacheKeyByIdAndIndex, BlocksCacheKey, HeldBlocksKey]
KeySpec = Tuple[int, int, int, int]             # slot, kind, id, model id
RemoteKey = Tuple[int, int, int, int]           # kind, id, model id, batch index
TensorRange = Optional[Tuple[int, int]]
SwapEnd = Union[int, Tuple[List[int], int]]     # a cache id, or addresses and how many blocks lie there


class PullOptions(TypedDict, total=False):
    """Keywords of a pull of either generation."""

    src_layer_range: Optional[range]
    dst_layer_range: Optional[range]
    tensor_num_per_layer: int


class PullSlotOptions(PullOptions, total=False):
    """Keywords of ``KvCacheManager.pull_cache``."""

    src_cache_offset: Optional[int]
    dst_cache_offset: Optional[int]


class PullBlocksOptions(PullOptions, total=False):
    """Keywords of ``CacheManager.pull_blocks``."""

    release: bool


PULL_KEYWORDS = tuple(PullOptions.__annotations__)
PULL_HELD_KEYWORDS = (*PULL_KEYWORDS, "release")
PULL_SLOT_KEYWORDS = (*PULL_KEYWORDS, "src_cache_offset", "dst_cache_offset")


# ------------------------------------------------------------------------------------------------------- keys

def check_pull_key(cache_key: CacheKey) -> None:
    """Check that a key of a pull names a request or a prefix, and not both."""
    if is_valid_id(cache_key.req_id) == is_valid_id(cache_key.prefix_id):
        raise LLMParamInvalidError(
            f"cache_key={cache_key} is not allowed; exactly one of req_id and prefix_id must be set")


def key_specs(cache_desc: CacheDesc, cache_keys: Sequence[CacheKey]) -> List[KeySpec]:
    """Bind the i-th key to batch slot i; padding keys occupy a slot and bind nothing."""
    if len(cache_keys) > cache_desc.shape[0]:
        raise LLMParamInvalidError(
            f"cache_keys has {len(cache_keys)} keys, but the cache only {cache_desc.shape[0]} batch slots")
    specs = []
    for slot, key in enumerate(cache_keys):
        if key._prefix_id != INVALID_ID:
            specs.append((slot, KEY_PREFIX, key._prefix_id, key._model_id))
        elif key._req_id != INVALID_ID:
            specs.append((slot, KEY_REQ, key._req_id, key._model_id))
    return specs


def blocks_key_specs(blocks_cache_key: Optional[BlocksCacheKey]) -> List[KeySpec]:
    """Bind the key of a blocks cache, if there is one."""
    return [] if blocks_cache_key is None else [(0, KEY_BLOCKS, INVALID_ID, _number_of(blocks_cache_key, "model_id"))]


def _number_of(key: BlocksCacheKey, name: str) -> int:
    """A number of a blocks key, whose constructor lets everything through."""
    value = getattr(key, name)
    if not isinstance(value, int) or not 0 <= value < 2**64:
        raise LLMParamInvalidError(f"{name}={value} of a BlocksCacheKey is not allowed; it must be in [0, 2**64)")
    return value


def cluster_of(cache_key: AnyKey) -> int:
    """Cluster that owns what a key names."""
    return _number_of(cache_key, "cluster_id") if isinstance(cache_key, BlocksCacheKey) else cache_key.cluster_id


def remote_key(cache_key: AnyKey) -> RemoteKey:
    """Name of a cache on its owner."""
    if isinstance(cache_key, CacheKeyByIdAndIndex):
        return KEY_BY_ID, max(cache_key.cache_id, 0), 0, cache_key.batch_index      # no cache has id 0
    if isinstance(cache_key, HeldBlocksKey):
        return KEY_HOLD, cache_key.req_id, cache_key.generation, 0
    if isinstance(cache_key, BlocksCacheKey):
        return KEY_BLOCKS, INVALID_ID, _number_of(cache_key, "model_id"), 0
    if is_valid_id(cache_key.prefix_id):
        return KEY_PREFIX, cache_key.prefix_id, cache_key.model_id, 0
    return KEY_REQ, cache_key.req_id, cache_key.model_id, 0


def packed_pull_key(cache_key: AnyKey) -> Tuple[int, RemoteKey]:
    """Cluster and name of what a pull reads. A key never changes, so that is worked out once for each."""
    packed = cache_key._packed
    if packed is None:
        if isinstance(cache_key, CacheKey):
            check_pull_key(cache_key)
        packed = cache_key._packed = cluster_of(cache_key), remote_key(cache_key)
    return packed


# ---------------------------------------------------------------------------------------- descriptors and sizes

def check_desc(cache_desc: CacheDesc) -> int:
    """Check a descriptor for use and return the bytes of one tensor."""
    if cache_desc.num_tensors <= 0:
        raise LLMParamInvalidError("cache_desc.num_tensors=0 is not allowed; a cache has at least one tensor")
    if not 1 <= len(cache_desc.shape) <= MAX_DIMS:
        raise LLMParamInvalidError(
            f"cache_desc.shape has {len(cache_desc.shape)} dimensions; 1 to {MAX_DIMS} are allowed")
    return cache_desc.size


def check_size(size: int) -> None:
    """Check the ``size`` of a pull or copy."""
    check_int64("size", size)
    if size != -1 and size <= 0:
        raise LLMParamInvalidError(f"size={size} is not allowed; it must be -1 or positive")


def described(cache_desc: CacheDesc) -> Tuple[int, Sequence[int]]:
    """Number of the data type, -1 where there is none, and shape of the tensors: what peers are told."""
    return cache_desc._type_number, cache_desc._shape


# ----------------------------------------------------------------------------------------------------- layers

def check_tensors_per_layer(tensors_per_layer: int) -> int:
    """Check ``tensor_num_per_layer`` and return it."""
    check_uint32("tensor_num_per_layer", tensors_per_layer)
    if tensors_per_layer == 0:
        raise LLMParamInvalidError("tensor_num_per_layer=0 is not allowed; a layer has at least one tensor")
    return tensors_per_layer


def layers_of_pull(
    dst_desc: CacheDesc, tensors_per_layer: int, kwargs: PullOptions,
) -> Tuple[TensorRange, TensorRange]:
    """Turn the layer ranges of a pull into tensor ranges of source and destination."""
    src = _pull_range("src_layer_range", kwargs.get("src_layer_range"))
    dst = _pull_range("dst_layer_range", kwargs.get("dst_layer_range"))
    check_equal_lengths(src, dst)
    if (src is not None or dst is not None) and dst_desc.num_tensors % tensors_per_layer:
        raise LLMParamInvalidError(f"the destination's num_tensors={dst_desc.num_tensors} is no multiple of "
                                   f"tensor_num_per_layer={tensors_per_layer}")
    return (tensors_of("src_layer_range", src, tensors_per_layer),
            tensors_of("dst_layer_range", dst, tensors_per_layer))


def layers_to_fill(error: LLMException, dst_desc: CacheDesc, kwargs: PullOptions) -> Optional[Sequence[int]]:
    """Destination layers of a pull that failed; None where there are no whole layers."""
    tensors_per_layer = kwargs.get("tensor_num_per_layer", 2)
    if error._faulty_tensors is not None:
        return _layers_of(error._faulty_tensors, tensors_per_layer)
    layers = kwargs.get("dst_layer_range")
    if layers:
        return layers
    num_layers, rest = divmod(dst_desc.num_tensors, tensors_per_layer)
    return None if rest else range(num_layers)


def layers_left(error: LLMException, dst: TensorRange, tensors_per_layer: int) -> Optional[Sequence[int]]:
    """Destination layers of a push that had not arrived when it failed; None where there are no whole layers."""
    if error._faulty_tensors is not None:
        return _layers_of(error._faulty_tensors, tensors_per_layer)
    if dst is None or dst[0] % tensors_per_layer or dst[1] % tensors_per_layer:
        return None
    return range((dst[0] + error._num_tensors) // tensors_per_layer, dst[1] // tensors_per_layer)


def _layers_of(tensors: Sequence[int], tensors_per_layer: int) -> Sequence[int]:
    layers = sorted({tensor // tensors_per_layer for tensor in tensors})
    whole = range(layers[0], layers[-1] + 1)
    return whole if len(layers) == len(whole) else layers


def _pull_range(name: str, layer_range: Optional[range]) -> Optional[range]:
    """Check a layer range of a pull; an empty one counts as not given."""
    check_isinstance(name, layer_range, range)
    if not layer_range:
        return None
    if layer_range.step != 1 or layer_range.start < 0:
        raise LLMParamInvalidError(f"{name}={layer_range} is not allowed; it must have step 1 and start at 0 or later")
    return layer_range


def check_equal_lengths(src: Optional[range], dst: Optional[range]) -> None:
    """Check that two ranges of step 1 are equally long, where both are given."""
    if src is not None and dst is not None and src.stop - src.start != dst.stop - dst.start:
        raise LLMParamInvalidError(f"src_layer_range={src} and dst_layer_range={dst} must have equal lengths")


def tensors_of(name: str, layers: Optional[range], tensors_per_layer: int) -> TensorRange:
    """Tensor indices [start, stop) of a layer range."""
    if layers is None:
        return None
    if layers.stop * tensors_per_layer > MAX_TENSORS:
        raise LLMParamInvalidError(f"{name}={layers} is not allowed: no cache has that many layers of "
                                   f"{tensors_per_layer} tensors")
    return layers.start * tensors_per_layer, layers.stop * tensors_per_layer


# ----------------------------------------------------------------------------------------------------- blocks

def block_pairs(name: str, mapping: Mapping[int, Sequence[int]], num_blocks: int,
                strict: bool) -> Tuple[List[int], List[int]]:
    """Flatten ``{src: [dst, ...]}`` in dict order, then list order."""
    src: List[int] = []
    dst: List[int] = []
    for source, destinations in mapping.items():
        src.extend([source] * len(destinations))
        dst.extend(destinations)
    check_block_numbers(f"{name} keys", list(mapping), num_blocks)
    check_block_numbers(f"{name} values", dst, num_blocks)
    if strict:
        check_no_repeats(f"{name} values", dst)
    return src, dst


def check_block_numbers(name: str, numbers: Sequence[int], num_blocks: int) -> None:
    """Refuse block numbers outside [0, num_blocks)."""
    if numbers and not (0 <= min(numbers) and max(numbers) < num_blocks):
        bad = next(number for number in numbers if not 0 <= number < num_blocks)
        raise LLMParamInvalidError(f"{name}: block {bad} is not allowed; it must be in [0, {num_blocks})")


def check_same_elements(operation: str, src: CacheDesc, dst: CacheDesc) -> None:
    """Refuse to copy between caches of different data types, or of blocks that are shaped differently.

    A block of one dimension may stand for any shape of as many bytes: its descriptor does not tell the shape.
    """
    src_block, dst_block = ([n for n in desc.shape[1:] if n != 1] for desc in (src, dst))
    if src.data_type is not dst.data_type:
        what = "data types"
    elif len(src_block) > 1 and len(dst_block) > 1 and src_block != dst_block:
        what = "shapes of a slot or block"
    else:
        return
    raise LLMParamInvalidError(
        f"{operation}: the {what} of source and destination differ, so the bytes would mean something else there: "
        f"source {src}, destination {dst}. Describe both alike, or set option llm.Strict='0' to copy bytes as they "
        "are", operation=operation)


def check_no_repeats(name: str, numbers: Sequence[int]) -> None:
    """Refuse a destination block that occurs twice."""
    if len(set(numbers)) != len(numbers):
        seen: Set[int] = set()
        for number in numbers:
            if number in seen:
                raise LLMParamInvalidError(
                    f"{name}: block {number} is the destination more than once, of which the last would stay; name "
                    "each destination block once, or set option llm.Strict='0'")
            seen.add(number)


def _check_swap(src_desc: CacheDesc, dst_desc: CacheDesc, src_to_dst: Mapping[int, int], strict: bool) -> int:
    """Check that two caches fit each other, and return the bytes of one block."""
    src_bytes = src_desc.size // src_desc.shape[0]
    dst_bytes = dst_desc.size // dst_desc.shape[0]
    if src_bytes != dst_bytes:
        raise LLMParamInvalidError(f"a block of the source has {src_bytes} bytes, one of the destination {dst_bytes}")
    if src_desc.num_tensors != dst_desc.num_tensors:
        raise LLMParamInvalidError(
            f"num_tensors of the source is {src_desc.num_tensors}, that of the destination {dst_desc.num_tensors}")
    if strict:
        check_same_elements("swap_blocks", src_desc, dst_desc)
        check_no_repeats("src_to_dst values", list(src_to_dst.values()))
    check_block_numbers("src_to_dst keys", list(src_to_dst), src_desc.shape[0])
    check_block_numbers("src_to_dst values", list(src_to_dst.values()), dst_desc.shape[0])
    if (src_desc.placement == Placement.HOST) == (dst_desc.placement == Placement.HOST):
        raise LLMParamInvalidError(f"placements {src_desc.placement} and {dst_desc.placement} are not allowed; "
                                   f"one side must be HOST and the other DEVICE")
    return src_bytes


# ----------------------------------------------------------------------------------------------------- manager

class ManagerBase:
    """The engine's memory calls, in the words of the handles.

    Parameters
    ----------
    llm_engine : Engine
        The engine of the `LLMDataDist`.
    """

    def __init__(self, llm_engine: "Engine") -> None:
        self._llm_engine = llm_engine
        self._lease_ms = llm_engine.options.cache_key_lease_ms
        self._lease_log = LeaseLog(llm_engine)
        self._initialized = True
        self._has_pool = llm_engine.has_pool()
        self._strict = bool(llm_engine.options.strict)
        self._places: "Optional[Places]" = None         # where caches were allocated, once events are recorded
        if llm_engine.options.trace:
            self._keep_places()

    @staticmethod
    def check_cache_key(cache_key: CacheKey) -> None:
        """Check that a key of a pull names a request or a prefix, and not both.

        Parameters
        ----------
        cache_key : CacheKey
            The key.

        Raises
        ------
        LLMParamInvalidError
            Both or neither are set.
        """
        check_pull_key(cache_key)

    def is_initialized(self) -> bool:
        """Return whether the engine is up."""
        return self._initialized

    @property
    def is_host_addressable(self) -> bool:
        """Whether the CPU can read and write memory of placement DEVICE."""
        return self._llm_engine.is_host_addressable

    @property
    def pool_memory(self) -> object:
        """What keeps the memory of the pools in place as long as it is referenced; `TensorView` does."""
        return self._llm_engine.pool_memory

    def _finalize(self) -> None:
        """Called when the engine is closed."""
        self._initialized = False
        self._lease_log.close()
        if self._places is not None:
            self._places.close()

    def _keep_places(self) -> None:
        """Note from now on where caches are allocated."""
        from llm_datadist.observe.places import Places

        if self._places is None:
            self._places = Places(self._llm_engine)

    def _require_initialized(self) -> None:
        if not self._initialized:
            raise LLMException("the cache manager is not initialized: its engine was finalized",
                               status_code=LLMStatusCode.LLM_FAILED)

    def _id_of(self, cache: Union[Cache, KvCache]) -> int:
        """Id of a cache here; 0, which no cache has, for a handle that an engine before this one left behind."""
        return cache.cache_id if cache.manager is None or cache.manager is self else 0

    def _allocate(self, cache_desc: CacheDesc, specs: Sequence[KeySpec], is_blocks: bool,
                  lease_ms: Optional[int] = None) -> Tuple[int, Sequence[int]]:
        self._require_initialized()
        host = cache_desc.placement is Placement.HOST
        lease_ms = self._lease_ms if lease_ms is None else lease_ms
        if lease_ms:
            self._lease_log.begin()
        cache_id, addrs = self._llm_engine.allocate(
            cache_desc.num_tensors, cache_desc.shape[0], cache_desc.size, host, is_blocks, specs, lease_ms,
            *described(cache_desc))
        if self._places is not None:
            self._places.note(cache_id)
        return cache_id, addrs

    def _deallocate_here(self, cache: Union[Cache, KvCache]) -> None:
        """Give the handle of a cache back to the engine, and empty it."""
        self._llm_engine.deallocate(self._id_of(cache))
        if log.logger.level <= log.DEBUG:
            log.debug("deallocated %s", cache)

    def _remove_key(self, cache_key: CacheKey) -> None:
        kind, id_, model_id, _ = remote_key(cache_key)
        self._llm_engine.remove_key(kind, id_, model_id)
        if log.logger.level <= log.DEBUG:
            log.debug("removed %s", cache_key)

    def _check_keywords(self, operation: str, given: Mapping[str, Any], known: Sequence[str]) -> None:
        """Refuse keywords nobody knows; without strictness only say so, as the original ignores them."""
        try:
            refuse_unknown(operation, given, known)
        except TypeError as error:
            if self._strict:
                raise
            log.warn("%s; it is ignored", error)

    def _require_pool(self, operation: str) -> None:
        self._require_initialized()
        if not self._has_pool:
            raise LLMNotEnabledError(f"{operation} failed, error code is {LLMStatusCode.LLM_FEATURE_NOT_ENABLED}, "
                                     f"no memory pool is configured.", operation=operation)

    def _swap(self, src: Union[Cache, KvCache], src_addrs: List[int], dst: Union[Cache, KvCache], dst_addrs: List[int],
              src_to_dst: Dict[int, int]) -> None:
        block_bytes = _check_swap(src.cache_desc, dst.cache_desc, src_to_dst, self._strict)
        self._require_initialized()
        ends = self._swap_end("src", src, src_addrs), self._swap_end("dst", dst, dst_addrs)
        if src_to_dst:
            self._llm_engine.swap_blocks(*ends, src.cache_desc.num_tensors, block_bytes, list(src_to_dst),
                                         list(src_to_dst.values()))

    def _swap_end(self, name: str, cache: Union[Cache, KvCache], addrs: List[int]) -> SwapEnd:
        """The id of a cache of the engine, or addresses and number of blocks of a cpu cache."""
        if not addrs:
            raise LLMNotFoundError(f"swap_blocks failed, error code is {LLMStatusCode.LLM_KV_CACHE_NOT_EXIST}, "
                                   f"{name}={cache} was deallocated.", operation="swap_blocks")
        if cache.cache_id != CPU_CACHE_ID:
            return self._id_of(cache)
        for index, address in enumerate(addrs):
            if not 0 < address < 2**64:
                raise LLMParamInvalidError(
                    f"address {index} of {name} is {address}, which is not allowed; it must be in [1, 2**64)")
        return addrs, cache.cache_desc.shape[0]
