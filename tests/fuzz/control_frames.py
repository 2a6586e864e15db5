"""Frames of the control protocol, changed at random and sent to an engine of this process over real sockets.

``python fuzz/control_frames.py SECONDS [SEED]`` from ``tests/``, best with an interpreter of ``build/sanitize``, whose
modules see what no answer shows. Hellos go over connections of their own; requests over a link that is made by hand,
many to a connection, as whoever is linked may send them. A third process links through a proxy that changes what the
engine answers. One good link watches: it must work to the end, and when all
is over nothing may be left.
"""
from __future__ import annotations

import contextlib
import os
import random
import select
import socket
import struct
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any, Dict, Iterator, List

sys.path.append(str(Path(__file__).resolve().parent.parent))
from support.control_frames import (
    CHECKSUM,
    HELLO,
    PING,
    RANGES,
    RELEASE,
    RESOLVE,
    UNLINK,
    frame,
    hello,
    read_frame,
)
from support.link_steps import addrs_of, fetch, link, offer, unlink, until, withdraw
from support.peer import Peers, engine_options

from llm_datadist import LLMException

OWNER, READER, BELIEVER = 1, 2, 3
BATCH = 64
NUMBERS = [0, 1, 2, 7, 8, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1]


class Fuzzer:
    """Makes frames; `addresses` are good ones, so that some requests get further than their first check."""

    def __init__(self, address: Any, addresses: List[int], rng: random.Random) -> None:
        self.address, self.addresses, self.rng, self.num_frames = address, addresses, rng, 0

    def good(self) -> bytes:
        """A request as an honest peer may send it."""
        rng = self.rng
        kind = rng.choice([RESOLVE, RESOLVE, RELEASE, RANGES, CHECKSUM, PING, 11])
        if kind == RESOLVE:
            return frame(kind, struct.pack("<BBHIQQ", rng.randrange(5), rng.randrange(2), 0, rng.randrange(4),
                                           rng.choice([OWNER, 1, 2, 2**64 - 1]), rng.randrange(2)))
        if kind == RELEASE:
            return frame(kind, struct.pack("<IIII", rng.randrange(64), rng.randrange(2), 0, rng.randrange(3)))
        if kind == RANGES:
            return frame(kind, bytes(8) + b"".join(
                struct.pack("<QQ", rng.choice(self.addresses) + rng.randrange(256), rng.randrange(1, 512))
                for _ in range(rng.randrange(1, 6))))
        if kind == CHECKSUM:
            ranges = [struct.pack("<QII", rng.choice(self.addresses), rng.randrange(1024), rng.randrange(3))
                      for _ in range(rng.randrange(1, 4))]
            return frame(kind, struct.pack("<II", rng.randrange(64), len(ranges)) + b"".join(ranges))
        return frame(kind)

    def changed(self, data: bytes, start: int) -> bytes:
        """The same with a few bytes or numbers others, from `start` on."""
        rng, found = self.rng, bytearray(data)
        for _ in range(rng.choice([0, 1, 1, 2, 4])):
            if len(found) <= start:
                break
            at = rng.randrange(start, len(found))
            width = rng.choice([1, 2, 4, 8])
            if rng.random() < 0.3:
                found[at] ^= 1 << rng.randrange(8)
            elif at + width <= len(found):
                value = rng.choice(NUMBERS) if rng.random() < 0.7 else rng.randrange(2**64)
                found[at:at + width] = (value & 2**(8 * width) - 1).to_bytes(width, "little")
        return bytes(found)

    def greet(self) -> None:
        """One hello, of which something may be wrong, and perhaps some frames behind it."""
        rng = self.rng
        fields = {"token": rng.randbytes(16), "direction": rng.randrange(4), "mode": rng.randrange(2),
                  "cluster": rng.choice([77, READER, OWNER, 2**64 - 1]), "expected": rng.choice([OWNER, 0, 9])}
        data = self.changed(frame(HELLO, hello(**fields)), 0 if rng.random() < 0.3 else 16)
        data += b"".join(self.good() for _ in range(rng.randrange(3)))
        with socket.create_connection(self.address, timeout=10) as sock:
            sock.sendall(data[:rng.randrange(len(data))] if rng.random() < 0.1 else data)
            sock.shutdown(socket.SHUT_WR)
            _drain(sock)
        self.num_frames += 1

    def ask(self) -> None:
        """Make a link, and send requests over it until it is ended or has sent some hundreds."""
        token = self.rng.randbytes(16)
        with contextlib.ExitStack() as stack:
            socks = []
            for direction in (0, 1):
                sock = stack.enter_context(socket.create_connection(self.address, timeout=10))
                sock.sendall(frame(HELLO, hello(token=token, direction=direction, cluster=77)))
                read_frame(sock)
                socks.append(sock)
            asking = socks[0]
            for _ in range(8):
                frames = [self.changed(self.good(), 16) for _ in range(BATCH)]
                if self.rng.random() < 0.1:
                    frames.append(self.changed(self.good(), 0))
                if self.rng.random() < 0.02:
                    frames.append(frame(UNLINK))
                self.num_frames += len(frames)
                with contextlib.suppress(OSError, AssertionError):      # it is ended, or answers what was changed
                    for part in _up_to_checksums(frames):
                        asking.sendall(b"".join(part))
                        for _ in part:
                            read_frame(asking)
                    continue
                break


def _up_to_checksums(frames: List[bytes]) -> Iterator[List[bytes]]:
    """Frames that may be sent at once: CHECKSUM must be the last that was sent."""
    part: List[bytes] = []
    for one in frames:
        part.append(one)
        if one[6] == CHECKSUM:
            yield part
            part = []
    if part:
        yield part


class Proxy:
    """Stands between a reader and the owner, and changes some of what the owner answers."""

    def __init__(self, address: Any, rng: random.Random, change: Any) -> None:
        self.address, self.rng, self.change = address, rng, change
        self.num_changed = 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.thread = threading.Thread(target=self._accept)
        self.thread.start()

    def _accept(self) -> None:
        threads = []
        with contextlib.suppress(OSError):
            while True:
                threads.append(threading.Thread(target=self._pass_on, args=(self.listener.accept()[0],)))
                threads[-1].start()
        for thread in threads:
            thread.join()

    def _pass_on(self, near: socket.socket) -> None:
        with near, socket.create_connection(self.address) as far, contextlib.suppress(OSError):
            while True:
                for sock in select.select([near, far], [], [], 10)[0]:
                    data = sock.recv(65536)
                    if not data:
                        return
                    if sock is far and self.rng.random() < 0.3:
                        data = self.change(data, 0 if self.rng.random() < 0.2 else 16)
                        self.num_changed += 1
                    (far if sock is near else near).sendall(data)

    def close(self) -> None:
        """End it; connections end with their peers."""
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join()


def believe(node: Any, address: Any, count: int) -> Dict[str, int]:
    """Link through the proxy and read, again and again: whatever comes, this process lives, and says what it got."""
    seen: Counter = Counter()
    for _ in range(count):
        code, _ = link(node, (OWNER, address), timeout_ms=300)
        seen[code.name] += 1
        for _ in range(5 if code == 0 else 0):
            try:
                seen["right" if fetch(node, OWNER) else "other bytes"] += 1      # an owner may say anything
            except LLMException as error:
                seen[error.status_code.name] += 1
        unlink(node, (OWNER,), timeout_ms=300, force=True)
    return dict(seen)


def _drain(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while sock.recv(65536):
            pass


def main(seconds: float, seed: int) -> None:
    """Run for so long, and say how much that was."""
    print(f"control_frames, seed {seed}", flush=True)
    with Peers() as peers:
        owner, reader = peers.here(OWNER), peers.start(READER)
        owner.call(offer)
        peers.link(reader, owner)
        options = engine_options(timeout_ms=300, llm_LinkHealTime="0")
        believer = peers.start(BELIEVER, options, env={"LLM_DATADIST_HOST_PATHS": "cma"})
        files = len(os.listdir("/proc/self/fd"))
        fuzzer = Fuzzer(owner.address, addrs_of(owner.node.kept["offer", 0]), random.Random(seed))
        proxy = Proxy(owner.address, fuzzer.rng, fuzzer.changed)
        believed: Counter = Counter()
        start = time.monotonic()
        while time.monotonic() - start < seconds:
            for _ in range(20):
                fuzzer.greet()
            for _ in range(4):
                fuzzer.ask()
            believed.update(believer.call(believe, proxy.listener.getsockname(), 4))
            assert reader.call(fetch, OWNER), "the good link brings other bytes"
        proxy.close()
        assert until(lambda: owner.stats()["pins"] == 0), "pins are left"
        assert until(lambda: len(os.listdir("/proc/self/fd")) <= files), "connections are left"
        owner.call(withdraw)
        spent = time.monotonic() - start
        print(f"  {fuzzer.num_frames} frames, {fuzzer.num_frames / spent:.0f} a second; "
              f"{proxy.num_changed} answers changed, after which: {dict(believed)}; nothing found")


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 60,
         int(sys.argv[2]) if len(sys.argv) > 2 else random.SystemRandom().randrange(2**32))
