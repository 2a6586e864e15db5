"""The reference copies of the benchmarks move exactly what they are told, or their ratios mean nothing."""
import errno
import subprocess
import sys

import numpy as np
import pytest

from llm_datadist.tools.bench.native.bound import CopyBound, has_stream_copy

KIB = 1024


def scattered(lengths, seed, gap=64):
    """Descriptors of these lengths between two buffers, in random order and at odd addresses, with gaps."""
    rng = np.random.default_rng(seed)
    size = sum(lengths) + gap * (len(lengths) + 1)
    src = rng.integers(0, 256, size, dtype=np.uint8)
    dst = np.full(size, 0xA5, dtype=np.uint8)
    starts = []
    for order in (rng.permutation(len(lengths)), rng.permutation(len(lengths))):
        place = np.zeros(len(lengths), dtype=np.int64)
        at = 1
        for index in order:
            place[index] = at
            at += lengths[index] + int(rng.integers(1, gap))
        starts.append(place)
    expected = dst.copy()
    for length, s, d in zip(lengths, *starts):
        expected[d : d + length] = src[s : s + length]
    descs = np.stack([starts[0] + src.ctypes.data, starts[1] + dst.ctypes.data, np.array(lengths)], axis=1)
    return src, dst, expected, np.ascontiguousarray(descs, dtype=np.uint64)


SHAPES = {
    "one byte": [1],
    "around a line": [1, 63, 64, 65, 127, 128, 129, 255, 0, 4096],
    "blocks": [16 * KIB] * 100,
    "one large": [3 * KIB * KIB + 17],
    "mixed": [1, 700 * KIB, 5, 2 * KIB * KIB + 1, 0, 64],
}


@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("kernel", ["memcpy", "stream"])
@pytest.mark.parametrize("lengths", SHAPES.values(), ids=SHAPES)
def test_every_byte_moves_and_no_other(lengths, kernel, num_threads):
    src, dst, expected, descs = scattered(lengths, seed=len(lengths))
    bound = CopyBound(descs, num_threads)
    assert bound.num_bytes == sum(lengths)
    for _ in range(3):
        dst[:] = 0xA5
        assert bound.run(kernel) >= 0
        assert np.array_equal(dst, expected)
    del src


def test_run_each_copies_all_and_times_each():
    _src, dst, expected, descs = scattered([4096] * 50, seed=1)
    took = CopyBound(descs, 1).run_each()
    assert len(took) == 50 and all(t >= 0 for t in took)
    assert np.array_equal(dst, expected)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_parts_move_on_their_own(num_threads):
    _src, dst, expected, descs = scattered([300 * KIB, 17, 0, 600 * KIB, 64, 1 * KIB], seed=9)
    bound = CopyBound(descs, num_threads, num_parts=3)
    for part in range(3):
        dst[:] = 0xA5
        bound.run("memcpy", part)
        inside = np.zeros(len(dst), dtype=bool)
        for _, start, length in descs[2 * part : 2 * part + 2].astype(np.int64):
            inside[start - dst.ctypes.data : start - dst.ctypes.data + length] = True
        assert np.array_equal(dst[inside], expected[inside])
        assert (dst[~inside] == 0xA5).all()
    with pytest.raises(ValueError):
        bound.run("memcpy", 3)
    with pytest.raises(ValueError):
        CopyBound(descs, 1, num_parts=4)


def test_nothing_to_move():
    bound = CopyBound(np.empty((0, 3), dtype=np.uint64), 2)
    assert bound.num_bytes == 0 and bound.run("memcpy") >= 0 and bound.run_each() == []


@pytest.mark.parametrize("descs, threads, error", [
    (np.zeros((2, 2), dtype=np.uint64), 1, ValueError),
    (np.zeros((2, 3), dtype=np.int32), 1, ValueError),
    (np.zeros((2, 3), dtype=np.uint64), 0, ValueError),
    (np.zeros((2, 3), dtype=np.uint64), 65, ValueError),
])
def test_bad_arguments_are_refused(descs, threads, error):
    with pytest.raises(error):
        CopyBound(descs, threads)


def test_unknown_kernel():
    with pytest.raises(KeyError):
        CopyBound(np.zeros((0, 3), dtype=np.uint64), 1).run("teleport")


def test_stream_copy_is_known_or_not():
    assert has_stream_copy() in (True, False)


# Owns a mebibyte: "w" and the content writes it, "r" sends it back, the end of the input ends it.
_OWNER = """
import ctypes, os, sys
memory = (ctypes.c_uint8 * (1 << 20))()
sys.stdout.buffer.write(b"%d %d\\n" % (os.getpid(), ctypes.addressof(memory)))
while True:
    sys.stdout.buffer.flush()
    command = sys.stdin.buffer.read(1)
    if command == b"w":
        sys.stdin.buffer.readinto(memory)
    elif command == b"r":
        sys.stdout.buffer.write(memory)
    else:
        break
"""


@pytest.fixture
def other_process():
    process = subprocess.Popen([sys.executable, "-c", _OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        pid, address = process.stdout.readline().split()
        yield process, int(pid), int(address)
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("num_threads", [1, 2])
def test_reading_and_writing_another_process(other_process, num_threads):
    process, pid, address = other_process
    content = np.random.default_rng(3).integers(0, 256, 1 << 20, dtype=np.uint8)
    local = np.zeros(1 << 20, dtype=np.uint8)
    order = np.random.default_rng(4).permutation(256).astype(np.uint64) * np.uint64(4096)
    lengths = np.full(256, 4096, dtype=np.uint64)
    process.stdin.write(b"w" + content.tobytes() + b"r")
    process.stdin.flush()
    assert process.stdout.read(1 << 20) == content.tobytes()        # so it is there before it is read

    reader = CopyBound(np.stack([address + order, local.ctypes.data + order, lengths], 1), num_threads, pid)
    try:
        reader.run("vm_read")
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOSYS):
            raise
        pytest.skip(f"this host does not read another process: {error}")
    assert np.array_equal(local, content)

    local[:] = content[::-1]
    CopyBound(np.stack([local.ctypes.data + order, address + order, lengths], 1), num_threads, pid).run("vm_write")
    process.stdin.write(b"r")
    process.stdin.flush()
    assert process.stdout.read(1 << 20) == local.tobytes()

    lost = CopyBound(np.array([[8, local.ctypes.data, 64]], dtype=np.uint64), num_threads, pid)
    with pytest.raises(OSError) as caught:
        lost.run("vm_read")
    assert caught.value.errno == errno.EFAULT
