"""Data servers for peers that come in by a new local address; see ``serve.pyx``. The service thread."""
from libc.stdint cimport uint32_t

from llm_datadist.core.base.status cimport ldd_detail, ldd_status
from llm_datadist.core.link.service_conn cimport ldd_conn, ldd_service

# The port of the data server at this local address. Where it takes time to make one, `conn` waits, and its hello is to
# be looked at again once `ldd_serve_ended`.
cdef ldd_status ldd_serve(ldd_service* service, ldd_conn* conn, const char* ip, uint32_t* port,
                          ldd_detail* detail) noexcept nogil
# Whether such a server was made, or not, since this was last asked: then those who wait have their turn.
cdef bint ldd_serve_ended(ldd_service* service) noexcept nogil
