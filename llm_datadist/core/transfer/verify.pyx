"""Holding bytes that arrived against checksums of their source, block by block.

The owner of the source computes over its memory, and whoever asked for the transfer over what lies in the destination;
of a push it is the other way round. Both happen after the last byte moved and while both ends are pinned, so whatever
happened to the bytes on the way is seen, and so is a program that wrote to either end meanwhile.

Runs on the caller's thread without the GIL. Requests are small, so that the peer's service thread has time for others,
and each side computes while the other does.
"""
from libc.stddef cimport size_t
from libc.stdint cimport uint32_t, uint64_t
from libc.stdio cimport snprintf
from libc.stdlib cimport free, malloc

from llm_datadist.core.base.crc32c cimport ldd_crc32c
from llm_datadist.core.base.provider cimport HixlOneSideOpDesc
from llm_datadist.core.base.status cimport LDD_E_CHECKSUM, LDD_E_NO_MEMORY, LDD_OK, ldd_fail
from llm_datadist.core.link.requests cimport ldd_request_checksums, ldd_take_checksums
from llm_datadist.core.link.wire cimport (
    LDD_CHECKED_MAX_BYTES, LDD_CHECKED_MAX_RANGES, ldd_checked, ldd_checked_range, ldd_checksums,
)
from llm_datadist.core.plan.block_plan cimport ldd_plan_reserve
from llm_datadist.core.transfer.fitting cimport ldd_fault

# One request, its answer, and where the ranges lie here. Laid out as they travel.
ctypedef struct ldd_round:
    ldd_checked head
    ldd_checked_range ranges[LDD_CHECKED_MAX_RANGES]
    ldd_checksums answer
    uint32_t sums[LDD_CHECKED_MAX_RANGES]
    uint64_t local[LDD_CHECKED_MAX_RANGES]
    ldd_fault places[LDD_CHECKED_MAX_RANGES]

# The next byte to check: of a descriptor, at an offset.
ctypedef struct ldd_cursor:
    size_t item
    uint64_t offset

cdef enum:
    NAMED_FAULTS = 6                            # in the text; all are in the list


cdef void _fill(ldd_link* link, const ldd_moved* moved, ldd_cursor* at, ldd_round* out) noexcept nogil:
    """As many ranges as one request may ask for, none of which spans two blocks of the destination."""
    cdef const HixlOneSideOpDesc* item
    cdef uint64_t left = LDD_CHECKED_MAX_BYTES, inside, length
    cdef uint32_t n = 0, tensor
    while n < LDD_CHECKED_MAX_RANGES and left and at.item < link.descs.count:
        item = &link.descs.items[at.item]
        tensor = <uint32_t>(at.item // link.descs.num_runs)
        inside = <uint64_t>(item.remote_buf if moved.put else item.local_buf) + at.offset - moved.addrs[tensor]
        length = min(min(item.len - at.offset, moved.block_bytes - inside % moved.block_bytes), left)
        out.local[n] = <uint64_t>item.local_buf + at.offset
        out.ranges[n].addr = <uint64_t>item.remote_buf + at.offset
        out.ranges[n].bytes = <uint32_t>length
        out.ranges[n].pin = moved.first_pin + (tensor if moved.pin_by_tensor else 0)
        out.places[n].tensor = moved.first_tensor + tensor
        out.places[n].block = inside // moved.block_bytes
        n += 1
        left -= length
        at.offset += length
        if at.offset == item.len:
            at.item += 1
            at.offset = 0
    out.head.lease = moved.lease
    out.head.num_ranges = n


cdef ldd_status _add_fault(ldd_faults* faults, const ldd_fault* fault, ldd_detail* detail) noexcept nogil:
    cdef const ldd_fault* last = &faults.items[faults.count - 1] if faults.count else NULL
    cdef ldd_status status
    if last != NULL and last.tensor == fault.tensor and last.block == fault.block:
        return LDD_OK                           # a block that was asked for in several ranges
    status = ldd_plan_reserve(<void**>&faults.items, &faults.capacity, faults.count, 1, sizeof(ldd_fault), detail)
    if status == LDD_OK:
        faults.items[faults.count] = fault[0]
        faults.count += 1
    return status


cdef ldd_status ldd_say_faults(const ldd_link* link, bint put, const ldd_faults* faults,
                               ldd_detail* detail) noexcept nogil:
    cdef char named[240]
    cdef size_t i, shown = min(faults.count, <size_t>NAMED_FAULTS), at = 0
    for i in range(shown):
        at += <size_t>snprintf(named + at, sizeof(named) - at, b"%sblock %llu of tensor %u",
                               <const char*>b", " if i else <const char*>b"",
                               <unsigned long long>faults.items[i].block, faults.items[i].tensor)
    if shown < faults.count:
        snprintf(named + at, sizeof(named) - at, b" and %zu more", faults.count - shown)
    return ldd_fail(detail, LDD_E_CHECKSUM, b"what was %s cluster %llu arrived otherwise than it left: %s",
                    <const char*>b"written to" if put else <const char*>b"read from",
                    <unsigned long long>link.cluster_id, <const char*>named)


cdef ldd_status ldd_verify(ldd_link* link, const ldd_moved* moved, int64_t deadline_ns, ldd_faults* faults,
                           ldd_detail* detail) noexcept nogil:
    cdef ldd_cursor at = [0, 0]
    cdef ldd_round* one = <ldd_round*>malloc(sizeof(ldd_round))
    cdef uint32_t i
    cdef uint32_t sums[LDD_CHECKED_MAX_RANGES]
    cdef ldd_status status = LDD_OK
    if one == NULL:
        return ldd_fail(detail, LDD_E_NO_MEMORY, b"no memory for checksums")
    while status == LDD_OK and at.item < link.descs.count:
        _fill(link, moved, &at, one)
        status = ldd_request_checksums(link, &one.head, deadline_ns, detail)
        if status < 0:
            break
        for i in range(one.head.num_ranges):
            sums[i] = ldd_crc32c(<const void*>one.local[i], one.ranges[i].bytes)
        status = ldd_take_checksums(link, &one.answer, one.head.num_ranges, deadline_ns, detail)
        for i in range(one.head.num_ranges):
            if status == LDD_OK and sums[i] != one.sums[i]:
                status = _add_fault(faults, &one.places[i], detail)
    free(one)
    return status
