"""Calls into the provider that may take longer than their caller has time; see ``background.pyx``."""
from libc.stdint cimport int64_t, uint32_t, uint64_t

from llm_datadist.core.base.provider cimport CompleteHandle
from llm_datadist.core.base.status cimport ldd_detail, ldd_status
from llm_datadist.core.link.links cimport ldd_link, ldd_node

# The port of the data server at this local address, which is started when there is none; fails as the next does.
cdef ldd_status ldd_background_serve(ldd_link* link, const char* ip, uint32_t* port, int64_t deadline_ns,
                                     ldd_detail* detail) noexcept nogil
# Make link.client, or wait for the one that an earlier transfer left to be made. LDD_E_TIMEOUT when the deadline passed
# first: the next transfer may have it if there is a link.opening then. LDD_E_INTERRUPTED when a signal handler raised.
cdef ldd_status ldd_background_open(ldd_link* link, int64_t deadline_ns, ldd_detail* detail) noexcept nogil
# Submit link.descs; the handle is to be waited for.
cdef ldd_status ldd_background_submit(ldd_link* link, bint put, int64_t deadline_ns, CompleteHandle* out,
                                      ldd_detail* detail) noexcept nogil
# Destroy link.client, and with it what it still moves; one that is being made, once it is made.
cdef void ldd_background_destroy(ldd_link* link) noexcept nogil
# All links' clients forget a range of ours. Waits for transfers that run, and breaks links that stay busy.
cdef void ldd_links_withdraw(ldd_node* node, uint64_t addr, uint64_t nbytes, int64_t deadline_ns) noexcept nogil
