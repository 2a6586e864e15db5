"""Pushing blocks while the model computes them: each request is one thread, which waits for layers and always ends.

A step of the model has one `StepLayers`, which the model's hooks tick off; the transfers of all requests of that step
follow it. A request whose other side has no room yet is pushed later, from the blocks that are kept for it.
"""
from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Deque, Dict, List, Mapping, Optional, Sequence, Tuple

from llm_datadist import Cache, HeldBlocksKey, LayerSynchronizer, LLMDataDist, LLMStatusCode, TransferWithCacheKeyConfig
from llm_datadist.connectors.vllm.block_tables import TABLE_GENERATION, BlockTables
from llm_datadist.connectors.vllm.layout import BlocksLayout
from llm_datadist.connectors.vllm.links import Links
from llm_datadist.connectors.vllm.logger import log
from llm_datadist.connectors.vllm.metadata import NULL_BLOCK, Chunk, Endpoint, PushOrder
from llm_datadist.managers.cache_task import CacheTask
from llm_datadist.status import LLMException, LLMNotFoundError

__all__ = ["PushResult", "Pushes", "StepLayers"]

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.001, 0.05      # between questions for a block table that is not there yet
_OPEN, _GIVEN_UP, _ENDED = range(3)


class StepLayers:
    """Which places of the KV cache a step of the model has filled. Safe from any thread.

    Parameters
    ----------
    places : mapping of str to (int, int)
        The blocks cache of each layer, and its place in that.
    """

    def __init__(self, places: Mapping[str, Tuple[int, int]]) -> None:
        self._places = places
        self._left: Dict[Tuple[int, int], int] = {}
        for place in places.values():
            self._left[place] = self._left.get(place, 0) + 1
        self._changed = threading.Condition()
        self._is_complete = False
        self.end_s = 0.0

    def tick(self, layer: str) -> None:
        """A layer has been computed."""
        place = self._places.get(layer)
        if place is not None:
            with self._changed:
                self._left[place] -= 1
                self._changed.notify_all()

    def complete(self) -> None:
        """The step has ended, and with it all layers."""
        with self._changed:
            self._is_complete = True
            self.end_s = time.monotonic()
            self._changed.notify_all()

    def wait(self, cache: int, place: int) -> None:
        """Return when a place is filled."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_complete or self._left.get((cache, place), 0) <= 0)


class _Synchronizer(LayerSynchronizer):
    def __init__(self, layers: StepLayers, cache: int) -> None:
        self._layers = layers
        self._cache = cache

    def synchronize_layer(self, layer_index: int, timeout_in_millis: Optional[int]) -> bool:
        """Wait until the model has computed what lies in this tensor."""
        self._layers.wait(self._cache, layer_index)
        return True


@dataclass
class PushResult:
    """How the push of one request ended; seconds from the end of its last step on."""

    order: PushOrder
    seconds: float
    num_bytes: int
    error: Optional[Exception]


@dataclass
class _Push:
    """One request; `changed` guards what follows it."""

    order: PushOrder
    changed: threading.Condition
    chunks: Deque[Tuple[Chunk, StepLayers]] = field(default_factory=deque)
    tasks: List[CacheTask] = field(default_factory=list)
    round: int = 0                  # how often it began anew
    state: int = _OPEN
    deadline_s: Optional[float] = None
    finished: bool = False          # whether the scheduler waits for the end


class Pushes:
    """Requests that one worker pushes. Orders come from its main thread.

    Parameters
    ----------
    engine : LLMDataDist
        The engine; remote access to caches is enabled.
    caches : sequence of (BlocksLayout, Cache)
        The KV cache; the position is the generation of its keys.
    places : mapping of str to (int, int)
        The blocks cache of each layer, and its place in that.
    tables : BlockTables
        Slots for block tables.
    links : Links
        Links of `engine`.
    rank : int
        Which of the other engine's workers is the counterpart.
    lease_ms : int
        How long the blocks of a computed prompt are kept for an engine that does not tell where they go.
    """

    def __init__(self, engine: LLMDataDist, caches: Sequence[Tuple[BlocksLayout, Cache]],
                 places: Mapping[str, Tuple[int, int]], tables: BlockTables, links: Links, rank: int,
                 lease_ms: int) -> None:
        self._manager = engine.cache_manager
        self._caches = list(caches)
        self._places = dict(places)
        self._tables = tables
        self._links = links
        self._rank = rank
        self._lease_s = lease_ms / 1000
        self._pushes: Dict[str, _Push] = {}
        self._lock = threading.Lock()
        self._results: List[PushResult] = []
        self._step: Optional[StepLayers] = None

    def __len__(self) -> int:
        return len(self._pushes)

    # ------------------------------------------------------------------------------------- the worker's main thread

    def start(self, order: PushOrder) -> None:
        """Have the blocks of a request pushed as they come."""
        push = _Push(order, threading.Condition())
        self._pushes[order.request_id] = push
        threading.Thread(target=self._run, args=(push,), name="llm_datadist-push", daemon=True).start()

    def restart(self, request_id: str) -> None:
        """It lost its blocks, and is computed anew. Nothing reads the old ones once this has returned."""
        push = self._pushes.get(request_id)
        if push is not None:
            self._stop(push, _OPEN)

    def drop(self, request_id: str) -> None:
        """It was aborted. Nothing reads its blocks once this has returned."""
        push = self._pushes.pop(request_id, None)
        if push is not None:
            self._stop(push, _GIVEN_UP)

    def _stop(self, push: _Push, state: int) -> None:
        with push.changed:
            push.chunks.clear()
            push.round += 1
            push.state = max(push.state, state)
            tasks = list(push.tasks)
            push.changed.notify_all()
        for task in tasks:
            task.cancel()

    def finish(self, request_id: str) -> None:
        """Its prompt was computed; the scheduler waits for the end of the push."""
        push = self._pushes.get(request_id)
        if push is not None:
            with push.changed:
                push.finished = True
                push.deadline_s = time.monotonic() + self._lease_s
                push.changed.notify_all()

    def begin_step(self, chunks: Sequence[Chunk]) -> None:
        """A step computes these blocks."""
        if self._step is not None:                      # of a step that was not ended
            self._step.complete()
        self._step = StepLayers(self._places) if chunks else None
        for chunk in chunks:
            push = self._pushes.get(chunk.request_id)
            if push is not None and self._step is not None:
                with push.changed:
                    push.chunks.append((chunk, self._step))
                    push.changed.notify_all()

    def tick(self, layer: str) -> None:
        """A layer of this step has been computed."""
        if self._step is not None:
            self._step.tick(layer)

    def end_step(self) -> None:
        """All of them have."""
        if self._step is not None:
            self._step.complete()
            self._step = None

    def take_ended(self) -> Tuple[List[str], List[PushResult]]:
        """Return the requests that ended and that the scheduler waits for, and how pushes ended since the last call."""
        if not self._pushes and not self._results:
            return [], []
        with self._lock:
            results, self._results = self._results, []
        sent = [request_id for request_id, push in self._pushes.items() if push.state == _ENDED and push.finished]
        for request_id in sent:
            del self._pushes[request_id]
        return sent, results

    def close(self) -> None:
        """Give up what is not pushed yet."""
        self.end_step()
        for request_id in list(self._pushes):
            self.drop(request_id)

    # --------------------------------------------------------------------------------------------- a request's thread

    def _run(self, push: _Push) -> None:
        result = PushResult(push.order, 0.0, 0, None)
        peer = push.order.endpoints[self._rank]
        try:
            self._serve(push, peer, result)
        except Exception as error:  # whatever it was, the scheduler waits for the end of the request
            result.error = error
            if push.state != _GIVEN_UP:
                log.warning("request %s: its blocks cannot be pushed to cluster %s: %s", push.order.request_id,
                            peer.cluster_id, error)
            self._refuse(push, peer)
        with push.changed:
            push.state = _ENDED
        with self._lock:
            self._results.append(result)

    def _serve(self, push: _Push, peer: Endpoint, result: PushResult) -> None:
        table = self._fetch_table(push, peer)
        pairs: Dict[int, Tuple[List[int], List[int]]]
        left: List[int] = []
        serving = -1
        while True:
            with push.changed:
                if push.round != serving:
                    serving, left, result.num_bytes = push.round, self._num_needed(table), 0
                if not any(left):
                    return
                push.changed.wait_for(lambda: push.chunks or push.state != _OPEN)
                if push.state != _OPEN:
                    raise _GivenUp
                if push.round != serving:
                    continue
                chunk, layers = push.chunks.popleft()
                pairs = {cache: self._pair(layout, chunk, table) for cache, (layout, _) in enumerate(self._caches)}
                push.tasks = []
                for cache, (src, dst) in pairs.items():
                    left[cache] -= len(dst)
                    if dst:
                        push.tasks.append(self._send(push, peer, cache, src, dst, layers, left[cache] <= 0))
            for task in push.tasks:
                self._wait(push, serving, task)
            result.num_bytes += sum(len(dst) * self._caches[cache][0].block_bytes
                                    * len(self._caches[cache][0].offsets) for cache, (_, dst) in pairs.items())
            if chunk.is_last and any(left) and push.round == serving:
                raise LLMException(f"{left} blocks of the other side are none of this prompt")
            result.seconds = time.monotonic() - layers.end_s if layers.end_s else 0.0

    def _send(self, push: _Push, peer: Endpoint, cache: int, src: List[int], dst: List[int], layers: StepLayers,
              is_last: bool) -> CacheTask:
        places = range(len(self._caches[cache][0].offsets))
        key = HeldBlocksKey(peer.cluster_id, push.order.transfer_id, cache)
        config = TransferWithCacheKeyConfig(key, places, places, release=is_last)
        return self._manager.transfer_cache_async(self._caches[cache][1], _Synchronizer(layers, cache), [config], src,
                                                  dst, tensor_num_per_layer=1)

    def _wait(self, push: _Push, serving: int, task: CacheTask) -> None:
        if task.synchronize() == LLMStatusCode.LLM_SUCCESS or push.round != serving:
            return
        error = task.exception()
        raise error if isinstance(error, Exception) else LLMException("a push ended early")

    def _fetch_table(self, push: _Push, peer: Endpoint) -> Tuple[List[int], ...]:
        """Where the blocks go, as soon as the other side has room for them."""
        key = HeldBlocksKey(peer.cluster_id, push.order.transfer_id, TABLE_GENERATION)
        pause_s = _FIRST_PAUSE_S
        while True:
            slot = self._tables.take_slot()
            if slot is not None:
                try:
                    return self._links.call(peer, lambda slot=slot: self._tables.fetch(slot, key))  # type: ignore[misc]
                except LLMNotFoundError:
                    if push.deadline_s is not None and time.monotonic() > push.deadline_s:
                        raise
                finally:
                    self._tables.free_slot(slot)
            with push.changed:
                push.changed.wait_for(lambda: push.state != _OPEN, pause_s)
                if push.state != _OPEN:
                    raise _GivenUp
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _num_needed(self, table: Sequence[Sequence[int]]) -> List[int]:
        return [sum(block != NULL_BLOCK for group in layout.groups for block in table[group])
                for layout, _ in self._caches]

    @staticmethod
    def _pair(layout: BlocksLayout, chunk: Chunk, table: Sequence[Sequence[int]]) -> Tuple[List[int], List[int]]:
        """Pair the blocks of a chunk by position, without those that the other side does not need."""
        src: List[int] = []
        dst: List[int] = []
        for group in sorted(layout.groups):
            first = chunk.first[group]
            for here, there in zip(chunk.blocks[group], table[group][first:]):
                if NULL_BLOCK not in (here, there):
                    src.append(here)
                    dst.append(there)
        return src, dst

    def _refuse(self, push: _Push, peer: Endpoint) -> None:
        """Tell the other side that nothing comes, so that it need not wait."""
        for generation in (TABLE_GENERATION, *range(len(self._caches))):
            try:
                self._manager.release_blocks(HeldBlocksKey(peer.cluster_id, push.order.transfer_id, generation))
            except LLMException:
                continue                                # it has ended, or the other side is gone


class _GivenUp(Exception):
    """The request was aborted."""
