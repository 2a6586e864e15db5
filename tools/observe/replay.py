"""``llm-datadist replay``: perform the calls of a recording again, with real engines in processes of this host.

What ``llm-datadist record`` wrote says of each call when it began, how long it took and how it ended. The same calls,
in the same order where it matters, give the same figures for this build and host, to be held against each other.
"""
from __future__ import annotations

import argparse
import json
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from typing import Any

from llm_datadist import __version__
from llm_datadist.tools.observe.recording import Recording, host_facts, read, sizes_of
from llm_datadist.tools.observe.replay_plan import is_replayable, plans
from llm_datadist.tools.tables import show

_START_DELAY_NS = 20_000_000            # from the last engine that is ready to the first call
# The modules that this process has, wherever it was started.
_PROGRAM = ("import json, sys; sys.path[:] = json.loads(sys.argv.pop()); "
            "from llm_datadist.tools.observe import replayer; sys.exit(replayer.main())")
_SHOWN = 20                             # outcomes that differ, in the text

Json = dict[str, Any]


class ReplayError(RuntimeError):
    """A process of the replay ended before its calls did."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("recording", metavar="FILE", help="what llm-datadist record wrote")
    parser.add_argument("--speed", choices=("recorded", "full"), default="recorded",
                        help="begin each call when the recorded one began (default), or as soon as what it waits for "
                             "is done")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Replay and compare.

    Returns
    -------
    int
        0 when every call ended as recorded, 1 when one did not, 2 when the file is no recording.
    """
    try:
        recording = read(args.recording)
    except (OSError, ValueError) as error:
        reason = f"{args.recording}: {error.strerror}" if isinstance(error, OSError) else error
        print(f"replay: {reason}", file=sys.stderr)
        return 2
    try:
        results = replay(recording, args.speed)
    except ReplayError as error:
        print(f"replay: {error}", file=sys.stderr)
        return 1
    compared = compare(recording, results)
    compared["speed"] = args.speed
    if args.json:
        print(json.dumps(compared, indent=2))
    else:
        _print(compared)
    return 1 if compared["differences"] else 0


# ------------------------------------------------------------------------------------------------------- processes

def replay(recording: Recording, speed: str) -> dict[int, tuple[int, int, str]]:
    """Perform the calls; for each that can be replayed, by its place among those, its start, end and status."""
    found = plans(recording)
    token = secrets.token_hex(4)
    pipes = [os.pipe() for _ in found]
    processes: list[subprocess.Popen[str]] = []
    with tempfile.TemporaryDirectory(prefix="llm-datadist-replay-") as folder:
        try:
            for index, plan in enumerate(found):
                plan.update(speed=speed, token=token)
                path = os.path.join(folder, f"{index}.json")
                with open(path, "w", encoding="utf-8") as out:
                    json.dump(plan, out)
                outboxes = {other: pipe[1] for other, pipe in enumerate(pipes) if other != index}
                with open(f"{path}.log", "wb") as log:
                    processes.append(subprocess.Popen(
                        [sys.executable, "-c", _PROGRAM, path, str(pipes[index][0]), json.dumps(outboxes),
                         json.dumps(sys.path)], env=_environment(plan["engine"]), stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE, stderr=log, text=True, pass_fds=[pipes[index][0], *outboxes.values()]))
            _expect(processes, "ready", folder)
            _tell(processes, f"{time.monotonic_ns() + _START_DELAY_NS}\n")
            _expect(processes, "done", folder)
            results = {}
            for index in range(len(found)):
                with open(os.path.join(folder, f"{index}.json.done"), encoding="utf-8") as source:
                    results.update({call: (start, end, status) for call, start, end, status in json.load(source)})
            _tell(processes, "end\n")
            for process in processes:
                process.wait()
            return results
        finally:
            for process in processes:
                process.kill()
                process.wait()
                for stream in (process.stdin, process.stdout):
                    if stream is not None:
                        stream.close()
            for ends in pipes:
                for fd in ends:
                    os.close(fd)


def _environment(engine: Json) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LLM_DATADIST_")}
    return {**kept, **engine["environment"], "LLM_DATADIST_PROVIDER": "host"}


def _expect(processes: list[subprocess.Popen[str]], word: str, folder: str) -> None:
    """Wait until each says `word`. One that ends instead would leave others waiting, which the caller then ends."""
    import selectors

    with selectors.DefaultSelector() as selector:
        for index, process in enumerate(processes):
            selector.register(process.stdout, selectors.EVENT_READ, index)      # type: ignore[arg-type]
        while selector.get_map():
            for key, _ in selector.select():
                line = key.fileobj.readline()                                   # type: ignore[union-attr]
                if line.strip() != word:
                    with open(os.path.join(folder, f"{key.data}.json.log"), encoding="utf-8") as log:
                        raise ReplayError(f"the process of engine {key.data} ended:\n{log.read()[-2000:]}")
                selector.unregister(key.fileobj)


def _tell(processes: list[subprocess.Popen[str]], text: str) -> None:
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(text)
        process.stdin.flush()


# ------------------------------------------------------------------------------------------------------ comparison

def compare(recording: Recording, results: dict[int, tuple[int, int, str]]) -> Json:
    """What was recorded beside what was replayed, by operation, and the calls that ended in another way."""
    sizes = [size for size, call in zip(sizes_of(recording), recording.calls) if is_replayable(call)]
    calls = [call for call in recording.calls if is_replayable(call)]
    sides: dict[str, tuple[_Side, _Side]] = defaultdict(lambda: (_Side(), _Side()))
    differences = []
    for index, call in enumerate(calls):
        start_ns, end_ns, status = results[index]
        recorded, replayed = sides[call["op"]]
        recorded.add(call["duration_ns"], sizes[index], call["status"])
        replayed.add(end_ns - start_ns, sizes[index], status)
        if status != call["status"]:
            differences.append({"call": index, "engine": call["engine"], "op": call["op"],
                                "at_s": call["start_ns"] / 1e9, "recorded": call["status"], "replayed": status})
    begun = min((start for start, _, _ in results.values()), default=0)
    ended = max((end for _, end, _ in results.values()), default=0)
    operations = []
    for op in sorted(sides):
        recorded, replayed = (side.row() for side in sides[op])
        operations.append({"op": op, "recorded": recorded, "replayed": replayed,
                           "ratio": _ratio(replayed["p50_us"], recorded["p50_us"]),
                           "rate_ratio": _ratio(replayed["gb_per_s"], recorded["gb_per_s"])})
    return {
        "recorded": {key: recording.head[key] for key in ("package", "host", "duration_s")} | {
            "providers": sorted({engine["provider"] for engine in recording.engines})},
        "replayed": {"package": __version__, "host": host_facts(), "duration_s": (ended - begun) / 1e9,
                     "providers": ["host"]},
        "engines": len(recording.engines), "calls": len(recording.calls), "left_out": len(recording.calls) - len(calls),
        "operations": operations, "differences": differences,
    }


def _ratio(replayed: float | None, recorded: float | None) -> float | None:
    return replayed / recorded if replayed and recorded else None


class _Side:
    """Calls of one operation: how long they took, and what they moved."""

    def __init__(self) -> None:
        self.durations: list[int] = []
        self.failed, self.bytes, self.busy_ns = 0, 0, 0

    def add(self, duration_ns: int, size: int, status: str) -> None:
        self.durations.append(duration_ns)
        if status != "LLM_SUCCESS":
            self.failed += 1
        elif size:
            self.bytes += size
            self.busy_ns += duration_ns

    def row(self) -> Json:
        ordered = sorted(self.durations)
        return {"count": len(ordered), "failed": self.failed, "p50_us": statistics.median(ordered) / 1e3,
                "p99_us": ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)] / 1e3, "bytes": self.bytes,
                "gb_per_s": self.bytes / self.busy_ns if self.busy_ns else None}


def _print(compared: Json) -> None:
    for side in ("recorded", "replayed"):
        facts, host = compared[side], compared[side]["host"]
        print(f"{side}: version {facts['package']}, provider {', '.join(facts['providers'])}, {host['cpus']} CPUs "
              f"({host['cpu'] or host['machine']}), kernel {host['kernel']}, Python {host['python']}; "
              f"{facts['duration_s']:.3f} s")
    print(f"{compared['calls']} calls of {compared['engines']} engines, speed: {compared['speed']}"
          + (f"; {compared['left_out']} left out" if compared["left_out"] else ""))
    heads = ("operation", "count", "failed", "p50 us", "p99 us", "GB/s", "again: failed", "p50 us", "p99 us", "GB/s",
             "p50 ratio", "GB/s ratio")
    rows = [heads] + [(
        row["op"], str(row["recorded"]["count"]), *_cells(row["recorded"]), *_cells(row["replayed"]),
        *("-" if row[name] is None else f"{row[name]:.2f}" for name in ("ratio", "rate_ratio")))
        for row in compared["operations"]]
    show(rows)
    if not compared["differences"]:
        print("every call ended as recorded")
    for each in compared["differences"][:_SHOWN]:
        print(f"{each['op']} of engine {each['engine']} at {each['at_s']:.3f} s: recorded {each['recorded']}, "
              f"replayed {each['replayed']}")
    if len(compared["differences"]) > _SHOWN:
        print(f"... and {len(compared['differences']) - _SHOWN} more calls that ended in another way: --json has them")


def _cells(side: Json) -> tuple[str, str, str, str]:
    rate = "-" if side["gb_per_s"] is None else f"{side['gb_per_s']:.2f}"
    return str(side["failed"]), f"{side['p50_us']:.1f}", f"{side['p99_us']:.1f}", rate
