"""Meeting the other members of a communicator in the background.

Of each pair, the member of lower rank waits and the other one calls. On one host they meet at an abstract Unix
socket named after communicator and pair, which vanishes with the process that holds it. A member that may be on
another host is also called at its address, at the base port plus its device id. A caller that comes before the
other side has asked for the communicator is sent away and tries again until the time is up.

Threads of the engine look after all communicators: one while nobody answers slowly, more, up to `MAX_CALLERS`, while
calls to hosts that do not answer are on their way. So neither an order of asking nor a host that is gone blocks others.
"""
from __future__ import annotations

import hashlib
import threading
import time
from typing import TYPE_CHECKING, Dict, FrozenSet, List, Mapping, Optional, Set, Tuple

from llm_datadist.caches.descriptors import RegisterMemStatus
from llm_datadist.links.rank_table import Member
from llm_datadist.options.admission import closed_text
from llm_datadist.status import LLMException, LLMLinkError, LLMParamInvalidError, LLMStatusCode
from llm_datadist.utils import log

if TYPE_CHECKING:
    from llm_datadist.core.engine.engine import Engine

__all__ = ["Rendezvous"]

MAX_COMMUNICATORS = 512
MAX_CALLERS = 16                    # threads; as many calls to slow hosts are on their way at once
MAX_IDLE = 2                        # one looks around while the other one calls
ATTEMPT_MS = 500                    # for one call; the other side answers at once or is not there
FIRST_PAUSE_S, LAST_PAUSE_S = 0.002, 0.05


class _Communicator:
    """One call of ``link`` and how far it is."""

    def __init__(self, comm_id: int, digest: bytes, own: Member, peers: Mapping[int, Member], deadline: float) -> None:
        self.comm_id = comm_id
        self.digest = digest
        self.own = own
        self.peers = dict(peers)                                # cluster id -> member
        self.missing = set(peers)
        self.due = {cluster: 0.0 for cluster, peer in peers.items() if peer.rank < own.rank}     # when to call next
        self.pause = FIRST_PAUSE_S
        self.deadline = deadline
        self.status = RegisterMemStatus.PREPARING
        self.waits = any(peer.rank > own.rank for peer in peers.values())
        self.local_listener: Optional[int] = None
        self.dropped = False


def digest_of(comm_name: str, cluster_rank_info: Mapping[int, int]) -> bytes:
    """What both ends of a pair know of a communicator, in 32 bytes."""
    members = ",".join(f"{cluster}:{rank}" for cluster, rank in sorted(cluster_rank_info.items()))
    return hashlib.sha256(f"{comm_name}\0{members}".encode("utf-8", "surrogatepass")).digest()


def local_name(digest: bytes, cluster_id: int) -> str:
    """Abstract Unix name at which `cluster_id` waits for the members of higher rank."""
    return f"@llm_datadist.{digest[:16].hex()}.{cluster_id}"


class Rendezvous:
    """The communicators of one engine.

    Parameters
    ----------
    engine : Engine
        Opens the links and answers callers.
    cluster_id : int
        This process.
    base_port : int
        A member that waits on another host listens at this port plus its device id.
    """

    def __init__(self, engine: "Engine", cluster_id: int, base_port: int) -> None:
        self._engine = engine
        self._cluster_id = cluster_id
        self._base_port = base_port
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._communicators: Dict[int, _Communicator] = {}
        self._listeners: Dict[Tuple[str, int], Tuple[int, FrozenSet[int]]] = {}      # (ip, port) -> handle, users
        self._next_id = 1
        self._threads: Set[threading.Thread] = set()
        self._num_idle = 0
        self._pause = FIRST_PAUSE_S                             # between two looks at who has come
        self._closed = False

    def link(self, comm_name: str, cluster_rank_info: Mapping[int, int], members: Mapping[int, Member],
             total_time_s: float) -> int:
        """Ask for a communicator and return its id at once."""
        own = members[cluster_rank_info[self._cluster_id]]
        peers = {cluster: members[rank] for cluster, rank in cluster_rank_info.items() if cluster != self._cluster_id}
        with self._lock:
            if len(self._communicators) >= MAX_COMMUNICATORS:
                raise LLMParamInvalidError(f"link: {MAX_COMMUNICATORS} communicators exist, which is the most")
            communicator = _Communicator(self._next_id, digest_of(comm_name, cluster_rank_info), own, peers,
                                         time.monotonic() + total_time_s)
            self._next_id += 1
            try:
                for cluster, peer in peers.items():
                    if peer.rank > own.rank:
                        self._engine.expect(communicator.digest, cluster, communicator.comm_id)
            except BaseException:
                self._engine.forget(communicator.comm_id)
                raise
            self._communicators[communicator.comm_id] = communicator
            self._pause = FIRST_PAUSE_S
            if not self._num_idle:
                self._add_thread()
            self._changed.notify_all()
        return communicator.comm_id

    def unlink(self, comm_id: int) -> None:
        """Drop the links of a communicator on this side."""
        with self._lock:
            communicator = self._communicators.pop(comm_id, None)
            if communicator is None:
                raise _unknown("unlink", comm_id)
            communicator.dropped = True
            self._forget(communicator)
            self._changed.notify_all()

    def status(self, comm_id: int) -> RegisterMemStatus:
        """How far the exchange with the other members is."""
        with self._lock:
            communicator = self._communicators.get(comm_id)
            if communicator is None:
                raise _unknown("query_register_mem_status", comm_id)
            self._collect_callers(communicator)
            return communicator.status

    def close(self) -> None:
        """Drop everything and end the threads."""
        with self._lock:
            self._closed = True
            for communicator in self._communicators.values():
                communicator.dropped = True
                self._forget(communicator)
            self._communicators.clear()
            self._changed.notify_all()
            threads = list(self._threads)
        for thread in threads:
            thread.join()

    # Below: under the lock, unless said otherwise.

    def _forget(self, communicator: _Communicator) -> None:
        if communicator.local_listener is not None:
            self._engine.unlisten(communicator.local_listener)
            communicator.local_listener = None
        self._leave_port(communicator)
        self._engine.forget(communicator.comm_id)

    def _port_of(self, member: Member) -> int:
        return self._base_port + member.device_id

    def _open_listeners(self, communicator: _Communicator) -> None:
        """Wait for callers; another process may still hold a name, then the next round tries again."""
        if not communicator.waits:
            return
        if communicator.local_listener is None:
            communicator.local_listener = self._engine.listen_at(local_name(communicator.digest, self._cluster_id), 0)
        own = communicator.own
        if own.address is None or communicator.comm_id in self._port_users():
            return
        if all(peer.server == own.server for peer in communicator.peers.values()):
            return
        if not self._engine.options.may_listen(own.address):
            return                                      # members of this host meet by name all the same
        at = (own.address, self._port_of(own))
        users: FrozenSet[int] = frozenset()
        if at in self._listeners:
            handle, users = self._listeners[at]
        else:
            opened = self._engine.listen_at(*at)
            if opened is None:
                return                                  # the address is another network's, or in use
            handle = opened
        self._listeners[at] = (handle, users | {communicator.comm_id})

    def _port_users(self) -> FrozenSet[int]:
        return frozenset().union(*(users for _, users in self._listeners.values()))

    def _leave_port(self, communicator: _Communicator) -> None:
        for at, (handle, users) in list(self._listeners.items()):
            if communicator.comm_id in users:
                users = users - {communicator.comm_id}
                if users:
                    self._listeners[at] = (handle, users)
                else:
                    self._engine.unlisten(handle)
                    del self._listeners[at]

    def _collect_callers(self, communicator: _Communicator) -> None:
        """Note which members of higher rank have come."""
        for cluster in list(communicator.missing):
            if communicator.peers[cluster].rank > communicator.own.rank \
                    and self._engine.has_joined(communicator.comm_id, cluster):
                communicator.missing.discard(cluster)
        if communicator.status is RegisterMemStatus.PREPARING and not communicator.missing:
            communicator.status = RegisterMemStatus.OK
            self._stop_waiting(communicator)

    def _stop_waiting(self, communicator: _Communicator) -> None:
        if communicator.local_listener is not None:
            self._engine.unlisten(communicator.local_listener)
            communicator.local_listener = None
        self._leave_port(communicator)

    def _pending(self) -> List[_Communicator]:
        return [c for c in self._communicators.values() if c.status is RegisterMemStatus.PREPARING]

    def _add_thread(self) -> None:
        if len(self._threads) < MAX_CALLERS:
            thread = threading.Thread(target=self._run, name="llm_datadist-rendezvous", daemon=True)
            self._threads.add(thread)
            thread.start()

    def _run(self) -> None:
        with self._lock:
            while not self._closed:
                self._look_around()
                call = self._next_call()
                if call is not None:
                    if not self._num_idle:
                        self._add_thread()                      # somebody must look around while this one calls
                    self._make_call(*call)
                elif self._num_idle == MAX_IDLE:
                    break
                else:
                    self._wait()
            self._threads.discard(threading.current_thread())

    def _wait(self) -> None:
        """Sleep until a call is due, or it is time to look around again."""
        self._num_idle += 1
        pending = self._pending()
        if pending:
            due = [at for communicator in pending for at in communicator.due.values()]
            self._changed.wait(min([self._pause] + [max(at - time.monotonic(), 0.0) for at in due]))
            self._pause = min(self._pause * 1.5, LAST_PAUSE_S)
        else:
            self._changed.wait()
        self._num_idle -= 1

    def _next_call(self) -> Optional[Tuple[_Communicator, int]]:
        """Take the call that has been due for longest."""
        now = time.monotonic()
        due = [(at, communicator.comm_id, cluster) for communicator in self._pending()
               for cluster, at in communicator.due.items() if at <= now]
        if not due:
            return None
        _, comm_id, cluster = min(due)
        communicator = self._communicators[comm_id]
        del communicator.due[cluster]
        return communicator, cluster

    def _make_call(self, communicator: _Communicator, cluster: int) -> None:
        self._lock.release()
        try:
            met = self._call(communicator, cluster)
        finally:
            self._lock.acquire()
        if not met:
            communicator.due[cluster] = time.monotonic() + communicator.pause
            communicator.pause = min(communicator.pause * 1.5, LAST_PAUSE_S)
        elif communicator.dropped:
            self._engine.forget(communicator.comm_id)           # unlinked while the call was on its way
        else:
            communicator.missing.discard(cluster)
            self._collect_callers(communicator)

    def _look_around(self) -> None:
        """See who has come and whose time is up; wait for callers."""
        now = time.monotonic()
        for communicator in self._pending():
            self._collect_callers(communicator)
            if communicator.status is not RegisterMemStatus.PREPARING:
                continue
            if now > communicator.deadline:
                communicator.status = RegisterMemStatus.FAILED
                self._stop_waiting(communicator)
                self._engine.forget(communicator.comm_id)
                log.error("link %s: clusters %s did not come in time%s", communicator.comm_id,
                          sorted(communicator.missing), self._why_nobody_called(communicator.own))
                continue
            self._open_listeners(communicator)

    def _why_nobody_called(self, own: Member) -> str:
        if own.address is None or self._engine.options.may_listen(own.address):
            return ""
        return f"; those of other hosts were not listened for: {closed_text(own.address)}"

    def _call(self, communicator: _Communicator, cluster: int) -> bool:
        """Try once to reach a member of lower rank. Without the lock."""
        peer = communicator.peers[cluster]
        places: List[Tuple[str, int]] = [(local_name(communicator.digest, cluster), 0)]
        if peer.address is not None and peer.server != communicator.own.server:
            places.append((peer.address, self._port_of(peer)))
        for ip, port in places:
            if communicator.dropped or self._closed:
                return False
            left_ms = int((communicator.deadline - time.monotonic()) * 1000)
            if left_ms <= 0:
                return False
            try:
                status, text = self._engine.link(cluster, ip, port, min(ATTEMPT_MS, left_ms), communicator.digest,
                                                 communicator.comm_id)
            except LLMException as error:       # it must not end the thread that looks after the others
                log.error("link %s: calling cluster %s failed: %s", communicator.comm_id, cluster, error)
                return False
            if status == 0:
                return True
            log.info("link %s: cluster %s not reached at %s: %s", communicator.comm_id, cluster, ip, text)
        return False


def _unknown(operation: str, comm_id: int) -> LLMException:
    return LLMLinkError(f"{operation} failed, error code is {LLMStatusCode.LLM_NOT_YET_LINK}, comm_id {comm_id} is "
                        "unknown.", status_code=LLMStatusCode.LLM_NOT_YET_LINK, operation=operation)
