"""System calls that a process may not make, as in a container, and forked children for limits that cannot be undone."""
from __future__ import annotations

import ctypes
import errno
import functools
import mmap
import os
import platform
import resource
import struct
from typing import Callable, Optional

import pytest

_NUMBERS = {
    "x86_64": {"process_vm_readv": 310, "process_vm_writev": 311, "epoll_ctl": 233},
    "aarch64": {"process_vm_readv": 270, "process_vm_writev": 271, "epoll_ctl": 21},
}
PROCESS_VM = ("process_vm_readv", "process_vm_writev")

_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _SECCOMP_MODE_FILTER = 22, 38, 2
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _FAIL = 0x7FFF0000, 0x00050000


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]


def deny(*names: str, code: int = errno.EPERM) -> None:
    """Let these calls fail from now on, in this thread and in what it starts; there is no way back."""
    numbers = [_NUMBERS[platform.machine()][name] for name in names]
    steps = [(_LOAD, 0, 0, 0)]
    steps += [(_JUMP_IF_EQUAL, len(numbers) - i, 0, number) for i, number in enumerate(numbers)]
    steps += [(_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _FAIL | code)]
    words = b"".join(struct.pack("<HBBI", *step) for step in steps)
    libc = ctypes.CDLL(None, use_errno=True)
    program = _Program(len(steps), words)
    for arguments in ((_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
                      (_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program))):
        if libc.prctl(*arguments) != 0:
            raise OSError(ctypes.get_errno(), "prctl")


def in_child(work: Callable[[], Optional[str]]) -> str:
    """Run `work` in a forked child: limits set there do not bind this process. Its text, or "" when it is fine."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        text = "the child ended early"
        try:
            text = work() or ""
        except BaseException as error:
            text = repr(error)
        finally:
            os.write(write_end, text.encode())
            os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return f"the child was ended by signal {os.WTERMSIG(status)}"
    return text


@functools.cache
def _denies() -> bool:
    return in_child(lambda: deny("epoll_ctl")) == ""


@functools.cache
def _limits_address_space() -> bool:
    def work():
        resource.setrlimit(resource.RLIMIT_AS, (1 << 20, resource.RLIM_INFINITY))
        mmap.mmap(-1, 64 << 20)

    return in_child(work) != ""


def need_denial() -> None:
    """Skip where no system call can be denied: emulators of a processor do not pass such a filter on."""
    if not _denies():
        pytest.skip("system calls cannot be denied here")


def need_limited_address_space() -> None:
    """Skip where a limit on address space limits nothing, as under an emulator."""
    if not _limits_address_space():
        pytest.skip("address space cannot be limited here")
