"""The calls into an engine, written down as they end: which, with what, when, and how they ended; never the bytes.

Off, nothing of this is loaded. On (``LLM_DATADIST_RECORD``), the public calls of one engine and its manager are wrapped
when the engine is made, and each writes one line of JSON into a file of its own. ``llm-datadist record`` joins the
files of a run and takes out what tells of the place, such as addresses; docs/observability.md has the format.
"""
from __future__ import annotations

import functools
import inspect
import itertools
import json
import os
import threading
import time
from collections.abc import Mapping
from enum import Enum
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Optional, Tuple

from llm_datadist.caches.descriptors import CacheDesc
from llm_datadist.caches.handles import CPU_CACHE_ID, Cache, KvCache
from llm_datadist.caches.held_blocks import HeldBlocksKey
from llm_datadist.caches.keys import BlocksCacheKey, CacheKey, CacheKeyByIdAndIndex
from llm_datadist.configs import LLMClusterInfo
from llm_datadist.managers.cache_task import CacheTask
from llm_datadist.managers.transfer_config import LayerSynchronizer, TransferConfig, TransferWithCacheKeyConfig
from llm_datadist.observe.records import Record
from llm_datadist.options import parser
from llm_datadist.status import LLMException, LLMStatusCode
from llm_datadist.utils.version import __version__

if TYPE_CHECKING:
    from llm_datadist.options.parser import EngineOptions

__all__ = ["SUFFIX", "CallRecorder"]

SUFFIX = ".ldd-calls"
# Of the engine, and of its manager as far as it has them.
ENGINE_CALLS = ("link_clusters", "unlink_clusters", "check_link_status", "ping", "link", "unlink",
                "query_register_mem_status", "switch_role")
MANAGER_CALLS = (
    "allocate_cache", "allocate_blocks_cache", "deallocate_cache", "deallocate_blocks_cache", "register_cache",
    "register_blocks_cache", "unregister_cache", "remove_cache_key", "hold_blocks", "drop_blocks", "release_blocks",
    "pull_cache", "pull_blocks", "push_cache", "push_blocks", "transfer_cache_async", "copy_cache", "copy_blocks",
    "swap_blocks")
# What of options and environment says how an engine works, and nothing of where. Everything else is left out.
OPTIONS = (
    parser.DEVICE_ID, parser.FLOW_GRAPH_MEM_MAX_SIZE, parser.BUF_POOL_CFG, parser.CACHE_KEY_LEASE, parser.CHECKSUM,
    parser.ENABLE_REMOTE_CACHE_ACCESSIBLE, parser.ENABLE_SWITCH_ROLE, parser.HOST_MEM_POOL_CONFIG,
    parser.LINK_HEAL_TIME, parser.LINK_RETRY_COUNT, parser.LINK_SILENCE_TIME, parser.LINK_TOTAL_TIME,
    parser.MEM_POOL_CONFIG, parser.STRICT, parser.SYNC_KV_CACHE_WAIT_TIME)
VARIABLES = (
    "LLM_DATADIST_HOST_PATHS", "LLM_DATADIST_COPY_THREADS", "LLM_DATADIST_TCP_STREAMS", "LLM_DATADIST_SHARED_TABLE",
    "LLM_DATADIST_CACHE_KEY_LEASE_MS", "LLM_DATADIST_LINK_SILENCE_MS", "LLM_DATADIST_LINK_HEAL_MS",
    "LLM_DATADIST_HOST_DEVICES", "LLM_DATADIST_STRICT", "LLM_DATADIST_CHECKSUM")

_files = itertools.count()


class CallRecorder:
    """Writes down the calls of one engine from now on until `close`.

    Parameters
    ----------
    dist, manager : LLMDataDist and its manager
        Whose calls are wrapped, on these two objects alone.
    parsed : EngineOptions
        What the engine was told; `given` as the dict.
    facts : dict
        ``role``, ``cluster_id``, ``record_fd``: of the engine.
    start_ns : int
        When its `init` began, ``time.monotonic_ns``.

    Raises
    ------
    OSError
        The folder cannot be made, or written.
    """

    def __init__(self, dist: object, manager: object, parsed: "EngineOptions", given: Mapping[str, str],
                 facts: Dict[str, Any], start_ns: int) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._wrapped: List[Tuple[object, str]] = []
        os.makedirs(parsed.record_folder, exist_ok=True)
        path = os.path.join(parsed.record_folder, f"{self._pid}-{time.monotonic_ns()}-{next(_files)}{SUFFIX}")
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
        facts["provider"] = _provider_of(facts.pop("record_fd"), parsed)
        listens = parsed.listen is not None or bool(parsed.listen_all)
        self._put({**facts, "generation": parsed.generation, "package": __version__, "listens": listens,
                   "has_comm_res": parsed.local_comm_res is not None, "backend": bool(parsed.transfer_backend),
                   "options": {name: given[name] for name in OPTIONS if name in given},
                   "environment": {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}})
        self._write("init", {}, start_ns, time.monotonic_ns(), "LLM_SUCCESS", None)
        for owner, names in ((dist, ENGINE_CALLS), (manager, MANAGER_CALLS)):
            for name in names:
                if hasattr(owner, name):
                    setattr(owner, name, self._wrap(name, getattr(owner, name)))
                    self._wrapped.append((owner, name))

    def close(self, start_ns: int) -> None:
        """Write that the engine was finalised, from `start_ns` until now, and wrap no longer."""
        for owner, name in self._wrapped:
            delattr(owner, name)
        self._wrapped.clear()
        self._write("finalize", {}, start_ns, time.monotonic_ns(), "LLM_SUCCESS", None)
        with self._lock:
            os.close(self._fd)
            self._fd = -1

    def _wrap(self, name: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(inner)

        @functools.wraps(inner)
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                bound = signature.bind(*args, **kwargs).arguments
            except TypeError:
                bound = {}
            if not bound or os.getpid() != self._pid:       # it is refused, or not of this engine's process
                return inner(*args, **kwargs)
            bound.update(bound.pop("kwargs", {}))
            arguments = _arguments(bound)
            layers: List[Any] = []
            start_ns = time.monotonic_ns()
            if isinstance(bound.get("layer_synchronizer"), LayerSynchronizer):
                bound["layer_synchronizer"] = _Synchronizer(bound["layer_synchronizer"], layers, start_ns)
                args, kwargs = (), bound
            try:
                result = inner(*args, **kwargs)
            except BaseException as error:
                self._write(name, arguments, start_ns, time.monotonic_ns(), _status_of(error), None)
                raise
            end_ns = time.monotonic_ns()
            if isinstance(result, CacheTask):
                def ended(task: CacheTask) -> None:
                    self._write(name, arguments, start_ns, time.monotonic_ns(), _status_of_task(task), None,
                                returned_ns=end_ns, layers=layers)

                result.add_done_callback(ended)
            else:
                status, outcome = _outcome(result)
                self._write(name, arguments, start_ns, end_ns, status, outcome)
            return result

        return call

    def _write(self, name: str, arguments: Dict[str, Any], start_ns: int, end_ns: int, status: str, result: Any,
               **more: Any) -> None:
        self._put({"op": name, "thread": threading.get_native_id(), "start_ns": start_ns, "end_ns": end_ns,
                   "status": status, "args": arguments, "result": result, **more})

    def _put(self, line: Dict[str, Any]) -> None:
        text = json.dumps(line, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            if self._fd >= 0:
                os.write(self._fd, text)


def _provider_of(record_fd: int, parsed: "EngineOptions") -> str:
    if record_fd < 0:
        return parsed.provider
    with Record(os.dup(record_fd)) as record:
        return record.provider


class _Synchronizer(LayerSynchronizer):
    """The client's synchroniser, and when it let each layer go: ns since the call, and its answer."""

    def __init__(self, inner: LayerSynchronizer, layers: List[Any], start_ns: int) -> None:
        self._inner, self._layers, self._start_ns = inner, layers, start_ns

    def synchronize_layer(self, layer_index: int, timeout_in_millis: Optional[int]) -> bool:
        answer: Optional[bool] = None               # of one that raises
        try:
            answer = self._inner.synchronize_layer(layer_index, timeout_in_millis)
            return answer
        finally:
            self._layers.append([layer_index, time.monotonic_ns() - self._start_ns, answer and bool(answer)])


# ------------------------------------------------------------------------------------------------------- outcomes

def _status_of(error: BaseException) -> str:
    """The name of a code, or of the exception where it has none. Its text may tell of addresses."""
    return error.status_code.name if isinstance(error, LLMException) else type(error).__name__


def _status_of_task(task: CacheTask) -> str:
    code = task.synchronize(0)
    error = task.exception(0)
    return _status_of(error) if error is not None and code is LLMStatusCode.LLM_SUCCESS else code.name


def _outcome(result: Any) -> Tuple[str, Any]:
    """How a call that returned ended, and what of its result later calls speak of."""
    success = LLMStatusCode.LLM_SUCCESS.name
    if isinstance(result, (Cache, KvCache)):
        addresses = result.tensor_addrs if isinstance(result, Cache) else result.per_device_tensor_addrs[0]
        return success, {"cache": result.cache_id, "addresses": list(addresses)}
    if isinstance(result, tuple):                   # of calls that link
        return result[0].name, {"codes": [code.name for code in result[1]]}
    if isinstance(result, Enum):
        return success, result.name
    return success, result if isinstance(result, int) else None


# ------------------------------------------------------------------------------------------------------ arguments

def _cluster(cluster_id: Any) -> Dict[str, Any]:
    """A cluster id, marked, as a recording numbers clusters anew."""
    return {"cluster": cluster_id}


def _arguments(bound: Mapping[str, Any]) -> Dict[str, Any]:
    found: Dict[str, Any] = {}
    for name, value in bound.items():
        if name == "addrs":                         # where the caller's memory lies is seen from the result
            found[name] = {"memory": len(value) if isinstance(value, (list, tuple)) else 0}
        elif name == "remote_cluster_id":
            found[name] = _cluster(value)
        elif name == "cluster_rank_info" and isinstance(value, Mapping):
            found[name] = {"map": [[_cluster(key), rank] for key, rank in value.items()]}
        elif name == "switch_options":
            found[name] = {"listens": bool(value) and parser.LISTEN_IP_INFO in value}
        elif name == "comm_name":
            found[name] = {"comm": value}
        elif name != "rank_table":
            found[name] = _plain(value)
    return found


def _key(value: Any) -> Dict[str, Any]:
    numbers = {CacheKey: ("req_id", "model_id", "prefix_id"), CacheKeyByIdAndIndex: ("cache_id", "batch_index"),
               BlocksCacheKey: ("model_id",), HeldBlocksKey: ("req_id", "generation")}[type(value)]
    return {"key": type(value).__name__, "of": _cluster(value.cluster_id),
            "numbers": [getattr(value, name) for name in numbers]}


def _desc(value: CacheDesc) -> Dict[str, Any]:
    return {"num_tensors": value.num_tensors, "shape": list(value.shape),
            "data_type": value.data_type and value.data_type.name,
            "placement": value.placement and value.placement.name}


def _cache(value: Any) -> Dict[str, Any]:
    if value.cache_id != CPU_CACHE_ID:
        return {"handle": value.cache_id}
    return {"cpu": id(value), "desc": _desc(value.cache_desc)}


def _by_address(value: TransferConfig) -> Dict[str, Any]:
    return {"to": "address", "dst_cluster_id": _cluster(value.dst_cluster_id), "addresses": list(value.dst_addrs),
            "src_layer_range": _plain(value.src_layer_range), "src_batch_index": value.src_batch_index}


def _by_key(value: TransferWithCacheKeyConfig) -> Dict[str, Any]:
    names = ("cache_key", "src_layer_range", "dst_layer_range", "src_batch_index", "release")
    return {"to": "key", **{name: _plain(getattr(value, name)) for name in names}}


def _link(value: LLMClusterInfo) -> Dict[str, Any]:
    return {"peer": _cluster(value.remote_cluster_id), "remote": len(value.remote_ip_info_list),
            "local": len(value.local_ip_info_list)}


_ENCODERS: Dict[type, Callable[[Any], Any]] = {
    CacheKey: _key, CacheKeyByIdAndIndex: _key, BlocksCacheKey: _key, HeldBlocksKey: _key, Cache: _cache,
    KvCache: _cache, CacheDesc: lambda value: {"desc": _desc(value)}, TransferConfig: _by_address,
    TransferWithCacheKeyConfig: _by_key, LLMClusterInfo: _link,
    range: lambda value: {"range": [value.start, value.stop, value.step]},
}


def _plain(value: Any) -> Any:
    """What JSON can hold of an argument; no text that a client chose."""
    encoder = _ENCODERS.get(type(value))
    if encoder is not None:
        return encoder(value)
    if isinstance(value, Enum):
        return {"enum": value.name}
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, Mapping):
        return {"map": [[_plain(key), _plain(each)] for key, each in value.items()]}
    if isinstance(value, LayerSynchronizer):
        return {"synchronizer": True}
    try:
        return [int(each) for each in value]        # an array or buffer of block numbers
    except (TypeError, ValueError):
        return {"type": type(value).__name__}
