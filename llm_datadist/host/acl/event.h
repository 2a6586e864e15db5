/* Events: marks in a stream that other streams and threads wait for. */
#ifndef LLM_DATADIST_HOST_EVENT_H
#define LLM_DATADIST_HOST_EVENT_H

#include <pthread.h>
#include <stdatomic.h>

#include "acl/error.h"
#include "acl/object.h"

typedef struct {
    acl_object object;
    pthread_mutex_t lock; /* guards what follows */
    pthread_cond_t changed;
    uint64_t issued;    /* records asked for so far */
    uint64_t completed; /* the latest record that a stream reached */
} acl_event;

/* The event of a handle, with a reference for the caller. */
aclError acl_enter_event(const char *function, aclrtEvent handle, acl_event **event);

/* Called by a stream: the record is reached, or wait until it is or until *cancelled. */
void acl_event_reached(acl_event *event, uint64_t sequence);
void acl_event_wait(acl_event *event, uint64_t sequence, const atomic_bool *cancelled);
void acl_event_kick(acl_event *event);

#endif
