/* Contexts, and which one a thread has current; see acl/context.h. */
#include "acl/context.h"

#include <stdlib.h>

/* The current context. Its device is remembered for as long as no handle has ended since it was looked up. */
static _Thread_local struct {
    void *handle;
    uint64_t withdrawals;
    int32_t device;
} current;

static void destroy_context(ldd_host_object *object) {
    ldd_host_context *context = (ldd_host_context *)object;
    pthread_mutex_destroy(&context->lock);
    free(context);
}

aclError ldd_host_create_context(const char *function, int32_t device, bool primary, void **handle) {
    ldd_host_context *context = calloc(1, sizeof *context);
    if (context == NULL) {
        return ldd_host_acl_fail(ACL_ERROR_RT_RESOURCE_ALLOC_FAIL, "%s: no memory for a context", function);
    }
    context->object.kind = LDD_HOST_CONTEXT;
    context->object.refs = 1;
    context->object.destroy = destroy_context;
    context->device = device;
    context->primary = primary;
    pthread_mutex_init(&context->lock, NULL);
    if (!ldd_host_publish(&context->object)) {
        destroy_context(&context->object);
        return ldd_host_acl_fail(ACL_ERROR_RT_RESOURCE_ALLOC_FAIL, "%s: no handle left for a context", function);
    }
    *handle = context->object.handle;
    return ACL_SUCCESS;
}

void ldd_host_make_current(void *handle, int32_t device, uint64_t withdrawals) {
    current.handle = handle;
    current.device = device;
    current.withdrawals = withdrawals;
}

int32_t ldd_host_current_device(void) {
    uint64_t withdrawals = ldd_host_withdrawals(); /* before the look-up: a later end makes us look again */
    ldd_host_context *context;
    if (current.handle == NULL) {
        return -1;
    }
    if (current.withdrawals != withdrawals) {
        context = (ldd_host_context *)ldd_host_acquire(current.handle, LDD_HOST_CONTEXT);
        if (context == NULL) {
            current.handle = NULL;
            return -1;
        }
        ldd_host_make_current(current.handle, context->device, withdrawals);
        ldd_host_release(&context->object);
    }
    return current.device;
}

static aclError no_context(const char *function) {
    return ldd_host_acl_fail(ACL_ERROR_RT_CONTEXT_NULL,
                             "%s: the calling thread has no current context; call aclrtSetDevice first", function);
}

aclError ldd_host_require_context(const char *function, int32_t *device) {
    *device = ldd_host_current_device();
    return *device >= 0 ? ACL_SUCCESS : no_context(function);
}

aclError ldd_host_enter_context(const char *function, ldd_host_context **context) {
    *context = current.handle == NULL ? NULL
                                      : (ldd_host_context *)ldd_host_acquire(current.handle, LDD_HOST_CONTEXT);
    return *context != NULL ? ACL_SUCCESS : no_context(function);
}

void *ldd_host_current_handle(void) {
    return current.handle;
}
