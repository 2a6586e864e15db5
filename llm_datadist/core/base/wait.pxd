"""Bounded waits for batches, and the mapping of the C API's status numbers; see ``wait.pyx``."""
from libc.stdint cimport int64_t

from llm_datadist.core.base.provider cimport CompleteHandle, HixlClientHandle, HixlStatus, aclError, ldd_provider
from llm_datadist.core.base.status cimport ldd_detail, ldd_status
from llm_datadist.core.base.sync cimport ldd_mutex

cdef ldd_status ldd_map_hixl(HixlStatus code) noexcept nogil
cdef ldd_status ldd_map_acl(aclError code) noexcept nogil

# Map the code, and leave "<what>: <provider's text> (<code>)" and the code in `detail`; LDD_OK for success.
cdef ldd_status ldd_hixl_result(
    const ldd_provider* provider, HixlStatus code, const char* what, ldd_detail* detail) noexcept nogil
cdef ldd_status ldd_acl_result(
    const ldd_provider* provider, aclError code, const char* what, ldd_detail* detail) noexcept nogil

# `deadline_ns` is absolute on the monotonic clock (ldd_now_ns); INT64_MAX waits without limit. The handle
# is gone on return, except after LDD_E_TIMEOUT or LDD_E_INTERRUPTED of a provider without LDD_CAP_CANCEL:
# then bytes may still land until the caller has destroyed the client.
cdef ldd_status ldd_wait_complete(
    const ldd_provider* provider, HixlClientHandle client, CompleteHandle handle, int64_t deadline_ns,
    ldd_detail* detail) noexcept nogil

# The same for a thread that came from Python and has released the GIL: signal handlers run meanwhile.
# After LDD_E_INTERRUPTED the handler's exception is set; hand the status to check() before other Python code.
cdef ldd_status ldd_wait_interruptible(
    const ldd_provider* provider, HixlClientHandle client, CompleteHandle handle, int64_t deadline_ns,
    ldd_detail* detail) noexcept nogil

# A mutex for a thread that came from Python and has released the GIL: LDD_OK with it, otherwise LDD_E_TIMEOUT or, as
# above, LDD_E_INTERRUPTED.
cdef ldd_status ldd_lock_interruptible(ldd_mutex* mutex, int64_t deadline_ns) noexcept nogil
