/*
 * HMAC-SHA256 (FIPS 180-4, RFC 2104), for the proofs of a handshake: a few hundred bytes each.
 *
 * Written out here because the service thread needs it without the interpreter, whose hashlib takes the GIL, and
 * because one function is no reason to depend on one version of a cryptographic library. Running time depends on
 * lengths alone: there is no table that is indexed by data, and no branch on it.
 */
#ifndef LLM_DATADIST_LDD_HMAC_H
#define LLM_DATADIST_LDD_HMAC_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { LDD_SHA256_BYTES = 32, LDD_SHA256_BLOCK = 64 };

typedef struct {
    uint32_t state[8];
    uint64_t bytes; /* taken in so far; those that fill no block wait in `block` */
    uint8_t block[LDD_SHA256_BLOCK];
} ldd_sha256;

static inline uint32_t ldd_sha256_rotate(uint32_t word, int by) {
    return (word >> by) | (word << (32 - by));
}

static inline void ldd_sha256_block(uint32_t state[8], const uint8_t *block) {
    static const uint32_t constants[64] = {
        0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
        0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
        0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
        0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
        0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
        0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
        0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
        0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
    };
    uint32_t schedule[64], v[8];
    int i;
    for (i = 0; i < 16; i++) {
        schedule[i] = (uint32_t)block[4 * i] << 24 | (uint32_t)block[4 * i + 1] << 16 |
                      (uint32_t)block[4 * i + 2] << 8 | block[4 * i + 3];
    }
    for (i = 16; i < 64; i++) {
        uint32_t early = schedule[i - 15], late = schedule[i - 2];
        schedule[i] = schedule[i - 16] + schedule[i - 7] +
                      (ldd_sha256_rotate(early, 7) ^ ldd_sha256_rotate(early, 18) ^ (early >> 3)) +
                      (ldd_sha256_rotate(late, 17) ^ ldd_sha256_rotate(late, 19) ^ (late >> 10));
    }
    memcpy(v, state, sizeof v);
    for (i = 0; i < 64; i++) {
        uint32_t first = v[7] + constants[i] + schedule[i] + ((v[4] & v[5]) ^ (~v[4] & v[6])) +
                         (ldd_sha256_rotate(v[4], 6) ^ ldd_sha256_rotate(v[4], 11) ^ ldd_sha256_rotate(v[4], 25));
        uint32_t second = ((v[0] & v[1]) ^ (v[0] & v[2]) ^ (v[1] & v[2])) +
                          (ldd_sha256_rotate(v[0], 2) ^ ldd_sha256_rotate(v[0], 13) ^ ldd_sha256_rotate(v[0], 22));
        memmove(v + 1, v, 7 * sizeof v[0]);
        v[4] += first;
        v[0] = first + second;
    }
    for (i = 0; i < 8; i++) {
        state[i] += v[i];
    }
}

static inline void ldd_sha256_start(ldd_sha256 *hash) {
    static const uint32_t initial[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                        0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    memcpy(hash->state, initial, sizeof initial);
    hash->bytes = 0;
}

static inline void ldd_sha256_add(ldd_sha256 *hash, const void *data, size_t nbytes) {
    const uint8_t *at = data;
    while (nbytes > 0) {
        size_t used = hash->bytes % LDD_SHA256_BLOCK;
        size_t taken = LDD_SHA256_BLOCK - used < nbytes ? LDD_SHA256_BLOCK - used : nbytes;
        memcpy(hash->block + used, at, taken);
        hash->bytes += taken;
        at += taken;
        nbytes -= taken;
        if (hash->bytes % LDD_SHA256_BLOCK == 0) {
            ldd_sha256_block(hash->state, hash->block);
        }
    }
}

static inline void ldd_sha256_end(ldd_sha256 *hash, uint8_t digest[LDD_SHA256_BYTES]) {
    uint64_t bits = hash->bytes * 8;
    uint8_t padding[2 * LDD_SHA256_BLOCK] = {0x80};
    size_t used = hash->bytes % LDD_SHA256_BLOCK, length = (used < 56 ? 56 : 120) - used;
    int i;
    for (i = 0; i < 8; i++) {
        padding[length + i] = (uint8_t)(bits >> (56 - 8 * i));
    }
    ldd_sha256_add(hash, padding, length + 8);
    for (i = 0; i < LDD_SHA256_BYTES; i++) {
        digest[i] = (uint8_t)(hash->state[i / 4] >> (24 - 8 * (i % 4)));
    }
}

/* The key is at most one block, 64 bytes. What is authenticated goes in by ldd_sha256_add(&hmac->inner, ...). */
typedef struct {
    ldd_sha256 inner, outer;
} ldd_hmac;

static inline void ldd_hmac_start(ldd_hmac *hmac, const void *key, size_t key_bytes) {
    uint8_t inner[LDD_SHA256_BLOCK] = {0}, outer[LDD_SHA256_BLOCK];
    int i;
    memcpy(inner, key, key_bytes);
    for (i = 0; i < LDD_SHA256_BLOCK; i++) {
        outer[i] = inner[i] ^ 0x5c;
        inner[i] ^= 0x36;
    }
    ldd_sha256_start(&hmac->inner);
    ldd_sha256_start(&hmac->outer);
    ldd_sha256_add(&hmac->inner, inner, sizeof inner);
    ldd_sha256_add(&hmac->outer, outer, sizeof outer);
}

static inline void ldd_hmac_add(ldd_hmac *hmac, const void *data, size_t nbytes) {
    ldd_sha256_add(&hmac->inner, data, nbytes);
}

static inline void ldd_hmac_end(ldd_hmac *hmac, uint8_t mac[LDD_SHA256_BYTES]) {
    ldd_sha256_end(&hmac->inner, mac);
    ldd_sha256_add(&hmac->outer, mac, LDD_SHA256_BYTES);
    ldd_sha256_end(&hmac->outer, mac);
}

/* 1 when both are equal, in a time that does not tell where they differ. */
static inline int ldd_hmac_equal(const uint8_t *a, const uint8_t *b) {
    volatile uint8_t difference = 0;
    int i;
    for (i = 0; i < LDD_SHA256_BYTES; i++) {
        difference |= a[i] ^ b[i];
    }
    return difference == 0;
}

#endif
