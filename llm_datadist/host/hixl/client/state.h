/*
 * What a client knows: one connection to one server, its view of the server's regions, and the batches in flight.
 *
 * Any thread may call; one lock per client covers everything below except the bytes of a copy, which move without
 * it, the streams during a round (tcp.c), and waits in poll(), which are taken with it released. Several clients run
 * in parallel.
 *
 * Who uses whom: client (life cycle) -> batch (submission, completion, cancellation) -> plan (descriptors to segments),
 * copy (the shm and cma paths), tcp (the tcp path) -> remote (regions and mappings), connect (and liveness) -> this.
 */
#ifndef LLM_DATADIST_HIXL_CLIENT_STATE_H
#define LLM_DATADIST_HIXL_CLIENT_STATE_H

#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <sys/queue.h>
#include <sys/types.h>

#include "copy/pool.h"
#include "hixl/shared/error.h"
#include "hixl/shared/fork.h"
#include "hixl/shared/handle.h"
#include "hixl/shared/socket.h"
#include "base/deadline.h"
#include "hixl/shared/wire.h"
#include "llm_datadist/ldd_ext.h"

enum {
    HIXL_MAX_BATCHES = 4096, /* not yet queried to their end, per client */
    HIXL_MAX_STREAMS = 16,
};

typedef enum { HIXL_PATH_SHM, HIXL_PATH_CMA, HIXL_PATH_TCP, HIXL_NUM_PATHS } hixl_path;

extern const char *const hixl_path_names[HIXL_NUM_PATHS];

/* A memfd of the server, mapped here. */
typedef struct hixl_mapping {
    struct hixl_mapping *next;
    uint64_t backing;
    uint8_t *base; /* NULL: it could not be had; the next refresh tries again */
    uint64_t bytes;
    bool writable;
    bool in_use; /* by a region of the list being built */
} hixl_mapping;

typedef struct {
    uint64_t address, bytes; /* in the server */
    uint64_t reach;          /* the highest end of this and all regions before it */
    uint64_t region, generation;
    uint64_t backing, backing_offset;
    uint8_t *mapped; /* HIXL_PATH_SHM: its first byte here */
    bool read_only;  /* the mapping is: puts go by TCP, where the server says no */
    hixl_path path;
} hixl_remote_region;

/* Bytes to copy here; `remote` is an address here (shm) or in the server (cma). */
typedef struct {
    uint64_t local, remote, bytes;
} hixl_segment;

typedef struct {
    hixl_segment *items;
    size_t count, capacity;
} hixl_segments;

typedef struct {
    uint64_t local;
    hixl_wire_desc desc;
} hixl_tcp_op;

/* Some bytes of some segments in a row: what one thread copies at a time. */
typedef struct {
    uint32_t first;  /* index into mapped segments, or behind them into cma segments */
    uint64_t offset; /* into the first */
    uint64_t bytes;
} hixl_chunk;

typedef enum { HIXL_BATCH_FREE, HIXL_BATCH_RUNNING, HIXL_BATCH_COMPLETED, HIXL_BATCH_FAILED } hixl_batch_state;

typedef struct hixl_client hixl_client;

typedef struct hixl_batch {
    hixl_client *client;
    uint64_t generation; /* with `slot` it makes the handle: a stale one misses */
    uint32_t slot;
    hixl_batch_state state;
    bool is_put;
    bool copying;        /* the copy job is not known to be done */
    bool tcp_pending;    /* in client->tcp_queue */
    bool abandoned;      /* cancelled: whoever still waits for it frees it */
    unsigned num_waiters;
    uint64_t num_bytes;
    hixl_segments mapped, cma;
    hixl_chunk *chunks;
    size_t chunk_capacity;
    hixl_tcp_op *tcp_ops;
    size_t num_tcp_ops, tcp_capacity;
    const void *fetch_request; /* of a fetch, otherwise NULL; tcp_ops say where its bytes go */
    uint32_t fetch_bytes;
    LddFetchReply *fetch_reply;
    copy_job job;
    atomic_flag error_taken; /* the first failing chunk writes `error` */
    hixl_error error;
    TAILQ_ENTRY(hixl_batch) entry; /* client->tcp_queue */
} hixl_batch;

/* One data connection and its share of the batch at the head of the queue. */
typedef struct {
    int fd; /* -1: not open */
    bool active;
    hixl_wire_desc *descs;
    struct iovec *iov; /* the local bytes of each descriptor */
    size_t count, capacity;
    size_t frame_first, frame_end; /* descriptors of the frame under way */
    hixl_wire_hello hello;
    size_t hello_sent;
    hixl_wire_welcome welcome;
    size_t welcome_received;
    hixl_wire_request request;
    hixl_wire_fetch fetch;       /* of a fetch: which part this is */
    size_t head_sent;            /* of request, part, and descriptors or words */
    size_t send_index, send_skip; /* put: bytes under way */
    bool sent;
    hixl_wire_reply reply;
    size_t reply_received;
    char text[HIXL_MAX_TEXT_BYTES + 1];
    size_t text_received;
    size_t receive_index, receive_skip; /* get: bytes under way */
    bool failed; /* in a round; `error` says why */
    hixl_error error;
} hixl_stream;

/* Memory the user registered with the client: only remembered, since any local memory will do. */
typedef struct hixl_local_memory {
    struct hixl_local_memory *next;
} hixl_local_memory;

struct hixl_client {
    pid_t pid; /* a forked child must not touch any of this */
    hixl_fork_node fork_node;
    pthread_mutex_t lock;
    hixl_address address;
    uint8_t client_id[16]; /* new with each attempt to connect: the server may not have seen the last one end */
    uint8_t token[16];
    hixl_path paths[HIXL_NUM_PATHS]; /* in order of preference; tcp is among them */
    unsigned num_paths;
    hixl_local_memory *local_memory;

    bool connected;
    hixl_error poison; /* status HIXL_SUCCESS: none */
    uint8_t server_nonce[16];
    int admin_fd, local_fd, pid_fd;
    pid_t server_pid;
    bool can_cma;
    int64_t alive_ns; /* when the server was last seen alive */
    atomic_uint sequence;
    hixl_wire_reply list_reply; /* a LIST reply in arrival: it survives a timeout in its middle */
    uint8_t *list_payload;
    size_t list_received;

    hixl_remote_region *regions; /* by address */
    size_t num_regions, last_hit;
    hixl_mapping *mappings, *retired; /* retired: unmapped once no batch runs */
    CommMem *user_list;
    char **user_tags;

    hixl_batch *batches[HIXL_MAX_BATCHES];
    uint16_t free_slots[HIXL_MAX_BATCHES];
    unsigned num_slots, num_free, num_running;
    uint64_t batch_generation, num_fetches;
    uint64_t good_first, good_end; /* local memory last found mapped */
    bool good_to_write;            /* and writable */

    TAILQ_HEAD(, hixl_batch) tcp_queue; /* the head has the streams */
    bool tcp_started;
    bool in_round;      /* threads move the streams without the lock: hands off */
    const hixl_batch *round_batch;
    int64_t round_until_ns;
    copy_job round;
    hixl_stream *round_streams[HIXL_MAX_STREAMS];
    bool has_confirmed; /* what was sent last, by stream 0, is the confirmation of a fetch */
    unsigned num_streams; /* allowed */
    hixl_stream streams[HIXL_MAX_STREAMS];
};

/* NULL: error says why. */
hixl_client *hixl_checked_client(HixlClientHandle handle, hixl_error *error);

/* The first failure after which nothing more is started. */
void hixl_poison(hixl_client *client, const hixl_error *error);

/* A number for the next request; streams of a round take theirs without the lock. */
static inline uint32_t hixl_next_sequence(hixl_client *client) {
    return atomic_fetch_add_explicit(&client->sequence, 1, memory_order_relaxed) + 1;
}

#endif
