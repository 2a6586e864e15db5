"""Fetches as an owner and a client of the host provider see them: look-up, bytes and confirmation in one exchange."""
import ctypes
import hashlib
import random
import threading

import pytest
import support.hixl_peer as hixl
from support.hixl_fetches import (
    BIG,
    CONTENT,
    KIB,
    MIB,
    PAGE,
    SINGLE,
    SIZE,
    TOKEN,
    assert_poisoned,
    num_begun,
)
from support.hixl_peer import fails

# A child that is forked here calls nothing of its parent's.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

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
    """The order of the segments there meets the order of the places here."""
    monkeypatch.setenv("LLM_DATADIST_TCP_STREAMS", streams)
    rng = random.Random(total)
    segments = scattered(rng, cuts(rng, total, most), peer.addr)
    places = scattered(rng, cuts(rng, total, most), local)
    ctypes.memset(local, 0xEE, SIZE)
    with api.client(peer.port) as client:
        assert client.connect().fetch(hixl.fetch_request(segments), places) == (0, "")
    stream = b"".join(CONTENT[addr - peer.addr:addr - peer.addr + size] for addr, size in segments)
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
    assert peer.call("confirms")


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
def test_confirmed_without_another_call(peer, client, local, size, times):
    """When the wait returns the frame is on its way; its owner is told as it arrives, whatever anybody asks."""
    request, places = hixl.fetch_request([[peer.addr, size]]), [(local, size)]
    for _ in range(times):
        client.fetch(request, places)
        assert peer.call("confirms")


def test_confirmed_when_the_client_goes_at_once(api, peer, local):
    for size in [1, MIB] * 20:
        with api.client(peer.port) as client:
            client.connect().fetch(hixl.fetch_request([[peer.addr, size]]), [(local, size)])
        assert peer.call("confirms")
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
    """The ends of each segment are looked at before a byte is promised; the fetch fails in words, not by the bytes."""
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
    hooks = [hixl.FetchHooks.BEGIN(lambda *_: 1), hixl.FetchHooks.END(lambda *_: None)]
    whole = hixl.FetchHooks(*hooks)
    server = api.server(hixl.free_port())
    try:
        for lacking in range(2):
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
