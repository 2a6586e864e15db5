"""Mutexes, conditions, the monotonic clock and a pause, for ``nogil`` code; see ``ldd_sync.h`` for deadlines."""
from libc.stdint cimport int64_t

from llm_datadist.core.base.status cimport ldd_status

cdef extern from "llm_datadist/ldd_sync.h" nogil:
    ctypedef struct ldd_mutex:
        pass
    ctypedef struct ldd_cond:
        pass
    const int64_t LDD_NEVER

    void ldd_cpu_relax()
    int64_t ldd_now_ns()
    int ldd_timer_create()
    void ldd_timer_set(int fd, int64_t at_ns)
    ldd_status ldd_mutex_init(ldd_mutex* mutex)
    void ldd_mutex_destroy(ldd_mutex* mutex)
    void ldd_lock(ldd_mutex* mutex)
    void ldd_unlock(ldd_mutex* mutex)
    ldd_status ldd_lock_until(ldd_mutex* mutex, int64_t deadline_ns)
    ldd_status ldd_cond_init(ldd_cond* cond)
    void ldd_cond_destroy(ldd_cond* cond)
    void ldd_cond_broadcast(ldd_cond* cond)
    ldd_status ldd_cond_wait_until(ldd_cond* cond, ldd_mutex* mutex, int64_t deadline_ns)
