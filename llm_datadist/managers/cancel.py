"""`CancelScope`: ending calls that wait, from another thread."""
from __future__ import annotations

import threading
from types import TracebackType
from typing import TYPE_CHECKING, List, Optional, Tuple, Type

if TYPE_CHECKING:
    from llm_datadist.core.base.interrupt import CancelWatch

__all__ = ["CancelScope"]


class CancelScope:
    """Calls that another thread can end: those made within a ``with`` block of this scope.

    A pull, push, link call or any other call of this package that waits in the block raises `LLMException` with
    LLM_FAILED within 100 ms once `cancel` was called, and none of its bytes lands any more. What was cancelled while
    its bytes moved breaks its link, which heals by the next call.

    Notes
    -----
    Several threads may be in one scope at once, and a thread in several, of which the innermost counts. A call that
    ends before it has to wait is not cancelled.

    Examples
    --------
    >>> scope = CancelScope()
    >>> def pull():
    ...     with scope:
    ...         manager.pull_blocks(key, cache, src_blocks, dst_blocks)
    >>> scope.cancel()                                  # from another thread
    """

    def __init__(self) -> None:
        from llm_datadist.core.base.interrupt import CancelFlag

        self._flag = CancelFlag()
        self._left = threading.Condition()
        self._inside: List[Tuple[int, "CancelWatch"]] = []

    def __enter__(self) -> "CancelScope":
        from llm_datadist.core.base.interrupt import CancelWatch, cancelled

        with self._left:
            if self._flag.is_set():
                raise cancelled()
            watch = CancelWatch(self._flag)
            self._inside.append((threading.get_ident(), watch))
        watch.enter()
        return self

    def __exit__(self, kind: Optional[Type[BaseException]], error: Optional[BaseException],
                 trace: Optional[TracebackType]) -> None:
        ident = threading.get_ident()
        with self._left:
            at = next(i for i in reversed(range(len(self._inside))) if self._inside[i][0] == ident)
            self._inside.pop(at)[1].leave()
            self._left.notify_all()

    def cancel(self, timeout_in_millis: Optional[int] = None) -> bool:
        """End the calls in the block, and those to come.

        Parameters
        ----------
        timeout_in_millis : int, optional
            How long to wait until the other threads have left the block; None waits without limit, 0 not at all.

        Returns
        -------
        bool
            Whether they have: then no byte of their calls lands any more.
        """
        self._flag.set()
        ident = threading.get_ident()
        with self._left:
            return self._left.wait_for(lambda: all(inside == ident for inside, _ in self._inside),
                                       None if timeout_in_millis is None else timeout_in_millis / 1000)

    @property
    def is_cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._flag.is_set()
