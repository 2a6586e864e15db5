"""``llm-datadist ascend-check``: whether transfers work on this machine, in a few minutes, as a report to attach.

Two processes of their own are linked over 127.0.0.1, on one device and on two. What a pull or push has moved is read
back by a copy to the host, so that nothing needs the CPU to address device memory. Works with either provider.
"""
from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

SIZE = 1 << 20                  # bytes of one block or slot
POOL = 64 << 20
NUM_SLOTS = 4
DEVICES = "0,1"
TIMEOUT_MS = 5000
ANSWER_LIMIT_S = 120.0
_HOST_TO_DEVICE, _DEVICE_TO_HOST = 1, 2
LAYOUTS = ("contiguous", "paged", "registered")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--devices", default=DEVICES, metavar="A,B",
                        help=f"devices to use (default: {DEVICES}, or the only one)")
    parser.add_argument("--local-comm-res", metavar="JSON", help="endpoints of both processes (default: found)")
    parser.add_argument("--json", action="store_true", help="machine-readable output")


def run(args: argparse.Namespace) -> int:
    """Print the report; 0 when every check passed, 1 when one failed."""
    devices = [int(text) for text in args.devices.split(",")]
    found = facts()
    # Of the default, what this machine has not is left out; what was asked for is tried.
    if args.devices == DEVICES and int(found["devices"]) == 1:
        devices = devices[:1]
    report = {"facts": found, "checks": checks(devices, args.local_comm_res)}
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        for name, value in report["facts"].items():
            print(f"{name}: {value}")
        for row in report["checks"]:
            reason = f": {row['text']}" if row["text"] else ""
            print(f"{row['outcome']:6} {row['seconds']:6.2f} s  {row['check']}{reason}")
    return 0 if all(row["outcome"] != "FAILED" for row in report["checks"]) else 1


def facts() -> dict[str, str]:
    """Say what the checks ran on."""
    from llm_datadist.core.base.provider import Provider
    from llm_datadist.tools.doctor import num_devices
    provider = Provider.open("auto")
    return {
        "machine": f"{platform.machine()}, Linux {platform.release()}, Python {platform.python_version()}",
        "provider": provider.name + (f", not CANN: {provider.why_not_cann}" if provider.why_not_cann else ""),
        "runtime": ", ".join([provider.version or "version unknown", *provider.libraries.values()]),
        "devices": str(num_devices(provider)),
    }


def checks(devices: list[int], comm_res: str | None = None) -> list[dict[str, Any]]:
    """Run all checks; one dict each: check, outcome ("ok" or "FAILED"), text, seconds."""
    rows = []
    pairs = [devices[:1] * 2] + ([devices[:2]] if len(set(devices[:2])) == 2 else [])
    for pair in pairs:
        where = f"device {pair[0]}" if pair[0] == pair[1] else f"devices {pair[0]} and {pair[1]}"
        for layout in LAYOUTS:
            rows.append(_row(f"{where}: pull, {layout}", _pull, pair, comm_res, layout))
        rows.append(_row(f"{where}: push, contiguous", _push, pair, comm_res))
        rows.append(_row(f"{where}: a peer that stands still is a timeout", _timeout, pair, comm_res))
        rows.append(_row(f"{where}: a peer that is killed can be replaced", _kill, pair, comm_res))
    return rows


def loopback(device: int = 0) -> str:
    """Pull once between two processes on one device; "yes", or why not."""
    row = _row("loopback", _pull, [device, device], None, "paged")
    return "yes" if row["outcome"] == "ok" else f"no: {row['text']}"


def _row(name: str, check: Callable[..., None], *args: Any) -> dict[str, Any]:
    start = time.monotonic()
    text, outcome = "", "ok"
    try:
        check(*args)
    except Exception as error:              # the report says what went wrong, whatever it is
        outcome, text = "FAILED", f"{type(error).__name__}: {error}"
    return {"check": name, "outcome": outcome, "text": text, "seconds": round(time.monotonic() - start, 3)}


# ------------------------------------------------------------------------------------------------------- the checks

@contextlib.contextmanager
def _linked(devices: list[int], comm_res: str | None) -> Iterator[tuple[_Peer, _Peer, Any]]:
    with _Peer() as here, _Peer() as there:
        address = there("start", cluster=1, device=devices[1], comm_res=comm_res)
        here("start", cluster=2, device=devices[0], comm_res=comm_res)
        here("link", address=address)
        yield here, there, address


def _expect(found: Any, wanted: Any) -> None:
    if found != wanted:
        raise AssertionError(f"the bytes are {found}, not {wanted}")


def _pull(devices: list[int], comm_res: str | None, layout: str) -> None:
    with _linked(devices, comm_res) as (here, there, _):
        cache = there("offer", layout=layout, byte=7)
        _expect(here("pull", layout=layout, cache=cache), [7])


def _push(devices: list[int], comm_res: str | None) -> None:
    with _linked(devices, comm_res) as (here, there, _):
        cache = there("offer", layout="contiguous", byte=0)
        here("push", cache=cache, byte=9)
        _expect(there("read"), [9])


def _timeout(devices: list[int], comm_res: str | None) -> None:
    with _linked(devices, comm_res) as (here, there, _):
        cache = there("offer", layout="contiguous", byte=7)
        there.process.send_signal(signal.SIGSTOP)
        try:
            found = here("pull", layout="contiguous", cache=cache, may_fail=True)
        finally:
            there.process.send_signal(signal.SIGCONT)
        if found not in ("LLM_TIMEOUT", [7]):       # bytes that need no help of the peer's processor may arrive
            raise AssertionError(f"the pull ended with {found}")


def _kill(devices: list[int], comm_res: str | None) -> None:
    with _linked(devices, comm_res) as (here, there, _):
        cache = there("offer", layout="contiguous", byte=7)
        _expect(here("pull", layout="contiguous", cache=cache), [7])
        there.process.kill()
        there.process.wait()
        found = here("pull", layout="contiguous", cache=cache, may_fail=True)
        if isinstance(found, list):
            raise AssertionError("a pull from a process that is gone succeeded")
        here("unlink")
        with _Peer() as other:
            address = other("start", cluster=1, device=devices[1], comm_res=comm_res)
            here("link", address=address)
            cache = other("offer", layout="contiguous", byte=8)
            _expect(here("pull", layout="contiguous", cache=cache), [8])


# ----------------------------------------------------------------------------------------------------- the processes

class _Peer:
    """A process with one engine; called with what it is to do."""

    def __init__(self) -> None:
        self.was_late = False
        self.process = subprocess.Popen([sys.executable, "-m", __spec__.name if __spec__ else __name__],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, do: str, may_fail: bool = False, **args: Any) -> Any:
        """Have it done; the result. With `may_fail` the code of the exception instead of an error."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"do": do, **args}) + "\n")
        self.process.stdin.flush()
        timer = threading.Timer(ANSWER_LIMIT_S, self._end_late)
        timer.start()
        try:
            line = self.process.stdout.readline()
        finally:
            timer.cancel()
        if not line:
            why = f"gave no answer for {ANSWER_LIMIT_S:g} s" if self.was_late else (
                f"ended with {self.process.wait(ANSWER_LIMIT_S)}")
            raise RuntimeError(f"the process that was to {do} {why}")
        answer = json.loads(line)
        if "error" in answer and not may_fail:
            raise RuntimeError(answer["error"])
        return answer["result"]

    def _end_late(self) -> None:
        self.was_late = True
        self.process.kill()

    def __enter__(self) -> _Peer:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            self.process.communicate(timeout=ANSWER_LIMIT_S)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


class _Engine:
    """What runs in such a process."""

    def __init__(self) -> None:
        self.kept: dict[str, Any] = {}

    def start(self, cluster: int, device: int, comm_res: str | None) -> Any:
        from llm_datadist import LLMConfig, LLMDataDist, LLMRole
        config = LLMConfig()
        config.device_id = device
        config.enable_cache_manager = True
        config.enable_remote_cache_accessible = True
        config.sync_kv_timeout = TIMEOUT_MS
        config.mem_pool_cfg = json.dumps({"memory_size": POOL, "page_shift": 16})
        config.listen_ip_info = "127.0.0.1:0"
        if comm_res:
            config.local_comm_res = comm_res
        self.device = device
        self.dist = LLMDataDist(LLMRole.MIX, cluster)
        self.dist.init(config.generate_options())
        self.manager = self.dist.cache_manager
        return self.dist.listen_address

    def _cluster(self, address: Any) -> Any:
        from llm_datadist import LLMClusterInfo
        cluster = LLMClusterInfo()
        cluster.remote_cluster_id = 1
        cluster.append_local_ip_info("127.0.0.1", 0)
        if address is not None:
            cluster.append_remote_ip_info(address[0], address[1])
        return cluster

    def link(self, address: Any) -> None:
        overall, _ = self.dist.link_clusters([self._cluster(address)], 30000)
        if overall.name != "LLM_SUCCESS":
            raise RuntimeError(f"link_clusters: {overall.name}; the log says why")

    def unlink(self) -> None:
        self.dist.unlink_clusters([self._cluster(None)], 10000, True)

    def _runtime(self) -> ctypes.CDLL:
        """The runtime of the provider, with our device current in this thread."""
        from llm_datadist.core.base.provider import Provider
        acl = ctypes.CDLL(Provider.open(self.dist.stats()["provider"]).libraries["acl"])
        if acl["aclrtSetDevice"](self.device) != 0:
            raise RuntimeError(f"aclrtSetDevice refuses device {self.device}")
        return acl

    def _device_memory(self, num_bytes: int) -> int:
        """Memory of the runtime that no pool owns; it goes with the process."""
        memory = ctypes.c_void_p()
        code = self._runtime()["aclrtMalloc"](ctypes.byref(memory), ctypes.c_size_t(num_bytes), 0)
        if code != 0 or memory.value is None:
            raise RuntimeError(f"aclrtMalloc of {num_bytes} bytes answers {code}")
        return memory.value

    def _copy(self, dst: int, src: int, kind: int) -> None:
        size = ctypes.c_size_t(NUM_SLOTS * SIZE)
        code = self._runtime()["aclrtMemcpy"](ctypes.c_void_p(dst), size, ctypes.c_void_p(src), size, kind)
        if code != 0:
            raise RuntimeError(f"aclrtMemcpy answers {code}")

    def _make(self, layout: str) -> Any:
        from llm_datadist import BlocksCacheKey, CacheDesc, DataType
        desc = CacheDesc(1, [NUM_SLOTS, SIZE], DataType.DT_UINT8)
        if layout == "paged":
            return self.manager.allocate_blocks_cache(desc, BlocksCacheKey(self.dist.cluster_id))
        if layout == "contiguous":
            return self.manager.allocate_cache(desc)
        return self.manager.register_cache(desc, [self._device_memory(NUM_SLOTS * SIZE)])

    def _fill(self, cache: Any, byte: int) -> None:
        memory = ctypes.create_string_buffer(bytes([byte]) * (NUM_SLOTS * SIZE), NUM_SLOTS * SIZE)
        self._copy(cache.tensor_addrs[0], ctypes.addressof(memory), _HOST_TO_DEVICE)

    def offer(self, layout: str, byte: int) -> int:
        self.kept["offer"] = cache = self._make(layout)
        self._fill(cache, byte)
        return cache.cache_id

    def read(self, name: str = "offer", num_slots: int = 1) -> list[int]:
        memory = ctypes.create_string_buffer(NUM_SLOTS * SIZE)
        self._copy(ctypes.addressof(memory), self.kept[name].tensor_addrs[0], _DEVICE_TO_HOST)
        return sorted(set(memory.raw[:num_slots * SIZE]))

    def pull(self, layout: str, cache: int) -> list[int]:
        from llm_datadist import BlocksCacheKey, CacheKeyByIdAndIndex
        if layout not in self.kept:
            self.kept[layout] = self._make(layout)
        target = self.kept[layout]
        self._fill(target, 0)
        if layout == "paged":
            blocks = list(range(NUM_SLOTS))
            self.manager.pull_blocks(BlocksCacheKey(1), target, blocks, blocks)
            return self.read(layout, NUM_SLOTS)
        self.manager.pull_cache(CacheKeyByIdAndIndex(1, cache, 0), target, 0)
        return self.read(layout)

    def push(self, cache: int, byte: int) -> None:
        from llm_datadist import CacheKeyByIdAndIndex
        source = self._make("contiguous")
        self._fill(source, byte)
        self.manager.push_cache(CacheKeyByIdAndIndex(1, cache, 0), source)


def main() -> None:
    """Do what is asked for on standard input, until it ends."""
    engine = _Engine()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"result": getattr(engine, request.pop("do"))(**request)}
        except Exception as error:
            code = getattr(getattr(error, "status_code", None), "name", type(error).__name__)
            answer = {"result": code, "error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)
    if hasattr(engine, "dist"):
        engine.dist.finalize()


if __name__ == "__main__":
    main()
