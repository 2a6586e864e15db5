"""Addresses of caller-owned tensors: plain integers, or objects that hold memory.

The original takes integers alone. Here every element may also be a tensor or a buffer, whose size is then held
against the descriptor and which the manager keeps alive while the cache is registered.
"""
from __future__ import annotations

import ctypes
import sys
from typing import Any, List, Mapping, Tuple

from llm_datadist.status import LLMParamInvalidError

__all__ = ["resolve_addresses"]


def resolve_addresses(name: str, addrs: List[Any], tensor_bytes: int) -> Tuple[List[int], List[Any]]:
    """Return one address per element, and what must stay alive for them.

    Parameters
    ----------
    name : str
        Name of the argument, for the texts.
    addrs : list
        Integers, or objects with ``data_ptr()``, ``__array_interface__``, the buffer protocol or ``__dlpack__``. A
        NumPy scalar is neither.
    tensor_bytes : int
        Bytes each object must hold, exactly.

    Raises
    ------
    TypeError
        `addrs` is no list, or an element is none of these.
    LLMParamInvalidError
        An object is not contiguous, read only, or of another size.
    """
    if not isinstance(addrs, list):
        raise TypeError(f"{name} only support list, but got {type(addrs).__name__}")
    addresses, owners = [], []
    for index, element in enumerate(addrs):
        if isinstance(element, int):
            addresses.append(element)
            continue
        address, nbytes, owner = _memory_of(f"{name}[{index}]", element)
        if nbytes != tensor_bytes:
            raise LLMParamInvalidError(
                f"{name}[{index}] holds {nbytes} bytes; the descriptor says {tensor_bytes} bytes per tensor")
        addresses.append(address)
        owners.append(owner)
    return addresses, owners


def _memory_of(name: str, element: Any) -> Tuple[int, int, Any]:
    """Address, bytes and owner of one object."""
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(element, numpy.generic):        # it offers the memory of a passing copy
        raise _not_an_address(name, element)
    if callable(getattr(element, "data_ptr", None)):                    # torch, and what looks like it
        if hasattr(element, "is_contiguous") and not element.is_contiguous():
            raise LLMParamInvalidError(f"{name} is not contiguous")
        return element.data_ptr(), element.numel() * element.element_size(), element
    interface = getattr(element, "__array_interface__", None)
    if interface is not None and isinstance(interface.get("data"), tuple):      # otherwise it is a buffer as well
        return _interface_memory_of(name, interface, element)
    try:
        view = memoryview(element)
    except TypeError:
        return _dlpack_memory_of(name, element)
    if view.readonly:
        raise LLMParamInvalidError(f"{name} is read only; peers must be able to write to a cache")
    if not view.c_contiguous:
        raise LLMParamInvalidError(f"{name} is not contiguous")
    anchor = ctypes.c_char.from_buffer(element) if view.nbytes else None
    return (ctypes.addressof(anchor) if anchor is not None else 0), view.nbytes, view


def _interface_memory_of(name: str, interface: Mapping[str, Any], owner: Any) -> Tuple[int, int, Any]:
    address, read_only = interface["data"]
    if read_only:
        raise LLMParamInvalidError(f"{name} is read only; peers must be able to write to a cache")
    nbytes = int(interface["typestr"][2:]) * (4 if interface["typestr"][1] == "U" else 1)
    shape, strides = interface["shape"], interface.get("strides")
    for axis in reversed(range(len(shape))):
        if strides is not None and shape[axis] > 1 and strides[axis] != nbytes:
            raise LLMParamInvalidError(f"{name} is not contiguous")
        nbytes *= shape[axis]
    return address, nbytes, owner


class _DLPackSource:
    """Passes an object on to NumPy, and notes which protocol it speaks: an older one cannot say what may be written."""

    def __init__(self, element: Any) -> None:
        self._element = element
        self.says_read_only = False

    def __dlpack__(self, **kwargs: Any) -> Any:
        capsule = self._element.__dlpack__(**kwargs)
        self.says_read_only = bool(_is_capsule(capsule, b"dltensor_versioned"))
        return capsule

    def __dlpack_device__(self) -> Any:
        return self._element.__dlpack_device__()


_is_capsule = ctypes.pythonapi.PyCapsule_IsValid
_is_capsule.argtypes = [ctypes.py_object, ctypes.c_char_p]
_is_capsule.restype = ctypes.c_int


def _dlpack_memory_of(name: str, element: Any) -> Tuple[int, int, Any]:
    if not hasattr(element, "__dlpack__"):
        raise _not_an_address(name, element)
    import numpy as np

    if not hasattr(np, "from_dlpack"):
        raise TypeError(f"{name} offers its memory through __dlpack__ alone, which needs NumPy 1.23; "
                        f"this is {np.__version__}")
    source: Any = _DLPackSource(element)
    try:
        array = np.from_dlpack(source)
    except (BufferError, RuntimeError) as error:
        raise LLMParamInvalidError(f"{name} has no memory that can be described here: {error}") from None
    address, read_only = array.__array_interface__["data"]
    # NumPy calls an array read only where the protocol cannot say.
    interface = {**array.__array_interface__, "data": (address, read_only and source.says_read_only)}
    return _interface_memory_of(name, interface, array)


def _not_an_address(name: str, element: Any) -> TypeError:
    return TypeError(f"{name} only support int, or an object that holds memory (data_ptr(), __array_interface__, "
                     f"buffer or __dlpack__), but got {type(element).__name__}")
