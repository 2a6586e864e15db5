"""The links of an engine: by address, by rank table, and what is known of them."""
cimport cython

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

from llm_datadist.core.base.atomic cimport ldd_get32, ldd_get64
from llm_datadist.core.base.status cimport (
    LDD_E_INTERRUPTED, LDD_E_LINK_BUSY, LDD_E_NO_MEMORY, LDD_OK, ldd_detail, ldd_fail, ldd_status, raise_status,
    start_detail,
)
from llm_datadist.core.base.sync cimport ldd_lock, ldd_lock_until, ldd_now_ns, ldd_unlock
from llm_datadist.core.link.accept cimport ldd_service_accepted, ldd_service_expect, ldd_service_forget
from llm_datadist.core.link.heal cimport ldd_link_find
from llm_datadist.core.link.links cimport (
    ORIGIN_COMM, ORIGIN_LOCAL, ORIGIN_PEER, ldd_link, ldd_link_end, ldd_link_existed, ldd_link_origin,
    ldd_link_state, ldd_link_state_of, ldd_links_drop, ldd_node,
)
from llm_datadist.core.link.open cimport ldd_link_close, ldd_link_open
from llm_datadist.core.link.requests cimport ldd_request_ping


# What `links` tells of a link.
ctypedef struct ldd_link_row:
    uint64_t cluster_id
    ldd_link_origin origin
    ldd_link_state state
    int64_t comm_id
    char peer_ip[64]
    char reason[160]
    uint32_t ops
    uint64_t pulled_bytes
    uint64_t pushed_bytes
    uint64_t num_transfers


@cython.no_gc_clear
cdef class EngineLinks(EngineHoldings):
    """An engine that links; outcomes are internal statuses with a text, which the facade turns into codes."""

    def link(self, uint64_t cluster_id, str ip, int port, int timeout_ms, bytes comm=None, int64_t comm_id=0):
        """Open a link. Returns (internal status, text); 0 is success. `comm`: digest of a communicator, 32 bytes."""
        cdef ldd_detail detail
        cdef ldd_status status
        cdef bytes address = ip.encode()
        cdef const char* c_ip = address
        cdef const uint8_t* digest = NULL
        cdef int64_t deadline_ns = ldd_now_ns() + <int64_t>timeout_ms * 1000000
        self.require_open()
        start_detail(&detail)
        if comm is not None:
            if len(comm) != 32:
                raise ValueError(f"comm: 32 bytes expected, {len(comm)} given")
            digest = comm
        with nogil:
            status = ldd_link_open(&self.node, &self.service, c_ip, port, cluster_id, digest, comm_id, deadline_ns,
                                   &detail)
        if status == LDD_E_INTERRUPTED:
            self.raise_for(status, &detail, b"link")
        return status, detail.text.decode("utf-8", "replace") if status < 0 else ""

    def unlink(self, uint64_t cluster_id, int timeout_ms, bint force, address=None):
        """End the links to a cluster that `link_clusters` made. Returns (internal status, text, how many there were).

        `address`: where the peer listens, (ip, port); unless forced, a broken link stays when nobody is there.
        """
        cdef ldd_detail detail
        cdef ldd_status status = LDD_OK
        cdef int64_t deadline_ns = ldd_now_ns() + <int64_t>timeout_ms * 1000000
        cdef uint32_t before = 0
        cdef const char* c_ip = NULL
        cdef int port = 0
        self.require_open()
        if address is not None:
            encoded = address[0].encode()
            c_ip = encoded
            port = address[1]
        start_detail(&detail)
        with nogil:
            before = _count_links(&self.node, cluster_id)
            if force:
                ldd_links_drop(&self.node, ORIGIN_LOCAL, -1, False, cluster_id, True)
                ldd_links_drop(&self.node, ORIGIN_PEER, -1, False, cluster_id, True)
            else:
                status = ldd_link_close(&self.node, c_ip, port, cluster_id, deadline_ns, &detail)
        if status == LDD_E_INTERRUPTED:
            self.raise_for(status, &detail, b"unlink")
        return status, detail.text.decode("utf-8", "replace") if status < 0 else "", before

    def was_linked(self, uint64_t cluster_id):
        """Whether a link to a cluster that `link_clusters` made, here or there, exists or existed."""
        self.require_open()
        return ldd_link_existed(&self.node, cluster_id)

    def ping(self, uint64_t cluster_id, int timeout_ms, bytes name=b"check_link_status"):
        """Ask the peer for a sign of life over the link; raises what is wrong with it, as the call `name`."""
        cdef ldd_detail detail
        cdef ldd_status status
        self.require_open()
        start_detail(&detail)
        with nogil:
            status = _ping_link(&self.node, cluster_id, ldd_now_ns() + <int64_t>timeout_ms * 1000000, &detail)
        self.raise_for_peer(status, &detail, name, cluster_id, b"ping")

    def links(self):
        """One dict per link: cluster_id, state, origin, comm_id, peer_ip, pulled_bytes, pushed_bytes, num_transfers."""
        cdef uint32_t capacity, count, i
        cdef ldd_link_row* rows
        self.require_open()
        capacity = ldd_get32(&self.node.num_links) + 16
        rows = <ldd_link_row*>malloc(capacity * sizeof(ldd_link_row))
        if rows == NULL:
            raise_status(LDD_E_NO_MEMORY, NULL, b"links", False)
        try:
            # Objects are made without the lock: making one may run any finaliser, or let another thread go on.
            with nogil:
                count = _copy_links(&self.node, rows, capacity)
            return [{
                "cluster_id": rows[i].cluster_id,
                "state": ("opening", "active", "broken", "closed")[<int>rows[i].state],
                "origin": ("local", "peer", "comm")[<int>rows[i].origin], "comm_id": rows[i].comm_id,
                "peer_ip": rows[i].peer_ip.decode(), "pulled_bytes": rows[i].pulled_bytes,
                "pushed_bytes": rows[i].pushed_bytes, "num_transfers": rows[i].num_transfers,
                "running": rows[i].ops, "reason": rows[i].reason.decode("utf-8", "replace"),
            } for i in range(count)]
        finally:
            free(rows)

    def num_links(self):
        """How many links there are, broken ones included."""
        self.require_open()
        return ldd_get32(&self.node.num_links)

    # ----------------------------------------------------------------------------------- links by rank table

    def expect(self, bytes comm, uint64_t cluster_id, int64_t comm_id):
        """Let this peer open a link for this communicator."""
        cdef ldd_detail detail
        cdef ldd_status status
        self.require_open()
        start_detail(&detail)
        if len(comm) != 32:
            raise ValueError(f"comm: 32 bytes expected, {len(comm)} given")
        status = ldd_service_expect(&self.service, comm, cluster_id, comm_id)
        self.raise_for(status, &detail, b"link")

    def has_joined(self, int64_t comm_id, uint64_t cluster_id):
        """Whether that peer has come."""
        return self._open and ldd_service_accepted(&self.service, comm_id, cluster_id)

    def forget(self, int64_t comm_id):
        """Drop the pending and links of a communicator on this side."""
        if self._open and self.is_own_process():
            with nogil:
                ldd_service_forget(&self.service, comm_id)
                ldd_links_drop(&self.node, ORIGIN_COMM, comm_id, True, 0, False)


cdef ldd_status _ping_link(ldd_node* node, uint64_t cluster_id, int64_t deadline_ns, ldd_detail* detail) noexcept nogil:
    cdef ldd_link* link = NULL
    cdef int64_t ignored = 0
    cdef ldd_status status = ldd_link_find(node, cluster_id, deadline_ns - ldd_now_ns(), &link, &ignored, detail)
    if status < 0:
        return status
    if ldd_lock_until(&link.lock, 0) < 0:
        status = ldd_fail(detail, LDD_E_LINK_BUSY, b"a transfer is running on the link to cluster %llu",
                          <unsigned long long>cluster_id)
    else:
        status = ldd_request_ping(link, deadline_ns, detail)
        ldd_unlock(&link.lock)
    ldd_link_end(link)
    return status


cdef uint32_t _copy_links(ldd_node* node, ldd_link_row* rows, uint32_t capacity) noexcept nogil:
    cdef ldd_link* link
    cdef ldd_link_row* row
    cdef uint32_t count = 0
    ldd_lock(&node.lock)
    link = node.links
    while link != NULL and count < capacity:
        row = &rows[count]
        row.cluster_id = link.cluster_id
        row.origin = link.origin
        row.state = ldd_link_state_of(link)
        row.comm_id = link.comm_id
        memcpy(row.peer_ip, link.peer_ip, sizeof(row.peer_ip))
        memcpy(row.reason, link.reason, sizeof(row.reason))
        row.ops = link.ops
        row.pulled_bytes = ldd_get64(&link.pulled_bytes)
        row.pushed_bytes = ldd_get64(&link.pushed_bytes)
        row.num_transfers = ldd_get64(&link.num_transfers)
        count += 1
        link = link.next
    ldd_unlock(&node.lock)
    return count


cdef uint32_t _count_links(ldd_node* node, uint64_t cluster_id) noexcept nogil:
    cdef ldd_link* link
    cdef uint32_t count = 0
    ldd_lock(&node.lock)
    link = node.links
    while link != NULL:
        if link.cluster_id == cluster_id and link.origin != ORIGIN_COMM:
            count += 1
        link = link.next
    ldd_unlock(&node.lock)
    return count
