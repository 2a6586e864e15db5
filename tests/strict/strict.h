/*
 * A stand-in for CANN that refuses what CANN refuses, in front of the embedded host provider.
 *
 * It exports the functions of the acl runtime and of HIXL's client/server part, and none of the optional additions,
 * so the core takes the ways it takes on a device. Each call is recorded, held against the rules, and passed on; any
 * call can be made to fail. Built by tests/support/strict.py for tests; nothing of it is shipped.
 *
 * Environment, read when the library is loaded:
 *   LDD_STRICT_HOST       path of the host provider's library
 *   LDD_STRICT_CREATE_MS  how long creating a client takes
 *   LDD_STRICT_SERVER_MS  how long creating a server takes
 *   LDD_STRICT_REGISTER_MS  how long a client takes to register memory
 *   LDD_STRICT_DESTROY_MS  how long the end of a client takes
 *   LDD_STRICT_SUBMIT_MS  how long a batch over a host endpoint takes, within the submitting call
 *   LDD_STRICT_LATE_MS    how long a batch over a device endpoint takes to write its bytes
 *   LDD_STRICT_SUPER_POD  which super node the device belongs to
 *   LDD_STRICT_PAGE_BYTES  size of the pages of device memory, 2 MiB without it
 *   LDD_STRICT_FAIL       "function:n:code": the n-th call of that function answers `code`
 */
#ifndef LDD_TESTS_STRICT_H
#define LDD_TESTS_STRICT_H

#define _GNU_SOURCE
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "llm_datadist/ldd_provider.h"

#define EXPORT __attribute__((visibility("default")))

/* User device d is logical device d + 2, which is physical device d + 4: none can pass for another. */
enum { LOGIC_OFFSET = 2, PHYSICAL_OFFSET = 4, SUPER_DEVICE_OFFSET = 0x100, SUPER_POD = 7 };

extern ldd_provider *strict_real;
/* Functions of the host provider that the core has no use for. */
extern __typeof__(&aclrtGetDevice) strict_get_device;
extern __typeof__(&HixlCSClientBatchPutSync) strict_put, strict_get;

/* Whether the call is to answer *code without being carried out; records it in any case. */
bool strict_enter(const char *function, const void *subject, int *code);
/* Note the outcome of the calling thread's latest call, and return it. */
int strict_leave(int code);
/* Keep a number that a test asks for later by name. */
void strict_note(const char *name, int64_t value);
void strict_add(const char *name, int64_t by);
/* Milliseconds of an environment variable, 0 without it. */
int strict_ms(const char *variable);
void strict_sleep_ms(int ms);

/* User device of the calling thread's context, or -1. */
int32_t strict_device(void);

#endif
