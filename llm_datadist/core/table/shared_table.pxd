"""The cache table as peers on this host see it: memory they map, and who writes what; see ``docs/protocol.md``.

Every field here is read or written by another process at any time: by ``base.atomic`` alone, whole fields, in the order
that the page gives. Nothing the owner acts on lies here.
"""
from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint32_t, uint64_t

from llm_datadist.core.base.atomic cimport (
    ldd_fence, ldd_get32, ldd_get64, ldd_load64, ldd_set32, ldd_set64, ldd_store64,
)
from llm_datadist.core.base.status cimport ldd_detail, ldd_status

cdef extern from * nogil:
    """
    #ifndef LDD_SHARED_TABLE_LIMITS
    #define LDD_SHARED_TABLE_LIMITS
    /* Address space only: the files are sparse, and pages are taken when they are first used. */
    #define LDD_MAX_KEYS (1u << 21)
    #define LDD_MAX_CELLS (1u << 22)
    #define LDD_MAX_CACHES (1u << 19)
    #define LDD_LANE_RING 256
    #define LDD_CACHE_LINE 64
    /* In place of the mask of a table that peers can look up nothing in. */
    #define LDD_NOT_SHARED UINT32_MAX
    #endif
    """
    const uint32_t LDD_MAX_KEYS
    const uint32_t LDD_MAX_CELLS
    const uint32_t LDD_MAX_CACHES
    const uint32_t LDD_NOT_SHARED
    enum:
        LDD_LANE_RING
        LDD_CACHE_LINE

cdef enum:
    LDD_SHOWN_PUBLISHED = 1
    LDD_SHOWN_OWNED = 2
    LDD_SHOWN_BLOCKS = 4
    LDD_SHOWN_HOST = 8
    LDD_SHOWN_REMOTE_ACCESSIBLE = 16
    LDD_SHOWN_OPEN = 32                         # not deallocated; for whoever watches, peers do not care
    LDD_SHOWN_DTYPE_SHIFT = 8                   # from this bit on: the data type, as in ldd_tensor_desc

# What a reader needs of a key; the owner's own record is ldd_key.
ctypedef struct ldd_shared_key:
    uint64_t id
    uint64_t model_id
    uint32_t kind
    uint32_t generation
    uint32_t cache_slot
    uint32_t batch_slot

# What a reader needs of a cache; the owner's own record is ldd_cache. Fills a cache line.
ctypedef struct ldd_shared_cache:
    uint64_t cache_id
    uint64_t num_slots
    uint64_t tensor_bytes
    uint64_t step                               # distance of tensors; 0: only the owner knows their addresses
    uint64_t base                               # of the first tensor; peers select among regions by it
    uint32_t generation
    uint32_t num_tensors
    uint32_t num_keys
    uint32_t flags                              # LDD_SHOWN_*, and the data type
    uint64_t born_ns                            # when it was allocated or registered; for whoever watches

# Start of the table's file; peers map it read-only, and nobody but the owner's first mapping can write it. The owner
# alone writes: `seq` is odd while it changes anything behind it.
ctypedef struct ldd_shared_head:
    uint64_t magic                              # the layout of everything here, see _layout
    uint64_t seq
    uint64_t region_epoch
    uint32_t mask                               # of the cells; LDD_NOT_SHARED: ask the owner

# One file that all peers of an owner write: it tells the owner to look, and readers that a key may be gone.
ctypedef struct ldd_release_marks:
    uint64_t doorbell
    char apart[56]                              # one is written by every release, the others are read by every pull
    uint32_t marks[1]                           # LDD_MAX_KEYS in truth: the generation in which a key was released

ctypedef struct ldd_lane_entry:
    uint32_t key_index
    uint32_t key_generation

# One file per link. The peer writes the first line and the ring, the owner the second line.
ctypedef struct ldd_lane:
    uint64_t hazard                             # generation << 32 | slot + 1 of a cache the peer touches; 0: none
    uint32_t ring_head                          # entries ever written
    char apart[52]
    uint32_t ring_tail                          # entries the owner has taken in
    uint32_t closed                             # the owner heeds this lane no longer: what its hazard kept may be gone
    char apart_too[56]
    ldd_lane_entry ring[LDD_LANE_RING]          # keys the peer has released

# The owner's mappings, or a reader's. head NULL: the table is not shared.
ctypedef struct ldd_shared_table:
    ldd_shared_head* head
    uint64_t* cells                             # LDD_MAX_CELLS, see ldd_shared_cell
    ldd_shared_key* keys                        # LDD_MAX_KEYS
    ldd_shared_cache* caches                    # LDD_MAX_CACHES
    ldd_release_marks* marks
    int table_fd                                # of the owner, for peers
    int marks_fd

# A peer's table as one link reads it.
ctypedef struct ldd_shared_reader:
    ldd_shared_table shared
    ldd_lane* lane
    uint32_t key_index                          # of the pinned cache
    uint32_t key_generation
    int64_t known_id                            # cache whose addresses are in known_addrs
    uint32_t known_count
    uint64_t* known_addrs

# Without what it takes (memory files that can be sealed against later writers, address space, /proc) the table is not
# shared: head stays NULL, which is no failure.
cdef void ldd_shared_table_create(ldd_shared_table* shared) noexcept nogil
cdef size_t ldd_shared_table_bytes() noexcept nogil
cdef void ldd_shared_table_destroy(ldd_shared_table* shared) noexcept nogil
# Map files that came from a peer, after checking that they are what they should be and cannot shrink.
cdef ldd_status ldd_shared_table_map(ldd_shared_table* shared, int table_fd, int marks_fd,
                                     ldd_detail* detail) noexcept nogil
cdef ldd_lane* ldd_lane_create(int* fd) noexcept nogil
cdef ldd_lane* ldd_lane_map(int fd) noexcept nogil
cdef void ldd_lane_unmap(ldd_lane* lane) noexcept nogil
# Unmap everything; NULL is allowed.
cdef void ldd_reader_free(ldd_shared_reader* reader) noexcept nogil

# The sequence, around every change of what readers see. Orders: docs/protocol.md, "The sequence" and "Hazards".
cdef inline void ldd_seq_begin(uint64_t* seq) noexcept nogil:
    ldd_set64(seq, ldd_get64(seq) + 1)
    ldd_fence()


cdef inline void ldd_seq_end(uint64_t* seq) noexcept nogil:
    ldd_store64(seq, ldd_get64(seq) + 1)


cdef inline uint64_t ldd_seq_read(const uint64_t* seq) noexcept nogil:
    return ldd_load64(seq)


cdef inline bint ldd_seq_unchanged(const uint64_t* seq, uint64_t before) noexcept nogil:
    ldd_fence()
    return ldd_get64(seq) == before


cdef inline uint64_t ldd_shared_cell(uint32_t hash, uint32_t key) noexcept nogil:
    return <uint64_t>key << 32 | hash


cdef inline void ldd_shared_key_write(ldd_shared_key* at, const ldd_shared_key* key) noexcept nogil:
    ldd_set64(&at.id, key.id)
    ldd_set64(&at.model_id, key.model_id)
    ldd_set32(&at.kind, key.kind)
    ldd_set32(&at.generation, key.generation)
    ldd_set32(&at.cache_slot, key.cache_slot)
    ldd_set32(&at.batch_slot, key.batch_slot)


cdef inline void ldd_shared_key_read(const ldd_shared_key* at, ldd_shared_key* key) noexcept nogil:
    key.id = ldd_get64(&at.id)
    key.model_id = ldd_get64(&at.model_id)
    key.kind = ldd_get32(&at.kind)
    key.generation = ldd_get32(&at.generation)
    key.cache_slot = ldd_get32(&at.cache_slot)
    key.batch_slot = ldd_get32(&at.batch_slot)


cdef inline void ldd_shared_cache_write(ldd_shared_cache* at, const ldd_shared_cache* cache) noexcept nogil:
    ldd_set64(&at.cache_id, cache.cache_id)
    ldd_set64(&at.num_slots, cache.num_slots)
    ldd_set64(&at.tensor_bytes, cache.tensor_bytes)
    ldd_set64(&at.step, cache.step)
    ldd_set64(&at.base, cache.base)
    ldd_set32(&at.generation, cache.generation)
    ldd_set32(&at.num_tensors, cache.num_tensors)
    ldd_set32(&at.num_keys, cache.num_keys)
    ldd_set32(&at.flags, cache.flags)
    ldd_set64(&at.born_ns, cache.born_ns)


cdef inline void ldd_shared_cache_read(const ldd_shared_cache* at, ldd_shared_cache* cache) noexcept nogil:
    cache.cache_id = ldd_get64(&at.cache_id)
    cache.num_slots = ldd_get64(&at.num_slots)
    cache.tensor_bytes = ldd_get64(&at.tensor_bytes)
    cache.step = ldd_get64(&at.step)
    cache.base = ldd_get64(&at.base)
    cache.generation = ldd_get32(&at.generation)
    cache.num_tensors = ldd_get32(&at.num_tensors)
    cache.num_keys = ldd_get32(&at.num_keys)
    cache.flags = ldd_get32(&at.flags)
