/* The regions a server lets its clients read and write; see hixl/server/region.h. */
#define _GNU_SOURCE
#include "hixl/server/region.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "hixl/shared/socket.h"
#include "base/deadline.h"
#include "acl/memory.h"

/* A handle is slot and generation in one word: a stale or foreign one misses instead of being followed. */
#define SLOT_BITS 16
#define GENERATION_BITS 47
static_assert(HIXL_MAX_REGIONS == 1u << SLOT_BITS, "a slot fits a handle");

/* How long users of a region that move bytes may go on before an unregistration breaks them off. */
#define GRACE_NS (2 * HIXL_SECOND_NS)

static MemHandle handle_of(const hixl_region *region) {
    return (MemHandle)(uintptr_t)(region->generation << SLOT_BITS | region->slot);
}

HixlStatus hixl_regions_init(hixl_region_table *table, hixl_error *error) {
    pthread_condattr_t attributes;
    uint32_t seed;

    memset(table, 0, sizeof *table);
    if (!hixl_random_bytes(&seed, sizeof seed)) {
        return hixl_fail(error, HIXL_FAILED, "getrandom: %s", strerror(errno));
    }
    table->last_generation = seed; /* a restarted server does not repeat what its predecessor said */
    pthread_mutex_init(&table->lock, NULL);
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&table->unused, &attributes);
    pthread_condattr_destroy(&attributes);
    return HIXL_SUCCESS;
}

static void drop_backing(hixl_region_table *table, hixl_backing *backing) {
    hixl_backing **link = &table->backings;
    if (backing == NULL || --backing->num_regions > 0) {
        return;
    }
    while (*link != backing) {
        link = &(*link)->next;
    }
    *link = backing->next;
    close(backing->fd);
    free(backing);
}

void hixl_regions_destroy(hixl_region_table *table) {
    size_t i;
    for (i = 0; i < table->num_slots; i++) {
        drop_backing(table, table->slots[i]->backing);
        free(table->slots[i]->tag);
        free(table->slots[i]);
    }
    free(table->slots);
    pthread_cond_destroy(&table->unused);
    pthread_mutex_destroy(&table->lock);
}

/* Locked. Find or make the entry of an allocation's memfd. */
static HixlStatus hold_backing(hixl_region_table *table, const acl_allocation *allocation, hixl_backing **out,
                               hixl_error *error) {
    hixl_backing *backing;
    for (backing = table->backings; backing != NULL; backing = backing->next) {
        if (backing->id == allocation->id) {
            backing->num_regions++;
            *out = backing;
            return HIXL_SUCCESS;
        }
    }
    backing = calloc(1, sizeof *backing);
    if (backing == NULL) {
        return hixl_fail(error, HIXL_RESOURCE_EXHAUSTED, "no memory for a region");
    }
    backing->fd = acl_dup_allocation_fd(allocation->id);
    if (backing->fd < 0) {
        int code = errno;
        free(backing);
        return hixl_fail(error, HIXL_RESOURCE_EXHAUSTED, "duplicate the descriptor of allocation 0x%" PRIx64 ": %s",
                         allocation->base, strerror(code));
    }
    backing->id = allocation->id;
    backing->bytes = allocation->mapped;
    backing->num_regions = 1;
    backing->next = table->backings;
    table->backings = backing;
    *out = backing;
    return HIXL_SUCCESS;
}

/* Locked. A vacant slot: its region object stays allocated as long as the table. */
static hixl_region *vacant_slot(hixl_region_table *table) {
    hixl_region *region = table->free_list;
    if (region != NULL) {
        table->free_list = region->next_free;
        return region;
    }
    if (table->num_slots == table->capacity) {
        size_t capacity = table->capacity == 0 ? 64 : 2 * table->capacity;
        hixl_region **slots = realloc(table->slots, capacity * sizeof *slots);
        if (slots == NULL) {
            return NULL;
        }
        table->slots = slots;
        table->capacity = capacity;
    }
    region = calloc(1, sizeof *region);
    if (region != NULL) {
        region->slot = table->num_slots;
        table->slots[table->num_slots++] = region;
    }
    return region;
}

static HixlStatus add_locked(hixl_region_table *table, char *tag, const CommMem *mem, MemHandle *out,
                             hixl_error *error) {
    acl_allocation allocation;
    hixl_backing *backing = NULL;
    hixl_region *region;
    uint64_t slot, address = (uintptr_t)mem->addr;

    if (table->num_live >= HIXL_MAX_REGIONS) {
        return hixl_fail(error, HIXL_RESOURCE_EXHAUSTED, "a server holds at most %u regions", HIXL_MAX_REGIONS);
    }
    if (acl_find_allocation(address, mem->size, &allocation) == 0) {
        HixlStatus status = hold_backing(table, &allocation, &backing, error);
        if (status != HIXL_SUCCESS) {
            return status;
        }
    }
    region = vacant_slot(table);
    if (region == NULL) {
        drop_backing(table, backing);
        return hixl_fail(error, HIXL_RESOURCE_EXHAUSTED, "no memory for a region");
    }
    slot = region->slot;
    memset(region, 0, sizeof *region);
    region->slot = slot;
    region->generation = ++table->last_generation & ((UINT64_C(1) << GENERATION_BITS) - 1);
    region->address = address;
    region->bytes = mem->size;
    region->type = mem->type;
    region->tag = tag;
    region->backing = backing;
    region->backing_offset = backing != NULL ? address - allocation.base : 0;
    table->num_live++;
    *out = handle_of(region);
    return HIXL_SUCCESS;
}

HixlStatus hixl_regions_add(hixl_region_table *table, const char *tag, const CommMem *mem, MemHandle *out,
                            hixl_error *error) {
    char *copy = NULL;
    HixlStatus status;

    if (mem->addr == NULL || mem->size == 0 || mem->size > UINT64_MAX - (uintptr_t)mem->addr) {
        return hixl_fail(error, HIXL_PARAM_INVALID, "memory [%p, +%" PRIu64 ") is empty or wraps around", mem->addr,
                         mem->size);
    }
    if (mem->type != COMM_MEM_TYPE_DEVICE && mem->type != COMM_MEM_TYPE_HOST) {
        return hixl_fail(error, HIXL_PARAM_INVALID, "memory type %d is neither device (0) nor host (1)", mem->type);
    }
    if (tag != NULL) {
        if (strlen(tag) > HIXL_MAX_TAG_BYTES) {
            return hixl_fail(error, HIXL_PARAM_INVALID, "tag of %zu bytes: at most %u", strlen(tag),
                             HIXL_MAX_TAG_BYTES);
        }
        copy = strdup(tag);
        if (copy == NULL) {
            return hixl_fail(error, HIXL_RESOURCE_EXHAUSTED, "no memory for a region");
        }
    }
    pthread_mutex_lock(&table->lock);
    status = add_locked(table, copy, mem, out, error);
    pthread_mutex_unlock(&table->lock);
    if (status != HIXL_SUCCESS) {
        free(copy);
    }
    return status;
}

/* Locked. NULL unless the name is of a live region. */
static hixl_region *live_region(hixl_region_table *table, uint64_t slot, uint64_t generation) {
    hixl_region *region = slot < table->num_slots ? table->slots[slot] : NULL;
    return region != NULL && region->bytes > 0 && region->generation == generation && !region->retiring ? region : NULL;
}

HixlStatus hixl_regions_remove(hixl_region_table *table, MemHandle handle, hixl_error *error) {
    uint64_t name = (uintptr_t)handle;
    struct timespec grace = hixl_timespec(hixl_now_ns() + GRACE_NS);
    hixl_region *region;

    pthread_mutex_lock(&table->lock);
    region = live_region(table, name & (HIXL_MAX_REGIONS - 1), name >> SLOT_BITS);
    if (region == NULL) {
        pthread_mutex_unlock(&table->lock);
        return hixl_fail(error, HIXL_PARAM_INVALID, "memory handle %p is not registered with this server", handle);
    }
    region->retiring = true;
    atomic_fetch_add(&table->num_retiring, 1);
    while (region->num_users > 0) {
        if (region->evicting) {
            pthread_cond_wait(&table->unused, &table->lock);
        } else if (pthread_cond_timedwait(&table->unused, &table->lock, &grace) == ETIMEDOUT) {
            region->evicting = true;
        }
    }
    atomic_fetch_sub(&table->num_retiring, 1);
    drop_backing(table, region->backing);
    free(region->tag);
    region->tag = NULL;
    region->backing = NULL;
    region->bytes = 0;
    region->next_free = table->free_list;
    table->free_list = region;
    table->num_live--;
    pthread_mutex_unlock(&table->lock);
    return HIXL_SUCCESS;
}

static void release_locked(hixl_region_table *table, const hixl_target *targets, size_t count) {
    bool wake = false;
    size_t i;
    for (i = 0; i < count; i++) {
        wake |= --targets[i].region->num_users == 0 && targets[i].region->retiring;
    }
    if (wake) {
        pthread_cond_broadcast(&table->unused);
    }
}

HixlStatus hixl_regions_acquire(hixl_region_table *table, const hixl_wire_desc *descs, size_t count, uint64_t bytes,
                                hixl_target *targets, hixl_error *error) {
    HixlStatus status = HIXL_SUCCESS;
    uint64_t sum = 0;
    size_t i;

    pthread_mutex_lock(&table->lock);
    for (i = 0; i < count; i++) {
        const hixl_wire_desc *desc = &descs[i];
        hixl_region *region = live_region(table, desc->region, desc->generation);
        if (region == NULL) {
            status = hixl_fail(error, HIXL_PARAM_INVALID,
                               "descriptor %zu: region %" PRIu64 " generation %" PRIu64 " is not registered", i,
                               desc->region, desc->generation);
            break;
        }
        if (desc->bytes == 0 || desc->offset > region->bytes || desc->bytes > region->bytes - desc->offset) {
            status = hixl_fail(error, HIXL_PARAM_INVALID,
                               "descriptor %zu: [%" PRIu64 ", +%" PRIu64 ") is outside its region of %" PRIu64 " bytes",
                               i, desc->offset, desc->bytes, region->bytes);
            break;
        }
        if (desc->bytes > bytes - sum) {
            status = hixl_fail(error, HIXL_PARAM_INVALID, "descriptors exceed the %" PRIu64 " bytes announced", bytes);
            break;
        }
        sum += desc->bytes;
        region->num_users++;
        targets[i].region = region;
        targets[i].address = (uint8_t *)(uintptr_t)(region->address + desc->offset);
        targets[i].bytes = desc->bytes;
    }
    if (status == HIXL_SUCCESS && sum != bytes) {
        status = hixl_fail(error, HIXL_PARAM_INVALID,
                           "descriptors of %" PRIu64 " bytes, but %" PRIu64 " were announced", sum, bytes);
    }
    if (status != HIXL_SUCCESS) {
        release_locked(table, targets, i);
    }
    pthread_mutex_unlock(&table->lock);
    return status;
}

void hixl_regions_release(hixl_region_table *table, const hixl_target *targets, size_t count) {
    pthread_mutex_lock(&table->lock);
    release_locked(table, targets, count);
    pthread_mutex_unlock(&table->lock);
}

bool hixl_regions_must_leave(hixl_region_table *table, const hixl_target *targets, size_t count, bool stalled) {
    bool leave = false;
    size_t i;
    if (atomic_load(&table->num_retiring) == 0) {
        return false;
    }
    pthread_mutex_lock(&table->lock);
    for (i = 0; i < count && !leave; i++) {
        leave = targets[i].region->evicting || (stalled && targets[i].region->retiring);
    }
    pthread_mutex_unlock(&table->lock);
    return leave;
}

void *hixl_regions_list(hixl_region_table *table, size_t *bytes, uint64_t *count) {
    size_t i, tag_bytes = 0, used = 0;
    hixl_wire_region *regions;
    char *tags;

    pthread_mutex_lock(&table->lock);
    for (i = 0; i < table->num_slots; i++) {
        tag_bytes += table->slots[i]->tag != NULL ? strlen(table->slots[i]->tag) : 0;
    }
    *bytes = table->num_live * sizeof *regions + tag_bytes;
    regions = calloc(1, *bytes + 1); /* one more: an empty list is no failure */
    if (regions == NULL) {
        pthread_mutex_unlock(&table->lock);
        return NULL;
    }
    tags = (char *)(regions + table->num_live);
    for (i = 0; i < table->num_slots; i++) {
        const hixl_region *region = table->slots[i];
        hixl_wire_region *out = &regions[used];
        if (region->bytes == 0 || region->retiring) {
            continue;
        }
        out->region = region->slot;
        out->generation = region->generation;
        out->address = region->address;
        out->bytes = region->bytes;
        out->backing = region->backing != NULL ? region->backing->id : 0;
        out->backing_offset = region->backing_offset;
        out->type = region->type;
        out->tag_bytes = region->tag != NULL ? (uint32_t)strlen(region->tag) : 0;
        if (out->tag_bytes > 0) {
            memcpy(tags, region->tag, out->tag_bytes);
            tags += out->tag_bytes;
        }
        used++;
    }
    if (used < table->num_live) { /* some are retiring: close the gap they left between entries and tags */
        char *from = (char *)(regions + table->num_live);
        size_t kept = (size_t)(tags - from);
        memmove(regions + used, from, kept);
        tags = (char *)(regions + used) + kept;
    }
    *bytes = (size_t)(tags - (char *)regions);
    *count = used;
    pthread_mutex_unlock(&table->lock);
    return regions;
}

/* The file of a descriptor, opened anew to be read. */
static int open_to_read(int fd) {
    char path[40];
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    return open(path, O_RDONLY | O_CLOEXEC);
}

int hixl_regions_dup_backing(hixl_region_table *table, uint64_t id, bool writable, uint64_t *bytes) {
    const hixl_backing *backing;
    int fd = -1;
    pthread_mutex_lock(&table->lock);
    for (backing = table->backings; backing != NULL; backing = backing->next) {
        if (backing->id == id) {
            *bytes = backing->bytes;
            fd = writable ? fcntl(backing->fd, F_DUPFD_CLOEXEC, 0) : open_to_read(backing->fd);
            break;
        }
    }
    pthread_mutex_unlock(&table->lock);
    return fd;
}

void hixl_regions_after_fork(hixl_region_table *table) {
    const hixl_backing *backing;
    for (backing = table->backings; backing != NULL; backing = backing->next) {
        close(backing->fd);
    }
}
