"""The data client of a link: how it is made, the memory of ours it knows, and how it ends.

Called under the link's lock, or by the one thread that opens the link; and by nobody else once a link is given up. A
provider that wants local memory registered sees only what was there when a client connected, so a client is made anew
after more memory came, and told of memory that goes.
"""
from libc.stdint cimport uint32_t, uint64_t
from libc.stdio cimport snprintf
from libc.stdlib cimport free, malloc
from libc.string cimport memset

from llm_datadist.core.base.device_context cimport ldd_device_enter, ldd_device_leave
from llm_datadist.core.base.provider cimport (
    LDD_CAP_CANCEL, LDD_CAP_DROP_PEER, EndpointDesc, HixlClientConfig, HixlClientDesc, aclrtContext,
)
from llm_datadist.core.base.status cimport LDD_OK
from llm_datadist.core.base.sync cimport ldd_cond_broadcast, ldd_lock, ldd_unlock
from llm_datadist.core.base.thread cimport ldd_spawn
from llm_datadist.core.base.wait cimport ldd_hixl_result
from llm_datadist.core.link.region cimport ldd_client_memory, ldd_regions_register_client

ctypedef struct ldd_ending:
    ldd_node* node
    HixlClientHandle client


cdef ldd_status ldd_client_create(ldd_link* link, HixlClientHandle* out, ldd_detail* detail) noexcept nogil:
    cdef ldd_node* node = link.node
    cdef HixlClientDesc desc
    cdef HixlClientConfig config
    cdef char json[64]
    cdef int i, at
    cdef HixlClientHandle client = NULL
    cdef aclrtContext before
    cdef ldd_status status
    memset(&desc, 0, sizeof(desc))
    memset(&config, 0, sizeof(config))
    if node.provider.caps & LDD_CAP_DROP_PEER:
        at = snprintf(json, sizeof(json), b'{"ldd_token":"')
        for i in range(16):
            at += snprintf(json + at, sizeof(json) - at, b"%02x", <unsigned int>link.token[i])
        snprintf(json + at, sizeof(json) - at, b'"}')
        config.global_resource_config = json
    else:
        config.global_resource_config = node.regions.resource_config
    desc.server_ip = link.data_ip
    desc.server_port = link.data_port
    desc.tc = node.regions.traffic_class
    desc.sl = node.regions.service_level
    if link.own_endpoint != NULL:
        desc.local_endpoint = <const EndpointDesc*>link.own_endpoint
        desc.remote_endpoint = <const EndpointDesc*>link.endpoint
    before = ldd_device_enter(node.provider, node.context)
    status = ldd_hixl_result(node.provider, node.provider.hixl.HixlCSClientCreate(&desc, &config, &client),
                             b"create the data client", detail)
    ldd_device_leave(node.provider, node.context, before)
    out[0] = client if status == LDD_OK else NULL
    return status


cdef ldd_status ldd_client_connect(ldd_node* node, HixlClientHandle client, uint32_t timeout_ms,
                                   ldd_client_memory** known, ldd_detail* detail) noexcept nogil:
    cdef aclrtContext before = ldd_device_enter(node.provider, node.context)
    cdef ldd_status status = ldd_regions_register_client(&node.regions, client, known, detail)
    if status == LDD_OK:
        status = ldd_hixl_result(node.provider, node.provider.hixl.HixlCSClientConnect(client, timeout_ms),
                                 b"connect the data path", detail)
    if status < 0:
        node.provider.hixl.HixlCSClientDestroy(client)
        free(known[0])
        known[0] = NULL
    ldd_device_leave(node.provider, node.context, before)
    return status


cdef void ldd_client_destroy(ldd_node* node, HixlClientHandle client) noexcept nogil:
    cdef aclrtContext before = ldd_device_enter(node.provider, node.context)
    node.provider.hixl.HixlCSClientDestroy(client)
    ldd_device_leave(node.provider, node.context, before)


cdef void* _end_main(void* argument) noexcept nogil:
    cdef ldd_ending* ending = <ldd_ending*>argument
    ldd_client_destroy(ending.node, ending.client)
    ldd_lock(&ending.node.lock)
    ending.node.num_ops -= 1
    if ending.node.num_ops == 0:
        ldd_cond_broadcast(&ending.node.idle)
    ldd_unlock(&ending.node.lock)
    free(ending)
    return NULL


cdef bint _end_elsewhere(ldd_node* node, HixlClientHandle client) noexcept nogil:
    cdef ldd_ending* ending = <ldd_ending*>malloc(sizeof(ldd_ending))
    cdef bint is_started
    if ending == NULL:
        return False
    ending.node = node
    ending.client = client
    ldd_lock(&node.lock)                        # held until it is counted: the thread may end at once
    is_started = not node.closing and ldd_spawn(_end_main, ending) == 0
    node.num_ops += is_started
    ldd_unlock(&node.lock)
    if not is_started:
        free(ending)
    return is_started


cdef void ldd_client_end(ldd_node* node, HixlClientHandle client) noexcept nogil:
    if node.provider.caps & LDD_CAP_CANCEL or not _end_elsewhere(node, client):
        ldd_client_destroy(node, client)


cdef void ldd_client_withdraw(ldd_link* link, uint64_t addr, uint64_t nbytes) noexcept nogil:
    cdef ldd_client_memory* own = link.own_memory
    cdef aclrtContext before
    cdef uint32_t i
    if own == NULL or link.client == NULL:
        return
    for i in range(own.count):
        if own.items[i].addr == addr and own.items[i].nbytes == nbytes:
            before = ldd_device_enter(link.node.provider, link.node.context)
            link.node.provider.hixl.HixlCSClientUnregMem(link.client, own.items[i].handle)
            ldd_device_leave(link.node.provider, link.node.context, before)
            own.count -= 1
            own.items[i] = own.items[own.count]
            return
