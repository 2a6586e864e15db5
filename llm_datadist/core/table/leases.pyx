"""Request keys that nobody pulled in time: they release themselves, so that no peer that died keeps memory for ever.

A lease is given to a cache, for all of its request keys. When it ends, those that are still bound are released as
``remove_cache_key`` would do it. A cache that somebody reads at that moment is left alone until the reader has
finished: its pin, or its hazard in the shared table, is looked at after the table's sequence was made odd, so that a
reader who comes later finds the change and looks again (``docs/protocol.md``, "Hazards").

The service thread does this: a timer wakes it, which the earliest lease sets. What expired waits for whoever logs it.
"""
from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memcpy, memmove

from llm_datadist.core.base.sync cimport (
    LDD_NEVER, ldd_cond_broadcast, ldd_cond_wait_until, ldd_lock, ldd_now_ns, ldd_timer_set, ldd_unlock,
)
from llm_datadist.core.table.cache_life cimport (
    LDD_MAX_EXPIRED, LDD_NO_SLOT, ldd_cache, ldd_cache_find, ldd_cache_is_touched, ldd_cache_release_key,
)
from llm_datadist.core.table.cache_table cimport ldd_table_begin, ldd_table_end, ldd_table_take_in
from llm_datadist.core.table.key_index cimport KEY_REQ, LDD_NO_KEY, ldd_key

cdef enum:
    SHORTEST_NS = 20000000                      # between two looks at all caches


cdef void ldd_table_lease(ldd_table* table, int64_t cache_id, int64_t end_ns) noexcept nogil:
    cdef uint32_t slot
    ldd_lock(&table.mutex)
    slot = ldd_cache_find(table, cache_id)
    if slot != LDD_NO_SLOT:
        table.caches[slot].lease_end_ns = end_ns
        if end_ns < table.next_lease_ns:
            table.next_lease_ns = end_ns
            ldd_timer_set(table.lease_fd, end_ns)
    ldd_unlock(&table.mutex)


cdef void _note(ldd_table* table, const ldd_cache* cache, const ldd_key* key, int64_t now_ns) noexcept nogil:
    """Keep what is to be logged; of very many the oldest are forgotten."""
    cdef ldd_expired* row
    if table.num_waiting == LDD_MAX_EXPIRED:
        table.num_waiting -= 1
        memmove(table.waiting, &table.waiting[1], table.num_waiting * sizeof(ldd_expired))
    row = &table.waiting[table.num_waiting]
    row.cache_id = cache.cache_id
    row.id = key.id
    row.model_id = key.model_id
    row.bytes = cache.num_tensors * cache.tensor_bytes
    row.age_ns = now_ns - cache.born_ns
    table.num_waiting += 1
    table.num_expired += 1


cdef void _release_keys(ldd_table* table, uint32_t slot, int64_t now_ns) noexcept nogil:
    """Release the request keys of a cache, which may free it."""
    cdef ldd_cache* cache = &table.caches[slot]
    cdef int64_t cache_id = cache.cache_id
    cdef uint32_t i, key
    cache.lease_end_ns = LDD_NEVER
    for i in range(cache.num_key_slots):
        key = cache.slot_keys[i]
        if key == LDD_NO_KEY or table.keys.entries[key].kind != KEY_REQ:
            continue
        _note(table, cache, &table.keys.entries[key], now_ns)
        ldd_cache_release_key(table, key)
        if cache.cache_id != cache_id or not cache.published:
            return                              # that was the last thing that kept it


cdef void ldd_table_expire(ldd_table* table) noexcept nogil:
    cdef int64_t now_ns = ldd_now_ns()
    cdef uint32_t i = 0, slot, num_caches
    cdef ldd_cache* cache
    ldd_table_take_in(table)                    # what was pulled is not overdue
    ldd_lock(&table.mutex)
    ldd_table_begin(table)
    table.next_lease_ns = LDD_NEVER
    while i < table.num_caches:
        slot = table.ranges[i].slot
        cache = &table.caches[slot]
        num_caches = table.num_caches
        if cache.lease_end_ns <= now_ns and cache.published and not ldd_cache_is_touched(table, slot):
            _release_keys(table, slot, now_ns)
        else:
            table.next_lease_ns = min(table.next_lease_ns, cache.lease_end_ns)
        if table.num_caches == num_caches:      # otherwise the last one has moved to i
            i += 1
    ldd_table_end(table)
    if table.next_lease_ns != LDD_NEVER:
        table.next_lease_ns = max(table.next_lease_ns, now_ns + SHORTEST_NS)
    ldd_timer_set(table.lease_fd, table.next_lease_ns)
    if table.num_waiting:
        ldd_cond_broadcast(&table.expired)
    ldd_unlock(&table.mutex)


cdef size_t ldd_table_take_expired(ldd_table* table, ldd_expired* rows, size_t capacity) noexcept nogil:
    cdef size_t count
    ldd_lock(&table.mutex)
    while table.num_waiting == 0 and not table.leases_ended:
        ldd_cond_wait_until(&table.expired, &table.mutex, LDD_NEVER)
    count = min(<size_t>table.num_waiting, capacity)
    memcpy(rows, table.waiting, count * sizeof(ldd_expired))
    table.num_waiting -= <uint32_t>count
    memmove(table.waiting, &table.waiting[count], table.num_waiting * sizeof(ldd_expired))
    ldd_unlock(&table.mutex)
    return count


cdef void ldd_table_end_leases(ldd_table* table) noexcept nogil:
    ldd_lock(&table.mutex)
    table.leases_ended = True
    ldd_cond_broadcast(&table.expired)
    ldd_unlock(&table.mutex)


cdef uint64_t ldd_table_count_unpulled(ldd_table* table) noexcept nogil:
    cdef uint64_t count = 0
    cdef uint32_t i
    cdef const ldd_key* entry
    ldd_table_take_in(table)
    ldd_lock(&table.mutex)
    for i in range(table.keys.num_entries):
        entry = &table.keys.entries[i]
        if entry.generation & 1 and entry.kind == KEY_REQ and table.caches[entry.cache_slot].owned:
            count += 1
    ldd_unlock(&table.mutex)
    return count
