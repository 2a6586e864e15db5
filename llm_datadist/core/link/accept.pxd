"""The answering side of a handshake: who may link, and what becomes of the two connections."""
from libc.stdint cimport int64_t, uint8_t, uint64_t

from llm_datadist.core.base.status cimport ldd_status
from llm_datadist.core.link.service_conn cimport ldd_conn, ldd_service
from llm_datadist.core.link.wire cimport ldd_frame_header

# Answer a HELLO, or the PROOF that it asked for; False when the connection is to be closed. May hand the
# socket over and forget `conn`. When `conn` waits afterwards, the same is to be called again later.
cdef bint ldd_accept_hello(ldd_service* service, ldd_conn* conn, const ldd_frame_header* header,
                           const uint8_t* payload) noexcept nogil

# What this side wants of communicators: any thread.
cdef ldd_status ldd_service_expect(ldd_service* service, const uint8_t* comm, uint64_t cluster_id,
                                 int64_t comm_id) noexcept nogil
# True when the peer of this awaited has come.
cdef bint ldd_service_accepted(ldd_service* service, int64_t comm_id, uint64_t cluster_id) noexcept nogil
cdef void ldd_service_forget(ldd_service* service, int64_t comm_id) noexcept nogil
