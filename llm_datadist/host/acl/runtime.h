/*
 * Contexts, streams and events as the files of the acl half share them.
 *
 * Lock order: device, context, handle table; stream, event, handle table; the registry of allocations and the
 * lock of one event or stream are never held while another of its kind is taken.
 */
#ifndef LLM_DATADIST_HOST_RUNTIME_H
#define LLM_DATADIST_HOST_RUNTIME_H

#include <pthread.h>
#include <time.h>

#include "acl/memory.h"
#include "acl/object.h"

enum { LDD_HOST_MAX_DEVICES = 64 };

typedef struct {
    ldd_host_object object;
    int32_t device;
    bool primary;         /* made by aclrtSetDevice, ended by aclrtResetDevice only */
    pthread_mutex_t lock; /* guards what follows */
    bool closed;
    void *default_stream; /* NULL until somebody asks */
} ldd_host_context;

typedef struct {
    ldd_host_object object;
    pthread_mutex_t lock; /* guards what follows */
    pthread_cond_t changed;
    uint64_t issued;    /* records asked for so far */
    uint64_t completed; /* the latest record that a stream reached */
} ldd_host_event;

typedef struct ldd_host_stream ldd_host_stream;

/* One copy that was checked; the pins keep what it touches mapped until it is done. */
typedef struct {
    void *dst;
    const void *src;
    size_t size;
    ldd_host_pin *dst_pin, *src_pin; /* NULL: memory of the caller */
} ldd_host_copy;

/* ---- device.c ---- */

/* The device of this thread's current context; fails with ACL_ERROR_RT_CONTEXT_NULL naming `function`. */
aclError ldd_host_require_context(const char *function, int32_t *device);

/* The current context with a reference for the caller, or the same failure. */
aclError ldd_host_enter_context(const char *function, ldd_host_context **context);

/* ---- memops.c ---- */

void ldd_host_run_copy(const ldd_host_copy *copy, const atomic_bool *cancelled);
void ldd_host_unpin_copy(const ldd_host_copy *copy);

/* ---- stream.c ---- */

/* The stream of a handle, NULL for the default one, with a reference; it must belong to the current context. */
aclError ldd_host_enter_stream(const char *function, aclrtStream handle, ldd_host_stream **stream);

/* Queue checked copies; they and their pins become the stream's. With `wait` the copies are done on return. */
aclError ldd_host_submit_copies(ldd_host_stream *stream, const ldd_host_copy *copies, size_t num_copies, bool wait);

/* Queue the record of an event, or a wait for record number `sequence`; the reference becomes the stream's. */
aclError ldd_host_submit_record(ldd_host_stream *stream, ldd_host_event *event, uint64_t sequence);
aclError ldd_host_submit_wait(ldd_host_stream *stream, ldd_host_event *event, uint64_t sequence);

void ldd_host_release_stream(ldd_host_stream *stream);

/* Create a stream in a context whose lock the caller holds. */
aclError ldd_host_create_stream(ldd_host_context *context, bool is_default, aclrtStream *out_stream);

/* Drop the work of all streams of a context and end them. */
void ldd_host_end_streams(void *context_handle);

/* In a child made by fork(): no stream of the parent counts any more. */
void ldd_host_forget_streams(void);

/* ---- event.c ---- */

/* Called by a stream: the record is reached, or wait until it is or until *cancelled. */
void ldd_host_event_reached(ldd_host_event *event, uint64_t sequence);
void ldd_host_event_wait(ldd_host_event *event, uint64_t sequence, const atomic_bool *cancelled);
void ldd_host_event_kick(ldd_host_event *event);

/* ---- shared by all ---- */

/* A condition variable on the monotonic clock: no jump of the wall clock moves a deadline. */
static inline void ldd_host_init_condition(pthread_cond_t *condition) {
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(condition, &attributes);
    pthread_condattr_destroy(&attributes);
}

static inline struct timespec ldd_host_deadline(int32_t timeout_ms) {
    struct timespec deadline;
    clock_gettime(CLOCK_MONOTONIC, &deadline);
    deadline.tv_sec += timeout_ms / 1000;
    deadline.tv_nsec += (long)(timeout_ms % 1000) * 1000000L;
    if (deadline.tv_nsec >= 1000000000L) {
        deadline.tv_sec++;
        deadline.tv_nsec -= 1000000000L;
    }
    return deadline;
}

/* -1 waits for ever; 0 has no meaning in this interface. */
static inline aclError ldd_host_check_timeout(const char *function, int32_t timeout_ms) {
    if (timeout_ms == -1 || timeout_ms > 0) {
        return ACL_SUCCESS;
    }
    return ldd_host_acl_fail(ACL_ERROR_RT_PARAM_INVALID, "%s: timeout is %d ms; -1 or at least 1 expected", function,
                             timeout_ms);
}

#endif
