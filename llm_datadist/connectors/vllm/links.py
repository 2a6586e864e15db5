"""Links to workers of other engines, made when first needed and made anew when broken."""
from __future__ import annotations

import threading
from typing import Callable, Dict, TypeVar

from llm_datadist import LLMClusterInfo, LLMDataDist, LLMStatusCode
from llm_datadist.connectors.vllm.logger import log
from llm_datadist.connectors.vllm.metadata import Endpoint
from llm_datadist.status import LLMLinkError

__all__ = ["Links"]

_FORGET_TIMEOUT_MS = 1000
_T = TypeVar("_T")


class Links:
    """The links of one engine. Safe from any thread; threads that want the same link wait for one that makes it.

    Parameters
    ----------
    engine : LLMDataDist
        The engine.
    timeout_ms : int
        Deadline of making a link.
    """

    def __init__(self, engine: LLMDataDist, timeout_ms: int) -> None:
        self._engine = engine
        self._timeout_ms = timeout_ms
        self._lock = threading.Lock()
        self._making: Dict[Endpoint, threading.Lock] = {}
        self._linked: set[Endpoint] = set()

    def ensure(self, peer: Endpoint) -> None:
        """Link to `peer` unless that was done.

        Raises
        ------
        LLMLinkError
            It cannot be reached, or is not the one it is taken for, such as a process that was started anew.
        """
        if peer in self._linked:
            return
        with self._lock:
            making = self._making.setdefault(peer, threading.Lock())
        with making:
            if peer in self._linked:
                return
            _, codes = self._engine.link_clusters([_cluster(peer)], self._timeout_ms)
            if codes[0] not in (LLMStatusCode.LLM_SUCCESS, LLMStatusCode.LLM_ALREADY_LINK):
                raise LLMLinkError(f"cannot link to cluster {peer.cluster_id} at {peer.host}:{peer.port}, "
                                   f"error code is {codes[0]}.", status_code=codes[0], operation="link_clusters",
                                   peer=peer.cluster_id)
            with self._lock:
                self._linked.add(peer)
            log.info("linked to cluster %s at %s:%s", peer.cluster_id, peer.host, peer.port)

    def call(self, peer: Endpoint, call: Callable[[], _T]) -> _T:
        """Call over a link to `peer`; over a new one if that it had turns out to be broken."""
        self.ensure(peer)
        try:
            return call()
        except LLMLinkError:
            self.forget(peer)
            self.ensure(peer)
            return call()

    def forget(self, peer: Endpoint) -> None:
        """Drop a link that turned out to be broken, so that the next transfer makes it anew."""
        with self._lock:
            self._making.setdefault(peer, threading.Lock())
            if peer not in self._linked:
                return
            self._linked.discard(peer)
        self._engine.unlink_clusters([_cluster(peer)], _FORGET_TIMEOUT_MS, force=True)


def _cluster(peer: Endpoint) -> LLMClusterInfo:
    cluster = LLMClusterInfo()
    cluster.remote_cluster_id = peer.cluster_id
    cluster.append_local_ip_info(peer.host, 0)
    cluster.append_remote_ip_info(peer.host, peer.port)
    return cluster
