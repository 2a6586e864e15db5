/*
 * The thread of one data connection: checks each request, then moves bytes straight between socket and memory.
 *
 * Before every slice of bytes it asks whether it still may: the server stopping, its client dropped, or a
 * region being unregistered under a stalled peer make it break off, whatever the peer does.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#include "hixl/server/data.h"
#include "hixl/server/fetch.h"
#include "base/deadline.h"
#include "base/probe.h"

enum {
    SLICE_IOVECS = 64,
    SLICE_BYTES = 1 << 20,
    LOOK_UP_MS = 100, /* between two looks at the flags while a peer is silent */
};
static_assert((int)SLICE_IOVECS <= (int)BASE_PROBE_MAX, "a slice fits a question");
#define IDLE_NS HIXL_SECOND_NS       /* without a request: hand the connection back to the service thread */
#define STALL_NS (60 * HIXL_SECOND_NS) /* a peer that neither takes nor gives bytes this long has lost interest */

typedef struct {
    hixl_conn *conn;
    hixl_wire_desc *descs;
    hixl_target *targets;
    size_t capacity;     /* of both */
    size_t num_targets;  /* held now */
    hixl_fetch *fetch;   /* a part of which is served now, otherwise NULL */
} data_session;

typedef enum { MOVE_READY, MOVE_IDLE, MOVE_BROKEN } move_state;

static bool must_leave(data_session *session, bool stalled) {
    hixl_conn *conn = session->conn;
    if (atomic_load(&conn->dropped) || atomic_load(&conn->server->stopping)) {
        return true;
    }
    if (session->fetch != NULL) { /* its memory is the owner's to hold, not its region's */
        return atomic_load(&session->fetch->over);
    }
    return hixl_regions_must_leave(&conn->server->regions, session->targets, session->num_targets, stalled);
}

/* Wait for `events` on the connection; BROKEN also when the peer has closed it, even with bytes left to read. */
static move_state wait_conn(data_session *session, short events, int64_t limit_ns) {
    int64_t deadline = hixl_now_ns() + limit_ns;
    struct pollfd entry = {.fd = session->conn->fd, .events = (short)(events | POLLRDHUP)};
    bool stalled = false;
    for (;;) {
        int ready;
        if (must_leave(session, stalled)) {
            return MOVE_BROKEN;
        }
        ready = poll(&entry, 1, LOOK_UP_MS);
        if (ready > 0) {
            return entry.revents & (POLLRDHUP | POLLHUP | POLLERR | POLLNVAL) ? MOVE_BROKEN : MOVE_READY;
        }
        if (ready < 0 && errno != EINTR) {
            return MOVE_BROKEN;
        }
        stalled = ready == 0;
        if (hixl_now_ns() >= deadline) {
            return MOVE_IDLE;
        }
    }
}

/* Frames, not server memory. `limit_ns`: how long the first byte may take. */
static move_state receive_frame(data_session *session, void *data, size_t bytes, int64_t limit_ns) {
    uint8_t *next = data;
    while (bytes > 0) {
        ssize_t got = recv(session->conn->fd, next, bytes, 0);
        if (got > 0) {
            next += got;
            bytes -= (size_t)got;
            limit_ns = STALL_NS;
        } else if (got < 0 && errno == EAGAIN) {
            move_state state = wait_conn(session, POLLIN, limit_ns);
            if (state != MOVE_READY) {
                return state == MOVE_IDLE && limit_ns == STALL_NS ? MOVE_BROKEN : state;
            }
        } else if (got == 0 || errno != EINTR) {
            return MOVE_BROKEN;
        }
    }
    return MOVE_READY;
}

/* Position in the targets of a request. */
typedef struct {
    size_t index;
    uint64_t offset;
} data_cursor;

static void advance(const data_session *session, data_cursor *cursor, uint64_t bytes) {
    while (bytes > 0) {
        uint64_t left = session->targets[cursor->index].bytes - cursor->offset;
        if (bytes < left) {
            cursor->offset += bytes;
            return;
        }
        bytes -= left;
        cursor->index++;
        cursor->offset = 0;
    }
}

static size_t slice(const data_session *session, const data_cursor *cursor, struct iovec *out) {
    uint64_t offset = cursor->offset, room = SLICE_BYTES;
    size_t i, n = 0;
    for (i = cursor->index; i < session->num_targets && n < SLICE_IOVECS && room > 0; i++, n++) {
        uint64_t bytes = session->targets[i].bytes - offset;
        out[n].iov_base = session->targets[i].address + offset;
        out[n].iov_len = bytes < room ? bytes : room;
        room -= out[n].iov_len;
        offset = 0;
    }
    return n;
}

static bool send_frame(data_session *session, const void *data, size_t bytes) {
    const uint8_t *next = data;
    while (bytes > 0) {
        ssize_t sent = send(session->conn->fd, next, bytes, MSG_NOSIGNAL);
        if (sent >= 0) {
            next += sent;
            bytes -= (size_t)sent;
        } else if (errno == EAGAIN) {
            if (wait_conn(session, POLLOUT, STALL_NS) != MOVE_READY) {
                return false;
            }
        } else if (errno != EINTR) {
            return false;
        }
    }
    return true;
}

static bool send_refusal(data_session *session, hixl_wire_reply *reply, HixlStatus status, const char *text) {
    uint8_t frame[sizeof *reply + HIXL_MAX_TEXT_BYTES];
    size_t text_bytes = strnlen(text, HIXL_MAX_TEXT_BYTES);
    reply->status = status;
    reply->text_bytes = (uint16_t)text_bytes;
    reply->bytes = 0;
    memcpy(frame, reply, sizeof *reply);
    memcpy(frame + sizeof *reply, text, text_bytes);
    return send_frame(session, frame, sizeof *reply + text_bytes);
}

static bool send_failure(data_session *session, hixl_wire_reply *reply, const hixl_error *error) {
    return send_refusal(session, reply, error->status, error->text);
}

static bool may_be_unmapped(const data_session *session, const hixl_target *target) {
    return session->fetch != NULL ? !session->fetch->source.never_unmapped : target->region->backing == NULL;
}

/*
 * Once a reply promises bytes it cannot be taken back, so ask first whether private memory is there: its owner
 * may have unmapped it. The ends of each range are enough to tell; a hole between them ends the connection.
 */
static bool is_readable(const data_session *session, hixl_error *error) {
    struct iovec asked[SLICE_IOVECS];
    base_probe probe = {0};
    bool readable = true;
    size_t i, n = 0;
    for (i = 0; i <= session->num_targets && readable; i++) {
        bool last = i == session->num_targets;
        if ((last && n > 0) || n + 2 > SLICE_IOVECS) {
            int good = base_probe_readable(&probe, asked, n);
            if (good >= 0 && good < (int)n) {
                hixl_fail(error, HIXL_FAILED, "registered memory near %p is not mapped", asked[good].iov_base);
                readable = false;
            }
            n = 0;
        }
        if (!last && may_be_unmapped(session, &session->targets[i])) {
            const hixl_target *target = &session->targets[i];
            asked[n++] = (struct iovec){.iov_base = target->address, .iov_len = 1};
            asked[n++] = (struct iovec){.iov_base = target->address + target->bytes - 1, .iov_len = 1};
        }
    }
    base_probe_close(&probe);
    return readable;
}

static bool serve_get(data_session *session, hixl_wire_reply *reply) {
    struct iovec iov[1 + SLICE_IOVECS];
    struct msghdr message = {.msg_iov = iov};
    data_cursor cursor = {0, 0};
    uint64_t left = reply->bytes;
    size_t header_left = sizeof *reply;
    hixl_error error;

    if (!is_readable(session, &error)) {
        return send_failure(session, reply, &error);
    }
    while (header_left > 0 || left > 0) {
        size_t first = header_left > 0 ? 1 : 0;
        ssize_t sent;
        iov[0].iov_base = (uint8_t *)(reply + 1) - header_left;
        iov[0].iov_len = header_left;
        message.msg_iovlen = first + slice(session, &cursor, iov + first);
        if (must_leave(session, false)) {
            return false;
        }
        sent = sendmsg(session->conn->fd, &message, MSG_NOSIGNAL);
        if (sent >= 0) {
            size_t header = (size_t)sent < header_left ? (size_t)sent : header_left;
            header_left -= header;
            left -= (uint64_t)sent - header;
            advance(session, &cursor, (uint64_t)sent - header);
        } else if (errno == EAGAIN) {
            if (wait_conn(session, POLLOUT, STALL_NS) != MOVE_READY) {
                return false;
            }
        } else if (errno != EINTR) { /* the peer has gone, or memory has since the look above */
            return false;
        }
    }
    return true;
}

/* Receive and forget: the peer sent its bytes before it could know that they are refused. */
static bool drain(data_session *session, uint64_t bytes) {
    while (bytes > 0) {
        size_t want = bytes < SLICE_BYTES ? (size_t)bytes : SLICE_BYTES;
        ssize_t got = recv(session->conn->fd, NULL, want, MSG_TRUNC);
        if (got > 0) {
            bytes -= (uint64_t)got;
        } else if (got < 0 && errno == EAGAIN) {
            if (wait_conn(session, POLLIN, STALL_NS) != MOVE_READY) {
                return false;
            }
        } else if (got == 0 || errno != EINTR) {
            return false;
        }
    }
    return true;
}

static bool serve_put(data_session *session, hixl_wire_reply *reply) {
    struct iovec iov[SLICE_IOVECS];
    struct msghdr message = {.msg_iov = iov};
    data_cursor cursor = {0, 0};
    uint64_t left = reply->bytes;

    while (left > 0) {
        ssize_t got;
        /* Asked before each slice: once the peer has given up (a reset), bytes still queued here must not land. */
        if (wait_conn(session, POLLIN, STALL_NS) != MOVE_READY) {
            return false;
        }
        message.msg_iovlen = slice(session, &cursor, iov);
        got = recvmsg(session->conn->fd, &message, 0);
        if (got > 0) {
            left -= (uint64_t)got;
            advance(session, &cursor, (uint64_t)got);
        } else if (got < 0 && errno == EFAULT) {
            hixl_error error;
            hixl_fail(&error, HIXL_FAILED, "registered memory near %p is not writable", iov[0].iov_base);
            return send_failure(session, reply, &error) && drain(session, left);
        } else if (got == 0 || (errno != EAGAIN && errno != EINTR)) {
            return false;
        }
    }
    reply->bytes = 0;
    return send_frame(session, reply, sizeof *reply);
}

static bool reserve(data_session *session, size_t count) {
    if (count > session->capacity) {
        size_t capacity = count < 64 ? 64 : count;
        free(session->descs);
        free(session->targets);
        session->descs = malloc(capacity * sizeof *session->descs);
        session->targets = malloc(capacity * sizeof *session->targets);
        session->capacity = session->descs != NULL && session->targets != NULL ? capacity : 0;
    }
    return count <= session->capacity;
}

/* Have the bytes [offset, offset + bytes) of the fetch as targets. */
static bool aim(data_session *session, const LddFetchSource *source, uint64_t offset, uint64_t bytes) {
    size_t i = 0, n = 0;
    if (!reserve(session, source->num_segments)) {
        return false;
    }
    while (offset >= source->segments[i].bytes) {
        offset -= source->segments[i++].bytes;
    }
    for (; bytes > 0; i++, n++) {
        uint64_t part = source->segments[i].bytes - offset;
        part = part < bytes ? part : bytes;
        session->targets[n].region = NULL;
        session->targets[n].address = (uint8_t *)(uintptr_t)(source->segments[i].addr + offset);
        session->targets[n].bytes = part;
        bytes -= part;
        offset = 0;
    }
    session->num_targets = n;
    return true;
}

/*
 * After part 0: stay until the other parts are over and the client has confirmed, then let the owner know. There is no
 * limit but the end of the connection, or of its session: until then the client may yet confirm what it has.
 */
static bool conclude(data_session *session, bool ok) {
    hixl_server *server = session->conn->server;
    hixl_fetch *fetch = session->fetch;
    bool broken = !ok;
    hixl_fetch_progress progress;
    while (!broken && (progress = hixl_fetch_look(server, fetch)) != HIXL_FETCH_DONE) {
        struct pollfd entry = {.fd = session->conn->fd, .events = POLLRDHUP};
        if (progress == HIXL_FETCH_BROKEN) {
            broken = true;
        } else if (progress == HIXL_FETCH_AWAITS_PARTS) {
            hixl_fetch_wait(server, fetch, LOOK_UP_MS * HIXL_MS_NS);
            broken = must_leave(session, false) || poll(&entry, 1, 0) > 0;
        } else {
            move_state state = wait_conn(session, POLLIN, LOOK_UP_MS * HIXL_MS_NS);
            broken = state == MOVE_BROKEN;
            /* While a part is not sent the client cannot have it all: whatever it says has to wait. */
            if (state == MOVE_READY && hixl_fetch_wait(server, fetch, LOOK_UP_MS * HIXL_MS_NS)) {
                hixl_fetch_take_confirmation(fetch);
                if (!fetch->confirmed && !fetch->broken) {
                    poll(NULL, 0, 1); /* a part of the frame: the rest is on its way */
                }
            }
        }
    }
    hixl_fetch_end(server, fetch);
    return !broken;
}

/* Wait for part 0, which travels on a connection of its own. */
static bool join(data_session *session, const hixl_wire_fetch *head) {
    for (;;) {
        struct pollfd entry = {.fd = session->conn->fd, .events = POLLRDHUP};
        hixl_fetch_arrival arrival = hixl_fetch_join(session->conn, head, LOOK_UP_MS * HIXL_MS_NS, &session->fetch);
        if (arrival != HIXL_FETCH_EARLY) {
            return arrival == HIXL_FETCH_JOINED;
        }
        if (must_leave(session, false) || poll(&entry, 1, 0) > 0) {
            return false;
        }
    }
}

static bool serve_part(data_session *session, const hixl_wire_fetch *head, hixl_wire_reply *reply) {
    hixl_fetch *fetch = session->fetch;
    bool ok;
    if (fetch->refusal != 0) {
        reply->argument = (uint64_t)(int64_t)fetch->refusal;
        return send_refusal(session, reply, HIXL_FAILED, fetch->text);
    }
    if (!aim(session, &fetch->source, head->offset, reply->bytes)) {
        hixl_error error;
        hixl_fail(&error, HIXL_RESOURCE_EXHAUSTED, "no memory for %zu segments", fetch->source.num_segments);
        return send_failure(session, reply, &error);
    }
    ok = serve_get(session, reply);
    session->num_targets = 0;
    return ok;
}

static bool serve_fetch(data_session *session, const hixl_wire_request *request, hixl_wire_reply *reply) {
    hixl_conn *conn = session->conn;
    hixl_wire_fetch head;
    void *body = NULL;
    bool ok;

    if (request->count > LDD_FETCH_MAX_REQUEST_BYTES ||
        receive_frame(session, &head, sizeof head, STALL_NS) != MOVE_READY || head.part >= head.num_parts ||
        (request->count > 0) != (head.part == 0) || head.offset > head.total ||
        request->bytes > head.total - head.offset) {
        return false;
    }
    if (head.part == 0) {
        body = malloc(request->count);
        if (body == NULL || receive_frame(session, body, request->count, STALL_NS) != MOVE_READY) {
            free(body);
            return false;
        }
        session->fetch = hixl_fetch_lead(conn, request, &head, body);
        free(body);
        if (session->fetch == NULL) {
            return false;
        }
    } else if (!join(session, &head)) {
        return false;
    }
    ok = serve_part(session, &head, reply);
    hixl_fetch_leave(conn->server, session->fetch);
    if (head.part == 0) {
        ok = conclude(session, ok);
    }
    session->fetch = NULL;
    return ok;
}

/* One request; IDLE: none came, BROKEN: the connection is of no more use. */
static move_state serve_request(data_session *session) {
    hixl_region_table *regions = &session->conn->server->regions;
    hixl_wire_request request;
    hixl_wire_reply reply = {.magic = HIXL_WIRE_REPLY_MAGIC};
    move_state state = receive_frame(session, &request, sizeof request, IDLE_NS);
    hixl_error error;
    bool ok;

    if (state != MOVE_READY) {
        return state;
    }
    reply.op = request.op;
    reply.sequence = request.sequence;
    reply.bytes = request.bytes;
    if (request.magic != HIXL_WIRE_REQUEST_MAGIC || request.reserved != 0 || request.argument != 0) {
        return MOVE_BROKEN;
    }
    if (request.op == HIXL_OP_FETCH) {
        return request.bytes > 0 && serve_fetch(session, &request, &reply) ? MOVE_READY : MOVE_BROKEN;
    }
    if ((request.op != HIXL_OP_GET && request.op != HIXL_OP_PUT) || request.count == 0 ||
        request.count > HIXL_WIRE_MAX_DESCS || request.bytes < request.count || !reserve(session, request.count)) {
        return MOVE_BROKEN;
    }
    if (receive_frame(session, session->descs, request.count * sizeof *session->descs, STALL_NS) != MOVE_READY) {
        return MOVE_BROKEN;
    }
    if (request.op == HIXL_OP_PUT && !(session->conn->session->rights & LDD_RIGHT_WRITE)) {
        hixl_fail(&error, HIXL_PARAM_INVALID, "this client may not write here");
        return send_failure(session, &reply, &error) && drain(session, request.bytes) ? MOVE_READY : MOVE_BROKEN;
    }
    if (hixl_regions_acquire(regions, session->descs, request.count, request.bytes, session->targets, &error) !=
        HIXL_SUCCESS) {
        ok = send_failure(session, &reply, &error) && (request.op == HIXL_OP_GET || drain(session, request.bytes));
        return ok ? MOVE_READY : MOVE_BROKEN;
    }
    session->num_targets = request.count;
    ok = request.op == HIXL_OP_GET ? serve_get(session, &reply) : serve_put(session, &reply);
    hixl_regions_release(regions, session->targets, session->num_targets);
    session->num_targets = 0;
    return ok ? MOVE_READY : MOVE_BROKEN;
}

void *hixl_serve_data_main(void *argument) {
    hixl_conn *conn = argument;
    hixl_server *server = conn->server;
    data_session session = {.conn = conn};
    move_state state;

    do {
        state = serve_request(&session);
    } while (state == MOVE_READY);
    free(session.descs);
    free(session.targets);
    pthread_mutex_lock(&server->lock);
    conn->broken = state == MOVE_BROKEN;
    conn->state = HIXL_CONN_FINISHED;
    TAILQ_INSERT_TAIL(&server->finished, conn, finished);
    pthread_cond_broadcast(&server->unserved);
    hixl_wake_service(server);
    pthread_mutex_unlock(&server->lock);
    return NULL;
}
