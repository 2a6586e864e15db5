"""Links between hosts: each process has a network namespace of its own, and only its address leads there."""
from __future__ import annotations

import contextlib
import ctypes
import json
import socket

import pytest
from support.link_steps import (
    ask,
    drop_links,
    fetch,
    fetch_code,
    leave,
    link,
    links,
    met,
    offer,
    rank_table,
    server,
    until,
    wait_links,
)
from support.networks import Network, NoNamespacesError
from support.peer import engine_options

from llm_datadist import BlocksCacheKey, CacheDesc, DataType, LLMStatusCode, RegisterMemStatus

S = LLMStatusCode
BASE_PORT = 27000
LARGE = CacheDesc(4, [8, 32768], DataType.DT_FLOAT)     # 4 MiB
LARGE_BYTES = 4 << 20
ALL_BLOCKS = list(range(8))
SECRET = "what-these-hosts-share"


@pytest.fixture(scope="module")
def network():
    try:
        network = Network(3)
    except NoNamespacesError as error:
        pytest.skip(f"network namespaces are not possible here: {error}")
    with network:
        yield network


def start(peers, host, cluster_id, *, env=None, **options):
    """A process on that host, which listens at the host's address only and offers something."""
    options.setdefault("llm_listenIpInfo", f"{host.ip}:0")
    options.setdefault("llm_LinkSecret", SECRET)
    child = host.run(peers.start, cluster_id, engine_options(timeout_ms=5000, **options), env=env)
    child.leftovers_allowed = True
    child.call(offer)
    return child


def offer_large(node):
    cache = node.cache_manager.allocate_blocks_cache(LARGE, BlocksCacheKey(node.dist.cluster_id, 9))
    for number, addr in enumerate(cache.tensor_addrs):
        ctypes.memset(addr, number + 1, LARGE_BYTES // 4)


def fetch_large(node, cluster_id):
    cache = node.cache_manager.allocate_blocks_cache(LARGE)
    node.cache_manager.pull_blocks(BlocksCacheKey(cluster_id, 9), cache, ALL_BLOCKS, ALL_BLOCKS[::-1])
    found = [set(ctypes.string_at(addr, LARGE_BYTES // 4)) for addr in cache.tensor_addrs]
    node.cache_manager.deallocate_blocks_cache(cache)
    return found == [{1}, {2}, {3}, {4}]


def all_fetch(members):
    return all(member.call(fetch, other.cluster_id) for member in members for other in members if other is not member)


# -------------------------------------------------------------------------------------------------- link_clusters

def test_link_clusters(network, peers):
    here, there = network.hosts[:2]
    server, client = start(peers, here, 1), start(peers, there, 2)
    assert server.address[0] == here.ip
    assert client.call(link, (1, server.address)) == (S.LLM_SUCCESS, [S.LLM_SUCCESS])
    assert all_fetch([server, client])
    assert [row["peer_ip"] for row in client.call(link_rows)] == [here.ip]
    assert [row["peer_ip"] for row in server.call(link_rows)] == [there.ip]


def link_rows(node):
    return node.dist.links()


def test_the_bytes_cross_the_network(network, peers):
    here, there = network.hosts[:2]
    server, client = start(peers, here, 1), start(peers, there, 2)
    server.call(offer_large)
    client.call(link, (1, server.address))
    before = there.received_bytes()
    assert client.call(fetch_large, 1)
    assert there.received_bytes() - before >= LARGE_BYTES


def test_a_listener_at_every_address(network, peers):
    here, there = network.hosts[:2]
    server, client = start(peers, here, 1, llm_listenIpInfo="0.0.0.0:0"), start(peers, there, 2)
    neighbour = start(peers, here, 3)
    port = server.address[1]
    assert client.call(link, (1, (here.ip, port)))[0] is S.LLM_SUCCESS
    assert neighbour.call(link, (1, ("127.0.0.1", port)))[0] is S.LLM_SUCCESS
    for other in (client, neighbour):
        assert all_fetch([server, other])


def test_nobody_is_reached_at_an_address_of_another_host(network, peers):
    here, there = network.hosts[:2]
    server, client = start(peers, here, 1), start(peers, there, 2)
    assert client.call(link, (1, (there.ip, server.address[1])))[0] is S.LLM_LINK_FAILED
    assert client.call(link, (1, (f"{here.ip[:-1]}77", server.address[1])), timeout_ms=300)[0] \
        in (S.LLM_TIMEOUT, S.LLM_LINK_FAILED)


@contextlib.contextmanager
def unplugged(network, host):
    """A host whose packets reach nobody for a while, without anybody being told."""
    network.plug(host, False)
    try:
        yield
    finally:
        network.plug(host, True)


def test_the_cable_is_pulled_under_a_pull(network, peers):
    """It fails when its time is up, and the link can be made anew."""
    here, there = network.hosts[:2]
    server = start(peers, here, 1)
    client = start(peers, there, 2, llm_SyncKvCacheWaitTime="300")
    client.call(link, (1, server.address))
    assert all_fetch([server, client])
    with unplugged(network, there):
        assert client.call(fetch_code, 1) is S.LLM_TIMEOUT
        assert client.call(links) == [(1, "local", "broken")]
        assert client.call(fetch_code, 1) is S.LLM_NOT_YET_LINK
    client.call(drop_links)
    # The client's host may take a second to see that there is a way to the other one again.
    assert until(lambda: client.call(link, (1, server.address))[0] is S.LLM_SUCCESS)
    assert all_fetch([server, client])


def unacknowledged_bytes(node):
    """What the connections of this network namespace have sent and not yet seen confirmed."""
    with open("/proc/self/net/tcp", encoding="ascii") as table:
        return sum(int(line.split()[4].split(":")[0], 16) for line in list(table)[1:])


def test_the_cable_is_pulled_under_an_idle_link(network, peers):
    """Either end finds out by itself, though neither has anything to say."""
    here, there = network.hosts[:2]
    server, client = start(peers, here, 1), start(peers, there, 2)
    client.call(link, (1, server.address))
    assert all_fetch([server, client])
    for process in (server, client):
        assert until(lambda process=process: process.call(unacknowledged_bytes) == 0)
    with unplugged(network, there):
        assert server.call(wait_links, []) == []
        broken = [(1, "local", "broken")]
        assert client.call(wait_links, broken) == broken
        assert [(process.stats()["links"], process.stats()["broken_links"]) for process in (server, client)] \
            == [(0, 0), (0, 1)]
    # The link comes back without anybody's help, and so does the way from one host to the other, after a second or so.
    assert until(lambda: client.call(fetch_code, 1) is S.LLM_SUCCESS)
    assert all_fetch([server, client])


def test_how_long_silence_is_borne_is_a_setting(network, peers):
    here, there = network.hosts[:2]
    server = start(peers, here, 1)
    hasty, patient = start(peers, there, 2), start(peers, there, 3, llm_LinkSilenceTime="60000")
    for client in (hasty, patient):
        client.call(link, (1, server.address))
        assert client.call(fetch, 1)
        assert until(lambda client=client: client.call(unacknowledged_bytes) == 0)
    with unplugged(network, there):
        assert hasty.call(wait_links, [(1, "local", "broken")]) == [(1, "local", "broken")]
        assert patient.call(links) == [(1, "local", "active")]


# ----------------------------------------------------------------------------------------------------- rank tables

def link_all(members, name, ranks, table):
    for member in members:
        member.call(ask, name, ranks, json.dumps(table))
    assert [member.call(met, name) for member in members] == [[RegisterMemStatus.OK]] * len(members)


@pytest.fixture(scope="module")
def members(network, module_peers):
    """One member on each of three hosts; the base port comes from the option or from the environment."""
    variable = {"LLM_DATADIST_LINK_BASE_PORT": str(BASE_PORT)}
    return [start(module_peers, network.hosts[0], 1, env=variable),
            start(module_peers, network.hosts[1], 2, llm_LinkBasePort=str(BASE_PORT)),
            start(module_peers, network.hosts[2], 3, llm_LinkBasePort=str(BASE_PORT),
                  env={"LLM_DATADIST_LINK_BASE_PORT": "1"})]


def tables(hosts):
    ips = [host.ip for host in hosts]
    return {
        "host_ip": rank_table([server(str(i), (0, i), host_ip=ip) for i, ip in enumerate(ips)]),
        "server_id": rank_table([server(ip, (0, i)) for i, ip in enumerate(ips)]),
        "device_ip": rank_table([server(str(i), (0, i), device_ip=ip) for i, ip in enumerate(ips)]),
        "host_ip before server_id": rank_table(
            [server(f"203.0.113.{i}", (0, i), host_ip=ip) for i, ip in enumerate(ips)]),
        "other devices": rank_table([server(ip, (7 - i, i)) for i, ip in enumerate(ips)], "1.2", super_pod_list=[]),
    }


@pytest.mark.parametrize("where", ["host_ip", "server_id", "device_ip", "host_ip before server_id", "other devices"])
def test_members_meet_at_the_address_of_the_table(network, members, where):
    table = tables(network.hosts)[where]
    link_all(members, where, {1: 0, 2: 1, 3: 2}, table)
    assert all_fetch(members)
    for member in members:
        member.call(leave, where)
    link_all(members, where, {1: 0, 2: 1, 3: 2}, table)
    assert all_fetch(members)
    for member in members:
        member.call(leave, where)
        assert member.call(wait_links, []) == []


def is_open(ip, port):
    try:
        socket.create_connection((ip, port), timeout=2).close()
        return True
    except OSError:
        return False


def test_the_port_is_the_base_port_and_the_device(network, members):
    """The member of lower rank listens there while it waits, and at no time else."""
    here, there = network.hosts[:2]
    table = json.dumps(rank_table([server(here.ip, (3, 0)), server(there.ip, (0, 1))]))
    assert not there.run(is_open, here.ip, BASE_PORT + 3)
    members[0].call(ask, "port", {1: 0, 2: 1}, table)
    members[0].call(met, "port", within_s=0.2)
    assert there.run(is_open, here.ip, BASE_PORT + 3)
    members[1].call(ask, "port", {1: 0, 2: 1}, table)
    assert [member.call(met, "port") for member in members[:2]] == [[RegisterMemStatus.OK]] * 2
    for member in members[:2]:
        member.call(leave, "port")
    assert not there.run(is_open, here.ip, BASE_PORT + 3)


def test_two_on_one_host_and_one_on_another(network, members, peers):
    here, there = network.hosts[:2]
    neighbour = start(peers, here, 4, llm_LinkBasePort=str(BASE_PORT))
    table = rank_table([server(here.ip, (0, 0), (1, 1)), server(there.ip, (0, 2))])
    group = [members[0], neighbour, members[1]]
    link_all(group, "mixed", {1: 0, 4: 1, 2: 2}, table)
    assert all_fetch(group)
    for member in group:
        member.call(leave, "mixed")


def test_several_communicators_share_a_port(network, members):
    """Three pairs wait at one address at the same time."""
    here = network.hosts[0]
    names = [f"pair {i}" for i in range(3)]
    table = json.dumps(rank_table([server(host.ip, (0, i)) for i, host in enumerate(network.hosts)]))
    for name in names:
        members[0].call(ask, name, {1: 0, 2: 1, 3: 2}, table)
    members[0].call(met, names[0], within_s=0.2)
    for name in names:
        for member in members[1:]:
            member.call(ask, name, {1: 0, 2: 1, 3: 2}, table)
        assert [member.call(met, name) for member in members] == [[RegisterMemStatus.OK]] * 3
    assert all_fetch(members)
    for member in members:
        member.call(leave, *names)
    assert not here.run(is_open, here.ip, BASE_PORT)
