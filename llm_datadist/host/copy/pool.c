/* Helper threads that share large copies; see copy/pool.h. */
#define _GNU_SOURCE
#include "copy/pool.h"

#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#include "base/deadline.h"
#include "llm_datadist/ldd_sync.h"

enum { DEFAULT_MAX_THREADS = 4, HELPER_STACK_BYTES = 256 << 10 };

/* Waiting for the last chunk of a helper: this long without sleeping, about what going to sleep and waking costs. */
#define SPIN_NS INT64_C(20000)

static struct {
    pthread_mutex_t lock;
    pthread_cond_t work;
    TAILQ_HEAD(, copy_job) jobs; /* with chunks to claim */
    pthread_t threads[COPY_MAX_THREADS];
    unsigned num_threads;
    unsigned num_users;
    bool stopping;
} pool = {.lock = PTHREAD_MUTEX_INITIALIZER, .work = PTHREAD_COND_INITIALIZER};

static pthread_once_t pool_once = PTHREAD_ONCE_INIT;
static unsigned pool_width;

static void before_fork(void) {
    pthread_mutex_lock(&pool.lock);
}

static void after_fork_in_parent(void) {
    pthread_mutex_unlock(&pool.lock);
}

/* The threads stayed with the parent, and so did every job: the child begins with an empty pool. */
static void after_fork_in_child(void) {
    pthread_mutex_init(&pool.lock, NULL);
    pthread_cond_init(&pool.work, NULL);
    TAILQ_INIT(&pool.jobs);
    pool.num_threads = 0;
    pool.num_users = 0;
    pool.stopping = false;
}

static unsigned available_cpus(void) {
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) {
        return (unsigned)CPU_COUNT(&set);
    }
    long online = sysconf(_SC_NPROCESSORS_ONLN);
    return online > 0 ? (unsigned)online : 1;
}

static void init_pool(void) {
    const char *text = getenv("LLM_DATADIST_COPY_THREADS");
    long wanted = text != NULL ? strtol(text, NULL, 10) : 0;
    unsigned cpus = available_cpus();

    pool_width = cpus < DEFAULT_MAX_THREADS ? cpus : DEFAULT_MAX_THREADS;
    if (wanted > 0) {
        pool_width = wanted < COPY_MAX_THREADS ? (unsigned)wanted : COPY_MAX_THREADS;
    }
    TAILQ_INIT(&pool.jobs);
    pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
}

unsigned copy_pool_width(void) {
    pthread_once(&pool_once, init_pool);
    return pool_width;
}

bool copy_job_init(copy_job *job) {
    pthread_condattr_t attributes;
    bool ok;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    ok = pthread_cond_init(&job->idle, &attributes) == 0;
    pthread_condattr_destroy(&attributes);
    return ok;
}

void copy_job_destroy(copy_job *job) {
    pthread_cond_destroy(&job->idle);
}

static bool has_chunks(copy_job *job) {
    return atomic_load_explicit(&job->next, memory_order_relaxed) < job->num_chunks &&
           !atomic_load_explicit(&job->stopped, memory_order_relaxed);
}

/* The caller counts in num_active. */
static void run_chunks(copy_job *job, int64_t deadline_ns) {
    while (has_chunks(job)) {
        size_t index = atomic_fetch_add_explicit(&job->next, 1, memory_order_relaxed);
        if (index >= job->num_chunks) {
            return;
        }
        if (!job->run(job, index)) {
            atomic_store_explicit(&job->stopped, true, memory_order_relaxed);
            return;
        }
        if (deadline_ns != HIXL_NO_DEADLINE && hixl_now_ns() >= deadline_ns) {
            return;
        }
    }
}

static void unqueue(copy_job *job) {
    if (job->queued && !has_chunks(job)) {
        TAILQ_REMOVE(&pool.jobs, job, entry);
        job->queued = false;
    }
}

/* Pool locked. The release pairs with the acquire in seems_done: whoever sees the job done sees its bytes. */
static void leave_job(copy_job *job) {
    unqueue(job);
    if (atomic_fetch_sub_explicit(&job->num_active, 1, memory_order_release) == 1) {
        pthread_cond_broadcast(&job->idle);
    }
}

static void *helper_main(void *unused) {
    (void)unused;
    pthread_mutex_lock(&pool.lock);
    while (!pool.stopping) {
        copy_job *job, *found = NULL;
        TAILQ_FOREACH(job, &pool.jobs, entry) {
            if (has_chunks(job) && atomic_load_explicit(&job->num_active, memory_order_relaxed) < pool_width) {
                found = job;
                break;
            }
        }
        if (found == NULL) {
            pthread_cond_wait(&pool.work, &pool.lock);
            continue;
        }
        atomic_fetch_add_explicit(&found->num_active, 1, memory_order_relaxed);
        /* To the tail: several clients' jobs share the helpers in turn. */
        TAILQ_REMOVE(&pool.jobs, found, entry);
        TAILQ_INSERT_TAIL(&pool.jobs, found, entry);
        pthread_mutex_unlock(&pool.lock);
        run_chunks(found, HIXL_NO_DEADLINE);
        pthread_mutex_lock(&pool.lock);
        leave_job(found);
    }
    pthread_mutex_unlock(&pool.lock);
    return NULL;
}

/* Pool locked. A thread that cannot be had is no failure: whoever waits for a job copies too. */
static void start_threads(unsigned wanted) {
    pthread_attr_t attributes;
    sigset_t all, saved;

    if (pool.num_threads >= wanted || pool.num_users == 0 || pool.stopping) {
        return;
    }
    if (pthread_attr_init(&attributes) != 0) {
        return;
    }
    pthread_attr_setstacksize(&attributes, HELPER_STACK_BYTES);
    sigfillset(&all); /* signals belong to the application's threads */
    pthread_sigmask(SIG_SETMASK, &all, &saved);
    while (pool.num_threads < wanted &&
           pthread_create(&pool.threads[pool.num_threads], &attributes, helper_main, NULL) == 0) {
        pool.num_threads++;
    }
    pthread_sigmask(SIG_SETMASK, &saved, NULL);
    pthread_attr_destroy(&attributes);
}

void copy_pool_retain(void) {
    pthread_once(&pool_once, init_pool);
    pthread_mutex_lock(&pool.lock);
    pool.num_users++;
    pthread_mutex_unlock(&pool.lock);
}

void copy_pool_release(void) {
    pthread_t threads[COPY_MAX_THREADS];
    unsigned i, count = 0;

    pthread_mutex_lock(&pool.lock);
    if (--pool.num_users == 0 && pool.num_threads > 0 && !pool.stopping) {
        pool.stopping = true;
        for (count = 0; count < pool.num_threads; count++) {
            threads[count] = pool.threads[count];
        }
        pthread_cond_broadcast(&pool.work);
    }
    pthread_mutex_unlock(&pool.lock);
    if (count == 0) {
        return;
    }
    for (i = 0; i < count; i++) {
        pthread_join(threads[i], NULL);
    }
    pthread_mutex_lock(&pool.lock); /* a client made meanwhile starts new ones with its next large job */
    pool.num_threads = 0;
    pool.stopping = false;
    pthread_mutex_unlock(&pool.lock);
}

void copy_job_start(copy_job *job, unsigned helpers) {
    atomic_store_explicit(&job->next, 0, memory_order_relaxed);
    atomic_store_explicit(&job->stopped, false, memory_order_relaxed);
    atomic_store_explicit(&job->num_active, 0, memory_order_relaxed);
    job->queued = false;
    if (helpers == 0) {
        return;
    }
    pthread_mutex_lock(&pool.lock);
    start_threads(helpers);
    if (pool.num_threads > 0) {
        TAILQ_INSERT_TAIL(&pool.jobs, job, entry);
        job->queued = true;
        if (helpers == 1) {
            pthread_cond_signal(&pool.work);
        } else {
            pthread_cond_broadcast(&pool.work);
        }
    }
    pthread_mutex_unlock(&pool.lock);
}

static bool seems_done(copy_job *job) {
    return !has_chunks(job) && atomic_load_explicit(&job->num_active, memory_order_acquire) == 0;
}

/* Pool locked: helpers look and enter under the lock, so one that has not entered by now never will. */
static bool settle(copy_job *job) {
    bool done = seems_done(job);
    unqueue(job);
    return done;
}

bool copy_job_done(copy_job *job) {
    bool done = seems_done(job); /* without the lock a hint only: enough for "no" */
    if (done) {
        pthread_mutex_lock(&pool.lock);
        done = settle(job);
        pthread_mutex_unlock(&pool.lock);
    }
    return done;
}

void copy_job_help(copy_job *job, int64_t deadline_ns) {
    bool enter;
    pthread_mutex_lock(&pool.lock);
    enter = has_chunks(job);
    if (enter) {
        atomic_fetch_add_explicit(&job->num_active, 1, memory_order_relaxed);
    }
    pthread_mutex_unlock(&pool.lock);
    if (!enter) {
        return;
    }
    run_chunks(job, deadline_ns);
    pthread_mutex_lock(&pool.lock);
    leave_job(job);
    pthread_mutex_unlock(&pool.lock);
}

bool copy_job_wait(copy_job *job, int64_t deadline_ns) {
    int64_t spin_until = hixl_earlier(hixl_now_ns() + SPIN_NS, deadline_ns);
    struct timespec until;
    bool done;

    while (!seems_done(job) && hixl_now_ns() < spin_until) {
        ldd_cpu_relax();
    }
    until = hixl_timespec(deadline_ns == HIXL_NO_DEADLINE ? hixl_now_ns() + 3600 * HIXL_SECOND_NS : deadline_ns);
    pthread_mutex_lock(&pool.lock);
    while (!(done = settle(job)) && !has_chunks(job)) {
        if (pthread_cond_timedwait(&job->idle, &pool.lock, &until) != 0 && hixl_now_ns() >= deadline_ns) {
            break;
        }
    }
    pthread_mutex_unlock(&pool.lock);
    return done;
}

void copy_job_stop(copy_job *job) {
    atomic_store_explicit(&job->stopped, true, memory_order_relaxed);
    pthread_mutex_lock(&pool.lock);
    while (atomic_load_explicit(&job->num_active, memory_order_acquire) > 0) {
        pthread_cond_wait(&job->idle, &pool.lock);
    }
    unqueue(job);
    pthread_mutex_unlock(&pool.lock);
}
