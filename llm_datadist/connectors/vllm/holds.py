"""Blocks that wait for the other side: who holds what, until it was fetched or nobody came in time."""
from __future__ import annotations

import time
from typing import Dict, List, Tuple

__all__ = ["Holds"]


class Holds:
    """Requests whose blocks are kept.

    Parameters
    ----------
    lease_ms : int
        How long a finished request's blocks are kept.
    """

    def __init__(self, lease_ms: int) -> None:
        self._lease_s = lease_ms / 1000
        self._keys: Dict[str, int] = {}
        self._deadlines: Dict[str, float] = {}

    def hold(self, request_id: str, key: int) -> None:
        self._keys[request_id] = key

    def lease(self, request_id: str) -> None:
        self._deadlines[request_id] = time.monotonic() + self._lease_s

    def drop(self, request_id: str) -> None:
        self._keys.pop(request_id, None)

    def take_ended(self) -> List[Tuple[str, str]]:
        now = time.monotonic()
        ended = [request_id for request_id, deadline in self._deadlines.items() if now > deadline]
        for request_id in ended:
            del self._deadlines[request_id]
            self._keys.pop(request_id, None)
        return [(request_id, "expired") for request_id in ended]
