"""What peers ask of an established link, answered from the cache table."""
from libc.stdint cimport uint8_t

from llm_datadist.core.base.status cimport ldd_detail, ldd_status
from llm_datadist.core.link.links cimport ldd_node
from llm_datadist.core.link.service_conn cimport ldd_conn, ldd_service
from llm_datadist.core.link.wire cimport ldd_frame_header, ldd_resolve
from llm_datadist.core.table.cache_table cimport ldd_cache_view

# Pin what a peer asks for, if it may have that.
cdef ldd_status ldd_reply_find(ldd_node* node, const ldd_resolve* request, ldd_cache_view* view,
                               ldd_detail* detail) noexcept nogil

# Answer one request; False when the connection is to be closed.
cdef bint ldd_reply(ldd_service* service, ldd_conn* conn, const ldd_frame_header* header,
                    const uint8_t* payload) noexcept nogil
# The peer asks no more and touches nothing here any more: its leases are over. Forgets the connection.
cdef void ldd_reply_ended(ldd_service* service, ldd_conn* conn) noexcept nogil
# End some leases of links whose connections ended; call it again while `service.ending` names any.
cdef void ldd_reply_end_leases(ldd_service* service) noexcept nogil
