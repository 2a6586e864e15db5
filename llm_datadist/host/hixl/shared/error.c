/* The text of the latest failure in each thread, and what this provider can do beyond CANN. */
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
