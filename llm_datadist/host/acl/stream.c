/*
 * Streams: queues of work, each served in order by one thread of its own.
 *
 * The thread starts with the first task. Tasks are copies, records of events and waits for them. A
 * stream that is destroyed with work queued finishes it on its own; one that is aborted, or whose context
 * ends, drops it. Copies hold pins, so memory freed meanwhile stays mapped until they are done.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "acl/clock.h"
#include "acl/stream.h"

enum { MAX_STREAMS = 1984 }; /* per device, as on real parts */

typedef struct stream_task {
    struct stream_task *next;
    enum { TASK_COPIES, TASK_RECORD, TASK_WAIT } kind;
    acl_event *event; /* reference held; records and waits */
    uint64_t sequence;
    size_t num_copies;
    acl_copy copies[];
} stream_task;

struct acl_stream {
    acl_object object;
    void *context; /* handle: compared, never followed */
    int32_t device;
    bool is_default; /* lives as long as its context */

    pthread_mutex_t lock; /* guards what follows */
    pthread_cond_t work;  /* something is queued, or the stream is closing */
    pthread_cond_t done;  /* a task ended, or tasks were dropped */
    stream_task *head, **tail;
    uint64_t submitted, finished; /* tasks so far; dropped ones count as finished */
    uint64_t started;             /* tasks the thread took so far */
    uint64_t aborts;
    acl_event *waiting_for; /* by the running task */
    bool running;
    bool has_thread;
    bool closing;       /* the thread ends when nothing is queued */
    bool has_failure_mode;
    pthread_t thread;
    atomic_bool cancelled; /* the running task gives up at its next chunk */
};

static atomic_uint num_streams[ACL_HOST_MAX_DEVICES];

static void free_task(stream_task *task) {
    size_t i;
    for (i = 0; i < task->num_copies; i++) {
        acl_unpin_copy(&task->copies[i]);
    }
    if (task->event != NULL) {
        acl_release(&task->event->object);
    }
    free(task);
}

static void free_tasks(stream_task *task) {
    while (task != NULL) {
        stream_task *next = task->next;
        free_task(task);
        task = next;
    }
}

static void destroy_stream(acl_object *object) {
    acl_stream *stream = (acl_stream *)object;
    atomic_fetch_sub(&num_streams[stream->device], 1);
    pthread_cond_destroy(&stream->work);
    pthread_cond_destroy(&stream->done);
    pthread_mutex_destroy(&stream->lock);
    free(stream);
}

void acl_release_stream(acl_stream *stream) {
    acl_release(&stream->object);
}

/* ---- the thread of a stream ---- */

static void run_task(acl_stream *stream, const stream_task *task) {
    size_t i;
    switch (task->kind) {
    case TASK_COPIES:
        for (i = 0; i < task->num_copies; i++) {
            acl_run_copy(&task->copies[i], &stream->cancelled);
        }
        break;
    case TASK_RECORD:
        acl_event_reached(task->event, task->sequence);
        break;
    case TASK_WAIT:
        acl_event_wait(task->event, task->sequence, &stream->cancelled);
        break;
    }
}

static void *serve_stream(void *argument) {
    acl_stream *stream = argument;
    stream_task *task;
    pthread_mutex_lock(&stream->lock);
    for (;;) {
        while (stream->head == NULL && !stream->closing) {
            pthread_cond_wait(&stream->work, &stream->lock);
        }
        task = stream->head;
        if (task == NULL) {
            break;
        }
        stream->head = task->next;
        if (stream->head == NULL) {
            stream->tail = &stream->head;
        }
        stream->running = true;
        stream->started++;
        stream->waiting_for = task->kind == TASK_WAIT ? task->event : NULL;
        atomic_store(&stream->cancelled, false);
        pthread_mutex_unlock(&stream->lock);

        run_task(stream, task);

        pthread_mutex_lock(&stream->lock);
        stream->running = false;
        stream->waiting_for = NULL;
        stream->finished++;
        pthread_cond_broadcast(&stream->done);
        pthread_mutex_unlock(&stream->lock);
        free_task(task); /* outside the lock: the last pin of a freed allocation unmaps it here */
        pthread_mutex_lock(&stream->lock);
    }
    pthread_mutex_unlock(&stream->lock);
    acl_release_stream(stream);
    return NULL;
}

/* What a waiter waits for: the number of a task, unless the stream is aborted after this was taken. */
typedef struct {
    uint64_t number, aborts;
} stream_ticket;

/* Queue a task, starting the thread when it is the first. On failure the task is freed. */
static aclError submit(acl_stream *stream, stream_task *task, stream_ticket *ticket) {
    aclError error = ACL_SUCCESS;
    pthread_mutex_lock(&stream->lock);
    if (stream->closing) {
        error = acl_fail(ACL_ERROR_RT_INVALID_HANDLE, "stream %p is being destroyed", stream->object.handle);
    } else if (!stream->has_thread) {
        int failure;
        atomic_fetch_add_explicit(&stream->object.refs, 1, memory_order_relaxed); /* the thread's */
        failure = pthread_create(&stream->thread, NULL, serve_stream, stream);
        if (failure != 0) {
            atomic_fetch_sub_explicit(&stream->object.refs, 1, memory_order_relaxed);
            error = acl_fail(ACL_ERROR_RT_RESOURCE_ALLOC_FAIL, "no thread for stream %p: %s (see RLIMIT_NPROC)",
                             stream->object.handle, strerror(failure));
        } else {
            stream->has_thread = true;
        }
    }
    if (error == ACL_SUCCESS) {
        *stream->tail = task;
        stream->tail = &task->next;
        ticket->number = ++stream->submitted;
        ticket->aborts = stream->aborts;
        pthread_cond_signal(&stream->work);
    }
    pthread_mutex_unlock(&stream->lock);
    if (error != ACL_SUCCESS) {
        free_task(task);
    }
    return error;
}

/* ---- waiting and aborting ---- */

static aclError wait_for_ticket(const char *function, acl_stream *stream, const stream_ticket *ticket,
                                const struct timespec *deadline) {
    aclError error = ACL_SUCCESS;
    bool late = false;
    pthread_mutex_lock(&stream->lock);
    for (;;) {
        if (stream->aborts != ticket->aborts) { /* asked first: dropped tasks count as finished */
            error = acl_fail(ACL_ERROR_RT_STREAM_ABORT, "%s: stream %p was aborted", function, stream->object.handle);
            break;
        }
        if (stream->finished >= ticket->number) {
            break;
        }
        if (late) {
            error =
                acl_fail(ACL_ERROR_RT_STREAM_SYNC_TIMEOUT, "%s: stream %p has %llu tasks to go when the time is over",
                         function, stream->object.handle, (unsigned long long)(ticket->number - stream->finished));
            break;
        }
        if (deadline == NULL) {
            pthread_cond_wait(&stream->done, &stream->lock);
        } else {
            late = pthread_cond_timedwait(&stream->done, &stream->lock, deadline) == ETIMEDOUT;
        }
    }
    pthread_mutex_unlock(&stream->lock);
    return error;
}

/* Wait until everything submitted so far has ended. */
static aclError drain(const char *function, acl_stream *stream, const struct timespec *deadline) {
    stream_ticket ticket;
    pthread_mutex_lock(&stream->lock);
    ticket.number = stream->submitted;
    ticket.aborts = stream->aborts;
    pthread_mutex_unlock(&stream->lock);
    return wait_for_ticket(function, stream, &ticket, deadline);
}

/* Drop what is queued and make the running task give up; on return nothing of it touches memory any more. */
static void abort_stream(acl_stream *stream, bool close) {
    stream_task *dropped, *task;
    acl_event *event;
    uint64_t running;
    pthread_mutex_lock(&stream->lock);
    dropped = stream->head;
    stream->head = NULL;
    stream->tail = &stream->head;
    for (task = dropped; task != NULL; task = task->next) {
        stream->finished++;
    }
    stream->aborts++;
    stream->closing |= close;
    pthread_cond_broadcast(&stream->done);
    pthread_cond_broadcast(&stream->work);
    running = stream->running ? stream->started : 0;
    if (running != 0) {
        atomic_store(&stream->cancelled, true);
        event = stream->waiting_for;
        if (event != NULL) {
            acl_event_kick(event);
        }
    }
    /* A task submitted after this point has a higher number and is not ours to wait for. */
    while (stream->running && stream->started == running) {
        pthread_cond_wait(&stream->done, &stream->lock);
    }
    pthread_mutex_unlock(&stream->lock);
    free_tasks(dropped);
}

/*
 * The handle has ended: end the stream. Its thread finishes what is queued and then itself; it is waited for when
 * nothing was left to do, so that a stream destroyed after synchronising leaves no thread behind.
 */
static void end_stream(acl_stream *stream, bool drop) {
    bool idle, has_thread;
    if (drop) {
        abort_stream(stream, true);
    }
    pthread_mutex_lock(&stream->lock);
    stream->closing = true;
    idle = stream->head == NULL && !stream->running;
    has_thread = stream->has_thread;
    stream->has_thread = false; /* joined or detached below, once */
    pthread_cond_broadcast(&stream->work);
    pthread_mutex_unlock(&stream->lock);
    if (has_thread && idle) {
        pthread_join(stream->thread, NULL);
    } else if (has_thread) {
        pthread_detach(stream->thread);
    }
    acl_release_stream(stream);
}

/* ---- for the other files ---- */

aclError acl_create_stream(acl_context *context, bool is_default, aclrtStream *out_stream) {
    acl_stream *stream;
    if (context->closed) {
        return acl_fail(ACL_ERROR_RT_CONTEXT_NULL, "context %p is being destroyed", context->object.handle);
    }
    if (atomic_fetch_add(&num_streams[context->device], 1) >= MAX_STREAMS) {
        atomic_fetch_sub(&num_streams[context->device], 1);
        return acl_fail(ACL_ERROR_RT_NO_STREAM_RESOURCE, "device %d has %d streams", context->device, MAX_STREAMS);
    }
    stream = calloc(1, sizeof *stream);
    if (stream == NULL) {
        atomic_fetch_sub(&num_streams[context->device], 1);
        return acl_fail(ACL_ERROR_RT_RESOURCE_ALLOC_FAIL, "no memory for a stream");
    }
    stream->object.kind = ACL_HOST_STREAM;
    stream->object.refs = 1;
    stream->object.destroy = destroy_stream;
    stream->context = context->object.handle;
    stream->device = context->device;
    stream->is_default = is_default;
    stream->tail = &stream->head;
    pthread_mutex_init(&stream->lock, NULL);
    acl_init_condition(&stream->work);
    acl_init_condition(&stream->done);
    if (!acl_publish(&stream->object)) {
        destroy_stream(&stream->object);
        return acl_fail(ACL_ERROR_RT_RESOURCE_ALLOC_FAIL, "no handle left for a stream");
    }
    *out_stream = stream->object.handle;
    return ACL_SUCCESS;
}

aclError acl_enter_stream(const char *function, aclrtStream handle, acl_stream **stream) {
    aclrtContext context;
    aclError error = aclrtGetCurrentContext(&context);
    if (error == ACL_SUCCESS && handle == NULL) {
        error = aclrtCtxGetCurrentDefaultStream(&handle);
    }
    if (error != ACL_SUCCESS) {
        return error;
    }
    *stream = (acl_stream *)acl_acquire(handle, ACL_HOST_STREAM);
    if (*stream == NULL) {
        return acl_fail(ACL_ERROR_RT_INVALID_HANDLE, "%s: %p is no stream", function, handle);
    }
    if ((*stream)->context != context) {
        acl_release_stream(*stream);
        return acl_fail(ACL_ERROR_RT_STREAM_CONTEXT, "%s: stream %p belongs to another context", function, handle);
    }
    return ACL_SUCCESS;
}

void acl_forget_streams(void) {
    int32_t device;
    for (device = 0; device < ACL_HOST_MAX_DEVICES; device++) {
        atomic_store(&num_streams[device], 0);
    }
}

static bool is_of_context(const acl_object *object, const void *context) {
    return ((const acl_stream *)object)->context == context;
}

static bool is_of_device(const acl_object *object, const void *device) {
    return ((const acl_stream *)object)->device == *(const int32_t *)device;
}

void acl_end_streams(void *context_handle) {
    acl_object **streams;
    size_t count, i;
    if (!acl_collect(ACL_HOST_STREAM, is_of_context, context_handle, &streams, &count)) {
        return; /* no memory: the streams stay, unreachable, until the process ends */
    }
    for (i = 0; i < count; i++) {
        acl_object *withdrawn = acl_withdraw(streams[i]->handle, ACL_HOST_STREAM);
        if (withdrawn != NULL) {
            end_stream((acl_stream *)withdrawn, true);
        }
        acl_release(streams[i]);
    }
    free(streams);
}

static stream_task *create_task(int kind, size_t num_copies) {
    stream_task *task = calloc(1, sizeof *task + num_copies * sizeof task->copies[0]);
    if (task == NULL) {
        acl_fail(ACL_ERROR_RT_RESOURCE_ALLOC_FAIL, "no memory for a task of %zu copies", num_copies);
        return NULL;
    }
    task->kind = kind;
    task->num_copies = num_copies;
    return task;
}

aclError acl_submit_copies(acl_stream *stream, const acl_copy *copies, size_t num_copies, bool wait) {
    stream_task *task = create_task(TASK_COPIES, num_copies);
    stream_ticket ticket;
    size_t i;
    aclError error;
    if (task == NULL) {
        for (i = 0; i < num_copies; i++) {
            acl_unpin_copy(&copies[i]);
        }
        return ACL_ERROR_RT_RESOURCE_ALLOC_FAIL;
    }
    if (num_copies > 0) {
        memcpy(task->copies, copies, num_copies * sizeof *copies);
    }
    error = submit(stream, task, &ticket);
    if (error == ACL_SUCCESS && wait) {
        error = wait_for_ticket("aclrtMemcpyAsync", stream, &ticket, NULL);
    }
    return error;
}

static aclError submit_event_task(acl_stream *stream, int kind, acl_event *event, uint64_t sequence) {
    stream_task *task = create_task(kind, 0);
    stream_ticket ticket;
    if (task == NULL) {
        acl_release(&event->object);
        return ACL_ERROR_RT_RESOURCE_ALLOC_FAIL;
    }
    task->event = event;
    task->sequence = sequence;
    return submit(stream, task, &ticket);
}

aclError acl_submit_record(acl_stream *stream, acl_event *event, uint64_t sequence) {
    return submit_event_task(stream, TASK_RECORD, event, sequence);
}

aclError acl_submit_wait(acl_stream *stream, acl_event *event, uint64_t sequence) {
    return submit_event_task(stream, TASK_WAIT, event, sequence);
}

/* ---- the interface ---- */

LDD_EXPORT aclError aclrtCreateStreamWithConfig(aclrtStream *out_stream, uint32_t priority, uint32_t flags) {
    const uint32_t hints = ACL_STREAM_FAST_LAUNCH | ACL_STREAM_FAST_SYNC | ACL_STREAM_HUGE;
    acl_context *context;
    aclError error;
    if (out_stream == NULL) {
        return acl_fail(ACL_ERROR_INVALID_PARAM, "%s: result pointer is NULL", __func__);
    }
    if (priority != 0) {
        return acl_fail(ACL_ERROR_INVALID_PARAM, "%s: priority is %u; 0 expected", __func__, priority);
    }
    if ((flags & ~hints) != 0) {
        return acl_fail(ACL_ERROR_RT_FEATURE_NOT_SUPPORT, "%s: stream flags %#x", __func__, flags & ~hints);
    }
    error = acl_enter_context(__func__, &context);
    if (error != ACL_SUCCESS) {
        return error;
    }
    pthread_mutex_lock(&context->lock);
    error = acl_create_stream(context, false, out_stream);
    pthread_mutex_unlock(&context->lock);
    acl_release(&context->object);
    return error;
}

LDD_EXPORT aclError aclrtCreateStream(aclrtStream *out_stream) {
    return aclrtCreateStreamWithConfig(out_stream, 0, 0);
}

static aclError withdraw_stream(const char *function, aclrtStream handle, bool drop) {
    acl_stream *stream;
    acl_object *withdrawn;
    bool is_default;
    aclError error;
    if (handle == NULL) {
        return acl_fail(ACL_ERROR_INVALID_PARAM, "%s: stream is NULL", function);
    }
    error = acl_enter_stream(function, handle, &stream);
    if (error != ACL_SUCCESS) {
        return error;
    }
    is_default = stream->is_default;
    acl_release_stream(stream);
    if (is_default) {
        return acl_fail(ACL_ERROR_RT_PARAM_INVALID, "%s: %p is the default stream of its context", function, handle);
    }
    withdrawn = acl_withdraw(handle, ACL_HOST_STREAM);
    if (withdrawn == NULL) { /* another thread was faster */
        return acl_fail(ACL_ERROR_RT_INVALID_HANDLE, "%s: %p is no stream", function, handle);
    }
    end_stream((acl_stream *)withdrawn, drop);
    return ACL_SUCCESS;
}

LDD_EXPORT aclError aclrtDestroyStream(aclrtStream stream) {
    return withdraw_stream(__func__, stream, false);
}

LDD_EXPORT aclError aclrtDestroyStreamForce(aclrtStream stream) {
    return withdraw_stream(__func__, stream, true);
}

static aclError synchronize_stream(const char *function, aclrtStream handle, const struct timespec *deadline) {
    acl_stream *stream;
    aclError error = acl_enter_stream(function, handle, &stream);
    if (error != ACL_SUCCESS) {
        return error;
    }
    error = drain(function, stream, deadline);
    acl_release_stream(stream);
    return error;
}

LDD_EXPORT aclError aclrtSynchronizeStream(aclrtStream stream) {
    return synchronize_stream(__func__, stream, NULL);
}

LDD_EXPORT aclError aclrtSynchronizeStreamWithTimeout(aclrtStream stream, int32_t timeout_ms) {
    struct timespec deadline = acl_deadline(timeout_ms > 0 ? timeout_ms : 0);
    aclError error = acl_check_timeout(__func__, timeout_ms);
    if (error != ACL_SUCCESS) {
        return error;
    }
    return synchronize_stream(__func__, stream, timeout_ms < 0 ? NULL : &deadline);
}

/* All streams of the device of the current context, whatever context they are in. */
static aclError synchronize_device(const char *function, const struct timespec *deadline) {
    acl_object **streams;
    size_t count, i;
    int32_t device;
    aclError error = acl_require_context(function, &device);
    if (error != ACL_SUCCESS) {
        return error;
    }
    if (!acl_collect(ACL_HOST_STREAM, is_of_device, &device, &streams, &count)) {
        return acl_fail(ACL_ERROR_RT_RESOURCE_ALLOC_FAIL, "%s: no memory to list the streams", function);
    }
    for (i = 0; i < count; i++) {
        acl_stream *stream = (acl_stream *)streams[i];
        if (error == ACL_SUCCESS) {
            error = drain(function, stream, deadline);
        }
        acl_release_stream(stream);
    }
    free(streams);
    return error;
}

LDD_EXPORT aclError aclrtSynchronizeDevice(void) {
    return synchronize_device(__func__, NULL);
}

LDD_EXPORT aclError aclrtSynchronizeDeviceWithTimeout(int32_t timeout_ms) {
    struct timespec deadline = acl_deadline(timeout_ms > 0 ? timeout_ms : 0);
    aclError error = acl_check_timeout(__func__, timeout_ms);
    if (error != ACL_SUCCESS) {
        return error;
    }
    return synchronize_device(__func__, timeout_ms < 0 ? NULL : &deadline);
}

LDD_EXPORT aclError aclrtStreamQuery(aclrtStream stream, aclrtStreamStatus *out_status) {
    acl_stream *found;
    aclError error;
    if (out_status == NULL) {
        return acl_fail(ACL_ERROR_INVALID_PARAM, "%s: result pointer is NULL", __func__);
    }
    error = acl_enter_stream(__func__, stream, &found);
    if (error != ACL_SUCCESS) {
        return error;
    }
    pthread_mutex_lock(&found->lock);
    *out_status = found->finished == found->submitted ? ACL_STREAM_STATUS_COMPLETE : ACL_STREAM_STATUS_NOT_READY;
    pthread_mutex_unlock(&found->lock);
    acl_release_stream(found);
    return ACL_SUCCESS;
}

LDD_EXPORT aclError aclrtStreamAbort(aclrtStream stream) {
    acl_stream *found;
    aclError error = acl_enter_stream(__func__, stream, &found);
    if (error != ACL_SUCCESS) {
        return error;
    }
    abort_stream(found, false);
    acl_release_stream(found);
    return ACL_SUCCESS;
}

/* Tasks are checked when they are queued and do not fail later, so either mode is kept by doing nothing more. */
LDD_EXPORT aclError aclrtSetStreamFailureMode(aclrtStream stream, uint64_t mode) {
    acl_stream *found;
    aclError error;
    if (mode != ACL_CONTINUE_ON_FAILURE && mode != ACL_STOP_ON_FAILURE) {
        return acl_fail(ACL_ERROR_INVALID_PARAM, "%s: mode is %llu; 0 or 1 expected", __func__,
                        (unsigned long long)mode);
    }
    error = acl_enter_stream(__func__, stream, &found);
    if (error != ACL_SUCCESS) {
        return error;
    }
    pthread_mutex_lock(&found->lock);
    if (found->has_failure_mode) {
        error = acl_fail(ACL_ERROR_RT_PARAM_INVALID, "%s: stream %p has its failure mode already", __func__, stream);
    }
    found->has_failure_mode = true;
    pthread_mutex_unlock(&found->lock);
    acl_release_stream(found);
    return error;
}
