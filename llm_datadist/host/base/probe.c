/* Whether bytes of this process may be read or written; see base/probe.h. */
#define _GNU_SOURCE
#include "base/probe.h"

#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <unistd.h>

static bool open_pipe(base_probe *probe) {
    int ends[2];
    if (!probe->is_open && pipe2(ends, O_CLOEXEC | O_NONBLOCK) == 0) {
        *probe = (base_probe){true, ends[0], ends[1]};
    }
    return probe->is_open;
}

/* One byte from `from` into the pipe and out of it into `to`: 1 good, 0 a bad address, -1 neither. */
static int pass(const base_probe *probe, const void *from, void *to) {
    ssize_t moved;
    while ((moved = write(probe->write_fd, from, 1)) < 0 && errno == EINTR) {
    }
    if (moved == 1) {
        while ((moved = read(probe->read_fd, to, 1)) < 0 && errno == EINTR) {
        }
        if (moved < 0 && errno == EFAULT) { /* the byte is still in the pipe */
            uint8_t byte;
            moved = read(probe->read_fd, &byte, 1) == 1 ? 0 : -1;
        }
        return (int)moved;
    }
    return moved < 0 && errno == EFAULT ? 0 : -1;
}

static int pass_all(base_probe *probe, const struct iovec *from, const struct iovec *to, size_t count) {
    size_t i;
    if (!open_pipe(probe)) {
        return -1;
    }
    for (i = 0; i < count; i++) {
        int good = pass(probe, from[i].iov_base, to[i].iov_base);
        if (good <= 0) {
            return good < 0 ? -1 : (int)i;
        }
    }
    return (int)count;
}

int base_probe_readable(base_probe *probe, const struct iovec *ranges, size_t count) {
    uint8_t bytes[BASE_PROBE_MAX];
    struct iovec here[BASE_PROBE_MAX];
    ssize_t good;
    size_t i;
    for (i = 0; i < count; i++) {
        here[i] = (struct iovec){.iov_base = &bytes[i], .iov_len = 1};
    }
    good = probe->is_open ? -1 : process_vm_readv(getpid(), here, count, ranges, count, 0);
    if (good >= 0 || (!probe->is_open && errno == EFAULT)) {
        return good < 0 ? 0 : (int)good;
    }
    return pass_all(probe, ranges, here, count);
}

int base_probe_writable(base_probe *probe, const struct iovec *from, const struct iovec *ranges, size_t count) {
    ssize_t good = probe->is_open ? -1 : process_vm_writev(getpid(), from, count, ranges, count, 0);
    if (good >= 0 || (!probe->is_open && errno == EFAULT)) {
        return good < 0 ? 0 : (int)good;
    }
    return pass_all(probe, from, ranges, count);
}

void base_probe_close(base_probe *probe) {
    if (probe->is_open) {
        probe->is_open = false;
        close(probe->read_fd);
        close(probe->write_fd);
    }
}
