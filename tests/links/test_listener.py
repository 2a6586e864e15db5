"""What strangers send to the control listener: nothing they do reaches further than their own connection."""
from __future__ import annotations

import contextlib
import random
import socket
import struct

import pytest
from support.control_frames import (
    ACK,
    CHECKSUM,
    CHECKSUMS,
    DESCRIPTOR,
    HEADER,
    HELLO,
    HELLO_FRAME_BYTES,
    LEASE,
    MAGIC,
    PING,
    RANGES,
    RELEASE,
    RESOLVE,
    UNLINK,
    VERSION,
    WELCOME,
    WELCOME_FRAME_BYTES,
    WELCOME_HEAD,
    frame,
    hello,
    read_all,
    read_frame,
)
from support.link_steps import fetch, footprint, link, links, offer, unlink, until, wait_links, withdraw
from support.peer import engine_options

from llm_datadist import LLMParamInvalidError, LLMRole, LLMStatusCode

S = LLMStatusCode
OK = (S.LLM_SUCCESS, [S.LLM_SUCCESS])

MAX_HANDSHAKES = 256


@pytest.fixture(scope="module")
def pair(module_peers):
    """An owner, and a reader that is linked to it: its link works throughout."""
    owner, reader = module_peers.start(1), module_peers.start(2)
    owner.call(offer)
    module_peers.link(reader, owner)
    assert reader.call(fetch, 1)
    yield owner, reader
    owner.call(withdraw)


@pytest.fixture
def owner(pair):
    """The owner; afterwards it holds no more than before, and its link goes on as if nothing had been."""
    owner, reader = pair
    fds = owner.call(footprint)["fds"]
    yield owner
    assert until(lambda: owner.call(footprint)["fds"] == fds)
    assert owner.call(wait_links, [(2, "peer", "active")]) == [(2, "peer", "active")]
    assert owner.stats()["pins"] == 0
    assert reader.call(fetch, 1)


@contextlib.contextmanager
def connected(owner):
    with socket.create_connection(owner.address, timeout=10) as sock:
        yield sock


def rejected(owner):
    return owner.stats()["rejected_frames"]


@pytest.mark.parametrize("ip", ["0.0.0.0", "[::]", "192.0.2.1"])
def test_only_loopback_is_open_without_a_secret(peers, ip):
    """Before anything is bound: 192.0.2.1 is not even an address of this host."""
    child = peers.child()
    with pytest.raises(LLMParamInvalidError, match="LLM_DATADIST_OPEN=1"):
        child.open(1, engine_options(llm_listenIpInfo=f"{ip}:0"), LLMRole.MIX)


@pytest.mark.parametrize("extra, env", [({"llm_LinkSecret": "a-secret-for-the-port"}, {}),
                                        ({"llm_ListenOpen": "0.0.0.0"}, {}), ({}, {"LLM_DATADIST_OPEN": "1"})],
                         ids=["a secret", "the address", "open"])
def test_any_address_is_listened_at_when_it_was_said(peers, extra, env):
    owner = peers.start(1, engine_options(llm_listenIpInfo="0.0.0.0:0", **extra), env=env)
    reader = peers.start(2, engine_options(**{key: value for key, value in extra.items() if "Secret" in key}))
    assert reader.call(link, (1, ("127.0.0.1", owner.address[1]))) == OK


# ------------------------------------------------------------------------------------------------------ bad frames

RANDOM = random.Random(20260101)
FIRST_FRAMES = {
    "random bytes": RANDOM.randbytes(500),
    "zeros": bytes(4096),
    "ones": b"\xff" * 4096,
    "another protocol": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "another magic": frame(HELLO, hello(), magic=MAGIC + 1),
    "the largest length": frame(HELLO, hello(), length=2**32 - 1),
    "a length of 2**31": frame(HELLO, hello(), length=2**31),
    "one byte too many": frame(HELLO, hello() + b"x"),
    "one byte too few": frame(HELLO, hello()[:-1]),
    "no payload": frame(HELLO),
    "a request before the hello": frame(PING),
    "a lookup before the hello": frame(RESOLVE, bytes(24)),
    "an answer": frame(WELCOME, bytes(256)),
    "an unknown type": frame(99, hello()),
    "type 0": frame(0, hello()),
    "a direction that does not exist": frame(HELLO, hello(direction=9)),
    "a request for the table over a network": frame(HELLO, hello(direction=2)),
}


@pytest.mark.parametrize("name", FIRST_FRAMES)
def test_a_bad_first_frame(owner, name):
    """The connection ends without an answer, and is counted."""
    before = rejected(owner)
    with connected(owner) as sock:
        sock.sendall(FIRST_FRAMES[name])
        assert read_all(sock) == b""
    assert until(lambda: rejected(owner) == before + 1), rejected(owner) - before


@pytest.mark.parametrize("sent", [1, 15, 16, 17, 100, HELLO_FRAME_BYTES - 1])
def test_a_frame_that_is_cut_off(owner, sent):
    before = rejected(owner)
    with connected(owner) as sock:
        sock.sendall(frame(HELLO, hello())[:sent])
        sock.shutdown(socket.SHUT_WR)
        assert read_all(sock) == b""
    assert until(lambda: rejected(owner) == before + 1)


@pytest.mark.parametrize("size", [0, 320, 352, 4096])
@pytest.mark.parametrize("version", [0, VERSION - 1, VERSION + 1, 65535])
def test_another_version(owner, version, size):
    """The answer names both versions, whatever a hello of that version looks like."""
    before = rejected(owner)
    with connected(owner) as sock:
        sock.sendall(frame(HELLO, hello().ljust(size, b"x")[:size], version=version))
        answer = read_all(sock)
    status, _, cluster_id, _ = WELCOME_HEAD.unpack_from(answer, HEADER.size)
    assert status < 0 and cluster_id == 1
    assert f"version {version} is not spoken here, only {VERSION}".encode() in answer
    assert until(lambda: rejected(owner) == before + 1)


@pytest.mark.parametrize("refused", [{"expected": 9}, {"mode": 1}, {"comm": b"c" * 32}, {"direction": 1}],
                         ids=["another cluster", "another mode", "an unknown communicator", "an unknown token"])
def test_a_hello_that_is_refused(owner, refused):
    with connected(owner) as sock:
        sock.sendall(frame(HELLO, hello(**refused)))
        answer = read_all(sock)
    assert len(answer) == WELCOME_FRAME_BYTES
    assert WELCOME_HEAD.unpack_from(answer, HEADER.size)[0] < 0


@contextlib.contextmanager
def half_a_link(owner, token):
    """A connection that was welcomed, of a link whose other half never comes."""
    with connected(owner) as sock:
        sock.sendall(frame(HELLO, hello(token)))
        type_, answer = read_frame(sock)
        assert type_ == WELCOME and WELCOME_HEAD.unpack_from(answer)[0] == 0
        yield sock


LATER_FRAMES = {
    "random bytes": RANDOM.randbytes(500),
    "a second hello": frame(HELLO, hello()),
    "another magic": frame(PING, magic=1),
    "another version": frame(PING, version=VERSION + 1),
    "the largest length": frame(RESOLVE, length=2**32 - 1),
    "too many ranges": frame(RANGES, length=8 + 65537 * 16),
    "a piece of a range": frame(RANGES, bytes(8 + 24)),
    "no range": frame(RANGES, bytes(8)),
    "less than no range": frame(RANGES),
    "checksums of nothing": frame(CHECKSUM, struct.pack("<II", 1, 0)),
    "checksums of more ranges than follow": frame(CHECKSUM, struct.pack("<II", 1, 2) + bytes(16)),
    "checksums of too many ranges": frame(CHECKSUM, length=8 + 16 * 4097),
    "checksums without a lease": frame(CHECKSUM, bytes(4)),
    "checksums before the answer to others": 2 * frame(CHECKSUM, struct.pack("<II", 1, 1) + bytes(16)),
    "a lookup that is too short": frame(RESOLVE, bytes(23)),
    "a lookup that is too long": frame(RESOLVE, bytes(25)),
    "a release that is too short": frame(RELEASE, bytes(15)),
    "a probe with something in it": frame(PING, b"x"),
    "an unlink with something in it": frame(UNLINK, b"x"),
    "an answer": frame(ACK, bytes(8)),
    "an unknown type": frame(99),
}


@pytest.mark.parametrize("name", LATER_FRAMES)
def test_a_bad_later_frame(owner, name):
    before = rejected(owner)
    with half_a_link(owner, b"later frame     ") as sock:
        sock.sendall(LATER_FRAMES[name])
        assert read_all(sock) == b""
    assert until(lambda: rejected(owner) == before + 1)


def test_half_a_link_gives_access_to_nothing(owner):
    with half_a_link(owner, b"half of a link  ") as sock:
        for request, answer_type in ((frame(RESOLVE, struct.pack("<BBHIQQ", 2, 0, 0, 0, 2**64 - 1, 0)), DESCRIPTOR),
                                     (frame(RANGES, bytes(8) + struct.pack("<QQ", 4096, 4096)), LEASE),
                                     (frame(CHECKSUM, struct.pack("<IIQII", 1, 1, 4096, 8, 0)), CHECKSUMS),
                                     (frame(PING), ACK)):
            sock.sendall(request)
            type_, payload = read_frame(sock)
            assert type_ == answer_type and struct.unpack_from("<i", payload)[0] < 0
        for request in (frame(RELEASE, bytes(16)), frame(RELEASE, struct.pack("<IIII", 1, 1, 0, 1))):
            sock.sendall(request)
            assert struct.unpack_from("<i", read_frame(sock)[1])[0] < 0


def test_any_garbage(owner):
    """Whole and broken frames with bytes changed at random: each ends its own connection at most."""
    rng = random.Random(1)
    for number in range(300):
        good = frame(HELLO, hello(rng.randbytes(16))) + frame(rng.randrange(12), rng.randbytes(rng.choice((0, 16, 24))))
        bad = bytearray(good)
        for _ in range(rng.randrange(1, 6)):
            bad[rng.randrange(len(bad))] = rng.randrange(256)
        with connected(owner) as sock, contextlib.suppress(ConnectionError):
            sock.sendall(bytes(bad[:rng.randrange(1, len(bad) + 1)]))
            if number % 2:
                sock.shutdown(socket.SHUT_WR)
                read_all(sock)


def test_one_byte_at_a_time(owner):
    with connected(owner) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in frame(HELLO, hello()) + frame(PING):
            sock.sendall(bytes([byte]))
        assert read_frame(sock)[0] == WELCOME
        assert read_frame(sock)[0] == ACK


def test_many_frames_at_once(owner):
    with half_a_link(owner, b"many at once    ") as sock:
        sock.sendall(frame(PING) * 1000)
        assert {read_frame(sock)[0] for _ in range(1000)} == {ACK}


def test_one_that_asks_and_reads_nothing(owner):
    """The answers it does not read are not kept for ever."""
    before = rejected(owner)
    with half_a_link(owner, b"reads nothing   ") as sock:
        request = frame(RANGES, struct.pack("<QQ", 1, 1)) * 500
        with contextlib.suppress(ConnectionError, socket.timeout):
            for _ in range(2000):
                sock.sendall(request)
        assert until(lambda: rejected(owner) == before + 1)


# ----------------------------------------------------------------------------------------------------------- silence

def test_a_flood_of_silent_connections(pair, peers):
    """No more of them are kept than the limit, newcomers are served at once, and the silent ones end by themselves."""
    owner, reader = pair
    before = owner.call(footprint)["fds"]
    newcomer = peers.start(3)
    with contextlib.ExitStack() as stack:
        for _ in range(3 * MAX_HANDSHAKES):
            stack.enter_context(connected(owner))
        assert newcomer.call(link, (1, owner.address)) == OK
        assert newcomer.call(fetch, 1) and reader.call(fetch, 1)
        assert owner.call(footprint)["fds"] <= before + MAX_HANDSHAKES + 8
        assert newcomer.call(unlink, (1,)) == OK
        assert until(lambda: owner.call(footprint)["fds"] == before)        # though they are still open at our end
    assert owner.call(links) == [(2, "peer", "active")]


def test_a_flood_of_half_links(pair, peers):
    """The same for peers that say hello and then nothing more."""
    owner, reader = pair
    before = owner.call(footprint)["fds"]
    newcomer = peers.start(4)
    with contextlib.ExitStack() as stack:
        for number in range(MAX_HANDSHAKES + 100):
            stack.enter_context(half_a_link(owner, b"%16d" % number))
        assert newcomer.call(link, (1, owner.address)) == OK
        assert newcomer.call(fetch, 1) and reader.call(fetch, 1)
        assert owner.call(footprint)["fds"] <= before + MAX_HANDSHAKES + 8
        assert newcomer.call(unlink, (1,)) == OK
    assert until(lambda: owner.call(footprint)["fds"] == before)
    assert owner.call(links) == [(2, "peer", "active")]


def test_connections_that_come_and_go(owner):
    for _ in range(200):
        connected(owner).__enter__().close()
