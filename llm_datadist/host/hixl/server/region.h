/*
 * The regions a server lets its clients read and write.
 *
 * A region is named by a slot and a generation. Slots are reused, generations never, so a name kept past
 * UnregMem misses. A registered address is never touched here: it may be anything but zero.
 *
 * Any thread. The table's lock is a leaf: nothing else is taken under it but the allocation registry.
 */
#ifndef LLM_DATADIST_HIXL_REGION_H
#define LLM_DATADIST_HIXL_REGION_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>

#include "hixl/shared/error.h"
#include "hixl/shared/wire.h"

/* A memfd some regions lie in: our own duplicate of its descriptor, so that it outlives its allocation. */
typedef struct hixl_backing {
    struct hixl_backing *next;
    uint64_t id;
    uint64_t bytes;
    uint32_t num_regions;
    int fd;
} hixl_backing;

typedef struct hixl_region {
    uint64_t address, bytes;
    uint64_t slot, generation;
    hixl_backing *backing; /* NULL: private memory */
    uint64_t backing_offset;
    CommMemType type;
    char *tag; /* NULL: none */
    uint32_t num_users;
    bool retiring; /* being unregistered: no new users, and stalled ones are to leave */
    bool evicting; /* the grace is over: all are to leave */
    struct hixl_region *next_free;
} hixl_region;

typedef struct {
    pthread_mutex_t lock;
    pthread_cond_t unused; /* some region's num_users fell to zero */
    hixl_region **slots;
    hixl_region *free_list;
    size_t num_slots, capacity, num_live;
    uint64_t last_generation;
    atomic_uint num_retiring;
    hixl_backing *backings;
} hixl_region_table;

/* One checked segment of server memory that a request moves. */
typedef struct {
    hixl_region *region; /* NULL: of a fetch, whose owner holds the memory; such are not for the functions below */
    uint8_t *address;
    uint64_t bytes;
} hixl_target;

HixlStatus hixl_regions_init(hixl_region_table *table, hixl_error *error);
void hixl_regions_destroy(hixl_region_table *table); /* no user is left */

HixlStatus hixl_regions_add(hixl_region_table *table, const char *tag, const CommMem *mem, MemHandle *out,
                            hixl_error *error);

/* Wait until no server thread uses the region: at most about two seconds, after which they break off. */
HixlStatus hixl_regions_remove(hixl_region_table *table, MemHandle handle, hixl_error *error);

/*
 * Check `count` descriptors and take a use of each region; their lengths must add up to `bytes`. On failure
 * nothing is held. Pair with hixl_regions_release.
 */
HixlStatus hixl_regions_acquire(hixl_region_table *table, const hixl_wire_desc *descs, size_t count, uint64_t bytes,
                                hixl_target *targets, hixl_error *error);
void hixl_regions_release(hixl_region_table *table, const hixl_target *targets, size_t count);

/* Whether whoever uses these must break off now; `stalled`: its peer takes or gives no bytes. */
bool hixl_regions_must_leave(hixl_region_table *table, const hixl_target *targets, size_t count, bool stalled);

/* The payload of a LIST reply, for the caller to free; NULL with *bytes > 0 when memory is short. */
void *hixl_regions_list(hixl_region_table *table, size_t *bytes, uint64_t *count);

/* A descriptor of a backing for the caller to close, or -1; unless `writable` it can be mapped to be read only. */
int hixl_regions_dup_backing(hixl_region_table *table, uint64_t id, bool writable, uint64_t *bytes);

/* In a forked child: close its copies of descriptors. */
void hixl_regions_after_fork(hixl_region_table *table);

#endif
