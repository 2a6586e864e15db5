"""What ends a wait before its time: a signal handler that raises, or a cancel from another thread.

Both look alike to whoever waits: it looks now and then, between slices of its wait, and finds that an exception is set.
Then it gives up as at its deadline, so that no byte lands any more, and the entry point lets the exception out.

Python runs signal handlers in its main thread only, and a cancel concerns the calls within a `CancelScope` alone. Any
other thread does not slice its waits, and takes no GIL here.
"""
cimport cython

from cpython.exc cimport PyErr_SetObject
from libc.stdint cimport uint32_t

import os
import threading

from llm_datadist import status as _public
from llm_datadist.core.base.atomic cimport ldd_load32, ldd_store32

cdef extern from "Python.h":
    # Raw result: the exception stays set in this thread until check() lets it out.
    int PyErr_CheckSignals() noexcept
    unsigned long PyThread_get_thread_ident() noexcept nogil

cdef extern from *:
    """
    /* The flag of the innermost scope that this thread is in; NULL outside. */
    static __thread const uint32_t *ldd_cancel_flag;

    static const uint32_t *ldd_cancel_flag_get(void) { return ldd_cancel_flag; }
    static void ldd_cancel_flag_set(const uint32_t *flag) { ldd_cancel_flag = flag; }
    """
    const uint32_t* ldd_cancel_flag_get() noexcept nogil
    void ldd_cancel_flag_set(const uint32_t* flag) noexcept nogil

cdef unsigned long main_thread = threading.main_thread().ident


def _note_main_thread():
    global main_thread
    main_thread = PyThread_get_thread_ident()


os.register_at_fork(after_in_child=_note_main_thread)


cdef bint ldd_is_interruptible() noexcept nogil:
    return PyThread_get_thread_ident() == main_thread or ldd_cancel_flag_get() != NULL


cdef bint ldd_is_cancelled() noexcept nogil:
    cdef const uint32_t* flag = ldd_cancel_flag_get()
    return flag != NULL and ldd_load32(flag) != 0


cdef int ldd_interrupted() noexcept nogil:
    if ldd_is_cancelled():
        return _set_cancelled()
    if PyThread_get_thread_ident() == main_thread:
        return _run_signal_handlers()
    return 0


cdef int _run_signal_handlers() noexcept with gil:
    return PyErr_CheckSignals()


cdef int _set_cancelled() noexcept with gil:
    try:
        error = cancelled()
    except Exception as failure:                    # no memory, for one
        error = failure
    PyErr_SetObject(type(error), error)
    return -1


def cancelled():
    """The exception of a call that was cancelled."""
    return _public.LLMException("the call was cancelled", status_code=_public.LLMStatusCode.LLM_FAILED,
                                recoverable=True, hint="repeat the call if it is still wanted")


@cython.final
cdef class CancelFlag:
    """Whether calls have been cancelled; the part of a `CancelScope` that waiting threads look at."""
    cdef uint32_t _flag

    def set(self):
        """Have calls of threads that look here end."""
        ldd_store32(&self._flag, 1)

    def is_set(self):
        """Whether `set` was called."""
        return ldd_load32(&self._flag) != 0


@cython.final
cdef class CancelWatch:
    """Has calls of the current thread look at a flag from `enter` to `leave`; of several the innermost counts."""
    cdef CancelFlag _watched
    cdef const uint32_t* _before

    def __init__(self, CancelFlag flag):
        self._watched = flag

    def enter(self):
        """From now on."""
        self._before = ldd_cancel_flag_get()
        ldd_cancel_flag_set(&self._watched._flag)

    def leave(self):
        """No longer; on the same thread, innermost first."""
        ldd_cancel_flag_set(self._before)
