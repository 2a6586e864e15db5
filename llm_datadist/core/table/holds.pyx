"""Blocks that are held for one request under a key of its own, and what became of such keys.

A blocks cache has one key for all of its blocks, which tells nobody whether a block still belongs to the request that a
peer means. A hold is a second key to the same cache, of a request and a generation: its owner makes it before a peer
can know of it, and hands the blocks to another request only after it has ended. It ends once: a peer has moved the
blocks and let go, or goes away while it does, or nobody comes before the deadline, or the owner withdraws it. All but
the last are events for the owner. Whoever comes later, or is still at it when the owner withdraws, is told that there
is no such key.

Holds are not in the shared table: peers ask the service thread, which so knows of every end when it comes, and wakes
whoever waits for the descriptor. No function here takes the GIL, waits for a peer, or holds the mutex longer than a
system call, but for a pass over all holds when a deadline has passed.
"""
from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport free, realloc
from libc.string cimport memcpy, memmove, memset

from llm_datadist.core.base.atomic cimport ldd_set64
from llm_datadist.core.base.status cimport (
    LDD_E_NO_MEMORY, LDD_E_NOT_EXIST, LDD_E_PARAM, LDD_OK, ldd_detail, ldd_fail, ldd_status,
)
from llm_datadist.core.base.sync cimport (
    LDD_NEVER, ldd_lock, ldd_mutex_destroy, ldd_mutex_init, ldd_now_ns, ldd_timer_create, ldd_timer_set, ldd_unlock,
)
from llm_datadist.core.record.record cimport LDD_EVENT_KEY_GONE, ldd_trace_span
from llm_datadist.core.table.key_index cimport (
    LDD_NO_KEY, ldd_keys_add, ldd_keys_destroy, ldd_keys_find, ldd_keys_init, ldd_keys_remove, ldd_keys_reserve,
)

cdef extern from "<unistd.h>" nogil:
    int close(int fd)

cdef enum:
    MIN_HOLDS = 32


cdef void ldd_holds_init(ldd_holds* holds) noexcept nogil:
    memset(holds, 0, sizeof(ldd_holds))
    ldd_mutex_init(&holds.mutex)
    ldd_keys_init(&holds.keys)
    holds.next_deadline_ns = LDD_NEVER
    holds.fd = ldd_timer_create()


cdef void ldd_holds_destroy(ldd_holds* holds) noexcept nogil:
    if holds.fd >= 0:
        close(holds.fd)
    holds.fd = -1
    ldd_keys_destroy(&holds.keys)
    free(holds.holds)
    free(holds.events)
    holds.holds = NULL
    holds.events = NULL
    ldd_mutex_destroy(&holds.mutex)


cdef void _arm(ldd_holds* holds) noexcept nogil:
    ldd_timer_set(holds.fd, 1 if holds.num_events else holds.next_deadline_ns)


cdef void _tell_number(ldd_holds* holds) noexcept nogil:
    if holds.record != NULL and holds.record.head != NULL:
        ldd_set64(&holds.record.head.num_holds, holds.keys.num_keys)


cdef ldd_status _reserve(ldd_holds* holds) noexcept nogil:
    """Make room for one more hold, and for its event."""
    cdef size_t wanted = holds.num_events + holds.keys.num_keys + 1
    cdef uint32_t capacity
    cdef void* grown
    cdef ldd_status status = ldd_keys_reserve(&holds.keys, 1)
    if status != LDD_OK:
        return status
    if holds.keys.entry_capacity > holds.capacity:
        capacity = holds.keys.entry_capacity
        grown = realloc(holds.holds, capacity * sizeof(ldd_hold))
        if grown == NULL:
            return LDD_E_NO_MEMORY
        holds.holds = <ldd_hold*>grown
        holds.capacity = capacity
    if wanted > holds.event_capacity:
        wanted = max(2 * wanted, <size_t>MIN_HOLDS)
        grown = realloc(holds.events, wanted * sizeof(ldd_hold_event))
        if grown == NULL:
            return LDD_E_NO_MEMORY
        holds.events = <ldd_hold_event*>grown
        holds.event_capacity = wanted
    return LDD_OK


cdef void _end(ldd_holds* holds, uint32_t key, ldd_hold_outcome outcome) noexcept nogil:
    cdef ldd_hold_event* event = &holds.events[holds.num_events]
    event.request = holds.keys.entries[key].id
    event.generation = holds.keys.entries[key].model_id
    event.outcome = outcome
    holds.num_events += 1
    ldd_trace_span(holds.record, LDD_EVENT_KEY_GONE, holds.holds[key].born_ns, 0, KEY_HOLD, event.request,
                   event.generation, 0, LDD_OK if outcome == HOLD_DONE else LDD_E_NOT_EXIST)
    ldd_keys_remove(&holds.keys, key)
    _tell_number(holds)


cdef void _expire(ldd_holds* holds, int64_t now_ns) noexcept nogil:
    """End what is overdue and not being moved."""
    cdef uint32_t key
    cdef ldd_hold* hold
    holds.next_deadline_ns = LDD_NEVER
    for key in range(holds.keys.num_entries):
        hold = &holds.holds[key]
        if not holds.keys.entries[key].generation & 1 or hold.readers:
            continue
        if hold.deadline_ns <= now_ns:
            _end(holds, key, HOLD_EXPIRED)
        else:
            holds.next_deadline_ns = min(holds.next_deadline_ns, hold.deadline_ns)


cdef ldd_status ldd_holds_bind(ldd_holds* holds, uint64_t request, uint64_t generation, int64_t cache_id,
                               int64_t deadline_ns, ldd_detail* detail) noexcept nogil:
    cdef ldd_status status = LDD_OK
    cdef ldd_hold* hold
    cdef uint32_t key
    ldd_lock(&holds.mutex)
    key = ldd_keys_find(&holds.keys, KEY_HOLD, request, generation)
    if key != LDD_NO_KEY:
        hold = &holds.holds[key]
        if hold.cache_id != cache_id:
            status = ldd_fail(detail, LDD_E_PARAM, b"blocks of cache %lld are held for request %llu, generation %llu",
                              <long long>hold.cache_id, <unsigned long long>request, <unsigned long long>generation)
    else:
        status = _reserve(holds)
        if status != LDD_OK:
            ldd_fail(detail, status, b"no room for another key, %u are held", holds.keys.num_keys)
        else:
            key = ldd_keys_add(&holds.keys, KEY_HOLD, request, generation, 0, 0)
            hold = &holds.holds[key]
            hold.cache_id = cache_id
            hold.readers = 0
            hold.born_ns = ldd_now_ns()
            _tell_number(holds)
    if status == LDD_OK:
        hold.deadline_ns = deadline_ns
        if deadline_ns < holds.next_deadline_ns and not hold.readers:
            holds.next_deadline_ns = deadline_ns
            _arm(holds)
    ldd_unlock(&holds.mutex)
    return status


cdef bint ldd_holds_drop(ldd_holds* holds, uint64_t request, uint64_t generation) noexcept nogil:
    cdef uint32_t key
    ldd_lock(&holds.mutex)
    key = ldd_keys_find(&holds.keys, KEY_HOLD, request, generation)
    if key != LDD_NO_KEY:
        ldd_keys_remove(&holds.keys, key)
        _tell_number(holds)
    ldd_unlock(&holds.mutex)
    return key != LDD_NO_KEY


cdef ldd_status ldd_holds_begin(ldd_holds* holds, uint64_t request, uint64_t generation, int64_t* cache_id,
                                uint32_t* key, uint32_t* key_generation, ldd_detail* detail) noexcept nogil:
    cdef int64_t now_ns = ldd_now_ns()
    ldd_lock(&holds.mutex)
    if now_ns >= holds.next_deadline_ns:
        _expire(holds, now_ns)
        _arm(holds)
    key[0] = ldd_keys_find(&holds.keys, KEY_HOLD, request, generation)
    if key[0] != LDD_NO_KEY:
        key_generation[0] = holds.keys.entries[key[0]].generation
        holds.holds[key[0]].readers += 1
        cache_id[0] = holds.holds[key[0]].cache_id
    ldd_unlock(&holds.mutex)
    if key[0] == LDD_NO_KEY:
        return ldd_fail(detail, LDD_E_NOT_EXIST, b"no blocks are held for request %llu, generation %llu, any more",
                        <unsigned long long>request, <unsigned long long>generation)
    return LDD_OK


cdef ldd_status ldd_holds_end(ldd_holds* holds, uint32_t key, uint32_t key_generation,
                              ldd_hold_outcome outcome) noexcept nogil:
    cdef ldd_status status = LDD_OK
    cdef ldd_hold* hold
    ldd_lock(&holds.mutex)
    if holds.keys.entries[key].generation != key_generation:
        status = LDD_E_NOT_EXIST
    else:
        hold = &holds.holds[key]
        hold.readers -= 1
        if outcome != HOLD_OPEN:
            _end(holds, key, outcome)
            _arm(holds)
        elif hold.readers == 0 and hold.deadline_ns < holds.next_deadline_ns:
            holds.next_deadline_ns = hold.deadline_ns       # it may be over by now
            _arm(holds)
    ldd_unlock(&holds.mutex)
    return status


cdef size_t ldd_holds_take_events(ldd_holds* holds, ldd_hold_event* events, size_t capacity) noexcept nogil:
    cdef int64_t now_ns = ldd_now_ns()
    cdef size_t count
    ldd_lock(&holds.mutex)
    if now_ns >= holds.next_deadline_ns:
        _expire(holds, now_ns)
        _arm(holds)
    count = min(holds.num_events, capacity)
    if count:
        memcpy(events, holds.events, count * sizeof(ldd_hold_event))
        holds.num_events -= count
        memmove(holds.events, holds.events + count, holds.num_events * sizeof(ldd_hold_event))
        _arm(holds)                                          # setting it anew also takes its readiness away
    ldd_unlock(&holds.mutex)
    return count


cdef size_t ldd_holds_count(ldd_holds* holds) noexcept nogil:
    cdef size_t count
    ldd_lock(&holds.mutex)
    count = holds.keys.num_keys
    ldd_unlock(&holds.mutex)
    return count
