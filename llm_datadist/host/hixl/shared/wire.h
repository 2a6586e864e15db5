/*
 * What travels between a HIXL client and server of the host provider.
 *
 * Fixed little-endian layouts. A connection starts with one hello and one welcome; then the client sends
 * requests and the server answers each with a reply, in order. No address is believed: a descriptor names a
 * region by id and generation and a byte range inside it, and the server checks all of it before it moves a byte.
 *
 * Connections of one client:
 *   ADMIN  TCP, first; its end is the end of the client. LIST.
 *   LOCAL  abstract Unix socket of the same server, tried when both run under one kernel. MAP.
 *   DATA   TCP, opened when the first bytes travel that way. GET, PUT, FETCH.
 *
 * LIST  reply.argument = number of regions; payload: that many hixl_wire_region, then their tags back to back.
 * MAP   request.argument = backing; the reply carries the memfd (SCM_RIGHTS), reply.argument = its bytes.
 * GET   request.count descriptors follow; request.bytes is their sum; the reply is followed by the bytes.
 * PUT   request.count descriptors follow, then request.bytes bytes; the reply comes when they are in place.
 * FETCH one hixl_wire_fetch follows, then request.count bytes in the owners' words (on part 0; none on the others); the
 *       reply is followed by request.bytes bytes. Once the client has all bytes of all parts it sends CONFIRM where it
 *       sent part 0, with the same sequence, to which nothing is replied. A refusal of the owner's has its number in
 *       reply.argument and is not confirmed.
 * A reply whose status is not HIXL_SUCCESS has text_bytes of UTF-8 text instead of a payload.
 */
#ifndef LLM_DATADIST_HIXL_WIRE_H
#define LLM_DATADIST_HIXL_WIRE_H

#include <assert.h>
#include <stdint.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "frames are read and written in place: a big-endian target needs conversions"
#endif

#define HIXL_WIRE_HELLO_MAGIC UINT64_C(0x004c58494844444c) /* "LDDHIXL\0" */
#define HIXL_WIRE_VERSION 1
#define HIXL_WIRE_REQUEST_MAGIC UINT32_C(0x51525848) /* "HXRQ" */
#define HIXL_WIRE_REPLY_MAGIC UINT32_C(0x50525848)   /* "HXRP" */

enum { HIXL_KIND_ADMIN = 1, HIXL_KIND_LOCAL = 2, HIXL_KIND_DATA = 3 };
enum { HIXL_OP_LIST = 1, HIXL_OP_MAP = 2, HIXL_OP_GET = 3, HIXL_OP_PUT = 4, HIXL_OP_FETCH = 5, HIXL_OP_CONFIRM = 6 };

/* A frame names at most this many descriptors (2 MiB of them); a longer batch is several frames. */
#define HIXL_WIRE_MAX_DESCS 65536u
#define HIXL_MAX_REGIONS 65536u
#define HIXL_MAX_TAG_BYTES 255u
#define HIXL_MAX_TEXT_BYTES 300u

typedef struct {
    uint64_t magic;
    uint16_t version;
    uint16_t kind;
    uint32_t reserved;
    uint8_t client_id[16];    /* the same on all connections of a client, random */
    uint8_t token[16];        /* client configuration key "ldd_token"; zero without one */
    uint8_t server_nonce[16]; /* zero on the ADMIN connection; proves afterwards that both mean one server */
} hixl_wire_hello;

typedef struct {
    uint64_t magic;
    uint16_t version;
    uint16_t reserved;
    uint32_t status;
    uint8_t server_nonce[16];
    uint8_t boot_id[16];    /* tells one running kernel from another */
    char local_name[48];    /* abstract Unix name, zero padded; empty: none */
    uint64_t nonce_address; /* LOCAL: where server_nonce lies in the server, to try reading it across */
    uint64_t scratch_address; /* LOCAL: a word that is there for ever, to try writing across */
} hixl_wire_welcome;

typedef struct {
    uint32_t magic;
    uint16_t op;
    uint16_t reserved;
    uint32_t sequence;
    uint32_t count;
    uint64_t bytes;
    uint64_t argument;
} hixl_wire_request;

typedef struct {
    uint32_t magic;
    uint16_t op;
    uint16_t text_bytes;
    uint32_t sequence;
    uint32_t status;
    uint64_t bytes;
    uint64_t argument;
} hixl_wire_reply;

typedef struct {
    uint64_t region;
    uint64_t generation;
    uint64_t offset;
    uint64_t bytes;
} hixl_wire_desc;

/* Which part of a fetch travels on this connection. */
typedef struct {
    uint64_t exchange; /* of the client's, one per fetch */
    uint64_t offset;   /* of the part, in the bytes of the fetch */
    uint64_t total;    /* bytes of the fetch */
    uint32_t part, num_parts;
} hixl_wire_fetch;

typedef struct {
    uint64_t region;
    uint64_t generation;
    uint64_t address;
    uint64_t bytes;
    uint64_t backing; /* 0: private memory of the server */
    uint64_t backing_offset;
    int32_t type;
    uint32_t tag_bytes;
    uint64_t reserved;
} hixl_wire_region;

static_assert(sizeof(hixl_wire_hello) == 64, "hello");
static_assert(sizeof(hixl_wire_welcome) == 112, "welcome");
static_assert(sizeof(hixl_wire_request) == 32, "request");
static_assert(sizeof(hixl_wire_reply) == 32, "reply");
static_assert(sizeof(hixl_wire_desc) == 32, "descriptor");
static_assert(sizeof(hixl_wire_fetch) == 32, "fetch");
static_assert(sizeof(hixl_wire_region) == 64, "region");

#endif
