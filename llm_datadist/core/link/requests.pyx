"""The asking side of a link: requests to the peer's service thread, one at a time under the link's lock.

Called by user threads without the GIL. Whatever leaves the connection in doubt (time out, broken frame, a
peer that is gone) breaks the link: later transfers on it fail at once until it is made anew. A refusal in
the peer's own words (unknown key, bad range) leaves it as it is.
"""
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdio cimport snprintf
from libc.stdlib cimport realloc
from libc.string cimport memcpy, memset, strcmp

from llm_datadist.core.base.provider cimport (
    HIXL_SUCCESS, LDD_CAP_FETCH, CommMem, EndpointDesc, HixlClientConfig, HixlClientDesc,
)
from llm_datadist.core.base.sockets cimport ldd_socket_recv, ldd_socket_send
from llm_datadist.core.base.status cimport LDD_E_FAILED, LDD_E_NO_MEMORY, LDD_E_TIMEOUT, LDD_OK, ldd_fail
from llm_datadist.core.base.sync cimport ldd_now_ns
from llm_datadist.core.base.wait cimport ldd_hixl_result
from llm_datadist.core.link.links cimport ldd_link_break
from llm_datadist.core.link.region cimport ldd_regions_register_client
from llm_datadist.core.link.wire cimport (
    LDD_ACCESS_READ, LDD_ACCESS_WRITE, LDD_DESC_EVEN, LDD_FRAME_ACK, LDD_FRAME_DESCRIPTOR, LDD_FRAME_LEASE,
    LDD_FRAME_PING, LDD_FRAME_RANGES, LDD_FRAME_RELEASE, LDD_FRAME_RESOLVE, LDD_FRAME_UNLINK, LDD_RELEASE_TAKE,
    LDD_WIRE_MAGIC, LDD_WIRE_MAX_PAYLOAD, LDD_WIRE_VERSION, ldd_ack, ldd_frame_header, ldd_lease_reply, ldd_range,
    ldd_release, ldd_resolve,
)

cdef enum:
    SMALL_REQUEST_BYTES = 512


cdef ldd_status ldd_reply_room(ldd_link* link, size_t nbytes) noexcept nogil:
    cdef uint8_t* grown
    if nbytes > link.reply_capacity:
        grown = <uint8_t*>realloc(link.reply, nbytes)
        if grown == NULL:
            return LDD_E_NO_MEMORY
        link.reply = grown
        link.reply_capacity = nbytes
    return LDD_OK


cdef ldd_status ldd_exchange(int fd, uint32_t request_id, uint32_t type, const void* payload, size_t nbytes,
                             uint32_t reply_type, void* reply, size_t fixed, ldd_link* rest_into, size_t* rest_bytes,
                             int64_t deadline_ns, ldd_detail* detail) noexcept nogil:
    cdef ldd_frame_header header
    cdef uint8_t small[SMALL_REQUEST_BYTES]
    cdef ldd_status status
    cdef size_t rest
    header.magic = LDD_WIRE_MAGIC
    header.version = LDD_WIRE_VERSION
    header.type = <uint16_t>type
    header.length = <uint32_t>nbytes
    header.request_id = request_id
    if sizeof(header) + nbytes <= sizeof(small):
        memcpy(small, &header, sizeof(header))      # one segment on the wire, one wake-up of the peer
        if nbytes:
            memcpy(small + sizeof(header), payload, nbytes)
        status = ldd_socket_send(fd, small, sizeof(header) + nbytes, deadline_ns, detail)
    else:
        status = ldd_socket_send(fd, &header, sizeof(header), deadline_ns, detail)
        if status == LDD_OK:
            status = ldd_socket_send(fd, payload, nbytes, deadline_ns, detail)
    if status == LDD_OK:
        status = ldd_socket_recv(fd, &header, sizeof(header), deadline_ns, detail)
    if status < 0:
        return status
    if header.magic != LDD_WIRE_MAGIC or header.version != LDD_WIRE_VERSION:
        return ldd_fail(detail, LDD_E_FAILED, b"the peer does not speak this protocol (magic %#x, version %u; here %u)",
                        header.magic, <uint32_t>header.version, <uint32_t>LDD_WIRE_VERSION)
    if header.type != reply_type or header.request_id != request_id or header.length < fixed \
            or header.length > LDD_WIRE_MAX_PAYLOAD or (rest_into == NULL and header.length != fixed):
        return ldd_fail(detail, LDD_E_FAILED, b"the peer's answer does not fit the request (type %u, %u bytes)",
                        <uint32_t>header.type, header.length)
    status = ldd_socket_recv(fd, reply, fixed, deadline_ns, detail)
    if status < 0 or rest_into == NULL:
        return status
    rest = header.length - fixed
    rest_bytes[0] = rest
    status = ldd_reply_room(rest_into, rest + 1)
    if status < 0:
        return ldd_fail(detail, status, b"no memory for an answer of %u bytes", header.length)
    status = ldd_socket_recv(fd, rest_into.reply, rest, deadline_ns, detail)
    rest_into.reply[rest] = 0
    return status


cdef ldd_status _ask(ldd_link* link, uint32_t type, const void* payload, size_t nbytes, uint32_t reply_type,
                    void* reply, size_t fixed, bint has_rest, size_t* rest_bytes, int64_t deadline_ns,
                    ldd_detail* detail) noexcept nogil:
    cdef ldd_status status
    link.next_request += 1
    status = ldd_exchange(link.ask_fd, link.next_request, type, payload, nbytes, reply_type, reply, fixed,
                          link if has_rest else NULL, rest_bytes, deadline_ns, detail)
    if status < 0:
        ldd_link_break(link, detail.text)
    return status


cdef ldd_status _bad_descriptor(ldd_link* link, ldd_detail* detail) noexcept nogil:
    ldd_fail(detail, LDD_E_FAILED, b"cluster %llu described a cache inconsistently",
             <unsigned long long>link.cluster_id)
    ldd_link_break(link, detail.text)
    return LDD_E_FAILED


cdef ldd_status ldd_request_resolve(ldd_link* link, uint32_t kind, uint64_t id, uint64_t model_id, uint64_t batch_index,
                                bint write, int64_t deadline_ns, ldd_remote_cache* out,
                                ldd_detail* detail) noexcept nogil:
    cdef ldd_resolve request
    cdef size_t rest = 0
    cdef uint32_t i
    cdef uint64_t base, step
    cdef ldd_status status
    memset(&request, 0, sizeof(request))
    request.kind = <uint8_t>kind
    request.access = LDD_ACCESS_WRITE if write else LDD_ACCESS_READ
    request.batch_index = <uint32_t>batch_index
    request.id = id
    request.model_id = model_id
    status = _ask(link, LDD_FRAME_RESOLVE, &request, sizeof(request), LDD_FRAME_DESCRIPTOR, &out.desc,
                 sizeof(out.desc), True, &rest, deadline_ns, detail)
    if status < 0:
        return status
    if out.desc.status < 0:
        return ldd_fail(detail, out.desc.status, b"cluster %llu: %s", <unsigned long long>link.cluster_id,
                        <char*>link.reply)
    if out.desc.num_tensors == 0 or out.desc.num_slots == 0 or out.desc.num_tensors > LDD_WIRE_MAX_PAYLOAD // 8:
        return _bad_descriptor(link, detail)
    if out.desc.flags & LDD_DESC_EVEN:
        if rest != 16 or ldd_reply_room(link, 8 * <size_t>out.desc.num_tensors) < 0:
            return _bad_descriptor(link, detail)
        out.addrs = <uint64_t*>link.reply
        base = out.addrs[0]
        step = out.addrs[1]
        for i in range(out.desc.num_tensors):
            out.addrs[i] = base + i * step
    elif rest != 8 * <size_t>out.desc.num_tensors:
        return _bad_descriptor(link, detail)
    out.addrs = <uint64_t*>link.reply
    return LDD_OK


cdef ldd_status ldd_request_ranges(ldd_link* link, const ldd_range* ranges, uint32_t num_ranges, int64_t deadline_ns,
                               uint32_t* lease, uint64_t* region_epoch, ldd_detail* detail) noexcept nogil:
    cdef ldd_lease_reply reply
    cdef ldd_status status
    status = _ask(link, LDD_FRAME_RANGES, ranges, num_ranges * sizeof(ldd_range), LDD_FRAME_LEASE, &reply,
                 sizeof(reply), False, NULL, deadline_ns, detail)
    if status < 0:
        return status
    if reply.status < 0:
        reply.text[sizeof(reply.text) - 1] = 0
        return ldd_fail(detail, reply.status, b"cluster %llu: %s", <unsigned long long>link.cluster_id, reply.text)
    lease[0] = reply.lease
    region_epoch[0] = reply.region_epoch
    return LDD_OK


cdef ldd_status ldd_request_release(ldd_link* link, uint32_t lease, bint take, uint32_t first_tensor,
                                uint32_t num_tensors, int64_t deadline_ns, ldd_detail* detail) noexcept nogil:
    cdef ldd_release request
    cdef ldd_ack ack
    cdef ldd_status status
    request.lease = lease
    request.flags = LDD_RELEASE_TAKE if take else 0
    request.first_tensor = first_tensor
    request.num_tensors = num_tensors
    status = _ask(link, LDD_FRAME_RELEASE, &request, sizeof(request), LDD_FRAME_ACK, &ack, sizeof(ack), False, NULL,
                 deadline_ns, detail)
    if status == LDD_OK and ack.status < 0:
        return ldd_fail(detail, ack.status, b"cluster %llu refused to end lease %u",
                        <unsigned long long>link.cluster_id, lease)
    return status


cdef ldd_status ldd_request_unlink(ldd_link* link, int64_t deadline_ns, ldd_detail* detail) noexcept nogil:
    cdef ldd_ack ack
    return _ask(link, LDD_FRAME_UNLINK, NULL, 0, LDD_FRAME_ACK, &ack, sizeof(ack), False, NULL, deadline_ns, detail)


cdef ldd_status ldd_request_ping(ldd_link* link, int64_t deadline_ns, ldd_detail* detail) noexcept nogil:
    cdef ldd_ack ack
    return _ask(link, LDD_FRAME_PING, NULL, 0, LDD_FRAME_ACK, &ack, sizeof(ack), False, NULL, deadline_ns, detail)


cdef uint32_t _left_ms(int64_t deadline_ns) noexcept nogil:
    """Milliseconds to the deadline, rounded up; 0 when it has passed."""
    cdef int64_t left = deadline_ns - ldd_now_ns()
    return <uint32_t>min((left + 999999) // 1000000, <int64_t>0x7fffffff) if left > 0 else 0


cdef ldd_status _connect_client(ldd_link* link, int64_t deadline_ns, ldd_detail* detail) noexcept nogil:
    cdef HixlClientDesc desc
    cdef HixlClientConfig config
    cdef char json[64]
    cdef int i, at
    cdef ldd_status status
    cdef uint32_t timeout_ms = _left_ms(deadline_ns)
    if timeout_ms == 0:
        return ldd_fail(detail, LDD_E_TIMEOUT, b"the deadline passed before the data path was connected")
    memset(&desc, 0, sizeof(desc))
    memset(&config, 0, sizeof(config))
    at = snprintf(json, sizeof(json), b'{"ldd_token":"')
    for i in range(16):
        at += snprintf(json + at, sizeof(json) - at, b"%02x", <unsigned int>link.token[i])
    snprintf(json + at, sizeof(json) - at, b'"}')
    config.global_resource_config = json
    desc.server_ip = link.data_ip
    desc.server_port = link.data_port
    if link.node.regions.num_endpoints:
        desc.local_endpoint = link.node.regions.endpoints
        desc.remote_endpoint = <const EndpointDesc*>link.endpoint
    status = ldd_hixl_result(link.node.provider,
                             link.node.provider.hixl.HixlCSClientCreate(&desc, &config, &link.client),
                             b"create the data client", detail)
    if status < 0:
        link.client = NULL
        return status
    status = ldd_regions_register_client(&link.node.regions, link.client, detail)
    if status == LDD_OK:
        status = ldd_hixl_result(link.node.provider,
                                 link.node.provider.hixl.HixlCSClientConnect(link.client, timeout_ms),
                                 b"connect the data path", detail)
    if status < 0:
        link.node.provider.hixl.HixlCSClientDestroy(link.client)
        link.client = NULL
    return status


cdef void _note_paths(ldd_link* link) noexcept nogil:
    cdef char text[64]
    link.fetches = (link.node.provider.caps & LDD_CAP_FETCH and link.node.provider.ext.LddClientPaths != NULL
                    and link.node.provider.ext.LddClientPaths(link.client, text, sizeof(text)) == HIXL_SUCCESS
                    and strcmp(text, b"tcp") == 0)


cdef ldd_status ldd_link_ready(ldd_link* link, uint64_t region_epoch, int64_t deadline_ns,
                               ldd_detail* detail) noexcept nogil:
    cdef ldd_status status
    cdef CommMem* regions
    cdef char** tags
    cdef uint32_t count
    if link.client == NULL:
        status = _connect_client(link, deadline_ns, detail)
    elif link.seen_epoch != region_epoch:
        status = ldd_hixl_result(link.node.provider, link.node.provider.hixl.HixlCSClientGetRemoteMem(
            link.client, &regions, &tags, &count, _left_ms(deadline_ns)), b"read the peer's regions", detail)
    else:
        return LDD_OK
    if status < 0:
        ldd_link_break(link, detail.text)
        return status
    _note_paths(link)
    if region_epoch:
        link.seen_epoch = region_epoch
    return LDD_OK
