/* Batches: submission, completion, waiting, cancellation. */
#define _GNU_SOURCE
#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "hixl/client/connect.h"
#include "hixl/client/copy.h"
#include "hixl/client/plan.h"
#include "hixl/client/remote.h"
#include "hixl/client/tcp.h"
#include "acl/memory.h"
#include "llm_datadist/ldd_ext.h"

/*
 * Up to here a batch is copied in the call that submits it: a helper takes tens of microseconds to wake, in which
 * one thread moves this much. A synchronous call waits anyway, so it does more by itself.
 */
#define INLINE_ASYNC_BYTES ((uint64_t)128 << 10)
#define INLINE_SYNC_BYTES ((uint64_t)1 << 20)
/* Between looks at the client while other threads copy or the peer is silent. */
#define SLICE_NS (100 * HIXL_MS_NS)
/* How long a submission may wait for a region list it needs. */
#define REFRESH_NS HIXL_SECOND_NS

/* Arrays are kept for the next batch: large ones only in the slots that are used over and over. */
enum { KEPT_SLOTS = 8, KEPT_ITEMS = 1024 };

#define SLOT_BITS 12
static_assert(HIXL_MAX_BATCHES == 1u << SLOT_BITS, "a slot fits a handle");

static CompleteHandle handle_of(const hixl_batch *batch) {
    return (CompleteHandle)(uintptr_t)(batch->generation << SLOT_BITS | batch->slot);
}

static hixl_batch *find_batch(hixl_client *client, CompleteHandle handle) {
    uint64_t name = (uintptr_t)handle;
    unsigned slot = name & (HIXL_MAX_BATCHES - 1);
    hixl_batch *batch = slot < client->num_slots ? client->batches[slot] : NULL;
    return batch != NULL && batch->state != HIXL_BATCH_FREE && !batch->abandoned &&
                   batch->generation == name >> SLOT_BITS
               ? batch
               : NULL;
}

static hixl_batch *take_slot(hixl_client *client) {
    hixl_batch *batch;
    if (client->num_free > 0) {
        batch = client->batches[client->free_slots[--client->num_free]];
    } else {
        if (client->num_slots == HIXL_MAX_BATCHES || (batch = calloc(1, sizeof *batch)) == NULL) {
            return NULL;
        }
        if (!copy_job_init(&batch->job)) {
            free(batch);
            return NULL;
        }
        batch->client = client;
        batch->slot = client->num_slots;
        client->batches[client->num_slots++] = batch;
    }
    batch->generation = ++client->batch_generation;
    batch->state = HIXL_BATCH_RUNNING;
    batch->copying = batch->tcp_pending = batch->abandoned = false;
    batch->fetch_request = NULL;
    batch->num_waiters = 0;
    batch->error.status = HIXL_SUCCESS;
    atomic_flag_clear(&batch->error_taken);
    client->num_running++;
    return batch;
}

/* The batch has ended one way or the other, and no thread moves a byte of it. */
static void end_batch(hixl_batch *batch, hixl_batch_state state) {
    if (batch->state == HIXL_BATCH_RUNNING) {
        batch->client->num_running--;
        hixl_remote_unmap_retired(batch->client);
    }
    batch->state = state;
}

static void *trimmed(void *items, size_t *capacity) {
    if (*capacity <= KEPT_ITEMS) {
        return items;
    }
    free(items);
    *capacity = 0;
    return NULL;
}

static void free_slot(hixl_batch *batch) {
    hixl_client *client = batch->client;
    end_batch(batch, HIXL_BATCH_FREE);
    if (batch->slot >= KEPT_SLOTS) {
        batch->mapped.items = trimmed(batch->mapped.items, &batch->mapped.capacity);
        batch->cma.items = trimmed(batch->cma.items, &batch->cma.capacity);
        batch->chunks = trimmed(batch->chunks, &batch->chunk_capacity);
        batch->tcp_ops = trimmed(batch->tcp_ops, &batch->tcp_capacity);
    }
    client->free_slots[client->num_free++] = (uint16_t)batch->slot;
}

/* End the batch as failed, which poisons the client; no byte of it moves afterwards. */
static void fail_batch(hixl_batch *batch, const hixl_error *error) {
    hixl_client *client = batch->client;
    if (batch->copying) {
        copy_job_stop(&batch->job);
        batch->copying = false;
    }
    batch->error = *error;
    hixl_poison(client, error);
    if (batch->tcp_pending) { /* its bytes, and the next ones' replies, are lost in the middle of the streams */
        TAILQ_REMOVE(&client->tcp_queue, batch, entry);
        batch->tcp_pending = false;
        hixl_tcp_abort(client);
    }
    end_batch(batch, HIXL_BATCH_FAILED);
}

static void progress_streams(hixl_client *client) {
    hixl_error error = {0};
    hixl_batch *failed = hixl_tcp_progress(client, &error);
    if (failed != NULL) {
        fail_batch(failed, &error);
    }
}

/* Move what can be moved without waiting, and see whether the batch has ended. */
static void advance(hixl_client *client, hixl_batch *batch) {
    hixl_error error;
    if (batch->copying && copy_job_done(&batch->job)) {
        batch->copying = false;
        if (atomic_load(&batch->job.stopped)) {
            error = batch->error;
            fail_batch(batch, &error);
        }
    }
    if (batch->state == HIXL_BATCH_RUNNING && batch->tcp_pending) {
        if (client->poison.status != HIXL_SUCCESS) { /* another batch took the streams down */
            error = client->poison;
            fail_batch(batch, &error);
        } else if (hixl_link_check(client, &error) != HIXL_SUCCESS) {
            fail_batch(batch, &error);
        } else {
            progress_streams(client);
        }
    }
    if (batch->state == HIXL_BATCH_RUNNING && !batch->copying && !batch->tcp_pending) {
        end_batch(batch, HIXL_BATCH_COMPLETED);
    }
}

static void sleep_for_streams(hixl_client *client, int64_t deadline_ns) {
    struct pollfd entries[HIXL_MAX_STREAMS + 2];
    size_t count = hixl_tcp_poll_set(client, entries);
    if (client->in_round) { /* of another waiter, who has the streams */
        deadline_ns = hixl_earlier(deadline_ns, hixl_now_ns() + HIXL_MS_NS);
    }
    entries[count++] = (struct pollfd){.fd = client->admin_fd, .events = POLLRDHUP};
    entries[count++] = (struct pollfd){.fd = client->pid_fd, .events = POLLIN};
    pthread_mutex_unlock(&client->lock);
    poll(entries, count, hixl_poll_ms(deadline_ns));
    pthread_mutex_lock(&client->lock);
    if (entries[count - 1].revents || entries[count - 2].revents) {
        client->alive_ns = 0; /* ask at once, not after the usual pause */
    }
}

/* Drive the batch until it ends or the deadline passes. Locked on entry and exit. */
static void wait_batch(hixl_client *client, hixl_batch *batch, int64_t deadline_ns) {
    batch->num_waiters++;
    for (;;) {
        int64_t slice_ns;
        bool moved = false;
        if (batch->copying) {
            pthread_mutex_unlock(&client->lock);
            copy_job_help(&batch->job, deadline_ns);
            pthread_mutex_lock(&client->lock);
        }
        if (batch->state == HIXL_BATCH_RUNNING) {
            moved = batch->tcp_pending && hixl_tcp_round(client, deadline_ns);
        }
        if (batch->state == HIXL_BATCH_RUNNING) {
            advance(client, batch);
        }
        if (batch->state != HIXL_BATCH_RUNNING || hixl_now_ns() >= deadline_ns) {
            break;
        }
        if (moved) {
            continue;
        }
        slice_ns = hixl_earlier(deadline_ns, hixl_now_ns() + SLICE_NS);
        if (batch->tcp_pending) {
            sleep_for_streams(client, slice_ns);
        } else {
            pthread_mutex_unlock(&client->lock);
            copy_job_wait(&batch->job, slice_ns);
            pthread_mutex_lock(&client->lock);
        }
    }
    batch->num_waiters--;
}

/* Give up: afterwards no byte is written here on behalf of the batch. */
static void cancel(hixl_batch *batch, HixlStatus status, const char *why) {
    if (batch->state == HIXL_BATCH_RUNNING) {
        hixl_error error;
        hixl_fail(&error, status, "batch of %" PRIu64 " bytes with %s: %s", batch->num_bytes,
                  batch->client->address.text, why);
        fail_batch(batch, &error);
    }
}

/* Hand an ended batch's outcome to the caller and free its handle. */
static HixlStatus reap(hixl_batch *batch, hixl_error *error) {
    HixlStatus status = HIXL_SUCCESS;
    if (batch->state == HIXL_BATCH_FAILED) {
        *error = batch->error;
        status = error->status;
    }
    if (batch->num_waiters == 0) {
        free_slot(batch);
    } else {
        batch->abandoned = true;
    }
    return status;
}

static HixlStatus check_usable(hixl_client *client, hixl_error *error) {
    HixlStatus status;
    if (!client->connected) {
        return hixl_fail(error, HIXL_NOT_CONNECTED, "client is not connected");
    }
    if (client->poison.status != HIXL_SUCCESS) {
        return hixl_fail(error, HIXL_FAILED, "an earlier batch failed, connect anew: %.280s", client->poison.text);
    }
    status = hixl_link_check(client, error);
    if (status != HIXL_SUCCESS) {
        hixl_poison(client, error);
    }
    return status;
}

/* Start a planned batch. What fails here fails before a byte has moved, or ends the batch as failed. */
static HixlStatus start(hixl_client *client, hixl_batch *batch, uint64_t inline_bytes, hixl_error *error) {
    bool copies = batch->mapped.count + batch->cma.count > 0;
    bool at_once = batch->num_bytes <= inline_bytes;

    if (copies && !at_once && !hixl_copy_cut(batch)) {
        return hixl_fail(error, HIXL_RESOURCE_EXHAUSTED, "no memory for a batch of %" PRIu64 " bytes",
                         batch->num_bytes);
    }
    if (batch->num_tcp_ops > 0) {
        hixl_tcp_submit(client, batch);
        progress_streams(client); /* the request leaves now, not when somebody comes to wait */
        if (batch->state != HIXL_BATCH_RUNNING) {
            return HIXL_SUCCESS;
        }
    }
    if (copies && at_once) {
        if (!hixl_copy_all(batch)) {
            hixl_error failure = batch->error;
            fail_batch(batch, &failure);
        }
    } else if (copies) {
        batch->copying = true;
        copy_job_start(&batch->job, copy_pool_width() > 1 ? copy_pool_width() - 1 : 1);
    }
    if (batch->state == HIXL_BATCH_RUNNING && !batch->copying && !batch->tcp_pending) {
        end_batch(batch, HIXL_BATCH_COMPLETED);
    }
    return HIXL_SUCCESS;
}

static HixlStatus new_batch(hixl_client *client, bool is_put, hixl_batch **out, hixl_error *error) {
    HixlStatus status = check_usable(client, error);
    if (status != HIXL_SUCCESS) {
        return status;
    }
    *out = take_slot(client);
    if (*out == NULL) {
        return hixl_fail(error, HIXL_RESOURCE_EXHAUSTED,
                         "no room for another batch: %u are not queried to their end, %d may be", client->num_slots,
                         HIXL_MAX_BATCHES);
    }
    (*out)->is_put = is_put;
    return HIXL_SUCCESS;
}

static HixlStatus submit(hixl_client *client, uint32_t num_ops, const HixlOneSideOpDesc *ops, bool is_put,
                         uint64_t inline_bytes, int64_t deadline_ns, hixl_batch **out, hixl_error *error) {
    hixl_batch *batch;
    HixlStatus status = new_batch(client, is_put, &batch, error);
    if (status != HIXL_SUCCESS) {
        return status;
    }
    status = hixl_plan(batch, ops, num_ops, deadline_ns, error);
    if (status == HIXL_SUCCESS) {
        status = start(client, batch, inline_bytes, error);
    }
    if (status != HIXL_SUCCESS) {
        free_slot(batch);
        return status;
    }
    *out = batch;
    return HIXL_SUCCESS;
}

static HixlStatus check_ops(uint32_t num_ops, const HixlOneSideOpDesc *ops, hixl_error *error) {
    if (ops == NULL || num_ops == 0) {
        return hixl_fail(error, HIXL_PARAM_INVALID, "%s", ops == NULL ? "ops is NULL" : "num_ops is 0");
    }
    return HIXL_SUCCESS;
}

static HixlStatus submit_async(HixlClientHandle handle, uint32_t num_ops, const HixlOneSideOpDesc *ops, bool is_put,
                               CompleteHandle *out_handle) {
    hixl_error *error = hixl_thread_error();
    hixl_client *client = hixl_checked_client(handle, error);
    hixl_batch *batch;
    HixlStatus status;
    if (client == NULL) {
        return error->status;
    }
    status = check_ops(num_ops, ops, error);
    if (status == HIXL_SUCCESS && out_handle == NULL) {
        status = hixl_fail(error, HIXL_PARAM_INVALID, "out_handle is NULL");
    }
    if (status != HIXL_SUCCESS) {
        return status;
    }
    pthread_mutex_lock(&client->lock);
    status = submit(client, num_ops, ops, is_put, INLINE_ASYNC_BYTES, hixl_deadline_after(REFRESH_NS), &batch, error);
    if (status == HIXL_SUCCESS) {
        *out_handle = handle_of(batch);
    }
    pthread_mutex_unlock(&client->lock);
    return status;
}

static HixlStatus submit_sync(HixlClientHandle handle, uint32_t num_ops, const HixlOneSideOpDesc *ops, bool is_put,
                              uint32_t timeout_ms) {
    hixl_error *error = hixl_thread_error();
    int64_t deadline_ns = hixl_deadline_after((int64_t)timeout_ms * HIXL_MS_NS);
    hixl_client *client = hixl_checked_client(handle, error);
    hixl_batch *batch;
    HixlStatus status;
    if (client == NULL) {
        return error->status;
    }
    status = check_ops(num_ops, ops, error);
    if (status != HIXL_SUCCESS) {
        return status;
    }
    pthread_mutex_lock(&client->lock);
    status = submit(client, num_ops, ops, is_put, INLINE_SYNC_BYTES, deadline_ns, &batch, error);
    if (status == HIXL_SUCCESS) {
        if (batch->state == HIXL_BATCH_RUNNING) {
            wait_batch(client, batch, deadline_ns);
            cancel(batch, HIXL_TIMEOUT, "time is up");
        }
        status = reap(batch, error);
    }
    pthread_mutex_unlock(&client->lock);
    return status;
}

LDD_EXPORT HixlStatus HixlCSClientBatchPutAsync(HixlClientHandle client, uint32_t num_ops, const HixlOneSideOpDesc *ops,
                                                CompleteHandle *out_handle) {
    return submit_async(client, num_ops, ops, true, out_handle);
}

LDD_EXPORT HixlStatus HixlCSClientBatchGetAsync(HixlClientHandle client, uint32_t num_ops, const HixlOneSideOpDesc *ops,
                                                CompleteHandle *out_handle) {
    return submit_async(client, num_ops, ops, false, out_handle);
}

LDD_EXPORT HixlStatus LddClientFetchAsync(HixlClientHandle handle, const void *request, uint32_t request_bytes,
                                          uint32_t num_ops, const HixlOneSideOpDesc *ops, LddFetchReply *reply,
                                          CompleteHandle *out_handle) {
    hixl_error *error = hixl_thread_error();
    hixl_client *client = hixl_checked_client(handle, error);
    hixl_batch *batch;
    HixlStatus status;
    if (client == NULL) {
        return error->status;
    }
    status = check_ops(num_ops, ops, error);
    if (status == HIXL_SUCCESS && (request == NULL || reply == NULL || out_handle == NULL)) {
        status = hixl_fail(error, HIXL_PARAM_INVALID, "%s is NULL",
                           request == NULL ? "request"
                           : reply == NULL ? "reply"
                                           : "out_handle");
    }
    if (status == HIXL_SUCCESS && (request_bytes == 0 || request_bytes > LDD_FETCH_MAX_REQUEST_BYTES)) {
        status = hixl_fail(error, HIXL_PARAM_INVALID, "request_bytes is %u, allowed are 1 to %u", request_bytes,
                           (unsigned)LDD_FETCH_MAX_REQUEST_BYTES);
    }
    if (status != HIXL_SUCCESS) {
        return status;
    }
    pthread_mutex_lock(&client->lock);
    status = new_batch(client, false, &batch, error);
    if (status == HIXL_SUCCESS) {
        batch->fetch_request = request;
        batch->fetch_bytes = request_bytes;
        batch->fetch_reply = reply;
        reply->status = 0;
        reply->text[0] = '\0';
        status = hixl_plan_fetch(batch, ops, num_ops, error);
        if (status == HIXL_SUCCESS) {
            status = start(client, batch, INLINE_ASYNC_BYTES, error);
        }
        if (status == HIXL_SUCCESS) {
            *out_handle = handle_of(batch);
        } else {
            free_slot(batch);
        }
    }
    pthread_mutex_unlock(&client->lock);
    return status;
}

LDD_EXPORT HixlStatus HixlCSClientBatchPutSync(HixlClientHandle client, uint32_t num_ops, const HixlOneSideOpDesc *ops,
                                               uint32_t timeout_ms) {
    return submit_sync(client, num_ops, ops, true, timeout_ms);
}

LDD_EXPORT HixlStatus HixlCSClientBatchGetSync(HixlClientHandle client, uint32_t num_ops, const HixlOneSideOpDesc *ops,
                                               uint32_t timeout_ms) {
    return submit_sync(client, num_ops, ops, false, timeout_ms);
}

/* The batch of a handle, its client locked; NULL: error says why, and nothing is. */
static hixl_batch *lock_batch(HixlClientHandle handle, CompleteHandle batch_handle, hixl_error *error) {
    hixl_client *client = hixl_checked_client(handle, error);
    hixl_batch *batch;
    if (client == NULL) {
        return NULL;
    }
    pthread_mutex_lock(&client->lock);
    batch = find_batch(client, batch_handle);
    if (batch == NULL) {
        pthread_mutex_unlock(&client->lock);
        hixl_fail(error, HIXL_PARAM_INVALID, "completion handle %p is unknown or has ended", batch_handle);
    }
    return batch;
}

/* The outcome so far; an ended batch's handle is gone afterwards. The batch's own status when it FAILED. */
static HixlStatus report(hixl_batch *batch, HixlCompleteStatus *out_status, hixl_error *error) {
    if (batch->state == HIXL_BATCH_RUNNING) {
        *out_status = HIXL_COMPLETE_STATUS_WAITING;
        return HIXL_SUCCESS;
    }
    *out_status = batch->state == HIXL_BATCH_COMPLETED ? HIXL_COMPLETE_STATUS_COMPLETED : HIXL_COMPLETE_STATUS_FAILED;
    return reap(batch, error);
}

LDD_EXPORT HixlStatus HixlCSClientQueryCompleteStatus(HixlClientHandle handle, CompleteHandle batch_handle,
                                                      HixlCompleteStatus *out_status) {
    hixl_error *error = hixl_thread_error();
    hixl_client *client;
    hixl_batch *batch;
    if (out_status == NULL) {
        return hixl_fail(error, HIXL_PARAM_INVALID, "out_status is NULL");
    }
    batch = lock_batch(handle, batch_handle, error);
    if (batch == NULL) {
        return error->status;
    }
    client = batch->client;
    if (batch->state == HIXL_BATCH_RUNNING) {
        advance(client, batch);
    }
    if (batch->copying && atomic_load(&batch->job.num_active) == 0) {
        /* No helper has come, and perhaps none can: whoever only polls must still get there. */
        batch->num_waiters++;
        pthread_mutex_unlock(&client->lock);
        copy_job_help(&batch->job, 0);
        pthread_mutex_lock(&client->lock);
        batch->num_waiters--;
        if (batch->state == HIXL_BATCH_RUNNING) {
            advance(client, batch);
        }
    }
    report(batch, out_status, error); /* as in CANN, FAILED is an answer and not a failure of the query */
    pthread_mutex_unlock(&client->lock);
    return HIXL_SUCCESS;
}

LDD_EXPORT HixlStatus LddClientWait(HixlClientHandle handle, CompleteHandle batch_handle, int64_t timeout_ns,
                                    HixlCompleteStatus *out_status) {
    hixl_error *error = hixl_thread_error();
    int64_t deadline_ns = hixl_deadline_after(timeout_ns);
    hixl_client *client;
    hixl_batch *batch;
    HixlStatus status;
    if (out_status == NULL) {
        return hixl_fail(error, HIXL_PARAM_INVALID, "out_status is NULL");
    }
    batch = lock_batch(handle, batch_handle, error);
    if (batch == NULL) {
        return error->status;
    }
    client = batch->client;
    if (batch->state == HIXL_BATCH_RUNNING) {
        wait_batch(client, batch, deadline_ns);
    }
    status = report(batch, out_status, error);
    pthread_mutex_unlock(&client->lock);
    return status;
}

LDD_EXPORT HixlStatus LddClientCancel(HixlClientHandle handle, CompleteHandle batch_handle) {
    hixl_error *error = hixl_thread_error();
    hixl_client *client;
    hixl_batch *batch;
    batch = lock_batch(handle, batch_handle, error);
    if (batch == NULL) {
        return error->status;
    }
    client = batch->client;
    cancel(batch, HIXL_FAILED, "cancelled");
    if (batch->num_waiters == 0) {
        free_slot(batch);
    } else {
        batch->abandoned = true;
    }
    pthread_mutex_unlock(&client->lock);
    return HIXL_SUCCESS;
}
