"""Memory that is not there, or may not be written: an error on every path, whatever the host permits, never the end."""
import ctypes
import mmap

import pytest
import support.hixl_peer as hixl
from support.denied import PROCESS_VM, deny, in_child, need_denial

MIB = 1 << 20
SIZE = 8 * MIB                  # enough for helper threads and several connections
PAGE = mmap.PAGESIZE
NO_ACCESS = 0                   # PROT_NONE
REFUSED = (hixl.PARAM_INVALID, hixl.FAILED)


@pytest.fixture(scope="module")
def api():
    return hixl.Api()


@pytest.fixture(scope="module", params=["as usual", "denied"])
def denied(request):
    if request.param == "denied":
        need_denial()
    return request.param == "denied"


@pytest.fixture(scope="module")
def peer(denied):
    """An owner of 8 MiB at `addr`, of which process_vm_readv and process_vm_writev may be refused."""
    with hixl.Peer(before=(lambda: deny(*PROCESS_VM)) if denied else None) as started:
        started.addr = started.call("pool", SIZE)
        started.call("register", started.addr, SIZE)
        started.call("fill", started.addr, SIZE, 3)
        yield started


@pytest.fixture(params=["shm", "cma", "tcp"])
def path(request, monkeypatch):
    monkeypatch.setenv("LLM_DATADIST_HOST_PATHS", request.param)
    return request.param


def private(protection, first=0, end=SIZE):
    """Memory of this process, filled with "p", of which a range is then protected."""
    memory = mmap.mmap(-1, SIZE)
    memory[:] = b"p" * SIZE
    addr = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    protect(addr + first, end - first, protection)
    return memory, addr


def protect(addr, num_bytes, protection):
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    assert libc.mprotect(addr, num_bytes, protection) == 0


def unmap(addr, num_bytes):
    libc = ctypes.CDLL(None, use_errno=True)
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    assert libc.munmap(addr, num_bytes) == 0


def scattered(remote, local, count):
    """One descriptor, or so many that do not touch each other."""
    if count == 1:
        return [(remote, local, SIZE)]
    step = SIZE // count
    return [(remote + i * step, local + i * step, step // 2) for i in range(count)]


def is_mapped(addr, nbytes):
    """Whether any of the range belongs to a mapping of this process."""
    with open("/proc/self/maps", encoding="ascii") as maps:
        ranges = [[int(end, 16) for end in line.split()[0].split("-")] for line in maps]
    return any(first < addr + nbytes and addr < last for first, last in ranges)


@pytest.mark.parametrize("bad", ["unmapped", "no access", "read only", "a hole", "a hole at the end"])
@pytest.mark.parametrize("put", [False, True], ids=["get", "put"])
def test_local_memory(api, peer, path, denied, bad, put):
    """The batch fails and says so; a put takes from what may only be read."""
    def work():
        if denied:
            deny(*PROCESS_VM)
        hole = (SIZE // 2, SIZE // 2 + SIZE // 8) if bad == "a hole" else (SIZE - SIZE // 8, SIZE)
        first, end = hole if bad.startswith("a hole") else (0, SIZE)
        memory, addr = private(mmap.PROT_READ if bad == "read only" else NO_ACCESS, first, end)
        clients = [(count, api.client(peer.port).connect()) for count in (1, 16, 64)]
        if bad != "read only" and bad != "no access":       # now: what a client maps would take the free place
            unmap(addr + first, end - first)
        for count, client in clients:
            with client:
                call, ops = client.put if put else client.get, scattered(peer.addr, addr, count)
                if bad == "read only" and put:
                    call(ops)
                else:
                    try:
                        with hixl.fails(*REFUSED):
                            call(ops)
                    except AssertionError:
                        # Nothing can keep a place free: where a thread's stack, say, went there it is good memory.
                        if bad in ("read only", "no access") or not is_mapped(addr + first, end - first):
                            raise
        if bad == "read only":
            protect(addr, SIZE, mmap.PROT_READ | mmap.PROT_WRITE)
            assert memory[:] == b"p" * SIZE

    assert in_child(work) == ""
    peer.call("fill", peer.addr, SIZE, 3)


@pytest.mark.parametrize("bad", ["no access", "read only", "a hole"])
@pytest.mark.parametrize("put", [False, True], ids=["get", "put"])
def test_registered_memory(api, peer, path, denied, bad, put):
    """The owner stays up, and goes on with memory that is good."""
    addr = peer.call("private", SIZE + PAGE)
    addr += -addr % PAGE
    peer.call("register", addr, SIZE)
    first, end = (SIZE // 2, SIZE // 2 + MIB) if bad == "a hole" else (0, SIZE)
    peer.call("protect", addr + first, end - first, mmap.PROT_READ if bad == "read only" else NO_ACCESS)

    def work():
        if denied:
            deny(*PROCESS_VM)
        buffer = ctypes.create_string_buffer(SIZE)
        local = ctypes.addressof(buffer)
        with api.client(peer.port) as client:
            client.connect()
            call = client.put if put else client.get
            if bad == "read only" and not put:
                call([(addr, local, SIZE)])
            else:
                with hixl.fails(*REFUSED, hixl.NOT_CONNECTED):
                    call([(addr, local, SIZE)])
        with api.client(peer.port) as client:
            client.connect().get([(peer.addr, local, SIZE)])
        assert buffer.raw == hixl.pattern(SIZE, 3)

    try:
        assert in_child(work) == ""
    finally:
        peer.call("protect", addr, SIZE, mmap.PROT_READ | mmap.PROT_WRITE)
