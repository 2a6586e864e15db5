"""Checksums of leased memory, for peers that hold against them what arrived.

Runs on the service thread, which reads at most LDD_CHECKED_MAX_BYTES for one request: a peer that has much to compare
asks again and again, and other connections have their turn in between. The lease pins the caches, so their memory stays
while it is read; every range is looked for in the cache that it is said to lie in.
"""
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcpy, memset

from llm_datadist.core.base.crc32c cimport ldd_crc32c
from llm_datadist.core.base.provider cimport LDD_CAP_ANY_LOCAL
from llm_datadist.core.base.status cimport LDD_E_NOT_ENABLED, LDD_E_PARAM, LDD_OK, ldd_status
from llm_datadist.core.link.links cimport ldd_lease, ldd_link, ldd_node, ldd_pin
from llm_datadist.core.link.service_conn cimport ldd_conn_reply
from llm_datadist.core.link.wire cimport (
    LDD_CHECKED_MAX_BYTES, LDD_CHECKED_MAX_RANGES, LDD_FRAME_CHECKSUMS, ldd_checked, ldd_checked_range, ldd_checksums,
)
from llm_datadist.core.table.cache_table cimport ldd_cache_view, ldd_table_repin, ldd_table_unpin

cdef enum:
    MAX_LOOKS = 1 << 20                             # at tensors, for one request; a writer names them in order

# The cache of the range before, pinned once more, and the tensor that it lay in: the next one is most often there, too.
ctypedef struct ldd_place:
    bint pinned
    uint32_t pin
    uint32_t tensor
    uint32_t looks
    ldd_cache_view view


cdef ldd_lease* _find_lease(ldd_link* link, uint32_t id) noexcept nogil:
    cdef uint32_t i
    for i in range(link.num_leases):
        if id and link.leases[i].id == id:
            return &link.leases[i]
    return NULL


cdef void _leave(ldd_node* node, ldd_place* place) noexcept nogil:
    if place.pinned:
        ldd_table_unpin(node.table, place.view.slot, place.view.generation)
    place.pinned = False


cdef bint _go_to(ldd_node* node, const ldd_lease* lease, uint32_t pin, ldd_place* place) noexcept nogil:
    cdef const ldd_pin* found = &lease.first
    if place.pinned and place.pin == pin:
        return True
    _leave(node, place)
    if pin >= lease.num_pins:
        return False
    if pin:
        found = &lease.more[pin - 1]
    place.pin = pin
    place.tensor = 0
    place.pinned = ldd_table_repin(node.table, found.slot, found.generation, &place.view)
    return place.pinned


cdef bint _is_inside(ldd_place* place, const ldd_checked_range* item) noexcept nogil:
    """Whether one tensor contains the range, starting from the tensor of the range before."""
    cdef uint32_t _step
    cdef uint64_t offset
    for _step in range(min(place.view.num_tensors, MAX_LOOKS - place.looks)):
        offset = item.addr - place.view.addrs[place.tensor]         # wraps where the tensor begins behind
        if offset < place.view.tensor_bytes and item.bytes <= place.view.tensor_bytes - offset:
            return True
        place.looks += 1
        place.tensor = place.tensor + 1 if place.tensor + 1 < place.view.num_tensors else 0
    return False


cdef ldd_status _compute(ldd_node* node, const ldd_lease* lease, const uint8_t* items, uint32_t num_ranges,
                         uint32_t* sums) noexcept nogil:
    cdef ldd_place place
    cdef ldd_checked_range item
    cdef uint64_t left = LDD_CHECKED_MAX_BYTES
    cdef uint32_t i
    cdef ldd_status status = LDD_OK
    memset(&place, 0, sizeof(place))
    for i in range(num_ranges):
        memcpy(&item, items + i * sizeof(item), sizeof(item))
        if item.bytes == 0 or item.bytes > left or not _go_to(node, lease, item.pin, &place) \
                or not _is_inside(&place, &item):
            status = LDD_E_PARAM
            break
        if not place.view.host and not node.provider.caps & LDD_CAP_ANY_LOCAL:
            status = LDD_E_NOT_ENABLED
            break
        left -= item.bytes
        sums[i] = ldd_crc32c(<const void*>item.addr, item.bytes)
    _leave(node, &place)
    return status


cdef bint ldd_reply_checksums(ldd_service* service, ldd_conn* conn, const ldd_frame_header* header,
                              const uint8_t* payload) noexcept nogil:
    cdef ldd_checked request
    cdef ldd_checksums answer
    cdef uint32_t sums[LDD_CHECKED_MAX_RANGES]
    cdef const ldd_lease* lease
    if header.length < sizeof(request):
        return False
    memcpy(&request, payload, sizeof(request))
    if (request.num_ranges == 0 or request.num_ranges > LDD_CHECKED_MAX_RANGES
            or header.length != sizeof(request) + request.num_ranges * sizeof(ldd_checked_range)):
        return False
    memset(sums, 0, request.num_ranges * sizeof(uint32_t))
    lease = _find_lease(conn.link, request.lease)
    answer.status = LDD_E_PARAM
    answer.num_sums = request.num_ranges
    if lease != NULL:
        answer.status = _compute(service.node, lease, payload + sizeof(request), request.num_ranges, sums)
    return ldd_conn_reply(conn, header.request_id, LDD_FRAME_CHECKSUMS, &answer, sizeof(answer), sums,
                          request.num_ranges * sizeof(uint32_t)) == LDD_OK
