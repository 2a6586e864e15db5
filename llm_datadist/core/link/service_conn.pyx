"""Connections of the service thread: their buffers, and the list they are in.

Sockets never block: what cannot be sent waits in the outbox until the socket is writable.
"""
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memcpy, memmove

from llm_datadist.core.base.status cimport LDD_E_NO_MEMORY, LDD_OK
from llm_datadist.core.base.sync cimport ldd_lock, ldd_now_ns, ldd_unlock
from llm_datadist.core.link.wire cimport LDD_WIRE_MAGIC, LDD_WIRE_VERSION, ldd_frame_header

cdef extern from * nogil:
    """
    #include <sys/epoll.h>
    #include <sys/socket.h>
    #include <unistd.h>

    static int ldd_epoll(int epoll_fd, int operation, int fd, uint32_t events, void *conn) {
        struct epoll_event event = {.events = events, .data = {.ptr = conn}};
        return epoll_ctl(epoll_fd, operation, fd, &event);
    }
    """
    int EPOLLIN, EPOLLOUT, EPOLL_CTL_ADD, EPOLL_CTL_DEL, EPOLL_CTL_MOD, MSG_NOSIGNAL
    ssize_t send(int fd, const void* data, size_t nbytes, int flags)
    int close(int fd)
    int ldd_epoll(int epoll_fd, int operation, int fd, uint32_t events, void* conn)

cdef enum:
    HANDSHAKE_TIMEOUT_MS = 5000


cdef ldd_status ldd_bytes_append(ldd_bytes* out, const void* data, size_t nbytes) noexcept nogil:
    cdef size_t capacity
    cdef uint8_t* grown
    if out.length + nbytes > out.capacity:
        capacity = max(out.length + nbytes, out.capacity * 2)
        grown = <uint8_t*>realloc(out.data, capacity)
        if grown == NULL:
            return LDD_E_NO_MEMORY
        out.data = grown
        out.capacity = capacity
    if nbytes:
        memcpy(out.data + out.length, data, nbytes)
    out.length += nbytes
    return LDD_OK


cdef void ldd_bytes_consume(ldd_bytes* out, size_t nbytes) noexcept nogil:
    out.length -= nbytes
    if out.length:
        memmove(out.data, out.data + nbytes, out.length)


cdef ldd_conn* ldd_conn_add(ldd_service* service, int fd, ldd_conn_kind kind) noexcept nogil:
    cdef ldd_conn* conn = <ldd_conn*>calloc(1, sizeof(ldd_conn))
    if conn == NULL:
        return NULL
    conn.fd = fd
    conn.kind = kind
    ldd_lock(&service.conns_lock)
    conn.next = service.conns
    conn.at = &service.conns
    if conn.next != NULL:
        conn.next.at = &conn.next
    service.conns = conn
    ldd_unlock(&service.conns_lock)
    if kind == CONN_HANDSHAKE:
        service.num_handshakes += 1
        conn.deadline_ns = ldd_now_ns() + <int64_t>HANDSHAKE_TIMEOUT_MS * 1000000
    if ldd_epoll(service.epoll_fd, EPOLL_CTL_ADD, fd, EPOLLIN, conn) != 0:
        ldd_conn_forget(service, conn, False)       # the kernel has no memory: nobody would ever look after it
        return NULL
    return conn


cdef void ldd_conn_forget(ldd_service* service, ldd_conn* conn, bint close_fd) noexcept nogil:
    """Out of epoll and the list; frees it. The link reference is the caller's."""
    ldd_epoll(service.epoll_fd, EPOLL_CTL_DEL, conn.fd, 0, NULL)
    if conn.deadline_ns:
        service.num_handshakes -= 1
    ldd_lock(&service.conns_lock)
    conn.at[0] = conn.next
    if conn.next != NULL:
        conn.next.at = conn.at
    if close_fd:
        close(conn.fd)                              # a child has closed its copy, or has none
    ldd_unlock(&service.conns_lock)
    free(conn.greeting)
    free(conn.inbox.data)
    free(conn.outbox.data)
    free(conn)


cdef bint ldd_conn_flush(ldd_service* service, ldd_conn* conn) noexcept nogil:
    """Send what the socket takes; False when the connection is over."""
    cdef size_t sent = 0
    cdef ssize_t count
    while sent < conn.outbox.length:
        count = send(conn.fd, conn.outbox.data + sent, conn.outbox.length - sent, MSG_NOSIGNAL)
        if count > 0:
            sent += count
        elif count < 0 and errno == EINTR:
            continue
        elif count < 0 and errno == EAGAIN:
            break
        else:
            return False
    ldd_bytes_consume(&conn.outbox, sent)
    if conn.outbox.length == 0 and conn.closing:
        return False
    if (conn.outbox.length != 0) != conn.wants_write:
        conn.wants_write = not conn.wants_write
        ldd_epoll(service.epoll_fd, EPOLL_CTL_MOD, conn.fd, EPOLLIN | (EPOLLOUT if conn.wants_write else 0), conn)
    return True


cdef ldd_status ldd_conn_reply(ldd_conn* conn, uint32_t request_id, uint32_t type, const void* fixed,
                               size_t fixed_bytes, const void* rest, size_t rest_bytes) noexcept nogil:
    cdef ldd_frame_header header
    header.magic = LDD_WIRE_MAGIC
    header.version = LDD_WIRE_VERSION
    header.type = <uint16_t>type
    header.length = <uint32_t>(fixed_bytes + rest_bytes)
    header.request_id = request_id
    if (ldd_bytes_append(&conn.outbox, &header, sizeof(header)) < 0
            or ldd_bytes_append(&conn.outbox, fixed, fixed_bytes) < 0
            or ldd_bytes_append(&conn.outbox, rest, rest_bytes) < 0):
        return LDD_E_NO_MEMORY
    return LDD_OK


cdef bint ldd_conn_is_listed(const ldd_service* service, const ldd_conn* conn) noexcept nogil:
    """An earlier event of the same batch may have ended the connection of a later one."""
    cdef ldd_conn* at = service.conns
    while at != NULL and at != conn:
        at = at.next
    return at != NULL
