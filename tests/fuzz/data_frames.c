/* Requests on a data connection: GET, PUT, FETCH and CONFIRM, as a client that is let in may write them. */
#include "peer.h"

#include "hixl/server/data.c"
#include "hixl/server/fetch.c"

enum { REGION_BYTES = 4096 };

static hixl_server *server;
static hixl_session session;
static LddSegment segments[] = {{0, 100}, {0, 1}, {0, 900}};
static unsigned num_begun;

/* What a request of a fetch means is its owner's: the first byte decides between bytes and a refusal. */
static int32_t begin(void *context, const uint8_t token[16], const void *request, size_t request_bytes,
                     uint64_t num_bytes, LddFetchSource *source, char *text, size_t text_size) {
    (void)context;
    peer_read(token, 16);
    peer_read(request, request_bytes);
    if (*(const uint8_t *)request & 1 || num_bytes != 1001) {
        strncpy(text, "not today", text_size - 1);
        return -5;
    }
    source->segments = segments;
    source->num_segments = 3;
    source->ticket = segments;
    num_begun++;
    return 0;
}

static void end(void *context, void *ticket, int32_t confirmed) {
    (void)context;
    (void)confirmed;
    if (ticket != segments || num_begun == 0) {
        abort();
    }
    num_begun--;
}

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    const LddFetchHooks hooks = {begin, end};
    HixlServerDesc desc = {0};
    HixlServerConfig config = {0};
    HixlServerHandle handle;
    size_t i;
    (void)argc;
    (void)argv;
    if (HixlCSServerCreate(&desc, &config, &handle) != HIXL_SUCCESS ||
        LddServerSetFetch(handle, &hooks, NULL) != HIXL_SUCCESS) {
        abort();
    }
    server = hixl_checked_server(handle, hixl_thread_error());
    server->regions.last_generation = 0; /* an input must be able to name them */
    for (i = 0; i < 2; i++) {
        CommMem mem = {.type = COMM_MEM_TYPE_HOST, .addr = calloc(1, REGION_BYTES), .size = REGION_BYTES};
        MemHandle region;
        if (hixl_regions_add(&server->regions, NULL, &mem, &region, hixl_thread_error()) != HIXL_SUCCESS) {
            abort();
        }
    }
    for (i = 0; i < 3; i++) {
        segments[i].addr = (uint64_t)(uintptr_t)calloc(1, segments[i].bytes);
    }
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    hixl_conn conn = {.server = server, .session = &session, .state = HIXL_CONN_SERVED, .fd = PEER_FD};
    data_session served = {.conn = &conn};
    peer_start(data, size);
    session.rights = size > 0 && data[0] & 0x80 ? LDD_RIGHT_READ : LDD_RIGHT_READ | LDD_RIGHT_WRITE;
    while (serve_request(&served) == MOVE_READY) {
    }
    free(served.descs);
    free(served.targets);
    if (num_begun != 0 || !TAILQ_EMPTY(&server->fetches) || served.num_targets != 0) {
        abort(); /* something is held for a peer that has gone */
    }
    return 0;
}
