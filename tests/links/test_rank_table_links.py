"""`link` by rank table between real processes: they meet in any order, part, and meet again."""
from __future__ import annotations

import contextlib
import ctypes
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.link_steps import (
    ALL_BLOCKS,
    BLOCK_BYTES,
    DESC,
    NUM_BLOCKS,
    NUM_TENSORS,
    ask,
    fetch,
    fetch_code,
    leave,
    links,
    met,
    offer,
    rank_table,
    server,
    stopped,
    until,
    wait_links,
    withdraw,
)
from support.peer import engine_options

from llm_datadist import BlocksCacheKey, Cache, LLMStatusCode, Placement, RegisterMemStatus
from llm_datadist.links.rendezvous import digest_of, local_name
from llm_datadist.status import LLMLinkError

S = LLMStatusCode
OK, PREPARING, FAILED = RegisterMemStatus.OK, RegisterMemStatus.PREPARING, RegisterMemStatus.FAILED
IDS = (11, 12, 13, 14)
ACCEPTS_CONNECTIONS = 0x10000                           # flag of a Unix socket in /proc/net/unix


@pytest.fixture(scope="module")
def processes(module_peers):
    """Four members that listen at no port and each offer something."""
    members = [module_peers.start(cluster_id, engine_options(listen=False)) for cluster_id in IDS]
    for member in members:
        member.call(offer)
    yield members
    for member in members:
        member.call(withdraw)


@pytest.fixture
def members(processes):
    """The same four, without communicators before and after."""
    yield processes
    for member in processes:
        member.call(leave_all)
    for member in processes:
        assert member.call(wait_links, []) == []


def leave_all(node):
    leave(node, *[name for kind, name in list(node.kept) if kind == "comm"])


def one_server(*clusters):
    """Members on devices of one server, and their table."""
    ranks = {cluster_id: rank for rank, cluster_id in enumerate(clusters)}
    devices = [(rank, rank) for rank in range(len(clusters))]
    return ranks, json.dumps(rank_table([server("127.0.0.1", *devices)]))


def link_all(members, name, ranks, table):
    """Let every member ask, and wait until all have met."""
    for member in members:
        member.call(ask, name, ranks, table)
    assert [member.call(met, name) for member in members] == [[OK]] * len(members)


def all_fetch(members):
    return all(member.call(fetch, other.cluster_id) for member in members for other in members if other is not member)


# --------------------------------------------------------------------------------------------------------- meeting

@pytest.mark.parametrize("count", [2, 3, 4])
def test_everybody_links_to_everybody(members, count):
    members = members[:count]
    link_all(members, "all", *one_server(*IDS[:count]))
    assert all_fetch(members)
    for member in members:
        assert member.call(links) == [(other.cluster_id, "comm", "active") for other in members if other is not member]


TABLES = {
    "one server": rank_table([server("127.0.0.1", (0, 0), (1, 1), (2, 2))]),
    "one server that is only named": rank_table([server("node-7", (0, 0), (1, 1), (2, 2))]),
    "servers that are only numbered": rank_table([server("0", (0, 0)), server("1", (0, 1)), server("2", (0, 2))]),
    "one address for all servers": rank_table([server("0", (0, 0), host_ip="127.0.0.1"),
                                               server("1", (1, 1), host_ip="127.0.0.1"),
                                               server("2", (2, 2), host_ip="127.0.0.1")]),
    "an address for each server": rank_table([server("127.0.0.1", (0, 0)), server("127.0.0.2", (0, 1), (1, 2))]),
    "addresses of another host": rank_table([server("203.0.113.1", (0, 0)), server("203.0.113.2", (0, 1), (1, 2))]),
    "ranks in another order": rank_table([server("0", (3, 2), (1, 0)), server("1", (0, 1))]),
    "more devices than members": rank_table([server("0", *[(i, i) for i in range(8)])]),
    "version 1.2": rank_table([server("0", (0, 0)), server("1", (0, 1), (1, 2))], "1.2"),
    "version 1.2 with super pods": rank_table(
        [server("0", (0, 0), (1, 1)), server("1", (0, 2))], "1.2",
        super_pod_list=[{"super_pod_id": "0", "server_list": [{"server_id": "0"}, {"server_id": "1"}]}]),
}


@pytest.mark.parametrize("table", TABLES)
def test_any_table(members, table):
    members = members[:3]
    ranks = dict(zip(IDS, range(3)))
    link_all(members, table, ranks, json.dumps(TABLES[table]))
    assert all_fetch(members)


@pytest.mark.parametrize("clusters", [(11, 12, 13), (13, 11, 12), (12, 13, 11)])
@pytest.mark.parametrize("first", [0, 1, 2])
def test_any_rank_may_come_first(members, clusters, first):
    """`link` returns before anybody else is there, whatever rank it is called at."""
    members = members[:3]
    ranks, table = one_server(*clusters)
    order = members[first:] + members[:first]
    for member in order[:-1]:
        assert 0 < member.call(ask, "first", ranks, table) < 1000
        assert member.call(met, "first", within_s=0.05) == [PREPARING]
    order[-1].call(ask, "first", ranks, table)
    assert [member.call(met, "first") for member in members] == [[OK]] * 3
    assert all_fetch(members)


def test_other_ranks_of_the_table_are_left_alone(members):
    """Two of a table of eight."""
    table = json.dumps(rank_table([server("0", *[(i, i) for i in range(8)])]))
    link_all(members[:2], "two of eight", {11: 3, 12: 6}, table)
    assert all_fetch(members[:2])


def test_ids_are_small_and_increase(members):
    ranks, table = one_server(11, 12)
    ids = [members[0].call(ask, name, ranks, table) for name in "abc"]
    assert ids == sorted(set(ids)) and ids[0] > 0
    assert all(number not in [int(code) for code in S] for number in ids)


def test_status_numbers():
    assert [(status.name, status.value) for status in RegisterMemStatus] == [("OK", 0), ("PREPARING", 1), ("FAILED", 2)]


def test_no_pull_before_the_peer_has_come(members):
    ranks, table = one_server(11, 12)
    members[0].call(ask, "early", ranks, table)
    assert members[0].call(fetch_code, 12) is S.LLM_NOT_YET_LINK
    members[1].call(ask, "early", ranks, table)
    members[0].call(met, "early")
    members[1].call(met, "early")
    assert all_fetch(members[:2])


def test_an_unknown_id(members):
    ranks, table = one_server(11, 12)
    members[0].call(ask, "known", ranks, table)
    for call in (unlink_id, query_id):
        with pytest.raises(LLMLinkError) as caught:
            members[0].call(call, 987654321)
        assert caught.value.status_code is S.LLM_NOT_YET_LINK
    members[0].call(leave, "known")
    with pytest.raises(LLMLinkError):
        members[0].call(unlink_id, 1)


def unlink_id(node, comm_id):
    node.dist.unlink(comm_id)


def query_id(node, comm_id):
    node.dist.query_register_mem_status(comm_id)


def test_other_names_and_members_do_not_meet(members):
    ranks, table = one_server(11, 12)
    members[0].call(ask, "one", ranks, table)
    members[1].call(ask, "other", ranks, table)
    assert members[0].call(met, "one", within_s=0.1) == members[1].call(met, "other", within_s=0.1) == [PREPARING]
    members[1].call(ask, "one", *one_server(11, 12, 13))
    assert members[1].call(met, "one", within_s=0.1) == [PREPARING]
    assert members[0].call(links) == members[1].call(links) == []


@pytest.mark.parametrize("name", ["x" * 127, "prefill→decode", "a b\n/..%s", "\ud800"])
def test_any_name(members, name):
    link_all(members[:2], name, *one_server(11, 12))
    assert all_fetch(members[:2])


# ------------------------------------------------------------------------------------------------- order of asking

def ask_in_turn(node, wishes):
    """Ask for one after the other, as a thread does that needs them all."""
    for name, ranks, table in wishes:
        ask(node, name, ranks, table)


def pair_name(one, other):
    return f"pair {min(one, other)} {max(one, other)}"


@pytest.mark.parametrize("count", [3, 4])
def test_a_circle_of_asking(members, count):
    """Everybody asks for the pair with its successor first, so each first wish needs somebody's last one."""
    members = members[:count]
    wishes = []
    for i, member in enumerate(members):
        others = [members[(i + step) % count].cluster_id for step in range(1, count)]
        wishes.append([(pair_name(member.cluster_id, other), *one_server(*sorted((member.cluster_id, other))))
                       for other in others])
    for turn in range(count - 1):
        for member, wish in zip(members, wishes):
            member.call(ask_in_turn, [wish[turn]])
    for member, wish in zip(members, wishes):
        assert member.call(met, *[name for name, _, _ in wish]) == [OK] * (count - 1)
    assert all_fetch(members)


def ask_each_in_a_thread(node, wishes):
    with ThreadPoolExecutor(len(wishes)) as pool:
        return list(pool.map(lambda wish: ask(node, *wish), wishes))


def test_sixteen_at_once_in_several_processes(members):
    members = members[:3]
    names = [f"parallel {i}" for i in range(16)]
    wishes = [(name, *one_server(*IDS[:3])) for name in names]
    started = [member.begin(ask_each_in_a_thread, wishes) for member in members]
    assert all(len(set(start())) == 16 for start in started)
    for member in members:
        assert member.call(met, *names) == [OK] * 16
        assert len(member.call(links)) == 32
    assert all_fetch(members)


@contextlib.contextmanager
def silent_hosts(count):
    """Addresses of this host at which connections are never accepted, and the port."""
    with contextlib.ExitStack() as stack:
        port = 0
        for i in range(count):
            full = stack.enter_context(socket.socket())
            full.bind((f"127.0.9.{i + 1}", port))
            full.listen(0)
            port = full.getsockname()[1]
            for _ in range(3):
                filler = stack.enter_context(socket.socket())
                filler.setblocking(False)
                filler.connect_ex(full.getsockname())
        yield port


def test_hosts_that_do_not_answer_hold_nobody_up(peers):
    """Forty calls into the void are on their way, again and again, and two that are there still meet."""
    with silent_hosts(40) as port:
        pair = [peers.start(cluster_id, engine_options(listen=False, llm_LinkBasePort=str(port)))
                for cluster_id in (21, 22)]
        for i in range(40):
            table = rank_table([server(f"127.0.9.{i + 1}", (0, 0)), server("127.0.0.1", (0, 1))])
            pair[1].call(ask, f"void {i}", {100 + i: 0, 22: 1}, json.dumps(table))
        for member in pair:
            member.call(ask, "there", *one_server(21, 22))
        assert [member.call(met, "there", within_s=8) for member in pair] == [[OK], [OK]]


# ----------------------------------------------------------------------------------------------------------- data

def keep_own_cache(node, byte):
    """Register memory of our own under the usual key, as a newer one may replace an older."""
    buffers = [ctypes.create_string_buffer(bytes([byte]) * (NUM_BLOCKS * BLOCK_BYTES)) for _ in range(NUM_TENSORS)]
    addrs = [ctypes.addressof(buffer) for buffer in buffers]
    cache = node.cache_manager.register_blocks_cache(DESC, addrs, BlocksCacheKey(node.dist.cluster_id, 5))
    node.kept.setdefault("own", []).append((cache, buffers))
    return isinstance(cache, Cache) and cache.cache_desc.placement is Placement.DEVICE


def drop_own_caches(node):
    for cache, _ in node.kept.pop("own"):
        node.cache_manager.unregister_cache(cache.cache_id)


def fetch_byte(node, cluster_id, model_id):
    cache = node.cache_manager.allocate_blocks_cache(DESC)
    try:
        node.cache_manager.pull_blocks(BlocksCacheKey(cluster_id, model_id), cache, ALL_BLOCKS, ALL_BLOCKS)
        found = {byte for addr in cache.tensor_addrs for byte in ctypes.string_at(addr, NUM_BLOCKS * BLOCK_BYTES)}
        assert len(found) == 1
        return found.pop()
    finally:
        node.cache_manager.deallocate_blocks_cache(cache)


def test_caches_of_after_the_link(members):
    owner, reader = members[:2]
    link_all([owner, reader], "later", *one_server(11, 12))
    assert reader.call(fetch_code, 11, 3) is S.LLM_KV_CACHE_NOT_EXIST
    owner.call(offer, 3)
    assert reader.call(fetch, 11, 3)
    owner.call(withdraw, 3)
    assert reader.call(fetch_code, 11, 3) is S.LLM_KV_CACHE_NOT_EXIST
    assert owner.call(keep_own_cache, 77)
    assert reader.call(fetch_byte, 11, 5) == 77
    assert owner.call(keep_own_cache, 78)
    assert reader.call(fetch_byte, 11, 5) == 78         # the newer cache of the key replaces the older one
    owner.call(drop_own_caches)


# -------------------------------------------------------------------------------------------------------- parting

def unlink_and_ask_again(node, name, ranks, table):
    leave(node, name)
    return ask(node, name, ranks, table)


def test_both_ends_part_and_meet_again_under_the_same_name(members):
    pair = members[:2]
    ranks, table = one_server(11, 12)
    link_all(pair, "again", ranks, table)
    for _ in range(10):
        wishes = [member.begin(unlink_and_ask_again, "again", ranks, table) for member in pair]
        for wish in wishes:
            wish()
        assert [member.call(met, "again") for member in pair] == [[OK]] * 2
        assert all_fetch(pair)


@pytest.mark.parametrize("first", [0, 1])
def test_one_end_is_back_before_the_other_has_left(members, first):
    pair = members[first], members[1 - first]
    ranks, table = one_server(11, 12)
    link_all(pair, "slow", ranks, table)
    for _ in range(3):
        pair[0].call(unlink_and_ask_again, "slow", ranks, table)
        assert pair[0].call(met, "slow", within_s=0.1) == [PREPARING]
        pair[1].call(unlink_and_ask_again, "slow", ranks, table)
        assert [member.call(met, "slow") for member in pair] == [[OK]] * 2
        assert all_fetch(pair)


@pytest.mark.parametrize("leaver", [0, 1])
def test_one_end_leaves(members, leaver):
    one, other = members[leaver], members[1 - leaver]
    link_all(members[:2], "left", *one_server(11, 12))
    one.call(leave, "left")
    assert one.call(links) == []
    broken = [(one.cluster_id, "comm", "broken")]
    assert other.call(wait_links, broken) == broken
    assert one.call(fetch_code, other.cluster_id) is other.call(fetch_code, one.cluster_id) is S.LLM_NOT_YET_LINK
    other.call(leave, "left")
    assert other.call(links) == []


def test_leaving_before_anybody_came(members):
    ranks, table = one_server(11, 12)
    for member in members[:2]:
        member.call(ask, "given up", ranks, table)
        member.call(leave, "given up")
    link_all(members[:2], "given up", ranks, table)
    assert all_fetch(members[:2])


def test_two_communicators_of_one_pair(members):
    pair = members[:2]
    link_all(pair, "one", *one_server(11, 12))
    link_all(pair, "two", *one_server(11, 12))
    for member in pair:
        member.call(leave, "one")
    assert all_fetch(pair)


def test_the_same_name_twice(members):
    pair = members[:2]
    link_all(pair, "twice", *one_server(11, 12))
    first = [member.call(rename, "twice", "first") for member in pair]
    link_all(pair, "twice", *one_server(11, 12))
    assert [len(member.call(links)) for member in pair] == [2, 2]
    for member in pair:
        member.call(leave, "first")
    assert len(first) == 2 and all_fetch(pair)


def rename(node, old, new):
    node.kept["comm", new] = node.kept.pop(("comm", old))


def leave_while_fetching(node, cluster_id, name):
    with ThreadPoolExecutor(2) as pool:
        fetching = [pool.submit(fetch_until_it_fails, node, cluster_id) for _ in range(2)]
        until(lambda: any(row["num_transfers"] for row in node.dist.links()))
        leave(node, name)
        return {future.result() for future in fetching}


def fetch_until_it_fails(node, cluster_id):
    while True:
        code = fetch_code(node, cluster_id)
        if code is not S.LLM_SUCCESS:
            return code


def test_leaving_while_both_ends_pull(members):
    pair = members[:2]
    link_all(pair, "busy", *one_server(11, 12))
    fetching = pair[1].begin(fetch_until_it_fails, 11)
    assert pair[0].call(leave_while_fetching, 12, "busy") == {S.LLM_NOT_YET_LINK}
    assert fetching() is S.LLM_NOT_YET_LINK
    pair[1].call(leave, "busy")
    link_all(pair, "busy", *one_server(11, 12))
    assert all_fetch(pair)


# ------------------------------------------------------------------------------------------------ death and delay

def names_in_use():
    """Names at which some process of this host listens."""
    with open("/proc/net/unix", encoding="utf-8", errors="replace") as table:
        return {line.split()[-1] for line in list(table)[1:] if int(line.split()[3], 16) & ACCEPTS_CONNECTIONS}


@pytest.mark.parametrize("killed", [0, 1, 2])
def test_a_killed_member_leaves_nothing_behind(members, peers, killed):
    ids = [11, 12]
    ids.insert(killed, 31)                              # so that the one that dies is first, middle or last
    ranks, table = one_server(*ids)
    name = f"killed {killed}"
    victim = peers.start(31, engine_options(listen=False))
    group = [*members[:2], victim]
    link_all(group, name, ranks, table)
    victim.kill()
    broken = [(31, "comm", "broken")]
    for member in members[:2]:
        assert until(lambda member=member: member.call(links)[-1:] == broken)
        assert member.call(fetch_code, 31) is S.LLM_NOT_YET_LINK
        member.call(leave, name)
    place = local_name(digest_of(name, ranks), ids[0])
    assert place not in names_in_use()

    again = peers.start(31, engine_options(listen=False))
    again.call(offer)
    group[2] = again
    link_all(group, name, ranks, table)
    assert all_fetch(group)
    again.call(withdraw)


def test_killed_while_it_waits(members, peers):
    ranks, table = one_server(31, 11)
    victim = peers.start(31, engine_options(listen=False))
    victim.call(ask, "waiting", ranks, table)
    place = local_name(digest_of("waiting", ranks), 31)
    assert until(lambda: place in names_in_use())
    victim.kill()
    assert until(lambda: place not in names_in_use())
    again = peers.start(31, engine_options(listen=False))
    link_all([again, members[0]], "waiting", ranks, table)


def test_nobody_waits_any_more_after_the_meeting(members):
    ranks, table = one_server(11, 12)
    link_all(members[:2], "met", ranks, table)
    assert local_name(digest_of("met", ranks), 11) not in names_in_use()


def test_the_time_is_up(members, peers):
    """The one that waited too long says so, keeps nothing of it, and may ask again."""
    short = peers.start(31, engine_options(listen=False, llm_LinkTotalTime="1"))
    short.call(offer)
    ranks, table = one_server(11, 12, 31)
    members[0].call(ask, "late", ranks, table)
    short.call(ask, "late", ranks, table)
    assert short.call(wait_links, [(11, "comm", "active")]) == [(11, "comm", "active")]
    assert short.call(met, "late") == [FAILED]
    assert short.call(links) == []
    assert short.call(fetch_code, 11) is S.LLM_NOT_YET_LINK
    members[1].call(ask, "late", ranks, table)
    assert members[1].call(met, "late", within_s=0.1) == [PREPARING]
    for member in (*members[:2], short):
        member.call(leave, "late")
    link_all([*members[:2], short], "late", ranks, table)
    assert all_fetch([*members[:2], short])
    short.call(withdraw)


def test_a_member_that_stands_still_is_only_late(members):
    ranks, table = one_server(11, 12)
    members[0].call(ask, "still", ranks, table)
    with stopped(members[0]):
        members[1].call(ask, "still", ranks, table)
        time.sleep(0.7)                                 # longer than one call waits for an answer
        assert members[1].call(met, "still", within_s=0) == [PREPARING]
    assert [member.call(met, "still") for member in members[:2]] == [[OK]] * 2
    assert all_fetch(members[:2])


def test_members_of_either_mode_do_not_meet(members, peers):
    other = peers.start(31, engine_options(listen=False, remote_accessible=True))
    ranks, table = one_server(11, 31)
    for member in (members[0], other):
        member.call(ask, "modes", ranks, table)
    assert [member.call(met, "modes", within_s=0.2) for member in (members[0], other)] == [[PREPARING]] * 2
    assert members[0].call(links) == other.call(links) == []
