/* Recording an event in a stream, and having a stream wait for one. */
#include "acl/event.h"
#include "acl/stream.h"

LDD_EXPORT aclError aclrtRecordEvent(aclrtEvent event, aclrtStream stream) {
    acl_event *found_event;
    acl_stream *found_stream;
    uint64_t sequence;
    aclError error = acl_enter_event(__func__, event, &found_event);
    if (error != ACL_SUCCESS) {
        return error;
    }
    error = acl_enter_stream(__func__, stream, &found_stream);
    if (error != ACL_SUCCESS) {
        acl_release(&found_event->object);
        return error;
    }
    pthread_mutex_lock(&found_event->lock);
    sequence = ++found_event->issued;
    pthread_mutex_unlock(&found_event->lock);
    error = acl_submit_record(found_stream, found_event, sequence);
    acl_release_stream(found_stream);
    return error;
}

LDD_EXPORT aclError aclrtStreamWaitEvent(aclrtStream stream, aclrtEvent event) {
    acl_event *found_event;
    acl_stream *found_stream;
    uint64_t sequence;
    aclError error = acl_enter_event(__func__, event, &found_event);
    if (error != ACL_SUCCESS) {
        return error;
    }
    error = acl_enter_stream(__func__, stream, &found_stream);
    if (error != ACL_SUCCESS) {
        acl_release(&found_event->object);
        return error;
    }
    pthread_mutex_lock(&found_event->lock);
    sequence = found_event->issued > 0 ? found_event->issued : 1;
    pthread_mutex_unlock(&found_event->lock);
    error = acl_submit_wait(found_stream, found_event, sequence);
    acl_release_stream(found_stream);
    return error;
}
