"""Tensors of other libraries, as far as they differ from those of NumPy and torch in what they offer."""
import numpy as np
import pytest

from llm_datadist.caches.tensor_addresses import resolve_addresses

SHAPE, BYTES = (2, 3), 24


class Dlpack:
    """Speaks DLPack of a version that cannot say what is read only, as most producers do."""

    def __init__(self, array):
        self._array = array

    def __dlpack__(self, *, stream=None):
        return self._array.__dlpack__()

    def __dlpack_device__(self):
        return self._array.__dlpack_device__()


class OnDevice(Dlpack):
    """Has memory that the CPU cannot address."""

    def __dlpack__(self, *, stream=None):
        raise BufferError("the tensor is on a device")


class Pointer:
    """No more than an address and a size."""

    def __init__(self, array):
        self._array = array

    def data_ptr(self):
        return self._array.ctypes.data

    def numel(self):
        return self._array.size

    def element_size(self):
        return self._array.itemsize


class Strided:
    """Says its strides, also where they follow from the shape."""

    def __init__(self, array):
        self._array = array
        self.__array_interface__ = {**array.__array_interface__, "strides": array.strides}


@pytest.mark.parametrize("kind", [Dlpack, Pointer, Strided])
def test_memory_is_found(kind):
    array = np.zeros(SHAPE, np.float32)
    addresses, owners = resolve_addresses("addrs", [kind(array)], BYTES)
    assert addresses == [array.ctypes.data] and len(owners) == 1


@pytest.mark.parametrize("kind", [Dlpack, Pointer, Strided])
def test_the_size_must_fit(assert_raises, kind):
    error = assert_raises("PI", resolve_addresses, "addrs", [kind(np.zeros(SHAPE, np.float32))], BYTES + 4)
    assert "24 bytes" in str(error)


@pytest.mark.parametrize("kind", [Dlpack, Strided])
def test_gaps_are_refused(assert_raises, kind):
    gaps = kind(np.zeros((4, 6), np.float32)[::2, ::2])
    assert "contiguous" in str(assert_raises("PI", resolve_addresses, "addrs", [gaps], BYTES))


def test_a_dimension_of_one_has_any_stride():
    array = np.zeros((4, 6), np.float32)[:1]
    addresses, _ = resolve_addresses("addrs", [Strided(array)], BYTES)
    assert addresses == [array.ctypes.data]


def test_memory_of_a_device(assert_raises):
    error = assert_raises("PI", resolve_addresses, "addrs", [OnDevice(np.zeros(SHAPE, np.float32))], BYTES)
    assert "addrs[0]" in str(error) and "on a device" in str(error)
