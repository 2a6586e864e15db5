"""Element types: numbers, sizes and their NumPy twins."""
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from llm_datadist import data_type
from llm_datadist.data_type import (
    DataType,
    element_size,
    get_python_dtype_from_wrapper_dtype,
    python_dtype_2_dwrapper_dtype,
)

NUMPY = {
    "DT_FLOAT": np.float32, "DT_FLOAT16": np.float16, "DT_INT8": np.int8, "DT_INT32": np.int32, "DT_UINT8": np.uint8,
    "DT_INT16": np.int16, "DT_UINT16": np.uint16, "DT_UINT32": np.uint32, "DT_INT64": np.int64,
    "DT_UINT64": np.uint64, "DT_DOUBLE": np.float64, "DT_BOOL": np.bool_, "DT_STRING": np.bytes_,
    "DT_BF16": np.float16,
}


@pytest.mark.parametrize("member", DataType)
def test_member(member):
    numpy_type = NUMPY[member.name]
    assert str(member) == f"{member}" == f"DataType.{member.name}"
    assert data_type.dtype_to_np_dtype[member] is numpy_type
    assert element_size(member) == (16 if member is DataType.DT_STRING else np.dtype(numpy_type).itemsize)
    assert get_python_dtype_from_wrapper_dtype(python_dtype_2_dwrapper_dtype[member]) is member


def test_numpy_maps():
    assert len(DataType) == len(data_type.dtype_to_np_dtype) == 14
    assert len(data_type.np_dtype_to_dtype) == 13
    assert all(isinstance(key, np.dtype) for key in data_type.np_dtype_to_dtype)
    assert data_type.np_dtype_to_dtype[np.dtype(np.float16)] is DataType.DT_FLOAT16
    assert DataType.DT_BF16 not in data_type.np_dtype_to_dtype.values()
    assert set(data_type.valid_np_dtypes) == set(NUMPY.values())


def test_unknown_names_and_numbers(assert_raises):
    assert "has no attribute" in str(assert_raises("AE", getattr, data_type, "np_something"))
    for number in (5, 14, 28, -1, "DT_FLOAT", None):
        assert_raises("VE", get_python_dtype_from_wrapper_dtype, number)


def test_numpy_is_not_imported_before_it_is_needed():
    code = ("import sys, json, llm_datadist, llm_datadist.data_type as d; before = 'numpy' in sys.modules; "
            "d.valid_np_dtypes; print(json.dumps([before, 'numpy' in sys.modules]))")
    root = pathlib.Path(__file__).resolve().parents[2]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(run.stdout) == [False, True]
