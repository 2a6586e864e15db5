"""What a peer may do with a cache: the rules, once, for the owner who is asked and for a reader of its shared table."""
from libc.stdint cimport int64_t, uint32_t, uint64_t

from llm_datadist.core.base.status cimport ldd_detail, ldd_status

# `mode`: LDD_MODE_* of both ends of the link. `kind`: how the cache was found. The text says "here" for the owner.
cdef ldd_status ldd_check_access(uint32_t mode, uint32_t kind, bint write, int64_t cache_id, uint64_t num_slots,
                                 bint is_blocks, bint remote_accessible, uint64_t batch_index,
                                 ldd_detail* detail) noexcept nogil
