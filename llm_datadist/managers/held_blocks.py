"""Blocks that are held for one request, for owners whose blocks go to another request afterwards."""
from __future__ import annotations

from typing import List, Optional

from llm_datadist.caches.handles import Cache
from llm_datadist.caches.held_blocks import HeldBlocksKey, KeyEvent, KeyOutcome
from llm_datadist.managers.base import ManagerBase
from llm_datadist.status import LLMParamInvalidError
from llm_datadist.utils.utils import check_isinstance, check_uint32

__all__ = ["HeldBlocks"]


class HeldBlocks(ManagerBase):
    """The part of `CacheManager` that makes keys for the blocks of a request and learns what became of them.

    An owner calls `hold_blocks` before it tells a peer of the request, and gives the blocks to another one only when
    `take_key_events` has returned the key, or `drop_blocks` was called. The peer reads with ``pull_blocks`` and the
    key, or writes with ``transfer_cache_async`` and the key, or calls `release_blocks` when it does neither.
    """

    def hold_blocks(self, cache: Cache, key: HeldBlocksKey, lease_ms: Optional[int] = None) -> None:
        """Let peers read blocks of a cache under a key of the request that they are held for.

        Parameters
        ----------
        cache : Cache
            A blocks cache of this process, allocated or registered. Which of its blocks are the request's is between
            the owner and the peer.
        key : HeldBlocksKey
            Its ``cluster_id`` is this process. One that is held already gets the new lease.
        lease_ms : int, optional
            How long it is good for, from now on, milliseconds, uint32. None: until a peer, or `drop_blocks`, ends it.

        Raises
        ------
        TypeError, ValueError
            An argument has another type, or `lease_ms` does not fit uint32.
        LLMParamInvalidError
            `cache` is no blocks cache, `key` names another cluster, or is held for another cache.
        LLMNotFoundError
            LLM_KV_CACHE_NOT_EXIST: the cache was deallocated or unregistered.

        Notes
        -----
        A peer that is at it when the lease ends may finish; the key expires after that. So ``lease_ms=0`` refuses
        everybody who comes from now on, and its event says that nobody touches the blocks any more.
        """
        check_isinstance("cache", cache, Cache, allow_none=False)
        self._check_own(key)
        if lease_ms is not None:
            check_uint32("lease_ms", lease_ms)
        if not cache.is_blocks_cache:
            raise LLMParamInvalidError(f"{cache} is a contiguous cache; its slots have a CacheKey each")
        self._require_initialized()
        self._llm_engine.hold_blocks(self._id_of(cache), key.req_id, key.generation, lease_ms)

    def drop_blocks(self, key: HeldBlocksKey) -> bool:
        """Withdraw a key without an event. A peer that is reading under it will find that its pull failed.

        Parameters
        ----------
        key : HeldBlocksKey
            Of `hold_blocks`.

        Returns
        -------
        bool
            Whether it was still held.

        Raises
        ------
        TypeError
            `key` is no HeldBlocksKey.
        LLMParamInvalidError
            `key` names another cluster.
        """
        self._check_own(key)
        self._require_initialized()
        return self._llm_engine.drop_blocks(key.req_id, key.generation)

    def release_blocks(self, key: HeldBlocksKey) -> None:
        """Tell the owner of held blocks that they are not needed: what `pull_blocks` does at its end, without reading.

        Parameters
        ----------
        key : HeldBlocksKey
            Its ``cluster_id`` selects the link.

        Raises
        ------
        TypeError
            `key` is no HeldBlocksKey.
        LLMNotFoundError
            LLM_KV_CACHE_NOT_EXIST: it is not held any more.
        LLMLinkError
            LLM_NOT_YET_LINK: no link, or one that broke and could not be made anew in time.
        LLMTimeoutError
            ``sync_kv_timeout`` passed; the link is broken.
        """
        check_isinstance("key", key, HeldBlocksKey, allow_none=False)
        self._require_initialized()
        self._llm_engine.release_blocks(key.cluster_id, key.req_id, key.generation)

    def take_key_events(self) -> List[KeyEvent]:
        """Return the keys of `hold_blocks` that ended since the last call, oldest first. Never waits.

        Returns
        -------
        list of KeyEvent
            Each key is in one event at most; one that was withdrawn by `drop_blocks` is in none.

        Notes
        -----
        Costs well under a microsecond when there are none, so a scheduler may call it in every step. Events are kept
        until they are taken. Keys whose lease has run out expire here at the latest.
        """
        self._require_initialized()
        events = self._llm_engine.take_key_events()
        if not events:
            return []
        cluster_id = self._llm_engine.cluster_id
        return [KeyEvent(HeldBlocksKey(cluster_id, request, generation), KeyOutcome(outcome))
                for request, generation, outcome in events]

    def key_event_fd(self) -> int:
        """Return a file descriptor that is readable while `take_key_events` has something to return.

        Returns
        -------
        int
            For ``select``, ``poll``, ``epoll`` or an event loop; not to be read, written or closed. It is good until
            the engine is finalised.

        Raises
        ------
        LLMException
            LLM_FAILED: the process had no descriptor left when the engine was initialised.
        """
        self._require_initialized()
        return self._llm_engine.key_event_fd()

    def _check_own(self, key: HeldBlocksKey) -> None:
        check_isinstance("key", key, HeldBlocksKey, allow_none=False)
        if key.cluster_id != self._llm_engine.cluster_id:
            raise LLMParamInvalidError(f"{key} names cluster {key.cluster_id}, this one is "
                                       f"{self._llm_engine.cluster_id}")
