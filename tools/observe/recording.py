"""Recordings of calls: the files of one run joined into one that tells nothing of the place, and read again.

docs/observability.md describes the file.
"""
from __future__ import annotations

import json
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_datadist import CacheDesc, DataType, LLMException, __version__
from llm_datadist.observe.calls import SUFFIX

FORMAT, VERSION = "llm-datadist calls", 1

Json = dict[str, Any]


@dataclass
class Recording:
    """One run: facts of the host, one dict for each engine, and the calls in the order of their start."""

    head: Json
    engines: list[Json]
    calls: list[Json]


def read(path: str) -> Recording:
    """Read a file that `write` made.

    Raises
    ------
    OSError, ValueError
        It cannot be read, or is no recording of this version.
    """
    with open(path, encoding="utf-8") as source:
        try:
            lines = [json.loads(line) for line in source]
        except (ValueError, RecursionError):
            lines = []
    if not lines or not all(isinstance(line, dict) for line in lines) or lines[0].get("format") != FORMAT:
        raise ValueError(f"{path} is no recording of llm-datadist record")
    if lines[0].get("version") != VERSION:
        raise ValueError(f"{path} is a recording of version {lines[0].get('version')}, this is version {VERSION}")
    return Recording(lines[0], [line for line in lines[1:] if "op" not in line],
                     [line for line in lines[1:] if "op" in line])


def write(path: str, recording: Recording) -> None:
    """Write a recording, one line of JSON for each engine and call."""
    with open(path, "w", encoding="utf-8") as out:
        for line in (recording.head, *recording.engines, *recording.calls):
            out.write(json.dumps(line, separators=(",", ":")) + "\n")


def host_facts() -> Json:
    """What a run depends on that is not the package: of this host, without its name."""
    model = ""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    return {"kernel": platform.release(), "machine": platform.machine(), "cpus": len(os.sched_getaffinity(0)),
            "cpu": model, "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "python": platform.python_version()}


# ---------------------------------------------------------------------------------------------------------- merging

@dataclass
class _Memory:
    """Where the tensors of a cache lay, from `since_ns` on."""

    cluster: int
    cache_id: int
    since_ns: int
    addresses: list[int]
    tensor_bytes: int


class _Merger:
    """What stands in a recording for names of the place: numbers, in the order in which they are met."""

    def __init__(self) -> None:
        self._numbers: dict[str, dict[Any, int]] = {}
        self.memory: list[_Memory] = []

    def number(self, kind: str, name: Any) -> int:
        numbers = self._numbers.setdefault(kind, {})
        return numbers.setdefault(name, len(numbers) + 1)

    def learn(self, cluster: int, call: Json) -> None:
        """Keep where a new cache lies."""
        result, desc = call["result"], call["args"].get("cache_desc")
        if isinstance(result, dict) and "addresses" in result and desc:
            self.memory.append(_Memory(cluster, result["cache"], call["start_ns"], result["addresses"],
                                       tensor_bytes(desc["desc"])))

    def clean(self, value: Any, engine: int, when_ns: int) -> Any:
        """An argument or result without names and addresses of the place."""
        if isinstance(value, list):
            return value if all(type(each) is int for each in value) else [
                self.clean(each, engine, when_ns) for each in value]
        if not isinstance(value, dict):
            return value
        if value.keys() == {"cluster"}:
            return {"cluster": self.number("cluster", value["cluster"])}
        if value.keys() == {"comm"}:
            return {"comm": self.number("comm", value["comm"])}
        value = {name: self.clean(each, engine, when_ns) for name, each in value.items()}
        if "cpu" in value:
            value["cpu"] = self.number("cpu", (engine, value["cpu"]))
        if value.get("to") == "address":
            value.update(self._place(value["dst_cluster_id"]["cluster"], value.pop("addresses"), when_ns))
        return value

    def _place(self, cluster: int, addresses: list[int], when_ns: int) -> Json:
        """Which tensors of which cache of a cluster lie at these addresses; of none, how many there are."""
        for memory in reversed(self.memory):
            if memory.cluster == cluster and memory.since_ns <= when_ns and addresses:
                first = [(tensor, addresses[0] - start) for tensor, start in enumerate(memory.addresses)
                         if 0 <= addresses[0] - start < memory.tensor_bytes]
                for tensor, offset in first:
                    there = memory.addresses[tensor:tensor + len(addresses)]
                    if [start + offset for start in there] == addresses:
                        return {"cache": memory.cache_id, "tensor": tensor, "offset": offset, "count": len(addresses)}
        return {"cache": None, "count": len(addresses)}


def merge(folder: str) -> Recording:
    """Join what the engines of a run wrote into `folder`; of a run without engines, there are none in it."""
    runs = [run for run in (_lines(path) for path in Path(folder).glob(f"*{SUFFIX}")) if len(run) > 1]
    runs.sort(key=lambda run: run[1]["start_ns"])
    merger, origin_ns = _Merger(), min((run[1]["start_ns"] for run in runs), default=0)
    for facts, *own in runs:
        cluster = merger.number("cluster", facts["cluster_id"])
        for call in own:
            merger.learn(cluster, call)
    merger.memory.sort(key=lambda memory: memory.since_ns)
    engines, calls = [], []
    for index, (facts, *own) in enumerate(runs):
        engines.append({"engine": index, "cluster": merger.number("cluster", facts.pop("cluster_id")), **facts})
        for call in own:
            start_ns, end_ns, result = call.pop("start_ns"), call.pop("end_ns"), call.pop("result")
            if isinstance(result, dict):
                result.pop("addresses", None)
            if "returned_ns" in call:
                call["returned_ns"] -= start_ns
            calls.append({
                **call, "engine": index, "thread": merger.number("thread", (index, call["thread"])),
                "start_ns": start_ns - origin_ns, "duration_ns": end_ns - start_ns,
                "args": merger.clean(call["args"], index, start_ns), "result": result})
    calls.sort(key=lambda call: call["start_ns"])
    head = {"format": FORMAT, "version": VERSION, "package": __version__, "host": host_facts(),
            "engines": len(engines), "calls": len(calls),
            "duration_s": max((call["start_ns"] + call["duration_ns"] for call in calls), default=0) // 1000 / 1e6}
    return Recording(head, engines, calls)


def _lines(path: Path) -> list[Json]:
    """The lines of one engine; the last of one that was killed may have been cut."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


# ------------------------------------------------------------------------------------------------------------ sizes

def tensor_bytes(desc: Json) -> int:
    """Bytes of one tensor of a descriptor; 0 for one that has no size."""
    try:
        return CacheDesc(1, desc["shape"], desc["data_type"] and DataType[desc["data_type"]]).size
    except LLMException:
        return 0


def sizes_of(recording: Recording) -> list[int]:
    """Bytes that each call moved, or would have moved had it not failed."""
    descs: dict[tuple[int, int], Json] = {}
    sizes = []
    for call in recording.calls:
        result, desc = call["result"], call["args"].get("cache_desc")
        if isinstance(result, dict) and "cache" in result and desc:
            descs[call["engine"], result["cache"]] = desc["desc"]
        sizes.append(_moved(call, descs))
    return sizes


# The cache of this side, whose descriptor says how large what moves is; the first that a call has.
_OWN = ("cache", "kv_cache", "dst_cache", "decoder_kv_cache", "src_cache", "src")
_LISTS = ("dst_blocks", "decoder_blocks", "dst_block_indices")


def _moved(call: Json, descs: dict[tuple[int, int], Json]) -> int:
    op, args = call["op"], call["args"]
    if not op.startswith(("pull_", "push_", "copy_", "swap_", "transfer_")):
        return 0
    own: Json = next((args[name] for name in _OWN if isinstance(args.get(name), dict)), {})
    desc = descs.get((call["engine"], own.get("handle", -1))) or own.get("desc")
    if desc is None or not desc["shape"]:
        return 0
    stride = tensor_bytes(desc) // max(desc["shape"][0], 1)
    per_layer = args.get("tensor_num_per_layer", 2)
    num_blocks = next((len(args[name]) for name in _LISTS if args.get(name)), 1)
    if op == "copy_blocks":
        return desc["num_tensors"] * stride * sum(len(to) for _, to in args["copy_block_info"]["map"])
    if op == "swap_blocks":
        return desc["num_tensors"] * stride * len(args["src_to_dst"]["map"])
    if op == "transfer_cache_async":
        pieces = num_blocks if args.get("src_block_indices") else 1     # a slot that is cut is as long as it was
        return sum(_tensors(config, desc, per_layer) for config in args["transfer_configs"]) * pieces * stride
    size = args.get("size", -1)
    return _tensors(args, desc, per_layer) * num_blocks * (stride if size == -1 else size)


def _tensors(args: Json, desc: Json, per_layer: int) -> int:
    for name in ("dst_layer_range", "src_layer_range"):
        if args.get(name):
            start, stop, _ = args[name]["range"]
            return (stop - start) * per_layer
    return desc["num_tensors"]
