"""The acl runtime of the host provider: bytes, error numbers, and what happens to work in flight."""
import contextlib
import ctypes
import fcntl
import os
import random
import resource
import threading
import time
import warnings
from ctypes import byref, c_int, c_int32, c_size_t, c_uint32, c_uint64, c_void_p

import acl_library as acl
import pytest

MIB = 1 << 20


@pytest.fixture
def rt():
    """A runtime with device 0 set in this thread; what a test leaves behind fails it."""
    runtime = acl.Runtime()
    before, threads_before = own_descriptors(), num_threads()
    runtime.ok("aclrtSetDevice", 0)
    yield runtime
    runtime.ok("aclrtResetDevice", 0)
    assert own_descriptors() == before, "an allocation was left behind"
    wait_until(lambda: num_threads() <= threads_before, "a stream left its thread behind")


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


@pytest.fixture
def pair(rt):
    """Two device allocations of 64 KiB: one with known bytes, one with zeros."""
    size = 64 << 10
    src, dst = rt.malloc(size), rt.malloc(size)
    data = pattern(size, 1)
    rt.fill(src, data)
    rt.ok("aclrtMemset", dst, size, 0, size)
    yield src, dst, size, data
    for address in (src, dst):
        rt.lib.aclrtFree(address)          # a test may have freed it


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


# ---- memory ----

@pytest.mark.parametrize("name", ["aclrtMalloc", "aclrtMallocHost"])
@pytest.mark.parametrize("size", [1, 64, 4096, 4097, 2 * MIB, 5 * MIB + 3])
def test_memory_is_aligned_and_holds_its_bytes(rt, name, size):
    on_device = name == "aclrtMalloc"
    address = rt.out(name, size, *([acl.HUGE_FIRST] if on_device else []))
    assert address % (2 * MIB if size >= 2 * MIB else 4096) == 0
    data = pattern(size, size)
    rt.fill(address, data)
    assert rt.bytes_at(address, size) == data
    base, length = c_void_p(), c_size_t()
    rt.ok("aclrtMemGetAddressRange", address + size - 1, byref(base), byref(length))
    assert (base.value, length.value) == (address, size)
    attributes = acl.Attributes()
    rt.ok("aclrtPointerGetAttributes", address + size - 1, byref(attributes))
    assert attributes.type == (1 if on_device else 0)
    rt.ok("aclrtFree" if on_device else "aclrtFreeHost", address)
    rt.ok("aclrtPointerGetAttributes", address, byref(attributes))
    assert attributes.type == 2                               # nobody's
    assert rt.lib.aclrtMemGetAddressRange(address, byref(base), byref(length)) == acl.RT_PARAM


def test_attributes_name_the_device(rt):
    rt.ok("aclrtSetDevice", 3)
    address = rt.malloc(64)
    attributes = acl.Attributes()
    rt.ok("aclrtPointerGetAttributes", address, byref(attributes))
    assert (attributes.type, attributes.id) == (1, 3)
    rt.ok("aclrtFree", address)
    rt.ok("aclrtResetDevice", 3)
    rt.ok("aclrtSetDevice", 0)
    rt.ok("aclrtResetDevice", 0)


def test_memory_is_a_sealed_memfd_that_nobody_can_resize(rt):
    before = set(own_descriptors())
    address = rt.malloc(10000)
    (fd,) = set(own_descriptors()) - before
    assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) & 0x7 == 0x7    # seal, shrink, grow
    assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    assert os.fstat(fd).st_size == 12288
    for size in (0, 4096, 1 << 20):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size)
    rt.fill(address, b"seen through the descriptor")
    assert os.pread(fd, 27, 0) == b"seen through the descriptor"
    rt.ok("aclrtFree", address)


@pytest.mark.parametrize("policy", [0, 1, 2, 3, 4, 5, 0x1000, 0x1001, 0x100])
def test_page_policies_are_wishes(rt, policy):
    rt.ok("aclrtFree", rt.malloc(4096, policy))


@pytest.mark.parametrize(("policy", "error"), [
    (6, acl.UNSUPPORTED), (7, acl.UNSUPPORTED), (8, acl.BAD_PARAM), (-1, acl.BAD_PARAM)])
def test_other_policies_are_refused(rt, policy, error):
    assert rt.lib.aclrtMalloc(byref(c_void_p()), 4096, policy) == error


def test_wrong_arguments_of_allocation(rt):
    result = c_void_p()
    assert rt.lib.aclrtMalloc(byref(result), 0, 0) == acl.BAD_PARAM
    assert rt.lib.aclrtMalloc(None, 64, 0) == acl.BAD_PARAM
    assert rt.lib.aclrtMallocHost(byref(result), 0) == acl.BAD_PARAM
    assert rt.lib.aclrtMallocWithCfg(byref(result), 64, 0, 1) == acl.UNSUPPORTED
    assert result.value is None
    rt.ok("aclrtMallocWithCfg", byref(result), 64, 0, None)
    rt.ok("aclrtFree", result)


def test_free_takes_the_start_of_its_own_kind_once(rt):
    device, host = rt.malloc(4096), rt.out("aclrtMallocHost", 4096)
    assert rt.lib.aclrtFree(None) == acl.BAD_PARAM
    for name, address in (("aclrtFree", host), ("aclrtFreeHost", device), ("aclrtFree", device + 1)):
        assert getattr(rt.lib, name)(address) == acl.RT_PARAM
        assert f"{address:#x}" in rt.text()
    rt.ok("aclrtFree", device)
    rt.ok("aclrtFreeHost", host)
    assert rt.lib.aclrtFree(device) == acl.RT_PARAM
    assert rt.lib.aclrtFreeHost(host) == acl.RT_PARAM


def memory(rt):
    free, total = c_size_t(), c_size_t()
    rt.ok("aclrtGetMemInfo", 1, byref(free), byref(total))
    return free.value, total.value


@pytest.mark.parametrize(("name", "error"), [("aclrtMalloc", acl.DEVICE_OOM), ("aclrtMallocHost", acl.HOST_OOM)])
def test_more_than_the_machine_has_is_refused(rt, name, error):
    _, total = memory(rt)
    policy = [0] if name == "aclrtMalloc" else []
    for size in (total + 1, 2**63, 2**64 - 1):
        result = c_void_p()
        assert getattr(rt.lib, name)(byref(result), size, *policy) == error
        assert str(size) in rt.text() and str(total) in rt.text()
        assert result.value is None


def test_what_is_promised_and_not_yet_written_counts(rt):
    free, total = memory(rt)
    assert 0 < free < total
    first = rt.malloc(free * 6 // 10)
    assert memory(rt)[0] < free // 2
    assert rt.lib.aclrtMalloc(byref(c_void_p()), free * 6 // 10, 0) == acl.DEVICE_OOM
    rt.ok("aclrtFree", first)
    rt.ok("aclrtFree", rt.malloc(free * 6 // 10))


def test_a_process_out_of_descriptors_is_told_so(rt):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    result = c_void_p()
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        error = rt.lib.aclrtMalloc(byref(result), 4096, 0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert error in (acl.NO_RESOURCE, acl.DEVICE_OOM)
    assert result.value is None
    rt.ok("aclrtFree", rt.malloc(4096))


def test_concurrent_allocations_keep_apart(rt):
    failures = []

    def work(seed):
        rng, mine = random.Random(seed), []
        rt.ok("aclrtSetDevice", 0)
        for step in range(150):
            if mine and rng.random() < 0.45:
                address, size, byte = mine.pop(rng.randrange(len(mine)))
                if rt.bytes_at(address, size) != bytes([byte]) * size:
                    failures.append((seed, step))
                rt.ok("aclrtFree", address)
            else:
                size, byte = rng.randrange(1, 20000), rng.randrange(256)
                address = rt.malloc(size)
                rt.ok("aclrtMemset", address, size, byte, size)
                mine.append((address, size, byte))
        for address, _, _ in mine:
            rt.ok("aclrtFree", address)
        rt.ok("aclrtResetDevice", 0)
        return True

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert rt.lib.aclrtResetDevice(0) == 0                    # every worker got to its end
    assert rt.lib.aclrtGetDevice(byref(c_int32())) == acl.NO_CONTEXT
    rt.ok("aclrtSetDevice", 0)


# ---- copies ----

def test_memset_and_memcpy_move_exactly_their_bytes(rt, pair):
    src, dst, size, data = pair
    rt.ok("aclrtMemcpy", dst + 100, size - 100, src + 7, 1000, acl.D2D)
    assert rt.bytes_at(dst, size) == bytes(100) + data[7:1007] + bytes(size - 1100)
    rt.ok("aclrtMemset", dst + 200, 50, 0x1A5, 50)            # the low byte, as memset does
    assert rt.bytes_at(dst + 199, 52) == data[106:107] + b"\xa5" * 50 + data[157:158]
    rt.ok("aclrtMemcpy", dst, size, src, 0, acl.BY_ADDRESS)
    assert rt.bytes_at(src, size) == data


@pytest.mark.parametrize("shift", [1, 100, 4096])
def test_overlapping_copies_are_as_if_over_a_third_place(rt, pair, shift):
    src, _, size, data = pair
    rt.ok("aclrtMemcpy", src + shift, size - shift, src, size - shift, acl.D2D)
    assert rt.bytes_at(src, size) == data[:shift] + data[:size - shift]
    rt.fill(src, data)
    rt.ok("aclrtMemcpy", src, size, src + shift, size - shift, acl.D2D)
    assert rt.bytes_at(src, size) == data[shift:] + data[size - shift:]


def test_copies_between_host_and_device(rt, pair):
    src, dst, size, data = pair
    buffer = ctypes.create_string_buffer(size)
    rt.ok("aclrtMemcpy", buffer, size, src, size, acl.D2H)
    assert buffer.raw == data
    rt.ok("aclrtMemcpy", dst, size, buffer, size, acl.H2D)
    assert rt.bytes_at(dst, size) == data
    other = ctypes.create_string_buffer(size)
    rt.ok("aclrtMemcpy", other, size, buffer, size, acl.H2H)
    assert other.raw == data


def test_ranges_that_leave_their_allocation_are_refused(rt, pair):
    src, dst, size, _ = pair
    assert rt.lib.aclrtMemcpy(dst, 99, src, 100, acl.D2D) == acl.BAD_PARAM
    assert rt.lib.aclrtMemcpy(dst, size + 1, src, size + 1, acl.D2D) == acl.RT_PARAM
    assert rt.lib.aclrtMemcpy(dst + 1, size, src, size, acl.D2D) == acl.RT_PARAM
    assert rt.lib.aclrtMemcpy(dst, size, src + 1, size, acl.D2D) == acl.RT_PARAM
    assert rt.lib.aclrtMemcpy(dst, 2**64 - 1, src, 2**64 - 1, acl.D2D) == acl.RT_PARAM
    assert rt.lib.aclrtMemcpy(None, size, src, size, acl.D2D) == acl.BAD_PARAM
    assert rt.lib.aclrtMemcpy(dst, size, None, size, acl.D2D) == acl.BAD_PARAM
    assert rt.lib.aclrtMemcpy(dst, size, src, size, 8) == acl.BAD_PARAM
    assert rt.lib.aclrtMemset(dst, 10, 1, 11) == acl.BAD_PARAM
    assert rt.lib.aclrtMemset(dst, 2 * size, 1, 2 * size) == acl.RT_PARAM
    assert rt.bytes_at(dst, size) == bytes(size)


def batch(copies):
    dsts, srcs, sizes = zip(*copies)
    n = len(copies)
    return ((c_void_p * n)(*dsts), (c_size_t * n)(*sizes), (c_void_p * n)(*srcs), (c_size_t * n)(*sizes), n)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_batches_move_all_or_nothing(rt, pair, asynchronous):
    src, dst, size, data = pair
    failed = c_size_t(7)
    stream = rt.stream()
    name, tail = ("aclrtMemcpyBatchAsync", (stream,)) if asynchronous else ("aclrtMemcpyBatch", ())
    copies = [(dst + 1000 * i, src + 3000 * i, 500) for i in range(20)]
    wrong = batch([*copies, (dst + size - 1, src, 2)])
    assert getattr(rt.lib, name)(*wrong, None, None, 0, byref(failed), *tail) == acl.RT_PARAM
    assert failed.value == 20
    rt.ok("aclrtSynchronizeStream", stream)
    assert rt.bytes_at(dst, size) == bytes(size)
    rt.ok(name, *batch(copies), None, None, 0, byref(failed), *tail)
    assert failed.value == 2**64 - 1
    rt.ok("aclrtSynchronizeStream", stream)
    expected = bytearray(size)
    for i in range(20):
        expected[1000 * i:1000 * i + 500] = data[3000 * i:3000 * i + 500]
    assert rt.bytes_at(dst, size) == expected
    rt.ok("aclrtDestroyStream", stream)


def test_wrong_arguments_of_batches(rt, pair):
    src, dst, _, _ = pair
    failed = c_size_t()
    one = batch([(dst, src, 8)])
    indexes = (c_size_t * 2)(0, 0)
    attributes = (ctypes.c_uint8 * 64)()
    call = rt.lib.aclrtMemcpyBatch
    assert call(*one[:4], 0, None, None, 0, byref(failed)) == acl.BAD_PARAM
    assert call(None, *one[1:], None, None, 0, byref(failed)) == acl.BAD_PARAM
    assert call(*one, None, None, 1, byref(failed)) == acl.BAD_PARAM
    assert call(*one, attributes, indexes, 2, byref(failed)) == acl.BAD_PARAM
    assert call(*one, None, None, 0, None) == acl.BAD_PARAM
    assert call(*one, attributes, indexes, 1, byref(failed)) == 0
    assert rt.lib.aclrtMemcpyBatchAsync(*one, None, None, 0, None, None) == acl.BAD_PARAM


# ---- streams and events ----

@pytest.fixture
def blocked(rt):
    """A stream that stands still until `gate` is recorded, and another one to record it in."""
    stream, opener, gate = rt.stream(), rt.stream(), rt.event()
    rt.ok("aclrtStreamWaitEvent", stream, gate)
    yield stream, opener, gate
    rt.lib.aclrtDestroyStreamForce(stream)
    rt.ok("aclrtDestroyStream", opener)
    rt.ok("aclrtDestroyEvent", gate)


def open_gate(rt, blocked):
    rt.ok("aclrtRecordEvent", blocked[2], blocked[1])


def test_copies_are_asynchronous_and_in_order(rt, pair, blocked):
    src, dst, size, data = pair
    stream = blocked[0]
    middle = rt.malloc(size)
    rt.ok("aclrtMemset", middle, size, 9, size)
    rt.ok("aclrtMemcpyAsync", middle, size, src, size, acl.D2D, stream)
    rt.ok("aclrtMemcpyAsync", dst, size, middle, size, acl.D2D, stream)
    assert not rt.idle(stream)
    assert rt.bytes_at(middle, size) == b"\x09" * size        # both calls returned, nothing moved
    open_gate(rt, blocked)
    rt.ok("aclrtSynchronizeStream", stream)
    assert rt.idle(stream)
    assert rt.bytes_at(dst, size) == data
    rt.ok("aclrtFree", middle)


def test_the_default_stream_is_NULL(rt, pair):
    src, dst, size, data = pair
    default = rt.out("aclrtCtxGetCurrentDefaultStream")
    assert rt.out("aclrtCtxGetCurrentDefaultStream") == default
    rt.ok("aclrtMemcpyAsync", dst, size, src, size, acl.D2D, None)
    rt.ok("aclrtSynchronizeStream", default)
    assert rt.bytes_at(dst, size) == data
    assert rt.lib.aclrtDestroyStream(default) == acl.RT_PARAM
    assert rt.lib.aclrtDestroyStream(None) == acl.BAD_PARAM


def test_waits_end_with_their_timeout(rt, blocked):
    stream, _, gate = blocked
    assert rt.lib.aclrtSynchronizeStreamWithTimeout(stream, 5) == acl.STREAM_TIMEOUT
    assert "1 tasks to go" in rt.text()
    assert rt.lib.aclrtSynchronizeEventWithTimeout(gate, 5) == acl.EVENT_TIMEOUT
    assert rt.lib.aclrtSynchronizeDeviceWithTimeout(5) == acl.STREAM_TIMEOUT
    for timeout in (0, -2):
        assert rt.lib.aclrtSynchronizeStreamWithTimeout(stream, timeout) == acl.RT_PARAM
        assert rt.lib.aclrtSynchronizeEventWithTimeout(gate, timeout) == acl.RT_PARAM
        assert rt.lib.aclrtSynchronizeDeviceWithTimeout(timeout) == acl.RT_PARAM
    open_gate(rt, blocked)
    rt.ok("aclrtSynchronizeStreamWithTimeout", stream, 60000)  # the same work may be waited for again
    rt.ok("aclrtSynchronizeEventWithTimeout", gate, -1)
    rt.ok("aclrtSynchronizeDevice")
    rt.ok("aclrtSynchronizeDeviceWithTimeout", 60000)


def test_a_wait_is_for_the_latest_record_before_it(rt, blocked):
    stream, opener, gate = blocked
    assert not rt.query(gate)
    open_gate(rt, blocked)
    rt.ok("aclrtSynchronizeStream", stream)
    rt.ok("aclrtSynchronizeStream", opener)
    assert rt.query(gate)
    rt.ok("aclrtStreamWaitEvent", stream, gate)               # recorded already: passes
    rt.ok("aclrtSynchronizeStream", stream)
    second = rt.event()
    rt.ok("aclrtStreamWaitEvent", opener, second)
    rt.ok("aclrtRecordEvent", gate, opener)                   # a new record that is held up
    assert not rt.query(gate)
    rt.ok("aclrtStreamWaitEvent", stream, gate)
    assert rt.lib.aclrtSynchronizeStreamWithTimeout(stream, 5) == acl.STREAM_TIMEOUT
    third = rt.stream()
    rt.ok("aclrtRecordEvent", second, third)
    rt.ok("aclrtSynchronizeStream", stream)
    assert rt.query(gate)
    rt.ok("aclrtDestroyStream", third)
    rt.ok("aclrtDestroyEvent", second)


def test_abort_drops_queued_work_and_the_stream_goes_on(rt, pair, blocked):
    src, dst, size, data = pair
    stream = blocked[0]
    rt.ok("aclrtMemcpyAsync", dst, size, src, size, acl.D2D, stream)
    rt.ok("aclrtStreamAbort", stream)
    assert rt.idle(stream)
    open_gate(rt, blocked)
    rt.ok("aclrtSynchronizeDevice")
    assert rt.bytes_at(dst, size) == bytes(size)
    rt.ok("aclrtMemcpyAsync", dst, size, src, size, acl.D2D, stream)
    rt.ok("aclrtSynchronizeStream", stream)
    assert rt.bytes_at(dst, size) == data


def test_abort_answers_those_who_wait(rt):
    stream, gate = rt.stream(), rt.event()
    answers = []

    def synchronise():
        rt.ok("aclrtSetDevice", 0)
        while not answers or answers[-1] == 0:                # 0: it came between two rounds and found nothing queued
            answers.append(rt.lib.aclrtSynchronizeStream(stream))
        rt.ok("aclrtResetDevice", 0)

    thread = threading.Thread(target=synchronise)
    thread.start()
    while thread.is_alive():
        rt.ok("aclrtStreamWaitEvent", stream, gate)
        thread.join(0.01)
        rt.ok("aclrtStreamAbort", stream)
    assert set(answers) <= {0, acl.STREAM_ABORTED} and answers[-1] == acl.STREAM_ABORTED
    rt.ok("aclrtDestroyStream", stream)
    rt.ok("aclrtDestroyEvent", gate)


def test_a_destroyed_stream_finishes_its_work(rt, pair, blocked):
    src, dst, size, data = pair
    stream = blocked[0]
    done = rt.event()
    rt.ok("aclrtMemcpyAsync", dst, size, src, size, acl.D2D, stream)
    rt.ok("aclrtRecordEvent", done, stream)
    rt.ok("aclrtDestroyStream", stream)
    assert rt.lib.aclrtSynchronizeStream(stream) == acl.BAD_HANDLE
    assert rt.bytes_at(dst, size) == bytes(size)
    open_gate(rt, blocked)
    rt.ok("aclrtSynchronizeEventWithTimeout", done, 60000)
    assert rt.bytes_at(dst, size) == data
    rt.ok("aclrtDestroyEvent", done)


def test_a_stream_destroyed_by_force_drops_its_work(rt, pair, blocked):
    src, dst, size, _ = pair
    rt.ok("aclrtMemcpyAsync", dst, size, src, size, acl.D2D, blocked[0])
    rt.ok("aclrtDestroyStreamForce", blocked[0])
    open_gate(rt, blocked)
    rt.ok("aclrtSynchronizeDevice")
    assert rt.bytes_at(dst, size) == bytes(size)


def test_memory_freed_under_queued_work_stays_until_it_is_done(rt, blocked):
    stream, size = blocked[0], 3 * MIB
    data = pattern(size, 3)
    src, middle, dst = (rt.malloc(size) for _ in range(3))
    rt.fill(src, data)
    rt.ok("aclrtMemcpyAsync", middle, size, src, size, acl.D2D, stream)
    rt.ok("aclrtMemcpyAsync", dst, size, middle, size, acl.D2D, stream)
    rt.ok("aclrtFree", src)
    rt.ok("aclrtFree", middle)
    assert rt.lib.aclrtMemset(src, size, 0, 0) == 0           # an address of nobody, and no bytes: not looked at
    open_gate(rt, blocked)
    rt.ok("aclrtSynchronizeStream", stream)
    assert rt.bytes_at(dst, size) == data
    rt.ok("aclrtFree", dst)


def test_streams_stay_in_their_context(rt, pair, blocked):
    src, dst, size, _ = pair
    stream, _, gate = blocked
    default = rt.out("aclrtGetCurrentContext")
    own = rt.out("aclrtCreateContext", 0)
    assert rt.lib.aclrtMemcpyAsync(dst, size, src, size, acl.D2D, stream) == acl.WRONG_CONTEXT
    assert rt.lib.aclrtSynchronizeStream(stream) == acl.WRONG_CONTEXT
    assert rt.lib.aclrtDestroyStream(stream) == acl.WRONG_CONTEXT
    assert rt.lib.aclrtRecordEvent(gate, stream) == acl.WRONG_CONTEXT
    rt.ok("aclrtDestroyContext", own)
    rt.ok("aclrtSetCurrentContext", default)


def test_a_context_takes_its_streams_and_their_work_along(rt, pair):
    src, dst, size, _ = pair
    default = rt.out("aclrtGetCurrentContext")
    own = rt.out("aclrtCreateContext", 0)
    stream, gate = rt.stream(), rt.event()
    rt.ok("aclrtStreamWaitEvent", stream, gate)
    rt.ok("aclrtMemcpyAsync", dst, size, src, size, acl.D2D, stream)
    rt.ok("aclrtDestroyContext", own)
    rt.ok("aclrtSetCurrentContext", default)
    assert rt.lib.aclrtSynchronizeStream(stream) == acl.BAD_HANDLE
    rt.ok("aclrtRecordEvent", gate, None)
    rt.ok("aclrtSynchronizeDevice")
    assert rt.bytes_at(dst, size) == bytes(size)
    rt.ok("aclrtDestroyEvent", gate)


def test_handles_that_are_none_are_refused(rt):
    event, stream = rt.event(), rt.stream()
    assert rt.lib.aclrtSynchronizeStream(event) == acl.BAD_HANDLE
    assert rt.lib.aclrtSynchronizeEvent(stream) == acl.BAD_HANDLE
    assert rt.lib.aclrtSetCurrentContext(stream) == acl.BAD_HANDLE
    rt.ok("aclrtDestroyEvent", event)
    rt.ok("aclrtDestroyStream", stream)
    again = rt.event()                                        # the slot is used again, the old handle is not
    for handle in (event, stream, 1, 0xDEADBEEF, 2**64 - 1):
        assert rt.lib.aclrtDestroyEvent(handle) == acl.BAD_HANDLE
        assert rt.lib.aclrtDestroyStream(handle) == acl.BAD_HANDLE
        assert rt.lib.aclrtDestroyContext(handle) == acl.BAD_HANDLE
    rt.ok("aclrtDestroyEvent", again)


def test_unsupported_wishes_are_named(rt):
    result = c_void_p()
    assert rt.lib.aclrtCreateStreamWithConfig(byref(result), 0, 0x24) == acl.UNSUPPORTED
    assert "0x24" in rt.text()
    assert rt.lib.aclrtCreateStreamWithConfig(byref(result), 1, 0) == acl.BAD_PARAM
    assert rt.lib.aclrtCreateEventExWithFlag(byref(result), 0x40) == acl.UNSUPPORTED
    assert "0x40" in rt.text()
    rt.ok("aclrtCreateEventExWithFlag", byref(result), 0x9)
    rt.ok("aclrtDestroyEvent", result)
    rt.ok("aclrtCreateStreamWithConfig", byref(result), 0, 0x3)
    rt.ok("aclrtDestroyStream", result)


def test_host_to_host_is_no_asynchronous_copy(rt):
    host = rt.out("aclrtMallocHost", 4096)
    device = rt.malloc(4096)
    buffer = ctypes.create_string_buffer(4096)
    assert rt.lib.aclrtMemcpyAsync(host, 4096, buffer, 4096, acl.H2H, None) == acl.UNSUPPORTED
    assert rt.lib.aclrtMemcpyAsync(host, 4096, buffer, 4096, acl.BY_ADDRESS, None) == acl.UNSUPPORTED
    rt.ok("aclrtMemcpyAsync", device, 4096, host, 4096, acl.BY_ADDRESS, None)
    rt.ok("aclrtSynchronizeStream", None)
    rt.ok("aclrtFree", device)
    rt.ok("aclrtFreeHost", host)


def test_a_copy_of_caller_memory_is_done_on_return(rt, pair, blocked):
    _, dst, size, data = pair
    buffer = ctypes.create_string_buffer(data, size)
    default = rt.out("aclrtGetCurrentContext")

    def copy():
        rt.ok("aclrtSetCurrentContext", default)
        error = rt.lib.aclrtMemcpyAsync(dst, size, buffer, size, acl.H2D, blocked[0])
        ctypes.memset(buffer, 0, size)                        # allowed from now on
        return error, rt.bytes_at(dst, size)

    results = []
    thread = threading.Thread(target=lambda: results.append(copy()))
    thread.start()
    open_gate(rt, blocked)
    thread.join()
    assert results == [(0, data)]


def test_registered_caller_memory_is_copied_asynchronously(rt, pair, blocked):
    _, dst, size, data = pair
    buffer = ctypes.create_string_buffer(data, size)
    address = ctypes.addressof(buffer)
    mapped = c_void_p()
    rt.ok("aclrtHostRegister", address, size, 0, byref(mapped))
    assert mapped.value == address
    attributes = acl.Attributes()
    rt.ok("aclrtPointerGetAttributes", address, byref(attributes))
    assert attributes.type == 0
    rt.ok("aclrtMemcpyAsync", dst, size, address, size, acl.H2D, blocked[0])    # returns though the stream stands
    assert rt.bytes_at(dst, size) == bytes(size)
    open_gate(rt, blocked)
    rt.ok("aclrtSynchronizeStream", blocked[0])
    assert rt.bytes_at(dst, size) == data
    for start, length in ((address, size), (address + size - 1, 1), (address - 8, 9)):
        assert rt.lib.aclrtHostRegister(start, length, 0, byref(mapped)) == acl.ALREADY_REGISTERED
    assert rt.lib.aclrtHostUnregister(address + 1) == acl.NOT_REGISTERED
    rt.ok("aclrtHostUnregister", address)
    assert rt.lib.aclrtHostUnregister(address) == acl.NOT_REGISTERED


def test_wrong_arguments_of_registration(rt):
    buffer = ctypes.create_string_buffer(64)
    mapped = c_void_p()
    address = ctypes.addressof(buffer)
    assert rt.lib.aclrtHostRegister(None, 64, 0, byref(mapped)) == acl.BAD_PARAM
    assert rt.lib.aclrtHostRegister(address, 0, 0, byref(mapped)) == acl.BAD_PARAM
    assert rt.lib.aclrtHostRegister(address, 2**64 - 1, 0, byref(mapped)) == acl.BAD_PARAM
    assert rt.lib.aclrtHostRegister(address, 64, 4, byref(mapped)) == acl.UNSUPPORTED
    hole = rt.malloc(4096)
    rt.ok("aclrtFree", hole)
    assert rt.lib.aclrtHostRegister(hole, 4096, 0, byref(mapped)) == acl.RT_PARAM
    assert "not mapped" in rt.text()


def test_a_stream_has_one_failure_mode(rt):
    stream = rt.stream()
    assert rt.lib.aclrtSetStreamFailureMode(stream, 2) == acl.BAD_PARAM
    rt.ok("aclrtSetStreamFailureMode", stream, 1)
    assert rt.lib.aclrtSetStreamFailureMode(stream, 0) == acl.RT_PARAM
    rt.ok("aclrtDestroyStream", stream)


def test_streams_of_a_device_are_limited(rt):
    streams = [rt.stream() for _ in range(1984)]
    assert rt.lib.aclrtCreateStream(byref(c_void_p())) == acl.NO_STREAM
    rt.ok("aclrtDestroyStream", streams.pop())
    streams.append(rt.stream())
    for stream in streams:
        rt.ok("aclrtDestroyStream", stream)


def test_error_texts_belong_to_their_thread(rt):
    assert rt.lib.aclrtSetDevice(-7) == acl.BAD_DEVICE
    assert "-7" in rt.text()
    assert acl.in_thread(rt.lib.aclGetRecentErrMsg) is None
    assert "-7" in rt.text()                                  # asking does not clear it


def test_threads_may_share_streams_and_events(rt):
    """Whatever threads do to the same handles, every call answers one of its numbers, and memory stays whole."""
    steps, size = 400, 8
    allowed = {0, acl.STREAM_ABORTED, acl.BAD_HANDLE, acl.STREAM_TIMEOUT, acl.EVENT_TIMEOUT}
    src, dst = rt.malloc(size), rt.malloc(3 * steps * size)   # every copy has its own place
    rt.ok("aclrtMemset", src, size, 7, size)
    rt.ok("aclrtMemset", dst, 3 * steps * size, 0, 3 * steps * size)
    streams, events = [rt.stream() for _ in range(3)], [rt.event() for _ in range(3)]
    context = rt.out("aclrtGetCurrentContext")
    odd = []

    def work(seed):
        rng = random.Random(seed)
        rt.ok("aclrtSetCurrentContext", context)
        for step in range(steps):
            place = dst + (seed * steps + step) * size
            k, stream, event = rng.randrange(3), rng.choice(streams), rng.choice(events)
            name, args = rng.choice([
                ("aclrtMemcpyAsync", (place, size, src, size, acl.D2D, stream)), ("aclrtRecordEvent", (event, stream)),
                ("aclrtStreamWaitEvent", (stream, event)), ("aclrtStreamAbort", (stream,)),
                ("aclrtSynchronizeStreamWithTimeout", (stream, 1)), ("aclrtSynchronizeEventWithTimeout", (event, 1)),
                ("aclrtDestroyStreamForce", (stream,)), ("aclrtDestroyEvent", (event,)), ("create", ()),
            ])
            if name == "create":
                new_stream, new_event = rt.stream(), rt.event()
                rt.lib.aclrtDestroyStreamForce(streams[k])
                rt.lib.aclrtDestroyEvent(events[k])
                streams[k], events[k] = new_stream, new_event
            else:
                error = getattr(rt.lib, name)(*args)
                if error not in allowed:
                    odd.append((name, error))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert odd == []
    rt.ok("aclrtResetDevice", 0)                              # ends the context with every stream that is left
    rt.ok("aclrtSetDevice", 0)
    data = rt.bytes_at(dst, 3 * steps * size)
    assert {data[i:i + size] for i in range(0, len(data), size)} == {bytes(size), b"\x07" * size}
    rt.ok("aclrtFree", src)
    rt.ok("aclrtFree", dst)


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
