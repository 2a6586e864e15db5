/*
 * The text of the latest failure of an acl call in each thread.
 */
#include <stdarg.h>
#include <stdio.h>

#include "acl/error.h"

static _Thread_local char recent_text[512];

aclError acl_fail(aclError error, const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(recent_text, sizeof recent_text, format, args);
    va_end(args);
    return error;
}

/* NULL when no call of this thread has failed yet. Asking does not clear the text. */
LDD_EXPORT const char *aclGetRecentErrMsg(void) {
    return recent_text[0] != '\0' ? recent_text : NULL;
}
