"""``llm-datadist doctor``: which provider answers and why not another, what this host allows, and what to do about it.

Nothing is changed. Only ``--loopback`` takes device memory, and uses the network of this host.
"""
from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import json
import os
import resource
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from llm_datadist import LLMException
from llm_datadist.core.base.provider import Provider

SETTINGS = (
    "LLM_DATADIST_PROVIDER", "LLM_DATADIST_HOST_PATHS", "LLM_DATADIST_COPY_THREADS", "LLM_DATADIST_TCP_STREAMS",
    "LLM_DATADIST_SHARED_TABLE", "LLM_DATADIST_LINK_BASE_PORT", "LLM_DATADIST_HOST_DEVICES", "LLM_DATADIST_HCCN_CONF",
    "ASCEND_HOME_PATH", "HCCL_INTRA_ROCE_ENABLE", "HCCL_RDMA_TC", "HCCL_RDMA_SL",
)
_LIMITS = {
    "locked memory": (resource.RLIMIT_MEMLOCK, "pinned memory and RDMA registration"),
    "open files": (resource.RLIMIT_NOFILE, "a few per link"),
    "address space": (resource.RLIMIT_AS, "pools of peers are mapped"),
}
_PROBE_SECONDS = 10.0
# Runs in a child that then reads this process: an ancestor is as foreign to it as any other process of the same user,
# while a child could be read even where reading strangers is forbidden.
_PROBE = """
import ctypes, os, sys
pid, address, size = map(int, sys.argv[1:])
class Piece(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("size", ctypes.c_size_t)]
into = ctypes.create_string_buffer(size)
local, remote = Piece(ctypes.addressof(into), size), Piece(address, size)
libc = ctypes.CDLL(None, use_errno=True)
libc.process_vm_readv.restype = ctypes.c_ssize_t
got = libc.process_vm_readv(pid, ctypes.byref(local), ctypes.c_ulong(1), ctypes.byref(remote), ctypes.c_ulong(1),
                            ctypes.c_ulong(0))
if got != size:
    sys.exit(os.strerror(ctypes.get_errno()))
sys.stdout.buffer.write(into.raw)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    parser.add_argument("--loopback", action="store_true", help="also pull once between two processes on device 0")


def run(args: argparse.Namespace) -> int:
    """Print the findings.

    Returns
    -------
    int
        0 when an engine would find a provider, 1 when not.
    """
    findings = {
        "providers": providers(os.environ),
        "settings": {name: os.environ[name] for name in SETTINGS if name in os.environ},
        "host": {
            "processors": str(len(os.sched_getaffinity(0))),
            "memfd": memfd(),
            "cross-memory attach": cross_memory_attach(),
            "pidfd": pidfd(),
            "huge pages": huge_pages(),
            "shared memory huge pages": _selected("/sys/kernel/mm/transparent_hugepage/shmem_enabled"),
            "RDMA devices": rdma_devices(),
        },
        "limits": limits(),
    }
    if args.loopback:
        from llm_datadist.tools.ascend_check import loopback
        findings["loopback"] = {"a pull between two processes": loopback()}
    findings["advice"] = dict(enumerate(advice(findings, os.environ), 1))
    if args.json:
        print(json.dumps(findings, indent=2))
    else:
        _print_text(findings)
    return 0 if findings["providers"]["chosen"] else 1


def providers(environ: Mapping[str, str]) -> dict:
    """Return {"wanted", "chosen", "host", "cann"}: the setting, the name of what answers to it, a line about each."""
    wanted = environ.get("LLM_DATADIST_PROVIDER") or "auto"
    found = {"wanted": wanted, "chosen": None}
    for which in ("host", "cann"):
        try:
            provider = Provider.open(which)
        except LLMException as error:
            found[which] = f"no: {error}"
        else:
            found[which] = _describe(provider)
    try:
        provider = Provider.open(wanted)
    except LLMException as error:
        found["refused"] = str(error)
    else:
        found["chosen"] = provider.name
        if provider.why_not_cann:
            found["why not CANN"] = provider.why_not_cann
    return found


def num_devices(provider: Provider) -> int:
    """How many devices the runtime of a provider counts, 0 when it does not answer."""
    count = ctypes.c_uint32()
    runtime = ctypes.CDLL(provider.libraries["acl"])
    return count.value if runtime["aclrtGetDeviceCount"](ctypes.byref(count)) == 0 else 0


def advice(findings: dict, environ: Mapping[str, str]) -> list[str]:
    """What to do about the findings; empty when nothing seems to be missing."""
    found, told = findings["providers"], []
    why = found.get("refused") or found.get("why not CANN") or ""
    if found["chosen"] != "cann" and why:
        if "No such file" in why or "unavailable" in why:
            told.append("To use CANN, run the toolkit's set_env.sh, or set ASCEND_HOME_PATH to where it is installed"
                        + ("." if environ.get("ASCEND_HOME_PATH") else ": it is not set."))
        if "lacks symbol" in why:
            told.append("The toolkit is too old, or is none: install one with the symbol that is named.")
        if "no device" in why:
            told.append("CANN sees no device: look at npu-smi info, at ASCEND_RT_VISIBLE_DEVICES, and, in a container, "
                        "at /dev/davinci*.")
    if found["chosen"] == "cann":
        conf = environ.get("LLM_DATADIST_HCCN_CONF") or "/etc/hccn.conf"
        if not os.access(conf, os.R_OK):
            told.append(f"{conf} cannot be read: without local_comm_res only devices of one super node are linked.")
        if findings["limits"]["locked memory"].partition(" ")[0] != "unlimited":
            told.append("Memory that may be locked is limited: raise it (ulimit -l unlimited) for host pools and RDMA.")
    elif str(findings["host"]["cross-memory attach"]).startswith("no"):
        told.append("Registered memory goes through TCP on this host: allow ptrace between processes to change that.")
    if str(findings.get("loopback", {}).get("a pull between two processes", "yes")).startswith("no"):
        told.append("The loopback failed: run llm-datadist ascend-check for the whole report.")
    return told


def memfd() -> str:
    """Say whether sealed anonymous files work: they carry the pools of the host provider."""
    if not hasattr(os, "memfd_create"):
        return "no: this Python was built without it"
    try:
        fd = os.memfd_create("doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:
        return f"no: {error.strerror}"
    try:
        os.ftruncate(fd, 4096)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    except OSError as error:
        return f"no: without seals, {error.strerror}"
    finally:
        os.close(fd)
    return "yes, with seals"


def cross_memory_attach() -> str:
    """Say whether one process may read another's memory: how registered memory travels on one host."""
    secret = os.urandom(64)
    memory = ctypes.create_string_buffer(secret, len(secret))
    command = [sys.executable, "-c", _PROBE, str(os.getpid()), str(ctypes.addressof(memory)), str(len(secret))]
    try:
        probe = subprocess.run(command, capture_output=True, timeout=_PROBE_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown: {error}"
    if probe.returncode == 0 and probe.stdout == secret:
        return "yes"
    reason = probe.stderr.decode("utf-8", "replace").strip().splitlines()
    scope = _read("/proc/sys/kernel/yama/ptrace_scope")
    hint = f" (kernel.yama.ptrace_scope={scope})" if scope not in (None, "0") else ""
    return f"no, TCP is used instead: {reason[-1] if reason else f'exit status {probe.returncode}'}{hint}"


def pidfd() -> str:
    """Say whether the kernel tells of a peer's death through a file descriptor."""
    if not hasattr(os, "pidfd_open"):
        return "unknown: this Python was built without it"
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError as error:
        return f"no: {error.strerror}"
    return "yes"


def huge_pages() -> str:
    """Say how many huge pages are reserved, and when transparent ones are used."""
    values = {}
    for line in (_read("/proc/meminfo") or "").splitlines():
        name, _, value = line.partition(":")
        values[name] = value.strip()
    transparent = _selected("/sys/kernel/mm/transparent_hugepage/enabled")
    return (
        f"{values.get('HugePages_Free', '0')} of {values.get('HugePages_Total', '0')} of "
        f"{values.get('Hugepagesize', 'unknown size')} free; transparent: {transparent}"
    )


def rdma_devices() -> str:
    """List the RDMA devices the kernel shows."""
    with contextlib.suppress(OSError):
        return ", ".join(sorted(path.name for path in Path("/sys/class/infiniband").iterdir())) or "none"
    return "none"


def limits() -> dict[str, str]:
    """Return the soft limits of this process that matter, with the reason."""
    found = {}
    for name, (which, reason) in _LIMITS.items():
        soft, _ = resource.getrlimit(which)
        value = "unlimited" if soft == resource.RLIM_INFINITY else str(soft)
        found[name] = f"{value} ({reason})"
    return found


def _describe(provider) -> str:
    version = provider.version or "version unknown"
    capabilities = ", ".join(sorted(provider.capabilities)) or "none"
    libraries = ", ".join(sorted(set(provider.libraries.values())))
    return f"yes: {version}, {libraries}; optional abilities: {capabilities}"


def _print_text(findings: dict) -> None:
    for title, values in findings.items():
        print(f"{title}:" if values else f"{title}: none")
        for name, value in values.items():
            print(f"  {name}: {value if value is not None else 'none'}")


def _read(path: str) -> str | None:
    with contextlib.suppress(OSError):
        return Path(path).read_text(encoding="ascii", errors="replace").strip()
    return None


def _selected(path: str) -> str:
    """Return the bracketed word of a file like "always [madvise] never"."""
    text = _read(path)
    return text.partition("[")[2].partition("]")[0] if text else "unknown"
