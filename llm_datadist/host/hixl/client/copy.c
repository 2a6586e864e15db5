/*
 * The two paths that move bytes without the server's help: mapped memory (shm) and cross-memory attach (cma).
 *
 * Segments are cut into chunks of even size in bytes, whatever their number, so that threads share large and
 * scattered batches alike. Nothing here takes a lock.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>

#include "copy/kernel.h"
#include "hixl/client/copy.h"

enum {
    CMA_IOVECS = 256, /* per call; more gain nothing, fewer cost (measured 64..1024: within 3 %) */
    DYING_MS = 50,    /* a process gives up its memory some time before it is known to have ended */
};
#define FAULT_AROUND_BYTES ((uintptr_t)64 << 10)
#define TOUCH_MIN_BYTES ((uint64_t)8 << 10) /* one or two pages are not worth the look */
#define MIN_CHUNK_BYTES ((uint64_t)256 << 10)
#define MAX_CHUNK_BYTES ((uint64_t)1 << 20)

static bool record(hixl_batch *batch, const hixl_error *error) {
    if (!atomic_flag_test_and_set(&batch->error_taken)) {
        batch->error = *error;
    }
    return false;
}

/*
 * Look at destination pages of a mapping before writing them. A page touched first by a read is mapped along with its
 * neighbours (64 KiB, the kernel's fault-around), and writable too; one touched first by a write is mapped alone.
 * The first put through a mapping costs a third this way (measured: 0.15 instead of 0.40 CPU seconds per GB), a
 * later one a cache miss per 64 KiB.
 */
static void touch(const volatile uint8_t *first, uint64_t bytes) {
    const volatile uint8_t *end = first + bytes, *next = first;
    while (next < end) {
        (void)*next;
        next = (const volatile uint8_t *)(((uintptr_t)next & ~(FAULT_AROUND_BYTES - 1)) + FAULT_AROUND_BYTES);
    }
}

static void copy_segment(const hixl_batch *batch, const hixl_segment *segment, uint64_t offset, uint64_t bytes) {
    void *local = (void *)(uintptr_t)(segment->local + offset);
    void *remote = (void *)(uintptr_t)(segment->remote + offset);
    void *to = batch->is_put ? remote : local;
    const void *from = batch->is_put ? local : remote;
    if (batch->is_put && bytes >= TOUCH_MIN_BYTES) {
        touch(to, bytes);
    }
    if (bytes >= COPY_STREAM_MIN_SEGMENT && batch->num_bytes >= COPY_STREAM_MIN_BATCH) {
        copy_stream(to, from, bytes);
    } else {
        memcpy(to, from, bytes);
    }
}

/* The pidfd keeps no pid from being reused, it tells: looked at before, so that we do not write into a stranger,
 * and after, so that we do not believe what we read from one. */
static bool server_ended(const hixl_client *client, int wait_ms) {
    struct pollfd entry = {.fd = client->pid_fd, .events = POLLIN};
    int ready;
    do {
        ready = poll(&entry, 1, wait_ms);
    } while (ready < 0 && errno == EINTR); /* a signal of the application's says nothing about the server */
    return ready > 0;
}

static bool fail_cma(hixl_batch *batch, int code, const struct iovec *local, const struct iovec *remote) {
    const hixl_client *client = batch->client;
    hixl_error error;
    if (code == ESRCH || server_ended(client, DYING_MS)) {
        hixl_fail(&error, HIXL_NOT_CONNECTED, "server %s (process %d) has ended", client->address.text,
                  client->server_pid);
    } else {
        hixl_fail(&error, HIXL_FAILED, "%s process %d memory %p, +%zu, local %p: %s",
                  batch->is_put ? "write to" : "read from", client->server_pid, remote->iov_base, remote->iov_len,
                  local->iov_base, strerror(code));
    }
    return record(batch, &error);
}

static void skip_iov(struct iovec **iov, size_t *count, size_t bytes) {
    while (*count > 0 && bytes >= (*iov)->iov_len) {
        bytes -= (*iov)->iov_len;
        (*iov)++;
        (*count)--;
    }
    if (bytes > 0) {
        (*iov)->iov_base = (uint8_t *)(*iov)->iov_base + bytes;
        (*iov)->iov_len -= bytes;
    }
}

/* Move a run of equal iovecs; partial results go on where they stopped, which names the byte that fails. */
static bool cma_move(hixl_batch *batch, struct iovec *local, struct iovec *remote, size_t count) {
    const hixl_client *client = batch->client;
    size_t num_local = count, num_remote = count;
    while (num_local > 0) {
        ssize_t moved;
        if (server_ended(client, 0)) {
            return fail_cma(batch, ESRCH, local, remote);
        }
        moved = batch->is_put ? process_vm_writev(client->server_pid, local, num_local, remote, num_remote, 0)
                              : process_vm_readv(client->server_pid, local, num_local, remote, num_remote, 0);
        if (moved <= 0) {
            return fail_cma(batch, moved == 0 ? EFAULT : errno, local, remote);
        }
        skip_iov(&local, &num_local, (size_t)moved);
        skip_iov(&remote, &num_remote, (size_t)moved);
    }
    if (server_ended(client, 0)) {
        hixl_error error;
        hixl_fail(&error, HIXL_NOT_CONNECTED, "server %s (process %d) has ended", client->address.text,
                  client->server_pid);
        return record(batch, &error);
    }
    return true;
}

/* `bytes` from `offset` in segments[0] on. */
static bool cma_run(hixl_batch *batch, const hixl_segment *segments, uint64_t offset, uint64_t bytes) {
    struct iovec local[CMA_IOVECS], remote[CMA_IOVECS];
    size_t count = 0;
    while (bytes > 0) {
        uint64_t part = segments->bytes - offset < bytes ? segments->bytes - offset : bytes;
        local[count] = (struct iovec){.iov_base = (void *)(uintptr_t)(segments->local + offset), .iov_len = part};
        remote[count] = (struct iovec){.iov_base = (void *)(uintptr_t)(segments->remote + offset), .iov_len = part};
        count++;
        bytes -= part;
        offset = 0;
        segments++;
        if (count == CMA_IOVECS || bytes == 0) {
            if (!cma_move(batch, local, remote, count)) {
                return false;
            }
            count = 0;
        }
    }
    return true;
}

bool hixl_copy_run(copy_job *job, size_t index) {
    hixl_batch *batch = (hixl_batch *)((uint8_t *)job - offsetof(hixl_batch, job));
    const hixl_chunk *chunk = &batch->chunks[index];
    const hixl_segment *segment;
    uint64_t offset = chunk->offset, bytes = chunk->bytes;

    if (chunk->first >= batch->mapped.count) {
        return cma_run(batch, &batch->cma.items[chunk->first - batch->mapped.count], offset, bytes);
    }
    for (segment = &batch->mapped.items[chunk->first]; bytes > 0; segment++) {
        uint64_t part = segment->bytes - offset < bytes ? segment->bytes - offset : bytes;
        copy_segment(batch, segment, offset, part);
        bytes -= part;
        offset = 0;
    }
    return true;
}

bool hixl_copy_all(hixl_batch *batch) {
    uint64_t bytes = 0;
    size_t i;
    for (i = 0; i < batch->mapped.count; i++) {
        copy_segment(batch, &batch->mapped.items[i], 0, batch->mapped.items[i].bytes);
    }
    for (i = 0; i < batch->cma.count; i++) {
        bytes += batch->cma.items[i].bytes;
    }
    return bytes == 0 || cma_run(batch, batch->cma.items, 0, bytes);
}

static bool cut_list(hixl_batch *batch, const hixl_segments *list, uint32_t first, uint64_t chunk_bytes) {
    size_t i = 0, *count = &batch->job.num_chunks;
    uint64_t offset = 0;
    while (i < list->count) {
        hixl_chunk *chunk;
        if (*count == batch->chunk_capacity) {
            size_t capacity = *count == 0 ? 64 : 2 * *count;
            hixl_chunk *chunks = realloc(batch->chunks, capacity * sizeof *chunks);
            if (chunks == NULL) {
                return false;
            }
            batch->chunks = chunks;
            batch->chunk_capacity = capacity;
        }
        chunk = &batch->chunks[(*count)++];
        *chunk = (hixl_chunk){first + (uint32_t)i, offset, 0};
        while (i < list->count && chunk->bytes < chunk_bytes) {
            uint64_t left = list->items[i].bytes - offset, room = chunk_bytes - chunk->bytes;
            if (left > room) {
                offset += room;
                chunk->bytes += room;
            } else {
                offset = 0;
                chunk->bytes += left;
                i++;
            }
        }
    }
    return true;
}

bool hixl_copy_cut(hixl_batch *batch) {
    uint64_t chunk_bytes = batch->num_bytes / (8 * copy_pool_width());
    chunk_bytes = chunk_bytes < MIN_CHUNK_BYTES ? MIN_CHUNK_BYTES : chunk_bytes;
    chunk_bytes = chunk_bytes > MAX_CHUNK_BYTES ? MAX_CHUNK_BYTES : chunk_bytes & ~(uint64_t)4095;
    batch->job.num_chunks = 0;
    batch->job.run = hixl_copy_run;
    return cut_list(batch, &batch->mapped, 0, chunk_bytes) &&
           cut_list(batch, &batch->cma, (uint32_t)batch->mapped.count, chunk_bytes);
}
