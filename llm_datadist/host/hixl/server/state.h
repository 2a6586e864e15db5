/*
 * What a server knows: who listens, its connections, and the threads that serve them.
 *
 * Who uses whom: server (life cycle) -> service (the service thread) -> data (threads of data connections) -> fetch
 * -> this; admission (who may come in) and region (what they reach) stand by themselves.
 *
 * One service thread accepts, does handshakes, answers LIST and MAP, and watches idle data connections; it never
 * blocks. A data connection whose peer asks for bytes gets a thread of its own, which hands the connection back
 * after a while without requests. Server memory is only ever touched by system calls that take its address
 * (sendmsg, recvmsg): a bad address is an error, not a crash.
 *
 * Locks: server->lock protects connections and sessions; it is taken before the region table's, and before fetch_lock,
 * which protects fetches under way (hixl/server/fetch.h).
 * Only the service thread closes connections, so a descriptor in use is never closed under its user.
 */
#ifndef LLM_DATADIST_HIXL_SERVER_STATE_H
#define LLM_DATADIST_HIXL_SERVER_STATE_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <sys/queue.h>
#include <sys/types.h>

#include "hixl/shared/fork.h"
#include "hixl/server/admission.h"
#include "hixl/server/region.h"
#include "hixl/shared/handle.h"
#include "hixl/shared/socket.h"
#include "hixl/shared/wire.h"
#include "llm_datadist/ldd_ext.h"

struct hixl_fetch;

/* One client: the connections that carry its id. Lives as long as its ADMIN connection. */
typedef struct hixl_session {
    TAILQ_ENTRY(hixl_session) entry;
    uint8_t client_id[16];
    uint8_t token[16];
    uint32_t rights;
    bool dropped; /* takes no further connections */
    size_t num_conns;
} hixl_session;

typedef enum {
    HIXL_CONN_PENDING, /* no hello yet */
    HIXL_CONN_CONTROL, /* ADMIN or LOCAL: answered by the service thread */
    HIXL_CONN_IDLE,    /* DATA without a thread: watched by the service thread */
    HIXL_CONN_SERVED,  /* DATA with a thread */
    HIXL_CONN_FINISHED, /* DATA whose thread has ended and waits to be joined */
    HIXL_CONN_CLOSED
} hixl_conn_state;

typedef struct hixl_conn {
    TAILQ_ENTRY(hixl_conn) entry;    /* server->pending, conns or closed */
    TAILQ_ENTRY(hixl_conn) finished; /* server->finished */
    struct hixl_server *server;
    hixl_session *session; /* NULL while pending */
    hixl_conn_state state;
    int fd;
    bool is_local;
    bool is_admin;
    bool broken;           /* its thread ended because the connection did */
    atomic_bool dropped;   /* move no more bytes on its behalf */
    pthread_t thread;      /* SERVED */
    int64_t deadline_ns;   /* PENDING */
    size_t num_received;
    union {
        hixl_wire_hello hello;
        hixl_wire_request request;
        uint8_t bytes[64];
    } in;
    uint8_t *out; /* a reply that did not fit the socket at once */
    size_t out_bytes, out_sent;
} hixl_conn;

TAILQ_HEAD(hixl_conn_list, hixl_conn);

typedef struct hixl_server {
    pid_t pid; /* a forked child must not touch any of this */
    hixl_fork_node fork_node;
    hixl_region_table regions;
    uint8_t nonce[16];
    uint8_t boot_id[16];
    char local_name[48];
    hixl_address address;
    bool listening;
    int tcp_fd, local_fd, epoll_fd, wake_fd;
    pthread_t service;

    pthread_mutex_t lock;
    pthread_cond_t unserved; /* some connection's thread ended */
    atomic_bool stopping;
    struct hixl_conn_list pending; /* oldest first: all have the same time for their hello */
    struct hixl_conn_list conns;
    struct hixl_conn_list finished; /* their threads are to be joined */
    struct hixl_conn_list closed;   /* freed once no event of the current round can name them */
    TAILQ_HEAD(, hixl_session) sessions;
    size_t num_pending, num_conns;
    size_t max_conns;         /* so that descriptors are left for the rest of the process */
    hixl_admissions admissions;
    LddFetchHooks fetch_hooks; /* all NULL: fetches are refused */
    void *fetch_context;
    pthread_mutex_t fetch_lock; /* see hixl/server/fetch.h */
    pthread_cond_t fetch_changed;
    bool fetch_withdrawn;
    unsigned num_hooked; /* fetches that have begun, or are about to, and not ended: these may call hooks */
    TAILQ_HEAD(, hixl_fetch) fetches;
    int64_t accept_after_ns; /* out of descriptors: the listeners rest until then; 0: they do not */
} hixl_server;

/* NULL: error says why. */
hixl_server *hixl_checked_server(HixlServerHandle handle, hixl_error *error);

void hixl_wake_service(hixl_server *server);

#endif
