#include "hixl/shared/error.h"

#include <stdarg.h>
#include <stdio.h>

#include "acl/memory.h"
#include "llm_datadist/ldd_ext.h"

static _Thread_local hixl_error last_error;

hixl_error *hixl_thread_error(void) {
    return &last_error;
}

HixlStatus hixl_fail(hixl_error *error, HixlStatus status, const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(error->text, sizeof error->text, format, args);
    va_end(args);
    error->status = status;
    return status;
}

LDD_EXPORT const char *LddLastError(void) {
    return last_error.text;
}

LDD_EXPORT uint32_t LddCapabilities(void) {
    return LDD_CAP_LATE_REGISTRATION | LDD_CAP_ANY_LOCAL | LDD_CAP_WAIT | LDD_CAP_CANCEL | LDD_CAP_DROP_PEER |
           LDD_CAP_FETCH | LDD_CAP_ADMIT;
}
