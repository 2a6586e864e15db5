"""Element types of tensors. Values equal those of ``aclDataType``.

The NumPy maps ``dtype_to_np_dtype``, ``np_dtype_to_dtype`` and ``valid_np_dtypes`` are made when first asked for:
importing this module does not import NumPy.
"""
from __future__ import annotations

from enum import Enum
from typing import Any, Dict

__all__ = ["DataType", "element_size", "get_python_dtype_from_wrapper_dtype", "python_dtype_2_dwrapper_dtype"]


class DataType(Enum):
    """Element type of the tensors of a cache; the value is the ``aclDataType`` number."""

    DT_FLOAT = 0
    DT_FLOAT16 = 1
    DT_INT8 = 2
    DT_INT32 = 3
    DT_UINT8 = 4
    DT_INT16 = 6
    DT_UINT16 = 7
    DT_UINT32 = 8
    DT_INT64 = 9
    DT_UINT64 = 10
    DT_DOUBLE = 11
    DT_BOOL = 12
    DT_STRING = 13
    DT_BF16 = 27


# Member -> (bytes of one element, name of the NumPy scalar type). A string is a pair of handles; NumPy has no
# bfloat16, so float16 stands for its two bytes.
_LAYOUT = {
    DataType.DT_FLOAT: (4, "float32"), DataType.DT_FLOAT16: (2, "float16"), DataType.DT_INT8: (1, "int8"),
    DataType.DT_INT32: (4, "int32"), DataType.DT_UINT8: (1, "uint8"), DataType.DT_INT16: (2, "int16"),
    DataType.DT_UINT16: (2, "uint16"), DataType.DT_UINT32: (4, "uint32"), DataType.DT_INT64: (8, "int64"),
    DataType.DT_UINT64: (8, "uint64"), DataType.DT_DOUBLE: (8, "float64"), DataType.DT_BOOL: (1, "bool_"),
    DataType.DT_STRING: (16, "bytes_"), DataType.DT_BF16: (2, "float16"),
}

python_dtype_2_dwrapper_dtype: Dict[DataType, int] = {member: member.value for member in DataType}


def element_size(data_type: DataType) -> int:
    """Return the size in bytes of one element of `data_type`; 16 for a string, which is a pair of handles."""
    return _LAYOUT[data_type][0]


def get_python_dtype_from_wrapper_dtype(wrapper_dtype: int) -> DataType:
    """Return the `DataType` with the number `wrapper_dtype`.

    Raises
    ------
    ValueError
        No member has that number.
    """
    try:
        return DataType(wrapper_dtype)
    except ValueError:
        known = ", ".join(str(member.value) for member in DataType)
        raise ValueError(f"wrapper_dtype={wrapper_dtype!r} is no data type; known numbers: {known}") from None


def __getattr__(name: str) -> Any:
    if name not in ("dtype_to_np_dtype", "valid_np_dtypes", "np_dtype_to_dtype"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import numpy as np

    to_numpy = {member: getattr(np, scalar) for member, (_, scalar) in _LAYOUT.items()}
    from_numpy = {np.dtype(to_numpy[member]): member for member in DataType if member is not DataType.DT_BF16}
    valid = list(dict.fromkeys(to_numpy.values()))
    globals().update(dtype_to_np_dtype=to_numpy, np_dtype_to_dtype=from_numpy, valid_np_dtypes=valid)
    return globals()[name]
