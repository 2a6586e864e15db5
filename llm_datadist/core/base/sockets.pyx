"""Stream sockets with absolute deadlines, for threads that hold no GIL.

Sockets are non-blocking; every wait is a poll that ends at a monotonic deadline. A thread that came from
Python looks for signals and a cancel between slices of such a wait, so they are noticed within `SIGNAL_SLICE_MS`;
`LDD_E_INTERRUPTED` then means that an exception is set. A connection that ends under a send
or a receive is `LDD_E_NOT_LINKED`, however the kernel calls it.
"""
from libc.errno cimport errno, EAGAIN, EINTR, EINPROGRESS
from libc.stdint cimport int64_t
from libc.string cimport strerror
from llm_datadist.core.base.interrupt cimport ldd_interrupted
from llm_datadist.core.base.status cimport (
    LDD_E_FAILED, LDD_E_INTERRUPTED, LDD_E_NOT_LINKED, LDD_E_TIMEOUT, LDD_OK, ldd_fail,
)
from llm_datadist.core.base.sync cimport ldd_now_ns

cdef extern from * nogil:
    """
    #include <arpa/inet.h>
    #include <netinet/in.h>
    #include <netinet/tcp.h>
    #include <poll.h>
    #include <stddef.h>
    #include <stdio.h>
    #include <string.h>
    #include <sys/socket.h>
    #include <sys/uio.h>
    #include <sys/un.h>
    #include <unistd.h>

    /* Fill an address from numeric text or "@abstract"; 0 when the text is neither. */
    static socklen_t ldd_net_address(const char *ip, int port, struct sockaddr_storage *out) {
        memset(out, 0, sizeof *out);
        if (ip[0] == '@') {
            struct sockaddr_un *un = (struct sockaddr_un *)out;
            size_t length = strlen(ip + 1);
            if (length + 1 > sizeof un->sun_path) return 0;
            un->sun_family = AF_UNIX;
            memcpy(un->sun_path + 1, ip + 1, length);
            return (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + length);
        }
        struct sockaddr_in *v4 = (struct sockaddr_in *)out;
        if (inet_pton(AF_INET, ip, &v4->sin_addr) == 1) {
            v4->sin_family = AF_INET;
            v4->sin_port = htons((uint16_t)port);
            return sizeof *v4;
        }
        struct sockaddr_in6 *v6 = (struct sockaddr_in6 *)out;
        if (inet_pton(AF_INET6, ip, &v6->sin6_addr) == 1) {
            v6->sin6_family = AF_INET6;
            v6->sin6_port = htons((uint16_t)port);
            return sizeof *v6;
        }
        return 0;
    }

    /* The numeric text of an address; Unix sockets live on this host. */
    static int ldd_net_text(const struct sockaddr_storage *from, char *text, size_t size) {
        if (from->ss_family == AF_INET) {
            inet_ntop(AF_INET, &((const struct sockaddr_in *)from)->sin_addr, text, (socklen_t)size);
            return ntohs(((const struct sockaddr_in *)from)->sin_port);
        }
        if (from->ss_family == AF_INET6) {
            const struct in6_addr *v6 = &((const struct sockaddr_in6 *)from)->sin6_addr;
            if (IN6_IS_ADDR_V4MAPPED(v6)) inet_ntop(AF_INET, &v6->s6_addr[12], text, (socklen_t)size);
            else inet_ntop(AF_INET6, v6, text, (socklen_t)size);
            return ntohs(((const struct sockaddr_in6 *)from)->sin6_port);
        }
        snprintf(text, size, "127.0.0.1");
        return 0;
    }

    /* How long a peer may be silent, without a sign that it has received anything, before its connection ends. */
    static int ldd_net_silence_ms = 3000;

    /* A probe each third of that time, in whole seconds. The limit is a little shorter than the time: the kernel looks
       when a probe is due, and would otherwise find that a moment is missing, and wait for another one. */
    static void ldd_net_keepalive(int fd) {
        int on = 1, unacked_ms = ldd_net_silence_ms - 100;
        int interval_s = ldd_net_silence_ms / 3000 > 1 ? ldd_net_silence_ms / 3000 : 1, idle_s = interval_s;
        int probes = (ldd_net_silence_ms + 1000 * interval_s - 1) / (1000 * interval_s);
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on);
        setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle_s, sizeof idle_s);
        setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &interval_s, sizeof interval_s);
        setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &probes, sizeof probes);
        setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &unacked_ms, sizeof unacked_ms);
    }

    static int ldd_net_open(const struct sockaddr_storage *address) {
        return socket(address->ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    }

    static void ldd_net_reuse(int fd) {
        int on = 1;
        setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    }

    /* Descriptors travel as ancillary data of the first byte. */
    static ssize_t ldd_net_recv_files(int fd, void *data, size_t size, int *files, int num_files) {
        union { char bytes[CMSG_SPACE(8 * sizeof(int))]; struct cmsghdr align; } control;
        struct iovec part = {.iov_base = data, .iov_len = size};
        struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = control.bytes,
                                 .msg_controllen = sizeof control.bytes};
        ssize_t count = recvmsg(fd, &message, MSG_CMSG_CLOEXEC);
        for (struct cmsghdr *at = CMSG_FIRSTHDR(&message); count >= 0 && at != NULL; at = CMSG_NXTHDR(&message, at)) {
            if (at->cmsg_level != SOL_SOCKET || at->cmsg_type != SCM_RIGHTS) continue;
            int received = (int)((at->cmsg_len - CMSG_LEN(0)) / sizeof(int));
            for (int i = 0; i < received; i++) {
                int file;
                memcpy(&file, CMSG_DATA(at) + i * sizeof(int), sizeof file);
                if (i < num_files && files[i] < 0) files[i] = file;
                else close(file);
            }
        }
        return count;
    }

    static int ldd_net_send_files(int fd, const void *data, size_t size, const int *files, int num_files) {
        union { char bytes[CMSG_SPACE(8 * sizeof(int))]; struct cmsghdr align; } control;
        struct iovec part = {.iov_base = (void *)(uintptr_t)data, .iov_len = size};
        struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = control.bytes,
                                 .msg_controllen = CMSG_SPACE(num_files * sizeof(int))};
        memset(&control, 0, sizeof control);
        struct cmsghdr *header = CMSG_FIRSTHDR(&message);
        header->cmsg_level = SOL_SOCKET;
        header->cmsg_type = SCM_RIGHTS;
        header->cmsg_len = CMSG_LEN(num_files * sizeof(int));
        memcpy(CMSG_DATA(header), files, num_files * sizeof(int));
        return sendmsg(fd, &message, MSG_NOSIGNAL) == (ssize_t)size;
    }

    static int ldd_net_is_own_user(int fd) {
        struct ldd_ucred { pid_t pid; uid_t uid; gid_t gid; } credentials = {0, (uid_t)-1, (gid_t)-1};
        socklen_t length = sizeof credentials;
        if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &credentials, &length) < 0) return 0;
        return credentials.uid == geteuid() || credentials.uid == 0;
    }

    static int ldd_net_error(int fd) {
        int error = 0;
        socklen_t length = sizeof error;
        return getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &length) < 0 ? errno : error;
    }

    static int ldd_net_name(int fd, int peer, char *text, size_t size) {
        struct sockaddr_storage address;
        socklen_t length = sizeof address;
        memset(&address, 0, sizeof address);
        if ((peer ? getpeername : getsockname)(fd, (struct sockaddr *)&address, &length) < 0) address.ss_family = 0;
        return ldd_net_text(&address, text, size);
    }
    """
    struct sockaddr_storage:
        pass
    ctypedef unsigned int socklen_t
    struct sockaddr:
        pass
    struct pollfd:
        int fd
        short events
        short revents
    short POLLIN, POLLOUT
    int MSG_NOSIGNAL, SHUT_RDWR
    socklen_t ldd_net_address(const char* ip, int port, sockaddr_storage* out)
    int ldd_net_silence_ms
    void ldd_net_keepalive(int fd)
    int ldd_net_open(const sockaddr_storage* address)
    void ldd_net_reuse(int fd)
    int ldd_net_error(int fd)
    ssize_t ldd_net_recv_files(int fd, void* data, size_t size, int* files, int num_files)
    int ldd_net_send_files(int fd, const void* data, size_t size, const int* files, int num_files)
    int ldd_net_is_own_user(int fd)
    int ldd_net_name(int fd, int peer, char* text, size_t size)
    int connect(int fd, const sockaddr* address, socklen_t length)
    int bind(int fd, const sockaddr* address, socklen_t length)
    int listen(int fd, int backlog)
    ssize_t send(int fd, const void* data, size_t nbytes, int flags)
    ssize_t recv(int fd, void* data, size_t nbytes, int flags)
    int shutdown(int fd, int how)
    int close(int fd)
    int poll(pollfd* fds, unsigned long count, int timeout_ms)


cdef ldd_status _wait_ready(int fd, short events, int64_t deadline_ns, const char* what,
                           ldd_detail* detail) noexcept nogil:
    """Sleep until the socket is ready, the deadline passes, or a signal handler raised."""
    cdef pollfd entry
    cdef int64_t left_ns
    cdef int slice_ms, ready
    entry.fd = fd
    entry.events = events
    while True:
        left_ns = deadline_ns - ldd_now_ns()
        if left_ns <= 0:
            return ldd_fail(detail, LDD_E_TIMEOUT, b"the deadline passed while %s", what)
        # rounded up, so that the last slice does not spin on a zero timeout
        slice_ms = <int>min(<int64_t>SIGNAL_SLICE_MS, (left_ns + 999999) // 1000000)
        entry.revents = 0
        ready = poll(&entry, 1, slice_ms)
        if ready > 0:
            return LDD_OK
        if ready < 0 and errno != EINTR:
            return ldd_fail(detail, LDD_E_FAILED, b"poll failed while %s: %s", what, strerror(errno))
        if ldd_interrupted() != 0:
            return LDD_E_INTERRUPTED


cdef void ldd_socket_set_silence(int silence_ms) noexcept nogil:
    global ldd_net_silence_ms
    ldd_net_silence_ms = silence_ms


cdef void ldd_socket_tune(int fd) noexcept nogil:
    ldd_net_keepalive(fd)


cdef void ldd_socket_local_ip(int fd, char* text, size_t size) noexcept nogil:
    ldd_net_name(fd, 0, text, size)


cdef void ldd_socket_peer_ip(int fd, char* text, size_t size) noexcept nogil:
    ldd_net_name(fd, 1, text, size)


cdef void ldd_socket_shutdown(int fd) noexcept nogil:
    if fd >= 0:
        shutdown(fd, SHUT_RDWR)


cdef ldd_status ldd_socket_connect(const char* ip, int port, int64_t deadline_ns, int* fd,
                                   ldd_detail* detail) noexcept nogil:
    cdef sockaddr_storage address
    cdef socklen_t length = ldd_net_address(ip, port, &address)
    cdef ldd_status status
    cdef int error = 0
    fd[0] = -1
    if length == 0:
        return ldd_fail(detail, LDD_E_FAILED, b"%s is not a numeric IP address", ip)
    cdef int sock = ldd_net_open(&address)
    if sock < 0:
        return ldd_fail(detail, LDD_E_FAILED, b"cannot open a socket: %s", strerror(errno))
    if connect(sock, <sockaddr*>&address, length) < 0:
        if errno != EINPROGRESS:
            error = errno
        else:
            status = _wait_ready(sock, POLLOUT, deadline_ns, b"connecting", detail)
            if status < 0:
                close(sock)
                if status == LDD_E_TIMEOUT:
                    ldd_fail(detail, status, b"no answer from %s:%d before the deadline", ip, port)
                return status
            error = ldd_net_error(sock)
    if error:
        close(sock)
        if detail != NULL:
            detail.provider_code = error
        return ldd_fail(detail, LDD_E_FAILED, b"cannot connect to %s:%d: %s", ip, port, strerror(error))
    ldd_net_keepalive(sock)
    fd[0] = sock
    return LDD_OK


cdef ldd_status ldd_socket_listen(const char* ip, int port, int backlog, int* fd, int* bound_port,
                           ldd_detail* detail) noexcept nogil:
    cdef sockaddr_storage address
    cdef char text[64]
    cdef socklen_t length = ldd_net_address(ip, port, &address)
    fd[0] = -1
    if length == 0:
        return ldd_fail(detail, LDD_E_FAILED, b"%s is not a numeric IP address", ip)
    cdef int sock = ldd_net_open(&address)
    if sock < 0:
        return ldd_fail(detail, LDD_E_FAILED, b"cannot open a socket: %s", strerror(errno))
    if ip[0] != c'@':
        ldd_net_reuse(sock)
    if bind(sock, <sockaddr*>&address, length) < 0 or listen(sock, backlog) < 0:
        if detail != NULL:
            detail.provider_code = errno
        ldd_fail(detail, LDD_E_FAILED, b"cannot listen on %s:%d: %s", ip, port, strerror(errno))
        close(sock)
        return LDD_E_FAILED
    if bound_port != NULL:
        bound_port[0] = ldd_net_name(sock, 0, text, sizeof(text))
    fd[0] = sock
    return LDD_OK


cdef int ldd_socket_free_port(const char* ip, ldd_detail* detail) noexcept nogil:
    """A port that is free at this moment, or 0. CANN's servers cannot choose one themselves."""
    cdef int sock = -1, port = 0
    if ldd_socket_listen(ip, 0, 1, &sock, &port, detail) < 0:
        return 0
    close(sock)
    return port


cdef ldd_status ldd_socket_send(int fd, const void* data, size_t nbytes, int64_t deadline_ns,
                         ldd_detail* detail) noexcept nogil:
    cdef const char* at = <const char*>data
    cdef ssize_t count
    cdef ldd_status status
    while nbytes:
        count = send(fd, at, nbytes, MSG_NOSIGNAL)
        if count > 0:
            at += count
            nbytes -= count
        elif count < 0 and errno == EAGAIN:
            status = _wait_ready(fd, POLLOUT, deadline_ns, b"sending a request", detail)
            if status < 0:
                return status
        elif count < 0 and errno != EINTR:
            return ldd_fail(detail, LDD_E_NOT_LINKED, b"the peer's connection broke: %s", strerror(errno))
    return LDD_OK


cdef ldd_status ldd_socket_recv(int fd, void* data, size_t nbytes, int64_t deadline_ns,
                                ldd_detail* detail) noexcept nogil:
    cdef char* at = <char*>data
    cdef ssize_t count
    cdef ldd_status status
    while nbytes:
        count = recv(fd, at, nbytes, 0)
        if count > 0:
            at += count
            nbytes -= count
        elif count == 0:
            return ldd_fail(detail, LDD_E_NOT_LINKED, b"the peer closed the connection")
        elif errno == EAGAIN:
            status = _wait_ready(fd, POLLIN, deadline_ns, b"waiting for the peer's answer", detail)
            if status < 0:
                return status
        elif errno != EINTR:
            return ldd_fail(detail, LDD_E_NOT_LINKED, b"the peer's connection broke: %s", strerror(errno))
    return LDD_OK


cdef ldd_status ldd_socket_recv_files(int fd, void* data, size_t nbytes, int* files, int num_files,
                               int64_t deadline_ns) noexcept nogil:
    cdef char* at = <char*>data
    cdef ssize_t count
    cdef int i
    cdef ldd_status status = LDD_OK
    while nbytes and status == LDD_OK:
        count = ldd_net_recv_files(fd, at, nbytes, files, num_files)
        if count > 0:
            at += count
            nbytes -= count
        elif count < 0 and errno == EAGAIN:
            status = _wait_ready(fd, POLLIN, deadline_ns, b"waiting for the peer's files", NULL)
        elif count == 0 or errno != EINTR:
            status = LDD_E_FAILED
    for i in range(num_files):
        if status < 0 and files[i] >= 0:
            close(files[i])
            files[i] = -1
    return status


cdef bint ldd_socket_send_files(int fd, const void* data, size_t nbytes, const int* files,
                                int num_files) noexcept nogil:
    return ldd_net_send_files(fd, data, nbytes, files, num_files) != 0


cdef bint ldd_socket_is_own_user(int fd) noexcept nogil:
    return ldd_net_is_own_user(fd) != 0
