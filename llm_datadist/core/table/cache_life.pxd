"""What a cache table is made of, and the life of one cache in it; see ``cache_life.pyx``."""
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from llm_datadist.core.base.status cimport ldd_detail, ldd_status
from llm_datadist.core.base.sync cimport ldd_cond, ldd_mutex
from llm_datadist.core.base.tensor_desc cimport ldd_tensor_desc
from llm_datadist.core.record.record cimport ldd_record
from llm_datadist.core.table.key_index cimport ldd_keys
from llm_datadist.core.table.pool cimport ldd_pool, ldd_span
from llm_datadist.core.table.shared_table cimport ldd_lane, ldd_shared_table

cdef enum:
    LDD_CACHE_BLOCKS = 1            # slots are blocks; batch size counts as 1
    LDD_CACHE_HOST = 2              # placement
    LDD_CACHE_REMOTE = 4            # remote accessible
    LDD_CACHE_LAST_KEY_WINS = 8     # first generation: of equal keys in one call the last one counts
    LDD_MAX_EXPIRED = 256           # keys that wait to be logged

# A key to bind. Padding keys never get here; the caller has compared the length of the whole list with num_slots.
ctypedef struct ldd_key_spec:
    uint32_t slot                   # batch slot; 0 for KEY_BLOCKS
    uint32_t kind                   # KEY_REQ, KEY_PREFIX or KEY_BLOCKS
    uint64_t id                     # 2**64-1 for KEY_BLOCKS
    uint64_t model_id

# A pinned cache. Valid until ldd_table_unpin(slot, generation); addrs is neither moved nor freed before that.
ctypedef struct ldd_cache_view:
    int64_t cache_id
    uint32_t slot
    uint32_t generation
    uint32_t num_tensors
    uint32_t tensor                 # ldd_table_pin_range: the tensor that contains the range
    uint64_t offset                 # ... and where in it, bytes
    uint64_t batch_index            # the slot a key is bound to, or the index asked for
    uint64_t num_slots              # shape[0]
    uint64_t tensor_bytes
    uint64_t stride                 # tensor_bytes // num_slots
    uint64_t step                   # distance of consecutive tensors when it is constant and positive, otherwise 0
    const uint64_t* addrs           # num_tensors
    const ldd_tensor_desc* described    # lives as long as addrs
    uint32_t key_index              # releasable key, for ldd_table_take; LDD_NO_KEY when a pull releases nothing
    uint32_t key_generation
    uint32_t key_kind               # KEY_REQ, KEY_PREFIX, KEY_BLOCKS; KEY_BY_ID when the slot has no key
    uint8_t owned
    uint8_t is_blocks
    uint8_t host
    uint8_t remote_accessible

# The owner's own record, which no peer sees; ldd_shared_cache is what is shown of it.
ctypedef struct ldd_cache:
    int64_t cache_id                # 0: free slot
    uint32_t generation
    uint32_t pins
    uint32_t num_keys               # keys in the index that lead here
    uint32_t num_refs               # those that keep the memory: req and prefix keys of owned contiguous caches
    uint8_t owned
    uint8_t is_blocks
    uint8_t host
    uint8_t remote_accessible
    uint8_t handle_ref              # until deallocate or unregister
    uint8_t published               # may be found and pinned; once False it is freed with its last pin
    uint8_t awaits_readers          # only a peer's hazard keeps it
    int64_t lease_end_ns            # when its request keys expire; LDD_NEVER: not
    uint32_t num_tensors
    uint32_t num_key_slots
    uint64_t num_slots
    uint64_t tensor_bytes
    uint64_t step
    uint64_t* addrs                 # one block: addrs[num_tensors], then `described`, then slot_keys[num_key_slots]
    ldd_tensor_desc* described
    uint32_t* slot_keys             # batch slot -> key index
    uint64_t* taken                 # per key slot: how many tensors layered pulls took, and a bit for each; NULL: none
    ldd_pool* pool
    ldd_span span
    uint32_t link                   # live: position in ldd_table.ranges; free: next free slot
    int64_t born_ns                 # when it was published

# A peer's lane, and how far its ring was read.
ctypedef struct ldd_lane_reader:
    ldd_lane* lane
    uint32_t tail

# A request key that expired.
ctypedef struct ldd_expired:
    int64_t cache_id
    uint64_t id
    uint64_t model_id
    uint64_t bytes                  # of the cache
    int64_t age_ns                  # since the cache was allocated

# Address bounds of a live cache, kept dense so that ldd_table_pin_range reads little.
ctypedef struct ldd_range:
    uint64_t first
    uint64_t last                   # inclusive, so the end of the address space needs no special case
    uint32_t slot

ctypedef struct ldd_table:
    ldd_mutex mutex
    ldd_cond drained                # some unpublished cache went away
    ldd_keys keys
    ldd_cache* caches
    uint32_t cache_capacity
    uint32_t first_free
    ldd_range* ranges
    uint32_t num_caches
    uint32_t num_owned
    uint32_t num_deferred
    uint64_t num_pins
    uint64_t owned_bytes
    uint64_t registered_bytes
    int64_t next_id
    ldd_record* record              # of the engine; NULL: without one
    ldd_shared_table shared         # what peers on this host see of all this
    ldd_lane_reader* lanes
    uint32_t num_lanes
    uint32_t lane_capacity
    uint32_t* retired               # slots
    uint32_t num_retired
    uint32_t retired_capacity
    const uint64_t* doorbell        # what peers ring
    uint64_t seen_doorbell
    int lease_fd                    # a timer: readable when a lease may have ended; see leases.pyx
    int64_t next_lease_ns           # no lease ends before
    uint64_t num_expired
    ldd_expired[LDD_MAX_EXPIRED] waiting
    uint32_t num_waiting
    bint leases_ended
    bint closed                     # what there was is freed; calls that come too late find nothing
    ldd_cond expired                # there is something to log

cdef extern from *:
    """
    #define LDD_NO_SLOT UINT32_MAX
    """
    const uint32_t LDD_NO_SLOT

# Check what needs no lock and fill `cache`, with room for addresses and for keys by batch slot (free(cache.addrs)).
# `described` may be NULL: nothing is said.
cdef ldd_status ldd_cache_describe(ldd_cache* cache, uint32_t num_tensors, uint64_t num_slots, uint64_t tensor_bytes,
                                   uint32_t flags, const ldd_tensor_desc* described, const ldd_key_spec* keys,
                                   uint32_t num_keys, ldd_detail* detail) noexcept nogil

# The rest is called with the table's mutex held, and takes a pool's.

# Give a described cache a slot and bind its keys, or leave everything as it was; cache.addrs stays the caller's.
cdef ldd_status ldd_cache_enter(ldd_table* table, const ldd_cache* cache, const ldd_key_spec* keys, uint32_t num_keys,
                                uint32_t flags, uint32_t* slot, ldd_detail* detail) noexcept nogil
# Undo ldd_cache_enter before ldd_cache_publish.
cdef void ldd_cache_leave(ldd_table* table, uint32_t slot) noexcept nogil
# Addresses are in: give the cache its id and let it be found. It owns cache.addrs from now on.
cdef int64_t ldd_cache_publish(ldd_table* table, uint32_t slot) noexcept nogil
# The slot of a cache, a retired one too, or LDD_NO_SLOT.
cdef uint32_t ldd_cache_find(ldd_table* table, int64_t cache_id) noexcept nogil
# The handle is gone; without effect the second time. `force` drops the keys too.
cdef void ldd_cache_close(ldd_table* table, uint32_t slot, bint force) noexcept nogil
# Unbind a key and let go of what it kept.
cdef void ldd_cache_release_key(ldd_table* table, uint32_t key) noexcept nogil
# Pin a published cache and describe it, with the key of the batch slot if a pull of that releases it.
cdef void ldd_cache_pin(ldd_table* table, uint32_t slot, uint64_t batch_index, ldd_cache_view* view) noexcept nogil
cdef void ldd_cache_unpin(ldd_table* table, uint32_t slot) noexcept nogil
# Free a retired cache, unless somebody still touches it: the last pin, or ldd_cache_free_retired, comes back then.
cdef void ldd_cache_free_unused(ldd_table* table, uint32_t slot) noexcept nogil
# Free the retired that no hazard keeps any more.
cdef void ldd_cache_free_retired(ldd_table* table) noexcept nogil
# Mark a range of the tensors that the key of a batch slot leads to; 1 when all were taken by now, 0 when not,
# LDD_E_NO_MEMORY when nothing was marked.
cdef int ldd_cache_take(ldd_cache* cache, uint32_t batch_slot, uint32_t first, uint32_t count) noexcept nogil
# Whether a transfer here or a peer reads or writes it just now; between begin and end of a change.
cdef bint ldd_cache_is_touched(ldd_table* table, uint32_t slot) noexcept nogil
# How many hazards peers have out at this moment.
cdef uint64_t ldd_cache_count_hazards(ldd_table* table) noexcept nogil
# The tensor that contains [addr, last], or num_tensors.
cdef uint32_t ldd_cache_tensor_of(const ldd_cache* cache, uint64_t addr, uint64_t last) noexcept nogil

# Needs no lock. LDD_E_NOT_EXIST: a cache found by its id has no such slot.
cdef ldd_status ldd_cache_check_index(int64_t cache_id, bint is_blocks, uint64_t num_slots, uint64_t batch_index,
                                      ldd_detail* detail) noexcept nogil
cdef const char* ldd_kind_name(uint32_t kind) noexcept nogil
