/* From descriptors to what each path moves: look regions up, check both sides, merge neighbours. */
#define _GNU_SOURCE
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include "hixl/client/plan.h"
#include "hixl/client/remote.h"
#include "acl/memory.h"
#include "base/probe.h"

enum {
    PROBE_OPS = 16, /* both ends of so many are checked by one system call */
};
static_assert(2 * (int)PROBE_OPS <= (int)BASE_PROBE_MAX, "both ends fit a question");

static void *grown(void *items, size_t *capacity, size_t item_bytes) {
    size_t wanted = *capacity == 0 ? 64 : 2 * *capacity;
    void *result = realloc(items, wanted * item_bytes);
    if (result != NULL) {
        *capacity = wanted;
    }
    return result;
}

static bool add_segment(hixl_segments *list, uint64_t local, uint64_t remote, uint64_t bytes) {
    hixl_segment *last = list->count > 0 ? &list->items[list->count - 1] : NULL;
    if (last != NULL && last->local + last->bytes == local && last->remote + last->bytes == remote) {
        last->bytes += bytes;
        return true;
    }
    if (list->count == list->capacity) {
        hixl_segment *items = grown(list->items, &list->capacity, sizeof *items);
        if (items == NULL) {
            return false;
        }
        list->items = items;
    }
    list->items[list->count++] = (hixl_segment){local, remote, bytes};
    return true;
}

static bool add_tcp_op(hixl_batch *batch, uint64_t local, uint64_t region, uint64_t generation, uint64_t offset,
                       uint64_t bytes) {
    hixl_tcp_op *last = batch->num_tcp_ops > 0 ? &batch->tcp_ops[batch->num_tcp_ops - 1] : NULL;
    if (last != NULL && last->local + last->desc.bytes == local && last->desc.region == region &&
        last->desc.generation == generation && last->desc.offset + last->desc.bytes == offset) {
        last->desc.bytes += bytes;
        return true;
    }
    if (batch->num_tcp_ops == batch->tcp_capacity) {
        hixl_tcp_op *ops = grown(batch->tcp_ops, &batch->tcp_capacity, sizeof *ops);
        if (ops == NULL) {
            return false;
        }
        batch->tcp_ops = ops;
    }
    last = &batch->tcp_ops[batch->num_tcp_ops++];
    last->local = local;
    last->desc = (hixl_wire_desc){region, generation, offset, bytes};
    return true;
}

/*
 * Whether the first and last byte of each range can be read, or for a get written, as the kernel sees it. What is
 * written is what the get will put there, so that nobody sees a byte that was not asked for.
 */
static HixlStatus probe_ends(base_probe *probe, const hixl_segment *segments, size_t count, bool is_put,
                             hixl_error *error) {
    struct iovec from[2 * PROBE_OPS], asked[2 * PROBE_OPS];
    size_t i;
    int good;
    for (i = 0; i < 2 * count; i++) {
        const hixl_segment *segment = &segments[i / 2];
        const uint64_t offset = i % 2 ? segment->bytes - 1 : 0;
        from[i] = (struct iovec){.iov_base = (void *)(uintptr_t)(segment->remote + offset), .iov_len = 1};
        asked[i] = (struct iovec){.iov_base = (void *)(uintptr_t)(segment->local + offset), .iov_len = 1};
    }
    good = is_put ? base_probe_readable(probe, asked, 2 * count) : base_probe_writable(probe, from, asked, 2 * count);
    if (good == (int)(2 * count)) {
        return HIXL_SUCCESS;
    }
    if (good < 0) {
        return hixl_fail(error, HIXL_RESOURCE_EXHAUSTED, "ask whether local memory is there: %s", strerror(errno));
    }
    return hixl_fail(error, HIXL_PARAM_INVALID, "local memory [0x%" PRIx64 ", +%" PRIu64 ") is not %s at %p",
                     segments[good / 2].local, segments[good / 2].bytes, is_put ? "mapped" : "mapped and writable",
                     asked[good].iov_base);
}

/* Asynchronous msync does nothing but look whether the whole range is mapped. */
static bool is_mapped(uint64_t first, uint64_t end) {
    const uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE), start = first & ~(page - 1);
    return msync((void *)(uintptr_t)start, end - start, MS_ASYNC) == 0;
}

static HixlStatus check_segments(base_probe *probe, const hixl_segment *segments, size_t count, bool all_mapped,
                                 bool is_put, hixl_error *error) {
    size_t i;
    for (i = 0; i < count && !all_mapped; i++) {
        if (!is_mapped(segments[i].local, segments[i].local + segments[i].bytes)) {
            return hixl_fail(error, HIXL_PARAM_INVALID, "local memory [0x%" PRIx64 ", +%" PRIu64 ") is not all mapped",
                             segments[i].local, segments[i].bytes);
        }
    }
    return probe_ends(probe, segments, count, is_put, error);
}

static void remember_good(hixl_client *client, uint64_t first, uint64_t end, bool is_put) {
    client->good_first = first;
    client->good_end = end;
    client->good_to_write = !is_put;
}

/* Skip what lies in allocations of this provider, check the rest in groups. */
static HixlStatus check_unknown(base_probe *probe, const hixl_segments *segments, bool all_mapped, bool is_put,
                                hixl_error *error) {
    acl_allocation allocation = {0};
    hixl_segment unknown[PROBE_OPS];
    HixlStatus status = HIXL_SUCCESS;
    size_t i, num_unknown = 0;
    for (i = 0; i < segments->count && status == HIXL_SUCCESS; i++) {
        const hixl_segment *segment = &segments->items[i];
        if ((segment->local >= allocation.base &&
             segment->local + segment->bytes <= allocation.base + allocation.size) ||
            acl_find_allocation(segment->local, segment->bytes, &allocation) == 0) {
            continue;
        }
        unknown[num_unknown++] = *segment;
        if (num_unknown == PROBE_OPS) {
            status = check_segments(probe, unknown, num_unknown, all_mapped, is_put, error);
            num_unknown = 0;
        }
    }
    return status == HIXL_SUCCESS && num_unknown > 0
               ? check_segments(probe, unknown, num_unknown, all_mapped, is_put, error)
               : status;
}

/*
 * Copies through a mapping touch local memory with the CPU, where a bad address ends the process. Allocations of
 * this provider are known to be there; for other memory ask the kernel and remember the range, if all of it is mapped.
 */
static HixlStatus check_local(hixl_client *client, const hixl_segments *segments, bool is_put, hixl_error *error) {
    uint64_t first = UINT64_MAX, end = 0;
    acl_allocation allocation;
    base_probe probe = {0};
    HixlStatus status;
    bool all_mapped;
    size_t i;

    for (i = 0; i < segments->count; i++) {
        const hixl_segment *segment = &segments->items[i];
        first = segment->local < first ? segment->local : first;
        end = segment->local + segment->bytes > end ? segment->local + segment->bytes : end;
    }
    if ((first >= client->good_first && end <= client->good_end && (is_put || client->good_to_write)) ||
        acl_find_allocation(first, end - first, &allocation) == 0) {
        return HIXL_SUCCESS;
    }
    all_mapped = is_mapped(first, end);
    status = check_unknown(&probe, segments, all_mapped, is_put, error);
    base_probe_close(&probe);
    if (status == HIXL_SUCCESS && all_mapped) {
        remember_good(client, first, end, is_put);
    }
    return status;
}

static HixlStatus plan_op(hixl_batch *batch, const HixlOneSideOpDesc *op, uint32_t index, bool *unknown,
                          hixl_error *error) {
    uint64_t local = (uintptr_t)op->local_buf, remote = (uintptr_t)op->remote_buf;
    const hixl_remote_region *region;
    bool added;

    if (op->len == 0 || local == 0 || op->len > UINT64_MAX - local || op->len > UINT64_MAX - remote) {
        return hixl_fail(error, HIXL_PARAM_INVALID,
                         "descriptor %u: local 0x%" PRIx64 ", remote 0x%" PRIx64 ", length %" PRIu64
                         " is empty or wraps around",
                         index, local, remote, op->len);
    }
    region = hixl_remote_find(batch->client, remote, op->len);
    if (region == NULL) {
        *unknown = true;
        return hixl_fail(error, HIXL_PARAM_INVALID,
                         "descriptor %u: remote memory [0x%" PRIx64 ", +%" PRIu64 ") is not registered with server %s",
                         index, remote, op->len, batch->client->address.text);
    }
    switch (batch->is_put && region->read_only ? HIXL_PATH_TCP : region->path) {
    case HIXL_PATH_SHM:
        added = add_segment(&batch->mapped, local, (uintptr_t)(region->mapped + (remote - region->address)), op->len);
        break;
    case HIXL_PATH_CMA:
        added = add_segment(&batch->cma, local, remote, op->len);
        break;
    default:
        added = add_tcp_op(batch, local, region->region, region->generation, remote - region->address, op->len);
        break;
    }
    if (!added) {
        return hixl_fail(error, HIXL_RESOURCE_EXHAUSTED, "no memory for descriptor %u", index);
    }
    batch->num_bytes += op->len;
    return HIXL_SUCCESS;
}

static HixlStatus plan_once(hixl_batch *batch, const HixlOneSideOpDesc *ops, uint32_t num_ops, bool *unknown,
                            hixl_error *error) {
    HixlStatus status = HIXL_SUCCESS;
    uint32_t i;
    batch->mapped.count = batch->cma.count = batch->num_tcp_ops = 0;
    batch->num_bytes = 0;
    for (i = 0; i < num_ops && status == HIXL_SUCCESS; i++) {
        status = plan_op(batch, &ops[i], i, unknown, error);
    }
    return status;
}

HixlStatus hixl_plan(hixl_batch *batch, const HixlOneSideOpDesc *ops, uint32_t num_ops, int64_t deadline_ns,
                     hixl_error *error) {
    bool unknown = false;
    HixlStatus status = plan_once(batch, ops, num_ops, &unknown, error);
    if (unknown) { /* registered since the list was fetched, perhaps */
        status = hixl_remote_refresh(batch->client, deadline_ns, false, NULL, error);
        if (status == HIXL_SUCCESS) {
            status = plan_once(batch, ops, num_ops, &unknown, error);
        }
    }
    if (status == HIXL_SUCCESS && batch->mapped.count > 0) {
        status = check_local(batch->client, &batch->mapped, batch->is_put, error);
    }
    return status;
}

HixlStatus hixl_plan_fetch(hixl_batch *batch, const HixlOneSideOpDesc *ops, uint32_t num_ops, hixl_error *error) {
    uint32_t i;
    batch->mapped.count = batch->cma.count = batch->num_tcp_ops = 0;
    batch->num_bytes = 0;
    for (i = 0; i < num_ops; i++) {
        uint64_t local = (uintptr_t)ops[i].local_buf;
        if (ops[i].len == 0 || local == 0 || ops[i].len > UINT64_MAX - local) {
            return hixl_fail(error, HIXL_PARAM_INVALID,
                             "descriptor %u: local 0x%" PRIx64 ", length %" PRIu64 " is empty or wraps around", i,
                             local, ops[i].len);
        }
        /* The stream of a fetch stands for a region: what follows in it and in memory is one operation. */
        if (!add_tcp_op(batch, local, 0, 0, batch->num_bytes, ops[i].len)) {
            return hixl_fail(error, HIXL_RESOURCE_EXHAUSTED, "no memory for descriptor %u", i);
        }
        batch->num_bytes += ops[i].len;
    }
    return HIXL_SUCCESS;
}
