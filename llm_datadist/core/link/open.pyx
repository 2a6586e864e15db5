"""Opening and ending a link, for the side that asks for it.

Opening takes three steps, each bounded by the one deadline: a connection to ask on, a second one on which
the peer asks, and the data path to the peer's memory. Whatever fails, both ends are left without the link. A link
that is made anew takes the place of the broken one, whose data client ends before: nothing of it moves any more.
"""
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset, strncpy

from llm_datadist.core.base.interrupt cimport ldd_interrupted
from llm_datadist.core.base.sockets cimport (
    SIGNAL_SLICE_MS, ldd_socket_connect, ldd_socket_local_ip, ldd_socket_peer_ip,
)
from llm_datadist.core.base.status cimport (
    LDD_E_ALREADY_LINKED, LDD_E_FAILED, LDD_E_INTERRUPTED, LDD_E_LINK_FAILED, LDD_E_NOT_LINKED, LDD_E_NO_MEMORY,
    LDD_E_TIMEOUT, LDD_E_UNLINK_FAILED, LDD_OK, ldd_fail,
)
from llm_datadist.core.base.sync cimport ldd_cond_broadcast, ldd_cond_wait_until, ldd_lock, ldd_now_ns, ldd_unlock
from llm_datadist.core.base.wait cimport ldd_lock_interruptible
from llm_datadist.core.link.background cimport ldd_background_destroy, ldd_background_serve
from llm_datadist.core.link.links cimport (
    LINK_ACTIVE, LINK_CLOSED, ORIGIN_COMM, ORIGIN_LOCAL, ldd_attempt, ldd_link, ldd_link_drop, ldd_link_end,
    ldd_link_hold_broken, ldd_link_new, ldd_link_publish, ldd_link_set_left, ldd_link_state_of,
    ldd_link_unref,
)
from llm_datadist.core.link.region cimport (
    ldd_regions_admit_peer, ldd_regions_drop_peer, ldd_regions_own_endpoint,
)
from llm_datadist.core.link.requests cimport ldd_exchange, ldd_link_ready, ldd_request_unlink
from llm_datadist.core.link.secret cimport ldd_random, ldd_secret_confirms, ldd_secret_prove
from llm_datadist.core.link.service cimport ldd_service_serve
from llm_datadist.core.link.wire cimport (
    LDD_FRAME_HELLO, LDD_FRAME_PROOF, LDD_FRAME_WELCOME, LDD_HELLO_FORWARD, LDD_HELLO_HAS_SECRET, LDD_HELLO_REVERSE,
    LDD_WELCOME_PROVE, ldd_hello, ldd_proof, ldd_welcome,
)
from llm_datadist.core.record.record cimport (
    LDD_EVENT_LINK, LDD_OP_LINK, ldd_record_count, ldd_record_peer, ldd_trace_span,
)

cdef extern from "<unistd.h>" nogil:
    int close(int fd)


cdef enum:
    ANSWER_GRACE_NS = 5000000000


cdef ldd_status _already_linked_locked(ldd_node* node, uint64_t cluster_id, ldd_detail* detail) noexcept nogil:
    """A link made from this side stays until this side unlinks; one that is broken can be replaced, if links heal."""
    cdef ldd_link* link = node.links
    while link != NULL and not (link.cluster_id == cluster_id and link.origin == ORIGIN_LOCAL):
        link = link.next
    if link == NULL:
        return LDD_OK
    if ldd_link_state_of(link) == LINK_ACTIVE:
        return ldd_fail(detail, LDD_E_ALREADY_LINKED, b"cluster %llu is linked already",
                        <unsigned long long>cluster_id)
    if node.heal_ns:
        return LDD_OK
    return ldd_fail(detail, LDD_E_ALREADY_LINKED,
                    b"cluster %llu is linked already, though broken (%s): unlink it first",
                    <unsigned long long>cluster_id, link.reason)


cdef bint _is_attempted_locked(ldd_node* node, uint64_t cluster_id) noexcept nogil:
    cdef ldd_attempt* attempt = node.attempts
    while attempt != NULL and attempt.cluster_id != cluster_id:
        attempt = attempt.next
    return attempt != NULL


cdef ldd_status _start_attempt(ldd_node* node, ldd_attempt* attempt, int64_t deadline_ns,
                              ldd_detail* detail) noexcept nogil:
    """Become the one thread that links to this cluster, once no other does and there is no link.

    Two attempts at once would undo each other: the peer keeps only the later of two links from the same cluster.
    """
    cdef int64_t slice_ns
    cdef ldd_status status
    ldd_lock(&node.lock)
    while True:
        status = _already_linked_locked(node, attempt.cluster_id, detail)
        if status == LDD_OK and node.closing:
            status = ldd_fail(detail, LDD_E_FAILED, b"the engine is being finalized")
        if status < 0 or not _is_attempted_locked(node, attempt.cluster_id):
            break
        slice_ns = ldd_now_ns() + <int64_t>SIGNAL_SLICE_MS * 1000000
        ldd_cond_wait_until(&node.attempted, &node.lock, min(deadline_ns, slice_ns))
        ldd_unlock(&node.lock)
        if ldd_interrupted() != 0:
            return LDD_E_INTERRUPTED
        if ldd_now_ns() >= deadline_ns:
            return ldd_fail(detail, LDD_E_TIMEOUT, b"another thread was linking to cluster %llu all the time",
                            <unsigned long long>attempt.cluster_id)
        ldd_lock(&node.lock)
    if status == LDD_OK:
        attempt.next = node.attempts
        node.attempts = attempt
        node.num_ops += 1                       # the engine's parts stay while we use them
    ldd_unlock(&node.lock)
    return status


cdef void _end_attempt(ldd_node* node, ldd_attempt* attempt) noexcept nogil:
    cdef ldd_attempt** at = &node.attempts
    ldd_lock(&node.lock)
    while at[0] != attempt:
        at = &at[0].next
    at[0] = attempt.next
    node.num_ops -= 1
    if node.num_ops == 0:
        ldd_cond_broadcast(&node.idle)
    ldd_cond_broadcast(&node.attempted)
    ldd_unlock(&node.lock)


cdef ldd_status _greet(ldd_link* link, int fd, uint16_t direction, const uint8_t* comm, uint32_t data_port,
                      ldd_welcome* answer, int64_t deadline_ns, ldd_detail* detail) noexcept nogil:
    cdef ldd_hello hello
    cdef ldd_welcome asked
    cdef ldd_proof proof
    cdef ldd_status status
    memset(&hello, 0, sizeof(hello))
    hello.direction = direction
    if link.node.num_secrets:
        hello.flags = LDD_HELLO_HAS_SECRET
        ldd_random(hello.nonce, sizeof(hello.nonce))
    hello.mode = link.node.mode
    hello.cluster_id = link.node.cluster_id
    hello.expected_cluster_id = link.cluster_id
    hello.check_expected = 1
    memcpy(hello.instance, link.node.instance, 16)
    memcpy(hello.token, link.token, 16)
    if comm != NULL:
        memcpy(hello.comm, comm, 32)
    hello.data_port = data_port
    ldd_regions_own_endpoint(&link.node.regions, hello.endpoint)
    status = ldd_exchange(fd, direction + 1, LDD_FRAME_HELLO, &hello, sizeof(hello), LDD_FRAME_WELCOME, answer,
                          sizeof(ldd_welcome), NULL, NULL, deadline_ns, detail)
    if status == LDD_OK and answer.status == LDD_WELCOME_PROVE and link.node.num_secrets:
        asked = answer[0]
        ldd_secret_prove(link.node, &hello, &asked, &proof)
        status = ldd_exchange(fd, direction + 1, LDD_FRAME_PROOF, &proof, sizeof(proof), LDD_FRAME_WELCOME, answer,
                              sizeof(ldd_welcome), NULL, NULL, deadline_ns, detail)
        if status == LDD_OK and answer.status >= 0 and not ldd_secret_confirms(link.node, &hello, &asked, answer):
            return ldd_fail(detail, LDD_E_LINK_FAILED, b"cluster %llu does not know the shared secret of this side",
                            <unsigned long long>link.cluster_id)
    elif status == LDD_OK and answer.status >= 0 and (link.node.num_secrets or answer.status != LDD_OK):
        return ldd_fail(detail, LDD_E_LINK_FAILED,
                        b"cluster %llu asks for no shared secret, and this side has one" if link.node.num_secrets else
                        b"cluster %llu asks for a shared secret, and this side has none",
                        <unsigned long long>link.cluster_id)
    if status < 0:
        return status if status == LDD_E_TIMEOUT or status == LDD_E_INTERRUPTED else LDD_E_LINK_FAILED
    answer.text[sizeof(answer.text) - 1] = 0
    if answer.status < 0:
        return ldd_fail(detail, answer.status, b"cluster %llu refuses: %s", <unsigned long long>link.cluster_id,
                        answer.text)
    if answer.cluster_id != link.cluster_id:
        return ldd_fail(detail, LDD_E_LINK_FAILED, b"cluster %llu answered instead of %llu",
                        <unsigned long long>answer.cluster_id, <unsigned long long>link.cluster_id)
    return LDD_OK


cdef ldd_status _open_parts(ldd_link* link, const char* ip, int port, const uint8_t* comm, int* serve_fd,
                           int64_t deadline_ns, ldd_detail* detail) noexcept nogil:
    cdef ldd_welcome answer
    cdef char local_ip[64]
    cdef uint32_t data_port = 0
    cdef ldd_status status
    status = ldd_socket_connect(ip, port, deadline_ns, &link.ask_fd, detail)
    if status < 0:
        return LDD_E_LINK_FAILED if status == LDD_E_FAILED else status
    ldd_socket_local_ip(link.ask_fd, local_ip, sizeof(local_ip))
    ldd_socket_peer_ip(link.ask_fd, link.peer_ip, sizeof(link.peer_ip))
    status = ldd_background_serve(link, local_ip, &data_port, deadline_ns, detail)
    if status == LDD_OK:
        status = _greet(link, link.ask_fd, LDD_HELLO_FORWARD, comm, data_port, &answer, deadline_ns, detail)
    if status == LDD_OK:                        # not before: who merely listens there has been told the token
        status = ldd_regions_admit_peer(&link.node.regions, data_port, link.token, detail)
    if status < 0:
        return status
    memcpy(link.instance, answer.instance, 16)
    memcpy(link.data_ip, link.peer_ip, sizeof(link.data_ip))
    link.data_port = answer.data_port
    memcpy(link.endpoint, answer.endpoint, sizeof(link.endpoint))
    status = ldd_link_ready(link, 0, deadline_ns, detail)
    if status < 0:
        return status if status == LDD_E_TIMEOUT or status == LDD_E_INTERRUPTED else LDD_E_LINK_FAILED
    status = ldd_socket_connect(ip, port, deadline_ns, serve_fd, detail)
    if status < 0:
        return LDD_E_LINK_FAILED if status == LDD_E_FAILED else status
    if comm != NULL:
        # With its answer the peer counts the communicator as made: one that is just late must not be given up.
        deadline_ns = max(deadline_ns, ldd_now_ns() + ANSWER_GRACE_NS)
    return _greet(link, serve_fd[0], LDD_HELLO_REVERSE, comm, data_port, &answer, deadline_ns, detail)


cdef ldd_status _fence(ldd_link* link, int64_t deadline_ns, ldd_detail* detail) noexcept nogil:
    """Have the data client of a broken link end, once nobody uses it, so that nothing it moves lands any more."""
    cdef ldd_status status = ldd_lock_interruptible(&link.lock, deadline_ns)
    if status < 0:
        if status == LDD_E_TIMEOUT:
            ldd_fail(detail, status, b"a transfer that failed kept the link to cluster %llu until the deadline",
                     <unsigned long long>link.cluster_id)
        return status
    ldd_background_destroy(link)
    ldd_unlock(&link.lock)
    return LDD_OK


cdef ldd_status _open_link(ldd_node* node, ldd_service* service, const char* ip, int port, uint64_t cluster_id,
                          const uint8_t* comm, int64_t comm_id, ldd_link* replaced, int64_t deadline_ns,
                          ldd_detail* detail) noexcept nogil:
    cdef int serve_fd = -1
    cdef ldd_link* link
    cdef ldd_status status
    cdef int64_t start_ns
    if replaced != NULL:
        status = _fence(replaced, deadline_ns, detail)
        if status < 0:
            return status
    link = ldd_link_new(node, cluster_id, ORIGIN_COMM if comm != NULL else ORIGIN_LOCAL)
    if link == NULL:
        return ldd_fail(detail, LDD_E_NO_MEMORY, b"no memory for a link")
    link.comm_id = comm_id
    strncpy(link.at_ip, ip, sizeof(link.at_ip) - 1)
    link.at_port = port
    ldd_random(link.token, sizeof(link.token))
    start_ns = ldd_now_ns()
    status = _open_parts(link, ip, port, comm, &serve_fd, deadline_ns, detail)
    if status == LDD_OK:
        status = ldd_link_publish(link, replaced, detail)
    ldd_record_count(ldd_record_peer(&node.record, cluster_id), LDD_OP_LINK, ldd_now_ns() - start_ns, 0, status < 0)
    ldd_trace_span(&node.record, LDD_EVENT_LINK, start_ns, cluster_id, 0, 0, 0, 0, status)
    if status < 0:
        if serve_fd >= 0:
            close(serve_fd)
        ldd_regions_drop_peer(&node.regions, link.token)
        ldd_link_unref(link)
        return status
    ldd_service_serve(service, serve_fd, link)  # takes over the reference
    return LDD_OK


cdef ldd_status ldd_link_open(ldd_node* node, ldd_service* service, const char* ip, int port, uint64_t cluster_id,
                              const uint8_t* comm, int64_t comm_id, int64_t deadline_ns,
                              ldd_detail* detail) noexcept nogil:
    cdef ldd_attempt attempt
    cdef ldd_link* broken
    cdef ldd_status status
    if comm != NULL:
        return _open_link(node, service, ip, port, cluster_id, comm, comm_id, NULL, deadline_ns, detail)
    attempt.cluster_id = cluster_id
    status = _start_attempt(node, &attempt, deadline_ns, detail)
    if status == LDD_OK:
        broken = ldd_link_hold_broken(node, cluster_id)
        status = _open_link(node, service, ip, port, cluster_id, NULL, 0, broken, deadline_ns, detail)
        if broken != NULL:
            ldd_link_unref(broken)
        _end_attempt(node, &attempt)
    return status


cdef ldd_status ldd_link_reopen(ldd_node* node, uint64_t cluster_id, int64_t deadline_ns,
                                ldd_detail* detail) noexcept nogil:
    cdef ldd_attempt attempt
    cdef ldd_link* broken
    cdef ldd_status status
    attempt.cluster_id = cluster_id
    status = _start_attempt(node, &attempt, deadline_ns, detail)
    if status < 0:
        return LDD_OK if status == LDD_E_ALREADY_LINKED else status
    broken = ldd_link_hold_broken(node, cluster_id)
    if broken == NULL:
        status = ldd_fail(detail, LDD_E_NOT_LINKED, b"cluster %llu was unlinked", <unsigned long long>cluster_id)
    else:
        status = _open_link(node, <ldd_service*>node.service, broken.at_ip, broken.at_port, cluster_id, NULL, 0, broken,
                            deadline_ns, detail)
        ldd_link_unref(broken)
    _end_attempt(node, &attempt)
    return status


cdef ldd_link* _next_to_close(ldd_node* node, uint64_t cluster_id) noexcept nogil:
    cdef ldd_link* link
    ldd_lock(&node.lock)
    link = node.links
    while link != NULL and (link.cluster_id != cluster_id or link.origin == ORIGIN_COMM):
        link = link.next
    if link != NULL:
        link.refs += 1
        link.ops += 1
        node.num_ops += 1
    ldd_unlock(&node.lock)
    return link


cdef ldd_status _tell_listener(const char* ip, int port, int64_t deadline_ns, ldd_detail* detail) noexcept nogil:
    """A broken link cannot be asked on. The peer drops its side when it sees ours end, if it is alive."""
    cdef int fd = -1
    cdef ldd_status status
    if ip == NULL:
        return LDD_OK
    status = ldd_socket_connect(ip, port, deadline_ns, &fd, detail)
    if status == LDD_OK:
        close(fd)
    return status


cdef ldd_status ldd_link_close(ldd_node* node, const char* ip, int port, uint64_t cluster_id, int64_t deadline_ns,
                               ldd_detail* detail) noexcept nogil:
    cdef ldd_link* link
    cdef ldd_status status
    while True:
        link = _next_to_close(node, cluster_id)
        if link == NULL:
            return LDD_OK
        status = ldd_lock_interruptible(&link.lock, deadline_ns)
        if status < 0:
            if status != LDD_E_INTERRUPTED:
                ldd_fail(detail, status, b"the link to cluster %llu is in use", <unsigned long long>cluster_id)
            ldd_link_end(link)
            return status
        status = LDD_OK
        ldd_link_set_left(link, True)             # it is to go: where the peer cannot be told it breaks, and stays so
        if ldd_link_state_of(link) == LINK_ACTIVE:
            ldd_background_destroy(link)        # before the peer hears of the end: what it confirms last arrives first
            status = ldd_request_unlink(link, deadline_ns, detail)
        elif not _link_closed(link):
            status = _tell_listener(ip, port, deadline_ns, detail)
        ldd_unlock(&link.lock)
        if status < 0 and status != LDD_E_INTERRUPTED and _link_closed(link):
            status = LDD_OK                     # the peer unlinked at the same time
        if status == LDD_OK:
            ldd_link_drop(link)
        elif ldd_link_state_of(link) == LINK_ACTIVE:
            ldd_link_set_left(link, False)
        ldd_link_end(link)
        if status < 0:
            return status if status == LDD_E_TIMEOUT or status == LDD_E_INTERRUPTED else LDD_E_UNLINK_FAILED


cdef bint _link_closed(ldd_link* link) noexcept nogil:
    """Whether the peer's own unlink, or another thread's, has closed it."""
    cdef bint closed
    ldd_lock(&link.node.lock)
    closed = ldd_link_state_of(link) == LINK_CLOSED
    ldd_unlock(&link.node.lock)
    return closed
