"""Wait for a batch until it ends, its deadline passes, or a signal handler raises; and map the C API's status numbers.

Called by the transfer code, with the GIL released, from any thread; one thread at a time per client. Whoever
waits owns the completion handle, which is gone afterwards, and completion beats the clock: a batch that ended
before the last look is a success even when the deadline has passed.

A wait that gives up cancels the batch, so that no byte lands after it returned. A provider that cannot cancel
leaves this to the caller, who destroys the client before telling anybody.
"""
from libc.stdint cimport INT64_MAX, int32_t, int64_t
from posix.time cimport nanosleep, timespec

from llm_datadist.core.base.interrupt cimport ldd_interrupted, ldd_is_interruptible
from llm_datadist.core.base.provider cimport (
    ACL_ERROR_BAD_ALLOC, ACL_ERROR_RT_DEVICE_MEM_ERROR, ACL_ERROR_RT_DEVICE_OOM, ACL_ERROR_RT_EVENT_SYNC_TIMEOUT,
    ACL_ERROR_RT_FEATURE_NOT_SUPPORT, ACL_ERROR_RT_HBM_MULTI_BIT_ECC_ERROR, ACL_ERROR_RT_MEMORY_ALLOCATION,
    ACL_ERROR_RT_NO_DEVICE, ACL_ERROR_RT_NO_STREAM_RESOURCE, ACL_ERROR_RT_RESOURCE_ALLOC_FAIL,
    ACL_ERROR_RT_STREAM_SYNC_TIMEOUT, ACL_ERROR_RT_SUSPECT_DEVICE_MEM_ERROR, ACL_ERROR_RT_SUSPECT_REMOTE_ERROR,
    ACL_ERROR_RT_TASK_TIMEOUT, ACL_ERROR_RT_WAIT_TIMEOUT, HIXL_ALREADY_CONNECTED, HIXL_COMPLETE_STATUS_COMPLETED,
    HIXL_COMPLETE_STATUS_TIMEOUT, HIXL_COMPLETE_STATUS_WAITING, HIXL_FAILED, HIXL_NOT_CONNECTED, HIXL_PARAM_INVALID,
    HIXL_RESOURCE_EXHAUSTED, HIXL_SUCCESS, HIXL_TIMEOUT, HIXL_UNSUPPORTED, LDD_CAP_CANCEL, LDD_CAP_WAIT,
    CompleteHandle, HixlClientHandle, HixlCompleteStatus, HixlStatus, aclError, ldd_provider,
)
from llm_datadist.core.base.status cimport (
    LDD_E_ALREADY_LINKED, LDD_E_DEVICE_MEM, LDD_E_FAILED, LDD_E_INTERRUPTED, LDD_E_NO_MEMORY, LDD_E_NOT_ENABLED,
    LDD_E_NOT_LINKED, LDD_E_PARAM, LDD_E_SUSPECT_REMOTE, LDD_E_TIMEOUT, LDD_OK, ldd_detail, ldd_fail, ldd_status,
)
from llm_datadist.core.base.sync cimport ldd_cpu_relax, ldd_lock_until, ldd_mutex, ldd_now_ns

cdef enum:
    PENDING = 1                     # an answer between "done" (0) and the errors (< 0)

    SIGNAL_SLICE_NS = 25000000      # Ctrl-C and a cancel are served within twice this, by 40 wake-ups a second
    SPIN_NS = 50000                 # about what a small batch takes between two processes of one host
    MIN_NAP_NS = 2000
    MAX_NAP_NS = 100000


cdef ldd_status ldd_map_hixl(HixlStatus code) noexcept nogil:
    if code == HIXL_SUCCESS:
        return LDD_OK
    if code == HIXL_PARAM_INVALID:
        return LDD_E_PARAM
    if code == HIXL_TIMEOUT:
        return LDD_E_TIMEOUT
    if code == HIXL_NOT_CONNECTED:
        return LDD_E_NOT_LINKED
    if code == HIXL_ALREADY_CONNECTED:
        return LDD_E_ALREADY_LINKED
    if code == HIXL_UNSUPPORTED:
        return LDD_E_NOT_ENABLED
    if code == <HixlStatus>HIXL_RESOURCE_EXHAUSTED or code == <HixlStatus>HIXL_FAILED:
        return LDD_E_FAILED
    return ldd_map_acl(<aclError>code)          # HIXL hands on what the runtime told it


cdef ldd_status ldd_map_acl(aclError code) noexcept nogil:
    if code == 0:
        return LDD_OK
    if (code == ACL_ERROR_RT_STREAM_SYNC_TIMEOUT or code == ACL_ERROR_RT_EVENT_SYNC_TIMEOUT
            or code == ACL_ERROR_RT_WAIT_TIMEOUT or code == ACL_ERROR_RT_TASK_TIMEOUT):
        return LDD_E_TIMEOUT
    if (code == ACL_ERROR_BAD_ALLOC or code == ACL_ERROR_RT_MEMORY_ALLOCATION or code == ACL_ERROR_RT_DEVICE_OOM
            or code == ACL_ERROR_RT_RESOURCE_ALLOC_FAIL or code == ACL_ERROR_RT_NO_STREAM_RESOURCE):
        return LDD_E_NO_MEMORY
    if code == ACL_ERROR_RT_FEATURE_NOT_SUPPORT or code == ACL_ERROR_RT_NO_DEVICE:
        return LDD_E_NOT_ENABLED
    if (code == ACL_ERROR_RT_DEVICE_MEM_ERROR or code == ACL_ERROR_RT_HBM_MULTI_BIT_ECC_ERROR
            or code == ACL_ERROR_RT_SUSPECT_DEVICE_MEM_ERROR):
        return LDD_E_DEVICE_MEM
    if code == ACL_ERROR_RT_SUSPECT_REMOTE_ERROR:
        return LDD_E_SUSPECT_REMOTE
    return LDD_E_FAILED


cdef ldd_status ldd_hixl_result(
    const ldd_provider* provider, HixlStatus code, const char* what, ldd_detail* detail
) noexcept nogil:
    if code == HIXL_SUCCESS:
        return LDD_OK
    return _fail(ldd_map_hixl(code), provider.ext.LddLastError, what, b"HIXL status", <int32_t>code, detail)


cdef ldd_status ldd_acl_result(
    const ldd_provider* provider, aclError code, const char* what, ldd_detail* detail
) noexcept nogil:
    if code == 0:
        return LDD_OK
    return _fail(ldd_map_acl(code), provider.acl.aclGetRecentErrMsg, what, b"acl error", code, detail)


cdef ldd_status _fail(
    ldd_status status, const char* (*last_error)() noexcept nogil, const char* what, const char* kind, int32_t code,
    ldd_detail* detail
) noexcept nogil:
    """Leave what was called, the provider's number, and its own words when it has any."""
    cdef const char* text = NULL
    if last_error != NULL:
        text = last_error()
    if detail != NULL:
        detail.provider_code = code
    if text == NULL or text[0] == 0:
        return ldd_fail(detail, status, b"%s: %s %d", what, kind, code)
    return ldd_fail(detail, status, b"%s: %s %d, %s", what, kind, code, text)


cdef ldd_status ldd_wait_complete(
    const ldd_provider* provider, HixlClientHandle client, CompleteHandle handle, int64_t deadline_ns,
    ldd_detail* detail
) noexcept nogil:
    cdef ldd_status status = _wait_slice(provider, client, handle, deadline_ns, detail)
    return status if status != PENDING else _give_up(provider, client, handle, LDD_E_TIMEOUT, detail)


cdef ldd_status ldd_wait_interruptible(
    const ldd_provider* provider, HixlClientHandle client, CompleteHandle handle, int64_t deadline_ns,
    ldd_detail* detail
) noexcept nogil:
    cdef int64_t now, until
    cdef ldd_status status
    if not ldd_is_interruptible():
        return ldd_wait_complete(provider, client, handle, deadline_ns, detail)
    while True:
        # Taking the GIL may last as long as another thread keeps it. The last slice is the longest, so that
        # this happens well before the deadline and never at it.
        now = ldd_now_ns()
        until = deadline_ns if deadline_ns - now < 2 * SIGNAL_SLICE_NS else now + SIGNAL_SLICE_NS
        status = _wait_slice(provider, client, handle, until, detail)
        if status != PENDING:
            return status
        if until == deadline_ns:
            return _give_up(provider, client, handle, LDD_E_TIMEOUT, detail)
        if ldd_interrupted() != 0:
            return _give_up(provider, client, handle, LDD_E_INTERRUPTED, detail)


cdef ldd_status ldd_lock_interruptible(ldd_mutex* mutex, int64_t deadline_ns) noexcept nogil:
    cdef int64_t now, until
    cdef ldd_status status
    if not ldd_is_interruptible():
        return ldd_lock_until(mutex, deadline_ns)
    while True:
        now = ldd_now_ns()
        until = deadline_ns if deadline_ns - now < 2 * SIGNAL_SLICE_NS else now + SIGNAL_SLICE_NS
        status = ldd_lock_until(mutex, until)
        if status != LDD_E_TIMEOUT or until == deadline_ns:
            return status
        if ldd_interrupted() != 0:
            return LDD_E_INTERRUPTED


cdef ldd_status _wait_slice(
    const ldd_provider* provider, HixlClientHandle client, CompleteHandle handle, int64_t until_ns, ldd_detail* detail
) noexcept nogil:
    """Wait until the batch ends or the time comes; PENDING in the latter case. Looks at least once."""
    cdef HixlCompleteStatus state = HIXL_COMPLETE_STATUS_WAITING
    cdef HixlStatus code
    cdef int64_t now, start = ldd_now_ns(), nap_ns = MIN_NAP_NS
    if provider.caps & <unsigned int>LDD_CAP_WAIT:
        code = provider.ext.LddClientWait(
            client, handle, -1 if until_ns == INT64_MAX else max(0, until_ns - start), &state)
        return _verdict(provider, code, state, detail)
    while True:
        code = provider.hixl.HixlCSClientQueryCompleteStatus(client, handle, &state)
        if code != HIXL_SUCCESS or state != HIXL_COMPLETE_STATUS_WAITING:
            return _verdict(provider, code, state, detail)
        now = ldd_now_ns()
        if now >= until_ns:
            return PENDING
        if now - start < SPIN_NS:
            ldd_cpu_relax()
        else:
            _nap(min(nap_ns, until_ns - now))
            nap_ns = min(2 * nap_ns, <int64_t>MAX_NAP_NS)


cdef ldd_status _verdict(
    const ldd_provider* provider, HixlStatus code, HixlCompleteStatus state, ldd_detail* detail
) noexcept nogil:
    if code != HIXL_SUCCESS:
        return ldd_hixl_result(provider, code, b"wait for a batch", detail)
    if state == HIXL_COMPLETE_STATUS_COMPLETED:
        return LDD_OK
    if state == HIXL_COMPLETE_STATUS_WAITING:
        return PENDING
    return _fail(
        LDD_E_TIMEOUT if state == HIXL_COMPLETE_STATUS_TIMEOUT else LDD_E_FAILED, provider.ext.LddLastError,
        b"the batch ended unfinished", b"HIXL completion status", <int32_t>state, detail)


cdef ldd_status _give_up(
    const ldd_provider* provider, HixlClientHandle client, CompleteHandle handle, ldd_status reason, ldd_detail* detail
) noexcept nogil:
    """Cancel, and return the reason whatever comes of it: the caller tears the link down in any case."""
    cdef HixlStatus code
    if provider.caps & <unsigned int>LDD_CAP_CANCEL:
        code = provider.ext.LddClientCancel(client, handle)
        if code != HIXL_SUCCESS:
            ldd_hixl_result(provider, code, b"the batch did not end in time and was not cancelled", detail)
            return reason
    if detail != NULL:
        detail.provider_code = 0
    return ldd_fail(detail, reason, b"the batch did not end in time")


cdef inline void _nap(int64_t nap_ns) noexcept nogil:
    cdef timespec length
    length.tv_sec = 0
    length.tv_nsec = nap_ns
    nanosleep(&length, NULL)
