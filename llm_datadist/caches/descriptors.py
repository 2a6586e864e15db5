"""What caches are made of: placements, memory kinds, and the descriptor of a cache."""
from __future__ import annotations

from enum import Enum
from typing import List, Optional, Sequence, Tuple, Union

from llm_datadist.data_type import DataType, element_size
from llm_datadist.status import LLMParamInvalidError, NamedIntEnum
from llm_datadist.utils.calls import public_call
from llm_datadist.utils.utils import (
    check_int32,
    check_int64,
    check_isinstance,
    check_list_int64,
    check_uint32,
)

__all__ = [
    "Placement", "RegisterMemStatus", "Memtype", "MemType", "MemInfo", "CacheDesc", "calc_tensor_size",
    "clone_cache_desc", "int_to_mem_status_dict",
]

_MAX_BYTES = 2**63 - 1

Shape = Union[List[int], Tuple[int, ...]]


class Placement(NamedIntEnum):
    """Where the memory of a cache is. ``str()`` gives ``Placement.HOST``; `Memtype` numbers the two the other way."""

    HOST = 0
    DEVICE = 1


class RegisterMemStatus(Enum):
    """How far the exchange of memory descriptors of a link has come."""

    OK = 0
    PREPARING = 1
    FAILED = 2


class Memtype(Enum):
    """Kind of a memory range. `Placement` numbers the two the other way."""

    MEM_TYPE_DEVICE = 0
    MEM_TYPE_HOST = 1


MemType = Memtype
int_to_mem_status_dict = {status.value: status for status in RegisterMemStatus}


class MemInfo:
    """A memory range for ``remap_registered_memory``.

    Parameters
    ----------
    mem_type : Memtype
        Kind of memory.
    addr : int
        First byte.
    size : int
        Length in bytes.

    Raises
    ------
    TypeError
        An argument has another type; None passes.
    """

    @public_call
    def __init__(self, mem_type: Memtype, addr: int, size: int) -> None:
        self._mem_type = check_isinstance("mem_type", mem_type, Memtype)
        self._addr = check_isinstance("addr", addr, int)
        self._size = check_isinstance("size", size, int)

    @property
    def mem_type(self) -> Memtype:
        """Kind of memory."""
        return self._mem_type

    @property
    def addr(self) -> int:
        """First byte."""
        return self._addr

    @property
    def size(self) -> int:
        """Length in bytes."""
        return self._size

    def __repr__(self) -> str:
        return f"MemInfo(mem_type={self._mem_type}, addr={self._addr}, size={self._size})"


def calc_tensor_size(shape: Sequence[int], data_type: DataType) -> int:
    """Return the bytes of one tensor.

    Parameters
    ----------
    shape : sequence of int
        Number of elements along each dimension, each at least 1.
    data_type : DataType
        Element type.

    Raises
    ------
    LLMParamInvalidError
        A dimension is not positive, there is no data type, or the product exceeds 2**63 - 1.
    """
    if data_type is None:
        raise LLMParamInvalidError("data_type is None; a tensor without an element type has no size")
    num_bytes = element_size(data_type)
    for dimension in shape:
        if dimension <= 0:
            raise LLMParamInvalidError(f"shape={list(shape)} has no size in bytes: every dimension must be at least 1")
        num_bytes *= dimension
    if num_bytes > _MAX_BYTES:
        raise LLMParamInvalidError(f"shape={list(shape)} of {data_type} takes {num_bytes} bytes, more than 2**63 - 1")
    return num_bytes


class CacheDesc:
    """Descriptor of a cache: a number of equal tensors.

    Parameters
    ----------
    num_tensors : int
        Number of tensors, uint32. Usually two per layer, K and V.
    shape : list or tuple of int
        Shape of each tensor, int64 each. The engine takes ``shape[0]`` as the number of batch slots or blocks. The
        object is kept, not copied.
    data_type : DataType
        Element type.
    placement : Placement
        Where the memory is.
    batch_dim_index : int
        Index of the batch dimension, for `batch_size` alone.
    seq_len_dim_index : int
        Index of the sequence length dimension, or -1.
    kv_tensor_format : str, optional
        Kept as given.

    Raises
    ------
    TypeError, ValueError
        An argument has another type, or does not fit its integer type. None passes for `data_type`, `placement` and
        `kv_tensor_format`.
    LLMParamInvalidError
        `batch_dim_index` or `seq_len_dim_index` is no index of `shape`; so an empty shape is refused.
    """

    @public_call
    def __init__(
        self, num_tensors: int, shape: Shape, data_type: DataType, placement: Placement = Placement.DEVICE,
        batch_dim_index: int = 0, seq_len_dim_index: int = -1, kv_tensor_format: Optional[str] = None,
    ) -> None:
        self._num_tensors = check_uint32("num_tensors", num_tensors)
        check_isinstance("shape", shape, (list, tuple), allow_none=False)
        check_list_int64("shape", shape)
        self._shape = shape
        self._data_type = check_isinstance("data_type", data_type, DataType)
        self._type_number = -1 if data_type is None else data_type.value
        self._placement = check_isinstance("placement", placement, Placement)
        check_isinstance("batch_dim_index", batch_dim_index, int, allow_none=False)
        if not 0 <= batch_dim_index < len(shape):
            raise LLMParamInvalidError(
                f"batch_dim_index={batch_dim_index} is not allowed; it must be in [0, {len(shape)}), as shape={shape}")
        self._batch_dim = batch_dim_index
        self._batch_size = shape[batch_dim_index]
        check_int32("seq_len_dim_index", seq_len_dim_index)
        if seq_len_dim_index != -1 and not 0 <= seq_len_dim_index < len(shape):
            raise LLMParamInvalidError(f"seq_len_dim_index={seq_len_dim_index} is not allowed; "
                                       f"it must be -1 or in [0, {len(shape)}), as shape={shape}")
        self._seq_len_dim_index = seq_len_dim_index
        self._kv_tensor_format = check_isinstance("kv_tensor_format", kv_tensor_format, str)
        self._size: Optional[int] = None

    @property
    def num_tensors(self) -> int:
        """Number of tensors."""
        return self._num_tensors

    @property
    def shape(self) -> Shape:
        """Shape of each tensor: the caller's own object."""
        return self._shape

    @property
    def data_type(self) -> DataType:
        """Element type."""
        return self._data_type

    @property
    def placement(self) -> Placement:
        """Where the memory is."""
        return self._placement

    @property
    def batch_dim(self) -> int:
        """Index of the batch dimension."""
        return self._batch_dim

    @property
    def batch_size(self) -> int:
        """Length of the batch dimension when the descriptor was made."""
        return self._batch_size

    @property
    def seq_len_dim_index(self) -> int:
        """Index of the sequence length dimension, or -1."""
        return self._seq_len_dim_index

    @property
    def kv_tensor_format(self) -> Optional[str]:
        """The format given, or None."""
        return self._kv_tensor_format

    @property
    def size(self) -> int:
        """Bytes of one tensor, computed when first read (`LLMParamInvalidError` if the shape has none)."""
        if self._size is None:
            self._size = calc_tensor_size(self._shape, self._data_type)
        return self._size

    def update_dim(self, dim_index: int, dim_value: int) -> None:
        """Change one dimension of `shape`; `batch_size` stays.

        Parameters
        ----------
        dim_index : int
            Index into `shape`.
        dim_value : int
            New length, int64.

        Raises
        ------
        TypeError, ValueError
            An argument is no int or too large, or `shape` is a tuple.
        LLMParamInvalidError
            `dim_index` is no index of `shape`.
        """
        check_int32("dim_index", dim_index)
        check_int64("dim_value", dim_value)
        if not 0 <= dim_index < len(self._shape):
            raise LLMParamInvalidError(f"dim_index={dim_index} is not allowed; it must be in [0, {len(self._shape)})")
        self._shape[dim_index] = dim_value  # type: ignore[index]  # a tuple refuses, as documented
        self._size = None

    def __repr__(self) -> str:
        return (f"CacheDesc(num_tensors={self._num_tensors}, shape={self._shape}, data_type={self._data_type}, "
                f"placement={self._placement}, batch_dim_index={self._batch_dim}, "
                f"seq_len_dim_index={self._seq_len_dim_index},kv_tensor_format={self._kv_tensor_format})")


def clone_cache_desc(cache_desc: CacheDesc) -> CacheDesc:
    """Return a descriptor equal to `cache_desc` with a shape list of its own."""
    return CacheDesc(
        cache_desc.num_tensors, list(cache_desc.shape), cache_desc.data_type, cache_desc.placement,
        cache_desc.batch_dim, cache_desc.seq_len_dim_index, cache_desc.kv_tensor_format)
