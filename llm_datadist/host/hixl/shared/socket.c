/* Sockets of the transfer protocol: addresses, listening, connecting, sending and receiving whole frames and files. */
#define _GNU_SOURCE
#include "hixl/shared/socket.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/random.h>
#include <sys/un.h>
#include <unistd.h>

#include "base/deadline.h"

enum {
    PROBE_IDLE_S = 1,      /* first keepalive probe after this much silence */
    PROBE_INTERVAL_S = 1,
    PROBE_COUNT = 2,       /* 1 + 2 x 1 s: a silent peer is gone after three seconds */
    UNACKNOWLEDGED_MS = 3000
};

HixlStatus hixl_parse_address(const char *ip, uint32_t port, hixl_address *out, hixl_error *error) {
    struct sockaddr_in *v4 = (struct sockaddr_in *)&out->storage;
    struct sockaddr_in6 *v6 = (struct sockaddr_in6 *)&out->storage;

    memset(out, 0, sizeof *out);
    if (ip == NULL) {
        return hixl_fail(error, HIXL_PARAM_INVALID, "server_ip is NULL");
    }
    if (inet_pton(AF_INET, ip, &v4->sin_addr) == 1) {
        v4->sin_family = AF_INET;
        v4->sin_port = htons((uint16_t)port);
        out->size = sizeof *v4;
        snprintf(out->text, sizeof out->text, "%s:%u", ip, port);
        return HIXL_SUCCESS;
    }
    if (inet_pton(AF_INET6, ip, &v6->sin6_addr) == 1) {
        v6->sin6_family = AF_INET6;
        v6->sin6_port = htons((uint16_t)port);
        out->size = sizeof *v6;
        snprintf(out->text, sizeof out->text, "[%.45s]:%u", ip, port);
        return HIXL_SUCCESS;
    }
    return hixl_fail(error, HIXL_PARAM_INVALID, "server_ip '%.64s' is not a numeric IPv4 or IPv6 address", ip);
}

static HixlStatus fail_socket(int fd, const char *what, const char *where, hixl_error *error) {
    int code = errno;
    if (fd >= 0) {
        close(fd);
    }
    return hixl_fail(error, code == EMFILE || code == ENFILE ? HIXL_RESOURCE_EXHAUSTED : HIXL_FAILED, "%s %s: %s", what,
                     where, strerror(code));
}

HixlStatus hixl_listen_tcp(const hixl_address *address, int backlog, int *out_fd, hixl_error *error) {
    int one = 1;
    int fd = socket(address->storage.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0) {
        return fail_socket(fd, "socket for", address->text, error);
    }
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(fd, (const struct sockaddr *)&address->storage, address->size) != 0) {
        return fail_socket(fd, "bind", address->text, error);
    }
    if (listen(fd, backlog) != 0) {
        return fail_socket(fd, "listen on", address->text, error);
    }
    *out_fd = fd;
    return HIXL_SUCCESS;
}

static socklen_t local_address(const char *name, struct sockaddr_un *out) {
    size_t length = strnlen(name, sizeof out->sun_path - 1);
    memset(out, 0, sizeof *out);
    out->sun_family = AF_UNIX;
    memcpy(out->sun_path + 1, name, length); /* the leading NUL makes it abstract */
    return (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + length);
}

HixlStatus hixl_listen_local(const char *name, int backlog, int *out_fd, hixl_error *error) {
    struct sockaddr_un address;
    socklen_t size = local_address(name, &address);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0) {
        return fail_socket(fd, "socket for", name, error);
    }
    if (bind(fd, (struct sockaddr *)&address, size) != 0 || listen(fd, backlog) != 0) {
        return fail_socket(fd, "bind", name, error);
    }
    *out_fd = fd;
    return HIXL_SUCCESS;
}

int hixl_start_connect(const hixl_address *address) {
    int fd = socket(address->storage.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd >= 0 && connect(fd, (const struct sockaddr *)&address->storage, address->size) != 0 &&
        errno != EINPROGRESS && errno != EINTR) {
        int code = errno;
        close(fd);
        errno = code;
        return -1;
    }
    return fd;
}

int hixl_connect_result(int fd) {
    int code = 0;
    socklen_t size = sizeof code;
    return getsockopt(fd, SOL_SOCKET, SO_ERROR, &code, &size) == 0 ? code : errno;
}

int hixl_connect_local(const char *name) {
    struct sockaddr_un address;
    socklen_t size = local_address(name, &address);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd >= 0 && connect(fd, (struct sockaddr *)&address, size) != 0) { /* immediate or never: no EINPROGRESS */
        int code = errno;
        close(fd);
        errno = code;
        return -1;
    }
    return fd;
}

static void set_option(int fd, int level, int option, int value) {
    /* Each option is an improvement only: a kernel that refuses one still carries the connection. */
    (void)setsockopt(fd, level, option, &value, sizeof value);
}

/* Buffer sizes stay with the kernel's autotuning: fixed ones of 128 KiB to 4 MiB cost no less CPU per byte. */
void hixl_tune_tcp(int fd, bool control) {
    set_option(fd, IPPROTO_TCP, TCP_NODELAY, 1);
    set_option(fd, SOL_SOCKET, SO_KEEPALIVE, 1);
    set_option(fd, IPPROTO_TCP, TCP_KEEPIDLE, PROBE_IDLE_S);
    set_option(fd, IPPROTO_TCP, TCP_KEEPINTVL, PROBE_INTERVAL_S);
    set_option(fd, IPPROTO_TCP, TCP_KEEPCNT, PROBE_COUNT);
    if (control) {
        set_option(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, UNACKNOWLEDGED_MS);
    }
}

HixlStatus hixl_wait_fd(int fd, short events, int64_t deadline_ns, hixl_error *error) {
    struct pollfd entry = {.fd = fd, .events = events};
    for (;;) {
        int ready = poll(&entry, 1, hixl_poll_ms(deadline_ns));
        if (ready > 0) {
            return HIXL_SUCCESS;
        }
        if (ready < 0 && errno != EINTR) {
            return hixl_fail(error, HIXL_FAILED, "poll: %s", strerror(errno));
        }
        if (hixl_now_ns() >= deadline_ns) {
            return hixl_fail(error, HIXL_TIMEOUT, "the peer did not answer in time");
        }
    }
}

HixlStatus hixl_send_all(int fd, const void *data, size_t bytes, int64_t deadline_ns, hixl_error *error) {
    const uint8_t *next = data;
    while (bytes > 0) {
        ssize_t sent = send(fd, next, bytes, MSG_NOSIGNAL);
        if (sent >= 0) {
            next += sent;
            bytes -= (size_t)sent;
        } else if (errno == EAGAIN) {
            HixlStatus status = hixl_wait_fd(fd, POLLOUT, deadline_ns, error);
            if (status != HIXL_SUCCESS) {
                return status;
            }
        } else if (errno != EINTR) {
            return hixl_fail(error, HIXL_NOT_CONNECTED, "the peer has gone: %s", strerror(errno));
        }
    }
    return HIXL_SUCCESS;
}

HixlStatus hixl_receive_all(int fd, void *data, size_t bytes, int64_t deadline_ns, hixl_error *error) {
    uint8_t *next = data;
    while (bytes > 0) {
        ssize_t got = recv(fd, next, bytes, 0);
        if (got > 0) {
            next += got;
            bytes -= (size_t)got;
        } else if (got == 0) {
            return hixl_fail(error, HIXL_NOT_CONNECTED, "the peer has closed the connection");
        } else if (errno == EAGAIN) {
            HixlStatus status = hixl_wait_fd(fd, POLLIN, deadline_ns, error);
            if (status != HIXL_SUCCESS) {
                return status;
            }
        } else if (errno != EINTR) {
            return hixl_fail(error, HIXL_NOT_CONNECTED, "the peer has gone: %s", strerror(errno));
        }
    }
    return HIXL_SUCCESS;
}

typedef union {
    struct cmsghdr header; /* for its alignment */
    char space[CMSG_SPACE(4 * sizeof(int))];
} descriptor_message;

ssize_t hixl_send_fd(int fd, const void *data, size_t bytes, int passed_fd) {
    descriptor_message control = {0};
    struct iovec iov = {.iov_base = (void *)(uintptr_t)data, .iov_len = bytes};
    struct msghdr message = {.msg_iov = &iov, .msg_iovlen = 1};
    if (passed_fd >= 0) {
        struct cmsghdr *header;
        message.msg_control = control.space;
        message.msg_controllen = CMSG_SPACE(sizeof passed_fd);
        header = CMSG_FIRSTHDR(&message);
        header->cmsg_level = SOL_SOCKET;
        header->cmsg_type = SCM_RIGHTS;
        header->cmsg_len = CMSG_LEN(sizeof passed_fd);
        memcpy(CMSG_DATA(header), &passed_fd, sizeof passed_fd);
    }
    return sendmsg(fd, &message, MSG_NOSIGNAL);
}

ssize_t hixl_receive_fd(int fd, void *data, size_t bytes, int *passed_fd) {
    descriptor_message control = {0};
    struct iovec iov = {.iov_base = data, .iov_len = bytes};
    struct msghdr message = {
        .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.space, .msg_controllen = sizeof control.space};
    ssize_t got = recvmsg(fd, &message, MSG_CMSG_CLOEXEC);
    struct cmsghdr *header;

    *passed_fd = -1;
    if (got < 0) {
        return got;
    }
    for (header = CMSG_FIRSTHDR(&message); header != NULL; header = CMSG_NXTHDR(&message, header)) {
        size_t i, count;
        if (header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS) {
            continue;
        }
        count = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (i = 0; i < count; i++) {
            int received;
            memcpy(&received, CMSG_DATA(header) + i * sizeof received, sizeof received);
            if (*passed_fd < 0) {
                *passed_fd = received;
            } else {
                close(received);
            }
        }
    }
    return got;
}

void hixl_reset_on_close(int fd) {
    struct linger now = {.l_onoff = 1, .l_linger = 0};
    setsockopt(fd, SOL_SOCKET, SO_LINGER, &now, sizeof now);
}

bool hixl_random_bytes(void *out, size_t bytes) {
    uint8_t *next = out;
    while (bytes > 0) {
        ssize_t got = getrandom(next, bytes, 0);
        if (got < 0 && errno != EINTR) {
            return false;
        }
        if (got > 0) {
            next += got;
            bytes -= (size_t)got;
        }
    }
    return true;
}

/* 32 hexadecimal digits, with dashes between. */
void hixl_boot_id(uint8_t out[16]) {
    char text[64] = "";
    size_t i, nibbles = 0;
    int fd = open("/proc/sys/kernel/random/boot_id", O_RDONLY | O_CLOEXEC);
    ssize_t got = fd >= 0 ? read(fd, text, sizeof text) : -1;
    if (fd >= 0) {
        close(fd);
    }
    memset(out, 0, 16);
    for (i = 0; got > 0 && i < (size_t)got && nibbles < 32; i++) {
        int value = hixl_hex_digit(text[i]);
        if (value >= 0) {
            out[nibbles / 2] = (uint8_t)(out[nibbles / 2] << 4 | value);
            nibbles++;
        }
    }
}

size_t hixl_slice_iov(const struct iovec *iov, size_t count, size_t skip, size_t max_bytes, struct iovec *out,
                      size_t limit) {
    size_t n = 0;
    while (n < count && n < limit && max_bytes > 0) {
        size_t bytes = iov[n].iov_len - skip;
        out[n].iov_base = (uint8_t *)iov[n].iov_base + skip;
        out[n].iov_len = bytes < max_bytes ? bytes : max_bytes;
        max_bytes -= out[n].iov_len;
        skip = 0;
        n++;
    }
    return n;
}

void hixl_advance_iov(const struct iovec *iov, size_t *index, size_t *skip, size_t bytes) {
    while (bytes > 0) {
        size_t left = iov[*index].iov_len - *skip;
        if (bytes < left) {
            *skip += bytes;
            return;
        }
        bytes -= left;
        *skip = 0;
        ++*index;
    }
}
