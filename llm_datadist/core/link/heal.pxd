"""Links that come back after they broke; see ``heal.pyx``."""
from libc.stdint cimport int64_t, uint64_t

from llm_datadist.core.base.status cimport ldd_detail, ldd_status
from llm_datadist.core.link.links cimport ldd_link, ldd_node
from llm_datadist.core.link.service_conn cimport ldd_service

# From now on links of this engine heal; `heal_ns` is what a call may spend on one that it finds broken.
cdef void ldd_heal_start(ldd_node* node, ldd_service* service, int64_t heal_ns) noexcept nogil
# As ldd_link_begin, but a broken link is made anew, or waited for, at most `timeout_ns`. After LDD_OK `limit_ns` is the
# time by which the call is to end when that took some of its time; otherwise it is left alone.
cdef ldd_status ldd_link_find(ldd_node* node, uint64_t cluster_id, int64_t timeout_ns, ldd_link** out,
                              int64_t* limit_ns, ldd_detail* detail) noexcept nogil
