"""What two linked processes record, read from outside while they run."""
import asyncio
import gzip
import json
import os
import signal
import threading
import time

import pytest
from observe.steps import DESC, drop, ping, publish, pull, pull_in_vain
from support.link_steps import cluster
from support.peer import engine_options

from llm_datadist import (
    BlocksCacheKey,
    CacheDesc,
    CacheKey,
    DataType,
    HeldBlocksKey,
    LLMException,
    LLMParamInvalidError,
    LLMRole,
    LLMStatusCode,
    trace_context,
)
from llm_datadist.observe import layout
from llm_datadist.observe.records import find_records, folder_records
from llm_datadist.observe.timeline import Recording, clock_offsets, write_trace


def begin_trace(node, path):
    node.session = node.dist.trace(path)


def end_trace(node):
    return node.session.stop()


def records_of(*processes):
    """The records of these processes, in their order."""
    found = {record.pid: record for record in find_records()}
    wanted = [found.pop(process.pid) for process in processes]
    for record in found.values():
        record.close()
    return wanted


@pytest.fixture(params=[{}, {"LLM_DATADIST_HOST_PATHS": "tcp", "LLM_DATADIST_SHARED_TABLE": "0"}],
                ids=["shared memory", "tcp"])
def pair(peers, request):
    """Decode (1) linked to prefill (2), both traced."""
    options = {**engine_options(), "llm.Trace": "1"}
    prefill = peers.start(2, options, role=LLMRole.PROMPT, env=request.param)
    decode = peers.start(1, options, role=LLMRole.DECODER, env=request.param)
    peers.link(decode, prefill)
    prefill.call(publish, 10, 20)
    decode.call(pull, 10, 20)
    return decode, prefill


def by_cluster(record):
    return {peer.cluster_id: peer for peer in record.peers()}


def test_counters_of_both_ends(pair):
    decode, prefill = pair
    decode.call(pull_in_vain, 99)
    decode.call(ping)
    prefill.settled()
    here, there = records_of(decode, prefill)
    with here, there:
        assert (here.cluster_id, there.cluster_id) == (1, 2)
        assert here.head()["role"] == "decoder" and there.head()["role"] == "prompt"
        peer = by_cluster(here)[2]
        assert (peer.num_links, peer.state, peer.num_broken, peer.num_opened) == (1, "active", 0, 1)
        assert (peer.operations["pull"].count, peer.operations["pull"].failures) == (21, 1)
        assert peer.operations["pull"].bytes == 20 * 2 * 4096
        assert (peer.operations["ping"].count, peer.operations["link"].count) == (1, 1)
        assert peer.operations["push"].count == 0
        assert 0 < peer.operations["pull"].quantile_us(0.5) <= peer.operations["pull"].quantile_us(0.99)
        peer = by_cluster(there)[1]
        assert (peer.num_links, peer.address) == (1, "127.0.0.1")
        served = peer.operations["serve"].count + peer.operations["answer"].count
        assert served >= 1 and peer.operations["serve"].bytes in (0, 19 * 2 * 4096, 20 * 2 * 4096)


def test_caches_and_keys(pair):
    decode, prefill = pair
    prefill.call(publish, 50, 2)
    (there,) = records_of(prefill)
    with there:
        time.sleep(0.02)
        found = there.caches()
        assert [cache.keys for cache in found] == [[{"kind": "req", "id": id, "model_id": 0}] for id in (50, 51)]
        assert all(cache.bytes == 2 * 4096 and not cache.is_open and cache.owned for cache in found)
        assert 0.02 <= found[0].age_s < 60 and found[0].age_s >= found[1].age_s
        decode.call(pull, 50, 1)
        prefill.settled()
        assert [cache.keys[0]["id"] for cache in there.caches()] == [51]
        prefill.call(drop, 51, 1)
        assert there.caches() == []


def test_a_trace_of_both_ends(pair, tmp_path):
    decode, prefill = pair
    prefill.call(publish, 70, 3)
    path = tmp_path / "trace.json"
    decode.call(begin_trace, str(path))
    decode.call(pull, 70, 3)
    prefill.settled()                               # through shared memory the owner takes releases in when it looks
    result = decode.call(end_trace)
    assert result["engines"] == 2 and result["lost"] == 0
    entries = json.loads(path.read_text())["traceEvents"]
    names = {entry["pid"]: entry["args"]["name"] for entry in entries if entry["name"] == "process_name"}
    assert [name.split(" (")[0] for name in names.values()] == ["decode cluster 1", "prefill cluster 2"]
    pulls = [entry for entry in entries if entry["ph"] == "X" and entry["name"] == "pull"]
    assert [entry["args"]["request_id"] for entry in pulls] == [70, 71, 72]
    assert all(entry["args"]["bytes"] == 2 * 4096 and entry["args"]["peer"] == 2 for entry in pulls)
    moves = [entry for entry in entries if entry["ph"] == "X" and entry["name"] == "move" and entry["pid"] == 1]
    assert len(moves) == 3
    for outer, step in zip(pulls, moves):
        assert outer["ts"] <= step["ts"] and step["ts"] + step["dur"] <= outer["ts"] + outer["dur"] + 0.001


def test_flows_lead_from_pulls_to_releases(pair, tmp_path):
    decode, prefill = pair
    prefill.settled()
    found = records_of(decode, prefill)
    recordings = [Recording.of(record) for record in found]
    for record in found:
        record.close()
    assert clock_offsets(recordings) == [0, 0]
    path = tmp_path / "trace.json"
    write_trace(path, recordings)
    entries = json.loads(path.read_text())["traceEvents"]
    starts = {entry["id"]: entry for entry in entries if entry["ph"] == "s" and entry["name"] == "released"}
    ends = {entry["id"]: entry for entry in entries if entry["ph"] == "f" and entry["id"] in starts}
    assert len(starts) == len(ends) == 20
    slices = [entry for entry in entries if entry["ph"] == "X"]
    for number, start in starts.items():
        end = ends[number]
        (source,) = [each for each in slices if each["name"] == "pull" and each["ts"] == start["ts"]
                     and each["pid"] == start["pid"] and each["tid"] == start["tid"]]
        (target,) = [each for each in slices if each["name"] == "release key" and each["ts"] == end["ts"]
                     and each["pid"] == end["pid"] and each["tid"] == end["tid"]]
        assert start["pid"] == 1 and end["pid"] == 2 and start["ts"] <= end["ts"]
        assert source["args"]["request_id"] == target["args"]["request_id"]


def test_clocks_of_two_hosts_are_aligned_by_what_they_exchanged(pair):
    decode, prefill = pair
    for _ in range(20):
        decode.call(ping)
    found = records_of(decode, prefill)
    here, there = [Recording.of(record) for record in found]
    for record in found:
        record.close()
    there.boot_id = "another host"
    there.events = there.events.copy()
    there.events["start_ns"] += 5_000_000_000       # its clock is 5 s ahead; the wall clocks know to 1 s
    there.wall_offset_ns -= 6_000_000_000
    (first, offset) = clock_offsets([here, there])
    asked = here.events[here.events["kind"] == layout.EVENTS.index("ask")]
    assert first == 0 and abs(offset + 5_000_000_000) <= int(asked["duration_ns"].min())


def test_seen_while_it_is_stopped_and_gone_when_it_was_killed(peers):
    child = peers.start(2, engine_options())
    child.signal(signal.SIGSTOP)
    try:
        (record,) = records_of(child)
        with record:
            assert record.cluster_id == 2 and record.caches() == []
    finally:
        child.signal(signal.SIGCONT)
    child.kill()
    assert child.pid not in [record.pid for record in find_records()]


def fork(node):
    pid = os.fork()
    if pid == 0:
        try:
            time.sleep(30)
        finally:
            os._exit(0)
    return pid


def test_a_forked_child_is_no_engine(peers):
    child = peers.start(2, engine_options())
    forked = child.call(fork)
    try:
        pids = [record.pid for record in find_records()]
        assert child.pid in pids and forked not in pids
    finally:
        os.kill(forked, signal.SIGKILL)


def test_a_folder_keeps_the_events_of_a_process_that_was_killed(peers, tmp_path):
    folder = tmp_path / "traces"
    env = {"LLM_DATADIST_TRACE": str(folder)}
    prefill, decode = peers.start(2, env=env), peers.start(1)
    peers.link(decode, prefill)
    prefill.call(publish, 1, 1)
    decode.call(pull, 1, 1)
    prefill.settled()
    (path,) = folder.glob("*.ldd-record")
    assert path.stat().st_mode & 0o777 == 0o600
    prefill.kill()
    (record,) = folder_records(folder)
    with record:
        events, lost = record.events()
        assert lost == 0 and layout.EVENTS.index("key_gone") in events["kind"]


@pytest.mark.parametrize("part", ["folder", "file"])
def test_a_folder_that_cannot_be_written_to_is_named_by_init(peers, tmp_path, part):
    (tmp_path / "taken").write_text("", encoding="ascii")
    folder = str(tmp_path / "taken" / "traces") if part == "folder" else "/proc"
    with pytest.raises(LLMException, match=rf"LLM_DATADIST_TRACE: no {part} for the trace: .*: {folder}") as caught:
        peers.start(2, env={"LLM_DATADIST_TRACE": folder})
    assert caught.value.status_code == LLMStatusCode.LLM_FAILED


def test_nothing_is_recorded_unless_it_is_asked_for(peers):
    prefill, decode = peers.start(2), peers.start(1)
    peers.link(decode, prefill)
    prefill.call(publish, 1, 1)
    decode.call(pull, 1, 1)
    (record,) = records_of(decode)
    with record:
        events, _ = record.events()
        assert len(events) == 0 and not record.head()["tracing"]
        assert by_cluster(record)[2].operations["pull"].count == 1


def test_blocks_are_named_in_a_trace(peers, tmp_path):
    options = {**engine_options(), "llm.Trace": "1"}
    prefill, decode = peers.start(2, options), peers.start(1, options)
    peers.link(decode, prefill)
    path = tmp_path / "trace.json.gz"
    decode.call(_pull_blocks, prefill.call(_blocks), str(path))
    prefill.call(_free)
    with gzip.open(path, "rt") as source:
        entries = json.load(source)["traceEvents"]
    assert [entry["args"]["key"] for entry in entries if entry["name"] == "pull"] == ["blocks, model 3"]


def _blocks(node):
    desc = CacheDesc(1, [4, 64], DataType.DT_UINT8)
    node.blocks = node.cache_manager.allocate_blocks_cache(desc, BlocksCacheKey(2, 3))
    return desc


def _free(node):
    node.cache_manager.deallocate_blocks_cache(node.blocks)


def _pull_blocks(node, desc, path):
    cache = node.cache_manager.allocate_blocks_cache(desc)
    with node.dist.trace(path) as session:
        node.cache_manager.pull_blocks(BlocksCacheKey(2, 3), cache, [1], [2])
    node.cache_manager.deallocate_blocks_cache(cache)
    return session.result


def churn(node, count):
    def work():
        for _ in range(count):
            node.cache_manager.deallocate_cache(node.cache_manager.allocate_cache(DESC))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_the_oldest_events_are_lost_and_counted(peers):
    child = peers.start(2, {**engine_options(), "llm.Trace": "1"})
    child.call(churn, 10_000)
    (record,) = records_of(child)
    with record:
        events, lost = record.events()
        head = record.head()
    assert head["events"] == 80_000 and lost == head["events_lost"] == 80_000 - len(events)
    # Places that were just being written were given up, which is rare.
    assert 65_000 <= len(events) <= 65_536 and len(set(events["seq"].tolist())) == len(events)
    assert events["seq"].min() >= 80_000 - 65_536 and events["seq"].max() == 80_000
    assert set(events["kind"].tolist()) == set(layout.names_of(["allocate", "free"]))
    assert set(events["bytes"].tolist()) == {2 * 4096} and len(set(events["thread"].tolist())) <= 4


TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def pull_for(node, first, count, traceparent):
    with trace_context(traceparent):
        pull(node, first, count)


def pull_in_tasks(node, requests):
    """One pull in each of several tasks, of which each has a trace of its own."""
    cache = node.cache_manager.allocate_cache(DESC)

    async def one(request):
        with trace_context(f"00-{request:032x}-{PARENT}-01"):
            await asyncio.sleep(0)
            node.cache_manager.pull_cache(CacheKey(2, request), cache)

    async def every():
        await asyncio.gather(*(one(request) for request in requests))

    asyncio.run(every())
    node.cache_manager.deallocate_cache(cache)


def test_a_trace_context_reaches_the_owner(pair, tmp_path, request):
    """Over TCP the owner's own events name it; of shared memory, where it was not asked, the joined file does."""
    decode, prefill = pair
    prefill.call(publish, 60, 6)
    decode.call(pull, 60, 1)
    decode.call(pull_for, 61, 2, f"00-{TRACE}-{PARENT}-01")
    decode.call(pull_for, 63, 1, None)
    decode.call(pull_in_tasks, [64, 65])
    prefill.settled()
    found = records_of(decode, prefill)
    recordings = [Recording.of(record) for record in found]
    for record in found:
        record.close()
    path = tmp_path / "trace.json"
    write_trace(path, recordings)
    entries = json.loads(path.read_text())["traceEvents"]
    slices = [entry for entry in entries if entry["ph"] == "X"]
    assert "context" not in {entry["name"] for entry in slices}
    wanted = {61: TRACE, 62: TRACE, 64: f"{64:032x}", 65: f"{65:032x}"}
    for name in ("pull", "release key"):
        traces = {entry["args"]["request_id"]: entry["args"].get("trace_id") for entry in slices
                  if entry["name"] == name and entry["args"]["request_id"] >= 60}
        assert traces == {60: None, 63: None, **wanted}, name
    assert {entry["args"].get("parent_id") for entry in slices if "trace_id" in entry["args"]} == {PARENT}
    moves = [entry["args"].get("trace_id") for entry in slices if entry["name"] == "move"][-6:]
    assert sorted(moves, key=str) == sorted([None, None, *wanted.values()], key=str)
    write_trace(path, recordings[1:])
    own = [entry for entry in json.loads(path.read_text())["traceEvents"] if entry["name"] == "serve"]
    traces = {entry["args"]["request_id"]: entry["args"].get("trace_id") for entry in own
              if entry["args"]["request_id"] >= 60}
    assert traces == ({60: None, 63: None, **wanted} if "tcp" in request.node.name else {})


@pytest.mark.parametrize("traceparent", [
    "", TRACE, f"00-{TRACE}-{PARENT}", f"00-{TRACE}-{PARENT}-01-more", f"ff-{TRACE}-{PARENT}-01",
    f"00-{'0' * 32}-{PARENT}-01", f"00-{TRACE}-{'0' * 16}-01", f"00-{TRACE.upper()}-{PARENT}-01",
    f"00-{TRACE}-{PARENT}-01\n"])
def test_no_trace_context(traceparent):
    with pytest.raises(LLMParamInvalidError, match="traceparent"), trace_context(traceparent):
        pass


def test_trace_contexts_nest_and_end():
    from llm_datadist.core.record.record import trace_context as current

    with pytest.raises(TypeError), trace_context(7):
        pass
    with trace_context(f"00-{TRACE}-{PARENT}-01"):
        outer = current.get()
        with trace_context(f"01-{PARENT * 2}-{PARENT}-00-more"):        # a later version may say more
            assert current.get() == (int(PARENT, 16),) * 3
        assert current.get() == outer == (int(TRACE[:16], 16), int(TRACE[16:], 16), int(PARENT, 16))
    assert current.get() is None


def link_in_vain(node, ids):
    for cluster_id in ids:
        code, _ = node.dist.link_clusters([cluster(cluster_id, ("127.0.0.1", 1))], 1000)
        assert code is not LLMStatusCode.LLM_SUCCESS


def test_more_peers_than_there_is_room_for_are_added_up(peers):
    prefill, decode = peers.start(2), peers.start(1)
    peers.link(decode, prefill)
    decode.call(link_in_vain, range(1000, 2200))
    (record,) = records_of(decode)
    with record:
        found = record.peers()
    assert len(found) == 1024 and len({peer.cluster_id for peer in found}) == 1024
    assert {2, 2199} <= {peer.cluster_id for peer in found} and 1000 not in {peer.cluster_id for peer in found}
    assert sum(peer.operations["link"].count for peer in found) == 1201
    assert sum(peer.operations["link"].failures for peer in found) == 1200
    assert found[0].operations["link"].failures == 1200 - 1022


def hold(node):
    node.blocks = node.cache_manager.allocate_blocks_cache(CacheDesc(1, [4, 64], DataType.DT_UINT8), BlocksCacheKey(2))
    for request in (7, 8):
        node.cache_manager.hold_blocks(node.blocks, HeldBlocksKey(2, request))


def drop_hold(node, request):
    assert node.cache_manager.drop_blocks(HeldBlocksKey(2, request))


def free_blocks(node):
    node.cache_manager.deallocate_blocks_cache(node.blocks)


def test_held_blocks_are_counted(peers):
    child = peers.start(2)
    child.call(hold)
    (record,) = records_of(child)
    with record:
        assert record.head()["held_requests"] == 2
        child.call(drop_hold, 7)
        assert record.head()["held_requests"] == 1
        child.call(drop_hold, 8)
        assert record.head()["held_requests"] == 0
    child.call(free_blocks)
