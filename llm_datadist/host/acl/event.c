/*
 * Events: marks in a stream that other streams and threads wait for.
 *
 * Every record of an event has a number. A wait is for the latest record asked for before it, and for the first
 * one when there was none yet: a wait never passes an event that nobody recorded.
 */
#include <errno.h>
#include <stdlib.h>

#include "acl/clock.h"
#include "acl/context.h"
#include "acl/event.h"

static void destroy_event(ldd_host_object *object) {
    ldd_host_event *event = (ldd_host_event *)object;
    pthread_cond_destroy(&event->changed);
    pthread_mutex_destroy(&event->lock);
    free(event);
}

static aclError create_event(const char *function, aclrtEvent *out_event, uint32_t flags) {
    const uint32_t harmless = ACL_EVENT_SYNC | ACL_EVENT_CAPTURE_STREAM_PROGRESS | ACL_EVENT_TIME_LINE;
    int32_t device;
    ldd_host_event *event;
    aclError error;
    if (out_event == NULL) {
        return ldd_host_acl_fail(ACL_ERROR_INVALID_PARAM, "%s: result pointer is NULL", function);
    }
    error = ldd_host_require_context(function, &device);
    if (error != ACL_SUCCESS) {
        return error;
    }
    if ((flags & ~harmless) != 0) {
        return ldd_host_acl_fail(ACL_ERROR_RT_FEATURE_NOT_SUPPORT, "%s: event flags %#x", function, flags & ~harmless);
    }
    event = calloc(1, sizeof *event);
    if (event == NULL) {
        return ldd_host_acl_fail(ACL_ERROR_RT_RESOURCE_ALLOC_FAIL, "%s: no memory for an event", function);
    }
    event->object.kind = LDD_HOST_EVENT;
    event->object.refs = 1;
    event->object.destroy = destroy_event;
    pthread_mutex_init(&event->lock, NULL);
    ldd_host_init_condition(&event->changed);
    if (!ldd_host_publish(&event->object)) {
        destroy_event(&event->object);
        return ldd_host_acl_fail(ACL_ERROR_RT_RESOURCE_ALLOC_FAIL, "%s: no handle left for an event", function);
    }
    *out_event = event->object.handle;
    return ACL_SUCCESS;
}

aclError ldd_host_enter_event(const char *function, aclrtEvent handle, ldd_host_event **event) {
    int32_t device;
    aclError error = ldd_host_require_context(function, &device);
    if (error != ACL_SUCCESS) {
        return error;
    }
    *event = (ldd_host_event *)ldd_host_acquire(handle, LDD_HOST_EVENT);
    return *event != NULL ? ACL_SUCCESS
                          : ldd_host_acl_fail(ACL_ERROR_RT_INVALID_HANDLE, "%s: %p is no event", function, handle);
}

LDD_EXPORT aclError aclrtCreateEvent(aclrtEvent *out_event) {
    return create_event(__func__, out_event, ACL_EVENT_SYNC);
}

LDD_EXPORT aclError aclrtCreateEventExWithFlag(aclrtEvent *out_event, uint32_t flags) {
    return create_event(__func__, out_event, flags);
}

/* Work that was queued with the event goes on with it. */
LDD_EXPORT aclError aclrtDestroyEvent(aclrtEvent event) {
    ldd_host_object *object;
    int32_t device;
    aclError error = ldd_host_require_context(__func__, &device);
    if (error != ACL_SUCCESS) {
        return error;
    }
    object = ldd_host_withdraw(event, LDD_HOST_EVENT);
    if (object == NULL) {
        return ldd_host_acl_fail(ACL_ERROR_RT_INVALID_HANDLE, "%s: %p is no event", __func__, event);
    }
    ldd_host_release(object);
    return ACL_SUCCESS;
}

/* ---- from streams ---- */

void ldd_host_event_reached(ldd_host_event *event, uint64_t sequence) {
    pthread_mutex_lock(&event->lock);
    if (event->completed < sequence) {
        event->completed = sequence;
    }
    pthread_cond_broadcast(&event->changed);
    pthread_mutex_unlock(&event->lock);
}

void ldd_host_event_wait(ldd_host_event *event, uint64_t sequence, const atomic_bool *cancelled) {
    pthread_mutex_lock(&event->lock);
    while (event->completed < sequence && !atomic_load_explicit(cancelled, memory_order_acquire)) {
        pthread_cond_wait(&event->changed, &event->lock);
    }
    pthread_mutex_unlock(&event->lock);
}

/* Make waiters look at their flag: set before this call, it is seen because it is read under the same lock. */
void ldd_host_event_kick(ldd_host_event *event) {
    pthread_mutex_lock(&event->lock);
    pthread_cond_broadcast(&event->changed);
    pthread_mutex_unlock(&event->lock);
}

/* ---- from callers ---- */

LDD_EXPORT aclError aclrtQueryEventStatus(aclrtEvent event, aclrtEventRecordedStatus *out_status) {
    ldd_host_event *found;
    aclError error;
    if (out_status == NULL) {
        return ldd_host_acl_fail(ACL_ERROR_INVALID_PARAM, "%s: result pointer is NULL", __func__);
    }
    error = ldd_host_enter_event(__func__, event, &found);
    if (error != ACL_SUCCESS) {
        return error;
    }
    pthread_mutex_lock(&found->lock);
    *out_status = found->issued > 0 && found->completed >= found->issued ? ACL_EVENT_RECORDED_STATUS_COMPLETE
                                                                         : ACL_EVENT_RECORDED_STATUS_NOT_READY;
    pthread_mutex_unlock(&found->lock);
    ldd_host_release(&found->object);
    return ACL_SUCCESS;
}

static aclError synchronize_event(const char *function, aclrtEvent handle, int32_t timeout_ms) {
    struct timespec deadline = ldd_host_deadline(timeout_ms > 0 ? timeout_ms : 0);
    ldd_host_event *event;
    uint64_t sequence;
    aclError error = ldd_host_enter_event(function, handle, &event);
    if (error != ACL_SUCCESS) {
        return error;
    }
    pthread_mutex_lock(&event->lock);
    sequence = event->issued > 0 ? event->issued : 1;
    while (event->completed < sequence && error == ACL_SUCCESS) {
        if (timeout_ms < 0) {
            pthread_cond_wait(&event->changed, &event->lock);
        } else if (pthread_cond_timedwait(&event->changed, &event->lock, &deadline) == ETIMEDOUT &&
                   event->completed < sequence) {
            error = ldd_host_acl_fail(ACL_ERROR_RT_EVENT_SYNC_TIMEOUT, "%s: event %p is not reached after %d ms",
                                      function, handle, timeout_ms);
        }
    }
    pthread_mutex_unlock(&event->lock);
    ldd_host_release(&event->object);
    return error;
}

LDD_EXPORT aclError aclrtSynchronizeEvent(aclrtEvent event) {
    return synchronize_event(__func__, event, -1);
}

LDD_EXPORT aclError aclrtSynchronizeEventWithTimeout(aclrtEvent event, int32_t timeout_ms) {
    aclError error = ldd_host_check_timeout(__func__, timeout_ms);
    return error != ACL_SUCCESS ? error : synchronize_event(__func__, event, timeout_ms);
}
