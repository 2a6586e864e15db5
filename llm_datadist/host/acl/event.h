/* Events: marks in a stream that other streams and threads wait for. */
#ifndef LLM_DATADIST_HOST_EVENT_H
#define LLM_DATADIST_HOST_EVENT_H

#include <pthread.h>
#include <stdatomic.h>

#include "acl/error.h"
#include "acl/object.h"

typedef struct {
    ldd_host_object object;
    pthread_mutex_t lock; /* guards what follows */
    pthread_cond_t changed;
    uint64_t issued;    /* records asked for so far */
    uint64_t completed; /* the latest record that a stream reached */
} ldd_host_event;

/* The event of a handle, with a reference for the caller. */
aclError ldd_host_enter_event(const char *function, aclrtEvent handle, ldd_host_event **event);

/* Called by a stream: the record is reached, or wait until it is or until *cancelled. */
void ldd_host_event_reached(ldd_host_event *event, uint64_t sequence);
void ldd_host_event_wait(ldd_host_event *event, uint64_t sequence, const atomic_bool *cancelled);
void ldd_host_event_kick(ldd_host_event *event);

#endif
