"""Telling the owner of held blocks that they are not needed."""
from libc.stdint cimport uint64_t

from llm_datadist.core.base.status cimport ldd_detail, ldd_status
from llm_datadist.core.link.links cimport ldd_node

# LDD_E_NOT_EXIST: nothing is held there under that key any more.
cdef ldd_status ldd_release_hold(ldd_node* node, uint64_t cluster_id, uint64_t request, uint64_t generation,
                                 ldd_detail* detail) noexcept nogil
