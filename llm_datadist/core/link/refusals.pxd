"""Log lines about peers that were refused."""
from llm_datadist.core.base.status cimport ldd_detail
from llm_datadist.core.link.service_conn cimport ldd_service

# Have it logged that the peer at this connection was refused, and why; at most once in ten seconds. Service thread.
cdef void ldd_tell_refusal(ldd_service* service, int fd, const ldd_detail* detail) noexcept nogil
