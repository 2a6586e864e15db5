"""One pull or push: resolve, plan, move, release; in one exchange where that can be, see ``one_pull.pyx``.

Runs on the caller's thread without the GIL, under the link's lock from the resolve to the release: transfers
on one link take turns, different links run in parallel. Waiting for the turn and every step of the transfer
are each bounded by the engine's `sync_timeout_ns`.

The local cache is pinned for the whole call and the remote one by a lease on its owner, so neither end can
give the memory away meanwhile. Checks come before the first byte moves.
"""
from libc.stdint cimport int64_t, uint32_t, uint64_t

from llm_datadist.core.base.provider cimport aclrtContext
from llm_datadist.core.base.status cimport LDD_E_NOT_ENABLED, LDD_E_PARAM, LDD_OK, ldd_fail
from llm_datadist.core.base.sync cimport ldd_now_ns, ldd_unlock
from llm_datadist.core.link.links cimport LINK_ACTIVE, ldd_link, ldd_link_begin, ldd_link_end
from llm_datadist.core.link.requests cimport ldd_link_ready, ldd_remote_cache, ldd_request_release, ldd_request_resolve
from llm_datadist.core.link.shared_reader cimport (
    LDD_READER_ASK, ldd_reader_attach, ldd_reader_done, ldd_reader_remember, ldd_reader_resolve,
)
from llm_datadist.core.link.wire cimport (
    LDD_DESC_BLOCKS, LDD_DESC_HOST, LDD_DESC_OWNED, LDD_FETCH_ASK, LDD_MODE_REMOTE_ACCESSIBLE,
)
from llm_datadist.core.plan.block_plan cimport (
    ldd_desc_list_clear, ldd_plan_blocks, ldd_plan_contiguous, ldd_plan_slot_to_blocks,
)
from llm_datadist.core.table.cache_table cimport ldd_cache_view, ldd_table_pin_local, ldd_table_unpin
from llm_datadist.core.table.holds cimport KEY_HOLD
from llm_datadist.core.transfer.batch cimport ldd_batch_run, ldd_context_enter, ldd_context_leave, ldd_link_lock
from llm_datadist.core.transfer.one_pull cimport ldd_one_pull

# Tensors [first, first + count) of one end.
ctypedef struct ldd_selection:
    uint32_t first
    uint32_t count


# ------------------------------------------------------------------------------------------- checks and plan

cdef ldd_status _select(int64_t first, int64_t stop, uint32_t num_tensors, const char* end, ldd_selection* out,
                       ldd_detail* detail) noexcept nogil:
    if first < 0:
        out.first = 0
        out.count = num_tensors
        return LDD_OK
    if first >= stop or stop > num_tensors:
        return ldd_fail(detail, LDD_E_PARAM, b"%s tensors [%lld, %lld) are outside the cache's %u tensors", end,
                        <long long>first, <long long>stop, num_tensors)
    out.first = <uint32_t>first
    out.count = <uint32_t>(stop - first)
    return LDD_OK


cdef inline const char* _layout(bint is_blocks) noexcept nogil:
    return b"blocks" if is_blocks else b"contiguous"


cdef ldd_status _check_layouts(ldd_node* node, const ldd_transfer* what, const ldd_cache_view* local,
                              const ldd_remote_cache* remote, ldd_detail* detail) noexcept nogil:
    cdef bint remote_blocks = (remote.desc.flags & LDD_DESC_BLOCKS) != 0
    cdef bint remote_host = (remote.desc.flags & LDD_DESC_HOST) != 0
    cdef bint want_local_blocks = what.shape == SHAPE_BLOCKS or (what.shape == SHAPE_SLOT_TO_BLOCKS and not what.put)
    cdef bint want_remote_blocks = what.shape == SHAPE_BLOCKS or (what.shape == SHAPE_SLOT_TO_BLOCKS and what.put)
    if local.is_blocks != want_local_blocks:
        return ldd_fail(detail, LDD_E_PARAM, b"local cache %lld is a %s cache, this call needs a %s cache",
                        <long long>local.cache_id, _layout(local.is_blocks),
                        _layout(want_local_blocks))
    if remote_blocks != want_remote_blocks:
        return ldd_fail(detail, LDD_E_PARAM, b"cache %lld of cluster %llu is a %s cache, this call needs a %s cache",
                        <long long>remote.desc.cache_id, <unsigned long long>what.cluster_id,
                        _layout(remote_blocks), _layout(want_remote_blocks))
    if what.shape == SHAPE_SLOT_TO_BLOCKS and not what.put and remote_host and not local.host:
        return ldd_fail(detail, LDD_E_NOT_ENABLED,
                        b"cache %lld of cluster %llu is on the host: only a cache of the same layout can be pulled",
                        <long long>remote.desc.cache_id, <unsigned long long>what.cluster_id)
    return LDD_OK


cdef ldd_status _slot_bytes(const ldd_transfer* what, const ldd_cache_view* local, const ldd_remote_cache* remote,
                           uint64_t* nbytes, ldd_detail* detail) noexcept nogil:
    """How much of each tensor goes over, contiguous to contiguous; the destination's stride is the default."""
    cdef uint64_t local_stride = local.stride, remote_stride = remote.desc.stride_bytes
    if what.local_slot >= local.num_slots:
        return ldd_fail(detail, LDD_E_PARAM, b"batch index %llu is outside local cache %lld of %llu",
                        <unsigned long long>what.local_slot, <long long>local.cache_id,
                        <unsigned long long>local.num_slots)
    if what.put and local_stride != remote_stride:
        return ldd_fail(detail, LDD_E_PARAM, b"the source's stride is %llu bytes, the destination's %llu",
                        <unsigned long long>local_stride, <unsigned long long>remote_stride)
    if what.local_offset >= local_stride or what.remote_offset >= remote_stride:
        return ldd_fail(detail, LDD_E_PARAM,
                        b"offsets %llu (source) and %llu (destination) must lie inside strides of %llu and %llu bytes",
                        <unsigned long long>what.remote_offset, <unsigned long long>what.local_offset,
                        <unsigned long long>remote_stride, <unsigned long long>local_stride)
    nbytes[0] = <uint64_t>what.size if what.size > 0 else local_stride - what.local_offset
    if nbytes[0] > local_stride - what.local_offset:
        return ldd_fail(detail, LDD_E_PARAM, b"size %llu at offset %llu exceeds the destination's stride of %llu bytes",
                        <unsigned long long>nbytes[0], <unsigned long long>what.local_offset,
                        <unsigned long long>local_stride)
    if nbytes[0] > remote_stride - what.remote_offset:
        return ldd_fail(detail, LDD_E_PARAM, b"size %llu at offset %llu exceeds the source's stride of %llu bytes",
                        <unsigned long long>nbytes[0], <unsigned long long>what.remote_offset,
                        <unsigned long long>remote_stride)
    return LDD_OK


cdef ldd_status _plan(const ldd_transfer* what, ldd_link* link, const ldd_cache_view* local,
                     const ldd_remote_cache* remote, uint32_t local_first, uint32_t remote_first, uint32_t count,
                     ldd_detail* detail) noexcept nogil:
    cdef const uint64_t* local_addrs = local.addrs + local_first
    cdef const uint64_t* remote_addrs = remote.addrs + remote_first
    cdef uint64_t nbytes = 0
    cdef ldd_status status
    ldd_desc_list_clear(&link.descs)
    # A pool is one region, whereas every tensor of a registered cache is one, also where they follow each other.
    link.descs.by_tensor = not (local.owned and remote.desc.flags & LDD_DESC_OWNED)
    if what.shape == SHAPE_SLOT:
        status = _slot_bytes(what, local, remote, &nbytes, detail)
        if status < 0:
            return status
        return ldd_plan_contiguous(
            &link.descs, remote_addrs, remote.desc.batch_index * remote.desc.stride_bytes + what.remote_offset,
            local_addrs, what.local_slot * local.stride + what.local_offset, count, nbytes, detail)
    if what.shape == SHAPE_BLOCKS:
        if local.stride != remote.desc.stride_bytes:
            return ldd_fail(detail, LDD_E_PARAM,
                            b"a block is %llu bytes here and %llu bytes in cache %lld of cluster %llu",
                            <unsigned long long>local.stride, <unsigned long long>remote.desc.stride_bytes,
                            <long long>remote.desc.cache_id, <unsigned long long>what.cluster_id)
        return ldd_plan_blocks(&link.descs, remote_addrs, what.remote_blocks, remote.desc.num_slots, local_addrs,
                               what.local_blocks, local.num_slots, count, local.stride, what.num_blocks, what.put,
                               detail)
    if what.put:
        if what.local_slot >= local.num_slots:
            return ldd_fail(detail, LDD_E_PARAM, b"batch index %llu is outside local cache %lld of %llu",
                            <unsigned long long>what.local_slot, <long long>local.cache_id,
                            <unsigned long long>local.num_slots)
        return ldd_plan_slot_to_blocks(
            &link.descs, local_addrs, what.local_slot * local.stride, local.stride, remote_addrs, what.remote_blocks,
            remote.desc.num_slots, count, remote.desc.stride_bytes, what.num_blocks, True, detail)
    return ldd_plan_slot_to_blocks(
        &link.descs, remote_addrs, remote.desc.batch_index * remote.desc.stride_bytes, remote.desc.stride_bytes,
        local_addrs, what.local_blocks, local.num_slots, count, local.stride, what.num_blocks, False, detail)


# ------------------------------------------------------------------------------------------------ the transfer

cdef ldd_status _move_steps(const ldd_transfer* what, ldd_link* link, const ldd_cache_view* local,
                           const ldd_remote_cache* remote, int64_t deadline_ns, ldd_selection* taken,
                           ldd_detail* detail) noexcept nogil:
    cdef ldd_selection mine = [0, 0], theirs = [0, 0]
    cdef uint32_t step, at = 0, count
    cdef ldd_status status = _check_layouts(link.node, what, local, remote, detail)
    if status == LDD_OK:
        status = _select(what.local_first, what.local_stop, local.num_tensors,
                        b"source" if what.put else b"destination", &mine, detail)
    if status == LDD_OK:
        status = _select(what.remote_first, what.remote_stop, remote.desc.num_tensors,
                        b"destination" if what.put else b"source", &theirs, detail)
    if status < 0:
        return status
    if mine.count != theirs.count:
        return ldd_fail(detail, LDD_E_PARAM, b"%u local and %u remote tensors are selected: the numbers must be equal",
                        mine.count, theirs.count)
    taken[0] = theirs
    step = what.tensors_per_step if what.tensors_per_step else mine.count
    status = _plan(what, link, local, remote, mine.first, theirs.first, min(step, mine.count), detail)
    if status == LDD_OK:
        status = ldd_link_ready(link, remote.desc.region_epoch, deadline_ns, detail)
    while status == LDD_OK:
        status = ldd_batch_run(link, what.put, deadline_ns, detail)
        at += step
        if at >= mine.count or status < 0:
            break
        count = min(step, mine.count - at)
        status = _plan(what, link, local, remote, mine.first + at, theirs.first + at, count, detail)
        deadline_ns = ldd_now_ns() + link.node.sync_timeout_ns
    return status


cdef ldd_status _run_locked(ldd_node* node, const ldd_transfer* what, ldd_link* link, const ldd_cache_view* local,
                           ldd_detail* detail) noexcept nogil:
    cdef int64_t deadline_ns = ldd_now_ns() + node.sync_timeout_ns
    cdef ldd_remote_cache remote
    cdef ldd_selection taken
    cdef ldd_detail ignored
    cdef ldd_status status, released
    taken.first = taken.count = 0
    cdef bint peeked
    status = ldd_reader_attach(link, deadline_ns)
    if status < 0:
        return status
    status = LDD_READER_ASK
    if what.kind != KEY_HOLD and not (what.release and what.remote_first >= 0):
        status = ldd_reader_resolve(link, what.kind, what.id, what.model_id, what.batch_index, what.put, what.release,
                                  &remote, detail)
    peeked = status == LDD_OK
    if status == LDD_READER_ASK:
        if what.kind != KEY_HOLD:               # how such a pull ends matters to its owner and to us
            status = ldd_one_pull(link, what, local, deadline_ns, detail)
            if status != LDD_FETCH_ASK:
                return status
        status = ldd_request_resolve(link, what.kind, what.id, what.model_id, what.batch_index, what.put, deadline_ns,
                                 &remote, detail)
        if status == LDD_OK:
            ldd_reader_remember(link, &remote)
    if status < 0:
        return status
    status = _move_steps(what, link, local, &remote, deadline_ns, &taken, detail)
    if peeked:
        released = ldd_reader_done(link, what.release and status == LDD_OK, ldd_now_ns() + node.sync_timeout_ns,
                                 detail if status == LDD_OK else &ignored)
        return released if status == LDD_OK else status
    if link.state != LINK_ACTIVE and status < 0:
        return status                           # the lease ends with the connection
    # The bytes have arrived; what is left is bookkeeping on the owner, which gets its own time.
    released = ldd_request_release(link, remote.desc.lease, what.release and status == LDD_OK, taken.first, taken.count,
                               ldd_now_ns() + node.sync_timeout_ns, detail if status == LDD_OK else &ignored)
    return released if status == LDD_OK else status


cdef ldd_status ldd_transfer_run(ldd_node* node, const ldd_transfer* what, ldd_detail* detail) noexcept nogil:
    cdef ldd_cache_view local
    cdef ldd_link* link = NULL
    cdef aclrtContext before
    cdef ldd_status status
    if what.cluster_id == node.cluster_id:
        return ldd_fail(detail, LDD_E_PARAM, b"cluster %llu is this one: local copies have their own calls",
                        <unsigned long long>what.cluster_id)
    status = ldd_table_pin_local(node.table, what.cache_id, &local, detail)
    if status < 0:
        return status
    if node.mode & LDD_MODE_REMOTE_ACCESSIBLE and not local.remote_accessible:
        status = ldd_fail(detail, LDD_E_PARAM, b"local cache %lld is not remote accessible", <long long>local.cache_id)
    if status == LDD_OK:
        status = ldd_link_begin(node, what.cluster_id, &link, detail)
    if status == LDD_OK:
        status = ldd_link_lock(link, detail)
        if status == LDD_OK:
            before = ldd_context_enter(node)
            status = _run_locked(node, what, link, &local, detail)
            ldd_context_leave(node, before)
            ldd_unlock(&link.lock)
        ldd_link_end(link)
    ldd_table_unpin(node.table, local.slot, local.generation)
    return status
