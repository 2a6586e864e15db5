/*
 * Connecting to a server, and telling whether it is still there.
 *
 * The ADMIN connection exists always. When both ends run under one kernel the server's abstract Unix socket is
 * tried too: it passes memfds, and tells the server's pid, which a pidfd pins against reuse before the server
 * answers on that very socket.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include "hixl/client/connect.h"

/* A death is noticed by the first batch that starts this long after it; asking more often costs small batches. */
#define ALIVE_NS (HIXL_MS_NS / 2)

#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434
#endif

static void fill_hello(const hixl_client *client, uint16_t kind, hixl_wire_hello *hello) {
    memset(hello, 0, sizeof *hello);
    hello->magic = HIXL_WIRE_HELLO_MAGIC;
    hello->version = HIXL_WIRE_VERSION;
    hello->kind = kind;
    memcpy(hello->client_id, client->client_id, sizeof hello->client_id);
    memcpy(hello->token, client->token, sizeof hello->token);
    memcpy(hello->server_nonce, client->server_nonce, sizeof hello->server_nonce);
}

HixlStatus hixl_check_welcome(const hixl_client *client, const hixl_wire_welcome *welcome, bool first,
                              hixl_error *error) {
    if (welcome->magic != HIXL_WIRE_HELLO_MAGIC) {
        return hixl_fail(error, HIXL_NOT_CONNECTED, "this is not a transfer server");
    }
    if (welcome->version != HIXL_WIRE_VERSION) {
        return hixl_fail(error, HIXL_UNSUPPORTED, "the server speaks version %u of the transfer protocol, not %u",
                         welcome->version, HIXL_WIRE_VERSION);
    }
    if (welcome->status != HIXL_SUCCESS) {
        return hixl_fail(error, HIXL_NOT_CONNECTED, "the server refused the connection (%u)", welcome->status);
    }
    if (!first && memcmp(welcome->server_nonce, client->server_nonce, sizeof client->server_nonce) != 0) {
        return hixl_fail(error, HIXL_NOT_CONNECTED, "another server answers now");
    }
    return HIXL_SUCCESS;
}

void hixl_data_hello(const hixl_client *client, hixl_wire_hello *hello) {
    fill_hello(client, HIXL_KIND_DATA, hello);
}

static HixlStatus greet(hixl_client *client, int fd, uint16_t kind, int64_t deadline_ns, hixl_wire_welcome *welcome,
                        hixl_error *error) {
    hixl_wire_hello hello;
    HixlStatus status;
    fill_hello(client, kind, &hello);
    status = hixl_send_all(fd, &hello, sizeof hello, deadline_ns, error);
    if (status == HIXL_SUCCESS) {
        status = hixl_receive_all(fd, welcome, sizeof *welcome, deadline_ns, error);
    }
    return status == HIXL_SUCCESS ? hixl_check_welcome(client, welcome, kind == HIXL_KIND_ADMIN, error) : status;
}

/* Whether the kernel lets us read and write the server's memory: containers, users and Yama may forbid it. */
static bool probe_cma(const hixl_client *client, const hixl_wire_welcome *welcome) {
    uint8_t nonce[16] = {0};
    uint64_t word = 1;
    struct iovec local = {.iov_base = nonce, .iov_len = sizeof nonce};
    struct iovec remote = {.iov_base = (void *)(uintptr_t)welcome->nonce_address, .iov_len = sizeof nonce};
    if (process_vm_readv(client->server_pid, &local, 1, &remote, 1, 0) != sizeof nonce ||
        memcmp(nonce, client->server_nonce, sizeof nonce) != 0) {
        return false;
    }
    local = (struct iovec){.iov_base = &word, .iov_len = sizeof word};
    remote = (struct iovec){.iov_base = (void *)(uintptr_t)welcome->scratch_address, .iov_len = sizeof word};
    return process_vm_writev(client->server_pid, &local, 1, &remote, 1, 0) == sizeof word;
}

static bool wants_local(const hixl_client *client, const hixl_wire_welcome *welcome) {
    static const uint8_t unknown[16];
    uint8_t boot_id[16];
    hixl_boot_id(boot_id);
    return client->paths[0] != HIXL_PATH_TCP && welcome->local_name[0] != '\0' &&
           welcome->local_name[sizeof welcome->local_name - 1] == '\0' &&
           memcmp(boot_id, unknown, sizeof boot_id) != 0 && memcmp(boot_id, welcome->boot_id, sizeof boot_id) == 0;
}

/* Nothing here fails the connection: without the local socket the bytes travel by TCP. */
static void open_local(hixl_client *client, const hixl_wire_welcome *admin, int64_t deadline_ns) {
    struct ucred peer;
    socklen_t size = sizeof peer;
    hixl_wire_welcome welcome;
    hixl_error ignored;
    int fd = hixl_connect_local(admin->local_name);

    if (fd < 0) { /* another network namespace, most likely */
        return;
    }
    if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) == 0 && peer.pid > 0) {
        client->server_pid = peer.pid;
        client->pid_fd = (int)syscall(SYS_pidfd_open, peer.pid, 0);
    }
    if (greet(client, fd, HIXL_KIND_LOCAL, deadline_ns, &welcome, &ignored) != HIXL_SUCCESS) {
        close(fd);
        hixl_close_fd(&client->pid_fd);
        return;
    }
    client->local_fd = fd;
    client->can_cma = client->pid_fd >= 0 && probe_cma(client, &welcome);
}

HixlStatus hixl_link_open(hixl_client *client, int64_t deadline_ns, hixl_error *error) {
    hixl_wire_welcome welcome;
    hixl_error detail = {0};
    HixlStatus status;
    int code;

    memset(client->server_nonce, 0, sizeof client->server_nonce);
    if (!hixl_random_bytes(client->client_id, sizeof client->client_id)) {
        return hixl_fail(error, HIXL_FAILED, "getrandom: %s", strerror(errno));
    }
    client->admin_fd = hixl_start_connect(&client->address);
    if (client->admin_fd < 0) {
        return hixl_fail(error, errno == EMFILE || errno == ENFILE ? HIXL_RESOURCE_EXHAUSTED : HIXL_NOT_CONNECTED,
                         "connect to %s: %s", client->address.text, strerror(errno));
    }
    status = hixl_wait_fd(client->admin_fd, POLLOUT, deadline_ns, &detail);
    if (status == HIXL_SUCCESS && (code = hixl_connect_result(client->admin_fd)) != 0) {
        status = hixl_fail(&detail, code == ETIMEDOUT ? HIXL_TIMEOUT : HIXL_NOT_CONNECTED, "%s", strerror(code));
    }
    if (status == HIXL_SUCCESS) {
        hixl_tune_tcp(client->admin_fd, true);
        status = greet(client, client->admin_fd, HIXL_KIND_ADMIN, deadline_ns, &welcome, &detail);
    }
    if (status != HIXL_SUCCESS) {
        return hixl_fail(error, status, "connect to %s: %.200s", client->address.text, detail.text);
    }
    memcpy(client->server_nonce, welcome.server_nonce, sizeof client->server_nonce);
    if (wants_local(client, &welcome)) {
        open_local(client, &welcome, deadline_ns);
    }
    client->alive_ns = hixl_now_ns();
    return HIXL_SUCCESS;
}

void hixl_link_close(hixl_client *client) {
    hixl_close_fd(&client->admin_fd);
    hixl_close_fd(&client->local_fd);
    hixl_close_fd(&client->pid_fd);
    client->can_cma = false;
}

HixlStatus hixl_link_check(hixl_client *client, hixl_error *error) {
    struct pollfd entries[] = {{.fd = client->admin_fd, .events = POLLRDHUP}, {.fd = client->pid_fd, .events = POLLIN}};
    int64_t now = hixl_now_ns();
    if (now - client->alive_ns < ALIVE_NS) {
        return HIXL_SUCCESS;
    }
    if (poll(entries, 2, 0) > 0) {
        int code = entries[0].revents & POLLERR ? hixl_connect_result(client->admin_fd) : 0;
        const char *why = code != 0 ? strerror(code) : "it closed the connection";
        return hixl_fail(error, HIXL_NOT_CONNECTED, "server %s: %s", client->address.text,
                         entries[1].revents ? "its process has ended" : why);
    }
    client->alive_ns = now;
    return HIXL_SUCCESS;
}
