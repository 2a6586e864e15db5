"""A network that damages bytes: between a reader and an owner, it flips single bits of what the data path carries.

The proxy stands where the owner listens. It changes one thing of the control connection, the data port that the answer
to a hello names, so that the data connections come here, too. Of these it follows the frames (``hixl/shared/wire.h``)
and flips bits of payloads alone: whatever protects headers is not what is tested.
"""
from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
from typing import Iterator, List, Optional, Tuple

from support.control_frames import HEADER, WELCOME, WELCOME_HEAD, read_exactly

REQUEST = struct.Struct("<IHHIIQQ")             # magic, op, reserved, sequence, count, bytes, argument
REPLY = struct.Struct("<IHHIIQQ")               # magic, op, text bytes, sequence, status, bytes, argument
HELLO_BYTES, WELCOME_BYTES, DESC_BYTES = 64, 112, 32
LIST, MAP, GET, PUT, FETCH, CONFIRM = range(1, 7)


class Tamperer:
    """A proxy before one owner.

    Attributes
    ----------
    address : tuple of (str, int)
        What is linked to in place of the owner.
    """

    def __init__(self, owner: Tuple[str, int]) -> None:
        self._owner = owner
        self._random = random.Random(8)
        self._lock = threading.Lock()
        self._wanted = 0
        self._flipped = 0
        self._sockets: List[socket.socket] = []
        self._threads: List[threading.Thread] = []
        self._control, self._data = self._listen(), self._listen()
        self.address: Tuple[str, int] = self._control.getsockname()
        self._data_port: Optional[int] = None
        self._start(self._accept, self._control, self._owner, self._pump_control)

    def flip(self, count: int = 1) -> None:
        """Flip a bit of each of the next `count` payloads."""
        with self._lock:
            self._wanted = count

    def take_flipped(self) -> int:
        """How many bits were flipped since the last call; no more are from now on."""
        with self._lock:
            flipped, self._flipped, self._wanted = self._flipped, 0, 0
            return flipped

    def close(self) -> None:
        """End all connections."""
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        for thread in self._threads:
            thread.join(10)

    def _listen(self) -> socket.socket:
        sock = socket.create_server(("127.0.0.1", 0))
        self._sockets.append(sock)
        return sock

    def _start(self, function, *args) -> None:
        thread = threading.Thread(target=self._run, args=(function, *args), daemon=True)
        self._threads.append(thread)
        thread.start()

    @staticmethod
    def _run(function, *args) -> None:
        with contextlib.suppress(OSError, AssertionError):     # an end of a connection is the end of this thread
            function(*args)

    def _accept(self, listener: socket.socket, to: Tuple[str, int], pump) -> None:
        while True:
            near, _ = listener.accept()
            far = socket.create_connection(to)
            for sock in (near, far):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._sockets += [near, far]
            self._start(self._both, pump, near, far)

    def _both(self, pump, near: socket.socket, far: socket.socket) -> None:
        for source, sink, from_owner in ((near, far, False), (far, near, True)):
            self._start(self._one_way, pump, source, sink, from_owner)

    @staticmethod
    def _one_way(pump, source: socket.socket, sink: socket.socket, from_owner: bool) -> None:
        try:
            pump(source, sink, from_owner)
        finally:
            with contextlib.suppress(OSError):
                sink.shutdown(socket.SHUT_WR)

    def _pump_control(self, source: socket.socket, sink: socket.socket, from_owner: bool) -> None:
        while True:
            header = read_exactly(source, HEADER.size)
            _, _, type_, length, _ = HEADER.unpack(header)
            payload = bytearray(read_exactly(source, length))
            if from_owner and type_ == WELCOME:
                (port,) = struct.unpack_from("<I", payload, WELCOME_HEAD.size)
                if port and self._data_port is None:
                    self._data_port = port
                    self._start(self._accept, self._data, (self._owner[0], port), self._pump_data)
                if port:
                    struct.pack_into("<I", payload, WELCOME_HEAD.size, self._data.getsockname()[1])
            sink.sendall(header + payload)

    def _pump_data(self, source: socket.socket, sink: socket.socket, from_owner: bool) -> None:
        sink.sendall(read_exactly(source, WELCOME_BYTES if from_owner else HELLO_BYTES))
        while True:
            header = read_exactly(source, (REPLY if from_owner else REQUEST).size)
            sink.sendall(header)
            if from_owner:
                _, op, text_bytes, _, status, count, _ = REPLY.unpack(header)
                if status:
                    sink.sendall(read_exactly(source, text_bytes))
                elif op in (LIST, GET, FETCH):
                    self._pass(source, sink, count, op != LIST)
            else:
                _, op, _, _, count, num_bytes, _ = REQUEST.unpack(header)
                names = {GET: DESC_BYTES * count, PUT: DESC_BYTES * count, FETCH: 32 + count}.get(op, 0)
                sink.sendall(read_exactly(source, names))
                if op == PUT:
                    self._pass(source, sink, num_bytes, True)

    def _pass(self, source: socket.socket, sink: socket.socket, count: int, may_flip: bool) -> None:
        payload = bytearray(read_exactly(source, count))
        with self._lock:
            if may_flip and self._wanted and count:
                payload[self._random.randrange(count)] ^= 1 << self._random.randrange(8)
                self._wanted -= 1
                self._flipped += 1
        sink.sendall(payload)


@contextlib.contextmanager
def tampering(owner: Tuple[str, int]) -> Iterator[Tamperer]:
    """A `Tamperer` for the time of a test."""
    proxy = Tamperer(owner)
    try:
        yield proxy
    finally:
        proxy.close()
