"""Close inherited sockets in a forked child; see ``fork.pyx``."""
from llm_datadist.core.link.service_conn cimport ldd_service

# From its start to its end. Children that are forked in between close their copies of its descriptors.
cdef void ldd_fork_watch(ldd_service* service) noexcept nogil
cdef void ldd_fork_forget(ldd_service* service) noexcept nogil
