/*
 * Optional additions of a provider that the C API of CANN lacks.
 *
 * Each symbol may be absent: the core asks by capability (ldd_provider.caps) and works without.
 * Statuses are HixlStatus numbers (cs/hixl_cs.h).
 */
#ifndef LLM_DATADIST_LDD_EXT_H
#define LLM_DATADIST_LDD_EXT_H

#include <stddef.h>
#include <stdint.h>

#include "cs/hixl_cs.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Capability bits, answered by LddCapabilities(). */
enum {
    LDD_CAP_LATE_REGISTRATION = 1u << 0, /* memory registered with a server after clients connected is seen by them   */
    LDD_CAP_ANY_LOCAL = 1u << 1,         /* local_buf of a batch needs no registration with the client                */
    LDD_CAP_WAIT = 1u << 2,              /* LddClientWait                                                             */
    LDD_CAP_CANCEL = 1u << 3,            /* LddClientCancel                                                           */
    LDD_CAP_DROP_PEER = 1u << 4          /* LddServerDropPeer; client config key "ldd_token" (32 hex digits) is heard */
};

uint32_t LddCapabilities(void);

/* Text of the latest failure of a Hixl* or Ldd* call in this thread; "" when there was none. Never NULL. */
const char *LddLastError(void);

/*
 * Drive the batch and sleep until it ends or timeout_ns (monotonic, relative; < 0: no limit) passes.
 * *status: WAITING when time ran out (the batch goes on, the handle stays valid); COMPLETED or FAILED
 * otherwise (the handle is gone, as with HixlCSClientQueryCompleteStatus). The calling thread may
 * itself copy bytes. Never sleeps past the deadline by more than the time one piece of a copy takes.
 */
HixlStatus LddClientWait(HixlClientHandle client, CompleteHandle handle, int64_t timeout_ns, HixlCompleteStatus *status);

/*
 * Give the batch up. When this returns, no byte of it is written locally any more, the handle is gone,
 * and the client is poisoned unless the batch had already ended.
 */
HixlStatus LddClientCancel(HixlClientHandle client, CompleteHandle handle);

/*
 * Close what the client that announced this token has open at the server, and wait until nothing more
 * is written into or read from server memory on its behalf by server threads.
 */
HixlStatus LddServerDropPeer(HixlServerHandle server, const uint8_t token[16]);

/* "shm", "cma" or "tcp" per remote region, comma separated without repeats, e.g. "shm,cma". */
HixlStatus LddClientPaths(HixlClientHandle client, char *text, size_t size);

#ifdef __cplusplus
}
#endif
#endif
