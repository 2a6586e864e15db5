"""Copies inside this process: what copy_cache, copy_blocks and swap_blocks move, and the moving itself.

The engine plans with the planners below and then executes, both without the GIL. An operation never overlaps
itself unless the memory it was planned for does, and operations are carried out in order, so a plan means what
the pairs mean one after the other.

Operations of 2 MiB and more on average are queued on the caller's stream, smaller ones go one blocking
`aclrtMemcpy` after the other: queueing a scattered 64 MiB in chunks of 16 KiB took the host provider three times
as long as copying it in place, and six times where it must wait for memory it does not know.
"""
from libc.stdint cimport INT32_MAX, INT64_MAX, UINT64_MAX, int32_t, int64_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memset

from llm_datadist.core.base.checked_math cimport ldd_add_overflows, ldd_mul_overflows
from llm_datadist.core.base.provider cimport (
    ACL_ERROR_RT_FEATURE_NOT_SUPPORT, ACL_MEMCPY_HOST_TO_HOST, aclError, aclrtMemcpyKind, aclrtStream, ldd_provider,
)
from llm_datadist.core.base.status cimport (
    LDD_E_PARAM, LDD_E_TIMEOUT, LDD_OK, ldd_detail, ldd_fail, ldd_status,
)
from llm_datadist.core.base.sync cimport ldd_now_ns
from llm_datadist.core.base.wait cimport ldd_acl_result, ldd_map_acl
from llm_datadist.core.plan.block_plan cimport ldd_plan_reserve
from llm_datadist.core.plan.index_list cimport ldd_index_error, ldd_load_index

cdef enum:
    STREAM_OP_BYTES = 2 << 20       # average operation from which on queueing costs nothing
    OPS_PER_LOOK = 64               # operations between two looks at the clock

cdef uint64_t MAX_COPY_BYTES = <uint64_t>1 << 32    # the runtime's limit for one asynchronous copy


cdef void ldd_op_list_clear(ldd_op_list* out) noexcept nogil:
    """Forget the operations and keep the memory."""
    out.count = 0
    out.bytes = 0


cdef void ldd_op_list_free(ldd_op_list* out) noexcept nogil:
    free(out.items)
    memset(out, 0, sizeof(out[0]))


cdef inline ldd_status _reserve(ldd_op_list* out, size_t extra, ldd_detail* detail) noexcept nogil:
    return ldd_plan_reserve(<void**>&out.items, &out.capacity, out.count, extra, sizeof(ldd_local_op), detail)


cdef ldd_status ldd_plan_copy_cache(
    ldd_op_list* out, const ldd_slots* dst, uint64_t dst_slot, const ldd_slots* src, uint64_t src_slot,
    uint64_t offset, int64_t nbytes, ldd_detail* detail
) noexcept nogil:
    cdef uint64_t length, end, dst_offset, src_offset, unused
    cdef size_t t
    cdef ldd_local_op* op
    cdef ldd_status status
    if src.num_tensors != dst.num_tensors:
        return ldd_fail(detail, LDD_E_PARAM, b"the source has %zu tensors and the destination %zu",
                        src.num_tensors, dst.num_tensors)
    status = _check_slot(b"source", src, src_slot, offset, detail)
    if status == LDD_OK:
        status = _check_slot(b"destination", dst, dst_slot, offset, detail)
    if status < 0:
        return status
    if nbytes == 0 or nbytes < -1:
        return ldd_fail(detail, LDD_E_PARAM, b"size is %lld, -1 or more than 0 is allowed", <long long>nbytes)
    length = src.stride - offset if nbytes == -1 else <uint64_t>nbytes
    if length > src.stride - offset or length > dst.stride - offset:
        return ldd_fail(
            detail, LDD_E_PARAM,
            b"%llu bytes from offset %llu exceed the strides of %llu (source) and %llu (destination)",
            <unsigned long long>length, <unsigned long long>offset, <unsigned long long>src.stride,
            <unsigned long long>dst.stride)
    if (ldd_mul_overflows(src.num_slots, src.stride, &unused)
            or ldd_mul_overflows(dst.num_slots, dst.stride, &unused)):
        return _beyond(detail)
    src_offset = src_slot * src.stride + offset
    dst_offset = dst_slot * dst.stride + offset
    for t in range(src.num_tensors):
        if (ldd_add_overflows(src.addrs[t], src_offset + length, &end)
                or ldd_add_overflows(dst.addrs[t], dst_offset + length, &end)):
            return _beyond(detail)
    status = _reserve(out, src.num_tensors, detail)
    if status < 0 or length == 0:
        return status
    for t in range(src.num_tensors):
        op = &out.items[out.count]
        op.src = <const void*>(src.addrs[t] + src_offset)
        op.dst = <void*>(dst.addrs[t] + dst_offset)
        op.bytes = length
        out.count += 1
    out.bytes += length * src.num_tensors
    return LDD_OK


cdef ldd_status _check_slot(
    const char* side, const ldd_slots* slots, uint64_t slot, uint64_t offset, ldd_detail* detail
) noexcept nogil:
    if slot >= slots.num_slots:
        return ldd_fail(detail, LDD_E_PARAM, b"batch index %llu of the %s is not below its batch size %llu",
                        <unsigned long long>slot, side, <unsigned long long>slots.num_slots)
    if offset > 0 and offset >= slots.stride:
        return ldd_fail(detail, LDD_E_PARAM, b"offset %llu is not below the stride %llu of the %s",
                        <unsigned long long>offset, <unsigned long long>slots.stride, side)
    return LDD_OK


cdef ldd_status _beyond(ldd_detail* detail) noexcept nogil:
    return ldd_fail(detail, LDD_E_PARAM, b"the copy reaches beyond the address space")


cdef ldd_status ldd_plan_copy_blocks(
    ldd_op_list* out, const uint64_t* addrs, size_t num_tensors, uint64_t num_blocks, uint64_t block_bytes,
    const int64_t* src_blocks, const int64_t* dst_blocks, size_t num_pairs, ldd_detail* detail
) noexcept nogil:
    return ldd_plan_swap_blocks(out, addrs, src_blocks, num_blocks, addrs, dst_blocks, num_blocks,
                                num_tensors, block_bytes, num_pairs, detail)


cdef ldd_status ldd_plan_swap_blocks(
    ldd_op_list* out,
    const uint64_t* src_addrs, const int64_t* src_blocks, uint64_t num_src_blocks,
    const uint64_t* dst_addrs, const int64_t* dst_blocks, uint64_t num_dst_blocks,
    size_t num_tensors, uint64_t block_bytes, size_t num_pairs, ldd_detail* detail
) noexcept nogil:
    """Plan the first tensor from the pairs, and every other one by moving that plan."""
    cdef size_t base = out.count, per_tensor, t, i
    cdef int64_t s, d
    cdef uint64_t max_src = 0, max_dst = 0, src_end, dst_end, unused, bytes_before = out.bytes
    cdef ldd_local_op* op
    cdef ldd_status status
    if num_pairs == 0 or num_tensors == 0:
        return LDD_OK
    if block_bytes == 0:
        return ldd_fail(detail, LDD_E_PARAM, b"the block size is 0 bytes")
    status = _reserve(out, num_pairs, detail)
    if status < 0:
        return status
    for i in range(num_pairs):
        s = ldd_load_index(src_blocks + i)
        d = ldd_load_index(dst_blocks + i)
        if <uint64_t>s >= num_src_blocks or <uint64_t>d >= num_dst_blocks:
            status = (ldd_index_error(b"src_blocks", i, s, num_src_blocks, detail) if <uint64_t>s >= num_src_blocks
                      else ldd_index_error(b"dst_blocks", i, d, num_dst_blocks, detail))
            break
        max_src = max(max_src, <uint64_t>s)
        max_dst = max(max_dst, <uint64_t>d)
        # Wraps at worst, in which case the check below throws the plan away.
        _append(out, base, dst_addrs[0] + <uint64_t>d * block_bytes, src_addrs[0] + <uint64_t>s * block_bytes,
                block_bytes)
    if status == LDD_OK:
        if ldd_mul_overflows(max_src + 1, block_bytes, &src_end):
            status = _beyond(detail)
        elif ldd_mul_overflows(max_dst + 1, block_bytes, &dst_end):
            status = _beyond(detail)
        else:
            for t in range(num_tensors):
                if (ldd_add_overflows(src_addrs[t], src_end, &unused)
                        or ldd_add_overflows(dst_addrs[t], dst_end, &unused)):
                    status = _beyond(detail)
                    break
    per_tensor = out.count - base
    if status == LDD_OK:
        if ldd_mul_overflows(per_tensor, num_tensors - 1, &unused):
            unused = UINT64_MAX
        status = _reserve(out, unused, detail)
    if status < 0:
        out.count = base
        out.bytes = bytes_before
        return status
    for t in range(1, num_tensors):
        for i in range(per_tensor):
            op = &out.items[out.count]
            op.dst = <void*>(<uint64_t>out.items[base + i].dst + dst_addrs[t] - dst_addrs[0])
            op.src = <const void*>(<uint64_t>out.items[base + i].src + src_addrs[t] - src_addrs[0])
            op.bytes = out.items[base + i].bytes
            out.count += 1
    out.bytes = bytes_before + (out.bytes - bytes_before) * num_tensors
    return LDD_OK


cdef inline void _append(ldd_op_list* out, size_t base, uint64_t dst, uint64_t src, uint64_t nbytes) noexcept nogil:
    """Add a copy, or extend the one before it where both together read nothing that they write."""
    cdef ldd_local_op* last
    cdef uint64_t distance = dst - src if dst > src else src - dst
    if distance == 0:
        return                                  # a block onto itself
    out.bytes += nbytes
    if out.count > base:
        last = &out.items[out.count - 1]
        if distance < last.bytes + nbytes:
            pass                                # merged, it would read what it has just written
        elif <uint64_t>last.src + last.bytes == src and <uint64_t>last.dst + last.bytes == dst:
            last.bytes += nbytes
            return
        elif src + nbytes == <uint64_t>last.src and dst + nbytes == <uint64_t>last.dst:
            last.src = <const void*>src
            last.dst = <void*>dst
            last.bytes += nbytes
            return
    last = &out.items[out.count]
    last.dst = <void*>dst
    last.src = <const void*>src
    last.bytes = nbytes
    out.count += 1


# How the chunks of one ldd_local_copy call are carried out.
ctypedef struct copier:
    const ldd_provider* provider
    aclrtStream stream              # NULL: one blocking copy after the other
    aclrtMemcpyKind kind


cdef ldd_status ldd_local_copy(
    const ldd_provider* provider, aclrtStream stream, const ldd_local_op* ops, size_t num_ops,
    aclrtMemcpyKind kind, int64_t deadline_ns, ldd_detail* detail
) noexcept nogil:
    cdef copier how
    cdef uint64_t total = 0
    cdef size_t i
    cdef aclError code = 0
    cdef ldd_status status
    cdef bint late = False
    for i in range(num_ops):
        total += ops[i].bytes
    how.provider = provider
    how.kind = kind
    # The runtime queues no copies between two places in host memory.
    how.stream = NULL
    if num_ops != 0 and total // num_ops >= STREAM_OP_BYTES and kind != ACL_MEMCPY_HOST_TO_HOST:
        how.stream = stream
    for i in range(num_ops):
        code = _copy(&how, &ops[i])
        if code == ACL_ERROR_RT_FEATURE_NOT_SUPPORT and how.stream != NULL:
            # Both addresses turned out to be host memory. Go on blocking, after what is queued.
            status = _drain(&how, 0, False, deadline_ns, detail)
            if status < 0:
                return status
            how.stream = NULL
            code = _copy(&how, &ops[i])
        if code != 0:
            break
        if i % OPS_PER_LOOK == OPS_PER_LOOK - 1 and deadline_ns != INT64_MAX and ldd_now_ns() >= deadline_ns:
            late = i + 1 < num_ops
            if late:
                break
    if how.stream != NULL:
        return _drain(&how, code, late, deadline_ns, detail)
    if code != 0:
        return ldd_acl_result(provider, code, b"copy memory", detail)
    if late:
        return ldd_fail(detail, LDD_E_TIMEOUT, b"%zu of %zu copies were made in time", i + 1, num_ops)
    return LDD_OK


cdef aclError _copy(const copier* how, const ldd_local_op* op) noexcept nogil:
    """Carry out one operation; where it overlaps itself, in chunks that do not, from the safe end."""
    cdef uint64_t dst = <uint64_t>op.dst, src = <uint64_t>op.src
    cdef uint64_t distance = dst - src if dst > src else src - dst
    cdef uint64_t step = min(distance, MAX_COPY_BYTES)
    cdef uint64_t done = 0, chunk
    cdef aclError code
    if distance == 0:
        return 0
    if distance >= op.bytes:
        step = MAX_COPY_BYTES
    while done < op.bytes:
        chunk = min(step, op.bytes - done)
        if dst < src or distance >= op.bytes:
            code = _copy_chunk(how, dst + done, src + done, chunk)
        else:
            code = _copy_chunk(how, dst + op.bytes - done - chunk, src + op.bytes - done - chunk, chunk)
        if code != 0:
            return code
        done += chunk
    return 0


cdef inline aclError _copy_chunk(const copier* how, uint64_t dst, uint64_t src, uint64_t nbytes) noexcept nogil:
    if how.stream == NULL:
        return how.provider.acl.aclrtMemcpy(<void*>dst, nbytes, <const void*>src, nbytes, how.kind)
    return how.provider.acl.aclrtMemcpyAsync(<void*>dst, nbytes, <const void*>src, nbytes, how.kind, how.stream)


cdef ldd_status _drain(
    const copier* how, aclError submitted, bint late, int64_t deadline_ns, ldd_detail* detail
) noexcept nogil:
    """Wait for what was queued, also after a failed submission: nothing may be in flight on return."""
    cdef const ldd_provider* provider = how.provider
    cdef int64_t left_ns
    cdef int32_t timeout_ms = -1
    cdef aclError code
    if deadline_ns != INT64_MAX:
        left_ns = deadline_ns - ldd_now_ns()
        # 0 means nothing defined to the runtime.
        timeout_ms = <int32_t>max(1, min(left_ns // 1000000 + (left_ns % 1000000 > 0), <int64_t>INT32_MAX))
    code = provider.acl.aclrtSynchronizeStreamWithTimeout(how.stream, timeout_ms)
    if ldd_map_acl(code) == LDD_E_TIMEOUT and (
            provider.acl.aclrtStreamAbort == NULL or provider.acl.aclrtStreamAbort(how.stream) != 0):
        provider.acl.aclrtSynchronizeStreamWithTimeout(how.stream, -1)      # what cannot be dropped has to end
    if submitted != 0:
        return ldd_acl_result(provider, submitted, b"queue a memory copy", detail)
    if code != 0:
        return ldd_acl_result(provider, code, b"copy memory", detail)
    if late:
        return ldd_fail(detail, LDD_E_TIMEOUT, b"not all copies were made in time")
    return LDD_OK
