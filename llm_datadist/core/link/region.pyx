"""Memory that peers may reach, and the data servers that announce it.

A region is one range registered with every data server of this engine. Servers are started per local
address when the first peer comes in by it, so a process that only ever dials out on loopback is reachable
on loopback alone. Any thread. The lock is held across calls into the provider, which may take long: transfers, and
peers that come in by an address where there is a server, do without it.
"""
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcpy, memset, strcmp, strdup, strlen, strstr

from llm_datadist.core.base.atomic cimport ldd_load32, ldd_store32
from llm_datadist.core.base.device_context cimport ldd_device_enter, ldd_device_leave
from llm_datadist.core.base.provider cimport (
    ACL_MEM_LOCATION_TYPE_DEVICE, COMM_MEM_TYPE_DEVICE, COMM_MEM_TYPE_HOST, COMM_PROTOCOL_HCCS, LDD_CAP_ADMIT,
    LDD_CAP_ANY_LOCAL, LDD_CAP_DROP_PEER, LDD_CAP_FETCH, LDD_RIGHT_READ, LDD_RIGHT_WRITE, CommMem, HixlServerConfig,
    HixlServerDesc, aclrtPtrAttributes,
)
from llm_datadist.core.base.sockets cimport ldd_socket_free_port
from llm_datadist.core.base.status cimport (
    LDD_E_FAILED, LDD_E_NOT_ENABLED, LDD_E_NO_MEMORY, LDD_E_PARAM, LDD_OK, ldd_fail,
)
from llm_datadist.core.base.sync cimport ldd_lock, ldd_mutex_destroy, ldd_mutex_init, ldd_unlock
from llm_datadist.core.base.wait cimport ldd_hixl_result
from llm_datadist.core.link.wire cimport LDD_MAX_ENDPOINTS, ldd_endpoint_record

cdef extern from * nogil:
    int __ATOMIC_RELEASE, __ATOMIC_ACQUIRE
    uint64_t __atomic_add_fetch(uint64_t* counter, uint64_t by, int order)
    uint64_t __atomic_load_n(const uint64_t* counter, int order)

cdef enum:
    LISTEN_BACKLOG = 512
    PORT_TRIES = 16                             # a port found free may be taken before the server binds it
    HUGE_PAGE_BYTES = 2 << 20

# What CANN's documentation allows for one registration.
cdef uint64_t MAX_DEVICE_BYTES = <uint64_t>50 << 30
cdef uint64_t MAX_HOST_BYTES = <uint64_t>1 << 40


cdef void ldd_regions_init(ldd_regions* regions, const ldd_provider* provider) noexcept nogil:
    memset(regions, 0, sizeof(ldd_regions))
    regions.provider = provider
    regions.epoch = 1
    ldd_mutex_init(&regions.lock)


cdef void ldd_regions_close(ldd_regions* regions) noexcept nogil:
    cdef uint32_t i, s
    cdef aclrtContext before = ldd_device_enter(regions.provider, regions.context)
    ldd_lock(&regions.lock)
    for s in range(regions.num_servers):
        for i in range(regions.count):
            if regions.items[i].refs and regions.items[i].handles[s] != NULL:
                regions.provider.hixl.HixlCSServerUnregMem(regions.servers[s].handle, regions.items[i].handles[s])
        regions.provider.hixl.HixlCSServerDestroy(regions.servers[s].handle)
    regions.num_servers = 0
    free(regions.items)
    regions.items = NULL
    regions.count = regions.capacity = 0
    free(regions.resource_config)
    regions.resource_config = NULL
    regions.num_endpoints = 0
    ldd_unlock(&regions.lock)
    ldd_device_leave(regions.provider, regions.context, before)
    ldd_mutex_destroy(&regions.lock)


cdef void _describe(const ldd_region* region, CommMem* mem) noexcept nogil:
    memset(mem, 0, sizeof(CommMem))
    mem.type = COMM_MEM_TYPE_HOST if region.host else COMM_MEM_TYPE_DEVICE
    mem.addr = <void*>region.addr
    mem.size = region.nbytes


cdef ldd_status _announce(ldd_regions* regions, ldd_region* region, uint32_t server,
                         ldd_detail* detail) noexcept nogil:
    cdef CommMem mem
    _describe(region, &mem)
    return ldd_hixl_result(
        regions.provider,
        regions.provider.hixl.HixlCSServerRegMem(regions.servers[server].handle, NULL, &mem, &region.handles[server]),
        b"register memory with the data server", detail)


cdef void _withdraw(ldd_regions* regions, ldd_region* region) noexcept nogil:
    cdef uint32_t s
    for s in range(regions.num_servers):
        if region.handles[s] != NULL:
            regions.provider.hixl.HixlCSServerUnregMem(regions.servers[s].handle, region.handles[s])
            region.handles[s] = NULL
    region.refs = 0


cdef ldd_status _check_range(const ldd_regions* regions, uint64_t addr, uint64_t nbytes, bint host,
                             ldd_detail* detail) noexcept nogil:
    """The rules of a provider that registers memory with hardware, before it is asked: its own refusal comes late."""
    cdef aclrtPtrAttributes attributes
    cdef uint64_t limit = MAX_HOST_BYTES if host else MAX_DEVICE_BYTES
    cdef uint32_t i
    if nbytes > limit:
        return ldd_fail(detail, LDD_E_PARAM,
                        b"%llu bytes at %#llx: one registration of %s memory has at most %llu bytes",
                        <unsigned long long>nbytes, <unsigned long long>addr,
                        <const char*>b"host" if host else <const char*>b"device", <unsigned long long>limit)
    for i in range(regions.count):
        if (regions.items[i].refs and addr < regions.items[i].addr + regions.items[i].nbytes
                and regions.items[i].addr < addr + nbytes):
            return ldd_fail(detail, LDD_E_PARAM,
                            b"%llu bytes at %#llx overlap the %llu bytes at %#llx that are registered: ranges must be "
                            b"equal or apart", <unsigned long long>nbytes, <unsigned long long>addr,
                            <unsigned long long>regions.items[i].nbytes, <unsigned long long>regions.items[i].addr)
    for i in range(regions.num_endpoints):
        if regions.endpoints[i].protocol == COMM_PROTOCOL_HCCS and not host \
                and regions.provider.acl.aclrtPointerGetAttributes != NULL and addr % HUGE_PAGE_BYTES:
            memset(&attributes, 0, sizeof(attributes))
            if (regions.provider.acl.aclrtPointerGetAttributes(<void*>addr, &attributes) == 0
                    and attributes.location.type == ACL_MEM_LOCATION_TYPE_DEVICE
                    and 0 < attributes.pageSize < HUGE_PAGE_BYTES):
                return ldd_fail(detail, LDD_E_PARAM,
                                b"device memory at %#llx lies on pages of %u bytes: HCCS needs huge pages, or memory "
                                b"that starts at a multiple of 2 MiB", <unsigned long long>addr, attributes.pageSize)
            break
    return LDD_OK


cdef ldd_status _add_locked(ldd_regions* regions, uint64_t addr, uint64_t nbytes, bint host,
                            ldd_detail* detail) noexcept nogil:
    cdef uint32_t i, s, slot
    cdef ldd_status status = LDD_OK
    cdef ldd_region* grown
    slot = regions.count
    for i in range(regions.count):
        if regions.items[i].refs == 0:
            slot = i
        elif regions.items[i].addr == addr and regions.items[i].nbytes == nbytes:
            regions.items[i].refs += 1
            return LDD_OK
    if not regions.provider.caps & LDD_CAP_ANY_LOCAL:
        status = _check_range(regions, addr, nbytes, host, detail)
        if status < 0:
            return status
    if slot == regions.capacity:
        grown = <ldd_region*>realloc(regions.items, (regions.capacity * 2 + 16) * sizeof(ldd_region))
        if grown == NULL:
            return ldd_fail(detail, LDD_E_NO_MEMORY, b"no memory for another region")
        regions.items = grown
        regions.capacity = regions.capacity * 2 + 16
    cdef ldd_region* region = &regions.items[slot]
    memset(region, 0, sizeof(ldd_region))
    region.addr = addr
    region.nbytes = nbytes
    region.host = host
    # Peers that are connected ask again when they hear of a new epoch.
    for s in range(regions.num_servers):
        status = _announce(regions, region, s, detail)
        if status < 0:
            break
    if status < 0:
        _withdraw(regions, region)
    else:
        region.refs = 1
        if slot == regions.count:
            regions.count += 1
        __atomic_add_fetch(&regions.added, 1, __ATOMIC_RELEASE)
        __atomic_add_fetch(&regions.epoch, 1, __ATOMIC_RELEASE)
    return status


cdef ldd_status ldd_regions_add(ldd_regions* regions, uint64_t addr, uint64_t nbytes, bint host,
                                ldd_detail* detail) noexcept nogil:
    cdef aclrtContext before = ldd_device_enter(regions.provider, regions.context)
    cdef ldd_status status
    ldd_lock(&regions.lock)
    status = _add_locked(regions, addr, nbytes, host, detail)
    ldd_unlock(&regions.lock)
    ldd_device_leave(regions.provider, regions.context, before)
    return status


cdef bint ldd_regions_remove(ldd_regions* regions, uint64_t addr, uint64_t nbytes) noexcept nogil:
    cdef uint32_t i
    cdef bint is_gone = False
    cdef aclrtContext before = ldd_device_enter(regions.provider, regions.context)
    ldd_lock(&regions.lock)
    for i in range(regions.count):
        if regions.items[i].refs and regions.items[i].addr == addr and regions.items[i].nbytes == nbytes:
            regions.items[i].refs -= 1
            if regions.items[i].refs == 0:
                is_gone = True
                _withdraw(regions, &regions.items[i])
                __atomic_add_fetch(&regions.epoch, 1, __ATOMIC_RELEASE)
            break
    ldd_unlock(&regions.lock)
    ldd_device_leave(regions.provider, regions.context, before)
    return is_gone


cdef bint ldd_regions_find_server(const ldd_regions* regions, const char* ip, uint32_t* port) noexcept nogil:
    cdef uint32_t s
    for s in range(ldd_load32(&regions.num_servers)):
        if strcmp(regions.servers[s].ip, ip) == 0:
            port[0] = regions.servers[s].port
            return True
    return False


cdef ldd_status _start_server(ldd_regions* regions, uint32_t s, const char* ip, ldd_detail* detail) noexcept nogil:
    """Create, announce everything, then listen: a peer must find all memory when it connects."""
    cdef HixlServerDesc desc
    cdef HixlServerConfig config
    cdef ldd_data_server* server = &regions.servers[s]
    cdef ldd_detail reason
    cdef int _attempt
    cdef uint32_t i
    cdef ldd_status status = LDD_E_FAILED
    for _attempt in range(PORT_TRIES):
        memset(&desc, 0, sizeof(desc))
        memset(&config, 0, sizeof(config))
        config.global_resource_config = regions.resource_config
        server.port = <uint32_t>ldd_socket_free_port(ip, &reason)
        if server.port == 0:
            return ldd_fail(detail, LDD_E_FAILED, b"no port for a data server at %s: %s", ip, reason.text)
        desc.server_ip = ip
        desc.server_port = server.port
        if regions.num_endpoints:
            desc.endpoint_list = regions.endpoints
        desc.endpoint_list_num = regions.num_endpoints
        status = ldd_hixl_result(regions.provider,
                                 regions.provider.hixl.HixlCSServerCreate(&desc, &config, &server.handle),
                                 b"create a data server", detail)
        if status < 0:
            return status
        if regions.provider.caps & LDD_CAP_ADMIT:
            status = ldd_hixl_result(regions.provider, regions.provider.ext.LddServerRestrict(server.handle),
                                     b"restrict a data server", detail)
        if status == LDD_OK and regions.fetch_hooks.begin != NULL and regions.provider.caps & LDD_CAP_FETCH:
            status = ldd_hixl_result(regions.provider, regions.provider.ext.LddServerSetFetch(
                server.handle, &regions.fetch_hooks, regions.fetch_context), b"set up a data server", detail)
        for i in range(regions.count):
            regions.items[i].handles[s] = NULL
            if status == LDD_OK and regions.items[i].refs:
                status = _announce(regions, &regions.items[i], s, detail)
        if status == LDD_OK:
            status = ldd_hixl_result(regions.provider,
                                     regions.provider.hixl.HixlCSServerListen(server.handle, LISTEN_BACKLOG),
                                     b"start a data server", detail)
            if status == LDD_OK:
                return LDD_OK
        regions.provider.hixl.HixlCSServerDestroy(server.handle)
    return status


cdef ldd_status ldd_regions_serve(ldd_regions* regions, const char* ip, uint32_t* port,
                                  ldd_detail* detail) noexcept nogil:
    cdef uint32_t s
    cdef ldd_status status
    cdef aclrtContext before
    if ldd_regions_find_server(regions, ip, port):
        return LDD_OK
    ldd_lock(&regions.lock)
    if ldd_regions_find_server(regions, ip, port):         # another thread was faster
        ldd_unlock(&regions.lock)
        return LDD_OK
    s = regions.num_servers
    if s == MAX_DATA_SERVERS or strlen(ip) >= sizeof(regions.servers[0].ip):
        ldd_unlock(&regions.lock)
        return ldd_fail(detail, LDD_E_NOT_ENABLED, b"no data server at %s: at most %d local addresses", ip,
                        <int>MAX_DATA_SERVERS)
    if s and regions.port_is_fixed:
        ldd_unlock(&regions.lock)
        return ldd_fail(detail, LDD_E_NOT_ENABLED,
                        b"no data server at %s: there is one at %s, and the listen_port of global_resource_config is "
                        b"for one alone. Leave it out, or have all peers come by one local address", ip,
                        regions.servers[0].ip)
    memset(&regions.servers[s], 0, sizeof(ldd_data_server))
    memcpy(regions.servers[s].ip, ip, strlen(ip))
    before = ldd_device_enter(regions.provider, regions.context)
    status = _start_server(regions, s, ip, detail)
    ldd_device_leave(regions.provider, regions.context, before)
    if status == LDD_OK:
        ldd_store32(&regions.num_servers, s + 1)
        port[0] = regions.servers[s].port
    ldd_unlock(&regions.lock)
    return status


cdef ldd_status ldd_regions_register_client(ldd_regions* regions, HixlClientHandle client, ldd_client_memory** out,
                                            ldd_detail* detail) noexcept nogil:
    cdef CommMem mem
    cdef uint32_t i
    cdef ldd_client_memory* known
    cdef ldd_client_range* item
    cdef ldd_status status = LDD_OK
    out[0] = NULL
    if regions.provider.caps & LDD_CAP_ANY_LOCAL:
        return LDD_OK
    ldd_lock(&regions.lock)
    known = <ldd_client_memory*>malloc(sizeof(ldd_client_memory) + regions.count * sizeof(ldd_client_range))
    if known == NULL:
        ldd_unlock(&regions.lock)
        return ldd_fail(detail, LDD_E_NO_MEMORY, b"no memory for a record of %u regions", regions.count)
    known.items = <ldd_client_range*>(known + 1)
    known.count = 0
    known.added = regions.added
    for i in range(regions.count):
        if regions.items[i].refs and status == LDD_OK:
            _describe(&regions.items[i], &mem)
            item = &known.items[known.count]
            item.addr = regions.items[i].addr
            item.nbytes = regions.items[i].nbytes
            status = ldd_hixl_result(regions.provider,
                                     regions.provider.hixl.HixlCSClientRegMem(client, NULL, &mem, &item.handle),
                                     b"register memory with the data client", detail)
            known.count += 1
    ldd_unlock(&regions.lock)
    if status < 0:
        free(known)                             # the registrations go with the client
    else:
        out[0] = known
    return status


cdef ldd_status ldd_regions_admit_peer(ldd_regions* regions, uint32_t port, const uint8_t* token,
                                       ldd_detail* detail) noexcept nogil:
    cdef uint32_t s
    cdef ldd_status status = LDD_OK
    if not regions.provider.caps & LDD_CAP_ADMIT:
        return LDD_OK
    ldd_lock(&regions.lock)
    for s in range(regions.num_servers):
        if regions.servers[s].port == port and status == LDD_OK:
            status = ldd_hixl_result(regions.provider, regions.provider.ext.LddServerAdmitPeer(
                regions.servers[s].handle, token, LDD_RIGHT_READ | LDD_RIGHT_WRITE),
                b"admit a peer to the data server", detail)
    ldd_unlock(&regions.lock)
    return status


cdef bint ldd_regions_are_known(ldd_regions* regions, const ldd_client_memory* known) noexcept nogil:
    return known == NULL or known.added == __atomic_load_n(&regions.added, __ATOMIC_ACQUIRE)


cdef void ldd_regions_drop_peer(ldd_regions* regions, const uint8_t* token) noexcept nogil:
    cdef uint32_t s
    if not regions.provider.caps & LDD_CAP_DROP_PEER:
        return
    ldd_lock(&regions.lock)
    for s in range(regions.num_servers):
        regions.provider.ext.LddServerDropPeer(regions.servers[s].handle, token)
    ldd_unlock(&regions.lock)


cdef void ldd_regions_end_fetches(ldd_regions* regions) noexcept nogil:
    cdef uint32_t s
    if not regions.provider.caps & LDD_CAP_FETCH:
        return
    ldd_lock(&regions.lock)
    for s in range(regions.num_servers):
        regions.provider.ext.LddServerSetFetch(regions.servers[s].handle, NULL, NULL)
    ldd_unlock(&regions.lock)


cdef ldd_status ldd_regions_configure(ldd_regions* regions, const void* records, uint32_t count,
                                      const char* resource_config, uint8_t traffic_class,
                                      uint8_t service_level) noexcept nogil:
    cdef uint32_t i
    count = min(count, <uint32_t>LDD_MAX_ENDPOINTS)
    memcpy(regions.offers.items, records, count * sizeof(ldd_endpoint_record))
    for i in range(count):
        memcpy(&regions.endpoints[i], regions.offers.items[i].endpoint, sizeof(EndpointDesc))
    regions.offers.count = regions.num_endpoints = count
    regions.traffic_class = traffic_class
    regions.service_level = service_level
    regions.port_is_fixed = strstr(resource_config, b'listen_port"') != NULL
    if resource_config[0] != 0:
        regions.resource_config = strdup(resource_config)
        if regions.resource_config == NULL:
            return LDD_E_NO_MEMORY
    return LDD_OK


cdef void ldd_regions_own_endpoint(ldd_regions* regions, uint8_t* out) noexcept nogil:
    if regions.num_endpoints:
        memcpy(out, regions.endpoints, sizeof(EndpointDesc))


cdef uint64_t ldd_regions_epoch(ldd_regions* regions) noexcept nogil:
    return __atomic_load_n(&regions.epoch, __ATOMIC_ACQUIRE)
