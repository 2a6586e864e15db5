"""`link_clusters` and `unlink_clusters` between real processes: every row of their tables, and both ends at once."""
from __future__ import annotations

import contextlib
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.link_steps import (
    TCP_ONLY,
    cluster,
    fetch,
    fetch_code,
    footprint,
    link,
    link_each_in_a_thread,
    link_in_threads,
    links,
    offer,
    stopped,
    unlink,
    until,
    wait_links,
    withdraw,
)
from support.peer import engine_options

from llm_datadist import LLMStatusCode
from llm_datadist.status import LLMParamInvalidError

S = LLMStatusCode
OK = (S.LLM_SUCCESS, [S.LLM_SUCCESS])


@pytest.fixture(scope="module")
def processes(module_peers):
    """A server and a client that both listen and both offer something."""
    both = module_peers.start(1), module_peers.start(2)
    for process in both:
        process.call(offer)
    yield both
    for process in both:
        process.call(withdraw)


@pytest.fixture
def raw_listener():
    """A listener of the test's own, on which nothing is answered."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as sock:
        yield sock


def unused_address():
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()


# ----------------------------------------------------------------------------------------------------------- link

def test_a_link_serves_both_directions(pair):
    server, client = pair
    assert client.call(link, (1, server.address)) == OK
    assert client.call(links) == [(1, "local", "active")]
    assert server.call(links) == [(2, "peer", "active")]
    assert client.call(fetch, 1)
    assert server.call(fetch, 2)


def test_nobody_listens(pair):
    _, client = pair
    assert client.call(link, (1, unused_address())) == (S.LLM_LINK_FAILED, [S.LLM_LINK_FAILED])
    assert client.call(links) == []


def test_a_listener_that_never_answers(pair, raw_listener):
    _, client = pair
    before = client.call(footprint)
    assert client.call(link, (1, raw_listener.getsockname()), timeout_ms=200) == (S.LLM_TIMEOUT, [S.LLM_TIMEOUT])
    assert client.call(links) == []
    assert client.call(footprint) == before


def test_a_listener_that_accepts_nobody(pair):
    _, client = pair
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
        assert client.call(link, (1, full.getsockname()), timeout_ms=200) == (S.LLM_TIMEOUT, [S.LLM_TIMEOUT])


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n" * 20, b"\0" * 272])
def test_a_listener_that_is_something_else(pair, raw_listener, answer):
    _, client = pair

    def serve():
        sock, _ = raw_listener.accept()
        with sock:
            sock.recv(4096)
            sock.sendall(answer)

    with ThreadPoolExecutor(1) as pool:
        served = pool.submit(serve)
        assert client.call(link, (1, raw_listener.getsockname())) == (S.LLM_LINK_FAILED, [S.LLM_LINK_FAILED])
        served.result()
    assert client.call(links) == []


def test_already_linked_from_this_side(pair):
    server, client = pair
    client.call(link, (1, server.address))
    assert client.call(link, (1, server.address)) == (S.LLM_ALREADY_LINK, [S.LLM_ALREADY_LINK])
    assert len(client.call(links)) == len(server.call(links)) == 1
    assert client.call(fetch, 1)


def test_linked_by_the_peer_earlier(pair):
    server, client = pair
    client.call(link, (1, server.address))
    assert server.call(link, (2, client.address)) == OK
    assert server.call(links) == [(2, "local", "active"), (2, "peer", "active")]
    assert client.call(fetch, 1) and server.call(fetch, 2)
    assert client.call(unlink, (1,)) == OK
    assert server.call(wait_links, []) == client.call(links) == []


def test_the_peer_restarted_where_links_stay_broken(peers):
    client = peers.start(2, engine_options(llm_LinkHealTime="0"), env=TCP_ONLY)
    server = peers.start(3)
    client.call(link, (3, server.address))
    server.kill()
    assert client.call(wait_links, [(3, "local", "broken")]) == [(3, "local", "broken")]

    again = peers.start(3, engine_options(llm_listenIpInfo="{}:{}".format(*server.address)))
    again.call(offer)
    assert client.call(link, (3, again.address)) == (S.LLM_ALREADY_LINK, [S.LLM_ALREADY_LINK])
    assert client.call(fetch_code, 3) is S.LLM_NOT_YET_LINK
    assert client.call(unlink, (3,), force=True) == OK
    assert client.call(link, (3, again.address)) == OK
    assert client.call(fetch, 3)
    again.call(withdraw)


def test_a_stale_link_at_the_peer_is_dropped(pair, peers):
    server, _ = pair
    client = peers.start(4)
    client.call(link, (1, server.address))
    with stopped(client):                               # so that the server cannot know that it is stale
        again = peers.start(4)
        assert again.call(link, (1, server.address)) == OK
        assert server.call(links) == [(4, "peer", "active")]
        assert again.call(fetch, 1)
    assert client.call(wait_links, [(1, "local", "broken")]) == [(1, "local", "broken")]
    assert again.call(fetch, 1)


def test_linking_again_after_a_forced_unlink(pair):
    server, client = pair
    client.call(link, (1, server.address))
    assert client.call(unlink, (1,), force=True) == OK
    assert client.call(link, (1, server.address)) == OK
    assert server.call(wait_links, [(2, "peer", "active")]) == [(2, "peer", "active")]
    assert client.call(fetch, 1) and server.call(fetch, 2)


def test_the_sides_disagree_on_remote_access(pair, peers):
    server, _ = pair
    other = peers.start(5, engine_options(remote_accessible=True))
    refused = (S.LLM_PARAM_INVALID, [S.LLM_PARAM_INVALID])
    assert other.call(link, (1, server.address)) == refused
    assert server.call(link, (5, other.address)) == refused
    assert other.call(links) == server.call(links) == []


def test_another_cluster_listens_there(pair):
    server, client = pair
    assert client.call(link, (7, server.address)) == (S.LLM_LINK_FAILED, [S.LLM_LINK_FAILED])
    assert client.call(links) == server.call(links) == []


def test_an_id_of_the_whole_range(peers):
    largest, zero = peers.start(2**64 - 1), peers.start(0)
    largest.call(offer)
    zero.call(offer)
    assert zero.call(link, (2**64 - 1, largest.address)) == OK
    assert zero.call(fetch, 2**64 - 1)
    assert largest.call(fetch, 0)
    largest.call(withdraw)
    zero.call(withdraw)


def link_infos(node, infos):
    return node.dist.link_clusters(infos, 1000)


@pytest.mark.parametrize("num_local, num_remote", [(1, 0), (1, 2), (2, 1)])
def test_exactly_one_address_of_each_side(pair, num_local, num_remote):
    server, client = pair
    info = cluster(1, *[server.address] * num_remote, local=[("127.0.0.1", 0)] * num_local)
    assert client.call(link_infos, [info]) == (S.LLM_PARAM_INVALID, [S.LLM_PARAM_INVALID])
    assert client.call(links) == []


def test_no_local_address(pair):
    server, client = pair
    with pytest.raises(LLMParamInvalidError, match="local_ip_info_list"):
        client.call(link_infos, [cluster(1, server.address, local=[])])


def test_no_local_address_with_a_network_identity(peers):
    pair = [peers.start(cluster_id, engine_options(llm_LocalCommRes='{"version": "1.3"}')) for cluster_id in (1, 2)]
    assert pair[1].call(link_infos, [cluster(1, pair[0].address, local=[])]) == OK


def test_an_empty_list(pair):
    assert pair[1].call(link) == (S.LLM_PARAM_INVALID, [])
    assert pair[1].call(unlink) == (S.LLM_PARAM_INVALID, [])


def test_the_second_mention_in_one_list(pair):
    server, client = pair
    assert client.call(link, (1, server.address), (1, server.address)) \
        == (S.LLM_ALREADY_LINK, [S.LLM_SUCCESS, S.LLM_ALREADY_LINK])
    assert len(client.call(links)) == 1
    assert client.call(unlink, (1,), (1,)) == (S.LLM_SUCCESS, [S.LLM_SUCCESS] * 2)


def test_the_overall_code_is_the_last_failure_of_the_list(pair):
    server, client = pair
    nobody = unused_address()
    client.call(link, (1, server.address))
    assert client.call(link, (8, nobody), (1, server.address), (2, client.address)) \
        == (S.LLM_ALREADY_LINK, [S.LLM_LINK_FAILED, S.LLM_ALREADY_LINK, S.LLM_SUCCESS])
    assert client.call(link, (1, server.address), (8, nobody)) \
        == (S.LLM_LINK_FAILED, [S.LLM_ALREADY_LINK, S.LLM_LINK_FAILED])


# ------------------------------------------------------------------------------------------------------ many links

def accept_together(listener, count):
    """Accept so many connections before any is answered; how many came."""
    listener.settimeout(10)
    with contextlib.ExitStack() as stack:
        for accepted in range(count):
            try:
                stack.enter_context(listener.accept()[0])
            except socket.timeout:
                return accepted
    return count


def test_sixteen_clusters_of_one_call_at_once(pair, raw_listener):
    _, client = pair
    targets = [(100 + i, raw_listener.getsockname()) for i in range(16)]
    with ThreadPoolExecutor(1) as pool:
        accepted = pool.submit(accept_together, raw_listener, 16)
        assert client.call(link, *targets) == (S.LLM_LINK_FAILED, [S.LLM_LINK_FAILED] * 16)
        assert accepted.result() == 16


def test_sixteen_calls_at_once(pair, raw_listener):
    _, client = pair
    targets = [(100 + i, raw_listener.getsockname()) for i in range(16)]
    with ThreadPoolExecutor(1) as pool:
        accepted = pool.submit(accept_together, raw_listener, 16)
        assert client.call(link_each_in_a_thread, targets) == [S.LLM_LINK_FAILED] * 16
        assert accepted.result() == 16


def test_everybody_links_to_everybody_at_once(pair, peers):
    members = [*pair, peers.start(3)]
    members[2].call(offer)
    wishes = [member.begin(link_each_in_a_thread, [(other.cluster_id, other.address) for other in members
                                                   if other is not member]) for member in members]
    assert [wish() for wish in wishes] == [[S.LLM_SUCCESS] * 2] * 3
    for member in members:
        assert len(member.call(links)) == 4
        assert all(member.call(fetch, other.cluster_id) for other in members if other is not member)
    members[2].call(withdraw)


@pytest.mark.parametrize("attempt", range(5))
def test_32_threads_link_to_the_same_peer(pair, attempt):
    server, client = pair
    codes = client.call(link_in_threads, (1, server.address), 32)
    assert sorted(codes) == [S.LLM_SUCCESS] + [S.LLM_ALREADY_LINK] * 31
    assert client.call(links) == [(1, "local", "active")]
    assert server.call(wait_links, [(2, "peer", "active")]) == [(2, "peer", "active")]
    assert client.call(fetch, 1)
    assert server.call(fetch, 2)


def test_both_ends_link_and_unlink_at_the_same_time(pair):
    server, client = pair
    for round_number in range(15):
        wishes = server.begin(link, (2, client.address)), client.begin(link, (1, server.address))
        assert [wish() for wish in wishes] == [OK, OK]
        assert client.call(fetch, 1) and server.call(fetch, 2)
        targets = ((2,), (1,)) if round_number % 2 else ((2, client.address), (1, server.address))
        wishes = server.begin(unlink, targets[0]), client.begin(unlink, targets[1])
        assert [wish() for wish in wishes] == [OK, OK]
        assert server.call(wait_links, []) == client.call(wait_links, []) == []


# --------------------------------------------------------------------------------------------------------- unlink

@pytest.mark.parametrize("by_client", [True, False])
@pytest.mark.parametrize("with_address", [True, False])
def test_both_sides_drop_the_link(pair, by_client, with_address):
    server, client = pair
    client.call(link, (1, server.address))
    one, other = (client, server) if by_client else (server, client)
    target = (other.cluster_id, other.address) if with_address else (other.cluster_id,)
    assert one.call(unlink, target) == OK
    assert server.call(wait_links, []) == client.call(wait_links, []) == []
    assert client.call(fetch_code, 1) is server.call(fetch_code, 2) is S.LLM_NOT_YET_LINK


def test_a_forced_unlink_needs_no_peer(pair, peers):
    _, client = pair
    server = peers.start(3)
    client.call(link, (3, server.address))
    with stopped(server):
        assert client.call(unlink, (3,), force=True) == OK
        assert client.call(links) == []


@pytest.mark.parametrize("force", [True, False])
def test_a_link_that_existed(pair, force):
    """Either side may come second: the link is gone, and nothing but the id is needed to say so."""
    server, client = pair
    client.call(link, (1, server.address))
    client.call(unlink, (1,))
    server.call(wait_links, [])
    assert client.call(unlink, (1,), force=force) == OK
    assert server.call(unlink, (2,), force=force) == OK


def test_a_link_that_never_existed(pair):
    server, client = pair
    assert client.call(unlink, (900, server.address)) == OK
    assert client.call(unlink, (901,), force=True) == OK
    assert client.call(unlink, (902,)) == (S.LLM_PARAM_INVALID, [S.LLM_PARAM_INVALID])


def test_unlinking_with_two_addresses(pair):
    server, client = pair
    client.call(link, (1, server.address))
    assert client.call(unlink, (1, server.address, server.address)) == (S.LLM_PARAM_INVALID, [S.LLM_PARAM_INVALID])
    assert client.call(fetch, 1)


def test_the_peer_cannot_be_told(pair, peers):
    _, client = pair
    server = peers.start(3)
    client.call(link, (3, server.address))
    server.kill()
    client.call(wait_links, [(3, "local", "broken")])
    refused = (S.LLM_UNLINK_FAILED, [S.LLM_UNLINK_FAILED])
    assert client.call(unlink, (3, server.address)) == refused
    assert client.call(links) == [(3, "local", "broken")]
    assert client.call(unlink, (3,)) == OK              # without an address there is nobody to tell
    assert client.call(links) == []


def test_the_peer_does_not_answer(pair, peers):
    _, client = pair
    server = peers.start(3)
    client.call(link, (3, server.address))
    with stopped(server):
        assert client.call(unlink, (3, server.address), timeout_ms=200) == (S.LLM_TIMEOUT, [S.LLM_TIMEOUT])
    assert client.call(links) == [(3, "local", "broken")]
    assert client.call(unlink, (3, server.address)) == OK
    assert client.call(link, (3, server.address)) == OK


def test_the_peer_dropped_its_side_by_force(pair):
    server, client = pair
    client.call(link, (1, server.address))
    server.call(unlink, (2,), force=True)
    assert client.call(wait_links, [(1, "local", "broken")]) == [(1, "local", "broken")]
    assert client.call(fetch_code, 1) is S.LLM_NOT_YET_LINK
    assert client.call(unlink, (1, server.address)) == OK
    assert client.call(link, (1, server.address)) == OK
    assert client.call(fetch, 1)


def fetch_until_it_fails(node, cluster_id):
    """Fetch again and again; returns how often that worked, and the first code that is none of success."""
    node.kept["fetched"] = threading.Event()
    for count in range(1000000):
        code = fetch_code(node, cluster_id)
        if code is not S.LLM_SUCCESS:
            return count, code
        node.kept["fetched"].set()
    raise AssertionError("it never failed")


def unlink_while_fetching(node, cluster_id):
    with ThreadPoolExecutor(4) as pool:
        fetches = [pool.submit(fetch_until_it_fails, node, cluster_id) for _ in range(4)]
        until(lambda: "fetched" in node.kept)
        node.kept["fetched"].wait(10)
        overall, _ = unlink(node, (cluster_id,))
        return overall, {fetch.result()[1] for fetch in fetches}


@pytest.mark.parametrize("by_client", [True, False])
def test_unlinking_while_pulls_run(pair, by_client):
    server, client = pair
    one, other = (client, server) if by_client else (server, client)
    for _ in range(5):
        client.call(link, (1, server.address))
        assert one.call(unlink_while_fetching, other.cluster_id) == (S.LLM_SUCCESS, {S.LLM_NOT_YET_LINK})
        assert other.call(wait_links, []) == []


def test_unlinking_while_the_peer_pulls(pair):
    server, client = pair
    for _ in range(5):
        client.call(link, (1, server.address))
        fetching = client.begin(fetch_until_it_fails, 1)
        assert until(lambda: server.stats()["requests"] > 0)
        assert server.call(unlink, (2,)) == OK
        assert fetching()[1] is S.LLM_NOT_YET_LINK
        assert client.call(wait_links, []) == []


def unlink_during_a_pull_that_hangs(node, cluster_id):
    with ThreadPoolExecutor(1) as pool:
        fetching = pool.submit(fetch_code, node, cluster_id)
        until(lambda: any(row["running"] for row in node.dist.links()))
        return unlink(node, (cluster_id,), timeout_ms=100)[0], fetching.result()


def test_unlinking_does_not_wait_longer_than_its_time(peers):
    """The pull keeps the link until its own time is up: the unlink waits for it, but never says LLM_LINK_BUSY."""
    client, server = peers.start(1, engine_options(timeout_ms=1500), env=TCP_ONLY), peers.start(2)
    client.call(link, (2, server.address))
    with stopped(server):
        assert client.call(unlink_during_a_pull_that_hangs, 2) == (S.LLM_TIMEOUT, S.LLM_TIMEOUT)


# ------------------------------------------------------------------------------------------------------ odd links

def test_a_link_to_oneself(pair):
    _, client = pair
    assert client.call(link, (2, client.address)) == OK
    assert client.call(links) == [(2, "local", "active"), (2, "peer", "active")]
    assert client.call(fetch_code, 2) is S.LLM_PARAM_INVALID
    assert client.call(unlink, (2,)) == OK
    assert client.call(wait_links, []) == []


def test_the_peer_was_finalized(pair, peers):
    _, client = pair
    server = peers.start(3)
    client.call(link, (3, server.address))
    server.finalize()
    assert client.call(wait_links, [(3, "local", "broken")]) == [(3, "local", "broken")]
    assert client.call(fetch_code, 3) is S.LLM_NOT_YET_LINK
    client.call(unlink, (3,), force=True)
    assert client.call(link, (3, server.address)) == (S.LLM_LINK_FAILED, [S.LLM_LINK_FAILED])
