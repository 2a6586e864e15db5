"""Turn an internal status into the public exception, from the one table in ``ldd_status.h``.

Called by every entry point of the core after its ``nogil`` part; workers never raise. Only the cold
path takes the GIL.
"""
from llm_datadist import status as _public

cdef extern from "llm_datadist/ldd_status.h" nogil:
    ctypedef struct ldd_status_row:
        ldd_status status
        const char* name
        const char* code_v2
        const char* code_v1
        const char* exception
    const ldd_status_row* ldd_status_rows(size_t* count)


def _read_table():
    """Map every internal status to (name, v2 code, v1 code, exception class)."""
    cdef size_t count, i
    cdef const ldd_status_row* rows = ldd_status_rows(&count)
    table = {}
    for i in range(count):
        table[rows[i].status] = (
            rows[i].name.decode(),
            _public.LLMStatusCode[rows[i].code_v2.decode()],
            _public.LLMStatusCode[rows[i].code_v1.decode()],
            getattr(_public, rows[i].exception.decode()),
        )
    return table


STATUS_TABLE = _read_table()
_FALLBACK = STATUS_TABLE[LDD_E_FAILED]
# For a status that says all there is to say, and so came without words.
_WORDS = {LDD_E_NO_MEMORY: "this process has no memory left for the records of the call"}


cdef int raise_status(ldd_status status, const ldd_detail* detail, const char* what, bint v1) except -1 with gil:
    if status == LDD_E_INTERRUPTED:
        return -1                                   # the signal handler's exception is already set
    name, code_v2, code_v1, exception = STATUS_TABLE.get(status, _FALLBACK)
    code = code_v1 if v1 else code_v2
    operation = what.decode()
    text = (<ldd_detail*>detail).text.decode("utf-8", "replace") if detail != NULL else ""
    provider_code = detail.provider_code if detail != NULL else 0
    raise exception(
        f"{operation} failed, error code is {code}, {text or _WORDS.get(status, name)}.",
        status_code=code, operation=operation, provider_code=provider_code or None,
    )


def raise_for_status(int status, str what, str text="", bint v1=False):
    """Raise the exception of an internal status; return None for success. For Python callers and tests."""
    cdef ldd_detail detail
    detail.provider_code = 0
    encoded = text.encode()
    ldd_fail(&detail, status, b"%s", <char*>encoded)
    operation = what.encode()
    check(status, &detail, operation, v1)


def public_code(int status, bint v1=False):
    """Return the `LLMStatusCode` of an internal status (0 is success)."""
    if status >= 0:
        return _public.LLMStatusCode.LLM_SUCCESS
    row = STATUS_TABLE.get(status, _FALLBACK)
    return row[2] if v1 else row[1]
