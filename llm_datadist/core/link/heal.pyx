"""Links heal: after a timeout, a cut, or a peer that was started anew, the next call on a link works again.

The side that asked for a link remembers where the peer listens, and makes it anew: a call that finds it broken does so
at once, within its own time. For the peer, which cannot call back, and for calls to come, a thread tries as well, as
soon as a link broke and then after pauses that grow and vary. It runs only while some link is broken. The accepting
side has nothing to open: its calls wait for the peer to come back.

Nothing of the broken link lands in the new one's time: its operations ended before it was given up, its data client
ends before the new link is opened, and the peer takes the end of its connections as the end of its leases. A link that
the peer unlinked by force, whose unlink failed, or that is of a communicator, is left as it is.
"""
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdio cimport snprintf

from llm_datadist.core.base.interrupt cimport ldd_interrupted
from llm_datadist.core.base.sockets cimport SIGNAL_SLICE_MS
from llm_datadist.core.base.status cimport LDD_E_INTERRUPTED, LDD_E_NOT_LINKED, LDD_OK, ldd_fail, start_detail
from llm_datadist.core.base.sync cimport (
    ldd_cond_broadcast, ldd_cond_wait_until, ldd_lock, ldd_now_ns, ldd_unlock,
)
from llm_datadist.core.base.thread cimport ldd_spawn
from llm_datadist.core.link.links cimport (
    LINK_ACTIVE, LINK_BROKEN, ORIGIN_COMM, ORIGIN_LOCAL, ldd_link_begin, ldd_link_state_of, ldd_past,
)
from llm_datadist.core.link.open cimport ldd_link_reopen
from llm_datadist.core.link.secret cimport ldd_random

cdef enum:
    ATTEMPT_NS = 500000000                      # of the thread, and so what `finalize` may wait for it
    FIRST_PAUSE_NS = 10000000
    LAST_PAUSE_NS = 2000000000

cdef enum ldd_outlook:
    OUTLOOK_NONE                                # nobody will make it anew
    OUTLOOK_OURS                                # we do
    OUTLOOK_THEIRS                              # the peer does


cdef int64_t _vary(int64_t pause_ns) noexcept nogil:
    """Half of it to all of it, so that many peers of one that went away do not come back at once."""
    cdef uint32_t number
    ldd_random(&number, sizeof(number))
    return pause_ns // 2 + pause_ns // 2 * (number & 1023) // 1023


cdef int64_t _longer(int64_t pause_ns) noexcept nogil:
    return min(max(2 * pause_ns, <int64_t>FIRST_PAUSE_NS), <int64_t>LAST_PAUSE_NS)


cdef ldd_link* _next_locked(ldd_node* node) noexcept nogil:
    """The broken link of ours whose turn is next."""
    cdef ldd_link* link = node.links
    cdef ldd_link* found = NULL
    while link != NULL:
        if (link.origin == ORIGIN_LOCAL and ldd_link_state_of(link) == LINK_BROKEN and not link.left
                and (found == NULL or link.heal_at_ns < found.heal_at_ns)):
            found = link
        link = link.next
    return found


cdef void* _heal_main(void* argument) noexcept nogil:
    cdef ldd_node* node = <ldd_node*>argument
    cdef ldd_link* link
    cdef ldd_detail ignored
    cdef uint64_t cluster_id
    ldd_lock(&node.lock)
    while not node.closing:
        link = _next_locked(node)
        if link == NULL:
            break
        if link.heal_at_ns > ldd_now_ns():
            ldd_cond_wait_until(&node.attempted, &node.lock, link.heal_at_ns)
            continue
        link.heal_pause_ns = _longer(link.heal_pause_ns)
        link.heal_at_ns = ldd_now_ns() + _vary(link.heal_pause_ns)
        cluster_id = link.cluster_id
        ldd_unlock(&node.lock)
        start_detail(&ignored)
        ldd_link_reopen(node, cluster_id, ldd_now_ns() + ATTEMPT_NS, &ignored)
        ldd_lock(&node.lock)
    node.healing = False
    ldd_cond_broadcast(&node.idle)
    ldd_unlock(&node.lock)
    return NULL


cdef void _on_broken(ldd_node* node) noexcept nogil:
    cdef bint starts
    ldd_lock(&node.lock)
    starts = not node.healing and not node.closing and _next_locked(node) != NULL
    if starts:
        node.healing = True
    ldd_cond_broadcast(&node.attempted)
    ldd_unlock(&node.lock)
    if starts and ldd_spawn(_heal_main, node) != 0:
        ldd_lock(&node.lock)                    # calls make it anew all the same
        node.healing = False
        ldd_cond_broadcast(&node.idle)
        ldd_unlock(&node.lock)


cdef void ldd_heal_start(ldd_node* node, ldd_service* service, int64_t heal_ns) noexcept nogil:
    node.service = service
    node.heal_ns = heal_ns
    if heal_ns:
        node.on_broken = _on_broken


cdef ldd_outlook _look(ldd_node* node, uint64_t cluster_id, char* reason, size_t size) noexcept nogil:
    """What may become of the link to this cluster, and why it is broken."""
    cdef ldd_outlook outlook = OUTLOOK_NONE
    cdef ldd_link* link
    cdef ldd_past* known
    cdef uint32_t i
    ldd_lock(&node.lock)
    link = node.links
    while link != NULL:
        if link.cluster_id == cluster_id and link.origin != ORIGIN_COMM:
            if ldd_link_state_of(link) == LINK_ACTIVE:
                outlook = OUTLOOK_THEIRS        # it has just come back
                break
            if not link.left and outlook != OUTLOOK_OURS:
                outlook = OUTLOOK_OURS if link.origin == ORIGIN_LOCAL else OUTLOOK_THEIRS
                snprintf(reason, size, b"%s", link.reason)
        link = link.next
    if outlook == OUTLOOK_NONE:
        for i in range(node.num_past):
            known = &node.past[i]
            if known.cluster_id == cluster_id and known.lost:
                outlook = OUTLOOK_THEIRS
                snprintf(reason, size, b"the peer's connection ended")
    ldd_unlock(&node.lock)
    return outlook


cdef ldd_status _wait_for(ldd_node* node, uint64_t cluster_id, int64_t until_ns, ldd_link** out,
                          ldd_detail* detail) noexcept nogil:
    """Begin on the link as soon as there is one; LDD_E_INTERRUPTED when a signal handler raised."""
    cdef int64_t slice_ns
    cdef ldd_status status = ldd_link_begin(node, cluster_id, out, detail)
    while status != LDD_OK and ldd_now_ns() < until_ns:
        slice_ns = ldd_now_ns() + <int64_t>SIGNAL_SLICE_MS * 1000000
        ldd_lock(&node.lock)
        ldd_cond_wait_until(&node.attempted, &node.lock, min(until_ns, slice_ns))
        ldd_unlock(&node.lock)
        if ldd_interrupted() != 0:
            return LDD_E_INTERRUPTED
        status = ldd_link_begin(node, cluster_id, out, detail)
    return status


cdef ldd_status ldd_link_find(ldd_node* node, uint64_t cluster_id, int64_t timeout_ns, ldd_link** out,
                              int64_t* limit_ns, ldd_detail* detail) noexcept nogil:
    cdef ldd_status status = ldd_link_begin(node, cluster_id, out, detail)
    if status != LDD_OK and node.heal_ns:
        status = _heal(node, cluster_id, timeout_ns, out, limit_ns, detail)
    return status


cdef ldd_status _heal(ldd_node* node, uint64_t cluster_id, int64_t timeout_ns, ldd_link** out, int64_t* limit_ns,
                      ldd_detail* detail) noexcept nogil:
    cdef int64_t start_ns = ldd_now_ns(), end_ns = start_ns + min(timeout_ns, node.heal_ns), until_ns
    cdef int64_t pause_ns = 0
    cdef char reason[160]
    cdef ldd_detail why
    cdef ldd_outlook outlook
    cdef uint32_t attempts = 0
    cdef ldd_status status
    reason[0] = 0
    start_detail(&why)
    while True:
        outlook = _look(node, cluster_id, reason, sizeof(reason))
        if outlook == OUTLOOK_OURS:
            attempts += 1
            status = ldd_link_reopen(node, cluster_id, end_ns, &why)
            if status == LDD_E_INTERRUPTED:
                return status
        pause_ns = _longer(pause_ns)
        until_ns = end_ns if outlook == OUTLOOK_THEIRS else min(end_ns, ldd_now_ns() + _vary(pause_ns))
        status = _wait_for(node, cluster_id, until_ns if outlook != OUTLOOK_NONE else start_ns, out, detail)
        if status == LDD_OK:
            limit_ns[0] = start_ns + timeout_ns
        if status == LDD_OK or status == LDD_E_INTERRUPTED or outlook == OUTLOOK_NONE:
            return status
        if ldd_now_ns() >= end_ns:
            break
    if attempts:
        return ldd_fail(detail, LDD_E_NOT_LINKED,
                        b"the link to cluster %llu is broken (%s), and could not be made anew in %lld ms, %u attempts: "
                        b"%s",
                        <unsigned long long>cluster_id, reason, <long long>((end_ns - start_ns) // 1000000), attempts,
                        <const char*>why.text)
    return ldd_fail(detail, LDD_E_NOT_LINKED,
                    b"the link to cluster %llu is broken (%s), and the peer, which asked for it, did not make it anew "
                    b"in %lld ms", <unsigned long long>cluster_id, reason,
                    <long long>((end_ns - start_ns) // 1000000))
