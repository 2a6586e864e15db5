"""Reference measurements for benchmarks: descriptors, and a team of threads; see ``bound.pyx``."""
from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint64_t

from llm_datadist.core.base.status cimport ldd_status
from llm_datadist.core.base.sync cimport ldd_cond, ldd_mutex

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_t:
        pass

cdef enum:
    BOUND_MAX_THREADS = 64

ctypedef struct bound_desc:
    uint64_t src
    uint64_t dst
    uint64_t length                             # bytes

# Work for member `index` of a team; member 0 is the calling thread.
ctypedef void (*bound_work)(void* context, int index) noexcept nogil

# Threads that sleep between jobs. One job at a time.
ctypedef struct bound_team:
    ldd_mutex lock
    ldd_cond start
    ldd_cond done
    pthread_t threads[BOUND_MAX_THREADS]
    int num_threads                             # the calling one included
    int num_started                             # members that know their index
    int num_running                             # atomic
    uint64_t job                                # counts up
    bint stopping
    bound_work work
    void* context

# All zero is a team of nobody, which bound_team_stop accepts.
cdef ldd_status bound_team_start(bound_team* team, int num_threads) noexcept nogil
cdef void bound_team_run(bound_team* team, bound_work work, void* context) noexcept nogil
cdef void bound_team_stop(bound_team* team) noexcept nogil

# C array of the rows (src, dst, length) of a two-dimensional uint64 buffer; the caller frees it.
cdef bound_desc* bound_descs(object rows, size_t* count, uint64_t* total) except NULL
