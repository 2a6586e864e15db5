/* What a server may answer on data connections: to a get, a put and a fetch, on one stream and on two. */
#include "peer.h"

#include "hixl/client/tcp.c"

enum { NUM_OPS = 3, BIG_BYTES = 300 << 10 };

static const uint64_t op_bytes[NUM_OPS] = {100, 1, 411};

/* Destinations, each an allocation of its own: whatever lands outside is seen. */
static void fill_ops(hixl_tcp_op *ops, uint8_t *buffers[NUM_OPS], bool big) {
    size_t i;
    for (i = 0; i < NUM_OPS; i++) {
        uint64_t bytes = big && i == 1 ? BIG_BYTES : op_bytes[i];
        buffers[i] = calloc(1, bytes);
        if (buffers[i] == NULL) {
            abort();
        }
        ops[i] = (hixl_tcp_op){.local = (uint64_t)(uintptr_t)buffers[i], .desc = {i, 1, 8 * i, bytes}};
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    const uint8_t kind = size > 0 ? data[0] : 0;
    static hixl_client only;
    hixl_client *client = &only;
    hixl_tcp_op ops[NUM_OPS];
    uint8_t *buffers[NUM_OPS];
    LddFetchReply reply = {0};
    hixl_batch batch = {.is_put = (kind & 3) == 1, .tcp_ops = ops, .num_tcp_ops = NUM_OPS};
    hixl_error error = {0};
    size_t i, turns = 0;
    memset(client->streams, 0, sizeof client->streams);
    atomic_store(&client->sequence, 0);
    client->num_fetches = 0;
    client->tcp_started = client->has_confirmed = false;
    if ((kind & 3) == 2) {
        batch.fetch_request = "what the owner is asked";
        batch.fetch_bytes = 23;
        batch.fetch_reply = &reply;
    }
    TAILQ_INIT(&client->tcp_queue);
    client->num_streams = 2;
    for (i = 0; i < HIXL_MAX_STREAMS; i++) {
        client->streams[i].fd = i < 2 ? PEER_FD : -1;
        if (!(kind & 4)) { /* greeted before */
            client->streams[i].hello_sent = sizeof(hixl_wire_hello);
            client->streams[i].welcome_received = sizeof(hixl_wire_welcome);
        }
    }
    fill_ops(ops, buffers, (kind & 8) != 0);
    peer_start(size > 0 ? data + 1 : data, size > 0 ? size - 1 : 0);
    hixl_tcp_submit(client, &batch);
    while (hixl_tcp_progress(client, &error) == NULL && !TAILQ_EMPTY(&client->tcp_queue) && turns++ < 2 * size + 64) {
    }
    if (memchr(reply.text, 0, sizeof reply.text) == NULL) {
        abort();
    }
    for (i = 0; i < 2; i++) {
        client->streams[i].fd = -1; /* nothing to shut down */
    }
    hixl_tcp_close(client);
    for (i = 0; i < NUM_OPS; i++) {
        free(buffers[i]);
    }
    return 0;
}
