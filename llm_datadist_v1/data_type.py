"""Older path of `llm_datadist.data_type`: the very same objects."""
from typing import TYPE_CHECKING

from llm_datadist._lazy import lazy_attributes
from llm_datadist.data_type import DataType, get_python_dtype_from_wrapper_dtype, python_dtype_2_dwrapper_dtype

if TYPE_CHECKING:
    from llm_datadist.data_type import dtype_to_np_dtype, np_dtype_to_dtype, valid_np_dtypes

__all__ = [
    "DataType", "get_python_dtype_from_wrapper_dtype", "python_dtype_2_dwrapper_dtype", "dtype_to_np_dtype",
    "np_dtype_to_dtype", "valid_np_dtypes",
]

__getattr__ = lazy_attributes(globals(), dict.fromkeys(
    ("dtype_to_np_dtype", "np_dtype_to_dtype", "valid_np_dtypes"), "llm_datadist.data_type"))
