/*
 * The tcp path of the client: data connections that carry one batch at a time, split evenly by bytes.
 *
 * A get or a fetch receives straight into the destination, a put sends straight from the source; nothing is staged. All
 * sockets are non-blocking: hixl_tcp_progress moves what the kernel has or takes, the waiting thread polls. Where much
 * flows on several streams, one thread cannot keep up with those that send: then it moves them in rounds together with
 * helpers of the copy pool, a stream each. Local memory is written only in these two, so whoever holds the client's
 * lock, has stopped the round and has closed the streams knows that no further byte lands.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include "hixl/client/connect.h"
#include "hixl/client/tcp.h"

enum { SLICE_IOVECS = 64 };
/* Up to here one connection carries a batch alone: a second request and wake-up cost more than they save. */
#define SINGLE_STREAM_BYTES ((uint64_t)256 << 10)
/* How long a call may take beyond its time; a server that answers at all takes a fraction of it. */
#define SEE_OFF_NS (100 * HIXL_MS_NS)
/* From here on a batch is worth a round; and how long one lasts, or waits for bytes that do not come. */
#define ROUND_BYTES ((uint64_t)4 << 20)
#define ROUND_NS (100 * HIXL_MS_NS)
enum { ROUND_IDLE_MS = 1 };
/* Moved in one go before the deadline is looked at again. */
#define BURST_BYTES ((uint64_t)4 << 20)

typedef enum { STREAM_DONE, STREAM_PENDING, STREAM_FAILED } stream_state;

static stream_state fail_stream(const hixl_client *client, const char *what, int code, hixl_error *error) {
    if (code == EFAULT) {
        hixl_fail(error, HIXL_PARAM_INVALID, "local memory of a batch is not mapped or not writable");
    } else if (code == 0) {
        hixl_fail(error, HIXL_NOT_CONNECTED, "server %s closed a data connection", client->address.text);
    } else {
        hixl_fail(error, HIXL_NOT_CONNECTED, "%s server %s: %s", what, client->address.text, strerror(code));
    }
    return STREAM_FAILED;
}

static bool open_stream(hixl_client *client, hixl_stream *stream, hixl_error *error) {
    stream->fd = hixl_start_connect(&client->address);
    if (stream->fd < 0) {
        hixl_fail(error, errno == EMFILE || errno == ENFILE ? HIXL_RESOURCE_EXHAUSTED : HIXL_NOT_CONNECTED,
                  "data connection to %s: %s", client->address.text, strerror(errno));
        return false;
    }
    hixl_tune_tcp(stream->fd, false);
    hixl_data_hello(client, &stream->hello);
    stream->hello_sent = 0;
    stream->welcome_received = 0;
    return true;
}

static bool is_fetch(const hixl_batch *batch) {
    return batch->fetch_request != NULL;
}

/* Begin the frame that starts at the current descriptor, if any is left. A fetch sends none: all of it is one frame. */
static void begin_frame(hixl_client *client, const hixl_batch *batch, hixl_stream *stream) {
    bool all = is_fetch(batch) || stream->count - stream->frame_end < HIXL_WIRE_MAX_DESCS;
    size_t i;
    stream->frame_first = stream->frame_end;
    stream->frame_end = all ? stream->count : stream->frame_first + HIXL_WIRE_MAX_DESCS;
    stream->request = (hixl_wire_request){.magic = HIXL_WIRE_REQUEST_MAGIC,
                                          .op = batch->is_put ? HIXL_OP_PUT : HIXL_OP_GET,
                                          .sequence = hixl_next_sequence(client),
                                          .count = (uint32_t)(stream->frame_end - stream->frame_first)};
    if (is_fetch(batch)) {
        stream->request.op = HIXL_OP_FETCH;
        stream->request.count = stream->fetch.part == 0 ? batch->fetch_bytes : 0;
    }
    for (i = stream->frame_first; i < stream->frame_end; i++) {
        stream->request.bytes += stream->descs[i].bytes;
    }
    stream->head_sent = 0;
    stream->send_index = stream->receive_index = stream->frame_first;
    stream->send_skip = stream->receive_skip = 0;
    stream->sent = false;
    stream->reply_received = stream->text_received = 0;
}

static bool add_share(hixl_stream *stream, const hixl_tcp_op *op, uint64_t offset, uint64_t bytes) {
    if (stream->count == stream->capacity) {
        size_t capacity = stream->capacity == 0 ? 64 : 2 * stream->capacity;
        hixl_wire_desc *descs = realloc(stream->descs, capacity * sizeof *descs);
        struct iovec *iov;
        if (descs == NULL) {
            return false;
        }
        stream->descs = descs;
        iov = realloc(stream->iov, capacity * sizeof *iov);
        if (iov == NULL) {
            return false;
        }
        stream->iov = iov;
        stream->capacity = capacity;
    }
    stream->descs[stream->count] = op->desc;
    stream->descs[stream->count].offset += offset;
    stream->descs[stream->count].bytes = bytes;
    stream->iov[stream->count] =
        (struct iovec){.iov_base = (void *)(uintptr_t)(op->local + offset), .iov_len = (size_t)bytes};
    stream->count++;
    return true;
}

/* Give every stream its share of the batch, an equal number of bytes each. */
static bool share_out(hixl_client *client, const hixl_batch *batch, unsigned num_streams, uint64_t bytes) {
    uint64_t share = (bytes + num_streams - 1) / num_streams, filled = 0;
    unsigned s = 0;
    size_t i;
    for (i = 0; i < num_streams; i++) {
        client->streams[i].count = 0;
    }
    for (i = 0; i < batch->num_tcp_ops; i++) {
        const hixl_tcp_op *op = &batch->tcp_ops[i];
        uint64_t offset = 0;
        while (offset < op->desc.bytes) {
            uint64_t part = op->desc.bytes - offset;
            if (filled == share) {
                s++;
                filled = 0;
            }
            part = part < share - filled ? part : share - filled;
            if (!add_share(&client->streams[s], op, offset, part)) {
                return false;
            }
            offset += part;
            filled += part;
        }
    }
    return true;
}

static bool begin_batch(hixl_client *client, const hixl_batch *batch, hixl_error *error) {
    unsigned i, wanted, num_streams = 0;
    uint64_t bytes = 0, offset = 0;
    size_t k;

    for (k = 0; k < batch->num_tcp_ops; k++) {
        bytes += batch->tcp_ops[k].desc.bytes;
    }
    wanted = bytes <= SINGLE_STREAM_BYTES ? 1 : client->num_streams;
    while (num_streams < wanted &&
           (client->streams[num_streams].fd >= 0 || open_stream(client, &client->streams[num_streams], error))) {
        num_streams++;
    }
    if (num_streams == 0) { /* some are enough */
        return false;
    }
    if (!share_out(client, batch, num_streams, bytes)) {
        hixl_fail(error, HIXL_RESOURCE_EXHAUSTED, "no memory for a batch of %" PRIu64 " bytes", bytes);
        return false;
    }
    client->num_fetches += is_fetch(batch);
    client->has_confirmed = false;
    for (i = 0; i < num_streams; i++) {
        hixl_stream *stream = &client->streams[i];
        stream->frame_end = 0;
        stream->fetch = (hixl_wire_fetch){client->num_fetches, offset, bytes, i, num_streams};
        begin_frame(client, batch, stream);
        stream->active = true;
        stream->failed = false;
        offset += stream->request.bytes;
    }
    return true;
}

/* What precedes the bytes of a frame: request, part, and descriptors or words. Returns how many of these there are. */
static size_t head_of(const hixl_batch *batch, hixl_stream *stream, struct iovec head[3], size_t *head_bytes) {
    size_t i, n = 0;
    head[n++] = (struct iovec){&stream->request, sizeof stream->request};
    if (is_fetch(batch)) {
        head[n++] = (struct iovec){&stream->fetch, sizeof stream->fetch};
        head[n++] = (struct iovec){(void *)batch->fetch_request, stream->request.count};
    } else {
        head[n++] = (struct iovec){&stream->descs[stream->frame_first], stream->request.count * sizeof(hixl_wire_desc)};
    }
    *head_bytes = 0;
    for (i = 0; i < n; i++) {
        *head_bytes += head[i].iov_len;
    }
    return n;
}

/* Send hello, head and, of a put, the bytes; several of them in one call where they are due. */
static stream_state send_some(const hixl_client *client, const hixl_batch *batch, hixl_stream *stream, uint64_t *budget,
                              hixl_error *error) {
    struct iovec head[3];
    size_t head_bytes;
    const size_t num_heads = head_of(batch, stream, head, &head_bytes);
    while (!stream->sent && *budget > 0) {
        struct iovec iov[4 + SLICE_IOVECS];
        struct msghdr message = {.msg_iov = iov};
        size_t n = 0, i = 0, skip = 0, rest;
        ssize_t sent;
        if (stream->hello_sent < sizeof stream->hello) {
            iov[n].iov_base = (uint8_t *)&stream->hello + stream->hello_sent;
            iov[n++].iov_len = sizeof stream->hello - stream->hello_sent;
        }
        if (stream->head_sent < head_bytes) {
            hixl_advance_iov(head, &i, &skip, stream->head_sent);
            n += hixl_slice_iov(head + i, num_heads - i, skip, head_bytes, iov + n, num_heads);
        }
        if (batch->is_put) {
            n += hixl_slice_iov(stream->iov + stream->send_index, stream->frame_end - stream->send_index,
                                stream->send_skip, BURST_BYTES, iov + n, SLICE_IOVECS);
        }
        message.msg_iovlen = n;
        sent = sendmsg(stream->fd, &message, MSG_NOSIGNAL);
        if (sent < 0) {
            if (errno == EINTR) {
                continue;
            }
            return errno == EAGAIN ? STREAM_PENDING : fail_stream(client, "send to", errno, error);
        }
        *budget -= (uint64_t)sent < *budget ? (uint64_t)sent : *budget;
        rest = (size_t)sent;
        if (stream->hello_sent < sizeof stream->hello) {
            size_t part = sizeof stream->hello - stream->hello_sent;
            part = part < rest ? part : rest;
            stream->hello_sent += part;
            rest -= part;
        }
        if (stream->head_sent < head_bytes) {
            size_t part = head_bytes - stream->head_sent;
            part = part < rest ? part : rest;
            stream->head_sent += part;
            rest -= part;
        }
        hixl_advance_iov(stream->iov, &stream->send_index, &stream->send_skip, rest);
        stream->sent = stream->head_sent == head_bytes && (!batch->is_put || stream->send_index == stream->frame_end);
    }
    return STREAM_PENDING;
}

/* Receive into a fixed frame: DONE once it is whole. */
static stream_state receive_frame(const hixl_client *client, const hixl_stream *stream, void *frame, size_t bytes,
                                  size_t *received, hixl_error *error) {
    while (*received < bytes) {
        ssize_t got = recv(stream->fd, (uint8_t *)frame + *received, bytes - *received, 0);
        if (got > 0) {
            *received += (size_t)got;
        } else if (got < 0 && errno == EAGAIN) {
            return STREAM_PENDING;
        } else if (got == 0 || errno != EINTR) {
            return fail_stream(client, "receive from", got == 0 ? 0 : errno, error);
        }
    }
    return STREAM_DONE;
}

static stream_state check_reply(const hixl_client *client, const hixl_stream *stream, bool is_put, hixl_error *error) {
    const hixl_wire_reply *reply = &stream->reply;
    uint64_t bytes = reply->status == HIXL_SUCCESS && !is_put ? stream->request.bytes : 0;
    if (reply->magic != HIXL_WIRE_REPLY_MAGIC || reply->op != stream->request.op ||
        reply->sequence != stream->request.sequence || reply->bytes != bytes ||
        reply->text_bytes > (reply->status == HIXL_SUCCESS ? 0 : HIXL_MAX_TEXT_BYTES)) {
        hixl_fail(error, HIXL_NOT_CONNECTED, "server %s sent a malformed reply", client->address.text);
        return STREAM_FAILED;
    }
    return STREAM_DONE;
}

static stream_state receive_bytes(const hixl_client *client, hixl_stream *stream, uint64_t *budget, hixl_error *error) {
    while (stream->receive_index < stream->frame_end) {
        struct iovec iov[SLICE_IOVECS];
        struct msghdr message = {.msg_iov = iov};
        ssize_t got;
        if (*budget == 0) {
            return STREAM_PENDING;
        }
        message.msg_iovlen =
            hixl_slice_iov(stream->iov + stream->receive_index, stream->frame_end - stream->receive_index,
                           stream->receive_skip, BURST_BYTES, iov, SLICE_IOVECS);
        got = recvmsg(stream->fd, &message, 0);
        if (got > 0) {
            hixl_advance_iov(stream->iov, &stream->receive_index, &stream->receive_skip, (size_t)got);
            *budget -= (uint64_t)got < *budget ? (uint64_t)got : *budget;
        } else if (got < 0 && errno == EAGAIN) {
            return STREAM_PENDING;
        } else if (got == 0 || errno != EINTR) {
            return fail_stream(client, "receive from", got == 0 ? 0 : errno, error);
        }
    }
    return STREAM_DONE;
}

/* DONE: the frame under way has been answered. */
static stream_state receive_answer(const hixl_client *client, const hixl_batch *batch, hixl_stream *stream,
                                   uint64_t *budget, hixl_error *error) {
    stream_state state;
    if (stream->welcome_received < sizeof stream->welcome) {
        state =
            receive_frame(client, stream, &stream->welcome, sizeof stream->welcome, &stream->welcome_received, error);
        if (state != STREAM_DONE) {
            return state;
        }
        hixl_error refusal;
        if (hixl_check_welcome(client, &stream->welcome, false, &refusal) != HIXL_SUCCESS) {
            hixl_fail(error, refusal.status, "data connection to %s: %.200s", client->address.text, refusal.text);
            return STREAM_FAILED;
        }
    }
    if (stream->reply_received < sizeof stream->reply) {
        state = receive_frame(client, stream, &stream->reply, sizeof stream->reply, &stream->reply_received, error);
        if (state == STREAM_DONE) {
            state = check_reply(client, stream, batch->is_put, error);
        }
        if (state != STREAM_DONE) {
            return state;
        }
    }
    if (stream->reply.status != HIXL_SUCCESS) {
        state = receive_frame(client, stream, stream->text, stream->reply.text_bytes, &stream->text_received, error);
        if (state != STREAM_DONE) {
            return state;
        }
        stream->text[stream->text_received] = '\0';
        if (is_fetch(batch) && (int32_t)stream->reply.argument != 0) { /* of the server's owner, not of the server */
            if (stream->fetch.part == 0) { /* it is the same on all */
                batch->fetch_reply->status = (int32_t)stream->reply.argument;
                snprintf(batch->fetch_reply->text, sizeof batch->fetch_reply->text, "%s", stream->text);
            }
            return STREAM_DONE;
        }
        hixl_fail(error, HIXL_FAILED, "server %s refused (%u): %s", client->address.text, stream->reply.status,
                  stream->text);
        return STREAM_FAILED;
    }
    return batch->is_put ? STREAM_DONE : receive_bytes(client, stream, budget, error);
}

static stream_state progress_stream(hixl_client *client, const hixl_batch *batch, hixl_stream *stream, uint64_t *budget,
                                    hixl_error *error) {
    for (;;) {
        stream_state state = send_some(client, batch, stream, budget, error);
        hixl_error send_error = *error;
        bool send_failed = state == STREAM_FAILED;
        /* Even when sending fails: the server may have said why before it closed. */
        state = receive_answer(client, batch, stream, budget, error);
        if (send_failed) {
            if (state != STREAM_FAILED || error->status == HIXL_NOT_CONNECTED) {
                *error = send_error;
            }
            return STREAM_FAILED;
        }
        if (state != STREAM_DONE) {
            return state;
        }
        if (stream->frame_end == stream->count) {
            return STREAM_DONE;
        }
        begin_frame(client, batch, stream);
    }
}

/* All bytes of a fetch are in place, or it was refused. */
static stream_state confirm(hixl_client *client, const hixl_batch *batch, hixl_error *error) {
    const hixl_stream *lead = &client->streams[0];
    hixl_wire_request frame = {.magic = HIXL_WIRE_REQUEST_MAGIC,
                               .op = HIXL_OP_CONFIRM,
                               .sequence = lead->request.sequence,
                               .argument = lead->fetch.exchange};
    ssize_t sent;
    unsigned i;
    for (i = 1; i < lead->fetch.num_parts; i++) {
        if (client->streams[i].reply.status != lead->reply.status) {
            hixl_fail(error, HIXL_NOT_CONNECTED, "server %s answered parts of one fetch differently",
                      client->address.text);
            return STREAM_FAILED;
        }
    }
    if (batch->fetch_reply->status != 0) {
        return STREAM_DONE;
    }
    do {
        sent = send(lead->fd, &frame, sizeof frame, MSG_NOSIGNAL); /* all before it was answered: there is room */
    } while (sent < 0 && errno == EINTR);
    client->has_confirmed = true;
    return sent == sizeof frame ? STREAM_DONE : fail_stream(client, "send to", sent < 0 ? errno : EAGAIN, error);
}

void hixl_tcp_submit(hixl_client *client, hixl_batch *batch) {
    batch->tcp_pending = true;
    TAILQ_INSERT_TAIL(&client->tcp_queue, batch, entry);
}

/* One round over the streams of the batch at the head. */
static stream_state progress_head(hixl_client *client, hixl_batch *batch, hixl_error *error) {
    uint64_t budget = BURST_BYTES;
    stream_state result = STREAM_DONE;
    unsigned i;

    if (!client->tcp_started) {
        if (!begin_batch(client, batch, error)) {
            return STREAM_FAILED;
        }
        client->tcp_started = true;
    }
    for (i = 0; i < client->num_streams; i++) {
        hixl_stream *stream = &client->streams[i];
        stream_state state;
        if (stream->failed) {
            *error = stream->error;
            return STREAM_FAILED;
        }
        if (!stream->active) {
            continue;
        }
        budget = BURST_BYTES;
        state = progress_stream(client, batch, stream, &budget, error);
        if (state == STREAM_FAILED) {
            return STREAM_FAILED;
        }
        if (state == STREAM_DONE) {
            stream->active = false;
        } else {
            result = STREAM_PENDING;
        }
    }
    return result == STREAM_DONE && is_fetch(batch) ? confirm(client, batch, error) : result;
}

/* One stream's share of a round, on any thread. */
static bool run_stream(copy_job *job, size_t index) {
    hixl_client *client = (hixl_client *)((uint8_t *)job - offsetof(hixl_client, round));
    hixl_stream *stream = client->round_streams[index];
    const hixl_batch *batch = client->round_batch;
    while (!atomic_load_explicit(&job->stopped, memory_order_relaxed)) {
        uint64_t budget = BURST_BYTES;
        stream_state state = progress_stream(client, batch, stream, &budget, &stream->error);
        stream->failed = state == STREAM_FAILED;
        stream->active = state == STREAM_PENDING;
        if (!stream->active || hixl_now_ns() + ROUND_IDLE_MS * HIXL_MS_NS >= client->round_until_ns) {
            break;
        }
        if (budget > 0) { /* the kernel has no more just now */
            struct pollfd entry = {.fd = stream->fd, .events = (short)(stream->sent ? POLLIN : POLLIN | POLLOUT)};
            if (poll(&entry, 1, ROUND_IDLE_MS) <= 0) {
                break; /* nothing flows: the thread may have better things to do than wait */
            }
        }
    }
    return true;
}

bool hixl_tcp_round(hixl_client *client, int64_t deadline_ns) {
    const hixl_batch *batch = TAILQ_FIRST(&client->tcp_queue);
    unsigned i, count = 0, width = copy_pool_width();
    bool flows = false;

    if (client->in_round || batch == NULL || !client->tcp_started || batch->num_bytes < ROUND_BYTES || width < 2) {
        return false;
    }
    for (i = 0; i < client->num_streams; i++) {
        hixl_stream *stream = &client->streams[i];
        if (stream->active && !stream->failed) {
            client->round_streams[count++] = stream;
            flows = flows || stream->receive_index > stream->frame_first || stream->receive_skip > 0 ||
                    stream->send_index > stream->frame_first || stream->send_skip > 0;
        }
    }
    if (count < 2 || !flows) {
        return false;
    }
    client->in_round = true;
    client->round_batch = batch;
    client->round_until_ns = hixl_earlier(deadline_ns, hixl_now_ns() + ROUND_NS);
    client->round.run = run_stream;
    client->round.num_chunks = count;
    copy_job_start(&client->round, (count < width ? count : width) - 1);
    pthread_mutex_unlock(&client->lock);
    copy_job_help(&client->round, HIXL_NO_DEADLINE);
    copy_job_wait(&client->round, HIXL_NO_DEADLINE);
    pthread_mutex_lock(&client->lock);
    client->in_round = false;
    return true;
}

hixl_batch *hixl_tcp_progress(hixl_client *client, hixl_error *error) {
    hixl_batch *batch;
    while (!client->in_round && (batch = TAILQ_FIRST(&client->tcp_queue)) != NULL) {
        stream_state state = progress_head(client, batch, error);
        if (state != STREAM_DONE) {
            return state == STREAM_FAILED ? batch : NULL;
        }
        TAILQ_REMOVE(&client->tcp_queue, batch, entry);
        batch->tcp_pending = false;
        client->tcp_started = false;
    }
    return NULL;
}

size_t hixl_tcp_poll_set(hixl_client *client, struct pollfd *entries) {
    size_t n = 0;
    unsigned i;
    if (client->in_round) {
        return 0;
    }
    for (i = 0; i < client->num_streams; i++) {
        const hixl_stream *stream = &client->streams[i];
        if (stream->active) {
            short events = (short)(stream->sent ? POLLIN : POLLIN | POLLOUT);
            entries[n++] = (struct pollfd){.fd = stream->fd, .events = events};
        }
    }
    return n;
}

void hixl_tcp_abort(hixl_client *client) {
    int i;
    if (client->in_round) {
        copy_job_stop(&client->round);
    }
    for (i = 0; i < HIXL_MAX_STREAMS; i++) {
        hixl_stream *stream = &client->streams[i];
        stream->active = stream->failed = false;
        if (stream->fd >= 0) {
            /* A thread may be polling it: wake that before the number can mean something else. A reset also tells
             * the server to drop what it has received of a put and not yet put in place; without a batch under way
             * the last thing sent may be a confirmation, which is to arrive. */
            shutdown(stream->fd, SHUT_RD);
            if (client->tcp_started) {
                hixl_reset_on_close(stream->fd);
            }
            hixl_close_fd(&stream->fd);
        }
    }
    client->tcp_started = false;
}

/*
 * Have the last confirmation taken in before anything else tells the server that this client is gone: that comes by
 * other connections, which may be faster. The server ends a connection whose client has, and reads all of it before.
 */
static void see_off(const hixl_client *client) {
    const hixl_stream *lead = &client->streams[0];
    int64_t deadline = hixl_now_ns() + SEE_OFF_NS;
    char byte;
    if (lead->fd < 0 || !client->has_confirmed || client->tcp_started || shutdown(lead->fd, SHUT_WR) != 0) {
        return;
    }
    while (recv(lead->fd, &byte, 1, MSG_DONTWAIT) < 0 && (errno == EAGAIN || errno == EINTR)) {
        struct pollfd entry = {.fd = lead->fd, .events = POLLIN};
        if (poll(&entry, 1, hixl_poll_ms(deadline)) == 0) {
            return;
        }
    }
}

void hixl_tcp_close(hixl_client *client) {
    int i;
    see_off(client);
    hixl_tcp_abort(client);
    for (i = 0; i < HIXL_MAX_STREAMS; i++) {
        free(client->streams[i].descs);
        free(client->streams[i].iov);
    }
}
