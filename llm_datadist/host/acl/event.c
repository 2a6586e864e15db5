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

static void destroy_event(acl_object *object) {
    acl_event *event = (acl_event *)object;
    pthread_cond_destroy(&event->changed);
    pthread_mutex_destroy(&event->lock);
    free(event);
}

static aclError create_event(const char *function, aclrtEvent *out_event, uint32_t flags) {
    const uint32_t harmless = ACL_EVENT_SYNC | ACL_EVENT_CAPTURE_STREAM_PROGRESS | ACL_EVENT_TIME_LINE;
    int32_t device;
    acl_event *event;
    aclError error;
    if (out_event == NULL) {
        return acl_fail(ACL_ERROR_INVALID_PARAM, "%s: result pointer is NULL", function);
    }
    error = acl_require_context(function, &device);
    if (error != ACL_SUCCESS) {
        return error;
    }
    if ((flags & ~harmless) != 0) {
        return acl_fail(ACL_ERROR_RT_FEATURE_NOT_SUPPORT, "%s: event flags %#x", function, flags & ~harmless);
    }
    event = calloc(1, sizeof *event);
    if (event == NULL) {
        return acl_fail(ACL_ERROR_RT_RESOURCE_ALLOC_FAIL, "%s: no memory for an event", function);
    }
    event->object.kind = ACL_HOST_EVENT;
    event->object.refs = 1;
    event->object.destroy = destroy_event;
    pthread_mutex_init(&event->lock, NULL);
    acl_init_condition(&event->changed);
    if (!acl_publish(&event->object)) {
        destroy_event(&event->object);
        return acl_fail(ACL_ERROR_RT_RESOURCE_ALLOC_FAIL, "%s: no handle left for an event", function);
    }
    *out_event = event->object.handle;
    return ACL_SUCCESS;
}

aclError acl_enter_event(const char *function, aclrtEvent handle, acl_event **event) {
    int32_t device;
    aclError error = acl_require_context(function, &device);
    if (error != ACL_SUCCESS) {
        return error;
    }
    *event = (acl_event *)acl_acquire(handle, ACL_HOST_EVENT);
    return *event != NULL ? ACL_SUCCESS : acl_fail(ACL_ERROR_RT_INVALID_HANDLE, "%s: %p is no event", function, handle);
}

LDD_EXPORT aclError aclrtCreateEvent(aclrtEvent *out_event) {
    return create_event(__func__, out_event, ACL_EVENT_SYNC);
}

LDD_EXPORT aclError aclrtCreateEventExWithFlag(aclrtEvent *out_event, uint32_t flags) {
    return create_event(__func__, out_event, flags);
}

/* Work that was queued with the event goes on with it. */
LDD_EXPORT aclError aclrtDestroyEvent(aclrtEvent event) {
    acl_object *object;
    int32_t device;
    aclError error = acl_require_context(__func__, &device);
    if (error != ACL_SUCCESS) {
        return error;
    }
    object = acl_withdraw(event, ACL_HOST_EVENT);
    if (object == NULL) {
        return acl_fail(ACL_ERROR_RT_INVALID_HANDLE, "%s: %p is no event", __func__, event);
    }
    acl_release(object);
    return ACL_SUCCESS;
}

/* ---- from streams ---- */

void acl_event_reached(acl_event *event, uint64_t sequence) {
    pthread_mutex_lock(&event->lock);
    if (event->completed < sequence) {
        event->completed = sequence;
    }
    pthread_cond_broadcast(&event->changed);
    pthread_mutex_unlock(&event->lock);
}

void acl_event_wait(acl_event *event, uint64_t sequence, const atomic_bool *cancelled) {
    pthread_mutex_lock(&event->lock);
    while (event->completed < sequence && !atomic_load_explicit(cancelled, memory_order_acquire)) {
        pthread_cond_wait(&event->changed, &event->lock);
    }
    pthread_mutex_unlock(&event->lock);
}

/* Make waiters look at their flag: set before this call, it is seen because it is read under the same lock. */
void acl_event_kick(acl_event *event) {
    pthread_mutex_lock(&event->lock);
    pthread_cond_broadcast(&event->changed);
    pthread_mutex_unlock(&event->lock);
}

/* ---- from callers ---- */

LDD_EXPORT aclError aclrtQueryEventStatus(aclrtEvent event, aclrtEventRecordedStatus *out_status) {
    acl_event *found;
    aclError error;
    if (out_status == NULL) {
        return acl_fail(ACL_ERROR_INVALID_PARAM, "%s: result pointer is NULL", __func__);
    }
    error = acl_enter_event(__func__, event, &found);
    if (error != ACL_SUCCESS) {
        return error;
    }
    pthread_mutex_lock(&found->lock);
    *out_status = found->issued > 0 && found->completed >= found->issued ? ACL_EVENT_RECORDED_STATUS_COMPLETE
                                                                         : ACL_EVENT_RECORDED_STATUS_NOT_READY;
    pthread_mutex_unlock(&found->lock);
    acl_release(&found->object);
    return ACL_SUCCESS;
}

static aclError synchronize_event(const char *function, aclrtEvent handle, int32_t timeout_ms) {
    struct timespec deadline = acl_deadline(timeout_ms > 0 ? timeout_ms : 0);
    acl_event *event;
    uint64_t sequence;
    aclError error = acl_enter_event(function, handle, &event);
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
            error = acl_fail(ACL_ERROR_RT_EVENT_SYNC_TIMEOUT, "%s: event %p is not reached after %d ms", function,
                             handle, timeout_ms);
        }
    }
    pthread_mutex_unlock(&event->lock);
    acl_release(&event->object);
    return error;
}

LDD_EXPORT aclError aclrtSynchronizeEvent(aclrtEvent event) {
    return synchronize_event(__func__, event, -1);
}

LDD_EXPORT aclError aclrtSynchronizeEventWithTimeout(aclrtEvent event, int32_t timeout_ms) {
    aclError error = acl_check_timeout(__func__, timeout_ms);
    return error != ACL_SUCCESS ? error : synchronize_event(__func__, event, timeout_ms);
}
