/*
 * Monotonic time, mutexes and conditions that wait until a monotonic deadline, and the pause of a loop that spins.
 *
 * A deadline is CLOCK_MONOTONIC in nanoseconds; INT64_MAX waits for ever and anything in the past tries once.
 * Needs _GNU_SOURCE (Python.h sets it) for pthread_mutex_clocklock.
 */
#ifndef LLM_DATADIST_LDD_SYNC_H
#define LLM_DATADIST_LDD_SYNC_H

#include <errno.h>
#include <pthread.h>
#include <stdint.h>
#include <sys/timerfd.h>
#include <time.h>

#include "llm_datadist/ldd_status.h"

#define LDD_NEVER INT64_MAX

/* Once per turn of a loop that spins: tells the processor that it may let the other thread of its core go first. */
#if defined(__x86_64__) || defined(__i386__)
#define ldd_cpu_relax() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define ldd_cpu_relax() __asm__ __volatile__("yield" ::: "memory")
#else
#define ldd_cpu_relax() __asm__ __volatile__("" ::: "memory")
#endif

typedef pthread_mutex_t ldd_mutex;
typedef pthread_cond_t ldd_cond;

static inline int64_t ldd_now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static inline struct timespec ldd_timespec(int64_t ns) {
    struct timespec ts = {.tv_sec = (time_t)(ns / 1000000000), .tv_nsec = (long)(ns % 1000000000)};
    return ts;
}

/* A descriptor that is readable from a monotonic time on; -1 when there is none left. */
static inline int ldd_timer_create(void) {
    return timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
}

/* LDD_NEVER: not readable at all. Setting it anew takes its readiness away. */
static inline void ldd_timer_set(int fd, int64_t at_ns) {
    struct itimerspec when = {{0, 0}, {0, 0}};
    if (at_ns != LDD_NEVER) when.it_value = ldd_timespec(at_ns < 1 ? 1 : at_ns); /* 0 would disarm it */
    if (fd >= 0) timerfd_settime(fd, TFD_TIMER_ABSTIME, &when, NULL);
}

static inline ldd_status ldd_mutex_init(ldd_mutex *mutex) {
    return pthread_mutex_init(mutex, NULL) == 0 ? LDD_OK : LDD_E_NO_MEMORY;
}

static inline void ldd_mutex_destroy(ldd_mutex *mutex) {
    pthread_mutex_destroy(mutex);
}
static inline void ldd_lock(ldd_mutex *mutex) {
    pthread_mutex_lock(mutex);
}
static inline void ldd_unlock(ldd_mutex *mutex) {
    pthread_mutex_unlock(mutex);
}

/* LDD_OK with the mutex held, or LDD_E_TIMEOUT without it. */
static inline ldd_status ldd_lock_until(ldd_mutex *mutex, int64_t deadline_ns) {
    if (pthread_mutex_trylock(mutex) == 0) return LDD_OK;
    if (deadline_ns == LDD_NEVER) return pthread_mutex_lock(mutex) == 0 ? LDD_OK : LDD_E_FAILED;
    int64_t left = deadline_ns - ldd_now_ns();
    if (left <= 0) return LDD_E_TIMEOUT;
    /* Thread sanitizers know timedlock alone: after a clocklock they report the unlock as somebody else's. */
#if defined(__GLIBC__) && (__GLIBC__ > 2 || (__GLIBC__ == 2 && __GLIBC_MINOR__ >= 30)) && !defined(__SANITIZE_THREAD__)
    struct timespec until = ldd_timespec(deadline_ns);
    int rc = pthread_mutex_clocklock(mutex, CLOCK_MONOTONIC, &until);
#else
    /* Without clocklock only the wall clock is on offer: a clock step moves this wait, never an earlier one. */
    struct timespec wall;
    clock_gettime(CLOCK_REALTIME, &wall);
    int64_t wall_ns = (int64_t)wall.tv_sec * 1000000000 + wall.tv_nsec;
    struct timespec until = ldd_timespec(left > INT64_MAX - wall_ns ? INT64_MAX : wall_ns + left);
    int rc = pthread_mutex_timedlock(mutex, &until);
#endif
    return rc == 0 ? LDD_OK : rc == ETIMEDOUT ? LDD_E_TIMEOUT : LDD_E_FAILED;
}

static inline ldd_status ldd_cond_init(ldd_cond *cond) {
    pthread_condattr_t attr;
    if (pthread_condattr_init(&attr) != 0) return LDD_E_NO_MEMORY;
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    int rc = pthread_cond_init(cond, &attr);
    pthread_condattr_destroy(&attr);
    return rc == 0 ? LDD_OK : LDD_E_NO_MEMORY;
}

static inline void ldd_cond_destroy(ldd_cond *cond) {
    pthread_cond_destroy(cond);
}
static inline void ldd_cond_broadcast(ldd_cond *cond) {
    pthread_cond_broadcast(cond);
}

/* Wait with the mutex held on entry and return. LDD_OK may be spurious: test the condition again. */
static inline ldd_status ldd_cond_wait_until(ldd_cond *cond, ldd_mutex *mutex, int64_t deadline_ns) {
    if (deadline_ns == LDD_NEVER) return pthread_cond_wait(cond, mutex) == 0 ? LDD_OK : LDD_E_FAILED;
    if (deadline_ns <= 0) return LDD_E_TIMEOUT;
    struct timespec until = ldd_timespec(deadline_ns);
    int rc = pthread_cond_timedwait(cond, mutex, &until);
    return rc == 0 ? LDD_OK : rc == ETIMEDOUT ? LDD_E_TIMEOUT : LDD_E_FAILED;
}

#endif
