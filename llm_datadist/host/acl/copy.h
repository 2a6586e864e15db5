/* Copies that were checked: carried out chunk by chunk, by a stream or at once. */
#ifndef LLM_DATADIST_HOST_COPY_H
#define LLM_DATADIST_HOST_COPY_H

#include <stdatomic.h>
#include <stddef.h>

#include "acl/memory.h"

/* One copy that was checked; the pins keep what it touches mapped until it is done. */
typedef struct {
    void *dst;
    const void *src;
    size_t size;
    acl_pin *dst_pin, *src_pin; /* NULL: memory of the caller */
} acl_copy;

void acl_run_copy(const acl_copy *copy, const atomic_bool *cancelled);
void acl_unpin_copy(const acl_copy *copy);

#endif
