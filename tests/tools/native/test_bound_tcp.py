"""The reference transfer over plain sockets of the benchmarks."""
import os
import threading

import numpy as np
import pytest

from llm_datadist.tools.bench.native.bound_tcp import TcpClient, TcpServer

LENGTHS = [5, 300_000, 0, 64, 1 << 20, 4096, 1]


@pytest.fixture
def memory():
    """Two buffers, and descriptors of pieces of both sides; the two sides are one process here."""
    size = sum(LENGTHS) + 1000
    src = np.random.default_rng(5).integers(0, 256, size, dtype=np.uint8)
    dst = np.zeros(size, dtype=np.uint8)
    starts = np.cumsum([0] + LENGTHS[:-1]) + np.arange(len(LENGTHS)) * 3
    descs = np.stack([starts + src.ctypes.data, starts + dst.ctypes.data, LENGTHS], axis=1)
    expected = np.zeros(size, dtype=np.uint8)
    for start, length in zip(starts, LENGTHS):
        expected[start : start + length] = src[start : start + length]
    return src, dst, expected, np.ascontiguousarray(descs, dtype=np.uint64)


@pytest.mark.parametrize("put", [False, True])
@pytest.mark.parametrize("num_connections, num_threads", [(1, 1), (2, 2), (3, 2), (4, 1), (16, 3)])
def test_every_byte_moves_and_no_other(memory, num_connections, num_threads, put):
    _src, dst, expected, descs = memory
    server = TcpServer("127.0.0.1", descs)
    try:
        client = TcpClient("127.0.0.1", server.port, descs, num_connections, num_threads)
        try:
            for _ in range(3):
                dst[:] = 0
                assert client.run(put) > 0
                assert np.array_equal(dst, expected)
        finally:
            client.close()
    finally:
        server.close()


def test_nothing_is_left(memory):
    descs = memory[3]
    before = threading.active_count(), len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
    server = TcpServer("127.0.0.1", descs)
    client = TcpClient("127.0.0.1", server.port, descs, 4, 2)
    client.run()
    client.close()
    client.close()
    server.close()
    server.close()
    after = threading.active_count(), len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
    assert after == before
    with pytest.raises(ValueError):
        client.run()
    with pytest.raises(OSError):
        TcpClient("127.0.0.1", server.port, descs, 1, 1)


def test_a_server_that_closes_is_an_error(memory):
    descs = memory[3]
    server = TcpServer("127.0.0.1", descs)
    client = TcpClient("127.0.0.1", server.port, descs, 2, 1)
    server.close()
    with pytest.raises(OSError):
        client.run()
    client.close()


@pytest.mark.parametrize("connections, threads", [(0, 0), (1, 2), (65, 1), (1, 0)])
def test_bad_arguments_are_refused(memory, connections, threads):
    with pytest.raises(ValueError):
        TcpClient("127.0.0.1", 1, memory[3], connections, threads)
