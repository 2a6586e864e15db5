/* The service thread of a data server: accepts, shakes hands, answers LIST and MAP, hands connections to threads. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "hixl/server/data.h"
#include "hixl/server/fetch.h"
#include "hixl/server/service.h"
#include "base/deadline.h"

enum {
    MAX_PENDING = 256,   /* connections without a hello; the oldest makes room, so silence cannot keep others out */
    MAX_SESSION_CONNS = 40, /* of one client, which opens up to 18; each data connection may cost a thread */
    MAX_SESSIONS = 4,       /* of one token: a client, and those of earlier attempts that have not ended yet */
    MAX_TOKEN_CONNS = 64,   /* of all these together */
    ACCEPTS_PER_ROUND = 64, /* then those that have connected get their turn */
    EVENTS_PER_ROUND = 64,
    DATA_STACK_BYTES = 256 << 10
};
#define HELLO_TIMEOUT_NS (2 * HIXL_SECOND_NS)
#define ACCEPT_REST_NS (100 * HIXL_MS_NS)

/*
 * What clients may write across to see whether they can. Not of a connection: it may have ended, and its memory may
 * be in other use, by the time a client that was slow gets to it.
 */
static uint64_t scratch;

static void set_watch(hixl_server *server, hixl_conn *conn, int operation, uint32_t events) {
    struct epoll_event event = {.events = events, .data.ptr = conn};
    epoll_ctl(server->epoll_fd, operation, conn->fd, &event);
}

static void end_session(hixl_server *server, hixl_session *session);

/* Locked; the connection has no thread. */
static void close_conn(hixl_server *server, hixl_conn *conn) {
    hixl_session *session = conn->session;
    if (conn->state == HIXL_CONN_CLOSED) {
        return;
    }
    if (conn->state == HIXL_CONN_PENDING) {
        TAILQ_REMOVE(&server->pending, conn, entry);
        server->num_pending--;
    } else {
        TAILQ_REMOVE(&server->conns, conn, entry);
        server->num_conns--;
    }
    /* By hand: a descriptor that a child just forked still holds stays watched when it is closed here. */
    set_watch(server, conn, EPOLL_CTL_DEL, 0);
    close(conn->fd);
    conn->state = HIXL_CONN_CLOSED;
    conn->session = NULL;
    TAILQ_INSERT_TAIL(&server->closed, conn, entry);
    if (session != NULL) {
        session->num_conns--;
        if (conn->is_admin) {
            end_session(server, session);
        }
        if (session->num_conns == 0) {
            TAILQ_REMOVE(&server->sessions, session, entry);
            free(session);
        }
    }
}

/* Locked. The client has gone: so do its other connections, those with a thread as soon as that has ended. */
static void end_session(hixl_server *server, hixl_session *session) {
    hixl_conn *conn, *next;
    session->dropped = true;
    session->num_conns++; /* ours, while connections leave */
    for (conn = TAILQ_FIRST(&server->conns); conn != NULL; conn = next) {
        next = TAILQ_NEXT(conn, entry);
        if (conn->session != session) {
            continue;
        }
        if (conn->state == HIXL_CONN_SERVED) {
            atomic_store(&conn->dropped, true);
            shutdown(conn->fd, SHUT_RDWR);
        } else if (conn->state != HIXL_CONN_FINISHED) {
            close_conn(server, conn);
        }
    }
    session->num_conns--;
    hixl_fetch_wake(server);
}

static void drop_conn(hixl_server *server, hixl_conn *conn) {
    pthread_mutex_lock(&server->lock);
    close_conn(server, conn);
    pthread_mutex_unlock(&server->lock);
}

static void free_closed(hixl_server *server) {
    hixl_conn *conn;
    while ((conn = TAILQ_FIRST(&server->closed)) != NULL) {
        TAILQ_REMOVE(&server->closed, conn, entry);
        free(conn->out);
        free(conn);
    }
}

/* Give a data connection a thread. */
static void serve(hixl_server *server, hixl_conn *conn) {
    pthread_attr_t attributes;
    int code = pthread_attr_init(&attributes);
    if (code == 0) {
        pthread_attr_setstacksize(&attributes, DATA_STACK_BYTES);
        pthread_mutex_lock(&server->lock);
        set_watch(server, conn, EPOLL_CTL_DEL, 0);
        conn->broken = false;
        conn->state = HIXL_CONN_SERVED;
        code = pthread_create(&conn->thread, &attributes, hixl_serve_data_main, conn);
        if (code != 0) {
            conn->state = HIXL_CONN_IDLE;
        }
        pthread_mutex_unlock(&server->lock);
        pthread_attr_destroy(&attributes);
    }
    if (code != 0) {
        drop_conn(server, conn);
    }
}

/* Join threads that ended, and watch or close their connections. */
static void collect_finished(hixl_server *server) {
    for (;;) {
        hixl_conn *conn;
        pthread_mutex_lock(&server->lock);
        conn = TAILQ_FIRST(&server->finished);
        if (conn != NULL) {
            TAILQ_REMOVE(&server->finished, conn, finished);
        }
        pthread_mutex_unlock(&server->lock);
        if (conn == NULL) {
            return;
        }
        pthread_join(conn->thread, NULL); /* past its last use of the lock: returns at once */
        pthread_mutex_lock(&server->lock);
        conn->state = HIXL_CONN_IDLE;
        if (conn->broken || conn->session->dropped) {
            close_conn(server, conn);
        } else {
            set_watch(server, conn, EPOLL_CTL_ADD, EPOLLIN | EPOLLRDHUP);
        }
        pthread_mutex_unlock(&server->lock);
    }
}

/* Send what is queued; false when the connection is to be closed. */
static bool flush(hixl_server *server, hixl_conn *conn) {
    while (conn->out_sent < conn->out_bytes) {
        ssize_t sent = send(conn->fd, conn->out + conn->out_sent, conn->out_bytes - conn->out_sent, MSG_NOSIGNAL);
        if (sent >= 0) {
            conn->out_sent += (size_t)sent;
        } else if (errno == EAGAIN) {
            set_watch(server, conn, EPOLL_CTL_MOD, EPOLLOUT); /* and no further request until it is out */
            return true;
        } else if (errno != EINTR) {
            return false;
        }
    }
    free(conn->out);
    conn->out = NULL;
    set_watch(server, conn, EPOLL_CTL_MOD, EPOLLIN | EPOLLRDHUP);
    return true;
}

static bool answer_list(hixl_server *server, hixl_conn *conn, hixl_wire_reply *reply) {
    size_t bytes;
    void *payload = hixl_regions_list(&server->regions, &bytes, &reply->argument);
    if (payload == NULL) {
        return false;
    }
    conn->out = malloc(sizeof *reply + bytes);
    if (conn->out != NULL) {
        reply->bytes = bytes;
        memcpy(conn->out, reply, sizeof *reply);
        memcpy(conn->out + sizeof *reply, payload, bytes);
        conn->out_bytes = sizeof *reply + bytes;
        conn->out_sent = 0;
    }
    free(payload);
    return conn->out != NULL && flush(server, conn);
}

static bool answer_map(hixl_server *server, hixl_conn *conn, hixl_wire_reply *reply) {
    const bool writable = (conn->session->rights & LDD_RIGHT_WRITE) != 0;
    int fd = hixl_regions_dup_backing(&server->regions, conn->in.request.argument, writable, &reply->argument);
    ssize_t sent;
    if (fd < 0) {
        reply->status = HIXL_PARAM_INVALID;
    }
    sent = hixl_send_fd(conn->fd, reply, sizeof *reply, fd);
    if (fd >= 0) {
        close(fd);
    }
    return sent == sizeof *reply; /* a peer that leaves 200 KiB of answers unread asks for nothing sensible */
}

static bool answer(hixl_server *server, hixl_conn *conn) {
    const hixl_wire_request *request = &conn->in.request;
    hixl_wire_reply reply = {.magic = HIXL_WIRE_REPLY_MAGIC, .op = request->op, .sequence = request->sequence};
    if (request->magic != HIXL_WIRE_REQUEST_MAGIC || request->reserved != 0 || request->count != 0 ||
        request->bytes != 0) {
        return false;
    }
    switch (request->op) {
    case HIXL_OP_LIST:
        return answer_list(server, conn, &reply);
    case HIXL_OP_MAP:
        return conn->is_local && answer_map(server, conn, &reply);
    default:
        return false;
    }
}

/* Receive up to `bytes` into conn->in: 1 all there, 0 not yet, -1 closed or failed. */
static int fill(hixl_conn *conn, size_t bytes) {
    while (conn->num_received < bytes) {
        ssize_t got = recv(conn->fd, conn->in.bytes + conn->num_received, bytes - conn->num_received, 0);
        if (got > 0) {
            conn->num_received += (size_t)got;
        } else if (got < 0 && errno == EAGAIN) {
            return 0;
        } else if (got == 0 || errno != EINTR) {
            return -1;
        }
    }
    conn->num_received = 0;
    return 1;
}

static hixl_session *find_session(hixl_server *server, const uint8_t client_id[16]) {
    hixl_session *session;
    TAILQ_FOREACH(session, &server->sessions, entry) {
        if (!session->dropped && memcmp(session->client_id, client_id, 16) == 0) {
            return session;
        }
    }
    return NULL;
}

/* Whether a token may have another connection. Those without one have nothing in common. */
static bool has_room(hixl_server *server, const uint8_t token[16], bool new_session) {
    static const uint8_t none[16];
    hixl_session *session;
    size_t num_sessions = 0, num_conns = 0;
    if (memcmp(token, none, sizeof none) != 0) {
        TAILQ_FOREACH(session, &server->sessions, entry) {
            if (memcmp(session->token, token, sizeof session->token) == 0) {
                num_sessions++;
                num_conns += session->num_conns;
            }
        }
    }
    return num_conns < MAX_TOKEN_CONNS && (!new_session || num_sessions < MAX_SESSIONS);
}

/* Locked. Find or make the session a hello belongs to. */
static HixlStatus join_session(hixl_server *server, hixl_conn *conn) {
    const hixl_wire_hello *hello = &conn->in.hello;
    hixl_session *session = find_session(server, hello->client_id);
    const uint32_t rights = hixl_admission_rights(&server->admissions, hello->token);
    if (rights == 0) {
        return HIXL_NOT_CONNECTED;
    }
    if (!has_room(server, hello->token, hello->kind == HIXL_KIND_ADMIN)) {
        return HIXL_RESOURCE_EXHAUSTED;
    }
    if (hello->kind == HIXL_KIND_ADMIN) {
        if (session != NULL || conn->is_local) {
            return HIXL_PARAM_INVALID;
        }
        session = calloc(1, sizeof *session);
        if (session == NULL) {
            return HIXL_RESOURCE_EXHAUSTED;
        }
        memcpy(session->client_id, hello->client_id, sizeof session->client_id);
        memcpy(session->token, hello->token, sizeof session->token);
        session->rights = rights;
        TAILQ_INSERT_TAIL(&server->sessions, session, entry);
        conn->is_admin = true;
    } else {
        if (hello->kind != (conn->is_local ? HIXL_KIND_LOCAL : HIXL_KIND_DATA)) {
            return HIXL_PARAM_INVALID;
        }
        if (memcmp(hello->server_nonce, server->nonce, sizeof server->nonce) != 0 || session == NULL ||
            memcmp(hello->token, session->token, sizeof session->token) != 0) {
            return HIXL_NOT_CONNECTED; /* meant for an earlier server at this address, or dropped */
        }
        if (session->num_conns >= MAX_SESSION_CONNS) {
            return HIXL_RESOURCE_EXHAUSTED;
        }
    }
    session->num_conns++;
    conn->session = session;
    TAILQ_REMOVE(&server->pending, conn, entry);
    server->num_pending--;
    TAILQ_INSERT_TAIL(&server->conns, conn, entry);
    server->num_conns++;
    conn->state = hello->kind == HIXL_KIND_DATA ? HIXL_CONN_IDLE : HIXL_CONN_CONTROL;
    return HIXL_SUCCESS;
}

/* A hello has arrived; false when the connection is to be closed. */
static bool welcome(hixl_server *server, hixl_conn *conn) {
    const hixl_wire_hello *hello = &conn->in.hello;
    hixl_wire_welcome reply = {.magic = HIXL_WIRE_HELLO_MAGIC, .version = HIXL_WIRE_VERSION};

    if (hello->magic != HIXL_WIRE_HELLO_MAGIC) {
        return false;
    }
    if (hello->version != HIXL_WIRE_VERSION || hello->reserved != 0) {
        reply.status = HIXL_UNSUPPORTED;
    } else if (server->num_conns >= server->max_conns) {
        reply.status = HIXL_RESOURCE_EXHAUSTED;
    } else {
        pthread_mutex_lock(&server->lock);
        reply.status = join_session(server, conn);
        pthread_mutex_unlock(&server->lock);
    }
    if (reply.status == HIXL_SUCCESS) {
        if (conn->is_admin) {
            hixl_tune_tcp(conn->fd, true);
        }
        memcpy(reply.server_nonce, server->nonce, sizeof reply.server_nonce);
        memcpy(reply.boot_id, server->boot_id, sizeof reply.boot_id);
        memcpy(reply.local_name, server->local_name, sizeof reply.local_name);
        if (conn->is_local) {
            reply.nonce_address = (uintptr_t)server->nonce;
            reply.scratch_address = (uintptr_t)&scratch;
        }
    }
    /* The first bytes on a fresh connection: they fit its buffer, or something is very wrong with it. */
    return send(conn->fd, &reply, sizeof reply, MSG_NOSIGNAL) == sizeof reply && reply.status == HIXL_SUCCESS;
}

static void handle_conn(hixl_server *server, hixl_conn *conn, uint32_t events) {
    bool keep = true;
    int ready;

    switch (conn->state) {
    case HIXL_CONN_PENDING:
        ready = fill(conn, sizeof(hixl_wire_hello));
        keep = ready >= 0 && (ready == 0 || welcome(server, conn));
        if (keep && conn->state == HIXL_CONN_IDLE) {
            serve(server, conn); /* it would not have connected without something to ask for */
        }
        break;
    case HIXL_CONN_CONTROL:
        if (conn->out != NULL) {
            keep = flush(server, conn);
        } else {
            ready = fill(conn, sizeof(hixl_wire_request));
            keep = ready >= 0 && (ready == 0 || answer(server, conn));
        }
        break;
    case HIXL_CONN_IDLE:
        keep = !(events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR));
        if (keep) {
            serve(server, conn);
        }
        break;
    case HIXL_CONN_SERVED:
    case HIXL_CONN_FINISHED:
    case HIXL_CONN_CLOSED: /* an event from before this round's earlier ones changed it */
        break;
    }
    if (!keep) {
        drop_conn(server, conn);
    }
}

static void rest_listeners(hixl_server *server, bool rest) {
    int *fds[] = {&server->tcp_fd, &server->local_fd};
    size_t i;
    for (i = 0; i < 2; i++) {
        struct epoll_event event = {.events = rest ? 0 : EPOLLIN, .data.ptr = fds[i]};
        epoll_ctl(server->epoll_fd, EPOLL_CTL_MOD, *fds[i], &event);
    }
    server->accept_after_ns = rest ? hixl_now_ns() + ACCEPT_REST_NS : 0;
}

static void accept_conns(hixl_server *server, int listener) {
    int i;
    for (i = 0; i < ACCEPTS_PER_ROUND; i++) {
        int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        hixl_conn *conn;
        if (fd < 0) {
            if (errno == EINTR || errno == ECONNABORTED) {
                continue;
            }
            if (errno != EAGAIN) { /* out of descriptors or memory: a level-triggered listener would spin */
                conn = TAILQ_FIRST(&server->pending);
                if (conn != NULL) {
                    drop_conn(server, conn);
                }
                rest_listeners(server, true);
            }
            return;
        }
        conn = calloc(1, sizeof *conn);
        if (conn == NULL) {
            close(fd);
            return;
        }
        if (server->num_pending >= MAX_PENDING) {
            drop_conn(server, TAILQ_FIRST(&server->pending));
        }
        conn->server = server;
        conn->fd = fd;
        conn->is_local = listener == server->local_fd;
        conn->state = HIXL_CONN_PENDING;
        conn->deadline_ns = hixl_now_ns() + HELLO_TIMEOUT_NS;
        if (!conn->is_local) {
            hixl_tune_tcp(fd, false);
        }
        pthread_mutex_lock(&server->lock);
        TAILQ_INSERT_TAIL(&server->pending, conn, entry);
        server->num_pending++;
        pthread_mutex_unlock(&server->lock);
        set_watch(server, conn, EPOLL_CTL_ADD, EPOLLIN | EPOLLRDHUP);
    }
}

/* Close pending connections whose time is over; the time of the next thing to do, or no deadline. */
static int64_t expire(hixl_server *server) {
    int64_t now = hixl_now_ns(), next = HIXL_NO_DEADLINE;
    hixl_conn *conn;
    while ((conn = TAILQ_FIRST(&server->pending)) != NULL) {
        if (conn->deadline_ns > now) {
            next = conn->deadline_ns;
            break;
        }
        drop_conn(server, conn);
    }
    if (server->accept_after_ns != 0) {
        if (server->accept_after_ns <= now) {
            rest_listeners(server, false);
        } else {
            next = hixl_earlier(next, server->accept_after_ns);
        }
    }
    return next;
}

static void close_all(hixl_server *server) {
    hixl_conn *conn, *next;
    bool served;

    while ((conn = TAILQ_FIRST(&server->pending)) != NULL) {
        drop_conn(server, conn);
    }
    pthread_mutex_lock(&server->lock);
    TAILQ_FOREACH(conn, &server->conns, entry) {
        conn->session->dropped = true;
        if (conn->state == HIXL_CONN_SERVED) {
            atomic_store(&conn->dropped, true);
            shutdown(conn->fd, SHUT_RDWR);
        }
    }
    do {
        served = false;
        TAILQ_FOREACH(conn, &server->conns, entry) {
            served = served || conn->state == HIXL_CONN_SERVED;
        }
        if (served) {
            pthread_cond_wait(&server->unserved, &server->lock);
        }
    } while (served);
    pthread_mutex_unlock(&server->lock);
    collect_finished(server);
    pthread_mutex_lock(&server->lock);
    for (conn = TAILQ_FIRST(&server->conns); conn != NULL; conn = next) {
        close_conn(server, conn); /* may take others with it: start over */
        next = TAILQ_FIRST(&server->conns);
    }
    pthread_mutex_unlock(&server->lock);
    free_closed(server);
}

void *hixl_service_main(void *argument) {
    hixl_server *server = argument;
    struct epoll_event events[EVENTS_PER_ROUND];
    int i;

    while (!atomic_load(&server->stopping)) {
        int64_t deadline = expire(server);
        int timeout = deadline == HIXL_NO_DEADLINE ? -1 : hixl_poll_ms(deadline);
        int ready = epoll_wait(server->epoll_fd, events, EVENTS_PER_ROUND, timeout);
        for (i = 0; i < ready; i++) {
            void *tag = events[i].data.ptr;
            if (tag == &server->wake_fd) {
                uint64_t count;
                ssize_t got = read(server->wake_fd, &count, sizeof count);
                (void)got;
            } else if (tag == &server->tcp_fd || tag == &server->local_fd) {
                accept_conns(server, *(int *)tag);
            } else {
                handle_conn(server, tag, events[i].events);
            }
        }
        collect_finished(server);
        free_closed(server);
    }
    close_all(server);
    return NULL;
}
