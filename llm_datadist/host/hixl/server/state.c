/* What every part of a server asks: which server a handle names, and to wake its service thread. */
#include "hixl/server/state.h"

#include <unistd.h>

hixl_server *hixl_checked_server(HixlServerHandle handle, hixl_error *error) {
    hixl_server *server = hixl_handle_object(HIXL_SERVER_HANDLE, handle);
    if (server == NULL) {
        hixl_fail(error, HIXL_PARAM_INVALID, "server handle %p is not open", handle);
        return NULL;
    }
    if (server->pid != getpid()) {
        hixl_fail(error, HIXL_FAILED, "server belongs to process %d, of which this is a fork", server->pid);
        return NULL;
    }
    return server;
}

void hixl_wake_service(hixl_server *server) {
    uint64_t one = 1;
    ssize_t written = write(server->wake_fd, &one, sizeof one);
    (void)written; /* full means it is awake anyway */
}
