"""Moving the bytes of a plan over a link, within a time limit."""
from libc.stdint cimport int64_t

from llm_datadist.core.base.provider cimport CompleteHandle, aclrtContext
from llm_datadist.core.base.status cimport ldd_detail, ldd_status
from llm_datadist.core.link.links cimport ldd_link, ldd_node

# Let this thread work in the engine's device context; returns what was current, for ldd_context_leave.
cdef aclrtContext ldd_context_enter(ldd_node* node) noexcept nogil
cdef void ldd_context_leave(ldd_node* node, aclrtContext before) noexcept nogil
# Take link.lock within the engine's time limit.
cdef ldd_status ldd_link_lock(ldd_link* link, ldd_detail* detail) noexcept nogil
# Submit link.descs and wait; a failure that leaves the data path in doubt breaks the link. Needs link.lock.
cdef ldd_status ldd_batch_run(ldd_link* link, bint put, int64_t deadline_ns, ldd_detail* detail) noexcept nogil
# The same for a batch of link.descs that was submitted with this outcome.
cdef ldd_status ldd_batch_finish(ldd_link* link, ldd_status submitted, CompleteHandle handle, int64_t deadline_ns,
                             ldd_detail* detail) noexcept nogil
# link.descs have gone over.
cdef void ldd_batch_count(ldd_link* link, bint put) noexcept nogil
