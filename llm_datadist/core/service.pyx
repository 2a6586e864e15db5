"""The service thread: answers peers' requests without the interpreter.

One thread per engine waits on epoll for listeners, handshakes and serving connections, and never takes the
GIL: a peer resolves, reads and releases while this process is busy in Python or in the model. It owns its
connections alone; other threads hand it work through commands that wait until they are carried out.

Nothing a peer sends is believed: frames are bounded before memory is taken for them, and a frame that does
not fit closes that connection only. The end of a serving connection ends every lease of that link.
"""
from libc.errno cimport EAGAIN, EINTR, EMFILE, ENFILE, errno
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdio cimport snprintf
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcmp, memcpy, memmove, memset, strerror, strlen

from .cache_table cimport (ldd_cache_view, ldd_table_pin_range, ldd_table_resolve, ldd_table_take, ldd_table_unpin)
from .key_index cimport KEY_BY_ID, LDD_NO_KEY
from .net cimport net_local_ip, net_peer_ip, net_tune
from .node cimport (LINK_ACTIVE, LINK_OPENING, ORIGIN_COMM, ORIGIN_PEER, ldd_lease, ldd_link_break, ldd_link_drop,
                    ldd_link_new, ldd_link_publish, ldd_link_unref, ldd_links_drop, ldd_pin)
from .region cimport ldd_regions_drop_peer, ldd_regions_epoch, ldd_regions_serve
from .status cimport (LDD_E_FAILED, LDD_E_LINK_FAILED, LDD_E_NO_MEMORY, LDD_E_NOT_LINKED, LDD_E_PARAM,
                      LDD_E_PROCESSING_LINK, LDD_OK, ldd_fail)
from .sync cimport (ldd_cond_broadcast, ldd_cond_destroy, ldd_cond_init, ldd_cond_wait_until, ldd_lock,
                    ldd_mutex_destroy, ldd_mutex_init, ldd_now_ns, ldd_unlock, LDD_NEVER)
from .wire cimport *

cdef extern from * nogil:
    """
    #include <pthread.h>
    #include <signal.h>
    #include <sys/epoll.h>
    #include <sys/eventfd.h>
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

    static void ldd_epoll(int epoll_fd, int operation, int fd, uint32_t events, void *conn) {
        struct epoll_event event = {.events = events, .data = {.ptr = conn}};
        epoll_ctl(epoll_fd, operation, fd, &event);
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
    int EPOLLIN, EPOLLOUT, EPOLL_CTL_ADD, EPOLL_CTL_DEL, EPOLL_CTL_MOD, EPOLL_CLOEXEC
    int EFD_CLOEXEC, EFD_NONBLOCK, MSG_NOSIGNAL, SOCK_NONBLOCK, SOCK_CLOEXEC
    int epoll_create1(int flags)
    int epoll_wait(int epoll_fd, epoll_event* events, int max_events, int timeout_ms)
    int eventfd(unsigned int value, int flags)
    int accept4(int fd, void* address, void* length, int flags)
    ssize_t recv(int fd, void* data, size_t nbytes, int flags)
    ssize_t send(int fd, const void* data, size_t nbytes, int flags)
    ssize_t read(int fd, void* data, size_t nbytes)
    ssize_t write(int fd, const void* data, size_t nbytes)
    int close(int fd)
    int pthread_join(pthread_t thread, void** result)
    int ldd_service_spawn(pthread_t* thread, void* (*main)(void*) noexcept nogil, void* argument)
    void ldd_epoll(int epoll_fd, int operation, int fd, uint32_t events, void* conn)
    void ldd_nap_ms(int ms)

cdef enum:
    EVENTS_PER_WAIT = 64
    HANDSHAKE_TIMEOUT_MS = 5000
    MAX_HANDSHAKES = 256                        # a flood of silent connections costs no more than this
    MAX_SMALL_REQUEST = 64                      # bytes of any request but RANGES and HELLO
    READ_BYTES = 4096


# ---------------------------------------------------------------------------------------------- connections

cdef ldd_status append(ldd_bytes* bytes_, const void* data, size_t nbytes) noexcept nogil:
    cdef size_t capacity
    cdef uint8_t* grown
    if bytes_.length + nbytes > bytes_.capacity:
        capacity = max(bytes_.length + nbytes, bytes_.capacity * 2)
        grown = <uint8_t*>realloc(bytes_.data, capacity)
        if grown == NULL:
            return LDD_E_NO_MEMORY
        bytes_.data = grown
        bytes_.capacity = capacity
    if nbytes:
        memcpy(bytes_.data + bytes_.length, data, nbytes)
    bytes_.length += nbytes
    return LDD_OK


cdef void consume(ldd_bytes* bytes_, size_t nbytes) noexcept nogil:
    bytes_.length -= nbytes
    if bytes_.length:
        memmove(bytes_.data, bytes_.data + nbytes, bytes_.length)


cdef ldd_conn* add_conn(ldd_service* service, int fd, ldd_conn_kind kind) noexcept nogil:
    cdef ldd_conn* conn = <ldd_conn*>calloc(1, sizeof(ldd_conn))
    if conn == NULL:
        return NULL
    conn.fd = fd
    conn.kind = kind
    conn.next = service.conns
    conn.at = &service.conns
    if conn.next != NULL:
        conn.next.at = &conn.next
    service.conns = conn
    if kind == CONN_HANDSHAKE:
        service.num_handshakes += 1
        conn.deadline_ns = ldd_now_ns() + <int64_t>HANDSHAKE_TIMEOUT_MS * 1000000
    ldd_epoll(service.epoll_fd, EPOLL_CTL_ADD, fd, EPOLLIN, conn)
    return conn


cdef void forget_conn(ldd_service* service, ldd_conn* conn, bint close_fd) noexcept nogil:
    """Out of epoll and the list; frees it. The link reference is the caller's."""
    ldd_epoll(service.epoll_fd, EPOLL_CTL_DEL, conn.fd, 0, NULL)
    if conn.deadline_ns:
        service.num_handshakes -= 1
    conn.at[0] = conn.next
    if conn.next != NULL:
        conn.next.at = conn.at
    if close_fd:
        close(conn.fd)
    free(conn.inbox.data)
    free(conn.outbox.data)
    free(conn)


cdef void end_lease(ldd_service* service, ldd_lease* lease) noexcept nogil:
    cdef uint32_t i
    if lease.num_pins:
        ldd_table_unpin(service.node.table, lease.first.slot, lease.first.generation)
    for i in range(1, lease.num_pins):
        ldd_table_unpin(service.node.table, lease.more[i - 1].slot, lease.more[i - 1].generation)
    free(lease.more)
    memset(lease, 0, sizeof(ldd_lease))


cdef void peer_gone(ldd_service* service, ldd_conn* conn) noexcept nogil:
    """A serving connection ended: the peer touches nothing here any more, so its leases are over."""
    cdef ldd_link* link = conn.link
    cdef char reason[96]
    cdef uint32_t i
    forget_conn(service, conn, True)
    if link == NULL:
        return
    ldd_regions_drop_peer(&service.node.regions, link.token)
    for i in range(link.num_leases):
        if link.leases[i].id:
            end_lease(service, &link.leases[i])
    link.num_leases = 0
    snprintf(reason, sizeof(reason), b"cluster %llu closed the connection", <unsigned long long>link.cluster_id)
    ldd_link_break(link, reason)
    if link.origin == ORIGIN_PEER:
        ldd_link_drop(link)                     # nobody here asked for it, so nobody here will unlink it
    ldd_link_unref(link)


cdef bint flush(ldd_service* service, ldd_conn* conn) noexcept nogil:
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
    consume(&conn.outbox, sent)
    if conn.outbox.length == 0 and conn.closing:
        return False
    if (conn.outbox.length != 0) != conn.wants_write:
        conn.wants_write = not conn.wants_write
        ldd_epoll(service.epoll_fd, EPOLL_CTL_MOD, conn.fd, EPOLLIN | (EPOLLOUT if conn.wants_write else 0), conn)
    return True


cdef ldd_status reply(ldd_conn* conn, uint32_t request_id, uint32_t type, const void* fixed, size_t fixed_bytes,
                      const void* rest, size_t rest_bytes) noexcept nogil:
    cdef ldd_frame_header header
    header.magic = LDD_WIRE_MAGIC
    header.version = LDD_WIRE_VERSION
    header.type = <uint16_t>type
    header.length = <uint32_t>(fixed_bytes + rest_bytes)
    header.request_id = request_id
    if (append(&conn.outbox, &header, sizeof(header)) < 0 or append(&conn.outbox, fixed, fixed_bytes) < 0
            or append(&conn.outbox, rest, rest_bytes) < 0):
        return LDD_E_NO_MEMORY
    return LDD_OK


# ------------------------------------------------------------------------------------------------- handshake

cdef ldd_wish* find_wish(ldd_service* service, const uint8_t* comm, uint64_t cluster_id) noexcept nogil:
    """A wish for this communicator and peer that is not met yet. Needs service.lock."""
    cdef uint32_t i
    for i in range(service.num_wishes):
        if (not service.wishes[i].met and service.wishes[i].cluster_id == cluster_id
                and memcmp(service.wishes[i].comm, comm, 32) == 0):
            return &service.wishes[i]
    return NULL


cdef bint is_zero(const uint8_t* data, size_t nbytes) noexcept nogil:
    cdef size_t i
    for i in range(nbytes):
        if data[i]:
            return False
    return True


cdef ldd_status welcome_forward(ldd_service* service, ldd_conn* conn, const ldd_hello* hello,
                                ldd_welcome* answer, ldd_detail* detail) noexcept nogil:
    """Check who comes, and open a link that becomes active when its second connection arrives."""
    cdef ldd_node* node = service.node
    cdef ldd_link* link
    cdef ldd_wish* wish
    cdef char local_ip[64]
    cdef uint32_t port = 0
    cdef int64_t comm_id = 0
    cdef bint for_comm = not is_zero(hello.comm, 32)
    cdef ldd_status status
    if hello.check_expected and hello.expected_cluster_id != node.cluster_id:
        return ldd_fail(detail, LDD_E_LINK_FAILED, b"this is cluster %llu, not %llu",
                        <unsigned long long>node.cluster_id, <unsigned long long>hello.expected_cluster_id)
    if hello.mode != node.mode:
        return ldd_fail(detail, LDD_E_PARAM, b"the two sides disagree on remote-accessible mode (here %d, there %d)",
                        <int>(node.mode & LDD_MODE_REMOTE_ACCESSIBLE),
                        <int>(hello.mode & LDD_MODE_REMOTE_ACCESSIBLE))
    if for_comm:
        ldd_lock(&service.lock)
        wish = find_wish(service, hello.comm, hello.cluster_id)
        comm_id = wish.comm_id if wish != NULL else 0
        ldd_unlock(&service.lock)
        if comm_id == 0:
            return ldd_fail(detail, LDD_E_PROCESSING_LINK, b"cluster %llu has not asked for this communicator yet",
                            <unsigned long long>node.cluster_id)
    net_local_ip(conn.fd, local_ip, sizeof(local_ip))
    status = ldd_regions_serve(&node.regions, local_ip, &port, detail)
    if status < 0:
        return status
    link = ldd_link_new(node, hello.cluster_id, ORIGIN_COMM if for_comm else ORIGIN_PEER)
    if link == NULL:
        return ldd_fail(detail, LDD_E_NO_MEMORY, b"no memory for a link")
    memcpy(link.instance, hello.instance, 16)
    memcpy(link.token, hello.token, 16)
    link.comm_id = comm_id
    net_peer_ip(conn.fd, link.peer_ip, sizeof(link.peer_ip))
    memcpy(link.data_ip, hello.data_ip if hello.data_ip[0] else link.peer_ip, sizeof(link.data_ip))
    link.data_port = hello.data_port
    conn.link = link
    answer.data_port = port
    return LDD_OK


cdef ldd_conn* find_opening(ldd_service* service, const uint8_t* token) noexcept nogil:
    cdef ldd_conn* conn = service.conns
    while conn != NULL:
        if conn.link != NULL and conn.link.state == LINK_OPENING and memcmp(conn.link.token, token, 16) == 0:
            return conn
        conn = conn.next
    return NULL


cdef ldd_status activate(ldd_service* service, ldd_conn* reverse, const ldd_hello* hello,
                         ldd_detail* detail) noexcept nogil:
    """The second connection of a link arrived: it is the one we ask on."""
    cdef ldd_conn* forward = find_opening(service, hello.token)
    cdef ldd_link* link
    cdef ldd_wish* wish
    cdef ldd_status status
    if forward == NULL:
        return ldd_fail(detail, LDD_E_LINK_FAILED, b"no link is being opened under this token")
    link = forward.link
    if link.origin == ORIGIN_PEER:
        # The peer would not ask if it knew of these: they are left over from before it unlinked or restarted.
        ldd_links_drop(service.node, ORIGIN_PEER, -1, False, link.cluster_id)
    elif link.origin == ORIGIN_COMM:
        ldd_lock(&service.lock)
        wish = find_wish(service, hello.comm, link.cluster_id)
        if wish != NULL and wish.comm_id == link.comm_id:
            wish.met = True
        else:
            wish = NULL
        ldd_unlock(&service.lock)
        if wish == NULL:
            return ldd_fail(detail, LDD_E_PROCESSING_LINK, b"the communicator was given up meanwhile")
    link.ask_fd = reverse.fd
    status = ldd_link_publish(link, detail)
    if status < 0:
        link.ask_fd = -1
        return status
    forward.deadline_ns = 0
    service.num_handshakes -= 1
    return LDD_OK


cdef bint on_hello(ldd_service* service, ldd_conn* conn, const ldd_frame_header* header,
                   const uint8_t* payload) noexcept nogil:
    cdef ldd_hello hello
    cdef ldd_welcome answer
    cdef ldd_detail detail
    cdef ldd_status status
    cdef bint handed_over = False
    memset(&answer, 0, sizeof(answer))
    detail.text[0] = 0
    detail.provider_code = 0
    answer.cluster_id = service.node.cluster_id
    answer.mode = service.node.mode
    memcpy(answer.instance, service.node.instance, 16)
    if header.version != LDD_WIRE_VERSION:
        status = ldd_fail(&detail, LDD_E_LINK_FAILED, b"protocol version %u is not spoken here, only %u",
                          <uint32_t>header.version, <uint32_t>LDD_WIRE_VERSION)
    else:
        memcpy(&hello, payload, sizeof(hello))
        hello.data_ip[sizeof(hello.data_ip) - 1] = 0
        if hello.direction == LDD_HELLO_FORWARD and conn.link == NULL:
            status = welcome_forward(service, conn, &hello, &answer, &detail)
        elif hello.direction == LDD_HELLO_REVERSE and conn.link == NULL:
            status = activate(service, conn, &hello, &detail)
            handed_over = status == LDD_OK
        else:
            return False
    answer.status = status
    snprintf(answer.text, sizeof(answer.text), b"%s", detail.text)
    if reply(conn, header.request_id, LDD_FRAME_WELCOME, &answer, sizeof(answer), NULL, 0) < 0:
        return False
    if handed_over:
        # The socket now belongs to the link; its small answer fits an empty send buffer.
        send(conn.fd, conn.outbox.data, conn.outbox.length, MSG_NOSIGNAL)
        forget_conn(service, conn, False)
        return True
    if status < 0:
        conn.closing = True
    else:
        conn.kind = CONN_SERVING                # the deadline stays until the link's second connection came
    return True


# -------------------------------------------------------------------------------------------------- requests

cdef ldd_lease* new_lease(ldd_link* link) noexcept nogil:
    cdef uint32_t i, slot = link.num_leases
    cdef ldd_lease* grown
    for i in range(link.num_leases):
        if link.leases[i].id == 0:
            slot = i
            break
    if slot == link.lease_capacity:
        grown = <ldd_lease*>realloc(link.leases, (link.lease_capacity * 2 + 4) * sizeof(ldd_lease))
        if grown == NULL:
            return NULL
        link.leases = grown
        link.lease_capacity = link.lease_capacity * 2 + 4
    if slot == link.num_leases:
        link.num_leases += 1
    link.next_lease = link.next_lease + 1 if link.next_lease + 1 else 1
    memset(&link.leases[slot], 0, sizeof(ldd_lease))
    link.leases[slot].id = link.next_lease
    link.leases[slot].key_index = LDD_NO_KEY
    return &link.leases[slot]


cdef ldd_status on_resolve(ldd_service* service, ldd_conn* conn, uint32_t request_id,
                           const ldd_resolve* request) noexcept nogil:
    cdef ldd_node* node = service.node
    cdef ldd_descriptor answer
    cdef ldd_cache_view view
    cdef ldd_detail detail
    cdef ldd_lease* lease = NULL
    cdef uint64_t even[2]
    cdef ldd_status status
    memset(&answer, 0, sizeof(answer))
    detail.text[0] = 0
    if conn.link.state != LINK_ACTIVE:
        status = ldd_fail(&detail, LDD_E_NOT_LINKED, b"the link was closed here")
    elif request.kind > KEY_BY_ID or request.access > LDD_ACCESS_WRITE:
        status = ldd_fail(&detail, LDD_E_PARAM, b"unknown key kind %u or access %u", <uint32_t>request.kind,
                          <uint32_t>request.access)
    else:
        # A write names its slot as an argument, a read looks a slot up: the API wants different codes for a bad one.
        status = ldd_table_resolve(node.table, request.kind, request.id, request.model_id,
                                   0 if request.access == LDD_ACCESS_WRITE else request.batch_index, &view, &detail)
        if status == LDD_OK:
            if request.access == LDD_ACCESS_WRITE and request.batch_index >= view.num_slots:
                status = ldd_fail(&detail, LDD_E_PARAM, b"batch index %u is outside cache %lld of %llu",
                                  request.batch_index, <long long>view.cache_id, <unsigned long long>view.num_slots)
            elif node.mode & LDD_MODE_REMOTE_ACCESSIBLE and not view.remote_accessible:
                status = ldd_fail(&detail, LDD_E_PARAM, b"cache %lld is not remote accessible",
                                  <long long>view.cache_id)
            elif request.access == LDD_ACCESS_WRITE and not node.mode & LDD_MODE_REMOTE_ACCESSIBLE:
                status = ldd_fail(&detail, LDD_E_PARAM, b"remote access to caches is not enabled here")
            else:
                lease = new_lease(conn.link)
                if lease == NULL:
                    status = ldd_fail(&detail, LDD_E_NO_MEMORY, b"no memory for a lease")
            if status < 0:
                ldd_table_unpin(node.table, view.slot, view.generation)
    answer.status = status
    if status < 0:
        answer.text_bytes = <uint32_t>strlen(detail.text)
        return reply(conn, request_id, LDD_FRAME_DESCRIPTOR, &answer, sizeof(answer), detail.text, answer.text_bytes)
    lease.num_pins = 1
    lease.first.slot = view.slot
    lease.first.generation = view.generation
    lease.key_index = view.key_index
    lease.key_generation = view.key_generation
    answer.lease = lease.id
    answer.cache_id = view.cache_id
    answer.num_tensors = view.num_tensors
    answer.flags = ((LDD_DESC_BLOCKS if view.is_blocks else 0) | (LDD_DESC_HOST if view.host else 0)
                    | (LDD_DESC_OWNED if view.owned else 0)
                    | (LDD_DESC_REMOTE_ACCESSIBLE if view.remote_accessible else 0)
                    | (LDD_DESC_EVEN if view.step else 0))
    answer.num_slots = view.num_slots
    answer.tensor_bytes = view.tensor_bytes
    answer.stride_bytes = view.stride
    answer.region_epoch = ldd_regions_epoch(&node.regions)
    answer.batch_index = request.batch_index if request.access == LDD_ACCESS_WRITE else view.batch_index
    if view.step:
        even[0] = view.addrs[0]
        even[1] = view.step
        return reply(conn, request_id, LDD_FRAME_DESCRIPTOR, &answer, sizeof(answer), even, sizeof(even))
    return reply(conn, request_id, LDD_FRAME_DESCRIPTOR, &answer, sizeof(answer), view.addrs,
                 8 * <size_t>view.num_tensors)


cdef ldd_status on_release(ldd_service* service, ldd_conn* conn, uint32_t request_id,
                           const ldd_release* request) noexcept nogil:
    cdef ldd_ack answer
    cdef ldd_lease* lease
    cdef uint32_t i
    memset(&answer, 0, sizeof(answer))
    answer.status = LDD_E_PARAM
    for i in range(conn.link.num_leases):
        lease = &conn.link.leases[i]
        if lease.id == request.lease and lease.id:
            answer.status = LDD_OK
            if request.flags & LDD_RELEASE_TAKE:
                answer.status = ldd_table_take(service.node.table, lease.key_index, lease.key_generation,
                                               request.first_tensor, request.num_tensors)
            end_lease(service, lease)
            break
    return reply(conn, request_id, LDD_FRAME_ACK, &answer, sizeof(answer), NULL, 0)


cdef ldd_status on_ranges(ldd_service* service, ldd_conn* conn, uint32_t request_id, const uint8_t* payload,
                          uint32_t num_ranges) noexcept nogil:
    cdef ldd_node* node = service.node
    cdef ldd_lease_reply answer
    cdef ldd_detail detail
    cdef ldd_cache_view view
    cdef ldd_range item
    cdef ldd_pin pin
    cdef ldd_pin* more = NULL
    cdef ldd_lease* lease = NULL
    cdef ldd_status status = LDD_OK
    cdef uint32_t i
    memset(&answer, 0, sizeof(answer))
    detail.text[0] = 0
    if conn.link.state != LINK_ACTIVE:
        status = ldd_fail(&detail, LDD_E_NOT_LINKED, b"the link was closed here")
    else:
        lease = new_lease(conn.link)
        more = <ldd_pin*>malloc(sizeof(ldd_pin) * num_ranges)
        if lease == NULL or more == NULL:
            status = ldd_fail(&detail, LDD_E_NO_MEMORY, b"no memory for a lease on %u ranges", num_ranges)
            free(more)
        else:
            lease.more = more
            for i in range(num_ranges):
                memcpy(&item, payload + i * sizeof(item), sizeof(item))
                status = ldd_table_pin_range(node.table, item.addr, item.bytes, &view, &detail)
                if status < 0:
                    break
                pin.slot = view.slot
                pin.generation = view.generation
                if lease.num_pins:
                    more[lease.num_pins - 1] = pin
                else:
                    lease.first = pin
                lease.num_pins += 1
                if node.mode & LDD_MODE_REMOTE_ACCESSIBLE and not view.remote_accessible:
                    status = ldd_fail(&detail, LDD_E_PARAM, b"cache %lld at address %#llx is not remote accessible",
                                      <long long>view.cache_id, <unsigned long long>item.addr)
                    break
    if status < 0:
        if lease != NULL:
            end_lease(service, lease)
    else:
        answer.lease = lease.id
    answer.status = status
    answer.region_epoch = ldd_regions_epoch(&node.regions)
    snprintf(answer.text, sizeof(answer.text), b"%s", detail.text)
    return reply(conn, request_id, LDD_FRAME_LEASE, &answer, sizeof(answer), NULL, 0)


cdef bint on_frame(ldd_service* service, ldd_conn* conn, const ldd_frame_header* header,
                   const uint8_t* payload) noexcept nogil:
    """Answer one request; False when the connection is to be closed."""
    cdef ldd_resolve resolve
    cdef ldd_release release
    cdef ldd_ack ack
    service.num_requests += 1
    if header.type == LDD_FRAME_RESOLVE and header.length == sizeof(resolve):
        memcpy(&resolve, payload, sizeof(resolve))
        return on_resolve(service, conn, header.request_id, &resolve) == LDD_OK
    if header.type == LDD_FRAME_RELEASE and header.length == sizeof(release):
        memcpy(&release, payload, sizeof(release))
        return on_release(service, conn, header.request_id, &release) == LDD_OK
    if header.type == LDD_FRAME_RANGES and header.length and header.length % sizeof(ldd_range) == 0:
        return on_ranges(service, conn, header.request_id, payload,
                         header.length // <uint32_t>sizeof(ldd_range)) == LDD_OK
    if (header.type == LDD_FRAME_UNLINK or header.type == LDD_FRAME_PING) and header.length == 0:
        memset(&ack, 0, sizeof(ack))
        if conn.link.state != LINK_ACTIVE and header.type == LDD_FRAME_PING:
            ack.status = LDD_E_NOT_LINKED
        if header.type == LDD_FRAME_UNLINK:
            ldd_link_drop(conn.link)
        return reply(conn, header.request_id, LDD_FRAME_ACK, &ack, sizeof(ack), NULL, 0) == LDD_OK
    return False


cdef bint frame_fits(const ldd_conn* conn, const ldd_frame_header* header) noexcept nogil:
    """Whether such a frame may come now; checked before memory is taken for its payload."""
    if header.magic != LDD_WIRE_MAGIC:
        return False
    if conn.kind == CONN_HANDSHAKE:
        return header.type == LDD_FRAME_HELLO and header.length == sizeof(ldd_hello)
    if header.version != LDD_WIRE_VERSION:
        return False
    if header.type == LDD_FRAME_RANGES:
        return header.length <= LDD_WIRE_MAX_RANGES * sizeof(ldd_range)
    return header.length <= MAX_SMALL_REQUEST


cdef bint on_readable(ldd_service* service, ldd_conn* conn) noexcept nogil:
    """Read and answer what has come; False when the connection is over (and then not yet forgotten)."""
    cdef uint8_t chunk[READ_BYTES]
    cdef ldd_frame_header header
    cdef ssize_t count
    cdef size_t at
    cdef bint was_handshake
    while True:
        count = recv(conn.fd, chunk, sizeof(chunk), 0)
        if count == 0:
            return False
        if count < 0:
            return errno == EAGAIN or errno == EINTR
        if append(&conn.inbox, chunk, <size_t>count) < 0:
            return False
        at = 0
        while conn.inbox.length - at >= sizeof(header):
            memcpy(&header, conn.inbox.data + at, sizeof(header))
            if not frame_fits(conn, &header):
                service.num_rejected_frames += 1
                return False
            if conn.inbox.length - at < sizeof(header) + header.length:
                break
            was_handshake = conn.kind == CONN_HANDSHAKE
            if was_handshake:
                if not on_hello(service, conn, &header, conn.inbox.data + at + sizeof(header)):
                    return False
                if header.version == LDD_WIRE_VERSION and is_handed_over(service, conn):
                    return True                 # the connection is the link's now, and `conn` is gone
            elif not on_frame(service, conn, &header, conn.inbox.data + at + sizeof(header)):
                service.num_rejected_frames += 1
                return False
            at += sizeof(header) + header.length
        consume(&conn.inbox, at)
        if not flush(service, conn):
            return False


cdef bint is_handed_over(ldd_service* service, const ldd_conn* conn) noexcept nogil:
    cdef ldd_conn* at = service.conns
    while at != NULL:
        if at == conn:
            return False
        at = at.next
    return True


cdef void on_connection(ldd_service* service, ldd_conn* listener) noexcept nogil:
    cdef int fd
    while True:
        fd = accept4(listener.fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)
        if fd < 0:
            if errno == EMFILE or errno == ENFILE:
                ldd_nap_ms(10)                  # the listener stays readable: do not spin while files run out
            return
        net_tune(fd)
        if service.num_handshakes >= MAX_HANDSHAKES or add_conn(service, fd, CONN_HANDSHAKE) == NULL:
            close(fd)


# ---------------------------------------------------------------------------------------------- the thread

cdef void end_conn(ldd_service* service, ldd_conn* conn) noexcept nogil:
    if conn.link != NULL:
        peer_gone(service, conn)
    else:
        forget_conn(service, conn, True)


cdef bint run_commands(ldd_service* service) noexcept nogil:
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
                forget_conn(service, conn, True)
        else:
            conn = add_conn(service, command.fd, CONN_LISTENER if command.kind == COMMAND_LISTEN else CONN_SERVING)
            if conn != NULL:
                conn.link = command.link
            else:
                close(command.fd)
                if command.link != NULL:
                    ldd_link_break(command.link, b"no memory to serve the peer")
                    ldd_link_unref(command.link)
        command.done = True
    ldd_cond_broadcast(&service.done)
    ldd_unlock(&service.lock)
    return go_on


cdef void end_late_handshakes(ldd_service* service) noexcept nogil:
    cdef ldd_conn* conn = service.conns
    cdef ldd_conn* following
    cdef int64_t now = ldd_now_ns()
    while conn != NULL:
        following = conn.next
        if conn.deadline_ns and now > conn.deadline_ns:
            end_conn(service, conn)
        conn = following


cdef bint is_listed(const ldd_service* service, const ldd_conn* conn) noexcept nogil:
    """An earlier event of the same batch may have ended the connection of a later one."""
    cdef ldd_conn* at = service.conns
    while at != NULL and at != conn:
        at = at.next
    return at != NULL


cdef void* service_main(void* argument) noexcept nogil:
    cdef ldd_service* service = <ldd_service*>argument
    cdef epoll_event events[EVENTS_PER_WAIT]
    cdef ldd_conn* conn
    cdef uint64_t wakes
    cdef int i, count, woken
    cdef int64_t next_sweep_ns = 0
    if service.node.context != NULL:
        service.node.provider.acl.aclrtSetCurrentContext(service.node.context)
    while True:
        count = epoll_wait(service.epoll_fd, events, EVENTS_PER_WAIT, 1000 if service.num_handshakes else -1)
        woken = 0
        for i in range(max(count, 0)):
            conn = <ldd_conn*>events[i].data.ptr
            if conn == NULL:
                read(service.wake_fd, &wakes, sizeof(wakes))
                woken = 1
            elif count > 1 and not is_listed(service, conn):
                continue
            elif conn.kind == CONN_LISTENER:
                on_connection(service, conn)
            elif events[i].events & EPOLLOUT and not flush(service, conn):
                end_conn(service, conn)
            elif events[i].events & ~<uint32_t>EPOLLOUT and not on_readable(service, conn):
                end_conn(service, conn)
        if woken and not run_commands(service):
            break
        if service.num_handshakes and ldd_now_ns() > next_sweep_ns:
            end_late_handshakes(service)
            next_sweep_ns = ldd_now_ns() + 500000000
    while service.conns != NULL:
        end_conn(service, service.conns)
    return NULL


cdef void run(ldd_service* service, ldd_command* command) noexcept nogil:
    cdef uint64_t one = 1
    command.done = False
    ldd_lock(&service.lock)
    command.next = service.commands
    service.commands = command
    write(service.wake_fd, &one, sizeof(one))
    while not command.done:
        ldd_cond_wait_until(&service.done, &service.lock, LDD_NEVER)
    ldd_unlock(&service.lock)


cdef ldd_status ldd_service_start(ldd_service* service, ldd_node* node, ldd_detail* detail) noexcept nogil:
    cdef int error
    memset(service, 0, sizeof(ldd_service))
    service.node = node
    service.epoll_fd = epoll_create1(EPOLL_CLOEXEC)
    service.wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
    if service.epoll_fd < 0 or service.wake_fd < 0:
        error = errno
    else:
        ldd_mutex_init(&service.lock)
        ldd_cond_init(&service.done)
        ldd_epoll(service.epoll_fd, EPOLL_CTL_ADD, service.wake_fd, EPOLLIN, NULL)
        error = ldd_service_spawn(&service.thread, service_main, service)
        if error == 0:
            service.running = True
            return LDD_OK
        ldd_cond_destroy(&service.done)
        ldd_mutex_destroy(&service.lock)
    if service.epoll_fd >= 0:
        close(service.epoll_fd)
    if service.wake_fd >= 0:
        close(service.wake_fd)
    return ldd_fail(detail, LDD_E_FAILED, b"cannot start the service thread: %s", strerror(error))


cdef void ldd_service_stop(ldd_service* service) noexcept nogil:
    cdef ldd_command command
    if not service.running:
        return
    memset(&command, 0, sizeof(command))
    command.kind = COMMAND_STOP
    run(service, &command)
    pthread_join(service.thread, NULL)
    service.running = False
    close(service.epoll_fd)
    close(service.wake_fd)
    free(service.wishes)
    service.wishes = NULL
    ldd_cond_destroy(&service.done)
    ldd_mutex_destroy(&service.lock)


cdef void command_with_fd(ldd_service* service, ldd_command_kind kind, int fd, ldd_link* link) noexcept nogil:
    cdef ldd_command command
    memset(&command, 0, sizeof(command))
    command.kind = kind
    command.fd = fd
    command.link = link
    run(service, &command)


cdef void ldd_service_serve(ldd_service* service, int fd, ldd_link* link) noexcept nogil:
    command_with_fd(service, COMMAND_SERVE, fd, link)


cdef void ldd_service_listen(ldd_service* service, int fd) noexcept nogil:
    command_with_fd(service, COMMAND_LISTEN, fd, NULL)


cdef void ldd_service_unlisten(ldd_service* service, int fd) noexcept nogil:
    command_with_fd(service, COMMAND_UNLISTEN, fd, NULL)


cdef ldd_status ldd_service_wish(ldd_service* service, const uint8_t* comm, uint64_t cluster_id,
                                 int64_t comm_id) noexcept nogil:
    cdef ldd_wish* grown
    cdef ldd_status status = LDD_OK
    ldd_lock(&service.lock)
    if service.num_wishes == service.wish_capacity:
        grown = <ldd_wish*>realloc(service.wishes, (service.wish_capacity * 2 + 8) * sizeof(ldd_wish))
        if grown == NULL:
            status = LDD_E_NO_MEMORY
        else:
            service.wishes = grown
            service.wish_capacity = service.wish_capacity * 2 + 8
    if status == LDD_OK:
        memcpy(service.wishes[service.num_wishes].comm, comm, 32)
        service.wishes[service.num_wishes].cluster_id = cluster_id
        service.wishes[service.num_wishes].comm_id = comm_id
        service.wishes[service.num_wishes].met = False
        service.num_wishes += 1
    ldd_unlock(&service.lock)
    return status


cdef bint ldd_service_met(ldd_service* service, int64_t comm_id, uint64_t cluster_id) noexcept nogil:
    cdef bint met = False
    cdef uint32_t i
    ldd_lock(&service.lock)
    for i in range(service.num_wishes):
        if service.wishes[i].comm_id == comm_id and service.wishes[i].cluster_id == cluster_id:
            met = service.wishes[i].met
    ldd_unlock(&service.lock)
    return met


cdef void ldd_service_forget(ldd_service* service, int64_t comm_id) noexcept nogil:
    cdef uint32_t i = 0
    ldd_lock(&service.lock)
    while i < service.num_wishes:
        if service.wishes[i].comm_id == comm_id:
            service.num_wishes -= 1
            service.wishes[i] = service.wishes[service.num_wishes]
        else:
            i += 1
    ldd_unlock(&service.lock)
