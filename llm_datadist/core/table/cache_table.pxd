"""Caches, their keys and their pins: what a peer may find here and how long it lives; see ``cache_table.pyx``."""
from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from llm_datadist.core.base.status cimport ldd_detail, ldd_status
from llm_datadist.core.base.tensor_desc cimport ldd_tensor_desc
from llm_datadist.core.table.cache_life cimport (
    LDD_CACHE_BLOCKS, LDD_CACHE_HOST, LDD_CACHE_LAST_KEY_WINS, LDD_CACHE_REMOTE, ldd_cache_view, ldd_key_spec,
    ldd_table,
)
from llm_datadist.core.table.pool cimport ldd_pool
from llm_datadist.core.table.shared_table cimport ldd_lane

ctypedef struct ldd_table_counts:
    uint64_t num_owned
    uint64_t num_registered
    uint64_t num_keys
    uint64_t num_pins
    uint64_t num_deferred           # handle gone, kept by keys or pins
    uint64_t num_expired            # request keys whose lease ended
    uint64_t owned_bytes            # num_tensors * tensor_bytes, without page rounding
    uint64_t registered_bytes
    uint64_t max_probe              # longest search of the key index, in cells; costs a pass over it
    uint64_t key_bytes              # memory held for keys

ctypedef struct ldd_cache_row:
    int64_t cache_id
    uint64_t bytes
    uint32_t num_tensors
    uint32_t num_keys
    uint32_t pins
    uint8_t owned
    uint8_t is_blocks
    uint8_t handle_ref
    uint8_t published
    int64_t age_ns
    int64_t lease_ns                # what is left of it; LDD_NEVER: it has none

# Every function may be called from any thread, with or without the GIL. A deadline (CLOCK_MONOTONIC, ns) bounds the
# wait for the table's mutex; LDD_E_TIMEOUT then means nothing was changed. All hold the mutex for well under the time
# of a system call, and none waits for a peer with it. The table's mutex comes before a pool's.

cdef ldd_status ldd_table_create(ldd_table** out, ldd_detail* detail) noexcept nogil
# Free all that the table holds; call ldd_table_clear first. Calls that come later find it empty.
cdef void ldd_table_close(ldd_table* table) noexcept nogil
# Close it, and free the table itself: nobody may call any more. NULL is allowed.
cdef void ldd_table_destroy(ldd_table* table) noexcept nogil

# New owned cache. addrs (num_tensors, may be NULL) receives a copy; `described` NULL says nothing of what it holds. On
# failure nothing is bound and nothing taken.
# LDD_E_PARAM: no pool, zero sizes, slot outside the cache, equal keys in one call (unless LAST_KEY_WINS), a key bound
# to another live cache. LDD_E_NO_MEMORY: the pool's text.
cdef ldd_status ldd_table_allocate(ldd_table* table, ldd_pool* pool, uint32_t num_tensors, uint64_t num_slots,
                                   uint64_t tensor_bytes, uint32_t flags, const ldd_tensor_desc* described,
                                   const ldd_key_spec* keys, uint32_t num_keys, int64_t* cache_id, uint64_t* addrs,
                                   int64_t deadline_ns, ldd_detail* detail) noexcept nogil
# New registered cache over the caller's memory. A KEY_BLOCKS bound elsewhere moves here; other keys bound elsewhere
# stay where they are.
cdef ldd_status ldd_table_register(ldd_table* table, const uint64_t* addrs, uint32_t num_tensors, uint64_t num_slots,
                                   uint64_t tensor_bytes, uint32_t flags, const ldd_tensor_desc* described,
                                   const ldd_key_spec* keys, uint32_t num_keys, int64_t* cache_id,
                                   int64_t deadline_ns, ldd_detail* detail) noexcept nogil
# The handle of an owned cache is gone: free at once, or when the last key and pin are. Unknown, already deallocated
# and registered ids: LDD_OK without effect.
cdef ldd_status ldd_table_deallocate(ldd_table* table, int64_t cache_id, int64_t deadline_ns,
                                     ldd_detail* detail) noexcept nogil
# Unpublish a registered cache and wait until no pin is left. LDD_E_TIMEOUT: unpublished, still pinned (or the mutex
# was busy and nothing happened); call again. Unknown and owned ids: LDD_OK without effect.
cdef ldd_status ldd_table_unregister(ldd_table* table, int64_t cache_id, int64_t deadline_ns,
                                     ldd_detail* detail) noexcept nogil
# Unbind a key. Unknown keys: LDD_OK without effect.
cdef ldd_status ldd_table_remove_key(ldd_table* table, uint32_t kind, uint64_t id, uint64_t model_id,
                                     int64_t deadline_ns, ldd_detail* detail) noexcept nogil

# Find by key, or by id (kind KEY_BY_ID: id is the cache id, model_id is ignored), and pin. batch_index counts for
# KEY_BY_ID alone. LDD_E_NOT_EXIST names what is missing.
cdef ldd_status ldd_table_resolve(ldd_table* table, uint32_t kind, uint64_t id, uint64_t model_id,
                                  uint64_t batch_index, ldd_cache_view* view, ldd_detail* detail) noexcept nogil
# Pin by id for a local operation. LDD_E_NOT_EXIST once the cache is freed, or waits for nothing but its pins.
cdef ldd_status ldd_table_pin_local(ldd_table* table, int64_t cache_id, ldd_cache_view* view,
                                    ldd_detail* detail) noexcept nogil
# Pin the cache one of whose tensors contains [addr, addr + num_bytes); view.tensor and view.offset say where.
# LDD_E_PARAM names the address when there is none. Reads the bounds of every live cache.
cdef ldd_status ldd_table_pin_range(ldd_table* table, uint64_t addr, uint64_t num_bytes, ldd_cache_view* view,
                                    ldd_detail* detail) noexcept nogil
# One more pin on a cache that is pinned, described in `view` unless that is NULL; False when it is not, or gone.
cdef bint ldd_table_repin(ldd_table* table, uint32_t slot, uint32_t generation, ldd_cache_view* view) noexcept nogil
# Drop one pin; the last one of an unpublished cache frees it. A stale (slot, generation) is a no-op.
cdef void ldd_table_unpin(ldd_table* table, uint32_t slot, uint32_t generation) noexcept nogil
# A pull of tensors [first_tensor, first_tensor + num_tensors) succeeded: release the key when all were taken. A stale
# key is a no-op, so is LDD_NO_KEY. LDD_E_PARAM: range outside the cache. LDD_E_NO_MEMORY: nothing was marked.
cdef ldd_status ldd_table_take(ldd_table* table, uint32_t key_index, uint32_t key_generation, uint32_t first_tensor,
                               uint32_t num_tensors) noexcept nogil

# A peer has all bytes of a pinned cache, and nobody reads them here any more: release the key (LDD_NO_KEY: none) and
# drop the pin, so that nobody sees the one without the other. What is stale is left alone.
cdef void ldd_table_settle(ldd_table* table, uint32_t slot, uint32_t generation, uint32_t key_index,
                           uint32_t key_generation) noexcept nogil

# Free everything, waiting for pins. LDD_E_TIMEOUT names a pinned cache; all is unpublished by then, call again.
cdef ldd_status ldd_table_clear(ldd_table* table, int64_t deadline_ns, ldd_detail* detail) noexcept nogil
cdef void ldd_table_stats(ldd_table* table, ldd_table_counts* counts) noexcept nogil
# Up to capacity rows; returns the number of live caches.
cdef size_t ldd_table_snapshot(ldd_table* table, ldd_cache_row* rows, size_t capacity) noexcept nogil

# A link's peer may read the shared table and write this lane from now on; afterwards its hazards and releases count.
cdef ldd_status ldd_table_add_lane(ldd_table* table, ldd_lane* lane) noexcept nogil
# The peer is gone: take in what it released, and forget its hazards.
cdef void ldd_table_remove_lane(ldd_table* table, ldd_lane* lane) noexcept nogil
# Around changes that peers read, with the mutex held.
cdef void ldd_table_begin(ldd_table* table) noexcept nogil
cdef void ldd_table_end(ldd_table* table) noexcept nogil
# Do what peers have left to be done, as every other call does first.
cdef void ldd_table_take_in(ldd_table* table) noexcept nogil
cdef void ldd_table_set_epoch(ldd_table* table, uint64_t region_epoch) noexcept nogil
