/*
 * The other end of a connection, for fuzz targets: an input in memory instead of a socket.
 *
 * A target includes the sources it is about after this header, which has their calls for sockets come here. So an
 * execution costs no system call, and what is sent is read byte by byte, where a system call would not let a sanitizer
 * see it. The first byte of an input says how many bytes come at a time; after the last one the peer has gone.
 */
#ifndef LLM_DATADIST_FUZZ_PEER_H
#define LLM_DATADIST_FUZZ_PEER_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

enum { PEER_FD = 1 << 20 }; /* no descriptor of this process */

typedef struct {
    const uint8_t *next;
    size_t left;
    size_t at_a_time; /* 0: all */
    bool paused;      /* the next call finds nothing yet */
    bool starved;     /* what is waited for will not come: the peer has gone whatever is left to read */
} peer_input;

static peer_input peer;
static volatile uint8_t peer_sink;

static void peer_start(const uint8_t *data, size_t size) {
    peer = (peer_input){.next = data, .left = size};
    if (size > 0) {
        peer.at_a_time = data[0] & 0x3f;
        peer.next++;
        peer.left--;
    }
}

/* How many bytes a call that has room for so many gets now; -1: none yet. */
static ssize_t peer_ready(size_t room) {
    size_t bytes = room < peer.left ? room : peer.left;
    if (peer.at_a_time != 0) {
        peer.paused = !peer.paused;
        if (peer.paused && peer.left > 0) {
            errno = EAGAIN;
            return -1;
        }
        bytes = bytes < peer.at_a_time ? bytes : peer.at_a_time;
    }
    return (ssize_t)bytes;
}

static void peer_took(size_t bytes) {
    peer.next += bytes;
    peer.left -= bytes;
}

static inline ssize_t peer_recv(int fd, void *data, size_t bytes, int flags) {
    ssize_t got;
    (void)fd;
    if (flags & MSG_PEEK) {
        size_t seen = bytes < peer.left ? bytes : peer.left;
        memcpy(data, peer.next, seen);
        peer.starved = seen < bytes;
        return (ssize_t)seen;
    }
    got = flags & MSG_DONTWAIT ? (ssize_t)(bytes < peer.left ? bytes : peer.left) : peer_ready(bytes);
    if (got > 0) {
        if (data != NULL) {
            memcpy(data, peer.next, (size_t)got);
        }
        peer_took((size_t)got);
    }
    return got;
}

static inline ssize_t peer_recvmsg(int fd, struct msghdr *message, int flags) {
    size_t i, room = 0;
    ssize_t got, left;
    (void)fd;
    (void)flags;
    for (i = 0; i < message->msg_iovlen; i++) {
        room += message->msg_iov[i].iov_len;
    }
    got = left = peer_ready(room);
    for (i = 0; left > 0; i++) {
        const struct iovec *part = &message->msg_iov[i];
        size_t bytes = part->iov_len < (size_t)left ? part->iov_len : (size_t)left;
        memcpy(part->iov_base, peer.next, bytes);
        peer_took(bytes);
        left -= (ssize_t)bytes;
    }
    return got;
}

static inline void peer_read(const void *data, size_t bytes) {
    const uint8_t *next = data;
    size_t i;
    if (bytes > 0) { /* the ends: what lies between is inside when they are */
        for (i = 0; i < bytes; i += bytes > 64 ? 61 : 1) {
            peer_sink ^= next[i];
        }
        peer_sink ^= next[bytes - 1];
    }
}

static inline ssize_t peer_send(int fd, const void *data, size_t bytes, int flags) {
    (void)fd;
    (void)flags;
    peer_read(data, bytes);
    return (ssize_t)bytes;
}

static inline ssize_t peer_sendmsg(int fd, const struct msghdr *message, int flags) {
    size_t i, bytes = 0;
    (void)fd;
    (void)flags;
    for (i = 0; i < message->msg_iovlen; i++) {
        peer_read(message->msg_iov[i].iov_base, message->msg_iov[i].iov_len);
        bytes += message->msg_iov[i].iov_len;
    }
    return (ssize_t)bytes;
}

static inline int peer_poll(struct pollfd *entries, nfds_t count, int timeout_ms) {
    (void)timeout_ms;
    if (count == 0) {
        return 0;
    }
    entries[0].revents = (short)(entries[0].events & (POLLIN | POLLOUT));
    if (peer.left == 0 || peer.starved || !(entries[0].events & (POLLIN | POLLOUT))) {
        entries[0].revents |= POLLRDHUP;
    }
    return 1;
}

static inline int peer_cond_timedwait(pthread_cond_t *cond, pthread_mutex_t *lock, const struct timespec *until) {
    (void)cond;
    (void)lock;
    (void)until;
    peer.starved = true; /* nobody else is there to wait for: the peer gives up */
    return ETIMEDOUT;
}

static inline int peer_close(int fd) {
    return fd == PEER_FD ? 0 : close(fd);
}

#define recv peer_recv
#define recvmsg peer_recvmsg
#define send peer_send
#define sendmsg peer_sendmsg
#define poll peer_poll
#define pthread_cond_timedwait peer_cond_timedwait
#define close peer_close

#endif
