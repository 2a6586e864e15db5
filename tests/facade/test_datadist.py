"""`LLMDataDist`: construction, init and finalize, accessors and modes, roles, and the checks of `link` and its kin."""
import gc
import json
import os
import re
import socket
import subprocess
import sys
import threading
import warnings

import pytest
from support.engines import CLUSTER, NO_ID, NOT_UINT64, desc
from support.peer import engine_options, engine_options_v1, finalize

import llm_datadist
import llm_datadist_v1
from llm_datadist import (
    CacheKey,
    LLMClusterInfo,
    LLMDataDist,
    LLMException,
    LLMRole,
    LLMStatusCode,
    RegisterMemStatus,
)
from llm_datadist.v2.llm_datadist import _shutdown_handler

LISTEN = "llm.listenIpInfo"
BACKEND = {"llm_TransferBackend": "hixl", "llm_listenIpInfo": "127.0.0.1:0", "llm_EnableRemoteCacheAccessible": "1"}


def options(**extra):
    return engine_options(device_pool=1 << 20, host_pool=1 << 20, listen=False, **extra)


def options_v1(**extra):
    return engine_options_v1(device_pool=1 << 20, **extra)


@pytest.fixture
def start():
    """Initialise engines of this process, one at a time; the last one is finalised at the end."""
    made = []

    def call(options=None, role=LLMRole.MIX, cluster_id=CLUSTER):
        for dist in made:
            finalize(dist)
        made[:] = [LLMDataDist(role, cluster_id)]
        made[0].init(globals()["options"]() if options is None else options)
        return made[0]

    yield call
    for dist in made:
        finalize(dist)
    assert LLMDataDist.llm_engine_instance is None


def resources():
    """What a process holds that an engine must give back; engines of earlier tests hold nothing any more."""
    gc.collect()
    with open("/proc/self/maps", encoding="ascii") as maps:
        mapped = sorted(line.split(maxsplit=5)[5] for line in maps if "memfd" in line)
    return {"threads": sorted(os.listdir("/proc/self/task")), "fds": len(os.listdir("/proc/self/fd")), "memory": mapped}


@pytest.fixture
def nothing_left():
    """Whatever the test does, threads, file descriptors and shared memory are back afterwards."""
    warm = LLMDataDist(LLMRole.MIX, CLUSTER)        # the first engine loads libraries for good
    warm.init(options())
    warm.finalize()
    before = resources()
    yield
    assert resources() == before


# ------------------------------------------------------------------------------------------------ construction

@pytest.mark.parametrize("role, cluster_id, kind", [
    ("PROMPT", 1, "TE"), (1, 1, "TE"), (None, 1, "TE"),
    *((LLMRole.MIX, value, kind) for value, kind in NOT_UINT64),
])
def test_construction_refuses(assert_raises, role, cluster_id, kind):
    assert_raises(kind, LLMDataDist, role, cluster_id)


@pytest.mark.parametrize("role", LLMRole)
@pytest.mark.parametrize("cluster_id", [0, 1, 2**48 + 5, NO_ID])
def test_construction_opens_nothing(role, cluster_id):
    before = resources()
    assert LLMDataDist(role, cluster_id).cluster_id == cluster_id
    assert resources() == before and LLMDataDist.llm_engine_instance is None


# -------------------------------------------------------------------------------------------- init and finalize

@pytest.mark.parametrize("role, bad, kind", [
    (LLMRole.MIX, None, "AE"), (LLMRole.MIX, [], "TE"), (LLMRole.MIX, "options", "TE"),
    (LLMRole.MIX, {"ge.flowGraphMemMaxSize": 1}, "TE"), (LLMRole.MIX, {"ge.flowGraphMemMaxSize": "1,2"}, "PI"),
    (LLMRole.MIX, {"ge.flowGraphMemMaxSize": "lots"}, "PI"), (LLMRole.MIX, options(llm_SyncKvCacheWaitTime="0"), "PI"),
    (LLMRole.MIX, options(llm_SyncKvCacheWaitTime="soon"), "PI"),
    (LLMRole.MIX, options(llm_EnableRemoteCacheAccessible="yes"), "PI"),
    (LLMRole.MIX, options(llm_LocalCommRes="", llm_EnableCacheManager="0"), "PI"),
    (LLMRole.MIX, options(llm_TransferBackend="hixl"), "PI"),
    (LLMRole.MIX, options(llm_TransferBackend="hixl", llm_listenIpInfo="127.0.0.1:0",
                          llm_EnableRemoteCacheAccessible="0"), "PI"),
    (LLMRole.MIX, options_v1(llm_TransferBackend="hixl"), "PI"),
    (LLMRole.MIX, options(llm_listenIpInfo="127.0.0.1"), "PI"),
    (LLMRole.MIX, options(llm_listenIpInfo="::1:0"), "PI"),
    (LLMRole.MIX, options(llm_listenIpInfo="127.0.0.1:http"), "VE"),
    (LLMRole.MIX, options(llm_MemPoolConfig='{"memory_size": 0}'), "PI"),
    (LLMRole.MIX, options(llm_MemPoolConfig="{"), "PI"), (LLMRole.MIX, options(llm_HostMemPoolConfig="[]"), "PI"),
    (LLMRole.MIX, options(llm_MemPoolConfig='{"memory_size": 4096, "page_shift": 13}'), "PI"),
    (LLMRole.MIX, options(llm_MemPoolConfig='{"memory_size": 1125899906842624, "page_shift": 30}'), "OUT_OF_MEMORY"),
    (LLMRole.MIX, options(llm_HostMemPoolConfig='{"memory_size": 1125899906842624, "page_shift": 30}'), "FAILED"),
    (LLMRole.PROMPT, options_v1(listen=False), "PI"), (LLMRole.DECODER, {}, "PI"),
    (LLMRole.PROMPT, {**options_v1(), "ge.exec.deviceId": "0;1"}, "PI"),
])
def test_a_failed_init_leaves_nothing_and_may_be_repeated(nothing_left, assert_raises, role, bad, kind):
    dist = LLMDataDist(role, CLUSTER)
    before = resources()
    assert_raises(kind, dist.init, bad)
    assert resources() == before and LLMDataDist.llm_engine_instance is None
    assert_raises("FAILED", lambda: dist.cache_manager)
    dist.finalize()
    dist.init(options())
    assert dist.cache_manager.is_initialized()
    dist.finalize()


def test_init_fails_where_the_port_is_taken(nothing_left, assert_raises):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        dist = LLMDataDist(LLMRole.MIX, CLUSTER)
        before = resources()
        error = assert_raises("FAILED", dist.init, options(llm_listenIpInfo=address))
        assert address.rpartition(":")[2] in str(error)
        assert resources() == before
    dist.init(options(llm_listenIpInfo=address))
    assert dist.listen_address == ("127.0.0.1", int(address.rpartition(":")[2]))
    dist.finalize()


def test_init_leaves_the_options_alone(start):
    for mine in (options(), options_v1()):
        kept = dict(mine)
        start(mine)
        assert mine == kept


def test_a_second_init_of_the_same_object_is_silent(start):
    dist = start()
    manager, state = dist.cache_manager, resources()
    dist.init(options_v1())
    dist.init(None)
    assert dist.cache_manager is manager and resources() == state


def test_a_second_instance_is_refused(start, assert_raises):
    dist = start()
    other = LLMDataDist(LLMRole.MIX, 2)
    state = resources()
    assert_raises("FAILED", other.init, options())
    assert resources() == state
    assert LLMDataDist.llm_engine_instance is dist and dist.cache_manager.is_initialized()
    other.finalize()                                                # never initialised: nothing
    assert LLMDataDist.llm_engine_instance is dist
    dist.finalize()
    other.init(options())
    assert LLMDataDist.llm_engine_instance is other
    other.finalize()


def test_init_and_finalize_in_turn(nothing_left):
    dist = LLMDataDist(LLMRole.PROMPT, CLUSTER)
    dist.finalize()
    for turn in range(6):
        dist.init(options_v1() if turn % 2 else options(llm_listenIpInfo="127.0.0.1:0"))
        manager = dist.kv_cache_manager if turn % 2 else dist.cache_manager
        cache = manager.allocate_cache(desc())
        assert dist.stats()["caches"] == 1 and cache.cache_id == 1
        finalize(dist)
        dist.finalize()
        assert LLMDataDist.llm_engine_instance is None


def test_finalize_frees_what_was_left(nothing_left):
    dist = LLMDataDist(LLMRole.MIX, CLUSTER)
    dist.init(options())
    dist.cache_manager.allocate_cache(desc(), [CacheKey(1, 1)])
    dist.cache_manager.allocate_blocks_cache(desc())
    dist.cache_manager.register_cache(desc(num_tensors=1), [4096])
    finalize(dist)


def test_the_engine_works_from_a_dict_made_by_hand(start):
    dist = start({"ge.exec.deviceId": "0", "llm.EnableCacheManager": "1", "llm.RdmaServiceLevel": "4", "other": "key"})
    assert dist.cache_manager.is_initialized() and dist.listen_address is None
    assert start({"llm.LocalCommRes": ""}).cache_manager.is_initialized()           # no device id: device 0


def test_threads_that_init_at_once_get_one_engine(nothing_left):
    instances = [LLMDataDist(LLMRole.MIX, cluster_id) for cluster_id in range(4)]
    outcomes = [None] * 4
    barrier = threading.Barrier(4)

    def work(index):
        barrier.wait()
        try:
            instances[index].init(options())
            outcomes[index] = "up"
        except LLMException as error:
            outcomes[index] = error.status_code

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(str, outcomes)) == sorted([str(LLMStatusCode.LLM_FAILED)] * 3 + ["up"])
    for dist in instances:
        dist.finalize()


def test_the_exit_handler_finalises_the_live_instance(nothing_left):
    _shutdown_handler()
    dist = LLMDataDist(LLMRole.MIX, CLUSTER)
    dist.init(options())
    _shutdown_handler()
    assert LLMDataDist.llm_engine_instance is None
    with pytest.raises(RuntimeError):
        _ = dist.cache_manager


def test_the_exit_handler_swallows_what_finalize_raises(start, monkeypatch):
    dist = start()

    def fail(**_):
        raise LLMException("cannot", status_code=LLMStatusCode.LLM_FAILED)

    monkeypatch.setattr(dist, "_close", fail)
    _shutdown_handler()
    monkeypatch.undo()


@pytest.mark.parametrize("ending", ["", "finalize(dist)", "raise SystemExit(0)"])
def test_a_process_may_end_without_finalize(ending):
    """With a cache, a key, a KvCache and a transfer thread alive."""
    code = f"""
import sys
sys.path.insert(0, {os.path.dirname(os.path.dirname(__file__))!r})
from support.engines import Synchronizer, desc
from llm_datadist import *
from support.peer import engine_options_v1, finalize
dist = LLMDataDist(LLMRole.PROMPT, 1)
dist.init(engine_options_v1(device_pool=1 << 20))
cache = dist.kv_cache_manager.allocate_cache(desc(), [CacheKey(1, 1)])
task = dist.kv_cache_manager.transfer_cache_async(cache, Synchronizer(), [TransferConfig(9, [1] * 4)])
task.synchronize()
{ending}
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60,
                          check=False)
    assert done.returncode == 0
    assert re.fullmatch(r"\[ERROR\] .* cluster 9 is not linked\..*\n", done.stderr), done.stderr


def test_a_forked_child_is_refused_and_harms_nothing(start, assert_raises):
    dist = start()
    manager = dist.cache_manager
    cache = manager.allocate_cache(desc())

    def child():
        assert_raises("FAILED", manager.allocate_cache, desc())
        assert_raises("FAILED", manager.deallocate_cache, cache)
        assert_raises("FAILED", lambda: dist.cache_manager)
        assert_raises("FAILED", dist.stats)
        error = assert_raises("FAILED", LLMDataDist(LLMRole.MIX, 2).init, options())
        assert "forked" in str(error)
        _shutdown_handler()
        dist.finalize()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)         # of fork with threads, which is what is tested
        pid = os.fork()
    if pid == 0:
        try:
            child()
            os._exit(0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0
    assert dist.stats()["caches"] == 1
    dist.cache_manager.deallocate_cache(cache)


# -------------------------------------------------------------------------------------------- accessors, modes

V2_ONLY = {
    "cache_manager": lambda dist: dist.cache_manager,
    "link": lambda dist: dist.link("name", {1: 0, 2: 1}, table(2)),
    "unlink": lambda dist: dist.unlink(1),
    "query_register_mem_status": lambda dist: dist.query_register_mem_status(1),
}
V1_ONLY = {
    "kv_cache_manager": lambda dist: dist.kv_cache_manager,
    "check_link_status": lambda dist: dist.check_link_status(1),
}
BOTH = {
    "link_clusters": lambda dist: dist.link_clusters([]),
    "unlink_clusters": lambda dist: dist.unlink_clusters([]),
    "switch_role": lambda dist: dist.switch_role(LLMRole.MIX),
    "stats": lambda dist: dist.stats(),
    "links": lambda dist: dist.links(),
    "listen_address": lambda dist: dist.listen_address,
}


@pytest.mark.parametrize("call", [*V2_ONLY.values(), *V1_ONLY.values(), *BOTH.values()],
                         ids=[*V2_ONLY, *V1_ONLY, *BOTH])
def test_nothing_works_before_init_or_after_finalize(start, assert_raises, call):
    fresh = LLMDataDist(LLMRole.MIX, CLUSTER)
    assert str(assert_raises("FAILED", call, fresh)) == "llm datadist is not initialized"
    dist = start()
    dist.finalize()
    assert str(assert_raises("FAILED", call, dist)) == "llm datadist is not initialized"
    assert dist.cluster_id == CLUSTER


@pytest.mark.parametrize("operation", V2_ONLY)
def test_calls_of_the_second_generation_need_its_mode(start, assert_raises, operation):
    error = assert_raises("PI", V2_ONLY[operation], start(options_v1(), LLMRole.PROMPT))
    assert operation in str(error)


@pytest.mark.parametrize("operation", V1_ONLY)
def test_calls_of_the_first_generation_need_its_mode(start, assert_raises, operation):
    error = assert_raises("PI", V1_ONLY[operation], start())
    assert operation in str(error)


def test_managers_are_always_the_same_object(start):
    dist = start()
    assert dist.cache_manager is dist.cache_manager
    assert type(dist.cache_manager) is llm_datadist.CacheManager
    dist = start(options_v1())
    assert dist.kv_cache_manager is dist.kv_cache_manager
    assert type(dist.kv_cache_manager) is llm_datadist.KvCacheManager


def test_the_package_of_the_first_generation_has_the_very_same_classes(start, assert_raises):
    for name in llm_datadist_v1.__all__:
        assert getattr(llm_datadist_v1, name) is getattr(llm_datadist, name)
    dist = start(options_v1(), LLMRole.PROMPT)
    with pytest.raises(llm_datadist_v1.LLMException):
        dist.kv_cache_manager.pull_cache(CacheKey(1, 1), None)
    dist = start()
    with pytest.raises(llm_datadist_v1.LLMException):
        dist.cache_manager.deallocate_cache(dist.cache_manager.register_blocks_cache(desc(num_tensors=1), [4096]))


# ------------------------------------------------------------------------------------------------ link, unlink

def table(num_devices):
    return json.dumps({"version": "1.0", "status": "completed", "server_count": "1", "server_list": [{
        "server_id": "0", "device": [{"device_id": str(i), "device_ip": "", "rank_id": str(i)}
                                     for i in range(num_devices)]}]})


@pytest.mark.parametrize("comm_name, members, text, kind", [
    (None, {1: 0, 2: 1}, table(2), "TE"), (b"name", {1: 0, 2: 1}, table(2), "TE"), (1, {1: 0, 2: 1}, table(2), "TE"),
    ("", {1: 0, 2: 1}, table(2), "PI"), ("n" * 128, {1: 0, 2: 1}, table(2), "PI"),
    ("name", None, table(2), "AE"), ("name", [(1, 0)], table(2), "TE"), ("name", {"1": 0, 2: 1}, table(2), "TE"),
    ("name", {1: "0", 2: 1}, table(2), "TE"), ("name", {1: None, 2: 1}, table(2), "TE"),
    ("name", {1: 0, 2: 1, 3: 2, 4: 3, 5: 4}, table(5), "PI"),
    ("name", {-1: 0, 2: 1}, table(2), "VE"), ("name", {2**64: 0, 2: 1}, table(2), "VE"),
    ("name", {1: -1, 2: 1}, table(2), "VE"), ("name", {1: 0, 2: 2**32}, table(2), "VE"),
    ("name", {1: 0, 2: 1}, None, "TE"), ("name", {1: 0, 2: 1}, {}, "TE"), ("name", {1: 0, 2: 1}, b"{}", "TE"),
    ("name", {}, table(2), "PI"), ("name", {1: 0}, table(2), "PI"), ("name", {1: 1, 2: 0}, table(2), "PI"),
    ("name", {1: 0, 2: 0}, table(2), "PI"), ("name", {2: 0, 3: 1}, table(2), "PI"),
    ("name", {1: 0, 2: 1}, "", "PI"), ("name", {1: 0, 2: 1}, "{", "PI"), ("name", {1: 0, 2: 1}, "[]", "PI"),
    ("name", {1: 0, 2: 2}, table(2), "PI"),
    # The order of the checks, where two things are wrong.
    ("", None, None, "PI"), ("name", {"1": 0, 2: 1, 3: 2, 4: 3, 5: 4}, None, "TE"),
    ("name", {-1: 0, 2: 1, 3: 2, 4: 3, 5: 4}, None, "PI"), ("name", {-1: 0}, None, "VE"), ("name", {1: 0}, None, "TE"),
])
def test_link_refuses(start, assert_raises, comm_name, members, text, kind):
    dist = start()
    assert_raises(kind, dist.link, comm_name, members, text)
    assert dist.links() == [] and not dist.cache_manager._linked
    assert_raises("NOT_YET_LINK", dist.unlink, 1)


def test_link_returns_ids_that_count_up_and_are_no_status_codes(start, assert_raises):
    dist = start()
    ids = [dist.link("n" * 127, {1: 0, 2: 1}, table(2)), dist.link("other", {0: 0, 1: 3, 2: 5}, table(6))]
    ids.append(dist.link("four", {1: 0, 2: 1, 3: 2, 4: 3}, table(4)))
    assert 1 <= ids[0] < ids[1] < ids[2] and not set(ids) & {int(code) for code in LLMStatusCode}
    assert [dist.query_register_mem_status(comm_id) for comm_id in ids] == [RegisterMemStatus.PREPARING] * 3
    assert_raises("NOT_YET_LINK", dist.cache_manager.pull_cache, CacheKey(2, 1), _slots(dist))
    for comm_id in ids:
        dist.unlink(comm_id)
        assert_raises("NOT_YET_LINK", dist.unlink, comm_id)
        assert_raises("NOT_YET_LINK", dist.query_register_mem_status, comm_id)


def _slots(dist):
    return dist.cache_manager.allocate_cache(desc())


def test_link_makes_registered_memory_local_by_default(start, assert_raises):
    dist = start()
    dist.unlink(dist.link("name", {1: 0, 2: 1}, table(2)))
    assert_raises("PI", dist.cache_manager.register_cache, desc(num_tensors=1), [4096], (), True)
    cache = dist.cache_manager.register_cache(desc(num_tensors=1), [4096])
    dist.cache_manager.unregister_cache(cache.cache_id)


def test_link_fails_when_its_time_is_up(start):
    dist = start(options(llm_LinkTotalTime="1"))
    comm_id = dist.link("name", {1: 0, 2: 1}, table(2))
    for _ in range(500):
        if dist.query_register_mem_status(comm_id) is not RegisterMemStatus.PREPARING:
            break
        threading.Event().wait(0.01)
    assert dist.query_register_mem_status(comm_id) is RegisterMemStatus.FAILED
    dist.unlink(comm_id)


def test_at_most_512_communicators(start, assert_raises):
    dist = start()
    ids = [dist.link(f"name {index}", {1: 0, 2: 1}, table(2)) for index in range(512)]
    assert_raises("PI", dist.link, "one more", {1: 0, 2: 1}, table(2))
    dist.unlink(ids[0])
    dist.link("one more", {1: 0, 2: 1}, table(2))


@pytest.mark.parametrize("operation", ["unlink", "query_register_mem_status"])
@pytest.mark.parametrize("value, kind", [*NOT_UINT64, *((value, "NOT_YET_LINK") for value in (0, 7, NO_ID))])
def test_unlink_and_query_refuse(start, assert_raises, operation, value, kind):
    assert_raises(kind, getattr(start(), operation), value)


def test_a_transfer_backend_has_no_communicators(start, assert_raises):
    dist = start(options(**BACKEND))
    assert_raises("NOT_ENABLED", dist.link, "name", {1: 0, 2: 1}, table(2))
    assert_raises("NOT_ENABLED", dist.unlink, 1)
    assert_raises("NOT_ENABLED", dist.query_register_mem_status, 1)
    assert_raises("TE", dist.unlink, "1")


@pytest.mark.parametrize("value, kind", [*NOT_UINT64, (7, "NOT_YET_LINK")])
def test_check_link_status_refuses(start, assert_raises, value, kind):
    assert_raises(kind, start(options_v1(), LLMRole.DECODER).check_link_status, value)


# ------------------------------------------------------------------------------------------------- switch_role

@pytest.fixture
def port():
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("generation", [1, 2])
@pytest.mark.parametrize("role, switch_options, kind", [
    ("PROMPT", None, "TE"), (2, None, "TE"), (None, None, "TE"),
    (LLMRole.PROMPT, [], "TE"), (LLMRole.PROMPT, "options", "TE"), (LLMRole.PROMPT, {LISTEN: 26000}, "TE"),
    (LLMRole.PROMPT, {LISTEN: "127.0.0.1"}, "PI"), (LLMRole.PROMPT, {LISTEN: "a:b:c"}, "PI"),
    (LLMRole.PROMPT, {LISTEN: "127.0.0.1:http"}, "VE"), (LLMRole.PROMPT, {LISTEN: "127.0.0.1:65536"}, "PI"),
])
def test_switch_role_refuses(start, assert_raises, generation, role, switch_options, kind):
    """Role and listener stay."""
    listening = options(llm_listenIpInfo="127.0.0.1:0") if generation == 2 else {
        **options_v1(), "llm.EnableSwitchRole": "1"}
    dist = start(listening)
    before = dist.listen_address, dist._role, resources()
    assert before[0] is not None
    assert_raises(kind, dist.switch_role, role, switch_options)
    assert (dist.listen_address, dist._role, resources()) == before


def test_switch_role_v2_opens_moves_and_closes_the_listener(start, port):
    dist = start()
    assert dist.listen_address is None
    cache = dist.cache_manager.allocate_cache(desc(), [CacheKey(1, 1)])
    dist.switch_role(LLMRole.PROMPT, {**options(), LISTEN: f"127.0.0.1:{port}"})
    assert dist.listen_address == ("127.0.0.1", port)
    with socket.create_connection(("127.0.0.1", port)):
        pass
    dist.switch_role(LLMRole.PROMPT, {LISTEN: f"127.0.0.1:{port}"})         # the current role, the same port: kept
    assert dist.listen_address == ("127.0.0.1", port)
    dist.switch_role(LLMRole.MIX, {LISTEN: "127.0.0.1:0"})
    assert dist.listen_address not in (None, ("127.0.0.1", port))
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
    dist.switch_role(LLMRole.DECODER)
    assert dist.listen_address is None
    assert (dist.stats()["caches"], dist.stats()["keys"]) == (1, 1)
    dist.cache_manager.deallocate_cache(cache)
    dist.cache_manager.remove_cache_key(CacheKey(1, 1))


def test_switches_of_the_second_generation_take_turns(start):
    dist = start()
    with dist._linker.exclusive():
        thread = threading.Thread(target=dist.switch_role, args=(LLMRole.PROMPT, {LISTEN: "127.0.0.1:0"}))
        thread.start()
        thread.join(0.05)
        assert thread.is_alive() and dist.listen_address is None
    thread.join()
    assert dist.listen_address is not None


@pytest.mark.parametrize("generation", [1, 2])
def test_switch_role_to_a_taken_port_changes_nothing(start, assert_raises, generation):
    listening = options(llm_listenIpInfo="127.0.0.1:0") if generation == 2 else {
        **options_v1(), "llm.EnableSwitchRole": "1"}
    dist = start(listening)
    before = dist.listen_address, dist._role
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        assert_raises("FAILED", dist.switch_role, LLMRole.PROMPT, {LISTEN: f"127.0.0.1:{taken.getsockname()[1]}"})
    assert (dist.listen_address, dist._role) == before
    with socket.create_connection(before[0]):
        pass


@pytest.mark.parametrize("generation", [1, 2])
def test_a_port_moves_between_processes(peers, generation):
    """Prefill and decode change places: one gives the port up, the other opens it, and back."""
    made = options() if generation == 2 else {**options_v1(listen=False), "llm.EnableSwitchRole": "1"}
    here, there = peers.here(1, made, role=LLMRole.DECODER), peers.start(2, made, role=LLMRole.DECODER)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        whole = {**made, LISTEN: f"127.0.0.1:{probe.getsockname()[1]}"}
    for listener, client in ((here, there), (there, here)) * 2:
        client.call(switch, LLMRole.MIX if generation == 1 and client is there else LLMRole.DECODER, None)
        assert client.call(listens_at) is None
        listener.address = listener.call(switch, LLMRole.PROMPT, whole)
        assert listener.address == ("127.0.0.1", int(whole[LISTEN].rpartition(":")[2]))
        if generation == 2:
            peers.link(client, listener)
            with pytest.raises(LLMException) as caught:
                listener.call(switch, LLMRole.DECODER, None)
            assert caught.value.status_code is LLMStatusCode.LLM_EXIST_LINK
            assert listener.call(listens_at) == listener.address
            peers.unlink(client, listener)


def switch(node, role, switch_options):
    if role is not node.dist._role or node.dist._require_engine().options.generation == 2:
        node.dist.switch_role(role, switch_options)
    return node.dist.listen_address


def listens_at(node):
    return node.dist.listen_address


@pytest.mark.parametrize("role, extra, to, switch_options, kind", [
    (LLMRole.PROMPT, {}, LLMRole.PROMPT, {LISTEN: "127.0.0.1:0"}, "PI"), (LLMRole.MIX, {}, LLMRole.MIX, None, "PI"),
    (LLMRole.DECODER, {}, LLMRole.PROMPT, None, "PI"), (LLMRole.DECODER, {}, LLMRole.PROMPT, {}, "PI"),
    (LLMRole.DECODER, {}, LLMRole.PROMPT, {LISTEN: "127.0.0.1:0"}, "NOT_ENABLED"),
    (LLMRole.PROMPT, {"llm.EnableSwitchRole": "0"}, LLMRole.DECODER, None, "NOT_ENABLED"),
    (LLMRole.DECODER, {"llm.EnableSwitchRole": "1", "ge.exec.deviceId": "0;1"}, LLMRole.MIX, None, "NOT_ENABLED"),
])
def test_switch_role_v1_refuses(start, assert_raises, role, extra, to, switch_options, kind):
    dist = start({**options_v1(), **extra}, role)
    before = dist.listen_address
    assert_raises(kind, dist.switch_role, to, switch_options)
    assert dist.listen_address == before and dist._role is role and dist.kv_cache_manager._role is role


def test_switch_role_v1_takes_the_manager_along(start, assert_raises):
    dist = start({**options_v1(listen=False), "llm.EnableSwitchRole": "1"}, LLMRole.DECODER)
    manager = dist.kv_cache_manager
    cache = manager.allocate_cache(desc())
    assert_raises("PI", manager.allocate_cache, desc(), [CacheKey(1, 1)])
    dist.switch_role(LLMRole.PROMPT, {LISTEN: "127.0.0.1:0"})
    assert dist.listen_address is not None
    keyed = manager.allocate_cache(desc(), [CacheKey(1, 1)])
    assert_raises("PI", manager.pull_cache, CacheKey(2, 1), cache)
    dist.switch_role(LLMRole.DECODER)
    assert dist.listen_address is None
    assert_raises("NOT_YET_LINK", manager.pull_cache, CacheKey(2, 1), cache)
    assert dist.stats()["caches"] == 2
    manager.deallocate_cache(cache)
    manager.deallocate_cache(keyed)


def test_switch_role_with_a_backend_keeps_the_address(start, assert_raises):
    dist = start(options(**BACKEND))
    ip, port = dist.listen_address
    assert_raises("NOT_ENABLED", dist.switch_role, LLMRole.PROMPT)
    assert_raises("NOT_ENABLED", dist.switch_role, LLMRole.PROMPT, {LISTEN: "127.0.0.1:0"})
    dist.switch_role(LLMRole.PROMPT, {LISTEN: f"{ip}:{port}"})
    assert dist.listen_address == (ip, port)


@pytest.mark.parametrize("generation", [1, 2])
def test_switch_role_while_linked(peers, assert_raises, generation):
    if generation == 2:
        here, there = peers.here(1, options()), peers.start(2)
    else:
        here = peers.here(1, {**options_v1(listen=False), "llm.EnableSwitchRole": "1"}, role=LLMRole.DECODER)
        there = peers.start(2, options_v1(), role=LLMRole.PROMPT)
    peers.link(here, there)
    dist = here.node.dist
    assert_raises("EXIST_LINK", dist.switch_role, LLMRole.PROMPT, {LISTEN: "127.0.0.1:0"})
    assert dist.listen_address is None and dist._role is not LLMRole.PROMPT and len(dist.links()) == 1
    cluster = LLMClusterInfo()
    cluster.remote_cluster_id = 2
    assert dist.unlink_clusters([cluster], force=True)[0] is LLMStatusCode.LLM_SUCCESS
    dist.switch_role(LLMRole.PROMPT, {LISTEN: "127.0.0.1:0"})
