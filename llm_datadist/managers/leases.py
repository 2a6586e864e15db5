"""Keys that expire: the thread that logs them."""
from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Optional

from llm_datadist.utils import log

if TYPE_CHECKING:
    from llm_datadist.core.engine.engine import Engine

__all__ = ["LeaseLog"]


class LeaseLog:
    """Logs each request key of an engine that expired, once. Its thread begins with the first lease.

    Parameters
    ----------
    engine : Engine
        The engine.
    """

    def __init__(self, engine: "Engine") -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._thread: Optional[threading.Thread] = None

    def begin(self) -> None:
        """Have expired keys logged from now on."""
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="llm_datadist-leases", daemon=True)
                self._thread.start()

    def close(self) -> None:
        """Log what has expired, and end the thread."""
        if self._thread is not None:
            self._engine.end_leases()
            self._thread.join()

    def _run(self) -> None:
        while True:
            expired = self._engine.take_expired()
            if not expired:
                return
            for cache_id, req_id, model_id, num_bytes, age_s in expired:
                log.warn("req_id=%s, model_id=%s of cache %s (%s bytes) was not pulled within its lease and is "
                         "released, %.3f s after it was allocated", req_id, model_id, cache_id, num_bytes, age_s)
