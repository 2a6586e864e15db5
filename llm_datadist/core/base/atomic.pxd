"""Atomic accesses by their order: get and set are relaxed, load acquires, store releases; see ``docs/protocol.md``."""
from libc.stdint cimport uint32_t, uint64_t

cdef extern from "llm_datadist/ldd_atomic.h" nogil:
    uint32_t ldd_get32(const uint32_t* at)
    uint64_t ldd_get64(const uint64_t* at)
    void ldd_set32(uint32_t* at, uint32_t value)
    void ldd_set64(uint64_t* at, uint64_t value)
    uint32_t ldd_load32(const uint32_t* at)
    uint64_t ldd_load64(const uint64_t* at)
    void ldd_store32(uint32_t* at, uint32_t value)
    void ldd_store64(uint64_t* at, uint64_t value)
    void ldd_add64(uint64_t* at, uint64_t by)
    void ldd_ring(uint64_t* bell)
    void ldd_raise(uint32_t* at, uint32_t value)
    void ldd_fence()
