"""Arithmetic on sizes and addresses that tells when it wraps: true on overflow, result in `out`."""
from libc.stdint cimport uint64_t

cdef extern from *:
    """
    static inline int ldd_mul_overflows(uint64_t a, uint64_t b, uint64_t *out) {
        return __builtin_mul_overflow(a, b, out);
    }
    static inline int ldd_add_overflows(uint64_t a, uint64_t b, uint64_t *out) {
        return __builtin_add_overflow(a, b, out);
    }
    """
    bint ldd_mul_overflows(uint64_t a, uint64_t b, uint64_t* out) noexcept nogil
    bint ldd_add_overflows(uint64_t a, uint64_t b, uint64_t* out) noexcept nogil
