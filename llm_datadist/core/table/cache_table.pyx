"""The cache table of one engine: what can be found here by key, id or address, and pinned while it is used.

Called by user threads, and by the service thread and those of the data servers, which never hold the GIL. One mutex
covers the table: no operation scans caches or keys (but for pushes to given addresses, statistics and the end). None
makes a system call under the mutex except through the allocator, and none waits with it but ``unregister`` and
``clear``, on a condition. Lock order: GIL, table, pool. The transitions themselves are in ``cache_life.pyx``; what
peers see meanwhile, and write, is in ``docs/protocol.md``.
"""
from libc.stddef cimport size_t
from libc.stdint cimport UINT64_MAX, int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memcpy

from llm_datadist.core.base.atomic cimport (
    ldd_fence, ldd_get32, ldd_get64, ldd_load32, ldd_load64, ldd_set32, ldd_set64, ldd_store32,
)
from llm_datadist.core.base.status cimport (
    LDD_E_FAILED, LDD_E_NOT_EXIST, LDD_E_NO_MEMORY, LDD_E_PARAM, LDD_OK, ldd_detail, ldd_fail, ldd_status,
)
from llm_datadist.core.base.sync cimport (
    LDD_NEVER, ldd_cond_destroy, ldd_cond_init, ldd_cond_wait_until, ldd_lock, ldd_lock_until, ldd_mutex_destroy,
    ldd_mutex_init, ldd_now_ns, ldd_timer_create, ldd_unlock,
)
from llm_datadist.core.table.cache_life cimport (
    LDD_NO_SLOT, ldd_cache, ldd_cache_check_index, ldd_cache_close, ldd_cache_count_hazards, ldd_cache_describe,
    ldd_cache_enter, ldd_cache_find, ldd_cache_free_retired, ldd_cache_leave, ldd_cache_pin, ldd_cache_publish,
    ldd_cache_release_key, ldd_cache_take, ldd_cache_tensor_of, ldd_cache_unpin, ldd_kind_name, ldd_lane_reader,
    ldd_range,
)
from llm_datadist.core.table.key_index cimport (
    KEY_BLOCKS, KEY_BY_ID, KEY_REQ, LDD_NO_KEY, ldd_key, ldd_keys_bytes, ldd_keys_destroy, ldd_keys_find, ldd_keys_init,
    ldd_keys_max_probe, ldd_keys_share,
)
from llm_datadist.core.table.pool cimport ldd_pool, ldd_pool_alloc_tensors
from llm_datadist.core.table.shared_table cimport (
    LDD_LANE_RING, LDD_NOT_SHARED, ldd_lane, ldd_seq_begin, ldd_seq_end, ldd_shared_table_create,
    ldd_shared_table_destroy,
)

cdef extern from "<unistd.h>" nogil:
    int close(int fd)

cdef enum:
    HAZARD_POLL_NS = 200000


cdef ldd_status ldd_table_create(ldd_table** out, ldd_detail* detail) noexcept nogil:
    cdef ldd_table* table = <ldd_table*>calloc(1, sizeof(ldd_table))
    out[0] = NULL
    if table == NULL or ldd_mutex_init(&table.mutex) != LDD_OK:
        free(table)
        return ldd_fail(detail, LDD_E_NO_MEMORY, b"no room for a cache table")
    if ldd_cond_init(&table.drained) != LDD_OK or ldd_cond_init(&table.expired) != LDD_OK:
        ldd_mutex_destroy(&table.mutex)
        free(table)
        return ldd_fail(detail, LDD_E_NO_MEMORY, b"no room for a cache table")
    ldd_shared_table_create(&table.shared)
    ldd_keys_init(&table.keys)
    ldd_keys_share(&table.keys, table.shared.cells, table.shared.keys)
    # Without a shared table nobody rings: compared with itself the number never changes.
    table.doorbell = &table.shared.marks.doorbell if table.shared.head != NULL else &table.seen_doorbell
    table.lease_fd = ldd_timer_create()
    table.next_lease_ns = LDD_NEVER
    table.first_free = LDD_NO_SLOT
    table.next_id = 1
    out[0] = table
    return LDD_OK


cdef void ldd_table_close(ldd_table* table) noexcept nogil:
    cdef uint32_t i
    ldd_lock(&table.mutex)
    table.closed = True
    for i in range(table.num_caches):
        free(table.caches[table.ranges[i].slot].addrs)
        free(table.caches[table.ranges[i].slot].taken)
    ldd_keys_destroy(&table.keys)
    ldd_keys_init(&table.keys)
    table.doorbell = &table.seen_doorbell
    ldd_shared_table_destroy(&table.shared)
    free(table.caches)
    free(table.ranges)
    free(table.lanes)
    free(table.retired)
    table.caches = NULL
    table.ranges = NULL
    table.lanes = NULL
    table.retired = NULL
    table.cache_capacity = table.num_caches = table.num_owned = table.num_deferred = 0
    table.num_lanes = table.lane_capacity = table.num_retired = table.retired_capacity = 0
    table.first_free = LDD_NO_SLOT
    if table.lease_fd >= 0:
        close(table.lease_fd)
    table.lease_fd = -1
    ldd_unlock(&table.mutex)


cdef void ldd_table_destroy(ldd_table* table) noexcept nogil:
    if table == NULL:
        return
    ldd_table_close(table)
    ldd_cond_destroy(&table.drained)
    ldd_cond_destroy(&table.expired)
    ldd_mutex_destroy(&table.mutex)
    free(table)


cdef ldd_status ldd_table_allocate(ldd_table* table, ldd_pool* pool, uint32_t num_tensors, uint64_t num_slots,
                                   uint64_t tensor_bytes, uint32_t flags, const ldd_tensor_desc* described,
                                   const ldd_key_spec* keys, uint32_t num_keys, int64_t* cache_id, uint64_t* addrs,
                                   int64_t deadline_ns, ldd_detail* detail) noexcept nogil:
    cdef ldd_cache cache
    cdef uint32_t slot
    cdef ldd_status st
    if pool == NULL:
        return ldd_fail(detail, LDD_E_PARAM, b"there is no %s memory pool to allocate from",
                        b"host" if flags & LDD_CACHE_HOST else b"device")
    st = ldd_cache_describe(&cache, num_tensors, num_slots, tensor_bytes, flags, described, keys, num_keys, detail)
    if st != LDD_OK:
        return st
    cache.owned = True
    cache.pool = pool
    st = _lock(table, deadline_ns, detail)
    if st != LDD_OK:
        free(cache.addrs)
        return st
    _begin(table)
    st = ldd_cache_enter(table, &cache, keys, num_keys, flags, &slot, detail)
    if st == LDD_OK:
        st = ldd_pool_alloc_tensors(pool, num_tensors, tensor_bytes, cache.addrs, &table.caches[slot].span, detail)
        if st != LDD_OK:
            ldd_cache_leave(table, slot)
    if st == LDD_OK:
        cache_id[0] = ldd_cache_publish(table, slot)
        if addrs != NULL:
            memcpy(addrs, cache.addrs, num_tensors * sizeof(uint64_t))
    _end(table)
    ldd_unlock(&table.mutex)
    if st != LDD_OK:
        free(cache.addrs)
    return st


cdef ldd_status ldd_table_register(ldd_table* table, const uint64_t* addrs, uint32_t num_tensors, uint64_t num_slots,
                                   uint64_t tensor_bytes, uint32_t flags, const ldd_tensor_desc* described,
                                   const ldd_key_spec* keys, uint32_t num_keys, int64_t* cache_id,
                                   int64_t deadline_ns, ldd_detail* detail) noexcept nogil:
    cdef ldd_cache cache
    cdef uint32_t slot, i
    cdef ldd_status st
    st = ldd_cache_describe(&cache, num_tensors, num_slots, tensor_bytes, flags, described, keys, num_keys, detail)
    if st != LDD_OK:
        return st
    for i in range(num_tensors):
        if addrs[i] == 0 or tensor_bytes - 1 > UINT64_MAX - addrs[i]:
            free(cache.addrs)
            return ldd_fail(detail, LDD_E_PARAM, b"address %u is 0x%llx, no place for %llu bytes", i,
                            <unsigned long long>addrs[i], <unsigned long long>tensor_bytes)
    memcpy(cache.addrs, addrs, num_tensors * sizeof(uint64_t))
    st = _lock(table, deadline_ns, detail)
    if st != LDD_OK:
        free(cache.addrs)
        return st
    _begin(table)
    st = ldd_cache_enter(table, &cache, keys, num_keys, flags, &slot, detail)
    if st == LDD_OK:
        cache_id[0] = ldd_cache_publish(table, slot)
    _end(table)
    ldd_unlock(&table.mutex)
    if st != LDD_OK:
        free(cache.addrs)
    return st


cdef ldd_status ldd_table_deallocate(ldd_table* table, int64_t cache_id, int64_t deadline_ns,
                                     ldd_detail* detail) noexcept nogil:
    cdef uint32_t slot
    cdef ldd_status st = _lock(table, deadline_ns, detail)
    if st != LDD_OK:
        return st
    slot = ldd_cache_find(table, cache_id)
    if slot != LDD_NO_SLOT and table.caches[slot].owned:
        _begin(table)
        ldd_cache_close(table, slot, False)
        _end(table)
    ldd_unlock(&table.mutex)
    return LDD_OK


cdef ldd_status ldd_table_unregister(ldd_table* table, int64_t cache_id, int64_t deadline_ns,
                                     ldd_detail* detail) noexcept nogil:
    cdef uint32_t slot
    cdef ldd_status st = _lock(table, deadline_ns, detail)
    if st != LDD_OK:
        return st
    slot = ldd_cache_find(table, cache_id)
    if slot != LDD_NO_SLOT and not table.caches[slot].owned:
        _begin(table)
        ldd_cache_close(table, slot, False)
        _end(table)
        # Ids are never used twice, so a slot that has another one by now tells that the cache is gone.
        while table.caches[slot].cache_id == cache_id:
            if st == LDD_OK:
                st = _wait_drained(table, deadline_ns)
                continue
            ldd_fail(detail, st, b"cache %lld is read or written by %u transfers", <long long>cache_id,
                     table.caches[slot].pins)
            ldd_unlock(&table.mutex)
            return st
    ldd_unlock(&table.mutex)
    return LDD_OK


cdef ldd_status ldd_table_remove_key(ldd_table* table, uint32_t kind, uint64_t id, uint64_t model_id,
                                     int64_t deadline_ns, ldd_detail* detail) noexcept nogil:
    cdef uint32_t key
    cdef ldd_status st
    if kind > KEY_BLOCKS:                           # ids are not keys, though the index holds both
        return ldd_fail(detail, LDD_E_PARAM, b"key kind is %u; allowed are 0 to 2", kind)
    st = _lock(table, deadline_ns, detail)
    if st != LDD_OK:
        return st
    key = ldd_keys_find(&table.keys, kind, id, model_id)
    if key != LDD_NO_KEY:
        _begin(table)
        ldd_cache_release_key(table, key)
        _end(table)
    ldd_unlock(&table.mutex)
    return LDD_OK


cdef ldd_status ldd_table_resolve(ldd_table* table, uint32_t kind, uint64_t id, uint64_t model_id,
                                  uint64_t batch_index, ldd_cache_view* view, ldd_detail* detail) noexcept nogil:
    cdef uint32_t key
    cdef ldd_status st = LDD_OK
    if kind == KEY_BY_ID:
        return _pin_by_id(table, id, batch_index, view, detail)
    _lock_now(table)
    key = ldd_keys_find(&table.keys, kind, id, model_id)
    if key != LDD_NO_KEY:
        ldd_cache_pin(table, table.keys.entries[key].cache_slot, table.keys.entries[key].batch_slot, view)
    ldd_unlock(&table.mutex)
    if key == LDD_NO_KEY:
        st = ldd_fail(detail, LDD_E_NOT_EXIST, b"no cache is bound to %s %llu of model %llu", ldd_kind_name(kind),
                      <unsigned long long>id, <unsigned long long>model_id)
    return st


cdef ldd_status ldd_table_pin_local(ldd_table* table, int64_t cache_id, ldd_cache_view* view,
                                    ldd_detail* detail) noexcept nogil:
    return _pin_by_id(table, <uint64_t>cache_id, 0, view, detail)


cdef ldd_status ldd_table_pin_range(ldd_table* table, uint64_t addr, uint64_t num_bytes, ldd_cache_view* view,
                                    ldd_detail* detail) noexcept nogil:
    cdef uint64_t last = addr + num_bytes - 1
    cdef uint32_t i, tensor
    cdef ldd_range* bounds
    cdef ldd_cache* cache
    if num_bytes != 0 and last >= addr:
        _lock_now(table)
        for i in range(table.num_caches):
            bounds = &table.ranges[i]
            if addr < bounds.first or last > bounds.last:
                continue
            cache = &table.caches[bounds.slot]
            tensor = ldd_cache_tensor_of(cache, addr, last)
            if tensor < cache.num_tensors and cache.published:
                ldd_cache_pin(table, bounds.slot, 0, view)
                view.tensor = tensor
                view.offset = addr - cache.addrs[tensor]
                ldd_unlock(&table.mutex)
                return LDD_OK
        ldd_unlock(&table.mutex)
    return ldd_fail(detail, LDD_E_PARAM, b"%llu bytes at 0x%llx lie in no tensor of a live cache",
                    <unsigned long long>num_bytes, <unsigned long long>addr)


cdef bint ldd_table_repin(ldd_table* table, uint32_t slot, uint32_t generation, ldd_cache_view* view) noexcept nogil:
    cdef bint pinned = False
    _lock_now(table)
    if slot < table.cache_capacity and table.caches[slot].generation == generation and table.caches[slot].pins:
        if view != NULL:
            ldd_cache_pin(table, slot, 0, view)
        else:
            table.caches[slot].pins += 1
            table.num_pins += 1
        pinned = True
    ldd_unlock(&table.mutex)
    return pinned


cdef void ldd_table_unpin(ldd_table* table, uint32_t slot, uint32_t generation) noexcept nogil:
    _lock_now(table)
    _unpin(table, slot, generation)
    ldd_unlock(&table.mutex)


cdef void _unpin(ldd_table* table, uint32_t slot, uint32_t generation) noexcept nogil:
    cdef ldd_cache* cache
    if slot < table.cache_capacity:
        cache = &table.caches[slot]
        if cache.cache_id != 0 and cache.generation == generation and cache.pins != 0:
            if cache.published:
                ldd_cache_unpin(table, slot)
            else:
                _begin(table)
                ldd_cache_unpin(table, slot)
                _end(table)


cdef ldd_status ldd_table_take(ldd_table* table, uint32_t key_index, uint32_t key_generation, uint32_t first_tensor,
                               uint32_t num_tensors) noexcept nogil:
    cdef ldd_key* key
    cdef ldd_cache* cache
    cdef int taken
    cdef ldd_status st = LDD_OK
    _lock_now(table)
    # The handle may come from a peer: only an entry in use, of the very generation, that keeps memory, is taken.
    if key_index < table.keys.num_entries and key_generation & 1:
        key = &table.keys.entries[key_index]
        if key.generation == key_generation and key.kind == KEY_REQ:
            cache = &table.caches[key.cache_slot]
            if not cache.owned:
                pass
            elif first_tensor > cache.num_tensors or num_tensors > cache.num_tensors - first_tensor:
                st = LDD_E_PARAM
            else:
                taken = ldd_cache_take(cache, key.batch_slot, first_tensor, num_tensors)
                if taken < 0:
                    st = taken
                elif taken:
                    _begin(table)
                    ldd_cache_release_key(table, key_index)
                    _end(table)
    ldd_unlock(&table.mutex)
    return st


cdef ldd_status ldd_table_clear(ldd_table* table, int64_t deadline_ns, ldd_detail* detail) noexcept nogil:
    cdef uint32_t i = 0, num_caches, slot
    cdef ldd_status st = _lock(table, deadline_ns, detail)
    if st != LDD_OK:
        return st
    _begin(table)
    while i < table.num_caches:
        num_caches = table.num_caches
        ldd_cache_close(table, table.ranges[i].slot, True)
        if table.num_caches == num_caches:          # pinned; otherwise the last one has moved to i
            i += 1
    _end(table)
    while st == LDD_OK and table.num_caches:
        st = _wait_drained(table, deadline_ns)
    if table.num_caches:
        slot = table.ranges[0].slot
        ldd_fail(detail, st, b"%u caches are still read or written, among them cache %lld by %u transfers",
                 table.num_caches, <long long>table.caches[slot].cache_id, table.caches[slot].pins)
    else:
        st = LDD_OK
    ldd_unlock(&table.mutex)
    return st


cdef ldd_status _wait_drained(ldd_table* table, int64_t deadline_ns) noexcept nogil:
    """Sleep until some cache went away. Hazards are dropped without a word, so look after them now and then."""
    cdef int64_t until = deadline_ns
    cdef ldd_status st
    if table.num_retired:
        until = min(deadline_ns, ldd_now_ns() + HAZARD_POLL_NS)
    st = ldd_cond_wait_until(&table.drained, &table.mutex, until)
    if table.num_retired:
        _begin(table)
        ldd_cache_free_retired(table)
        _end(table)
        if ldd_now_ns() < deadline_ns:
            return LDD_OK
    return st


cdef void ldd_table_stats(ldd_table* table, ldd_table_counts* counts) noexcept nogil:
    _lock_now(table)
    counts.num_owned = table.num_owned
    counts.num_registered = table.num_caches - table.num_owned
    counts.num_keys = table.keys.num_keys - table.num_caches
    counts.num_pins = table.num_pins + ldd_cache_count_hazards(table)
    counts.num_deferred = table.num_deferred
    counts.num_expired = table.num_expired
    counts.owned_bytes = table.owned_bytes
    counts.registered_bytes = table.registered_bytes
    counts.max_probe = ldd_keys_max_probe(&table.keys)
    counts.key_bytes = ldd_keys_bytes(&table.keys)
    ldd_unlock(&table.mutex)


cdef size_t ldd_table_snapshot(ldd_table* table, ldd_cache_row* rows, size_t capacity) noexcept nogil:
    cdef size_t i, count
    cdef ldd_cache* cache
    cdef int64_t now_ns = ldd_now_ns()
    _lock_now(table)
    count = table.num_caches
    for i in range(min(count, capacity)):
        cache = &table.caches[table.ranges[i].slot]
        rows[i].cache_id = cache.cache_id
        rows[i].bytes = cache.num_tensors * cache.tensor_bytes
        rows[i].num_tensors = cache.num_tensors
        rows[i].num_keys = cache.num_keys
        rows[i].pins = cache.pins
        rows[i].owned = cache.owned
        rows[i].is_blocks = cache.is_blocks
        rows[i].handle_ref = cache.handle_ref
        rows[i].published = cache.published
        rows[i].age_ns = now_ns - cache.born_ns
        rows[i].lease_ns = LDD_NEVER if cache.lease_end_ns == LDD_NEVER else cache.lease_end_ns - now_ns
    ldd_unlock(&table.mutex)
    return count


# The mutex, and what peers have left to be done: every entry to the table goes through one of these.

cdef inline ldd_status _lock(ldd_table* table, int64_t deadline_ns, ldd_detail* detail) noexcept nogil:
    cdef ldd_status st = ldd_lock_until(&table.mutex, deadline_ns)
    if st != LDD_OK:
        return ldd_fail(detail, st, b"the cache table was busy until the deadline")
    if table.closed:
        ldd_unlock(&table.mutex)
        return ldd_fail(detail, LDD_E_FAILED, b"the engine was finalized meanwhile")
    if ldd_load64(table.doorbell) != table.seen_doorbell or table.num_retired:
        _take_in(table)
    return LDD_OK


cdef inline void _lock_now(ldd_table* table) noexcept nogil:
    ldd_lock(&table.mutex)
    if ldd_load64(table.doorbell) != table.seen_doorbell or table.num_retired:
        _take_in(table)


cdef inline void _begin(ldd_table* table) noexcept nogil:
    """Something that peers read is about to change."""
    if table.shared.head != NULL:
        ldd_seq_begin(&table.shared.head.seq)


cdef inline void _end(ldd_table* table) noexcept nogil:
    if table.shared.head != NULL:
        ldd_set32(&table.shared.head.mask, table.keys.mask if table.keys.shared_cells != NULL else LDD_NOT_SHARED)
        ldd_seq_end(&table.shared.head.seq)


cdef void ldd_table_begin(ldd_table* table) noexcept nogil:
    _begin(table)


cdef void ldd_table_end(ldd_table* table) noexcept nogil:
    _end(table)


cdef void _take_in(ldd_table* table) noexcept nogil:
    """Release the keys that peers say they pulled, and free what their hazards kept."""
    cdef uint32_t i
    table.seen_doorbell = ldd_load64(table.doorbell)
    _begin(table)
    for i in range(table.num_lanes):
        _read_ring(table, &table.lanes[i])
    if table.num_retired:
        ldd_cache_free_retired(table)
    _end(table)


cdef void ldd_table_settle(ldd_table* table, uint32_t slot, uint32_t generation, uint32_t key_index,
                           uint32_t key_generation) noexcept nogil:
    _lock_now(table)
    if key_index != LDD_NO_KEY:
        _begin(table)
        _release(table, key_index, key_generation)
        _end(table)
    _unpin(table, slot, generation)
    ldd_unlock(&table.mutex)


cdef void _release(ldd_table* table, uint32_t key_index, uint32_t generation) noexcept nogil:
    """A peer has pulled what this key was bound to. A key that is gone, or keeps no memory, is left alone."""
    cdef ldd_key* key
    if key_index < table.keys.num_entries and generation & 1:
        key = &table.keys.entries[key_index]
        if key.generation == generation and key.kind == KEY_REQ and table.caches[key.cache_slot].owned:
            ldd_cache_release_key(table, key_index)


cdef void _read_ring(ldd_table* table, ldd_lane_reader* reader) noexcept nogil:
    cdef uint32_t head = ldd_load32(&reader.lane.ring_head), at
    if head - reader.tail > LDD_LANE_RING:          # only a peer that breaks the rules gets there
        reader.tail = head - LDD_LANE_RING
    while reader.tail != head:
        at = reader.tail % LDD_LANE_RING
        reader.tail += 1
        _release(table, ldd_get32(&reader.lane.ring[at].key_index), ldd_get32(&reader.lane.ring[at].key_generation))
    ldd_store32(&reader.lane.ring_tail, reader.tail)


cdef ldd_status ldd_table_add_lane(ldd_table* table, ldd_lane* lane) noexcept nogil:
    cdef ldd_lane_reader* grown
    cdef ldd_status st = LDD_OK
    _lock_now(table)
    if table.num_lanes == table.lane_capacity:
        grown = <ldd_lane_reader*>realloc(table.lanes, (table.lane_capacity * 2 + 8) * sizeof(ldd_lane_reader))
        if grown == NULL:
            st = LDD_E_NO_MEMORY
        else:
            table.lanes = grown
            table.lane_capacity = table.lane_capacity * 2 + 8
    if st == LDD_OK:
        table.lanes[table.num_lanes].lane = lane
        table.lanes[table.num_lanes].tail = 0
        table.num_lanes += 1
    ldd_unlock(&table.mutex)
    return st


cdef void ldd_table_remove_lane(ldd_table* table, ldd_lane* lane) noexcept nogil:
    cdef uint32_t i
    _lock_now(table)
    _begin(table)
    for i in range(table.num_lanes):
        if table.lanes[i].lane == lane:
            _read_ring(table, &table.lanes[i])
            ldd_set32(&lane.closed, 1)
            ldd_fence()                             # a reader that does not see it yet has read nothing newer
            table.num_lanes -= 1
            table.lanes[i] = table.lanes[table.num_lanes]
            break
    if table.num_retired:
        ldd_cache_free_retired(table)
    _end(table)
    ldd_unlock(&table.mutex)


cdef void ldd_table_take_in(ldd_table* table) noexcept nogil:
    _lock_now(table)
    ldd_unlock(&table.mutex)


cdef void ldd_table_set_epoch(ldd_table* table, uint64_t region_epoch) noexcept nogil:
    ldd_lock(&table.mutex)
    if table.shared.head != NULL and region_epoch > ldd_get64(&table.shared.head.region_epoch):
        _begin(table)                               # only ever up: callers come in any order
        ldd_set64(&table.shared.head.region_epoch, region_epoch)
        _end(table)
    ldd_unlock(&table.mutex)


cdef ldd_status _pin_by_id(ldd_table* table, uint64_t cache_id, uint64_t batch_index, ldd_cache_view* view,
                           ldd_detail* detail) noexcept nogil:
    cdef uint32_t slot
    cdef ldd_status st
    _lock_now(table)
    slot = ldd_cache_find(table, <int64_t>cache_id)
    if slot == LDD_NO_SLOT or not table.caches[slot].published:
        st = ldd_fail(detail, LDD_E_NOT_EXIST, b"there is no cache %lld", <long long>cache_id)
    else:
        st = ldd_cache_check_index(<int64_t>cache_id, table.caches[slot].is_blocks, table.caches[slot].num_slots,
                                   batch_index, detail)
        if st == LDD_OK:
            ldd_cache_pin(table, slot, batch_index, view)
    ldd_unlock(&table.mutex)
    return st
