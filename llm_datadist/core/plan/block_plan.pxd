"""Block lists turned into descriptors of a one-sided batch; see ``block_plan.pyx``."""
from libc.stdint cimport int64_t, uint64_t

from llm_datadist.core.base.provider cimport HixlOneSideOpDesc
from llm_datadist.core.base.status cimport ldd_detail, ldd_status

# What goes over in one run within every tensor: offsets from the tensor's base on either side and a length,
# in blocks while runs are being found and in bytes from then on.
ctypedef struct ldd_run:
    uint64_t src
    uint64_t dst
    uint64_t length

# Growable descriptors with the scratch memory of the planners; kept by its owner and reused from call to
# call, so that planning allocates only while it grows. One thread at a time. All zero is the empty list.
ctypedef struct ldd_desc_list:
    HixlOneSideOpDesc* items
    size_t count
    size_t capacity
    uint64_t bytes                              # sum of all len
    bint by_tensor                              # no descriptor spans two tensors: each may be a region of its own
    bint refuses_repeats                        # a destination block that occurs twice is an error
    ldd_run* runs                               # scratch, as is all that follows
    size_t num_runs
    size_t run_capacity
    uint64_t* seen
    size_t seen_capacity

cdef void ldd_desc_list_clear(ldd_desc_list* out) noexcept nogil
cdef void ldd_desc_list_free(ldd_desc_list* out) noexcept nogil

# Room for `extra` more entries in a growable array of a plan.
cdef ldd_status ldd_plan_reserve(
    void** items, size_t* capacity, size_t count, size_t extra, size_t item_bytes, ldd_detail* detail) noexcept nogil

# Planners append; a failing one leaves the list as it was. Addresses are tensor bases, num_tensors on each
# side. `put` says that bytes go from local to remote. They check every index themselves, reading each once.
cdef ldd_status ldd_plan_contiguous(
    ldd_desc_list* out,
    const uint64_t* remote_addrs, uint64_t remote_offset,
    const uint64_t* local_addrs, uint64_t local_offset,
    size_t num_tensors, uint64_t nbytes, ldd_detail* detail) noexcept nogil

cdef ldd_status ldd_plan_blocks(
    ldd_desc_list* out,
    const uint64_t* remote_addrs, const int64_t* remote_blocks, uint64_t num_remote_blocks,
    const uint64_t* local_addrs, const int64_t* local_blocks, uint64_t num_local_blocks,
    size_t num_tensors, uint64_t block_bytes, size_t num_pairs, bint put, ldd_detail* detail) noexcept nogil

# The slot is remote and the blocks are local, or with `put` the other way round.
cdef ldd_status ldd_plan_slot_to_blocks(
    ldd_desc_list* out,
    const uint64_t* slot_addrs, uint64_t slot_offset, uint64_t slot_bytes,
    const uint64_t* block_addrs, const int64_t* blocks, uint64_t num_blocks,
    size_t num_tensors, uint64_t block_bytes, size_t num_filled, bint put, ldd_detail* detail) noexcept nogil
