"""The data client of a link and the memory it knows; see ``client.pyx``."""
from libc.stdint cimport uint32_t, uint64_t

from llm_datadist.core.base.provider cimport HixlClientHandle
from llm_datadist.core.base.status cimport ldd_detail, ldd_status
from llm_datadist.core.link.links cimport ldd_link, ldd_node
from llm_datadist.core.link.region cimport ldd_client_memory

# Create a client for the link. What is read of it does not change any more.
cdef ldd_status ldd_client_create(ldd_link* link, HixlClientHandle* out, ldd_detail* detail) noexcept nogil
# Let a client know our memory, and connect it. It is destroyed when that fails. `known` is what it knows, or NULL.
cdef ldd_status ldd_client_connect(ldd_node* node, HixlClientHandle client, uint32_t timeout_ms,
                                   ldd_client_memory** known, ldd_detail* detail) noexcept nogil
cdef void ldd_client_destroy(ldd_node* node, HixlClientHandle client) noexcept nogil
# The same, elsewhere if it may take long. It counts as an operation, so that the end of the node waits for it.
cdef void ldd_client_end(ldd_node* node, HixlClientHandle client) noexcept nogil
# The client of the link, if it has one, forgets a range of ours; needs link.lock.
cdef void ldd_client_withdraw(ldd_link* link, uint64_t addr, uint64_t nbytes) noexcept nogil
