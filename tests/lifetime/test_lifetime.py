"""What processes hold, and what is left when they stop, die, fork, are interrupted, or just end.

Every count is compared with what it was before: descriptors, threads, mappings, pool bytes, pins.
"""
from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.link_steps import (
    SETTLE_S,
    TCP_ONLY,
    ask,
    byte_of,
    fetch,
    fetch_code,
    footprint,
    leave,
    link,
    links,
    met,
    offer,
    rank_table,
    server,
    stopped,
    unlink,
    until,
    wait_links,
    withdraw,
)
from support.peer import engine_options, finalize

from llm_datadist import (
    CacheDesc,
    CacheKey,
    DataType,
    LayerSynchronizer,
    LLMException,
    LLMRole,
    LLMStatusCode,
    RegisterMemStatus,
    TransferConfig,
)

S = LLMStatusCode
SMALL = CacheDesc(2, [1, 256], DataType.DT_FLOAT)
TWO_LAYERS = CacheDesc(4, [1, 256], DataType.DT_FLOAT)
LARGE_BYTES = 16 << 20                                  # of one tensor; big enough to be met on its way
LARGE = CacheDesc(2, [1, LARGE_BYTES // 4], DataType.DT_FLOAT)

# An interpreter may take or give back memory for its own objects at any time; a leak grows with every cycle.
SOME_MAPPINGS = 8


def large_key(cluster_id):
    """Key of a large cache; a pull by prefix does not release it."""
    return CacheKey(cluster_id, 2**64 - 1, 0, 1)


def fill(cache, byte):
    for addr in cache.tensor_addrs:
        ctypes.memset(addr, byte, cache.cache_desc.size)


def contents(cache):
    """The bytes that occur in a cache."""
    found = set()
    for addr in cache.tensor_addrs:
        data = ctypes.string_at(addr, cache.cache_desc.size)
        found |= {data[0]} if data[1:] == data[:-1] else set(data)      # all the same, as a rule: seen at once
    return found


def settled_footprint(node):
    gc.collect()
    return footprint(node)


def assert_same(before, after):
    assert {**after, "maps": 0} == {**before, "maps": 0}
    assert after["maps"] <= before["maps"] + SOME_MAPPINGS


@pytest.fixture(scope="module")
def pair(module_peers):
    """An owner and a reader, linked for the whole module; tests leave them as they were."""
    owner, reader = module_peers.start(1), module_peers.start(2)
    module_peers.link(reader, owner)
    return owner, reader


# ------------------------------------------------------------------------------------------------------ many times

def make_caches(node, first, count):
    for number in range(first, first + count):
        cache = node.cache_manager.allocate_cache(SMALL, [CacheKey(1, number)])
        fill(cache, number % 251)
        other = node.cache_manager.allocate_cache(SMALL, [CacheKey(1, number, 1)])
        for handle in (cache, other):
            node.cache_manager.deallocate_cache(handle)


def pull_caches(node, first, count):
    for number in range(first, first + count):
        cache = node.cache_manager.allocate_cache(SMALL)
        node.cache_manager.pull_cache(CacheKey(1, number), cache)
        assert contents(cache) == {number % 251}
        node.cache_manager.deallocate_cache(cache)


def remove_keys(node, first, count):
    for number in range(first, first + count):
        node.cache_manager.remove_cache_key(CacheKey(1, number, 1))


def test_10000_cycles(pair):
    """Allocate with keys, pull, remove the keys that nobody pulled, deallocate."""
    owner, reader = pair

    def cycles(first, count):
        owner.call(make_caches, first, count)
        reader.call(pull_caches, first, count)
        owner.call(remove_keys, first, count)

    cycles(0, 500)
    before = owner.call(settled_footprint), reader.call(settled_footprint)
    for first in range(500, 10500, 500):
        cycles(first, 500)
    assert_same(before[0], owner.call(settled_footprint))
    assert_same(before[1], reader.call(settled_footprint))
    for process in pair:
        stats = process.stats()
        assert (stats["caches"], stats["keys"], stats["pins"]) == (0, 0, 0)
        assert stats["device_pool"]["free_bytes"] == stats["device_pool"]["bytes"]


def link_and_unlink(node, target, count):
    for number in range(count):
        assert link(node, target)[0] is S.LLM_SUCCESS
        assert fetch(node, target[0])
        assert unlink(node, target, force=number % 2 == 1)[0] is S.LLM_SUCCESS


def test_200_links(peers):
    owner, reader = peers.start(1), peers.start(2)
    owner.call(offer)
    reader.call(link_and_unlink, (1, owner.address), 5)
    assert owner.call(wait_links, []) == []
    before = owner.call(settled_footprint), reader.call(settled_footprint)
    reader.call(link_and_unlink, (1, owner.address), 200)
    assert owner.call(wait_links, []) == []
    assert until(lambda: owner.call(settled_footprint)["fds"] == before[0]["fds"])
    assert_same(before[0], owner.call(settled_footprint))
    assert_same(before[1], reader.call(settled_footprint))
    owner.call(withdraw)


def meet_and_leave(node, ranks, table, count):
    for _ in range(count):
        ask(node, "again", ranks, table)
        assert met(node, "again") == [RegisterMemStatus.OK]
        leave(node, "again")


def test_50_communicators(peers):
    pair = peers.start(1, engine_options(listen=False)), peers.start(2, engine_options(listen=False))
    table = json.dumps(rank_table([server("0", (0, 0), (1, 1))]))

    def meet(count):
        started = [process.begin(meet_and_leave, {1: 0, 2: 1}, table, count) for process in pair]
        for start in started:
            start()
        for process in pair:
            assert process.call(wait_links, []) == []

    meet(3)
    before = [process.call(settled_footprint) for process in pair]
    meet(50)
    for process, old in zip(pair, before):
        assert until(lambda process=process, old=old: process.call(settled_footprint)["fds"] == old["fds"])
        assert_same(old, process.call(settled_footprint))


def init_and_finalize(node, options, peer, count):
    """Engines one after the other, each with a link and a transfer; what the process holds after each."""
    found = []
    for _ in range(count):
        node.start(7, options, LLMRole.MIX)
        assert link(node, peer)[0] is S.LLM_SUCCESS
        assert fetch(node, peer[0])
        cache = node.cache_manager.allocate_cache(SMALL, [CacheKey(7, 1)])
        fill(cache, 1)
        finalize(node.dist)
        gc.collect()
        found.append(process_footprint())
    return found


def process_footprint():
    with open("/proc/self/maps", encoding="ascii") as maps:
        num_maps = sum(1 for _ in maps)
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), num_maps


def test_50_engines_in_one_process(pair, peers):
    owner, _ = pair
    owner.call(offer)
    child = peers.child()
    found = child.call(init_and_finalize, engine_options(), (1, owner.address), 50)
    fds, threads, maps = found[-1]
    assert (fds, threads) == found[4][:2]
    assert maps <= found[4][2] + SOME_MAPPINGS
    of_the_fixture = [(2, "peer", "active")]
    assert owner.call(wait_links, of_the_fixture) == of_the_fixture
    owner.call(withdraw)


# --------------------------------------------------------------------------------------- the owner is busy elsewhere

def spin(node):
    """Keep the interpreter: no other thread of Python ever gets a turn."""
    sys.setswitchinterval(1e6)
    node.kept["spins"] = True
    while True:
        pass


def pull_keys(node, cluster_id, count):
    for number in range(count):
        cache = node.cache_manager.allocate_cache(SMALL)
        node.cache_manager.pull_cache(CacheKey(cluster_id, number), cache)
        assert contents(cache) == {number % 251}
        with pytest.raises(LLMException) as caught:
            node.cache_manager.pull_cache(CacheKey(cluster_id, number), cache)
        assert caught.value.status_code is S.LLM_KV_CACHE_NOT_EXIST         # the first pull has released the key
        node.cache_manager.deallocate_cache(cache)
    return count


def hold_keys(node, count):
    for number in range(count):
        cache = node.cache_manager.allocate_cache(SMALL, [CacheKey(node.dist.cluster_id, number)])
        fill(cache, number % 251)
        node.cache_manager.deallocate_cache(cache)


@pytest.mark.parametrize("env", [{}, TCP_ONLY], ids=["any path", "tcp"])
def test_the_owner_spins_in_python(peers, env):
    """Peers link, look up, pull, release and unlink, though the owner's interpreter never yields."""
    owner, reader = peers.start(5), peers.start(6, env=env)
    owner.call(hold_keys, 100)
    owner.begin(spin)
    assert reader.call(link, (5, owner.address))[0] is S.LLM_SUCCESS
    assert reader.call(pull_keys, 5, 100) == 100
    assert reader.call(unlink, (5, owner.address))[0] is S.LLM_SUCCESS
    owner.kill()


# ----------------------------------------------------------------------------------------------------------- death

class Waits(LayerSynchronizer):
    """Says at once that the first layer is ready, and of the others only when it is told to."""

    def __init__(self):
        self.asked = threading.Event()
        self.go_on = threading.Event()

    def synchronize_layer(self, layer_index, timeout_in_millis):
        if layer_index == 0:
            return True
        self.asked.set()
        return self.go_on.wait(60)


def hold_destination(node):
    node.kept["destination"] = node.cache_manager.allocate_cache(TWO_LAYERS)
    return list(node.kept["destination"].tensor_addrs)


def drop_destination(node):
    node.cache_manager.deallocate_cache(node.kept.pop("destination"))


def begin_transfer(node, cluster_id, addrs):
    """Start a transfer that stays in the middle: it has a lease on its destination, and its source pinned."""
    source = node.cache_manager.allocate_cache(TWO_LAYERS)
    waits = Waits()
    task = node.cache_manager.transfer_cache_async(source, waits, [TransferConfig(cluster_id, addrs, range(2), 0)])
    waits.asked.wait(10)
    node.kept["transfer"] = task, waits, source


def end_transfer(node):
    task, waits, source = node.kept.pop("transfer")
    waits.go_on.set()
    code = task.synchronize()
    node.cache_manager.deallocate_cache(source)
    return code


def restart(peers, process):
    """A new process in place of one that is dead: the same id at the same port."""
    again = peers.start(process.cluster_id, engine_options(llm_listenIpInfo="{}:{}".format(*process.address)))
    again.call(offer)
    return again


def test_the_writer_is_killed_while_it_holds_a_lease(pair, peers):
    owner, _ = pair
    before = owner.call(settled_footprint)
    addrs = owner.call(hold_destination)
    writer = peers.start(5)
    writer.call(link, (1, owner.address))
    writer.call(begin_transfer, 1, addrs)
    assert until(lambda: owner.stats()["pins"] > 0)
    writer.kill()
    assert until(lambda: owner.stats()["pins"] == 0)
    owner.call(drop_destination)
    assert until(lambda: owner.call(settled_footprint) == before), owner.call(settled_footprint)
    owner.call(offer)
    again = restart(peers, writer)
    assert again.call(link, (1, owner.address))[0] is S.LLM_SUCCESS
    assert again.call(fetch, 1) and owner.call(fetch, 5)
    again.call(withdraw)
    owner.call(withdraw)


def test_the_owner_is_killed_under_a_transfer(pair, peers):
    _, reader = pair
    before = reader.call(settled_footprint)
    owner = peers.start(5)
    reader.call(link, (5, owner.address))
    reader.call(begin_transfer, 5, owner.call(hold_destination))
    owner.kill()
    broken = [(1, "local", "active"), (5, "local", "broken")]
    assert reader.call(wait_links, broken) == broken
    assert reader.call(end_transfer) is not S.LLM_SUCCESS
    assert reader.stats()["pins"] == 0
    again = restart(peers, owner)
    assert reader.call(unlink, (5,), force=True)[0] is S.LLM_SUCCESS
    assert until(lambda: reader.call(settled_footprint)["fds"] == before["fds"])
    assert reader.call(link, (5, again.address))[0] is S.LLM_SUCCESS
    assert reader.call(fetch, 5)
    reader.call(unlink, (5,))
    assert reader.call(settled_footprint)["free_bytes"] == before["free_bytes"]
    again.call(withdraw)


def pull_large_for_ever(node, cluster_id):
    manager = node.cache_manager
    cache = manager.allocate_cache(LARGE)
    while True:
        manager.pull_cache(large_key(cluster_id), cache)


def hold_large(node, byte):
    node.kept["large"] = node.cache_manager.allocate_cache(LARGE, [large_key(node.dist.cluster_id)])
    fill(node.kept["large"], byte)


def drop_large(node):
    node.cache_manager.remove_cache_key(large_key(node.dist.cluster_id))
    node.cache_manager.deallocate_cache(node.kept.pop("large"))


@pytest.mark.parametrize("env", [{}, TCP_ONLY], ids=["any path", "tcp"])
def test_the_reader_is_killed_in_the_middle(pair, peers, env):
    owner, _ = pair
    before = owner.call(settled_footprint)
    owner.call(hold_large, 3)
    for _ in range(3):
        reader = peers.start(5, env=env)
        reader.call(link, (1, owner.address))
        reader.begin(pull_large_for_ever, 1)
        assert until(lambda: owner.stats()["pins"] != 0)
        reader.kill()
        assert until(lambda: owner.stats()["pins"] == 0)
    owner.call(drop_large)
    assert until(lambda: owner.call(settled_footprint)["fds"] == before["fds"])
    assert owner.call(settled_footprint)["free_bytes"] == before["free_bytes"]


# ------------------------------------------------------------------------------------------------- an owner that stops

def pull_while_the_owner_stops(node, cluster_id, pid):
    """Pull, and stop the owner as soon as the first byte has come; how it ended, and whether bytes came later."""
    cache = node.cache_manager.allocate_cache(LARGE)
    code = S.LLM_SUCCESS
    for _ in range(20):
        fill(cache, 0)
        done = threading.Event()

        def stop_it(done=done):
            # Both ends of both tensors, as several connections carry parts of them.
            first = [(ctypes.c_char * LARGE_BYTES).from_address(addr) for addr in cache.tensor_addrs]
            while not done.is_set() and not any(part[at] != b"\0" for part in first for at in (0, LARGE_BYTES // 2)):
                pass
            os.kill(pid, signal.SIGSTOP)

        with ThreadPoolExecutor(1) as pool:
            stopping = pool.submit(stop_it)
            try:
                node.cache_manager.pull_cache(large_key(cluster_id), cache)
            except LLMException as error:
                code = error.status_code
            done.set()
            stopping.result()
        if code is not S.LLM_SUCCESS:
            break
        os.kill(pid, signal.SIGCONT)                    # it was faster than the signal: once more
    fill(cache, 0xA5)
    state = links(node), fetch_code(node, cluster_id)
    os.kill(pid, signal.SIGCONT)
    state = (*state, until(lambda: fetch_code(node, cluster_id) is S.LLM_SUCCESS))
    time.sleep(0.2)                                     # the owner runs, and sends what it still has
    untouched = contents(cache) == {0xA5}
    node.cache_manager.deallocate_cache(cache)
    return code, untouched, state


def test_the_owner_stops_while_bytes_move(peers):
    owner = peers.start(5)
    reader = peers.start(6, engine_options(timeout_ms=300), env=TCP_ONLY)
    owner.call(offer)
    owner.call(hold_large, 7)
    reader.call(link, (5, owner.address))
    assert reader.call(pull_while_the_owner_stops, 5, owner.pid) \
        == (S.LLM_TIMEOUT, True, ([(5, "local", "broken")], S.LLM_NOT_YET_LINK, True))
    assert until(lambda: owner.stats()["pins"] == 0)
    assert reader.call(fetch, 5)
    owner.call(drop_large)
    owner.call(withdraw)


def test_the_owner_stands_still(peers):
    """Nothing was asked for before it stopped; each call ends with its time, and nothing comes later."""
    owner = peers.start(5)
    reader = peers.start(6, engine_options(timeout_ms=200), env=TCP_ONLY)
    owner.call(offer)
    reader.call(link, (5, owner.address))
    with stopped(owner):
        assert reader.call(fetch_code, 5) is S.LLM_TIMEOUT
        assert reader.call(fetch_code, 5) is S.LLM_NOT_YET_LINK
        assert reader.call(links) == [(5, "local", "broken")]
    assert until(lambda: reader.call(fetch_code, 5) is S.LLM_SUCCESS)
    owner.call(withdraw)


# ------------------------------------------------------------------------------------------------------- interrupts

FOR_EVER_MS = 3600 * 1000                               # a call that Ctrl-C does not end fails its test by hanging


def interrupt(node, is_blocked, function, *args):
    """Call, and press Ctrl-C once the call is blocked; which exception it raised."""
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def press():
        until(lambda: is_blocked(node))
        os.kill(os.getpid(), signal.SIGINT)

    with ThreadPoolExecutor(1) as pool:
        pressing = pool.submit(press)
        try:
            function(node, *args)
            return None
        except BaseException as error:
            return type(error)
        finally:
            pressing.result()


def has_operation(node):
    return any(row["running"] for row in node.dist.links())


def is_connecting(node):
    return len(os.listdir("/proc/self/fd")) > node.kept["fds"]


def keep_fds(node):
    node.kept["fds"] = len(os.listdir("/proc/self/fd"))


def test_ctrl_c_during_a_pull(peers):
    owner, reader = peers.start(5), peers.start(6, engine_options(timeout_ms=FOR_EVER_MS), env=TCP_ONLY)
    owner.call(offer)
    reader.call(link, (5, owner.address))
    with stopped(owner):
        assert reader.call(interrupt, has_operation, fetch, 5) is KeyboardInterrupt
        assert reader.call(links) == [(5, "local", "broken")]
    assert until(lambda: reader.call(fetch_code, 5) is S.LLM_SUCCESS)
    assert until(lambda: owner.stats()["pins"] == 0)
    owner.call(withdraw)


def test_ctrl_c_while_linking(pair):
    _, reader = pair
    with socket.create_server(("127.0.0.1", 0)) as silent:
        reader.call(keep_fds)
        # The pool of the helper thread and its event need no descriptor: the one more is the connection.
        assert reader.call(interrupt, is_connecting, link_for_ever, (9, silent.getsockname())) is KeyboardInterrupt
    assert reader.call(links) == [(1, "local", "active")]
    reader.call(keep_fds)


def link_for_ever(node, target):
    link(node, target, timeout_ms=FOR_EVER_MS)


def unlink_for_ever(node, target):
    unlink(node, target, timeout_ms=FOR_EVER_MS)


def test_ctrl_c_while_unlinking(peers):
    owner, reader = peers.start(5), peers.start(6)
    reader.call(link, (5, owner.address))
    with stopped(owner):
        assert reader.call(interrupt, has_operation, unlink_for_ever, (5, owner.address)) is KeyboardInterrupt
    assert reader.call(unlink, (5,), force=True)[0] is S.LLM_SUCCESS
    assert reader.call(link, (5, owner.address))[0] is S.LLM_SUCCESS


# ------------------------------------------------------------------------------- memory that is given up under a pull

def give_up_under_a_pull(node, byte):
    """Once somebody reads the key's cache, drop key and handle, and fill whatever memory there is to get."""
    deadline = time.monotonic() + SETTLE_S
    while not node.dist.stats()["pins"]:        # without a pause: a pull takes less than one
        if time.monotonic() > deadline:
            return False
    drop_large(node)
    while True:
        try:
            cache = node.cache_manager.allocate_cache(LARGE)
        except LLMException as error:
            assert error.status_code is S.LLM_OUT_OF_MEMORY
            break
        node.kept.setdefault("others", []).append(cache)
        fill(cache, byte)
    return True


def drop_others(node):
    for cache in node.kept.pop("others", ()):
        node.cache_manager.deallocate_cache(cache)


def pull_large_until_gone(node, cluster_id):
    """Pull until the key is gone; all bytes that ever came."""
    cache = node.cache_manager.allocate_cache(LARGE)
    manager, found = node.cache_manager, set()
    try:
        while True:
            manager.pull_cache(large_key(cluster_id), cache)
            found |= contents(cache)
            fill(cache, 0)
    except LLMException as error:
        return found, error.status_code
    finally:
        manager.deallocate_cache(cache)


@pytest.mark.parametrize("env", [{}, TCP_ONLY], ids=["any path", "tcp"])
def test_a_running_pull_keeps_the_bytes(peers, env):
    owner, reader = peers.start(5, engine_options(device_pool=3 * LARGE_BYTES * 2)), peers.start(6, env=env)
    reader.call(link, (5, owner.address))
    for _ in range(3):
        owner.call(hold_large, 1)
        pulling = reader.begin(pull_large_until_gone, 5)
        assert owner.call(give_up_under_a_pull, 0xEE)
        assert pulling() == ({1}, S.LLM_KV_CACHE_NOT_EXIST)
        owner.call(drop_others)
        stats = owner.stats()
        assert until(lambda: owner.stats()["pins"] == 0)
        assert stats["device_pool"]["free_bytes"] == stats["device_pool"]["bytes"]


# -------------------------------------------------------------------------------------------------- finalize meanwhile

def test_the_peer_is_finalized_under_a_pull(peers):
    owner, reader = peers.start(5), peers.start(6)
    for _ in range(3):
        owner.call(hold_large, 1)
        assert reader.call(link, (5, owner.address))[0] is S.LLM_SUCCESS
        pulling = reader.begin(pull_large_until_gone, 5)
        time.sleep(0.05)                # in the middle of a pull, most of the time; what must hold holds at any moment
        owner.finalize()
        found, code = pulling()
        assert found <= {1} and code is S.LLM_NOT_YET_LINK, (found, code)
        assert reader.call(unlink, (5,), force=True)[0] is S.LLM_SUCCESS
        owner.open(5, engine_options(), LLMRole.MIX)


def finalize_under_own_pulls(node, cluster_id):
    with ThreadPoolExecutor(2) as pool:
        pulling = [pool.submit(pull_large_until_error, node, cluster_id) for _ in range(2)]
        until(lambda: has_operation(node))
        finalize(node.dist)
        return {future.result() for future in pulling}


def pull_large_until_error(node, cluster_id):
    try:
        pull_large_for_ever(node, cluster_id)
    except LLMException as error:
        return error.status_code


def test_finalizing_under_own_pulls(peers):
    owner, reader = peers.start(5), peers.start(6, engine_options(device_pool=128 << 20))
    owner.call(hold_large, 1)
    reader.call(link, (5, owner.address))
    assert reader.call(finalize_under_own_pulls, 5) <= {S.LLM_NOT_YET_LINK, S.LLM_FAILED}
    assert owner.call(wait_links, []) == []
    assert until(lambda: owner.stats()["pins"] == 0)
    owner.call(drop_large)


def test_byte_of_a_cluster_is_never_zero():
    """A cache that nobody has written is not taken for one that was offered."""
    assert all(byte_of(cluster_id) for cluster_id in range(600))
