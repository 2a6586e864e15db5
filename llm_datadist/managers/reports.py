"""What `LLMDataDist` tells of its engine, for operators and for whoever waits until it holds nothing."""
from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any, Dict, List, Union

from llm_datadist.managers.leftovers import drain, held, leaks
from llm_datadist.status import LLMParamInvalidError
from llm_datadist.utils.calls import public_call
from llm_datadist.utils.utils import check_int32, check_uint32, check_uint64

if TYPE_CHECKING:
    from llm_datadist.core.engine.engine import Engine
    from llm_datadist.managers.cache import CacheManager
    from llm_datadist.managers.kv_cache import KvCacheManager
    from llm_datadist.observe.session import Trace

__all__ = ["EngineReports"]


class EngineReports:
    """The part of `LLMDataDist` that changes nothing: counts, caches, links, a sign of life, a trace."""

    if TYPE_CHECKING:
        _manager: Union[CacheManager, KvCacheManager, None]

        def _require_engine(self) -> "Engine": ...

    def stats(self) -> Dict[str, Any]:
        """What this process holds right now: ``caches``, ``keys``, ``pins``, ``device_pool``, ``host_pool``, ``links``.

        ``links`` can be used, ``broken_links`` not, ``healed_links`` were made anew; ``expired_keys`` were not pulled
        in time.

        Raises
        ------
        LLMException
            Before `init`, or after `finalize`.
        """
        return self._require_engine().stats()

    def held(self) -> List[Dict[str, Any]]:
        """One dict per allocated cache that is still here, oldest first.

        Returns
        -------
        list of dict
            ``cache_id``, ``bytes``, ``num_tensors``, ``is_blocks``, ``handle`` (whether it was not deallocated),
            ``names`` (its keys as texts, each of which keeps it), ``pins`` (transfers that use it just now), ``age_s``
            (seconds since it was allocated), and ``lease_s`` (seconds until its request keys expire, or None).

        Raises
        ------
        RuntimeError
            Before `init`.
        """
        return held(self._require_engine())

    def leaks(self, min_age_s: float = 0.0) -> List[Dict[str, Any]]:
        """Report the allocated caches of an age, oldest first, that were not given back, and who could pull them.

        Parameters
        ----------
        min_age_s : float
            Seconds; younger caches are left out.

        Returns
        -------
        list of dict
            As of `held`, with ``peers``: cluster ids that are linked just now, any of which could pull its keys; and
            ``place``, file and line that allocated it, where events were recorded then (option ``llm.Trace``, or after
            `trace` was called), otherwise None.

        Raises
        ------
        LLMException
            Before `init`, or after `finalize`.
        """
        return self._with_places(leaks(self._require_engine(), min_age_s))

    def _with_places(self, rows: List[Dict[str, Any]]) -> List[Dict[str, Any]]:
        places = self._manager._places if self._manager is not None else None
        return [{**row, "place": places.of(row["cache_id"]) if places is not None else None} for row in rows]

    def drain(self, timeout_in_millis: int) -> List[Dict[str, Any]]:
        """Wait until no transfer runs, here or of a peer, and no request key or held block waits to be pulled.

        Parameters
        ----------
        timeout_in_millis : int
            Milliseconds, uint32.

        Returns
        -------
        list of dict
            As of `leaks`: the caches that still have keys or pins when the time is up; empty when all is done.

        Raises
        ------
        TypeError, ValueError
            `timeout_in_millis` is no uint32.
        LLMException
            Before `init`, or after `finalize`.

        Notes
        -----
        New keys and new pulls are taken in meanwhile: stop to make them first. A prefix key is not waited for, as no
        pull takes it.
        """
        check_uint32("timeout_in_millis", timeout_in_millis)
        return self._with_places(drain(self._require_engine(), timeout_in_millis / 1000))

    def links(self) -> List[Dict[str, Any]]:
        """One dict per link: cluster id, state, who asked for it, bytes moved, and why it broke.

        Raises
        ------
        LLMException
            Before `init`, or after `finalize`.
        """
        return self._require_engine().links()

    @public_call
    def ping(self, remote_cluster_id: int, timeout: int = 1000) -> float:
        """Ask a linked peer for a sign of life, and return the seconds it took. In any mode and role.

        Parameters
        ----------
        remote_cluster_id : int
            The peer, uint64.
        timeout : int
            Milliseconds, positive.

        Raises
        ------
        TypeError, ValueError
            An argument has another type, or is outside its integer range.
        LLMParamInvalidError
            `timeout` is not positive.
        LLMLinkError
            LLM_NOT_YET_LINK: no such link; LLM_LINK_BUSY: a transfer uses it, which is a sign of life, too.
        LLMTimeoutError
            No answer in time; the link is broken, until the next call makes it anew.
        RuntimeError
            Before `init`.
        """
        engine = self._require_engine()
        check_uint64("remote_cluster_id", remote_cluster_id)
        check_int32("timeout", timeout)
        if timeout <= 0:
            raise LLMParamInvalidError(f"timeout={timeout} is not allowed; it must be positive, in milliseconds")
        start = time.perf_counter()
        engine.ping(remote_cluster_id, timeout, b"ping")
        return time.perf_counter() - start

    @public_call
    def trace(self, path: "Union[str, os.PathLike[str]]") -> "Trace":
        """Record events from now on, and write them as one file that Perfetto (ui.perfetto.dev) opens.

        Parameters
        ----------
        path : path-like
            The file; compressed if its name ends in ``.gz``. It is overwritten.

        Returns
        -------
        Trace
            A context manager; its ``stop`` writes the file and tells how many events there are. Events of other
            engines of this user on this host are in it, too, as far as they were traced meanwhile.

        Raises
        ------
        OSError
            The file cannot be created.
        LLMNotEnabledError
            The host has no memory files.
        LLMException
            Before `init`, or after `finalize`.

        Notes
        -----
        The last 65536 events are kept; what was lost before is counted. Option ``llm.Trace`` ``"1"`` records from
        `init` on; variable ``LLM_DATADIST_TRACE`` names a folder where events outlive the process, see ``llm-datadist
        trace``.
        """
        from llm_datadist.observe.session import Trace

        session = Trace(self._require_engine(), path)
        assert self._manager is not None
        self._manager._keep_places()
        return session
