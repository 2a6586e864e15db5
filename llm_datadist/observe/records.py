"""Finding and reading the records of engines: those of other processes through ``/proc``, one's own, and kept files.

Nothing is asked of the process that is watched, and nothing is mapped: files are read at the places that hold data, so
that a reader takes no memory in the name of what it watches.
"""
from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple

import numpy as np

from llm_datadist.observe import layout
from llm_datadist.observe.layout import text
from llm_datadist.observe.places import read_places

__all__ = ["Cache", "Operation", "Peer", "Record", "find_records", "folder_records"]

SUFFIX = ".ldd-record"
_MEMORY_NAME = "/memfd:llm_datadist-record"
_TRIES = 8


@dataclass
class Operation:
    """What was counted of one operation with one peer."""

    count: int
    failures: int
    bytes: int
    total_ns: int
    buckets: "np.ndarray[Any, Any]"

    def quantile_us(self, q: float) -> float:
        """The `q` quantile of its duration, in microseconds."""
        return layout.quantile_ns(self.buckets, q) / 1e3

    def since(self, before: "Optional[Operation]") -> "Operation":
        """What was counted after `before`."""
        if before is None or before.count > self.count:
            return self
        return Operation(self.count - before.count, self.failures - before.failures, self.bytes - before.bytes,
                         self.total_ns - before.total_ns, self.buckets - before.buckets)


@dataclass
class Peer:
    """A cluster that the engine is or was linked to; `cluster_id` None gathers what no cluster is known for."""

    cluster_id: Optional[int]
    num_links: int
    num_broken: int
    num_opened: int
    state: str
    address: str
    reason: str
    operations: Dict[str, Operation]


@dataclass
class Cache:
    """A cache that an engine holds, with the keys that lead to it.

    `is_pulled`: a reader on this host has taken the last key, and the memory is free as soon as the engine looks at its
    table again, which it does before it allocates. Keys that were taken so are not listed. `place`: file and line that
    allocated it, where events were recorded then.
    """

    cache_id: int
    bytes: int
    num_tensors: int
    age_s: float
    owned: bool
    is_open: bool
    host: bool
    is_blocks: bool
    is_pulled: bool = False
    place: Optional[str] = None
    keys: List[Dict[str, Any]] = field(default_factory=list)


class Record:
    """The record of one engine.

    Parameters
    ----------
    fd : int
        The record, open for reading; closed by `close`.
    pid : int or None
        The process, as this one sees it; None for a file that was kept.

    Raises
    ------
    ValueError
        This is no record, or one of another version.
    """

    def __init__(self, fd: int, pid: Optional[int] = None) -> None:
        self._fd = fd
        self.pid = pid
        self._shared: Dict[str, int] = {}
        data = os.pread(fd, layout.HEAD.itemsize, 0)
        if len(data) < layout.HEAD.itemsize:
            raise ValueError("no record of an engine: it is too short")
        head = np.frombuffer(data, layout.HEAD)[0]
        known = (layout.MAGIC, len(layout.OPERATIONS), layout.NUM_BUCKETS, layout.EVENT.itemsize)
        found = (int(head["magic"]), int(head["num_ops"]), int(head["num_buckets"]), int(head["event_bytes"]))
        if found != known:
            raise ValueError("a record of another version of this package")
        self.cluster_id = int(head["cluster_id"])
        self.own_pid = int(head["pid"])
        self.boot_id = text(head["boot_id"])
        self.start_ns = int(head["start_ns"])
        self.wall_offset_ns = int(head["realtime_ns"]) - self.start_ns
        self.generation = int(head["generation"])
        self.provider = text(head["provider"])
        self.device_pool_bytes = int(head["device_pool_bytes"])
        self.host_pool_bytes = int(head["host_pool_bytes"])
        self._head = head

    def __enter__(self) -> "Record":
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; idempotent."""
        for fd in (self._fd, *self._shared.values()):
            if fd >= 0:
                os.close(fd)
        self._fd, self._shared = -1, {}

    def head(self) -> Dict[str, Any]:
        """What changes while the engine runs: role, listener, tracing, events, events_lost, held_requests."""
        head = np.frombuffer(os.pread(self._fd, layout.HEAD.itemsize, 0), layout.HEAD)[0]
        events = int(head["next_ticket"])
        return {"role": text(head["role"]).lower(), "listener": text(head["listener"]) or None,
                "tracing": bool(head["tracing"]), "events": events, "held_requests": int(head["num_holds"]),
                "events_lost": max(0, events - int(head["ring_capacity"])) + int(head["dropped"])}

    def peers(self) -> List[Peer]:
        """What was counted, by peer; the first is for what no peer is known for."""
        found = []
        size, count = int(self._head["peer_bytes"]), int(self._head["num_peers"])
        for index in range(count):
            data = os.pread(self._fd, size, int(self._head["peers_offset"]) + index * size)
            head = np.frombuffer(data, layout.PEER_HEAD, 1)[0]
            if index and not head["used_ns"]:
                break
            ops = np.frombuffer(data, layout.OP, len(layout.OPERATIONS), layout.PEER_HEAD.itemsize)
            found.append(Peer(
                int(head["cluster_id"]) if index else None, int(head["num_links"]), int(head["num_broken"]),
                int(head["num_opened"]), layout.LINK_STATES[int(head["state"]) % len(layout.LINK_STATES)],
                text(head["peer_ip"]), text(head["reason"]),
                {name: Operation(int(op["buckets"].sum()), int(op["failures"]), int(op["bytes"]), int(op["total_ns"]),
                                 op["buckets"]) for name, op in zip(layout.OPERATIONS, ops)}))
        return found

    def events(self) -> "Tuple[np.ndarray[Any, Any], int]":
        """The events that the ring holds, in the order of their end, and how many were lost."""
        capacity, offset = int(self._head["ring_capacity"]), int(self._head["ring_offset"])
        size = capacity * layout.EVENT.itemsize
        before = np.frombuffer(os.pread(self._fd, size, offset), layout.EVENT)
        after = np.frombuffer(os.pread(self._fd, size, offset), layout.EVENT)
        places = np.arange(capacity, dtype=np.uint64)
        with np.errstate(over="ignore"):
            is_whole = (before["seq"] == after["seq"]) & (before["seq"] != 0) & (
                (before["seq"] - np.uint64(1)) % np.uint64(capacity) == places) & (
                before["seq"] != np.uint64(0xFFFFFFFFFFFFFFFF))
        events = before[is_whole]
        return events[np.argsort(events["seq"])], int(self.head()["events_lost"])

    def caches(self) -> List[Cache]:
        """The caches that the engine holds, oldest first; empty where it shares no table, as when the host cannot."""
        fd, marks_fd = self._open_shared("table_fd"), self._open_shared("marks_fd")
        if fd < 0 or marks_fd < 0:
            return []
        keys_at, caches_at = int(self._head["keys_offset"]), int(self._head["caches_offset"])
        caches_end = caches_at + int(self._head["max_caches"]) * layout.SHARED_CACHE.itemsize
        for _ in range(_TRIES):
            before = os.pread(fd, 8, 8)
            keys = list(_rows(fd, keys_at, caches_at, layout.SHARED_KEY))
            caches = list(_rows(fd, caches_at, caches_end, layout.SHARED_CACHE))
            if int.from_bytes(before, "little") % 2 == 0 and os.pread(fd, 8, 8) == before:
                break                               # otherwise it changed meanwhile, and the last look has to do
        now_ns = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        found: Dict[int, Cache] = {}
        for first, rows in caches:
            for place in np.flatnonzero(rows["flags"] & layout.SHOWN_PUBLISHED):
                row, flags = rows[place], int(rows[place]["flags"])
                found[first + int(place)] = Cache(
                    int(row["cache_id"]), int(row["num_tensors"]) * int(row["tensor_bytes"]), int(row["num_tensors"]),
                    max(0, now_ns - int(row["born_ns"])) / 1e9, bool(flags & layout.SHOWN_OWNED),
                    bool(flags & layout.SHOWN_OPEN), bool(flags & layout.SHOWN_HOST),
                    bool(flags & layout.SHOWN_BLOCKS))
        for first, rows in keys:
            marks = np.zeros(len(rows), np.uint32)
            data = os.pread(marks_fd, marks.nbytes, layout.MARKS_OFFSET + 4 * first)
            marks[: len(data) // 4] = np.frombuffer(data, np.uint32, len(data) // 4)
            is_taken = (rows["kind"] == 0) & ((marks - rows["generation"]).view(np.int32) >= 0)
            for place in np.flatnonzero((rows["generation"] % 2 == 1) & (rows["kind"] < 3)):
                cache, row = found.get(int(rows[place]["cache_slot"])), rows[place]
                if cache is None:
                    continue
                if is_taken[place]:
                    cache.is_pulled = not cache.is_open and cache.owned
                else:
                    cache.keys.append({"kind": layout.KEY_KINDS[int(row["kind"])], "id": int(row["id"]),
                                       "model_id": int(row["model_id"])})
        places = read_places(self.pid) if self.pid is not None else {}
        for cache in found.values():
            cache.is_pulled = cache.is_pulled and not cache.keys
            cache.place = places.get(cache.cache_id)
        return sorted(found.values(), key=lambda cache: cache.cache_id)

    def _open_shared(self, name: str) -> int:
        """A file that the engine shares with its peers, open for reading; -1 without one."""
        if name not in self._shared and self.pid is not None and int(self._head[name]) >= 0:
            try:
                self._shared[name] = os.open(f"/proc/{self.pid}/fd/{int(self._head[name])}", os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                return -1
        return self._shared.get(name, -1)


def _rows(fd: int, start: int, stop: int, dtype: "np.dtype[Any]") -> "Iterator[Tuple[int, np.ndarray[Any, Any]]]":
    """The stretches of a sparse array that hold data: index of the first row, and the rows."""
    at = start
    while at < stop:
        try:
            begin = max(os.lseek(fd, at, os.SEEK_DATA), at)
        except OSError:                             # nothing but holes
            return
        if begin >= stop:
            return
        end = min(os.lseek(fd, begin, os.SEEK_HOLE), stop)
        first = (begin - start) // dtype.itemsize
        last = -(-(end - start) // dtype.itemsize)
        data = os.pread(fd, (last - first) * dtype.itemsize, start + first * dtype.itemsize)
        yield first, np.frombuffer(data[: len(data) // dtype.itemsize * dtype.itemsize], dtype)
        at = start + last * dtype.itemsize


def _innermost_pid(pid: str) -> int:
    """The number by which a process knows itself."""
    with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as source:
        for line in source:
            if line.startswith("NSpid:"):
                return int(line.split()[-1])
    return int(pid)


def find_records() -> List[Record]:
    """The records of all engines of this user that this process can see, in order of their process ids.

    Returns
    -------
    list of Record
        To be closed by the caller. What ends meanwhile is left out, and so are copies that forked children inherited.
    """
    found = []
    user = os.geteuid()
    for pid in sorted((name for name in os.listdir("/proc") if name.isdigit()), key=int):
        try:
            if os.stat(f"/proc/{pid}").st_uid != user:
                continue
            for name in os.listdir(f"/proc/{pid}/fd"):
                path = f"/proc/{pid}/fd/{name}"
                try:
                    target = os.readlink(path)
                except OSError:
                    continue
                if target.startswith(_MEMORY_NAME) or target.endswith(SUFFIX):
                    record = _open(path, int(pid))
                    if record is not None and record.own_pid != _innermost_pid(pid):
                        record.close()
                    elif record is not None:
                        found.append(record)
        except OSError:
            continue                                # it has ended, or is not for us to see
    return found


def folder_records(folder: "os.PathLike[str] | str") -> List[Record]:
    """The records that engines keep in a folder, see ``LLM_DATADIST_TRACE``; to be closed by the caller."""
    opened = [_open(str(path), None) for path in sorted(Path(folder).glob(f"*{SUFFIX}"))]
    return [record for record in opened if record is not None]


def _open(path: str, pid: Optional[int]) -> Optional[Record]:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return Record(fd, pid)
    except ValueError:
        os.close(fd)
        return None
