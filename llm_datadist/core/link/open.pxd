"""Opening and ending a link, for the side that asks for it."""
from libc.stdint cimport int64_t, uint8_t, uint64_t

from llm_datadist.core.base.status cimport ldd_detail, ldd_status
from llm_datadist.core.link.links cimport ldd_node
from llm_datadist.core.link.service_conn cimport ldd_service

# Both connections, the data path, and the entry in the set, in the place of a broken link where links heal. `comm` is
# NULL for link_clusters, otherwise the 32-byte digest of a communicator; LDD_E_PROCESSING_LINK then says that the peer
# does not expect it yet.
cdef ldd_status ldd_link_open(ldd_node* node, ldd_service* service, const char* ip, int port, uint64_t cluster_id,
                              const uint8_t* comm, int64_t comm_id, int64_t deadline_ns,
                              ldd_detail* detail) noexcept nogil
# Make the broken link to this cluster anew, where it was made before. LDD_OK as well when another thread has done so;
# LDD_E_NOT_LINKED when there is none, or it was unlinked meanwhile.
cdef ldd_status ldd_link_reopen(ldd_node* node, uint64_t cluster_id, int64_t deadline_ns,
                                ldd_detail* detail) noexcept nogil
# Tell the peer, then drop every link_clusters link to it; the link in hand stays when the peer cannot be told.
# The peer of a broken link is taken as told when it listens at `ip` (NULL: not asked) and `port`.
cdef ldd_status ldd_link_close(ldd_node* node, const char* ip, int port, uint64_t cluster_id, int64_t deadline_ns,
                               ldd_detail* detail) noexcept nogil
