"""Holding bytes that arrived against checksums of their source; see ``verify.pyx``."""
from libc.stdint cimport int64_t, uint32_t, uint64_t

from llm_datadist.core.base.status cimport ldd_detail, ldd_status
from llm_datadist.core.link.links cimport ldd_link
from llm_datadist.core.transfer.fitting cimport ldd_faults

# What has just been moved by link.descs, which must be made by tensor.
ctypedef struct ldd_moved:
    bint put
    uint32_t lease                              # the peer's caches are pinned under it
    uint32_t first_pin                          # the cache of the first tensor among those of the lease
    bint pin_by_tensor                          # each further tensor has the next one; otherwise all have the first
    const uint64_t* addrs                       # where tensors of the destination begin, from the first on
    uint32_t first_tensor                       # its number
    uint64_t block_bytes                        # of the destination, or bytes of a slot

# Add every block that differs to `faults`. LDD_OK: all was compared, whatever came of it. Needs link.lock.
cdef ldd_status ldd_verify(ldd_link* link, const ldd_moved* moved, int64_t deadline_ns, ldd_faults* faults,
                           ldd_detail* detail) noexcept nogil
# LDD_E_CHECKSUM in words, of at least one fault.
cdef ldd_status ldd_say_faults(const ldd_link* link, bint put, const ldd_faults* faults,
                               ldd_detail* detail) noexcept nogil
