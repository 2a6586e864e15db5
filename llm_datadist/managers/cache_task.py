"""`CacheTask`: what a client holds of a transfer in the background."""
from __future__ import annotations

import contextlib
import os
import threading
from typing import TYPE_CHECKING, Any, Callable, Generator, List, Optional, Tuple

from llm_datadist.status import LLMStatusCode
from llm_datadist.utils import log
from llm_datadist.utils.utils import check_uint32

if TYPE_CHECKING:
    from llm_datadist.managers.task import TransferAsyncThread

__all__ = ["CacheTask"]


def _seconds(timeout_in_millis: Optional[int]) -> Optional[float]:
    if timeout_in_millis is None:
        return None
    return check_uint32("timeout_in_millis", timeout_in_millis) / 1000


class CacheTask:
    """A transfer in the background. Made by ``transfer_cache_async``.

    ``await task`` gives what `synchronize` returns, without blocking the event loop.

    Parameters
    ----------
    transfer_thread : TransferAsyncThread
        The running transfer.
    """

    def __init__(self, transfer_thread: TransferAsyncThread) -> None:
        self._thread = transfer_thread
        self._fd: Optional[int] = None              # readable once the transfer has ended
        self._fd_lock = threading.Lock()

    def __del__(self) -> None:
        fd = self.__dict__.get("_fd")
        if fd is not None:
            os.close(fd)

    def synchronize(self, timeout_in_millis: Optional[int] = None) -> LLMStatusCode:
        """Wait for the transfer.

        Parameters
        ----------
        timeout_in_millis : int, optional
            Milliseconds, uint32; None waits without limit.

        Returns
        -------
        LLMStatusCode
            The first failure of a config, ``LLM_SUCCESS`` when there is none, or the timeout code while it still runs.

        Raises
        ------
        TypeError, ValueError
            `timeout_in_millis` is no uint32.
        """
        if not self._thread.job.wait(_seconds(timeout_in_millis)):
            return self._thread.timeout_code
        for result in self._thread.job.results:
            if result is not None and result != LLMStatusCode.LLM_SUCCESS:
                return result
        return LLMStatusCode.LLM_SUCCESS

    def get_results(self, timeout_in_millis: Optional[int] = None) -> List[Optional[LLMStatusCode]]:
        """Wait for the transfer and return one result per config, in order.

        Parameters
        ----------
        timeout_in_millis : int, optional
            Milliseconds, uint32; None waits without limit.

        Returns
        -------
        list of LLMStatusCode or None
            None for a config that did not finish because another failed first; all timeout codes while it still runs.

        Raises
        ------
        TypeError, ValueError
            `timeout_in_millis` is no uint32.
        """
        job = self._thread.job
        if not job.wait(_seconds(timeout_in_millis)):
            return [self._thread.timeout_code] * len(job.results)
        return list(job.results)

    def exception(self, timeout_in_millis: Optional[int] = None) -> Optional[BaseException]:
        """Wait for the transfer and return what ended it early: a failure's exception, or the synchroniser's own.

        Parameters
        ----------
        timeout_in_millis : int, optional
            Milliseconds, uint32; None waits without limit.

        Returns
        -------
        BaseException or None
            None when all layers were sent, or while it still runs.

        Raises
        ------
        TypeError, ValueError
            `timeout_in_millis` is no uint32.
        """
        return self._thread.job.error if self._thread.job.wait(_seconds(timeout_in_millis)) else None

    def done(self) -> bool:
        """Return whether the transfer has ended, however it did."""
        return self._thread.job.wait(0)

    def cancelled(self) -> bool:
        """Return whether `cancel` ended the transfer."""
        return self._thread.job.is_cancelled

    def cancel(self) -> bool:
        """Stop the transfer. No byte of it lands in a peer's cache once this has returned.

        Returns
        -------
        bool
            Whether it was stopped; False when it had ended already. Layers sent before stay where they are, and
            configs that did not finish have the result ``LLM_FAILED``.

        Notes
        -----
        Returns within 100 ms, also while a layer is on its way. That breaks the link it was on, which heals by the next
        call. A synchroniser that is waiting is not interrupted; what it returns no longer counts.
        """
        return self._thread.job.cancel()

    def add_done_callback(self, callback: "Callable[[CacheTask], object]") -> None:
        """Have `callback` called with this task when the transfer has ended; at once when it has ended already.

        Parameters
        ----------
        callback : callable
            Called on a thread of the transfers. An exception from it is logged.
        """
        def call() -> None:
            try:
                callback(self)
            except Exception as error:
                log.error("a callback of transfer_cache_async failed: %r", error)

        self._thread.job.on_done(call)

    def fileno(self) -> int:
        """Return a file descriptor that is readable once the transfer has ended, for ``select`` and event loops.

        It belongs to the task: do not read from it, nor close it.
        """
        with self._fd_lock:
            if self._fd is None:
                self._fd, signal = os.pipe()
                self._thread.job.on_done(lambda: os.close(signal))      # the end of the pipe makes it readable
            return self._fd

    def __await__(self) -> "Generator[Any, None, LLMStatusCode]":
        import asyncio

        loop = asyncio.get_running_loop()
        ended = loop.create_future()

        def end() -> None:
            if not ended.done():                                        # who waited may have been cancelled
                ended.set_result(None)

        def wake(_: CacheTask) -> None:
            with contextlib.suppress(RuntimeError):                     # the loop is closed: nobody waits
                loop.call_soon_threadsafe(end)

        self.add_done_callback(wake)
        yield from ended.__await__()
        return self.synchronize(0)

    @property
    def progress(self) -> List[Tuple[int, int]]:
        """Layers that have arrived and layers that are wanted, for each config in order."""
        job = self._thread.job
        return list(zip(job.layers_sent, map(len, job.layers_wanted)))

    def failed_layers(self) -> List[Optional[range]]:
        """Return for each config the layers of the source that have not arrived; None for one that is complete."""
        job = self._thread.job
        return [range(layers.start + sent, layers.stop) if sent < len(layers) else None
                for layers, sent in zip(job.layers_wanted, job.layers_sent)]
