"""The asking side of a link: requests to the peer's service thread, one at a time under the link's lock.

Called by user threads without the GIL. Whatever leaves the connection in doubt (time out, broken frame, a
peer that is gone) breaks the link: later transfers on it fail at once until it is made anew. A refusal in
the peer's own words (unknown key, bad range) leaves it as it is.
"""
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdio cimport snprintf
from libc.stdlib cimport realloc
from libc.string cimport memcpy, memset, strcmp, strncmp

from llm_datadist.core.base.device_context cimport ldd_device_enter, ldd_device_leave
from llm_datadist.core.base.provider cimport (
    COMM_PROTOCOL_HCCS, COMM_PROTOCOL_ROCE, COMM_PROTOCOL_UBC_CTP, COMM_PROTOCOL_UBG, COMM_PROTOCOL_UBOE,
    ENDPOINT_LOC_TYPE_HOST, HIXL_SUCCESS, LDD_CAP_FETCH, CommMem, CommProtocol, EndpointDesc, aclrtContext,
)
from llm_datadist.core.base.sockets cimport ldd_socket_recv, ldd_socket_send
from llm_datadist.core.base.status cimport (
    LDD_E_FAILED, LDD_E_LINK_FAILED, LDD_E_NO_MEMORY, LDD_E_TIMEOUT, LDD_OK, ldd_fail,
)
from llm_datadist.core.base.sync cimport ldd_now_ns
from llm_datadist.core.base.wait cimport ldd_hixl_result
from llm_datadist.core.link.background cimport ldd_background_destroy, ldd_background_open
from llm_datadist.core.link.links cimport ldd_link_break
from llm_datadist.core.link.region cimport ldd_regions, ldd_regions_are_known
from llm_datadist.core.link.wire cimport (
    LDD_ACCESS_READ, LDD_ACCESS_WRITE, LDD_DESC_EVEN, LDD_FRAME_ACK, LDD_FRAME_CHECKSUM, LDD_FRAME_CHECKSUMS,
    LDD_FRAME_DESCRIPTOR, LDD_FRAME_ENDPOINT_LIST, LDD_FRAME_ENDPOINTS, LDD_FRAME_LEASE, LDD_FRAME_PING,
    LDD_FRAME_RANGES, LDD_FRAME_RELEASE, LDD_FRAME_RESOLVE, LDD_FRAME_UNLINK, LDD_MAX_ENDPOINTS, LDD_RELEASE_TAKE,
    LDD_WIRE_MAGIC, LDD_WIRE_MAX_PAYLOAD, LDD_WIRE_VERSION, ldd_ack, ldd_checked, ldd_checked_range, ldd_checksums,
    ldd_endpoint_list, ldd_endpoint_record, ldd_frame_header, ldd_lease_reply, ldd_range, ldd_ranges, ldd_release,
    ldd_resolve,
)
from llm_datadist.core.record.record cimport (
    LDD_EVENT_ASK, LDD_OP_PING, LDD_OP_RELEASE, LDD_OP_RESOLVE, ldd_record_count, ldd_trace_span,
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
    cdef ldd_status status = _send(fd, request_id, type, payload, nbytes, deadline_ns, detail)
    if status < 0:
        return status
    return _receive(fd, request_id, reply_type, reply, fixed, rest_into, rest_bytes, deadline_ns, detail)


cdef ldd_status _send(int fd, uint32_t request_id, uint32_t type, const void* payload, size_t nbytes,
                      int64_t deadline_ns, ldd_detail* detail) noexcept nogil:
    cdef ldd_frame_header header
    cdef uint8_t small[SMALL_REQUEST_BYTES]
    cdef ldd_status status
    header.magic = LDD_WIRE_MAGIC
    header.version = LDD_WIRE_VERSION
    header.type = <uint16_t>type
    header.length = <uint32_t>nbytes
    header.request_id = request_id
    if sizeof(header) + nbytes <= sizeof(small):
        memcpy(small, &header, sizeof(header))      # one segment on the wire, one wake-up of the peer
        if nbytes:
            memcpy(small + sizeof(header), payload, nbytes)
        return ldd_socket_send(fd, small, sizeof(header) + nbytes, deadline_ns, detail)
    status = ldd_socket_send(fd, &header, sizeof(header), deadline_ns, detail)
    return ldd_socket_send(fd, payload, nbytes, deadline_ns, detail) if status == LDD_OK else status


cdef ldd_status _receive(int fd, uint32_t request_id, uint32_t reply_type, void* reply, size_t fixed,
                         ldd_link* rest_into, size_t* rest_bytes, int64_t deadline_ns,
                         ldd_detail* detail) noexcept nogil:
    cdef ldd_frame_header header
    cdef size_t rest
    cdef ldd_status status = ldd_socket_recv(fd, &header, sizeof(header), deadline_ns, detail)
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
    cdef int64_t start_ns = ldd_now_ns()
    link.next_request += 1
    status = ldd_exchange(link.ask_fd, link.next_request, type, payload, nbytes, reply_type, reply, fixed,
                          link if has_rest else NULL, rest_bytes, deadline_ns, detail)
    if type == LDD_FRAME_RESOLVE or type == LDD_FRAME_RELEASE or type == LDD_FRAME_PING:
        ldd_record_count(link.record, LDD_OP_RESOLVE if type == LDD_FRAME_RESOLVE else
                         LDD_OP_RELEASE if type == LDD_FRAME_RELEASE else LDD_OP_PING, ldd_now_ns() - start_ns, 0,
                         status < 0)
    ldd_trace_span(&link.node.record, LDD_EVENT_ASK, start_ns, link.cluster_id, 0, link.next_request, type, nbytes,
                   status)
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


cdef ldd_status ldd_request_ranges(ldd_link* link, const ldd_ranges* head, uint32_t num_ranges, int64_t deadline_ns,
                               ldd_lease_reply* out, ldd_detail* detail) noexcept nogil:
    cdef ldd_status status = _ask(link, LDD_FRAME_RANGES, head, sizeof(head[0]) + num_ranges * sizeof(ldd_range),
                                  LDD_FRAME_LEASE, out, sizeof(out[0]), False, NULL, deadline_ns, detail)
    if status < 0:
        return status
    if out.status < 0:
        out.text[sizeof(out.text) - 1] = 0
        return ldd_fail(detail, out.status, b"cluster %llu: %s", <unsigned long long>link.cluster_id, out.text)
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


cdef ldd_status ldd_request_checksums(ldd_link* link, const ldd_checked* request, int64_t deadline_ns,
                                      ldd_detail* detail) noexcept nogil:
    cdef ldd_status status
    link.next_request += 1
    status = _send(link.ask_fd, link.next_request, LDD_FRAME_CHECKSUM, request,
                   sizeof(request[0]) + request.num_ranges * sizeof(ldd_checked_range), deadline_ns, detail)
    if status < 0:
        ldd_link_break(link, detail.text)
    return status


cdef ldd_status ldd_take_checksums(ldd_link* link, ldd_checksums* out, uint32_t num_sums, int64_t deadline_ns,
                                   ldd_detail* detail) noexcept nogil:
    cdef ldd_status status = _receive(link.ask_fd, link.next_request, LDD_FRAME_CHECKSUMS, out,
                                      sizeof(out[0]) + num_sums * sizeof(uint32_t), NULL, NULL, deadline_ns, detail)
    if status < 0:
        ldd_link_break(link, detail.text)
        return status
    if out.status < 0:
        return ldd_fail(detail, out.status, b"cluster %llu could not compute checksums: its memory is not for the CPU "
                        b"to read, or the transfer's lease has ended", <unsigned long long>link.cluster_id)
    return LDD_OK


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


cdef int _preference(CommProtocol protocol) noexcept nogil:
    """The order in which protocols are tried, from 0; -1 for one that nothing is known of."""
    if protocol == COMM_PROTOCOL_UBC_CTP:
        return 0
    if protocol == COMM_PROTOCOL_HCCS:
        return 1
    if protocol == COMM_PROTOCOL_UBOE:
        return 2
    if protocol == COMM_PROTOCOL_UBG:
        return 3
    return 4 if protocol == COMM_PROTOCOL_ROCE else -1


cdef const char* _protocol_name(CommProtocol protocol) noexcept nogil:
    if protocol == COMM_PROTOCOL_UBC_CTP:
        return b"ub_ctp"
    if protocol == COMM_PROTOCOL_UBG:
        return b"ub_rtp"
    if protocol == COMM_PROTOCOL_UBOE:
        return b"uboe"
    if protocol == COMM_PROTOCOL_HCCS:
        return b"hccs"
    return b"roce" if protocol == COMM_PROTOCOL_ROCE else b"unknown"


cdef int _rank_pair(const ldd_endpoint_record* ours, const ldd_endpoint_record* theirs) noexcept nogil:
    """How well two endpoints go together, 0 is best; -1 when they do not."""
    cdef EndpointDesc here, there
    cdef int preference
    memcpy(&here, ours.endpoint, sizeof(here))
    memcpy(&there, theirs.endpoint, sizeof(there))
    preference = _preference(here.protocol)
    if (preference < 0 or here.protocol != there.protocol or here.commAddr.type != there.commAddr.type
            or strncmp(ours.plane, theirs.plane, sizeof(ours.plane)) != 0):
        return -1
    if ((here.protocol == COMM_PROTOCOL_HCCS or here.protocol == COMM_PROTOCOL_UBC_CTP)
            and ours.net_instance[0] != 0 and theirs.net_instance[0] != 0
            and strncmp(ours.net_instance, theirs.net_instance, sizeof(ours.net_instance)) != 0):
        return -1                               # another super node
    return 4 * preference + 2 * (here.loc.locType == ENDPOINT_LOC_TYPE_HOST) + (
        there.loc.locType == ENDPOINT_LOC_TYPE_HOST)


cdef void _list_endpoints(const ldd_endpoint_list* offers, char* text, size_t size) noexcept nogil:
    cdef size_t at = 0
    cdef uint32_t i
    cdef EndpointDesc endpoint
    text[0] = 0
    for i in range(offers.count):
        memcpy(&endpoint, offers.items[i].endpoint, sizeof(endpoint))
        if at + 1 < size:
            at += snprintf(text + at, size - at, b"%s%s on the %s%s%.31s%s%.40s", <const char*>b", " if i else
                           <const char*>b"", _protocol_name(endpoint.protocol),
                           <const char*>b"host" if endpoint.loc.locType == ENDPOINT_LOC_TYPE_HOST else
                           <const char*>b"device",
                           <const char*>b" of plane " if offers.items[i].plane[0] else <const char*>b"",
                           offers.items[i].plane,
                           <const char*>b" in " if offers.items[i].net_instance[0] else <const char*>b"",
                           offers.items[i].net_instance)


cdef ldd_status _choose_endpoints(ldd_link* link, int64_t deadline_ns, ldd_detail* detail) noexcept nogil:
    """Pick the pair of endpoints that the data path will use, out of all of ours and all of the peer's."""
    cdef ldd_regions* regions = &link.node.regions
    cdef ldd_endpoint_list theirs
    cdef char ours_text[130]
    cdef char theirs_text[130]
    cdef int rank, best = -1
    cdef uint32_t i, k, own = 0, other = 0
    cdef ldd_status status
    theirs.count = 0
    for i in range(sizeof(link.endpoint)):
        if link.endpoint[i]:
            theirs.count = 1
            break
    if theirs.count == 0:
        return ldd_fail(detail, LDD_E_LINK_FAILED,
                        b"cluster %llu names no endpoint of a network: does it run another provider?",
                        <unsigned long long>link.cluster_id)
    status = _ask(link, LDD_FRAME_ENDPOINTS, NULL, 0, LDD_FRAME_ENDPOINT_LIST, &theirs, sizeof(theirs), False, NULL,
                 deadline_ns, detail)
    if status < 0:
        return status
    theirs.count = min(theirs.count, <uint32_t>LDD_MAX_ENDPOINTS)
    for i in range(theirs.count):
        theirs.items[i].plane[sizeof(theirs.items[i].plane) - 1] = 0
        theirs.items[i].net_instance[sizeof(theirs.items[i].net_instance) - 1] = 0
        for k in range(regions.offers.count):
            rank = _rank_pair(&regions.offers.items[k], &theirs.items[i])
            if rank >= 0 and (best < 0 or rank < best):
                best = rank
                own = k
                other = i
    if best < 0:
        _list_endpoints(&regions.offers, ours_text, sizeof(ours_text))
        _list_endpoints(&theirs, theirs_text, sizeof(theirs_text))
        return ldd_fail(detail, LDD_E_LINK_FAILED,
                        b"no endpoint here (%s) fits one of cluster %llu (%s): name endpoints of one protocol in "
                        b"local_comm_res", ours_text, <unsigned long long>link.cluster_id, theirs_text)
    link.own_endpoint = &regions.endpoints[own]
    link.submits_slowly = regions.endpoints[own].loc.locType == ENDPOINT_LOC_TYPE_HOST
    memcpy(link.endpoint, theirs.items[other].endpoint, sizeof(link.endpoint))
    return LDD_OK


cdef ldd_status _connect_client(ldd_link* link, int64_t deadline_ns, ldd_detail* detail) noexcept nogil:
    cdef ldd_status status = LDD_OK
    if _left_ms(deadline_ns) == 0:
        return ldd_fail(detail, LDD_E_TIMEOUT, b"the deadline passed before the data path was connected")
    if link.node.regions.num_endpoints and link.own_endpoint == NULL:
        status = _choose_endpoints(link, deadline_ns, detail)
    return ldd_background_open(link, deadline_ns, detail) if status == LDD_OK else status


cdef void _note_paths(ldd_link* link) noexcept nogil:
    cdef char text[64]
    link.fetches = (link.node.provider.caps & LDD_CAP_FETCH and link.node.provider.ext.LddClientPaths != NULL
                    and link.node.provider.ext.LddClientPaths(link.client, text, sizeof(text)) == HIXL_SUCCESS
                    and strcmp(text, b"tcp") == 0)


cdef ldd_status _not_ready(ldd_link* link, ldd_status status, const ldd_detail* detail) noexcept nogil:
    if link.opening == NULL:                    # otherwise the next transfer may have the client
        ldd_link_break(link, detail.text)
    return status


cdef ldd_status ldd_link_ready(ldd_link* link, uint64_t region_epoch, int64_t deadline_ns,
                               ldd_detail* detail) noexcept nogil:
    cdef ldd_status status = LDD_OK
    cdef CommMem* regions
    cdef char** tags
    cdef uint32_t count, left_ms
    cdef aclrtContext before
    if link.opening != NULL:
        status = ldd_background_open(link, deadline_ns, detail)
        if status < 0:
            return _not_ready(link, status, detail)
    left_ms = _left_ms(deadline_ns)
    if link.client != NULL and not ldd_regions_are_known(&link.node.regions, link.own_memory):
        ldd_background_destroy(link)            # it was connected before there was all of the memory we have now
    if link.client == NULL:
        status = _connect_client(link, deadline_ns, detail)
    elif link.seen_epoch != region_epoch:
        if left_ms == 0:
            return ldd_fail(detail, LDD_E_TIMEOUT, b"the deadline passed before the peer's regions were read")
        before = ldd_device_enter(link.node.provider, link.node.context)
        status = ldd_hixl_result(link.node.provider, link.node.provider.hixl.HixlCSClientGetRemoteMem(
            link.client, &regions, &tags, &count, left_ms), b"read the peer's regions", detail)
        ldd_device_leave(link.node.provider, link.node.context, before)
    else:
        return LDD_OK
    if status < 0:
        return _not_ready(link, status, detail)
    _note_paths(link)
    if region_epoch:
        link.seen_epoch = region_epoch
    return LDD_OK
