"""A pull or push step by step: resolve, plan, move, release; pulls in one exchange are in ``one_pull.pyx``.

Runs on the caller's thread without the GIL, under the link's lock from the resolve to the release: transfers
on one link take turns, different links run in parallel. Waiting for the turn and every step of the transfer
are each bounded by the engine's `sync_timeout_ns`.

The local cache is pinned for the whole call and the remote one by a lease on its owner, so neither end can
give the memory away meanwhile. Checks come before the first byte moves.

A call that finds its link broken has it made anew, see ``link/heal.pyx``; so does, once, a call that finds out by its
own first request, or while bytes move. Then all of it is bounded by one `sync_timeout_ns`.
"""
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport strcmp

from llm_datadist.core.base.atomic cimport ldd_get64
from llm_datadist.core.base.provider cimport aclrtContext
from llm_datadist.core.base.status cimport LDD_E_NOT_LINKED, LDD_E_PARAM, LDD_OK, ldd_fail
from llm_datadist.core.base.sync cimport LDD_NEVER, ldd_now_ns, ldd_unlock
from llm_datadist.core.link.heal cimport ldd_link_find
from llm_datadist.core.link.links cimport (
    LINK_ACTIVE, ldd_link, ldd_link_end, ldd_link_state_of,
)
from llm_datadist.core.link.requests cimport ldd_link_ready, ldd_remote_cache, ldd_request_release, ldd_request_resolve
from llm_datadist.core.link.shared_reader cimport (
    LDD_READER_ASK, ldd_reader_attach, ldd_reader_done, ldd_reader_remember, ldd_reader_resolve,
)
from llm_datadist.core.link.wire cimport LDD_FETCH_ASK, LDD_MODE_REMOTE_ACCESSIBLE
from llm_datadist.core.record.record cimport (
    LDD_EVENT_MOVE, LDD_EVENT_PLAN, LDD_EVENT_PULL, LDD_EVENT_PUSH, LDD_EVENT_RELEASE, LDD_EVENT_RESOLVE,
    LDD_EVENT_TURN, LDD_OP_PULL, LDD_OP_PUSH, ldd_peer_record, ldd_record_count, ldd_trace_context, ldd_trace_lap,
    ldd_trace_span,
)
from llm_datadist.core.table.cache_table cimport ldd_cache_view, ldd_table_pin_local, ldd_table_unpin
from llm_datadist.core.table.holds cimport KEY_HOLD
from llm_datadist.core.transfer.batch cimport ldd_batch_run, ldd_context_enter, ldd_context_leave, ldd_link_lock
from llm_datadist.core.transfer.fitting cimport (
    ldd_end, ldd_end_here, ldd_end_there, ldd_fit, ldd_fit_ends, ldd_fit_plan,
)
from llm_datadist.core.transfer.one_pull cimport ldd_one_pull
from llm_datadist.core.transfer.verify cimport ldd_moved, ldd_say_faults, ldd_verify


cdef ldd_status _verify(const ldd_transfer* what, ldd_link* link, const ldd_end* local, const ldd_end* there,
                        uint32_t lease, const ldd_fit* fit, uint32_t at, int64_t deadline_ns,
                        ldd_detail* detail) noexcept nogil:
    """Check the step that has just moved tensors from `at` of the selection on; differences do not end the others."""
    cdef ldd_moved moved
    cdef const ldd_end* to = there if what.put else local
    moved.put = what.put
    moved.lease = lease
    moved.first_pin = 0
    moved.pin_by_tensor = False
    moved.first_tensor = at + (fit.remote_first if what.put else fit.local_first)
    moved.addrs = to.addrs + moved.first_tensor
    moved.block_bytes = to.stride
    return ldd_verify(link, &moved, deadline_ns, &what.progress.faults, detail)


cdef ldd_status _move_steps(const ldd_transfer* what, ldd_link* link, const ldd_end* local,
                            const ldd_remote_cache* remote, int64_t deadline_ns, int64_t* at_ns, ldd_fit* fit,
                            ldd_detail* detail) noexcept nogil:
    cdef ldd_end there
    cdef uint32_t step, at = 0
    cdef ldd_status status
    what.progress.stage = b"plan"
    ldd_end_there(remote, &there)
    status = ldd_fit_ends(what, local, &there, fit, detail)
    if status < 0:
        return status
    step = what.tensors_per_step if what.tensors_per_step else fit.count
    status = ldd_fit_plan(&link.descs, what, local, fit.local_first, &there, fit.remote_first, min(step, fit.count),
                          detail)
    ldd_trace_lap(&link.node.record, LDD_EVENT_PLAN, at_ns, what.cluster_id, link.descs.bytes, status)
    if status == LDD_OK:
        what.progress.stage = b"transfer"
        status = ldd_link_ready(link, remote.desc.region_epoch, deadline_ns, detail)
    while status == LDD_OK:
        status = ldd_batch_run(link, what.put, deadline_ns, detail)
        if status == LDD_OK and what.verify:
            status = _verify(what, link, local, &there, remote.desc.lease, fit, at, deadline_ns, detail)
        ldd_trace_lap(&link.node.record, LDD_EVENT_MOVE, at_ns, what.cluster_id, link.descs.bytes, status)
        if status == LDD_OK:
            what.progress.num_tensors = min(at + step, fit.count)
        at += step
        if at >= fit.count or status < 0:
            break
        status = ldd_fit_plan(&link.descs, what, local, fit.local_first + at, &there, fit.remote_first + at,
                              min(step, fit.count - at), detail)
        deadline_ns = ldd_now_ns() + link.node.sync_timeout_ns
    if status == LDD_OK and what.progress.faults.count:
        what.progress.stage = b"verify"
        status = ldd_say_faults(link, what.put, &what.progress.faults, detail)
    return status


cdef ldd_status _run_locked(ldd_node* node, const ldd_transfer* what, ldd_link* link, const ldd_end* local,
                            int64_t limit_ns, ldd_detail* detail) noexcept nogil:
    cdef int64_t at_ns = ldd_now_ns(), deadline_ns = min(at_ns + node.sync_timeout_ns, limit_ns)
    cdef ldd_remote_cache remote
    cdef ldd_fit fit = [0, 0, 0]
    cdef ldd_detail ignored
    cdef ldd_status status, released
    cdef bint peeked
    what.progress.stage = b"resolve"
    status = ldd_reader_attach(link, deadline_ns)
    if status < 0:
        return status
    status = LDD_READER_ASK                     # always where checksums are wanted: those are of caches under a lease
    if not what.verify and what.kind != KEY_HOLD and not (what.release and what.remote_first >= 0):
        status = ldd_reader_resolve(link, what.kind, what.id, what.model_id, what.batch_index, what.put, what.release,
                                    local.described.dtype if what.same_dtype else 0, &remote, detail)
    peeked = status == LDD_OK
    if status == LDD_READER_ASK:
        if what.kind != KEY_HOLD and not what.verify:   # how such a pull ends matters to its owner and to us
            status = ldd_one_pull(link, what, local, deadline_ns, detail)
            if status != LDD_FETCH_ASK:
                ldd_trace_lap(&node.record, LDD_EVENT_MOVE, &at_ns, what.cluster_id, link.descs.bytes, status)
                return status
        status = ldd_request_resolve(link, what.kind, what.id, what.model_id, what.batch_index, what.put, deadline_ns,
                                 &remote, detail)
        if status == LDD_OK:
            ldd_reader_remember(link, &remote)
    ldd_trace_lap(&node.record, LDD_EVENT_RESOLVE, &at_ns, what.cluster_id, 0, status)
    if status < 0:
        return status
    status = _move_steps(what, link, local, &remote, deadline_ns, &at_ns, &fit, detail)
    if status == LDD_OK:
        what.progress.stage = b"release"
    if peeked:
        released = ldd_reader_done(link, what.release and status == LDD_OK, ldd_now_ns() + node.sync_timeout_ns,
                                 detail if status == LDD_OK else &ignored)
        ldd_trace_lap(&node.record, LDD_EVENT_RELEASE, &at_ns, what.cluster_id, 0, released)
        return released if status == LDD_OK else status
    if ldd_link_state_of(link) != LINK_ACTIVE and status < 0:
        return status                           # the lease ends with the connection
    # The bytes have arrived; what is left is bookkeeping on the owner, which gets its own time.
    released = ldd_request_release(link, remote.desc.lease, what.release and status == LDD_OK, fit.remote_first,
                                   fit.count, ldd_now_ns() + node.sync_timeout_ns,
                                   detail if status == LDD_OK else &ignored)
    ldd_trace_lap(&node.record, LDD_EVENT_RELEASE, &at_ns, what.cluster_id, 0, released)
    return released if status == LDD_OK else status


cdef bint _may_repeat(const ldd_transfer* what, const ldd_link* link) noexcept nogil:
    """Whether a call that lost its link may begin again over a new one.

    Not once it releases, for then its key may be gone; nor with a key that ends with the link it was used over.
    """
    return (link.node.heal_ns != 0 and ldd_link_state_of(link) != LINK_ACTIVE
            and strcmp(what.progress.stage, b"release") != 0
            and (what.kind != KEY_HOLD or strcmp(what.progress.stage, b"link") == 0))


cdef ldd_status _run_on_link(ldd_node* node, const ldd_transfer* what, const ldd_cache_view* local, int64_t start_ns,
                             int64_t* limit_ns, bint* again, ldd_peer_record** peer, uint64_t* moved,
                             ldd_detail* detail) noexcept nogil:
    """One attempt; `again` says whether to make another one, within a limit that the first one did not have."""
    cdef ldd_link* link = NULL
    cdef uint64_t* counter
    cdef uint64_t before_bytes
    cdef ldd_end here
    cdef aclrtContext before
    cdef ldd_status status
    again[0] = False
    ldd_end_here(local, what.local_slot, &here)
    what.progress.stage = b"link"
    status = ldd_link_find(node, what.cluster_id, node.sync_timeout_ns if limit_ns[0] == LDD_NEVER
                           else limit_ns[0] - ldd_now_ns(), &link, limit_ns, detail)
    if status < 0:
        return status
    peer[0] = link.record
    status = ldd_link_lock(link, detail)
    if status == LDD_OK:
        ldd_trace_lap(&node.record, LDD_EVENT_TURN, &start_ns, what.cluster_id, 0, status)
        counter = &link.pushed_bytes if what.put else &link.pulled_bytes
        before_bytes = ldd_get64(counter)
        before = ldd_context_enter(node)
        link.pin.slot, link.pin.generation, link.pinned = local.slot, local.generation, True
        status = _run_locked(node, what, link, &here, limit_ns[0], detail)
        link.pinned = False
        ldd_context_leave(node, before)
        moved[0] = ldd_get64(counter) - before_bytes
        ldd_unlock(&link.lock)
    again[0] = status == LDD_E_NOT_LINKED and limit_ns[0] == LDD_NEVER and _may_repeat(what, link)
    ldd_link_end(link)
    return status


cdef ldd_status ldd_transfer_run(ldd_node* node, const ldd_transfer* what, ldd_detail* detail) noexcept nogil:
    cdef int64_t start_ns = ldd_now_ns()
    cdef ldd_peer_record* peer = node.record.peers          # until there is a link
    cdef ldd_cache_view local
    cdef uint64_t moved = 0
    cdef int64_t limit_ns = LDD_NEVER
    cdef bint again
    cdef ldd_status status
    if what.cluster_id == node.cluster_id:
        return ldd_fail(detail, LDD_E_PARAM, b"cluster %llu is this one: local copies have their own calls",
                        <unsigned long long>what.cluster_id)
    status = ldd_table_pin_local(node.table, what.cache_id, &local, detail)
    if status < 0:
        return status
    if node.mode & LDD_MODE_REMOTE_ACCESSIBLE and not local.remote_accessible:
        status = ldd_fail(detail, LDD_E_PARAM, b"local cache %lld is not remote accessible", <long long>local.cache_id)
    while status == LDD_OK:
        status = _run_on_link(node, what, &local, start_ns, &limit_ns, &again, &peer, &moved, detail)
        if not again:
            break
        limit_ns = ldd_now_ns() + node.sync_timeout_ns
        what.progress.num_tensors = 0
        what.progress.faults.count = 0
        status = LDD_OK
    ldd_table_unpin(node.table, local.slot, local.generation)
    ldd_record_count(peer, LDD_OP_PUSH if what.put else LDD_OP_PULL, ldd_now_ns() - start_ns, moved, status < 0)
    ldd_trace_span(&node.record, LDD_EVENT_PUSH if what.put else LDD_EVENT_PULL, start_ns, what.cluster_id, what.kind,
                   what.id, what.model_id, moved, status)
    ldd_trace_context(&node.record, start_ns, what.cluster_id, what.context)
    return status
