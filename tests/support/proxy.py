"""A network between two processes that a test can watch and damage, frame by frame.

The proxy stands where an owner listens. It changes one thing of the control connection, the data port that the answer
to a hello names, so that the data connections come here, too. Of both kinds it follows the frames (``ldd_wire.h``,
``hixl/shared/wire.h``), so that a test can name the place where something happens: a `Trap` waits for one frame.
"""
from __future__ import annotations

import contextlib
import socket
import struct
import threading
from typing import Callable, Dict, Iterator, List, Optional, Set, Tuple

from support.control_frames import HEADER, WELCOME, WELCOME_HEAD, read_exactly

REQUEST = struct.Struct("<IHHIIQQ")             # magic, op, reserved, sequence, count, bytes, argument
REPLY = struct.Struct("<IHHIIQQ")               # magic, op, text bytes, sequence, status, bytes, argument
HELLO_BYTES, WELCOME_BYTES, DESC_BYTES = 64, 112, 32
LIST, MAP, GET, PUT, FETCH, CONFIRM = range(1, 7)
OPS = {LIST: "LIST", MAP: "MAP", GET: "GET", PUT: "PUT", FETCH: "FETCH", CONFIRM: "CONFIRM"}
CONTROL = {1: "HELLO", 2: "WELCOME", 3: "RESOLVE", 4: "DESCRIPTOR", 5: "RELEASE", 6: "ACK", 7: "RANGES", 8: "LEASE",
           9: "UNLINK", 10: "PING", 14: "PROOF", 15: "CHECKSUM", 16: "CHECKSUMS"}
RESET = struct.pack("ii", 1, 0)                 # SO_LINGER: an end of the connection that is a reset
LIMIT_S = 20.0                                  # how long a frame is held if the test forgets it


class Trap:
    """What happens to the next frame of a name.

    Attributes
    ----------
    reached : threading.Event
        The frame has come, and its first half went on where the trap lets it.
    passed : threading.Event
        The proxy has done with the frame: it went on, or there is no connection any more that it could go by.
    go_on : threading.Event
        Set by the test: a frame that is held goes on.
    """

    def __init__(self, action: str, half: bool, skip: int) -> None:
        self.action = action
        self.half = half
        self.skip = skip
        self.reached, self.passed, self.go_on = threading.Event(), threading.Event(), threading.Event()

    def wait(self, what: str = "reached") -> None:
        """Wait for `reached` or `passed`; that it never comes fails the test."""
        assert getattr(self, what).wait(LIMIT_S), f"the frame was never {what}"


class Proxy:
    """A proxy before one owner.

    Attributes
    ----------
    address : tuple of (str, int)
        What is linked to in place of the owner.
    seen : list of str
        Names of the frames that came, in their order: ``"RESOLVE"``; of data connections ``"data HELLO"``,
        ``"data WELCOME"``, ``"GET request"``, ``"GET reply"``, ``"GET bytes"``, ``"CONFIRM request"``.
    """

    def __init__(self, owner: Tuple[str, int], follows_data: bool = True) -> None:
        self._owner = owner
        self._follows_data = follows_data               # not where a secret proves what the owner said
        self._lock = threading.Lock()
        self._traps: Dict[str, Trap] = {}               # armed
        self._sprung: List[Trap] = []                   # until `restore`
        self._listeners: List[socket.socket] = []
        self._sockets: Set[socket.socket] = set()
        self._threads: List[threading.Thread] = []
        self._silent: Set[socket.socket] = set()        # what comes from these goes nowhere
        self._slow: Set[socket.socket] = set()          # what goes there goes byte by byte
        self._is_silent = False
        self.seen: List[str] = []
        self._control, self._data = self._listen(), self._listen()
        self.address: Tuple[str, int] = self._control.getsockname()
        self._data_port: Optional[int] = None
        self._start(self._accept, self._control, lambda: self._owner[1], self._pump_control)
        self._start(self._accept, self._data, lambda: self._data_port, self._pump_data)

    # ---------------------------------------------------------------------------------------------- for tests

    def arm(self, name: str, action: str, *, half: bool = False, skip: int = 0) -> Trap:
        """Have something happen to the next frame of that name, after `skip` others.

        Parameters
        ----------
        name : str
            As in `seen`.
        action : {"hold", "cut", "swallow", "dribble"}
            Wait for the test; reset every connection; let nothing through any more, either way and on no connection,
            until `restore`; from here on pass the connection byte by byte.
        half : bool
            Pass the first half of the frame on before.
        """
        trap = Trap(action, half, skip)
        with self._lock:
            self._traps[name] = trap
        return trap

    def restore(self) -> None:
        """Forget traps; let what comes from now on through, on new connections where others fell silent."""
        with self._lock:
            traps, self._traps, self._sprung = [*self._traps.values(), *self._sprung], {}, []
            was_silent, self._is_silent = self._is_silent, False
        for trap in traps:
            trap.go_on.set()
        if was_silent:
            self.cut()

    def cut(self) -> None:
        """Reset every connection."""
        with self._lock:
            sockets, self._sockets = self._sockets, set()
        for sock in sockets:
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                sock.shutdown(socket.SHUT_RD)           # wakes the thread that reads; no orderly end goes out
            with contextlib.suppress(OSError):
                sock.close()

    def owner_is_now(self, owner: Tuple[str, int]) -> None:
        """Another process stands behind the proxy."""
        self._owner, self._data_port = owner, None

    def close(self) -> None:
        """End all connections."""
        self.restore()
        for sock in self._listeners:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        self.cut()
        for thread in self._threads:
            thread.join(10)

    # ---------------------------------------------------------------------------------------------- for subclasses

    def on_payload(self, payload: bytearray) -> None:
        """Look at or change bytes of caches before they go on."""

    # ----------------------------------------------------------------------------------------------- connections

    def _listen(self) -> socket.socket:
        sock = socket.create_server(("127.0.0.1", 0))
        self._listeners.append(sock)
        return sock

    def _start(self, function: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=self._run, args=(function, *args), daemon=True)
        self._threads.append(thread)
        thread.start()

    @staticmethod
    def _run(function: Callable[..., None], *args: object) -> None:
        with contextlib.suppress(OSError, AssertionError):     # an end of a connection is the end of this thread
            function(*args)

    def _accept(self, listener: socket.socket, port: Callable[[], Optional[int]], pump: Callable[..., None]) -> None:
        while True:
            near, _ = listener.accept()
            try:
                far = socket.create_connection((self._owner[0], port() or 1))
            except OSError:                             # the owner is gone, and so is whoever asked for it
                near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                near.close()
                continue
            for sock in (near, far):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._sockets |= {near, far}
                if self._is_silent:
                    self._silent |= {near, far}
            for source, sink, from_owner in ((near, far, False), (far, near, True)):
                self._start(self._one_way, pump, source, sink, from_owner)

    @staticmethod
    def _one_way(pump: Callable[..., None], source: socket.socket, sink: socket.socket, from_owner: bool) -> None:
        try:
            pump(source, sink, from_owner)
        finally:
            with contextlib.suppress(OSError):
                sink.shutdown(socket.SHUT_WR)

    # ---------------------------------------------------------------------------------------------------- frames

    def _carry(self, name: str, data: bytes, source: socket.socket, sink: socket.socket) -> None:
        """Pass a frame on, or do what a trap for it says."""
        with self._lock:
            self.seen.append(name)
            trap = self._traps.get(name)
            if trap is not None and trap.skip:
                trap.skip -= 1
                trap = None
            elif trap is not None:
                self._sprung.append(self._traps.pop(name))
        if trap is None:
            self._send(data, source, sink)
            return
        try:
            if trap.half:
                self._send(data[:len(data) // 2], source, sink)
                data = data[len(data) // 2:]
            if trap.action == "cut":
                trap.reached.set()                      # first: a call may be over because of the cut
                self.cut()
            elif trap.action == "swallow":
                with self._lock:
                    self._is_silent = True
                    self._silent |= self._sockets
            elif trap.action == "dribble":
                self._slow.add(sink)
            trap.reached.set()
            if trap.action == "hold":
                trap.go_on.wait(LIMIT_S)
            self._send(data, source, sink)
        finally:
            trap.passed.set()

    def _send(self, data: bytes, source: socket.socket, sink: socket.socket) -> None:
        if source in self._silent:
            return
        if sink in self._slow:
            for at in range(len(data)):
                sink.sendall(data[at:at + 1])
        else:
            sink.sendall(data)

    def _pump_control(self, source: socket.socket, sink: socket.socket, from_owner: bool) -> None:
        while True:
            header = read_exactly(source, HEADER.size)
            _, _, type_, length, _ = HEADER.unpack(header)
            payload = bytearray(read_exactly(source, length))
            if from_owner and type_ == WELCOME:
                (port,) = struct.unpack_from("<I", payload, WELCOME_HEAD.size)
                if port and self._follows_data:
                    self._data_port = port
                    struct.pack_into("<I", payload, WELCOME_HEAD.size, self._data.getsockname()[1])
            self._carry(CONTROL.get(type_, str(type_)), header + payload, source, sink)

    def _pump_data(self, source: socket.socket, sink: socket.socket, from_owner: bool) -> None:
        name = "data WELCOME" if from_owner else "data HELLO"
        self._carry(name, read_exactly(source, WELCOME_BYTES if from_owner else HELLO_BYTES), source, sink)
        while True:
            header = read_exactly(source, (REPLY if from_owner else REQUEST).size)
            if from_owner:
                _, op, text_bytes, _, status, count, _ = REPLY.unpack(header)
                follows = text_bytes if status else 0
                count = count if not status and op in (LIST, GET, FETCH) else 0
                names = f"{OPS.get(op, op)} reply"
            else:
                _, op, _, _, items, num_bytes, _ = REQUEST.unpack(header)
                follows = {GET: DESC_BYTES * items, PUT: DESC_BYTES * items, FETCH: 32 + items}.get(op, 0)
                count = num_bytes if op == PUT else 0
                names = f"{OPS.get(op, op)} request"
            self._carry(names, header + read_exactly(source, follows), source, sink)
            if count:
                payload = bytearray(read_exactly(source, count))
                if op != LIST:
                    self.on_payload(payload)
                self._carry(f"{OPS.get(op, op)} bytes", payload, source, sink)


@contextlib.contextmanager
def proxy(owner: Tuple[str, int]) -> Iterator[Proxy]:
    """A `Proxy` for the time of a test."""
    between = Proxy(owner)
    try:
        yield between
    finally:
        between.close()
