"""`Tensor` and `TensorDesc`: copies, views, shapes and refusals."""
import ctypes
import gc
import weakref

import numpy as np
import pytest

from llm_datadist import DataType, Tensor, TensorDesc
from llm_datadist.caches.tensor import register_memory
from llm_datadist.data_type import dtype_to_np_dtype

NUMERIC = [member for member in DataType if member not in (DataType.DT_STRING, DataType.DT_BF16)]


def array(data_type=DataType.DT_FLOAT, shape=(2, 3)):
    count = int(np.prod(shape))
    return (np.arange(count) % 2).astype(dtype_to_np_dtype[data_type]).reshape(shape)


def test_tensor_desc(assert_raises):
    desc = TensorDesc(DataType.DT_FLOAT, (2, 2))
    assert str(desc) == repr(desc) == "TensorDesc(dtype=DataType.DT_FLOAT, shape=[2, 2])"
    desc.shape.append(3)
    assert desc.dtype is DataType.DT_FLOAT and desc.shape == [2, 2]
    for dtype, shape in [(0, [1]), (None, [1]), ("DT_FLOAT", [1]), (DataType.DT_FLOAT, 1), (DataType.DT_FLOAT, None),
                         (DataType.DT_FLOAT, ["1"]), (DataType.DT_FLOAT, [np.int64(1)])]:
        assert_raises("TE", TensorDesc, dtype, shape)


@pytest.mark.parametrize("data_type", NUMERIC)
@pytest.mark.parametrize("with_desc", [False, True])
@pytest.mark.parametrize("copy", [False, True])
def test_numeric_tensor(data_type, with_desc, copy):
    data = array(data_type)
    tensor = Tensor(data, TensorDesc(data_type, [2, 3]) if with_desc else None)
    expected = data.flatten() if data_type is DataType.DT_FLOAT16 else data.copy()
    data[:] = 0
    got = tensor.numpy(copy)
    assert got.dtype == expected.dtype and got.shape == expected.shape and (got == expected).all()
    assert got.flags.writeable is copy
    if copy:
        got[:] = 0
        assert (tensor.numpy() == expected).all()


def test_numpy_views_one_storage():
    tensor = Tensor(array())
    assert np.shares_memory(tensor.numpy(), tensor.numpy()) and not np.shares_memory(tensor.numpy(True), tensor.numpy())


@pytest.mark.parametrize("copy", [False, True])
def test_bf16_is_flat_float32(copy):
    bits = np.array([[0x3F80, 0xC000], [0x0000, 0x7F80]], dtype=np.uint16)      # 1, -2, 0, inf
    tensor = Tensor(bits.view(np.float16), TensorDesc(DataType.DT_BF16, [2, 2]))
    got = tensor.numpy(copy)
    assert got.dtype == np.float32 and got.tolist() == [1.0, -2.0, 0.0, float("inf")] and got.flags.writeable


@pytest.mark.parametrize("data, desc", [
    (np.array([["a", "bc"]]), None), (np.array([[b"a", b"bc"]]), None),
    (np.array([[b"a", b"bc"]]), TensorDesc(DataType.DT_STRING, [1, 2]))])
def test_strings(data, desc, assert_raises):
    tensor = Tensor(data, desc)
    assert tensor.numpy(copy=True).tolist() == [["a", "bc"]] and tensor.numpy(True).dtype.kind == "U"
    assert_raises("RE", tensor.numpy)
    assert str(tensor) == "Tensor([['a' 'bc']],tensor_desc=TensorDesc(dtype=DataType.DT_STRING, shape=[1, 2]))"


def test_clone_shares_the_desc():
    tensor = Tensor(array())
    clone = Tensor(tensor)
    assert str(clone) == str(tensor) and "tensor_desc=TensorDesc(dtype=DataType.DT_FLOAT, shape=[2, 3])" in str(clone)
    assert str(tensor).startswith("Tensor([[0. 1. 0.]\n [1. 0. 1.]],tensor_desc=")


@pytest.mark.parametrize("data, desc, kind", [
    (None, None, "TE"), ([1, 2], None, "TE"), (b"12", None, "TE"), (array(), "desc", "TE"),
    (array(), TensorDesc(DataType.DT_INT32, [2, 3]), "RE"), (array(), TensorDesc(DataType.DT_FLOAT, [3, 2]), "RE"),
    (array(), TensorDesc(DataType.DT_FLOAT, [6]), "RE"), (array(), TensorDesc(DataType.DT_BF16, [2, 3]), "RE"),
    (np.array(["a"]), TensorDesc(DataType.DT_STRING, [1]), "RE"),
    (array(), TensorDesc(DataType.DT_STRING, [2, 3]), "RE"),
    (array().astype(">f4"), None, "RE"), (array().astype(np.complex64), None, "RE"), (np.array([object()]), None, "RE"),
    (array().T, None, "RE"), (array()[:, :2], None, "RE"), (np.zeros(2, dtype="datetime64[s]"), None, "RE"),
    (-7, None, "RE"), (2**62, TensorDesc(DataType.DT_FLOAT, [1]), "RE"),
])
def test_bad_tensor(data, desc, kind, assert_raises):
    assert_raises(kind, Tensor, data, desc)


@pytest.mark.parametrize("copy", [None, 1, "yes", 0])
def test_copy_must_be_a_bool(copy, assert_raises):
    assert_raises("TE", Tensor(array()).numpy, copy)


class Owner:
    """Stands for a cache handle."""


def test_engine_tensor_aliases_memory(assert_raises):
    memory, owner = (ctypes.c_float * 6)(*range(6)), Owner()
    alive = weakref.ref(owner)
    handle = register_memory(ctypes.addressof(memory), owner)
    del owner
    tensor = Tensor.from_tensor_tuple((handle, 0, (2, 3)))
    view = tensor.numpy()
    memory[5] = 50.0
    assert view.shape == (2, 3) and view[1, 2] == 50.0 and not view.flags.writeable
    copied = tensor.numpy(copy=True)
    memory[5] = 0.0
    assert copied[1, 2] == 50.0 and Tensor(tensor).numpy()[1, 2] == 0.0
    assert_raises("RE", Tensor.from_tensor_tuple, (handle, 0, (2, 3)))
    del tensor
    gc.collect()
    assert alive() is not None                  # the view still needs the memory
    del view
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("data_type, expected", [(DataType.DT_BF16, [1.0, -2.0]), (DataType.DT_FLOAT16, [1.875, -2.0])])
def test_engine_tensor_of_memory_behind_a_reader(data_type, expected):
    asked = []

    def read(address, num_bytes):
        asked.append((address, num_bytes))
        return np.array([0x3F80, 0xC000], dtype=np.uint16).tobytes()

    tensor = Tensor.from_tensor_tuple((register_memory(64, None, read), data_type.value, [1, 2]))
    assert not asked
    assert tensor.numpy().tolist() == expected == tensor.numpy(copy=True).tolist()
    assert asked == [(64, 4)] * 2


def test_unknown_data_type_of_a_tuple(assert_raises):
    assert_raises("VE", Tensor.from_tensor_tuple, (register_memory(64, None), 5, [1]))
