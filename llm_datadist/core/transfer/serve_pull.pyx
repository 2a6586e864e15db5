"""Answering pulls that are one exchange: what a peer asks for over the data path is looked up and pinned while it asks.

Runs on the data server's threads, which never hold the GIL. A request is answered here only if all is well with it, or
there is no such cache: where anything about it does not fit, the peer goes step by step, and finds out what is wrong
in words of its own. Nothing a peer sends is believed: every run is checked against the cache it is taken from.

The pin lasts until the peer has confirmed that all bytes are in place, which takes the key too. That is done by the
thread that receives the confirmation, as it arrives; a peer that goes away before leaves the key where it is.
"""
from libc.stddef cimport size_t
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.stdio cimport snprintf
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcmp, memcpy, memset

from llm_datadist.core.base.checked_math cimport ldd_add_overflows
from llm_datadist.core.base.provider cimport LddFetchSource, LddSegment
from llm_datadist.core.base.status cimport (
    LDD_E_FAILED, LDD_E_NOT_LINKED, LDD_E_NO_MEMORY, LDD_OK, ldd_detail, ldd_fail, ldd_status,
)
from llm_datadist.core.base.sync cimport ldd_lock, ldd_now_ns, ldd_unlock
from llm_datadist.core.base.tensor_desc cimport ldd_tensor_desc
from llm_datadist.core.link.links cimport LINK_ACTIVE, ldd_link, ldd_link_state_of, ldd_node
from llm_datadist.core.link.replies cimport ldd_reply_find
from llm_datadist.core.link.wire cimport (
    LDD_ACCESS_READ, LDD_FETCH_ASK, LDD_FETCH_BLOCKS, LDD_FETCH_CONTEXT_BYTES, LDD_FETCH_MAX_SEGMENTS,
    LDD_FETCH_RESHAPE, LDD_FETCH_TAKE, LDD_FETCH_TO_HOST, ldd_fetch_request, ldd_fetch_run, ldd_resolve,
)
from llm_datadist.core.record.record cimport (
    LDD_EVENT_REFUSE, LDD_EVENT_SERVE, LDD_OP_SERVE, ldd_peer_record, ldd_record_count, ldd_trace_context,
    ldd_trace_span,
)
from llm_datadist.core.table.cache_table cimport ldd_cache_view, ldd_table_settle, ldd_table_unpin
from llm_datadist.core.table.key_index cimport LDD_NO_KEY
from llm_datadist.core.transfer.fitting cimport (
    SHAPE_BLOCKS, SHAPE_SLOT, SHAPE_SLOT_TO_BLOCKS, ldd_end, ldd_end_here, ldd_fit, ldd_fit_ends, ldd_transfer,
)

# The ticket of one fetch.
ctypedef struct ldd_served:
    uint32_t slot                   # of the pinned cache
    uint32_t generation
    uint32_t key_index              # what a confirmation takes; LDD_NO_KEY: nothing
    uint32_t key_generation
    LddSegment* segments
    size_t num_segments
    int64_t start_ns                # for the record
    ldd_peer_record* peer
    uint64_t cluster_id
    ldd_resolve asked
    uint64_t num_bytes
    uint64_t[3] context             # the trace that it belongs to; all zero: none


cdef bint _is_linked(ldd_node* node, const uint8_t* token, ldd_served* served) noexcept nogil:
    cdef ldd_link* link
    cdef bint found = False
    ldd_lock(&node.lock)
    link = node.links
    while link != NULL and not found:
        found = ldd_link_state_of(link) == LINK_ACTIVE and memcmp(link.token, token, sizeof(link.token)) == 0
        if found:
            served.peer = link.record
            served.cluster_id = link.cluster_id
        link = link.next
    ldd_unlock(&node.lock)
    return found


cdef bint _add_segment(ldd_served* served, uint64_t addr, uint64_t nbytes, uint64_t* total) noexcept nogil:
    """False when the sum overflows. What follows in memory and on the way is one segment; there is room for each."""
    cdef LddSegment* last = &served.segments[served.num_segments - 1] if served.num_segments else NULL
    if ldd_add_overflows(total[0], nbytes, total):
        return False
    if last != NULL and last.addr + last.bytes == addr:
        last.bytes += nbytes
        return True
    served.segments[served.num_segments].addr = addr
    served.segments[served.num_segments].bytes = nbytes
    served.num_segments += 1
    return True


cdef ldd_status _cut(const ldd_fetch_request* request, const uint8_t* runs, const ldd_cache_view* view,
                     uint64_t num_bytes, ldd_served* served, ldd_detail* detail) noexcept nogil:
    """The segments of memory that are asked for, in order; LDD_FETCH_ASK where the request does not fit the cache."""
    cdef uint64_t begin, reach, total = 0, t, i
    cdef ldd_transfer what
    cdef ldd_end here, there
    cdef ldd_fit fit = [0, 0, 0]
    cdef ldd_fetch_run run
    cdef ldd_tensor_desc wanted
    memset(&what, 0, sizeof(what))
    what.shape = (SHAPE_BLOCKS if request.flags & LDD_FETCH_BLOCKS
                  else SHAPE_SLOT_TO_BLOCKS if request.flags & LDD_FETCH_RESHAPE else SHAPE_SLOT)
    what.local_first = -1
    what.same_dtype = True
    what.remote_first = request.first
    what.remote_stop = request.stop
    memset(&there, 0, sizeof(there))                # the peer is the one that asks: its end is the local one
    there.num_tensors = request.num_tensors
    there.stride = request.stride_bytes
    memset(&wanted, 0, sizeof(wanted))
    wanted.dtype = request.key.dtype                # 0: the peer takes any
    there.described = &wanted
    there.is_blocks = what.shape != SHAPE_SLOT
    there.host = (request.flags & LDD_FETCH_TO_HOST) != 0
    ldd_end_here(view, view.batch_index, &here)
    if (ldd_fit_ends(&what, &there, &here, &fit, NULL) != LDD_OK
            or request.num_runs * fit.count > LDD_FETCH_MAX_SEGMENTS):
        return LDD_FETCH_ASK
    begin = 0 if view.is_blocks else view.batch_index * view.stride
    reach = view.num_slots * view.stride if view.is_blocks else view.stride
    for i in range(request.num_runs):
        memcpy(&run, runs + i * sizeof(run), sizeof(run))
        if run.bytes == 0 or run.offset > reach or run.bytes > reach - run.offset:
            return LDD_FETCH_ASK
    served.segments = <LddSegment*>malloc(request.num_runs * fit.count * sizeof(LddSegment))
    if served.segments == NULL:
        return ldd_fail(detail, LDD_E_NO_MEMORY, b"no memory for a plan of %llu segments",
                        <unsigned long long>(request.num_runs * fit.count))
    for t in range(fit.remote_first, fit.remote_first + fit.count):
        for i in range(request.num_runs):
            memcpy(&run, runs + i * sizeof(run), sizeof(run))
            if not _add_segment(served, view.addrs[t] + begin + run.offset, run.bytes, &total):
                return LDD_FETCH_ASK
    return LDD_OK if total == num_bytes else <ldd_status>LDD_FETCH_ASK


cdef int32_t _on_begin(void* context, const uint8_t* token, const void* words, size_t num_words_bytes,
                      uint64_t num_bytes, LddFetchSource* source, char* text, size_t text_size) noexcept nogil:
    cdef ldd_node* node = <ldd_node*>context
    cdef ldd_fetch_request request
    cdef ldd_cache_view view
    cdef ldd_served* served
    cdef ldd_detail detail
    cdef ldd_status status
    cdef size_t context_at
    detail.text[0] = 0
    if num_words_bytes < sizeof(request):
        return LDD_FETCH_ASK
    memcpy(&request, words, sizeof(request))
    if request.num_runs == 0 or request.num_runs > LDD_FETCH_MAX_SEGMENTS or request.key.access != LDD_ACCESS_READ:
        return LDD_FETCH_ASK
    context_at = sizeof(request) + request.num_runs * sizeof(ldd_fetch_run)
    if num_words_bytes != context_at and num_words_bytes != context_at + LDD_FETCH_CONTEXT_BYTES:
        return LDD_FETCH_ASK
    served = <ldd_served*>calloc(1, sizeof(ldd_served))
    if served != NULL:
        served.start_ns = ldd_now_ns()
        served.asked = request.key
        served.num_bytes = num_bytes
        memcpy(served.context, <const uint8_t*>words + context_at, num_words_bytes - context_at)
    if served == NULL:
        status = ldd_fail(&detail, LDD_E_NO_MEMORY, b"no memory for a delivery")
    elif not _is_linked(node, token, served):
        status = ldd_fail(&detail, LDD_E_NOT_LINKED, b"the link was closed here")
    else:
        status = ldd_reply_find(node, &request.key, &view, &detail)
        if status == LDD_OK:
            status = _cut(&request, <const uint8_t*>words + sizeof(request), &view, num_bytes, served, &detail)
            if status != LDD_OK:
                ldd_table_unpin(node.table, view.slot, view.generation)
    if status != LDD_OK:
        if served != NULL:
            if status < 0:
                ldd_trace_span(&node.record, LDD_EVENT_REFUSE, served.start_ns, served.cluster_id, request.key.kind,
                               request.key.id, request.key.model_id, 0, status)
            free(served.segments)
        free(served)
        snprintf(text, text_size, b"%s", detail.text)
        return status
    served.slot = view.slot
    served.generation = view.generation
    served.key_index = view.key_index if request.flags & LDD_FETCH_TAKE else LDD_NO_KEY
    served.key_generation = view.key_generation
    source.segments = served.segments
    source.num_segments = served.num_segments
    source.never_unmapped = view.owned
    source.ticket = served
    return LDD_OK


cdef void _on_end(void* context, void* ticket, int32_t confirmed) noexcept nogil:
    cdef ldd_served* served = <ldd_served*>ticket
    cdef ldd_node* node = <ldd_node*>context
    ldd_record_count(served.peer, LDD_OP_SERVE, ldd_now_ns() - served.start_ns, served.num_bytes if confirmed else 0,
                     not confirmed)
    ldd_trace_span(&node.record, LDD_EVENT_SERVE, served.start_ns, served.cluster_id, served.asked.kind,
                   served.asked.id, served.asked.model_id, served.num_bytes, LDD_OK if confirmed else LDD_E_FAILED)
    ldd_trace_context(&node.record, served.start_ns, served.cluster_id, served.context)
    ldd_table_settle(node.table, served.slot, served.generation,
                     served.key_index if confirmed else LDD_NO_KEY, served.key_generation)
    free(served.segments)
    free(served)


cdef void ldd_serve_pull(ldd_node* node) noexcept nogil:
    node.regions.fetch_hooks.begin = _on_begin
    node.regions.fetch_hooks.end = _on_end
    node.regions.fetch_context = node
