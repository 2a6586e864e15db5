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
    LDD_CAP_ANY_LOCAL = 1u << 1, /* local_buf of a batch needs no registration with the client                */
    LDD_CAP_WAIT = 1u << 2, /* LddClientWait                                                             */
    LDD_CAP_CANCEL = 1u << 3, /* LddClientCancel                                                           */
    LDD_CAP_DROP_PEER = 1u << 4, /* LddServerDropPeer; client config key "ldd_token" (32 hex digits) is heard */
    LDD_CAP_FETCH = 1u << 5, /* LddServerSetFetch, LddClientFetchAsync                                    */
    LDD_CAP_SHARED_MEMORY = 1u << 6, /* processes of one host may share memory: LLM_DATADIST_HOST_PATHS says so   */
    LDD_CAP_ADMIT = 1u << 7 /* LddServerRestrict, LddServerAdmitPeer                                     */
};

uint32_t LddCapabilities(void);

/* Text of the latest failure of a Hixl* or Ldd* call in this thread; "" when there was none. Never NULL. */
const char *LddLastError(void);

/*
 * Drive the batch and sleep until it ends or timeout_ns (monotonic, relative; < 0: no limit) passes.
 * *status: WAITING when time ran out (the batch goes on, the handle stays valid); COMPLETED or FAILED
 * otherwise (the handle is gone, as with HixlCSClientQueryCompleteStatus). The calling thread may
 * itself copy bytes. Never sleeps past the deadline by more than the time one chunk of a copy takes.
 */
HixlStatus LddClientWait(HixlClientHandle client, CompleteHandle handle, int64_t timeout_ns,
                         HixlCompleteStatus *status);

/*
 * Give the batch up. When this returns, no byte of it is written locally any more, the handle is gone,
 * and the client is poisoned unless the batch had already ended.
 */
HixlStatus LddClientCancel(HixlClientHandle client, CompleteHandle handle);

/*
 * Who may connect. A restricted server admits the clients whose tokens it was told, each with its rights, until the
 * peer is dropped; others, and those without a token, are refused at their first frame. A right that is missing makes
 * requests that need it fail, and what is mapped for such a client is mapped to be read. LddServerRestrict comes before
 * the server listens.
 */
enum { LDD_RIGHT_READ = 1u << 0, LDD_RIGHT_WRITE = 1u << 1 };
HixlStatus LddServerRestrict(HixlServerHandle server);
HixlStatus LddServerAdmitPeer(HixlServerHandle server, const uint8_t token[16], uint32_t rights);

/*
 * Close what the client that announced this token has open at the server, admit it no more, and wait until nothing
 * more is written into or read from server memory on its behalf by server threads.
 */
HixlStatus LddServerDropPeer(HixlServerHandle server, const uint8_t token[16]);

/*
 * Fetching: one exchange over the network in which the server's owner looks up what the client asks for, the bytes
 * travel, and the client says that it has them. Both owners agree on the words of a request; the provider passes them
 * on, sends the segments the server's owner names, in that order, and puts them into the places the client's owner
 * names, in theirs.
 */
typedef struct {
    uint64_t addr, bytes;
} LddSegment;

/* What the server's owner answers. Segments stay where they are until `end`. */
typedef struct {
    const LddSegment *segments;
    size_t num_segments;
    int32_t never_unmapped; /* all of it is memory that is mapped as long as the ticket lasts */
    void *ticket;
} LddFetchSource;

/* The longest request; and the answer, in place of an owner's, of a server that has no hooks. */
enum { LDD_FETCH_MAX_REQUEST_BYTES = 1 << 20, LDD_FETCH_NOT_HERE = 1 };

typedef struct {
    /*
     * Look up what the request names, of num_bytes in all, and hold it. 0: source is filled, and `end` will follow.
     * Any other number is the owner's own, and reaches the client with `text`. Called on threads of the server, as is
     * `end`.
     */
    int32_t (*begin)(void *context, const uint8_t token[16], const void *request, size_t request_bytes,
                     uint64_t num_bytes, LddFetchSource *source, char *text, size_t text_size);
    /*
     * No byte is read on behalf of this ticket any more. `confirmed`: the client has said that it has them all; this
     * is called as soon as that arrives. 0: it went away, or was dropped, without having said so.
     */
    void (*end)(void *context, void *ticket, int32_t confirmed);
} LddFetchHooks;

/*
 * Before the server listens; the hooks are copied. NULL at any time: returns once `end` was called for whatever had
 * begun, confirmed if its confirmation has arrived, and no hook will be called again.
 */
HixlStatus LddServerSetFetch(HixlServerHandle server, const LddFetchHooks *hooks, void *context);

/* The outcome of a batch that completed: 0, or what the server's owner answered instead of bytes. */
typedef struct {
    int32_t status;
    char text[320];
} LddFetchReply;

/*
 * Ask for bytes and put them into local_buf of each op, in order; remote_buf is ignored. `request` and `reply` must
 * stay until the handle is gone.
 */
HixlStatus LddClientFetchAsync(HixlClientHandle client, const void *request, uint32_t request_bytes, uint32_t num_ops,
                               const HixlOneSideOpDesc *ops, LddFetchReply *reply, CompleteHandle *out_handle);

/* "shm", "cma" or "tcp" per remote region, comma separated without repeats, e.g. "shm,cma". */
HixlStatus LddClientPaths(HixlClientHandle client, char *text, size_t size);

#ifdef __cplusplus
}
#endif
#endif
