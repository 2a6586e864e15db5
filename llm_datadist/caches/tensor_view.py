"""Zero-copy access to one tensor of a cache, for NumPy and for anything that speaks DLPack."""
from __future__ import annotations

from typing import TYPE_CHECKING, Any, Dict, Tuple

from llm_datadist.data_type import DataType
from llm_datadist.status import LLMParamInvalidError

if TYPE_CHECKING:
    import numpy as np

__all__ = ["TensorView"]

_DLPACK_CPU = 1


class TensorView:
    """One tensor in memory that the CPU can address. Nothing is copied.

    Parameters
    ----------
    address : int
        First byte; nonzero.
    data_type : DataType
        Element type. BF16 is shown as uint16, its bits, for NumPy has no such type; strings are refused.
    shape : sequence of int
        Shape, each dimension at least 1.
    owner : object
        Kept alive as long as this view, or an array made from it, is.

    Raises
    ------
    LLMParamInvalidError
        The address is 0, or the elements are strings.

    Notes
    -----
    ``numpy.asarray(view)`` and ``torch.from_dlpack(view)`` share the memory; for BF16 follow the latter with
    ``.view(torch.bfloat16)``. The memory belongs to the pool or the caller. A view keeps that of a pool in place,
    also when the engine is finalised; after the cache is deallocated it may be another's. That of a caller may be used
    until the caller frees it. Source: NumPy array interface, version 3; DLPack.
    """

    def __init__(self, address: int, data_type: DataType, shape: Tuple[int, ...], owner: object) -> None:
        if address <= 0:
            raise LLMParamInvalidError(f"address={address} is not allowed; a tensor lies at a positive address")
        if data_type is DataType.DT_STRING:
            raise LLMParamInvalidError("data_type=DataType.DT_STRING is not allowed; handles of strings are no array")
        self._address = address
        self._data_type = data_type
        self._shape = tuple(shape)
        self._owner = owner

    @property
    def address(self) -> int:
        """First byte."""
        return self._address

    @property
    def data_type(self) -> DataType:
        """Element type in the cache."""
        return self._data_type

    @property
    def shape(self) -> Tuple[int, ...]:
        """Shape."""
        return self._shape

    @property
    def __array_interface__(self) -> Dict[str, Any]:
        import numpy as np

        from llm_datadist.data_type import dtype_to_np_dtype

        scalar = np.uint16 if self._data_type is DataType.DT_BF16 else dtype_to_np_dtype[self._data_type]
        return {"version": 3, "shape": self._shape, "typestr": np.dtype(scalar).str, "data": (self._address, False)}

    def numpy(self) -> "np.ndarray[Any, Any]":
        """Return a writable array over the memory, of the shape of the tensor; BF16 as uint16."""
        import numpy as np

        return np.asarray(self)

    def __dlpack__(self, **kwargs: Any) -> Any:
        return self.numpy().__dlpack__(**kwargs)

    def __dlpack_device__(self) -> Tuple[int, int]:
        return _DLPACK_CPU, 0

    def __repr__(self) -> str:
        return f"TensorView(address={self._address:#x}, data_type={self._data_type}, shape={self._shape})"
