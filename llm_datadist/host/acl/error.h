/* The text of the latest failure of an acl call in each thread, and the mark of exported symbols. */
#ifndef LLM_DATADIST_HOST_ERROR_H
#define LLM_DATADIST_HOST_ERROR_H

#include "acl/acl_rt.h"

/* The library hides every symbol but those of the seam, which carry this mark at their definition. */
#define LDD_EXPORT __attribute__((visibility("default")))

/* Set the text aclGetRecentErrMsg answers in this thread, and return `error`. */
__attribute__((format(printf, 2, 3))) aclError acl_fail(aclError error, const char *format, ...);

#endif
