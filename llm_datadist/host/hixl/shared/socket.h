/* Sockets of the transfer half: all non-blocking and close-on-exec; every wait has a deadline. */
#ifndef LLM_DATADIST_HIXL_SOCKET_H
#define LLM_DATADIST_HIXL_SOCKET_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include "hixl/shared/error.h"

typedef struct {
    struct sockaddr_storage storage;
    socklen_t size;
    char text[64]; /* "127.0.0.1:16000", for messages */
} hixl_address;

/* Numeric IPv4 or IPv6 only: a name could block on its resolver past any deadline. */
HixlStatus hixl_parse_address(const char *ip, uint32_t port, hixl_address *out, hixl_error *error);

HixlStatus hixl_listen_tcp(const hixl_address *address, int backlog, int *out_fd, hixl_error *error);

/* Listen on an abstract Unix name: it vanishes with the process, whatever ends it. */
HixlStatus hixl_listen_local(const char *name, int backlog, int *out_fd, hixl_error *error);

/* Start a connection; it is up once the socket is writable and hixl_connect_result says 0. */
int hixl_start_connect(const hixl_address *address);
int hixl_connect_result(int fd);
int hixl_connect_local(const char *name);

/*
 * Latency and liveness options of a TCP connection. Probes find a silent peer within about three seconds; a
 * peer that is merely stopped keeps acknowledging them. `control` also bounds unacknowledged bytes: not on data
 * connections, where a reader that takes its time is no fault.
 */
void hixl_tune_tcp(int fd, bool control);

/* Move exactly `bytes`, or fail: HIXL_TIMEOUT at the deadline, HIXL_NOT_CONNECTED when the peer has gone. */
HixlStatus hixl_send_all(int fd, const void *data, size_t bytes, int64_t deadline_ns, hixl_error *error);
HixlStatus hixl_receive_all(int fd, void *data, size_t bytes, int64_t deadline_ns, hixl_error *error);

/* Wait for poll `events`; HIXL_SUCCESS when any, or an error or hang-up, is there. */
HixlStatus hixl_wait_fd(int fd, short events, int64_t deadline_ns, hixl_error *error);

/* One byte run with a descriptor on its first byte; as send(): bytes sent or -1. */
ssize_t hixl_send_fd(int fd, const void *data, size_t bytes, int passed_fd);
/* As recv(): at most `bytes`; *passed_fd is -1 unless a descriptor came along (surplus ones are closed). */
ssize_t hixl_receive_fd(int fd, void *data, size_t bytes, int *passed_fd);

/* Let close() reset the connection: the kernel drops what is still queued, and the peer sees at once that we left. */
void hixl_reset_on_close(int fd);

bool hixl_random_bytes(void *out, size_t bytes);

/* Tells one running kernel from another; zero where /proc says nothing: no peer is local then. */
void hixl_boot_id(uint8_t out[16]);

static inline int hixl_hex_digit(char c) {
    if (c >= '0' && c <= '9') {
        return c - '0';
    }
    c |= 'a' ^ 'A';
    return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

/*
 * Entries for one call: of `iov`, of whose first `skip` bytes are done, at most `limit` entries and max_bytes bytes.
 * hixl_advance_iov then moves a position (index, skip) in an array by what the call did.
 */
size_t hixl_slice_iov(const struct iovec *iov, size_t count, size_t skip, size_t max_bytes, struct iovec *out,
                      size_t limit);
void hixl_advance_iov(const struct iovec *iov, size_t *index, size_t *skip, size_t bytes);

#endif
