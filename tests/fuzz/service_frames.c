/* Hellos, and LIST and MAP, of connections that come in on a data server; up to four at once. */
#include "peer.h"

#include <sys/epoll.h>

static inline int peer_epoll_ctl(int epoll, int operation, int fd, struct epoll_event *event) {
    (void)epoll;
    (void)operation;
    (void)fd;
    (void)event;
    return 0;
}

static inline int peer_thread(pthread_t *thread, const pthread_attr_t *attributes, void *(*run)(void *), void *with) {
    (void)thread;
    (void)attributes;
    (void)run;
    (void)with;
    return EAGAIN; /* data connections end here; what is said on them is another target */
}

#define epoll_ctl peer_epoll_ctl
#define pthread_create peer_thread

#include "hixl/server/service.c"

enum { NUM_CONNS = 4 };

static hixl_server *server;

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    static const char *const tags[] = {NULL, "kv", "a longer tag of a region"};
    HixlServerDesc desc = {0};
    HixlServerConfig config = {0};
    HixlServerHandle handle;
    size_t i;
    (void)argc;
    (void)argv;
    if (HixlCSServerCreate(&desc, &config, &handle) != HIXL_SUCCESS) {
        abort();
    }
    server = hixl_checked_server(handle, hixl_thread_error());
    server->max_conns = NUM_CONNS - 1;
    memset(server->nonce, 'n', sizeof server->nonce); /* an input must be able to name it */
    for (i = 0; i < 3; i++) {
        CommMem mem = {.type = COMM_MEM_TYPE_HOST, .addr = calloc(1, 4096), .size = 4096};
        MemHandle region;
        if (hixl_regions_add(&server->regions, tags[i], &mem, &region, hixl_thread_error()) != HIXL_SUCCESS) {
            abort();
        }
    }
    return 0;
}

static hixl_conn *accept_one(bool is_local) {
    hixl_conn *conn = calloc(1, sizeof *conn);
    if (conn == NULL) {
        abort();
    }
    conn->server = server;
    conn->fd = PEER_FD;
    conn->is_local = is_local;
    TAILQ_INSERT_TAIL(&server->pending, conn, entry);
    server->num_pending++;
    return conn;
}

/* The input is turns: a byte says whose, whether that is a local connection, and how many bytes come. */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    hixl_conn *conns[NUM_CONNS] = {NULL};
    hixl_conn *conn;
    size_t i;
    while (size > 0) {
        const uint8_t turn = *data++;
        size_t bytes = (size_t)(turn >> 3) * 8;
        size--;
        bytes = bytes == 0 || bytes > size ? size : bytes;
        i = turn & 3;
        conns[i] = conns[i] == NULL ? accept_one((turn & 4) != 0) : conns[i];
        conn = conns[i];
        peer = (peer_input){.next = data, .left = bytes};
        while (conn->state != HIXL_CONN_CLOSED && peer.left > 0) {
            handle_conn(server, conn, EPOLLIN);
        }
        data += bytes;
        size -= bytes;
    }
    for (i = 0; i < NUM_CONNS; i++) {
        if (conns[i] != NULL) {
            drop_conn(server, conns[i]);
        }
    }
    free_closed(server);
    if (server->num_pending != 0 || server->num_conns != 0 || !TAILQ_EMPTY(&server->sessions)) {
        abort(); /* something is held for peers that have gone */
    }
    return 0;
}
