/* What every part of a client asks: which client a handle names, and whether it is still of use. */
#include "hixl/client/state.h"

#include <unistd.h>

const char *const hixl_path_names[HIXL_NUM_PATHS] = {"shm", "cma", "tcp"};

hixl_client *hixl_checked_client(HixlClientHandle handle, hixl_error *error) {
    hixl_client *client = hixl_handle_object(HIXL_CLIENT_HANDLE, handle);
    if (client == NULL) {
        hixl_fail(error, HIXL_PARAM_INVALID, "client handle %p is not open", handle);
        return NULL;
    }
    if (client->pid != getpid()) {
        hixl_fail(error, HIXL_FAILED, "client belongs to process %d, of which this is a fork", client->pid);
        return NULL;
    }
    return client;
}

void hixl_poison(hixl_client *client, const hixl_error *error) {
    if (client->poison.status == HIXL_SUCCESS) {
        client->poison = *error;
    }
}
