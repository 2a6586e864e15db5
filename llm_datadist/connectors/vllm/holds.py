"""Blocks that wait for the other side: who holds what, until it was fetched or nobody came in time."""
from __future__ import annotations

from typing import Dict, List, Sequence, Tuple

from llm_datadist import Cache, HeldBlocksKey, KeyEvent, KeyOutcome, LLMDataDist

__all__ = ["Holds"]


class Holds:
    """The requests whose blocks others may fetch from here.

    A request has one key for each blocks cache, as the KV cache may consist of several; its blocks are free once all
    of them have ended.

    Parameters
    ----------
    engine : LLMDataDist
        The engine.
    caches : sequence of Cache
        The blocks caches of the KV cache; the position is the generation of their keys.
    lease_ms : int
        How long the blocks of a finished request are kept.
    """

    def __init__(self, engine: LLMDataDist, caches: Sequence[Cache], lease_ms: int) -> None:
        self._manager = engine.cache_manager
        self._cluster_id = engine.cluster_id
        self._caches = list(caches)
        self._lease_ms = lease_ms
        self._requests: Dict[int, str] = {}         # key -> request
        self._keys: Dict[str, int] = {}
        self._open: Dict[str, int] = {}             # request -> how many of its keys have not ended
        self._outcomes: Dict[str, KeyOutcome] = {}

    def hold(self, request_id: str, key: int) -> None:
        """Let others fetch the blocks of a request, whenever it has finished."""
        self._requests[key] = request_id
        self._keys[request_id] = key
        self._open[request_id] = len(self._caches)
        for generation, cache in enumerate(self._caches):
            self._manager.hold_blocks(cache, self._key(key, generation))

    def lease(self, request_id: str) -> None:
        """It has finished: its blocks wait from now on."""
        key = self._keys.get(request_id)
        if key is not None:
            for generation, cache in enumerate(self._caches):
                self._manager.hold_blocks(cache, self._key(key, generation), self._lease_ms)

    def drop(self, request_id: str) -> None:
        """Nobody will fetch its blocks."""
        key = self._forget(request_id)
        for generation in range(len(self._caches)):
            self._manager.drop_blocks(self._key(key, generation))

    def take_ended(self, events: Sequence[KeyEvent]) -> List[Tuple[str, KeyOutcome]]:
        """Return the requests whose blocks nobody will fetch any more, and the worst of what became of their keys."""
        ended = []
        for event in events:
            request_id = self._requests.get(event.key.req_id)
            if request_id is None:
                continue
            worst = max(self._outcomes.get(request_id, KeyOutcome.PULLED), event.outcome)
            self._outcomes[request_id] = worst
            self._open[request_id] -= 1
            if not self._open[request_id]:
                self._forget(request_id)
                ended.append((request_id, worst))
        return ended

    def __len__(self) -> int:
        return len(self._keys)

    def _forget(self, request_id: str) -> int:
        key = self._keys.pop(request_id)
        del self._requests[key], self._open[request_id]
        self._outcomes.pop(request_id, None)
        return key

    def _key(self, key: int, generation: int) -> HeldBlocksKey:
        return HeldBlocksKey(self._cluster_id, key, generation)
