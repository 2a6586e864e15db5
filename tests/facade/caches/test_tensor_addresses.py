"""Addresses of a caller's tensors: integers, and whatever holds memory."""
import array
import ctypes
import gc
import mmap
import weakref

import numpy as np
import pytest

from llm_datadist import DataType
from llm_datadist.caches.tensor_addresses import resolve_addresses
from llm_datadist.caches.tensor_view import TensorView

BYTES = 24


def resolve(element, tensor_bytes=BYTES):
    addresses, owners = resolve_addresses("addrs", [element], tensor_bytes)
    return addresses[0], owners


class Tensor:
    """What looks like a tensor of a framework."""

    def __init__(self, array, contiguous=True):
        self.array = array
        self.contiguous = contiguous

    def data_ptr(self):
        return self.array.ctypes.data

    def is_contiguous(self):
        return self.contiguous

    def numel(self):
        return self.array.size

    def element_size(self):
        return self.array.itemsize


class OnlyDlpack:
    """Offers its memory through DLPack alone."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **kwargs):
        return self.array.__dlpack__(**kwargs)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def test_integers_are_taken_as_they_are():
    assert resolve_addresses("addrs", [1, 2**64, -3, 0, True], BYTES) == ([1, 2**64, -3, 0, True], [])
    assert resolve_addresses("addrs", [], BYTES) == ([], [])


@pytest.mark.parametrize("wrap", [
    lambda made: made, Tensor, OnlyDlpack, lambda made: memoryview(made),
    lambda made: TensorView(made.ctypes.data, DataType.DT_INT64, (3,), made),
], ids=["numpy", "data_ptr", "dlpack", "memoryview", "TensorView"])
def test_objects_that_hold_memory(wrap):
    made = np.arange(3, dtype=np.int64)
    address, owners = resolve(wrap(made))
    assert address == made.ctypes.data and len(owners) == 1


@pytest.mark.parametrize("made", [bytearray(BYTES), array.array("q", [1, 2, 3]), (ctypes.c_int64 * 3)()],
                         ids=["bytearray", "array", "ctypes"])
def test_buffers(made):
    address, owners = resolve(made)
    ctypes.memset(address, 0x5A, BYTES)
    assert bytes(memoryview(made)) == b"\x5a" * BYTES
    if isinstance(made, bytearray):
        with pytest.raises(BufferError):                # it cannot be moved away while its address is known
            made.extend(b"more")
    del owners
    gc.collect()
    if isinstance(made, bytearray):
        made.extend(b"more")


def test_mapped_memory():
    with mmap.mmap(-1, BYTES) as mapped:
        address, owners = resolve(mapped)
        ctypes.memset(address, 7, BYTES)
        assert mapped[:] == b"\x07" * BYTES
        del owners
        gc.collect()


def test_owners_keep_the_memory_alive():
    made = np.zeros(BYTES, np.uint8)
    alive = weakref.ref(made)
    _, owners = resolve(made)
    del made
    gc.collect()
    assert alive() is not None
    del owners
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("addrs", [None, (1, 2), 1, "12", {1}, np.array([1, 2])],
                         ids=lambda value: type(value).__name__)
def test_only_a_list(assert_raises, addrs):
    assert_raises("TE", resolve_addresses, "addrs", addrs, BYTES)


@pytest.mark.parametrize("element", [None, 1.0, "1", [1], (1,), {1: 2}, object(), np.int64(1), np.uint64(1),
                                     np.float64(1), np.bool_(True)], ids=lambda value: type(value).__name__)
def test_what_is_neither_an_address_nor_memory(assert_raises, element):
    error = assert_raises("TE", resolve_addresses, "addrs", [1, element], 8)
    assert "addrs[1]" in str(error)


READ_ONLY = np.zeros(BYTES, np.uint8)
READ_ONLY.flags.writeable = False


@pytest.mark.parametrize("element, word", [
    (np.zeros(BYTES - 1, np.uint8), "23 bytes"), (np.zeros(4, np.int64), "32 bytes"),
    (bytearray(BYTES + 1), "25 bytes"),
    (bytearray(), "0 bytes"), (np.zeros((0, 3)), "0 bytes"), (np.array(["ab"]), "8 bytes"),
    (np.zeros((3, 2), np.int64)[:, 0], "contiguous"), (np.zeros((2, 3), np.int32).T, "contiguous"),
    (Tensor(np.zeros(3), contiguous=False), "contiguous"),
    (OnlyDlpack(np.zeros((3, 2), np.int64)[:, 0]), "contiguous"), (OnlyDlpack(np.zeros(4, np.int64)), "32 bytes"),
    (memoryview(bytearray(2 * BYTES))[::2], "contiguous"),
    (READ_ONLY, "read only"), (bytes(BYTES), "read only"), (memoryview(bytes(BYTES)), "read only"),
], ids=lambda value: value if isinstance(value, str) else type(value).__name__)
def test_memory_that_does_not_fit(assert_raises, element, word):
    error = assert_raises("PI", resolve_addresses, "addrs", [element], BYTES)
    assert "addrs[0]" in str(error) and word in str(error)


def test_dlpack_needs_a_numpy_that_knows_it(assert_raises, monkeypatch):
    monkeypatch.delattr(np, "from_dlpack")
    error = assert_raises("TE", resolve_addresses, "addrs", [OnlyDlpack(np.zeros(3))], BYTES)
    assert "addrs[0]" in str(error) and "NumPy" in str(error)
