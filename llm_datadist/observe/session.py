"""Tracing of one engine for a while: what `LLMDataDist.trace` returns."""
from __future__ import annotations

import os
import time
from types import TracebackType
from typing import TYPE_CHECKING, Dict, Optional, Type

from llm_datadist.observe.records import Record, find_records
from llm_datadist.observe.timeline import Recording, write_trace
from llm_datadist.status import LLMNotEnabledError

if TYPE_CHECKING:
    from llm_datadist.core.engine.engine import Engine

__all__ = ["Trace"]


class Trace:
    """Events are recorded from now on until `stop`, which writes them; a context manager.

    Attributes
    ----------
    path : str
        Where the file goes. It is created at once, so that a path that cannot be written fails before the run.
    result : dict or None
        After `stop`: ``engines``, ``events``, ``flows`` and ``lost``, how many of each.
    """

    def __init__(self, engine: "Engine", path: "str | os.PathLike[str]") -> None:
        if engine.record_fd() < 0:
            raise LLMNotEnabledError("trace failed: this host has no memory files (memfd_create), which it needs",
                                     operation="trace")
        self.path = os.fspath(path)
        with open(self.path, "wb"):
            pass
        self.result: Optional[Dict[str, int]] = None
        self._engine = engine
        self._start_ns = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        self._was_on = engine.set_tracing(True)

    def stop(self) -> Dict[str, int]:
        """Stop recording and write the file; a second call does nothing.

        Returns
        -------
        dict
            `result`.

        Raises
        ------
        OSError
            The file cannot be written.
        LLMException
            The engine was finalized meanwhile.
        """
        if self.result is not None:
            return self.result
        self._engine.set_tracing(self._was_on)
        with Record(os.dup(self._engine.record_fd()), os.getpid()) as record:
            recordings = [Recording.of(record, self._start_ns)]
        for other in find_records():
            with other:
                if other.pid != os.getpid():
                    there = Recording.of(other, self._start_ns)
                    recordings += [there] if len(there.events) else []
        self.result = write_trace(self.path, recordings)
        return self.result

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, kind: Optional[Type[BaseException]], error: Optional[BaseException],
                 trace: Optional[TracebackType]) -> None:
        self.stop()
