"""Telling the owner of held blocks that they are not needed: the first and the last step of a pull, with none between.

Runs on the caller's thread without the GIL, under the link's lock, like ``steps.pyx``.
"""
from libc.stdint cimport int64_t, uint64_t

from llm_datadist.core.base.status cimport LDD_OK
from llm_datadist.core.base.sync cimport ldd_now_ns, ldd_unlock
from llm_datadist.core.link.heal cimport ldd_link_find
from llm_datadist.core.link.links cimport ldd_link, ldd_link_end
from llm_datadist.core.link.requests cimport ldd_request_release, ldd_request_resolve, ldd_remote_cache
from llm_datadist.core.table.holds cimport KEY_HOLD
from llm_datadist.core.transfer.batch cimport ldd_link_lock


cdef ldd_status ldd_release_hold(ldd_node* node, uint64_t cluster_id, uint64_t request, uint64_t generation,
                                 ldd_detail* detail) noexcept nogil:
    cdef ldd_link* link = NULL
    cdef ldd_remote_cache remote
    cdef int64_t ignored = 0
    cdef ldd_status status = ldd_link_find(node, cluster_id, node.sync_timeout_ns, &link, &ignored, detail)
    if status != LDD_OK:
        return status
    status = ldd_link_lock(link, detail)
    if status == LDD_OK:
        status = ldd_request_resolve(link, KEY_HOLD, request, generation, 0, False,
                                     ldd_now_ns() + node.sync_timeout_ns, &remote, detail)
        if status == LDD_OK:
            status = ldd_request_release(link, remote.desc.lease, True, 0, 0, ldd_now_ns() + node.sync_timeout_ns,
                                         detail)
        ldd_unlock(&link.lock)
    ldd_link_end(link)
    return status
