"""Fetches that stop in the middle: whatever has begun ends once, and others are served meanwhile."""
import ctypes
import os
import signal

import pytest
import support.hixl_peer as hixl
from support.hixl_fetches import (
    CONTENT,
    MIB,
    MORE,
    SIZE,
    TOKEN,
    Raw,
    assert_poisoned,
    body_of,
    confirmation,
    fetch_by_hand,
    frame,
    next_begun,
    num_begun,
    take,
)
from support.hixl_peer import fails

# A child that is forked here calls nothing of its parent's.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

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
            assert peer.call("confirms")


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
        assert own_peer.call("confirms")
