"""Moving the bytes of a plan over a link, within a time limit.

Runs on the caller's thread without the GIL, under the link's lock. A failure after which bytes might still arrive
breaks the link.
"""
from libc.stdint cimport int32_t, int64_t

from llm_datadist.core.base.atomic cimport ldd_add64
from llm_datadist.core.base.device_context cimport ldd_device_enter, ldd_device_leave
from llm_datadist.core.base.provider cimport HIXL_RESOURCE_EXHAUSTED, LDD_CAP_CANCEL, CompleteHandle
from llm_datadist.core.base.status cimport (
    LDD_E_INTERRUPTED, LDD_E_NOT_LINKED, LDD_E_PARAM, LDD_E_TIMEOUT, LDD_OK, ldd_fail,
)
from llm_datadist.core.base.sync cimport ldd_now_ns, ldd_unlock
from llm_datadist.core.base.wait cimport ldd_lock_interruptible, ldd_wait_interruptible
from llm_datadist.core.link.background cimport ldd_background_destroy, ldd_background_submit
from llm_datadist.core.link.links cimport LINK_ACTIVE, ldd_link_break, ldd_link_state_of


cdef aclrtContext ldd_context_enter(ldd_node* node) noexcept nogil:
    return ldd_device_enter(node.provider, node.context)


cdef void ldd_context_leave(ldd_node* node, aclrtContext before) noexcept nogil:
    ldd_device_leave(node.provider, node.context, before)


cdef ldd_status ldd_link_lock(ldd_link* link, ldd_detail* detail) noexcept nogil:
    cdef ldd_status status = ldd_lock_interruptible(&link.lock, ldd_now_ns() + link.node.sync_timeout_ns)
    if status == LDD_E_TIMEOUT:
        return ldd_fail(detail, status, b"other transfers kept the link to cluster %llu busy for %lld ms",
                        <unsigned long long>link.cluster_id, <long long>(link.node.sync_timeout_ns // 1000000))
    if status == LDD_OK and ldd_link_state_of(link) != LINK_ACTIVE:
        ldd_unlock(&link.lock)
        return ldd_fail(detail, LDD_E_NOT_LINKED, b"the link to cluster %llu went away (%s)",
                        <unsigned long long>link.cluster_id,
                        <const char*>link.reason if link.reason[0] else <const char*>b"unlinked")
    return status


cdef ldd_status ldd_batch_run(ldd_link* link, bint put, int64_t deadline_ns, ldd_detail* detail) noexcept nogil:
    cdef CompleteHandle handle = NULL
    cdef ldd_status status
    if link.descs.count == 0:
        return LDD_OK
    status = ldd_background_submit(link, put, deadline_ns, &handle, detail)
    if handle == NULL and link.client != NULL and detail.provider_code == <int32_t>HIXL_RESOURCE_EXHAUSTED:
        return status                           # nothing was taken in, and the client is as good as before
    status = ldd_batch_finish(link, status, handle, deadline_ns, detail)
    if status == LDD_OK:
        ldd_batch_count(link, put)
    return status


cdef void ldd_batch_count(ldd_link* link, bint put) noexcept nogil:
    ldd_add64(&link.pushed_bytes if put else &link.pulled_bytes, link.descs.bytes)
    ldd_add64(&link.num_transfers, 1)


cdef ldd_status ldd_batch_finish(ldd_link* link, ldd_status submitted, CompleteHandle handle, int64_t deadline_ns,
                             ldd_detail* detail) noexcept nogil:
    cdef ldd_status status = submitted
    if status == LDD_E_PARAM:
        return status                           # refused before anything moved: the link is as good as before
    if status == LDD_OK:
        status = ldd_wait_interruptible(link.node.provider, link.client, handle, deadline_ns, detail)
        if status == LDD_OK:
            return LDD_OK
    if status == LDD_E_TIMEOUT:
        ldd_fail(detail, status, b"%llu bytes in %zu descriptors did not arrive within %lld ms (cluster %llu)",
                 <unsigned long long>link.descs.bytes, link.descs.count,
                 <long long>(link.node.sync_timeout_ns // 1000000), <unsigned long long>link.cluster_id)
    if not link.node.provider.caps & LDD_CAP_CANCEL:
        # Without a cancel only the end of the client is sure to stop late bytes.
        ldd_background_destroy(link)
    ldd_link_break(link, <const char*>b"interrupted" if status == LDD_E_INTERRUPTED else <const char*>detail.text)
    return status
