"""References for a case: what the machine does with the same bytes when nothing of ours is involved.

For mapped memory: copies of the very same descriptors within one process, from a twin of the peer's cache in the same
pool. For cross-memory attach: ``process_vm_readv`` (or ``writev``) of the peer's own memory. For TCP: plain sockets, as
many connections, served by threads in the peer, with one receiving thread and with one per connection.
"""
from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from .case import Case, descriptors
from .measure import Sampler, repeat_timed
from .native.bound import CopyBound, has_stream_copy
from .native.bound_tcp import TcpClient

REFERENCE_TEXTS = {
    "memcpy": "memcpy", "stream": "non-temporal copy", "vm_read": "process_vm_readv", "vm_write": "process_vm_writev",
    "tcp_one": "sockets, 1 thread", "tcp_each": "sockets, thread each",
}


@dataclass
class Ends:
    """Addresses of both ends of one link's transfer, by tensor.

    Attributes
    ----------
    local, remote : sequence of int
        In this process and in the peer's.
    twin : sequence of int
        In this process, of the same shape as the peer's; empty where no reference needs it.
    pid : int
        Of the peer, 0 when it is on another host.
    reference : tuple of (str, int)
        Where the peer serves its memory over plain sockets; port 0 where no reference needs it.
    """

    local: Sequence[int]
    remote: Sequence[int]
    twin: Sequence[int] = ()
    pid: int = 0
    reference: tuple[str, int] = ("", 0)


@dataclass
class Bounds:
    """The references of a case; `close` when done."""

    samplers: dict[str, Sampler] = field(default_factory=dict)
    _clients: list[TcpClient] = field(default_factory=list)
    _executor: ThreadPoolExecutor | None = None

    def close(self) -> None:
        """End connections and threads."""
        for client in self._clients:
            client.close()
        if self._executor is not None:
            self._executor.shutdown()

    @classmethod
    def of(cls, case: Case, ends: Sequence[Ends], num_slots: int) -> Bounds:
        """Prepare the references of a case; one `Ends` per link.

        Of a pull by key, which finds another cache each time, there is one for mapped memory only, and its twins have
        `num_slots` slots that are read in turn.
        """
        bounds = cls()
        if case.operation == "pull_key":
            if case.path == "shm":
                bounds._slots(case, ends, num_slots)
            return bounds
        if case.num_links > 1:
            bounds._executor = ThreadPoolExecutor(case.num_links)
        if case.path == "shm":
            bounds._copies(case, ends)
        elif case.path == "cma":
            bounds._attach(case, ends)
        else:
            try:
                bounds._sockets(case, ends)
            except BaseException:
                bounds.close()
                raise
        return bounds

    def _copies(self, case: Case, ends: Sequence[Ends]) -> None:
        rows = np.concatenate([_rows(case, link, end.local, end.twin) for link, end in enumerate(ends)])
        copy = CopyBound(rows, case.num_threads)
        for kernel in _copy_kernels():
            self.samplers[kernel] = repeat_timed(lambda kernel=kernel: copy.run(kernel))

    def _slots(self, case: Case, ends: Sequence[Ends], num_slots: int) -> None:
        dst = np.zeros(1, dtype=np.int64)
        rows = np.concatenate([
            descriptors(end.twin, end.local, np.full(1, slot), dst, case.block_bytes)
            for slot in range(num_slots) for end in ends
        ])
        copy, slots = CopyBound(rows, case.num_threads, num_parts=num_slots), itertools.cycle(range(num_slots))
        for kernel in _copy_kernels():
            self.samplers[kernel] = repeat_timed(lambda kernel=kernel: copy.run(kernel, next(slots)))

    def _attach(self, case: Case, ends: Sequence[Ends]) -> None:
        kernel = "vm_write" if case.is_push else "vm_read"
        copies = [CopyBound(_rows(case, link, end.local, end.remote), case.num_threads, end.pid)
                  for link, end in enumerate(ends)]
        self.samplers[kernel] = self._together([lambda copy=copy: copy.run(kernel) for copy in copies])

    def _sockets(self, case: Case, ends: Sequence[Ends]) -> None:
        variants = {"tcp_one": 1, "tcp_each": case.num_streams} if case.num_streams > 1 else {"tcp_one": 1}
        for name, num_threads in variants.items():
            clients = []
            for link, end in enumerate(ends):
                src, dst = case.block_lists(link)
                blocks = src if case.is_push else dst
                rows = descriptors(end.local, end.local, blocks, blocks, case.block_bytes)
                ip, port = end.reference
                clients.append(TcpClient(ip, port, rows, case.num_streams, num_threads))
                self._clients.append(clients[-1])
            self.samplers[name] = self._together([lambda client=client: client.run(case.is_push) for client in clients])

    def _together(self, calls: list) -> Sampler:
        if len(calls) == 1:
            return repeat_timed(calls[0])

        def run_all() -> int:
            before = time.perf_counter_ns()
            for future in [self._executor.submit(call) for call in calls]:
                future.result()
            return time.perf_counter_ns() - before

        return repeat_timed(run_all)


def _copy_kernels() -> tuple[str, ...]:
    return ("memcpy", "stream") if has_stream_copy() else ("memcpy",)


def _rows(case: Case, link: int, local: Sequence[int], other: Sequence[int]) -> np.ndarray:
    """Descriptors of one link, in the direction of its transfer."""
    src_blocks, dst_blocks = case.block_lists(link)
    src, dst = (local, other) if case.is_push else (other, local)
    return descriptors(src, dst, src_blocks, dst_blocks, case.block_bytes)
