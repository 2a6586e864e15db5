"""Copies inside this process: plans for copy and swap calls, and their execution through the C API."""
from libc.stdint cimport int64_t, uint64_t

from llm_datadist.core.base.provider cimport aclrtMemcpyKind, aclrtStream, ldd_provider
from llm_datadist.core.base.status cimport ldd_detail, ldd_status

ctypedef struct ldd_local_op:
    void* dst
    const void* src
    uint64_t bytes

# Growable and reusable; operations are carried out in order. All zero is the empty list.
ctypedef struct ldd_op_list:
    ldd_local_op* items
    size_t count
    size_t capacity
    uint64_t bytes

cdef void ldd_op_list_clear(ldd_op_list* out) noexcept nogil
cdef void ldd_op_list_free(ldd_op_list* out) noexcept nogil

# One side of copy_cache.
ctypedef struct ldd_slots:
    const uint64_t* addrs                       # tensor bases
    size_t num_tensors
    uint64_t num_slots
    uint64_t stride                             # bytes of one slot

# Planners append; a failing one leaves the list as it was and has validated everything before.
# `nbytes` -1 takes the rest of the source slot.
cdef ldd_status ldd_plan_copy_cache(
    ldd_op_list* out, const ldd_slots* dst, uint64_t dst_slot, const ldd_slots* src, uint64_t src_slot,
    uint64_t offset, int64_t nbytes, ldd_detail* detail) noexcept nogil

# Within one blocks cache, pair after pair: a later pair sees what earlier ones wrote.
cdef ldd_status ldd_plan_copy_blocks(
    ldd_op_list* out, const uint64_t* addrs, size_t num_tensors, uint64_t num_blocks, uint64_t block_bytes,
    const int64_t* src_blocks, const int64_t* dst_blocks, size_t num_pairs, ldd_detail* detail) noexcept nogil

# From one blocks cache to another, pair after pair. A number of blocks of UINT64_MAX means unknown.
cdef ldd_status ldd_plan_swap_blocks(
    ldd_op_list* out,
    const uint64_t* src_addrs, const int64_t* src_blocks, uint64_t num_src_blocks,
    const uint64_t* dst_addrs, const int64_t* dst_blocks, uint64_t num_dst_blocks,
    size_t num_tensors, uint64_t block_bytes, size_t num_pairs, ldd_detail* detail) noexcept nogil

# Blocks until every byte is in place. The calling thread has a current context, `stream` belongs to it and
# is used by nobody else meanwhile. `deadline_ns` as in wait.pxd; nothing is in flight after any return
# but LDD_E_TIMEOUT of a stream that cannot be aborted.
cdef ldd_status ldd_local_copy(
    const ldd_provider* provider, aclrtStream stream, const ldd_local_op* ops, size_t num_ops,
    aclrtMemcpyKind kind, int64_t deadline_ns, ldd_detail* detail) noexcept nogil
