"""A stand-in for CANN that refuses what CANN refuses: built from ``tests/strict/``, found like an installed toolkit.

``LDD_TEST_STRICT=cann`` runs any of the tests over it: every engine then takes the ``cann`` provider, over endpoints of
the kind that ``LDD_TEST_ENDPOINTS`` names (``device-hccs``, the default, ``device-roce`` or ``host-roce``). A call into
a process of a test is made from a fresh thread that has device 1 current, while its engine has device 0.
"""
from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

from llm_datadist.core.base.provider import HOST_LIBRARY

TESTS = Path(__file__).resolve().parents[1]
INCLUDE = TESTS.parent / "include"
NAMES = ("libacl_rt.so", "libcann_hixl.so")
PHYSICAL = 4                    # physical id of user device 0
OTHER_DEVICE = 1                # current in threads that call, while the engine has another
LIVE = ("devices", "contexts", "streams", "memory", "servers", "clients", "registrations")

# Name of a kind of endpoints -> those of a process, as local_comm_res lists them.
KINDS: Dict[str, List[Dict[str, str]]] = {
    "device-hccs": [{"protocol": "hccs", "comm_id": str(PHYSICAL), "placement": "device"}],
    "device-roce": [{"protocol": "roce", "comm_id": "127.0.0.1", "placement": "device"}],
    "host-roce": [{"protocol": "roce", "comm_id": "127.0.0.1", "placement": "host"}],
}


# Tests that are about something CANN has not, and why; parts of their names.
NOT_OVER_CANN = {
    "transfers/exchange/": "a pull in one exchange is an addition of the host provider",
    "transfers/test_memory.py::test_memory_that_overlaps": "CANN refuses overlapping registrations",
    "transfers/test_memory.py::test_memory_of_a_pool_registered_again": "CANN refuses overlapping registrations",
    "flows/test_flows.py::test_prefill": "its programs look at device memory as arrays",
    "flows/test_flows.py::test_prompt": "its programs look at device memory as arrays",
    "flows/test_flows.py::test_roles": "its programs look at device memory as arrays",
    "links/test_interrupted_turn.py": "signals reach the main thread, and strangers call from others",
    "links/test_link_clusters.py::test_a_listener_that_never": "it counts mappings, and each stranger is a thread",
    "links/test_link_clusters.py::test_exactly_one_address_of_each_side": "with endpoints, a local address is no need",
    "links/test_link_clusters.py::test_no_local_address": "with endpoints, a local address is no need",
    "links/test_access.py::test_memory": "the data port is CANN's, and so is what it gives",
    "links/test_secret.py::test_the_data_port": "the data port is CANN's, and so is who may use it",
    "links/test_secret.py::test_the_token_in_a_hello": "the data port is CANN's, and so is who may use it",
    "links/test_intruders.py::test_the_data_port_serves_links": "the data port is CANN's, and so is who may use it",
    "links/test_checksum_requests.py": "checksums are refused where the CPU cannot read memory",
    "transfers/test_checksums.py": "checksums are refused where the CPU cannot read memory",
    "links/test_peer_death.py::test_a_peer_that_dies_with_a_request_unread_is_not_linked[cma]":
        "nothing is asked over connections of ours, and CANN tells only that a batch failed",
    "links/test_peer_death.py::test_a_peer_that_dies_with_a_request_unread_is_not_linked[tcp]":
        "nothing is asked over connections of ours, and CANN tells only that a batch failed",
}


def let_the_cpu_address_devices() -> None:
    """Tests look at device memory as arrays; that of the stand-in is ordinary memory."""
    from llm_datadist.managers.base import ManagerBase
    ManagerBase.is_host_addressable = property(lambda self: True)       # type: ignore[assignment,method-assign]


def build(folder: Path, hidden: Tuple[str, ...] = (), objects: Optional[List[str]] = None) -> Path:
    """Build the stand-in as a toolkit's home, which is returned; symbols in `hidden` are not exported."""
    lib = folder / "lib64"
    lib.mkdir(parents=True)
    sources = objects or [str(path) for path in sorted((TESTS / "strict").glob("*.c"))]
    command = [*_compiler(), "-shared", *sources, "-ldl", "-Wl,-Bsymbolic", "-o", str(lib / NAMES[0])]
    if hidden:
        script = folder / "symbols"
        script.write_text(f"{{ local: {'; '.join(hidden)}; }};", encoding="ascii")
        command.append(f"-Wl,--version-script={script}")
    _run(command)
    (lib / NAMES[1]).symlink_to(NAMES[0])
    return folder


def compile_objects(folder: Path) -> List[str]:
    """Compile the stand-in, to be linked several times."""
    objects = []
    for source in sorted((TESTS / "strict").glob("*.c")):
        objects.append(str(folder / f"{source.stem}.o"))
        _run([*_compiler(), "-c", str(source), "-o", objects[-1]])
    return objects


def _compiler() -> List[str]:
    gcc = shutil.which("gcc") or shutil.which("cc")
    assert gcc is not None, "the stand-in for CANN needs a C compiler"
    return [gcc, "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-O1", "-g", "-fPIC", "-fvisibility=hidden", "-pthread",
            f"-I{INCLUDE}"]


def _run(command: List[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr


def environment(home: Path, **more: str) -> Dict[str, str]:
    """Variables of a process that finds the stand-in."""
    return {"ASCEND_HOME_PATH": str(home), "LDD_STRICT_HOST": HOST_LIBRARY, "LLM_DATADIST_PROVIDER": "cann", **more}


def comm_res(kind: str, **more: Any) -> str:
    """A ``local_comm_res`` with endpoints of one kind."""
    return json.dumps({"version": "1.3", "endpoint_list": KINDS[kind], **more})


class Call(NamedTuple):
    """A call of the core into the stand-in; `code` -1: it has not returned."""

    function: str
    subject: int
    thread: int
    code: int
    device: int


class Strict:
    """The stand-in that this process has loaded."""

    def __init__(self) -> None:
        home = os.environ["ASCEND_HOME_PATH"]
        self._library = ctypes.CDLL(f"{home}/lib64/{NAMES[0]}")
        self._library.strict_noted.restype = ctypes.c_int64

    def fail(self, function: str, nth: int, code: int) -> None:
        """Let the n-th call of a function from now on, from 1, answer this code; -1: every call, 0: none."""
        self._library.strict_fail(function.encode(), nth, code)

    def noted(self, name: str) -> int:
        """A number that the stand-in keeps."""
        return self._library.strict_noted(name.encode())

    def live(self) -> Dict[str, int]:
        """How many of each kind of thing there are."""
        return {name: self.noted(name) for name in LIVE}

    def forget(self) -> None:
        """Forget the calls so far."""
        self._library.strict_forget_calls()

    def calls(self) -> List[Call]:
        """The calls so far, in order."""
        found = []
        name, subject = ctypes.create_string_buffer(48), ctypes.c_uint64()
        thread, code, device = ctypes.c_int32(), ctypes.c_int32(), ctypes.c_int32()
        for index in range(self._library.strict_num_calls()):
            self._library.strict_call(index, name, *map(ctypes.byref, (subject, thread, code, device)))
            found.append(Call(name.value.decode(), subject.value, thread.value, code.value, device.value))
        return found

    def set_device(self, device: int) -> None:
        """Make a device current in this thread."""
        assert self._library.aclrtSetDevice(device) == 0

    def reset_device(self, device: int) -> None:
        """Undo one `set_device`."""
        assert self._library.aclrtResetDevice(device) == 0

    def device(self) -> int:
        """The current device of this thread, -1 without one."""
        device = ctypes.c_int32(-1)
        return device.value if self._library.aclrtGetDevice(ctypes.byref(device)) == 0 else -1


@contextlib.contextmanager
def whole_session(environ: Any) -> Iterator[None]:
    """Build the stand-in and let all processes of the tests find it, if ``LDD_TEST_STRICT`` asks for it."""
    if environ.get("LDD_TEST_STRICT") != "cann" or "LDD_STRICT_HOST" in environ:
        yield
        return
    kind = environ.get("LDD_TEST_ENDPOINTS", "device-hccs")
    assert kind in KINDS, f"LDD_TEST_ENDPOINTS={kind}: one of {', '.join(KINDS)} expected"
    let_the_cpu_address_devices()
    with tempfile.TemporaryDirectory() as folder:
        environ.update(environment(build(Path(folder) / "cann"), LDD_TEST_LOCAL_COMM_RES=comm_res(kind)))
        yield


def call_as_a_stranger(function: Callable[..., Any], *args: Any) -> Any:
    """Call from a fresh thread that has another device current, and see that it still has afterwards."""
    outcome: Dict[str, Any] = {}

    def main() -> None:
        strict = Strict()
        strict.set_device(OTHER_DEVICE)
        try:
            outcome["result"] = function(*args)
            assert strict.device() == OTHER_DEVICE, "the caller's device was not given back"
        except BaseException as error:
            outcome["error"] = error
        finally:
            strict.reset_device(OTHER_DEVICE)

    thread = threading.Thread(target=main)
    thread.start()
    thread.join()
    if "error" in outcome:
        raise outcome["error"]
    return outcome["result"]
