"""Processes of a test: children that each run one `LLMDataDist`, and the engine of the test's own process.

A test calls ordinary functions in either process, and passes them on like any value::

    def keep_cache(node, desc):                     # in a test module or next to it
        node.kept["cache"] = node.cache_manager.allocate_cache(desc)
        return node.kept["cache"].cache_id

    def test_pull(peers):
        owner = peers.start(1)                      # a child process, cluster 1
        here = peers.here(2)                        # this process, cluster 2
        peers.link(here, owner)
        cache_id = owner.call(keep_cache, desc)     # runs there; its result or exception comes back

The first argument of such a function is the `Node` of the process it runs in. Arguments and results are pickled. An
exception is raised in the test with the child's traceback as its cause. A call that takes too long, or a child that
ends, fails the test with all stacks of the child. `Peers.close` finalises every engine, ends every child, and fails
when an engine still held caches, keys or pins; `leftovers_allowed` of a process turns that off for it.

Run as a program, this module is the child.
"""
from __future__ import annotations

import faulthandler
import functools
import importlib
import importlib.util
import math
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple, Type

from llm_datadist import LLMClusterInfo, LLMConfig, LLMDataDist, LLMRole, LLMStatusCode

START_LIMIT_S = 60.0            # how long a child may take to start
CALL_LIMIT_S = 30.0             # how long one call into it may take
KILL_GRACE_S = 10.0             # on top of that, before the child ends itself
SETTLE_S = 1.0                  # how long an engine may take to let go of what a broken link held

Function = Callable[..., Any]


# ------------------------------------------------------------------------------------------------------ options

def engine_options(
    *, remote_accessible: bool = False, device_pool: int = 64 << 20, host_pool: int = 0, page_shift: int = 12,
    timeout_ms: int = 10000, listen: bool = True, **extra: str,
) -> Dict[str, str]:
    """Options of a `CacheManager` that listens at a free port; `extra` are raw keys with ``_`` for the dot."""
    config = LLMConfig()
    config.device_id = 0
    config.enable_cache_manager = True
    config.enable_remote_cache_accessible = remote_accessible
    config.sync_kv_timeout = timeout_ms
    if device_pool:
        config.mem_pool_cfg = f'{{"memory_size": {device_pool}, "page_shift": {page_shift}}}'
    if host_pool:
        config.host_mem_pool_cfg = f'{{"memory_size": {host_pool}, "page_shift": {page_shift}}}'
    if listen:
        config.listen_ip_info = "127.0.0.1:0"
    options = config.generate_options()
    if "LDD_TEST_LOCAL_COMM_RES" in os.environ:         # see strict.py
        options["llm.LocalCommRes"] = os.environ["LDD_TEST_LOCAL_COMM_RES"]
    return {**options, **{key.replace("_", ".", 1): value for key, value in extra.items()}}


def engine_options_v1(
    *, device_pool: int = 64 << 20, timeout_ms: int = 10000, listen: bool = True, **extra: str,
) -> Dict[str, str]:
    """Options of a `KvCacheManager`."""
    config = LLMConfig()
    config.device_id = 0
    config.sync_kv_timeout = timeout_ms
    config.ge_options = {"ge.flowGraphMemMaxSize": str(device_pool)}
    if listen:
        config.listen_ip_info = "127.0.0.1:0"
    return {**config.generate_options(), **{key.replace("_", ".", 1): value for key, value in extra.items()}}


# ----------------------------------------------------------------------------------------- inside either process

class Node:
    """What one process of a test holds: its engine, and in `kept` whatever functions leave for later calls."""

    def __init__(self) -> None:
        self._dist: Optional[LLMDataDist] = None
        self.kept: Dict[Any, Any] = {}

    @property
    def dist(self) -> LLMDataDist:
        """The engine."""
        assert self._dist is not None, "the engine was not started"
        return self._dist

    @property
    def has_engine(self) -> bool:
        """Whether there is an engine."""
        return self._dist is not None

    @property
    def cache_manager(self) -> Any:
        """The manager of the engine, of either generation."""
        engine = self.dist._require_engine()
        return self.dist.cache_manager if engine.options.generation == 2 else self.dist.kv_cache_manager

    def start(self, cluster_id: int, options: Dict[str, str], role: LLMRole) -> Optional[Tuple[str, int]]:
        """Initialise the engine and return where it listens."""
        dist = LLMDataDist(role, cluster_id)
        dist.init(options)
        self._dist = dist
        return dist.listen_address

    def leftovers(self) -> List[str]:
        """Say what the engine still holds, once what a broken link held had time to go."""
        if self._dist is None or self._dist._engine is None:
            return []
        deadline = time.monotonic() + SETTLE_S
        while True:
            found = _held(self._dist.stats())
            if not found or time.monotonic() >= deadline:
                return found
            time.sleep(0.01)

    def finalize(self) -> None:
        """Finalise the engine, if there is one."""
        dist, self._dist = self._dist, None
        self.kept.clear()
        if dist is not None:
            finalize(dist)                                      # what is left is what `leftovers` is for


def finalize(dist: LLMDataDist) -> None:
    """Finalise an engine that may hold caches and keys, which it would warn of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        dist.finalize()


def _held(stats: Dict[str, Any]) -> List[str]:
    found = [f"{stats[name]} {name}" for name in ("caches", "keys", "pins", "holds") if stats[name]]
    for name in ("device_pool", "host_pool"):
        pool = stats[name]
        if pool and pool["free_bytes"] != pool["bytes"]:
            found.append(f"{pool['bytes'] - pool['free_bytes']} bytes of {name}")
    return found


def _start(node: Node, cluster_id: int, options: Dict[str, str], role: LLMRole) -> Optional[Tuple[str, int]]:
    return node.start(cluster_id, options, role)


def _leftovers(node: Node) -> List[str]:
    return node.leftovers()


def _finalize(node: Node) -> None:
    node.finalize()


def _stats(node: Node) -> Dict[str, Any]:
    return node.dist.stats()


def _link(node: Node, cluster_id: int, address: Tuple[str, int], timeout_ms: int) -> LLMStatusCode:
    overall, codes = node.dist.link_clusters([_cluster(cluster_id, address)], timeout_ms)
    assert codes == [overall]
    return overall


def _unlink(node: Node, cluster_id: int, timeout_ms: int, force: bool) -> LLMStatusCode:
    return node.dist.unlink_clusters([_cluster(cluster_id, None)], timeout_ms, force)[0]


def _cluster(cluster_id: int, address: Optional[Tuple[str, int]]) -> LLMClusterInfo:
    cluster = LLMClusterInfo()
    cluster.remote_cluster_id = cluster_id
    if address is not None:
        cluster.append_local_ip_info("127.0.0.1", 0)
        cluster.append_remote_ip_info(*address)
    return cluster


# ------------------------------------------------------------------------------------------- the child's program

def _resolve(module_name: str, path: str, qualname: str) -> Function:
    """Find a function by module and name; a module that cannot be imported by name is loaded from its file."""
    module = sys.modules.get(module_name)
    if module is None:
        try:
            module = importlib.import_module(module_name)
        except ImportError:
            spec = importlib.util.spec_from_file_location(module_name, path)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[module_name] = module
            spec.loader.exec_module(module)
    found: Any = module
    for name in qualname.split("."):
        found = getattr(found, name)
    return found


def _answer(node: Node, request: Tuple[Tuple[str, str, str], bytes]) -> bytes:
    where, arguments = request
    try:
        function = _resolve(*where)
        args, kwargs = pickle.loads(arguments)
        call = functools.partial(function, node, *args, **kwargs)
        if os.environ.get("LDD_TEST_STRICT") == "cann" and node.has_engine:
            from support.strict import call_as_a_stranger
            call = functools.partial(call_as_a_stranger, call)
        return pickle.dumps((True, call(), None))
    except BaseException as error:
        text = traceback.format_exc()
        try:
            answer = pickle.dumps((False, error, text))
            pickle.loads(answer)
            return answer
        except Exception:
            return pickle.dumps((False, PeerError(f"{type(error).__name__}: {error}"), text))


def _end_with_parent() -> None:
    """Leave when the parent is gone: it holds the other end of our standard input."""
    while os.read(0, 4096):
        pass
    os._exit(1)


def main() -> None:
    """Answer calls until the parent closes the connection."""
    faulthandler.register(signal.SIGALRM, all_threads=True, chain=True)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Functions pass by name, and a test module may be known as tests.<name>; behind the installed package in the path.
    sys.path.append(os.path.dirname(sys.path[0]))
    if os.environ.get("LDD_TEST_STRICT") == "cann":
        from support.strict import let_the_cpu_address_devices
        let_the_cpu_address_devices()
    connection = Connection(int(sys.argv[1]))
    connection.send_bytes(b"ready")
    node = Node()
    while True:
        try:
            limit_s, request = connection.recv()
        except EOFError:
            break
        signal.alarm(math.ceil(limit_s))                # its default action ends a process that is stuck
        answer = _answer(node, request)
        signal.alarm(0)
        connection.send_bytes(answer)
    node.finalize()


# ------------------------------------------------------------------------------------------------ in the test

class PeerError(Exception):
    """A child did not answer as it should: it hangs, it died, or its exception cannot be pickled."""


class RemoteTraceback(Exception):
    """Where in the child an exception was raised."""

    def __str__(self) -> str:
        return f"\n\"\"\"\n{self.args[0]}\"\"\""


class Process:
    """An engine of a test, here or in a child.

    Attributes
    ----------
    cluster_id : int
    address : tuple of (str, int) or None
        Where it listens.
    leftovers_allowed : bool
        Set by a test that leaves caches, keys or pins behind on purpose.
    """

    cluster_id: int
    address: Optional[Tuple[str, int]]

    def __init__(self) -> None:
        self.leftovers_allowed = False

    def call(self, function: Function, *args: Any, **kwargs: Any) -> Any:
        """Run ``function(node, *args, **kwargs)`` in that process."""
        raise TypeError("a Process is either a Child or Here")

    def open(self, cluster_id: int, options: Dict[str, str], role: LLMRole) -> None:
        """Initialise the engine; its cluster id and address become those of this object."""
        self.cluster_id = cluster_id
        self.address = self.call(_start, cluster_id, options, role)

    def finalize(self) -> None:
        """Finalise the engine; `open` may follow."""
        self.call(_finalize)

    def stats(self) -> Dict[str, Any]:
        """``LLMDataDist.stats`` of that process."""
        return self.call(_stats)

    def settled(self) -> Dict[str, Any]:
        """`stats`, once nothing is pinned: what was pulled over TCP is known to be pulled within a moment."""
        deadline = time.monotonic() + CALL_LIMIT_S
        found = self.stats()
        while found["pins"] and time.monotonic() < deadline:
            time.sleep(0.001)
            found = self.stats()
        return found

    @property
    def is_running(self) -> bool:
        """Whether the process can be called."""
        return True

    def settle(self) -> None:
        """Wait for the end of a call whose result nobody asked for."""

    def end(self) -> List[str]:
        """Finalise and end; return what was wrong, if anything."""
        raise TypeError("a Process is either a Child or Here")

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, kind: Optional[Type[BaseException]], value: Optional[BaseException],
                 trace: Optional[TracebackType]) -> None:
        self.end()


class Here(Process):
    """The engine of this process; `env` is set while it is open."""

    def __init__(self, env: Mapping[str, str]) -> None:
        super().__init__()
        self.node = Node()
        self._before = {name: os.environ.get(name) for name in env}
        os.environ.update(env)

    def call(self, function: Function, *args: Any, **kwargs: Any) -> Any:
        """Run ``function(node, *args, **kwargs)``."""
        return function(self.node, *args, **kwargs)

    def end(self) -> List[str]:
        """Finalise the engine and restore the environment."""
        try:
            self.node.finalize()
        finally:
            for name, value in self._before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
        return []


class Child(Process):
    """A child process; `env` is added to the environment."""

    def __init__(self, env: Mapping[str, str]) -> None:
        super().__init__()
        self._lock = threading.Lock()                   # held from a request to its answer
        self._begun: Optional[Callable[[], Any]] = None
        self._stderr = tempfile.TemporaryFile()
        self._is_ready = False
        self._was_ended = False                         # by the test, or for an answer that never came
        ours, theirs = socket.socketpair()
        try:
            # Warnings of the child are errors as they are here; unbuffered, so that nothing is lost when it dies.
            self._process = subprocess.Popen(
                [sys.executable, "-u", "-W", "error", "-X", "faulthandler", __file__, str(theirs.fileno())],
                stdin=subprocess.PIPE, stdout=self._stderr, stderr=self._stderr, pass_fds=[theirs.fileno()],
                env={**os.environ, **env})
        except BaseException:
            ours.close()
            self._stderr.close()
            raise
        finally:
            theirs.close()
        self._connection = Connection(ours.detach())

    @property
    def pid(self) -> int:
        """Id of the child."""
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether the child is alive and was not ended by the test."""
        return not self._was_ended and self._process.poll() is None

    def call(self, function: Function, *args: Any, limit_s: float = CALL_LIMIT_S, **kwargs: Any) -> Any:
        """Run ``function(node, *args, **kwargs)`` in the child and return its result, or raise its exception."""
        return self.begin(function, *args, limit_s=limit_s, **kwargs)()

    def begin(self, function: Function, *args: Any, limit_s: float = CALL_LIMIT_S,
              **kwargs: Any) -> Callable[[], Any]:
        """Start a call; the returned function waits for its result. No other call is possible in between."""
        path = sys.modules[function.__module__].__file__ or ""
        module_name = Path(path).stem if function.__module__ == "__main__" else function.__module__
        where = (module_name, path, function.__qualname__)
        self._lock.acquire()
        try:
            if not self._is_ready:
                self._await("start", START_LIMIT_S)
                self._is_ready = True
            self._connection.send((limit_s + KILL_GRACE_S, (where, pickle.dumps((args, kwargs)))))
        except OSError:
            self._lock.release()
            raise self._died(function.__name__) from None
        except BaseException:
            self._lock.release()
            raise

        def finish() -> Any:
            try:
                return self._receive(function.__name__, limit_s)
            finally:
                self._begun = None
                self._lock.release()

        self._begun = finish
        return finish

    def settle(self) -> None:
        """Wait for the end of a call whose result nobody asked for, and forget the result."""
        if self._begun is not None:
            _attempt(self._begun)

    def _receive(self, name: str, limit_s: float) -> Any:
        succeeded, result, text = pickle.loads(self._await(name, limit_s))
        if succeeded:
            return result
        raise result from RemoteTraceback(text)

    def _await(self, name: str, limit_s: float) -> bytes:
        if not self._connection.poll(limit_s):
            self.signal(signal.SIGABRT)                 # faulthandler writes all stacks
            self._process.wait()
            self._was_ended = True
            raise PeerError(f"{name} did not return within {limit_s} s in process {self.pid}\n{self.output()}")
        try:
            return self._connection.recv_bytes()
        except (EOFError, OSError):
            raise self._died(name) from None

    def _died(self, name: str) -> PeerError:
        if self._was_ended:
            return PeerError(f"{name}: process {self.pid} was ended before")
        self._was_ended = True
        return PeerError(f"process {self.pid} ended during {name} with {self._reap()}\n{self.output()}")

    def output(self) -> str:
        """What the child wrote to standard output and error."""
        size = os.fstat(self._stderr.fileno()).st_size
        return os.pread(self._stderr.fileno(), size, 0).decode("utf-8", "replace")

    def signal(self, number: int) -> None:
        """Send a signal to the child."""
        if self._process.poll() is None:
            self._process.send_signal(number)

    def kill(self) -> None:
        """End the child at once; what it leaves behind is the test's subject."""
        self._was_ended = True
        self.signal(signal.SIGKILL)
        self._process.wait()

    def _reap(self) -> int:
        try:
            return self._process.wait(KILL_GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def end(self) -> List[str]:
        """Close the connection, which makes the child finalise and exit."""
        faults = []
        if not self._was_ended:
            self._connection.close()
            code = self._reap()
            if code != 0:
                faults.append(f"process {self.pid} ended with {code}\n{self.output()}")
        elif self._process.poll() is None:
            self.kill()
        if not self._connection.closed:
            self._connection.close()
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._stderr.close()
        self._was_ended = True
        return faults


class Peers:
    """The processes of one test or module; closing it ends them all and says what they left behind."""

    def __init__(self) -> None:
        self._processes: List[Process] = []

    def child(self, env: Optional[Mapping[str, str]] = None) -> Child:
        """Start a process without an engine."""
        child = Child(env or {})
        self._processes.append(child)
        return child

    def start(self, cluster_id: int, options: Optional[Dict[str, str]] = None, *, role: LLMRole = LLMRole.MIX,
              env: Optional[Mapping[str, str]] = None) -> Child:
        """Start a process with an engine; `options` as of `engine_options`."""
        child = self.child(env)
        child.open(cluster_id, engine_options() if options is None else options, role)
        return child

    def here(self, cluster_id: int, options: Optional[Dict[str, str]] = None, *, role: LLMRole = LLMRole.MIX,
             env: Optional[Mapping[str, str]] = None) -> Here:
        """Initialise the engine of this process."""
        here = Here(env or {})
        self._processes.append(here)
        here.open(cluster_id, engine_options() if options is None else options, role)
        return here

    def link(self, client: Process, server: Process, timeout_ms: int = 10000) -> None:
        """Link `client` to where `server` listens."""
        code = client.call(_link, server.cluster_id, server.address, timeout_ms)
        assert code == LLMStatusCode.LLM_SUCCESS, code

    def unlink(self, client: Process, server: Process, timeout_ms: int = 10000, force: bool = False) -> None:
        """End the link from the side of `client`."""
        code = client.call(_unlink, server.cluster_id, timeout_ms, force)
        assert code == LLMStatusCode.LLM_SUCCESS, code

    def close(self) -> None:
        """End everything, whatever happens; then raise AssertionError for what was wrong."""
        faults: List[str] = []
        for process in self._processes:
            process.settle()
            if process.is_running and not process.leftovers_allowed:
                found = _attempt(process.call, _leftovers)
                if isinstance(found, str):
                    faults.append(found)
                elif found:
                    faults.append(f"cluster {process.cluster_id} still holds {', '.join(found)}")
        for process in reversed(self._processes):
            ended = _attempt(process.end)
            faults.extend([ended] if isinstance(ended, str) else ended)
        self._processes.clear()
        assert not faults, "\n".join(faults)

    def __enter__(self) -> "Peers":
        return self

    def __exit__(self, kind: Optional[Type[BaseException]], value: Optional[BaseException],
                 trace: Optional[TracebackType]) -> None:
        self.close()


def _attempt(function: Function, *args: Any) -> Any:
    """Return the result, or the traceback as a text: an end must not keep the other processes from ending."""
    try:
        return function(*args)
    except Exception:
        return traceback.format_exc()


if __name__ == "__main__":
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    from support import peer  # functions and classes are pickled under this name

    peer.main()
