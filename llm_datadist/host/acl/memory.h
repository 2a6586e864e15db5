/*
 * Allocations of device memory and of page-locked host memory.
 *
 * Memory of aclrtMalloc and aclrtMallocHost is one sealed memfd per allocation, mapped shared; a peer
 * that receives a duplicate of the descriptor maps the very same pages. Everything here is safe from any
 * thread and needs no current context.
 */
#ifndef LLM_DATADIST_HOST_MEMORY_H
#define LLM_DATADIST_HOST_MEMORY_H

#include <stdbool.h>
#include <stdint.h>

#include "acl/acl_rt.h"
#include "acl/error.h"
#include "hcomm/hcomm_res_defs.h"

typedef struct {
    uint64_t id;      /* unique in this process, never reused: tells a new allocation at an old address apart */
    uint64_t base;    /* first byte */
    uint64_t size;    /* bytes asked for */
    uint64_t mapped;  /* bytes of the memfd: size rounded up to pages */
    CommMemType kind; /* COMM_MEM_TYPE_DEVICE or COMM_MEM_TYPE_HOST */
    int32_t device;   /* emulated device it was allocated on */
    int fd;           /* the registry's own: valid until freed; use acl_dup_allocation_fd to keep one */
} acl_allocation;

typedef struct acl_pin acl_pin;

/* Find the allocation that holds [addr, addr + len) whole; len 0 asks for addr alone. 0, or -1 if none. */
int acl_find_allocation(uint64_t addr, uint64_t len, acl_allocation *out);

/* A new descriptor (close-on-exec) of a live allocation's memfd, for the caller to close; -1 with errno. */
int acl_dup_allocation_fd(uint64_t id);

/*
 * The same search, and what is found stays mapped until acl_unpin even when it is freed meanwhile: for work
 * that goes on after the call that started it. NULL if none. `out` may be NULL.
 */
acl_pin *acl_pin_range(uint64_t addr, uint64_t len, acl_allocation *out);
void acl_unpin(acl_pin *pin); /* NULL is ignored */

/*
 * Whether [addr, addr + len) starts in an allocation and leaves it: such a range is never right, while one
 * that starts outside all of them is the caller's own memory.
 */
bool acl_overruns(uint64_t addr, uint64_t len);

/* ---- inside the acl half ---- */

/* Around fork(): as in acl/object.h, but the allocations stay valid in the child. */
void acl_memory_before_fork(void);
void acl_memory_after_fork(bool child);

#endif
