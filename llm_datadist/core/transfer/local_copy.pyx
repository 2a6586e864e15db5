"""Copies inside this process: what copy_cache, copy_blocks and swap_blocks move, and the moving itself.

The engine plans with the planners below and then executes, both without the GIL. An operation never overlaps
itself unless the memory it was planned for does, and operations are carried out in order, so a plan means what
the pairs mean one after the other.

Operations of 2 MiB and more on average are queued on the caller's stream, smaller ones go one blocking
`aclrtMemcpy` after the other: queueing a scattered 64 MiB in pieces of 16 KiB took the host provider three times
as long as copying it in place, and six times where it must wait for memory it does not know.
"""
cimport cython
from libc.stdint cimport INT32_MAX, INT64_MAX, UINT64_MAX, int32_t, int64_t, uint64_t, uintptr_t
from libc.stdlib cimport free, realloc
from libc.string cimport memset

from llm_datadist.core.base.checked_math cimport ldd_add_overflows, ldd_mul_overflows
from llm_datadist.core.base.provider cimport (
    ACL_ERROR_RT_FEATURE_NOT_SUPPORT, ACL_MEMCPY_HOST_TO_HOST, aclError, aclrtMemcpyKind, aclrtStream, ldd_provider,
)
from llm_datadist.core.base.status cimport (
    LDD_E_NO_MEMORY, LDD_E_PARAM, LDD_E_TIMEOUT, LDD_OK, check, ldd_detail, ldd_fail, ldd_status,
)
from llm_datadist.core.base.sync cimport ldd_now_ns
from llm_datadist.core.base.wait cimport TableProbe, ldd_acl_result, ldd_map_acl
from llm_datadist.core.plan.index_list cimport IndexList, ldd_index_error, ldd_load_index

cdef enum:
    STREAM_OP_BYTES = 2 << 20       # average operation from which on queueing costs nothing
    OPS_PER_LOOK = 64               # operations between two looks at the clock
    MIN_CAPACITY = 64

cdef uint64_t MAX_COPY_BYTES = <uint64_t>1 << 32    # the runtime's limit for one asynchronous copy


cdef void ldd_op_list_init(ldd_op_list* out) noexcept nogil:
    memset(out, 0, sizeof(out[0]))


cdef void ldd_op_list_clear(ldd_op_list* out) noexcept nogil:
    """Forget the operations and keep the memory."""
    out.count = 0
    out.bytes = 0


cdef void ldd_op_list_free(ldd_op_list* out) noexcept nogil:
    free(out.items)
    memset(out, 0, sizeof(out[0]))


cdef ldd_status _reserve(ldd_op_list* out, uint64_t extra, ldd_detail* detail) noexcept nogil:
    """Make room for `extra` more operations."""
    cdef uint64_t needed, nbytes
    cdef void* grown
    if ldd_add_overflows(out.count, extra, &needed):
        needed = UINT64_MAX
    if needed <= out.capacity:
        return LDD_OK
    needed = max(needed, 2 * out.capacity, <uint64_t>MIN_CAPACITY)
    grown = NULL if ldd_mul_overflows(needed, sizeof(ldd_local_op), &nbytes) else realloc(out.items, nbytes)
    if grown == NULL:
        return ldd_fail(detail, LDD_E_NO_MEMORY, b"no memory for a plan of %zu copies", <size_t>needed)
    out.items = <ldd_local_op*>grown
    out.capacity = needed
    return LDD_OK


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


# How the pieces of one ldd_local_copy call are carried out.
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
    """Carry out one operation; where it overlaps itself, in pieces that do not, from the safe end."""
    cdef uint64_t dst = <uint64_t>op.dst, src = <uint64_t>op.src
    cdef uint64_t distance = dst - src if dst > src else src - dst
    cdef uint64_t step = min(distance, MAX_COPY_BYTES)
    cdef uint64_t done = 0, piece
    cdef aclError code
    if distance == 0:
        return 0
    if distance >= op.bytes:
        step = MAX_COPY_BYTES
    while done < op.bytes:
        piece = min(step, op.bytes - done)
        if dst < src or distance >= op.bytes:
            code = _copy_piece(how, dst + done, src + done, piece)
        else:
            code = _copy_piece(how, dst + op.bytes - done - piece, src + op.bytes - done - piece, piece)
        if code != 0:
            return code
        done += piece
    return 0


cdef inline aclError _copy_piece(const copier* how, uint64_t dst, uint64_t src, uint64_t nbytes) noexcept nogil:
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
    if ldd_map_acl(code) == LDD_E_TIMEOUT and provider.acl.aclrtStreamAbort != NULL:
        provider.acl.aclrtStreamAbort(how.stream)
    if submitted != 0:
        return ldd_acl_result(provider, submitted, b"queue a memory copy", detail)
    if code != 0:
        return ldd_acl_result(provider, code, b"copy memory", detail)
    if late:
        return ldd_fail(detail, LDD_E_TIMEOUT, b"not all copies were made in time")
    return LDD_OK


@cython.final
cdef class CopyProbe:
    """Plans and copies for diagnostics and tests. Each call plans from scratch.

    Plans are returned as ``(dst, src, bytes)``; their addresses are followed by `copy` alone.
    """
    cdef ldd_op_list _list

    def __cinit__(self):
        ldd_op_list_init(&self._list)

    def __dealloc__(self):
        ldd_op_list_free(&self._list)

    def copy_cache(self, dst_addrs, dst_shape, dst_slot, src_addrs, src_shape, src_slot, offset, nbytes):
        """Plan copy_cache; shapes are ``(num_slots, stride)``."""
        cdef IndexList dst_list = IndexList.parse(dst_addrs, "dst_addrs")
        cdef IndexList src_list = IndexList.parse(src_addrs, "src_addrs")
        cdef ldd_slots dst, src
        cdef ldd_detail detail
        dst.addrs, dst.num_tensors = <const uint64_t*>dst_list.data, dst_list.length
        dst.num_slots, dst.stride = dst_shape
        src.addrs, src.num_tensors = <const uint64_t*>src_list.data, src_list.length
        src.num_slots, src.stride = src_shape
        detail.provider_code = 0
        ldd_op_list_clear(&self._list)
        return self._result(ldd_plan_copy_cache(
            &self._list, &dst, dst_slot, &src, src_slot, offset, nbytes, &detail), &detail)

    def copy_blocks(self, addrs, num_blocks, block_bytes, src_blocks, dst_blocks):
        """Plan copy_blocks."""
        cdef IndexList bases = IndexList.parse(addrs, "addrs")
        cdef IndexList src = IndexList.parse(src_blocks, "src_blocks")
        cdef IndexList dst = IndexList.parse(dst_blocks, "dst_blocks")
        cdef ldd_detail detail
        detail.provider_code = 0
        ldd_op_list_clear(&self._list)
        return self._result(ldd_plan_copy_blocks(
            &self._list, <const uint64_t*>bases.data, bases.length, num_blocks, block_bytes, src.data, dst.data,
            src.length, &detail), &detail)

    def swap_blocks(self, src_addrs, src_blocks, num_src, dst_addrs, dst_blocks, num_dst, block_bytes):
        """Plan swap_blocks."""
        cdef IndexList src_list = IndexList.parse(src_addrs, "src_addrs")
        cdef IndexList dst_list = IndexList.parse(dst_addrs, "dst_addrs")
        cdef IndexList src = IndexList.parse(src_blocks, "src_blocks")
        cdef IndexList dst = IndexList.parse(dst_blocks, "dst_blocks")
        cdef ldd_detail detail
        detail.provider_code = 0
        ldd_op_list_clear(&self._list)
        return self._result(ldd_plan_swap_blocks(
            &self._list, <const uint64_t*>src_list.data, src.data, num_src, <const uint64_t*>dst_list.data, dst.data,
            num_dst, src_list.length, block_bytes, src.length, &detail), &detail)

    def copy(self, TableProbe provider, uintptr_t stream, ops, int kind, timeout_ns=None):
        """Carry out ``(dst, src, bytes)`` operations; `timeout_ns` None sets no limit."""
        cdef int64_t deadline_ns = INT64_MAX if timeout_ns is None else ldd_now_ns() + <int64_t>timeout_ns
        cdef ldd_detail detail
        cdef ldd_status status
        cdef ldd_local_op* op
        detail.provider_code = 0
        detail.text[0] = 0
        ldd_op_list_clear(&self._list)
        check(_reserve(&self._list, len(ops), &detail), &detail, b"copy")
        for dst, src, nbytes in ops:
            op = &self._list.items[self._list.count]
            op.dst = <void*><uintptr_t>dst
            op.src = <const void*><uintptr_t>src
            op.bytes = nbytes
            self._list.count += 1
        with nogil:
            status = ldd_local_copy(&provider.table, <void*>stream, self._list.items, self._list.count,
                                    <aclrtMemcpyKind>kind, deadline_ns, &detail)
            check(status, &detail, b"copy")

    cdef list _result(self, ldd_status status, const ldd_detail* detail):
        cdef size_t i
        check(status, detail, b"plan")
        items = [(<uintptr_t>self._list.items[i].dst, <uintptr_t>self._list.items[i].src, self._list.items[i].bytes)
                 for i in range(self._list.count)]
        if self._list.bytes != sum(item[2] for item in items):
            raise RuntimeError("the byte count of a plan differs from the sum of its copies")
        return items
