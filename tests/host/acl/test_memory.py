"""Memory of the host provider, and copies that are done on return."""
import ctypes
import fcntl
import os
import random
import resource
import threading
from ctypes import byref, c_int32, c_size_t, c_void_p

import pytest
import support.acl_library as acl
from support.acl_library import own_descriptors, pattern

MIB = 1 << 20


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
