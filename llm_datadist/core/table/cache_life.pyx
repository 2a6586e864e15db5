"""The life of one cache in a table: its slot, its keys, its pins, and when its memory goes back.

A cache is live while its handle exists or, when owned and contiguous, while a req or prefix key is bound to it. Then it
is retired: nobody can find or pin it any more, and its last pin frees it, or the last reader on this host that has
said that it touches it. So a running transfer keeps its memory whatever happens to handle and keys meanwhile,
deallocation never waits, and counts are exact at every moment because each transition is one critical section of
``cache_table.pyx``.

    allocate -> published --handle and last key gone--> retired --last pin gone--> freed (owned pages: to the pool)
    register -> published --unregister---------------->   same

Slots are dense and reused with a new generation; ids are never reused. No function here locks, waits or raises.
"""
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memset

from llm_datadist.core.base.atomic cimport ldd_get32, ldd_load64, ldd_set32
from llm_datadist.core.base.status cimport (
    LDD_E_NOT_EXIST, LDD_E_NO_MEMORY, LDD_E_PARAM, LDD_OK, ldd_detail, ldd_fail, ldd_status,
)
from llm_datadist.core.base.sync cimport LDD_NEVER, ldd_cond_broadcast, ldd_now_ns
from llm_datadist.core.record.record cimport (
    LDD_EVENT_ALLOCATE, LDD_EVENT_FREE, LDD_EVENT_KEY_GONE, ldd_trace_span, ldd_tracing,
)
from llm_datadist.core.table.key_index cimport (
    KEY_BLOCKS, KEY_BY_ID, KEY_PREFIX, KEY_REQ, LDD_NO_KEY, ldd_keys_add, ldd_keys_find, ldd_keys_remove,
    ldd_keys_reserve, ldd_keys_share,
)
from llm_datadist.core.table.pool cimport LDD_NO_PAGE, ldd_pool_free
from llm_datadist.core.table.shared_table cimport (
    LDD_MAX_CACHES, LDD_SHOWN_BLOCKS, LDD_SHOWN_DTYPE_SHIFT, LDD_SHOWN_HOST, LDD_SHOWN_OPEN, LDD_SHOWN_OWNED,
    LDD_SHOWN_PUBLISHED, LDD_SHOWN_REMOTE_ACCESSIBLE, ldd_shared_cache, ldd_shared_cache_write,
)

cdef enum:
    MIN_CACHES = 16
    MAX_CACHES = 1 << 24
    MAX_BATCH = 1 << 30         # batch slots that can have a key


cdef ldd_status ldd_cache_describe(ldd_cache* cache, uint32_t num_tensors, uint64_t num_slots, uint64_t tensor_bytes,
                                   uint32_t flags, const ldd_tensor_desc* described, const ldd_key_spec* keys,
                                   uint32_t num_keys, ldd_detail* detail) noexcept nogil:
    cdef uint32_t i
    cdef uint64_t batch = 1 if flags & LDD_CACHE_BLOCKS else min(num_slots, <uint64_t>MAX_BATCH)
    cdef bint fits
    if num_tensors == 0 or num_slots == 0 or tensor_bytes == 0:
        return ldd_fail(detail, LDD_E_PARAM, b"%u tensors of %llu bytes in %llu slots were asked for; each must be "
                        b"at least 1", num_tensors, <unsigned long long>tensor_bytes, <unsigned long long>num_slots)
    if num_keys > batch:
        return ldd_fail(detail, LDD_E_PARAM, b"%u keys were given for a batch size of %llu", num_keys,
                        <unsigned long long>batch)
    memset(cache, 0, sizeof(ldd_cache))
    for i in range(num_keys):
        fits = keys[i].kind == KEY_BLOCKS if flags & LDD_CACHE_BLOCKS else keys[i].kind <= KEY_PREFIX
        if not fits:
            return ldd_fail(detail, LDD_E_PARAM, b"a %s key cannot be bound to a %s cache", ldd_kind_name(keys[i].kind),
                            b"blocks" if flags & LDD_CACHE_BLOCKS else b"contiguous")
        if keys[i].slot >= batch:
            return ldd_fail(detail, LDD_E_PARAM, b"%s %llu is meant for batch slot %u; the batch size is %llu",
                            ldd_kind_name(keys[i].kind), <unsigned long long>keys[i].id, keys[i].slot,
                            <unsigned long long>batch)
        cache.num_key_slots = max(cache.num_key_slots, keys[i].slot + 1)
    cache.addrs = <uint64_t*>malloc(num_tensors * sizeof(uint64_t) + sizeof(ldd_tensor_desc)
                                    + cache.num_key_slots * sizeof(uint32_t))
    if cache.addrs == NULL:
        return ldd_fail(detail, LDD_E_NO_MEMORY, b"no room for the addresses of %u tensors", num_tensors)
    cache.described = <ldd_tensor_desc*>(cache.addrs + num_tensors)
    cache.slot_keys = <uint32_t*>(cache.described + 1)
    if described != NULL:
        cache.described[0] = described[0]
    else:
        memset(cache.described, 0, sizeof(ldd_tensor_desc))
    memset(cache.slot_keys, 0xff, cache.num_key_slots * sizeof(uint32_t))       # LDD_NO_KEY everywhere
    cache.is_blocks = (flags & LDD_CACHE_BLOCKS) != 0
    cache.host = (flags & LDD_CACHE_HOST) != 0
    cache.remote_accessible = (flags & LDD_CACHE_REMOTE) != 0
    cache.handle_ref = True
    cache.num_tensors = num_tensors
    cache.num_slots = num_slots
    cache.tensor_bytes = tensor_bytes
    cache.span = LDD_NO_PAGE
    return LDD_OK


cdef ldd_status ldd_cache_enter(ldd_table* table, const ldd_cache* cache, const ldd_key_spec* keys, uint32_t num_keys,
                       uint32_t flags, uint32_t* out, ldd_detail* detail) noexcept nogil:
    cdef uint32_t slot, generation, i
    cdef ldd_status st = _reserve_slot(table)
    if st == LDD_OK:
        st = ldd_keys_reserve(&table.keys, num_keys + 1)
    if st != LDD_OK:
        return ldd_fail(detail, st, b"no room for another cache with %u keys", num_keys)
    slot = table.first_free
    table.first_free = table.caches[slot].link
    generation = table.caches[slot].generation
    table.caches[slot] = cache[0]
    table.caches[slot].generation = generation
    for i in range(num_keys):
        st = _bind(table, slot, &keys[i], flags, detail)
        if st != LDD_OK:
            ldd_cache_leave(table, slot)
            return st
    out[0] = slot
    return LDD_OK


cdef void ldd_cache_leave(ldd_table* table, uint32_t slot) noexcept nogil:
    cdef ldd_cache* cache = &table.caches[slot]
    _unbind_all(table, slot)
    cache.cache_id = 0
    cache.addrs = NULL
    cache.generation += 1
    cache.link = table.first_free
    table.first_free = slot


cdef ldd_status _reserve_slot(ldd_table* table) noexcept nogil:
    cdef uint32_t capacity, i
    cdef ldd_range* ranges
    cdef ldd_cache* caches
    if table.first_free != LDD_NO_SLOT:
        return LDD_OK
    if table.cache_capacity > MAX_CACHES // 2:
        return LDD_E_NO_MEMORY
    capacity = max(table.cache_capacity * 2, <uint32_t>MIN_CACHES)
    caches = <ldd_cache*>realloc(table.caches, capacity * sizeof(ldd_cache))
    if caches == NULL:
        return LDD_E_NO_MEMORY
    table.caches = caches
    memset(&caches[table.cache_capacity], 0, (capacity - table.cache_capacity) * sizeof(ldd_cache))
    ranges = <ldd_range*>realloc(table.ranges, capacity * sizeof(ldd_range))
    if ranges == NULL:
        return LDD_E_NO_MEMORY
    table.ranges = ranges
    for i in range(table.cache_capacity, capacity):
        table.caches[i].link = i + 1 if i + 1 < capacity else LDD_NO_SLOT
    table.first_free = table.cache_capacity
    table.cache_capacity = capacity
    if capacity > LDD_MAX_CACHES:
        ldd_keys_share(&table.keys, NULL, NULL)
    return LDD_OK


cdef ldd_status _bind(ldd_table* table, uint32_t slot, const ldd_key_spec* spec, uint32_t flags,
                      ldd_detail* detail) noexcept nogil:
    """Bind one key to a slot that _enter is filling; room in the index is reserved."""
    cdef ldd_cache* cache = &table.caches[slot]
    cdef uint32_t key = ldd_keys_find(&table.keys, spec.kind, spec.id, spec.model_id), other
    if cache.slot_keys[spec.slot] != LDD_NO_KEY:
        return ldd_fail(detail, LDD_E_PARAM, b"two keys were given for batch slot %u", spec.slot)
    if key != LDD_NO_KEY:
        other = table.keys.entries[key].cache_slot
        if other == slot:
            if not flags & LDD_CACHE_LAST_KEY_WINS:
                return ldd_fail(detail, LDD_E_PARAM, b"%s %llu of model %llu was given twice", ldd_kind_name(spec.kind),
                                <unsigned long long>spec.id, <unsigned long long>spec.model_id)
        elif cache.owned:
            return ldd_fail(detail, LDD_E_PARAM, b"%s %llu of model %llu is bound to cache %lld already",
                            ldd_kind_name(spec.kind), <unsigned long long>spec.id, <unsigned long long>spec.model_id,
                            <long long>table.caches[other].cache_id)
        elif spec.kind != KEY_BLOCKS:
            return LDD_OK                           # registered later: the first one keeps the key
        _unbind(table, key)
    key = ldd_keys_add(&table.keys, spec.kind, spec.id, spec.model_id, slot, spec.slot)
    cache.slot_keys[spec.slot] = key
    cache.num_keys += 1
    if cache.owned and not cache.is_blocks:
        cache.num_refs += 1
    return LDD_OK


cdef void _unbind(ldd_table* table, uint32_t key) noexcept nogil:
    cdef uint32_t slot = table.keys.entries[key].cache_slot
    cdef ldd_cache* cache = &table.caches[slot]
    cache.slot_keys[table.keys.entries[key].batch_slot] = LDD_NO_KEY
    cache.num_keys -= 1
    if cache.owned and not cache.is_blocks:
        cache.num_refs -= 1
    ldd_keys_remove(&table.keys, key)
    if cache.published:
        _show(table, slot)


cdef void _unbind_all(ldd_table* table, uint32_t slot) noexcept nogil:
    cdef ldd_cache* cache = &table.caches[slot]
    cdef uint32_t i
    for i in range(cache.num_key_slots if cache.num_keys else 0):
        if cache.slot_keys[i] != LDD_NO_KEY:
            _unbind(table, cache.slot_keys[i])


cdef int64_t ldd_cache_publish(ldd_table* table, uint32_t slot) noexcept nogil:
    cdef ldd_cache* cache = &table.caches[slot]
    cdef ldd_range* bounds = &table.ranges[table.num_caches]
    cdef uint64_t low = cache.addrs[0], high = cache.addrs[0], step = 0
    cdef uint32_t i
    if cache.num_tensors > 1 and cache.addrs[1] > cache.addrs[0]:
        step = cache.addrs[1] - cache.addrs[0]
    for i in range(1, cache.num_tensors):
        low = min(low, cache.addrs[i])
        high = max(high, cache.addrs[i])
        if cache.addrs[i] - cache.addrs[i - 1] != step:
            step = 0
    cache.step = step
    cache.born_ns = ldd_now_ns()
    cache.lease_end_ns = LDD_NEVER
    cache.cache_id = table.next_id
    cache.published = True
    cache.link = table.num_caches
    bounds.first = low
    bounds.last = high + cache.tensor_bytes - 1
    bounds.slot = slot
    ldd_keys_add(&table.keys, KEY_BY_ID, <uint64_t>cache.cache_id, 0, slot, 0)
    table.next_id += 1
    table.num_caches += 1
    _show(table, slot)
    if cache.owned:
        table.num_owned += 1
        table.owned_bytes += cache.num_tensors * cache.tensor_bytes
    else:
        table.registered_bytes += cache.num_tensors * cache.tensor_bytes
    if ldd_tracing(table.record):
        ldd_trace_span(table.record, LDD_EVENT_ALLOCATE, cache.born_ns, 0, 0, <uint64_t>cache.cache_id,
                       _first_key(table, cache), cache.num_tensors * cache.tensor_bytes, 0)
    return cache.cache_id


cdef uint64_t _first_key(const ldd_table* table, const ldd_cache* cache) noexcept nogil:
    cdef uint32_t i
    for i in range(cache.num_key_slots if cache.num_keys else 0):
        if cache.slot_keys[i] != LDD_NO_KEY:
            return table.keys.entries[cache.slot_keys[i]].id
    return 0


cdef void _show(ldd_table* table, uint32_t slot) noexcept nogil:
    """Have peers see what has become of a cache."""
    cdef const ldd_cache* cache = &table.caches[slot]
    cdef ldd_shared_cache shown
    if table.shared.head == NULL or slot >= LDD_MAX_CACHES:
        return
    shown.cache_id = <uint64_t>cache.cache_id
    shown.num_slots = cache.num_slots
    shown.tensor_bytes = cache.tensor_bytes
    shown.step = cache.step
    shown.base = cache.addrs[0]
    shown.born_ns = <uint64_t>cache.born_ns
    shown.generation = cache.generation
    shown.num_tensors = cache.num_tensors
    shown.num_keys = cache.num_keys
    shown.flags = ((LDD_SHOWN_PUBLISHED if cache.published else 0) | (LDD_SHOWN_OWNED if cache.owned else 0)
                   | (LDD_SHOWN_BLOCKS if cache.is_blocks else 0) | (LDD_SHOWN_HOST if cache.host else 0)
                   | (LDD_SHOWN_REMOTE_ACCESSIBLE if cache.remote_accessible else 0)
                   | (LDD_SHOWN_OPEN if cache.handle_ref else 0)
                   | <uint32_t>cache.described.dtype << LDD_SHOWN_DTYPE_SHIFT)
    ldd_shared_cache_write(&table.shared.caches[slot], &shown)


cdef void ldd_cache_close(ldd_table* table, uint32_t slot, bint force) noexcept nogil:
    cdef ldd_cache* cache = &table.caches[slot]
    cdef ldd_shared_cache* shown
    if cache.handle_ref:
        cache.handle_ref = False
        table.num_deferred += 1
    if cache.published and (force or cache.num_refs == 0):
        _retire(table, slot)
    elif cache.published and table.shared.head != NULL and slot < LDD_MAX_CACHES:
        shown = &table.shared.caches[slot]
        ldd_set32(&shown.flags, ldd_get32(&shown.flags) & ~<uint32_t>LDD_SHOWN_OPEN)


cdef void ldd_cache_release_key(ldd_table* table, uint32_t key) noexcept nogil:
    cdef uint32_t slot = table.keys.entries[key].cache_slot
    if ldd_tracing(table.record):
        ldd_trace_span(table.record, LDD_EVENT_KEY_GONE, table.caches[slot].born_ns, 0, table.keys.entries[key].kind,
                       table.keys.entries[key].id, table.keys.entries[key].model_id, 0, 0)
    _unbind(table, key)
    if not table.caches[slot].handle_ref and table.caches[slot].num_refs == 0:
        _retire(table, slot)


cdef int ldd_cache_take(ldd_cache* cache, uint32_t batch_slot, uint32_t first, uint32_t count) noexcept nogil:
    cdef size_t num_words = 1 + (<size_t>cache.num_tensors + 63) // 64
    cdef uint64_t* words
    cdef uint64_t bit
    cdef uint32_t i
    if count == cache.num_tensors:
        return 1                                    # the usual pull needs no bitmap
    if cache.taken == NULL:
        cache.taken = <uint64_t*>calloc(cache.num_key_slots * num_words, sizeof(uint64_t))
        if cache.taken == NULL:
            return LDD_E_NO_MEMORY
    words = cache.taken + batch_slot * num_words
    for i in range(first, first + count):
        bit = <uint64_t>1 << (i & 63)
        words[0] += not (words[1 + (i >> 6)] & bit)
        words[1 + (i >> 6)] |= bit
    return words[0] == cache.num_tensors


cdef void _retire(ldd_table* table, uint32_t slot) noexcept nogil:
    """Let nobody find a published cache from now on; free it now or with its last pin."""
    cdef ldd_cache* cache = &table.caches[slot]
    cache.published = False
    _unbind_all(table, slot)
    _show(table, slot)
    ldd_cache_free_unused(table, slot)


cdef void ldd_cache_free_unused(ldd_table* table, uint32_t slot) noexcept nogil:
    cdef ldd_cache* cache = &table.caches[slot]
    cdef uint32_t* grown
    if cache.pins != 0:
        return
    if not _has_hazard(table, slot, cache.generation):
        cache.awaits_readers = False
        _free_cache(table, slot)
        return
    if cache.awaits_readers:
        return
    if table.num_retired == table.retired_capacity:
        grown = <uint32_t*>realloc(table.retired, (table.retired_capacity * 2 + 16) * sizeof(uint32_t))
        if grown == NULL:
            return                                  # the memory stays taken; nothing is freed under a reader
        table.retired = grown
        table.retired_capacity = table.retired_capacity * 2 + 16
    cache.awaits_readers = True
    table.retired[table.num_retired] = slot
    table.num_retired += 1


cdef void ldd_cache_free_retired(ldd_table* table) noexcept nogil:
    cdef uint32_t i = 0, slot
    while i < table.num_retired:
        slot = table.retired[i]
        if table.caches[slot].pins != 0 or _has_hazard(table, slot, table.caches[slot].generation):
            i += 1
            continue
        table.num_retired -= 1
        table.retired[i] = table.retired[table.num_retired]
        table.caches[slot].awaits_readers = False
        _free_cache(table, slot)


cdef bint _has_hazard(ldd_table* table, uint32_t slot, uint32_t generation) noexcept nogil:
    """Whether a peer says that it touches this cache. The fence of ldd_seq_begin lies before the first look."""
    cdef uint64_t wanted = <uint64_t>generation << 32 | (slot + 1)
    cdef uint32_t i
    for i in range(table.num_lanes):
        if ldd_load64(&table.lanes[i].lane.hazard) == wanted:
            return True
    return False


cdef bint ldd_cache_is_touched(ldd_table* table, uint32_t slot) noexcept nogil:
    return table.caches[slot].pins != 0 or _has_hazard(table, slot, table.caches[slot].generation)


cdef uint64_t ldd_cache_count_hazards(ldd_table* table) noexcept nogil:
    cdef uint64_t count = 0
    cdef uint32_t i
    for i in range(table.num_lanes):
        count += ldd_load64(&table.lanes[i].lane.hazard) != 0
    return count


cdef void _free_cache(ldd_table* table, uint32_t slot) noexcept nogil:
    cdef ldd_cache* cache = &table.caches[slot]
    cdef ldd_range* moved
    if ldd_tracing(table.record):
        ldd_trace_span(table.record, LDD_EVENT_FREE, cache.born_ns, 0, 0, <uint64_t>cache.cache_id, 0,
                       cache.num_tensors * cache.tensor_bytes, 0)
    ldd_keys_remove(&table.keys, ldd_keys_find(&table.keys, KEY_BY_ID, <uint64_t>cache.cache_id, 0))
    if cache.owned:
        ldd_pool_free(cache.pool, cache.span)
        table.num_owned -= 1
        table.owned_bytes -= cache.num_tensors * cache.tensor_bytes
    else:
        table.registered_bytes -= cache.num_tensors * cache.tensor_bytes
    table.num_deferred -= 1
    table.num_caches -= 1
    moved = &table.ranges[table.num_caches]
    table.ranges[cache.link] = moved[0]
    table.caches[moved.slot].link = cache.link
    free(cache.addrs)
    free(cache.taken)
    ldd_cache_leave(table, slot)
    ldd_cond_broadcast(&table.drained)


cdef uint32_t ldd_cache_find(ldd_table* table, int64_t cache_id) noexcept nogil:
    cdef uint32_t key = ldd_keys_find(&table.keys, KEY_BY_ID, <uint64_t>cache_id, 0)
    return table.keys.entries[key].cache_slot if key != LDD_NO_KEY else <uint32_t>LDD_NO_SLOT


cdef void ldd_cache_pin(ldd_table* table, uint32_t slot, uint64_t batch_index, ldd_cache_view* view) noexcept nogil:
    cdef ldd_cache* cache = &table.caches[slot]
    cdef uint32_t key = cache.slot_keys[batch_index] if batch_index < cache.num_key_slots else LDD_NO_KEY
    cache.pins += 1
    table.num_pins += 1
    view.cache_id = cache.cache_id
    view.slot = slot
    view.generation = cache.generation
    view.num_tensors = cache.num_tensors
    view.batch_index = batch_index
    view.num_slots = cache.num_slots
    view.tensor_bytes = cache.tensor_bytes
    view.stride = cache.tensor_bytes // cache.num_slots
    view.step = cache.step
    view.addrs = cache.addrs
    view.described = cache.described
    view.key_index = LDD_NO_KEY
    view.key_generation = 0
    view.key_kind = KEY_BY_ID
    if key != LDD_NO_KEY:
        view.key_kind = table.keys.entries[key].kind
        if view.key_kind == KEY_REQ and cache.owned:
            view.key_index = key
            view.key_generation = table.keys.entries[key].generation
    view.tensor = 0
    view.offset = 0
    view.owned = cache.owned
    view.is_blocks = cache.is_blocks
    view.host = cache.host
    view.remote_accessible = cache.remote_accessible


cdef void ldd_cache_unpin(ldd_table* table, uint32_t slot) noexcept nogil:
    cdef ldd_cache* cache = &table.caches[slot]
    cache.pins -= 1
    table.num_pins -= 1
    if not cache.published:
        ldd_cache_free_unused(table, slot)


cdef uint32_t ldd_cache_tensor_of(const ldd_cache* cache, uint64_t addr, uint64_t last) noexcept nogil:
    cdef uint32_t i = 0, end = cache.num_tensors
    if cache.step:
        # The last tensor that starts at or below addr; none before it reaches further.
        i = <uint32_t>min((addr - cache.addrs[0]) // cache.step, <uint64_t>(end - 1))
        end = i + 1
    while i < end:
        if cache.addrs[i] <= addr and last - cache.addrs[i] < cache.tensor_bytes:
            return i
        i += 1
    return cache.num_tensors


cdef ldd_status ldd_cache_check_index(int64_t cache_id, bint is_blocks, uint64_t num_slots, uint64_t batch_index,
                                      ldd_detail* detail) noexcept nogil:
    cdef uint64_t batch = 1 if is_blocks else num_slots
    if batch_index < batch:
        return LDD_OK
    return ldd_fail(detail, LDD_E_NOT_EXIST, b"batch index %llu of cache %lld is out of range; its batch size is %llu",
                    <unsigned long long>batch_index, <long long>cache_id, <unsigned long long>batch)


cdef const char* ldd_kind_name(uint32_t kind) noexcept nogil:
    if kind == KEY_REQ:
        return b"req_id"
    if kind == KEY_PREFIX:
        return b"prefix_id"
    return b"blocks" if kind == KEY_BLOCKS else b"unknown"
