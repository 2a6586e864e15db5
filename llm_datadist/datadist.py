"""`LLMDataDist`: one process's engine, its links, and the way to its cache manager."""
from __future__ import annotations

import atexit
import sys
import threading
import time
import warnings
from types import TracebackType
from typing import TYPE_CHECKING, Dict, List, Optional, Tuple, Type, Union

from llm_datadist.caches.descriptors import RegisterMemStatus
from llm_datadist.configs import LLMClusterInfo, LLMRole
from llm_datadist.links.link_arguments import check_link_arguments, members_of
from llm_datadist.links.link_clusters import ClusterLinker
from llm_datadist.links.rendezvous import Rendezvous
from llm_datadist.managers.leftovers import leftovers
from llm_datadist.managers.reports import EngineReports
from llm_datadist.options.parser import LISTEN_IP_INFO, EngineOptions, parse_switch_listen
from llm_datadist.status import LLMException, LLMLinkError, LLMNotEnabledError, LLMParamInvalidError, LLMStatusCode
from llm_datadist.utils import log
from llm_datadist.utils.calls import public_call
from llm_datadist.utils.utils import check_isinstance, check_uint32, check_uint64

if TYPE_CHECKING:
    from llm_datadist.core.engine.engine import Engine
    from llm_datadist.managers.cache import CacheManager
    from llm_datadist.managers.kv_cache import KvCacheManager
    from llm_datadist.observe.calls import CallRecorder

__all__ = ["LLMDataDist"]

_PORT_HINT = ("stop the process that listens there, or take another port; port 0 lets the system choose, and "
              "LLMDataDist.listen_address says which")

_instance_lock = threading.Lock()


class LLMDataDist(EngineReports):
    """One cluster: a process that owns caches and exchanges them with linked clusters.

    Parameters
    ----------
    role : LLMRole
        What the process does. It decides what is allowed in kv cache manager mode and is informational otherwise.
    cluster_id : int
        Name of the process among its peers, uint64.

    Raises
    ------
    TypeError, ValueError
        `role` is no LLMRole; `cluster_id` is no uint64.

    Notes
    -----
    A context manager: ``with LLMDataDist(role, cluster_id) as engine:`` finalises at the end. The initialised instance
    is kept by the class, so it lives until `finalize`, or the end of the process.

    Attributes
    ----------
    llm_engine_instance : LLMDataDist or None
        The initialised instance of this process; there is at most one.
    """

    llm_engine_instance: "Optional[LLMDataDist]" = None

    @public_call
    def __init__(self, role: LLMRole, cluster_id: int) -> None:
        self._role = check_isinstance("role", role, LLMRole, allow_none=False)
        self._cluster_id = check_uint64("cluster_id", cluster_id)
        self._engine: "Optional[Engine]" = None
        self._manager: "Union[CacheManager, KvCacheManager, None]" = None
        self._linker: Optional[ClusterLinker] = None
        self._rendezvous: Optional[Rendezvous] = None
        self._options: Optional[EngineOptions] = None
        self._calls: "Optional[CallRecorder]" = None    # writes them down, where that is wanted

    # ---------------------------------------------------------------------------------------------- life cycle

    @public_call
    def init(self, options: Dict[str, str]) -> None:
        """Open the engine: bind the device, take the pools, start to listen. A second call does nothing.

        Parameters
        ----------
        options : dict of str to str
            As of ``LLMConfig.generate_options``, changed by hand or not. Unknown keys are ignored; it is not changed.

        Raises
        ------
        TypeError, ValueError
            `options`, or a value in it, has another type; the port of ``llm.listenIpInfo`` is no number.
        LLMParamInvalidError
            An option has a value that is not allowed, or contradicts another. The text names it.
        LLMMemoryError
            LLM_OUT_OF_MEMORY: the device pool cannot be had.
        LLMException
            LLM_FAILED: another instance is initialised in this process, the address is in use, or the host pool
            cannot be had. Nothing is left behind; the call may be repeated.
        """
        with _instance_lock:
            if self._engine is not None:
                return
            live = LLMDataDist.llm_engine_instance
            if live is not None:
                is_ours = live._engine is None or live._engine.is_own_process()
                where = "in this process already" if is_ours else "in the process that this one was forked from"
                hint = ("finalize that one first: LLMDataDist.llm_engine_instance.finalize(); a notebook cell that is "
                        "run again does so before it makes another") if is_ours else \
                    "use an engine in one of the two processes, or start the other with exec (spawn)"
                raise LLMException(f"init failed, error code is {LLMStatusCode.LLM_FAILED}, cluster {live.cluster_id} "
                                   f"is initialized {where}.", status_code=LLMStatusCode.LLM_FAILED, operation="init",
                                   hint=hint)
            parsed = EngineOptions.parse(options, self._role, self._cluster_id)
            start_ns = time.monotonic_ns()
            self._open(parsed)
            LLMDataDist.llm_engine_instance = self
            if parsed.record_folder:
                self._record_calls(parsed, options, start_ns)
        log.info("cluster %s is initialized, role %s", self._cluster_id, self._role)

    def _open(self, options: EngineOptions) -> None:
        from llm_datadist.core.engine.engine import Engine
        from llm_datadist.managers.cache import CacheManager
        from llm_datadist.managers.kv_cache import KvCacheManager

        try:
            engine = Engine(options, self._cluster_id)
        except LLMException as error:
            if options.listen is not None and error.operation == "listen":
                error._complete(hint=_PORT_HINT)
            raise
        self._options = options
        self._manager = CacheManager(engine) if options.generation == 2 else KvCacheManager(engine, self._role)
        self._linker = ClusterLinker(engine)
        self._rendezvous = Rendezvous(engine, self._cluster_id, options.link_base_port)
        self._engine = engine

    def _record_calls(self, parsed: EngineOptions, given: Dict[str, str], start_ns: int) -> None:
        from llm_datadist.observe.calls import CallRecorder

        assert self._engine is not None
        facts = {"role": self._role.name, "cluster_id": self._cluster_id, "record_fd": self._engine.record_fd()}
        try:
            self._calls = CallRecorder(self, self._manager, parsed, given, facts, start_ns)
        except OSError as error:
            log.error("calls of cluster %s are not recorded: %s", self._cluster_id, error)

    def finalize(self, drain_ms: Optional[int] = None) -> None:
        """Unlink everything, free the pools, stop listening. Without `init` it does nothing; `init` may follow.

        In a forked child it does nothing either: everything belongs to the parent process.

        Parameters
        ----------
        drain_ms : int, optional
            Milliseconds to wait before that for peers that pull or are still to come, as `drain` does. What is left
            then is logged.

        Raises
        ------
        TypeError, ValueError
            `drain_ms` is no uint32.
        LLMException
            Never for peers that are gone.

        Warns
        -----
        ResourceWarning
            Keys were still bound, or caches not deallocated: how many, and the oldest.
        """
        if drain_ms is not None:
            check_uint32("drain_ms", drain_ms)
            if self._engine is not None and self._engine.is_own_process():
                for row in self.drain(drain_ms):
                    log.warn("cluster %s is finalized with cache %s (%s bytes, %.1f s old, %s pins, keys: %s)",
                             self._cluster_id, row["cache_id"], row["bytes"], row["age_s"], row["pins"],
                             "; ".join(row["names"]) or "none")
        left = self._close()
        if left:
            warnings.warn(left, ResourceWarning, stacklevel=2)

    def _close(self, warns: bool = True) -> Optional[str]:
        """Do what `finalize` does, and return what it warns of."""
        if self._engine is not None and not self._engine.is_own_process():
            return None
        with _instance_lock:
            engine, manager, rendezvous = self._engine, self._manager, self._rendezvous
            if engine is None or manager is None or rendezvous is None:
                return None
            calls, self._calls, start_ns = self._calls, None, time.monotonic_ns()
            left = leftovers(engine) if warns else None
            self._engine = self._manager = self._linker = self._rendezvous = None
            if LLMDataDist.llm_engine_instance is self:
                LLMDataDist.llm_engine_instance = None
            manager._finalize()
            rendezvous.close()
            engine.close()
            if calls is not None:
                calls.close(start_ns)
        log.info("cluster %s is finalized", self._cluster_id)
        return left and f"cluster {self._cluster_id} was finalized with {left}"

    def __enter__(self) -> "LLMDataDist":
        return self

    def __exit__(self, kind: Optional[Type[BaseException]], error: Optional[BaseException],
                 trace: Optional[TracebackType]) -> None:
        left = self._close()
        if left and error is None:                  # an exception on its way explains what is left
            warnings.warn(left, ResourceWarning, stacklevel=2)

    def __del__(self) -> None:
        # Only where somebody took the instance from the class: it keeps the initialised one.
        if self.__dict__.get("_engine") is None or sys.is_finalizing():
            return
        try:
            left = self._close()
        except Exception as failure:                # nobody is there to catch it
            log.warn("cluster %s was not finalized cleanly: %s", self._cluster_id, failure)
            return
        warnings.warn(left or f"cluster {self._cluster_id} was collected without finalize", ResourceWarning,
                      source=self, stacklevel=2)

    def _require_engine(self) -> "Engine":
        if self._engine is None:
            raise LLMException("llm datadist is not initialized", status_code=LLMStatusCode.LLM_FAILED)
        self._engine.check_process()
        return self._engine

    def _require_generation(self, generation: int, what: str) -> "Engine":
        engine = self._require_engine()
        if engine.options.generation != generation:
            mode = "cache manager" if generation == 2 else "kv cache manager"
            raise LLMParamInvalidError(
                f"{what} is not allowed; it needs {mode} mode, see option llm.EnableCacheManager", operation=what)
        return engine

    # ------------------------------------------------------------------------------------------------ accessors

    @property
    def cluster_id(self) -> int:
        """Name of this process among its peers."""
        return self._cluster_id

    @property
    def cache_manager(self) -> "CacheManager":
        """The manager of caches, always the same object; needs cache manager mode (RuntimeError before `init`)."""
        self._require_generation(2, "cache_manager")
        return self._manager                        # type: ignore[return-value]  # by generation

    @property
    def kv_cache_manager(self) -> "KvCacheManager":
        """The manager of kv caches, always the same; needs kv cache manager mode (RuntimeError before `init`)."""
        self._require_generation(1, "kv_cache_manager")
        return self._manager                        # type: ignore[return-value]  # by generation

    # ---------------------------------------------------------------------------------------- links by address

    @public_call
    def link_clusters(
        self, clusters: Union[List[LLMClusterInfo], Tuple[LLMClusterInfo, ...]], timeout: int = 3000,
    ) -> Tuple[LLMStatusCode, List[LLMStatusCode]]:
        """Link to clusters that listen; a link serves both directions, and one that is broken is made anew.

        Parameters
        ----------
        clusters : sequence of LLMClusterInfo
            Peers, each with its id and one remote address.
        timeout : int
            Milliseconds for each cluster, positive.

        Returns
        -------
        tuple of LLMStatusCode and list of LLMStatusCode
            Overall code, and one per cluster. Failures are codes, not exceptions.

        Raises
        ------
        TypeError, ValueError
            An argument has another type, or is outside its integer range.
        LLMParamInvalidError
            `timeout` is not positive, or a local address is missing.
        LLMException
            Before `init`, or after `finalize`.
        """
        engine = self._require_engine()
        assert self._linker is not None
        if engine.options.generation == 1:
            return self._linker.link_v1(clusters, timeout, self._role)
        return self._linker.link(clusters, timeout)

    @public_call
    def unlink_clusters(
        self, clusters: Union[List[LLMClusterInfo], Tuple[LLMClusterInfo, ...]], timeout: int = 3000,
        force: bool = False,
    ) -> Tuple[LLMStatusCode, List[LLMStatusCode]]:
        """End links made by `link_clusters`, from either side.

        Parameters
        ----------
        clusters : sequence of LLMClusterInfo
            Peers by id.
        timeout : int
            Milliseconds for each cluster, positive.
        force : bool
            Drop this side only, without waiting for the peer, which keeps its own until it links or unlinks.

        Returns
        -------
        tuple of LLMStatusCode and list of LLMStatusCode
            Overall code, and one per cluster; a link that is gone already is LLM_SUCCESS (LLM_NOT_YET_LINK per
            cluster in kv cache manager mode).

        Raises
        ------
        TypeError, ValueError
            An argument has another type, or is outside its integer range.
        LLMParamInvalidError
            `timeout` is not positive.
        LLMException
            Before `init`, or after `finalize`.
        """
        engine = self._require_engine()
        assert self._linker is not None
        if engine.options.generation == 1:
            return self._linker.unlink_v1(clusters, timeout, force, self._role)
        return self._linker.unlink(clusters, timeout, force)

    @public_call
    def check_link_status(self, remote_cluster_id: int) -> None:
        """Ask a PROMPT for a sign of life. DECODER in kv cache manager mode only.

        Parameters
        ----------
        remote_cluster_id : int
            The peer, uint64.

        Raises
        ------
        TypeError, ValueError
            `remote_cluster_id` is no uint64.
        LLMParamInvalidError
            Another mode or role.
        LLMLinkError
            LLM_NOT_YET_LINK: no such link; LLM_LINK_BUSY: another operation uses it.
        LLMTimeoutError
            LLM_WAIT_PROCESS_TIMEOUT: no answer within ``sync_kv_timeout``.
        LLMException
            Before `init`, or after `finalize`.
        """
        engine = self._require_generation(1, "check_link_status")
        check_uint64("remote_cluster_id", remote_cluster_id)
        if self._role is not LLMRole.DECODER:
            raise LLMParamInvalidError(f"check_link_status is not allowed for {self._role}, only for {LLMRole.DECODER}")
        engine.ping(remote_cluster_id, engine.options.sync_timeout_ms)

    # ------------------------------------------------------------------------------------- links by rank table

    @public_call
    def link(self, comm_name: str, cluster_rank_info: Dict[int, int], rank_table: str) -> int:
        """Ask for links between 2 to 4 members that all call this; returns before the others have come.

        Parameters
        ----------
        comm_name : str
            Name of the communicator, 1 to 127 characters, the same at all members.
        cluster_rank_info : dict of int to int
            Cluster id (uint64) to rank (uint32) of every member, ranks ascending.
        rank_table : str
            JSON that says which server and device each rank is on; see ``llm_datadist/rank_table.py``.

        Returns
        -------
        int
            Id of the communicator, from 1 on. `query_register_mem_status` tells when it is usable.

        Raises
        ------
        TypeError, ValueError
            An argument has another type, or a number is outside its range.
        LLMParamInvalidError
            Another mode, a bad name, too few or too many members, ranks not ascending, this cluster is no member,
            or the table does not fit.
        LLMNotEnabledError
            With option ``llm.TransferBackend``.
        LLMException
            Before `init`, or after `finalize`.

        Notes
        -----
        Members on one host meet at a name in the abstract Unix name space; others at the first of ``host_ip``,
        ``server_id`` and ``device_ip`` that is an address, and the base port (option ``llm.LinkBasePort``, variable
        ``LLM_DATADIST_LINK_BASE_PORT``) plus the device id of the member of lower rank.
        """
        engine = self._require_generation(2, "link")
        assert self._rendezvous is not None and self._manager is not None
        check_link_arguments(comm_name, cluster_rank_info, rank_table)
        self._refuse_backend("link")
        if self._cluster_id not in cluster_rank_info:
            raise LLMParamInvalidError(f"cluster_rank_info={cluster_rank_info} is not allowed; "
                                       f"it must contain this cluster, {self._cluster_id}")
        members = members_of(cluster_rank_info, rank_table)
        total_time_s = engine.options.link_total_time_s
        comm_id = self._rendezvous.link(comm_name, cluster_rank_info, members, total_time_s)
        self._manager.set_is_call_linked()          # type: ignore[union-attr]  # a CacheManager, by generation
        return comm_id

    @public_call
    def unlink(self, comm_id: int) -> None:
        """Drop the links of a communicator on this side.

        Parameters
        ----------
        comm_id : int
            From `link`, uint64.

        Raises
        ------
        TypeError, ValueError
            `comm_id` is no uint64.
        LLMParamInvalidError
            Another mode.
        LLMLinkError
            LLM_NOT_YET_LINK: the id is unknown.
        LLMNotEnabledError
            With option ``llm.TransferBackend``.
        LLMException
            Before `init`, or after `finalize`.
        """
        self._require_generation(2, "unlink")
        assert self._rendezvous is not None
        check_uint64("comm_id", comm_id)
        self._refuse_backend("unlink")
        self._rendezvous.unlink(comm_id)

    @public_call
    def query_register_mem_status(self, comm_id: int) -> RegisterMemStatus:
        """Tell whether the members of a communicator have met.

        Parameters
        ----------
        comm_id : int
            From `link`, uint64.

        Returns
        -------
        RegisterMemStatus
            PREPARING until all have come, then OK; FAILED when the time of option ``llm.LinkTotalTime`` is up.

        Raises
        ------
        TypeError, ValueError, LLMParamInvalidError, LLMLinkError, LLMNotEnabledError, RuntimeError
            As for `unlink`.
        """
        self._require_generation(2, "query_register_mem_status")
        assert self._rendezvous is not None
        check_uint64("comm_id", comm_id)
        self._refuse_backend("query_register_mem_status")
        return self._rendezvous.status(comm_id)

    def _refuse_backend(self, operation: str) -> None:
        assert self._options is not None
        if self._options.transfer_backend:
            raise LLMNotEnabledError(f"{operation} is not available with option llm.TransferBackend="
                                     f"{self._options.transfer_backend!r}; use link_clusters")

    # ----------------------------------------------------------------------------------------------------- role

    @public_call
    def switch_role(self, role: LLMRole, switch_options: Optional[Dict[str, str]] = None) -> None:
        """Change the role, and with it whether and where this process listens. Caches and keys stay.

        Parameters
        ----------
        role : LLMRole
            The new role.
        switch_options : dict of str to str, optional
            ``llm.listenIpInfo`` says where to listen; without it the listener is closed. Other keys are ignored.

        Raises
        ------
        TypeError, ValueError
            An argument has another type; the port is no number.
        LLMParamInvalidError
            The address is malformed; in kv cache manager mode also the same role, or PROMPT without an address.
        LLMLinkError
            LLM_EXIST_LINK: a link exists. LLM_PROCESSING_LINK, in kv cache manager mode: another thread links or
            unlinks.
        LLMNotEnabledError
            LLM_FEATURE_NOT_ENABLED: kv cache manager mode without option ``llm.EnableSwitchRole`` or with several
            devices; or option ``llm.TransferBackend`` and another address.
        LLMException
            LLM_FAILED: the new address is in use. Role and listener stay as they were.
        LLMException
            Before `init`, or after `finalize`.
        """
        engine = self._require_engine()
        check_isinstance("role", role, LLMRole, allow_none=False)
        check_isinstance("switch_options", switch_options, dict)
        if engine.options.generation == 1:
            self._check_switch_v1(engine, role, switch_options)
            address = parse_switch_listen(switch_options) if role is not LLMRole.DECODER else None
        else:
            address = parse_switch_listen(switch_options)
            if engine.options.transfer_backend and address != engine.listener:
                raise LLMNotEnabledError("switch_role to another address is not available with option "
                                         f"llm.TransferBackend={engine.options.transfer_backend!r}")
        assert self._linker is not None
        with self._linker.exclusive(waits=engine.options.generation == 2) as is_alone:
            if not is_alone:
                raise _link_error("switch_role", LLMStatusCode.LLM_PROCESSING_LINK, "another link operation is running")
            num_links = engine.num_links()
            if num_links:
                raise _link_error("switch_role", LLMStatusCode.LLM_EXIST_LINK, f"{num_links} links exist")
            _move_listener(engine, address)
            if engine.options.generation == 1:
                self._manager._switch_role(role)    # type: ignore[union-attr]  # a KvCacheManager, by generation
            self._role = role
            engine.note(role.name, engine.listener)

    def _check_switch_v1(self, engine: "Engine", role: LLMRole, switch_options: Optional[Dict[str, str]]) -> None:
        if role is self._role:
            raise LLMParamInvalidError(f"role={role} is not allowed; it is the role already")
        if role is LLMRole.PROMPT and LISTEN_IP_INFO not in (switch_options or {}):
            raise LLMParamInvalidError(f"switch_options needs {LISTEN_IP_INFO} for {role}")
        if not engine.options.enable_switch_role:
            raise LLMNotEnabledError("switch_role needs option llm.EnableSwitchRole='1'")
        if len(engine.options.device_ids) > 1:
            raise LLMNotEnabledError("switch_role is not available with several devices")

    @property
    def listen_address(self) -> Optional[Tuple[str, int]]:
        """Where this process listens; the port is the real one where port 0 was asked for. None for a pure client."""
        return self._require_engine().listener


def _link_error(operation: str, code: LLMStatusCode, reason: str) -> LLMLinkError:
    return LLMLinkError(f"{operation} failed, error code is {code}, {reason}.", status_code=code, operation=operation)


def _move_listener(engine: "Engine", address: Optional[Tuple[str, int]]) -> None:
    """Listen at another address, or nowhere (None); where that fails, go back."""
    before = engine.listener
    try:
        engine.set_listener(address)
    except LLMException as error:
        error._complete(hint=_PORT_HINT)
        engine.set_listener(before)
        raise


def _shutdown_handler() -> None:
    """Finalise the live instance when the interpreter ends."""
    instance = LLMDataDist.llm_engine_instance
    if instance is None or (instance._engine is not None and not instance._engine.is_own_process()):
        return                                      # a forked child leaves its parent's engine alone
    try:
        instance._close(warns=False)                # the process ends, and with it everything that is left
    except LLMException as error:
        log.warn("finalize at exit failed: %s", error)


atexit.register(_shutdown_handler)
