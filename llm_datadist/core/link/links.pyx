"""The links of this engine and their state, shared by the service thread and user threads.

`node.lock` guards the set of links and each link's state and counts; it is a leaf lock, held for a few
instructions. A link is freed by whoever drops its last reference.

The rule that keeps peers' memory safe: **our asking connection stays open as long as an operation of ours
may touch peer memory**, whatever else became of the link, and is shut down right after. The peer takes its
end as the proof that its leases are over.
"""
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memcmp, memset, strncpy

from llm_datadist.core.base.atomic cimport ldd_add64, ldd_set32, ldd_store32
from llm_datadist.core.base.sockets cimport ldd_socket_shutdown
from llm_datadist.core.base.status cimport LDD_E_FAILED, LDD_E_NOT_LINKED, LDD_OK, ldd_fail
from llm_datadist.core.base.sync cimport (
    ldd_cond_broadcast, ldd_cond_destroy, ldd_cond_init, ldd_cond_wait_until, ldd_lock, ldd_mutex_destroy,
    ldd_mutex_init, ldd_unlock,
)
from llm_datadist.core.link.client cimport ldd_client_destroy, ldd_client_end
from llm_datadist.core.link.wire cimport LDD_FRAME_LEAVE, LDD_WIRE_MAGIC, LDD_WIRE_VERSION, ldd_frame_header
from llm_datadist.core.plan.block_plan cimport ldd_desc_list_free
from llm_datadist.core.record.record cimport (
    LDD_EVENT_ACCEPT, ldd_record_broken, ldd_record_destroy, ldd_record_linked, ldd_record_unlinked,
)
from llm_datadist.core.table.holds cimport ldd_holds_destroy, ldd_holds_init
from llm_datadist.core.table.shared_table cimport ldd_reader_free

cdef extern from "<sys/socket.h>" nogil:
    int MSG_NOSIGNAL, MSG_DONTWAIT
    ssize_t send(int fd, const void* data, size_t nbytes, int flags)
cdef extern from "unistd.h" nogil:
    int close(int fd)


cdef void ldd_node_init(ldd_node* node, const ldd_provider* provider, uint64_t cluster_id) noexcept nogil:
    memset(node, 0, sizeof(ldd_node))
    node.provider = provider
    node.cluster_id = cluster_id
    ldd_holds_init(&node.holds)
    ldd_mutex_init(&node.lock)
    ldd_cond_init(&node.idle)
    ldd_cond_init(&node.attempted)


cdef void ldd_node_destroy(ldd_node* node) noexcept nogil:
    ldd_holds_destroy(&node.holds)
    ldd_record_destroy(&node.record)
    ldd_mutex_destroy(&node.lock)
    ldd_cond_destroy(&node.idle)
    ldd_cond_destroy(&node.attempted)
    free(node.past)
    node.past = NULL


cdef ldd_link* ldd_link_new(ldd_node* node, uint64_t cluster_id, ldd_link_origin origin) noexcept nogil:
    cdef ldd_link* link = <ldd_link*>calloc(1, sizeof(ldd_link))
    if link == NULL:
        return NULL
    link.node = node
    link.cluster_id = cluster_id
    link.origin = origin
    ldd_store32(&link.state, LINK_OPENING)
    link.refs = 1
    link.ask_fd = -1
    ldd_mutex_init(&link.lock)
    link.descs.refuses_repeats = node.strict
    return link


cdef void _destroy(ldd_link* link) noexcept nogil:
    if link.opening != NULL:
        link.take_opening(link)
    if link.client != NULL:
        ldd_client_end(link.node, link.client)
    free(link.own_memory)
    if link.ask_fd >= 0:
        close(link.ask_fd)
    ldd_reader_free(link.reader)
    ldd_desc_list_free(&link.descs)
    free(link.reply)
    free(link.leases)
    ldd_mutex_destroy(&link.lock)
    free(link)


cdef void ldd_link_ref(ldd_link* link) noexcept nogil:
    ldd_lock(&link.node.lock)
    link.refs += 1
    ldd_unlock(&link.node.lock)


cdef void ldd_link_unref(ldd_link* link) noexcept nogil:
    cdef ldd_node* node = link.node
    ldd_lock(&node.lock)
    link.refs -= 1
    cdef bint last = link.refs == 0
    ldd_unlock(&node.lock)
    if last:
        _destroy(link)


cdef ldd_past* _past_locked(ldd_node* node, uint64_t cluster_id) noexcept nogil:
    cdef uint32_t i
    for i in range(node.num_past):
        if node.past[i].cluster_id == cluster_id:
            return &node.past[i]
    return NULL


cdef bint ldd_link_existed(ldd_node* node, uint64_t cluster_id) noexcept nogil:
    ldd_lock(&node.lock)
    cdef bint existed = _past_locked(node, cluster_id) != NULL
    ldd_unlock(&node.lock)
    return existed


cdef void _remember_locked(ldd_node* node, uint64_t cluster_id) noexcept nogil:
    """Without memory the cluster is forgotten with its link, which changes the code of a later unlink and no more."""
    cdef ldd_past* grown
    cdef ldd_past* known = _past_locked(node, cluster_id)
    if known != NULL:
        known.lost = False
        return
    if node.num_past == MAX_PAST:
        node.past[node.next_past].cluster_id = cluster_id
        node.past[node.next_past].lost = False
        node.next_past = (node.next_past + 1) % MAX_PAST
        return
    if node.num_past == node.past_capacity:
        grown = <ldd_past*>realloc(node.past, (node.past_capacity * 2 + 16) * sizeof(ldd_past))
        if grown == NULL:
            return
        node.past = grown
        node.past_capacity = node.past_capacity * 2 + 16
    node.past[node.num_past].cluster_id = cluster_id
    node.past[node.num_past].lost = False
    node.num_past += 1


cdef ldd_status ldd_link_publish(ldd_link* link, ldd_link* replaced, ldd_detail* detail) noexcept nogil:
    cdef ldd_node* node = link.node
    ldd_lock(&node.lock)
    if node.closing:
        ldd_unlock(&node.lock)
        return ldd_fail(detail, LDD_E_FAILED, b"the engine is being finalized")
    if replaced != NULL:
        if ldd_link_state_of(replaced) != LINK_BROKEN or not _take_out_locked(replaced):
            ldd_unlock(&node.lock)
            return ldd_fail(detail, LDD_E_NOT_LINKED, b"cluster %llu was unlinked meanwhile",
                            <unsigned long long>link.cluster_id)
        ldd_add64(&node.num_healed, 1)
    if node.num_links >= MAX_LINKS:
        ldd_unlock(&node.lock)
        return ldd_fail(detail, LDD_E_FAILED, b"%d links exist, which is the most one engine holds", <int>MAX_LINKS)
    ldd_store32(&link.state, LINK_ACTIVE)
    link.refs += 1
    link.next = node.links
    node.links = link
    ldd_set32(&node.num_links, node.num_links + 1)
    link.record = ldd_record_linked(&node.record, link.cluster_id, LINK_ACTIVE, link.peer_ip,
                                    0 if link.origin == ORIGIN_LOCAL else LDD_EVENT_ACCEPT)
    if link.origin != ORIGIN_COMM:
        _remember_locked(node, link.cluster_id)
    ldd_cond_broadcast(&node.attempted)
    ldd_unlock(&node.lock)
    if replaced != NULL:
        ldd_link_unref(replaced)
    return LDD_OK


cdef void _start_locked(ldd_link* link) noexcept nogil:
    link.refs += 1
    link.ops += 1
    link.node.num_ops += 1


cdef void ldd_link_hold(ldd_link* link) noexcept nogil:
    ldd_lock(&link.node.lock)
    _start_locked(link)
    ldd_unlock(&link.node.lock)


cdef bint ldd_link_resume(ldd_link* link) noexcept nogil:
    ldd_lock(&link.node.lock)
    cdef bint active = ldd_link_state_of(link) == LINK_ACTIVE
    if active:
        _start_locked(link)
    ldd_unlock(&link.node.lock)
    return active


cdef ldd_status ldd_link_begin(ldd_node* node, uint64_t cluster_id, ldd_link** out,
                               ldd_detail* detail) noexcept nogil:
    cdef ldd_link* link
    cdef ldd_link* broken = NULL
    cdef ldd_status status = LDD_E_NOT_LINKED
    ldd_lock(&node.lock)
    link = node.links
    while link != NULL:
        if link.cluster_id == cluster_id:
            if ldd_link_state_of(link) == LINK_ACTIVE:
                _start_locked(link)
                out[0] = link
                ldd_unlock(&node.lock)
                return LDD_OK
            broken = link
        link = link.next
    if broken != NULL:
        ldd_fail(detail, status, b"the link to cluster %llu is broken (%s)%s",
                 <unsigned long long>cluster_id, broken.reason,
                 <const char*>b"" if node.heal_ns and not broken.left else <const char*>b": unlink and link again")
    else:
        ldd_fail(detail, status, b"cluster %llu is not linked", <unsigned long long>cluster_id)
    ldd_unlock(&node.lock)
    return status


cdef void ldd_link_end(ldd_link* link) noexcept nogil:
    cdef ldd_node* node = link.node
    ldd_lock(&node.lock)
    link.ops -= 1
    if link.ops == 0 and ldd_link_state_of(link) != LINK_ACTIVE:
        _hang_up(link)
    ldd_unlock(&node.lock)
    ldd_link_let_go(link)


cdef void ldd_link_keep(ldd_link* link) noexcept nogil:
    ldd_lock(&link.node.lock)
    link.refs += 1
    link.node.num_ops += 1
    ldd_unlock(&link.node.lock)


cdef void ldd_link_let_go(ldd_link* link) noexcept nogil:
    cdef ldd_node* node = link.node
    ldd_link_unref(link)                        # this may end its client, which ldd_node_close has to wait for
    ldd_node_end(node)


cdef bint ldd_node_begin(ldd_node* node) noexcept nogil:
    ldd_lock(&node.lock)
    cdef bint is_open = not node.closing
    node.num_ops += is_open
    ldd_unlock(&node.lock)
    return is_open


cdef void ldd_node_end(ldd_node* node) noexcept nogil:
    ldd_lock(&node.lock)
    node.num_ops -= 1
    if node.num_ops == 0:
        ldd_cond_broadcast(&node.idle)
    ldd_unlock(&node.lock)


cdef void _hang_up(ldd_link* link) noexcept nogil:
    """End our asking connection, which nobody uses any more."""
    cdef ldd_frame_header header
    if link.says_leave and link.ask_fd >= 0:
        link.says_leave = False
        memset(&header, 0, sizeof(header))
        header.magic = LDD_WIRE_MAGIC
        header.version = LDD_WIRE_VERSION
        header.type = LDD_FRAME_LEAVE
        send(link.ask_fd, &header, sizeof(header), MSG_NOSIGNAL | MSG_DONTWAIT)
    ldd_socket_shutdown(link.ask_fd)


cdef void _leave_locked(ldd_link* link, ldd_link_state state) noexcept nogil:
    ldd_store32(&link.state, state)
    if link.ops == 0:
        _hang_up(link)


cdef void ldd_link_break(ldd_link* link, const char* reason) noexcept nogil:
    cdef ldd_node* node = link.node
    cdef bint heals = False
    ldd_lock(&node.lock)
    if ldd_link_state_of(link) == LINK_ACTIVE:
        strncpy(link.reason, reason, sizeof(link.reason) - 1)
        _leave_locked(link, LINK_BROKEN)
        ldd_record_broken(&node.record, link.record, LINK_BROKEN, link.reason)
        heals = node.on_broken != NULL and link.origin == ORIGIN_LOCAL
    ldd_unlock(&node.lock)
    if heals:
        node.on_broken(node)


cdef void ldd_link_set_left(ldd_link* link, bint left) noexcept nogil:
    ldd_lock(&link.node.lock)
    link.left = left
    ldd_unlock(&link.node.lock)


cdef void ldd_link_leave(ldd_link* link) noexcept nogil:
    ldd_link_set_left(link, True)
    if link.origin == ORIGIN_PEER:
        ldd_link_drop(link)


cdef void ldd_link_lose(ldd_link* link) noexcept nogil:
    cdef ldd_past* known
    ldd_lock(&link.node.lock)
    cdef bint was_in = _take_out_locked(link)
    if was_in:
        known = _past_locked(link.node, link.cluster_id)
        if known != NULL:
            known.lost = True
    ldd_unlock(&link.node.lock)
    if was_in:
        ldd_link_unref(link)


cdef ldd_link* ldd_link_hold_broken(ldd_node* node, uint64_t cluster_id) noexcept nogil:
    cdef ldd_link* link
    ldd_lock(&node.lock)
    link = node.links
    while link != NULL and not (link.cluster_id == cluster_id and link.origin == ORIGIN_LOCAL
                                and ldd_link_state_of(link) == LINK_BROKEN):
        link = link.next
    if link != NULL:
        link.refs += 1
    ldd_unlock(&node.lock)
    return link


cdef bint _take_out_locked(ldd_link* link) noexcept nogil:
    """Unchain the link and close it; the caller owes the set's reference afterwards."""
    cdef ldd_link** at = &link.node.links
    while at[0] != NULL and at[0] != link:
        at = &at[0].next
    if at[0] == NULL:
        return False
    at[0] = link.next
    ldd_set32(&link.node.num_links, link.node.num_links - 1)
    _leave_locked(link, LINK_CLOSED)
    ldd_record_unlinked(&link.node.record, link.record, LINK_CLOSED)
    return True


cdef void ldd_link_drop(ldd_link* link) noexcept nogil:
    ldd_lock(&link.node.lock)
    cdef bint was_in = _take_out_locked(link)
    ldd_unlock(&link.node.lock)
    if was_in:
        ldd_link_unref(link)


cdef void _move_out_locked(ldd_link* link, ldd_link** dropped) noexcept nogil:
    _take_out_locked(link)
    link.next = dropped[0]
    dropped[0] = link


cdef void _unref_all(ldd_link* dropped) noexcept nogil:
    cdef ldd_link* following
    while dropped != NULL:
        following = dropped.next
        ldd_link_unref(dropped)
        dropped = following


cdef uint32_t ldd_links_drop(ldd_node* node, int origin, int64_t comm_id, bint any_cluster, uint64_t cluster_id,
                             bint for_good) noexcept nogil:
    cdef ldd_link* link
    cdef ldd_link* following
    cdef ldd_link* dropped = NULL
    cdef ldd_past* known
    cdef uint32_t count = 0
    ldd_lock(&node.lock)
    link = node.links
    while link != NULL:
        following = link.next
        if ((origin < 0 or link.origin == origin) and (comm_id < 0 or link.comm_id == comm_id)
                and (any_cluster or link.cluster_id == cluster_id)):
            link.says_leave = for_good and ldd_link_state_of(link) == LINK_ACTIVE
            _move_out_locked(link, &dropped)
            count += 1
        link = following
    known = _past_locked(node, cluster_id) if for_good else NULL
    if known != NULL:
        known.lost = False
    ldd_unlock(&node.lock)
    _unref_all(dropped)
    return count


cdef void ldd_links_drop_stale(ldd_node* node, uint64_t cluster_id, const uint8_t* instance) noexcept nogil:
    cdef ldd_link* link
    cdef ldd_link* following
    cdef ldd_link* dropped = NULL
    ldd_lock(&node.lock)
    link = node.links
    while link != NULL:
        following = link.next
        if link.cluster_id == cluster_id and (
                link.origin == ORIGIN_PEER or (link.origin == ORIGIN_LOCAL and (
                    ldd_link_state_of(link) != LINK_ACTIVE or memcmp(link.instance, instance, 16) != 0))):
            _move_out_locked(link, &dropped)
        link = following
    ldd_unlock(&node.lock)
    _unref_all(dropped)


cdef ldd_status ldd_node_close(ldd_node* node, int64_t deadline_ns) noexcept nogil:
    cdef ldd_status status = LDD_OK
    cdef ldd_link* link
    cdef ldd_link* dropped = NULL
    ldd_lock(&node.lock)
    node.closing = True
    while node.links != NULL:
        _move_out_locked(node.links, &dropped)
    ldd_cond_broadcast(&node.attempted)
    while (node.num_ops or node.healing) and status == LDD_OK:
        status = ldd_cond_wait_until(&node.idle, &node.lock, deadline_ns)
    ldd_unlock(&node.lock)
    link = dropped
    while link != NULL and status == LDD_OK:    # whoever keeps one of them must not keep its client beyond the provider
        ldd_lock(&link.lock)
        if link.opening != NULL:
            link.take_opening(link)
        if link.client != NULL:
            ldd_client_destroy(node, link.client)
            link.client = NULL
        ldd_unlock(&link.lock)
        link = link.next
    _unref_all(dropped)
    return status
