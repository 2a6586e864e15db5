"""Streams and events of the host provider, and what happens to work in flight."""
import ctypes
import random
import threading
from ctypes import byref, c_void_p

import support.acl_library as acl
from support.acl_library import open_gate, pattern

MIB = 1 << 20


# ---- streams and events ----

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
