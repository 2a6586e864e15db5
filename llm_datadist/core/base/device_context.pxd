"""The device context of an engine on whatever thread works for it; see ``device_context.pyx``."""
from llm_datadist.core.base.provider cimport aclrtContext, ldd_provider

# Make `context` current on this thread; returns what was current, for ldd_device_leave. Without a context: no effect.
cdef aclrtContext ldd_device_enter(const ldd_provider* provider, aclrtContext context) noexcept nogil
cdef void ldd_device_leave(const ldd_provider* provider, aclrtContext context, aclrtContext before) noexcept nogil
