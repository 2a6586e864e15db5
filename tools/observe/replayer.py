"""One engine of a replay: a process that performs the calls of its plan, those of each recorded thread in a thread.

Started by replay.py. Engines tell each other through pipes what they have done: a call that others wait for, and what
those need of it, which is a port, the id of a cache, or where its tensors lie.
"""
from __future__ import annotations

import json
import os
import struct
import sys
import threading
import time
import warnings
from collections import defaultdict
from mmap import mmap
from typing import Any

import llm_datadist
from llm_datadist import (
    BlocksCacheKey,
    Cache,
    CacheDesc,
    CacheKey,
    CacheKeyByIdAndIndex,
    DataType,
    HeldBlocksKey,
    KvCache,
    LayerSynchronizer,
    LLMClusterInfo,
    LLMDataDist,
    LLMException,
    LLMRole,
    Placement,
    RegisterMemStatus,
    TransferConfig,
    TransferWithCacheKeyConfig,
)
from llm_datadist.tools.observe.recording import tensor_bytes

Json = dict[str, Any]
MESSAGE = struct.Struct("<qqQ")             # a call, the tensor of its cache or DONE, and a value
DONE = -1
NOWHERE = 1                                 # a port at which nobody listens
KEYS = {kind.__name__: kind for kind in (CacheKey, CacheKeyByIdAndIndex, BlocksCacheKey, HeldBlocksKey)}
_POLL_S = 0.001


class NotPerformed(Exception):
    """What the call needs is not there, because an earlier one had another outcome than in the recording."""


class _Progress:
    """What is done, here and elsewhere, and what came of it."""

    def __init__(self, plan: Json, inbox: int, outboxes: dict[int, int]) -> None:
        self._outboxes = outboxes
        self._foreign = {int(index): meaning for index, meaning in plan["foreign"].items()}
        self._events = {index: threading.Event() for call in plan["calls"] for index in call["needs"]}
        self.ports: dict[int, int] = {}
        self.cache_ids: dict[tuple[int, int], int] = {}
        self.addresses: dict[tuple[int, int], dict[int, int]] = defaultdict(dict)
        threading.Thread(target=self._receive, args=(inbox,), daemon=True).start()

    def wait(self, call: Json) -> None:
        for index in call["needs"]:
            self._events[index].wait()

    def done(self, call: Json, value: int = 0, addresses: tuple[int, ...] = ()) -> None:
        if call["index"] in self._events:
            self._events[call["index"]].set()
        for engine in call["tell"]:
            for tensor, address in enumerate(addresses):
                os.write(self._outboxes[engine], MESSAGE.pack(call["index"], tensor, address))
            os.write(self._outboxes[engine], MESSAGE.pack(call["index"], DONE, value))

    def _receive(self, inbox: int) -> None:
        with open(inbox, "rb") as source:
            while message := source.read(MESSAGE.size):
                index, tensor, value = MESSAGE.unpack(message)
                cluster, cache = self._foreign.get(index, (None, None))
                if tensor != DONE:
                    self.addresses[cluster, cache][tensor] = value
                    continue
                if cluster is not None and cache is None:
                    self.ports[cluster] = value
                elif cluster is not None:
                    self.cache_ids[cluster, cache] = value
                if index in self._events:
                    self._events[index].set()


class _Synchronizer(LayerSynchronizer):
    """Lets each layer go when the recorded one did, or at once."""

    def __init__(self, layers: list[Any], start_ns: int | None) -> None:
        self._answers = {layer: (at_ns, answer) for layer, at_ns, answer in layers}
        self._start_ns = start_ns

    def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:
        at_ns, answer = self._answers.get(layer_index, (0, True))
        if self._start_ns is not None:
            _sleep_until(self._start_ns + at_ns)
        if answer is None:
            raise RuntimeError("the synchroniser failed in the recording, too")
        return answer


def _sleep_until(when_ns: int) -> None:
    left_ns = when_ns - time.monotonic_ns()
    if left_ns > 0:
        time.sleep(left_ns / 1e9)


class Replayer:
    """Performs the calls of one engine.

    Parameters
    ----------
    plan : dict
        Of replay_plan.py.
    progress : _Progress
        What is done.
    """

    def __init__(self, plan: Json, progress: _Progress) -> None:
        self._plan, self._progress, self._engine = plan, progress, plan["engine"]
        self._cluster = self._engine["cluster"]
        self._at_speed = plan["speed"] == "recorded"
        self._start_ns = 0
        self._dist = LLMDataDist(LLMRole[self._engine["role"]], self._cluster)
        self._caches: dict[int, Any] = {}
        self._cpu_caches: dict[int, Any] = {}
        self._comms: dict[int, int] = {}
        self._memory: list[mmap] = []
        self._running: list[threading.Event] = []
        self.results: list[Any] = []

    def run(self, start_ns: int) -> None:
        """Perform every call; results are ``[index, start_ns, end_ns, status]``."""
        self._start_ns = start_ns
        by_thread: dict[int, list[Json]] = defaultdict(list)
        for call in self._plan["calls"]:
            by_thread[call["thread"]].append(call)
        threads = [threading.Thread(target=self._run_thread, args=(calls,)) for calls in by_thread.values()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for ended in self._running:
            ended.wait()

    def close(self) -> None:
        """Finalise, where the recording did not."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            self._dist.finalize()

    def _run_thread(self, calls: list[Json]) -> None:
        for call in calls:
            if self._at_speed:
                _sleep_until(self._start_ns + call["start_ns"])
            self._progress.wait(call)
            self._perform(call)

    def _perform(self, call: Json) -> None:
        value: int = 0
        result = None
        addresses: tuple[int, ...] = ()
        start_ns = time.monotonic_ns()
        try:
            function, arguments = self._prepare(call)
            start_ns = time.monotonic_ns()
            result = function(**arguments)
            end_ns, status = time.monotonic_ns(), "LLM_SUCCESS"
        except LLMException as error:
            end_ns, status = time.monotonic_ns(), error.status_code.name
        except NotPerformed:
            end_ns, status = start_ns, "not performed"
        except Exception as error:
            end_ns, status = time.monotonic_ns(), type(error).__name__
        if isinstance(result, tuple):
            status = result[0].name
        elif isinstance(result, (Cache, KvCache)):
            value = result.cache_id
            if isinstance(call["result"], dict):
                self._caches[call["result"]["cache"]] = result
                self._progress.cache_ids[self._cluster, call["result"]["cache"]] = value
            if call.get("shows_memory"):
                addresses = tuple(result.tensor_addrs if isinstance(result, Cache)
                                  else result.per_device_tensor_addrs[0])
                self._progress.addresses[self._cluster, call["result"]["cache"]] = dict(enumerate(addresses))
        elif call["op"] == "link" and result is not None:
            self._comms[call["result"]] = result
        elif call["op"] in ("init", "switch_role") and status == "LLM_SUCCESS":
            value = (self._dist.listen_address or ("", NOWHERE))[1]
        if hasattr(result, "add_done_callback"):
            self._follow(call, result, start_ns)
            return
        self.results.append([call["index"], start_ns, end_ns, status])
        self._progress.done(call, value, addresses)

    def _follow(self, call: Json, task: Any, start_ns: int) -> None:
        """Take the end of a transfer in the background for the end of its call."""
        ended = threading.Event()
        self._running.append(ended)

        def end(task: Any) -> None:
            end_ns = time.monotonic_ns()
            error, code = task.exception(0), task.synchronize(0)
            status = code.name
            if error is not None and status == "LLM_SUCCESS":
                status = error.status_code.name if isinstance(error, LLMException) else type(error).__name__
            self.results.append([call["index"], start_ns, end_ns, status])
            self._progress.done(call)
            ended.set()

        task.add_done_callback(end)

    # ------------------------------------------------------------------------------------------------- arguments

    def _prepare(self, call: Json) -> tuple[Any, Json]:
        op, args = call["op"], call["args"]
        if op == "init":
            return self._dist.init, {"options": self._options()}
        if op == "finalize":
            return self.close, {}
        arguments = {name: self._value(value) for name, value in args.items()}
        if op == "query_register_mem_status":
            return self._wait_for_members, arguments
        if "layer_synchronizer" in arguments:
            start_ns = time.monotonic_ns() if self._at_speed else None
            arguments["layer_synchronizer"] = _Synchronizer(call.get("layers", []), start_ns)
        if "addrs" in arguments:
            size = tensor_bytes(args["cache_desc"]["desc"])
            arguments["addrs"] = [self._take(size) for _ in range(args["addrs"]["memory"])]
        if op == "link":
            ranks = [rank for _, rank in args["cluster_rank_info"]["map"]]
            devices = [{"device_id": str(place), "rank_id": str(rank)} for place, rank in enumerate(ranks)]
            arguments["rank_table"] = json.dumps({
                "version": "1.0", "status": "completed", "server_count": "1",
                "server_list": [{"server_id": "replay", "device": devices}]})
        owner = self._dist if hasattr(self._dist, op) else (
            self._dist.cache_manager if self._engine["generation"] == 2 else self._dist.kv_cache_manager)
        return getattr(owner, op), arguments

    def _options(self) -> dict[str, str]:
        engine = self._engine
        options = {**engine["options"], "llm.EnableCacheManager": str(engine["generation"] - 1),
                   "llm.Provider": "host"}
        if engine["has_comm_res"]:
            options["llm.LocalCommRes"] = ""
        if engine["backend"]:
            options["llm.TransferBackend"] = "hixl"
        if engine["listens"]:
            options["llm.listenIpInfo"] = ";".join(
                "127.0.0.1:0" for _ in options.get("ge.exec.deviceId", "0").split(";"))
        return options

    def _wait_for_members(self, comm_id: int) -> RegisterMemStatus:
        while True:
            status = self._dist.query_register_mem_status(comm_id)
            if status is not RegisterMemStatus.PREPARING:
                return status
            time.sleep(_POLL_S)

    def _take(self, size: int) -> Any:
        memory = mmap(-1, max(size, 1))
        self._memory.append(memory)
        return memory

    def _value(self, value: Any) -> Any:
        if isinstance(value, list):
            return value if not value or isinstance(value[0], int) else [self._value(each) for each in value]
        if not isinstance(value, dict):
            return value
        for name, decode in (("range", lambda: range(*value["range"])), ("cluster", lambda: value["cluster"]),
                             ("map", lambda: {self._value(key): self._value(each) for key, each in value["map"]}),
                             ("desc", lambda: self._cpu_cache(value) if "cpu" in value else _desc(value["desc"])),
                             ("handle", lambda: self._cache(value["handle"])), ("key", lambda: self._key(value)),
                             ("comm", lambda: f"{self._plan['token']}.{value['comm']}"),
                             ("peer", lambda: self._link(value)), ("to", lambda: self._config(value)),
                             ("enum", lambda: LLMRole[value["enum"]]),
                             ("listens", lambda: {"llm.listenIpInfo": "127.0.0.1:0"} if value["listens"] else {})):
            if name in value:
                return decode()
        return None

    def _cache(self, recorded: int) -> Any:
        if recorded not in self._caches:
            raise NotPerformed
        return self._caches[recorded]

    def _cpu_cache(self, value: Json) -> Any:
        if value["cpu"] not in self._cpu_caches:
            import numpy as np

            desc = value["desc"]
            places = [np.frombuffer(self._take(tensor_bytes(desc)), np.uint8) for _ in range(desc["num_tensors"])]
            kind = Cache if self._engine["generation"] == 2 else KvCache
            self._cpu_caches[value["cpu"]] = kind.create_cpu_cache(
                _desc(desc), [place.ctypes.data for place in places])
        return self._cpu_caches[value["cpu"]]

    def _key(self, value: Json) -> Any:
        cluster, numbers = value["of"]["cluster"], list(value["numbers"])
        if value["key"] == "CacheKeyByIdAndIndex":
            numbers[0] = self._progress.cache_ids.get((cluster, numbers[0]), numbers[0])
        return KEYS[value["key"]](cluster, *numbers)

    def _link(self, value: Json) -> LLMClusterInfo:
        info = LLMClusterInfo()
        peer = value["peer"]["cluster"]
        if peer is not None:
            info.remote_cluster_id = peer
        for _ in range(value["remote"]):
            info.append_remote_ip_info("127.0.0.1", self._progress.ports.get(peer, NOWHERE))
        for _ in range(value["local"]):
            info.append_local_ip_info("127.0.0.1", 0)
        return info

    def _config(self, value: Json) -> Any:
        if value["to"] == "key":
            names = ("cache_key", "src_layer_range", "dst_layer_range", "src_batch_index", "release")
            return TransferWithCacheKeyConfig(**{name: self._value(value[name]) for name in names})
        cluster = value["dst_cluster_id"]["cluster"]
        there = self._progress.addresses.get((cluster, value["cache"]), {})
        addresses = [there.get(tensor, 0) + value.get("offset", 0)
                     for tensor in range(value.get("tensor", 0), value.get("tensor", 0) + value["count"])]
        return TransferConfig(cluster, addresses, self._value(value["src_layer_range"]), value["src_batch_index"])


def _desc(value: Json) -> CacheDesc:
    return CacheDesc(value["num_tensors"], value["shape"], value["data_type"] and DataType[value["data_type"]],
                     value["placement"] and Placement[value["placement"]])


def main() -> int:
    """Perform the plan that is named, when told to; say so, and end when told to."""
    path, inbox, outboxes = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
    with open(path, encoding="utf-8") as source:
        plan = json.load(source)
    replayer = Replayer(plan, _Progress(plan, inbox, {int(engine): fd for engine, fd in outboxes.items()}))
    assert llm_datadist.CacheManager and llm_datadist.KvCacheManager    # loaded before anything is timed
    print("ready", flush=True)
    replayer.run(int(sys.stdin.readline()))
    with open(f"{path}.done", "w", encoding="utf-8") as out:
        json.dump(replayer.results, out)
    print("done", flush=True)
    sys.stdin.readline()
    replayer.close()
    return 0
