"""Network namespaces of a test, joined by a bridge, as if they were hosts of one network.

A namespace has no name: it lives as long as a descriptor of this process refers to it, and ends with the process
however that ends. Needs root and ``ip`` of iproute2.
"""
from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import threading
from types import TracebackType
from typing import Any, Callable, List, Optional, Type, TypeVar

CLONE_NEWNET = 0x40000000
SUBNET = "10.79.0"              # nobody outside the namespaces sees it

_T = TypeVar("_T")


class NoNamespacesError(Exception):
    """This machine does not permit network namespaces; the text says why."""


def _in_thread(function: Callable[[], _T]) -> _T:
    """Run in a thread of its own, whose namespace may change without anybody else noticing."""
    results: List[_T] = []
    errors: List[BaseException] = []

    def run() -> None:
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def _system_call(name: str, *args: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*args) != 0:
        error = ctypes.get_errno()
        raise NoNamespacesError(f"{name}: {os.strerror(error)}")


def _new_namespace() -> int:
    def create() -> int:
        _system_call("unshare", CLONE_NEWNET)
        return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)

    return _in_thread(create)


def _run_in(descriptor: int, function: Callable[[], _T]) -> _T:
    def enter() -> _T:
        _system_call("setns", descriptor, CLONE_NEWNET)
        return function()

    return _in_thread(enter)


class Host:
    """One namespace, with an address of its own.

    Attributes
    ----------
    ip : str
        Its address, which the others reach.
    """

    def __init__(self, descriptor: int, ip: str) -> None:
        self.descriptor = descriptor
        self.ip = ip

    def received_bytes(self) -> int:
        """What has come in from other hosts so far."""
        return self.run(_received_bytes)

    def run(self, function: Callable[..., _T], *args: Any, **kwargs: Any) -> _T:
        """Call the function in this namespace; a process it starts stays there."""
        return _run_in(self.descriptor, lambda: function(*args, **kwargs))


def _received_bytes() -> int:
    with open("/proc/thread-self/net/dev", encoding="ascii") as devices:
        return next(int(line.split()[1]) for line in devices if line.strip().startswith("eth0:"))


class Network:
    """Hosts that reach each other, and nothing else; a context manager.

    Raises
    ------
    NoNamespacesError
        This machine does not permit it; nothing is left behind.
    """

    def __init__(self, num_hosts: int) -> None:
        self._descriptors: List[int] = []
        self.hosts: List[Host] = []
        try:
            self._build(num_hosts)
        except BaseException:
            self.close()
            raise

    def _namespace(self) -> int:
        self._descriptors.append(_new_namespace())
        return self._descriptors[-1]

    def _ip(self, descriptor: int, *words: str) -> None:
        ip = shutil.which("ip")
        if ip is None:
            raise NoNamespacesError("there is no ip command, of iproute2")
        done = _run_in(descriptor, lambda: subprocess.run(
            [ip, *words], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=10))
        if done.returncode:
            raise NoNamespacesError(f"ip {' '.join(words)}: {done.stderr.strip() or done.returncode}")

    def _build(self, num_hosts: int) -> None:
        switch = self._namespace()
        self._ip(switch, "link", "add", "bridge", "type", "bridge")
        self._ip(switch, "link", "set", "bridge", "up")
        for i in range(num_hosts):
            inside = self._namespace()
            host = Host(inside, f"{SUBNET}.{i + 1}")
            self._ip(inside, "link", "add", "eth0", "type", "veth", "peer", "name", f"port{i}", "netns", _path(switch))
            self._ip(switch, "link", "set", f"port{i}", "master", "bridge", "up")
            self._ip(inside, "addr", "add", f"{host.ip}/24", "dev", "eth0")
            self._ip(inside, "link", "set", "eth0", "up")
            self._ip(inside, "link", "set", "lo", "up")
            self.hosts.append(host)

    def plug(self, host: Host, is_in: bool) -> None:
        """Pull a host's plug, or put it back; nobody is told."""
        port = f"port{self.hosts.index(host)}"
        self._ip(self._descriptors[0], "link", "set", port, "up" if is_in else "down")

    def close(self) -> None:
        """Let go of the namespaces; they end with the last process in them."""
        while self._descriptors:
            os.close(self._descriptors.pop())
        self.hosts.clear()

    def __enter__(self) -> "Network":
        return self

    def __exit__(self, kind: Optional[Type[BaseException]], value: Optional[BaseException],
                 trace: Optional[TracebackType]) -> None:
        self.close()


def _path(descriptor: int) -> str:
    return f"/proc/{os.getpid()}/fd/{descriptor}"
