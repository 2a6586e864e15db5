"""Local copies: plans mean what the pairs mean one after the other, and executing them moves just those bytes."""
import ctypes
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_datadist import status as public
from llm_datadist.core.base.provider import HOST_LIBRARY
from llm_datadist_probes.transfer import CopyProbe, TableProbe

MIB = 1 << 20
H2H, H2D, D2H, D2D, DEFAULT = range(5)
STREAM = 0x5
COPY = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
COPY_ASYNC = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p)
SYNC = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int32)
ABORT = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)


class Runtime:
    """A runtime whose stream really is asynchronous: queued bytes move when it is synchronised.

    It refuses copies that overlap themselves, as the real one does not define them.
    """

    def __init__(self, copy_code=0, fail_at=0, sync_code=0, really=True, abort=True, only_async=False):
        self.calls, self.queue = [], []
        numbers = itertools.count()

        def move(dst, src, count):
            if really:
                assert abs(dst - src) >= count
                ctypes.memmove(dst, src, count)

        def copy(dst, dst_max, src, count, kind):
            assert dst_max >= count > 0
            self.calls.append(("copy", kind, count))
            if next(numbers) >= fail_at and copy_code and not only_async:
                return copy_code
            move(dst, src, count)
            return 0

        def copy_async(dst, dst_max, src, count, kind, stream):
            assert dst_max >= count > 0 and stream == STREAM
            self.calls.append(("async", kind, count))
            if next(numbers) >= fail_at and copy_code:
                return copy_code
            self.queue.append((dst, src, count))
            return 0

        def synchronize(stream, timeout_ms):
            assert stream == STREAM
            self.calls.append(("sync", timeout_ms))
            if sync_code == 0:
                for operation in self.queue:
                    move(*operation)
                self.queue.clear()
            return sync_code

        def stream_abort(stream):
            assert stream == STREAM
            self.calls.append(("abort",))
            self.queue.clear()
            return 0

        self.functions = {
            "memcpy": COPY(copy), "memcpy_async": COPY_ASYNC(copy_async), "synchronize": SYNC(synchronize)}
        if abort:
            self.functions["abort"] = ABORT(stream_abort)
        self.probe = TableProbe(
            **{name: ctypes.cast(function, ctypes.c_void_p).value for name, function in self.functions.items()})

    def run(self, ops, kind=D2D, timeout_ns=None):
        CopyProbe().copy(self.probe, STREAM, ops, kind, timeout_ns)

    def names(self):
        return [call[0] for call in self.calls]


def apply(plan, memory, base):
    """Carry out a plan on bytes whose first has address `base`, refusing copies that overlap themselves."""
    out = bytearray(memory)
    for dst, src, nbytes in plan:
        assert abs(dst - src) >= nbytes > 0
        out[dst - base:dst - base + nbytes] = out[src - base:src - base + nbytes]
    return bytes(out)


def stretches(num_src, num_dst):
    """Pairs in rising, falling and scattered stretches."""
    stretch = st.tuples(st.integers(0, num_src - 1), st.integers(0, num_dst - 1), st.integers(1, 6),
                        st.sampled_from([1, 1, -1, 2])).map(
        lambda a: [(a[0] + i * a[3], a[1] + i * a[3]) for i in range(a[2])])
    return st.lists(stretch, max_size=6).map(
        lambda parts: [(s, d) for part in parts for s, d in part if 0 <= s < num_src and 0 <= d < num_dst])


@given(st.data(), st.integers(1, 12), st.integers(1, 4), st.integers(1, 3), st.sampled_from([0, 3]))
def test_copy_blocks_equals_one_copy_after_the_other(data, num_blocks, block_bytes, num_tensors, gap):
    pairs = data.draw(stretches(num_blocks, num_blocks))
    stride = num_blocks * block_bytes + gap
    addrs = [1000 + t * stride for t in range(num_tensors)]
    memory = bytes(i % 251 for i in range(stride * num_tensors))
    expected = bytearray(memory)
    for t in range(num_tensors):
        for s, d in pairs:
            to, at = t * stride + d * block_bytes, t * stride + s * block_bytes
            expected[to:to + block_bytes] = expected[at:at + block_bytes]
    plan = CopyProbe().copy_blocks(addrs, num_blocks, block_bytes, [s for s, _ in pairs], [d for _, d in pairs])
    assert apply(plan, memory, 1000) == bytes(expected)


@given(st.data(), st.integers(1, 12), st.integers(1, 12), st.integers(1, 4), st.integers(1, 3), st.booleans())
def test_swap_blocks_equals_one_copy_after_the_other(data, num_src, num_dst, block_bytes, num_tensors, known):
    pairs = data.draw(stretches(num_src, num_dst))
    src = [1000 + t * num_src * block_bytes for t in range(num_tensors)]
    dst = [1000 + num_tensors * num_src * block_bytes + t * (num_dst * block_bytes + t) for t in range(num_tensors)]
    memory = bytes(i % 251 for i in range(dst[-1] + num_dst * block_bytes - 1000))
    expected = bytearray(memory)
    for t in range(num_tensors):
        for s, d in pairs:
            to, at = dst[t] + d * block_bytes - 1000, src[t] + s * block_bytes - 1000
            expected[to:to + block_bytes] = expected[at:at + block_bytes]
    limits = (num_src, num_dst) if known else (2**64 - 1, 2**64 - 1)
    plan = CopyProbe().swap_blocks(
        src, [s for s, _ in pairs], limits[0], dst, [d for _, d in pairs], limits[1], block_bytes)
    assert apply(plan, memory, 1000) == bytes(expected)


def test_runs_are_merged_and_stay_merged_for_every_tensor():
    probe = CopyProbe()
    assert probe.swap_blocks([0, 1000], [0, 1, 2, 7], 8, [5000, 7000], [4, 5, 6, 0], 8, 10) == [
        (5040, 0, 30), (5000, 70, 10), (7040, 1000, 30), (7000, 1070, 10)]
    assert probe.swap_blocks([0], [7, 6, 5], 8, [5000], [3, 2, 1], 8, 10) == [(5010, 50, 30)]
    assert probe.copy_blocks([0], 10, 10, [0, 1, 2], [5, 6, 7]) == [(50, 0, 30)]
    # 0 -> 1 -> 2: the second reads what the first wrote.
    assert probe.copy_blocks([0], 10, 10, [0, 1], [1, 2]) == [(10, 0, 10), (20, 10, 10)]
    assert probe.copy_blocks([0], 10, 10, [3, 4], [3, 4]) == []
    assert probe.copy_blocks([], 10, 10, [3], [4]) == [] and probe.copy_blocks([0], 10, 10, [], []) == []


@pytest.mark.parametrize("src, dst, message", [
    ([0, 9], [0, 1], r"src_blocks\[1\] is block 9, .*0\.\.8"),
    ([0, 1], [0, 9], r"dst_blocks\[1\] is block 9, .*0\.\.8"),
])
def test_an_index_outside_is_named(src, dst, message):
    probe = CopyProbe()
    with pytest.raises(public.LLMParamInvalidError, match=message):
        probe.copy_blocks([100, 300], 9, 10, src, dst)
    with pytest.raises(public.LLMParamInvalidError, match=message):
        probe.swap_blocks([100], src, 9, [300], dst, 9, 10)


@pytest.mark.parametrize("arguments", [
    ([0], [2**62], 2**64 - 1, [0], [0], 1, 8), ([0], [0], 1, [0], [2**62], 2**64 - 1, 8),
    ([0, 2**63 - 1], [0, 2**62], 2**64 - 1, [0, 0], [0, 1], 2, 2), ([0], [0], 1, [0], [0], 1, 0),
])
def test_nothing_wraps(arguments):
    with pytest.raises(public.LLMParamInvalidError, match=r"address space|block size"):
        CopyProbe().swap_blocks(*arguments)


slots = st.tuples(st.integers(1, 4), st.integers(1, 20))


@given(slots, slots, st.integers(0, 5), st.integers(0, 5), st.integers(0, 25), st.integers(-2, 25))
def test_copy_cache(dst_shape, src_shape, dst_slot, src_slot, offset, nbytes):
    length = src_shape[1] - offset if nbytes == -1 else nbytes
    allowed = (src_slot < src_shape[0] and dst_slot < dst_shape[0] and (nbytes == -1 or nbytes > 0)
               and offset < min(src_shape[1], dst_shape[1]) and offset + length <= min(src_shape[1], dst_shape[1]))
    arguments = ([1000, 2000], dst_shape, dst_slot, [3000, 4000], src_shape, src_slot, offset, nbytes)
    if not allowed:
        with pytest.raises(public.LLMParamInvalidError):
            CopyProbe().copy_cache(*arguments)
        return
    assert CopyProbe().copy_cache(*arguments) == [
        (dst + dst_slot * dst_shape[1] + offset, src + src_slot * src_shape[1] + offset, length)
        for dst, src in ((1000, 3000), (2000, 4000))]


@pytest.mark.parametrize("change, message", [
    ({"src_addrs": [1]}, "1 tensors and the destination 2"), ({"dst_slot": 4}, "index 4 of the destination.*size 4"),
    ({"src_slot": 3}, "index 3 of the source.*size 3"), ({"offset": 16}, "offset 16 .*stride 16 of the source"),
    ({"nbytes": 17}, "17 bytes from offset 0.*16.*32"), ({"nbytes": 0}, "size is 0"), ({"nbytes": -2}, "size is -2"),
    ({"src_shape": (2**62, 8), "src_slot": 2**61}, "address space"),
    ({"src_addrs": [1, 2**63 - 1], "src_shape": (2, 2**62)}, None),
])
def test_copy_cache_says_what_is_wrong(change, message):
    arguments = {"dst_addrs": [100, 200], "dst_shape": (4, 32), "dst_slot": 0, "src_addrs": [300, 400],
                 "src_shape": (3, 16), "src_slot": 0, "offset": 0, "nbytes": 1}
    arguments.update(change)
    if message is None:
        CopyProbe().copy_cache(**arguments)
        return
    with pytest.raises(public.LLMParamInvalidError, match=message):
        CopyProbe().copy_cache(**arguments)


def buffers(nbytes):
    src = np.random.default_rng(nbytes).integers(0, 256, nbytes, dtype=np.uint8)
    return src, np.zeros(nbytes, np.uint8)


@pytest.mark.parametrize("kind", [H2D, D2H, D2D, DEFAULT])
@pytest.mark.parametrize("nbytes, queued", [(2 * MIB - 1, False), (2 * MIB, True)])
def test_large_copies_are_queued_on_the_stream(kind, nbytes, queued):
    src, dst = buffers(2 * nbytes)
    runtime = Runtime()
    runtime.run([(dst.ctypes.data + i * nbytes, src.ctypes.data + i * nbytes, nbytes) for i in (0, 1)], kind)
    assert (src == dst).all()
    assert runtime.names() == (["async", "async", "sync"] if queued else ["copy", "copy"])
    assert all(call[1] == kind for call in runtime.calls if call[0] != "sync")


def test_host_to_host_is_never_queued():
    src, dst = buffers(3 * MIB)
    runtime = Runtime()
    runtime.run([(dst.ctypes.data, src.ctypes.data, 3 * MIB)], H2H)
    assert (src == dst).all() and runtime.names() == ["copy"]


def test_what_the_runtime_refuses_to_queue_is_copied_after_what_it_queued():
    memory = np.arange(2 * MIB, dtype=np.uint32)            # 8 MiB
    expected = memory.copy()
    half = MIB
    expected[half:] = memory[:half]
    expected[:64] = expected[half + 1000:half + 1064]       # reads what the first one writes
    runtime = Runtime(copy_code=207000, fail_at=1, only_async=True)
    base = memory.ctypes.data
    runtime.run([(base + 4 * half, base, 4 * half), (base, base + 4 * (half + 1000), 256)], DEFAULT)
    assert (memory == expected).all()
    assert runtime.names() == ["async", "async", "sync", "copy"]


def test_one_call_moves_at_most_4_gib():
    runtime = Runtime(really=False)
    runtime.run([(1 << 40, 1 << 41, (9 << 30) + 5)])
    assert [call[2] for call in runtime.calls[:-1]] == [4 << 30, 4 << 30, (1 << 30) + 5]


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 60))
def test_overlaps_behave_like_memmove(dst, src, nbytes):
    memory = np.arange(120, dtype=np.uint8)
    expected = memory.copy()
    expected[dst:dst + nbytes] = memory[src:src + nbytes].copy()
    Runtime().run([(memory.ctypes.data + dst, memory.ctypes.data + src, nbytes)])
    assert (memory == expected).all()


@pytest.mark.parametrize("shift", [4096 * 3, -4096 * 3])
def test_overlaps_on_the_stream(shift):
    memory = np.random.default_rng(1).integers(0, 256, 3 * MIB, dtype=np.uint8)
    expected = memory.copy()
    first, second = (0, shift) if shift > 0 else (-shift, 0)
    nbytes = 3 * MIB - abs(shift)
    expected[second:second + nbytes] = memory[first:first + nbytes].copy()
    runtime = Runtime()
    runtime.run([(memory.ctypes.data + second, memory.ctypes.data + first, nbytes)])
    assert (memory == expected).all() and runtime.names()[-1] == "sync"


def test_without_a_limit_the_stream_waits_forever_and_otherwise_at_least_a_millisecond():
    src, dst = buffers(2 * MIB)
    for timeout_ns, check in ((None, lambda ms: ms == -1), (5_000_000_000, lambda ms: 1000 < ms <= 5000),
                              (1, lambda ms: ms == 1), (2**62, lambda ms: ms == 2**31 - 1)):
        runtime = Runtime()
        runtime.run([(dst.ctypes.data, src.ctypes.data, 2 * MIB)], D2D, timeout_ns)
        assert check(runtime.calls[-1][1])


@pytest.mark.parametrize("abort", [True, False])
def test_a_stream_that_does_not_finish_in_time_is_aborted(abort):
    src, dst = buffers(2 * MIB)
    runtime = Runtime(sync_code=507046, abort=abort)
    with pytest.raises(public.LLMTimeoutError, match="507046") as info:
        runtime.run([(dst.ctypes.data, src.ctypes.data, 2 * MIB)], D2D, 1_000_000)
    assert info.value.provider_code == 507046
    assert runtime.names() == ["async", "sync", "abort" if abort else "sync"]     # without it, until the copy has ended


@pytest.mark.parametrize("code, error", [
    (507053, public.LLMDeviceError), (507057, public.LLMDeviceError), (1, public.LLMException)])
@pytest.mark.parametrize("nbytes", [99, 6 * MIB])
def test_a_failed_copy_ends_the_call_with_nothing_in_flight(code, error, nbytes):
    src, dst = buffers(nbytes)
    third = nbytes // 3
    runtime = Runtime(copy_code=code, fail_at=1)
    with pytest.raises(error, match=str(code)) as info:
        runtime.run([(dst.ctypes.data + i * third, src.ctypes.data + i * third, third) for i in range(3)])
    assert info.value.provider_code == code
    assert runtime.names() == (["copy", "copy"] if nbytes < MIB else ["async", "async", "sync"])
    assert runtime.queue == []


def test_many_small_copies_stop_at_the_deadline():
    src, dst = buffers(1000)
    runtime = Runtime()
    with pytest.raises(public.LLMTimeoutError, match="64 of 1000"):
        runtime.run([(dst.ctypes.data + i, src.ctypes.data + i, 1) for i in range(1000)], D2D, -1)
    assert (dst[:64] == src[:64]).all() and not dst[64:].any()
    runtime.run([(dst.ctypes.data + i, src.ctypes.data + i, 1) for i in range(1000)])
    assert (dst == src).all()


def test_nothing_to_do():
    runtime = Runtime()
    runtime.run([])
    runtime.run([(5, 5, 100), (7, 9, 0)])
    assert runtime.calls == []


@pytest.fixture
def host():
    """The embedded runtime with a current context: (probe, stream, allocate)."""
    library = ctypes.CDLL(HOST_LIBRARY)
    slots = {"memcpy": "aclrtMemcpy", "memcpy_async": "aclrtMemcpyAsync", "abort": "aclrtStreamAbort",
             "synchronize": "aclrtSynchronizeStreamWithTimeout", "acl_text": "aclGetRecentErrMsg"}
    probe = TableProbe(**{
        slot: ctypes.cast(getattr(library, name), ctypes.c_void_p).value for slot, name in slots.items()})
    stream, context, taken = ctypes.c_void_p(), ctypes.c_void_p(), []

    def allocate(nbytes):
        pointer = ctypes.c_void_p()
        assert library.aclrtMalloc(ctypes.byref(pointer), ctypes.c_size_t(nbytes), 0) == 0
        taken.append(pointer)
        return np.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(ctypes.c_uint8)), (nbytes,))

    assert library.aclrtSetDevice(0) == 0
    try:
        assert library.aclrtCreateContext(ctypes.byref(context), 0) == 0
        try:
            assert library.aclrtCreateStream(ctypes.byref(stream)) == 0
            yield probe, stream.value, allocate
        finally:
            if stream:
                library.aclrtDestroyStream(stream)
            for pointer in taken:
                library.aclrtFree(pointer)
            library.aclrtDestroyContext(context)
    finally:
        library.aclrtResetDevice(0)


@pytest.mark.parametrize("block_bytes", [4096 + 64, 3 * MIB])
@pytest.mark.parametrize("src_on_device, dst_on_device", list(itertools.product([True, False], repeat=2)))
def test_bytes_through_the_host_runtime(host, block_bytes, src_on_device, dst_on_device):
    """All placements, with the kind decided from the addresses, below and above the queueing threshold."""
    probe, stream, allocate = host
    nbytes = 4 * block_bytes
    src, dst = (allocate(nbytes) if on_device else np.empty(nbytes, np.uint8)
                for on_device in (src_on_device, dst_on_device))
    src[:], dst[:] = buffers(nbytes)
    expected = dst.copy()
    pairs = [(0, 2), (1, 3), (3, 0), (2, 0)]
    for s, d in pairs:
        expected[d * block_bytes:(d + 1) * block_bytes] = src[s * block_bytes:(s + 1) * block_bytes]
    copies = CopyProbe()
    plan = copies.swap_blocks([src.ctypes.data], [s for s, _ in pairs], 4, [dst.ctypes.data],
                              [d for _, d in pairs], 4, block_bytes)
    copies.copy(probe, stream, plan, DEFAULT, 60_000_000_000)
    assert (dst == expected).all()


def test_the_host_runtime_explains_what_it_refuses(host):
    probe, stream, allocate = host
    memory = allocate(4096)
    with pytest.raises(public.LLMException) as info:
        CopyProbe().copy(probe, stream, [(memory.ctypes.data, 0, 100)], DEFAULT)
    assert info.value.provider_code != 0 and "aclrtMemcpy" in str(info.value)
