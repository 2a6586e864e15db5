"""Counters, latency histograms and events of one engine; see ``record.pyx`` and ``llm_datadist/ldd_record.h``."""
from libc.stddef cimport size_t
from libc.stdint cimport int16_t, int32_t, int64_t, uint8_t, uint32_t, uint64_t

from llm_datadist.core.base.status cimport ldd_detail, ldd_status
from llm_datadist.core.base.sync cimport ldd_mutex

cdef extern from "llm_datadist/ldd_record.h" nogil:
    enum:
        LDD_RECORD_HEAD_BYTES
        LDD_RECORD_PEERS
        LDD_RECORD_EVENTS
        LDD_RECORD_BUCKETS
        LDD_NUM_OPS
    enum:
        LDD_OP_PULL
        LDD_OP_PUSH
        LDD_OP_RESOLVE
        LDD_OP_RELEASE
        LDD_OP_PING
        LDD_OP_LINK
        LDD_OP_ANSWER
        LDD_OP_SERVE
    enum:
        LDD_EVENT_PULL
        LDD_EVENT_PUSH
        LDD_EVENT_TURN
        LDD_EVENT_RESOLVE
        LDD_EVENT_PLAN
        LDD_EVENT_MOVE
        LDD_EVENT_RELEASE
        LDD_EVENT_ASK
        LDD_EVENT_ANSWER
        LDD_EVENT_SERVE
        LDD_EVENT_REFUSE
        LDD_EVENT_LINK
        LDD_EVENT_ACCEPT
        LDD_EVENT_BREAK
        LDD_EVENT_UNLINK
        LDD_EVENT_ALLOCATE
        LDD_EVENT_FREE
        LDD_EVENT_KEY_GONE
        LDD_EVENT_LAYER
    const uint64_t LDD_RECORD_MAGIC
    const uint64_t LDD_EVENT_BUSY

    ctypedef struct ldd_op_record:
        uint64_t failures
        uint64_t bytes
        uint64_t total_ns
        uint64_t* buckets
    ctypedef struct ldd_peer_record:
        uint64_t cluster_id
        uint64_t used_ns
        uint64_t num_links
        uint64_t num_broken
        uint64_t num_opened
        uint32_t state
        char[64] peer_ip
        char[144] reason
        ldd_op_record* ops
    ctypedef struct ldd_event:
        uint64_t seq
        int64_t start_ns
        int64_t duration_ns
        uint64_t peer
        uint64_t id
        uint64_t model_id
        uint64_t bytes
        uint32_t thread
        int16_t status
        uint8_t kind
        uint8_t key_kind
    ctypedef struct ldd_record_head:
        uint64_t magic
        uint32_t peers_offset
        uint32_t peer_bytes
        uint32_t num_peers
        uint32_t num_ops
        uint32_t num_buckets
        uint32_t ring_offset
        uint32_t ring_capacity
        uint32_t event_bytes
        uint32_t pid
        int32_t table_fd
        uint64_t cluster_id
        uint8_t[16] instance
        char[40] boot_id
        int64_t start_ns
        int64_t realtime_ns
        uint64_t device_pool_bytes
        uint64_t host_pool_bytes
        uint32_t generation
        uint32_t remote_accessible
        char[16] role
        char[16] provider
        char[80] listener
        uint32_t tracing
        int32_t marks_fd
        uint64_t next_ticket
        uint64_t dropped
        uint64_t keys_offset
        uint64_t caches_offset
        uint32_t max_keys
        uint32_t max_caches
        uint64_t num_holds
    ctypedef struct ldd_record:
        ldd_record_head* head
        ldd_peer_record* peers
        ldd_event* ring
        ldd_mutex lock
        int fd
        size_t bytes
        uint32_t tracing

    unsigned int ldd_record_bucket(int64_t duration_ns)
    void ldd_record_count(ldd_peer_record* peer, int op, int64_t duration_ns, uint64_t num_bytes, bint failed)
    bint ldd_tracing(const ldd_record* record)
    void ldd_record_event(ldd_record* record, const ldd_event* what)
    void ldd_trace(ldd_record* record, int kind, uint64_t peer, uint64_t id, uint64_t num_bytes, int status)
    void ldd_trace_span(ldd_record* record, int kind, int64_t start_ns, uint64_t peer, int key_kind, uint64_t id,
                        uint64_t model_id, uint64_t num_bytes, int status)
    void ldd_trace_context(ldd_record* record, int64_t start_ns, uint64_t peer, const uint64_t* context)
    void ldd_trace_lap(ldd_record* record, int kind, int64_t* at_ns, uint64_t peer, uint64_t num_bytes, int status)

# A record in memory, or in a new file of this name (not NULL), which outlives the process.
cdef ldd_status ldd_record_create(ldd_record* record, const char* path, ldd_detail* detail) noexcept nogil
# Close the file: whoever watches takes the engine for gone. What is counted later is still written, and not seen.
cdef void ldd_record_hide(ldd_record* record) noexcept nogil
cdef void ldd_record_destroy(ldd_record* record) noexcept nogil
cdef void ldd_record_set_tracing(ldd_record* record, bint on) noexcept nogil
# The counters of a cluster, from now on if there were none; NULL where nothing is recorded.
cdef ldd_peer_record* ldd_record_peer(ldd_record* record, uint64_t cluster_id) noexcept nogil
# A link to that cluster came into the set of links (`kind`: LDD_EVENT_*, or 0 for none), went out of it, or broke.
cdef ldd_peer_record* ldd_record_linked(ldd_record* record, uint64_t cluster_id, uint32_t state, const char* peer_ip,
                                        int kind) noexcept nogil
cdef void ldd_record_unlinked(ldd_record* record, ldd_peer_record* peer, uint32_t state) noexcept nogil
cdef void ldd_record_broken(ldd_record* record, ldd_peer_record* peer, uint32_t state,
                            const char* reason) noexcept nogil
