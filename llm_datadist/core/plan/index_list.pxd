"""Block lists read into contiguous int64; see ``index_list.pyx``."""
from libc.stdint cimport int64_t, uint64_t

from llm_datadist.core.base.status cimport ldd_detail, ldd_status

cdef extern from *:
    """
    /* Exactly one load: the memory may be a user's buffer that another thread writes to. */
    static inline int64_t ldd_load_index(const int64_t *p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }
    """
    int64_t ldd_load_index(const int64_t* p) noexcept nogil

cdef enum:
    INLINE_INDICES = 64


cdef class IndexList:
    """Block indices of one argument as contiguous int64; valid while the object lives."""
    cdef const int64_t* data                    # never NULL; every value was >= 0 when it was parsed
    cdef size_t length
    cdef int64_t* _heap                         # owned copy when it is longer than the inline space
    cdef bint _has_view
    cdef Py_buffer _view                        # the user's own memory, read in place
    cdef int64_t _inline[INLINE_INDICES]

    @staticmethod
    cdef IndexList parse(object values, str name)
    cdef int64_t* _room(self, size_t n) except NULL
    cdef int _read_list(self, list values, str name) except -1
    cdef int _read_tuple(self, tuple values, Py_ssize_t start, str name) except -1
    cdef int _read_range(self, values, str name) except -1
    cdef int _read_buffer(self, values, str name) except -1
    cdef int _read_view(self, const Py_buffer* view, str name) except -1
    cdef int _refuse_negative(self, str name, bint is_signed) except -1


# LDD_E_PARAM naming a value outside [0, limit).
cdef ldd_status ldd_index_error(
    const char* name, size_t i, int64_t value, uint64_t limit, ldd_detail* detail) noexcept nogil
