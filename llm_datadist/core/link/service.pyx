"""The control service thread of an engine: answers peers' requests without the interpreter.

One thread per engine waits on epoll for listeners, handshakes and serving connections, and never takes the
GIL: a peer resolves, reads and releases while this process is busy in Python or in the model. It owns its
connections alone; other threads hand it work through commands that wait until they are carried out.

Nothing a peer sends is believed: frames are bounded before memory is taken for them, and a frame that does
not fit closes that connection only. The end of a serving connection ends every lease of that link.
"""
from libc.errno cimport EAGAIN, EINTR, EMFILE, ENFILE, errno
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memcpy, memset, strerror

from llm_datadist.core.base.atomic cimport ldd_add64
from llm_datadist.core.base.sockets cimport ldd_socket_tune
from llm_datadist.core.base.status cimport LDD_E_FAILED, LDD_OK, ldd_fail
from llm_datadist.core.base.sync cimport (
    LDD_NEVER, ldd_cond_broadcast, ldd_cond_destroy, ldd_cond_init, ldd_cond_wait_until, ldd_lock, ldd_mutex_destroy,
    ldd_mutex_init, ldd_now_ns, ldd_unlock,
)
from llm_datadist.core.link.accept cimport ldd_accept_hello
from llm_datadist.core.link.fork cimport ldd_fork_forget, ldd_fork_watch
from llm_datadist.core.link.links cimport MAX_LINKS, ldd_link_break, ldd_link_unref
from llm_datadist.core.link.region cimport ldd_regions_drop_peer
from llm_datadist.core.link.replies cimport ldd_reply, ldd_reply_end_leases, ldd_reply_ended
from llm_datadist.core.link.serve cimport ldd_serve_ended
from llm_datadist.core.link.service_conn cimport (
    COMMAND_LISTEN, COMMAND_SERVE, COMMAND_STOP, COMMAND_UNLISTEN, CONN_HANDSHAKE, CONN_LISTENER, CONN_PROVING,
    CONN_SERVING, ldd_bytes_append, ldd_bytes_consume, ldd_command, ldd_command_kind, ldd_conn, ldd_conn_add,
    ldd_conn_flush, ldd_conn_forget, ldd_conn_is_listed, pthread_t,
)
from llm_datadist.core.link.wire cimport (
    LDD_CHECKED_MAX_RANGES, LDD_FRAME_CHECKSUM, LDD_FRAME_HELLO, LDD_FRAME_PROOF, LDD_FRAME_RANGES, LDD_WIRE_MAGIC,
    LDD_WIRE_MAX_HELLO, LDD_WIRE_MAX_PAYLOAD, LDD_WIRE_MAX_RANGES, LDD_WIRE_VERSION, ldd_checked, ldd_checked_range,
    ldd_frame_header, ldd_hello, ldd_proof, ldd_range, ldd_ranges,
)
from llm_datadist.core.table.leases cimport ldd_table_expire

cdef extern from * nogil:
    """
    #include <errno.h>
    #include <pthread.h>
    #include <signal.h>
    #include <sys/epoll.h>
    #include <fcntl.h>
    #include <sys/eventfd.h>
    #include <sys/resource.h>
    #include <sys/socket.h>
    #include <time.h>
    #include <unistd.h>

    /* A thread that no signal is delivered to, with a stack for what it does. */
    static int ldd_service_spawn(pthread_t *thread, void *(*main)(void *), void *argument) {
        sigset_t all, before;
        pthread_attr_t attributes;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        pthread_attr_init(&attributes);
        pthread_attr_setstacksize(&attributes, 512 * 1024);
        int error = pthread_create(thread, &attributes, main, argument);
        pthread_attr_destroy(&attributes);
        pthread_sigmask(SIG_SETMASK, &before, NULL);
        return error;
    }

    static int ldd_epoll_wake(int epoll_fd, int wake_fd, void *who) {
        struct epoll_event event = {.events = EPOLLIN, .data = {.ptr = who}};
        return epoll_ctl(epoll_fd, EPOLL_CTL_ADD, wake_fd, &event) == 0 ? 0 : errno;
    }

    static unsigned long ldd_file_limit(void) {
        struct rlimit limit;
        return getrlimit(RLIMIT_NOFILE, &limit) == 0 ? (unsigned long)limit.rlim_cur : 1024;
    }

    static int ldd_spare_fd(void) {
        return open("/dev/null", O_RDONLY | O_CLOEXEC);
    }

    static void ldd_nap_ms(int ms) {
        struct timespec nap = {.tv_sec = 0, .tv_nsec = ms * 1000000L};
        nanosleep(&nap, NULL);
    }
    """
    ctypedef union epoll_data_t:
        void* ptr
    struct epoll_event:
        uint32_t events
        epoll_data_t data
    int EPOLLOUT, EPOLL_CLOEXEC
    int EFD_CLOEXEC, EFD_NONBLOCK, SOCK_NONBLOCK, SOCK_CLOEXEC
    int epoll_create1(int flags)
    int epoll_wait(int epoll_fd, epoll_event* events, int max_events, int timeout_ms)
    int eventfd(unsigned int value, int flags)
    int accept4(int fd, void* address, void* length, int flags)
    ssize_t recv(int fd, void* data, size_t nbytes, int flags)
    ssize_t read(int fd, void* data, size_t nbytes)
    ssize_t write(int fd, const void* data, size_t nbytes)
    int close(int fd)
    int pthread_join(pthread_t thread, void** result)
    int ldd_service_spawn(pthread_t* thread, void* (*main)(void*) noexcept nogil, void* argument)
    int ldd_epoll_wake(int epoll_fd, int wake_fd, void* who)
    void ldd_nap_ms(int ms)
    unsigned long ldd_file_limit()
    int ldd_spare_fd()

cdef enum:
    EVENTS_PER_WAIT = 64
    FILES_PER_LINK = 6                          # two here, four at the data server
    MIN_LINKS = 8
    MAX_HANDSHAKES = 256                        # a flood of silent connections costs no more than this
    MAX_UNREAD_BYTES = LDD_WIRE_MAX_PAYLOAD     # of answers; a peer that has so many waiting is not answered any more
    MAX_SMALL_REQUEST = 64                      # bytes of any request but RANGES, CHECKSUM and HELLO
    READ_BYTES = 4096
    READS_PER_TURN = 16


cdef enum ldd_outcome:
    CONN_GOES_ON
    CONN_LETS_OTHERS                            # its turn is over
    CONN_IS_OVER                                # and not yet forgotten
    CONN_IS_GONE


cdef bint _frame_fits(const ldd_conn* conn, const ldd_frame_header* header) noexcept nogil:
    """Whether such a frame may come now; checked before memory is taken for its payload."""
    if header.magic != LDD_WIRE_MAGIC:
        return False
    if conn.kind == CONN_HANDSHAKE:
        return header.type == LDD_FRAME_HELLO and (
            header.length == sizeof(ldd_hello) if header.version == LDD_WIRE_VERSION
            else header.length <= LDD_WIRE_MAX_HELLO)
    if header.version != LDD_WIRE_VERSION:
        return False
    if conn.kind == CONN_PROVING:
        return header.type == LDD_FRAME_PROOF and header.length == sizeof(ldd_proof)
    if header.type == LDD_FRAME_RANGES:
        return header.length <= sizeof(ldd_ranges) + LDD_WIRE_MAX_RANGES * sizeof(ldd_range)
    if header.type == LDD_FRAME_CHECKSUM:
        return header.length <= sizeof(ldd_checked) + LDD_CHECKED_MAX_RANGES * sizeof(ldd_checked_range)
    return header.length <= MAX_SMALL_REQUEST


cdef ldd_outcome _take_frames(ldd_service* service, ldd_conn* conn) noexcept nogil:
    """Answer the frames that are in the inbox as a whole."""
    cdef ldd_frame_header header
    cdef size_t at = 0
    cdef bint was_handshake, takes_long = False
    while conn.inbox.length - at >= sizeof(header):
        memcpy(&header, conn.inbox.data + at, sizeof(header))
        if not _frame_fits(conn, &header):
            ldd_add64(&service.num_rejected_frames, 1)
            return CONN_IS_OVER
        if conn.inbox.length - at < sizeof(header) + header.length:
            break
        takes_long = header.type == LDD_FRAME_CHECKSUM
        was_handshake = conn.kind == CONN_HANDSHAKE or conn.kind == CONN_PROVING
        if was_handshake:
            if not ldd_accept_hello(service, conn, &header, conn.inbox.data + at + sizeof(header)):
                return CONN_IS_OVER
            if header.version != LDD_WIRE_VERSION:
                ldd_add64(&service.num_rejected_frames, 1)
            elif not ldd_conn_is_listed(service, conn):
                return CONN_IS_GONE                 # the connection is the link's now
            elif conn.waits:
                break
        elif (conn.outbox.length > MAX_UNREAD_BYTES         # it asks on and on, and reads nothing
                or (takes_long and conn.inbox.length - at != sizeof(header) + header.length)    # or does not wait
                or not ldd_reply(service, conn, &header, conn.inbox.data + at + sizeof(header))):
            ldd_add64(&service.num_rejected_frames, 1)
            return CONN_IS_OVER
        at += sizeof(header) + header.length
    ldd_bytes_consume(&conn.inbox, at)
    if not ldd_conn_flush(service, conn):
        return CONN_IS_OVER
    return CONN_LETS_OTHERS if takes_long else CONN_GOES_ON


cdef bint _on_readable(ldd_service* service, ldd_conn* conn) noexcept nogil:
    """Read and answer what has come; False when the connection is over (and then not yet forgotten)."""
    cdef uint8_t chunk[READ_BYTES]
    cdef ssize_t count
    cdef ldd_outcome outcome
    cdef int _turn
    for _turn in range(READS_PER_TURN):
        count = recv(conn.fd, chunk, sizeof(chunk), 0)
        if count == 0:
            if conn.inbox.length and not conn.waits:
                ldd_add64(&service.num_rejected_frames, 1)        # it ends in the middle of a frame
            return False
        if count < 0:
            return errno == EAGAIN or errno == EINTR
        if conn.waits:                              # nothing is to come before it was answered
            ldd_add64(&service.num_rejected_frames, 1)
            return False
        if ldd_bytes_append(&conn.inbox, chunk, <size_t>count) < 0:
            return False
        outcome = _take_frames(service, conn)
        if outcome != CONN_GOES_ON:
            return outcome != CONN_IS_OVER
    return True                                     # epoll reports it again, after the others had their turn


cdef void _let_waiting_on(ldd_service* service) noexcept nogil:
    """A data server was made, or could not be: those who waited for it, or for the thread that made it, go on."""
    cdef ldd_conn* conn = service.conns
    cdef ldd_conn* following
    while conn != NULL:
        following = conn.next
        if conn.waits:
            conn.waits = False
            if _take_frames(service, conn) == CONN_IS_OVER:
                _end_conn(service, conn)
        conn = following
    if not service.makes_server:
        service.server_status = LDD_OK              # why it could not has been told


cdef void _end_conn(ldd_service* service, ldd_conn* conn) noexcept nogil:
    if conn.link != NULL:
        ldd_reply_ended(service, conn)
    else:
        ldd_conn_forget(service, conn, True)


cdef bint _make_room(ldd_service* service) noexcept nogil:
    """End the handshake that has waited longest: for its first frame, or else for the second connection of its link.

    A peer that means it goes on at once, so those that do not cannot keep others out.
    """
    cdef ldd_conn* conn = service.conns
    cdef ldd_conn* silent = NULL
    cdef ldd_conn* half = NULL
    while conn != NULL:                         # new ones come first in the list
        if conn.kind == CONN_HANDSHAKE or conn.kind == CONN_PROVING:
            silent = conn
        elif conn.deadline_ns:
            half = conn
        conn = conn.next
    if silent == NULL and half == NULL:
        return False
    _end_conn(service, silent if silent != NULL else half)
    return True


cdef void _refuse_connection(ldd_service* service, ldd_conn* listener) noexcept nogil:
    """Files have run out: end a handshake that goes on no more, or else let the newcomer know by closing."""
    cdef int fd
    if _make_room(service):
        return                                  # the listener stays readable: the next turn accepts
    if service.spare_fd >= 0:
        close(service.spare_fd)
        fd = accept4(listener.fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)
        if fd >= 0:
            close(fd)
        service.spare_fd = ldd_spare_fd()
    else:
        service.spare_fd = ldd_spare_fd()
        ldd_nap_ms(10)                          # do not spin meanwhile


cdef void _on_connection(ldd_service* service, ldd_conn* listener) noexcept nogil:
    cdef int fd
    while True:
        fd = accept4(listener.fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)
        if fd < 0:
            if errno == EMFILE or errno == ENFILE:
                _refuse_connection(service, listener)
            return
        ldd_socket_tune(fd)
        if service.num_handshakes >= MAX_HANDSHAKES and not _make_room(service):
            close(fd)
        elif ldd_conn_add(service, fd, CONN_HANDSHAKE) == NULL:
            close(fd)


cdef void _drop_command(ldd_command* command) noexcept nogil:
    """What it brought cannot be served."""
    close(command.fd)
    if command.link != NULL:
        ldd_link_break(command.link, b"the peer cannot be served")
        ldd_regions_drop_peer(&command.link.node.regions, command.link.token)
        ldd_link_unref(command.link)


cdef bint _run_commands(ldd_service* service) noexcept nogil:
    """Carry out what other threads asked for; False when the thread is to stop."""
    cdef ldd_command* command
    cdef ldd_conn* conn
    cdef bint go_on = True
    ldd_lock(&service.lock)
    while service.commands != NULL:
        command = service.commands
        service.commands = command.next
        if command.kind == COMMAND_STOP:
            go_on = False
        elif command.kind == COMMAND_UNLISTEN:
            conn = service.conns
            while conn != NULL and not (conn.fd == command.fd and conn.kind == CONN_LISTENER):
                conn = conn.next
            if conn != NULL:
                ldd_conn_forget(service, conn, True)
        else:
            conn = ldd_conn_add(service, command.fd, CONN_LISTENER if command.kind == COMMAND_LISTEN else CONN_SERVING)
            if conn != NULL:
                conn.link = command.link
            else:
                _drop_command(command)
        command.done = True
    ldd_cond_broadcast(&service.done)
    ldd_unlock(&service.lock)
    return go_on


cdef void _end_late_handshakes(ldd_service* service) noexcept nogil:
    cdef ldd_conn* conn = service.conns
    cdef ldd_conn* following
    cdef int64_t now = ldd_now_ns()
    while conn != NULL:
        following = conn.next
        if conn.deadline_ns and now > conn.deadline_ns:
            _end_conn(service, conn)
        conn = following


cdef void* _service_main(void* argument) noexcept nogil:
    cdef ldd_service* service = <ldd_service*>argument
    cdef epoll_event events[EVENTS_PER_WAIT]
    cdef ldd_conn* conn
    cdef uint64_t wakes
    cdef int i, count, woken
    cdef int64_t next_sweep_ns = 0
    if service.node.context != NULL:
        service.node.provider.acl.aclrtSetCurrentContext(service.node.context)
    while True:
        count = epoll_wait(service.epoll_fd, events, EVENTS_PER_WAIT,
                           0 if service.ending != NULL else 1000 if service.num_handshakes else -1)
        woken = 0
        for i in range(max(count, 0)):
            conn = <ldd_conn*>events[i].data.ptr
            if conn == <ldd_conn*>service:
                ldd_table_expire(service.node.table)
            elif conn == NULL:
                read(service.wake_fd, &wakes, sizeof(wakes))
                woken = 1
            elif count > 1 and not ldd_conn_is_listed(service, conn):
                continue
            elif conn.kind == CONN_LISTENER:
                _on_connection(service, conn)
            elif events[i].events & EPOLLOUT and not ldd_conn_flush(service, conn):
                _end_conn(service, conn)
            elif events[i].events & ~<uint32_t>EPOLLOUT and not _on_readable(service, conn):
                _end_conn(service, conn)
        if woken and not _run_commands(service):
            break
        if woken and ldd_serve_ended(service):
            _let_waiting_on(service)
        if service.ending != NULL:
            ldd_reply_end_leases(service)       # some of them, after others had their turn
        if service.num_handshakes and ldd_now_ns() > next_sweep_ns:
            _end_late_handshakes(service)
            next_sweep_ns = ldd_now_ns() + 500000000
    while service.conns != NULL:
        _end_conn(service, service.conns)
    while service.ending != NULL:
        ldd_reply_end_leases(service)
    return NULL


cdef bint _run(ldd_service* service, ldd_command* command) noexcept nogil:
    """Have a command carried out and wait for that; False when the thread has been told to stop."""
    cdef uint64_t one = 1
    cdef bint accepted
    command.done = False
    ldd_lock(&service.lock)
    accepted = not service.stopping
    if accepted:
        service.stopping = command.kind == COMMAND_STOP
        command.next = service.commands
        service.commands = command
        write(service.wake_fd, &one, sizeof(one))
        while not command.done:
            ldd_cond_wait_until(&service.done, &service.lock, LDD_NEVER)
    ldd_unlock(&service.lock)
    return accepted


cdef ldd_status ldd_service_start(ldd_service* service, ldd_node* node, ldd_detail* detail) noexcept nogil:
    cdef int error
    memset(service, 0, sizeof(ldd_service))
    service.node = node
    service.max_links = <uint32_t>min(max(ldd_file_limit() // FILES_PER_LINK, <unsigned long>MIN_LINKS),
                                      <unsigned long>MAX_LINKS)
    service.spare_fd = ldd_spare_fd()
    service.epoll_fd = epoll_create1(EPOLL_CLOEXEC)
    service.wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
    if service.epoll_fd < 0 or service.wake_fd < 0:
        error = errno
    else:
        ldd_mutex_init(&service.lock)
        ldd_cond_init(&service.done)
        ldd_mutex_init(&service.conns_lock)
        error = ldd_epoll_wake(service.epoll_fd, service.wake_fd, NULL)
        if error == 0 and node.table.lease_fd >= 0:
            error = ldd_epoll_wake(service.epoll_fd, node.table.lease_fd, service)
        if error == 0:                          # otherwise the thread would never hear of a command
            error = ldd_service_spawn(&service.thread, _service_main, service)
        if error == 0:
            service.running = True
            ldd_fork_watch(service)
            return LDD_OK
        ldd_cond_destroy(&service.done)
        ldd_mutex_destroy(&service.lock)
        ldd_mutex_destroy(&service.conns_lock)
    if service.epoll_fd >= 0:
        close(service.epoll_fd)
    if service.wake_fd >= 0:
        close(service.wake_fd)
    if service.spare_fd >= 0:
        close(service.spare_fd)
    return ldd_fail(detail, LDD_E_FAILED, b"cannot start the service thread: %s", strerror(error))


cdef void ldd_service_stop(ldd_service* service) noexcept nogil:
    cdef ldd_command command
    if not service.running:
        return
    memset(&command, 0, sizeof(command))
    command.kind = COMMAND_STOP
    _run(service, &command)
    pthread_join(service.thread, NULL)
    ldd_fork_forget(service)
    ldd_mutex_destroy(&service.conns_lock)
    service.running = False
    close(service.epoll_fd)
    close(service.wake_fd)
    if service.spare_fd >= 0:
        close(service.spare_fd)
    free(service.pending)
    service.pending = NULL
    service.num_pending = service.pending_capacity = 0
    # The lock and the condition stay: a late caller finds out by them that it is too late.


cdef void _command_with_fd(ldd_service* service, ldd_command_kind kind, int fd, ldd_link* link) noexcept nogil:
    cdef ldd_command command
    memset(&command, 0, sizeof(command))
    command.kind = kind
    command.fd = fd
    command.link = link
    if not _run(service, &command) and kind != COMMAND_UNLISTEN:
        _drop_command(&command)


cdef void ldd_service_serve(ldd_service* service, int fd, ldd_link* link) noexcept nogil:
    _command_with_fd(service, COMMAND_SERVE, fd, link)


cdef void ldd_service_listen(ldd_service* service, int fd) noexcept nogil:
    _command_with_fd(service, COMMAND_LISTEN, fd, NULL)


cdef void ldd_service_unlisten(ldd_service* service, int fd) noexcept nogil:
    _command_with_fd(service, COMMAND_UNLISTEN, fd, NULL)
