"""What plain TCP sockets do at best: a reference for benchmarks, used by nothing else.

One side serves memory, the other fetches it (or writes to it) over a number of connections, an equal share of the bytes
each. Both know the descriptors beforehand, so a request is a few bytes; the data goes with vectored calls straight from
and into place. Times are taken in C on the fetching side, from the first request to the last byte.

Nothing is authenticated: whoever reaches the port can read and write the memory that is served. It is open only while
a benchmark runs, on the address it was told.
"""
cimport cython
from libc.errno cimport EAGAIN, EINTR, ECONNRESET, errno
from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

import os
import socket

from llm_datadist.core.base.status cimport ldd_status
from llm_datadist.core.base.sync cimport ldd_now_ns

cdef extern from "team.h" nogil:
    ctypedef struct pthread_t:
        pass
    ctypedef struct bound_desc:
        uint64_t src
        uint64_t dst
        uint64_t length
    ctypedef struct bound_team:
        pass
    ctypedef void (*bound_work)(void* context, int index) noexcept nogil
    ldd_status bound_team_start(bound_team* team, int num_threads)
    void bound_team_run(bound_team* team, bound_work work, void* context)
    void bound_team_stop(bound_team* team)
    int bound_spawn(pthread_t* thread, void* (*body)(void*) noexcept nogil, void* argument)
    int pthread_join(pthread_t thread, void** result)

cdef extern from * nogil:
    """
    #include <netinet/in.h>
    #include <netinet/tcp.h>
    #include <poll.h>
    #include <sys/socket.h>
    #include <unistd.h>

    static void bound_no_delay(int fd) {
        int on = 1;
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    }
    """
    void bound_no_delay(int fd)

cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void* iov_base
        size_t iov_len

cdef extern from "<sys/socket.h>" nogil:
    struct msghdr:
        iovec* msg_iov
        size_t msg_iovlen
    int MSG_DONTWAIT, MSG_NOSIGNAL, MSG_WAITALL, SHUT_RDWR
    int accept(int fd, void* address, void* length)
    int shutdown(int fd, int how)
    ssize_t recv(int fd, void* data, size_t length, int flags)
    ssize_t send(int fd, const void* data, size_t length, int flags)
    ssize_t recvmsg(int fd, msghdr* message, int flags)
    ssize_t sendmsg(int fd, const msghdr* message, int flags)

cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    short POLLIN, POLLOUT
    int poll(pollfd* fds, unsigned long count, int timeout_ms)

cdef extern from "<unistd.h>" nogil:
    int close(int fd)

cdef enum:
    MAX_CONNECTIONS = 64
    IOVECS = 64                                 # per system call
    SLICE_BYTES = 4 << 20                       # ... and at most this much
    GO_GET = 1
    GO_PUT = 2

# Bytes [offset, offset + length) of all descriptors in a row.
ctypedef struct tcp_request:
    uint64_t op
    uint64_t offset
    uint64_t length

# How far a range has come.
ctypedef struct tcp_cursor:
    const bound_desc* desc
    uint64_t skip                               # bytes of it that are done
    uint64_t left                               # bytes of the range that are not

ctypedef struct tcp_served:
    tcp_server* server
    int fd
    pthread_t thread

ctypedef struct tcp_server:
    int fd
    const bound_desc* descs
    pthread_t acceptor
    int num_served
    tcp_served served[MAX_CONNECTIONS]

ctypedef struct tcp_connection:
    int fd
    tcp_request request
    tcp_cursor cursor
    int missing                                 # acknowledgement bytes of a put
    bint finished

ctypedef struct tcp_client:
    tcp_connection connections[MAX_CONNECTIONS]
    int num_connections
    int num_threads
    const bound_desc* descs
    int error                                   # errno of the first connection that failed


# ---------------------------------------------------------------------------------------------------- descriptors

cdef const uint64_t[:, ::1] _checked(object descs):
    cdef const uint64_t[:, ::1] rows = descs
    if rows.shape[1] != 3:
        raise ValueError(f"descriptors have shape ({rows.shape[0]}, {rows.shape[1]}); (n, 3) is needed")
    return rows


cdef const bound_desc* _first(const uint64_t[:, ::1] rows) noexcept:
    return <const bound_desc*>&rows[0, 0] if rows.shape[0] else NULL


# ------------------------------------------------------------------------------------------------- moving a range

cdef void _cursor_start(tcp_cursor* cursor, const bound_desc* descs, uint64_t offset, uint64_t length) noexcept nogil:
    cursor.desc = descs
    while length > 0 and offset >= cursor.desc.length:
        offset -= cursor.desc.length
        cursor.desc += 1
    cursor.skip = offset
    cursor.left = length


cdef size_t _cursor_slice(const tcp_cursor* cursor, bint is_src, iovec* out) noexcept nogil:
    """The next bytes of a range as chunks of memory; returns how many chunks."""
    cdef const bound_desc* desc = cursor.desc
    cdef uint64_t skip = cursor.skip, left = min(cursor.left, <uint64_t>SLICE_BYTES), part
    cdef size_t n = 0
    while left > 0 and n < IOVECS:
        part = min(left, desc.length - skip)
        out[n].iov_base = <void*>((desc.src if is_src else desc.dst) + skip)
        out[n].iov_len = part
        n += 1
        left -= part
        skip = 0
        desc += 1
    return n


cdef void _cursor_advance(tcp_cursor* cursor, uint64_t moved) noexcept nogil:
    cursor.left -= moved
    moved += cursor.skip
    while cursor.left > 0 and moved >= cursor.desc.length:
        moved -= cursor.desc.length
        cursor.desc += 1
    cursor.skip = moved


cdef int _move_some(int fd, tcp_cursor* cursor, bint is_send, int flags) noexcept nogil:
    """Move until the range ends, or until the kernel would block and `flags` forbid that. 0, or an errno."""
    cdef iovec iov[IOVECS]
    cdef msghdr message
    cdef ssize_t moved
    memset(&message, 0, sizeof(message))
    message.msg_iov = iov
    while cursor.left > 0:
        message.msg_iovlen = _cursor_slice(cursor, is_send, iov)
        moved = sendmsg(fd, &message, flags | MSG_NOSIGNAL) if is_send else recvmsg(fd, &message, flags)
        if moved > 0:
            _cursor_advance(cursor, <uint64_t>moved)
        elif moved == 0:
            return ECONNRESET
        elif errno == EAGAIN:
            return 0
        elif errno != EINTR:
            return errno
    return 0


# ------------------------------------------------------------------------------------------------- the served side

cdef void* _serve(void* argument) noexcept nogil:
    cdef tcp_served* served = <tcp_served*>argument
    cdef tcp_request request
    cdef tcp_cursor cursor
    cdef char done = 1
    while recv(served.fd, &request, sizeof(request), MSG_WAITALL) == sizeof(request):
        _cursor_start(&cursor, served.server.descs, request.offset, request.length)
        if _move_some(served.fd, &cursor, request.op == GO_GET, 0) != 0:
            break
        if request.op == GO_PUT and send(served.fd, &done, 1, MSG_NOSIGNAL) != 1:
            break
    return NULL


cdef void* _accept_all(void* argument) noexcept nogil:
    cdef tcp_server* server = <tcp_server*>argument
    cdef tcp_served* served
    cdef int fd
    while server.num_served < MAX_CONNECTIONS:
        fd = accept(server.fd, NULL, NULL)
        if fd < 0:
            return NULL
        bound_no_delay(fd)
        served = &server.served[server.num_served]
        served.server = server
        served.fd = fd
        if bound_spawn(&served.thread, _serve, served) != 0:
            close(fd)
            return NULL
        server.num_served += 1
    return NULL


@cython.final
cdef class TcpServer:
    """Serves the source side of descriptors (and takes their destination side) until it is closed.

    Parameters
    ----------
    ip : str
        Address to listen at, IPv4; the port is one that was free.
    descs : buffer of uint64, shape (n, 3), C-contiguous
        Rows (source address, destination address, bytes); a get reads the sources here, a put writes the destinations.
    """
    cdef tcp_server* _server
    cdef const uint64_t[:, ::1] _rows           # whose memory the descriptors are read from
    cdef readonly int port

    def __init__(self, str ip, descs):
        if self.port:
            raise RuntimeError("a TcpServer is initialised once")
        self._rows = _checked(descs)
        with socket.create_server((ip, 0), backlog=MAX_CONNECTIONS) as listener:
            self._server = <tcp_server*>calloc(1, sizeof(tcp_server))
            if self._server == NULL:
                raise MemoryError()
            self.port = listener.getsockname()[1]
            self._server.descs = _first(self._rows)
            self._server.fd = listener.detach()
        if bound_spawn(&self._server.acceptor, _accept_all, self._server) != 0:
            close(self._server.fd)
            free(self._server)
            self._server = NULL
            raise MemoryError("cannot start the thread of a reference server")

    def __dealloc__(self):
        self.close()

    def close(self):
        """Stop serving; the memory is no longer touched when this returns. Idempotent."""
        cdef int i
        if self._server == NULL:
            return
        with nogil:
            shutdown(self._server.fd, SHUT_RDWR)        # ends the accept
            pthread_join(self._server.acceptor, NULL)
            close(self._server.fd)
            for i in range(self._server.num_served):
                shutdown(self._server.served[i].fd, SHUT_RDWR)
                pthread_join(self._server.served[i].thread, NULL)
                close(self._server.served[i].fd)
        free(self._server)
        self._server = NULL


# ----------------------------------------------------------------------------------------------- the fetching side

cdef bint _advance(tcp_client* client, tcp_connection* connection, int flags) noexcept nogil:
    """Go on with one connection; False when it failed."""
    cdef bint is_put = connection.request.op == GO_PUT
    cdef char done
    cdef ssize_t got
    cdef int error = _move_some(connection.fd, &connection.cursor, is_put, flags)
    if error == 0 and connection.cursor.left == 0 and connection.missing:
        got = recv(connection.fd, &done, 1, flags)
        if got == 1:
            connection.missing = 0
        elif got == 0:
            error = ECONNRESET
        elif errno != EAGAIN and errno != EINTR:
            error = errno
    if error:
        client.error = error
    connection.finished = error != 0 or (connection.cursor.left == 0 and not connection.missing)
    return error == 0


cdef void _fetch(void* context, int index) noexcept nogil:
    """One thread's connections: every num_threads-th. Alone it blocks in the calls, several are polled."""
    cdef tcp_client* client = <tcp_client*>context
    cdef pollfd waiting[MAX_CONNECTIONS]
    cdef tcp_connection* connection
    cdef int i, count, flags = 0 if client.num_connections <= client.num_threads else MSG_DONTWAIT
    i = index
    while i < client.num_connections:
        connection = &client.connections[i]
        if send(connection.fd, &connection.request, sizeof(tcp_request), MSG_NOSIGNAL) != sizeof(tcp_request):
            client.error = errno
            return
        i += client.num_threads
    while True:
        count = 0
        i = index
        while i < client.num_connections:
            connection = &client.connections[i]
            if not connection.finished and not _advance(client, connection, flags):
                return
            if not connection.finished:
                waiting[count].fd = connection.fd
                waiting[count].events = (
                    POLLOUT if connection.request.op == GO_PUT and connection.cursor.left else POLLIN)
                count += 1
            i += client.num_threads
        if count == 0:
            return
        poll(waiting, count, -1)


@cython.final
cdef class TcpClient:
    """Fetches what a `TcpServer` serves, or writes to it.

    Parameters
    ----------
    ip : str
    port : int
        Where the server listens.
    descs : buffer of uint64, shape (n, 3), C-contiguous
        As the server has them, with this side's addresses: destinations of a get, sources of a put.
    num_connections : int
        1 to 64.
    num_threads : int
        1 to `num_connections`, the calling thread included.
    """
    cdef tcp_client _client
    cdef const uint64_t[:, ::1] _rows           # whose memory the descriptors are read from
    cdef bound_team _team
    cdef readonly uint64_t num_bytes

    def __cinit__(self):
        memset(&self._client, 0, sizeof(self._client))
        memset(&self._team, 0, sizeof(self._team))

    def __init__(self, str ip, int port, descs, int num_connections, int num_threads):
        cdef ldd_status status
        cdef Py_ssize_t i
        if self._client.num_threads:
            raise RuntimeError("a TcpClient is initialised once")
        if not 1 <= num_threads <= num_connections <= MAX_CONNECTIONS:
            raise ValueError(f"num_threads={num_threads}, num_connections={num_connections} are not allowed; "
                             f"1 <= num_threads <= num_connections <= {MAX_CONNECTIONS}")
        self._rows = _checked(descs)
        for i in range(self._rows.shape[0]):
            self.num_bytes += self._rows[i, 2]
        self._client.descs = _first(self._rows)
        self._client.num_threads = num_threads
        while self._client.num_connections < num_connections:
            connection = socket.create_connection((ip, port), timeout=10)
            connection.settimeout(None)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._client.connections[self._client.num_connections].fd = connection.detach()
            self._client.num_connections += 1
        with nogil:
            status = bound_team_start(&self._team, num_threads)
        if status < 0:
            raise MemoryError("cannot start the threads of a reference client")

    def __dealloc__(self):
        self.close()

    def close(self):
        """End the connections. Idempotent."""
        cdef int i
        with nogil:
            bound_team_stop(&self._team)
            for i in range(self._client.num_connections):
                close(self._client.connections[i].fd)
        self._client.num_connections = 0

    def run(self, bint put=False):
        """Move everything once, and return the nanoseconds it took.

        Raises
        ------
        OSError
            A connection failed. Close the client then.
        """
        cdef uint64_t share, offset = 0
        cdef tcp_connection* connection
        cdef int64_t took_ns
        cdef int i
        if self._client.num_connections == 0:
            raise ValueError("the reference client is closed")
        share = (self.num_bytes + self._client.num_connections - 1) // self._client.num_connections
        for i in range(self._client.num_connections):
            connection = &self._client.connections[i]
            connection.request.op = GO_PUT if put else GO_GET
            connection.request.offset = offset
            connection.request.length = min(share, self.num_bytes - offset)
            _cursor_start(&connection.cursor, self._client.descs, offset, connection.request.length)
            offset += connection.request.length
            connection.missing = 1 if put else 0
            connection.finished = False
        self._client.error = 0
        with nogil:
            took_ns = ldd_now_ns()
            bound_team_run(&self._team, _fetch, &self._client)
            took_ns = ldd_now_ns() - took_ns
        if self._client.error:
            raise OSError(self._client.error, f"reference connection: {os.strerror(self._client.error)}")
        return took_ns
