"""What peers ask of an established link, answered from the cache table.

Runs on the service thread. A lease pins the caches it names until the peer releases it or its connection
ends; what a peer fetches over the data path is in ``serve_pull.pyx``.
"""
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdio cimport snprintf
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcpy, memset, strlen

from llm_datadist.core.base.atomic cimport ldd_add64
from llm_datadist.core.base.status cimport (
    LDD_E_NOT_LINKED, LDD_E_NO_MEMORY, LDD_E_PARAM, LDD_OK, ldd_detail, ldd_fail, ldd_status,
)
from llm_datadist.core.base.sync cimport ldd_now_ns
from llm_datadist.core.link.access cimport ldd_check_access
from llm_datadist.core.link.checksums cimport ldd_reply_checksums
from llm_datadist.core.link.links cimport (
    LINK_ACTIVE, ORIGIN_PEER, ldd_lease, ldd_link, ldd_link_break, ldd_link_drop, ldd_link_leave, ldd_link_lose,
    ldd_link_state_of, ldd_link_unref, ldd_node, ldd_pin,
)
from llm_datadist.core.link.region cimport ldd_regions_drop_peer, ldd_regions_epoch
from llm_datadist.core.link.service_conn cimport ldd_conn_forget, ldd_conn_reply
from llm_datadist.core.link.wire cimport (
    LDD_ACCESS_WRITE, LDD_DESC_BLOCKS, LDD_DESC_EVEN, LDD_DESC_HOST, LDD_DESC_OWNED, LDD_DESC_REMOTE_ACCESSIBLE,
    LDD_FRAME_ACK, LDD_FRAME_CHECKSUM, LDD_FRAME_DESCRIPTOR, LDD_FRAME_ENDPOINT_LIST, LDD_FRAME_ENDPOINTS,
    LDD_FRAME_LEASE, LDD_FRAME_LEAVE, LDD_FRAME_PING, LDD_FRAME_RANGES, LDD_FRAME_RELEASE, LDD_FRAME_RESOLVE,
    LDD_FRAME_UNLINK, LDD_MODE_REMOTE_ACCESSIBLE, LDD_RELEASE_TAKE, LDD_WIRE_MAX_RANGES, ldd_ack, ldd_descriptor,
    ldd_endpoint_list, ldd_frame_header, ldd_lease_reply, ldd_range, ldd_ranges, ldd_release, ldd_resolve,
)
from llm_datadist.core.record.record cimport (
    LDD_EVENT_ANSWER, LDD_EVENT_REFUSE, LDD_OP_ANSWER, ldd_record_count, ldd_trace_span,
)
from llm_datadist.core.table.cache_table cimport (
    ldd_cache_view, ldd_table_pin_range, ldd_table_remove_lane, ldd_table_resolve, ldd_table_take, ldd_table_take_in,
    ldd_table_unpin,
)
from llm_datadist.core.table.holds cimport (
    HOLD_DONE, HOLD_LOST, HOLD_OPEN, HOLD_RELEASED, KEY_HOLD, ldd_hold_outcome, ldd_holds_begin, ldd_holds_end,
)
from llm_datadist.core.table.key_index cimport KEY_BY_ID, LDD_NO_KEY
from llm_datadist.core.table.shared_table cimport ldd_lane_unmap


cdef enum:
    MAX_LEASES = 16384          # of one link; its peer needs one for the call that runs, and one for each async task
    MAX_PINS = 4 * LDD_WIRE_MAX_RANGES          # of all leases of one link: 2 MiB
    PINS_PER_TURN = 4096        # ended before other connections have their turn


cdef uint32_t _unpin_some(ldd_service* service, ldd_link* link, ldd_lease* lease, uint32_t limit) noexcept nogil:
    """Unpin at most so many caches of a lease, the last first; the lease is over when none is left."""
    cdef uint32_t done = min(lease.num_pins, limit), left = lease.num_pins - done
    cdef ldd_pin* pin
    while lease.num_pins > left:
        lease.num_pins -= 1
        pin = &lease.more[lease.num_pins - 1] if lease.num_pins else &lease.first
        ldd_table_unpin(service.node.table, pin.slot, pin.generation)
    link.num_pins -= done
    if left == 0:
        free(lease.more)
        memset(lease, 0, sizeof(ldd_lease))
    return done


cdef ldd_status _end_hold(ldd_service* service, ldd_lease* lease, ldd_hold_outcome outcome) noexcept nogil:
    """`outcome` is what becomes of held blocks; LDD_E_NOT_EXIST when their key was withdrawn meanwhile."""
    if not lease.held:
        return LDD_OK
    lease.held = False
    return ldd_holds_end(&service.node.holds, lease.key_index, lease.key_generation, outcome)


cdef ldd_status _end_lease(ldd_service* service, ldd_link* link, ldd_lease* lease,
                           ldd_hold_outcome outcome) noexcept nogil:
    cdef ldd_status status = _end_hold(service, lease, outcome)
    _unpin_some(service, link, lease, lease.num_pins)
    return status


cdef void ldd_reply_end_leases(ldd_service* service) noexcept nogil:
    cdef ldd_link* link = service.ending
    cdef uint32_t left = PINS_PER_TURN
    while link.num_leases and left:
        left -= _unpin_some(service, link, &link.leases[link.num_leases - 1], left)
        if link.leases[link.num_leases - 1].num_pins == 0:
            link.num_leases -= 1
    if link.num_leases == 0:
        service.ending = link.next_ending
        ldd_link_unref(link)


cdef void ldd_reply_ended(ldd_service* service, ldd_conn* conn) noexcept nogil:
    """A serving connection ended: the peer touches nothing here any more, so its leases are over."""
    cdef ldd_link* link = conn.link
    cdef char reason[96]
    cdef uint32_t i
    ldd_conn_forget(service, conn, True)
    if link == NULL:
        return
    # First: what comes in on the data path from now on finds no link.
    snprintf(reason, sizeof(reason), b"cluster %llu closed the connection", <unsigned long long>link.cluster_id)
    ldd_link_break(link, reason)
    ldd_regions_drop_peer(&service.node.regions, link.token)
    for i in range(link.num_leases):
        _end_hold(service, &link.leases[i], HOLD_LOST)
    if link.lane != NULL:
        ldd_table_remove_lane(service.node.table, link.lane)
        ldd_lane_unmap(link.lane)
        link.lane = NULL
    if link.origin == ORIGIN_PEER:
        ldd_link_lose(link)                     # nobody here asked for it, so nobody here will unlink it
    link.next_ending = service.ending           # with our reference to it
    service.ending = link
    ldd_reply_end_leases(service)               # all of a usual link


cdef ldd_lease* _new_lease(ldd_link* link) noexcept nogil:
    cdef uint32_t i, slot = link.num_leases
    cdef ldd_lease* grown
    for i in range(link.num_leases):
        if link.leases[i].id == 0:
            slot = i
            break
    if slot == MAX_LEASES:
        return NULL
    if slot == link.lease_capacity:
        grown = <ldd_lease*>realloc(link.leases, (link.lease_capacity * 2 + 4) * sizeof(ldd_lease))
        if grown == NULL:
            return NULL
        link.leases = grown
        link.lease_capacity = link.lease_capacity * 2 + 4
    if slot == link.num_leases:
        link.num_leases += 1
    link.next_lease = link.next_lease + 1 if link.next_lease + 1 else 1
    memset(&link.leases[slot], 0, sizeof(ldd_lease))
    link.leases[slot].id = link.next_lease
    link.leases[slot].key_index = LDD_NO_KEY
    return &link.leases[slot]


cdef ldd_status ldd_reply_find(ldd_node* node, const ldd_resolve* request, ldd_cache_view* view,
                               ldd_detail* detail) noexcept nogil:
    cdef bint write = request.access == LDD_ACCESS_WRITE
    cdef ldd_status status
    if request.kind > KEY_BY_ID or request.access > LDD_ACCESS_WRITE:
        return ldd_fail(detail, LDD_E_PARAM, b"unknown key kind %u or access %u", <uint32_t>request.kind,
                        <uint32_t>request.access)
    status = ldd_table_resolve(node.table, request.kind, request.id, request.model_id,
                               0 if write else request.batch_index, view, detail)
    if status < 0:
        return status
    status = ldd_check_access(node.mode, request.kind, write, view.cache_id, view.num_slots, view.is_blocks,
                              view.remote_accessible, request.batch_index, detail)
    if status < 0:
        ldd_table_unpin(node.table, view.slot, view.generation)
    return status


cdef ldd_status _find_held(ldd_node* node, const ldd_resolve* request, ldd_cache_view* view,
                           ldd_detail* detail) noexcept nogil:
    """As ldd_reply_find, for a key of blocks that are held; its handle is in the view."""
    cdef ldd_resolve by_id = request[0]
    cdef int64_t cache_id = 0
    cdef uint32_t key = 0, generation = 0
    cdef ldd_status status = ldd_holds_begin(&node.holds, request.id, request.model_id, &cache_id, &key, &generation,
                                             detail)
    if status < 0:
        return status
    by_id.kind = KEY_BY_ID
    by_id.id = <uint64_t>cache_id
    by_id.batch_index = 0
    status = ldd_reply_find(node, &by_id, view, detail)
    if status < 0:
        ldd_holds_end(&node.holds, key, generation, HOLD_OPEN)
    view.key_index = key
    view.key_generation = generation
    return status


cdef ldd_status _on_resolve(ldd_service* service, ldd_conn* conn, uint32_t request_id,
                           const ldd_resolve* request) noexcept nogil:
    cdef ldd_node* node = service.node
    cdef ldd_descriptor answer
    cdef ldd_cache_view view
    cdef ldd_detail detail
    cdef ldd_lease* lease = NULL
    cdef bint held = request.kind == KEY_HOLD
    cdef uint64_t even[2]
    cdef ldd_status status
    memset(&answer, 0, sizeof(answer))
    detail.text[0] = 0
    if ldd_link_state_of(conn.link) != LINK_ACTIVE:
        status = ldd_fail(&detail, LDD_E_NOT_LINKED, b"the link was closed here")
    else:
        status = _find_held(node, request, &view, &detail) if held else ldd_reply_find(node, request, &view, &detail)
        if status == LDD_OK:
            lease = _new_lease(conn.link)
            if lease == NULL:
                status = ldd_fail(&detail, LDD_E_NO_MEMORY, b"no room for another lease, %u are out",
                                  conn.link.num_leases)
                ldd_table_unpin(node.table, view.slot, view.generation)
                if held:
                    ldd_holds_end(&node.holds, view.key_index, view.key_generation, HOLD_OPEN)
    answer.status = status
    if status < 0:
        ldd_trace_span(&node.record, LDD_EVENT_REFUSE, ldd_now_ns(), conn.link.cluster_id, request.kind, request.id,
                       request.model_id, 0, status)
        answer.text_bytes = <uint32_t>strlen(detail.text)
        return ldd_conn_reply(conn, request_id, LDD_FRAME_DESCRIPTOR, &answer, sizeof(answer), detail.text,
                              answer.text_bytes)
    lease.num_pins = 1
    conn.link.num_pins += 1
    lease.first.slot = view.slot
    lease.first.generation = view.generation
    lease.key_index = view.key_index
    lease.key_generation = view.key_generation
    lease.held = held
    answer.lease = lease.id
    answer.cache_id = view.cache_id
    answer.num_tensors = view.num_tensors
    answer.flags = ((LDD_DESC_BLOCKS if view.is_blocks else 0) | (LDD_DESC_HOST if view.host else 0)
                    | (LDD_DESC_OWNED if view.owned else 0)
                    | (LDD_DESC_REMOTE_ACCESSIBLE if view.remote_accessible else 0)
                    | (LDD_DESC_EVEN if view.step else 0))
    answer.num_slots = view.num_slots
    answer.tensor_bytes = view.tensor_bytes
    answer.stride_bytes = view.stride
    answer.region_epoch = ldd_regions_epoch(&node.regions)
    answer.tensor = view.described[0]
    answer.batch_index = request.batch_index if request.access == LDD_ACCESS_WRITE else view.batch_index
    if view.step:
        even[0] = view.addrs[0]
        even[1] = view.step
        return ldd_conn_reply(conn, request_id, LDD_FRAME_DESCRIPTOR, &answer, sizeof(answer), even, sizeof(even))
    return ldd_conn_reply(conn, request_id, LDD_FRAME_DESCRIPTOR, &answer, sizeof(answer), view.addrs,
                 8 * <size_t>view.num_tensors)


cdef ldd_hold_outcome _outcome_of(const ldd_release* request) noexcept nogil:
    if not request.flags & LDD_RELEASE_TAKE:
        return HOLD_OPEN
    return HOLD_DONE if request.num_tensors else HOLD_RELEASED


cdef ldd_status _on_release(ldd_service* service, ldd_conn* conn, uint32_t request_id,
                           const ldd_release* request) noexcept nogil:
    cdef ldd_ack answer
    cdef ldd_lease* lease
    cdef uint32_t i
    memset(&answer, 0, sizeof(answer))
    answer.status = LDD_E_PARAM
    for i in range(conn.link.num_leases):
        lease = &conn.link.leases[i]
        if lease.id == request.lease and lease.id:
            answer.status = LDD_OK
            if request.flags & LDD_RELEASE_TAKE and not lease.held:
                answer.status = ldd_table_take(service.node.table, lease.key_index, lease.key_generation,
                                               request.first_tensor, request.num_tensors)
            if lease.held:
                answer.status = _end_lease(service, conn.link, lease, _outcome_of(request))
            else:
                _end_lease(service, conn.link, lease, HOLD_OPEN)
            break
    return ldd_conn_reply(conn, request_id, LDD_FRAME_ACK, &answer, sizeof(answer), NULL, 0)


cdef void _describe_range(const ldd_cache_view* view, bint is_first, uint32_t dtype,
                          ldd_lease_reply* out) noexcept nogil:
    """Have the answer say what a cache holds: the first one, until there is one of another data type than is meant."""
    cdef uint32_t found = view.described.dtype
    if is_first or (found != 0 and found != dtype and (out.tensor.dtype == dtype or out.tensor.dtype == 0)):
        out.tensor = view.described[0]
        out.cache_id = view.cache_id
        out.num_tensors = view.num_tensors


cdef ldd_status _on_ranges(ldd_service* service, ldd_conn* conn, uint32_t request_id, const uint8_t* payload,
                          uint32_t num_ranges) noexcept nogil:
    cdef ldd_node* node = service.node
    cdef ldd_lease_reply answer
    cdef ldd_detail detail
    cdef ldd_cache_view view
    cdef ldd_ranges head
    cdef ldd_range item
    cdef ldd_pin pin
    cdef ldd_pin* more = NULL
    cdef ldd_lease* lease = NULL
    cdef ldd_status status = LDD_OK
    cdef uint32_t i
    memset(&answer, 0, sizeof(answer))
    memcpy(&head, payload, sizeof(head))
    payload += sizeof(head)
    detail.text[0] = 0
    if ldd_link_state_of(conn.link) != LINK_ACTIVE:
        status = ldd_fail(&detail, LDD_E_NOT_LINKED, b"the link was closed here")
    else:
        if conn.link.num_pins + num_ranges <= MAX_PINS:
            lease = _new_lease(conn.link)
            more = <ldd_pin*>malloc(sizeof(ldd_pin) * num_ranges)
        if lease == NULL or more == NULL:
            status = ldd_fail(&detail, LDD_E_NO_MEMORY, b"no room for a lease on %u ranges, %u leases on %u are out",
                              num_ranges, conn.link.num_leases, conn.link.num_pins)
            free(more)
        else:
            lease.more = more
            for i in range(num_ranges):
                memcpy(&item, payload + i * sizeof(item), sizeof(item))
                status = ldd_table_pin_range(node.table, item.addr, item.bytes, &view, &detail)
                if status < 0:
                    break
                _describe_range(&view, i == 0, head.dtype, &answer)
                pin.slot = view.slot
                pin.generation = view.generation
                if lease.num_pins:
                    more[lease.num_pins - 1] = pin
                else:
                    lease.first = pin
                lease.num_pins += 1
                conn.link.num_pins += 1
                if node.mode & LDD_MODE_REMOTE_ACCESSIBLE and not view.remote_accessible:
                    status = ldd_fail(&detail, LDD_E_PARAM, b"cache %lld at address %#llx is not remote accessible",
                                      <long long>view.cache_id, <unsigned long long>item.addr)
                    break
    if status < 0:
        if lease != NULL:
            _end_lease(service, conn.link, lease, HOLD_OPEN)
    else:
        answer.lease = lease.id
    answer.status = status
    answer.region_epoch = ldd_regions_epoch(&node.regions)
    snprintf(answer.text, sizeof(answer.text), b"%s", detail.text)
    return ldd_conn_reply(conn, request_id, LDD_FRAME_LEASE, &answer, sizeof(answer), NULL, 0)


cdef bint _answer(ldd_service* service, ldd_conn* conn, const ldd_frame_header* header,
                  const uint8_t* payload) noexcept nogil:
    cdef ldd_resolve resolve
    cdef ldd_release release
    cdef ldd_ack ack
    ldd_add64(&service.num_requests, 1)
    if header.type == LDD_FRAME_RESOLVE and header.length == sizeof(resolve):
        memcpy(&resolve, payload, sizeof(resolve))
        return _on_resolve(service, conn, header.request_id, &resolve) == LDD_OK
    if header.type == LDD_FRAME_RELEASE and header.length == sizeof(release):
        memcpy(&release, payload, sizeof(release))
        return _on_release(service, conn, header.request_id, &release) == LDD_OK
    if (header.type == LDD_FRAME_RANGES and header.length > sizeof(ldd_ranges)
            and (header.length - sizeof(ldd_ranges)) % sizeof(ldd_range) == 0):
        return _on_ranges(service, conn, header.request_id, payload,
                         (header.length - <uint32_t>sizeof(ldd_ranges)) // <uint32_t>sizeof(ldd_range)) == LDD_OK
    if header.type == LDD_FRAME_CHECKSUM:
        return ldd_reply_checksums(service, conn, header, payload)
    if header.type == LDD_FRAME_ENDPOINTS and header.length == 0:
        return ldd_conn_reply(conn, header.request_id, LDD_FRAME_ENDPOINT_LIST, &service.node.regions.offers,
                              sizeof(ldd_endpoint_list), NULL, 0) == LDD_OK
    if (header.type == LDD_FRAME_UNLINK or header.type == LDD_FRAME_PING) and header.length == 0:
        memset(&ack, 0, sizeof(ack))
        if ldd_link_state_of(conn.link) != LINK_ACTIVE and header.type == LDD_FRAME_PING:
            ack.status = LDD_E_NOT_LINKED
        ldd_table_take_in(service.node.table)   # a peer with a full lane pings to have it read
        if header.type == LDD_FRAME_UNLINK:
            ldd_link_drop(conn.link)
        return ldd_conn_reply(conn, header.request_id, LDD_FRAME_ACK, &ack, sizeof(ack), NULL, 0) == LDD_OK
    if header.type == LDD_FRAME_LEAVE and header.length == 0:
        ldd_link_leave(conn.link)
        return True                             # the end of the connection follows
    return False


cdef bint ldd_reply(ldd_service* service, ldd_conn* conn, const ldd_frame_header* header,
                   const uint8_t* payload) noexcept nogil:
    """Answer one request; False when the connection is to be closed."""
    cdef int64_t start_ns = ldd_now_ns()
    cdef bint answered = _answer(service, conn, header, payload)
    ldd_record_count(conn.link.record, LDD_OP_ANSWER, ldd_now_ns() - start_ns, 0, not answered)
    ldd_trace_span(&service.node.record, LDD_EVENT_ANSWER, start_ns, conn.link.cluster_id, 0, header.request_id,
                   header.type, header.length, LDD_OK if answered else LDD_E_PARAM)
    return answered
