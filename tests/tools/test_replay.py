"""``record`` and ``replay``: the calls of two processes, written down and performed again by real ones."""
import json
import re
import subprocess
import sys

import pytest

from llm_datadist.tools.observe.replay_plan import waits_of

PREFILL = """
import sys, time
import numpy as np
from llm_datadist import *
SECRET = "an-unguessable-secret-0451"
config = LLMConfig(); config.device_id = 0; config.enable_cache_manager = True; config.sync_kv_timeout = 5000
config.enable_remote_cache_accessible = {remote}
config.mem_pool_cfg = '{{"memory_size": 16777216}}'; config.listen_ip_info = "127.0.0.1:0"
engine = LLMDataDist(LLMRole.PROMPT, 5); engine.init({{**config.generate_options(), "llm.LinkSecret": SECRET}})
manager = engine.cache_manager
"""
DECODE = PREFILL.replace('config.listen_ip_info = "127.0.0.1:0"', "").replace("PROMPT, 5", "DECODER, 9") + """
info = LLMClusterInfo(); info.remote_cluster_id = 5
info.append_local_ip_info("127.0.0.1", 0); info.append_remote_ip_info("127.0.0.1", int(sys.argv[1].split()[0]))
code, codes = engine.link_clusters([info], 3000)
assert code is LLMStatusCode.LLM_SUCCESS
"""
FIRST = """
desc = CacheDesc(4, [2, 8192], DataType.DT_FLOAT16)
for request in range(8):
    cache = manager.allocate_cache(desc, [CacheKey(5, 100 + request)])
    manager.deallocate_cache(cache)
blocks = manager.allocate_blocks_cache(CacheDesc(2, [16, 512], DataType.DT_INT8), BlocksCacheKey(5))
memory = np.full((2, 4, 64), 77, np.uint8)
registered = manager.register_cache(CacheDesc(2, [4, 64], DataType.DT_UINT8), list(memory), [CacheKey(5, 55)])
print(engine.listen_address[1], flush=True)
sys.stdin.readline()
manager.remove_cache_key(CacheKey(5, 107))
manager.copy_blocks(blocks, {{1: [2, 3]}})
manager.unregister_cache(registered.cache_id)
manager.deallocate_blocks_cache(blocks)
engine.finalize()
"""
SECOND = """
desc = CacheDesc(4, [1, 8192], DataType.DT_FLOAT16)
cache = manager.allocate_cache(desc)
for request in range(7):
    manager.pull_cache(CacheKey(5, 100 + request), cache)
small = manager.allocate_cache(CacheDesc(2, [1, 64], DataType.DT_UINT8))
manager.pull_cache(CacheKey(5, 55), small, size=32, src_layer_range=range(0, 1), dst_layer_range=range(0, 1))
try:
    manager.pull_cache(CacheKey(5, 999), cache)
except LLMException as error:
    assert error.status_code is LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
mine = manager.allocate_blocks_cache(CacheDesc(2, [16, 512], DataType.DT_INT8))
manager.pull_blocks(BlocksCacheKey(5), mine, [1, 2, 3], [4, 5, 6])
assert engine.ping(5) > 0
for each in (cache, small): manager.deallocate_cache(each)
manager.deallocate_blocks_cache(mine)
assert engine.unlink_clusters([info], 3000)[0] is LLMStatusCode.LLM_SUCCESS
engine.finalize()
"""
RUN = """
import subprocess, sys
first = subprocess.Popen([sys.executable, sys.argv[1]], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
port = first.stdout.readline().strip()
second = subprocess.run([sys.executable, sys.argv[2], port])
first.communicate("end\\n")
sys.exit(second.returncode or first.returncode)
"""


def run_tool(*arguments):
    return subprocess.run([sys.executable, "-m", "llm_datadist.tools", *map(str, arguments)], capture_output=True,
                          text=True, timeout=120, check=False)


def recorded(folder, first, second):
    """Record two scripts, and return the file and its lines."""
    for name, text in (("first.py", first), ("second.py", second), ("run.py", RUN)):
        (folder / name).write_text(text)
    path = folder / "run.jsonl"
    done = run_tool("record", "-o", path, "--", sys.executable, folder / "run.py", folder / "first.py",
                    folder / "second.py")
    assert done.returncode == 0, done.stderr
    return path, [json.loads(line) for line in path.read_text().splitlines()]


def calls_of(lines):
    found = {}
    for line in lines:
        if "op" in line:
            found.setdefault(line["op"], []).append(line["status"])
    return found


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A prefill and a decode process: pulls by key and by block, one of a key that is not there."""
    return recorded(tmp_path_factory.mktemp("pair"), (PREFILL + FIRST).format(remote=False),
                    (DECODE + SECOND).format(remote=False))


def test_a_recording_holds_the_calls_of_both_processes(pair):
    _, lines = pair
    head, engines = lines[0], [line for line in lines if "role" in line]
    assert head["format"] == "llm-datadist calls" and head["engines"] == 2 and head["host"]["cpus"] >= 1
    assert {(engine["role"], engine["provider"], engine["generation"]) for engine in engines} == {
        ("PROMPT", "host", 2), ("DECODER", "host", 2)}
    found = calls_of(lines)
    assert found["pull_cache"] == ["LLM_SUCCESS"] * 8 + ["LLM_KV_CACHE_NOT_EXIST"]
    assert found["link_clusters"] == ["LLM_SUCCESS"] and len(found["allocate_cache"]) == 10
    assert {op: len(found[op]) for op in ("init", "finalize", "register_cache", "pull_blocks", "copy_blocks", "ping",
                                          "remove_cache_key", "deallocate_cache", "unlink_clusters")} == {
        "init": 2, "finalize": 2, "register_cache": 1, "pull_blocks": 1, "copy_blocks": 1, "ping": 1,
        "remove_cache_key": 1, "deallocate_cache": 10, "unlink_clusters": 1}
    (blocks,) = [line for line in lines if line.get("op") == "pull_blocks"]
    assert blocks["args"]["src_blocks"] == [1, 2, 3] and blocks["args"]["dst_blocks"] == [4, 5, 6]


def test_a_recording_holds_nothing_secret(pair):
    path, _ = pair
    text = path.read_text()
    for secret in ("an-unguessable-secret-0451", "127.0.0.1", "localhost", str(path.parent), sys.executable):
        assert secret not in text, secret
    numbers = {int(number) for number in re.findall(r"\d+", text)}
    assert {number for number in numbers if number > 2**44} == {2**64 - 1}     # an address would be; that is no id


@pytest.mark.parametrize("speed", ["recorded", "full"])
def test_a_replay_has_the_same_outcomes(pair, speed):
    path, lines = pair
    done = run_tool("replay", path, "--speed", speed, "--json")
    assert done.returncode == 0, done.stderr + done.stdout
    result = json.loads(done.stdout)
    assert result["differences"] == [] and result["calls"] == sum("op" in line for line in lines)
    rows = {row["op"]: row for row in result["operations"]}
    assert rows["pull_cache"]["recorded"]["count"] == rows["pull_cache"]["replayed"]["count"] == 9
    assert rows["pull_cache"]["recorded"]["failed"] == rows["pull_cache"]["replayed"]["failed"] == 1
    assert rows["pull_cache"]["recorded"]["bytes"] == rows["pull_cache"]["replayed"]["bytes"] == 7 * 4 * 16384 + 64
    assert rows["pull_blocks"]["replayed"]["bytes"] == 2 * 3 * 512
    for row in rows.values():
        for side in ("recorded", "replayed"):
            assert 0 < row[side]["p50_us"] <= row[side]["p99_us"]
    assert rows["pull_cache"]["ratio"] == pytest.approx(
        rows["pull_cache"]["replayed"]["p50_us"] / rows["pull_cache"]["recorded"]["p50_us"])


def test_another_outcome_is_told(pair, tmp_path):
    """As if the pull of the missing key had found it."""
    path, _ = pair
    other = tmp_path / "other.jsonl"
    other.write_text(path.read_text().replace("LLM_KV_CACHE_NOT_EXIST", "LLM_SUCCESS"))
    done = run_tool("replay", other, "--speed", "full", "--json")
    assert done.returncode == 1
    (difference,) = json.loads(done.stdout)["differences"]
    assert (difference["op"], difference["recorded"], difference["replayed"]) == (
        "pull_cache", "LLM_SUCCESS", "LLM_KV_CACHE_NOT_EXIST")
    done = run_tool("replay", other, "--speed", "full")
    assert done.returncode == 1 and "pull_cache" in done.stdout and "LLM_KV_CACHE_NOT_EXIST" in done.stdout


def test_transfers_and_pushes(tmp_path):
    """Layers to an address, pushes to a key by id, from a thread of their own."""
    first = PREFILL + """
mine = manager.allocate_cache(CacheDesc(4, [2, 4096], DataType.DT_UINT8))
print(engine.listen_address[1], flush=True)
line = sys.stdin.readline()
manager.deallocate_cache(mine)
"""
    second = DECODE + """
import threading
class Sync(LayerSynchronizer):
    def synchronize_layer(self, layer_index, timeout_in_millis):
        time.sleep(0.01)
        return True
source = manager.allocate_cache(CacheDesc(4, [2, 4096], DataType.DT_UINT8))
key = CacheKeyByIdAndIndex(5, 1, 1)
manager.push_cache(key, source)
def work():
    task = manager.transfer_cache_async(source, Sync(), [
        TransferWithCacheKeyConfig(key, range(0, 2), range(0, 2), 1)])
    assert task.synchronize(5000) is LLMStatusCode.LLM_SUCCESS
thread = threading.Thread(target=work); thread.start(); thread.join()
manager.deallocate_cache(source)
engine.finalize()
"""
    path, lines = recorded(tmp_path, first.format(remote=True), second.format(remote=True))
    (transfer,) = [line for line in lines if line.get("op") == "transfer_cache_async"]
    assert transfer["status"] == "LLM_SUCCESS" and [layer[0] for layer in transfer["layers"]] == [0, 1]
    assert transfer["layers"][1][1] >= 20e6 and transfer["duration_ns"] >= 20e6
    for speed in ("recorded", "full"):
        done = run_tool("replay", path, "--speed", speed, "--json")
        assert done.returncode == 0, done.stderr + done.stdout
        rows = {row["op"]: row for row in json.loads(done.stdout)["operations"]}
        assert rows["transfer_cache_async"]["replayed"]["bytes"] == rows["push_cache"]["replayed"]["bytes"] == 4 * 4096


def test_transfers_to_addresses(tmp_path):
    """Addresses are those of a cache of the peer, from its second layer on, and of its second slot."""
    first = PREFILL + """
mine = manager.allocate_cache(CacheDesc(6, [2, 4096], DataType.DT_UINT8))
print(engine.listen_address[1], *(address + 4096 for address in mine.tensor_addrs[2:]), flush=True)
sys.stdin.readline()
assert all(tensor[1].tolist() == [7] * 4096 for tensor in mine.tensors()[2:])
manager.deallocate_cache(mine)
"""
    second = DECODE + """
class Sync(LayerSynchronizer):
    def synchronize_layer(self, layer_index, timeout_in_millis):
        return layer_index < 2
source = manager.allocate_cache(CacheDesc(6, [2, 4096], DataType.DT_UINT8))
for tensor in source.tensors(): tensor[:] = 7
there = [int(word) for word in sys.argv[1].split()[1:]]
task = manager.transfer_cache_async(source, Sync(), [TransferConfig(5, there, range(0, 2))])
assert task.synchronize() is LLMStatusCode.LLM_SUCCESS
task = manager.transfer_cache_async(source, Sync(), [TransferConfig(5, there[:2], range(2, 3))])
assert task.synchronize() is not LLMStatusCode.LLM_SUCCESS
"""
    path, lines = recorded(tmp_path, first.format(remote=False), second.format(remote=False))
    done, refused = [line for line in lines if line.get("op") == "transfer_cache_async"]
    (config,) = done["args"]["transfer_configs"]
    assert (config["cache"], config["tensor"], config["offset"], config["count"]) == (1, 2, 4096, 4)
    assert done["status"] == "LLM_SUCCESS" != refused["status"] and refused["layers"][0][2] is False
    done = run_tool("replay", path, "--speed", "full", "--json")
    assert done.returncode == 0, done.stderr + done.stdout
    (row,) = [row for row in json.loads(done.stdout)["operations"] if row["op"] == "transfer_cache_async"]
    assert row["replayed"]["failed"] == 1 and row["replayed"]["bytes"] == 4 * 4096


def test_links_by_rank_table(tmp_path):
    link = """
table = '{{"version": "1.0", "server_list": [{{"server_id": "10.1.2.3", "device": [{{"device_id": 0, "rank_id": 0}}, ' \
    '{{"device_id": 1, "rank_id": 1}}]}}]}}'
comm = engine.link("a-name-of-ours", {{5: 0, 9: 1}}, table)
"""
    wait = """
while engine.query_register_mem_status(comm) is RegisterMemStatus.PREPARING: time.sleep(0.01)
"""
    first = PREFILL + link + """
cache = manager.allocate_cache(CacheDesc(2, [1, 64], DataType.DT_UINT8), [CacheKey(5, 1)])
manager.deallocate_cache(cache)
print(engine.listen_address[1], flush=True)
sys.stdin.readline()
engine.unlink(comm)
"""
    second = DECODE.partition("info =")[0] + link + wait + """
cache = manager.allocate_cache(CacheDesc(2, [1, 64], DataType.DT_UINT8))
manager.pull_cache(CacheKey(5, 1), cache)
manager.deallocate_cache(cache)
"""
    path, lines = recorded(tmp_path, first.format(remote=False), second.format(remote=False))
    assert "a-name-of-ours" not in path.read_text() and "10.1.2.3" not in path.read_text()
    assert calls_of(lines)["link"] == ["LLM_SUCCESS"] * 2
    for speed in ("recorded", "full"):
        done = run_tool("replay", path, "--speed", speed, "--json")
        assert done.returncode == 0, done.stderr + done.stdout


def call(engine, op, start, end, result=None, thread=1, **args):
    return {"engine": engine, "thread": thread, "op": op, "start_ns": start, "duration_ns": end - start, "args": args,
            "status": "LLM_SUCCESS", "result": result}


def key(kind, *numbers):
    return {"key": kind, "of": {"cluster": 1}, "numbers": list(numbers)}


def test_what_a_call_waits_for():
    """Of engines 0 and 1, clusters 1 and 2, by their places: also not for what still ran, or what does not matter."""
    request, blocks = key("CacheKey", 7, 0, 2**64 - 1), key("BlocksCacheKey", 0)
    calls = [
        call(0, "init", 0, 10),
        call(1, "init", 0, 10),
        call(1, "link_clusters", 11, 20, clusters=[{"peer": {"cluster": 1}}]),
        call(0, "allocate_cache", 21, 30, {"cache": 1}, cache_keys=[request]),
        call(0, "allocate_blocks_cache", 31, 40, {"cache": 2}, blocks_cache_key=blocks),
        call(1, "pull_cache", 41, 60, cache_key=request),
        call(1, "pull_blocks", 45, 50, thread=2, src_cache_key=blocks),
        call(0, "allocate_cache", 55, 58, {"cache": 3}),            # the pull that makes room is still running
        call(0, "deallocate_blocks_cache", 59, 61, cache={"handle": 2}),
        call(0, "allocate_cache", 62, 63, {"cache": 4}),
        call(1, "pull_cache", 64, 65, thread=2, cache_key=request),
        call(0, "finalize", 70, 71),
    ]
    found = list(waits_of(calls, [1, 2]))
    wanted = {2: {0}, 5: {3}, 6: {2, 4}, 8: {6}, 9: {5}, 10: {5}, 11: {10}}
    assert {place: needs & wanted[place] for place, needs in enumerate(found) if place in wanted} == wanted
    assert found[0] == found[1] == set() and 5 not in found[7] and 5 not in found[6] and 3 not in found[6]


FIRST_V1 = """
import sys
from llm_datadist import *
config = LLMConfig(); config.device_id = 0; config.sync_kv_timeout = 5000
config.ge_options = {"ge.flowGraphMemMaxSize": "4194304"}
"""
MAIN_V1 = """
config.listen_ip_info = "127.0.0.1:0"
engine = LLMDataDist(LLMRole.PROMPT, 5); engine.init(config.generate_options())
manager = engine.kv_cache_manager
desc = CacheDesc(4, [1, 4096], DataType.DT_UINT8)
kept = [manager.allocate_cache(desc, [CacheKey(5, request)]) for request in range(3)]
print(engine.listen_address[1], flush=True)
sys.stdin.readline()
for cache in kept: manager.deallocate_cache(cache)
engine.finalize()
"""
OTHER_V1 = """
engine = LLMDataDist(LLMRole.DECODER, 9); engine.init(config.generate_options())
manager = engine.kv_cache_manager
info = LLMClusterInfo(); info.remote_cluster_id = 5
info.append_local_ip_info("127.0.0.1", 0); info.append_remote_ip_info("127.0.0.1", int(sys.argv[1]))
assert engine.link_clusters([info], 3000)[0] is LLMStatusCode.LLM_SUCCESS
engine.check_link_status(5)
cache = manager.allocate_cache(CacheDesc(4, [1, 4096], DataType.DT_UINT8))
for request in range(3): manager.pull_cache(CacheKey(5, request), cache)
try: manager.pull_cache(CacheKey(5, 1), cache)
except LLMException: pass
task_addrs = cache.per_device_tensor_addrs[0]
manager.deallocate_cache(cache)
engine.finalize()
"""


def test_the_first_generation(tmp_path):
    path, lines = recorded(tmp_path, FIRST_V1 + MAIN_V1, FIRST_V1 + OTHER_V1)
    assert calls_of(lines)["pull_cache"] == ["LLM_SUCCESS"] * 3 + ["LLM_KV_CACHE_NOT_EXIST"]
    done = run_tool("replay", path, "--json")
    assert done.returncode == 0, done.stderr + done.stdout
    assert json.loads(done.stdout)["differences"] == []


@pytest.mark.parametrize("arguments, text", [
    (["record", "-o", "PATH"], "a command is needed"),
    (["record", "-o", "/nowhere/x.jsonl", "--", "true"], "/nowhere/x.jsonl"),
    (["record", "-o", "PATH", "--", "true"], "no engine"),
    (["replay", "/nowhere/x.jsonl"], "/nowhere/x.jsonl"),
    (["replay", __file__], "no recording"),
])
def test_what_is_wrong_is_said(arguments, text, tmp_path):
    path = tmp_path / "x.jsonl"
    done = run_tool(*[path if word == "PATH" else word for word in arguments])
    assert done.returncode == 2 and text in done.stderr and "Traceback" not in done.stderr
    assert not path.exists()
