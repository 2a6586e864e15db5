"""Whether the two ends of a transfer fit, and the plan for ends that do: every rule stands here, and here alone.

The requester asks with the source's descriptor in hand, and gets words for its caller. Where it has none yet, because
the whole pull is one exchange, it asks about a source that would fit. The owner of a source asks about its own cache
and what the peer says of the destination: a lie there bends the peer's own bytes only, and which of its bytes leave the
owner checks apart, see ``serve_pull.pyx``.
"""
from libc.stdint cimport int64_t, uint32_t, uint64_t

from llm_datadist.core.base.status cimport LDD_E_NOT_ENABLED, LDD_E_PARAM, LDD_OK, ldd_fail
from llm_datadist.core.base.tensor_desc cimport ldd_tensor_text
from llm_datadist.core.link.wire cimport LDD_DESC_BLOCKS, LDD_DESC_HOST, LDD_DESC_OWNED
from llm_datadist.core.plan.block_plan cimport (
    ldd_desc_list_clear, ldd_plan_blocks, ldd_plan_contiguous, ldd_plan_slot_to_blocks,
)

cdef enum:
    DESCRIBED_BYTES = 120                       # two of them fit the text of an error


cdef void ldd_end_here(const ldd_cache_view* view, uint64_t slot, ldd_end* out) noexcept nogil:
    out.cache_id = view.cache_id
    out.addrs = view.addrs
    out.described = view.described
    out.num_tensors = view.num_tensors
    out.num_slots = view.num_slots
    out.stride = view.stride
    out.slot = slot
    out.is_blocks = view.is_blocks
    out.host = view.host
    out.owned = view.owned


cdef void ldd_end_there(const ldd_remote_cache* remote, ldd_end* out) noexcept nogil:
    out.cache_id = remote.desc.cache_id
    out.addrs = remote.addrs
    out.described = &remote.desc.tensor
    out.num_tensors = remote.desc.num_tensors
    out.num_slots = remote.desc.num_slots
    out.stride = remote.desc.stride_bytes
    out.slot = remote.desc.batch_index
    out.is_blocks = (remote.desc.flags & LDD_DESC_BLOCKS) != 0
    out.host = (remote.desc.flags & LDD_DESC_HOST) != 0
    out.owned = (remote.desc.flags & LDD_DESC_OWNED) != 0


# --------------------------------------------------------------------------------------------------------- rules

cdef ldd_status ldd_fit_ends(const ldd_transfer* what, const ldd_end* local, const ldd_end* remote, ldd_fit* fit,
                             ldd_detail* detail) noexcept nogil:
    cdef uint32_t num_remote = 0
    cdef ldd_status status = _check_layouts(what, local, remote, detail)
    if status == LDD_OK and what.same_dtype:
        status = ldd_fit_dtypes(local, remote, what.cluster_id, detail)
    if status == LDD_OK:
        status = _select(what.local_first, what.local_stop, local.num_tensors,
                         b"source" if what.put else b"destination", &fit.local_first, &fit.count, detail)
    if status == LDD_OK:
        status = _select(what.remote_first, what.remote_stop, remote.num_tensors,
                         b"destination" if what.put else b"source", &fit.remote_first, &num_remote, detail)
    if status < 0:
        return status
    if fit.count != num_remote:
        return ldd_fail(detail, LDD_E_PARAM, b"%u local and %u remote tensors are selected: the numbers must be equal",
                        fit.count, num_remote)
    if what.shape == SHAPE_BLOCKS and local.stride != remote.stride:
        return ldd_fail(detail, LDD_E_PARAM,
                        b"a block is %llu bytes here and %llu bytes in cache %lld of cluster %llu",
                        <unsigned long long>local.stride, <unsigned long long>remote.stride,
                        <long long>remote.cache_id, <unsigned long long>what.cluster_id)
    return LDD_OK


cdef ldd_status ldd_fit_dtypes(const ldd_end* local, const ldd_end* remote, uint64_t cluster_id,
                               ldd_detail* detail) noexcept nogil:
    cdef char here[DESCRIBED_BYTES]
    cdef char there[DESCRIBED_BYTES]
    if (local.described == NULL or remote.described == NULL or local.described.dtype == 0
            or remote.described.dtype == 0 or local.described.dtype == remote.described.dtype):
        return LDD_OK
    ldd_tensor_text(local.described, local.num_tensors, here, sizeof(here))
    ldd_tensor_text(remote.described, remote.num_tensors, there, sizeof(there))
    return ldd_fail(detail, LDD_E_PARAM, b"local cache %lld has %s, but cache %lld of cluster %llu has %s: give both "
                    b"one data type, or move bytes as they are with llm.Strict=0", <long long>local.cache_id,
                    <const char*>here, <long long>remote.cache_id, <unsigned long long>cluster_id, <const char*>there)


cdef ldd_status _select(int64_t first, int64_t stop, uint32_t num_tensors, const char* end, uint32_t* out_first,
                        uint32_t* out_count, ldd_detail* detail) noexcept nogil:
    if first < 0:
        out_first[0] = 0
        out_count[0] = num_tensors
        return LDD_OK
    if first >= stop or stop > num_tensors:
        return ldd_fail(detail, LDD_E_PARAM, b"%s tensors [%lld, %lld) are outside the cache's %u tensors", end,
                        <long long>first, <long long>stop, num_tensors)
    out_first[0] = <uint32_t>first
    out_count[0] = <uint32_t>(stop - first)
    return LDD_OK


cdef inline const char* _layout(bint is_blocks) noexcept nogil:
    return b"blocks" if is_blocks else b"contiguous"


cdef ldd_status _check_layouts(const ldd_transfer* what, const ldd_end* local, const ldd_end* remote,
                               ldd_detail* detail) noexcept nogil:
    cdef bint want_local_blocks = what.shape == SHAPE_BLOCKS or (what.shape == SHAPE_SLOT_TO_BLOCKS and not what.put)
    cdef bint want_remote_blocks = what.shape == SHAPE_BLOCKS or (what.shape == SHAPE_SLOT_TO_BLOCKS and what.put)
    if local.is_blocks != want_local_blocks:
        return ldd_fail(detail, LDD_E_PARAM, b"local cache %lld is a %s cache, this call needs a %s cache",
                        <long long>local.cache_id, _layout(local.is_blocks),
                        _layout(want_local_blocks))
    if remote.is_blocks != want_remote_blocks:
        return ldd_fail(detail, LDD_E_PARAM, b"cache %lld of cluster %llu is a %s cache, this call needs a %s cache",
                        <long long>remote.cache_id, <unsigned long long>what.cluster_id,
                        _layout(remote.is_blocks), _layout(want_remote_blocks))
    if what.shape == SHAPE_SLOT_TO_BLOCKS and not what.put and remote.host and not local.host:
        return ldd_fail(detail, LDD_E_NOT_ENABLED,
                        b"cache %lld of cluster %llu is on the host: only a cache of the same layout can be pulled",
                        <long long>remote.cache_id, <unsigned long long>what.cluster_id)
    return LDD_OK


cdef ldd_status _slot_bytes(const ldd_transfer* what, const ldd_end* local, const ldd_end* remote, uint64_t* nbytes,
                            ldd_detail* detail) noexcept nogil:
    """How much of each tensor goes over, contiguous to contiguous; the destination's stride is the default."""
    cdef uint64_t local_stride = local.stride, remote_stride = remote.stride
    if local.slot >= local.num_slots:
        return ldd_fail(detail, LDD_E_PARAM, b"batch index %llu is outside local cache %lld of %llu",
                        <unsigned long long>local.slot, <long long>local.cache_id,
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


# ---------------------------------------------------------------------------------------------------------- plan

cdef ldd_status ldd_fit_plan(ldd_desc_list* out, const ldd_transfer* what, const ldd_end* local, uint32_t local_first,
                             const ldd_end* remote, uint32_t remote_first, uint32_t count,
                             ldd_detail* detail) noexcept nogil:
    cdef const uint64_t* local_addrs = local.addrs + local_first
    cdef const uint64_t* remote_addrs = remote.addrs + remote_first
    cdef uint64_t nbytes = 0
    cdef ldd_status status
    ldd_desc_list_clear(out)
    # A pool is one region, whereas every tensor of a registered cache is one, also where they follow each other.
    out.by_tensor = what.verify or not (local.owned and remote.owned)
    if what.shape == SHAPE_SLOT:
        status = _slot_bytes(what, local, remote, &nbytes, detail)
        if status < 0:
            return status
        return ldd_plan_contiguous(
            out, remote_addrs, remote.slot * remote.stride + what.remote_offset,
            local_addrs, local.slot * local.stride + what.local_offset, count, nbytes, detail)
    if what.shape == SHAPE_BLOCKS:
        return ldd_plan_blocks(out, remote_addrs, what.remote_blocks, remote.num_slots, local_addrs,
                               what.local_blocks, local.num_slots, count, local.stride, what.num_blocks, what.put,
                               detail)
    if what.put:
        if local.slot >= local.num_slots:
            return ldd_fail(detail, LDD_E_PARAM, b"batch index %llu is outside local cache %lld of %llu",
                            <unsigned long long>local.slot, <long long>local.cache_id,
                            <unsigned long long>local.num_slots)
        return ldd_plan_slot_to_blocks(
            out, local_addrs, local.slot * local.stride, local.stride, remote_addrs, what.remote_blocks,
            remote.num_slots, count, remote.stride, what.num_blocks, True, detail)
    return ldd_plan_slot_to_blocks(
        out, remote_addrs, remote.slot * remote.stride, remote.stride,
        local_addrs, what.local_blocks, local.num_slots, count, local.stride, what.num_blocks, False, detail)
