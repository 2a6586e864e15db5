"""The client of the host provider against a server that lies: lists, memfds, replies written by hand."""
import contextlib
import ctypes
import fcntl
import mmap
import os
import socket
import threading

import pytest
import support.hixl_peer as hixl
from support.hixl_frames import (
    ADMIN,
    DATA,
    GET,
    HELLO,
    HELLO_MAGIC,
    LIST,
    LOCAL,
    MAP,
    REGION,
    REPLY,
    REPLY_MAGIC,
    REQUEST,
    VERSION,
    WELCOME,
)

PAGE = mmap.PAGESIZE
BIG = 2**64
ADDRESS = 0x7000_0000_0000
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


def boot_id():
    with open("/proc/sys/kernel/random/boot_id") as file:
        return bytes.fromhex(file.read().strip().replace("-", ""))


def memfd(size, seals=SEALS, data=b""):
    fd = os.memfd_create("fake", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    os.pwrite(fd, data, 0)
    if seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def region(address=ADDRESS, size=PAGE, backing=0, offset=0, tag=0, generation=5):
    return REGION.pack(0, generation, address, size, backing, offset, 0, tag, 0)


def listing(*regions, tags=b"", count=None, size=None):
    payload = b"".join(regions) + tags
    return {"payload": payload, "argument": len(regions) if count is None else count,
                "size": len(payload) if size is None else size}


class Liar:
    """A server that answers as it is told; one thread per connection."""

    def __init__(self, answer_list, fd=-1, mapped=PAGE, answer_get=None, nonces=None):
        self.answer_list, self.fd, self.mapped, self.answer_get = answer_list, fd, mapped, answer_get
        self.nonce = b"n" * 16
        self.nonces = nonces or {}
        self.tcp = socket.create_server(("127.0.0.1", 0))
        self.name = b"hixl-liar-" + os.urandom(8).hex().encode()
        self.local = socket.socket(socket.AF_UNIX)
        self.local.bind(b"\0" + self.name)
        self.local.listen()
        self.port = self.tcp.getsockname()[1]
        self.conns, self.threads = [], []
        for listener in (self.tcp, self.local):
            self.start(self.accept, listener)

    def start(self, work, *arguments):
        thread = threading.Thread(target=work, args=arguments)
        self.threads.append(thread)
        thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        for sock in (self.tcp, self.local, *self.conns):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self.threads:
            thread.join(10)
        for sock in (self.tcp, self.local, *self.conns):
            sock.close()
        if self.fd >= 0:
            os.close(self.fd)

    def accept(self, listener):
        with contextlib.suppress(OSError):
            while True:
                conn, _ = listener.accept()
                self.conns.append(conn)
                self.start(self.serve, conn)

    @staticmethod
    def receive(conn, size):
        data = b""
        while len(data) < size:
            part = conn.recv(size - len(data))
            if not part:
                raise EOFError
            data += part
        return data

    def serve(self, conn):
        with contextlib.suppress(OSError, EOFError):
            kind = HELLO.unpack(self.receive(conn, HELLO.size))[2]
            nonce = self.nonces.get(kind, self.nonce)
            conn.sendall(WELCOME.pack(HELLO_MAGIC, VERSION, 0, 0, nonce, boot_id(), self.name, 0x1000, 0x1000))
            while True:
                _, op, _, sequence, count, size, _ = REQUEST.unpack(self.receive(conn, REQUEST.size))
                if op == LIST:
                    answer = self.answer_list
                    conn.sendall(REPLY.pack(REPLY_MAGIC, LIST, 0, sequence, 0, answer["size"], answer["argument"])
                                 + answer["payload"])
                elif op == MAP:
                    socket.send_fds(conn, [REPLY.pack(REPLY_MAGIC, MAP, 0, sequence, 0, 0, self.mapped)],
                                    [self.fd] if self.fd >= 0 else [])
                elif op == GET:
                    self.receive(conn, 32 * count)
                    conn.sendall(self.answer_get(sequence, size))


@pytest.fixture(scope="module")
def api():
    return hixl.Api()


@pytest.fixture
def buffer():
    return ctypes.create_string_buffer(b"\xee" * 2 * PAGE, 2 * PAGE)


def connect(api, liar):
    client = api.client(liar.port)
    try:
        return client.connect()
    except BaseException:
        client.destroy()
        raise


def test_an_honest_liar(api, buffer):
    """The same machinery, telling the truth: what follows fails for its lies alone."""
    with Liar(listing(region(backing=7)), memfd(PAGE, data=b"hello")) as liar, connect(api, liar) as client:
        assert client.paths() == "shm"
        client.get([(ADDRESS, ctypes.addressof(buffer), 5)])
        assert buffer.raw[:6] == b"hello\xee"


@pytest.mark.parametrize("answer", [
    listing(region(), count=2),
    listing(region(), count=0),
    listing(region(), region(), count=1),
    listing(region(tag=1)),
    listing(region(tag=256), tags=b"x" * 256),
    listing(region(tag=2), tags=b"x"),
    listing(region(), tags=b"x"),
    listing(region(size=0)),
    listing(region(address=BIG - PAGE, size=PAGE + 1)),
    listing(region(size=BIG - 1)),
    listing(count=65537, size=65537 * 64),
    listing(count=BIG - 1, size=BIG - 64),
    listing(count=1, size=BIG - 1),
    listing(count=2**58, size=0),
])
def test_malformed_lists_are_refused(api, answer):
    with Liar(answer) as liar:
        with pytest.raises(hixl.HixlError) as info:
            connect(api, liar)
        assert info.value.status == hixl.NOT_CONNECTED


@pytest.mark.parametrize("what, make", [
    ("not sealed", lambda: {"fd": memfd(PAGE, seals=0)}),
    ("sealed against growing only", lambda: {"fd": memfd(PAGE, seals=fcntl.F_SEAL_GROW)}),
    ("smaller than told", lambda: {"fd": memfd(PAGE), "mapped": 2 * PAGE}),
    ("smaller than its region", lambda: {"fd": memfd(PAGE), "mapped": PAGE - 1}),
    ("empty", lambda: {"fd": memfd(PAGE), "mapped": 0}),
    ("absurd", lambda: {"fd": memfd(PAGE), "mapped": BIG - 1}),
    ("no descriptor", lambda: {"fd": -1}),
    ("not a memfd", lambda: {"fd": os.open("/dev/zero", os.O_RDWR)}),
])
def test_memory_that_cannot_be_trusted_is_not_mapped(api, what, make):
    """A file someone could shrink would turn a copy into SIGBUS: the region then travels by TCP."""
    with Liar(listing(region(backing=7)), **make()) as liar, connect(api, liar) as client:
        assert client.paths() == "tcp", what


@pytest.mark.parametrize("offset", [1, PAGE, BIG - 1, BIG - PAGE])
def test_region_outside_its_memory_is_not_mapped(api, offset):
    with Liar(listing(region(backing=7, offset=offset)), memfd(PAGE)) as liar, connect(api, liar) as client:
        assert client.paths() == "tcp"


@pytest.mark.parametrize("kind, status", [(LOCAL, None), (DATA, hixl.NOT_CONNECTED)])
def test_another_server_answers(api, buffer, kind, status):
    """A connection that reaches somebody else is not used."""
    with Liar(listing(region(backing=7)), memfd(PAGE), nonces={kind: b"m" * 16}) as liar, \
            connect(api, liar) as client:
        assert client.paths() == ("tcp" if kind == LOCAL else "shm")
    with Liar(listing(region()), nonces={kind: b"m" * 16},
              answer_get=lambda sequence, size: REPLY.pack(REPLY_MAGIC, GET, 0, sequence, 0, size, 0) + bytes(size)) \
            as liar, connect(api, liar) as client:
        if status is None:
            client.get([(ADDRESS, ctypes.addressof(buffer), 5)])
        else:
            with pytest.raises(hixl.HixlError) as info:
                client.get([(ADDRESS, ctypes.addressof(buffer), 5)])
            assert info.value.status == status
            assert buffer.raw == b"\xee" * 2 * PAGE


@pytest.mark.parametrize("reply", [
    lambda sequence, size: REPLY.pack(0, GET, 0, sequence, 0, size, 0),
    lambda sequence, size: REPLY.pack(REPLY_MAGIC, LIST, 0, sequence, 0, size, 0),
    lambda sequence, size: REPLY.pack(REPLY_MAGIC, GET, 0, sequence + 1, 0, size, 0),
    lambda sequence, size: REPLY.pack(REPLY_MAGIC, GET, 0, sequence, 0, size + 1, 0),
    lambda sequence, size: REPLY.pack(REPLY_MAGIC, GET, 0, sequence, 0, size - 1, 0),
    lambda sequence, size: REPLY.pack(REPLY_MAGIC, GET, 1, sequence, 0, size, 0),
    lambda sequence, size: REPLY.pack(REPLY_MAGIC, GET, 301, sequence, 1, 0, 0),
    lambda sequence, size: REPLY.pack(REPLY_MAGIC, GET, 5, sequence, 1, size, 0),
])
def test_malformed_replies_move_nothing(api, buffer, reply):
    def answer(sequence, size):
        return reply(sequence, size) + b"\x11" * 2 * size

    with Liar(listing(region()), answer_get=answer) as liar, connect(api, liar) as client:
        with pytest.raises(hixl.HixlError) as info:
            client.get([(ADDRESS, ctypes.addressof(buffer), 100)])
        assert info.value.status == hixl.NOT_CONNECTED
        assert buffer.raw == b"\xee" * 2 * PAGE


def test_refusal_in_words_that_are_no_text(api, buffer):
    """300 bytes of anything are carried to the caller, and bounded."""
    def refuse(sequence, size):
        return REPLY.pack(REPLY_MAGIC, GET, 300, sequence, 4711, 0, 0) + b"no%n%s" * 50

    with Liar(listing(region()), answer_get=refuse) as liar, connect(api, liar) as client:
        with pytest.raises(hixl.HixlError) as info:
            client.get([(ADDRESS, ctypes.addressof(buffer), 100)])
        assert info.value.status == hixl.FAILED
        assert "4711" in info.value.text and "no%n%s" in info.value.text
        assert buffer.raw == b"\xee" * 2 * PAGE


def test_more_bytes_than_asked_for_stay_out(api, buffer):
    """What follows an answer is taken for the next one, never written behind the destination."""
    def answer(sequence, size):
        return REPLY.pack(REPLY_MAGIC, GET, 0, sequence, 0, size, 0) + b"\x22" * (size + 100)

    with Liar(listing(region()), answer_get=answer) as liar, connect(api, liar) as client:
        client.get([(ADDRESS, ctypes.addressof(buffer), 100)])
        assert buffer.raw == b"\x22" * 100 + b"\xee" * (2 * PAGE - 100)
        with pytest.raises(hixl.HixlError):
            client.get([(ADDRESS, ctypes.addressof(buffer), 100)])


def test_admin_that_is_none(api):
    with Liar(listing(), nonces={ADMIN: bytes(16)}) as liar, connect(api, liar) as client:
        assert client.remote_mem() == []
