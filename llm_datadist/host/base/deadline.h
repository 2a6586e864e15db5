/* Monotonic deadlines in nanoseconds: nothing here looks at the wall clock. */
#ifndef LLM_DATADIST_DEADLINE_H
#define LLM_DATADIST_DEADLINE_H

#include <stdint.h>
#include <time.h>

#define HIXL_NO_DEADLINE INT64_MAX
#define HIXL_MS_NS INT64_C(1000000)
#define HIXL_SECOND_NS INT64_C(1000000000)

static inline int64_t hixl_now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * HIXL_SECOND_NS + now.tv_nsec;
}

/* Negative: no limit. */
static inline int64_t hixl_deadline_after(int64_t timeout_ns) {
    int64_t now = hixl_now_ns();
    return timeout_ns < 0 || timeout_ns > HIXL_NO_DEADLINE - now ? HIXL_NO_DEADLINE : now + timeout_ns;
}

static inline int64_t hixl_earlier(int64_t a, int64_t b) {
    return a < b ? a : b;
}

static inline struct timespec hixl_timespec(int64_t time_ns) {
    struct timespec result = {.tv_sec = time_ns / HIXL_SECOND_NS, .tv_nsec = time_ns % HIXL_SECOND_NS};
    return result;
}

/* Milliseconds until the deadline for poll(): rounded up, so that a wait never ends early and then spins. */
static inline int hixl_poll_ms(int64_t deadline_ns) {
    int64_t left = deadline_ns - hixl_now_ns();
    if (left <= 0) {
        return 0;
    }
    return left > 1000 * HIXL_SECOND_NS ? 1000000 : (int)((left + HIXL_MS_NS - 1) / HIXL_MS_NS);
}

#endif
