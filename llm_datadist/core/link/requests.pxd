"""The asking side of a link: requests to the peer's service thread, one at a time under the link's lock."""
from libc.stdint cimport int64_t, uint32_t, uint64_t

from llm_datadist.core.base.status cimport ldd_detail, ldd_status
from llm_datadist.core.link.links cimport ldd_link
from llm_datadist.core.link.wire cimport ldd_checked, ldd_checksums, ldd_descriptor, ldd_lease_reply, ldd_ranges

# What the owner said about a cache: addrs live in the link's reply buffer until the next request.
ctypedef struct ldd_remote_cache:
    ldd_descriptor desc
    uint64_t* addrs                             # num_tensors bases in the owner's address space

# All of these need link.lock. A failure other than the peer's own refusal breaks the link.
cdef ldd_status ldd_request_resolve(ldd_link* link, uint32_t kind, uint64_t id, uint64_t model_id, uint64_t batch_index,
                                bint write, int64_t deadline_ns, ldd_remote_cache* out,
                                ldd_detail* detail) noexcept nogil
# Pin the owner's caches that contain the ranges that follow this head. The answer describes the first of them whose
# data type is another than the head's; of LDD_OK, it holds a lease.
cdef ldd_status ldd_request_ranges(ldd_link* link, const ldd_ranges* head, uint32_t num_ranges, int64_t deadline_ns,
                               ldd_lease_reply* out, ldd_detail* detail) noexcept nogil
# `take` marks tensors of the leased key as taken.
cdef ldd_status ldd_request_release(ldd_link* link, uint32_t lease, bint take, uint32_t first_tensor,
                                uint32_t num_tensors, int64_t deadline_ns, ldd_detail* detail) noexcept nogil
# Ask for the checksums of the ranges that follow this head, and take the answer, whose head `num_sums` of them follow;
# in between the caller computes its own.
cdef ldd_status ldd_request_checksums(ldd_link* link, const ldd_checked* request, int64_t deadline_ns,
                                      ldd_detail* detail) noexcept nogil
cdef ldd_status ldd_take_checksums(ldd_link* link, ldd_checksums* out, uint32_t num_sums, int64_t deadline_ns,
                                   ldd_detail* detail) noexcept nogil
cdef ldd_status ldd_request_unlink(ldd_link* link, int64_t deadline_ns, ldd_detail* detail) noexcept nogil
cdef ldd_status ldd_request_ping(ldd_link* link, int64_t deadline_ns, ldd_detail* detail) noexcept nogil

# Room in the link's reply buffer.
cdef ldd_status ldd_reply_room(ldd_link* link, size_t nbytes) noexcept nogil
# One frame out, one frame in, on any connection: `fixed` bytes into `reply`, the rest into the link's buffer.
cdef ldd_status ldd_exchange(int fd, uint32_t request_id, uint32_t type, const void* payload, size_t nbytes,
                             uint32_t reply_type, void* reply, size_t fixed, ldd_link* rest_into, size_t* rest_bytes,
                             int64_t deadline_ns, ldd_detail* detail) noexcept nogil
# The data client of this link, connected and knowing the peer's regions of this epoch.
cdef ldd_status ldd_link_ready(ldd_link* link, uint64_t region_epoch, int64_t deadline_ns,
                               ldd_detail* detail) noexcept nogil
