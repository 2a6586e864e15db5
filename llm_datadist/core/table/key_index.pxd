"""Index of cache keys: from (kind, id, model id) to a cache slot; see ``key_index.pyx``."""
from libc.stdint cimport uint32_t, uint64_t

from llm_datadist.core.base.status cimport ldd_status
from llm_datadist.core.table.shared_table cimport ldd_shared_key

cdef enum:
    KEY_REQ = 0
    KEY_PREFIX = 1
    KEY_BLOCKS = 2
    KEY_BY_ID = 3

cdef extern from *:
    """
    #define LDD_NO_KEY UINT32_MAX
    """
    const uint32_t LDD_NO_KEY

ctypedef struct ldd_key:
    uint64_t id
    uint64_t model_id
    uint32_t kind
    uint32_t cache_slot         # free entry: next free entry
    uint32_t batch_slot
    uint32_t generation         # odd while in use

ctypedef struct ldd_cell:
    uint32_t hash
    uint32_t key                # index into ldd_keys.entries; LDD_NO_KEY: empty

ctypedef struct ldd_keys:
    ldd_cell* cells             # Robin Hood hashing, power of two; NULL before the first key
    uint32_t mask
    uint32_t num_keys
    ldd_key* entries
    uint32_t num_entries        # entries ever used
    uint32_t entry_capacity
    uint32_t first_free
    # Copies of cells and entries that peers read. NULL: nobody does, or there are more than fit.
    uint64_t* shared_cells
    ldd_shared_key* shared_keys

# No locking: the cache table calls these under its mutex. A zeroed ldd_keys with first_free = LDD_NO_KEY is empty.
cdef void ldd_keys_init(ldd_keys* keys) noexcept nogil
# Keep copies for peers in given, zeroed memory, LDD_MAX_CELLS and LDD_MAX_KEYS long. Right after ldd_keys_init.
cdef void ldd_keys_share(ldd_keys* keys, uint64_t* cells, ldd_shared_key* entries) noexcept nogil
# The search over such copies, which another process changes meanwhile: bounded, never outside them.
cdef uint32_t ldd_keys_find_shared(const uint64_t* cells, uint32_t mask, const ldd_shared_key* entries, uint32_t kind,
                                   uint64_t id, uint64_t model_id) noexcept nogil
cdef void ldd_keys_destroy(ldd_keys* keys) noexcept nogil
# Make room for `count` more keys, so that as many ldd_keys_add cannot fail. LDD_E_NO_MEMORY: nothing changed.
cdef ldd_status ldd_keys_reserve(ldd_keys* keys, uint32_t count) noexcept nogil
# Index of the key, or LDD_NO_KEY.
cdef uint32_t ldd_keys_find(const ldd_keys* keys, uint32_t kind, uint64_t id, uint64_t model_id) noexcept nogil
# Add a key that is not there, into reserved room; returns its index.
cdef uint32_t ldd_keys_add(ldd_keys* keys, uint32_t kind, uint64_t id, uint64_t model_id, uint32_t cache_slot,
                           uint32_t batch_slot) noexcept nogil
# Remove it; every handle to it goes stale.
cdef void ldd_keys_remove(ldd_keys* keys, uint32_t key) noexcept nogil
cdef uint32_t ldd_keys_max_probe(const ldd_keys* keys) noexcept nogil
cdef uint64_t ldd_keys_bytes(const ldd_keys* keys) noexcept nogil
