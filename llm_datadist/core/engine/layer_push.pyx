"""Writing a local cache to one peer in many steps, for transfers that follow the layers of a running model.

A `LayerPush` pins the local cache and leases the destination from the first step to `close`, so both ends keep
their memory however long the model takes between layers. The link is held only while a step runs: other
transfers go on in between. One thread at a time.
"""
cimport cython

from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset
from posix.unistd cimport getpid

from llm_datadist.core.base.provider cimport aclrtContext
from llm_datadist.core.base.status cimport (
    LDD_E_CHECKSUM, LDD_E_INTERRUPTED, LDD_E_NOT_LINKED, LDD_E_NO_MEMORY, LDD_E_PARAM, LDD_E_TIMEOUT, LDD_OK,
    ldd_detail, ldd_fail, ldd_status, raise_status,
)
from llm_datadist.core.base.sync cimport ldd_now_ns, ldd_unlock
from llm_datadist.core.engine.engine cimport Engine
from llm_datadist.core.link.heal cimport ldd_link_find
from llm_datadist.core.link.links cimport (
    ldd_link, ldd_link_break, ldd_link_end, ldd_link_ref, ldd_link_resume, ldd_link_unref,
)
from llm_datadist.core.link.requests cimport (
    ldd_link_ready, ldd_remote_cache, ldd_request_ranges, ldd_request_release, ldd_request_resolve,
)
from llm_datadist.core.link.wire cimport (
    LDD_DESC_BLOCKS, LDD_MODE_REMOTE_ACCESSIBLE, LDD_WIRE_MAX_RANGES, ldd_lease_reply, ldd_range,
    ldd_ranges,
)
from llm_datadist.core.plan.block_plan cimport (
    ldd_desc_list_clear, ldd_plan_blocks, ldd_plan_contiguous, ldd_plan_slot_to_blocks,
)
from llm_datadist.core.plan.index_list cimport IndexList
from llm_datadist.core.record.record cimport (
    LDD_EVENT_LAYER, LDD_EVENT_PUSH, LDD_OP_PUSH, ldd_record_count, ldd_trace, ldd_trace_span,
)
from llm_datadist.core.table.cache_table cimport ldd_cache_view, ldd_table_pin_local, ldd_table_unpin
from llm_datadist.core.table.key_index cimport KEY_BY_ID
from llm_datadist.core.transfer.batch cimport ldd_batch_run, ldd_context_enter, ldd_context_leave, ldd_link_lock
from llm_datadist.core.transfer.fitting cimport (
    ldd_end, ldd_end_here, ldd_end_there, ldd_faults, ldd_fit_dtypes,
)
from llm_datadist.core.transfer.verify cimport ldd_moved, ldd_say_faults, ldd_verify


@cython.final
@cython.no_gc_clear                             # __dealloc__ needs _engine
cdef class LayerPush:
    """A local cache on its way to one peer.

    Parameters
    ----------
    engine : Engine
    cluster_id : int
        The peer, linked.
    cache_id : int
        The local source.

    Raises
    ------
    LLMException
        LLM_KV_CACHE_NOT_EXIST for an unknown source, LLM_NOT_YET_LINK without a link, LLM_PARAM_INVALID for this
        process's own cluster id, or a source that must be remote accessible and is not.
    """
    cdef Engine _engine
    cdef uint64_t _cluster_id
    cdef ldd_link* _link                        # one reference
    cdef ldd_cache_view _local                  # pinned
    cdef bint _pinned
    cdef uint32_t _lease                        # 0: not aimed yet
    cdef uint64_t* _addrs                       # tensor bases in the peer
    cdef uint32_t _num_tensors
    cdef uint64_t _num_slots                    # of the destination; 0 where only addresses are known
    cdef uint64_t _reach                        # bytes from an address on up to the end of what is leased; 0 with a key
    cdef uint64_t _stride                       # of the destination, bytes; 0 where only addresses are known
    cdef uint64_t _batch_offset                 # of the destination slot, bytes
    cdef uint64_t _region_epoch
    cdef bint _is_blocks

    def __init__(self, Engine engine, uint64_t cluster_id, int64_t cache_id):
        cdef ldd_detail detail
        cdef ldd_status status
        cdef int64_t ignored = 0
        self._engine = engine
        self._cluster_id = cluster_id
        engine.require_open()
        detail.provider_code = 0
        detail.text[0] = 0
        if cluster_id == engine.node.cluster_id:
            engine.raise_for_peer(ldd_fail(&detail, LDD_E_PARAM, b"cluster %llu is this one",
                                           <unsigned long long>cluster_id), &detail, b"transfer_cache_async",
                                  cluster_id, b"check")
        with nogil:
            status = ldd_table_pin_local(engine.table, cache_id, &self._local, &detail)
            if status == LDD_OK:
                self._pinned = True
                if engine.node.mode & LDD_MODE_REMOTE_ACCESSIBLE and not self._local.remote_accessible:
                    status = ldd_fail(&detail, LDD_E_PARAM, b"local cache %lld is not remote accessible",
                                      <long long>cache_id)
            if status == LDD_OK:
                status = ldd_link_find(&engine.node, cluster_id, engine.node.sync_timeout_ns, &self._link, &ignored,
                                       &detail)
                if status == LDD_OK:
                    ldd_link_ref(self._link)
                    ldd_link_end(self._link)
        engine.raise_for_peer(status, &detail, b"transfer_cache_async", cluster_id,
                              b"link" if status == LDD_E_NOT_LINKED else b"check")

    cdef int _raise_for(self, ldd_status status, const ldd_detail* detail, const char* stage) except -1:
        return self._engine.raise_for_peer(status, detail, b"transfer_cache_async", self._cluster_id, stage)

    def __dealloc__(self):
        free(self._addrs)
        if self._engine is None or getpid() != self._engine._pid:
            return                                  # a forked child shares the table, and must not touch it
        if self._pinned and self._engine.table != NULL:
            ldd_table_unpin(self._engine.table, self._local.slot, self._local.generation)
        if self._link != NULL:
            ldd_link_unref(self._link)

    @property
    def stride_bytes(self):
        """Bytes of one slot or block of the local cache."""
        return self._local.stride

    # -------------------------------------------------------------------------------------------- destination

    def aim_at_key(self, key, uint64_t num_tensors):
        """Lease the peer's cache that ``(kind, id, model_id, batch_index)`` names; it must have so many tensors."""
        cdef ldd_detail detail
        cdef ldd_status status
        cdef uint32_t kind
        cdef uint64_t id_, model_id, batch_index
        kind, id_, model_id, batch_index = key
        with nogil:
            status = self._begin(&detail)
            if status == LDD_OK:
                status = self._resolve(kind, id_, model_id, batch_index, &detail)
                self._end()
            if status == LDD_OK and num_tensors > self._num_tensors:
                status = ldd_fail(&detail, LDD_E_PARAM, b"destination tensors up to %llu are outside the cache's %u",
                                  <unsigned long long>num_tensors, self._num_tensors)
        self._raise_for(status, &detail, b"resolve")

    cdef ldd_status _resolve(self, uint32_t kind, uint64_t id_, uint64_t model_id, uint64_t batch_index,
                             ldd_detail* detail) noexcept nogil:
        cdef ldd_remote_cache remote
        cdef ldd_end here, there
        cdef ldd_status status = ldd_request_resolve(
            self._link, kind, id_, model_id, batch_index, True,
            ldd_now_ns() + self._engine.node.sync_timeout_ns, &remote, detail)
        if status < 0:
            return status
        self._lease = remote.desc.lease
        self._num_tensors = remote.desc.num_tensors
        self._num_slots = remote.desc.num_slots
        self._stride = remote.desc.stride_bytes
        self._batch_offset = remote.desc.batch_index * remote.desc.stride_bytes
        self._region_epoch = remote.desc.region_epoch
        self._is_blocks = (remote.desc.flags & LDD_DESC_BLOCKS) != 0
        if self._engine.node.strict:
            ldd_end_here(&self._local, 0, &here)
            ldd_end_there(&remote, &there)
            status = ldd_fit_dtypes(&here, &there, self._cluster_id, detail)
            if status < 0:
                return status
        self._addrs = <uint64_t*>malloc(self._num_tensors * sizeof(uint64_t))
        if self._addrs == NULL:
            return ldd_fail(detail, LDD_E_NO_MEMORY, b"no memory for %u addresses", self._num_tensors)
        memcpy(self._addrs, remote.addrs, self._num_tensors * sizeof(uint64_t))
        return LDD_OK

    def aim_at_addresses(self, addrs, uint64_t first_byte, uint64_t nbytes):
        """Lease the peer's caches that contain bytes [first_byte, first_byte + nbytes) from each address on."""
        cdef ldd_detail detail
        cdef ldd_status status
        cdef uint32_t i, n = <uint32_t>len(addrs)
        cdef ldd_ranges* head = <ldd_ranges*>malloc(sizeof(ldd_ranges) + max(n, 1) * sizeof(ldd_range))
        cdef ldd_range* ranges = <ldd_range*>(head + 1)
        detail.provider_code = 0
        detail.text[0] = 0
        self._addrs = <uint64_t*>malloc(max(n, 1) * sizeof(uint64_t))
        try:
            if head == NULL or self._addrs == NULL:
                raise_status(LDD_E_NO_MEMORY, NULL, b"transfer_cache_async", False)
            for i in range(n):
                self._addrs[i] = addrs[i]
                ranges[i].addr = self._addrs[i] + first_byte
                ranges[i].bytes = nbytes
                if ranges[i].addr < first_byte:
                    self._raise_for(ldd_fail(
                        &detail, LDD_E_PARAM, b"address %#llx is outside the peer's caches",
                        <unsigned long long>self._addrs[i]), &detail, b"resolve")
            if n == 0 or n > LDD_WIRE_MAX_RANGES:
                self._raise_for(ldd_fail(
                    &detail, LDD_E_PARAM, b"%u addresses given, 1 to %u are possible", n,
                    <uint32_t>LDD_WIRE_MAX_RANGES), &detail, b"resolve")
            self._num_tensors = n
            self._reach = first_byte + nbytes
            with nogil:
                status = self._begin(&detail)
                if status == LDD_OK:
                    head.dtype = self._local.described.dtype
                    status = self._lease_ranges(head, n, &detail)
                    self._end()
            self._raise_for(status, &detail, b"resolve")
        finally:
            free(head)

    cdef ldd_status _lease_ranges(self, const ldd_ranges* head, uint32_t num_ranges,
                                  ldd_detail* detail) noexcept nogil:
        cdef ldd_lease_reply answer
        cdef ldd_end here, there
        cdef ldd_status status = ldd_request_ranges(
            self._link, head, num_ranges, ldd_now_ns() + self._engine.node.sync_timeout_ns, &answer, detail)
        if status < 0:
            return status
        self._lease = answer.lease
        self._region_epoch = answer.region_epoch
        if not self._engine.node.strict:
            return LDD_OK
        ldd_end_here(&self._local, 0, &here)
        memset(&there, 0, sizeof(there))
        there.cache_id = answer.cache_id
        there.num_tensors = answer.num_tensors
        there.described = &answer.tensor
        return ldd_fit_dtypes(&here, &there, self._cluster_id, detail)

    # -------------------------------------------------------------------------------------------------- steps

    cdef ldd_status _begin(self, ldd_detail* detail) noexcept nogil:
        cdef ldd_status status
        detail.provider_code = 0
        detail.text[0] = 0
        if not ldd_link_resume(self._link):
            return ldd_fail(detail, LDD_E_NOT_LINKED, b"the link to cluster %llu went away",
                            <unsigned long long>self._link.cluster_id)
        status = ldd_link_lock(self._link, detail)
        if status < 0:
            ldd_link_end(self._link)
        return status

    cdef void _end(self) noexcept nogil:
        ldd_unlock(&self._link.lock)
        ldd_link_end(self._link)

    cdef ldd_status _check_step(self, uint32_t local_first, uint32_t remote_first, uint32_t count,
                                ldd_detail* detail) noexcept nogil:
        detail.provider_code = 0
        detail.text[0] = 0
        ldd_trace(&self._engine.node.record, LDD_EVENT_LAYER, self._cluster_id, local_first // max(count, <uint32_t>1),
                  0, 0)
        if <uint64_t>local_first + count > self._local.num_tensors:
            return ldd_fail(detail, LDD_E_PARAM, b"source tensors [%u, %u) are outside the cache's %u", local_first,
                            local_first + count, self._local.num_tensors)
        if <uint64_t>remote_first + count > self._num_tensors:
            return ldd_fail(detail, LDD_E_PARAM, b"destination tensors [%u, %u) are outside the cache's %u",
                            remote_first, remote_first + count, self._num_tensors)
        return LDD_OK

    cdef uint64_t _num_blocks(self, uint64_t block_bytes) noexcept nogil:
        """How many blocks of a destination tensor may be written."""
        return self._num_slots if self._stride else self._reach // max(block_bytes, <uint64_t>1)

    cdef ldd_status _verify(self, uint32_t remote_first, uint64_t block_bytes, int64_t deadline_ns,
                            ldd_detail* detail) noexcept nogil:
        cdef ldd_moved moved
        cdef ldd_faults faults
        cdef ldd_status status
        memset(&faults, 0, sizeof(faults))
        moved.put = True
        moved.lease = self._lease
        moved.pin_by_tensor = self._stride == 0     # a lease on addresses has a pin for each
        moved.first_pin = remote_first if moved.pin_by_tensor else 0
        moved.addrs = self._addrs + remote_first
        moved.first_tensor = remote_first
        moved.block_bytes = block_bytes
        status = ldd_verify(self._link, &moved, deadline_ns, &faults, detail)
        if status == LDD_OK and faults.count:
            status = ldd_say_faults(self._link, True, &faults, detail)
        free(faults.items)
        return status

    cdef ldd_status _move(self, ldd_status planned, uint32_t remote_first, uint64_t block_bytes,
                          ldd_detail* detail) noexcept nogil:
        """Carry out the link's plan, which writes tensors from `remote_first` on. The link is locked."""
        cdef int64_t start_ns = ldd_now_ns(), deadline_ns = start_ns + self._engine.node.sync_timeout_ns
        cdef aclrtContext before
        cdef ldd_status status = planned
        if status == LDD_OK:
            before = ldd_context_enter(&self._engine.node)
            status = ldd_link_ready(self._link, self._region_epoch, deadline_ns, detail)
            if status == LDD_OK:
                self._link.pin.slot, self._link.pin.generation = self._local.slot, self._local.generation
                self._link.pinned = True
                status = ldd_batch_run(self._link, True, deadline_ns, detail)
                if status == LDD_OK and self._engine.node.verifies:
                    status = self._verify(remote_first, block_bytes, deadline_ns, detail)
                self._link.pinned = False
            ldd_context_leave(&self._engine.node, before)
        ldd_record_count(self._link.record, LDD_OP_PUSH, ldd_now_ns() - start_ns,
                         self._link.descs.bytes if status == LDD_OK else 0, status < 0)
        ldd_trace_span(&self._engine.node.record, LDD_EVENT_PUSH, start_ns, self._cluster_id, KEY_BY_ID,
                       <uint64_t>self._local.cache_id, 0, self._link.descs.bytes, status)
        return status

    def put_slot(self, uint32_t local_first, uint32_t remote_first, uint32_t count, uint64_t local_slot):
        """Write one slot of `count` tensors, one whole stride each."""
        cdef ldd_detail detail
        cdef ldd_status status
        with nogil:
            status = self._check_step(local_first, remote_first, count, &detail)
            if status == LDD_OK and local_slot >= self._local.num_slots:
                status = ldd_fail(&detail, LDD_E_PARAM, b"batch index %llu is outside the source's %llu",
                                  <unsigned long long>local_slot, <unsigned long long>self._local.num_slots)
            if status == LDD_OK and self._stride and (self._is_blocks != self._local.is_blocks
                                                      or self._stride != self._local.stride):
                status = ldd_fail(&detail, LDD_E_PARAM,
                                  b"the source is a %s cache with a stride of %llu bytes; the destination is a %s "
                                  b"cache with %llu",
                                  <const char*>b"blocks" if self._local.is_blocks else <const char*>b"contiguous",
                                  <unsigned long long>self._local.stride,
                                  <const char*>b"blocks" if self._is_blocks else <const char*>b"contiguous",
                                  <unsigned long long>self._stride)
            if status == LDD_OK:
                status = self._begin(&detail)
                if status == LDD_OK:
                    ldd_desc_list_clear(&self._link.descs)
                    self._link.descs.by_tensor = True           # what addresses name need not be one region
                    status = ldd_plan_contiguous(
                        &self._link.descs, self._addrs + remote_first, self._batch_offset,
                        self._local.addrs + local_first, local_slot * self._local.stride, count, self._local.stride,
                        &detail)
                    status = self._move(status, remote_first, self._local.stride, &detail)
                    self._end()
        self._raise_for(status, &detail, _stage_of(status))

    def put_slot_to_blocks(self, uint32_t local_first, uint32_t remote_first, uint32_t count, uint64_t local_slot,
                           IndexList dst_blocks, uint64_t block_bytes):
        """Write one slot of `count` tensors as blocks; the last one may be filled in part."""
        cdef ldd_detail detail
        cdef ldd_status status
        with nogil:
            status = self._check_step(local_first, remote_first, count, &detail)
            if status == LDD_OK and local_slot >= self._local.num_slots:
                status = ldd_fail(&detail, LDD_E_PARAM, b"batch index %llu is outside the source's %llu",
                                  <unsigned long long>local_slot, <unsigned long long>self._local.num_slots)
            if status == LDD_OK and self._stride and (not self._is_blocks or self._stride != block_bytes):
                status = ldd_fail(&detail, LDD_E_PARAM,
                                  b"blocks of %llu bytes are asked for; the destination is a %s cache with %llu",
                                  <unsigned long long>block_bytes,
                                  <const char*>b"blocks" if self._is_blocks else <const char*>b"contiguous",
                                  <unsigned long long>self._stride)
            if status == LDD_OK:
                status = self._begin(&detail)
                if status == LDD_OK:
                    ldd_desc_list_clear(&self._link.descs)
                    self._link.descs.by_tensor = True           # what addresses name need not be one region
                    status = ldd_plan_slot_to_blocks(
                        &self._link.descs, self._local.addrs + local_first, local_slot * self._local.stride,
                        self._local.stride, self._addrs + remote_first, dst_blocks.data,
                        self._num_blocks(block_bytes), count, block_bytes, dst_blocks.length, True, &detail)
                    status = self._move(status, remote_first, block_bytes, &detail)
                    self._end()
        self._raise_for(status, &detail, _stage_of(status))

    def put_blocks(self, uint32_t local_first, uint32_t remote_first, uint32_t count, IndexList src_blocks,
                   IndexList dst_blocks):
        """Write blocks of `count` tensors, paired by position."""
        cdef ldd_detail detail
        cdef ldd_status status
        with nogil:
            status = self._check_step(local_first, remote_first, count, &detail)
            if status == LDD_OK and self._stride and (not self._is_blocks or self._stride != self._local.stride):
                status = ldd_fail(&detail, LDD_E_PARAM,
                                  b"a block is %llu bytes here; the destination is a %s cache with %llu",
                                  <unsigned long long>self._local.stride,
                                  <const char*>b"blocks" if self._is_blocks else <const char*>b"contiguous",
                                  <unsigned long long>self._stride)
            if status == LDD_OK:
                status = self._begin(&detail)
                if status == LDD_OK:
                    ldd_desc_list_clear(&self._link.descs)
                    self._link.descs.by_tensor = True           # what addresses name need not be one region
                    status = ldd_plan_blocks(
                        &self._link.descs, self._addrs + remote_first, dst_blocks.data,
                        self._num_blocks(self._local.stride), self._local.addrs + local_first, src_blocks.data,
                        self._local.num_slots, count,
                        self._local.stride, dst_blocks.length, True, &detail)
                    status = self._move(status, remote_first, self._local.stride, &detail)
                    self._end()
        self._raise_for(status, &detail, _stage_of(status))

    def close(self, bint ends_hold=False):
        """End the lease and unpin the source. Idempotent; a peer that is gone has ended the lease itself.

        With `ends_hold` the key of held blocks that was aimed at ends as well, for all has been written.
        """
        cdef ldd_detail detail
        cdef ldd_status status = LDD_OK
        if not self._pinned or self._engine.table == NULL or getpid() != self._engine._pid:
            return
        with nogil:
            while self._lease:
                status = self._begin(&detail)
                if status == LDD_E_TIMEOUT:
                    continue                        # others keep the link busy; while it lives the lease must be ended
                if status == LDD_OK:
                    status = ldd_request_release(self._link, self._lease, ends_hold, 0,
                                             self._num_tensors if ends_hold else 0,
                                             ldd_now_ns() + self._engine.node.sync_timeout_ns, &detail)
                    self._end()
                elif status == LDD_E_INTERRUPTED:
                    ldd_link_break(self._link, b"interrupted")
                elif not ends_hold:
                    status = LDD_OK                 # the link has gone, and the lease with it
                self._lease = 0
            ldd_table_unpin(self._engine.table, self._local.slot, self._local.generation)
        self._pinned = False
        self._raise_for(status, &detail, b"release")


cdef const char* _stage_of(ldd_status status) noexcept nogil:
    if status == LDD_E_CHECKSUM:
        return b"verify"
    return b"plan" if status == LDD_E_PARAM else b"transfer"


def parse_indices(values, str name):
    """Block indices for `LayerPush`, checked and copied once.

    Raises
    ------
    TypeError, ValueError
        An entry is no integer, or negative; the text names it.
    """
    return IndexList.parse(values, name)
