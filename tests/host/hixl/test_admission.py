"""A restricted server: who may come in, and what the rights of a token let it do."""
import ctypes
import os

import pytest
import support.hixl_peer as hixl
from support.hixl_frames import ADMIN, DATA, LIST, LOCAL, Wire

SIZE = 1 << 20
READ, WRITE = 1, 2
GOOD, READER, UNKNOWN = bytes([1] * 16), bytes([2] * 16), bytes([3] * 16)


@pytest.fixture(scope="module")
def api():
    return hixl.Api()


@pytest.fixture(scope="module")
def server(api):
    """A server of provider memory that admits GOOD to read and write and READER to read: (handle, port, address)."""
    port = hixl.free_port()
    handle = api.server(port)
    addr = api.alloc(SIZE)
    ctypes.memmove(addr, hixl.pattern(SIZE, 1), SIZE)
    api.register(handle, addr, SIZE)
    api.check(api.lib.LddServerRestrict(handle))
    api.check(api.lib.HixlCSServerListen(handle, 16))
    admit(api, handle)
    yield handle, port, addr
    api.check(api.lib.HixlCSServerDestroy(handle))
    api.free(addr)


def admit(api, handle):
    api.check(api.lib.LddServerAdmitPeer(handle, GOOD, READ | WRITE))
    api.check(api.lib.LddServerAdmitPeer(handle, READER, READ))


def config(token):
    return b'{"ldd_token":"%s"}' % token.hex().encode()


@pytest.fixture(params=["shm", "tcp"])
def path(request, monkeypatch):
    monkeypatch.setenv("LLM_DATADIST_HOST_PATHS", request.param)
    return request.param


@pytest.mark.parametrize("token", [bytes(16), UNKNOWN, bytes(15) + b"\1", GOOD[:15] + b"\0"],
                         ids=["none", "unknown", "nearly none", "nearly good"])
@pytest.mark.parametrize("kind", [ADMIN, DATA, LOCAL])
def test_strangers_are_refused_at_their_first_frame(server, token, kind):
    with Wire(server[1]) as wire:
        welcome = wire.hello(kind, os.urandom(16), token=token)
        assert welcome[3] == hixl.NOT_CONNECTED
        assert welcome[4:] == (bytes(16), bytes(16), bytes(48), 0, 0)   # it learns nothing of the server
        assert wire.closed()


def test_a_session_of_another_token_takes_no_data_connection(server):
    with Wire(server[1]) as admin, Wire(server[1]) as data:
        client_id = os.urandom(16)
        welcome = admin.hello(ADMIN, client_id, token=GOOD)
        assert welcome[3] == hixl.SUCCESS
        assert data.hello(DATA, client_id, welcome[4], token=READER)[3] == hixl.NOT_CONNECTED
        admin.request(LIST)
        assert admin.reply()[0] == hixl.SUCCESS


def test_rights(api, server, path):
    _, port, addr = server
    buffer = ctypes.create_string_buffer(SIZE)
    local = ctypes.addressof(buffer)
    with api.client(port, config(READER)) as client:
        client.connect().get([(addr, local, SIZE)])
        assert buffer.raw == hixl.pattern(SIZE, 1)
        assert client.paths() == path
        ctypes.memmove(local, hixl.pattern(SIZE, 2), SIZE)
        with hixl.fails(hixl.FAILED) as caught:
            client.put([(addr, local, SIZE)])
        assert "may not write" in caught.value.text
    assert ctypes.string_at(addr, SIZE) == hixl.pattern(SIZE, 1)
    with api.client(port, config(GOOD)) as client:
        client.connect().put([(addr, local, SIZE)])
        assert ctypes.string_at(addr, SIZE) == hixl.pattern(SIZE, 2)
    ctypes.memmove(addr, hixl.pattern(SIZE, 1), SIZE)


def test_what_may_be_read_is_mapped_to_be_read(api, server, monkeypatch):
    monkeypatch.setenv("LLM_DATADIST_HOST_PATHS", "shm")

    def mappings():
        with open("/proc/self/maps") as maps:
            return sorted(line.split()[1] for line in maps if "memfd:llm_datadist" in line)

    before = mappings()
    with api.client(server[1], config(READER)) as client:
        client.connect()
        assert mappings() == sorted([*before, "r--s"])
    with api.client(server[1], config(GOOD)) as client:
        client.connect()
        assert mappings() == sorted([*before, "rw-s"])


def test_a_dropped_peer_is_admitted_no_more(api, server):
    handle, port, _ = server
    try:
        with api.client(port, config(GOOD)) as client:
            client.connect()
            api.check(api.lib.LddServerDropPeer(handle, GOOD))
            with api.client(port, config(GOOD)) as again, hixl.fails(hixl.NOT_CONNECTED):
                again.connect()
        with api.client(port, config(READER)) as other:
            other.connect()
    finally:
        admit(api, handle)
    with api.client(port, config(GOOD)) as client:
        client.connect()


def test_connections_of_one_token_are_limited(server):
    """However many clients it says to be; another still gets in."""
    wires = []
    try:
        for _ in range(3):
            client_id = os.urandom(16)
            wires.append(Wire(server[1]))
            welcome = wires[-1].hello(ADMIN, client_id, token=GOOD)
            while welcome[3] == hixl.SUCCESS and len(wires) < 200:
                nonce = welcome[4]
                wires.append(Wire(server[1]))
                welcome = wires[-1].hello(DATA, client_id, nonce, token=GOOD)
        assert 40 < len(wires) <= 64 + 3
        with Wire(server[1]) as wire:
            assert wire.hello(ADMIN, os.urandom(16), token=READER)[3] == hixl.SUCCESS
    finally:
        for wire in wires:
            wire.sock.close()


def test_parameters(api, server):
    handle = server[0]
    lib = api.lib
    for arguments in ((handle, None, READ), (handle, bytes(16), READ), (handle, UNKNOWN, 0), (handle, UNKNOWN, WRITE),
                      (handle, UNKNOWN, 4 | READ), (None, UNKNOWN, READ)):
        assert lib.LddServerAdmitPeer(*arguments) == hixl.PARAM_INVALID
    assert lib.LddServerRestrict(None) == hixl.PARAM_INVALID
    assert lib.LddServerRestrict(handle) == hixl.FAILED             # it listens already
