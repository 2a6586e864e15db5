"""A pull in one exchange: the owner looks up, sends, and lets go, on the connections the bytes travel by.

Over the network the steps of a pull (resolve, get, release) cost a round trip each. Here the request says where in each
tensor of the source the bytes lie, which follows from the block lists alone; the owner adds the addresses. The answer
is the bytes, which land in the destination as they come, and then one small frame says that all are in place: with it
the owner lets go of the cache and, where the pull takes its key, of that. Nobody waits for this frame, see
``serve_pull.pyx``.

This is for pulls that nothing is wrong with. Whatever is goes by the steps, which say so in the words of the API, and
so does what needs to know the source first: pieces of a slot that do not fill their blocks, layers taken one by one.
"""
from libc.stdint cimport UINT64_MAX, int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from llm_datadist.core.base.checked_math cimport ldd_mul_overflows
from llm_datadist.core.base.provider cimport LDD_FETCH_MAX_REQUEST_BYTES, CompleteHandle, LddFetchReply
from llm_datadist.core.base.status cimport LDD_OK, ldd_fail
from llm_datadist.core.base.wait cimport ldd_hixl_result
from llm_datadist.core.link.requests cimport ldd_reply_room
from llm_datadist.core.link.wire cimport (
    LDD_ACCESS_READ, LDD_FETCH_ASK, LDD_FETCH_BLOCKS, LDD_FETCH_MAX_PIECES, LDD_FETCH_RESHAPE, LDD_FETCH_TAKE,
    LDD_FETCH_TO_HOST, ldd_fetch_request, ldd_fetch_run,
)
from llm_datadist.core.plan.block_plan cimport (
    ldd_desc_list_clear, ldd_plan_blocks, ldd_plan_contiguous, ldd_plan_slot_to_blocks,
)
from llm_datadist.core.transfer.batch cimport ldd_batch_count, ldd_batch_finish
from llm_datadist.core.transfer.steps cimport SHAPE_BLOCKS, SHAPE_SLOT


cdef bint _plan(ldd_link* link, const ldd_transfer* what, const ldd_cache_view* local, uint32_t first,
               uint32_t count) noexcept nogil:
    """Plan from the start of each source tensor or slot, wherever that may be; False where the steps must tell more."""
    cdef const uint64_t* origins = <const uint64_t*>link.reply
    cdef const uint64_t* addrs = local.addrs + first
    cdef uint64_t begin, nbytes, slot_bytes
    if local.stride == 0:
        return False
    ldd_desc_list_clear(&link.descs)
    link.descs.by_tensor = True                     # the order of the bytes is that of the tensors
    if what.shape == SHAPE_BLOCKS:
        return ldd_plan_blocks(&link.descs, origins, what.remote_blocks, UINT64_MAX // local.stride, addrs,
                               what.local_blocks, local.num_slots, count, local.stride, what.num_blocks, False,
                               NULL) == LDD_OK
    if what.shape == SHAPE_SLOT:
        if what.local_slot >= local.num_slots or what.local_offset >= local.stride:
            return False
        nbytes = <uint64_t>what.size if what.size > 0 else local.stride - what.local_offset
        begin = what.local_slot * local.stride + what.local_offset
        return (nbytes <= local.stride - what.local_offset
                and ldd_plan_contiguous(&link.descs, origins, what.remote_offset, addrs, begin, count, nbytes,
                                        NULL) == LDD_OK)
    # Every block is filled: the owner finds out whether its slot is that long.
    return (not ldd_mul_overflows(what.num_blocks, local.stride, &slot_bytes)
            and ldd_plan_slot_to_blocks(&link.descs, origins, 0, slot_bytes, addrs, what.local_blocks,
                                        local.num_slots, count, local.stride, what.num_blocks, False, NULL) == LDD_OK)


cdef uint32_t _write_request(ldd_link* link, const ldd_transfer* what, const ldd_cache_view* local,
                            uint32_t count) noexcept nogil:
    """Say what is planned, in the link's reply buffer; bytes of it, 0 when it is too much to be said at once."""
    cdef size_t nbytes = sizeof(ldd_fetch_request) + link.descs.num_runs * sizeof(ldd_fetch_run), i
    cdef ldd_fetch_request request
    cdef ldd_fetch_run* runs
    if (link.descs.num_runs > LDD_FETCH_MAX_PIECES // count or nbytes > LDD_FETCH_MAX_REQUEST_BYTES
            or ldd_reply_room(link, nbytes) < 0):
        return 0
    memset(&request, 0, sizeof(request))
    request.key.kind = <uint8_t>what.kind
    request.key.access = LDD_ACCESS_READ
    request.key.batch_index = <uint32_t>what.batch_index
    request.key.id = what.id
    request.key.model_id = what.model_id
    request.flags = ((LDD_FETCH_TAKE if what.release else 0) | (LDD_FETCH_BLOCKS if what.shape == SHAPE_BLOCKS else 0)
                     | (LDD_FETCH_TO_HOST if local.host else 0)
                     | (0 if what.shape == SHAPE_BLOCKS or what.shape == SHAPE_SLOT else LDD_FETCH_RESHAPE))
    request.num_tensors = count
    request.first = what.remote_first
    request.stop = what.remote_stop
    request.stride_bytes = local.stride
    request.num_runs = link.descs.num_runs
    memcpy(link.reply, &request, sizeof(request))
    runs = <ldd_fetch_run*>(link.reply + sizeof(request))
    for i in range(link.descs.num_runs):
        runs[i].offset = link.descs.runs[i].src
        runs[i].bytes = link.descs.runs[i].length
    return <uint32_t>nbytes


cdef ldd_status ldd_one_pull(ldd_link* link, const ldd_transfer* what, const ldd_cache_view* local, int64_t deadline_ns,
                          ldd_detail* detail) noexcept nogil:
    cdef uint32_t first = 0, count = local.num_tensors, nbytes
    cdef CompleteHandle handle = NULL
    cdef LddFetchReply reply
    cdef ldd_status status
    if (not link.fetches or link.client == NULL or what.put or what.tensors_per_step
            or (what.release and what.remote_first >= 0) or local.is_blocks != (what.shape != SHAPE_SLOT)):
        return LDD_FETCH_ASK
    if what.local_first >= 0:
        if what.local_first >= what.local_stop or what.local_stop > local.num_tensors:
            return LDD_FETCH_ASK
        first = <uint32_t>what.local_first
        count = <uint32_t>(what.local_stop - what.local_first)
    if ldd_reply_room(link, count * sizeof(uint64_t)) < 0:
        return LDD_FETCH_ASK
    memset(link.reply, 0, count * sizeof(uint64_t))
    if not _plan(link, what, local, first, count) or link.descs.count == 0:
        return LDD_FETCH_ASK
    nbytes = _write_request(link, what, local, count)
    if nbytes == 0:
        return LDD_FETCH_ASK
    status = ldd_hixl_result(link.node.provider, link.node.provider.ext.LddClientFetchAsync(
        link.client, link.reply, nbytes, <uint32_t>link.descs.count, link.descs.items, &reply, &handle),
        b"read from the peer", detail)
    status = ldd_batch_finish(link, status, handle, deadline_ns, detail)
    if status != LDD_OK:
        return status
    if reply.status == LDD_OK:
        ldd_batch_count(link, False)
        return LDD_OK
    if reply.status > 0:
        return LDD_FETCH_ASK
    return ldd_fail(detail, reply.status, b"cluster %llu: %s", <unsigned long long>link.cluster_id, reply.text)
