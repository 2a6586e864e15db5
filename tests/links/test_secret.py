"""Links where a secret is asked for: who knows it links, nobody else does, and it is shown to nobody."""
from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import socket
import struct
import threading
import time

import pytest
from support.control_frames import (
    HEADER,
    HELLO,
    HELLO_PAYLOAD,
    PING,
    PROOF,
    VERSION,
    WELCOME,
    WELCOME_HEAD,
    frame,
    hello,
    read_all,
    read_exactly,
    read_frame,
)
from support.hixl_frames import ADMIN, Wire
from support.link_steps import fetch, link, links, offer, until, withdraw
from support.peer import engine_options

from llm_datadist import LLMStatusCode

S = LLMStatusCode
OK = (S.LLM_SUCCESS, [S.LLM_SUCCESS])
REFUSED = (S.LLM_LINK_FAILED, [S.LLM_LINK_FAILED])
NOT_CONNECTED = 103902
FIRST, SECOND, OTHER = "first-secret-of-the-two", "the-second-secret-of-two", "a-secret-that-nobody-else-has"
PROVE = 1                           # the status of a welcome that asks for a proof
PROOF_AT, HAS_SECRET = 40 + 32, 1


def key_of(secret):
    return hmac.new(secret.encode(), b"llm_datadist link key", hashlib.sha256).digest()


def proof_of(secret, *parts, label=b"llm_datadist/ask"):
    return hmac.new(key_of(secret), label + b"".join(parts), hashlib.sha256).digest()


def with_secret(*secrets, **extra):
    return engine_options(llm_LinkSecret=" ".join(secrets), **extra)


# ------------------------------------------------------------------------------------------------- whole engines

@pytest.mark.parametrize("accessible", [False, True], ids=["own caches", "remote accessible"])
@pytest.mark.parametrize("paths", ["shm", "tcp"])
def test_peers_with_the_secret_link_and_read(peers, paths, accessible):
    env = {"LLM_DATADIST_HOST_PATHS": paths}
    owner = peers.start(1, with_secret(FIRST, remote_accessible=accessible), env=env)
    reader = peers.start(2, with_secret(FIRST, remote_accessible=accessible), env=env)
    owner.call(offer)
    assert reader.call(link, (1, owner.address)) == OK
    assert reader.call(fetch, 1)
    assert owner.stats()["refused_peers"] == 0
    owner.call(withdraw)


def test_a_secret_of_the_environment_or_of_a_file(peers, tmp_path):
    file = tmp_path / "secret"
    file.write_text(FIRST + "\n", encoding="utf-8")
    owner = peers.start(1, env={"LLM_DATADIST_SECRET": FIRST})
    assert peers.start(2, env={"LLM_DATADIST_SECRET_FILE": str(file)}).call(link, (1, owner.address)) == OK
    assert peers.start(3, with_secret(FIRST), env={"LLM_DATADIST_SECRET": OTHER}).call(link, (1, owner.address)) == OK


@pytest.mark.parametrize("here, there", [((FIRST,), (OTHER,)), ((FIRST,), ()), ((), (FIRST,)),
                                         ((FIRST, SECOND), (OTHER,))],
                         ids=["another", "none there", "none here", "neither of two"])
def test_whoever_has_another_secret_or_none_is_refused(peers, here, there):
    owner = peers.start(1, with_secret(*here) if here else None)
    reader = peers.start(2, with_secret(*there) if there else None)
    assert reader.call(link, (1, owner.address)) == REFUSED
    assert owner.call(links) == reader.call(links) == []
    assert owner.stats()["refused_peers"] == 1
    # A refused peer has not spoilt anything for others.
    if here:
        assert peers.start(3, with_secret(*here)).call(link, (1, owner.address)) == OK


def test_secrets_change_one_process_after_another(peers):
    """Old and new on one side go with either on the other, whoever asks."""
    old, both, new = (peers.start(number, with_secret(*secrets)) for number, secrets in
                      enumerate([(FIRST,), (SECOND, FIRST), (SECOND,)], 1))
    assert both.call(link, (1, old.address)) == OK
    assert both.call(link, (3, new.address)) == OK
    assert old.call(link, (2, both.address)) == OK
    assert new.call(link, (2, both.address)) == OK
    assert new.call(link, (1, old.address)) == REFUSED


def logged(node, path):
    """What the owner writes to its standard error from now on lies in this file."""
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), 2)


def run_python(_node):
    """Where the interpreter's main thread gets to log."""
    for _ in range(1000):
        time.sleep(0)


def test_one_line_tells_of_many_refusals_and_no_secret(peers, tmp_path):
    path = tmp_path / "owner"
    owner = peers.start(1, with_secret(FIRST))
    owner.call(logged, str(path))
    reader = peers.start(2, with_secret(OTHER))
    assert [reader.call(link, (1, owner.address)) for _ in range(5)] == [REFUSED] * 5

    def lines():
        owner.call(run_python)
        return path.read_text(encoding="utf-8").splitlines()
    assert until(lines)
    assert [line for line in lines() if "refused a peer at 127.0.0.1" in line] == lines()[:1]
    assert "secrets of the two sides differ" in lines()[0]
    assert FIRST not in lines()[0] and OTHER not in lines()[0]
    assert owner.stats()["refused_peers"] == 5


# ----------------------------------------------------------------------------------------------- frames by hand

@pytest.fixture
def owner(peers):
    owner = peers.start(1, with_secret(FIRST, SECOND))
    yield owner
    assert owner.call(links) == []


def say(sock, **fields):
    """A hello of somebody with a secret: its payload, and that of the answer."""
    payload = bytearray(hello(**fields))
    struct.pack_into("<H", payload, 2, HAS_SECRET)
    sock.sendall(frame(HELLO, bytes(payload)))
    type_, answer = read_frame(sock)
    assert type_ == WELCOME
    return bytes(payload), answer


def status_of(answer):
    return WELCOME_HEAD.unpack_from(answer)[0]


def prove(sock, *macs):
    sock.sendall(frame(PROOF, b"".join(macs)))
    type_, answer = read_frame(sock)
    assert type_ == WELCOME
    return answer


@pytest.mark.parametrize("secret", [FIRST, SECOND])
def test_both_sides_prove(owner, secret):
    with socket.create_connection(owner.address, timeout=10) as sock:
        said, asked = say(sock, token=os.urandom(16))
        assert status_of(asked) == PROVE
        answer = prove(sock, os.urandom(32), proof_of(secret, said, asked))
        assert status_of(answer) == 0
        unsigned = answer[:PROOF_AT] + bytes(32) + answer[PROOF_AT + 32:]
        assert answer[PROOF_AT:PROOF_AT + 32] == proof_of(secret, said, asked, unsigned, label=b"llm_datadist/say")


def test_every_bit_of_what_was_said_counts(owner):
    """A proof for another hello, another answer, the other role or another secret is none."""
    for change in range(0, HELLO_PAYLOAD.size, 13):
        with socket.create_connection(owner.address, timeout=10) as sock:
            said, asked = say(sock, token=os.urandom(16))
            other = bytearray(said)
            other[change] ^= 1
            assert status_of(prove(sock, *[proof_of(FIRST, bytes(other), asked)] * 2)) < 0
            assert read_all(sock) == b""
    for wrong in (lambda said, asked: proof_of(FIRST, said, asked[:-1] + b"x"),
                  lambda said, asked: proof_of(FIRST, said, asked, label=b"llm_datadist/say"),
                  lambda said, asked: proof_of(OTHER, said, asked), lambda said, asked: bytes(32)):
        with socket.create_connection(owner.address, timeout=10) as sock:
            assert status_of(prove(sock, *[wrong(*say(sock, token=os.urandom(16)))] * 2)) < 0


def test_a_recorded_handshake_is_good_once(owner):
    token = os.urandom(16)
    with socket.create_connection(owner.address, timeout=10) as sock:
        said, asked = say(sock, token=token)
        proof = proof_of(FIRST, said, asked)
        assert status_of(prove(sock, proof, proof)) == 0
    assert until(lambda: owner.call(links) == [])
    with socket.create_connection(owner.address, timeout=10) as sock:
        again, other = say(sock, token=token)
        assert again == said and other != asked
        assert status_of(prove(sock, proof, proof)) < 0


def test_the_second_connection_proves_too(owner):
    token = os.urandom(16)
    with contextlib.ExitStack() as stack:
        forward, reverse = (stack.enter_context(socket.create_connection(owner.address, timeout=10)) for _ in range(2))
        said, asked = say(forward, token=token)
        proof = proof_of(FIRST, said, asked)
        assert status_of(prove(forward, proof, proof)) == 0
        said, asked = say(reverse, token=token, direction=1)
        assert status_of(asked) == PROVE
        assert status_of(prove(reverse, proof, proof)) < 0


@pytest.mark.parametrize("next_frame", [frame(PING), frame(HELLO, hello()), frame(PROOF, bytes(63)),
                                        frame(PROOF, bytes(64), version=VERSION + 1)],
                         ids=["a request", "a hello again", "a proof too short", "a proof of another version"])
def test_nothing_but_a_proof_follows(owner, next_frame):
    with socket.create_connection(owner.address, timeout=10) as sock:
        say(sock, token=os.urandom(16))
        sock.sendall(next_frame)
        answer = read_all(sock)                         # nothing, or a refusal
        assert not answer or status_of(answer[HEADER.size:]) < 0


def test_a_proof_without_a_hello(owner):
    with socket.create_connection(owner.address, timeout=10) as sock:
        sock.sendall(frame(PROOF, bytes(64)))
        assert read_all(sock) == b""


def test_the_data_port_knows_no_token_before_the_proof(owner):
    token = os.urandom(16)
    with socket.create_connection(owner.address, timeout=10) as sock:
        say(sock, token=token)
        port = data_port(owner)
        with Wire(port) as wire:
            assert wire.hello(ADMIN, os.urandom(16), token=token)[3] == NOT_CONNECTED


def data_port(owner):
    with socket.create_connection(owner.address, timeout=10) as sock:
        said, asked = say(sock, token=os.urandom(16), cluster=90)
        answer = prove(sock, *[proof_of(FIRST, said, asked)] * 2)
        return struct.unpack_from("<I", answer, WELCOME_HEAD.size)[0]


# ----------------------------------------------------------------------------------------- who pretends to listen

class Pretender:
    """Listens in the place of cluster 1 and gives one answer to the first hello, of which it keeps everything."""

    def __init__(self, asks):
        self._asks = asks
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = self._socket.getsockname()
        self.hello = b""
        self.heard = threading.Event()
        self.done = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _answer(self, sock, status, proof=bytes(32)):
        payload = WELCOME_HEAD.pack(status, 0, 1, b"p" * 16) + struct.pack("<II", 1, 0) + bytes(32) + proof
        request = HEADER.unpack(self._header)[4]
        sock.sendall(frame(WELCOME, payload.ljust(416, b"\0"), request=request))

    def _run(self):
        sock, _ = self._socket.accept()
        with sock, contextlib.suppress(ConnectionError, AssertionError):
            self._header = read_exactly(sock, HEADER.size)
            self.hello = read_exactly(sock, HELLO_PAYLOAD.size)
            self.heard.set()
            if self._asks:
                self._answer(sock, PROVE)
                read_exactly(sock, HEADER.size + 64)
                self.done.wait(20)
            self._answer(sock, 0, os.urandom(32))
            read_all(sock)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.done.set()
        self._thread.join()
        self._socket.close()


@pytest.mark.parametrize("asks", [True, False], ids=["asks, then guesses", "asks for nothing"])
def test_who_cannot_prove_it_is_no_peer(peers, asks):
    reader = peers.start(2, with_secret(FIRST))
    with Pretender(asks) as pretender:
        pretender.done.set()
        assert reader.call(link, (1, pretender.address)) == REFUSED
    assert reader.call(links) == []


def test_the_token_in_a_hello_opens_nothing_to_a_pretender(peers):
    """It has been told token and data port of the one who asks, and gets nowhere with them."""
    reader = peers.start(2, with_secret(FIRST))
    with Pretender(True) as pretender:
        asking = threading.Thread(target=reader.call, args=(link, (1, pretender.address)))
        asking.start()
        assert pretender.heard.wait(20)
        fields = HELLO_PAYLOAD.unpack(pretender.hello)
        token, port = fields[6], fields[8]
        with Wire(port) as wire:
            assert wire.hello(ADMIN, os.urandom(16), token=token)[3] == NOT_CONNECTED
        pretender.done.set()
        asking.join()
