"""Processes that come in on an engine's ports without being who they say: links in use go on, and nothing is given."""
from __future__ import annotations

import contextlib
import os
import resource
import socket
import struct

import pytest
from support.control_frames import (
    ACK,
    HELLO,
    LEASE,
    PING,
    RANGES,
    WELCOME,
    WELCOME_HEAD,
    frame,
    hello,
    read_frame,
)
from support.hixl_frames import ADMIN, DATA, Wire
from support.link_steps import addrs_of, fetch, footprint, link, links, offer, unlink, until, wait_links, withdraw
from support.peer import engine_options

from llm_datadist import LLMStatusCode

S = LLMStatusCode
OK = (S.LLM_SUCCESS, [S.LLM_SUCCESS])
NOT_CONNECTED = 103902


@pytest.fixture(scope="module")
def pair(module_peers):
    """An owner, and a reader that is linked to it: its link works throughout."""
    owner, reader = module_peers.start(1), module_peers.start(2)
    owner.call(offer)
    module_peers.link(reader, owner)
    yield owner, reader
    owner.call(withdraw)


@pytest.fixture
def owner(pair):
    """The owner; afterwards the reader's link is as good as before, and it alone is there."""
    owner, reader = pair
    assert reader.call(fetch, 1)
    yield owner
    assert owner.call(wait_links, [(2, "peer", "active")]) == [(2, "peer", "active")]
    assert reader.call(links) == [(1, "local", "active")]
    assert reader.call(fetch, 1)
    assert until(lambda: owner.stats()["pins"] == 0)


def greet(stack, owner, **fields):
    """Send one hello: the connection and the status of the answer."""
    sock = stack.enter_context(socket.create_connection(owner.address, timeout=10))
    sock.sendall(frame(HELLO, hello(**fields)))
    type_, answer = read_frame(sock)
    assert type_ == WELCOME
    return sock, WELCOME_HEAD.unpack_from(answer)[0], answer


def link_by_hand(stack, owner, **fields):
    """Both connections of a link; the one that is served, and the status of the last answer."""
    forward, status, _ = greet(stack, owner, **fields)
    if status == 0:
        reverse, status, _ = greet(stack, owner, direction=1, **fields)
        stack.callback(reverse.close)
    return forward, status


def data_port(owner):
    """Where the owner's data server listens, as any hello is told."""
    with contextlib.ExitStack() as stack:
        _, status, answer = greet(stack, owner, token=os.urandom(16), cluster=90)
        assert status == 0
        return struct.unpack_from("<I", answer, WELCOME_HEAD.size)[0]


@pytest.mark.parametrize("remote_accessible", [False, True], ids=["own caches", "remote accessible"])
@pytest.mark.parametrize("token", [bytes(16), b"not of any link "], ids=["none", "random"])
def test_the_data_port_serves_links_alone(module_peers, token, remote_accessible):
    """LIST, GET, PUT and FETCH need a session, and a session the token of a link."""
    cluster_id = 10 + remote_accessible + 2 * bool(token[0])
    server = module_peers.start(cluster_id, engine_options(remote_accessible=remote_accessible))
    with contextlib.ExitStack() as stack:
        _, status, answer = greet(stack, server, token=b"t" * 16, mode=int(remote_accessible), expected=cluster_id)
        assert status == 0
        port = struct.unpack_from("<I", answer, WELCOME_HEAD.size)[0]
        for kind in (ADMIN, DATA):
            with Wire(port) as wire:
                assert wire.hello(kind, os.urandom(16), token=token)[3] == NOT_CONNECTED
                assert wire.closed()
        with Wire(port) as wire:                            # that of a link is let in, until the link ends
            assert wire.hello(ADMIN, os.urandom(16), token=b"t" * 16)[3] == 0

    def refused():
        with Wire(port) as wire:
            return wire.hello(ADMIN, os.urandom(16), token=b"t" * 16)[3] == NOT_CONNECTED
    assert until(refused)


def test_the_token_of_a_live_link_makes_no_other(owner):
    """Nor does the end of such a connection end anything of the link."""
    with contextlib.ExitStack() as stack:
        forward, status = link_by_hand(stack, owner, token=b"mine alone      ", cluster=91)
        assert status == 0
        other, status, _ = greet(stack, owner, token=b"mine alone      ", cluster=92, instance=b"j" * 16)
        assert status < 0
        other.close()
        forward.sendall(frame(PING))
        assert read_frame(forward)[0] == ACK
        with Wire(data_port(owner)) as wire:
            assert wire.hello(ADMIN, os.urandom(16), token=b"mine alone      ")[3] == 0


def test_a_hello_that_is_said_again_is_refused(owner):
    for expected in (True, False):
        with contextlib.ExitStack() as stack:
            _, status = link_by_hand(stack, owner, token=b"said once       ", cluster=93)
            assert (status == 0) is expected
        assert owner.call(wait_links, [(2, "peer", "active")]) == [(2, "peer", "active")]


def test_another_process_under_the_name_of_a_linked_one(owner):
    """Cluster 2 is linked and lives: whoever else says it is cluster 2 is refused."""
    with contextlib.ExitStack() as stack:
        _, status = link_by_hand(stack, owner, token=os.urandom(16), cluster=2, instance=b"x" * 16)
        assert status < 0
    # Nor does it help to come as another and to turn into cluster 2 with the second connection.
    with contextlib.ExitStack() as stack:
        token = os.urandom(16)
        _, status, _ = greet(stack, owner, token=token, cluster=94, instance=b"x" * 16)
        assert status == 0
        assert greet(stack, owner, direction=1, token=token, cluster=2, instance=b"x" * 16)[1] < 0


def test_one_link_pins_so_much_and_no_more(owner, pair):
    """Leases on ranges are refused once 262144 pins are out; the end of the link ends all of them, and others go on."""
    reader = pair[1]
    (address,) = owner.call(addresses)[:1]
    ranges = bytes(8) + struct.pack("<QQ", address, 1) * 65536
    with contextlib.ExitStack() as stack:
        sock, status = link_by_hand(stack, owner, token=os.urandom(16), cluster=95)
        assert status == 0
        sock.settimeout(30)
        outcomes = []
        for _ in range(6):
            sock.sendall(frame(RANGES, ranges))
            type_, payload = read_frame(sock)
            assert type_ == LEASE
            outcomes.append(struct.unpack_from("<i", payload)[0])
        assert outcomes[:4] == [0] * 4 and max(outcomes[4:]) < 0
        assert owner.stats()["pins"] == 4 * 65536
    assert reader.call(fetch, 1)


def addresses(node):
    return addrs_of(node.kept["offer", 0])


@contextlib.contextmanager
def files_limited(number):
    """What is started meanwhile may have so many files open."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (number, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_accepted_links_leave_files_for_others(peers):
    """Whoever comes when as many links are accepted as the limit of files allows is told; links in use go on."""
    with files_limited(128):
        owner = peers.start(30)
    reader = peers.start(31)
    owner.call(offer)
    assert reader.call(link, (30, owner.address)) == OK and reader.call(fetch, 30)
    with contextlib.ExitStack() as stack:
        statuses = [link_by_hand(stack, owner, token=os.urandom(16), cluster=100 + number, expected=30)[1]
                    for number in range(30)]
        accepted = statuses.count(0)
        assert 4 <= accepted < 20 and statuses[:accepted] == [0] * accepted
        assert owner.call(footprint)["fds"] < 100
        code, _ = peers.start(32).call(link, (30, owner.address))
        assert code is S.LLM_LINK_FAILED
        assert reader.call(fetch, 30)
    assert until(lambda: owner.call(links) == [(31, "peer", "active")])
    assert reader.call(unlink, (30,)) == OK
    owner.call(withdraw)

