/* Fetches a server is answering; see hixl_fetch.h. */
#define _GNU_SOURCE
#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include "hixl_fetch.h"
#include "hixl_time.h"
#include "host_memory.h"

/* What lies between the last byte sent and a thread saying so: a few instructions, unless it is preempted there. */
#define SETTLE_NS (200 * INT64_C(1000))

static hixl_fetch *find(hixl_server *server, const hixl_session *session, uint64_t exchange) {
    hixl_fetch *fetch;
    TAILQ_FOREACH(fetch, &server->fetches, entry) {
        if (fetch->lead->session == session && fetch->exchange == exchange) {
            return fetch;
        }
    }
    return NULL;
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
    fetch->refusal = server->fetch_hooks.begin(server->fetch_context, conn->session->token, body, request->count,
                                               head->total, fetch, &fetch->source, fetch->text, sizeof fetch->text);
    pthread_mutex_lock(&server->fetch_lock);
    if (find(server, conn->session, head->exchange) == NULL) {
        TAILQ_INSERT_TAIL(&server->fetches, fetch, entry);
        pthread_cond_broadcast(&server->fetch_changed);
        pthread_mutex_unlock(&server->fetch_lock);
        return fetch;
    }
    pthread_mutex_unlock(&server->fetch_lock);
    if (fetch->refusal == 0) {
        server->fetch_hooks.end(server->fetch_context, fetch->source.ticket);
    }
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
    if (fetch == NULL) {
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

void hixl_fetch_leave(hixl_server *server, hixl_fetch *fetch) {
    atomic_fetch_sub(&fetch->num_moving, 1); /* at once: LddFetchConfirmed may spin on it. The fetch may be gone now. */
    pthread_mutex_lock(&server->fetch_lock);
    pthread_cond_broadcast(&server->fetch_changed);
    pthread_mutex_unlock(&server->fetch_lock);
}

/* Take the confirmation out of the lead's socket, if it is there as a whole. Locked. */
static bool take_confirmation(hixl_fetch *fetch) {
    hixl_wire_request frame;
    ssize_t got = recv(fetch->lead->fd, &frame, sizeof frame, MSG_PEEK | MSG_DONTWAIT);
    if (got != sizeof frame) {
        return false;
    }
    if (frame.magic != HIXL_WIRE_REQUEST_MAGIC || frame.op != HIXL_OP_CONFIRM || frame.sequence != fetch->sequence ||
        frame.argument != fetch->exchange || frame.reserved != 0 || frame.count != 0 || frame.bytes != 0) {
        fetch->broken = true;
        return false;
    }
    return recv(fetch->lead->fd, &frame, sizeof frame, MSG_DONTWAIT) == sizeof frame;
}

LDD_EXPORT int32_t LddFetchConfirmed(void *handle) {
    hixl_fetch *fetch = handle;
    hixl_server *server = fetch->lead->server;
    int64_t until = hixl_now_ns() + SETTLE_NS;
    bool confirmed;
    pthread_mutex_lock(&server->fetch_lock);
    if (!fetch->confirmed && !fetch->broken && fetch->num_joined == fetch->num_parts) {
        fetch->confirmed = take_confirmation(fetch);
    }
    confirmed = fetch->confirmed;
    pthread_mutex_unlock(&server->fetch_lock);
    while (confirmed && atomic_load(&fetch->num_moving) > 0) {
        if (hixl_now_ns() >= until) {
            return 0;
        }
        sched_yield();
    }
    return confirmed;
}

bool hixl_fetch_is_done(hixl_server *server, hixl_fetch *fetch, bool *broken) {
    bool done;
    pthread_mutex_lock(&server->fetch_lock);
    done = (fetch->confirmed || fetch->refusal != 0) && fetch->num_joined == fetch->num_parts &&
           atomic_load(&fetch->num_moving) == 0;
    *broken = fetch->broken;
    pthread_mutex_unlock(&server->fetch_lock);
    return done;
}

void hixl_fetch_wait(hixl_server *server, int64_t limit_ns) {
    struct timespec until = hixl_timespec(hixl_now_ns() + limit_ns);
    pthread_mutex_lock(&server->fetch_lock);
    pthread_cond_timedwait(&server->fetch_changed, &server->fetch_lock, &until);
    pthread_mutex_unlock(&server->fetch_lock);
}

void hixl_fetch_end(hixl_server *server, hixl_fetch *fetch) {
    pthread_mutex_lock(&server->fetch_lock);
    atomic_store(&fetch->over, true);
    while (atomic_load(&fetch->num_moving) > 0) {
        pthread_cond_wait(&server->fetch_changed, &server->fetch_lock);
    }
    pthread_mutex_unlock(&server->fetch_lock);
    if (fetch->refusal == 0) {
        server->fetch_hooks.end(server->fetch_context, fetch->source.ticket);
    }
    pthread_mutex_lock(&server->fetch_lock);
    TAILQ_REMOVE(&server->fetches, fetch, entry);
    pthread_mutex_unlock(&server->fetch_lock);
    free(fetch);
}

LDD_EXPORT HixlStatus LddServerSetFetch(HixlServerHandle handle, const LddFetchHooks *hooks, void *context) {
    hixl_error *error = hixl_thread_error();
    hixl_server *server = hixl_checked_server(handle, error);
    if (server == NULL) {
        return error->status;
    }
    if (hooks == NULL || hooks->begin == NULL || hooks->look == NULL || hooks->end == NULL) {
        return hixl_fail(error, HIXL_PARAM_INVALID, "hooks are NULL or lack begin, look or end");
    }
    if (server->listening) {
        return hixl_fail(error, HIXL_FAILED, "the server listens already");
    }
    server->fetch_hooks = *hooks;
    server->fetch_context = context;
    return HIXL_SUCCESS;
}
