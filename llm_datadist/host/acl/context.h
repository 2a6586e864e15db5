/*
 * Contexts, and which one a thread has current.
 *
 * Lock order of this folder: device, context, handle table; stream, event, handle table; the registry of allocations
 * and the lock of one event or stream are never held while another of its kind is taken.
 */
#ifndef LLM_DATADIST_HOST_CONTEXT_H
#define LLM_DATADIST_HOST_CONTEXT_H

#include <pthread.h>
#include <stdbool.h>

#include "acl/error.h"
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

/* A new context, published. */
aclError ldd_host_create_context(const char *function, int32_t device, bool primary, void **handle);

/* Have a context current in this thread; NULL: none. `withdrawals` as they were before its device was looked up. */
void ldd_host_make_current(void *handle, int32_t device, uint64_t withdrawals);

/* The handle that this thread made current last, ended or not; NULL: none. */
void *ldd_host_current_handle(void);

/* Device of the calling thread's current context, or -1 without one. */
int32_t ldd_host_current_device(void);

/* The device of this thread's current context; fails with ACL_ERROR_RT_CONTEXT_NULL naming `function`. */
aclError ldd_host_require_context(const char *function, int32_t *device);

/* The current context with a reference for the caller, or the same failure. */
aclError ldd_host_enter_context(const char *function, ldd_host_context **context);

#endif
