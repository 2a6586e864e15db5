"""What tests of fetches share: a server with known bytes, a client that writes its frames by hand."""
import contextlib
import mmap
import os
import socket
import struct

import support.hixl_peer as hixl
from support.hixl_frames import ADMIN, CONFIRM, DATA, FETCH, PART, REQUEST, REQUEST_MAGIC, Wire
from support.hixl_peer import fails

KIB, MIB = 1 << 10, 1 << 20
SINGLE = 256 * KIB              # up to here one connection carries a fetch
SIZE = 16 * MIB
MORE = 4 * SIZE                 # than sockets hold: who sends it waits for the reader
PAGE = mmap.PAGESIZE
TOKEN = "00112233445566778899aabbccddeeff"
CONTENT = hixl.pattern(SIZE, 1)
BIG = 2**64
NOT_HERE = 1                    # what a server without an owner answers


@contextlib.contextmanager
def serving():
    """A server in a process of its own, with known bytes at `addr`."""
    with hixl.Peer(fetches=True) as running:
        running.addr = running.call("pool", SIZE)
        running.call("register", running.addr, SIZE)
        running.call("fill", running.addr, SIZE, 1)
        yield running


def assert_poisoned(client, local):
    with fails(hixl.FAILED):
        client.start_fetch(hixl.fetch_request([]), [(local, 1)])
    with fails(hixl.FAILED):
        client.get([(4096, local, 1)])


def next_begun(peer, since):
    """Wait until one more fetch than `since` has begun."""
    assert len(peer.call("begun", since + 1)) == since + 1


def num_begun(peer):
    return len(peer.call("begun", 0))


class Raw:
    """A client that writes its frames by hand."""

    def __init__(self, port, token=bytes(16)):
        self.port = port
        self.token = token
        self.client_id = os.urandom(16)
        self.nonce = bytes(16)
        self.wires = []
        self.admin = self.open(ADMIN)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        for wire in self.wires:
            wire.sock.close()

    def open(self, kind=DATA):
        wire = Wire(self.port)
        wire.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.wires.append(wire)
        welcome = wire.hello(kind, self.client_id, self.nonce, token=self.token)
        assert welcome[3] == hixl.SUCCESS
        self.nonce = welcome[4]
        return wire


def frame(size, body=b"", exchange=1, offset=0, total=None, part=0, num_parts=1, count=None):
    """A FETCH of one part."""
    count = len(body) if count is None else count
    return (REQUEST.pack(REQUEST_MAGIC, FETCH, 0, 7, count, size, 0)
            + PART.pack(exchange, offset, size if total is None else total, part, num_parts) + body)


def confirmation(exchange=1, sequence=7):
    return REQUEST.pack(REQUEST_MAGIC, CONFIRM, 0, sequence, 0, 0, exchange)


def take(wire, size, offset=0):
    """Receive the answer to a part, which must be right."""
    assert wire.reply() == (hixl.SUCCESS, "", size, 0)
    assert wire.receive(size) == CONTENT[offset:offset + size]


def fetch_by_hand(wire, peer, size=100, exchange=1):
    wire.send(frame(size, hixl.fetch_request([[peer.addr, size]]), exchange))
    take(wire, size)


def reset(wire):
    """Close so that the other side is told at once, and nothing that waits here is sent any more."""
    wire.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    wire.sock.close()


def body_of(peer):
    return hixl.fetch_request([[peer.addr, 100]])
