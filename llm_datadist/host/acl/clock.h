/* Conditions, deadlines and time limits on the monotonic clock. */
#ifndef LLM_DATADIST_HOST_CLOCK_H
#define LLM_DATADIST_HOST_CLOCK_H

#include <pthread.h>
#include <stdint.h>
#include <time.h>

#include "acl/error.h"

/* A condition variable on the monotonic clock: no jump of the wall clock moves a deadline. */
static inline void acl_init_condition(pthread_cond_t *condition) {
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(condition, &attributes);
    pthread_condattr_destroy(&attributes);
}

static inline struct timespec acl_deadline(int32_t timeout_ms) {
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
static inline aclError acl_check_timeout(const char *function, int32_t timeout_ms) {
    if (timeout_ms == -1 || timeout_ms > 0) {
        return ACL_SUCCESS;
    }
    return acl_fail(ACL_ERROR_RT_PARAM_INVALID, "%s: timeout is %d ms; -1 or at least 1 expected", function,
                    timeout_ms);
}

#endif
