"""Threads of ours that nobody joins, and no signal is delivered to."""

cdef extern from * nogil:
    """
    #include <pthread.h>
    #include <signal.h>

    static inline int ldd_spawn(void *(*main)(void *), void *argument) {
        sigset_t all, before;
        pthread_attr_t attributes;
        pthread_t thread;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        pthread_attr_init(&attributes);
        pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
        int error = pthread_create(&thread, &attributes, main, argument);
        pthread_attr_destroy(&attributes);
        pthread_sigmask(SIG_SETMASK, &before, NULL);
        return error;
    }
    """
    # Start a thread; 0, or an error number.
    int ldd_spawn(void* (*main)(void*) noexcept nogil, void* argument)
