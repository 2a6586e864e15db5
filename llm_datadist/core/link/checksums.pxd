"""Answering for the bytes of leased caches; see ``checksums.pyx``."""
from libc.stdint cimport uint8_t

from llm_datadist.core.link.service_conn cimport ldd_conn, ldd_service
from llm_datadist.core.link.wire cimport ldd_frame_header

# Answer a CHECKSUM frame; False when the connection is to be closed.
cdef bint ldd_reply_checksums(ldd_service* service, ldd_conn* conn, const ldd_frame_header* header,
                              const uint8_t* payload) noexcept nogil
