"""Helpers of the older interface: tuples of descriptors and keys, and the descriptor of an options dict."""
from __future__ import annotations

from typing import TYPE_CHECKING, List, Mapping, Sequence, Tuple

from llm_datadist._lazy import lazy_attributes
from llm_datadist.caches.descriptors import CacheDesc, MemInfo, calc_tensor_size, clone_cache_desc
from llm_datadist.caches.keys import (
    INVALID_ID,
    BlocksCacheKey,
    CacheKey,
    CacheKeyByIdAndIndex,
    is_invalid_id,
    is_valid_id,
)
from llm_datadist.data_type import DataType, get_python_dtype_from_wrapper_dtype, python_dtype_2_dwrapper_dtype
from llm_datadist.managers.transfer_config import layer_range_to_tensor_indices
from llm_datadist.options.values import invalid, parse_listen_ip_info
from llm_datadist.status import LLMParamInvalidError

if TYPE_CHECKING:
    from llm_datadist.managers.task import (
        TransferAsyncThread,
        TransferCacheJob,
        TransferCacheParameters,
        transfer_cache_async,
    )

__all__ = [
    "pack_cache_desc", "pack_cache_key", "pack_cache_key_by_id", "pack_block_cache_key", "pack_mem_info",
    "parse_listen_ip_info", "layer_range_to_tensor_indices", "transfer_cache_async", "TransferCacheParameters",
    "TransferCacheJob", "TransferAsyncThread", "clone_cache_desc", "calc_tensor_size", "CacheDescParser",
    "is_valid_id", "is_invalid_id",
]

# Transfers need the compiled core, the rest does not.
__getattr__ = lazy_attributes(globals(), dict.fromkeys(
    ("transfer_cache_async", "TransferCacheParameters", "TransferCacheJob", "TransferAsyncThread"),
    "llm_datadist.managers.task"))

_REF_INPUT_SHAPES = "llm.RefInputShapes"
_REF_INPUT_DTYPES = "llm.RefInputDtypes"
_REF_INPUT_SEQ_LEN_DIM_INDEX = "llm.RefInputSeqLenDimIndex"
_KV_TENSOR_FORMAT = "llm.kvTensorFormat"

KeyTuple = Tuple[int, int, int, int, int, int, bool]


def pack_cache_desc(cache_desc: CacheDesc, is_blocks: bool = False) -> Tuple[int, int, int, List[int], int, bool]:
    """Return ``(num_tensors, dtype, seq_len_dim_index, shape, placement, is_blocks)`` of `cache_desc`.

    Parameters
    ----------
    cache_desc : CacheDesc
        The descriptor.
    is_blocks : bool
        Whether it describes a blocks cache; a descriptor does not know that itself.
    """
    return (cache_desc.num_tensors, python_dtype_2_dwrapper_dtype[cache_desc.data_type], cache_desc.seq_len_dim_index,
            list(cache_desc.shape), int(cache_desc.placement), is_blocks)


def pack_cache_key(cache_key: CacheKey) -> KeyTuple:
    """Return ``(cluster_id, -1, 0, req_id, prefix_id, model_id, False)`` of `cache_key`."""
    return cache_key.cluster_id, -1, 0, cache_key.req_id, cache_key.prefix_id, cache_key.model_id, False


def pack_cache_key_by_id(cache_key: CacheKeyByIdAndIndex) -> KeyTuple:
    """Return ``(cluster_id, cache_id, batch_index, none, none, 0, False)`` of `cache_key`; none is 2**64 - 1."""
    return cache_key.cluster_id, cache_key.cache_id, cache_key.batch_index, INVALID_ID, INVALID_ID, 0, False


def pack_block_cache_key(cache_key: BlocksCacheKey) -> KeyTuple:
    """Return ``(cluster_id, -1, 0, none, none, model_id, True)`` of `cache_key`; none is 2**64 - 1."""
    return cache_key.cluster_id, -1, 0, INVALID_ID, INVALID_ID, cache_key.model_id, True


def pack_mem_info(mem_info: MemInfo) -> Tuple[int, int, int]:
    """Return ``(mem_type, addr, size)`` of `mem_info`."""
    return mem_info.mem_type.value, mem_info.addr, mem_info.size


class CacheDescParser:
    """Makes a descriptor out of the reference inputs in an options dict."""

    @classmethod
    def parse_by_options(cls, options: Mapping[str, str]) -> CacheDesc:
        """Return the descriptor of the tensors that the options describe.

        Parameters
        ----------
        options : dict of str to str
            ``llm.RefInputShapes``: one shape per tensor, joined by ``;``, all equal, dimensions joined by ``,``; one
            dimension other than the first may be -1, the sequence length. ``llm.RefInputDtypes``: the numbers of the
            data types, joined by ``;``, all equal. Optional: ``llm.RefInputSeqLenDimIndex``, ``llm.kvTensorFormat``.

        Raises
        ------
        LLMParamInvalidError
            An option is missing, malformed, or contradicts another.
        """
        shapes = cls._shapes(options)
        shape = shapes[0]
        if any(other != shape for other in shapes):
            raise invalid(_REF_INPUT_SHAPES, options[_REF_INPUT_SHAPES], "all shapes must be equal")
        data_types = cls._data_types(options)
        if len(data_types) != len(shapes) or len(set(data_types)) != 1:
            raise invalid(_REF_INPUT_DTYPES, options[_REF_INPUT_DTYPES],
                          f"it must repeat one number {len(shapes)} times, once per shape")
        return CacheDesc(
            len(shapes), shape, data_types[0], seq_len_dim_index=cls._seq_len_dim_index(options, shape),
            kv_tensor_format=options.get(_KV_TENSOR_FORMAT))

    @staticmethod
    def _numbers(option: str, text: str, separator: str) -> List[int]:
        try:
            return [int(part) for part in text.split(separator)]
        except ValueError:
            raise invalid(option, text, f"it must hold integers joined by {separator!r}") from None

    @staticmethod
    def _required(options: Mapping[str, str], option: str) -> str:
        if option not in options:
            raise LLMParamInvalidError(f"option {option} is missing")
        return options[option]

    @classmethod
    def _shapes(cls, options: Mapping[str, str]) -> List[List[int]]:
        text = cls._required(options, _REF_INPUT_SHAPES)
        shapes = [cls._numbers(_REF_INPUT_SHAPES, part, ",") for part in text.split(";")]
        for shape in shapes:
            if any(dimension < 1 and dimension != -1 for dimension in shape) or shape[0] == -1 or shape.count(-1) > 1:
                raise invalid(_REF_INPUT_SHAPES, text, "dimensions must be positive; one but the first may be -1")
        return shapes

    @classmethod
    def _data_types(cls, options: Mapping[str, str]) -> Sequence[DataType]:
        text = cls._required(options, _REF_INPUT_DTYPES)
        try:
            return [get_python_dtype_from_wrapper_dtype(n) for n in cls._numbers(_REF_INPUT_DTYPES, text, ";")]
        except ValueError as error:
            raise invalid(_REF_INPUT_DTYPES, text, str(error)) from None

    @classmethod
    def _seq_len_dim_index(cls, options: Mapping[str, str], shape: List[int]) -> int:
        unknown = shape.index(-1) if -1 in shape else -1
        text = options.get(_REF_INPUT_SEQ_LEN_DIM_INDEX)
        if text is None:
            return unknown
        numbers = cls._numbers(_REF_INPUT_SEQ_LEN_DIM_INDEX, text, ";")
        index = numbers[0]
        if len(set(numbers)) != 1 or not -1 <= index < len(shape) or (unknown != -1 and index != unknown):
            raise invalid(_REF_INPUT_SEQ_LEN_DIM_INDEX, text,
                          f"it must be one index of the shape {shape}, and that of the dimension -1 if there is one")
        return index
