"""Open-addressing index from (kind, id, model id) to a cache slot, with handles that go stale.

Robin Hood hashing with backward shift: no tombstones, so searches stay short however long the table lives, and a miss
ends as soon as a cell is closer to its home than the search is. Cells hold the hash and an entry number; entries are
dense, reused, and carry a generation, so that a handle kept across a transfer says whether its key is still the same.
Caches are found by id through the same index (kind ``KEY_BY_ID``).

Cost: 32 bytes per entry and 8 per cell at 37 to 75 % load, with growth by a quarter and by doubling, is at most 62
bytes a key, and the copies for peers take 32 and 8 more of each; nothing shrinks. Growing rehashes all cells from
their stored hashes (about 10 ns a key); every other operation is constant. The cache table calls this under its mutex,
and between the two ends of its sequence what peers read; nothing is ever read back from the copies.
"""
from libc.stdint cimport UINT32_MAX, uint32_t, uint64_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memset

from llm_datadist.core.base.atomic cimport ldd_get32, ldd_get64, ldd_set64
from llm_datadist.core.base.status cimport LDD_E_NO_MEMORY, LDD_OK, ldd_status
from llm_datadist.core.table.shared_table cimport (
    LDD_MAX_CELLS, LDD_MAX_KEYS, ldd_shared_cell, ldd_shared_key, ldd_shared_key_write,
)

cdef enum:
    MIN_CELLS = 64
    MIN_ENTRIES = 32

cdef ldd_cell _EMPTY = [0, LDD_NO_KEY]


cdef void ldd_keys_init(ldd_keys* keys) noexcept nogil:
    memset(keys, 0, sizeof(ldd_keys))
    keys.first_free = LDD_NO_KEY


cdef void ldd_keys_destroy(ldd_keys* keys) noexcept nogil:
    free(keys.entries)
    free(keys.cells)
    ldd_keys_init(keys)


cdef void ldd_keys_share(ldd_keys* keys, uint64_t* cells, ldd_shared_key* entries) noexcept nogil:
    keys.shared_cells = cells
    keys.shared_keys = entries


cdef ldd_status ldd_keys_reserve(ldd_keys* keys, uint32_t count) noexcept nogil:
    cdef uint64_t wanted = <uint64_t>keys.num_keys + count
    cdef uint64_t capacity, num_cells = <uint64_t>keys.mask + 1 if keys.cells != NULL else 0
    cdef ldd_key* entries
    if wanted > keys.entry_capacity:
        capacity = keys.entry_capacity + (keys.entry_capacity >> 2)
        capacity = max(max(capacity, wanted), <uint64_t>MIN_ENTRIES)
        if capacity >= LDD_NO_KEY:
            return LDD_E_NO_MEMORY
        entries = <ldd_key*>realloc(keys.entries, capacity * sizeof(ldd_key))
        if entries == NULL:
            return LDD_E_NO_MEMORY
        keys.entries = entries
        keys.entry_capacity = <uint32_t>capacity
    if wanted * 4 > num_cells * 3:
        num_cells = max(num_cells, <uint64_t>MIN_CELLS)
        while wanted * 4 > num_cells * 3:
            num_cells *= 2
        return _rehash(keys, num_cells)
    return LDD_OK


cdef uint32_t ldd_keys_find(const ldd_keys* keys, uint32_t kind, uint64_t id, uint64_t model_id) noexcept nogil:
    cdef uint32_t hash = _hash(kind, id, model_id)
    cdef uint32_t mask = keys.mask, at = hash & mask, distance = 0
    cdef const ldd_cell* cell
    cdef const ldd_key* entry
    if keys.cells == NULL:
        return LDD_NO_KEY
    while True:
        cell = &keys.cells[at]
        if cell.key == LDD_NO_KEY or ((at - cell.hash) & mask) < distance:
            return LDD_NO_KEY
        if cell.hash == hash:
            entry = &keys.entries[cell.key]
            if entry.id == id and entry.model_id == model_id and entry.kind == kind:
                return cell.key
        at = (at + 1) & mask
        distance += 1


cdef uint32_t ldd_keys_find_shared(const uint64_t* cells, uint32_t mask, const ldd_shared_key* entries, uint32_t kind,
                                   uint64_t id, uint64_t model_id) noexcept nogil:
    cdef uint32_t hash = _hash(kind, id, model_id)
    cdef uint32_t at = hash & mask, distance, key
    cdef uint64_t cell
    for distance in range(mask):
        cell = ldd_get64(&cells[at])                # hash and key in one access, or they need not belong together
        key = <uint32_t>(cell >> 32)
        if key == LDD_NO_KEY or ((at - <uint32_t>cell) & mask) < distance:
            return LDD_NO_KEY
        if (<uint32_t>cell == hash and key < LDD_MAX_KEYS and ldd_get64(&entries[key].id) == id
                and ldd_get64(&entries[key].model_id) == model_id and ldd_get32(&entries[key].kind) == kind):
            return key
        at = (at + 1) & mask
    return LDD_NO_KEY


cdef uint32_t ldd_keys_add(ldd_keys* keys, uint32_t kind, uint64_t id, uint64_t model_id, uint32_t cache_slot,
                           uint32_t batch_slot) noexcept nogil:
    cdef uint32_t key = keys.first_free
    cdef ldd_key* entry
    if key != LDD_NO_KEY:
        entry = &keys.entries[key]
        keys.first_free = entry.cache_slot
    else:
        key = keys.num_entries
        keys.num_entries += 1
        entry = &keys.entries[key]
        entry.generation = 0
    entry.id = id
    entry.model_id = model_id
    entry.kind = kind
    entry.cache_slot = cache_slot
    entry.batch_slot = batch_slot
    entry.generation += 1
    keys.num_keys += 1
    if key >= LDD_MAX_KEYS:
        ldd_keys_share(keys, NULL, NULL)
    if keys.shared_keys != NULL:
        _show(&keys.shared_keys[key], entry)
    _place(keys.cells, keys.shared_cells, keys.mask, _hash(kind, id, model_id), key)
    return key


cdef void ldd_keys_remove(ldd_keys* keys, uint32_t key) noexcept nogil:
    cdef ldd_key* entry = &keys.entries[key]
    cdef uint32_t mask = keys.mask
    cdef uint32_t at = _hash(entry.kind, entry.id, entry.model_id) & mask, next
    while keys.cells[at].key != key:
        at = (at + 1) & mask
    while True:                                     # move followers home until one is there already
        next = (at + 1) & mask
        if keys.cells[next].key == LDD_NO_KEY or ((next - keys.cells[next].hash) & mask) == 0:
            break
        _set_cell(keys.cells, keys.shared_cells, at, keys.cells[next])
        at = next
    _set_cell(keys.cells, keys.shared_cells, at, _EMPTY)
    entry.generation += 1
    entry.cache_slot = keys.first_free
    keys.first_free = key
    keys.num_keys -= 1


cdef uint32_t ldd_keys_max_probe(const ldd_keys* keys) noexcept nogil:
    cdef uint32_t longest = 0, at
    if keys.cells == NULL:
        return 0
    for at in range(keys.mask + 1):
        if keys.cells[at].key != LDD_NO_KEY:
            longest = max(longest, ((at - keys.cells[at].hash) & keys.mask) + 1)
    return longest


cdef uint64_t ldd_keys_bytes(const ldd_keys* keys) noexcept nogil:
    cdef uint64_t num_cells = <uint64_t>keys.mask + 1 if keys.cells != NULL else 0
    cdef uint64_t nbytes = num_cells * sizeof(ldd_cell) + <uint64_t>keys.entry_capacity * sizeof(ldd_key)
    if keys.shared_cells != NULL:
        nbytes += num_cells * sizeof(uint64_t) + <uint64_t>keys.num_entries * sizeof(ldd_shared_key)
    return nbytes


cdef inline uint32_t _hash(uint32_t kind, uint64_t id, uint64_t model_id) noexcept nogil:
    """Mix all three: ids count up, model ids differ in few bits, and cells are picked by the low bits."""
    cdef uint64_t x = (id ^ (id >> 32)) * <uint64_t>0x9E3779B97F4A7C15
    x ^= x >> 29
    x += model_id * <uint64_t>0xBF58476D1CE4E5B9 + kind * <uint64_t>0x94D049BB133111EB
    x ^= x >> 32
    x *= <uint64_t>0xD6E8FEB86659FD93
    return <uint32_t>(x >> 32)


cdef inline void _set_cell(ldd_cell* cells, uint64_t* shared, uint32_t at, ldd_cell cell) noexcept nogil:
    cells[at] = cell
    if shared != NULL:
        ldd_set64(&shared[at], ldd_shared_cell(cell.hash, cell.key))


cdef inline void _show(ldd_shared_key* at, const ldd_key* entry) noexcept nogil:
    cdef ldd_shared_key key
    key.id = entry.id
    key.model_id = entry.model_id
    key.kind = entry.kind
    key.generation = entry.generation
    key.cache_slot = entry.cache_slot
    key.batch_slot = entry.batch_slot
    ldd_shared_key_write(at, &key)


cdef void _place(ldd_cell* cells, uint64_t* shared, uint32_t mask, uint32_t hash, uint32_t key) noexcept nogil:
    """Put a cell where it belongs: whoever is closer to home makes room."""
    cdef ldd_cell moving, other
    cdef uint32_t at = hash & mask, distance = 0, others
    moving.hash = hash
    moving.key = key
    while cells[at].key != LDD_NO_KEY:
        others = (at - cells[at].hash) & mask
        if others < distance:
            other = cells[at]
            _set_cell(cells, shared, at, moving)
            moving = other
            distance = others
        at = (at + 1) & mask
        distance += 1
    _set_cell(cells, shared, at, moving)


cdef ldd_status _rehash(ldd_keys* keys, uint64_t num_cells) noexcept nogil:
    cdef ldd_cell* cells
    cdef uint32_t mask = <uint32_t>(num_cells - 1), at
    if num_cells - 1 > UINT32_MAX >> 1:
        return LDD_E_NO_MEMORY
    cells = <ldd_cell*>malloc(num_cells * sizeof(ldd_cell))
    if cells == NULL:
        return LDD_E_NO_MEMORY
    memset(cells, 0xff, num_cells * sizeof(ldd_cell))       # LDD_NO_KEY everywhere
    if keys.cells != NULL:
        for at in range(keys.mask + 1):
            if keys.cells[at].key != LDD_NO_KEY:
                _place(cells, NULL, mask, keys.cells[at].hash, keys.cells[at].key)
    free(keys.cells)
    if num_cells > LDD_MAX_CELLS:
        ldd_keys_share(keys, NULL, NULL)
    if keys.shared_cells != NULL:
        for at in range(mask + 1):
            ldd_set64(&keys.shared_cells[at], ldd_shared_cell(cells[at].hash, cells[at].key))
    keys.cells = cells
    keys.mask = mask
    return LDD_OK
