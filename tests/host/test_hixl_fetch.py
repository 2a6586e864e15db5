"""Fetches of the host provider: look-up, bytes and confirmation in one exchange, also with a peer that plays foul."""
import contextlib
import ctypes
import hashlib
import mmap
import os
import random
import signal
import socket
import struct
import threading

import hixl_peer as hixl
import pytest
from hixl_frames import (
    ADMIN,
    CONFIRM,
    DATA,
    FETCH,
    GET,
    PART,
    REPLY_MAGIC,
    REQUEST,
    REQUEST_MAGIC,
    Wire,
)

# A child that is forked here calls nothing of its parent's.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

KIB, MIB = 1 << 10, 1 << 20
SINGLE = 256 * KIB              # up to here one connection carries a fetch
SIZE = 16 * MIB
MORE = 4 * SIZE                 # than sockets hold: who sends it waits for the reader
PAGE = mmap.PAGESIZE
TOKEN = "00112233445566778899aabbccddeeff"
CONTENT = hixl.pattern(SIZE, 1)
BIG = 2**64
NOT_HERE = 1                    # what a server without an owner answers


@pytest.fixture(scope="module")
def api():
    return hixl.Api()


@contextlib.contextmanager
def serving():
    """A server in a process of its own, with known bytes at `addr`."""
    with hixl.Peer(fetches=True) as running:
        running.addr = running.call("pool", SIZE)
        running.call("register", running.addr, SIZE)
        running.call("fill", running.addr, SIZE, 1)
        yield running


@pytest.fixture(scope="module")
def peer():
    with serving() as running:
        yield running


@pytest.fixture
def own_peer():
    """A server that the test may kill."""
    with serving() as running:
        yield running


@pytest.fixture(scope="module")
def local(api):
    addr = api.alloc(SIZE)
    yield addr
    api.free(addr)


@pytest.fixture
def client(api, peer):
    with api.client(peer.port) as connected:
        yield connected.connect()


@pytest.fixture(autouse=True)
def serves_on(api, peer, local):
    """After every test: whatever has begun has ended once, and the server answers others."""
    yield
    token = os.urandom(16).hex()
    with api.client(peer.port, b'{"ldd_token":"%s"}' % token.encode()) as client:
        ctypes.memset(local, 0, 100)
        assert client.connect().fetch(hixl.fetch_request([[peer.addr, 100]]), [(local, 100)]) == (0, "")
        assert ctypes.string_at(local, 100) == CONTENT[:100]
    ends = peer.call("ended")
    assert [len(end) for end in ends] == [1] * len(ends)
    assert [end for (whose, *_), end in zip(peer.call("begun", 0), ends) if whose == token] == [[True]]


@contextlib.contextmanager
def fails(*statuses):
    with pytest.raises(hixl.HixlError) as info:
        yield info
    assert info.value.status in statuses
    assert info.value.text


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


# ------------------------------------------------------------------------------------------------- bytes that arrive

SIZES = [1, 63, PAGE, SINGLE - 1, SINGLE, SINGLE + 1, MIB + 5, 5 * MIB]


@pytest.mark.parametrize("streams", ["1", "2", "5"])
@pytest.mark.parametrize("size", SIZES)
def test_exactly_the_bytes_arrive(api, peer, local, monkeypatch, streams, size):
    monkeypatch.setenv("LLM_DATADIST_TCP_STREAMS", streams)
    ctypes.memset(local, 0xEE, size + 128)
    with api.client(peer.port) as client:
        assert client.connect().fetch(hixl.fetch_request([[peer.addr + 7, size]]), [(local + 64, size)]) == (0, "")
    assert ctypes.string_at(local, size + 128) == b"\xee" * 64 + CONTENT[7:7 + size] + b"\xee" * 64


def cuts(rng, total, most):
    """Lengths that sum up to `total`."""
    sizes = []
    while total:
        sizes.append(min(rng.choice([1, 7, 64, 1000, PAGE, most]), total))
        total -= sizes[-1]
    return sizes


def scattered(rng, sizes, base):
    """Spans of these lengths in no order, some of them neighbours."""
    at, spans = base, []
    for size in sizes:
        spans.append((at, size))
        at += size + rng.choice([0, 0, 1, 13])
    assert at - base <= SIZE
    head = spans[:len(spans) // 3]
    rest = spans[len(spans) // 3:]
    rng.shuffle(rest)
    return head + rest


@pytest.mark.parametrize("total, most, streams", [(1000, 7, "2"), (SINGLE, 3000, "2"), (SINGLE + 1, 3000, "3"),
                                                  (3 * MIB, 9000, "2"), (8 * MIB, MIB + 1, "16")])
def test_both_sides_are_cut_differently(api, peer, local, monkeypatch, total, most, streams):
    """The order of the pieces there meets the order of the places here."""
    monkeypatch.setenv("LLM_DATADIST_TCP_STREAMS", streams)
    rng = random.Random(total)
    pieces = scattered(rng, cuts(rng, total, most), peer.addr)
    places = scattered(rng, cuts(rng, total, most), local)
    ctypes.memset(local, 0xEE, SIZE)
    with api.client(peer.port) as client:
        assert client.connect().fetch(hixl.fetch_request(pieces), places) == (0, "")
    stream = b"".join(CONTENT[addr - peer.addr:addr - peer.addr + size] for addr, size in pieces)
    expected = bytearray(b"\xee" * SIZE)
    for addr, size in places:
        expected[addr - local:addr - local + size], stream = stream[:size], stream[size:]
    assert ctypes.string_at(local, SIZE) == expected


def test_memory_that_no_region_holds(peer, client, local):
    """What a fetch reads is the business of the server's owner alone."""
    addr = peer.call("private", MIB)
    peer.call("fill", addr, MIB, 5)
    request = hixl.fetch_request([[addr, MIB - 3]], never_unmapped=0)
    assert client.fetch(request, [(local, MIB - 3)]) == (0, "")
    assert ctypes.string_at(local, MIB - 3) == hixl.pattern(MIB, 5)[:MIB - 3]


@pytest.mark.parametrize("length", [0, 4096, MIB])
def test_owner_hears_token_words_and_size(api, peer, local, length):
    request = hixl.fetch_request([[peer.addr, 50]], size=length)
    with api.client(peer.port, b'{"ldd_token":"%s"}' % TOKEN.encode()) as client:
        client.connect().fetch(request, [(local, 20), (local + 100, 30)])
    assert peer.call("begun", 0)[-1] == [TOKEN, 50, len(request), hashlib.sha256(request).hexdigest()]


def test_without_a_token_it_is_zero(peer, client, local):
    client.fetch(hixl.fetch_request([[peer.addr, 5]]), [(local, 5)])
    assert peer.call("begun", 0)[-1][0] == "00" * 16


def test_fetches_in_flight_with_gets_and_puts(peer, client, local):
    """One connection carries them in turn."""
    ctypes.memset(local, 0, SIZE)
    batches, kept = [], []
    for i in range(12):
        at, size = i * MIB, MIB if i % 2 else 5000
        if i % 3 == 1:
            batches.append(client.start([(peer.addr + at, local + at, size)]))
        elif i % 3 == 2:
            ctypes.memmove(local + at, CONTENT[at:at + size], size)
            batches.append(client.start([(peer.addr + at, local + at, size)], put=True))
        else:
            batch, reply = client.start_fetch(hixl.fetch_request([[peer.addr + at, size]]), [(local + at, size)])
            batches.append(batch)
            kept.append(reply)
    for batch in reversed(batches):
        assert client.wait(batch)[:2] == (hixl.SUCCESS, hixl.COMPLETED)
    assert [(reply.status, reply.text) for reply in kept] == [(0, b"")] * 4
    for i in range(12):
        at, size = i * MIB, MIB if i % 2 else 5000
        assert ctypes.string_at(local + at, size) == CONTENT[at:at + size]
    assert peer.call("matches", peer.addr, SIZE, 1)


def test_polling_alone_completes_a_fetch(peer, client, local):
    ctypes.memset(local, 0, SIZE)
    batch, reply = client.start_fetch(hixl.fetch_request([[peer.addr, 4 * MIB]]), [(local, 4 * MIB)])
    status = hixl.WAITING
    while status == hixl.WAITING:
        status = client.query(batch)
    assert (status, reply.status) == (hixl.COMPLETED, 0)
    assert ctypes.string_at(local, 4 * MIB) == CONTENT[:4 * MIB]
    assert peer.call("confirmed")


def test_clients_and_threads_in_parallel(api, peer, local):
    """Two threads for each of three clients, every thread into places of its own."""
    clients = [api.client(peer.port).connect() for _ in range(3)]
    failures = []

    def work(number):
        rng = random.Random(number)
        place = local + number * 2 * MIB
        try:
            for _ in range(20):
                size = rng.choice([1, 3000, SINGLE + 1, MIB])
                at = rng.randrange(SIZE - size)
                answer = clients[number // 2].fetch(hixl.fetch_request([[peer.addr + at, size]]), [(place, size)])
                if answer != (0, "") or ctypes.string_at(place, size) != CONTENT[at:at + size]:
                    failures.append((number, size, at, answer))
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for client in clients:
        client.destroy()
    assert failures == []


# --------------------------------------------------------------------------------------------------------- refusals

@pytest.mark.parametrize("size", [10, MIB])
@pytest.mark.parametrize("number, text, told", [
    (1, "no such thing", "no such thing"), (-7, "", ""), (2**31 - 1, "\u00fc %n%s", "\u00fc %n%s"),
    (-2**31, "x" * 1000, "x" * 299)])
def test_refusal_reaches_the_reply(peer, client, local, size, number, text, told):
    """The batch completes, nothing moves, and the next fetch works."""
    begun = num_begun(peer)
    ctypes.memset(local, 0xEE, size)
    for _ in range(3):
        request = hixl.fetch_request([[peer.addr, size]], refusal=number, text=text)
        assert client.fetch(request, [(local, size)]) == (number, told)
        assert ctypes.string_at(local, size) == b"\xee" * size
    assert num_begun(peer) == begun
    for _ in range(2):
        assert client.fetch(hixl.fetch_request([[peer.addr, size]]), [(local, size)]) == (0, "")
        assert ctypes.string_at(local, size) == CONTENT[:size]
    assert num_begun(peer) == begun + 2


def test_fetches_after_refused_ones_in_flight(peer, client, local):
    """Refused and answered ones alternate on the same connections, submitted at once."""
    asked = [(7 if i % 2 else 0, 2 * MIB if i % 4 < 2 else 100) for i in range(8)]
    ctypes.memset(local, 0xEE, SIZE)
    started = [client.start_fetch(hixl.fetch_request([[peer.addr + i, size]], refusal=number, text=f"{i}"),
                                  [(local + i * 2 * MIB, size)]) for i, (number, size) in enumerate(asked)]
    for i, ((batch, reply), (number, size)) in enumerate(zip(started, asked)):
        assert client.wait(batch)[:2] == (hixl.SUCCESS, hixl.COMPLETED)
        assert (reply.status, reply.text) == (number, str(i).encode() if number else b"")
        assert ctypes.string_at(local + i * 2 * MIB, size) == (b"\xee" * size if number else CONTENT[i:i + size])


# ---------------------------------------------------------------------------------------------------- confirmations

@pytest.mark.parametrize("size, times", [(1, 300), (SINGLE, 100), (SINGLE + 1, 100), (4 * MIB, 30)])
def test_confirmed_as_soon_as_the_wait_returns(peer, client, local, size, times):
    """Nobody has to wait for the client any more: the frame lies in the server's socket by then."""
    request, places = hixl.fetch_request([[peer.addr, size]]), [(local, size)]
    for _ in range(times):
        client.fetch(request, places)
        assert peer.call("confirmed")


def test_confirmed_when_the_client_goes_at_once(api, peer, local):
    for size in [1, MIB] * 20:
        with api.client(peer.port) as client:
            client.connect().fetch(hixl.fetch_request([[peer.addr, size]]), [(local, size)])
        assert peer.call("confirmed")
    assert peer.call("ended")[-40:] == [[True]] * 40


def test_confirmed_though_the_next_fetch_is_cancelled(api, peer, local):
    """The reset that ends the one does not swallow what was said about the other."""
    for _ in range(10):
        with api.client(peer.port) as client:
            client.connect().fetch(hixl.fetch_request([[peer.addr, 10]]), [(local, 10)])
            ticket = num_begun(peer)
            batch, _ = client.start_fetch(hixl.fetch_request([[peer.addr, SIZE]] * 4), [(local, SIZE)] * 4)
            client.cancel(batch)
        assert peer.call("ended")[ticket - 1] == [True]


def test_confirmed_though_the_server_stood_still(api, own_peer, local):
    """Even what is reset in the same sleep leaves the confirmation before it where it is."""
    with api.client(own_peer.port) as client:
        client.connect().fetch(hixl.fetch_request([[own_peer.addr, 10]]), [(local, 10)])
        own_peer.stop()
        batch, _ = client.start_fetch(hixl.fetch_request([[own_peer.addr, 10]]), [(local, 10)])
        assert client.wait(batch, 20_000_000)[:2] == (hixl.SUCCESS, hixl.WAITING)
        client.cancel(batch)
    own_peer.resume()
    assert own_peer.call("ended")[0] == [True]


# ------------------------------------------------------------------------------------------------ frames by hand

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


@pytest.fixture
def raw(peer):
    with Raw(peer.port) as made:
        yield made


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


@pytest.mark.parametrize("size", [1, 5 * MIB])
@pytest.mark.parametrize("goes", ["data", "admin", "reset"])
def test_never_confirmed(peer, raw, size, goes):
    wire = raw.open()
    fetch_by_hand(wire, peer, size)
    assert peer.call("confirmed") is False
    if goes == "reset":
        reset(wire)
    else:
        (raw.admin if goes == "admin" else wire).sock.close()
    assert peer.call("ended")[-1] == [False]


@pytest.mark.parametrize("size", [1, 5 * MIB])
@pytest.mark.parametrize("goes", ["data", "admin", "reset"])
def test_confirmed_and_closed_at_once(peer, size, goes):
    for _ in range(10):
        with Raw(peer.port) as raw:
            wire = raw.open()
            fetch_by_hand(wire, peer, size)
            wire.send(confirmation())
            if goes == "reset":
                reset(wire)
            else:
                (raw.admin if goes == "admin" else wire).sock.close()
        assert peer.call("ended")[-1] == [True]


def test_confirmed_and_asked_again_in_one_write(peer, raw):
    wire = raw.open()
    since = num_begun(peer)
    fetch_by_hand(wire, peer)
    for exchange in range(2, 20):
        wire.send(confirmation(exchange - 1) + frame(50, hixl.fetch_request([[peer.addr, 50]]), exchange))
        take(wire, 50)
    wire.send(confirmation(19))
    assert peer.call("confirmed")
    wire.sock.close()
    assert peer.call("ended")[since:] == [[True]] * 19


def test_confirmation_in_pieces(peer, raw):
    """Half of one says nothing yet."""
    wire = raw.open()
    fetch_by_hand(wire, peer)
    for begin, end in [(0, 1), (1, 16), (16, 31)]:
        wire.send(confirmation()[begin:end])
        assert peer.call("confirmed") is False
    wire.send(confirmation()[31:])
    assert peer.call("confirmed")
    fetch_by_hand(wire, peer, 50, exchange=2)
    wire.send(confirmation(2)[:31])
    wire.sock.close()
    assert peer.call("ended")[-2:] == [[True], [False]]


def test_early_confirmation_waits_for_the_bytes(peer, raw):
    """As long as memory may be read the owner is not told that it may go."""
    wire = raw.open()
    since = num_begun(peer)
    wire.send(frame(MORE, hixl.fetch_request([[peer.addr, SIZE]] * 4)) + confirmation())
    next_begun(peer, since)
    for _ in range(5):
        assert peer.call("confirmed") is False
    assert wire.reply() == (hixl.SUCCESS, "", MORE, 0)
    for _ in range(4):
        assert wire.receive(SIZE) == CONTENT
    wire.sock.close()
    assert peer.call("ended")[since:] == [[True]]


def test_early_confirmation_of_a_client_that_goes(peer, raw):
    """Whatever it was told, the owner hears `end` when nothing is read any more."""
    wire = raw.open()
    since = num_begun(peer)
    wire.send(frame(MORE, hixl.fetch_request([[peer.addr, SIZE]] * 4)) + confirmation())
    next_begun(peer, since)
    wire.sock.close()
    assert len(peer.call("ended")) == since + 1


@pytest.mark.parametrize("fields", [
    (REPLY_MAGIC, CONFIRM, 0, 7, 0, 0, 1), (REQUEST_MAGIC, FETCH, 0, 7, 0, 0, 1), (REQUEST_MAGIC, GET, 0, 7, 0, 0, 1),
    (REQUEST_MAGIC, CONFIRM, 1, 7, 0, 0, 1), (REQUEST_MAGIC, CONFIRM, 0, 8, 0, 0, 1),
    (REQUEST_MAGIC, CONFIRM, 0, 7, 1, 0, 1), (REQUEST_MAGIC, CONFIRM, 0, 7, 0, 1, 1),
    (REQUEST_MAGIC, CONFIRM, 0, 7, 0, 0, 2), (REQUEST_MAGIC, CONFIRM, 0, 7, 0, 0, 0),
])
@pytest.mark.parametrize("rest", [b"", confirmation()], ids=["alone", "then a good one"])
def test_malformed_confirmations_close(peer, raw, fields, rest):
    wire = raw.open()
    fetch_by_hand(wire, peer)
    wire.send(REQUEST.pack(*fields) + rest)
    assert wire.closed()
    assert peer.call("ended")[-1] == [False]


@pytest.mark.parametrize("exchange", [0, 1])
def test_confirmation_without_a_fetch_closes(peer, raw, exchange):
    wire = raw.open()
    wire.send(confirmation(exchange))
    assert wire.closed()


def test_second_confirmation_closes(peer, raw):
    wire = raw.open()
    fetch_by_hand(wire, peer)
    wire.send(confirmation() * 2)
    assert wire.closed()
    assert peer.call("ended")[-1] == [True]


def test_confirmation_on_another_connection_closes_that(peer, raw):
    wire, other = raw.open(), raw.open()
    fetch_by_hand(wire, peer)
    other.send(confirmation())
    assert other.closed()
    assert peer.call("confirmed") is False
    wire.send(confirmation())
    assert peer.call("confirmed")


def test_refusal_is_not_confirmed(peer, raw):
    """And its connection takes the next request at once."""
    wire = raw.open()
    for number in (5, -5):
        wire.send(frame(10, hixl.fetch_request([], refusal=number, text="go away")) * 2)
        for _ in range(2):
            assert wire.reply() == (hixl.FAILED, "go away", 0, number % BIG)
    fetch_by_hand(wire, peer)
    wire.send(confirmation())
    assert peer.call("confirmed")


# -------------------------------------------------------------------------------------------------------- the parts

def test_parts_in_any_order(peer, raw):
    """Three parts of different length; the last ones come first."""
    body = hixl.fetch_request([[peer.addr, 100], [peer.addr + 100, 900]])
    wires = [raw.open() for _ in range(3)]
    cut = [(0, 10), (10, 490), (500, 500)]
    for part in (2, 1, 0):
        offset, size = cut[part]
        wires[part].send(frame(size, body if part == 0 else b"", 9, offset, 1000, part, 3))
    for wire, (offset, size) in zip(wires, cut):
        take(wire, size, offset)
    assert peer.call("confirmed") is False
    wires[0].send(confirmation(9))
    assert peer.call("confirmed")


def test_refusal_of_every_part(peer, raw):
    body = hixl.fetch_request([], refusal=-4, text="none")
    first, second = raw.open(), raw.open()
    for exchange in range(1, 10):
        first.send(frame(50, body, exchange, 0, 100, 0, 2))
        second.send(frame(50, b"", exchange, 50, 100, 1, 2))
        for wire in (first, second):
            assert wire.reply() == (hixl.FAILED, "none", 0, BIG - 4)


def test_part_without_part_0_waits_alone(api, peer, raw, local):
    """It neither keeps others out nor stays when its client goes."""
    begun = num_begun(peer)
    waiting = [raw.open() for _ in range(4)]
    for part, wire in enumerate(waiting, 1):
        wire.send(frame(10, b"", 1, 10, 100, part, 5))
    with api.client(peer.port) as client:
        client.connect().fetch(hixl.fetch_request([[peer.addr, MIB]]), [(local, MIB)])
    assert num_begun(peer) == begun + 1
    raw.admin.sock.close()
    assert all(wire.closed() for wire in waiting)


def test_part_of_another_client_does_not_join(peer, raw):
    """An exchange belongs to who asked for it."""
    with Raw(peer.port) as stranger:
        theirs = stranger.open()
        theirs.send(frame(50, b"", 1, 50, 100, 1, 2))
        wire, second = raw.open(), raw.open()
        wire.send(frame(50, hixl.fetch_request([[peer.addr, 100]]), 1, 0, 100, 0, 2))
        take(wire, 50)
        wire.send(confirmation())
        assert peer.call("confirmed") is False
        second.send(frame(50, b"", 1, 50, 100, 1, 2))
        take(second, 50, 50)
        assert peer.call("confirmed")
        theirs.sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            theirs.sock.recv(1)


def test_part_0_without_the_others_is_never_confirmed(peer, raw):
    wire = raw.open()
    wire.send(frame(50, hixl.fetch_request([[peer.addr, 100]]), 1, 0, 100, 0, 2))
    take(wire, 50)
    wire.send(confirmation())
    assert peer.call("confirmed") is False
    wire.sock.close()
    assert peer.call("ended")[-1] == [False]


def test_confirmed_only_when_no_part_is_read_any_more(peer, raw):
    """The client says that it has all, and does not take the second part."""
    total = SIZE + 50
    first, second = raw.open(), raw.open()
    first.send(frame(50, hixl.fetch_request([[peer.addr, 50], [peer.addr, SIZE]]), 1, 0, total, 0, 2))
    take(first, 50)
    second.send(frame(SIZE, b"", 1, 50, total, 1, 2))
    assert second.reply() == (hixl.SUCCESS, "", SIZE, 0)
    first.send(confirmation())
    for _ in range(5):
        assert peer.call("confirmed") is False
    assert second.receive(SIZE) == CONTENT
    first.sock.close()
    assert peer.call("ended")[-1] == [True]


def test_part_0_that_goes_takes_the_others_along(peer, raw):
    first, second = raw.open(), raw.open()
    first.send(frame(50, hixl.fetch_request([[peer.addr, 50], [peer.addr, SIZE]]), 1, 0, SIZE + 50, 0, 2))
    take(first, 50)
    second.send(frame(SIZE, b"", 1, 50, SIZE + 50, 1, 2))
    assert second.reply() == (hixl.SUCCESS, "", SIZE, 0)
    first.sock.close()
    assert second.closed()
    assert peer.call("ended")[-1] == [False]


def test_same_exchange_twice_at_once(peer, raw):
    """The second is turned away, and what its owner held for it is let go."""
    since = num_begun(peer)
    wire, other = raw.open(), raw.open()
    fetch_by_hand(wire, peer)
    other.send(frame(50, hixl.fetch_request([[peer.addr, 50]])))
    assert other.closed()
    wire.send(confirmation())
    wire.sock.close()
    assert peer.call("ended")[since:] == [[True], [False]]


def test_same_exchange_again_and_from_another_client(peer, raw):
    since = num_begun(peer)
    with Raw(peer.port) as stranger:
        wires = [raw.open(), stranger.open()]
        for _ in range(3):
            for wire in wires:
                fetch_by_hand(wire, peer)
            for wire in wires:
                wire.send(confirmation())
    raw.admin.sock.close()
    assert peer.call("ended")[since:] == [[True]] * 6


def body_of(peer):
    return hixl.fetch_request([[peer.addr, 100]])


@pytest.mark.parametrize("size, fields", [
    (0, {}), (0, {"total": 100}), (100, {"total": 0}), (100, {"total": 99}), (BIG - 1, {"total": 100}),
    (100, {"offset": 1, "total": 100}), (1, {"offset": 101, "total": 100}), (1, {"offset": BIG - 1, "total": 100}),
    (100, {"offset": 100, "total": 100}), (2, {"offset": BIG - 1, "total": BIG - 1}),
    (100, {"num_parts": 0}), (100, {"part": 1, "num_parts": 1}), (100, {"part": 2**32 - 1, "num_parts": 2**32 - 1}),
    (100, {"count": 0}), (100, {"part": 1, "num_parts": 2}),
    (100, {"count": MIB + 1}), (100, {"count": 2**32 - 1}),
])
def test_parts_out_of_range_close(peer, raw, size, fields):
    """Without a word to the owner; the last two pairs say that words come where none belong, or too many."""
    begun = num_begun(peer)
    wire = raw.open()
    wire.send(frame(size, body_of(peer), **fields))
    assert wire.closed()
    assert num_begun(peer) == begun


@pytest.mark.parametrize("fields", [
    (REQUEST_MAGIC, FETCH, 1, 7, 5, 100, 0), (REQUEST_MAGIC, FETCH, 0, 7, 5, 100, 1),
    (REPLY_MAGIC, FETCH, 0, 7, 5, 100, 0), (REQUEST_MAGIC, 7, 0, 7, 5, 100, 0)])
def test_malformed_requests_close(peer, raw, fields):
    wire = raw.open()
    wire.send(REQUEST.pack(*fields) + PART.pack(1, 0, 100, 0, 1) + b"words")
    assert wire.closed()


def test_fetch_where_no_bytes_travel_closes(peer, raw):
    raw.admin.send(frame(100, body_of(peer)))
    assert raw.admin.closed()


@pytest.mark.parametrize("fields", [
    {"total": 101}, {"total": 99}, {"total": BIG - 1}, {"num_parts": 3}, {"num_parts": 2**32 - 1}])
def test_parts_that_tell_another_story_close(peer, raw, fields):
    """The fetch itself goes on with the part that fits; one more than there are has no place."""
    wire, liar, second, third = (raw.open() for _ in range(4))
    wire.send(frame(50, body_of(peer), 1, 0, 100, 0, 2))
    take(wire, 50)
    liar.send(frame(1, b"", **{"exchange": 1, "offset": 50, "total": 100, "part": 1, "num_parts": 2, **fields}))
    assert liar.closed()
    second.send(frame(50, b"", 1, 50, 100, 1, 2))
    take(second, 50, 50)
    third.send(frame(50, b"", 1, 50, 100, 1, 2))
    assert third.closed()
    wire.send(confirmation())
    assert peer.call("confirmed")


@pytest.mark.parametrize("total", [BIG - 1, 2**63, 101])
def test_more_bytes_than_the_owner_has_are_its_to_refuse(peer, raw, total):
    wire = raw.open()
    wire.send(frame(total, body_of(peer)))
    assert wire.reply()[::3] == (hixl.FAILED, 77)
    fetch_by_hand(wire, peer)


def test_words_may_be_a_mebibyte(peer, raw):
    wire = raw.open()
    wire.send(frame(100, hixl.fetch_request([[peer.addr, 100]], size=MIB)))
    take(wire, 100)


def test_many_more_parts_than_come(peer, raw):
    wire = raw.open()
    wire.send(frame(100, body_of(peer), num_parts=2**32 - 1))
    take(wire, 100)
    wire.send(confirmation())
    assert peer.call("confirmed") is False


def test_server_without_hooks(api, local):
    """Nobody is there to ask, which is an answer: the client goes on with what the server does know."""
    with hixl.Peer() as plain:
        addr = plain.call("pool", PAGE)
        plain.call("register", addr, PAGE)
        plain.call("fill", addr, PAGE, 3)
        for size in (5, MIB):
            with api.client(plain.port) as client:
                client.connect()
                ctypes.memset(local, 0xEE, size)
                for _ in range(3):
                    assert client.fetch(b"words", [(local, size)]) == (NOT_HERE, "")
                assert ctypes.string_at(local, size) == b"\xee" * size
                client.get([(addr, local, 5)])
                assert ctypes.string_at(local, 5) == hixl.pattern(5, 3)
        plain.call("destroy")


@pytest.mark.parametrize("confirmed", [False, True])
def test_hooks_that_are_withdrawn(api, own_peer, local, confirmed):
    """What has begun ends, and is known to be confirmed if it was; whoever asks later is told that nobody is there."""
    with Raw(own_peer.port) as raw:
        wire = raw.open()
        wire.send(frame(5, hixl.fetch_request([[own_peer.addr, 5]])))
        take(wire, 5)
        if confirmed:
            wire.send(confirmation())
        own_peer.call("withdraw")
        assert own_peer.call("ended") == [[confirmed]]
    for _ in range(2):
        with api.client(own_peer.port) as client:
            request = hixl.fetch_request([[own_peer.addr, 5]])
            assert client.connect().fetch(request, [(local, 5)]) == (NOT_HERE, "")
        own_peer.call("withdraw")
    assert num_begun(own_peer) == 1


def test_garbage(peer, raw):
    """A bit that flips anywhere in the head of a fetch or in its confirmation."""
    head, body = frame(100, body_of(peer))[:-len(body_of(peer))], body_of(peer)
    for seed in range(300):
        rng = random.Random(seed)
        bad = bytearray(head + confirmation())
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        with Wire(peer.port) as wire:
            assert wire.hello(DATA, raw.client_id, raw.nonce)[3] in (hixl.SUCCESS, hixl.RESOURCE_EXHAUSTED)
            with contextlib.suppress(OSError):
                wire.send(bytes(bad[:len(head)]) + body + bytes(bad[len(head):]))
                wire.sock.shutdown(socket.SHUT_WR)
            assert wire.closed()


# ------------------------------------------------------------------------------ clients that stop in the middle of it

def hold_unconfirmed(raw, peer):
    fetch_by_hand(raw.open(), peer)
    return 1


def hold_unread(raw, peer):
    raw.open().send(frame(MORE, hixl.fetch_request([[peer.addr, SIZE]] * 4)))
    return 1


def hold_unread_but_confirmed(raw, peer):
    raw.open().send(frame(MORE, hixl.fetch_request([[peer.addr, SIZE]] * 4)) + confirmation())
    return 1


def hold_half_a_confirmation(raw, peer):
    wire = raw.open()
    fetch_by_hand(wire, peer)
    wire.send(confirmation()[:16])
    return 1


def hold_half_a_head(raw, peer):
    raw.open().send(frame(100, body_of(peer))[:40])
    return 0


def hold_half_the_words(raw, peer):
    raw.open().send(frame(100, body_of(peer))[:-5])
    return 0


def hold_part_1_alone(raw, peer):
    raw.open().send(frame(50, b"", 1, 50, 100, 1, 2))
    return 0


def hold_part_0_alone(raw, peer):
    wire = raw.open()
    wire.send(frame(50, body_of(peer), 1, 0, 100, 0, 2))
    take(wire, 50)
    wire.send(confirmation())
    return 1


def hold_parts_unread(raw, peer):
    """Both halves are sent to somebody who does not take them."""
    first, second = raw.open(), raw.open()
    first.send(frame(MORE // 2, hixl.fetch_request([[peer.addr, SIZE]] * 4), 1, 0, MORE, 0, 2))
    second.send(frame(MORE // 2, b"", 1, MORE // 2, MORE, 1, 2))
    assert second.reply() == (hixl.SUCCESS, "", MORE // 2, 0)
    return 1


def hold_refusal_of_one_part(raw, peer):
    """The other part of what was refused does not come."""
    wire = raw.open()
    wire.send(frame(50, hixl.fetch_request([], refusal=3), 1, 0, 100, 0, 2))
    assert wire.reply()[::3] == (hixl.FAILED, 3)
    return 0


HOLDS = [hold_unconfirmed, hold_unread, hold_unread_but_confirmed, hold_half_a_confirmation, hold_half_a_head,
         hold_half_the_words, hold_part_1_alone, hold_part_0_alone, hold_parts_unread, hold_refusal_of_one_part]


def hold(raw, peer, how):
    """Bring the server there; it would wait a minute or more for the client."""
    since = num_begun(peer)
    expected = how(raw, peer)
    assert len(peer.call("begun", since + expected)) == since + expected


@pytest.mark.parametrize("how", HOLDS)
def test_others_are_served_meanwhile(api, peer, raw, local, how):
    hold(raw, peer, how)
    with api.client(peer.port) as client:
        client.connect()
        for size in (10, MIB):
            assert client.fetch(hixl.fetch_request([[peer.addr, size]]), [(local, size)]) == (0, "")
            assert ctypes.string_at(local, size) == CONTENT[:size]
            assert peer.call("confirmed")


@pytest.mark.parametrize("how", HOLDS)
def test_dropping_the_client(peer, how):
    """Returns when nothing is held for it any more."""
    with Raw(peer.port, bytes.fromhex(TOKEN)) as raw, Raw(peer.port) as other:
        kept = other.open()
        fetch_by_hand(kept, peer, exchange=4)
        hold(raw, peer, how)
        peer.call("drop", TOKEN)
        assert len(peer.call("held")) == 1
        assert all(wire.closed() for wire in raw.wires)
        kept.send(confirmation(4))


@pytest.mark.parametrize("how", HOLDS)
def test_destroying_the_server(own_peer, how):
    with Raw(own_peer.port) as raw:
        hold(raw, own_peer, how)
        own_peer.call("destroy")
        assert own_peer.call("held") == []
        assert all(len(end) == 1 for end in own_peer.call("ended"))
        assert all(wire.closed() for wire in raw.wires)


# ------------------------------------------------------------------------------------------------ ends in the middle

def start_more(client, peer, local):
    """Start a fetch that needs its client to go on; the client does nothing before it waits."""
    return client.start_fetch(hixl.fetch_request([[peer.addr, SIZE]] * 4), [(local, SIZE)] * 4)


def test_client_killed_under_a_fetch(api, peer, local):
    since = num_begun(peer)
    child = os.fork()
    if child == 0:
        try:
            client = api.client(peer.port).connect()
            kept = start_more(client, peer, local)
            while kept:
                signal.pause()
        finally:
            os._exit(1)
    try:
        next_begun(peer, since)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert peer.call("ended")[since:] == [[False]]


def test_server_killed_under_a_fetch(api, own_peer, local):
    with api.client(own_peer.port) as client:
        batch, _ = start_more(client.connect(), own_peer, local)
        next_begun(own_peer, 0)
        own_peer.kill()
        code, status, text = client.wait(batch)
        assert (code, status) == (hixl.NOT_CONNECTED, hixl.STATUS_FAILED)
        assert text
        assert_poisoned(client, local)


def test_server_destroyed_under_a_fetch(api, own_peer, local):
    with api.client(own_peer.port) as client:
        batch, _ = start_more(client.connect(), own_peer, local)
        next_begun(own_peer, 0)
        own_peer.call("destroy")
        assert client.wait(batch)[:2] == (hixl.NOT_CONNECTED, hixl.STATUS_FAILED)
        assert own_peer.call("ended") == [[False]]


def test_client_dropped_under_a_fetch(api, peer, local):
    since = num_begun(peer)
    with api.client(peer.port, b'{"ldd_token":"%s"}' % TOKEN.encode()) as client:
        batch, _ = start_more(client.connect(), peer, local)
        next_begun(peer, since)
        peer.call("drop", TOKEN)
        assert peer.call("held") == []
        assert client.wait(batch)[:2] == (hixl.NOT_CONNECTED, hixl.STATUS_FAILED)
    assert peer.call("ended")[since:] == [[False]]


def test_cancelled_fetch(api, peer, local):
    """Nothing lands any more, and its owner still has what was asked for."""
    since = num_begun(peer)
    with api.client(peer.port) as client:
        batch, _ = start_more(client.connect(), peer, local)
        assert client.wait(batch, 0)[:2] == (hixl.SUCCESS, hixl.WAITING)
        next_begun(peer, since)
        client.cancel(batch)
        ctypes.memset(local, 0xEE, SIZE)
        assert peer.call("ended")[since:] == [[False]]
        assert ctypes.string_at(local, SIZE) == b"\xee" * SIZE
        with fails(hixl.PARAM_INVALID):
            client.query(batch)
        assert_poisoned(client, local)


def test_client_destroyed_under_fetches(api, peer, local):
    since = num_begun(peer)
    with api.client(peer.port) as client:
        kept = [start_more(client.connect() if i == 0 else client, peer, local) for i in range(3)]
        next_begun(peer, since)
    assert len(kept) == 3
    assert peer.call("ended")[since:] == [[False]]


def test_wait_that_runs_out_keeps_the_fetch(api, own_peer, local):
    with api.client(own_peer.port) as client:
        client.connect()
        own_peer.stop()
        batch, reply = client.start_fetch(hixl.fetch_request([[own_peer.addr, MIB]]), [(local, MIB)])
        for limit_ns in (0, 30_000_000):
            assert client.wait(batch, limit_ns)[:2] == (hixl.SUCCESS, hixl.WAITING)
        own_peer.resume()
        assert client.wait(batch)[:2] == (hixl.SUCCESS, hixl.COMPLETED)
        assert reply.status == 0
        assert ctypes.string_at(local, MIB) == CONTENT[:MIB]
        assert own_peer.call("confirmed")


# ----------------------------------------------------------------------------------------- memory that is not there

HOLE = 64 * KIB


@pytest.fixture
def holed(peer):
    """Private memory of the peer, of which HOLE bytes from `holed + MIB` on may not be touched."""
    addr = peer.call("private", 4 * MIB)
    addr += -addr % PAGE
    peer.call("unmap", addr + MIB, HOLE)
    return addr


@pytest.mark.parametrize("offset, size", [(MIB, 10), (MIB - 1, 2), (MIB + HOLE - 1, 2), (MIB - 500, HOLE)])
def test_source_that_is_not_there(api, peer, local, holed, offset, size):
    """The ends of each piece are looked at before a byte is promised; the fetch fails in words, not by the bytes."""
    ctypes.memset(local, 0xEE, 100)
    with api.client(peer.port) as client:
        request = hixl.fetch_request([[peer.addr, 1], [holed + offset, size]], never_unmapped=0)
        batch, reply = client.connect().start_fetch(request, [(local, size + 1)])
        code, status, text = client.wait(batch)
        assert (code, status, reply.status) == (hixl.FAILED, hixl.STATUS_FAILED, 0)
        assert "not mapped" in text
        assert_poisoned(client, local)
    assert peer.call("ended")[-1] == [False]


def test_source_with_a_hole(api, peer, local, holed):
    """What the look at the ends cannot see breaks the connection."""
    with api.client(peer.port) as client:
        request = hixl.fetch_request([[holed, 3 * MIB]], never_unmapped=0)
        batch, _ = client.connect().start_fetch(request, [(local, 3 * MIB)])
        assert client.wait(batch)[:2] == (hixl.NOT_CONNECTED, hixl.STATUS_FAILED)
    assert peer.call("ended")[-1] == [False]


@pytest.mark.parametrize("size", [8, MIB])
def test_destination_that_is_not_there(api, peer, local, size):
    with api.client(peer.port) as client:
        batch, _ = client.connect().start_fetch(hixl.fetch_request([[peer.addr, size]]), [(0x1000, size)])
        code, status, text = client.wait(batch)
        assert (code, status) == (hixl.PARAM_INVALID, hixl.STATUS_FAILED)
        assert "not mapped" in text
        assert_poisoned(client, local)
    assert peer.call("ended")[-1] == [False]


# -------------------------------------------------------------------------------------------------------- arguments

def test_capability_is_told(api):
    assert api.lib.LddCapabilities() & 1 << 5


def test_arguments_of_a_fetch(api, peer, client, local):
    lib, handle, reply = api.lib, ctypes.c_void_p(), hixl.FetchReply()
    one = client.ops([(0, local, 1)])
    words = hixl.fetch_request([[peer.addr, 1]])
    begun = num_begun(peer)
    for arguments in [
            (None, words, len(words), 1, one, reply, handle), (0x1234, words, len(words), 1, one, reply, handle),
            (client.handle, None, 5, 1, one, reply, handle), (client.handle, words, 0, 1, one, reply, handle),
            (client.handle, words, MIB + 1, 1, one, reply, handle),
            (client.handle, words, 2**32 - 1, 1, one, reply, handle),
            (client.handle, words, len(words), 0, one, reply, handle),
            (client.handle, words, len(words), 1, None, reply, handle),
            (client.handle, words, len(words), 1, one, None, handle),
            (client.handle, words, len(words), 1, one, reply, None),
            (client.handle, words, len(words), 1, client.ops([(0, local, 0)]), reply, handle),
            (client.handle, words, len(words), 1, client.ops([(0, 0, 1)]), reply, handle),
            (client.handle, words, len(words), 2, client.ops([(0, local, 1), (0, BIG - 5, 6)]), reply, handle)]:
        assert lib.LddClientFetchAsync(*arguments) == hixl.PARAM_INVALID, arguments
        assert lib.LddLastError() != b""
    assert num_begun(peer) == begun
    remote = client.ops([(BIG - 1, local, 1)])      # which is ignored
    api.check(lib.LddClientFetchAsync(client.handle, words, len(words), 1, remote, reply, handle))
    assert client.wait(handle.value)[:2] == (hixl.SUCCESS, hixl.COMPLETED)
    with api.client(peer.port) as fresh, fails(hixl.NOT_CONNECTED):
        fresh.fetch(words, [(local, 1)])


def test_arguments_of_the_hooks(api, peer):
    hooks = [hixl.FetchHooks.BEGIN(lambda *_: 1), hixl.FetchHooks.LOOK(lambda _: None),
             hixl.FetchHooks.END(lambda *_: None)]
    whole = hixl.FetchHooks(*hooks)
    server = api.server(hixl.free_port())
    try:
        for lacking in range(3):
            part = hixl.FetchHooks(*(type(hook)(0) if i == lacking else hook for i, hook in enumerate(hooks)))
            assert api.lib.LddServerSetFetch(server, part, None) == hixl.PARAM_INVALID
            assert api.lib.LddLastError() != b""
        assert api.lib.LddServerSetFetch(None, whole, None) == hixl.PARAM_INVALID
        api.check(api.lib.LddServerSetFetch(server, whole, None))
        api.check(api.lib.HixlCSServerListen(server, 4))
        assert api.lib.LddServerSetFetch(server, whole, None) == hixl.FAILED
        assert api.lib.LddLastError() != b""
    finally:
        api.check(api.lib.HixlCSServerDestroy(server))
    assert api.lib.LddServerSetFetch(server, whole, None) == hixl.PARAM_INVALID
