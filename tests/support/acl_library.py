"""The acl half of the host library for tests: its functions through ctypes, and its numbers by name."""
from __future__ import annotations

import contextlib
import ctypes
import os
import random
import shutil
import tempfile
import threading
import time
from ctypes import POINTER, byref, c_char_p, c_int, c_int32, c_size_t, c_uint32, c_uint64, c_void_p

from llm_datadist.core.base.provider import HOST_LIBRARY

BAD_PARAM, REPEAT_INIT, REPEAT_FINALIZE = 100000, 100002, 100037
RT_PARAM, BAD_DEVICE, NO_CONTEXT, WRONG_CONTEXT, BAD_HANDLE = 107000, 107001, 107002, 107003, 107017
STREAM_ABORTED = 107023
UNSUPPORTED, HOST_OOM, NO_DEVICE, NO_RESOURCE, NO_STREAM, DEVICE_OOM = 207000, 207001, 207004, 207005, 207008, 207018
STREAM_TIMEOUT, EVENT_TIMEOUT = 507046, 507047
ALREADY_REGISTERED, NOT_REGISTERED = 507910, 507911
H2H, H2D, D2H, D2D, BY_ADDRESS = range(5)
HUGE_FIRST, HUGE_ONLY, NORMAL_ONLY = range(3)


class Attributes(ctypes.Structure):
    """aclrtPtrAttributes"""
    _fields_ = [("id", c_uint32), ("type", c_int), ("page_size", c_uint32), ("reserved", c_uint32 * 4)]


_TYPES = {
    "aclInit": [c_char_p],
    "aclFinalize": [],
    "aclFinalizeReference": [POINTER(c_uint64)],
    "aclrtGetVersion": [POINTER(c_int32)] * 3,
    "aclrtGetRunMode": [POINTER(c_int)],
    "aclrtGetDeviceCount": [POINTER(c_uint32)],
    "aclrtSetDevice": [c_int32],
    "aclrtResetDevice": [c_int32],
    "aclrtResetDeviceForce": [c_int32],
    "aclrtGetDevice": [POINTER(c_int32)],
    "aclrtGetLogicDevIdByUserDevId": [c_int32, POINTER(c_int32)],
    "aclrtGetPhyDevIdByLogicDevId": [c_int32, POINTER(c_int32)],
    "aclrtGetDeviceInfo": [c_uint32, c_int, POINTER(ctypes.c_int64)],
    "aclrtDeviceCanAccessPeer": [POINTER(c_int32), c_int32, c_int32],
    "aclrtDeviceEnablePeerAccess": [c_int32, c_uint32],
    "aclrtSynchronizeDevice": [],
    "aclrtSynchronizeDeviceWithTimeout": [c_int32],
    "aclrtCreateContext": [POINTER(c_void_p), c_int32],
    "aclrtDestroyContext": [c_void_p],
    "aclrtSetCurrentContext": [c_void_p],
    "aclrtGetCurrentContext": [POINTER(c_void_p)],
    "aclrtCtxGetCurrentDefaultStream": [POINTER(c_void_p)],
    "aclrtCreateStream": [POINTER(c_void_p)],
    "aclrtCreateStreamWithConfig": [POINTER(c_void_p), c_uint32, c_uint32],
    "aclrtDestroyStream": [c_void_p],
    "aclrtDestroyStreamForce": [c_void_p],
    "aclrtSynchronizeStream": [c_void_p],
    "aclrtSynchronizeStreamWithTimeout": [c_void_p, c_int32],
    "aclrtStreamQuery": [c_void_p, POINTER(c_int)],
    "aclrtStreamAbort": [c_void_p],
    "aclrtSetStreamFailureMode": [c_void_p, c_uint64],
    "aclrtStreamWaitEvent": [c_void_p, c_void_p],
    "aclrtCreateEvent": [POINTER(c_void_p)],
    "aclrtCreateEventExWithFlag": [POINTER(c_void_p), c_uint32],
    "aclrtDestroyEvent": [c_void_p],
    "aclrtRecordEvent": [c_void_p, c_void_p],
    "aclrtQueryEventStatus": [c_void_p, POINTER(c_int)],
    "aclrtSynchronizeEvent": [c_void_p],
    "aclrtSynchronizeEventWithTimeout": [c_void_p, c_int32],
    "aclrtMalloc": [POINTER(c_void_p), c_size_t, c_int],
    "aclrtMallocWithCfg": [POINTER(c_void_p), c_size_t, c_int, c_void_p],
    "aclrtFree": [c_void_p],
    "aclrtMallocHost": [POINTER(c_void_p), c_size_t],
    "aclrtFreeHost": [c_void_p],
    "aclrtMemset": [c_void_p, c_size_t, c_int32, c_size_t],
    "aclrtMemcpy": [c_void_p, c_size_t, c_void_p, c_size_t, c_int],
    "aclrtMemcpyAsync": [c_void_p, c_size_t, c_void_p, c_size_t, c_int, c_void_p],
    "aclrtMemcpyBatch": [POINTER(c_void_p), POINTER(c_size_t), POINTER(c_void_p), POINTER(c_size_t), c_size_t,
                         c_void_p, POINTER(c_size_t), c_size_t, POINTER(c_size_t)],
    "aclrtMemcpyBatchAsync": [POINTER(c_void_p), POINTER(c_size_t), POINTER(c_void_p), POINTER(c_size_t), c_size_t,
                              c_void_p, POINTER(c_size_t), c_size_t, POINTER(c_size_t), c_void_p],
    "aclrtGetMemInfo": [c_int, POINTER(c_size_t), POINTER(c_size_t)],
    "aclrtPointerGetAttributes": [c_void_p, POINTER(Attributes)],
    "aclrtMemGetAddressRange": [c_void_p, POINTER(c_void_p), POINTER(c_size_t)],
    "aclrtHostRegister": [c_void_p, c_uint64, c_int, POINTER(c_void_p)],
    "aclrtHostUnregister": [c_void_p],
}


def load() -> ctypes.CDLL:
    """Open a copy of the library that the package ships and give its functions their types.

    A copy has a state of its own: engines of other tests in this process have initialised the library itself, and a
    test that fails here leaves nothing behind for them.
    """
    with tempfile.TemporaryDirectory() as directory:
        library = ctypes.CDLL(shutil.copy(HOST_LIBRARY, directory))
    for name, types in _TYPES.items():
        getattr(library, name).argtypes = types
    for name in ("aclGetRecentErrMsg", "aclrtGetSocName"):
        getattr(library, name).restype = c_char_p
    return library


class Runtime:
    """Calls that must succeed, as methods that return the result; `lib` has the raw functions."""

    def __init__(self) -> None:
        self.lib = load()

    def ok(self, name, *args):
        """Call a function and assert that it answers 0."""
        error = getattr(self.lib, name)(*args)
        assert error == 0, f"{name} answered {error}: {self.text()}"

    def out(self, name, *args, kind=c_void_p):
        """Call a function whose first parameter receives the result, and return that."""
        result = kind()
        self.ok(name, byref(result), *args)
        return result.value

    def text(self) -> str:
        """The text of this thread's latest failure."""
        return (self.lib.aclGetRecentErrMsg() or b"").decode()

    def malloc(self, size, policy=HUGE_FIRST):
        return self.out("aclrtMalloc", size, policy)

    def fill(self, address, data: bytes):
        ctypes.memmove(address, data, len(data))

    def bytes_at(self, address, size) -> bytes:
        return ctypes.string_at(address, size)

    def stream(self):
        return self.out("aclrtCreateStream")

    def event(self):
        return self.out("aclrtCreateEvent")

    def query(self, event):
        """Whether an event is reached."""
        status = c_int()
        self.ok("aclrtQueryEventStatus", event, byref(status))
        return status.value == 1

    def idle(self, stream):
        """Whether a stream has nothing left to do."""
        status = c_int()
        self.ok("aclrtStreamQuery", stream, byref(status))
        return status.value == 0


def in_thread(function, *args):
    """Run a function in a thread of its own and return its result."""
    results = []
    thread = threading.Thread(target=lambda: results.append(function(*args)))
    thread.start()
    thread.join()
    return results[0]


def own_descriptors():
    """Descriptors of this process that are memory of the library."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if "memfd:llm_datadist" in os.readlink(f"/proc/self/fd/{name}"):
                found.append(int(name))
    return sorted(found)


def num_threads():
    return len(os.listdir("/proc/self/task"))


def wait_until(condition, what, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.001)


def pattern(size, seed):
    return random.Random(seed).randbytes(size)


def open_gate(rt, blocked):
    rt.ok("aclrtRecordEvent", blocked[2], blocked[1])
