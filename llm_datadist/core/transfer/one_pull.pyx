"""A pull in one exchange: the owner looks up, sends, and lets go, on the connections the bytes travel by.

Over the network the steps of a pull (resolve, get, release) cost a round trip each. Here the request says where in each
tensor of the source the bytes lie, which follows from the block lists alone; the owner adds the addresses. The answer
is the bytes, which land in the destination as they come, and then one small frame says that all are in place: with it
the owner lets go of the cache and, where the pull takes its key, of that. The provider sends this frame (`confirm` in
``host/hixl/client/tcp.c``), nobody waits for it, and it ends in `_on_end` of ``serve_pull.pyx``.

This is for pulls that nothing is wrong with. Whatever is goes by the steps, which say so in the words of the API, and
so does what needs to know the source first: slots whose last block is filled in part, layers taken one by one.
"""
from libc.stdint cimport UINT64_MAX, int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from llm_datadist.core.base.checked_math cimport ldd_mul_overflows
from llm_datadist.core.base.provider cimport LDD_FETCH_MAX_REQUEST_BYTES, CompleteHandle, LddFetchReply
from llm_datadist.core.base.status cimport LDD_OK, ldd_fail
from llm_datadist.core.base.wait cimport ldd_hixl_result
from llm_datadist.core.link.requests cimport ldd_reply_room
from llm_datadist.core.link.wire cimport (
    LDD_ACCESS_READ, LDD_FETCH_ASK, LDD_FETCH_BLOCKS, LDD_FETCH_CONTEXT_BYTES, LDD_FETCH_MAX_SEGMENTS,
    LDD_FETCH_RESHAPE, LDD_FETCH_TAKE, LDD_FETCH_TO_HOST, ldd_fetch_request, ldd_fetch_run,
)
from llm_datadist.core.transfer.batch cimport ldd_batch_count, ldd_batch_finish
from llm_datadist.core.transfer.fitting cimport (
    SHAPE_BLOCKS, SHAPE_SLOT_TO_BLOCKS, ldd_fit, ldd_fit_ends, ldd_fit_plan,
)


cdef bint _assume(const ldd_transfer* what, const ldd_end* local, ldd_end* out) noexcept nogil:
    """A source that fits, each tensor of which begins at 0; False where there is none."""
    out.cache_id = -1
    out.addrs = NULL
    out.described = NULL                            # the owner compares
    out.num_tensors = <uint32_t>what.remote_stop
    if what.remote_first < 0:
        out.num_tensors = <uint32_t>(what.local_stop - what.local_first) if what.local_first >= 0 else local.num_tensors
    out.slot = 0
    out.is_blocks = what.shape == SHAPE_BLOCKS
    out.host = local.host
    out.owned = False                               # the order of the bytes is that of the tensors
    if local.stride == 0:
        return False
    if what.shape == SHAPE_SLOT_TO_BLOCKS:
        # Every block is filled: the owner finds out whether its slot is that long.
        out.num_slots = 1
        return not ldd_mul_overflows(what.num_blocks, local.stride, &out.stride)
    out.stride = local.stride if out.is_blocks else UINT64_MAX
    out.num_slots = UINT64_MAX // out.stride
    return True


cdef uint32_t _write_request(ldd_link* link, const ldd_transfer* what, const ldd_end* local,
                             uint32_t count) noexcept nogil:
    """Say what is planned, in the link's reply buffer; bytes of it, 0 when it is too much to be said at once."""
    cdef size_t nbytes = sizeof(ldd_fetch_request) + link.descs.num_runs * sizeof(ldd_fetch_run), i
    cdef ldd_fetch_request request
    cdef ldd_fetch_run* runs
    cdef bint has_context = what.context[0] | what.context[1]
    nbytes += LDD_FETCH_CONTEXT_BYTES if has_context else 0
    if (link.descs.num_runs > LDD_FETCH_MAX_SEGMENTS // count or nbytes > LDD_FETCH_MAX_REQUEST_BYTES
            or ldd_reply_room(link, nbytes) < 0):
        return 0
    memset(&request, 0, sizeof(request))
    request.key.kind = <uint8_t>what.kind
    request.key.access = LDD_ACCESS_READ
    request.key.dtype = local.described.dtype if what.same_dtype else 0
    request.key.batch_index = <uint32_t>what.batch_index
    request.key.id = what.id
    request.key.model_id = what.model_id
    request.flags = ((LDD_FETCH_TAKE if what.release else 0) | (LDD_FETCH_BLOCKS if what.shape == SHAPE_BLOCKS else 0)
                     | (LDD_FETCH_TO_HOST if local.host else 0)
                     | (LDD_FETCH_RESHAPE if what.shape == SHAPE_SLOT_TO_BLOCKS else 0))
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
    if has_context:
        memcpy(runs + link.descs.num_runs, what.context, LDD_FETCH_CONTEXT_BYTES)
    return <uint32_t>nbytes


cdef ldd_status ldd_one_pull(ldd_link* link, const ldd_transfer* what, const ldd_end* local, int64_t deadline_ns,
                             ldd_detail* detail) noexcept nogil:
    cdef uint32_t nbytes
    cdef ldd_end source
    cdef ldd_fit fit = [0, 0, 0]
    cdef CompleteHandle handle = NULL
    cdef LddFetchReply reply
    cdef ldd_status status
    if (not link.fetches or link.client == NULL or what.put or what.tensors_per_step
            or (what.release and what.remote_first >= 0) or not _assume(what, local, &source)
            or ldd_fit_ends(what, local, &source, &fit, NULL) != LDD_OK
            or ldd_reply_room(link, fit.count * sizeof(uint64_t)) < 0):
        return LDD_FETCH_ASK
    memset(link.reply, 0, fit.count * sizeof(uint64_t))
    source.addrs = <const uint64_t*>link.reply
    if (ldd_fit_plan(&link.descs, what, local, fit.local_first, &source, 0, fit.count, NULL) != LDD_OK
            or link.descs.count == 0):
        return LDD_FETCH_ASK
    nbytes = _write_request(link, what, local, fit.count)
    if nbytes == 0:
        return LDD_FETCH_ASK
    what.progress.stage = b"transfer"
    status = ldd_hixl_result(link.node.provider, link.node.provider.ext.LddClientFetchAsync(
        link.client, link.reply, nbytes, <uint32_t>link.descs.count, link.descs.items, &reply, &handle),
        b"read from the peer", detail)
    status = ldd_batch_finish(link, status, handle, deadline_ns, detail)
    if status != LDD_OK:
        return status
    if reply.status == LDD_OK:
        ldd_batch_count(link, False)
        return LDD_OK
    what.progress.stage = b"resolve"            # the owner sent no bytes
    if reply.status > 0:
        return LDD_FETCH_ASK
    return ldd_fail(detail, reply.status, b"cluster %llu: %s", <unsigned long long>link.cluster_id, reply.text)
