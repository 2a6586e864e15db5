"""Measuring one case: both ends set up, operation and references in turn, processor time, and every byte verified."""
from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace

from llm_datadist import BlocksCacheKey, CacheKey, CacheKeyByIdAndIndex

from . import engine as engines
from .bounds import REFERENCE_TEXTS, Bounds, Ends
from .case import Case
from .channel import Channel
from .measure import Samples, interleave, repeat
from .memory import clear, fill, tensor_views, wrong_bytes
from .statistics import median, thin

_CPU_SECONDS = 0.25
_KEPT_SAMPLES = 400
_MOST_PER_CHUNK = 2000
_KEY_POOL_BYTES = 64 << 20
_MOST_KEYS = 256


class Rig:
    """Engines, caches and links of one case, on both sides. Leaving the context closes all of it.

    Parameters
    ----------
    case : Case
    peers : list of Channel
        One per link at least.
    timeout_ms : int, optional
        Time limit of a transfer.
    page_shift : int, optional
        Of the pools.
    held_caches : int, optional
        Room that the pools have besides, in caches of up to one page.
    """

    def __init__(
        self, case: Case, peers: list[Channel], timeout_ms: int = engines.SYNC_TIMEOUT_MS,
        page_shift: int = engines.PAGE_SHIFT, held_caches: int = 0,
    ) -> None:
        self.case = case
        self._timeout_ms, self._page_shift, self._held_bytes = timeout_ms, page_shift, held_caches << page_shift
        self._peers = peers[: case.num_links]
        self._stack = ExitStack()
        self._executor: ThreadPoolExecutor | None = None
        self._keys: list[Iterator[CacheKey]] = []
        self._next_id = 1

    def __enter__(self) -> Rig:
        try:
            self._open()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_exception) -> None:
        self._stack.close()

    @property
    def most_keys(self) -> int:
        """How many keys `ready` can publish at once."""
        return max(1, min(_MOST_KEYS, _KEY_POOL_BYTES // self.case.cache_bytes))

    @property
    def most_per_chunk(self) -> int:
        """How many operations may follow each other without a break."""
        return self.most_keys if self.case.operation == "pull_key" else _MOST_PER_CHUNK

    def _open(self) -> None:
        case = self.case
        is_key = case.operation == "pull_key"
        with_twin = case.path == "shm"
        self._stack.callback(self._shut_peers)
        hosts = [peer.ask("hello") for peer in self._peers]
        ports = []
        for link, peer in enumerate(self._peers):
            size = engines.pool_bytes(case, self.most_keys + 1 if is_key else 1) + self._held_bytes
            ports.append(peer.ask("open", cluster_id=link + 1, pool_bytes=size, page_shift=self._page_shift,
                                  remote_accessible=case.is_push)["port"])
        # Each pull by key reads another cache, so what it is compared with does, too.
        twin_case = replace(case, num_blocks=self.most_keys) if is_key else case
        size = engines.pool_bytes(case, case.num_links) + self._held_bytes
        size += engines.pool_bytes(twin_case, case.num_links) if with_twin else 0
        self.engine, _ = engines.open_engine(
            engines.WORKER_CLUSTER_ID, size, case.is_push, None, self._timeout_ms, self._page_shift)
        self._stack.callback(self.engine.finalize)
        self.clusters = [
            engines.cluster(link + 1, host["ip"], port) for link, (host, port) in enumerate(zip(hosts, ports))]
        engines.link(self.engine, self.clusters)
        self.memories, self.ends, self._calls = [], [], []
        for link, (peer, host) in enumerate(zip(self._peers, hosts)):
            prepared = peer.ask("prepare", case=case.to_dict(), link=link)
            memory = self._make(case)
            end = Ends(memory.addrs, prepared["addrs"], pid=host["pid"])
            if with_twin:
                end.twin = self._make(twin_case).addrs
                clear(tensor_views(end.twin, twin_case.capacity, case.block_bytes))
            if case.path == "tcp" and not is_key:
                end.reference = (host["ip"], peer.ask("reference")["port"])
            self.memories.append(memory)
            self.ends.append(end)
            self._calls.append(self._call(link, memory.cache, prepared["cache_id"]))
        self._fill_local()
        if case.num_links > 1:
            self._executor = self._stack.enter_context(ThreadPoolExecutor(case.num_links))

    def _make(self, case: Case) -> engines.Memory:
        memory = engines.Memory(self.engine, case, keys=False)
        self._stack.callback(memory.close)
        return memory

    def _fill_local(self) -> None:
        for link, memory in enumerate(self.memories):
            views = tensor_views(memory.addrs, self.case.capacity, self.case.block_bytes)
            fill(views, link) if self.case.is_push else clear(views)

    def _shut_peers(self) -> None:
        for peer in self._peers:
            peer.ask("shut")

    def _call(self, link: int, cache, remote_id: int) -> Callable[[], None]:
        """Return the call that moves everything over one link once."""
        case, manager, cluster_id = self.case, self.engine.cache_manager, link + 1
        src, dst = (blocks.tolist() for blocks in case.block_lists(link))
        if case.operation == "pull_blocks":
            key = BlocksCacheKey(cluster_id, engines.BLOCKS_MODEL_ID)
            return lambda: manager.pull_blocks(key, cache, src, dst)
        if case.operation == "push_blocks":
            key = BlocksCacheKey(cluster_id, engines.BLOCKS_MODEL_ID)
            return lambda: manager.push_blocks(key, cache, src, dst)
        if case.operation == "pull_cache":
            key = CacheKeyByIdAndIndex(cluster_id, remote_id, 0)
            return lambda: manager.pull_cache(key, cache)
        if case.operation == "push_cache":
            key = CacheKeyByIdAndIndex(cluster_id, remote_id, 0)
            return lambda: manager.push_cache(key, cache)
        return lambda: manager.pull_cache(next(self._keys[link]), cache)

    def ready(self, count: int, fill: bool = False) -> None:
        """Make the next `count` operations possible: publish what they will take, if anything."""
        if self.case.operation != "pull_key":
            return
        for peer in self._peers:
            peer.ask("publish", first_id=self._next_id, count=count, num_tensors=self.case.num_tensors,
                     slot_bytes=self.case.block_bytes, fill_first=fill)
        ids = range(self._next_id, self._next_id + count)
        self._keys = [iter([CacheKey(link + 1, req_id) for req_id in ids]) for link in range(len(self._peers))]
        self._next_id += count

    def run(self) -> None:
        """Do the operation once, over all links at the same time."""
        if self._executor is None:
            self._calls[0]()
            return
        for future in [self._executor.submit(call) for call in self._calls]:
            future.result()

    def sample(self, count: int) -> list[int]:
        """Do the operation `count` times and return the nanoseconds of each."""
        took: list[int] = []
        sampler = repeat(self._calls[0] if self._executor is None else self.run)
        while len(took) < count:
            batch = min(count - len(took), self.most_per_chunk)
            self.ready(batch)
            took += sampler(batch)
        return took

    def cpu_ns(self) -> int:
        """Processor time of all processes so far."""
        return time.process_time_ns() + sum(peer.ask("cpu")["cpu_ns"] for peer in self._peers)

    def verify(self, corrupt: bool) -> tuple[int, str]:
        """Clear the destination, move everything once, and count wrong bytes; `corrupt` damages one in between."""
        case = self.case
        views = [tensor_views(memory.addrs, case.capacity, case.block_bytes) for memory in self.memories]
        for link, peer in enumerate(self._peers):
            peer.ask("clear") if case.is_push else clear(views[link])
        self.ready(1, fill=True)
        self.run()
        found = []
        for link, peer in enumerate(self._peers):
            if case.is_push:
                answer = peer.ask("verify", corrupt=corrupt)
                found.append((answer["wrong_bytes"], answer["where"]))
                continue
            src, dst = case.block_lists(link)
            if corrupt:
                views[link][-1][dst[-1], -1] ^= 0x40
            found.append(wrong_bytes(views[link], link, src, dst))
        return sum(count for count, _ in found), next((where for count, where in found if count), "")


def measure_case(
    case: Case, peers: list[Channel], seconds: float, corrupt: bool, on_progress: Callable[[float], None]
) -> dict:
    """Measure one case.

    Returns
    -------
    dict
        The case, rates (GB/s, 1e9 bytes), latencies (microseconds), the reference and the fraction of it that was
        reached, processor seconds per GB, the verdict on the bytes, and the samples all this comes from.
    """
    with Rig(case, peers) as rig:
        bounds = Bounds.of(case, rig.ends, rig.most_keys)
        try:
            samples = interleave(rig.sample, bounds.samplers, seconds, on_progress, rig.most_per_chunk)
        finally:
            bounds.close()
        cpu = _cpu_seconds_per_gb(rig, samples)
        wrong, where = rig.verify(corrupt)
    return {**case.to_dict(), "key": case.key, "label": case.label, **_summary(case, samples), "cpu_s_per_gb": cpu,
            "wrong_bytes": wrong, "first_wrong": where}


def _cpu_seconds_per_gb(rig: Rig, samples: Samples) -> float:
    """Processor time of both processes while nothing but the operation runs."""
    left = max(3, int(_CPU_SECONDS * 1e9 / max(samples.latency(0.5), 1)))
    num_bytes, busy_ns = 0, 0
    while left > 0:
        count = min(left, rig.most_per_chunk)
        rig.ready(count)
        before = rig.cpu_ns()
        for _ in range(count):
            rig.run()
        busy_ns += rig.cpu_ns() - before
        num_bytes += count * rig.case.num_bytes
        left -= count
    return busy_ns / num_bytes


def _summary(case: Case, samples: Samples) -> dict:
    reference = samples.best_reference()
    op_ns = [each["op"] for each in samples.rounds]
    summary = {
        "num_bytes": case.num_bytes, "gb_per_s": case.num_bytes / median(op_ns), "reference": None,
        **{f"p{percent}_us": samples.latency(percent / 100) / 1e3 for percent in (50, 90, 99)},
        "num_samples": len(samples.latencies),
        "samples": {"op_ns": op_ns, "latency_ns": thin(samples.latencies, _KEPT_SAMPLES)},
    }
    if reference:
        ratios = samples.ratios(reference)
        summary.update(
            reference=REFERENCE_TEXTS[reference], fraction=median(ratios),
            references={
                REFERENCE_TEXTS[name]: case.num_bytes / median([each[name] for each in samples.rounds])
                for name in samples.rounds[0] if name != "op"
            },
        )
        summary["samples"]["fraction"] = ratios
    return summary
