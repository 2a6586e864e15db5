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

enum { ACL_HOST_MAX_DEVICES = 64 };

typedef struct {
    acl_object object;
    int32_t device;
    bool primary;         /* made by aclrtSetDevice, ended by aclrtResetDevice only */
    pthread_mutex_t lock; /* guards what follows */
    bool closed;
    void *default_stream; /* NULL until somebody asks */
} acl_context;

/* A new context, published. */
aclError acl_create_context(const char *function, int32_t device, bool primary, void **handle);

/* Have a context current in this thread; NULL: none. `withdrawals` as they were before its device was looked up. */
void acl_make_current(void *handle, int32_t device, uint64_t withdrawals);

/* The handle that this thread made current last, ended or not; NULL: none. */
void *acl_current_handle(void);

/* Device of the calling thread's current context, or -1 without one. */
int32_t acl_current_device(void);

/* The device of this thread's current context; fails with ACL_ERROR_RT_CONTEXT_NULL naming `function`. */
aclError acl_require_context(const char *function, int32_t *device);

/* The current context with a reference for the caller, or the same failure. */
aclError acl_enter_context(const char *function, acl_context **context);

#endif
