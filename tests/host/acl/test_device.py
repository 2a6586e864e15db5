"""The acl runtime of the host provider: processes, devices and contexts."""
import ctypes
import os
import warnings
from ctypes import byref, c_int, c_int32, c_size_t, c_uint32, c_uint64, c_void_p

import pytest
import support.acl_library as acl
from support.acl_library import open_gate

MIB = 1 << 20


# ---- process and devices ----

def test_init_is_counted_and_finalize_ends_it(rt):
    rt.ok("aclInit", None)
    assert rt.lib.aclInit(b"") == acl.REPEAT_INIT
    count = c_uint64()
    rt.ok("aclFinalizeReference", byref(count))
    assert count.value == 1
    rt.ok("aclFinalize")
    assert rt.lib.aclFinalize() == acl.REPEAT_FINALIZE
    assert rt.lib.aclrtGetDevice(byref(c_int32())) == acl.NO_CONTEXT
    rt.ok("aclrtSetDevice", 0)                                # for the fixture


def test_init_names_an_unreadable_configuration(rt):
    assert rt.lib.aclInit(b"/nonexistent/acl.json") == acl.BAD_PARAM
    assert "/nonexistent/acl.json" in rt.text()


@pytest.mark.parametrize(("value", "error", "count"), [
    ("3", 0, 3), ("0", 0, 0), ("64", 0, 64), ("", 0, 8), ("65", acl.BAD_PARAM, 0), ("-1", acl.BAD_PARAM, 0),
    ("two", acl.BAD_PARAM, 0), ("2 ", acl.BAD_PARAM, 0),
])
def test_device_count(rt, monkeypatch, value, error, count):
    monkeypatch.setenv("LLM_DATADIST_HOST_DEVICES", value)
    found = c_uint32()
    assert rt.lib.aclrtGetDeviceCount(byref(found)) == error
    assert found.value == count
    if error:
        assert repr(value) in rt.text()


def test_device_numbers_are_checked(rt, monkeypatch):
    monkeypatch.setenv("LLM_DATADIST_HOST_DEVICES", "2")
    for device in (-1, 2, 2**31 - 1):
        assert rt.lib.aclrtSetDevice(device) == acl.BAD_DEVICE
        assert str(device) in rt.text()
    assert rt.out("aclrtGetDevice", kind=c_int32) == 0        # unchanged
    monkeypatch.setenv("LLM_DATADIST_HOST_DEVICES", "0")
    assert rt.lib.aclrtSetDevice(0) == acl.NO_DEVICE
    monkeypatch.delenv("LLM_DATADIST_HOST_DEVICES")


def test_facts_about_devices(rt):
    assert rt.lib.aclrtGetSocName() == b"host"
    assert rt.out("aclrtGetRunMode", kind=c_int) == 1
    number = c_int32()
    rt.ok("aclrtGetLogicDevIdByUserDevId", 3, byref(number))
    assert number.value == 3
    rt.ok("aclrtGetPhyDevIdByLogicDevId", 5, byref(number))
    assert number.value == 5
    assert rt.out("aclrtDeviceCanAccessPeer", 0, 1, kind=c_int32) == 1
    rt.ok("aclrtDeviceEnablePeerAccess", 1, 0)
    assert rt.lib.aclrtDeviceEnablePeerAccess(1, 1) == acl.BAD_PARAM
    assert rt.lib.aclrtGetDeviceInfo(0, 403, byref(ctypes.c_int64())) == acl.UNSUPPORTED
    assert "403" in rt.text()


# ---- contexts ----

def test_a_thread_without_context_is_refused(rt):
    address = rt.malloc(64)
    stream, event = rt.stream(), rt.event()
    result, size = c_void_p(), c_size_t()
    calls = {
        "aclrtMalloc": (byref(result), 64, 0), "aclrtMallocHost": (byref(result), 64), "aclrtFree": (address,),
        "aclrtMemset": (address, 64, 0, 64), "aclrtMemcpy": (address, 64, address, 64, acl.D2D),
        "aclrtMemcpyAsync": (address, 64, address, 64, acl.D2D, stream), "aclrtCreateStream": (byref(result),),
        "aclrtSynchronizeStream": (stream,), "aclrtDestroyStream": (stream,), "aclrtCreateEvent": (byref(result),),
        "aclrtRecordEvent": (event, stream), "aclrtDestroyEvent": (event,), "aclrtSynchronizeEvent": (event,),
        "aclrtGetCurrentContext": (byref(result),), "aclrtGetDevice": (byref(c_int32()),),
        "aclrtGetMemInfo": (0, byref(size), byref(size)), "aclrtSynchronizeDevice": (),
        "aclrtCtxGetCurrentDefaultStream": (byref(result),),
        "aclrtHostRegister": (address, 64, 0, byref(result)), "aclrtHostUnregister": (address,),
    }
    errors = acl.in_thread(lambda: {name: getattr(rt.lib, name)(*args) for name, args in calls.items()})
    assert errors == dict.fromkeys(calls, acl.NO_CONTEXT)
    rt.ok("aclrtDestroyEvent", event)
    rt.ok("aclrtDestroyStream", stream)
    rt.ok("aclrtFree", address)


def test_set_device_is_counted(rt):
    rt.ok("aclrtSetDevice", 1)
    rt.ok("aclrtSetDevice", 1)
    rt.ok("aclrtResetDevice", 1)
    assert rt.out("aclrtGetDevice", kind=c_int32) == 1
    rt.ok("aclrtResetDevice", 1)
    assert rt.lib.aclrtGetDevice(byref(c_int32())) == acl.NO_CONTEXT
    assert rt.lib.aclrtResetDevice(1) == acl.NO_CONTEXT
    assert "device 1 is not set" in rt.text()
    rt.ok("aclrtSetDevice", 1)
    rt.ok("aclrtSetDevice", 1)
    rt.ok("aclrtResetDeviceForce", 1)
    assert rt.lib.aclrtGetDevice(byref(c_int32())) == acl.NO_CONTEXT
    rt.ok("aclrtSetDevice", 0)
    rt.ok("aclrtResetDevice", 0)                              # the fixture's stays


def test_threads_share_the_default_context_of_a_device(rt):
    def other():
        rt.ok("aclrtSetDevice", 0)
        context = rt.out("aclrtGetCurrentContext")
        rt.ok("aclrtResetDevice", 0)
        return context
    assert acl.in_thread(other) == rt.out("aclrtGetCurrentContext")


def test_contexts_are_saved_and_restored(rt):
    default = rt.out("aclrtGetCurrentContext")
    own = rt.out("aclrtCreateContext", 2)
    assert rt.out("aclrtGetCurrentContext") == own != default
    assert rt.out("aclrtGetDevice", kind=c_int32) == 2
    rt.ok("aclrtSetCurrentContext", default)
    assert rt.out("aclrtGetDevice", kind=c_int32) == 0        # the device follows
    rt.ok("aclrtSetCurrentContext", own)
    rt.ok("aclrtDestroyContext", own)
    assert rt.lib.aclrtGetCurrentContext(byref(c_void_p())) == acl.NO_CONTEXT
    assert rt.lib.aclrtSetCurrentContext(own) == acl.BAD_HANDLE
    assert rt.lib.aclrtDestroyContext(own) == acl.BAD_HANDLE
    assert rt.lib.aclrtSetCurrentContext(None) == acl.NO_CONTEXT
    rt.ok("aclrtSetCurrentContext", default)
    assert rt.lib.aclrtDestroyContext(default) == acl.RT_PARAM


def test_a_context_that_ends_in_another_thread_is_noticed(rt):
    own = rt.out("aclrtCreateContext", 0)
    address = rt.malloc(64)
    acl.in_thread(rt.ok, "aclrtDestroyContext", own)
    assert rt.lib.aclrtFree(address) == acl.NO_CONTEXT
    rt.ok("aclrtSetDevice", 0)
    rt.ok("aclrtResetDevice", 0)
    rt.ok("aclrtFree", address)


# ---- fork ----

def test_a_forked_child_starts_anew_and_harms_nothing(rt, pair, blocked):
    src, dst, size, data = pair
    stream = blocked[0]
    rt.ok("aclrtMemcpyAsync", dst, size, src, size, acl.D2D, stream)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)   # the streams' threads are none of Python's
        pid = os.fork()
    if pid == 0:
        code = 1
        try:
            assert rt.lib.aclrtGetCurrentContext(byref(c_void_p())) == acl.NO_CONTEXT
            rt.ok("aclrtSetDevice", 0)
            assert rt.lib.aclrtSynchronizeStream(stream) == acl.BAD_HANDLE
            own, other = rt.malloc(size), rt.stream()
            rt.ok("aclrtMemcpyAsync", own, size, src, size, acl.D2D, other)
            rt.ok("aclrtSynchronizeStream", other)
            assert rt.bytes_at(own, size) == data
            rt.ok("aclrtFree", own)
            rt.ok("aclrtFree", dst)                           # the child's mapping of it
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    open_gate(rt, blocked)
    rt.ok("aclrtSynchronizeStream", stream)
    assert rt.bytes_at(dst, size) == data
