"""What the processes of the soak run do: random operations whose every byte is checked.

A key's number says which bytes it must bring, whoever pulls it and whenever, so that no process has to know what the
others did. Numbers are never used twice: their upper half is the incarnation of the owner.
"""
from __future__ import annotations

import contextlib
import os
import random
import socket
import stat
import time
from collections import Counter
from typing import Any, Dict, List, Tuple

import numpy as np
from support.link_steps import link, unlink

from llm_datadist import CacheDesc, CacheKey, DataType, LLMException, LLMStatusCode

WORDS, TENSORS = 700, 3
DESC = CacheDesc(TENSORS, [1, WORDS], DataType.DT_UINT64)
WINDOW = 12                                     # keys that an owner offers at a time
MARK = 2**64 - 0x5A5A
NO_PREFIX = 2**64 - 1
Target = Tuple[int, Tuple[str, int]]
FAILURES = {                                    # what a call may say while others are killed, stopped and cut off
    LLMStatusCode.LLM_KV_CACHE_NOT_EXIST, LLMStatusCode.LLM_NOT_YET_LINK, LLMStatusCode.LLM_TIMEOUT,
    LLMStatusCode.LLM_LINK_FAILED, LLMStatusCode.LLM_ALREADY_LINK, LLMStatusCode.LLM_PROCESSING_LINK,
}


def board(path: str) -> Any:
    """The newest number that each cluster has offered, for all processes to read."""
    return np.memmap(path, dtype=np.uint64, mode="r+", shape=(64,))


def expected(number: int, tensor: int) -> Any:
    """The bytes of one tensor of a key."""
    return (np.arange(WORDS, dtype=np.uint64) * np.uint64(2 * tensor + 3)
            + np.uint64(number * 0x9E3779B97F4A7C15 & 2**64 - 1))


def key_of(cluster_id: int, number: int) -> CacheKey:
    """Every third key is a prefix, which a pull does not take."""
    return CacheKey(cluster_id, NO_PREFIX, 0, number) if number % 3 == 0 else CacheKey(cluster_id, number, 0)


def work(node: Any, path: str, cluster_id: int, incarnation: int, targets: List[Target], seed: int,
         seconds: float) -> Tuple[Dict[str, int], List[str]]:
    """Do random things for a while; return how often each was done, and everything that was wrong."""
    worker = _Worker(node, path, cluster_id, incarnation, targets, random.Random(seed))
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        worker.step()
    worker.check_marks()
    return dict(worker.counts), worker.faults[:5]


class _Worker:
    """One turn of one process; what lasts is in ``node.kept``."""

    def __init__(self, node: Any, path: str, cluster_id: int, incarnation: int, targets: List[Target],
                 rng: random.Random) -> None:
        self.node, self.told, self.cluster_id, self.targets, self.rng = node, board(path), cluster_id, targets, rng
        self.manager = node.cache_manager
        self.offered: List[int] = node.kept.setdefault("offered", [])
        self.next = node.kept.setdefault("next", (incarnation << 32) + 1)
        self.counts: Counter = Counter()
        self.faults: List[str] = []
        self.marked: List[Tuple[Any, Any]] = []

    def step(self) -> None:
        """One operation."""
        kinds = {self.offer: 300, self.pull: 650, self.link: 40, self.unlink: 5, self.cut: 2}
        action, = self.rng.choices(list(kinds), list(kinds.values()))
        try:
            action()
            self.counts[action.__name__] += 1
        except LLMException as error:
            self.counts[f"{action.__name__}: {error.status_code.name}"] += 1
            if error.status_code not in FAILURES:
                self.faults.append(f"cluster {self.cluster_id}: {action.__name__}: {error}")

    def offer(self) -> None:
        """Bind a key to new bytes, and take back the oldest, which may have been pulled."""
        if len(self.offered) >= WINDOW:
            self.manager.remove_cache_key(key_of(self.cluster_id, self.offered.pop(0)))
        number, self.next = self.next, self.next + 1
        self.node.kept["next"] = self.next
        cache = self.manager.allocate_cache(DESC, [key_of(self.cluster_id, number)])
        for index, tensor in enumerate(cache.tensors()):
            tensor[:] = expected(number, index).reshape(tensor.shape)
        self.manager.deallocate_cache(cache)                    # the key keeps it
        self.offered.append(number)
        self.told[self.cluster_id] = number

    def pull(self) -> None:
        """Pull a recent key of another process, and look at every byte."""
        cluster_id, _ = self.rng.choice(self.targets)
        number = int(self.told[cluster_id]) - self.rng.randrange(WINDOW)
        if number & 0xFFFFFFFF == 0 or number <= 0:
            return
        cache = self.manager.allocate_cache(DESC)
        views = cache.tensors()
        try:
            self.manager.pull_cache(key_of(cluster_id, number), cache)
        except LLMException:
            for tensor in views:
                tensor[:] = MARK
            self.marked.append((cache, views))                  # nothing may land there any more
            if len(self.marked) >= 16:
                self.check_marks()
            raise
        for index, tensor in enumerate(views):
            if not np.array_equal(np.asarray(tensor).reshape(-1), expected(number, index)):
                self.faults.append(f"cluster {self.cluster_id}: wrong bytes in tensor {index} of key {number:#x}")
        self.manager.deallocate_cache(cache)

    def check_marks(self) -> None:
        """What failed has not written since, and is given back."""
        for cache, views in self.marked:
            if any((tensor != MARK).any() for tensor in views):
                self.faults.append(f"cluster {self.cluster_id}: bytes landed after a call had failed")
            self.manager.deallocate_cache(cache)
        self.marked.clear()

    def link(self) -> None:
        """Link to another process; whether that was so before is its state's matter."""
        self.counts[f"link gives {link(self.node, self.rng.choice(self.targets), timeout_ms=2000)[0].name}"] += 1

    def unlink(self) -> None:
        """End a link."""
        unlink(self.node, self.rng.choice(self.targets), timeout_ms=2000, force=self.rng.random() < 0.5)

    def cut(self) -> None:
        """Shut one TCP connection of this process down, as a network would, whatever it is for."""
        files = [int(name) for name in os.listdir("/proc/self/fd")]
        self.rng.shuffle(files)
        for number in files:
            with contextlib.suppress(OSError):
                if not stat.S_ISSOCK(os.fstat(number).st_mode):
                    continue
                with socket.fromfd(number, socket.AF_INET, socket.SOCK_STREAM) as connection:
                    if connection.getsockopt(socket.SOL_SOCKET, socket.SO_DOMAIN) == socket.AF_INET:
                        connection.getpeername()                        # fails for one that listens
                        connection.shutdown(socket.SHUT_RDWR)
                        return


def clear(node: Any, cluster_id: int, targets: List[Target]) -> None:
    """Give everything back: keys, and links."""
    for number in node.kept.pop("offered", []):
        node.cache_manager.remove_cache_key(key_of(cluster_id, number))
    for target in targets:
        with contextlib.suppress(LLMException):
            unlink(node, target, timeout_ms=2000, force=True)


def footprint(node: Any) -> Tuple[int, int]:
    """Open files, and memory in use in KiB."""
    with open("/proc/self/status", encoding="ascii") as status:
        resident = next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))
    return len(os.listdir("/proc/self/fd")), resident
