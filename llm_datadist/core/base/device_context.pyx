"""The device context of an engine on whatever thread works for it.

CANN answers a call from a thread without a context with an error, and carries one out on whatever device the thread
has current. So every call into the provider is made in the engine's own context, and a caller who had another one has
it again afterwards. One who had none keeps ours, as there is no way to have none again.
"""
from llm_datadist.core.base.provider cimport aclrtContext, ldd_provider


cdef aclrtContext ldd_device_enter(const ldd_provider* provider, aclrtContext context) noexcept nogil:
    cdef aclrtContext before = NULL
    provider.acl.aclrtGetCurrentContext(&before)
    if context != NULL and before != context:
        provider.acl.aclrtSetCurrentContext(context)
    return before


cdef void ldd_device_leave(const ldd_provider* provider, aclrtContext context, aclrtContext before) noexcept nogil:
    if before != NULL and before != context:
        provider.acl.aclrtSetCurrentContext(before)
