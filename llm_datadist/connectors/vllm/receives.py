"""Blocks that another engine pushes into: who is awaited, and how it ended."""
from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import Deque, Dict, List, Sequence, Set, Tuple

from llm_datadist import Cache, HeldBlocksKey, KeyEvent, KeyOutcome, LLMDataDist
from llm_datadist.connectors.vllm.block_tables import TABLE_GENERATION, BlockTables
from llm_datadist.connectors.vllm.layout import BlocksLayout
from llm_datadist.connectors.vllm.logger import log
from llm_datadist.connectors.vllm.metadata import NULL_BLOCK, Expectation

__all__ = ["ReceiveResult", "Receives"]


@dataclass
class ReceiveResult:
    """How an expectation ended; as `PullResult`, `num_bytes` is what arrived for certain."""

    order: Expectation
    arrived: bool
    seconds: float
    num_bytes: int


@dataclass
class _Awaited:
    order: Expectation
    start: float
    num_bytes: int
    slot: int = -1
    keys: Set[int] = field(default_factory=set)         # generations that have not ended, of blocks and of the table
    arrived: bool = True


class Receives:
    """The requests whose blocks come by pushes. For the worker's main thread.

    Whoever pushes reads where the blocks are, writes them, and ends their keys; that is the end of the request. It ends
    as a failure when the other side says so, dies while it writes, or does not come in time. No result is given before
    nobody can write into the blocks any more.

    Parameters
    ----------
    engine : LLMDataDist
        The engine.
    caches : sequence of (BlocksLayout, Cache)
        The KV cache; the position is the generation of its keys.
    tables : BlockTables
        Slots for block tables.
    timeout_ms : int
        How long a push may be awaited.
    """

    def __init__(self, engine: LLMDataDist, caches: Sequence[Tuple[BlocksLayout, Cache]], tables: BlockTables,
                 timeout_ms: int) -> None:
        self._manager = engine.cache_manager
        self._cluster_id = engine.cluster_id
        self._caches = list(caches)
        self._tables = tables
        self._timeout_ms = timeout_ms
        self._awaited: Dict[int, _Awaited] = {}             # by transfer id
        self._transfers: Dict[str, int] = {}
        self._waiting: Deque[_Awaited] = deque()            # for a slot
        self._ended: List[ReceiveResult] = []

    def __len__(self) -> int:
        return len(self._awaited)

    def expect(self, order: Expectation) -> None:
        """Let the other engine write the blocks of a request."""
        num_bytes = 0
        awaited = _Awaited(order, time.monotonic(), 0)
        for generation, (layout, cache) in enumerate(self._caches):
            count = sum(block != NULL_BLOCK for group in layout.groups for block in order.blocks[group])
            num_bytes += count * layout.block_bytes * len(layout.offsets)
            if count:
                self._manager.hold_blocks(cache, self._key(order, generation), self._timeout_ms)
                awaited.keys.add(generation)
        awaited.num_bytes = num_bytes
        self._awaited[order.transfer_id] = awaited
        self._transfers[order.request_id] = order.transfer_id
        self._waiting.append(awaited)
        self._offer()

    def _offer(self) -> None:
        """Tell where the blocks are, as far as there are slots for it."""
        while self._waiting:
            slot = self._tables.take_slot()
            if slot is None:
                return
            awaited = self._waiting.popleft()
            if self._awaited.get(awaited.order.transfer_id) is not awaited:
                self._tables.free_slot(slot)
                continue
            awaited.slot = slot
            awaited.keys.add(TABLE_GENERATION)
            self._tables.offer(slot, self._key(awaited.order, TABLE_GENERATION), awaited.order.blocks,
                               self._timeout_ms)

    def withdraw(self, request_id: str) -> None:
        """Nobody needs the blocks any more: who has not begun to write them is refused."""
        awaited = self._awaited.get(self._transfers.get(request_id, 0))
        if awaited is not None:
            self._close_keys(awaited)

    def _close_keys(self, awaited: _Awaited) -> None:
        """Refuse newcomers. Each key ends by an event once nobody uses it."""
        for generation in sorted(awaited.keys):
            cache = None if generation == TABLE_GENERATION else self._caches[generation][1]
            if cache is None:
                self._tables.end(awaited.slot, self._key(awaited.order, generation))
            else:
                self._manager.hold_blocks(cache, self._key(awaited.order, generation), 0)

    def take_event(self, event: KeyEvent) -> bool:
        """Take in the end of a key; whether it was one of these."""
        awaited = self._awaited.get(event.key.req_id)
        if awaited is None:
            return False
        awaited.keys.discard(event.key.generation)
        if event.key.generation == TABLE_GENERATION:
            self._tables.free_slot(awaited.slot)
            self._offer()
        if event.outcome != KeyOutcome.PULLED and awaited.arrived:
            awaited.arrived = False
            log.warning("request %s: its blocks were not pushed: %s", awaited.order.request_id, event.outcome.name)
            self._close_keys(awaited)
        if not awaited.keys:
            del self._awaited[event.key.req_id], self._transfers[awaited.order.request_id]
            self._ended.append(ReceiveResult(awaited.order, awaited.arrived, time.monotonic() - awaited.start,
                                             awaited.num_bytes))
        return True

    def take_ended(self) -> List[ReceiveResult]:
        """Return what ended since the last call."""
        ended, self._ended = self._ended, []
        return ended

    def _key(self, order: Expectation, generation: int) -> HeldBlocksKey:
        return HeldBlocksKey(self._cluster_id, order.transfer_id, generation)
