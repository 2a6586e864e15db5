/*
 * Internal statuses of the core and the one table that gives each its public code.
 *
 * Every nogil worker of the core returns an ldd_status; only core/base/status.pyx turns
 * one into an exception, and it does so from this list alone.
 */
#ifndef LLM_DATADIST_LDD_STATUS_H
#define LLM_DATADIST_LDD_STATUS_H

#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

typedef int32_t ldd_status;

/*
 * X(internal name, value, public code (v2), public code (v1), exception class)
 * The v1 column differs where the first generation of the API names the same event otherwise.
 */
#define LDD_STATUS_LIST(X)                                                                           \
    X(LDD_E_FAILED, -1, LLM_FAILED, LLM_FAILED, LLMException)                                        \
    X(LDD_E_PARAM, -2, LLM_PARAM_INVALID, LLM_PARAM_INVALID, LLMParamInvalidError)                   \
    X(LDD_E_NOT_EXIST, -3, LLM_KV_CACHE_NOT_EXIST, LLM_KV_CACHE_NOT_EXIST, LLMNotFoundError)         \
    X(LDD_E_NO_MEMORY, -4, LLM_OUT_OF_MEMORY, LLM_DEVICE_OUT_OF_MEMORY, LLMMemoryError)              \
    X(LDD_E_TIMEOUT, -5, LLM_TIMEOUT, LLM_WAIT_PROCESS_TIMEOUT, LLMTimeoutError)                     \
    X(LDD_E_NOT_LINKED, -6, LLM_NOT_YET_LINK, LLM_NOT_YET_LINK, LLMLinkError)                        \
    X(LDD_E_ALREADY_LINKED, -7, LLM_ALREADY_LINK, LLM_ALREADY_LINK, LLMLinkError)                    \
    X(LDD_E_LINK_FAILED, -8, LLM_LINK_FAILED, LLM_LINK_FAILED, LLMLinkError)                         \
    X(LDD_E_UNLINK_FAILED, -9, LLM_UNLINK_FAILED, LLM_UNLINK_FAILED, LLMLinkError)                   \
    X(LDD_E_LINK_BUSY, -10, LLM_LINK_BUSY, LLM_LINK_BUSY, LLMLinkError)                              \
    X(LDD_E_NOT_ENABLED, -11, LLM_FEATURE_NOT_ENABLED, LLM_FEATURE_NOT_ENABLED, LLMNotEnabledError)  \
    X(LDD_E_EXIST_LINK, -12, LLM_EXIST_LINK, LLM_EXIST_LINK, LLMLinkError)                           \
    X(LDD_E_PROCESSING_LINK, -13, LLM_PROCESSING_LINK, LLM_PROCESSING_LINK, LLMLinkError)            \
    X(LDD_E_DEVICE_MEM, -14, LLM_DEVICE_MEM_ERROR, LLM_DEVICE_MEM_ERROR, LLMDeviceError)             \
    X(LDD_E_SUSPECT_REMOTE, -15, LLM_SUSPECT_REMOTE_ERROR, LLM_SUSPECT_REMOTE_ERROR, LLMDeviceError) \
    X(LDD_E_CHECKSUM, -16, LLM_FAILED, LLM_FAILED, LLMChecksumError)

enum {
    LDD_OK = 0,
#define LDD_STATUS_ENUM(name, value, v2, v1, cls) name = value,
    LDD_STATUS_LIST(LDD_STATUS_ENUM)
#undef LDD_STATUS_ENUM
    /* A signal handler raised while a wait was sliced: the Python exception is already set. */
    LDD_E_INTERRUPTED = -100
};

/* What a failing worker leaves for the one who raises: final text, the provider's own code, and the peer. */
typedef struct {
    int32_t provider_code;  /* acl / HIXL number, or errno; 0 when the provider was not involved */
    char text[420];
} ldd_detail;

__attribute__((format(printf, 3, 4))) static inline ldd_status ldd_fail(ldd_detail *detail, ldd_status status,
                                                                        const char *format, ...) {
    if (detail != NULL) {
        va_list args;
        va_start(args, format);
        vsnprintf(detail->text, sizeof detail->text, format, args);
        va_end(args);
    }
    return status;
}

/* One row of the list above, for the table that core/base/status.pyx reads. */
typedef struct {
    ldd_status status;
    const char *name, *code_v2, *code_v1, *exception;
} ldd_status_row;

static inline const ldd_status_row *ldd_status_rows(size_t *count) {
#define LDD_STATUS_ROW(name, value, v2, v1, cls) {value, #name, #v2, #v1, #cls},
    static const ldd_status_row rows[] = {LDD_STATUS_LIST(LDD_STATUS_ROW)};
#undef LDD_STATUS_ROW
    *count = sizeof rows / sizeof rows[0];
    return rows;
}

#endif
