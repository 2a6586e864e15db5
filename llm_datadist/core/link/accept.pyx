"""The answering side of a handshake: who may link, and what becomes of the two connections.

Where there is a secret, a hello is answered by a number that the peer has to prove the secret with, see secret.pyx; on
each of the two connections.

A link needs two connections from the same peer: the first is served, on the second we ask. It becomes
active when the second has come. A peer of this user on this host is given the shared table here, too. Runs on the
service thread, but for the functions about expected members of a communicator, at the end.
"""
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdio cimport snprintf
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcmp, memcpy, memset, strcmp

from llm_datadist.core.base.atomic cimport ldd_add64
from llm_datadist.core.base.sockets cimport (
    ldd_socket_is_own_user, ldd_socket_local_ip, ldd_socket_peer_ip, ldd_socket_send_files,
)
from llm_datadist.core.base.status cimport (
    LDD_E_LINK_FAILED, LDD_E_NO_MEMORY, LDD_E_PARAM, LDD_E_PROCESSING_LINK, LDD_OK, ldd_detail, ldd_fail,
)
from llm_datadist.core.base.sync cimport ldd_lock, ldd_lock_until, ldd_now_ns, ldd_unlock
from llm_datadist.core.link.links cimport (
    LINK_ACTIVE, LINK_OPENING, ORIGIN_COMM, ORIGIN_PEER, ldd_link, ldd_link_break, ldd_link_new, ldd_link_publish,
    ldd_link_state_of, ldd_link_unref, ldd_links_drop_stale, ldd_node,
)
from llm_datadist.core.link.refusals cimport ldd_tell_refusal
from llm_datadist.core.link.region cimport ldd_regions_admit_peer, ldd_regions_own_endpoint
from llm_datadist.core.link.secret cimport ldd_random, ldd_secret_confirm, ldd_secret_of
from llm_datadist.core.link.serve cimport ldd_serve
from llm_datadist.core.link.service_conn cimport (
    CONN_PROVING, CONN_SERVING, MAX_USED_TOKENS, ldd_conn_forget, ldd_conn_reply, ldd_greeting, ldd_pending,
)
from llm_datadist.core.link.wire cimport (
    LDD_FRAME_PING, LDD_FRAME_WELCOME, LDD_HELLO_FORWARD, LDD_HELLO_HAS_SECRET, LDD_HELLO_SHARED_TABLE,
    LDD_MODE_REMOTE_ACCESSIBLE, LDD_WELCOME_FRAME_BYTES, LDD_WELCOME_PROVE, LDD_WIRE_MAGIC, LDD_WIRE_VERSION, ldd_ack,
    ldd_frame_header, ldd_hello, ldd_proof, ldd_welcome,
)
from llm_datadist.core.table.cache_table cimport ldd_table_add_lane
from llm_datadist.core.table.shared_table cimport ldd_lane, ldd_lane_create, ldd_lane_unmap

cdef extern from * nogil:
    """
    #include <poll.h>
    #include <sys/socket.h>

    /* Whether the other end has neither closed the connection nor been found dead. */
    static int ldd_is_connected(int fd) {
        struct pollfd entry = {.fd = fd, .events = POLLRDHUP};
        return poll(&entry, 1, 0) <= 0;
    }

    /* Send a request and take in an answer of that many bytes, both at once or not at all. */
    static int ldd_ask_shortly(int fd, const void *request, size_t request_bytes, void *answer, size_t answer_bytes,
                               int limit_ms) {
        struct pollfd entry = {.fd = fd, .events = POLLIN};
        return send(fd, request, request_bytes, MSG_NOSIGNAL | MSG_DONTWAIT) == (ssize_t)request_bytes &&
               poll(&entry, 1, limit_ms) == 1 && recv(fd, answer, answer_bytes, MSG_DONTWAIT) == (ssize_t)answer_bytes;
    }
    """
    int MSG_NOSIGNAL
    int ldd_is_connected(int fd)
    int ldd_ask_shortly(int fd, const void* request, size_t request_bytes, void* answer, size_t answer_bytes,
                        int limit_ms)
    ssize_t send(int fd, const void* data, size_t nbytes, int flags)


cdef extern from "<unistd.h>" nogil:
    int close(int fd)

cdef enum:
    SLOW_CLIENT_NS = 120000000000               # a peer over hardware makes its client between the two connections
    PONG_BYTES = sizeof(ldd_frame_header) + sizeof(ldd_ack)
    PONG_LIMIT_MS = 300


cdef ldd_pending* _find_awaited(ldd_service* service, const uint8_t* comm, uint64_t cluster_id) noexcept nogil:
    """The awaited peer of this communicator and peer that is not accepted yet. Needs service.lock."""
    cdef uint32_t i
    for i in range(service.num_pending):
        if (not service.pending[i].accepted and service.pending[i].cluster_id == cluster_id
                and memcmp(service.pending[i].comm, comm, 32) == 0):
            return &service.pending[i]
    return NULL


cdef bint _is_zero(const uint8_t* data, size_t nbytes) noexcept nogil:
    cdef size_t i
    for i in range(nbytes):
        if data[i]:
            return False
    return True


cdef ldd_conn* _find_token(ldd_service* service, const uint8_t* token) noexcept nogil:
    """The serving connection of the link that this token names."""
    cdef ldd_conn* conn = service.conns
    while conn != NULL and (conn.link == NULL or memcmp(conn.link.token, token, 16) != 0):
        conn = conn.next
    return conn


cdef bint _is_used(ldd_service* service, const uint8_t* token) noexcept nogil:
    """Whether a link of now or lately has this token: each link has a new one, so whoever repeats it is another."""
    cdef uint32_t i
    if _find_token(service, token) != NULL:
        return True
    for i in range(min(service.num_used_tokens, <uint64_t>MAX_USED_TOKENS)):
        if memcmp(service.used_tokens[i], token, 16) == 0:
            return True
    return False


cdef void _note_used(ldd_service* service, const uint8_t* token) noexcept nogil:
    memcpy(service.used_tokens[service.num_used_tokens % MAX_USED_TOKENS], token, 16)
    service.num_used_tokens += 1


cdef bint _answers(ldd_link* link) noexcept nogil:
    """Whether the process behind an active link answers; the link is broken when it does not.

    Without the interpreter's help, which the usual requests may need; a process that lives answers at once.
    """
    cdef ldd_frame_header ping
    cdef uint8_t answer[PONG_BYTES]
    cdef bint alive
    if ldd_lock_until(&link.lock, 0) < 0:
        return True                             # somebody talks to it just now, and will find out
    memset(&ping, 0, sizeof(ping))
    link.next_request += 1
    ping.magic = LDD_WIRE_MAGIC
    ping.version = LDD_WIRE_VERSION
    ping.type = LDD_FRAME_PING
    ping.request_id = link.next_request
    alive = ldd_ask_shortly(link.ask_fd, &ping, sizeof(ping), answer, PONG_BYTES, PONG_LIMIT_MS) != 0
    if not alive:
        ldd_link_break(link, b"another process came in its place")
    ldd_unlock(&link.lock)
    return alive


cdef ldd_status _check_no_other(ldd_service* service, const ldd_hello* hello, ldd_detail* detail) noexcept nogil:
    """Refuse a process that calls itself by the cluster of another, which is linked and lives.

    One that was started anew in the place of another finds that one's connections ended, or nobody answering there.
    """
    cdef ldd_conn* conn = service.conns
    while conn != NULL:
        if (conn.link != NULL and conn.link.cluster_id == hello.cluster_id and conn.link.origin != ORIGIN_COMM
                and ldd_link_state_of(conn.link) == LINK_ACTIVE and memcmp(conn.link.instance, hello.instance, 16) != 0
                and ldd_is_connected(conn.fd) and _answers(conn.link)):
            return ldd_fail(detail, LDD_E_LINK_FAILED, b"another process is linked as cluster %llu, and lives",
                            <unsigned long long>hello.cluster_id)
        conn = conn.next
    return LDD_OK


cdef ldd_status _check_room(ldd_service* service, const char* peer_ip, ldd_detail* detail) noexcept nogil:
    """Keep descriptors for links in use and for newcomers from elsewhere; a communicator was asked for here."""
    cdef ldd_conn* conn = service.conns
    cdef uint32_t count = 0, from_there = 0
    while conn != NULL:
        if conn.link != NULL and conn.link.origin == ORIGIN_PEER and not conn.deadline_ns:
            count += 1
            from_there += strcmp(conn.link.peer_ip, peer_ip) == 0
        conn = conn.next
    if count >= service.max_links:
        return ldd_fail(detail, LDD_E_LINK_FAILED, b"%u links are accepted, as many as the limit of open files allows",
                        count)
    if from_there >= service.max_links - service.max_links // 4:
        return ldd_fail(detail, LDD_E_LINK_FAILED, b"%u links from %s are accepted, as many as one address may have",
                        from_there, peer_ip)
    return LDD_OK


cdef ldd_status _accept_forward(ldd_service* service, ldd_conn* conn, const ldd_hello* hello,
                                ldd_welcome* answer, ldd_detail* detail) noexcept nogil:
    """Check who comes, and open a link that becomes active when its second connection arrives."""
    cdef ldd_node* node = service.node
    cdef ldd_link* link
    cdef ldd_pending* awaited
    cdef char local_ip[64]
    cdef char peer_ip[64]
    cdef uint32_t port = 0
    cdef int64_t comm_id = 0
    cdef bint for_comm = not _is_zero(hello.comm, 32)
    cdef ldd_status status
    if hello.check_expected and hello.expected_cluster_id != node.cluster_id:
        return ldd_fail(detail, LDD_E_LINK_FAILED, b"this is cluster %llu, not %llu",
                        <unsigned long long>node.cluster_id, <unsigned long long>hello.expected_cluster_id)
    if _is_zero(hello.token, sizeof(hello.token)):
        return ldd_fail(detail, LDD_E_PARAM, b"the token of the link is all zero")
    if _is_used(service, hello.token):
        return ldd_fail(detail, LDD_E_LINK_FAILED, b"the token is that of another link")
    if hello.mode != node.mode:
        return ldd_fail(detail, LDD_E_PARAM, b"the two sides disagree on remote-accessible mode (here %d, there %d)",
                        <int>(node.mode & LDD_MODE_REMOTE_ACCESSIBLE),
                        <int>(hello.mode & LDD_MODE_REMOTE_ACCESSIBLE))
    ldd_socket_peer_ip(conn.fd, peer_ip, sizeof(peer_ip))
    if for_comm:
        ldd_lock(&service.lock)
        awaited = _find_awaited(service, hello.comm, hello.cluster_id)
        comm_id = awaited.comm_id if awaited != NULL else 0
        ldd_unlock(&service.lock)
        if comm_id == 0:
            return ldd_fail(detail, LDD_E_PROCESSING_LINK, b"cluster %llu has not asked for this communicator yet",
                            <unsigned long long>node.cluster_id)
    else:
        status = _check_no_other(service, hello, detail)
        if status == LDD_OK:
            status = _check_room(service, peer_ip, detail)
        if status < 0:
            return status
    ldd_socket_local_ip(conn.fd, local_ip, sizeof(local_ip))
    status = ldd_serve(service, conn, local_ip, &port, detail)
    if status < 0:
        return status
    link = ldd_link_new(node, hello.cluster_id, ORIGIN_COMM if for_comm else ORIGIN_PEER)
    if link == NULL:
        return ldd_fail(detail, LDD_E_NO_MEMORY, b"no memory for a link")
    memcpy(link.instance, hello.instance, 16)
    memcpy(link.token, hello.token, 16)
    link.comm_id = comm_id
    memcpy(link.peer_ip, peer_ip, sizeof(link.peer_ip))
    memcpy(link.data_ip, link.peer_ip, sizeof(link.data_ip))
    link.data_port = hello.data_port
    memcpy(link.endpoint, hello.endpoint, sizeof(link.endpoint))
    ldd_regions_own_endpoint(&node.regions, answer.endpoint)
    status = ldd_regions_admit_peer(&node.regions, port, link.token, detail)
    if status < 0:
        ldd_link_unref(link)
        return status
    conn.link = link
    answer.data_port = port
    return LDD_OK


cdef ldd_status _accept_awaited(ldd_service* service, const ldd_hello* hello, ldd_link* link,
                          ldd_detail* detail) noexcept nogil:
    """Publish the link of a communicator that is still expected."""
    cdef ldd_pending* awaited
    cdef ldd_status status
    ldd_lock(&service.lock)
    awaited = _find_awaited(service, hello.comm, link.cluster_id)
    if awaited == NULL or awaited.comm_id != link.comm_id:
        status = ldd_fail(detail, LDD_E_PROCESSING_LINK, b"the communicator was given up meanwhile")
    else:
        status = ldd_link_publish(link, NULL, detail)
        awaited.accepted = status == LDD_OK
    ldd_unlock(&service.lock)
    return status


cdef ldd_status _activate(ldd_service* service, ldd_conn* reverse, const ldd_hello* hello, ldd_link** out,
                         ldd_detail* detail) noexcept nogil:
    """The second connection of a link arrived: it is the one we ask on.

    The link is returned locked: who finds it now must not ask before our answer to this connection is on its way.
    """
    cdef ldd_conn* forward = _find_token(service, hello.token)
    cdef ldd_link* link
    cdef ldd_status status
    if forward == NULL or ldd_link_state_of(forward.link) != LINK_OPENING:
        return ldd_fail(detail, LDD_E_LINK_FAILED, b"no link is being opened under this token")
    link = forward.link
    if hello.cluster_id != link.cluster_id or memcmp(hello.instance, link.instance, 16) != 0:
        return ldd_fail(detail, LDD_E_LINK_FAILED, b"the two connections of the link are of different processes")
    if link.origin == ORIGIN_PEER:
        status = _check_no_other(service, hello, detail)
        if status < 0:
            return status
        # The peer would not ask if it knew of these: they are left over from before it unlinked or restarted.
        ldd_links_drop_stale(service.node, link.cluster_id, link.instance)
    link.ask_fd = reverse.fd
    ldd_lock(&link.lock)
    if link.origin == ORIGIN_COMM:
        status = _accept_awaited(service, hello, link, detail)
    else:
        status = ldd_link_publish(link, NULL, detail)
    if status < 0:
        ldd_unlock(&link.lock)
        link.ask_fd = -1
        return status
    out[0] = link
    _note_used(service, link.token)
    forward.deadline_ns = 0
    service.num_handshakes -= 1
    return LDD_OK


cdef bint _hand_out_table(ldd_service* service, ldd_conn* conn, const ldd_frame_header* header, const ldd_hello* hello,
                         ldd_welcome* answer) noexcept nogil:
    """Give a linked process of the same user on this host our table to read, and a lane to write."""
    cdef uint8_t frame[LDD_WELCOME_FRAME_BYTES]
    cdef ldd_frame_header reply_header
    cdef ldd_conn* serving = _find_token(service, hello.token)
    cdef ldd_lane* lane
    cdef int files[3]
    if (serving == NULL or serving.link.lane != NULL or not service.node.shares_table
            or service.node.table.shared.table_fd < 0 or not ldd_socket_is_own_user(conn.fd)):
        ldd_add64(&service.num_rejected_frames, 1)
        return False
    lane = ldd_lane_create(&files[2])
    if lane == NULL:
        return False
    if ldd_table_add_lane(service.node.table, lane) < 0:
        close(files[2])
        ldd_lane_unmap(lane)
        return False
    serving.link.lane = lane                    # goes with the link, see replies.pyx
    files[0] = service.node.table.shared.table_fd
    files[1] = service.node.table.shared.marks_fd
    reply_header = header[0]
    reply_header.type = LDD_FRAME_WELCOME
    reply_header.length = sizeof(ldd_welcome)
    memcpy(frame, &reply_header, sizeof(reply_header))
    memcpy(frame + sizeof(reply_header), answer, sizeof(ldd_welcome))
    ldd_socket_send_files(conn.fd, frame, sizeof(frame), files, 3)
    close(files[2])
    return False                                # one answer, and the connection is over


cdef bint _ask_for_proof(ldd_conn* conn, const ldd_frame_header* header, const ldd_hello* hello,
                         ldd_welcome* answer) noexcept nogil:
    """Answer a hello by a number that nobody was asked with before; False without memory."""
    conn.greeting = <ldd_greeting*>malloc(sizeof(ldd_greeting))
    if conn.greeting == NULL:
        return False
    answer.status = LDD_WELCOME_PROVE
    ldd_random(answer.nonce, sizeof(answer.nonce))
    conn.greeting.hello = hello[0]
    conn.greeting.asked = answer[0]
    conn.kind = CONN_PROVING
    return ldd_conn_reply(conn, header.request_id, LDD_FRAME_WELCOME, answer, sizeof(ldd_welcome), NULL, 0) == LDD_OK


cdef bint ldd_accept_hello(ldd_service* service, ldd_conn* conn, const ldd_frame_header* header,
                   const uint8_t* payload) noexcept nogil:
    cdef ldd_hello hello
    cdef ldd_proof proof
    cdef ldd_welcome answer
    cdef ldd_detail detail
    cdef ldd_status status = LDD_OK
    cdef ldd_link* activated = NULL
    cdef const uint8_t* secret = NULL
    memset(&answer, 0, sizeof(answer))
    detail.text[0] = 0
    detail.provider_code = 0
    answer.cluster_id = service.node.cluster_id
    answer.mode = service.node.mode
    memcpy(answer.instance, service.node.instance, 16)
    if header.version != LDD_WIRE_VERSION:
        status = ldd_fail(&detail, LDD_E_LINK_FAILED, b"protocol version %u is not spoken here, only %u",
                          <uint32_t>header.version, <uint32_t>LDD_WIRE_VERSION)
    elif conn.kind == CONN_PROVING:
        memcpy(&proof, payload, sizeof(proof))
        hello = conn.greeting.hello
        secret = ldd_secret_of(service.node, &hello, &conn.greeting.asked, &proof)
        if secret == NULL:
            status = ldd_fail(&detail, LDD_E_LINK_FAILED, b"the shared secrets of the two sides differ")
    else:
        memcpy(&hello, payload, sizeof(hello))
        if conn.link != NULL or hello.direction > LDD_HELLO_SHARED_TABLE:
            ldd_add64(&service.num_rejected_frames, 1)
            return False
        if hello.direction == LDD_HELLO_SHARED_TABLE:       # the token of a link says that its owner has proved it
            return _hand_out_table(service, conn, header, &hello, &answer)
        if (hello.flags & LDD_HELLO_HAS_SECRET != 0) != (service.node.num_secrets != 0):
            status = ldd_fail(&detail, LDD_E_LINK_FAILED,
                              b"a shared secret is asked for here, and the peer has none" if service.node.num_secrets
                              else b"the peer has a shared secret, and none is set here")
        elif service.node.num_secrets:
            return _ask_for_proof(conn, header, &hello, &answer)
    if status == LDD_OK:
        if hello.direction == LDD_HELLO_FORWARD:
            status = _accept_forward(service, conn, &hello, &answer, &detail)
            if conn.waits:
                return True
        else:
            status = _activate(service, conn, &hello, &activated, &detail)
    answer.status = status
    snprintf(answer.text, sizeof(answer.text), b"%s", detail.text)
    if secret != NULL:
        ldd_secret_confirm(secret, &hello, &conn.greeting.asked, &answer)
        free(conn.greeting)
        conn.greeting = NULL
    if status < 0:
        ldd_add64(&service.num_refused, 1)
        if status != LDD_E_PROCESSING_LINK:                 # who is early comes again, many times
            ldd_tell_refusal(service, conn.fd, &detail)
    if ldd_conn_reply(conn, header.request_id, LDD_FRAME_WELCOME, &answer, sizeof(answer), NULL, 0) < 0:
        if activated == NULL:
            return False
        ldd_link_break(activated, b"no memory to answer the peer")
    if activated != NULL:
        # The socket now belongs to the link; its small answer fits an empty send buffer.
        send(conn.fd, conn.outbox.data, conn.outbox.length, MSG_NOSIGNAL)
        ldd_conn_forget(service, conn, False)
        ldd_unlock(&activated.lock)             # the serving connection keeps a reference to it
        return True
    if status < 0:
        conn.closing = True
    else:
        conn.kind = CONN_SERVING                # the deadline stays until the link's second connection came
        if service.node.regions.num_endpoints and conn.deadline_ns:
            conn.deadline_ns = ldd_now_ns() + SLOW_CLIENT_NS
    return True


cdef ldd_status ldd_service_expect(ldd_service* service, const uint8_t* comm, uint64_t cluster_id,
                                 int64_t comm_id) noexcept nogil:
    cdef ldd_pending* grown
    cdef ldd_status status = LDD_OK
    ldd_lock(&service.lock)
    if service.num_pending == service.pending_capacity:
        grown = <ldd_pending*>realloc(service.pending, (service.pending_capacity * 2 + 8) * sizeof(ldd_pending))
        if grown == NULL:
            status = LDD_E_NO_MEMORY
        else:
            service.pending = grown
            service.pending_capacity = service.pending_capacity * 2 + 8
    if status == LDD_OK:
        memcpy(service.pending[service.num_pending].comm, comm, 32)
        service.pending[service.num_pending].cluster_id = cluster_id
        service.pending[service.num_pending].comm_id = comm_id
        service.pending[service.num_pending].accepted = False
        service.num_pending += 1
    ldd_unlock(&service.lock)
    return status


cdef bint ldd_service_accepted(ldd_service* service, int64_t comm_id, uint64_t cluster_id) noexcept nogil:
    cdef bint accepted = False
    cdef uint32_t i
    ldd_lock(&service.lock)
    for i in range(service.num_pending):
        if service.pending[i].comm_id == comm_id and service.pending[i].cluster_id == cluster_id:
            accepted = service.pending[i].accepted
    ldd_unlock(&service.lock)
    return accepted


cdef void ldd_service_forget(ldd_service* service, int64_t comm_id) noexcept nogil:
    cdef uint32_t i = 0
    ldd_lock(&service.lock)
    while i < service.num_pending:
        if service.pending[i].comm_id == comm_id:
            service.num_pending -= 1
            service.pending[i] = service.pending[service.num_pending]
        else:
            i += 1
    ldd_unlock(&service.lock)
