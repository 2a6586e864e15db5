/* Copies that were checked; see acl/copy.h. */
#include "acl/copy.h"

#include <string.h>

/* A copy that may be cancelled looks at its flag after each chunk: about a millisecond of work. */
#define CHUNK_BYTES ((size_t)8 << 20)

void acl_run_copy(const acl_copy *copy, const atomic_bool *cancelled) {
    uint8_t *dst = copy->dst;
    const uint8_t *src = copy->src;
    size_t left = copy->size;
    if (dst < src + left && src < dst + left) {
        memmove(dst, src, left); /* overlapping: in chunks it would depend on the direction */
        return;
    }
    while (left > 0 && !atomic_load_explicit(cancelled, memory_order_acquire)) {
        size_t chunk = left < CHUNK_BYTES ? left : CHUNK_BYTES;
        memcpy(dst, src, chunk);
        dst += chunk;
        src += chunk;
        left -= chunk;
    }
}

void acl_unpin_copy(const acl_copy *copy) {
    acl_unpin(copy->dst_pin);
    acl_unpin(copy->src_pin);
}
