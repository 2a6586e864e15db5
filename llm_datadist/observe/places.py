"""Where caches were allocated: file and line of the caller, kept while events are recorded.

They lie in a memory file of their own, ``memfd:llm_datadist-places``, which others of this user read as they do the
record: one row for each cache, its id and the text, in no order.
"""
from __future__ import annotations

import os
import struct
import sys
import threading
from typing import TYPE_CHECKING, Dict, List, Optional

if TYPE_CHECKING:
    from llm_datadist.core.engine.engine import Engine

__all__ = ["Places", "caller", "read_places"]

_NAME = "llm_datadist-places"
_ROW = struct.Struct("<Q248s")              # the id of a cache, 0: nothing; file:line, its end where it is too long
_MAX_ROWS = 65536
_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_TOOLS = os.path.join(_PACKAGE, "tools") + os.sep


def caller() -> str:
    """File and line of the nearest caller outside this package."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        name = frame.f_code.co_filename
        if not name.startswith(_PACKAGE) or name.startswith(_TOOLS):
            break
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


class Places:
    """Of one engine, the places that allocated its caches from now on.

    Parameters
    ----------
    engine : Engine
        Tells which caches are still there, when room is short.
    """

    def __init__(self, engine: "Engine") -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._places: Dict[int, str] = {}
        self._rows: Dict[int, int] = {}
        self._free: List[int] = []
        self._fd = os.memfd_create(_NAME) if hasattr(os, "memfd_create") else -1

    def note(self, cache_id: int) -> None:
        """Keep the place of the call that allocated a cache."""
        place = caller()
        with self._lock:
            if len(self._places) >= _MAX_ROWS:
                self._forget_freed()
            row = self._free.pop() if self._free else len(self._rows)
            if row >= _MAX_ROWS:
                return                              # as many caches are held: which they are is plain already
            self._places[cache_id], self._rows[cache_id] = place, row
            if self._fd >= 0:
                os.pwrite(self._fd, _ROW.pack(cache_id, os.fsencode(place)[-248:]), row * _ROW.size)

    def of(self, cache_id: int) -> Optional[str]:
        """Where a cache was allocated, as file:line; None for one that came before this was kept."""
        return self._places.get(cache_id)

    def close(self) -> None:
        """Forget everything."""
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    def _forget_freed(self) -> None:
        held = {row["cache_id"] for row in self._engine.caches()}
        for cache_id in [each for each in self._places if each not in held]:
            del self._places[cache_id]
            self._free.append(self._rows.pop(cache_id))


def read_places(pid: int) -> Dict[int, str]:
    """The places that the engine of a process of this user keeps, by cache id; empty where it keeps none."""
    folder = f"/proc/{pid}/fd"
    try:
        for name in os.listdir(folder):
            path = f"{folder}/{name}"
            if os.readlink(path).startswith(f"/memfd:{_NAME}"):
                with open(path, "rb") as source:
                    data = source.read(_MAX_ROWS * _ROW.size)
                rows = _ROW.iter_unpack(data[:len(data) // _ROW.size * _ROW.size])
                return {cache_id: os.fsdecode(place.rstrip(b"\0")) for cache_id, place in rows if cache_id}
    except OSError:
        pass
    return {}
