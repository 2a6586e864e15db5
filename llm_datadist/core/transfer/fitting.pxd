"""What is asked of a transfer, and whether its two ends fit; see ``fitting.pyx``."""
from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint32_t, uint64_t

from llm_datadist.core.base.status cimport ldd_detail, ldd_status
from llm_datadist.core.base.tensor_desc cimport ldd_tensor_desc
from llm_datadist.core.link.requests cimport ldd_remote_cache
from llm_datadist.core.plan.block_plan cimport ldd_desc_list
from llm_datadist.core.table.cache_table cimport ldd_cache_view

cdef enum ldd_shape:
    SHAPE_SLOT                                  # contiguous to contiguous
    SHAPE_BLOCKS                                # blocks to blocks
    SHAPE_SLOT_TO_BLOCKS                        # contiguous source, blocks destination

# A piece of the destination that did not arrive as it left.
ctypedef struct ldd_fault:
    uint64_t block                              # or slot
    uint32_t tensor

# All zero: none. Whoever owns it frees the items.
ctypedef struct ldd_faults:
    ldd_fault* items
    size_t count
    size_t capacity

# How far a transfer came, for whoever tells of its failure. All zero: it has not begun.
ctypedef struct ldd_progress:
    const char* stage                           # "link", "resolve", "plan", "transfer", "verify", "release"; NULL
    uint32_t num_tensors                        # local tensors that are complete, in the order of the selection
    ldd_faults faults

# What is asked for. "remote" and "local" are ends; which is source and which destination follows from `put`.
ctypedef struct ldd_transfer:
    ldd_shape shape
    bint put
    bint release                                # a pull that takes the key it came by
    bint same_dtype                             # refuse ends of different data types
    bint verify                                 # hold what arrived against the source's checksums
    uint64_t cluster_id
    uint32_t kind                               # KEY_*
    uint64_t id
    uint64_t model_id
    uint64_t batch_index                        # of KEY_BY_ID
    int64_t cache_id                            # local
    uint64_t local_slot
    int64_t size                                # bytes per tensor of SHAPE_SLOT; -1: the destination's stride
    uint64_t remote_offset
    uint64_t local_offset
    int64_t remote_first                        # tensors [first, stop); first -1: all
    int64_t remote_stop
    int64_t local_first
    int64_t local_stop
    uint32_t tensors_per_step                   # 0: all in one step; otherwise each step has its own deadline
    const int64_t* remote_blocks
    const int64_t* local_blocks
    size_t num_blocks                           # length of both lists, of the local one for a pull of a slot
    ldd_progress* progress
    uint64_t[3] context                         # the trace it belongs to; all zero: none, or events are not recorded

# What the rules need to know of one end.
ctypedef struct ldd_end:
    int64_t cache_id
    const uint64_t* addrs                       # tensor bases
    const ldd_tensor_desc* described            # NULL: nothing is known of what they hold
    uint32_t num_tensors
    uint64_t num_slots
    uint64_t stride                             # bytes of a slot or block
    uint64_t slot                               # the one that is meant, of a contiguous cache
    bint is_blocks
    bint host
    bint owned                                  # from a pool, which is one region

# The tensors of either end that go over: [first, first + count).
ctypedef struct ldd_fit:
    uint32_t local_first
    uint32_t remote_first
    uint32_t count

cdef void ldd_end_here(const ldd_cache_view* view, uint64_t slot, ldd_end* out) noexcept nogil
cdef void ldd_end_there(const ldd_remote_cache* remote, ldd_end* out) noexcept nogil

# Refuse two ends of different data types, where both are known.
cdef ldd_status ldd_fit_dtypes(const ldd_end* local, const ldd_end* remote, uint64_t cluster_id,
                               ldd_detail* detail) noexcept nogil

# LDD_OK and `fit`, or what does not fit, in words where `detail` is not NULL.
cdef ldd_status ldd_fit_ends(const ldd_transfer* what, const ldd_end* local, const ldd_end* remote, ldd_fit* fit,
                             ldd_detail* detail) noexcept nogil

# Replace `out` by the descriptors of `count` tensors of ends that fit; checks places within slots and block lists.
cdef ldd_status ldd_fit_plan(ldd_desc_list* out, const ldd_transfer* what, const ldd_end* local, uint32_t local_first,
                             const ldd_end* remote, uint32_t remote_first, uint32_t count,
                             ldd_detail* detail) noexcept nogil
