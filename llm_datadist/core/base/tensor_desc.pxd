"""What the tensors of a cache hold; see ``ldd_tensor.h``."""
from libc.stddef cimport size_t
from libc.stdint cimport uint16_t, uint32_t, uint64_t

cdef extern from "llm_datadist/ldd_tensor.h" nogil:
    enum:
        LDD_MAX_DIMS
    ctypedef struct ldd_tensor_desc:
        uint16_t dtype
        uint16_t rank
        uint64_t dims[8]
    void ldd_tensor_text(const ldd_tensor_desc* tensor, uint32_t num_tensors, char* text, size_t size)
