"""The transfer interface of the host provider through ctypes, and a second process that owns memory behind it.

Run as a program it is that process: it reads one JSON command per line from standard input and answers each with one
line. Tests import it for the bindings and for :class:`Peer`, which starts and drives it.
"""
import contextlib
import ctypes
import hashlib
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
from ctypes import POINTER, byref, c_char_p, c_int, c_int32, c_int64, c_uint8, c_uint32, c_uint64, c_void_p
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

SUCCESS = 0
PARAM_INVALID = 103900
TIMEOUT = 103901
NOT_CONNECTED = 103902
UNSUPPORTED = 103905
ALREADY_CONNECTED = 103903
RESOURCE_EXHAUSTED = 203900
FAILED = 503900

WAITING, COMPLETED, STATUS_TIMEOUT, STATUS_FAILED = range(4)


class ServerDesc(ctypes.Structure):
    _fields_ = [("endpoints", c_void_p), ("ip", c_char_p), ("port", c_uint32), ("num_endpoints", c_uint32),
                ("reserved", c_uint8 * 104)]


class ClientDesc(ctypes.Structure):
    _fields_ = [("local", c_void_p), ("remote", c_void_p), ("ip", c_char_p), ("port", c_uint32), ("tc", c_uint8),
                ("sl", c_uint8), ("reserved", c_uint8 * 98)]


class Config(ctypes.Structure):
    _fields_ = [("text", c_char_p), ("reserved", c_uint8 * 120)]


class CommMem(ctypes.Structure):
    _fields_ = [("type", c_int), ("addr", c_void_p), ("size", c_uint64)]


class Op(ctypes.Structure):
    _fields_ = [("remote", c_uint64), ("local", c_uint64), ("len", c_uint64)]


class Segment(ctypes.Structure):
    _fields_ = [("addr", c_uint64), ("bytes", c_uint64)]


class FetchSource(ctypes.Structure):
    _fields_ = [("segments", POINTER(Segment)), ("num_segments", ctypes.c_size_t), ("never_unmapped", c_int32),
                ("ticket", c_void_p)]


class FetchHooks(ctypes.Structure):
    BEGIN = ctypes.CFUNCTYPE(c_int32, c_void_p, c_void_p, c_void_p, ctypes.c_size_t, c_uint64,
                             POINTER(FetchSource), c_void_p, ctypes.c_size_t)
    END = ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_int32)
    _fields_ = [("begin", BEGIN), ("end", END)]


class FetchReply(ctypes.Structure):
    _fields_ = [("status", c_int32), ("text", ctypes.c_char * 320)]


def library_path():
    """Where the built library lies, without importing the package."""
    package = find_spec("llm_datadist").submodule_search_locations[0]
    return str(Path(package) / "host" / "libldd_host.so")


def load(path):
    """Return the library with argument types set."""
    lib = ctypes.CDLL(path)
    lib.LddLastError.restype = c_char_p
    lib.LddLastError.argtypes = []
    signatures = {
        "aclrtSetDevice": [ctypes.c_int32],
        "aclrtMalloc": [POINTER(c_void_p), ctypes.c_size_t, c_int],
        "aclrtFree": [c_void_p],
        "aclrtMallocHost": [POINTER(c_void_p), ctypes.c_size_t],
        "aclrtFreeHost": [c_void_p],
        "HixlCSServerCreate": [POINTER(ServerDesc), POINTER(Config), POINTER(c_void_p)],
        "HixlCSServerRegMem": [c_void_p, c_char_p, POINTER(CommMem), POINTER(c_void_p)],
        "HixlCSServerListen": [c_void_p, c_uint32],
        "HixlCSServerUnregMem": [c_void_p, c_void_p],
        "HixlCSServerDestroy": [c_void_p],
        "HixlCSClientCreate": [POINTER(ClientDesc), POINTER(Config), POINTER(c_void_p)],
        "HixlCSClientRegMem": [c_void_p, c_char_p, POINTER(CommMem), POINTER(c_void_p)],
        "HixlCSClientUnregMem": [c_void_p, c_void_p],
        "HixlCSClientConnect": [c_void_p, c_uint32],
        "HixlCSClientGetRemoteMem": [c_void_p, POINTER(POINTER(CommMem)), POINTER(POINTER(c_char_p)),
                                     POINTER(c_uint32), c_uint32],
        "HixlCSClientBatchPutAsync": [c_void_p, c_uint32, c_void_p, POINTER(c_void_p)],
        "HixlCSClientBatchGetAsync": [c_void_p, c_uint32, c_void_p, POINTER(c_void_p)],
        "HixlCSClientBatchPutSync": [c_void_p, c_uint32, c_void_p, c_uint32],
        "HixlCSClientBatchGetSync": [c_void_p, c_uint32, c_void_p, c_uint32],
        "HixlCSClientQueryCompleteStatus": [c_void_p, c_void_p, POINTER(c_int)],
        "HixlCSClientDestroy": [c_void_p],
        "LddCapabilities": [],
        "LddClientWait": [c_void_p, c_void_p, c_int64, POINTER(c_int)],
        "LddClientCancel": [c_void_p, c_void_p],
        "LddServerDropPeer": [c_void_p, c_char_p],
        "LddServerRestrict": [c_void_p],
        "LddServerAdmitPeer": [c_void_p, c_char_p, c_uint32],
        "LddClientPaths": [c_void_p, c_char_p, ctypes.c_size_t],
        "LddServerSetFetch": [c_void_p, POINTER(FetchHooks), c_void_p],
        "LddClientFetchAsync": [c_void_p, c_char_p, c_uint32, c_uint32, c_void_p, POINTER(FetchReply),
                                POINTER(c_void_p)],
    }
    for name, arguments in signatures.items():
        function = getattr(lib, name)
        function.argtypes = arguments
        function.restype = c_uint32
    return lib


class HixlError(Exception):
    """A call failed; `status` and `text` are the library's own."""

    def __init__(self, status, text):
        super().__init__(f"{status}: {text}")
        self.status = status
        self.text = text


class Api:
    """The library with failures as exceptions."""

    def __init__(self, path=None):
        self.lib = load(path or library_path())

    def check(self, status):
        if status != SUCCESS:
            raise HixlError(status, self.lib.LddLastError().decode())

    def alloc(self, size):
        out = c_void_p()
        assert self.lib.aclrtSetDevice(0) == 0
        assert self.lib.aclrtMalloc(byref(out), size, 0) == 0
        return out.value

    def free(self, addr):
        assert self.lib.aclrtFree(addr) == 0

    def server(self, port, ip="127.0.0.1"):
        handle = c_void_p()
        desc = ServerDesc(ip=ip.encode(), port=port)
        self.check(self.lib.HixlCSServerCreate(byref(desc), byref(Config()), byref(handle)))
        return handle.value

    def register(self, server, addr, size, tag=None, kind=0):
        handle = c_void_p()
        memory = CommMem(kind, addr, size)
        self.check(self.lib.HixlCSServerRegMem(server, tag, byref(memory), byref(handle)))
        return handle.value

    def client(self, port, config=None, ip="127.0.0.1"):
        handle = c_void_p()
        desc = ClientDesc(ip=ip.encode(), port=port)
        self.check(self.lib.HixlCSClientCreate(byref(desc), byref(Config(text=config)), byref(handle)))
        return Client(self, handle.value)


class Client:
    """One client handle; a context manager that destroys it."""

    def __init__(self, api, handle):
        self.api = api
        self.lib = api.lib
        self.handle = handle

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.destroy()

    def destroy(self):
        if self.handle is not None:
            self.api.check(self.lib.HixlCSClientDestroy(self.handle))
            self.handle = None

    def connect(self, timeout_ms=5000):
        self.api.check(self.lib.HixlCSClientConnect(self.handle, timeout_ms))
        return self

    def remote_mem(self, timeout_ms=5000):
        """Return (address, size, tag) of each region."""
        memory, tags, count = POINTER(CommMem)(), POINTER(c_char_p)(), c_uint32()
        self.api.check(self.lib.HixlCSClientGetRemoteMem(self.handle, byref(memory), byref(tags), byref(count),
                                                         timeout_ms))
        return [(memory[i].addr, memory[i].size, tags[i].decode()) for i in range(count.value)]

    def paths(self):
        text = ctypes.create_string_buffer(64)
        self.api.check(self.lib.LddClientPaths(self.handle, text, len(text)))
        return text.value.decode()

    @staticmethod
    def ops(triples):
        """(remote, local, length) descriptors as a C array."""
        return (Op * len(triples))(*triples)

    def get(self, triples, timeout_ms=10000):
        self.api.check(self.lib.HixlCSClientBatchGetSync(self.handle, len(triples), self.ops(triples), timeout_ms))

    def put(self, triples, timeout_ms=10000):
        self.api.check(self.lib.HixlCSClientBatchPutSync(self.handle, len(triples), self.ops(triples), timeout_ms))

    def start(self, triples, put=False):
        handle = c_void_p()
        call = self.lib.HixlCSClientBatchPutAsync if put else self.lib.HixlCSClientBatchGetAsync
        self.api.check(call(self.handle, len(triples), self.ops(triples), byref(handle)))
        return handle.value

    def start_fetch(self, request, places):
        """Ask for bytes into (local, length) places; return the batch and the reply, which keeps all of it alive."""
        handle, reply = c_void_p(), FetchReply(status=99, text=b"left over")
        reply.request = request
        ops = self.ops([(0, *place) for place in places])
        self.api.check(self.lib.LddClientFetchAsync(self.handle, request, len(request), len(places), ops,
                                                    byref(reply), byref(handle)))
        return handle.value, reply

    def fetch(self, request, places):
        """Fetch and wait; the number and text of the server's owner."""
        batch, reply = self.start_fetch(request, places)
        code, status, text = self.wait(batch)
        self.api.check(code)
        assert status == COMPLETED, text
        return reply.status, reply.text.decode()

    def query(self, batch):
        status = c_int(-1)
        self.api.check(self.lib.HixlCSClientQueryCompleteStatus(self.handle, batch, byref(status)))
        return status.value

    def wait(self, batch, timeout_ns=10_000_000_000):
        """Return (status of the call, completion status, text)."""
        status = c_int(-1)
        code = self.lib.LddClientWait(self.handle, batch, timeout_ns, byref(status))
        return code, status.value, self.lib.LddLastError().decode()

    def cancel(self, batch):
        self.api.check(self.lib.LddClientCancel(self.handle, batch))


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def fails(*statuses):
    """Expect a HixlError with one of these statuses, and a text; it is `value` of what is yielded, afterwards."""
    info = SimpleNamespace(value=None)
    try:
        yield info
    except HixlError as error:
        info.value = error
    assert info.value is not None, "it did not fail"
    assert info.value.status in statuses, info.value
    assert info.value.text


def pattern(size, seed=0):
    """`size` bytes that differ at every alignment and for every seed."""
    unit = bytes((i * 7 + seed * 31 + (i >> 8) * 13) & 0xFF for i in range(65521))
    return (unit * (size // len(unit) + 1))[:size]


class Peer:
    """A server in a process of its own, which calls `before` first; a context manager that leaves no process behind."""

    def __init__(self, env=None, port=None, fetches=False, before=None):
        self.port = port or free_port()
        self.process = subprocess.Popen([sys.executable, __file__, library_path(), str(self.port),
                                         *(["fetches"] if fetches else [])],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        env={**os.environ, **(env or {})}, preexec_fn=before)
        try:
            self.read()
        except BaseException:
            self.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()

    def kill(self):
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self):
        """Suspend the process, and return once it is."""
        os.kill(self.process.pid, signal.SIGSTOP)
        _, status = os.waitpid(self.process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)

    def resume(self):
        os.kill(self.process.pid, signal.SIGCONT)

    def read(self):
        ready, _, _ = select.select([self.process.stdout], [], [], 20)
        if not ready:
            raise TimeoutError("the peer does not answer")
        line = self.process.stdout.readline()
        if not line:
            raise EOFError("the peer has ended")
        answer = json.loads(line)
        if isinstance(answer, dict) and "status" in answer:
            raise HixlError(answer["status"], answer["text"])
        return answer

    def call(self, name, *arguments):
        self.process.stdin.write(json.dumps([name, *arguments]).encode() + b"\n")
        self.process.stdin.flush()
        return self.read()


class Fetches:
    """Hooks that hold what a request asks for, and remember every call.

    A request is ``fetch_request``: segments that are served as they are named, or a refusal. Tickets count from 1.
    """

    def __init__(self, api, server):
        self.api = api
        self.changed = threading.Condition()
        self.begun = []         # (token, bytes asked for, bytes of the request, its digest)
        self.open = {}          # ticket -> segments
        self.ended = {}         # ticket -> what each `end` said: confirmed or not
        self.hooks = FetchHooks.BEGIN(self.begin), FetchHooks.END(self.end)
        api.check(api.lib.LddServerSetFetch(server, byref(FetchHooks(*self.hooks)), None))

    def begin(self, _, token, request, request_bytes, num_bytes, source, text, text_size):
        body = ctypes.string_at(request, request_bytes)
        try:
            said = json.loads(body)
            segments = (Segment * len(said["segments"]))(*map(tuple, said["segments"]))
            refusal, words = said["refusal"], said["text"].encode()[:text_size - 1] + b"\0"
            held = said["never_unmapped"]
        except (ValueError, LookupError, TypeError):    # a test may send anything
            return 78
        if refusal == 0 and sum(segment.bytes for segment in segments) != num_bytes:
            refusal = 77
        if refusal:
            ctypes.memmove(text, words, len(words))
            return refusal
        with self.changed:
            self.begun.append((ctypes.string_at(token, 16).hex(), num_bytes, request_bytes,
                               hashlib.sha256(body).hexdigest()))
            ticket = len(self.begun)
            self.open[ticket] = segments
            self.changed.notify_all()
        source[0] = FetchSource(segments, len(segments), held, ticket)
        return 0

    def end(self, _, ticket, confirmed):
        with self.changed:
            self.ended.setdefault(ticket, []).append(bool(confirmed))
            self.open.pop(ticket, None)
            self.changed.notify_all()

    def wait(self, condition):
        with self.changed:
            return self.changed.wait_for(condition, 15)


def fetch_request(segments, refusal=0, text="", never_unmapped=1, size=0):
    """The words of a request that `Fetches` understands, filled up to `size` bytes."""
    said = {"segments": segments, "refusal": refusal, "text": text, "never_unmapped": never_unmapped}
    return json.dumps(said).encode().ljust(size)


class Owner:
    """What the peer process can be asked for: every method is a command."""

    def __init__(self, path, port, *fetches):
        self.api = Api(path)
        self.buffers = []
        self.handle = self.api.server(port)
        self.fetches = Fetches(self.api, self.handle) if fetches else None
        self.api.check(self.api.lib.HixlCSServerListen(self.handle, 64))

    def pool(self, size):
        """Memory of the provider."""
        return self.api.alloc(size)

    def free(self, addr):
        self.api.free(addr)

    def private(self, size):
        """Memory of the process itself."""
        buffer = ctypes.create_string_buffer(size)
        self.buffers.append(buffer)
        return ctypes.addressof(buffer)

    def register(self, addr, size, tag=None):
        return self.api.register(self.handle, addr, size, tag.encode() if tag else None)

    def unregister(self, handle):
        self.api.check(self.api.lib.HixlCSServerUnregMem(self.handle, handle))

    def fill(self, addr, size, seed):
        ctypes.memmove(addr, pattern(size, seed), size)

    def matches(self, addr, size, seed):
        return ctypes.string_at(addr, size) == pattern(size, seed)

    def bytes_at(self, addr, size):
        return ctypes.string_at(addr, size).hex()

    def digest(self, addr, size):
        return hashlib.sha256(ctypes.string_at(addr, size)).hexdigest()

    def fork(self):
        """Start a child that does nothing until it is killed; its pid."""
        child = os.fork()
        if child == 0:
            while True:
                signal.pause()
        return child

    def drop(self, token):
        self.api.check(self.api.lib.LddServerDropPeer(self.handle, bytes.fromhex(token)))

    def destroy(self):
        self.api.check(self.api.lib.HixlCSServerDestroy(self.handle))

    def begun(self, number):
        """Wait until so many fetches have begun, and say which there were: token, bytes, request bytes and digest."""
        self.fetches.wait(lambda: len(self.fetches.begun) >= number)
        return self.fetches.begun

    def ended(self):
        """Wait until all that have begun have ended, and say for each ticket what every `end` found confirmed."""
        self.fetches.wait(lambda: not self.fetches.open)
        return [self.fetches.ended.get(ticket, []) for ticket in range(1, len(self.fetches.begun) + 1)]

    def confirmed(self):
        """Whether the latest fetch has ended confirmed by now."""
        return self.fetches.ended.get(len(self.fetches.begun)) == [True]

    def confirms(self):
        """Wait until the latest fetch ends, and say whether it was confirmed."""
        ticket = len(self.fetches.begun)
        return self.fetches.wait(lambda: ticket in self.fetches.ended) and self.confirmed()

    def withdraw(self):
        self.api.check(self.api.lib.LddServerSetFetch(self.handle, None, None))

    def held(self):
        """Tickets that have not ended."""
        return list(self.fetches.open)

    def unmap(self, addr, size):
        """Take pages away from private memory."""
        self.protect(addr, size, 0)

    def protect(self, addr, size, protection):
        """Say what may be done with pages of private memory."""
        libc = ctypes.CDLL(None)
        libc.mprotect.argtypes = [c_void_p, ctypes.c_size_t, c_int]
        assert libc.mprotect(addr, size, protection) == 0

    def limit_descriptors(self, spare):
        """Leave this process `spare` descriptors to open."""
        limit = len(os.listdir("/proc/self/fd")) - 1 + spare
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))

    def counts(self):
        """Threads and descriptors of this process."""
        return [len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))]


def main():
    threading.Thread(target=lambda: None).start()  # what Python itself starts once is not counted later
    owner = Owner(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        try:
            answer = getattr(owner, name)(*arguments)
        except HixlError as error:
            answer = {"status": error.status, "text": error.text}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
