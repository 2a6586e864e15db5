"""The cache table as peers on this host see it: shared memory to look up, pin and release without a round trip."""
from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from llm_datadist.core.base.status cimport ldd_detail, ldd_status

cdef extern from * nogil:
    """
    #ifndef LDD_SHARED_TABLE_LIMITS
    #define LDD_SHARED_TABLE_LIMITS
    /* Address space only: the files are sparse, and pages are taken when they are first used. */
    #define LDD_MAX_KEYS (1u << 21)
    #define LDD_MAX_CELLS (1u << 22)
    #define LDD_MAX_CACHES (1u << 19)
    #define LDD_LANE_HAZARDS 8
    #define LDD_LANE_RING 256
    #endif
    """
    const uint32_t LDD_MAX_KEYS
    const uint32_t LDD_MAX_CELLS
    const uint32_t LDD_MAX_CACHES
    enum:
        LDD_LANE_HAZARDS
        LDD_LANE_RING

# Start of the table's file; peers map it read-only. `seq` is odd while the owner changes anything behind it.
ctypedef struct ldd_shared_head:
    uint64_t magic                              # layout of everything below, so that builds that differ do not meet
    uint64_t seq
    uint32_t which_cells
    uint32_t mask
    uint64_t region_epoch

# One file that all peers of an owner may write: it tells the owner to look, and says which keys are gone.
ctypedef struct ldd_release_marks:
    uint64_t doorbell
    uint32_t marks[1]                           # LDD_MAX_KEYS in truth: the generation in which a key was released

ctypedef struct ldd_lane_entry:
    uint32_t key_index
    uint32_t key_generation

# One file per link that its peer may write.
ctypedef struct ldd_lane:
    uint64_t hazards[LDD_LANE_HAZARDS]          # generation << 32 | slot + 1 of a cache the peer touches; 0: none
    uint32_t ring_head                          # entries ever written
    uint32_t ring_tail                          # entries the owner has taken in
    ldd_lane_entry ring[LDD_LANE_RING]          # keys the peer has released
    uint32_t closed                             # the owner heeds this lane no longer: what a hazard kept may be gone

# The owner's mappings. All NULL where the kernel has no memfd: then there is no sharing, only the table.
ctypedef struct ldd_shared_table:
    ldd_shared_head* head
    void* cells[2]                              # ldd_cell[LDD_MAX_CELLS] each
    void* entries                               # ldd_key[LDD_MAX_KEYS]
    void* caches                                # ldd_cache[LDD_MAX_CACHES]
    ldd_release_marks* marks
    size_t cache_bytes
    int table_fd                                # a read-only descriptor, for peers
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

cdef ldd_status ldd_shared_table_create(ldd_shared_table* board, size_t cell_bytes, size_t key_bytes,
                                        size_t cache_bytes,
                                 ldd_detail* detail) noexcept nogil
cdef void ldd_shared_table_destroy(ldd_shared_table* board) noexcept nogil
# Map files that came from a peer, after checking that they are what they should be and cannot shrink.
cdef ldd_status ldd_shared_table_map(ldd_shared_table* board, int table_fd, int marks_fd, size_t cell_bytes,
                                     size_t key_bytes,
                              size_t cache_bytes, ldd_detail* detail) noexcept nogil
cdef ldd_lane* ldd_lane_create(int* fd) noexcept nogil
cdef ldd_lane* ldd_lane_map(int fd) noexcept nogil
cdef void ldd_lane_unmap(ldd_lane* lane) noexcept nogil
# Unmap everything; NULL is allowed.
cdef void ldd_reader_free(ldd_shared_reader* reader) noexcept nogil

# Around every change of what peers read.
cdef extern from * nogil:
    """
    #ifndef LDD_BOARD_SEQ
    #define LDD_BOARD_SEQ
    #include <stdint.h>
    static inline void ldd_seq_begin(uint64_t *seq) {
        __atomic_store_n(seq, *seq + 1, __ATOMIC_RELAXED);
        __atomic_thread_fence(__ATOMIC_SEQ_CST);    /* before the changes, and before hazards are read */
    }
    static inline void ldd_seq_end(uint64_t *seq) { __atomic_store_n(seq, *seq + 1, __ATOMIC_RELEASE); }
    static inline uint64_t ldd_seq_read(const uint64_t *seq) { return __atomic_load_n(seq, __ATOMIC_ACQUIRE); }
    /* Whether nothing changed since `before` was read; also orders an own store against a later look of the owner. */
    static inline int ldd_seq_unchanged(const uint64_t *seq, uint64_t before) {
        __atomic_thread_fence(__ATOMIC_SEQ_CST);
        return __atomic_load_n(seq, __ATOMIC_RELAXED) == before;
    }
    static inline uint64_t ldd_load64(const uint64_t *at) { return __atomic_load_n(at, __ATOMIC_SEQ_CST); }
    static inline uint32_t ldd_load32(const uint32_t *at) { return __atomic_load_n(at, __ATOMIC_ACQUIRE); }
    /* After everything that was read or written before. */
    static inline uint32_t ldd_load32_last(const uint32_t *at) {
        __atomic_thread_fence(__ATOMIC_SEQ_CST);
        return __atomic_load_n(at, __ATOMIC_RELAXED);
    }
    static inline void ldd_store64(uint64_t *at, uint64_t value) { __atomic_store_n(at, value, __ATOMIC_SEQ_CST); }
    static inline void ldd_store32(uint32_t *at, uint32_t value) { __atomic_store_n(at, value, __ATOMIC_RELEASE); }
    static inline void ldd_ring(uint64_t *bell) { __atomic_add_fetch(bell, 1, __ATOMIC_SEQ_CST); }
    static inline int ldd_claim32(uint32_t *at, uint32_t before, uint32_t after) {
        return __atomic_compare_exchange_n(at, &before, after, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
    }
    #endif
    """
    void ldd_seq_begin(uint64_t* seq)
    void ldd_seq_end(uint64_t* seq)
    uint64_t ldd_seq_read(const uint64_t* seq)
    bint ldd_seq_unchanged(const uint64_t* seq, uint64_t before)
    uint64_t ldd_load64(const uint64_t* at)
    uint32_t ldd_load32(const uint32_t* at)
    uint32_t ldd_load32_last(const uint32_t* at)
    void ldd_store64(uint64_t* at, uint64_t value)
    void ldd_store32(uint32_t* at, uint32_t value)
    void ldd_ring(uint64_t* bell)
    bint ldd_claim32(uint32_t* at, uint32_t before, uint32_t after)
