"""Several processes do random things to each other's caches for hours, while they are killed, stopped and cut off.

``make soak HOURS=2``, or ``python soak/run.py HOURS [SEED]`` from ``tests/``. Every turn each process works for a
moment, at the same time as the others; one of them may be killed and started anew, or stand still for a while. What is
wrong ends the run with the seed: wrong bytes, bytes that land after a failure, a failure that has no reason, a process
that dies or hangs, and, at every stock-taking, caches, keys and pins that are still there when all was given back.
"""
from __future__ import annotations

import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, Dict, List

sys.path.append(str(Path(__file__).resolve().parent.parent))
from soak import steps
from support.link_steps import stopped
from support.peer import Child, PeerError, Peers, engine_options

CLUSTERS = (1, 2, 3, 4)
PATHS = ({}, {"LLM_DATADIST_HOST_PATHS": "cma,tcp"}, {"LLM_DATADIST_HOST_PATHS": "tcp"})
TURN_S = 1.0
STOCK_TURNS = 30                # turns between two stock-takings
TIMEOUT_MS = 2000


class Soak:
    """The processes, and what they did."""

    def __init__(self, peers: Peers, path: str, seed: int) -> None:
        self.peers, self.path, self.rng = peers, path, random.Random(seed)
        self.counts: Counter = Counter()
        self.running: Dict[int, Child] = {}
        self.incarnation = 0
        self.incarnations: Dict[int, int] = {}
        for cluster_id in CLUSTERS:
            self.start(cluster_id)

    def start(self, cluster_id: int) -> None:
        """Start a process, or the next of that name."""
        self.incarnation += 1
        self.incarnations[cluster_id] = self.incarnation
        options = engine_options(timeout_ms=TIMEOUT_MS)
        self.running[cluster_id] = self.peers.start(cluster_id, options, env=self.rng.choice(PATHS))

    def targets(self, cluster_id: int) -> List[steps.Target]:
        """Where the others are."""
        return [(other, child.address) for other, child in self.running.items() if other != cluster_id]

    def turn(self) -> None:
        """All work at the same time, and one thing happens to one of them."""
        pending = {}
        for cluster_id, child in self.running.items():
            pending[cluster_id] = child.begin(steps.work, self.path, cluster_id, self.incarnations[cluster_id],
                                              self.targets(cluster_id), self.rng.randrange(2**32), TURN_S)
        victim = self.rng.choice(CLUSTERS)
        event = self.rng.choices(["nothing", "kill", "stop", "long stop"], [60, 20, 15, 5])[0]
        time.sleep(self.rng.random() * TURN_S)
        if event == "kill":
            self.running[victim].kill()
        elif event != "nothing":
            with stopped(self.running[victim]):
                time.sleep(0.2 if event == "stop" else TIMEOUT_MS / 1000 + 0.5)
        self.counts[event] += 1
        for cluster_id, finish in pending.items():
            try:
                counts, faults = finish()
            except PeerError:
                if event == "kill" and cluster_id == victim:
                    continue
                raise
            self.counts.update(counts)
            assert not faults, "\n".join(faults)
        if event == "kill":
            self.start(victim)

    def take_stock(self) -> str:
        """All is given back, and nothing is left."""
        for cluster_id, child in self.running.items():
            child.call(steps.clear, cluster_id, self.targets(cluster_id))
        texts = []
        for cluster_id, child in self.running.items():
            stats = child.settled()
            held = {name: stats[name] for name in ("caches", "keys", "pins", "holds") if stats[name]}
            pool = stats["device_pool"]
            assert not held and pool["free_bytes"] == pool["bytes"], f"cluster {cluster_id} still holds {held}, {pool}"
            files, resident = child.call(steps.footprint)
            texts.append(f"{files} files {resident >> 10} MiB")
        return "; ".join(texts)


def main(hours: float, seed: int) -> None:
    """Run for so long, and say what was done."""
    start, turns = time.monotonic(), 0
    print(f"seed {seed}, {hours} hours, {len(CLUSTERS)} processes", flush=True)
    with tempfile.TemporaryDirectory() as folder, Peers() as peers:
        path = str(Path(folder) / "board")
        Path(path).write_bytes(bytes(64 * 8))
        soak: Any = Soak(peers, path, seed)
        while time.monotonic() - start < hours * 3600:
            soak.turn()
            turns += 1
            if turns % STOCK_TURNS == 0:
                print(f"{time.monotonic() - start:7.0f} s, {turns} turns, {soak.counts['pull']} pulls, "
                      f"{soak.counts['kill']} kills, {soak.counts['cut']} cuts; {soak.take_stock()}", flush=True)
        soak.take_stock()
    for name, count in sorted(soak.counts.items()):
        print(f"{count:10} {name}")
    print("every byte was right, and nothing was left")


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 1.0,
         int(sys.argv[2]) if len(sys.argv) > 2 else random.SystemRandom().randrange(2**32))
