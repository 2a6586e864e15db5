/* Fetches a server is answering; see hixl/server/fetch.h. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include "hixl/server/fetch.h"
#include "base/deadline.h"
#include "acl/memory.h"

/* The confirmation is one small frame: a part of it is followed by the rest. */
#define PARTIAL_NS HIXL_SECOND_NS

static hixl_fetch *find(hixl_server *server, const hixl_session *session, uint64_t exchange) {
    hixl_fetch *fetch;
    TAILQ_FOREACH(fetch, &server->fetches, entry) {
        if (fetch->lead->session == session && fetch->exchange == exchange) {
            return fetch;
        }
    }
    return NULL;
}

/* Let the hooks be withdrawn only when none runs. */
static bool enter_hooks(hixl_server *server) {
    bool entered;
    pthread_mutex_lock(&server->fetch_lock);
    entered = !server->fetch_withdrawn;
    server->num_hooked += entered;
    pthread_mutex_unlock(&server->fetch_lock);
    return entered;
}

static void leave_hooks(hixl_server *server) {
    pthread_mutex_lock(&server->fetch_lock);
    server->num_hooked--;
    pthread_cond_broadcast(&server->fetch_changed);
    pthread_mutex_unlock(&server->fetch_lock);
}

/* Ask the owner; what it holds afterwards is given back by drop. */
static void ask(hixl_fetch *fetch, const void *body, size_t bytes) {
    hixl_server *server = fetch->lead->server;
    if (server->fetch_hooks.begin == NULL || !enter_hooks(server)) {
        fetch->refusal = LDD_FETCH_NOT_HERE;
        return;
    }
    fetch->refusal = server->fetch_hooks.begin(server->fetch_context, fetch->lead->session->token, body, bytes,
                                               fetch->total, &fetch->source, fetch->text, sizeof fetch->text);
    if (fetch->refusal != 0) {
        leave_hooks(server);
    }
}

static void drop(hixl_server *server, hixl_fetch *fetch) {
    if (fetch->refusal == 0) {
        server->fetch_hooks.end(server->fetch_context, fetch->source.ticket, fetch->confirmed);
        leave_hooks(server);
    }
}

hixl_fetch *hixl_fetch_lead(hixl_conn *conn, const hixl_wire_request *request, const hixl_wire_fetch *head,
                            const void *body) {
    hixl_server *server = conn->server;
    hixl_fetch *fetch = calloc(1, sizeof *fetch);
    if (fetch == NULL) {
        return NULL;
    }
    fetch->lead = conn;
    fetch->sequence = request->sequence;
    fetch->exchange = head->exchange;
    fetch->total = head->total;
    fetch->num_parts = head->num_parts;
    fetch->num_joined = 1;
    atomic_store(&fetch->num_moving, 1);
    ask(fetch, body, request->count);
    pthread_mutex_lock(&server->fetch_lock);
    if (find(server, conn->session, head->exchange) == NULL && (fetch->refusal != 0 || !server->fetch_withdrawn)) {
        TAILQ_INSERT_TAIL(&server->fetches, fetch, entry);
        pthread_cond_broadcast(&server->fetch_changed);
        pthread_mutex_unlock(&server->fetch_lock);
        return fetch;
    }
    pthread_mutex_unlock(&server->fetch_lock);
    atomic_store(&fetch->num_moving, 0);
    drop(server, fetch);
    free(fetch);
    return NULL;
}

hixl_fetch_arrival hixl_fetch_join(hixl_conn *conn, const hixl_wire_fetch *head, int64_t limit_ns, hixl_fetch **out) {
    hixl_server *server = conn->server;
    struct timespec until = hixl_timespec(hixl_now_ns() + limit_ns);
    hixl_fetch_arrival arrival = HIXL_FETCH_EARLY;
    hixl_fetch *fetch;
    pthread_mutex_lock(&server->fetch_lock);
    fetch = find(server, conn->session, head->exchange);
    if (fetch == NULL && !atomic_load(&conn->dropped) && !atomic_load(&server->stopping)) {
        pthread_cond_timedwait(&server->fetch_changed, &server->fetch_lock, &until);
        fetch = find(server, conn->session, head->exchange);
    }
    if (fetch != NULL) {
        arrival = HIXL_FETCH_REFUSED;
        if (!atomic_load(&fetch->over) && fetch->num_joined < fetch->num_parts && head->total == fetch->total &&
            head->num_parts == fetch->num_parts) {
            fetch->num_joined++;
            atomic_fetch_add(&fetch->num_moving, 1);
            *out = fetch;
            arrival = HIXL_FETCH_JOINED;
        }
    }
    pthread_mutex_unlock(&server->fetch_lock);
    return arrival;
}

void hixl_fetch_wake(hixl_server *server) {
    pthread_mutex_lock(&server->fetch_lock);
    pthread_cond_broadcast(&server->fetch_changed);
    pthread_mutex_unlock(&server->fetch_lock);
}

void hixl_fetch_leave(hixl_server *server, hixl_fetch *fetch) {
    atomic_fetch_sub(&fetch->num_moving, 1); /* the fetch may be gone now */
    hixl_fetch_wake(server);
}

void hixl_fetch_take_confirmation(hixl_fetch *fetch) {
    hixl_wire_request frame;
    ssize_t got = recv(fetch->lead->fd, &frame, sizeof frame, MSG_PEEK | MSG_DONTWAIT);
    if (got > 0 && got < (ssize_t)sizeof frame) {
        int64_t now = hixl_now_ns();
        fetch->partial_ns = fetch->partial_ns == 0 ? now : fetch->partial_ns;
        fetch->broken = now - fetch->partial_ns > PARTIAL_NS;
    } else if (got == sizeof frame) {
        fetch->broken = frame.magic != HIXL_WIRE_REQUEST_MAGIC || frame.op != HIXL_OP_CONFIRM ||
                        frame.sequence != fetch->sequence || frame.argument != fetch->exchange || frame.reserved != 0 ||
                        frame.count != 0 || frame.bytes != 0;
        fetch->confirmed = !fetch->broken && recv(fetch->lead->fd, &frame, sizeof frame, MSG_DONTWAIT) == sizeof frame;
    }
}

/* Whether all parts have come, and none is sent any more: earlier the client cannot have all bytes. Locked. */
static bool is_sent(const hixl_fetch *fetch) {
    return fetch->num_joined == fetch->num_parts && atomic_load(&fetch->num_moving) == 0;
}

hixl_fetch_progress hixl_fetch_look(hixl_server *server, hixl_fetch *fetch) {
    hixl_fetch_progress progress;
    if (fetch->broken) {
        return HIXL_FETCH_BROKEN;
    }
    if (!fetch->confirmed && fetch->refusal == 0) {
        return HIXL_FETCH_AWAITS_CLIENT;
    }
    pthread_mutex_lock(&server->fetch_lock);
    progress = is_sent(fetch) ? HIXL_FETCH_DONE : HIXL_FETCH_AWAITS_PARTS;
    pthread_mutex_unlock(&server->fetch_lock);
    return progress;
}

bool hixl_fetch_wait(hixl_server *server, hixl_fetch *fetch, int64_t limit_ns) {
    bool sent;
    struct timespec until = hixl_timespec(hixl_now_ns() + limit_ns);
    pthread_mutex_lock(&server->fetch_lock);
    if (!is_sent(fetch)) {
        pthread_cond_timedwait(&server->fetch_changed, &server->fetch_lock, &until);
    }
    sent = is_sent(fetch);
    pthread_mutex_unlock(&server->fetch_lock);
    return sent;
}

void hixl_fetch_end(hixl_server *server, hixl_fetch *fetch) {
    bool sent;
    pthread_mutex_lock(&server->fetch_lock);
    atomic_store(&fetch->over, true);
    while (atomic_load(&fetch->num_moving) > 0) {
        pthread_cond_wait(&server->fetch_changed, &server->fetch_lock);
    }
    sent = is_sent(fetch);
    pthread_mutex_unlock(&server->fetch_lock);
    if (sent && fetch->refusal == 0 && !fetch->confirmed && !fetch->broken) {
        hixl_fetch_take_confirmation(fetch); /* of a client that said so and went */
    }
    drop(server, fetch);
    pthread_mutex_lock(&server->fetch_lock);
    TAILQ_REMOVE(&server->fetches, fetch, entry);
    pthread_mutex_unlock(&server->fetch_lock);
    free(fetch);
}

static void withdraw_hooks(hixl_server *server) {
    hixl_fetch *fetch;
    pthread_mutex_lock(&server->fetch_lock);
    server->fetch_withdrawn = true;
    TAILQ_FOREACH(fetch, &server->fetches, entry) {
        atomic_store(&fetch->over, true);
    }
    pthread_cond_broadcast(&server->fetch_changed);
    while (server->num_hooked > 0) {
        pthread_cond_wait(&server->fetch_changed, &server->fetch_lock);
    }
    pthread_mutex_unlock(&server->fetch_lock);
}

LDD_EXPORT HixlStatus LddServerSetFetch(HixlServerHandle handle, const LddFetchHooks *hooks, void *context) {
    hixl_error *error = hixl_thread_error();
    hixl_server *server = hixl_checked_server(handle, error);
    if (server == NULL) {
        return error->status;
    }
    if (hooks == NULL) {
        withdraw_hooks(server);
        return HIXL_SUCCESS;
    }
    if (hooks->begin == NULL || hooks->end == NULL) {
        return hixl_fail(error, HIXL_PARAM_INVALID, "hooks lack begin or end");
    }
    if (server->listening) {
        return hixl_fail(error, HIXL_FAILED, "the server listens already");
    }
    server->fetch_hooks = *hooks;
    server->fetch_context = context;
    return HIXL_SUCCESS;
}
