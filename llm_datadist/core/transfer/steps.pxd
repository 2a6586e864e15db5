"""One pull or push: resolve, plan, move, release."""
from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint32_t, uint64_t

from llm_datadist.core.base.status cimport ldd_detail, ldd_status
from llm_datadist.core.link.links cimport ldd_node

cdef enum ldd_shape:
    SHAPE_SLOT                                  # contiguous to contiguous
    SHAPE_BLOCKS                                # blocks to blocks
    SHAPE_SLOT_TO_BLOCKS                        # contiguous source, blocks destination

# What is asked for. "remote" and "local" are ends; which is source and which destination follows from `put`.
ctypedef struct ldd_transfer:
    ldd_shape shape
    bint put
    bint release                                # a pull that takes the key it came by
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

cdef ldd_status ldd_transfer_run(ldd_node* node, const ldd_transfer* what, ldd_detail* detail) noexcept nogil
