/*
 * How the transfer half reports failures: a status and a text that names the offending value.
 *
 * Inner functions fill the hixl_error they are given and return its status; the exported ones give them the
 * calling thread's own, which LddLastError answers. A batch carries one, because another thread may fail it.
 */
#ifndef LLM_DATADIST_HIXL_ERROR_H
#define LLM_DATADIST_HIXL_ERROR_H

#include "cs/hixl_cs.h"

typedef struct {
    HixlStatus status;
    char text[360];
} hixl_error;

/* The calling thread's own; what LddLastError answers. */
hixl_error *hixl_thread_error(void);

/* Fill *error and return `status`. */
__attribute__((format(printf, 3, 4))) HixlStatus hixl_fail(hixl_error *error, HixlStatus status, const char *format,
                                                           ...);

#endif
