/*
 * What an engine records of itself: counters and latency histograms by peer and operation, and a ring of events.
 *
 * All of it lies in one file that other processes of the same user may read while it is written; core/record/record.pyx
 * makes it and says how it is found. This header is the layout: fixed offsets, natural alignment, no padding, the
 * byte order of the host. llm_datadist/observe/layout.py says the same in Python, and a test compares them.
 *
 *   0                    ldd_record_head, LDD_RECORD_HEAD_BYTES
 *   peers_offset         LDD_RECORD_PEERS times ldd_peer_record; the first one counts what no peer is known for
 *   ring_offset          ring_capacity times ldd_event; the event of ticket t is at t % ring_capacity
 *
 * Counters only grow, and are written with relaxed order: a reader may see one without another that was written
 * before. An event is valid when its seq is its ticket + 1 both before and after it was read.
 */
#ifndef LLM_DATADIST_LDD_RECORD_H
#define LLM_DATADIST_LDD_RECORD_H

#include <stddef.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "llm_datadist/ldd_atomic.h"
#include "llm_datadist/ldd_sync.h"

#define LDD_RECORD_MAGIC 0x0001647272646c6cULL /* "lldrrd", version 1 */

enum {
    LDD_RECORD_HEAD_BYTES = 4096,
    LDD_RECORD_PEERS = 1024,
    LDD_RECORD_EVENTS = 1 << 16, /* 4 MiB, of which nothing is taken before the first event */
    LDD_RECORD_BUCKETS = 253,
};

/* Operations that are counted. */
enum {
    LDD_OP_PULL,    /* a whole pull, its wait for the link included; bytes that arrived */
    LDD_OP_PUSH,    /* a whole push, or one step of an asynchronous one */
    LDD_OP_RESOLVE, /* a lookup that the owner was asked for: the round trip */
    LDD_OP_RELEASE, /* the end of a lease that the owner was told: the round trip */
    LDD_OP_PING,    /* the round trip */
    LDD_OP_LINK,    /* opening a link, from here */
    LDD_OP_ANSWER,  /* a request of the peer, as long as it kept the service thread */
    LDD_OP_SERVE,   /* a pull by the peer in one exchange, from its request to its confirmation */
    LDD_NUM_OPS
};

/* Kinds of events. */
enum {
    LDD_EVENT_PULL = 1,
    LDD_EVENT_PUSH,
    LDD_EVENT_TURN,     /* waiting for the link */
    LDD_EVENT_RESOLVE,  /* looking up the peer's cache, in shared memory or by asking */
    LDD_EVENT_PLAN,     /* block lists to descriptors */
    LDD_EVENT_MOVE,     /* bytes on their way */
    LDD_EVENT_RELEASE,  /* letting go of the peer's cache */
    LDD_EVENT_ASK,      /* one request to a peer; id is its number on the link, model_id its frame type */
    LDD_EVENT_ANSWER,   /* one request of a peer; the same */
    LDD_EVENT_SERVE,    /* a pull of a peer in one exchange */
    LDD_EVENT_REFUSE,   /* a lookup of a peer that failed here */
    LDD_EVENT_LINK,     /* a link was opened from here */
    LDD_EVENT_ACCEPT,   /* a link was opened from there */
    LDD_EVENT_BREAK,    /* a link broke */
    LDD_EVENT_UNLINK,   /* a link was taken out */
    LDD_EVENT_ALLOCATE, /* a cache can be found; id is the cache's, model_id the id of its first key, if any */
    LDD_EVENT_FREE,     /* its memory is free again; bytes, and duration since ALLOCATE */
    LDD_EVENT_KEY_GONE, /* a key was pulled or removed; duration since its cache was allocated */
    LDD_EVENT_LAYER,    /* a layer of an asynchronous push was ready; id is its index */
    LDD_EVENT_CONTEXT,  /* of the PULL, PUSH or SERVE of this thread, peer and start: id and model_id are the trace's,
                           bytes is its caller's span (W3C trace context) */
};

typedef struct {
    uint64_t failures; /* of the operations counted in the buckets */
    uint64_t bytes;
    uint64_t total_ns;
    uint64_t buckets[LDD_RECORD_BUCKETS]; /* by duration, see ldd_record_bucket */
} ldd_op_record;

typedef struct {
    uint64_t cluster_id;
    uint64_t used_ns;    /* when it was taken for this cluster; 0: it is free */
    uint64_t num_links;  /* that are in the set of links now */
    uint64_t num_broken; /* links that broke */
    uint64_t num_opened; /* links that were made */
    uint32_t state;      /* of the link that changed last: ldd_link_state */
    uint32_t unused;
    char peer_ip[64];
    char reason[144]; /* of the link that broke last */
    ldd_op_record ops[LDD_NUM_OPS];
} ldd_peer_record;

typedef struct {
    uint64_t seq; /* ticket + 1; LDD_EVENT_BUSY while it is written */
    int64_t start_ns; /* CLOCK_MONOTONIC */
    int64_t duration_ns;
    uint64_t peer; /* cluster id */
    uint64_t id;   /* of the key, unless its kind says otherwise */
    uint64_t model_id;
    uint64_t bytes;
    uint32_t thread;
    int16_t status; /* ldd_status */
    uint8_t kind;
    uint8_t key_kind; /* KEY_*; KEY_HOLD for held blocks */
} ldd_event;

typedef struct {
    uint64_t magic;
    uint32_t peers_offset;
    uint32_t peer_bytes;
    uint32_t num_peers;
    uint32_t num_ops;
    uint32_t num_buckets;
    uint32_t ring_offset;
    uint32_t ring_capacity;
    uint32_t event_bytes;
    uint32_t pid; /* as this process sees itself */
    int32_t table_fd; /* where the table is shared with peers, in this process; -1: it is not */
    uint64_t cluster_id;
    uint8_t instance[16];
    char boot_id[40];     /* of this start of the host: those that agree share a clock */
    int64_t start_ns;     /* of the engine, CLOCK_MONOTONIC */
    int64_t realtime_ns;  /* CLOCK_REALTIME at that moment */
    uint64_t device_pool_bytes;
    uint64_t host_pool_bytes;
    uint32_t generation;
    uint32_t remote_accessible;
    char role[16];
    char provider[16];
    char listener[80];
    uint32_t tracing; /* whether events are recorded now */
    int32_t marks_fd; /* of the marks of released keys, one uint32_t for each of max_keys, after a cache line */
    uint64_t next_ticket; /* events ever begun; those before the last ring_capacity were overwritten */
    uint64_t dropped;     /* events given up because their place was just being written */
    uint64_t keys_offset; /* in the file of table_fd: max_keys times ldd_shared_key */
    uint64_t caches_offset; /* max_caches times ldd_shared_cache */
    uint32_t max_keys;
    uint32_t max_caches;
    uint64_t num_holds; /* requests that blocks are held for */
} ldd_record_head;

#define LDD_EVENT_BUSY UINT64_MAX

/* How this process holds its record. */
typedef struct {
    ldd_record_head *head; /* NULL: nothing is recorded */
    ldd_peer_record *peers;
    ldd_event *ring;
    ldd_mutex lock; /* guards who has which peer record */
    int fd;         /* -1: nobody else sees it */
    size_t bytes;
    uint32_t tracing;
} ldd_record;

/* Log-linear: 64 ns wide up to 512 ns, then eight to each power of two, up to 1099 s. */
static inline unsigned ldd_record_bucket(int64_t duration_ns) {
    uint64_t value = duration_ns > 0 ? (uint64_t)duration_ns >> 6 : 0;
    unsigned shift;
    if (value < 8) return (unsigned)value;
    shift = 60u - (unsigned)__builtin_clzll(value);
    shift = 8 + 8 * shift + (unsigned)((value >> shift) & 7);
    return shift < LDD_RECORD_BUCKETS ? shift : LDD_RECORD_BUCKETS - 1;
}

/* Count one operation. Any thread. */
static inline void ldd_record_count(ldd_peer_record *peer, int op, int64_t duration_ns, uint64_t bytes, int failed) {
    ldd_op_record *at;
    if (!peer) return;
    at = &peer->ops[op];
    ldd_add64(&at->buckets[ldd_record_bucket(duration_ns)], 1);
    ldd_add64(&at->total_ns, duration_ns > 0 ? (uint64_t)duration_ns : 0);
    if (bytes) ldd_add64(&at->bytes, bytes);
    if (failed) ldd_add64(&at->failures, 1);
}

static inline uint32_t ldd_record_thread(void) {
    static __thread uint32_t thread;
    if (!thread) thread = (uint32_t)syscall(SYS_gettid);
    return thread;
}

/* Whether events are wanted: what callers ask before they look at a clock. */
static inline int ldd_tracing(const ldd_record *record) {
    return record && ldd_get32(&record->tracing);
}

/*
 * Record one event; `what` has all but seq and thread. Any thread. The oldest is overwritten. A place that another
 * thread is still writing, which the ring has then passed by once, is left to it, and this event counts as dropped.
 */
static inline void ldd_record_event(ldd_record *record, const ldd_event *what) {
    uint64_t ticket = __atomic_fetch_add(&record->head->next_ticket, 1, __ATOMIC_RELAXED);
    ldd_event *at = &record->ring[ticket % LDD_RECORD_EVENTS];
    uint64_t before = ldd_get64(&at->seq);
    if (before == LDD_EVENT_BUSY ||
        !__atomic_compare_exchange_n(&at->seq, &before, LDD_EVENT_BUSY, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
        ldd_add64(&record->head->dropped, 1);
        return;
    }
    __atomic_thread_fence(__ATOMIC_RELEASE); /* readers that see a field of this event find the place busy */
    ldd_set64((uint64_t *)&at->start_ns, (uint64_t)what->start_ns);
    ldd_set64((uint64_t *)&at->duration_ns, (uint64_t)what->duration_ns);
    ldd_set64(&at->peer, what->peer);
    ldd_set64(&at->id, what->id);
    ldd_set64(&at->model_id, what->model_id);
    ldd_set64(&at->bytes, what->bytes);
    ldd_set32(&at->thread, ldd_record_thread());
    __atomic_store_n(&at->status, what->status, __ATOMIC_RELAXED);
    __atomic_store_n(&at->kind, what->kind, __ATOMIC_RELAXED);
    __atomic_store_n(&at->key_kind, what->key_kind, __ATOMIC_RELAXED);
    ldd_store64(&at->seq, ticket + 1);
}

/* What happened at one moment. */
static inline void ldd_trace(ldd_record *record, int kind, uint64_t peer, uint64_t id, uint64_t bytes, int status) {
    if (ldd_tracing(record)) {
        ldd_event what = {.start_ns = ldd_now_ns(),
                          .peer = peer,
                          .id = id,
                          .bytes = bytes,
                          .status = (int16_t)status,
                          .kind = (uint8_t)kind};
        ldd_record_event(record, &what);
    }
}

/* What took from `start_ns` until now. */
static inline void ldd_trace_span(ldd_record *record, int kind, int64_t start_ns, uint64_t peer, int key_kind,
                                  uint64_t id, uint64_t model_id, uint64_t bytes, int status) {
    if (ldd_tracing(record)) {
        ldd_event what = {.start_ns = start_ns,
                          .duration_ns = ldd_now_ns() - start_ns,
                          .peer = peer,
                          .id = id,
                          .model_id = model_id,
                          .bytes = bytes,
                          .status = (int16_t)status,
                          .kind = (uint8_t)kind,
                          .key_kind = (uint8_t)key_kind};
        ldd_record_event(record, &what);
    }
}

/* The trace that what began at `start_ns` belongs to: its id, high and low, and the span of the caller. */
static inline void ldd_trace_context(ldd_record *record, int64_t start_ns, uint64_t peer, const uint64_t context[3]) {
    if (context[0] | context[1]) {
        ldd_trace_span(record, LDD_EVENT_CONTEXT, start_ns, peer, 0, context[0], context[1], context[2], 0);
    }
}

/* One step after another: from `*at_ns` until now, which is where the next one begins. */
static inline void ldd_trace_lap(ldd_record *record, int kind, int64_t *at_ns, uint64_t peer, uint64_t bytes,
                                 int status) {
    if (ldd_tracing(record)) {
        int64_t now = ldd_now_ns();
        ldd_event what = {.start_ns = *at_ns,
                          .duration_ns = now - *at_ns,
                          .peer = peer,
                          .bytes = bytes,
                          .status = (int16_t)status,
                          .kind = (uint8_t)kind};
        ldd_record_event(record, &what);
        *at_ns = now;
    }
}

#endif
