"""Bounded waits: what ends them, what is cancelled, and which status each number of the C API becomes.

Fakes stand in for single slots of a provider's table. Most are Python functions; where a signal must arrive
while no Python code runs, functions of the C library do: ``strnlen(client, 0)`` is a query that always
answers "no error, still waiting", and ``sem_post(client)`` a cancel whose calls can be counted.
"""
import ctypes
import os
import signal
import socket
import threading
import time
import warnings

import numpy as np
import pytest

from llm_datadist import status as public
from llm_datadist.core.base.provider import CAPABILITIES, HOST_LIBRARY, Provider
from llm_datadist.core.base.status import STATUS_TABLE
from llm_datadist_probes.transfer import TableProbe, map_code

WAITING, COMPLETED, TIMEOUT, FAILED = range(4)
MS = 1_000_000
WAIT, CANCEL = CAPABILITIES["wait"], CAPABILITIES["cancel"]
QUERY = ctypes.CFUNCTYPE(ctypes.c_uint32, ctypes.c_void_p, ctypes.c_void_p, ctypes.POINTER(ctypes.c_int))
WAIT_FN = ctypes.CFUNCTYPE(
    ctypes.c_uint32, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.POINTER(ctypes.c_int))
CANCEL_FN = ctypes.CFUNCTYPE(ctypes.c_uint32, ctypes.c_void_p, ctypes.c_void_p)
TEXT_FN = ctypes.CFUNCTYPE(ctypes.c_void_p)
LIBC = ctypes.CDLL(None)


def address(function):
    return ctypes.cast(function, ctypes.c_void_p).value


class Client:
    """A client whose batch is still waiting for the first `looks` looks, and ends as `state` then."""

    def __init__(self, state=COMPLETED, looks=0, code=0, caps=0, text=None, cancel_code=0):
        self.looks, self.timeouts, self.cancels = 0, [], 0
        self.text = None if text is None else ctypes.create_string_buffer(text)

        def look(out):
            self.looks += 1
            out[0] = WAITING if self.looks <= looks else state
            return code

        def wait(client, handle, timeout_ns, out):
            assert (client, handle) == (11, 22)
            self.timeouts.append(timeout_ns)
            return look(out)

        def query(client, handle, out):
            assert (client, handle) == (11, 22)
            return look(out)

        def cancel(client, handle):
            assert (client, handle) == (11, 22)
            self.cancels += 1
            return cancel_code

        self.functions = {
            "query": QUERY(query), "wait": WAIT_FN(wait), "cancel": CANCEL_FN(cancel),
            "hixl_text": TEXT_FN(lambda: 0 if self.text is None else ctypes.addressof(self.text)),
        }
        self.probe = TableProbe(caps=caps, **{name: address(fn) for name, fn in self.functions.items()})

    def wait(self, timeout_ns=None, interruptible=False):
        self.probe.wait(11, 22, timeout_ns, interruptible)


class Counted:
    """A batch that never ends, in C alone, and counts its cancellations."""

    def __init__(self, caps=CANCEL):
        self.semaphore = ctypes.create_string_buffer(64)
        assert LIBC.sem_init(self.semaphore, 0, 0) == 0
        self.probe = TableProbe(caps=caps, query=address(LIBC.strnlen), cancel=address(LIBC.sem_post))

    def wait(self, timeout_ns=None, interruptible=True):
        self.probe.wait(ctypes.addressof(self.semaphore), 0, timeout_ns, interruptible)

    @property
    def cancels(self):
        value = ctypes.c_int()
        LIBC.sem_getvalue(self.semaphore, ctypes.byref(value))
        return value.value


@pytest.mark.parametrize("interruptible", [False, True])
@pytest.mark.parametrize("caps", [0, WAIT, WAIT | CANCEL])
@pytest.mark.parametrize("timeout_ns", [None, 10_000 * MS])
def test_completion_ends_the_wait(interruptible, caps, timeout_ns):
    client = Client(COMPLETED, looks=0 if caps else 5, caps=caps)
    client.wait(timeout_ns, interruptible)
    assert client.looks == (1 if caps else 6) and client.cancels == 0


def test_completion_beats_the_clock():
    for caps in (0, WAIT):
        for timeout_ns in (0, -5 * MS):
            client = Client(COMPLETED, caps=caps | CANCEL)
            client.wait(timeout_ns)
            assert client.looks == 1 and client.cancels == 0


def test_waiting_is_left_to_the_provider_within_its_limits():
    client = Client(COMPLETED, caps=WAIT)
    client.wait(None)
    client.wait(-1)
    client.wait(70_000 * MS)
    forever, past, limited = client.timeouts
    assert forever == -1 and past == 0 and 60_000 * MS < limited <= 70_000 * MS


def test_an_interruptible_wait_is_cut_into_slices():
    client = Client(COMPLETED, looks=3, caps=WAIT)
    client.wait(10_000 * MS, interruptible=True)
    assert len(client.timeouts) == 4 and all(0 <= ns <= 25 * MS for ns in client.timeouts)
    short = Client(COMPLETED, caps=WAIT)
    short.wait(45 * MS, interruptible=True)
    assert len(short.timeouts) == 1 and short.timeouts[0] > 25 * MS


def test_other_threads_are_not_sliced():
    client = Client(COMPLETED, caps=WAIT)
    thread = threading.Thread(target=client.wait, args=(10_000 * MS, True))
    thread.start()
    thread.join()
    assert len(client.timeouts) == 1 and client.timeouts[0] > 1000 * MS


@pytest.mark.parametrize("interruptible", [False, True])
@pytest.mark.parametrize("caps", [0, WAIT, CANCEL, WAIT | CANCEL])
def test_a_timeout_cancels_what_can_be_cancelled(interruptible, caps):
    client = Client(looks=10**9, caps=caps)
    with pytest.raises(public.LLMTimeoutError, match="did not end in time") as info:
        client.wait(2 * MS, interruptible)
    assert info.value.status_code == public.LLMStatusCode.LLM_TIMEOUT
    assert client.cancels == (1 if caps & CANCEL else 0)


def test_a_failing_cancel_is_told_and_changes_nothing_else():
    client = Client(looks=10**9, caps=CANCEL, cancel_code=503900, text=b"it is stuck")
    with pytest.raises(public.LLMTimeoutError, match=r"not cancelled.*503900.*it is stuck") as info:
        client.wait(MS)
    assert info.value.provider_code == 503900 and client.cancels == 1


@pytest.mark.parametrize("caps", [0, WAIT, WAIT | CANCEL])
@pytest.mark.parametrize("state, error", [(FAILED, public.LLMException), (TIMEOUT, public.LLMTimeoutError)])
def test_a_batch_that_ended_badly(caps, state, error):
    client = Client(state, caps=caps, text=b"the peer is gone")
    with pytest.raises(error, match="the peer is gone") as info:
        client.wait()
    assert info.value.provider_code == state and client.cancels == 0
    with pytest.raises(error, match="completion status"):
        Client(state, caps=caps).wait()


@pytest.mark.parametrize("caps", [0, WAIT])
@pytest.mark.parametrize("code, error", [
    (103900, public.LLMParamInvalidError), (103902, public.LLMLinkError), (503900, public.LLMException)])
def test_an_error_of_the_call_itself(caps, code, error):
    client = Client(FAILED, code=code, caps=caps, text=b"because")
    with pytest.raises(error, match=f"{code}, because") as info:
        client.wait()
    assert info.value.provider_code == code


def test_without_a_text_function_the_number_is_there():
    client = Client(COMPLETED, code=203900)
    probe = TableProbe(caps=0, query=address(client.functions["query"]))
    with pytest.raises(public.LLMException, match="203900"):
        probe.wait(11, 22)


class Interrupted(Exception):
    pass


@pytest.fixture
def alarm():
    """Deliver SIGALRM with a handler that counts, and raises on demand."""
    calls = []

    def handle(signum, frame):
        calls.append(signum)
        if raising:
            raise Interrupted

    raising = []
    before = signal.signal(signal.SIGALRM, handle)
    try:
        yield lambda seconds, raises: (raising.append(1) if raises else raising.clear(),
                                       signal.setitimer(signal.ITIMER_REAL, seconds)) and calls
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("caps", [0, CANCEL])
@pytest.mark.parametrize("timeout_ns", [None, 60_000 * MS])
def test_a_raising_signal_handler_ends_the_wait(alarm, caps, timeout_ns):
    batch = Counted(caps)
    calls = alarm(0.02, True)
    with pytest.raises(Interrupted):
        batch.wait(timeout_ns)
    assert len(calls) == 1 and batch.cancels == (1 if caps else 0)


def test_a_handler_that_returns_does_not(alarm):
    batch = Counted()
    calls = alarm(0.01, False)
    with pytest.raises(public.LLMTimeoutError):
        batch.wait(250 * MS)
    assert len(calls) == 1 and batch.cancels == 1


def test_a_pending_signal_is_served_after_a_wait_that_ignores_it(alarm):
    batch = Counted()
    alarm(0.01, True)
    with pytest.raises(Interrupted):
        try:
            batch.wait(100 * MS, interruptible=False)
        except public.LLMTimeoutError:
            pass
        time.sleep(0)
    assert batch.cancels == 1


def test_the_gil_is_free_meanwhile():
    batch = Counted()
    steps = []

    def work():
        while not done.is_set():
            steps.append(1)
            time.sleep(0.001)

    done = threading.Event()
    thread = threading.Thread(target=work)
    thread.start()
    try:
        with pytest.raises(public.LLMTimeoutError):
            batch.wait(100 * MS, interruptible=False)
        during = len(steps)
    finally:
        done.set()
        thread.join()
    assert during > 1


def test_the_main_thread_of_a_forked_child_serves_signals():
    """The thread that forks becomes the main one; a wait in the child must slice for it."""
    result = []

    def fork_here():
        pid = os.fork()
        if pid == 0:
            try:
                client = Client(COMPLETED, looks=1, caps=WAIT)
                client.wait(10_000 * MS, interruptible=True)
                os._exit(len(client.timeouts))
            finally:
                os._exit(99)
        result.append(os.waitpid(pid, 0)[1])

    thread = threading.Thread(target=fork_here)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)     # several threads and a fork: here on purpose
        thread.start()
        thread.join()
    assert os.WEXITSTATUS(result[0]) == 2


CODES = {
    ("hixl", 0): "LLM_SUCCESS", ("hixl", 103900): "LLM_PARAM_INVALID", ("hixl", 103901): "LLM_TIMEOUT",
    ("hixl", 103902): "LLM_NOT_YET_LINK", ("hixl", 103903): "LLM_ALREADY_LINK", ("hixl", 103904): "LLM_FAILED",
    ("hixl", 103905): "LLM_FEATURE_NOT_ENABLED", ("hixl", 203900): "LLM_FAILED", ("hixl", 503900): "LLM_FAILED",
    ("hixl", 2**32 - 1): "LLM_FAILED",
    ("acl", 0): "LLM_SUCCESS", ("acl", 507046): "LLM_TIMEOUT", ("acl", 507053): "LLM_DEVICE_MEM_ERROR",
    ("acl", 507057): "LLM_SUSPECT_REMOTE_ERROR", ("acl", 507047): "LLM_TIMEOUT", ("acl", 107002): "LLM_FAILED",
    ("acl", 207000): "LLM_FEATURE_NOT_ENABLED", ("acl", 207001): "LLM_OUT_OF_MEMORY",
    ("acl", 507054): "LLM_DEVICE_MEM_ERROR", ("hixl", 507046): "LLM_TIMEOUT", ("hixl", 107002): "LLM_FAILED",
    ("hixl", 507053): "LLM_DEVICE_MEM_ERROR", ("hixl", 507057): "LLM_SUSPECT_REMOTE_ERROR",
    ("hixl", 207018): "LLM_OUT_OF_MEMORY",
    ("acl", -1): "LLM_FAILED", ("acl", 100000): "LLM_FAILED",
}


@pytest.mark.parametrize("kind, code", CODES)
def test_numbers_of_the_c_api(kind, code):
    status = map_code(kind, code)
    name = "LLM_SUCCESS" if status == 0 else STATUS_TABLE[status][1].name
    assert name == CODES[kind, code]


def test_an_unknown_slot_is_refused():
    with pytest.raises(TypeError, match="nonsense"):
        TableProbe(nonsense=1)


class ServerDesc(ctypes.Structure):
    _fields_ = [("endpoints", ctypes.c_void_p), ("ip", ctypes.c_char_p), ("port", ctypes.c_uint32),
                ("num_endpoints", ctypes.c_uint32), ("reserved", ctypes.c_uint8 * 104)]


class ClientDesc(ctypes.Structure):
    _fields_ = [("local", ctypes.c_void_p), ("remote", ctypes.c_void_p), ("ip", ctypes.c_char_p),
                ("port", ctypes.c_uint32), ("tc", ctypes.c_uint8), ("sl", ctypes.c_uint8),
                ("reserved", ctypes.c_uint8 * 98)]


class Config(ctypes.Structure):
    _fields_ = [("json", ctypes.c_char_p), ("reserved", ctypes.c_uint8 * 120)]


class Mem(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int), ("addr", ctypes.c_void_p), ("size", ctypes.c_uint64)]


class Op(ctypes.Structure):
    _fields_ = [("remote", ctypes.c_void_p), ("local", ctypes.c_void_p), ("len", ctypes.c_uint64)]


class Loop:
    """A server of the host provider and a client of it in one process, with a source to read."""

    SIZE = 32 << 20

    def __init__(self):
        self.library = ctypes.CDLL(HOST_LIBRARY)
        self.source = np.random.default_rng(5).integers(0, 256, self.SIZE, dtype=np.uint8)
        self.server, self.client = ctypes.c_void_p(), ctypes.c_void_p()

    def open(self):
        memory = Mem(1, self.source.ctypes.data, self.SIZE)
        for _ in range(20):
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                self.port = probe.getsockname()[1]
            desc = ServerDesc(ip=b"127.0.0.1", port=self.port)
            self.call("HixlCSServerCreate", ctypes.byref(desc), ctypes.byref(Config()), ctypes.byref(self.server))
            self.call("HixlCSServerRegMem", self.server, None, ctypes.byref(memory), ctypes.byref(ctypes.c_void_p()))
            if self.library.HixlCSServerListen(self.server, ctypes.c_uint32(8)) == 0:
                break
            self.call("HixlCSServerDestroy", self.server)       # somebody else took the port in between
        self.connect()

    def connect(self):
        desc = ClientDesc(ip=b"127.0.0.1", port=self.port)
        self.call("HixlCSClientCreate", ctypes.byref(desc), ctypes.byref(Config()), ctypes.byref(self.client))
        self.call("HixlCSClientConnect", self.client, ctypes.c_uint32(10_000))

    def disconnect(self):
        if self.client:
            self.call("HixlCSClientDestroy", self.client)
        self.client = ctypes.c_void_p()

    def close(self):
        self.disconnect()
        if self.server:
            self.call("HixlCSServerDestroy", self.server)

    def call(self, name, *arguments):
        assert getattr(self.library, name)(*arguments) == 0, name

    def get(self, destination, sizes):
        """Submit a batch that reads the source piece by piece into the same places, and return its handle."""
        offsets = np.concatenate([[0], np.cumsum(sizes)]).tolist()
        ops = (Op * len(sizes))(*[
            Op(self.source.ctypes.data + at, destination.ctypes.data + at, size) for at, size in zip(offsets, sizes)])
        handle = ctypes.c_void_p()
        self.call("HixlCSClientBatchGetAsync", self.client, ctypes.c_uint32(len(ops)), ops, ctypes.byref(handle))
        return handle.value or 0


@pytest.fixture
def loop():
    loop = Loop()
    try:
        loop.open()
        yield loop
    finally:
        loop.close()


@pytest.mark.parametrize("interruptible", [False, True])
@pytest.mark.parametrize("caps", [None, 0], ids=["provider waits", "polling"])
@pytest.mark.parametrize("sizes", [[4096], [1 << 20] * 32, [16384] * 500 + [100]], ids=["small", "large", "scattered"])
def test_real_batches(loop, interruptible, caps, sizes):
    probe = TableProbe(Provider.open("host"), caps)
    destination = np.zeros(loop.SIZE, np.uint8)
    for timeout_ns in (None, 60_000 * MS):
        destination[:] = 0
        probe.wait(loop.client.value, loop.get(destination, sizes), timeout_ns, interruptible)
        assert (destination[:sum(sizes)] == loop.source[:sum(sizes)]).all() and not destination[sum(sizes):].any()


@pytest.mark.parametrize("interruptible", [False, True])
@pytest.mark.parametrize("caps", [None, CANCEL], ids=["provider waits", "polling"])
def test_no_byte_lands_after_a_timeout(loop, interruptible, caps):
    probe = TableProbe(Provider.open("host"), caps)
    destination = np.zeros(loop.SIZE, np.uint8)
    for timeout_ns in (0, MS, 3 * MS):
        destination[:] = 0
        try:
            probe.wait(loop.client.value, loop.get(destination, [1 << 20] * 32), timeout_ns, interruptible)
        except public.LLMTimeoutError:
            then = destination.copy()
            time.sleep(0.03)
            assert (destination == then).all()
        else:
            assert (destination == loop.source).all()
        loop.disconnect()           # a batch that timed out poisons its client
        loop.connect()


def test_a_real_failure_says_why(loop):
    probe = TableProbe(Provider.open("host"))
    with pytest.raises(public.LLMParamInvalidError, match="completion handle"):
        probe.wait(loop.client.value, 12345 << 12)
