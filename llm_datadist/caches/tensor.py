"""`TensorDesc` and `Tensor` of the first generation, deprecated: prefer ``KvCache.tensors()``.

A `Tensor` that a client makes owns a copy of its data. One that ``get_cache_tensors`` returns aliases memory of a
cache: the manager names that memory by a handle of `register_memory`, and ``Tensor.from_tensor_tuple`` takes it.
"""
from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Optional, Sequence, Tuple, Union

import numpy as np

from llm_datadist.caches.descriptors import calc_tensor_size
from llm_datadist.caches.tensor_view import TensorView
from llm_datadist.data_type import (
    DataType,
    dtype_to_np_dtype,
    get_python_dtype_from_wrapper_dtype,
    np_dtype_to_dtype,
)
from llm_datadist.utils.utils import check_isinstance

__all__ = ["TensorDesc", "Tensor", "register_memory"]

if TYPE_CHECKING:
    _Array = np.ndarray[Any, Any]
else:
    _Array = np.ndarray


class TensorDesc:
    """Element type and shape of a tensor.

    Parameters
    ----------
    dtype : DataType
        Element type.
    shape : list or tuple of int
        Shape.

    Raises
    ------
    TypeError
        An argument has another type.
    """

    def __init__(self, dtype: DataType, shape: Sequence[int]) -> None:
        self._dtype = check_isinstance("dtype", dtype, DataType, allow_none=False)
        self._shape = list(check_isinstance("shape", shape, (list, tuple), int, allow_none=False))

    @property
    def dtype(self) -> DataType:
        """Element type."""
        return self._dtype

    @property
    def shape(self) -> List[int]:
        """Shape, as a new list."""
        return list(self._shape)

    def __repr__(self) -> str:
        return f"TensorDesc(dtype={self._dtype}, shape={self._shape})"


class _Memory:
    """Memory of a cache. `read` copies (address, num_bytes) to the host where the CPU cannot address it."""

    def __init__(self, address: int, owner: object, read: Optional[Callable[[int, int], bytes]]) -> None:
        self._address = address
        self._owner = owner
        self._read = read

    def bits(self, dtype: DataType, shape: Sequence[int]) -> _Array:
        """Return the elements, flat; BF16 as uint16."""
        if self._read is None:
            return TensorView(self._address, dtype, tuple(shape), self._owner).numpy().reshape(-1)
        scalar = np.uint16 if dtype is DataType.DT_BF16 else dtype_to_np_dtype[dtype]
        return np.frombuffer(self._read(self._address, calc_tensor_size(shape, dtype)), dtype=scalar)


_memories: Dict[int, _Memory] = {}
_handles = itertools.count(1)


def register_memory(
    address: int, owner: object, read: Optional[Callable[[int, int], bytes]] = None
) -> int:
    """Name memory of a cache for ``Tensor.from_tensor_tuple``.

    Parameters
    ----------
    address : int
        First byte of the tensor.
    owner : object
        Kept alive while the tensor is; usually the handle of the cache.
    read : callable, optional
        Returns the bytes of (address, num_bytes). Required for memory that the CPU cannot address.

    Returns
    -------
    int
        A handle that one `Tensor` takes.
    """
    handle = next(_handles)
    _memories[handle] = _Memory(address, owner, read)
    return handle


class Tensor:
    """Data with a `TensorDesc`.

    Parameters
    ----------
    data : numpy.ndarray, Tensor or int
        An array is copied; a tensor is cloned with its descriptor; an int is a handle of `register_memory`.
    tensor_desc : TensorDesc, optional
        Must fit the array exactly: a BF16 descriptor wants float16 data, a string one ``numpy.bytes_``. Default: that
        of the array.

    Raises
    ------
    TypeError
        An argument has another type.
    RuntimeError
        The array does not fit the descriptor, is not C-contiguous, or has elements of a type that `DataType` lacks;
        or the handle is unknown.
    """

    def __init__(self, data: Union[_Array, "Tensor", int], tensor_desc: Optional[TensorDesc] = None) -> None:
        check_isinstance("data", data, [np.ndarray, Tensor, int], allow_none=False)
        check_isinstance("tensor_desc", tensor_desc, TensorDesc)
        self._data: Union[_Array, _Memory]
        self._tensor_desc: TensorDesc
        if isinstance(data, Tensor):
            self._data, self._tensor_desc = data._data, data._tensor_desc
        elif isinstance(data, int):
            memory = _memories.pop(data, None)
            if memory is None or tensor_desc is None:
                raise RuntimeError(f"data={data} is no handle of a tensor, or came without tensor_desc")
            self._data, self._tensor_desc = memory, tensor_desc
        else:
            self._tensor_desc = _desc_of(data) if tensor_desc is None else _fitting(tensor_desc, data)
            if not data.flags.c_contiguous:
                raise RuntimeError("data is not C-contiguous; pass numpy.ascontiguousarray(data)")
            self._data = _own_copy(data, self._tensor_desc.dtype)

    @staticmethod
    def from_tensor_tuple(tensor_tuple: Tuple[int, int, Sequence[int]]) -> "Tensor":
        """Make a tensor that aliases memory of a cache.

        Parameters
        ----------
        tensor_tuple : tuple
            Handle of `register_memory`, number of the `DataType`, and dimensions.

        Raises
        ------
        ValueError
            The number is no data type.
        RuntimeError
            The handle is unknown, or was taken already.
        """
        handle, dtype, dims = tensor_tuple
        return Tensor(handle, TensorDesc(get_python_dtype_from_wrapper_dtype(dtype), list(dims)))

    def numpy(self, copy: bool = False) -> _Array:
        """Return the elements as an array.

        Parameters
        ----------
        copy : bool
            Whether to copy. Strings need it. Otherwise the result is a read-only view, where it can be one.

        Returns
        -------
        numpy.ndarray
            Of the shape of the descriptor; but BF16 gives a flat float32 array, always a copy, and FLOAT16 a flat
            float16 one. Strings are str.

        Raises
        ------
        TypeError
            `copy` is no bool.
        RuntimeError
            The elements are strings and `copy` is False.
        """
        check_isinstance("copy", copy, bool, allow_none=False)
        dtype, shape = self._tensor_desc.dtype, self._tensor_desc.shape
        if dtype is DataType.DT_STRING and not copy:
            raise RuntimeError("copy=False is not allowed for strings; they have no array to view")
        elements: _Array = self._data.bits(dtype, shape) if isinstance(self._data, _Memory) else self._data
        if dtype is DataType.DT_BF16:
            elements = (elements.astype(np.uint32) << 16).view(np.float32)
            return elements
        if dtype is not DataType.DT_FLOAT16:
            elements = elements.reshape(shape)
        elements = elements.copy() if copy else elements.view()
        elements.flags.writeable = copy
        return elements

    def __repr__(self) -> str:
        return f"Tensor({self.numpy(copy=True)},tensor_desc={self._tensor_desc})"


def _is_text(data: _Array) -> bool:
    return data.dtype.kind in "SU"


def _desc_of(data: _Array) -> TensorDesc:
    dtype = DataType.DT_STRING if _is_text(data) else np_dtype_to_dtype.get(data.dtype)
    if dtype is None:
        raise RuntimeError(f"data.dtype={data.dtype} is no data type; allowed are "
                           f"{', '.join(str(known) for known in np_dtype_to_dtype)} and str")
    return TensorDesc(dtype, list(data.shape))


def _fitting(desc: TensorDesc, data: _Array) -> TensorDesc:
    """Return `desc` if it fits `data`."""
    wanted = dtype_to_np_dtype[desc.dtype]
    fits = data.dtype.type is np.bytes_ if desc.dtype is DataType.DT_STRING else data.dtype == np.dtype(wanted)
    if not fits:
        raise RuntimeError(f"data.dtype={data.dtype} does not fit {desc}; it must be {wanted.__name__}")
    if list(data.shape) != desc.shape:
        raise RuntimeError(f"data.shape={data.shape} does not fit {desc}")
    return desc


def _own_copy(data: _Array, dtype: DataType) -> _Array:
    """Copy the elements, flat: BF16 as its bits, strings as str."""
    if dtype is DataType.DT_STRING:
        if data.dtype.kind == "S":
            return np.char.decode(data, "utf-8", "surrogateescape").reshape(-1)
        return data.flatten()
    flat = data.flatten()
    return flat.view(np.uint16) if dtype is DataType.DT_BF16 else flat
