"""One pull or push: resolve, plan, move, release."""
from llm_datadist.core.base.status cimport ldd_detail, ldd_status
from llm_datadist.core.link.links cimport ldd_node
from llm_datadist.core.transfer.fitting cimport ldd_transfer

cdef ldd_status ldd_transfer_run(ldd_node* node, const ldd_transfer* what, ldd_detail* detail) noexcept nogil
