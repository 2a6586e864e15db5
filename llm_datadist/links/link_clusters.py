"""``link_clusters`` and ``unlink_clusters``: checks, one result per cluster, and the rules of either generation."""
from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterator, List, Optional, Sequence, Set, Tuple

from llm_datadist.configs import LLMClusterInfo, LLMRole, trans_int_ip
from llm_datadist.status import LLMParamInvalidError, LLMStatusCode
from llm_datadist.utils import log
from llm_datadist.utils.utils import check_int32, check_isinstance, check_uint64

if TYPE_CHECKING:
    from llm_datadist.core.engine.engine import Engine

__all__ = ["ClusterLinker"]

MAX_PARALLEL = 16
MAX_CLUSTERS_V1 = 16
BUSY_WAIT_S = 0.01

Codes = Tuple[LLMStatusCode, List[LLMStatusCode]]
S = LLMStatusCode


def _check_common(clusters: Sequence[LLMClusterInfo], timeout: int) -> None:
    check_int32("timeout", timeout)
    if timeout <= 0:
        raise LLMParamInvalidError(f"timeout={timeout} is not allowed; it must be positive, in milliseconds")
    check_isinstance("clusters", clusters, (list, tuple), LLMClusterInfo, allow_none=False)


def _check_addresses(clusters: Sequence[LLMClusterInfo], also_local: bool = False) -> None:
    """Refuse what `LLMClusterInfo` lets through, before anything is tried."""
    for cluster in clusters:
        _check_ips("remote_ip_info_list", cluster.remote_ip_info_list)
        if also_local:
            _check_ips("local_ip_info_list", cluster.local_ip_info_list)


def _check_ips(name: str, infos: Sequence[Tuple[Any, int]]) -> None:
    for ip, _ in infos:
        if not isinstance(ip, (int, str)):
            raise TypeError(f"ip of {name} only support int or IPv6 text, but got {type(ip).__name__}")


def _text_of(ip: Any) -> str:
    """Numeric text of an address that `LLMClusterInfo` holds: an integer for IPv4, a text for IPv6."""
    return ip if isinstance(ip, str) else trans_int_ip(ip)


def _first_address(cluster: LLMClusterInfo) -> Optional[Tuple[str, int]]:
    """Where the peer listens, as far as the description says."""
    for ip, port in cluster.remote_ip_info_list:
        return _text_of(ip), port
    return None


class ClusterLinker:
    """Links of one engine that one side asks for.

    Parameters
    ----------
    engine : Engine
        The engine that holds the links.
    """

    def __init__(self, engine: "Engine") -> None:
        self._engine = engine
        self._busy = threading.Lock()               # an operation of the first generation, or a switch of the second

    # ----------------------------------------------------------------------------------------- second generation

    def link(self, clusters: Sequence[LLMClusterInfo], timeout: int) -> Codes:
        """Link to each cluster, up to 16 at once."""
        _check_common(clusters, timeout)
        needs_local = not self._engine.options.local_comm_res
        for cluster in clusters:
            if needs_local and not cluster.local_ip_info_list:
                raise LLMParamInvalidError("local_ip_info_list is empty; it must hold one address unless "
                                           "option llm.LocalCommRes is set")
            check_uint64("remote_cluster_id", cluster.remote_cluster_id)    # type: ignore[arg-type]
        _check_addresses(clusters, also_local=True)
        return self._for_each(clusters, lambda cluster: self._link_one(cluster, timeout), S.LLM_ALREADY_LINK)

    def _link_one(self, cluster: LLMClusterInfo, timeout: int) -> LLMStatusCode:
        remote = cluster.remote_ip_info_list
        if len(remote) != 1:
            log.error("link_clusters: cluster %s has %s remote addresses, exactly one is needed",
                      cluster.remote_cluster_id, len(remote))
            return S.LLM_PARAM_INVALID
        if not self._engine.options.local_comm_res and len(cluster.local_ip_info_list) != 1:
            log.error("link_clusters: cluster %s has %s local addresses, exactly one is needed",
                      cluster.remote_cluster_id, len(cluster.local_ip_info_list))
            return S.LLM_PARAM_INVALID
        return self._open(cluster, timeout)

    def _open(self, cluster: LLMClusterInfo, timeout: int) -> LLMStatusCode:
        from llm_datadist.core.base.status import public_code

        cluster_id: int = cluster.remote_cluster_id         # type: ignore[assignment]  # checked above
        address, port = cluster.remote_ip_info_list[0]
        ip = _text_of(address)
        is_v1 = self._engine.options.generation == 1
        start = time.monotonic()
        status, text = self._engine.link(cluster_id, ip, port, timeout)
        code = public_code(status, is_v1)
        if code == S.LLM_LINK_FAILED and (time.monotonic() - start) * 1000 >= timeout:
            code = S.LLM_WAIT_PROCESS_TIMEOUT if is_v1 else S.LLM_TIMEOUT
        if code == S.LLM_SUCCESS:
            log.info("linked to cluster %s at %s:%s", cluster_id, ip, port)
        else:
            log.error("link_clusters: cluster %s at %s:%s: %s, %s", cluster_id, ip, port, code, text)
        return code

    def unlink(self, clusters: Sequence[LLMClusterInfo], timeout: int, force: bool) -> Codes:
        """Unlink from each cluster, up to 16 at once."""
        _check_common(clusters, timeout)
        check_isinstance("force", force, bool, allow_none=False)
        for cluster in clusters:
            check_uint64("remote_cluster_id", cluster.remote_cluster_id)    # type: ignore[arg-type]
        _check_addresses(clusters)
        return self._for_each(clusters, lambda cluster: self._unlink_one(cluster, timeout, force), S.LLM_SUCCESS)

    def _unlink_one(self, cluster: LLMClusterInfo, timeout: int, force: bool) -> LLMStatusCode:
        from llm_datadist.core.base.status import public_code

        cluster_id: int = cluster.remote_cluster_id         # type: ignore[assignment]  # checked above
        num_addresses = len(cluster.remote_ip_info_list)
        if not force and num_addresses > 1:
            log.error("unlink_clusters: cluster %s has %s remote addresses, one at most", cluster_id, num_addresses)
            return S.LLM_PARAM_INVALID
        if not force and num_addresses == 0 and not self._engine.was_linked(cluster_id):
            log.error("unlink_clusters: cluster %s was never linked, and no address is given", cluster_id)
            return S.LLM_PARAM_INVALID
        status, text, _ = self._engine.unlink(cluster_id, timeout, force, _first_address(cluster))
        code = public_code(status)
        if code != S.LLM_SUCCESS:
            log.error("unlink_clusters: cluster %s: %s, %s", cluster_id, code, text)
        return code

    def _for_each(self, clusters: Sequence[LLMClusterInfo], act: Callable[[LLMClusterInfo], LLMStatusCode],
                  repeated: LLMStatusCode) -> Codes:
        """Act on each cluster; the second mention of one in a call gets `repeated`."""
        if not clusters:
            return S.LLM_PARAM_INVALID, []
        first: Dict[object, int] = {}
        for index, cluster in enumerate(clusters):
            first.setdefault(cluster.remote_cluster_id, index)
        unique = list(first.values())
        if len(unique) == 1:
            results = [act(clusters[unique[0]])]
        else:
            with ThreadPoolExecutor(min(MAX_PARALLEL, len(unique)), "llm_datadist-link") as pool:
                results = list(pool.map(lambda index: act(clusters[index]), unique))
        by_index = dict(zip(unique, results))
        codes = [by_index.get(index, repeated) for index in range(len(clusters))]
        failures = [code for code in codes if code != S.LLM_SUCCESS]
        return (failures[-1] if failures else S.LLM_SUCCESS), codes

    # ------------------------------------------------------------------------------------------ first generation

    def link_v1(self, clusters: Sequence[LLMClusterInfo], timeout: int, role: LLMRole) -> Codes:
        """Link a DECODER to PROMPTs, one after the other. What fails leaves no link on this side."""
        _check_common(clusters, timeout)
        _check_addresses(clusters, also_local=True)
        if not clusters or role is not LLMRole.DECODER:
            return S.LLM_PARAM_INVALID, []
        return self._v1(clusters, lambda: self._link_all_v1(clusters, timeout))

    def _v1(self, clusters: Sequence[LLMClusterInfo], act: Callable[[], Codes]) -> Codes:
        if len(clusters) > MAX_CLUSTERS_V1:
            return S.LLM_CLUSTER_NUM_EXCEED_LIMIT, [S.LLM_CLUSTER_NUM_EXCEED_LIMIT] * len(clusters)
        with self.exclusive() as is_alone:
            return act() if is_alone else (S.LLM_PROCESSING_LINK, [S.LLM_PROCESSING_LINK] * len(clusters))

    @contextmanager
    def exclusive(self, waits: bool = False) -> Iterator[bool]:
        """Keep other operations that do the same away. While one is running: wait for it, or yield False."""
        is_alone = self._busy.acquire(timeout=-1 if waits else BUSY_WAIT_S)
        try:
            yield is_alone
        finally:
            if is_alone:
                self._busy.release()

    def _link_all_v1(self, clusters: Sequence[LLMClusterInfo], timeout: int) -> Codes:
        num_devices = len(self._engine.options.device_ids)
        seen: Set[Optional[int]] = set()
        codes: List[LLMStatusCode] = []
        for cluster in clusters:
            cluster_id = cluster.remote_cluster_id
            if cluster_id in seen:
                codes.append(S.LLM_REPEAT_REQUEST)
                continue
            seen.add(cluster_id)
            counts = len(cluster.remote_ip_info_list), len(cluster.local_ip_info_list)
            if cluster_id is None or counts != (num_devices, num_devices):
                codes.append(S.LLM_PARAM_INVALID)
                continue
            codes.append(self._open(cluster, timeout))
        failed = [code for code in codes if code not in (S.LLM_SUCCESS, S.LLM_ALREADY_LINK)]
        if not failed:
            return S.LLM_SUCCESS, codes
        if any(code in (S.LLM_LINK_FAILED, S.LLM_WAIT_PROCESS_TIMEOUT) for code in failed):
            return S.LLM_LINK_FAILED, codes
        return failed[-1], codes

    def unlink_v1(self, clusters: Sequence[LLMClusterInfo], timeout: int, force: bool, role: LLMRole) -> Codes:
        """Unlink; a PROMPT finds its peer by address and drops only its own side."""
        _check_common(clusters, timeout)
        check_isinstance("force", force, bool, allow_none=False)
        for cluster in clusters:
            check_uint64("remote_cluster_id", cluster.remote_cluster_id)    # type: ignore[arg-type]
        _check_addresses(clusters)
        if not clusters:
            return S.LLM_PARAM_INVALID, []
        return self._v1(clusters, lambda: self._unlink_all_v1(clusters, timeout, force, role))

    def _unlink_all_v1(self, clusters: Sequence[LLMClusterInfo], timeout: int, force: bool, role: LLMRole) -> Codes:
        seen: Set[Optional[int]] = set()
        codes = []
        for cluster in clusters:
            if cluster.remote_cluster_id in seen:
                codes.append(S.LLM_REPEAT_REQUEST)
                continue
            seen.add(cluster.remote_cluster_id)
            codes.append(self._unlink_one_v1(cluster, timeout, force, role))
        failed = [code for code in codes if code not in (S.LLM_SUCCESS, S.LLM_NOT_YET_LINK)]
        return (S.LLM_UNLINK_FAILED if failed else S.LLM_SUCCESS), codes

    def _unlink_one_v1(self, cluster: LLMClusterInfo, timeout: int, force: bool, role: LLMRole) -> LLMStatusCode:
        from llm_datadist.core.base.status import public_code

        cluster_id: int = cluster.remote_cluster_id         # type: ignore[assignment]  # checked above
        if role is LLMRole.PROMPT:
            cluster_id = self._peer_at(cluster, cluster_id)
            force = True
        if any(row["cluster_id"] == cluster_id and row["running"] for row in self._engine.links()):
            return S.LLM_LINK_BUSY
        status, text, num_links = self._engine.unlink(cluster_id, timeout, force, _first_address(cluster))
        if num_links == 0:
            return S.LLM_NOT_YET_LINK
        if status < 0 and not force:
            # The peer could not be told; this side is closed anyway.
            log.error("unlink_clusters: cluster %s could not be told: %s", cluster_id, text)
            self._engine.unlink(cluster_id, timeout, True)
            code = public_code(status, True)
            return S.LLM_NOTIFY_PROMPT_UNLINK_FAILED if code == S.LLM_UNLINK_FAILED else code
        return S.LLM_SUCCESS

    def _peer_at(self, cluster: LLMClusterInfo, cluster_id: int) -> int:
        """The linked peer that a PROMPT means: the one of that id, or else one at a remote address of `cluster`."""
        rows = self._engine.links()
        addresses = {_text_of(ip) for ip, _ in cluster.remote_ip_info_list}
        at_address = [row["cluster_id"] for row in rows if row["peer_ip"] in addresses]
        return cluster_id if not at_address or any(row["cluster_id"] == cluster_id for row in rows) else at_address[0]
