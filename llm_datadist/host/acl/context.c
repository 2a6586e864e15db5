/* Contexts, and which one a thread has current; see acl/context.h. */
#include "acl/context.h"

#include <stdlib.h>

/* The current context. Its device is remembered for as long as no handle has ended since it was looked up. */
static _Thread_local struct {
    void *handle;
    uint64_t withdrawals;
    int32_t device;
} current;

static void destroy_context(acl_object *object) {
    acl_context *context = (acl_context *)object;
    pthread_mutex_destroy(&context->lock);
    free(context);
}

aclError acl_create_context(const char *function, int32_t device, bool primary, void **handle) {
    acl_context *context = calloc(1, sizeof *context);
    if (context == NULL) {
        return acl_fail(ACL_ERROR_RT_RESOURCE_ALLOC_FAIL, "%s: no memory for a context", function);
    }
    context->object.kind = ACL_HOST_CONTEXT;
    context->object.refs = 1;
    context->object.destroy = destroy_context;
    context->device = device;
    context->primary = primary;
    pthread_mutex_init(&context->lock, NULL);
    if (!acl_publish(&context->object)) {
        destroy_context(&context->object);
        return acl_fail(ACL_ERROR_RT_RESOURCE_ALLOC_FAIL, "%s: no handle left for a context", function);
    }
    *handle = context->object.handle;
    return ACL_SUCCESS;
}

void acl_make_current(void *handle, int32_t device, uint64_t withdrawals) {
    current.handle = handle;
    current.device = device;
    current.withdrawals = withdrawals;
}

int32_t acl_current_device(void) {
    uint64_t withdrawals = acl_withdrawals(); /* before the look-up: a later end makes us look again */
    acl_context *context;
    if (current.handle == NULL) {
        return -1;
    }
    if (current.withdrawals != withdrawals) {
        context = (acl_context *)acl_acquire(current.handle, ACL_HOST_CONTEXT);
        if (context == NULL) {
            current.handle = NULL;
            return -1;
        }
        acl_make_current(current.handle, context->device, withdrawals);
        acl_release(&context->object);
    }
    return current.device;
}

static aclError no_context(const char *function) {
    return acl_fail(ACL_ERROR_RT_CONTEXT_NULL,
                    "%s: the calling thread has no current context; call aclrtSetDevice first", function);
}

aclError acl_require_context(const char *function, int32_t *device) {
    *device = acl_current_device();
    return *device >= 0 ? ACL_SUCCESS : no_context(function);
}

aclError acl_enter_context(const char *function, acl_context **context) {
    *context = current.handle == NULL ? NULL : (acl_context *)acl_acquire(current.handle, ACL_HOST_CONTEXT);
    return *context != NULL ? ACL_SUCCESS : no_context(function);
}

void *acl_current_handle(void) {
    return current.handle;
}
