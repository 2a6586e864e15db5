"""What a client passes to ``transfer_cache_async``: the synchroniser of layers, and one config per destination."""
from __future__ import annotations

from abc import ABC, abstractmethod
from enum import Enum
from typing import List, Optional, Sequence, Tuple, Union

from llm_datadist.caches.held_blocks import HeldBlocksKey
from llm_datadist.caches.keys import BlocksCacheKey, CacheKeyByIdAndIndex
from llm_datadist.status import LLMParamInvalidError
from llm_datadist.utils.calls import public_call
from llm_datadist.utils.utils import check_isinstance, check_list_uint64, check_uint32, check_uint64

__all__ = [
    "LayerSynchronizer", "TransferConfig", "TransferWithCacheKeyConfig", "PushType", "check_layer_range",
    "layer_range_to_tensor_indices",
]


_KEYS = [BlocksCacheKey, CacheKeyByIdAndIndex, HeldBlocksKey]


class PushType(Enum):
    """How a transfer names its destination."""

    NO_CACHE_KEY = 0
    BLOCKS_CACHE_KEY = 1
    CACHE_KEY_BY_ID = 2


class LayerSynchronizer(ABC):
    """Tells a transfer when a layer of the source is complete. Subclass it."""

    @abstractmethod
    def synchronize_layer(self, layer_index: int, timeout_in_millis: Optional[int]) -> bool:
        """Wait until a layer may be sent.

        Parameters
        ----------
        layer_index : int
            The layer, counted over the source cache; ascending from call to call.
        timeout_in_millis : int, optional
            Always None.

        Returns
        -------
        bool
            Whether the layer is complete. A false value fails the transfer of this layer and ends the task.

        Notes
        -----
        Called on the transfer thread with the GIL held, once for each layer that a config asks for.
        """


def check_layer_range(name: str, layer_range: Optional[range], allow_none: bool = True) -> None:
    """Check a range of layers.

    Parameters
    ----------
    name : str
        Name of the argument, for the text.
    layer_range : range, optional
        Layers with step 1 and ``0 <= start < stop``.
    allow_none : bool
        Whether None passes.

    Raises
    ------
    TypeError
        `layer_range` is no range, or None though that is not allowed.
    LLMParamInvalidError
        Step or bounds are others.
    """
    check_isinstance(name, layer_range, range, allow_none=allow_none)
    if layer_range is not None and not (layer_range.step == 1 and 0 <= layer_range.start < layer_range.stop):
        raise LLMParamInvalidError(f"{name}={layer_range} is not allowed; it must have step 1 and 0 <= start < stop")


def _required(name: str, layer_range: Optional[range]) -> range:
    check_layer_range(name, layer_range, allow_none=False)
    return layer_range  # type: ignore[return-value]  # None was refused


def layer_range_to_tensor_indices(
    src_layer_range: Optional[range], dst_layer_range: Optional[range], tensor_num_per_layer: int = 2
) -> Tuple[List[int], List[int]]:
    """Turn layers into the indices of their tensors.

    Parameters
    ----------
    src_layer_range, dst_layer_range : range, optional
        Layers of source and destination, step 1.
    tensor_num_per_layer : int
        Tensors per layer.

    Returns
    -------
    tuple of two lists of int
        Indices in source and destination; an empty list for None.
    """
    source, destination = (
        [] if layers is None else list(range(layers.start * tensor_num_per_layer, layers.stop * tensor_num_per_layer))
        for layers in (src_layer_range, dst_layer_range)
    )
    return source, destination


class TransferConfig:
    """Destination of a transfer, by address.

    Parameters
    ----------
    dst_cluster_id : int
        Cluster to write to, uint64.
    dst_addrs : list or tuple of int, shape (2 * num_layers,)
        Address in the peer of each tensor of each layer of `src_layer_range`, uint64.
    src_layer_range : range, optional
        Layers to send, step 1 and ``0 <= start < stop``. None means all; the transfer call fills it in.
    src_batch_index : int
        Batch slot of the source, uint32.

    Raises
    ------
    TypeError, ValueError
        An argument has another type, or a number does not fit its integer type.
    LLMParamInvalidError
        `src_layer_range` is empty, negative, or has another step.
    """

    @public_call
    def __init__(
        self, dst_cluster_id: int, dst_addrs: Sequence[int], src_layer_range: Optional[range] = None,
        src_batch_index: int = 0,
    ) -> None:
        self.dst_cluster_id = dst_cluster_id
        self.dst_addrs = dst_addrs
        self.src_layer_range = src_layer_range
        self.src_batch_index = src_batch_index
        self.dst_layer_range: Optional[range] = None

    @property
    def dst_cluster_id(self) -> int:
        """Cluster to write to."""
        return self._dst_cluster_id

    @dst_cluster_id.setter
    def dst_cluster_id(self, dst_cluster_id: int) -> None:
        self._dst_cluster_id = check_uint64("dst_cluster_id", dst_cluster_id)

    @property
    def dst_addrs(self) -> Sequence[int]:
        """Address in the peer of each tensor: the caller's own object."""
        return self._dst_addrs

    @dst_addrs.setter
    def dst_addrs(self, dst_addrs: Sequence[int]) -> None:
        check_isinstance("dst_addrs", dst_addrs, (list, tuple), allow_none=False)
        self._dst_addrs = check_list_uint64("dst_addrs", dst_addrs)

    @property
    def src_layer_range(self) -> Optional[range]:
        """Layers to send; None means all."""
        return self._src_layer_range

    @src_layer_range.setter
    def src_layer_range(self, src_layer_range: Optional[range]) -> None:
        check_layer_range("src_layer_range", src_layer_range)
        self._src_layer_range = src_layer_range

    @property
    def src_batch_index(self) -> int:
        """Batch slot of the source."""
        return self._src_batch_index

    @src_batch_index.setter
    def src_batch_index(self, src_batch_index: int) -> None:
        self._src_batch_index = check_uint32("src_batch_index", src_batch_index)

    def __repr__(self) -> str:
        return (f"TransferConfig(dst_cluster_id={self._dst_cluster_id}, dst_addrs={self._dst_addrs}, "
                f"src_layer_range={self._src_layer_range}, src_batch_index={self._src_batch_index})")


class TransferWithCacheKeyConfig:
    """Destination of a transfer, by the key of a cache of the peer.

    Parameters
    ----------
    cache_key : BlocksCacheKey, HeldBlocksKey or CacheKeyByIdAndIndex
        The cache to write to, or blocks of one that are held for a request.
    src_layer_range, dst_layer_range : range
        Layers to send and where they go, by position: step 1, ``0 <= start < stop``, of equal length. Required,
        although they have a default.
    src_batch_index : int
        Batch slot of the source, uint32; 0 with a `BlocksCacheKey`.
    release : bool, default True
        With a `HeldBlocksKey`: whether this is the last transfer that needs it, whose success ends it.

    Raises
    ------
    TypeError, ValueError
        An argument has another type, or `src_batch_index` does not fit uint32.
    LLMParamInvalidError
        A range is empty, negative, or has another step, the ranges differ in length, or `src_batch_index` is not 0
        with a `BlocksCacheKey`.
    """

    @public_call
    def __init__(
        self, cache_key: Union[BlocksCacheKey, CacheKeyByIdAndIndex, HeldBlocksKey],
        src_layer_range: Optional[range] = None, dst_layer_range: Optional[range] = None, src_batch_index: int = 0,
        release: bool = True,
    ) -> None:
        check_isinstance("cache_key", cache_key, _KEYS, allow_none=False)
        self.release = check_isinstance("release", release, bool, allow_none=False)
        src = _required("src_layer_range", src_layer_range)
        dst = _required("dst_layer_range", dst_layer_range)
        if src.stop - src.start != dst.stop - dst.start:        # len() overflows where the API takes any range
            raise LLMParamInvalidError(f"src_layer_range={src_layer_range} and dst_layer_range={dst_layer_range} "
                                       "differ in length")
        check_uint32("src_batch_index", src_batch_index)
        if isinstance(cache_key, BlocksCacheKey) and src_batch_index != 0:
            raise LLMParamInvalidError(f"src_batch_index={src_batch_index} is not allowed with a BlocksCacheKey; "
                                       "it must be 0")
        self.cache_key = cache_key
        self.src_layer_range = src_layer_range
        self.dst_layer_range = dst_layer_range
        self.src_batch_index = src_batch_index

    @property
    def cache_key(self) -> Union[BlocksCacheKey, CacheKeyByIdAndIndex, HeldBlocksKey, None]:
        """The cache to write to."""
        return self._cache_key

    @cache_key.setter
    def cache_key(self, cache_key: Union[BlocksCacheKey, CacheKeyByIdAndIndex, HeldBlocksKey, None]) -> None:
        self._cache_key = check_isinstance("cache_key", cache_key, _KEYS)

    @property
    def dst_cluster_id(self) -> Optional[int]:
        """Cluster to write to: that of `cache_key`."""
        return None if self._cache_key is None else self._cache_key.cluster_id

    @property
    def src_layer_range(self) -> Optional[range]:
        """Layers to send."""
        return self._src_layer_range

    @src_layer_range.setter
    def src_layer_range(self, src_layer_range: Optional[range]) -> None:
        check_layer_range("src_layer_range", src_layer_range)
        self._src_layer_range = src_layer_range

    @property
    def dst_layer_range(self) -> Optional[range]:
        """Where they go, by position."""
        return self._dst_layer_range

    @dst_layer_range.setter
    def dst_layer_range(self, dst_layer_range: Optional[range]) -> None:
        check_layer_range("dst_layer_range", dst_layer_range)
        self._dst_layer_range = dst_layer_range

    @property
    def src_batch_index(self) -> int:
        """Batch slot of the source."""
        return self._src_batch_index

    @src_batch_index.setter
    def src_batch_index(self, src_batch_index: int) -> None:
        self._src_batch_index = check_uint32("src_batch_index", src_batch_index)

    def __repr__(self) -> str:
        return (f"TransferWithCacheKeyConfig(cache_key={self._cache_key}, src_layer_range={self._src_layer_range}, "
                f"dst_layer_range={self._dst_layer_range}, src_batch_index={self._src_batch_index})")
