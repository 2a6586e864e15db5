"""Keys on blocks that are held for one request: made, withdrawn, and what became of them."""
from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint64_t

from llm_datadist.core.base.status cimport (
    LDD_E_FAILED, LDD_E_PARAM, LDD_OK, ldd_detail, ldd_fail, ldd_status, start_detail,
)
from llm_datadist.core.base.sync cimport LDD_NEVER, ldd_now_ns
from llm_datadist.core.table.cache_table cimport ldd_cache_view, ldd_table_pin_local, ldd_table_unpin
from llm_datadist.core.table.holds cimport (
    KEY_HOLD as _HOLD, ldd_hold_event, ldd_holds_bind, ldd_holds_drop, ldd_holds_take_events,
)
from llm_datadist.core.transfer.release cimport ldd_release_hold

KEY_HOLD = _HOLD

cdef enum:
    EVENTS_AT_ONCE = 64


cdef class EngineBlockKeys(EngineLinks):
    """The part of `Engine` that names blocks by the request they are held for."""

    def hold_blocks(self, int64_t cache_id, uint64_t request, uint64_t generation, lease_ms=None):
        """Let peers move blocks of a cache under this key, from now on for `lease_ms`, or until it is withdrawn."""
        cdef ldd_detail detail
        cdef ldd_cache_view view
        cdef ldd_status status
        cdef int64_t deadline_ns = LDD_NEVER
        self.require_open()
        start_detail(&detail)
        if lease_ms is not None:
            deadline_ns = ldd_now_ns() + <int64_t>lease_ms * 1000000
        with nogil:
            status = ldd_table_pin_local(self.table, cache_id, &view, &detail)
            if status == LDD_OK:
                if view.is_blocks:
                    status = ldd_holds_bind(&self.node.holds, request, generation, cache_id, deadline_ns, &detail)
                else:
                    status = ldd_fail(&detail, LDD_E_PARAM, b"cache %lld is no blocks cache", <long long>cache_id)
                ldd_table_unpin(self.table, view.slot, view.generation)
        self.raise_for(status, &detail, b"hold_blocks")

    def drop_blocks(self, uint64_t request, uint64_t generation):
        """Withdraw a key; whether there was one."""
        self.require_open()
        return ldd_holds_drop(&self.node.holds, request, generation)

    def release_blocks(self, uint64_t cluster_id, uint64_t request, uint64_t generation):
        """Tell the owner of a key that its blocks are not needed."""
        cdef ldd_detail detail
        cdef ldd_status status
        self.require_open()
        start_detail(&detail)
        with nogil:
            status = ldd_release_hold(&self.node, cluster_id, request, generation, &detail)
        self.raise_for_peer(status, &detail, b"release_blocks", cluster_id, b"release")

    def take_key_events(self):
        """The keys that ended since the last call, as (request, generation, outcome), oldest first."""
        cdef ldd_hold_event events[EVENTS_AT_ONCE]
        cdef size_t count, i
        self.require_open()
        taken = []
        while True:
            count = ldd_holds_take_events(&self.node.holds, events, EVENTS_AT_ONCE)
            for i in range(count):
                taken.append((events[i].request, events[i].generation, events[i].outcome))
            if count < EVENTS_AT_ONCE:
                return taken

    def key_event_fd(self):
        """A descriptor that is readable while `take_key_events` has something to return."""
        cdef ldd_detail detail
        self.require_open()
        start_detail(&detail)
        if self.node.holds.fd < 0:
            ldd_fail(&detail, LDD_E_FAILED, b"no descriptor was left when the engine was opened")
            self.raise_for(LDD_E_FAILED, &detail, b"key_event_fd")
        return self.node.holds.fd

    @property
    def cluster_id(self):
        """Name of this process among its peers."""
        return self.node.cluster_id
