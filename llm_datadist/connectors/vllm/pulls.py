"""Fetching blocks in the background: each request is one job of a few threads, and always ends."""
from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import List, Optional, Sequence, Set, Tuple

from llm_datadist import Cache, HeldBlocksKey, LLMDataDist
from llm_datadist.connectors.vllm.layout import BlocksLayout
from llm_datadist.connectors.vllm.links import Links
from llm_datadist.connectors.vllm.logger import log
from llm_datadist.connectors.vllm.metadata import Endpoint, PullOrder
from llm_datadist.status import LLMNotFoundError

__all__ = ["PullResult", "Pulls"]


@dataclass
class PullResult:
    """How the job of one request ended.

    Parameters
    ----------
    order : PullOrder
        What was asked for.
    seconds : float
        From the order to the end.
    num_bytes : int
        What arrived.
    failed_blocks : set of int
        Blocks here that did not.
    error : Exception or None
        Why.
    """

    order: PullOrder
    seconds: float = 0.0
    num_bytes: int = 0
    failed_blocks: Set[int] = field(default_factory=set)
    error: Optional[Exception] = None


class Pulls:
    """Jobs of one worker.

    Parameters
    ----------
    engine : LLMDataDist
        The engine that fetches.
    caches : sequence of (BlocksLayout, Cache)
        The KV cache; the position is the generation of its keys.
    links : Links
        Links of `engine`.
    rank : int
        Which of the other engine's workers is the counterpart.
    num_threads, chunk_bytes : int
        Jobs at once, and bytes per call.
    """

    def __init__(self, engine: LLMDataDist, caches: Sequence[Tuple[BlocksLayout, Cache]], links: Links, rank: int,
                 num_threads: int, chunk_bytes: int) -> None:
        self._manager = engine.cache_manager
        self._caches = list(caches)
        self._links = links
        self._rank = rank
        self._chunk_bytes = chunk_bytes
        self._threads = ThreadPoolExecutor(num_threads, "llm_datadist-pull")
        self._lock = threading.Lock()
        self._ended: List[PullResult] = []
        self.num_running = 0

    def start(self, order: PullOrder) -> None:
        """Have blocks fetched."""
        with self._lock:
            self.num_running += 1
        self._threads.submit(self._run, order, time.monotonic())

    def take_ended(self) -> List[PullResult]:
        """Return the jobs that ended since the last call."""
        if not self._ended:
            return []
        with self._lock:
            ended, self._ended = self._ended, []
        return ended

    def close(self) -> None:
        """Wait for the jobs that run, which their deadlines bound, and drop those that wait."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _run(self, order: PullOrder, start: float) -> None:
        result = PullResult(order)
        try:
            self._fetch(order, result)
        except Exception as error:  # whatever it was, the scheduler waits for the end of the request
            result.error = error
            log.warning("request %s: its blocks cannot be fetched from request %s of cluster %s: %s", order.request_id,
                        order.remote.request_id, order.remote.endpoints[0].cluster_id, error)
        result.seconds = time.monotonic() - start
        with self._lock:
            self.num_running -= 1
            self._ended.append(result)

    def _fetch(self, order: PullOrder, result: PullResult) -> None:
        peer = order.remote.endpoints[self._rank]
        result.failed_blocks.update(*order.dst_blocks)
        for generation, (layout, cache) in enumerate(self._caches):
            key = HeldBlocksKey(peer.cluster_id, order.remote.key, generation)
            src = _blocks_of(layout, order.src_blocks)
            dst = _blocks_of(layout, order.dst_blocks)
            if not src:
                self._release(peer, key)
                continue
            bytes_per_block = layout.block_bytes * len(layout.offsets)
            step = max(1, self._chunk_bytes // bytes_per_block)
            for first in range(0, len(src), step):
                stop = min(first + step, len(src))
                self._pull(peer, key, cache, src[first:stop], dst[first:stop], stop == len(src))
                result.num_bytes += bytes_per_block * (stop - first)
                if len(self._caches) == 1:
                    result.failed_blocks.difference_update(dst[first:stop])
        result.failed_blocks.clear()

    def _release(self, peer: Endpoint, key: HeldBlocksKey) -> None:
        try:
            self._links.call(peer, lambda: self._manager.release_blocks(key))
        except LLMNotFoundError:
            pass                                    # the lease has ended before

    def _pull(self, peer: Endpoint, key: HeldBlocksKey, cache: Cache, src: List[int], dst: List[int],
              is_last: bool) -> None:
        self._links.call(peer, lambda: self._manager.pull_blocks(key, cache, src, dst, release=is_last))


def _blocks_of(layout: BlocksLayout, block_ids: Sequence[List[int]]) -> List[int]:
    return [block for group, ids in enumerate(block_ids) if group in layout.groups for block in ids]
