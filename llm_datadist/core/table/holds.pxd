"""Blocks that are held for one request under a key of its own, and what became of such keys; see ``holds.pyx``."""
from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint32_t, uint64_t

from llm_datadist.core.base.status cimport ldd_detail, ldd_status
from llm_datadist.core.base.sync cimport ldd_mutex
from llm_datadist.core.record.record cimport ldd_record
from llm_datadist.core.table.key_index cimport ldd_keys

cdef enum:
    KEY_HOLD = 4                    # kind of these keys on the wire: id is the request, model id its generation

cdef enum ldd_hold_outcome:
    HOLD_OPEN                       # it stays
    HOLD_DONE                       # a peer moved the blocks and let go
    HOLD_RELEASED                   # a peer let go without
    HOLD_EXPIRED                    # nobody did in time
    HOLD_LOST                       # a peer went away while it moved them

# Beside the entry of its key in the index.
ctypedef struct ldd_hold:
    int64_t cache_id
    int64_t deadline_ns             # LDD_NEVER: without
    int64_t born_ns                 # when it was bound
    uint32_t readers                # peers that move its blocks at this moment

ctypedef struct ldd_hold_event:
    uint64_t request
    uint64_t generation
    uint32_t outcome

ctypedef struct ldd_holds:
    ldd_mutex mutex                 # a leaf lock
    ldd_keys keys
    ldd_hold* holds
    ldd_record* record              # of the engine
    uint32_t capacity
    int64_t next_deadline_ns        # no hold without readers ends before
    ldd_hold_event* events          # room for those that are in it and one for each hold, so that none is ever lost
    size_t num_events
    size_t event_capacity
    int fd                          # a timer: readable when there is an event to take

cdef void ldd_holds_init(ldd_holds* holds) noexcept nogil
cdef void ldd_holds_destroy(ldd_holds* holds) noexcept nogil
# Make a key, or give one that exists a new deadline. LDD_E_PARAM: it belongs to another cache.
cdef ldd_status ldd_holds_bind(ldd_holds* holds, uint64_t request, uint64_t generation, int64_t cache_id,
                               int64_t deadline_ns, ldd_detail* detail) noexcept nogil
# Withdraw a key without an event; whether there was one.
cdef bint ldd_holds_drop(ldd_holds* holds, uint64_t request, uint64_t generation) noexcept nogil
# A peer begins to move blocks: the cache, and a handle for ldd_holds_end. LDD_E_NOT_EXIST: there is no such key.
cdef ldd_status ldd_holds_begin(ldd_holds* holds, uint64_t request, uint64_t generation, int64_t* cache_id,
                                uint32_t* key, uint32_t* key_generation, ldd_detail* detail) noexcept nogil
# It is done. LDD_E_NOT_EXIST: the key was withdrawn meanwhile, so that what was read may be another request's.
cdef ldd_status ldd_holds_end(ldd_holds* holds, uint32_t key, uint32_t key_generation,
                              ldd_hold_outcome outcome) noexcept nogil
# Up to `capacity` events, oldest first; how many. Lets what is overdue expire.
cdef size_t ldd_holds_take_events(ldd_holds* holds, ldd_hold_event* events, size_t capacity) noexcept nogil
cdef size_t ldd_holds_count(ldd_holds* holds) noexcept nogil
