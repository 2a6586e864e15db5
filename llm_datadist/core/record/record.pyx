"""What an engine records of itself while it runs: made, given up, and divided among its peers here.

Always on are counters and latency histograms by peer and operation; a ring of events can be switched on. Recording is
inline code of ``llm_datadist/ldd_record.h``, which also is the layout: any thread records without a lock and without
the GIL, at the cost of a few atomic additions. This module is called when an engine opens and ends, and when links
change.

Others see it without the engine's help, also while the process is stopped or stuck. The record lies in a memory file,
``memfd:llm_datadist-record``, which this process keeps open: a reader finds it in ``/proc/PID/fd``, which the kernel
shows to processes of the same user alone, and it is gone with the process, however that ends. So there is no name that
could be left over, no socket to answer, and no thread that a reader could keep busy. The file is sealed: readers can
neither write nor resize it. A child that was forked has inherited the file; its ``pid`` tells whose it is.

Where a folder is given for traces, the record is a file there instead (``*.ldd-record``, mode 0600), so that the events
of a process that was killed are not lost. Whoever gave the folder removes it.

A record holds no bytes of caches and no token: ids of clusters, requests and caches, addresses of peers, numbers.
"""
from contextvars import ContextVar

from libc.errno cimport errno
from libc.stddef cimport size_t
from libc.stdint cimport uint64_t
from libc.string cimport memset, strerror, strncpy

from llm_datadist.core.base.atomic cimport ldd_get64, ldd_set32, ldd_set64
from llm_datadist.core.base.status cimport LDD_E_FAILED, LDD_OK, ldd_fail
from llm_datadist.core.base.sync cimport ldd_lock, ldd_mutex_destroy, ldd_mutex_init, ldd_now_ns, ldd_unlock

# The trace that the caller of a transfer works for: its id, high and low, and the span of the caller.
trace_context = ContextVar("llm_datadist.trace_context", default=None)

cdef extern from * nogil:
    """
    #include <fcntl.h>
    #include <stdint.h>
    #include <stdio.h>
    #include <sys/mman.h>
    #include <time.h>
    #include <unistd.h>

    #ifndef F_ADD_SEALS
    #define F_ADD_SEALS 1033
    #endif
    #ifndef F_SEAL_FUTURE_WRITE
    #define F_SEAL_FUTURE_WRITE 16              /* Linux 5.1 */
    #endif

    static void *ldd_record_map(int fd, size_t bytes) {
        void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_NORESERVE | (fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS
                                                                                     : MAP_SHARED), fd, 0);
        return at == MAP_FAILED ? NULL : at;
    }

    /* A sealed memory file, mapped; `*out` can only be read from. NULL without one. */
    static void *ldd_record_memory(size_t bytes, int *out) {
        char path[64];
        void *at = NULL;
        int fd = memfd_create("llm_datadist-record", MFD_CLOEXEC | MFD_ALLOW_SEALING);
        *out = -1;
        if (fd < 0) return NULL;
        if (fchmod(fd, 0400) == 0 && ftruncate(fd, (off_t)bytes) == 0) at = ldd_record_map(fd, bytes);
        if (at && fcntl(fd, F_ADD_SEALS, 1 | 2 | 4 | F_SEAL_FUTURE_WRITE) == 0) {       /* seal, shrink, grow */
            snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
            *out = open(path, O_RDONLY | O_CLOEXEC);
        }
        close(fd);
        if (at && *out < 0) {
            munmap(at, bytes);
            return NULL;
        }
        return at;
    }

    /* A new file, all of whose space is taken now: a full disk must not end the process later. */
    static void *ldd_record_file(const char *path, size_t bytes, int *out) {
        void *at = NULL;
        int error = 0, fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600);
        *out = fd;
        if (fd < 0) return NULL;
        error = posix_fallocate(fd, 0, (off_t)bytes);
        if (error == 0) at = ldd_record_map(fd, bytes);
        if (at) return at;
        if (error) errno = error;
        error = errno;
        close(fd);
        unlink(path);
        errno = error;
        *out = -1;
        return NULL;
    }

    static void ldd_record_boot_id(char *text, size_t size) {
        int fd = open("/proc/sys/kernel/random/boot_id", O_RDONLY | O_CLOEXEC);
        ssize_t count = fd < 0 ? 0 : read(fd, text, size - 1);
        if (fd >= 0) close(fd);
        while (count > 0 && text[count - 1] <= ' ') count--;
        text[count > 0 ? count : 0] = 0;
    }

    static int64_t ldd_record_realtime_ns(void) {
        struct timespec now;
        clock_gettime(CLOCK_REALTIME, &now);
        return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
    }
    """
    void* ldd_record_map(int fd, size_t num_bytes)
    void* ldd_record_memory(size_t num_bytes, int* out)
    void* ldd_record_file(const char* path, size_t num_bytes, int* out)
    void ldd_record_boot_id(char* text, size_t size)
    int64_t ldd_record_realtime_ns()
    int munmap(void* at, size_t num_bytes)
    int close(int fd)
    int getpid()


cdef ldd_status ldd_record_create(ldd_record* record, const char* path, ldd_detail* detail) noexcept nogil:
    cdef size_t peers_bytes = LDD_RECORD_PEERS * sizeof(ldd_peer_record)
    cdef ldd_record_head* head
    cdef void* at
    memset(record, 0, sizeof(ldd_record))
    record.bytes = LDD_RECORD_HEAD_BYTES + peers_bytes + LDD_RECORD_EVENTS * sizeof(ldd_event)
    if path != NULL:
        at = ldd_record_file(path, record.bytes, &record.fd)
        if at == NULL:
            return ldd_fail(detail, LDD_E_FAILED, b"LLM_DATADIST_TRACE: no file for the trace: %s: %s", strerror(errno),
                            path)
    else:
        at = ldd_record_memory(record.bytes, &record.fd)
        if at == NULL:                          # nobody else sees it then
            at = ldd_record_map(-1, record.bytes)
    if at == NULL:
        return LDD_OK                           # an engine that records nothing works as well
    ldd_mutex_init(&record.lock)
    head = <ldd_record_head*>at
    record.peers = <ldd_peer_record*>(<char*>at + LDD_RECORD_HEAD_BYTES)
    record.ring = <ldd_event*>(<char*>at + LDD_RECORD_HEAD_BYTES + peers_bytes)
    head.peers_offset = LDD_RECORD_HEAD_BYTES
    head.peer_bytes = sizeof(ldd_peer_record)
    head.num_peers = LDD_RECORD_PEERS
    head.num_ops = LDD_NUM_OPS
    head.num_buckets = LDD_RECORD_BUCKETS
    head.ring_offset = <uint32_t>(LDD_RECORD_HEAD_BYTES + peers_bytes)
    head.ring_capacity = LDD_RECORD_EVENTS
    head.event_bytes = sizeof(ldd_event)
    head.pid = <uint32_t>getpid()
    head.table_fd = head.marks_fd = -1
    ldd_record_boot_id(head.boot_id, sizeof(head.boot_id))
    head.start_ns = ldd_now_ns()
    head.realtime_ns = ldd_record_realtime_ns()
    ldd_set64(&head.magic, LDD_RECORD_MAGIC)
    record.head = head
    return LDD_OK


cdef void ldd_record_hide(ldd_record* record) noexcept nogil:
    if record.head != NULL and record.fd >= 0:
        close(record.fd)
        record.fd = -1


cdef void ldd_record_destroy(ldd_record* record) noexcept nogil:
    if record.head != NULL:
        ldd_record_hide(record)
        munmap(record.head, record.bytes)
        ldd_mutex_destroy(&record.lock)
    record.head = NULL
    record.tracing = False


cdef void ldd_record_set_tracing(ldd_record* record, bint on) noexcept nogil:
    if record.head != NULL:
        ldd_set32(&record.head.tracing, on)
        ldd_set32(&record.tracing, on)


cdef void _forget_locked(ldd_record* record, ldd_peer_record* peer) noexcept nogil:
    """Add what was counted to the first record, so that sums never shrink, and free this one."""
    cdef ldd_op_record* into
    cdef ldd_op_record* op
    cdef uint32_t i, k
    for i in range(LDD_NUM_OPS):
        into = &record.peers[0].ops[i]
        op = &peer.ops[i]
        ldd_set64(&into.failures, ldd_get64(&into.failures) + ldd_get64(&op.failures))
        ldd_set64(&into.bytes, ldd_get64(&into.bytes) + ldd_get64(&op.bytes))
        ldd_set64(&into.total_ns, ldd_get64(&into.total_ns) + ldd_get64(&op.total_ns))
        for k in range(LDD_RECORD_BUCKETS):
            if ldd_get64(&op.buckets[k]):
                ldd_set64(&into.buckets[k], ldd_get64(&into.buckets[k]) + ldd_get64(&op.buckets[k]))
    ldd_set64(&record.peers[0].num_broken, record.peers[0].num_broken + peer.num_broken)
    ldd_set64(&record.peers[0].num_opened, record.peers[0].num_opened + peer.num_opened)
    memset(peer, 0, sizeof(ldd_peer_record))


cdef ldd_peer_record* _peer_locked(ldd_record* record, uint64_t cluster_id) noexcept nogil:
    cdef ldd_peer_record* peer
    cdef ldd_peer_record* oldest = NULL
    cdef uint32_t i
    for i in range(1, LDD_RECORD_PEERS):
        peer = &record.peers[i]
        if peer.used_ns == 0:                   # they are taken in order, and never left empty
            oldest = peer
            break
        if peer.cluster_id == cluster_id:
            return peer
        if peer.num_links == 0 and (oldest == NULL or peer.used_ns < oldest.used_ns):
            oldest = peer
    if oldest == NULL:
        return record.peers                     # all have links: this one is counted among the unknown
    if oldest.used_ns:
        # An operation that ends just now may still be counted for its successor, which spoils no sum.
        _forget_locked(record, oldest)
    oldest.cluster_id = cluster_id
    ldd_set64(&oldest.used_ns, <uint64_t>ldd_now_ns())
    return oldest


cdef ldd_peer_record* ldd_record_peer(ldd_record* record, uint64_t cluster_id) noexcept nogil:
    cdef ldd_peer_record* peer
    if record.head == NULL:
        return NULL
    ldd_lock(&record.lock)
    peer = _peer_locked(record, cluster_id)
    ldd_unlock(&record.lock)
    return peer


cdef ldd_peer_record* ldd_record_linked(ldd_record* record, uint64_t cluster_id, uint32_t state, const char* peer_ip,
                                        int kind) noexcept nogil:
    cdef ldd_peer_record* peer
    if record.head == NULL:
        return NULL
    ldd_lock(&record.lock)
    peer = _peer_locked(record, cluster_id)
    ldd_set64(&peer.num_links, peer.num_links + 1)
    ldd_set64(&peer.num_opened, peer.num_opened + 1)
    ldd_set32(&peer.state, state)
    strncpy(peer.peer_ip, peer_ip, sizeof(peer.peer_ip) - 1)
    ldd_unlock(&record.lock)
    if kind:
        ldd_trace(record, kind, cluster_id, 0, 0, 0)
    return peer


cdef void ldd_record_unlinked(ldd_record* record, ldd_peer_record* peer, uint32_t state) noexcept nogil:
    if record.head == NULL or peer == NULL:
        return
    ldd_lock(&record.lock)
    ldd_set64(&peer.num_links, peer.num_links - 1)
    if peer.num_links == 0:                     # another link to that cluster may be there
        ldd_set32(&peer.state, state)
    ldd_unlock(&record.lock)
    ldd_trace(record, LDD_EVENT_UNLINK, peer.cluster_id, 0, 0, 0)


cdef void ldd_record_broken(ldd_record* record, ldd_peer_record* peer, uint32_t state,
                            const char* reason) noexcept nogil:
    if record.head == NULL or peer == NULL:
        return
    ldd_lock(&record.lock)
    ldd_set64(&peer.num_broken, peer.num_broken + 1)
    ldd_set32(&peer.state, state)
    strncpy(peer.reason, reason, sizeof(peer.reason) - 1)
    ldd_unlock(&record.lock)
    ldd_trace(record, LDD_EVENT_BREAK, peer.cluster_id, 0, 0, LDD_E_FAILED)


def layout():
    """Sizes and offsets of the record, for whoever reads it in another language: name to bytes."""
    cdef ldd_record_head head
    cdef ldd_peer_record peer
    cdef ldd_op_record op
    cdef ldd_event event
    return {
        "head": sizeof(head), "peer": sizeof(peer), "op": sizeof(op), "event": sizeof(event),
        "head.cluster_id": <size_t>&head.cluster_id - <size_t>&head,
        "head.boot_id": <size_t>&head.boot_id[0] - <size_t>&head,
        "head.start_ns": <size_t>&head.start_ns - <size_t>&head,
        "head.role": <size_t>&head.role[0] - <size_t>&head,
        "head.listener": <size_t>&head.listener[0] - <size_t>&head,
        "head.next_ticket": <size_t>&head.next_ticket - <size_t>&head,
        "head.dropped": <size_t>&head.dropped - <size_t>&head,
        "head.max_caches": <size_t>&head.max_caches - <size_t>&head,
        "head.num_holds": <size_t>&head.num_holds - <size_t>&head,
        "peer.state": <size_t>&peer.state - <size_t>&peer,
        "peer.reason": <size_t>&peer.reason[0] - <size_t>&peer,
        "peer.ops": <size_t>&peer.ops[0] - <size_t>&peer,
        "op.buckets": <size_t>&op.buckets[0] - <size_t>&op,
        "event.bytes": <size_t>&event.bytes - <size_t>&event,
        "event.key_kind": <size_t>&event.key_kind - <size_t>&event,
    }


def bucket(int64_t duration_ns):
    """The index of the histogram's bucket that a duration falls into."""
    return ldd_record_bucket(duration_ns)
