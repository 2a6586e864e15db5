"""Events of several engines on one time line, as a file that Perfetto opens (the JSON trace format).

Engines on one host share a clock. Others are aligned by the requests they exchanged: both ends of a link record each
under the same number, and the exchange whose way took least bounds the difference of the clocks best. Where none was
recorded, the wall clocks have to do.
"""
from __future__ import annotations

import gzip
import json
import os
from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np

from llm_datadist.observe import layout
from llm_datadist.observe.records import Record

__all__ = ["Recording", "clock_offsets", "trace_events", "write_trace"]

_PULL, _PUSH, _TURN, _ASK, _ANSWER, _SERVE, _KEY_GONE, _CONTEXT = layout.names_of(
    ["pull", "push", "turn", "ask", "answer", "serve", "key_gone", "context"])
_INSTANTS = set(layout.names_of(["refuse", "accept", "break", "unlink", "allocate", "layer", "key_gone", "free"]))
_SERVICE_THREAD = set(layout.names_of(["answer", "accept"]))


@dataclass
class Recording:
    """The events of one engine, taken out of its record."""

    cluster_id: int
    role: str
    pid: int
    boot_id: str
    wall_offset_ns: int
    events: "np.ndarray[Any, Any]"
    num_lost: int
    thread_names: Dict[int, str] = field(default_factory=dict)

    @classmethod
    def of(cls, record: Record, since_ns: int = 0) -> "Recording":
        """What a record holds now, but for what ended before `since_ns`."""
        events, lost = record.events()
        if since_ns:
            events = events[events["start_ns"] + events["duration_ns"] >= since_ns]
        return cls(record.cluster_id, record.head()["role"], record.pid or record.own_pid, record.boot_id,
                   record.wall_offset_ns, events, lost, _thread_names(record.pid))


def _thread_names(pid: Optional[int]) -> Dict[int, str]:
    names: Dict[int, str] = {}
    if pid is None:
        return names
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/comm", encoding="utf-8", errors="replace") as source:
                names[int(thread)] = source.read().strip()
    except OSError:
        pass
    return names


def write_trace(path: "os.PathLike[str] | str", recordings: Sequence[Recording]) -> Dict[str, int]:
    """Write recordings as one file, compressed if its name ends in ``.gz``.

    Returns
    -------
    dict
        ``engines``, ``events``, ``flows``, and ``lost``: events that were overwritten before they were read.
    """
    entries = list(trace_events(recordings))
    document = {"displayTimeUnit": "ns", "traceEvents": entries,
                "otherData": {"producer": "llm_datadist", "lost_events": sum(each.num_lost for each in recordings)}}
    opened = gzip.open(path, "wt", encoding="utf-8") if os.fspath(path).endswith(".gz") else open(
        path, "w", encoding="utf-8")
    with opened as out:
        json.dump(document, out, separators=(",", ":"))
    return {"engines": len(recordings), "events": sum(len(each.events) for each in recordings),
            "flows": sum(entry["ph"] == "s" for entry in entries), "lost": sum(each.num_lost for each in recordings)}


# ------------------------------------------------------------------------------------------------------------ clocks

def clock_offsets(recordings: Sequence[Recording]) -> List[int]:
    """What to add to the times of each recording, in ns, so that they are those of the first one's clock."""
    offsets: List[Optional[int]] = [None] * len(recordings)
    while None in offsets:
        start = offsets.index(None)
        # The first of each group that nothing connects with what came before goes by the wall clock.
        offsets[start] = (0 if start == 0 else
                          recordings[start].wall_offset_ns - recordings[0].wall_offset_ns)
        ready = [start]
        while ready:
            here = ready.pop()
            for there in range(len(recordings)):
                if offsets[there] is None:
                    difference = _difference(recordings[here], recordings[there])
                    if difference is not None:
                        offsets[there] = (offsets[here] or 0) + difference
                        ready.append(there)
    return [offset or 0 for offset in offsets]


def _difference(here: Recording, there: Recording) -> Optional[int]:
    """What to add to the clock of `there` to get that of `here`; None where nothing tells."""
    if here.boot_id and here.boot_id == there.boot_id:
        return 0
    measured = list(_exchanges(here, there)) + [(way, -offset) for way, offset in _exchanges(there, here)]
    return min(measured)[1] if measured else None


def _exchanges(asker: Recording, answerer: Recording) -> Iterator[Tuple[int, int]]:
    """For each request that both recorded: ns it spent on the way, and what to add to the answerer's clock."""
    answers: Dict[Tuple[int, int], List[Tuple[int, int]]] = defaultdict(list)
    for event in answerer.events[(answerer.events["kind"] == _ANSWER)
                                 & (answerer.events["peer"] == asker.cluster_id)]:
        answers[int(event["id"]), int(event["model_id"])].append((int(event["start_ns"]), int(event["duration_ns"])))
    by_wall = answerer.wall_offset_ns - asker.wall_offset_ns
    for event in asker.events[(asker.events["kind"] == _ASK) & (asker.events["peer"] == answerer.cluster_id)]:
        start, duration = int(event["start_ns"]), int(event["duration_ns"])
        candidates = [
            (duration - took, start + duration // 2 - (began + took // 2))
            for began, took in answers.get((int(event["id"]), int(event["model_id"])), ()) if took <= duration]
        if candidates:                              # numbers begin anew with each link: the likeliest of those alike
            yield min(candidates, key=lambda found: abs(found[1] - by_wall))


# ------------------------------------------------------------------------------------------------------------ events

def trace_events(recordings: Sequence[Recording]) -> Iterator[Dict[str, Any]]:
    """The entries of the JSON trace format: processes, threads, slices, lives of keys, and flows between them."""
    offsets = clock_offsets(recordings)
    starts = [int(each.events["start_ns"].min()) + offset
              for each, offset in zip(recordings, offsets) if len(each.events)]
    origin = min(starts) if starts else 0
    contexts = [_contexts(recording) for recording in recordings]
    recordings = [replace(each, events=each.events[each.events["kind"] != _CONTEXT]) for each in recordings]
    slices = [[_slice(index, event, offset - origin) for event in recording.events]
              for index, (recording, offset) in enumerate(zip(recordings, offsets))]
    for recording, own, known in zip(recordings, slices, contexts):
        _add_contexts(recording, own, known)
    flows = list(_flows(recordings, slices))
    for index, (recording, offset) in enumerate(zip(recordings, offsets)):
        yield from _names(index, recording)
        yield from slices[index]
        yield from _lives(index, recording, offset - origin)
    yield from flows


def _contexts(recording: Recording) -> Dict[Tuple[int, int, int], Dict[str, str]]:
    """The trace of what began at that time, by thread, start and peer."""
    return {(int(event["thread"]), int(event["start_ns"]), int(event["peer"])):
            {"trace_id": f"{int(event['id']):016x}{int(event['model_id']):016x}",
             "parent_id": f"{int(event['bytes']):016x}"}
            for event in recording.events[recording.events["kind"] == _CONTEXT]}


def _add_contexts(recording: Recording, own: List[Dict[str, Any]],
                  known: Dict[Tuple[int, int, int], Dict[str, str]]) -> None:
    """Name the trace of each transfer that has one, and of what its thread did within it."""
    if not known:
        return
    within: Dict[int, Tuple[int, Dict[str, str]]] = {}      # thread -> end of its transfer, and the trace
    for event, entry in sorted(zip(recording.events, own), key=lambda each: (
            int(each[0]["start_ns"]), -int(each[0]["duration_ns"]))):
        thread, start_ns = int(event["thread"]), int(event["start_ns"])
        trace = known.get((thread, start_ns, int(event["peer"])))
        end_ns, outer = within.get(thread, (0, {}))
        if trace is not None and int(event["kind"]) in (_PULL, _PUSH, _SERVE):
            within[thread] = start_ns + int(event["duration_ns"]), trace
        elif start_ns <= end_ns:
            trace = outer
        else:
            continue
        entry["args"].update(trace)


def _names(index: int, recording: Recording) -> Iterator[Dict[str, Any]]:
    role = {"prompt": "prefill", "decoder": "decode"}.get(recording.role, recording.role)
    yield {"ph": "M", "name": "process_name", "pid": index + 1,
           "args": {"name": f"{role} cluster {recording.cluster_id} (pid {recording.pid})"}}
    yield {"ph": "M", "name": "process_sort_index", "pid": index + 1, "args": {"sort_index": index}}
    for thread in sorted({int(thread) for thread in recording.events["thread"]}):
        kinds = {int(kind) for kind in recording.events["kind"][recording.events["thread"] == thread]}
        name = recording.thread_names.get(thread, "thread")
        name = "service" if kinds & _SERVICE_THREAD else "main" if thread == recording.pid else name
        yield {"ph": "M", "name": "thread_name", "pid": index + 1, "tid": thread, "args": {"name": f"{name} {thread}"}}


def _us(time_ns: int) -> float:
    return round(time_ns / 1e3, 3)


def _key_text(event: Any) -> str:
    kind = layout.KEY_KINDS[min(int(event["key_kind"]), len(layout.KEY_KINDS) - 1)]
    if kind == "blocks":
        return f"blocks, model {int(event['model_id'])}"
    more = f", model {int(event['model_id'])}" if event["model_id"] and kind != "id" else ""
    return f"{'cache' if kind == 'id' else kind} {int(event['id'])}{more}"


def _slice(index: int, event: Any, shift_ns: int) -> Dict[str, Any]:
    kind = int(event["kind"])
    name = layout.EVENTS[kind] if kind < len(layout.EVENTS) else f"event {kind}"
    end_ns = int(event["start_ns"]) + int(event["duration_ns"])
    start_ns = end_ns if kind in _INSTANTS else int(event["start_ns"])
    if kind == _TURN:
        start_ns += 1                               # an arrow that begins with the pull is to begin at the pull
    args: Dict[str, Any] = {}
    if event["peer"]:
        args["peer"] = int(event["peer"])
    if event["bytes"]:
        args["bytes"] = int(event["bytes"])
    if kind in (_PULL, _PUSH, _SERVE, _KEY_GONE) or name == "refuse":
        args["key"] = _key_text(event)
        if event["key_kind"] in (0, 4):
            args["request_id"] = int(event["id"])
    elif kind in (_ASK, _ANSWER):
        args["request"] = int(event["id"])
        name = f"{name} {layout.FRAMES.get(int(event['model_id']), int(event['model_id']))}"
    elif name in ("allocate", "free"):
        args["cache_id"] = int(event["id"])
    elif name == "layer":
        args["layer"] = int(event["id"])
    if kind == _KEY_GONE:
        name = "release key" if event["status"] == 0 else "key ended unread"
    if event["status"]:
        args["status"] = int(event["status"])
    if kind in (_KEY_GONE,) or name == "free":
        args["held_ms"] = int(event["duration_ns"]) / 1e6
    return {"ph": "X", "cat": layout.EVENTS[kind] if kind < len(layout.EVENTS) else "event", "name": name,
            "pid": index + 1, "tid": int(event["thread"]), "ts": _us(start_ns + shift_ns),
            "dur": max(end_ns - start_ns, 1) / 1e3, "args": args}


def _lives(index: int, recording: Recording, shift_ns: int) -> Iterator[Dict[str, Any]]:
    """From its allocation to its release, the life of each key that ended meanwhile."""
    for number, event in enumerate(recording.events[recording.events["kind"] == _KEY_GONE]):
        common = {"cat": "key", "name": _key_text(event), "pid": index + 1, "id": f"{index + 1}.{number}"}
        start_ns = int(event["start_ns"]) + shift_ns
        yield {"ph": "b", "ts": _us(start_ns), **common}
        yield {"ph": "e", "ts": _us(start_ns + int(event["duration_ns"])), **common}


def _flows(recordings: Sequence[Recording], slices: List[List[Dict[str, Any]]]) -> Iterator[Dict[str, Any]]:
    """Arrows from each pull to what it made its owner do, and from each request to its answer."""
    wanted = {_SERVE: "served", _KEY_GONE: "released", _ANSWER: "answered"}
    targets: Dict[Tuple[Any, ...], List[Dict[str, Any]]] = defaultdict(list)
    for recording, own in zip(recordings, slices):
        for event, entry in zip(recording.events, own):
            kind = int(event["kind"])
            if kind in wanted:
                asker = int(event["peer"]) if kind != _KEY_GONE else None
                key_kind = int(event["key_kind"])
                targets[recording.cluster_id, kind, asker, key_kind, int(event["id"]), int(event["model_id"])].append(
                    entry)
    number = 0
    for recording, own in zip(recordings, slices):
        for event, entry in zip(recording.events, own):
            kind, owner = int(event["kind"]), int(event["peer"])
            ends = (_SERVE, _KEY_GONE) if kind == _PULL else (_ANSWER,) if kind == _ASK else ()
            for end in ends:
                asker = recording.cluster_id if end != _KEY_GONE else None
                found = targets.get((owner, end, asker, int(event["key_kind"]), int(event["id"]),
                                     int(event["model_id"])), ())
                target = _after(found, entry["ts"], entry["ts"] + entry["dur"] if end == _ANSWER else None)
                if target is not None:
                    number += 1
                    # An owner whose memory was read was not asked: that a key went is all it knows, and whose pull it
                    # was is known from the other side.
                    target["args"].update({name: entry["args"][name] for name in ("trace_id", "parent_id")
                                           if name in entry["args"]})
                    common = {"cat": "flow", "name": wanted[end], "id": number}
                    # Perfetto binds an end to the slice around it, and draws arrows forward in time.
                    yield {"ph": "s", "pid": entry["pid"], "tid": entry["tid"], "ts": entry["ts"], **common}
                    yield {"ph": "f", "bp": "e", "pid": target["pid"], "tid": target["tid"], "ts": target["ts"],
                           **common}


def _after(found: Sequence[Dict[str, Any]], start: float, end: Optional[float]) -> Optional[Dict[str, Any]]:
    """The first of them that begins at or after `start`, and before `end`, if given."""
    later = [each for each in found if each["ts"] >= start and (end is None or each["ts"] <= end)]
    return min(later, key=lambda each: float(each["ts"])) if later else None
