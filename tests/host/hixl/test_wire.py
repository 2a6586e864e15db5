"""The server of the host provider against frames written by hand: what it refuses, and that it stays up."""
import contextlib
import ctypes
import os
import random
import socket
import time

import pytest
import support.hixl_peer as hixl
from support.hixl_frames import (
    ADMIN,
    DATA,
    DESC,
    GET,
    HELLO,
    HELLO_MAGIC,
    LIST,
    LOCAL,
    MAP,
    PUT,
    REGION,
    REPLY,
    REPLY_MAGIC,
    REQUEST,
    REQUEST_MAGIC,
    VERSION,
    WELCOME,
    Wire,
)

MIB = 1 << 20
SIZE = MIB


@pytest.fixture(scope="module")
def server():
    """A server in this process: (port, address of its region)."""
    api = hixl.Api()
    port = hixl.free_port()
    handle = api.server(port)
    buffer = ctypes.create_string_buffer(hixl.pattern(SIZE, 1), SIZE)
    api.register(handle, ctypes.addressof(buffer), SIZE, b"only")
    api.check(api.lib.HixlCSServerListen(handle, 512))
    yield port, buffer
    api.check(api.lib.HixlCSServerDestroy(handle))


@pytest.fixture
def admin(server):
    with Wire(server[0]) as wire:
        wire.client_id = os.urandom(16)
        welcome = wire.hello(ADMIN, wire.client_id)
        assert welcome[3] == hixl.SUCCESS
        wire.nonce = welcome[4]
        wire.local_name = welcome[6].rstrip(b"\0")
        wire.request(LIST)
        status, _, size, count = wire.reply()
        assert (status, count) == (hixl.SUCCESS, 1)
        wire.region = REGION.unpack_from(wire.receive(size))
        yield wire


@pytest.fixture
def data(server, admin):
    with Wire(server[0]) as wire:
        assert wire.hello(DATA, admin.client_id, admin.nonce)[3] == hixl.SUCCESS
        wire.region, wire.generation = admin.region[:2]
        yield wire


@pytest.fixture(autouse=True)
def still_serves(server):
    """After every test: the memory is as it was, and a client gets it."""
    yield
    port, buffer = server
    assert buffer.raw == hixl.pattern(SIZE, 1)
    with Wire(port) as wire:
        assert wire.hello(ADMIN, os.urandom(16))[3] == hixl.SUCCESS


def test_list_describes_the_region(server, admin):
    region, generation, address, size, backing, _, kind, tag_size, _ = admin.region
    assert (address, size, backing, kind, tag_size) == (ctypes.addressof(server[1]), SIZE, 0, 0, 4)
    assert generation != 0 and region == 0


def test_get_and_put(data):
    check_step(data)


def check_step(data):
    """Get and put on the connection: both ends are in step."""
    data.request(GET, [(data.region, data.generation, 5, 10), (data.region, data.generation, SIZE - 1, 1)], 11)
    assert data.reply()[::2] == (hixl.SUCCESS, 11)
    assert data.receive(11) == hixl.pattern(SIZE, 1)[5:15] + hixl.pattern(SIZE, 1)[-1:]
    same = hixl.pattern(SIZE, 1)[100:200]
    data.request(PUT, [(data.region, data.generation, 100, 100)], 100, data=same)
    assert data.reply() == (hixl.SUCCESS, "", 0, 0)


def test_frames_byte_by_byte(server):
    """A dribble parses like one write."""
    with Wire(server[0]) as wire:
        client_id = os.urandom(16)
        for byte in HELLO.pack(HELLO_MAGIC, VERSION, ADMIN, 0, client_id, bytes(16), bytes(16)):
            wire.send(bytes([byte]))
        nonce = WELCOME.unpack(wire.receive(WELCOME.size))[4]
        for byte in REQUEST.pack(REQUEST_MAGIC, LIST, 0, 7, 0, 0, 0):
            wire.send(bytes([byte]))
        _, _, size, _ = wire.reply()
        region = REGION.unpack_from(wire.receive(size))
        with Wire(server[0]) as data:
            data.hello(DATA, client_id, nonce)
            frame = REQUEST.pack(REQUEST_MAGIC, GET, 0, 7, 1, 3, 0) + DESC.pack(region[0], region[1], 0, 3)
            for byte in frame:
                data.send(bytes([byte]))
            assert data.reply()[0] == hixl.SUCCESS
            assert data.receive(3) == hixl.pattern(SIZE, 1)[:3]


def test_frames_in_one_write(data):
    frame = REQUEST.pack(REQUEST_MAGIC, GET, 0, 7, 1, 1, 0) + DESC.pack(data.region, data.generation, 0, 1)
    data.send(frame * 20)
    for _ in range(20):
        assert data.reply()[0] == hixl.SUCCESS
        assert data.receive(1) == hixl.pattern(SIZE, 1)[:1]


BIG = 2**64
OUTSIDE = [(SIZE, 1), (SIZE - 1, 2), (0, SIZE + 1), (BIG - 1, 1), (BIG - 1, 2), (1, BIG - 1),
           (BIG - SIZE, SIZE), (5, 0)]


@pytest.mark.parametrize("op, offset, size", [(GET, *span) for span in OUTSIDE]
                         + [(PUT, *span) for span in OUTSIDE if span[1] < 4 * MIB])  # what is refused is sent first
def test_ranges_outside_their_region(data, op, offset, size):
    total = max(min(size, BIG - 2) + 1, 2)
    data.request(op, [(data.region, data.generation, 0, 1), (data.region, data.generation, offset, size)], total,
                 data=b"\xff" * total if op == PUT else b"")
    status, text, _, _ = data.reply()
    assert status == hixl.PARAM_INVALID
    assert "descriptor 1" in text
    check_step(data)


@pytest.mark.parametrize("region, generation", [(1, 0), (65536, 0), (BIG - 1, 0), (0, 1), (0, -1)])
def test_regions_that_are_none(data, region, generation):
    generation = (data.generation + generation) % BIG
    data.request(GET, [(region, generation, 0, 1)], 1)
    status, text, _, _ = data.reply()
    assert status == hixl.PARAM_INVALID and "not registered" in text


@pytest.mark.parametrize("total", [1, 9, 11, BIG - 1])
def test_sum_that_does_not_add_up(data, total):
    data.request(GET, [(data.region, data.generation, 0, 5), (data.region, data.generation, 0, 5)], total)
    if total > 1:
        assert data.reply()[0] == hixl.PARAM_INVALID
    else:  # fewer bytes than descriptors
        assert data.closed()


@pytest.mark.parametrize("fields", [
    (0, GET, 0, 7, 1, 1, 0),
    (REQUEST_MAGIC, 9, 0, 7, 1, 1, 0),
    (REQUEST_MAGIC, LIST, 0, 7, 0, 0, 0),
    (REQUEST_MAGIC, GET, 1, 7, 1, 1, 0),
    (REQUEST_MAGIC, GET, 0, 7, 0, 0, 0),
    (REQUEST_MAGIC, GET, 0, 7, 65537, 65537, 0),
    (REQUEST_MAGIC, GET, 0, 7, 2**32 - 1, BIG - 1, 0),
    (REQUEST_MAGIC, PUT, 0, 7, 2**31, 2**63, 0),
    (REQUEST_MAGIC, GET, 0, 7, 1, 1, 1),
])
def test_malformed_data_requests_close(data, fields):
    data.send(REQUEST.pack(*fields))
    assert data.closed()


@pytest.mark.parametrize("fields", [
    (REPLY_MAGIC, LIST, 0, 7, 0, 0, 0),
    (REQUEST_MAGIC, LIST, 0, 7, 1, 0, 0),
    (REQUEST_MAGIC, LIST, 0, 7, 0, 1, 0),
    (REQUEST_MAGIC, MAP, 0, 7, 0, 0, 1),
    (REQUEST_MAGIC, GET, 0, 7, 0, 0, 0),
    (REQUEST_MAGIC, 0, 0, 7, 0, 0, 0),
])
def test_malformed_control_requests_close(admin, fields):
    admin.send(REQUEST.pack(*fields))
    assert admin.closed()


def test_declared_sizes_allocate_nothing(data, server):
    """A frame that announces much and brings nothing costs next to nothing."""
    def resident():
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGESIZE")
    before = resident()
    data.send(REQUEST.pack(REQUEST_MAGIC, PUT, 0, 7, 65536, 2**62, 0))
    time.sleep(0.1)
    assert resident() - before < MIB


@pytest.mark.parametrize("kind, client, nonce, status", [
    (DATA, "other", "right", hixl.NOT_CONNECTED),
    (DATA, "same", "wrong", hixl.NOT_CONNECTED),
    (LOCAL, "same", "right", hixl.PARAM_INVALID),
    (ADMIN, "same", "right", hixl.PARAM_INVALID),
    (9, "same", "right", hixl.PARAM_INVALID),
])
def test_hellos_that_do_not_fit(server, admin, kind, client, nonce, status):
    with Wire(server[0]) as wire:
        welcome = wire.hello(kind, admin.client_id if client == "same" else os.urandom(16),
                             admin.nonce if nonce == "right" else os.urandom(16))
        assert welcome[3] == status
        assert welcome[4] == bytes(16)  # nothing is told
        assert wire.closed()


def test_token_of_another_is_refused(server, admin):
    with Wire(server[0]) as wire:
        assert wire.hello(DATA, admin.client_id, admin.nonce, token=b"x" * 16)[3] == hixl.NOT_CONNECTED


def test_connections_of_one_client_are_limited(server, admin):
    wires = [Wire(server[0]) for _ in range(60)]
    statuses = [wire.hello(DATA, admin.client_id, admin.nonce)[3] for wire in wires]
    assert statuses[:18] == [hixl.SUCCESS] * 18
    assert statuses[-1] == hixl.RESOURCE_EXHAUSTED
    for wire in wires:
        wire.sock.close()


def test_other_versions_are_told(server):
    with Wire(server[0]) as wire:
        welcome = wire.hello(ADMIN, os.urandom(16), version=VERSION + 1)
        assert (welcome[1], welcome[3]) == (VERSION, hixl.UNSUPPORTED)
        assert wire.closed()


def test_data_connections_end_with_their_client(server, admin, data):
    admin.sock.close()
    assert data.closed()


def test_local_socket_needs_a_session(server, admin):
    with socket.socket(socket.AF_UNIX) as raw:
        raw.settimeout(10)
        raw.connect(b"\0" + admin.local_name)
        raw.sendall(HELLO.pack(HELLO_MAGIC, VERSION, LOCAL, 0, os.urandom(16), bytes(16), admin.nonce))
        assert WELCOME.unpack(raw.recv(WELCOME.size))[3] == hixl.NOT_CONNECTED
        assert raw.recv(1) == b""


def test_the_word_that_clients_may_write_is_of_no_connection(server, admin):
    """A client writes it without being asked again, perhaps when its connection has long ended."""
    words = []
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            raw = stack.enter_context(socket.socket(socket.AF_UNIX))
            raw.settimeout(10)
            raw.connect(b"\0" + admin.local_name)
            raw.sendall(HELLO.pack(HELLO_MAGIC, VERSION, LOCAL, 0, admin.client_id, bytes(16), admin.nonce))
            welcome = WELCOME.unpack(raw.recv(WELCOME.size))
            assert welcome[3] == hixl.SUCCESS
            words.append(welcome[8])
    assert words[0] == words[1] != 0


def test_map_of_an_unknown_backing(server, admin):
    with socket.socket(socket.AF_UNIX) as raw:
        raw.settimeout(10)
        raw.connect(b"\0" + admin.local_name)
        raw.sendall(HELLO.pack(HELLO_MAGIC, VERSION, LOCAL, 0, admin.client_id, bytes(16), admin.nonce))
        assert WELCOME.unpack(raw.recv(WELCOME.size))[3] == hixl.SUCCESS
        for backing in (0, 1 << 40, BIG - 1):
            raw.sendall(REQUEST.pack(REQUEST_MAGIC, MAP, 0, 7, 0, 0, backing))
            answer, descriptors, _, _ = socket.recv_fds(raw, REPLY.size, 4)
            assert REPLY.unpack(answer)[4] == hixl.PARAM_INVALID
            assert descriptors == []


def test_silent_connections_neither_stay_nor_keep_others_out(server):
    crowd = [socket.create_connection(("127.0.0.1", server[0])) for _ in range(400)]
    try:
        with Wire(server[0]) as wire:
            assert wire.hello(ADMIN, os.urandom(16))[3] == hixl.SUCCESS
        crowd[-1].settimeout(10)
        assert crowd[-1].recv(1) == b""  # two seconds of silence
    finally:
        for sock in crowd:
            sock.close()


def test_garbage(server, admin, data):
    rng = random.Random(3)
    for _ in range(300):
        with Wire(server[0]) as wire:
            wire.send(rng.randbytes(rng.randrange(1, 200)))
    for seed in range(300):
        rng.seed(seed)
        frame = bytearray(REQUEST.pack(REQUEST_MAGIC, GET, 0, 7, 1, 5, 0)
                          + DESC.pack(data.region, data.generation, 0, 5))
        frame[rng.randrange(len(frame))] ^= 1 << rng.randrange(8)
        with Wire(server[0]) as wire:
            assert wire.hello(DATA, admin.client_id, admin.nonce)[3] == hixl.SUCCESS
            wire.send(bytes(frame))
