"""The one place where an internal status becomes an exception."""
from libc.stdint cimport int32_t

cdef extern from "llm_datadist/ldd_status.h" nogil:
    ctypedef int32_t ldd_status
    ctypedef struct ldd_detail:
        int32_t provider_code
        char text[420]
    ldd_status ldd_fail(ldd_detail* detail, ldd_status status, const char* format, ...)
    enum:
        LDD_OK
        LDD_E_FAILED
        LDD_E_PARAM
        LDD_E_NOT_EXIST
        LDD_E_NO_MEMORY
        LDD_E_TIMEOUT
        LDD_E_NOT_LINKED
        LDD_E_ALREADY_LINKED
        LDD_E_LINK_FAILED
        LDD_E_UNLINK_FAILED
        LDD_E_LINK_BUSY
        LDD_E_NOT_ENABLED
        LDD_E_EXIST_LINK
        LDD_E_PROCESSING_LINK
        LDD_E_DEVICE_MEM
        LDD_E_SUSPECT_REMOTE
        LDD_E_CHECKSUM
        LDD_E_INTERRUPTED

cdef int raise_status(ldd_status status, const ldd_detail* detail, const char* what, bint v1) except -1 with gil

cdef inline int check(ldd_status status, const ldd_detail* detail, const char* what, bint v1=False) except -1 nogil:
    """Return 0, or raise what the table says. `what` names the operation in the text."""
    return 0 if status >= 0 else raise_status(status, detail, what, v1)

cdef inline void start_detail(ldd_detail* detail) noexcept nogil:
    """Empty: nothing went wrong yet."""
    detail.provider_code = 0
    detail.text[0] = 0
