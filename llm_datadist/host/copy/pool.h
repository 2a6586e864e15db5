/*
 * Helper threads that copy chunks of large batches, one small pool per process.
 *
 * A job is a number of independent chunks and a function that does one. Helpers and the thread that waits for
 * the job claim chunks until none is left. Threads start with the first large job, sleep on a condition
 * variable between jobs, and end when the last client of the process is destroyed. A forked child starts
 * without any.
 *
 * Lock order: a client's lock, then the pool's. No chunk runs under either.
 */
#ifndef LLM_DATADIST_COPY_POOL_H
#define LLM_DATADIST_COPY_POOL_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/queue.h>

enum { COPY_MAX_THREADS = 64 };

typedef struct copy_job {
    /* Do chunk `index`; false gives the rest of the job up (the function records why). Any thread, no lock held. */
    bool (*run)(struct copy_job *job, size_t index);
    size_t num_chunks;
    atomic_size_t next;     /* first chunk nobody claimed */
    atomic_bool stopped;    /* claim no more: cancelled, or a chunk failed */
    atomic_uint num_active; /* threads inside `run`; changed under the pool's lock */
    bool queued;
    pthread_cond_t idle;
    TAILQ_ENTRY(copy_job) entry;
} copy_job;

bool copy_job_init(copy_job *job); /* once, before its first use */
void copy_job_destroy(copy_job *job);

/* Each client holds the pool; the last release joins the threads. */
void copy_pool_retain(void);
void copy_pool_release(void);

/* Threads that may copy one job at a time, the waiting one included: LLM_DATADIST_COPY_THREADS or min(4, CPUs). */
unsigned copy_pool_width(void);

/* Make the job known and wake up to `helpers` threads; run, num_chunks are set. */
void copy_job_start(copy_job *job, unsigned helpers);

/* True once no chunk is left or running: success unless `stopped`. */
bool copy_job_done(copy_job *job);

/* Run chunks in this thread until none is left to claim, or the deadline passes (at least one is tried). */
void copy_job_help(copy_job *job, int64_t deadline_ns);

/* Wait for the chunks others are running; false when the deadline came first. */
bool copy_job_wait(copy_job *job, int64_t deadline_ns);

/* Claim no more, and return when no thread runs a chunk. */
void copy_job_stop(copy_job *job);

#endif
