"""A network that damages bytes: between a reader and an owner, it flips single bits of what the data path carries.

Bits of payloads alone are flipped: whatever protects headers is not what is tested.
"""
from __future__ import annotations

import contextlib
import random
import threading
from typing import Iterator, Tuple

from support.proxy import Proxy


class Tamperer(Proxy):
    """A proxy before one owner."""

    def __init__(self, owner: Tuple[str, int]) -> None:
        self._random = random.Random(8)
        self._counts = threading.Lock()
        self._wanted = 0
        self._flipped = 0
        super().__init__(owner)

    def flip(self, count: int = 1) -> None:
        """Flip a bit of each of the next `count` payloads."""
        with self._counts:
            self._wanted = count

    def take_flipped(self) -> int:
        """How many bits were flipped since the last call; no more are from now on."""
        with self._counts:
            flipped, self._flipped, self._wanted = self._flipped, 0, 0
            return flipped

    def on_payload(self, payload: bytearray) -> None:
        """Flip a bit where one is wanted."""
        with self._counts:
            if self._wanted:
                payload[self._random.randrange(len(payload))] ^= 1 << self._random.randrange(8)
                self._wanted -= 1
                self._flipped += 1


@contextlib.contextmanager
def tampering(owner: Tuple[str, int]) -> Iterator[Tamperer]:
    """A `Tamperer` for the time of a test."""
    proxy = Tamperer(owner)
    try:
        yield proxy
    finally:
        proxy.close()
