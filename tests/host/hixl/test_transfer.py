"""Batches of the host provider between two processes: the bytes that arrive, on every path."""
import ctypes
import functools
import mmap
import os
import random
import threading

import pytest
import support.hixl_peer as hixl

from llm_datadist.tools import doctor

MIB = 1 << 20
PATHS = ["shm", "cma", "tcp"]


@pytest.fixture(scope="module")
def api():
    return hixl.Api()


@pytest.fixture(scope="module")
def peer():
    with hixl.Peer() as running:
        yield running


@pytest.fixture(scope="module")
def pool(peer):
    """Address of 64 MiB of provider memory in the peer, registered."""
    addr = peer.call("pool", 64 * MIB)
    peer.call("register", addr, 64 * MIB)
    peer.baseline = peer.call("counts")
    return addr


@pytest.fixture(scope="module")
def private(peer):
    """Address of 4 MiB of the peer's own memory, registered with a tag."""
    addr = peer.call("private", 4 * MIB)
    peer.call("register", addr, 4 * MIB, "own memory")
    return addr


@pytest.fixture(scope="module")
def local(api):
    addr = api.alloc(64 * MIB)
    yield addr
    api.free(addr)


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    monkeypatch.setenv("LLM_DATADIST_HOST_PATHS", request.param)
    return request.param


@pytest.fixture
def client(api, peer, pool, private, path):
    with api.client(peer.port) as connected:
        yield connected.connect()


def read(addr, size):
    return ctypes.string_at(addr, size)


@functools.cache
def attach():
    return doctor.cross_memory_attach()


def need_attach():
    if attach() != "yes":
        pytest.skip(f"cross-memory attach: {attach()}")


def test_paths_follow_the_order_asked_for(client, path):
    if path == "cma":
        need_attach()
    assert set(client.paths().split(",")) == {"shm": {"shm", "tcp"}, "cma": {"cma"}, "tcp": {"tcp"}}[path]


def test_default_maps_provider_memory_and_attaches_to_the_rest(api, peer, pool, private, monkeypatch):
    need_attach()
    monkeypatch.delenv("LLM_DATADIST_HOST_PATHS", raising=False)
    with api.client(peer.port) as client:
        assert set(client.connect().paths().split(",")) == {"shm", "cma"}


def test_remote_list_names_address_size_and_tag(client, pool, private):
    assert set(client.remote_mem()) >= {(pool, 64 * MIB, ""), (private, 4 * MIB, "own memory")}


@pytest.mark.parametrize("size", [1, 63, 4096, 65537, MIB + 5, 64 * MIB])
def test_get_and_put_move_exactly_their_bytes(client, peer, pool, local, size):
    guard = 64 if size < 64 * MIB else 0
    peer.call("fill", pool, size + guard, 1)
    ctypes.memset(local, 0xEE, size + guard)
    client.get([(pool, local, size)])
    assert read(local, size) == hixl.pattern(size, 1)
    assert read(local + size, guard) == b"\xee" * guard

    ctypes.memmove(local, hixl.pattern(size, 2), size)
    client.put([(pool, local, size)])
    assert peer.call("matches", pool, size, 2)
    tail = hixl.pattern(size + guard, 1)[size:]
    assert bytes.fromhex(peer.call("bytes_at", pool + size, guard)) == tail


def test_private_memory_on_both_sides(client, peer, private):
    buffer = ctypes.create_string_buffer(4 * MIB)
    addr = ctypes.addressof(buffer)
    peer.call("fill", private, 4 * MIB, 3)
    client.get([(private, addr, 4 * MIB)])
    assert buffer.raw == hixl.pattern(4 * MIB, 3)
    ctypes.memmove(addr, hixl.pattern(4 * MIB, 4), 4 * MIB)
    client.put([(private, addr, 4 * MIB)])
    assert peer.call("matches", private, 4 * MIB, 4)


@pytest.mark.parametrize("put", [False, True])
def test_scattered_unaligned_descriptors(client, peer, pool, private, local, put):
    """Thousands of descriptors of odd sizes, over two regions with different paths, gaps untouched."""
    rng = random.Random(5)
    spans, offset = [], 0
    while offset < 8 * MIB - 9000 and len(spans) < 3000:
        size = rng.choice([1, 7, 64, 1000, 4096, 9000])
        spans.append((offset, size))
        offset += size + rng.choice([0, 1, 13])
    remote_spans = spans[:]
    # Some pairs stay neighbours on both sides, so runs get merged; the rest are shuffled.
    head, rest = remote_spans[:200], spans[200:]
    rng.shuffle(rest)
    triples = [(pool + o, local + o, s) for o, s in head + rest]
    triples += [(private + 3 * i * 1000, local + 16 * MIB + i * 2000, 1000) for i in range(300)]
    peer.call("fill", pool, 8 * MIB, 6)
    peer.call("fill", private, 4 * MIB, 7)
    ctypes.memmove(local, hixl.pattern(32 * MIB, 8), 32 * MIB)
    before = {pool: hixl.pattern(8 * MIB, 6), private: hixl.pattern(4 * MIB, 7)}
    expected_local = bytearray(hixl.pattern(32 * MIB, 8))
    expected_remote = {base: bytearray(data) for base, data in before.items()}
    for remote, to, size in triples:
        base = pool if pool <= remote < pool + 64 * MIB else private
        here = slice(to - local, to - local + size)
        there = slice(remote - base, remote - base + size)
        if put:
            expected_remote[base][there] = expected_local[here]
        else:
            expected_local[here] = before[base][there]
    (client.put if put else client.get)(triples)
    assert read(local, 32 * MIB) == expected_local
    for base, data in expected_remote.items():
        assert bytes.fromhex(peer.call("bytes_at", base, len(data))) == data


def test_more_descriptors_than_a_frame_holds(client, peer, pool, local):
    count = 70_000
    peer.call("fill", pool, 4 * count, 9)
    ctypes.memset(local, 0, 4 * count)
    client.get([(pool + 4 * i, local + 4 * (count - 1 - i), 4) for i in range(count)])
    data = hixl.pattern(4 * count, 9)
    expected = b"".join(data[4 * i:4 * i + 4] for i in reversed(range(count)))
    assert read(local, 4 * count) == expected


def test_small_batch_has_completed_at_the_first_query(api, peer, pool, private, local, monkeypatch):
    monkeypatch.setenv("LLM_DATADIST_HOST_PATHS", "shm,cma")
    with api.client(peer.port) as client:
        client.connect()
        peer.call("fill", pool, 4096, 10)
        client.get([(pool, local, 10), (private, local, 10)])
        if "tcp" in client.paths():
            pytest.skip("the kernel copies no memory of other processes here")
        batch = client.start([(pool, local, 4096), (private, local + 4096, 10)])
        assert client.query(batch) == hixl.COMPLETED
        assert read(local, 4096) == hixl.pattern(4096, 10)
        with pytest.raises(hixl.HixlError) as info:
            client.query(batch)
        assert info.value.status == hixl.PARAM_INVALID


def test_polling_alone_completes_a_large_batch(client, peer, pool, local):
    peer.call("fill", pool, 16 * MIB, 11)
    batch = client.start([(pool, local, 16 * MIB)])
    status = hixl.WAITING
    while status == hixl.WAITING:
        status = client.query(batch)
    assert status == hixl.COMPLETED
    assert read(local, 16 * MIB) == hixl.pattern(16 * MIB, 11)


def test_batches_in_flight_together(client, peer, pool, local):
    peer.call("fill", pool, 32 * MIB, 12)
    batches = [client.start([(pool + i * 4 * MIB, local + i * 4 * MIB, 4 * MIB)]) for i in range(8)]
    for batch in reversed(batches):
        assert client.wait(batch)[:2] == (hixl.SUCCESS, hixl.COMPLETED)
    assert read(local, 32 * MIB) == hixl.pattern(32 * MIB, 12)


def test_at_most_4096_batches_unqueried(client, pool, local):
    batches = [client.start([(pool, local, 1)]) for _ in range(4096)]
    with pytest.raises(hixl.HixlError) as info:
        client.start([(pool, local, 1)])
    assert info.value.status == hixl.RESOURCE_EXHAUSTED
    assert client.wait(batches[17])[1] == hixl.COMPLETED
    batches[17] = client.start([(pool, local, 1)])
    for batch in batches:
        assert client.wait(batch)[1] == hixl.COMPLETED


def test_memory_registered_later_is_found(client, peer, local):
    addr = peer.call("pool", MIB)
    handle = peer.call("register", addr, MIB)
    peer.call("fill", addr, MIB, 13)
    client.get([(addr, local, MIB)])  # not in the list fetched at Connect
    assert read(local, MIB) == hixl.pattern(MIB, 13)
    peer.call("unregister", handle)
    peer.call("free", addr)
    assert addr not in [region[0] for region in client.remote_mem()]


def test_new_allocation_at_an_old_address(client, peer, local):
    """After a refresh the new region is read, never pages of the old one still mapped here."""
    for seed in range(20, 24):
        addr = peer.call("pool", 2 * MIB)
        handle = peer.call("register", addr, 2 * MIB)
        peer.call("fill", addr, 2 * MIB, seed)
        client.remote_mem()
        client.get([(addr, local, 2 * MIB)])
        assert read(local, 2 * MIB) == hixl.pattern(2 * MIB, seed)
        peer.call("unregister", handle)
        peer.call("free", addr)


def test_overlapping_regions(client, peer, local):
    addr = peer.call("pool", MIB)
    handles = [peer.call("register", addr, MIB), peer.call("register", addr + 4096, 4096),
               peer.call("register", addr + 8192, 10)]
    peer.call("fill", addr, MIB, 14)
    client.remote_mem()
    for offset, size in [(8192, 10), (8200, 100), (4096, 4096), (5000, 8000), (0, MIB)]:
        client.get([(addr + offset, local, size)])
        assert read(local, size) == hixl.pattern(MIB, 14)[offset:offset + size]
    for handle in handles:
        peer.call("unregister", handle)
    peer.call("free", addr)


@pytest.mark.parametrize("offset, size", [(64 * MIB, 1), (64 * MIB - 1, 2), (-1, 1), (-1, 2), (0, 2**63)])
def test_remote_range_outside_is_refused(client, pool, local, offset, size):
    with pytest.raises(hixl.HixlError) as info:
        client.get([(pool + offset, local, size)])
    assert info.value.status == hixl.PARAM_INVALID
    assert hex(pool + offset) in info.value.text
    client.get([(pool, local, 1)])  # nothing moved, nothing is poisoned


@pytest.mark.parametrize("count", [1, 40])
def test_unmapped_local_memory_is_an_error(api, peer, pool, local, count, monkeypatch):
    monkeypatch.setenv("LLM_DATADIST_HOST_PATHS", "shm")
    with api.client(peer.port) as client:
        client.connect()
        for put in (False, True):
            with pytest.raises(hixl.HixlError) as info:
                (client.put if put else client.get)([(pool, local, 8)] * (count - 1) + [(pool + 100, 0x1000, 8)])
            assert info.value.status == hixl.PARAM_INVALID
            assert "0x1000" in info.value.text
        client.get([(pool, local, 8)])


@pytest.mark.parametrize("count", [1, 40])
@pytest.mark.parametrize("path", ["shm", "cma", "tcp"])
def test_local_memory_that_may_only_be_read(api, peer, pool, path, count, monkeypatch):
    """A put takes from it, a get that would write to it is refused, and the process lives."""
    monkeypatch.setenv("LLM_DATADIST_HOST_PATHS", path)
    memory = mmap.mmap(-1, MIB, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    memory[:] = b"r" * MIB
    addr = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    protect(addr, MIB, mmap.PROT_READ)
    ops = [(pool + 32 * i, addr + 64 * i, 8) for i in range(count)]
    with api.client(peer.port) as client:
        client.connect().put(ops)           # also: what was found good to read from is not taken as good to write to
        with pytest.raises(hixl.HixlError) as info:
            client.get(ops)
        assert info.value.status in ((hixl.PARAM_INVALID,) if path == "shm" else (hixl.PARAM_INVALID, hixl.FAILED))
        if path == "shm":
            assert hex(addr) in info.value.text
            protect(addr, MIB, mmap.PROT_READ | mmap.PROT_WRITE)
            client.get(ops)                 # refused beforehand: the client is as good as before
    protect(addr, MIB, mmap.PROT_READ | mmap.PROT_WRITE)
    assert memory[:] == b"r" * MIB


def protect(addr, num_bytes, protection):
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    assert libc.mprotect(addr, num_bytes, protection) == 0


@pytest.mark.parametrize("path", ["cma", "tcp"])
def test_unmapped_local_memory_fails_the_batch(api, peer, pool, path, monkeypatch):
    monkeypatch.setenv("LLM_DATADIST_HOST_PATHS", path)
    with api.client(peer.port) as client, pytest.raises(hixl.HixlError):
        client.connect().get([(pool, 0x1000, 8)])


@pytest.mark.parametrize("path", ["cma", "tcp"])
@pytest.mark.parametrize("put", [False, True])
def test_registered_memory_that_is_not_there(api, peer, local, path, put, monkeypatch):
    """Registration touches nothing; using such a region fails the batch and leaves the server running."""
    monkeypatch.setenv("LLM_DATADIST_HOST_PATHS", path)
    handle = peer.call("register", 0x10000, MIB)
    with api.client(peer.port) as client:
        client.connect()
        with pytest.raises(hixl.HixlError) as info:
            (client.put if put else client.get)([(0x10000, local, MIB)])
        assert info.value.status == hixl.FAILED
        # Either half may be refused first where a batch is split over two connections.
        assert any(hex(address) in info.value.text for address in (0x10000, 0x10000 + MIB // 2))
    peer.call("unregister", handle)


def test_parameters_are_checked(api, peer, pool, local, client):
    lib, handle = api.lib, ctypes.c_void_p()
    ops = client.ops([(pool, local, 1)])
    cases = [
        lambda: lib.HixlCSServerCreate(None, hixl.Config(), handle),
        lambda: lib.HixlCSServerCreate(hixl.ServerDesc(ip=b"127.0.0.1", port=65536), hixl.Config(), handle),
        lambda: lib.HixlCSServerCreate(hixl.ServerDesc(ip=b"nowhere", port=1), hixl.Config(), handle),
        lambda: lib.HixlCSServerRegMem(None, None, hixl.CommMem(0, local, 1), handle),
        lambda: lib.HixlCSClientCreate(hixl.ClientDesc(ip=b"127.0.0.1", port=0), hixl.Config(), handle),
        lambda: lib.HixlCSClientCreate(hixl.ClientDesc(ip=b"127.0.0.1", port=1), None, handle),
        lambda: lib.HixlCSClientCreate(hixl.ClientDesc(ip=b"127.0.0.1", port=1),
                                       hixl.Config(text=b'{"ldd_token": "12"}'), handle),
        lambda: lib.HixlCSClientBatchGetSync(client.handle, 0, ops, 1),
        lambda: lib.HixlCSClientBatchGetSync(client.handle, 1, None, 1),
        lambda: lib.HixlCSClientBatchGetSync(client.handle, 1, client.ops([(pool, local, 0)]), 1),
        lambda: lib.HixlCSClientBatchGetAsync(client.handle, 1, ops, None),
        lambda: lib.HixlCSClientUnregMem(client.handle, 77),
        lambda: lib.LddClientCancel(client.handle, 77),
        lambda: lib.LddServerDropPeer(None, b"0" * 16),
        lambda: lib.HixlCSServerDestroy(client.handle),
        lambda: lib.HixlCSClientDestroy(0x1234),
    ]
    for case in cases:
        assert case() == hixl.PARAM_INVALID
        assert lib.LddLastError() != b""


def test_destroyed_handles_are_refused(api, peer):
    client = api.client(peer.port)
    handle = client.handle
    client.destroy()
    with api.client(peer.port):  # may well lie where the first one did
        assert api.lib.HixlCSClientConnect(handle, 100) == hixl.PARAM_INVALID
        assert api.lib.HixlCSClientDestroy(handle) == hixl.PARAM_INVALID
        assert api.lib.LddClientPaths(handle, ctypes.create_string_buffer(32), 32) == hixl.PARAM_INVALID


def test_local_registration(api, client, local):
    handle = ctypes.c_void_p()
    api.check(api.lib.HixlCSClientRegMem(client.handle, b"tag", hixl.CommMem(0, local, 10), handle))
    api.check(api.lib.HixlCSClientUnregMem(client.handle, handle))
    assert api.lib.HixlCSClientUnregMem(client.handle, handle) == hixl.PARAM_INVALID


@pytest.mark.parametrize("variable, value", [
    ("LLM_DATADIST_HOST_PATHS", "shm,rdma"), ("LLM_DATADIST_HOST_PATHS", "shm,,cma"),
    ("LLM_DATADIST_TCP_STREAMS", "0"), ("LLM_DATADIST_TCP_STREAMS", "two")])
def test_environment_is_checked(api, monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    with pytest.raises(hixl.HixlError) as info:
        api.client(1)
    assert info.value.status == hixl.PARAM_INVALID
    assert value in info.value.text


@pytest.mark.parametrize("value, expected", [("cma|shm", {"cma"}), ("tcp,shm", {"tcp"}), ("", {"shm", "cma"})])
def test_order_and_separators_of_paths(api, peer, pool, private, monkeypatch, value, expected):
    monkeypatch.setenv("LLM_DATADIST_HOST_PATHS", value)
    if "cma" in expected:
        need_attach()
    with api.client(peer.port) as client:
        assert set(client.connect().paths().split(",")) == expected


def test_threads_and_clients_in_parallel(api, peer, pool, local, path):
    """Four clients with two threads each, every thread on its own bytes."""
    peer.call("fill", pool, 16 * MIB, 15)
    ctypes.memset(local, 0, 16 * MIB)
    clients = [api.client(peer.port).connect() for _ in range(4)]
    failures = []

    def work(client, offset):
        try:
            for part in range(4):
                at = offset + part * MIB // 2
                client.get([(pool + at, local + at, MIB // 2)])
                handle = client.start([(pool + at, local + at, MIB // 2)])
                if client.wait(handle)[1] != hixl.COMPLETED:
                    failures.append(handle)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(clients[i // 2], i * 2 * MIB)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for client in clients:
        client.destroy()
    assert failures == []
    assert read(local, 16 * MIB) == hixl.pattern(16 * MIB, 15)


def test_server_and_client_in_one_process(api, local, path):
    port = hixl.free_port()
    server = api.server(port)
    source = api.alloc(MIB)
    api.register(server, source, MIB)
    api.check(api.lib.HixlCSServerListen(server, 8))
    ctypes.memmove(source, hixl.pattern(MIB, 16), MIB)
    with api.client(port) as client:
        client.connect().get([(source, local, MIB)])
    assert read(local, MIB) == hixl.pattern(MIB, 16)
    api.check(api.lib.HixlCSServerDestroy(server))
    api.free(source)


def test_nothing_is_left_behind(api, peer, pool, local, path):
    """Descriptors, threads and mappings return to what they were, on both sides."""
    def counts():
        with open("/proc/self/maps") as maps:
            mapped = sum("memfd:" in line for line in maps)
        return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd")), mapped

    with api.client(peer.port) as client:
        client.connect().get([(pool, local, 8 * MIB)])
    here, there = counts(), None
    for _ in range(3):
        with api.client(peer.port) as client:
            client.connect().get([(pool, local, 8 * MIB)])
    assert counts() == here
    for _ in range(200):  # the server notices closed connections in its own time
        there = peer.call("counts")
        if there[1] <= peer.baseline[1] and there[0] <= peer.baseline[0]:
            break
        threading.Event().wait(0.02)
    assert there == peer.baseline
