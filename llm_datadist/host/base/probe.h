/*
 * Ask the kernel whether bytes of this process may be read or written: unlike a look at them, that cannot fault.
 *
 * process_vm_readv and process_vm_writev on this process answer for many bytes in one call. Where a filter forbids
 * them, or the system has none, the bytes go through a pipe.
 */
#ifndef LLM_DATADIST_HOST_PROBE_H
#define LLM_DATADIST_HOST_PROBE_H

#include <stdbool.h>
#include <stddef.h>
#include <sys/uio.h>

enum { BASE_PROBE_MAX = 64 }; /* ranges per question */

/* A pipe, once it was needed. */
typedef struct {
    bool is_open;
    int read_fd, write_fd;
} base_probe;

/*
 * Each of `ranges` is one byte. The number of good ones before the first bad; -1: the kernel cannot be asked (errno).
 */
int base_probe_readable(base_probe *probe, const struct iovec *ranges, size_t count);

/*
 * The same for writing, which puts the byte of `from` there: what will be written anyway, so that no one sees another.
 */
int base_probe_writable(base_probe *probe, const struct iovec *from, const struct iovec *ranges, size_t count);

void base_probe_close(base_probe *probe);

#endif
