/* What a server may answer to a client: lists of regions, and what the client finds in them. */
#include "peer.h"

#include "hixl/client/remote.h"

static HixlStatus peer_wait(int fd, short events, int64_t deadline_ns, hixl_error *error) {
    (void)fd;
    (void)events;
    (void)deadline_ns;
    return peer.left > 0 ? HIXL_SUCCESS : hixl_fail(error, HIXL_TIMEOUT, "nothing comes");
}

static HixlStatus peer_send_all(int fd, const void *data, size_t bytes, int64_t deadline_ns, hixl_error *error) {
    (void)deadline_ns;
    (void)error;
    peer_send(fd, data, bytes, 0);
    return HIXL_SUCCESS;
}

#define hixl_wait_fd peer_wait
#define hixl_send_all peer_send_all

#include "hixl/client/remote.c"

/* A region that holds the range must say so truly: no arithmetic has gone round. */
static void find(hixl_client *client, uint64_t address, uint64_t bytes) {
    const hixl_remote_region *found = hixl_remote_find(client, address, bytes);
    if (found != NULL &&
        (address < found->address || address + bytes < address || address + bytes > found->address + found->bytes)) {
        abort();
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static hixl_client only;
    hixl_client *client = &only;
    uint64_t words[2] = {0, 0};
    hixl_error error = {0};
    size_t i;
    atomic_store(&client->sequence, 0);
    client->admin_fd = PEER_FD;
    client->local_fd = client->pid_fd = -1;
    client->paths[0] = HIXL_PATH_SHM;
    client->paths[1] = HIXL_PATH_TCP;
    client->num_paths = 2;
    memcpy(words, data, size < sizeof words ? size : sizeof words);
    peer_start(data + (size < sizeof words ? size : sizeof words), size < sizeof words ? 0 : size - sizeof words);
    for (i = 0; i < 4 && peer.left > 0; i++) {
        uint32_t count = 0, k;
        if (hixl_remote_refresh(client, 0, true, &count, &error) != HIXL_SUCCESS) {
            if (error.status != HIXL_TIMEOUT) {
                break;
            }
            continue;
        }
        for (k = 0; k < count; k++) {
            if (client->user_tags[k] == NULL || strlen(client->user_tags[k]) > HIXL_MAX_TAG_BYTES) {
                abort();
            }
            find(client, client->regions[k].address, client->regions[k].bytes);
            find(client, client->regions[k].address + words[0], words[1]);
        }
        find(client, words[0], words[1]);
    }
    hixl_remote_close(client);
    return 0;
}
