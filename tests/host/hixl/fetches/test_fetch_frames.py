"""Fetches of clients that write their frames by hand: in any order, in pieces, early, twice, and wrong."""
import contextlib
import ctypes
import os
import random
import socket
import time

import pytest
import support.hixl_peer as hixl
from support.hixl_fetches import (
    BIG,
    CONTENT,
    MIB,
    MORE,
    NOT_HERE,
    PAGE,
    SIZE,
    Raw,
    body_of,
    confirmation,
    fetch_by_hand,
    frame,
    next_begun,
    num_begun,
    reset,
    take,
)
from support.hixl_frames import ADMIN, CONFIRM, DATA, FETCH, GET, PART, REPLY_MAGIC, REQUEST, REQUEST_MAGIC, Wire


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
    assert peer.call("confirms")
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
    assert peer.call("confirms")
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
    assert peer.call("confirms")


def test_refusal_is_not_confirmed(peer, raw):
    """And its connection takes the next request at once."""
    wire = raw.open()
    for number in (5, -5):
        wire.send(frame(10, hixl.fetch_request([], refusal=number, text="go away")) * 2)
        for _ in range(2):
            assert wire.reply() == (hixl.FAILED, "go away", 0, number % BIG)
    fetch_by_hand(wire, peer)
    wire.send(confirmation())
    assert peer.call("confirms")


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
    assert peer.call("confirms")


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
        assert peer.call("confirms")
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
    assert peer.call("confirms")


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


def test_sessions_of_one_token_are_few(peer):
    """A link has one data path, and perhaps those of earlier attempts: more are turned away, until one of them ends."""
    with contextlib.ExitStack() as stack:
        token, held = os.urandom(16), []
        for _ in range(4):
            held.append(stack.enter_context(Raw(peer.port, token)))
        assert one_more_session(peer, token) == hixl.RESOURCE_EXHAUSTED
        stack.enter_context(Raw(peer.port, os.urandom(16)))
        stack.enter_context(Raw(peer.port))
        held[0].admin.sock.close()
        deadline = time.monotonic() + 15
        while one_more_session(peer, token) != hixl.SUCCESS:
            assert time.monotonic() < deadline


def one_more_session(peer, token):
    """What the server says to it."""
    wire = Wire(peer.port)
    with wire.sock:
        return wire.hello(ADMIN, os.urandom(16), bytes(16), token=token)[3]
