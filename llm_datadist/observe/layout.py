"""The layout of an engine's record, as ``include/llm_datadist/ldd_record.h`` has it, and what its numbers mean."""
from __future__ import annotations

from typing import Any, Iterator, List, Tuple

import numpy as np

__all__ = ["BUCKET_BOUNDS_NS", "EVENT", "EVENTS", "HEAD", "KEY_KINDS", "MAGIC", "OPERATIONS", "OP", "PEER_HEAD",
           "SHARED_CACHE", "SHARED_KEY", "quantile_ns"]

MAGIC = 0x0001647272646C6C
NUM_BUCKETS = 253
OPERATIONS = ("pull", "push", "resolve", "release", "ping", "link", "answer", "serve")
EVENTS = ("", "pull", "push", "turn", "resolve", "plan", "move", "release", "ask", "answer", "serve", "refuse", "link",
          "accept", "break", "unlink", "allocate", "free", "key_gone", "layer", "context")
KEY_KINDS = ("req", "prefix", "blocks", "id", "hold")
LINK_STATES = ("opening", "active", "broken", "closed")
# Of the frames of the control protocol, for requests and answers in a trace.
FRAMES = {3: "resolve", 5: "release", 7: "ranges", 9: "unlink", 10: "ping"}

HEAD = np.dtype([
    ("magic", "u8"), ("peers_offset", "u4"), ("peer_bytes", "u4"), ("num_peers", "u4"), ("num_ops", "u4"),
    ("num_buckets", "u4"), ("ring_offset", "u4"), ("ring_capacity", "u4"), ("event_bytes", "u4"), ("pid", "u4"),
    ("table_fd", "i4"), ("cluster_id", "u8"), ("instance", "V16"), ("boot_id", "S40"), ("start_ns", "i8"),
    ("realtime_ns", "i8"), ("device_pool_bytes", "u8"), ("host_pool_bytes", "u8"), ("generation", "u4"),
    ("remote_accessible", "u4"), ("role", "S16"), ("provider", "S16"), ("listener", "S80"), ("tracing", "u4"),
    ("marks_fd", "i4"), ("next_ticket", "u8"), ("dropped", "u8"), ("keys_offset", "u8"), ("caches_offset", "u8"),
    ("max_keys", "u4"), ("max_caches", "u4"), ("num_holds", "u8"),
], align=True)
OP = np.dtype([("failures", "u8"), ("bytes", "u8"), ("total_ns", "u8"), ("buckets", "u8", NUM_BUCKETS)], align=True)
PEER_HEAD = np.dtype([
    ("cluster_id", "u8"), ("used_ns", "u8"), ("num_links", "u8"), ("num_broken", "u8"), ("num_opened", "u8"),
    ("state", "u4"), ("unused", "u4"), ("peer_ip", "S64"), ("reason", "S144"),
], align=True)
EVENT = np.dtype([
    ("seq", "u8"), ("start_ns", "i8"), ("duration_ns", "i8"), ("peer", "u8"), ("id", "u8"), ("model_id", "u8"),
    ("bytes", "u8"), ("thread", "u4"), ("status", "i2"), ("kind", "u1"), ("key_kind", "u1"),
], align=True)
# The table that an engine shares with its peers, of which this is a reader like others; see core/table/shared_table.
SHARED_KEY = np.dtype([
    ("id", "u8"), ("model_id", "u8"), ("kind", "u4"), ("generation", "u4"), ("cache_slot", "u4"), ("batch_slot", "u4"),
], align=True)
SHARED_CACHE = np.dtype([
    ("cache_id", "u8"), ("num_slots", "u8"), ("tensor_bytes", "u8"), ("step", "u8"), ("base", "u8"),
    ("generation", "u4"), ("num_tensors", "u4"), ("num_keys", "u4"), ("flags", "u4"), ("born_ns", "u8"),
], align=True)
MARKS_OFFSET = 64
SHOWN_PUBLISHED, SHOWN_OWNED, SHOWN_BLOCKS, SHOWN_HOST, SHOWN_OPEN = 1, 2, 4, 8, 32


def _bounds() -> Iterator[int]:
    for index in range(8):
        yield 64 * (index + 1)
    for index in range(NUM_BUCKETS - 8):
        shift, step = divmod(index, 8)
        yield 64 * ((9 + step) << shift)


# The first duration, in ns, that is too long for each bucket.
BUCKET_BOUNDS_NS: Tuple[int, ...] = tuple(_bounds())


def quantile_ns(buckets: "np.ndarray[Any, Any]", q: float) -> float:
    """The duration below which a share `q` of what was counted lies, in ns; 0.0 where nothing was.

    Exact to the width of a bucket: 64 ns up to half a microsecond, an eighth of the value or less above.
    """
    total = int(buckets.sum())
    if total == 0:
        return 0.0
    wanted = q * total
    sums = np.cumsum(buckets)
    index = int(np.searchsorted(sums, wanted))
    index = min(index, len(BUCKET_BOUNDS_NS) - 1)
    low = BUCKET_BOUNDS_NS[index - 1] if index else 0
    inside = (wanted - (int(sums[index - 1]) if index else 0)) / max(int(buckets[index]), 1)
    return low + inside * (BUCKET_BOUNDS_NS[index] - low)


def text(value: bytes) -> str:
    """A text of the record."""
    return value.split(b"\0", 1)[0].decode("utf-8", "replace")


def names_of(events: List[str]) -> Tuple[int, ...]:
    """The numbers of these kinds of events."""
    return tuple(EVENTS.index(name) for name in events)
