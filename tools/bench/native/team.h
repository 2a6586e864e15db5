/* A team of threads that sleep between jobs: what the references of the benchmarks divide their work among. */
#ifndef LLM_DATADIST_BENCH_TEAM_H
#define LLM_DATADIST_BENCH_TEAM_H

#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>

#include "llm_datadist/ldd_status.h"
#include "llm_datadist/ldd_sync.h"

#define BOUND_MAX_THREADS 64
#define BOUND_SPIN_NS 50000 /* waiting for the last member without sleeping */

/* One row that is to be moved. */
typedef struct {
    uint64_t src, dst, length; /* addresses, bytes */
} bound_desc;

/* Work for member `index` of a team; member 0 is the calling thread. */
typedef void (*bound_work)(void *context, int index);

/* One job at a time. All zero is a team of nobody, which bound_team_stop accepts. */
typedef struct {
    ldd_mutex lock;
    ldd_cond start, done;
    pthread_t threads[BOUND_MAX_THREADS];
    int num_threads; /* the calling one included */
    int num_started; /* members that know their index */
    int num_running; /* atomic */
    uint64_t job;    /* counts up */
    int stopping;
    bound_work work;
    void *context;
} bound_team;

/* A thread that no signal interrupts; 0, or an errno. */
static inline int bound_spawn(pthread_t *thread, void *(*body)(void *), void *argument) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = pthread_create(thread, NULL, body, argument);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return error;
}

static inline int bound_team_is_busy(bound_team *team) {
    return __atomic_load_n(&team->num_running, __ATOMIC_ACQUIRE) != 0;
}

static inline void *bound_team_main(void *argument) {
    bound_team *team = argument;
    uint64_t job = 0;
    ldd_lock(&team->lock);
    int index = ++team->num_started;
    for (;;) {
        while (team->job == job && !team->stopping)
            ldd_cond_wait_until(&team->start, &team->lock, LDD_NEVER);
        if (team->stopping) break;
        job = team->job;
        ldd_unlock(&team->lock);
        team->work(team->context, index);
        __atomic_fetch_sub(&team->num_running, 1, __ATOMIC_RELEASE);
        ldd_lock(&team->lock);
        if (!bound_team_is_busy(team)) ldd_cond_broadcast(&team->done);
    }
    ldd_unlock(&team->lock);
    return NULL;
}

static inline void bound_team_stop(bound_team *team) {
    if (team->num_threads == 0) return;
    ldd_lock(&team->lock);
    team->stopping = 1;
    ldd_cond_broadcast(&team->start);
    ldd_unlock(&team->lock);
    for (int i = 1; i < team->num_threads; i++)
        pthread_join(team->threads[i], NULL);
    ldd_cond_destroy(&team->done);
    ldd_cond_destroy(&team->start);
    ldd_mutex_destroy(&team->lock);
    team->num_threads = 0;
}

/* On failure there is nothing to stop. */
static inline ldd_status bound_team_start(bound_team *team, int num_threads) {
    memset(team, 0, sizeof *team);
    if (ldd_mutex_init(&team->lock) < 0) return LDD_E_NO_MEMORY;
    if (ldd_cond_init(&team->start) < 0) {
        ldd_mutex_destroy(&team->lock);
        return LDD_E_NO_MEMORY;
    }
    if (ldd_cond_init(&team->done) < 0) {
        ldd_cond_destroy(&team->start);
        ldd_mutex_destroy(&team->lock);
        return LDD_E_NO_MEMORY;
    }
    for (team->num_threads = 1; team->num_threads < num_threads; team->num_threads++) {
        if (bound_spawn(&team->threads[team->num_threads], bound_team_main, team) != 0) {
            bound_team_stop(team);
            return LDD_E_FAILED;
        }
    }
    return LDD_OK;
}

static inline void bound_team_run(bound_team *team, bound_work work, void *context) {
    ldd_lock(&team->lock);
    team->work = work;
    team->context = context;
    __atomic_store_n(&team->num_running, team->num_threads - 1, __ATOMIC_RELEASE);
    team->job++;
    ldd_cond_broadcast(&team->start);
    ldd_unlock(&team->lock);
    work(context, 0);
    int64_t spin_until = ldd_now_ns() + BOUND_SPIN_NS;
    while (bound_team_is_busy(team) && ldd_now_ns() < spin_until)
        ldd_cpu_relax();
    if (!bound_team_is_busy(team)) return;
    ldd_lock(&team->lock);
    while (bound_team_is_busy(team))
        ldd_cond_wait_until(&team->done, &team->lock, LDD_NEVER);
    ldd_unlock(&team->lock);
}

#endif
