"""Calls into the provider that may take longer than their caller has time.

CANN creates servers and clients without a time limit, moves batches over host endpoints within the submitting call,
where it may try one operation again for many minutes, and cannot cancel. Such a call is made on a thread of its own.
Its caller waits for it as for anything else: until the deadline, and Ctrl-C gets through.

Who gives up leaves everything to that thread: the client, which it destroys; an operation counted on the link, so that
our asking connection stays open and the peer's lease with it, and `finalize` waits; and a pin on the local cache, whose
memory nobody gets before the call has ended. All under the link's lock, but for the thread itself.

A client that a transfer had no time to wait for is not given up, or a peer that takes longer than any transfer may
would never be reached: the call stays with the link as `link.opening`, and the next transfer waits for it. It touches
nothing of the peer's, so the link may end meanwhile; then the thread destroys what it made.
"""
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdio cimport snprintf
from libc.stdlib cimport calloc, free

from llm_datadist.core.base.device_context cimport ldd_device_enter
from llm_datadist.core.base.interrupt cimport ldd_interrupted
from llm_datadist.core.base.provider cimport (
    HIXL_RESOURCE_EXHAUSTED, LDD_CAP_ANY_LOCAL, LDD_CAP_CANCEL, CompleteHandle, HixlClientHandle, HixlStatus,
)
from llm_datadist.core.base.sockets cimport SIGNAL_SLICE_MS
from llm_datadist.core.base.status cimport (
    LDD_E_INTERRUPTED, LDD_E_NOT_LINKED, LDD_E_NO_MEMORY, LDD_E_TIMEOUT, LDD_OK, ldd_fail, start_detail,
)
from llm_datadist.core.base.sync cimport (
    ldd_cond, ldd_cond_broadcast, ldd_cond_destroy, ldd_cond_init, ldd_cond_wait_until, ldd_lock, ldd_lock_until,
    ldd_mutex, ldd_mutex_destroy, ldd_mutex_init, ldd_now_ns, ldd_unlock,
)
from llm_datadist.core.base.thread cimport ldd_spawn
from llm_datadist.core.base.wait cimport ldd_hixl_result
from llm_datadist.core.link.client cimport (
    ldd_client_connect, ldd_client_create, ldd_client_destroy, ldd_client_withdraw,
)
from llm_datadist.core.link.links cimport (
    LINK_ACTIVE, LINK_OPENING, ldd_link_break, ldd_link_end, ldd_link_hold, ldd_link_keep, ldd_link_let_go,
    ldd_link_state, ldd_link_state_of, ldd_link_unref,
)
from llm_datadist.core.link.region cimport ldd_client_memory, ldd_regions_serve
from llm_datadist.core.table.cache_table cimport ldd_table_repin, ldd_table_unpin

cdef extern from * nogil:
    """
    #include <time.h>

    static void ldd_background_nap(void) {
        struct timespec nap = {.tv_sec = 0, .tv_nsec = 500000};
        nanosleep(&nap, NULL);
    }
    """
    void ldd_background_nap()

cdef enum:
    DESTROY_GRACE_NS = 200000000                # what the end of a client may take before its caller goes on

cdef enum ldd_call_kind:
    CALL_SERVE
    CALL_OPEN
    CALL_SUBMIT
    CALL_DESTROY

ctypedef struct ldd_call:
    ldd_call_kind kind
    ldd_link* link
    HixlClientHandle client
    ldd_client_memory* memory                   # of CALL_OPEN: what the client knows of ours
    bint put
    int64_t deadline_ns
    CompleteHandle handle
    char ip[64]                                 # of CALL_SERVE, as the next
    uint32_t port
    ldd_status status
    ldd_detail detail
    ldd_mutex lock                              # guards the four below
    ldd_cond changed
    bint ended
    bint given_up                               # the thread frees this, and what it was left
    bint registers                              # of CALL_OPEN: the client hears of our memory from now on
    bint kept                                   # of CALL_OPEN: the link is kept for the thread
    bint pinned
    uint32_t slot
    uint32_t generation


cdef ldd_status _submit(ldd_link* link, HixlClientHandle client, bint put, int64_t deadline_ns, const ldd_call* by,
                        CompleteHandle* out, ldd_detail* detail) noexcept nogil:
    """Submit, again and again while the provider has no room for one more batch."""
    cdef HixlStatus code
    while True:
        if put:
            code = link.node.provider.hixl.HixlCSClientBatchPutAsync(
                client, <uint32_t>link.descs.count, link.descs.items, out)
        else:
            code = link.node.provider.hixl.HixlCSClientBatchGetAsync(
                client, <uint32_t>link.descs.count, link.descs.items, out)
        if code != <HixlStatus>HIXL_RESOURCE_EXHAUSTED or (by != NULL and by.given_up):
            return ldd_hixl_result(link.node.provider, code,
                                   b"write to the peer" if put else b"read from the peer", detail)
        if ldd_now_ns() >= deadline_ns:
            ldd_hixl_result(link.node.provider, code, b"submit a batch", detail)
            return LDD_E_TIMEOUT
        if by == NULL and ldd_interrupted() != 0:
            return LDD_E_INTERRUPTED
        ldd_background_nap()


cdef uint32_t _left_ms(int64_t deadline_ns) noexcept nogil:
    return <uint32_t>min(max((deadline_ns - ldd_now_ns() + 999999) // 1000000, <int64_t>1), <int64_t>0x7fffffff)


cdef void _make_client(ldd_call* call) noexcept nogil:
    cdef ldd_link* link = call.link
    cdef ldd_link_state state
    call.status = ldd_client_create(link, &call.client, &call.detail)
    if call.status < 0:
        return
    ldd_lock(&call.lock)
    state = ldd_link_state_of(link)
    call.registers = not call.given_up and (state == LINK_ACTIVE or state == LINK_OPENING)
    ldd_unlock(&call.lock)
    if not call.registers:
        ldd_client_destroy(link.node, call.client)
        call.client = NULL
        call.status = ldd_fail(&call.detail, LDD_E_NOT_LINKED, b"the link went away")
        return
    # For a transfer that may leave it to the next one, no deadline counts any more.
    call.status = ldd_client_connect(
        link.node, call.client, _left_ms(call.deadline_ns if state == LINK_OPENING else
                                         ldd_now_ns() + link.node.sync_timeout_ns), &call.memory, &call.detail)
    if call.status < 0:
        call.client = NULL


cdef void _carry_out(ldd_call* call) noexcept nogil:
    cdef ldd_node* node = call.link.node
    if call.kind == CALL_SERVE:
        call.status = ldd_regions_serve(&node.regions, call.ip, &call.port, &call.detail)
    elif call.kind == CALL_OPEN:
        _make_client(call)
    elif call.kind == CALL_SUBMIT:
        call.status = _submit(call.link, call.client, call.put, call.deadline_ns, call, &call.handle,
                              &call.detail)
    else:
        ldd_client_destroy(node, call.client)
        call.client = NULL


cdef void _free(ldd_call* call) noexcept nogil:
    ldd_mutex_destroy(&call.lock)
    ldd_cond_destroy(&call.changed)
    free(call.memory)
    free(call)


cdef void* _call_main(void* argument) noexcept nogil:
    cdef ldd_call* call = <ldd_call*>argument
    cdef ldd_link* link = call.link
    cdef ldd_node* node = link.node
    cdef bint given_up, kept, held
    ldd_device_enter(node.provider, node.context)
    _carry_out(call)
    ldd_lock(&call.lock)
    call.ended = True
    given_up = call.given_up
    kept = call.kept
    held = given_up and not kept
    ldd_cond_broadcast(&call.changed)
    ldd_unlock(&call.lock)
    if given_up:                                # otherwise `call` is gone
        if call.client != NULL:
            ldd_client_destroy(node, call.client)
        if call.pinned:
            ldd_table_unpin(node.table, call.slot, call.generation)
        _free(call)
    if held:
        ldd_link_end(link)
    elif kept:
        ldd_link_let_go(link)
    return NULL


cdef ldd_call* _new_call(ldd_link* link, ldd_call_kind kind, int64_t deadline_ns) noexcept nogil:
    cdef ldd_call* call = <ldd_call*>calloc(1, sizeof(ldd_call))
    if call == NULL:
        return NULL
    call.kind = kind
    call.link = link
    call.client = link.client
    call.deadline_ns = deadline_ns
    start_detail(&call.detail)
    ldd_mutex_init(&call.lock)
    ldd_cond_init(&call.changed)
    return call


cdef void _keep_locked(ldd_call* call) noexcept nogil:
    if not call.kept:
        ldd_link_keep(call.link)
        call.kept = True


cdef void _give_up_locked(ldd_call* call) noexcept nogil:
    """Leave the link, the client and the local cache to the thread."""
    call.given_up = True
    if call.kind == CALL_OPEN:
        _keep_locked(call)
        return
    ldd_link_hold(call.link)
    if call.link.pinned:
        call.slot = call.link.pin.slot
        call.generation = call.link.pin.generation
        call.pinned = ldd_table_repin(call.link.node.table, call.slot, call.generation, NULL)


cdef ldd_status _run(ldd_call* call, bint interruptible, bint* given_up) noexcept nogil:
    """Make the call elsewhere and wait for its end."""
    if ldd_spawn(_call_main, call) != 0:
        _carry_out(call)                        # no thread to be had: without a time limit, then
        return LDD_OK
    return _await(call, call.deadline_ns, interruptible, given_up)


cdef ldd_status _await(ldd_call* call, int64_t deadline_ns, bint interruptible, bint* given_up) noexcept nogil:
    """Wait for the end of a call. Once it is given up, `call` is the thread's alone, or the link's."""
    cdef ldd_link* link = call.link
    cdef ldd_status status = LDD_OK
    cdef int64_t slice_ns
    ldd_lock(&call.lock)
    while not call.ended and status == LDD_OK:
        slice_ns = ldd_now_ns() + <int64_t>SIGNAL_SLICE_MS * 1000000
        ldd_cond_wait_until(&call.changed, &call.lock, min(deadline_ns, slice_ns))
        if call.ended:
            break
        if ldd_now_ns() >= deadline_ns:
            status = LDD_E_TIMEOUT
        elif interruptible:
            ldd_unlock(&call.lock)
            if ldd_interrupted() != 0:
                status = LDD_E_INTERRUPTED
            ldd_lock(&call.lock)
    given_up[0] = not call.ended
    if not call.ended and call.kind == CALL_OPEN and status == LDD_E_TIMEOUT \
            and ldd_link_state_of(link) == LINK_ACTIVE:
        _keep_locked(call)
        link.opening = call
        link.take_opening = _take_opening
    elif not call.ended:
        link.opening = NULL
        _give_up_locked(call)
    elif status == LDD_E_TIMEOUT:
        status = LDD_OK
    ldd_unlock(&call.lock)
    return status


cdef ldd_status ldd_background_serve(ldd_link* link, const char* ip, uint32_t* port, int64_t deadline_ns,
                                     ldd_detail* detail) noexcept nogil:
    cdef ldd_call* call
    cdef bint given_up = False
    cdef ldd_status status
    if link.node.provider.caps & LDD_CAP_CANCEL:
        return ldd_regions_serve(&link.node.regions, ip, port, detail)
    call = _new_call(link, CALL_SERVE, deadline_ns)
    if call == NULL:
        return ldd_fail(detail, LDD_E_NO_MEMORY, b"no memory for a data server")
    snprintf(call.ip, sizeof(call.ip), b"%s", ip)
    status = _run(call, True, &given_up)
    if given_up:                                # the server stays, for the next try
        if status == LDD_E_TIMEOUT:
            ldd_fail(detail, status, b"creating the data server at %s took longer than there was time", ip)
        return status
    if status == LDD_OK:
        status = call.status
        detail[0] = call.detail
        port[0] = call.port
    _free(call)
    return status


cdef void _adopt(ldd_link* link, ldd_call* call) noexcept nogil:
    """Take over what a call that ended has made."""
    link.opening = NULL
    free(link.own_memory)
    link.client = call.client
    link.own_memory = call.memory
    call.memory = NULL
    _free(call)


cdef void _take_opening(ldd_link* link) noexcept nogil:
    cdef ldd_call* call = <ldd_call*>link.opening
    ldd_lock(&call.lock)
    if not call.ended:
        link.opening = NULL
        call.given_up = True
    ldd_unlock(&call.lock)
    if link.opening != NULL:
        _adopt(link, call)


cdef bint _knows_no_more(ldd_link* link, int64_t deadline_ns) noexcept nogil:
    """Whether the client that is being made will know nothing of memory that is withdrawn by now, or is made."""
    cdef ldd_call* call = <ldd_call*>link.opening
    cdef bint is_sure
    ldd_lock(&call.lock)
    while call.registers and not call.ended and ldd_now_ns() < deadline_ns:
        ldd_cond_wait_until(&call.changed, &call.lock, deadline_ns)
    is_sure = not call.registers or call.ended
    if call.ended:
        ldd_unlock(&call.lock)
        _adopt(link, call)
    else:
        ldd_unlock(&call.lock)
    return is_sure


cdef ldd_status _open_here(ldd_link* link, int64_t deadline_ns, ldd_detail* detail) noexcept nogil:
    cdef ldd_status status = ldd_client_create(link, &link.client, detail)
    free(link.own_memory)
    link.own_memory = NULL
    if status == LDD_OK:
        status = ldd_client_connect(link.node, link.client, _left_ms(deadline_ns), &link.own_memory, detail)
    if status < 0:
        link.client = NULL
    return status


cdef ldd_status ldd_background_open(ldd_link* link, int64_t deadline_ns, ldd_detail* detail) noexcept nogil:
    cdef ldd_call* call = <ldd_call*>link.opening
    cdef bint given_up = False
    cdef ldd_status status
    if link.node.provider.caps & LDD_CAP_CANCEL:
        return _open_here(link, deadline_ns, detail)
    if call != NULL:
        status = _await(call, deadline_ns, True, &given_up)
    else:
        call = _new_call(link, CALL_OPEN, deadline_ns)
        if call == NULL:
            return ldd_fail(detail, LDD_E_NO_MEMORY, b"no memory for a data client")
        call.client = NULL
        status = _run(call, True, &given_up)
    if given_up:
        if status == LDD_E_TIMEOUT:
            ldd_fail(detail, status, b"creating the data client took longer than there was time%s",
                     <const char*>b"; it goes on, for the next transfer" if link.opening != NULL else <const char*>b"")
        return status
    if status == LDD_OK:
        status = call.status
        detail[0] = call.detail
    _adopt(link, call)
    return status


cdef ldd_status ldd_background_submit(ldd_link* link, bint put, int64_t deadline_ns, CompleteHandle* out,
                                      ldd_detail* detail) noexcept nogil:
    cdef ldd_call* call
    cdef bint given_up = False
    cdef ldd_status status
    if not link.submits_slowly:
        return _submit(link, link.client, put, deadline_ns, NULL, out, detail)
    call = _new_call(link, CALL_SUBMIT, deadline_ns)
    if call == NULL:
        return ldd_fail(detail, LDD_E_NO_MEMORY, b"no memory for a batch")
    call.put = put
    status = _run(call, True, &given_up)
    if given_up:
        link.client = NULL
        return status
    if status == LDD_OK:
        status = call.status
        detail[0] = call.detail
        out[0] = call.handle
    _free(call)
    return status


cdef void ldd_background_destroy(ldd_link* link) noexcept nogil:
    cdef ldd_call* call
    cdef bint given_up = False
    if link.opening != NULL:
        _take_opening(link)
    if link.client == NULL:
        return
    call = _new_call(link, CALL_DESTROY, ldd_now_ns() + DESTROY_GRACE_NS)
    link.client = NULL
    if call == NULL:                            # what it moves may still arrive: then it had better live on
        return
    _run(call, False, &given_up)
    if not given_up:
        _free(call)


cdef void ldd_links_withdraw(ldd_node* node, uint64_t addr, uint64_t nbytes, int64_t deadline_ns) noexcept nogil:
    cdef ldd_link* link
    cdef ldd_link** held
    cdef uint32_t i, count = 0
    if node.provider.caps & LDD_CAP_ANY_LOCAL:
        return
    ldd_lock(&node.lock)
    held = <ldd_link**>calloc(node.num_links + 1, sizeof(ldd_link*))
    link = node.links
    while link != NULL and held != NULL:
        link.refs += 1
        held[count] = link
        count += 1
        link = link.next
    ldd_unlock(&node.lock)
    for i in range(count):
        if ldd_lock_until(&held[i].lock, deadline_ns) == LDD_OK:
            if held[i].opening != NULL and not _knows_no_more(held[i], deadline_ns):
                ldd_link_break(held[i], b"a client was being connected while memory was unregistered")
            ldd_client_withdraw(held[i], addr, nbytes)
            ldd_unlock(&held[i].lock)
        else:
            ldd_link_break(held[i], b"a transfer went on while memory was unregistered")
        ldd_link_unref(held[i])
    free(held)
