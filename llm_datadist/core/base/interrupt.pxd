"""What ends a wait before its time: a signal handler that raises, or a cancel; see ``interrupt.pyx``."""

# Whether anything could end a wait of this thread: others need not be sliced.
cdef bint ldd_is_interruptible() noexcept nogil
# Run pending signal handlers, and look for a cancel; nonzero when an exception is set, which check() lets out.
cdef int ldd_interrupted() noexcept nogil
# Whether the calls of this thread have been cancelled.
cdef bint ldd_is_cancelled() noexcept nogil
