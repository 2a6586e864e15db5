/*
 * Control protocol between two engines: fixed-layout little-endian frames over a stream socket.
 *
 * A link owns two connections, both opened by the side that asked for it. On each, one side asks and
 * the other side's service thread answers in order, so neither ever waits behind the other's requests.
 * Addresses in a DESCRIPTOR or RANGES frame are the owner's and only ever select among the regions that
 * the owner announced to the data path; the data path checks region, generation, offset and length again.
 */
#ifndef LLM_DATADIST_LDD_WIRE_H
#define LLM_DATADIST_LDD_WIRE_H

#include <assert.h>
#include <stddef.h>
#include <stdint.h>

#include "llm_datadist/ldd_tensor.h"

#define LDD_WIRE_MAGIC 0x3144444cu /* "LDD1" */
#define LDD_WIRE_VERSION 3u
#define LDD_WIRE_MAX_PAYLOAD (4u << 20) /* bytes; about 500 000 tensor addresses */
#define LDD_WIRE_MAX_RANGES 65536u
#define LDD_WIRE_MAX_HELLO 4096u /* bytes of the payload of a HELLO of another version, which is told so */

enum {
    LDD_FRAME_HELLO = 1,      /* asker -> answerer, first frame of a connection  */
    LDD_FRAME_WELCOME = 2,    /* its answer                                      */
    LDD_FRAME_RESOLVE = 3,    /* key -> DESCRIPTOR; pins the cache under a lease */
    LDD_FRAME_DESCRIPTOR = 4,
    LDD_FRAME_RELEASE = 5,    /* ends a lease, may take the key -> ACK           */
    LDD_FRAME_ACK = 6,
    LDD_FRAME_RANGES = 7,     /* a data type, addresses -> LEASE; pins their caches */
    LDD_FRAME_LEASE = 8,
    LDD_FRAME_UNLINK = 9,     /* -> ACK; both sides drop the link                */
    LDD_FRAME_PING = 10,      /* -> ACK                                          */
    LDD_FRAME_ENDPOINTS = 11, /* -> ENDPOINT_LIST; where a network needs any     */
    LDD_FRAME_ENDPOINT_LIST = 12,
    LDD_FRAME_LEAVE = 13,     /* no answer; the link was dropped by force: do not make it anew */
    LDD_FRAME_PROOF = 14,     /* of the shared secret, to a WELCOME that asks for it -> WELCOME */
    LDD_FRAME_CHECKSUM = 15,  /* bytes of leased caches -> CHECKSUMS */
    LDD_FRAME_CHECKSUMS = 16
};

typedef struct {
    uint32_t magic;
    uint16_t version, type;
    uint32_t length; /* payload bytes that follow */
    uint32_t request_id;
} ldd_frame_header;

enum { LDD_HELLO_FORWARD = 0, LDD_HELLO_REVERSE = 1, LDD_HELLO_SHARED_TABLE = 2 };
/* Whole frames of a handshake, header included. */
enum { LDD_HELLO_FRAME_BYTES = 336, LDD_WELCOME_FRAME_BYTES = 432 };
enum { LDD_MODE_REMOTE_ACCESSIBLE = 1u << 0 };
enum { LDD_HELLO_HAS_SECRET = 1u << 0 };
/* Status of a WELCOME that asks for a PROOF; the next one says what became of the hello. */
enum { LDD_WELCOME_PROVE = 1, LDD_MAX_SECRETS = 2 };

typedef struct {
    /* FORWARD: the sender asks on this connection; REVERSE: it answers; SHARED_TABLE: it wants the shared table's
     * files. */
    uint16_t direction;
    uint16_t flags;       /* LDD_HELLO_HAS_SECRET */
    uint32_t mode;
    uint64_t cluster_id, expected_cluster_id;
    uint8_t instance[16]; /* fresh random number per engine */
    uint8_t token[16];    /* names the link on both connections and on the data path */
    uint8_t comm[32];     /* digest of a communicator, all zero for link_clusters */
    uint32_t data_port, check_expected;
    uint8_t nonce[32]; /* fresh for each hello, where there is a secret */
    uint8_t reserved[32];
    uint8_t endpoint[160]; /* EndpointDesc of the data path; all zero where the network needs none */
} ldd_hello;

typedef struct {
    int32_t status;
    uint32_t mode;
    uint64_t cluster_id;
    uint8_t instance[16];
    uint32_t data_port, reserved;
    uint8_t nonce[32]; /* fresh for each LDD_WELCOME_PROVE */
    uint8_t proof[32]; /* of the answer to a PROOF */
    uint8_t endpoint[160];
    char text[152];
} ldd_welcome;

/*
 * What shows that the asker knows the secret, once for each that it has (one alone: twice the same):
 * HMAC-SHA256(key, "llm_datadist/ask" + hello + welcome). The answerer's own, under the key that fitted, is
 * HMAC-SHA256(key, "llm_datadist/say" + hello + welcome + last welcome, its proof all zero). The key is
 * HMAC-SHA256(secret, "llm_datadist link key").
 */
typedef struct {
    uint8_t macs[LDD_MAX_SECRETS][32];
} ldd_proof;

/* Every way in which an engine can be reached; the asker picks a pair of its own and one of these. */
enum { LDD_MAX_ENDPOINTS = 16 };

typedef struct {
    uint8_t endpoint[160]; /* EndpointDesc */
    char plane[32];        /* endpoints of different planes do not reach each other; "" is a plane, too */
    char net_instance[64]; /* the super node, for protocols that do not leave it; "" says nothing */
} ldd_endpoint_record;

typedef struct {
    uint32_t count, reserved;
    ldd_endpoint_record items[LDD_MAX_ENDPOINTS];
} ldd_endpoint_list;

enum { LDD_ACCESS_READ = 0, LDD_ACCESS_WRITE = 1 };

typedef struct {
    uint8_t kind, access;
    uint16_t dtype; /* of the asker's cache, for a FETCH; as in ldd_tensor_desc, 0 where any will do */
    uint32_t batch_index;
    uint64_t id, model_id;
} ldd_resolve;

/*
 * A pull in one exchange, over the data path (LddClientFetchAsync): what the owner is to look up, and where in each of
 * its tensors the bytes lie that it is to send. num_runs of ldd_fetch_run follow, and, where the peer records events
 * and was given one, LDD_FETCH_CONTEXT_BYTES of the trace that it belongs to: three words, see ldd_trace_context.
 * The bytes go over tensor by tensor.
 */
enum {
    LDD_FETCH_TAKE = 1u << 0,    /* the key goes to the peer, once that has the bytes */
    LDD_FETCH_BLOCKS = 1u << 1,  /* offsets are those of a tensor of blocks of stride_bytes; otherwise of the slot */
    LDD_FETCH_TO_HOST = 1u << 2, /* the destination is host memory */
    LDD_FETCH_RESHAPE = 1u << 3  /* the destination is a cache of blocks, the source is not */
};
/*
 * The owner's answer when only the steps can tell what is wrong, or do it: resolve, get, release. Any positive number
 * is taken for it, so it may be that of a server that has nobody to ask (LDD_FETCH_NOT_HERE).
 */
enum { LDD_FETCH_ASK = 1, LDD_FETCH_MAX_SEGMENTS = 1 << 16, LDD_FETCH_CONTEXT_BYTES = 24 };

typedef struct {
    ldd_resolve key;
    uint32_t flags, num_tensors;   /* how many tensors the peer has selected */
    int64_t first, stop;           /* of the source; first -1: all */
    uint64_t stride_bytes;
    uint64_t num_runs;
} ldd_fetch_request;

typedef struct {
    uint64_t offset, bytes;
} ldd_fetch_run;

enum {
    LDD_DESC_BLOCKS = 1u << 0,
    LDD_DESC_HOST = 1u << 1,
    LDD_DESC_OWNED = 1u << 2,
    LDD_DESC_REMOTE_ACCESSIBLE = 1u << 3,
    LDD_DESC_EVEN = 1u << 4 /* addresses are base + i * step: two words follow instead of num_tensors */
};

typedef struct {
    int32_t status;
    uint32_t lease;
    int64_t cache_id;
    uint32_t num_tensors, flags;
    uint64_t num_slots, tensor_bytes, stride_bytes;
    uint64_t region_epoch; /* changes whenever the owner's regions do */
    uint32_t batch_index, text_bytes; /* on failure: text follows instead of addresses */
    ldd_tensor_desc tensor;
} ldd_descriptor;

enum { LDD_RELEASE_TAKE = 1u << 0 };

typedef struct {
    uint32_t lease, flags;
    uint32_t first_tensor, num_tensors;
} ldd_release;

/* Head of RANGES; at least one ldd_range follows. */
typedef struct {
    uint32_t dtype, reserved; /* of the asker's cache, as in ldd_tensor_desc */
} ldd_ranges;

typedef struct {
    uint64_t addr, bytes;
} ldd_range;

typedef struct {
    int32_t status;
    uint32_t lease;
    uint64_t region_epoch;
    ldd_tensor_desc tensor; /* of the first cache whose data type is another than the asker's, or of the first */
    int64_t cache_id;       /* that one */
    uint32_t num_tensors, reserved;
    char text[240];
} ldd_lease_reply;

/*
 * Head of CHECKSUM: the lease that pins what is to be read. num_ranges of ldd_checked_range follow, together of at most
 * LDD_CHECKED_MAX_BYTES, so that no request keeps the owner's service thread from others for longer than that takes.
 */
enum { LDD_CHECKED_MAX_RANGES = 4096, LDD_CHECKED_MAX_BYTES = 2 << 20 };

typedef struct {
    uint32_t lease, num_ranges;
} ldd_checked;

typedef struct {
    uint64_t addr;
    uint32_t bytes;
    uint32_t pin; /* which of the lease's caches: the place among the ranges it was taken for; 0 of a lease on a key */
} ldd_checked_range;

/* Head of CHECKSUMS; num_sums of uint32_t follow, CRC32C of each range; they mean nothing with a status below 0. */
typedef struct {
    int32_t status;
    uint32_t num_sums;
} ldd_checksums;

typedef struct {
    int32_t status;
    uint32_t reserved;
} ldd_ack;

static_assert(sizeof(ldd_frame_header) == 16, "frame header");
static_assert(sizeof(ldd_hello) == 320 && offsetof(ldd_hello, data_port) == 88, "hello");
static_assert(sizeof(ldd_welcome) == 416 && offsetof(ldd_welcome, nonce) == 40, "welcome");
static_assert(sizeof(ldd_proof) == 64, "proof");
static_assert(sizeof(ldd_frame_header) + sizeof(ldd_hello) == LDD_HELLO_FRAME_BYTES, "hello frame");
static_assert(sizeof(ldd_frame_header) + sizeof(ldd_welcome) == LDD_WELCOME_FRAME_BYTES, "welcome frame");
static_assert(sizeof(ldd_endpoint_record) == 256 && sizeof(ldd_endpoint_list) == 4104, "endpoints");
static_assert(sizeof(ldd_resolve) == 24, "resolve");
static_assert(sizeof(ldd_fetch_request) == 64 && sizeof(ldd_fetch_run) == 16, "fetch");
static_assert(sizeof(ldd_descriptor) == 136, "descriptor");
static_assert(sizeof(ldd_release) == 16, "release");
static_assert(sizeof(ldd_ranges) == 8 && sizeof(ldd_range) == 16, "range");
static_assert(sizeof(ldd_lease_reply) == 344, "lease reply");
static_assert(sizeof(ldd_checked) == 8 && sizeof(ldd_checked_range) == 16 && sizeof(ldd_checksums) == 8, "checksums");
static_assert(sizeof(ldd_ack) == 8, "ack");
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "frames are written as they lie in memory");

#endif
