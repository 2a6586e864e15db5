"""The service thread: answers peers' requests without the interpreter."""
from llm_datadist.core.base.status cimport ldd_detail, ldd_status
from llm_datadist.core.link.links cimport ldd_link, ldd_node
from llm_datadist.core.link.service_conn cimport ldd_service

cdef ldd_status ldd_service_start(ldd_service* service, ldd_node* node, ldd_detail* detail) noexcept nogil
# Closes every connection, which ends all leases.
cdef void ldd_service_stop(ldd_service* service) noexcept nogil
# The following return when the service thread has acted.
cdef void ldd_service_serve(ldd_service* service, int fd, ldd_link* link) noexcept nogil
cdef void ldd_service_listen(ldd_service* service, int fd) noexcept nogil
cdef void ldd_service_unlisten(ldd_service* service, int fd) noexcept nogil
