"""The engine behind one `LLMDataDist`: its caches, transfers and local copies, on top of life cycle and links.

The facade above validates arguments and calls with plain numbers and sequences; here they become C structs,
the work runs without the GIL, and statuses become exceptions. Every method may be called from any thread but
`close`, which must not overlap others. A forked child gets an error from everything and frees nothing.
"""
cimport cython

from libc.stdint cimport INT64_MAX, UINT16_MAX, int64_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset

from llm_datadist.core.base.provider cimport (
    ACL_MEMCPY_DEFAULT, ACL_MEMCPY_DEVICE_TO_DEVICE, ACL_MEMCPY_DEVICE_TO_HOST, ACL_MEMCPY_HOST_TO_DEVICE,
    ACL_MEMCPY_HOST_TO_HOST, LDD_CAP_ANY_LOCAL, aclrtContext, aclrtMemcpyKind,
)
from llm_datadist.core.base.status cimport (
    LDD_E_FAILED, LDD_E_NO_MEMORY, LDD_E_PARAM, LDD_E_TIMEOUT, LDD_OK, ldd_fail, raise_status, start_detail,
)
from llm_datadist.core.base.sync cimport ldd_now_ns, ldd_unlock
from llm_datadist.core.base.tensor_desc cimport LDD_MAX_DIMS, ldd_tensor_desc
from llm_datadist.core.base.wait cimport ldd_lock_interruptible
from llm_datadist.core.link.background cimport ldd_links_withdraw
from llm_datadist.core.link.region cimport ldd_regions_add, ldd_regions_epoch, ldd_regions_remove
from llm_datadist.core.link.wire cimport LDD_MODE_REMOTE_ACCESSIBLE
from llm_datadist.core.record.record cimport ldd_tracing
from llm_datadist.core.table.cache_table cimport (
    LDD_CACHE_BLOCKS, LDD_CACHE_HOST, LDD_CACHE_LAST_KEY_WINS, LDD_CACHE_REMOTE, ldd_cache_view, ldd_key_spec,
    ldd_table, ldd_table_allocate, ldd_table_deallocate, ldd_table_pin_local, ldd_table_register, ldd_table_remove_key,
    ldd_table_set_epoch, ldd_table_unpin, ldd_table_unregister,
)
from llm_datadist.core.table.key_index cimport (
    KEY_BLOCKS as _BLOCKS, KEY_BY_ID as _BY_ID, KEY_PREFIX as _PREFIX, KEY_REQ as _REQ,
)
from llm_datadist.core.table.leases cimport ldd_table_lease
from llm_datadist.core.table.pool cimport ldd_pool
from llm_datadist.core.transfer.batch cimport ldd_context_enter, ldd_context_leave
from llm_datadist.core.transfer.fitting cimport (
    SHAPE_BLOCKS, SHAPE_SLOT, SHAPE_SLOT_TO_BLOCKS, ldd_faults, ldd_progress,
)
from llm_datadist.core.transfer.local_copy cimport (
    ldd_local_copy, ldd_op_list_clear, ldd_plan_copy_blocks, ldd_plan_copy_cache, ldd_plan_swap_blocks, ldd_slots,
)
from llm_datadist.core.transfer.steps cimport ldd_transfer_run

from llm_datadist import status as _public
from llm_datadist.core.record.record import trace_context as _trace_context

KEY_REQ, KEY_PREFIX, KEY_BLOCKS, KEY_BY_ID = _REQ, _PREFIX, _BLOCKS, _BY_ID


# One side of swap_blocks: a cache of the table, or memory of the caller.
ctypedef struct ldd_swap_end:
    int64_t cache_id                            # of the table, unless `own`
    uint64_t* own                               # addresses of caller memory
    bint pinned
    ldd_cache_view view
    ldd_slots slots


cdef ldd_key_spec* ldd_key_specs(object keys, uint32_t* count) except? NULL:
    """C array of (slot, kind, id, model id) tuples; the caller frees it. NULL without keys."""
    cdef uint32_t i, n = <uint32_t>len(keys)
    count[0] = n
    if n == 0:
        return NULL
    cdef ldd_key_spec* specs = <ldd_key_spec*>malloc(n * sizeof(ldd_key_spec))
    if specs == NULL:
        raise_status(LDD_E_NO_MEMORY, NULL, b"allocate_cache", False)
    try:
        for i, (slot, kind, id_, model_id) in enumerate(keys):
            specs[i].slot = slot
            specs[i].kind = kind
            specs[i].id = id_
            specs[i].model_id = model_id
    except BaseException:
        free(specs)
        raise
    return specs


cdef uint64_t* ldd_address_array(object addrs) except? NULL:
    cdef uint32_t i, n = <uint32_t>len(addrs)
    cdef uint64_t* out = <uint64_t*>malloc(max(n, 1) * sizeof(uint64_t))
    if out == NULL:
        raise_status(LDD_E_NO_MEMORY, NULL, b"allocate_cache", False)
    try:
        for i in range(n):
            out[i] = addrs[i]
    except BaseException:
        free(out)
        raise
    return out


cdef object _address_sequence(const uint64_t* addrs, uint32_t count):
    """A range where the tensors lie at equal steps, so that a thousand addresses cost nothing until read."""
    cdef uint32_t i
    cdef uint64_t step
    if count > 1 and addrs[1] > addrs[0]:
        step = addrs[1] - addrs[0]
        for i in range(1, count):
            if addrs[i] - addrs[i - 1] != step:
                break
        else:
            return range(addrs[0], addrs[0] + step * count, step)
    return [addrs[i] for i in range(count)]


cdef int _describe(ldd_tensor_desc* out, int data_type, shape) except -1:
    cdef uint32_t i
    memset(out, 0, sizeof(out[0]))
    out.dtype = <uint16_t>(data_type + 1)
    out.rank = <uint16_t>min(len(shape), UINT16_MAX)
    for i in range(min(out.rank, <uint32_t>LDD_MAX_DIMS)):
        out.dims[i] = shape[i]
    return 0


cdef int ldd_tell_faults(error, const ldd_faults* faults, bint of_blocks) except -1:
    """Have an exception list what differs, where anything was compared."""
    cdef size_t i
    if faults.count:
        error._faulty_tensors = sorted({faults.items[i].tensor for i in range(faults.count)})
        if of_blocks:
            error._failed_blocks = sorted({faults.items[i].block for i in range(faults.count)})
    return 0


cdef int _set_range(object tensors, int64_t* first, int64_t* stop) except -1:
    if tensors is None:
        first[0] = stop[0] = -1
    else:
        first[0], stop[0] = tensors
    return 0


@cython.final
@cython.no_gc_clear
cdef class Engine(EngineBlockKeys):
    """One engine. Construction opens everything or leaves nothing behind.

    Parameters
    ----------
    options : EngineOptions
        Parsed options, see ``llm_datadist/options.py``.
    cluster_id : int
        This process's cluster id, uint64.

    Raises
    ------
    LLMException
        With the status the API documents for what failed: no provider, pool too large, address in use, ...
    """

    # ---------------------------------------------------------------------------------------------- memory

    def allocate(self, uint32_t num_tensors, uint64_t num_slots, uint64_t tensor_bytes, bint host, bint is_blocks,
                 keys=(), int64_t lease_ms=0, int data_type=-1, shape=()):
        """Take a cache from a pool and bind its keys; request keys expire after `lease_ms`, unless that is 0.

        `data_type` (-1: not said) and `shape` are told to peers, who compare and name them.

        Returns
        -------
        tuple of (int, sequence of int)
            Cache id, and one address per tensor.
        """
        cdef ldd_detail detail
        cdef ldd_status status
        cdef uint32_t num_keys = 0
        cdef int64_t cache_id = 0
        cdef uint32_t flags = (LDD_CACHE_BLOCKS if is_blocks else 0) | (LDD_CACHE_HOST if host else 0)
        cdef ldd_pool* pool = self.host_pool if host else self.device_pool
        cdef ldd_tensor_desc described
        self.require_open()
        start_detail(&detail)
        _describe(&described, data_type, shape)
        flags |= LDD_CACHE_REMOTE | (LDD_CACHE_LAST_KEY_WINS if self.v1 else 0)
        if pool == NULL:
            status = ldd_fail(&detail, LDD_E_PARAM, b"no %s pool is configured",
                              <const char*>b"host" if host else <const char*>b"device")
            return self.raise_for(status, &detail, b"allocate_cache")
        if not <uint64_t>num_tensors * sizeof(uint64_t) <= <uint64_t>1 << 31:
            status = ldd_fail(&detail, LDD_E_PARAM, b"num_tensors %u is beyond any pool", num_tensors)
            return self.raise_for(status, &detail, b"allocate_cache")
        if lease_ms and self.table.lease_fd < 0:
            status = ldd_fail(&detail, LDD_E_FAILED, b"no descriptor was left for a timer when the engine was opened")
            return self.raise_for(status, &detail, b"allocate_cache")
        cdef ldd_key_spec* specs = ldd_key_specs(keys, &num_keys)
        cdef uint64_t* addrs = <uint64_t*>malloc(max(num_tensors, <uint32_t>1) * sizeof(uint64_t))
        try:
            if addrs == NULL:
                raise_status(LDD_E_NO_MEMORY, NULL, b"allocate_cache", False)
            with nogil:
                status = ldd_table_allocate(self.table, pool, num_tensors, num_slots, tensor_bytes, flags, &described,
                                            specs, num_keys, &cache_id, addrs,
                                            ldd_now_ns() + self.node.sync_timeout_ns, &detail)
            self.raise_for(status, &detail, b"allocate_cache")
            if lease_ms:
                ldd_table_lease(self.table, cache_id, ldd_now_ns() + lease_ms * 1000000)
            return cache_id, _address_sequence(addrs, num_tensors)
        finally:
            free(addrs)
            free(specs)

    def deallocate(self, int64_t cache_id):
        """Drop the handle's reference. Unknown or already deallocated ids are no-ops; never waits for a peer."""
        cdef ldd_detail detail
        cdef ldd_status status
        self.require_open()
        start_detail(&detail)
        # The table is nearly always free, and then this takes less time than to give the GIL away and take it again.
        status = ldd_table_deallocate(self.table, cache_id, 0, &detail)
        if status == LDD_E_TIMEOUT:
            start_detail(&detail)
            with nogil:
                status = ldd_table_deallocate(self.table, cache_id, ldd_now_ns() + self.node.sync_timeout_ns, &detail)
        self.raise_for(status, &detail, b"deallocate_cache")

    def register(self, addrs, uint64_t num_slots, uint64_t tensor_bytes, bint host, bint is_blocks, keys=(),
                 bint remote_accessible=True, int data_type=-1, shape=()):
        """Describe memory of the caller as a cache and let peers reach it. Returns the cache id.

        In remote-accessible mode the data servers never hear of memory that is not to be accessible: what no request
        may name, no peer can move by going past the requests. Hardware has one registration for both directions, so
        there they do. In the other mode every cache may be read, and written to under a lease on its addresses.
        """
        cdef ldd_detail detail
        cdef ldd_status status = LDD_OK
        cdef uint32_t num_keys = 0, num_tensors = <uint32_t>len(addrs), i, done = 0, announced = num_tensors
        cdef int64_t cache_id = 0
        cdef uint32_t flags = ((LDD_CACHE_BLOCKS if is_blocks else 0) | (LDD_CACHE_HOST if host else 0)
                               | (LDD_CACHE_REMOTE if remote_accessible else 0))
        cdef ldd_tensor_desc described
        self.require_open()
        start_detail(&detail)
        _describe(&described, data_type, shape)
        cdef uint64_t* array = ldd_address_array(addrs)
        cdef ldd_key_spec* specs = NULL
        try:
            specs = ldd_key_specs(keys, &num_keys)
            with nogil:
                if (self.node.mode & LDD_MODE_REMOTE_ACCESSIBLE and not remote_accessible
                        and self._provider.table.caps & LDD_CAP_ANY_LOCAL):
                    announced = 0
                for i in range(announced):
                    status = ldd_regions_add(&self.node.regions, array[i], tensor_bytes, host, &detail)
                    if status < 0:
                        break
                    done += 1
                # Before the cache can be found: a peer that finds it must know that there are new regions.
                ldd_table_set_epoch(self.table, ldd_regions_epoch(&self.node.regions))
                if status == LDD_OK:
                    status = ldd_table_register(self.table, array, num_tensors, num_slots, tensor_bytes, flags,
                                                &described, specs, num_keys, &cache_id,
                                                ldd_now_ns() + self.node.sync_timeout_ns, &detail)
                if status < 0:
                    for i in range(done):
                        self._forget_range(array[i], tensor_bytes)
            self.raise_for(status, &detail, b"register_cache")
            self._registered[cache_id] = (tuple(addrs) if announced else (), tensor_bytes)
            return cache_id
        finally:
            free(array)
            free(specs)

    def unregister(self, int64_t cache_id):
        """Withdraw a registered cache, once nobody reads or writes it. Unknown ids are no-ops."""
        cdef ldd_detail detail
        cdef ldd_status status
        cdef uint64_t addr, nbytes
        self.require_open()
        start_detail(&detail)
        with nogil:
            status = ldd_table_unregister(self.table, cache_id, ldd_now_ns() + self.node.sync_timeout_ns, &detail)
        self.raise_for(status, &detail, b"unregister_cache")
        addrs, nbytes = self._registered.pop(cache_id, ((), 0))
        for addr in addrs:
            with nogil:
                self._forget_range(addr, nbytes)
        with nogil:
            ldd_table_set_epoch(self.table, ldd_regions_epoch(&self.node.regions))

    cdef void _forget_range(self, uint64_t addr, uint64_t nbytes) noexcept nogil:
        """Undo one registration of a range. Servers come first: no new client then learns of it."""
        if ldd_regions_remove(&self.node.regions, addr, nbytes):
            ldd_links_withdraw(&self.node, addr, nbytes, ldd_now_ns() + self.node.sync_timeout_ns)

    def remove_key(self, uint32_t kind, uint64_t id, uint64_t model_id):
        """Unbind a key; its cache is freed when nothing else holds it. Unknown keys are no-ops."""
        cdef ldd_detail detail
        cdef ldd_status status
        self.require_open()
        start_detail(&detail)
        status = ldd_table_remove_key(self.table, kind, id, model_id, 0, &detail)           # as in `deallocate`
        if status == LDD_E_TIMEOUT:
            start_detail(&detail)
            with nogil:
                status = ldd_table_remove_key(self.table, kind, id, model_id, ldd_now_ns() + self.node.sync_timeout_ns,
                                              &detail)
        self.raise_for(status, &detail, b"remove_cache_key")

    @property
    def pool_memory(self):
        """What keeps the memory of the pools in place for as long as it is referenced, also after `close`."""
        return self._memory

    @property
    def is_host_addressable(self):
        """Whether the CPU can read and write device memory of this provider."""
        return self._provider.name == "host"

    def has_pool(self, host=None):
        """Whether a pool is configured: the host one, the device one, or any (None)."""
        if host is None:
            return self.host_pool != NULL or self.device_pool != NULL
        return (self.host_pool if host else self.device_pool) != NULL

    # ------------------------------------------------------------------------------------------- transfers

    cdef int _run(self, ldd_transfer* what, key, src_tensors, dst_tensors, const char* name) except -1:
        cdef ldd_detail detail
        cdef ldd_progress progress
        cdef ldd_status status
        self.require_open()
        start_detail(&detail)
        what.kind, what.id, what.model_id, what.batch_index = key
        if what.put:
            _set_range(src_tensors, &what.local_first, &what.local_stop)
            _set_range(dst_tensors, &what.remote_first, &what.remote_stop)
        else:
            _set_range(src_tensors, &what.remote_first, &what.remote_stop)
            _set_range(dst_tensors, &what.local_first, &what.local_stop)
        what.same_dtype = self.node.strict
        what.verify = self.node.verifies
        memset(&progress, 0, sizeof(progress))
        what.progress = &progress
        if ldd_tracing(&self.node.record):
            context = _trace_context.get()
            if context is not None:
                what.context[0], what.context[1], what.context[2] = context
        with nogil:
            status = ldd_transfer_run(&self.node, what, &detail)
        if status >= 0:
            free(progress.faults.items)
            return 0
        try:
            return self.raise_for_peer(status, &detail, name, what.cluster_id, progress.stage)
        except _public.LLMException as error:
            error._num_tensors = progress.num_tensors
            ldd_tell_faults(error, &progress.faults, what.shape != SHAPE_SLOT)
            raise
        finally:
            free(progress.faults.items)

    def pull_cache(self, uint64_t cluster_id, key, int64_t cache_id, uint64_t batch_index=0, int64_t size=-1,
                   src_tensors=None, dst_tensors=None, uint64_t src_offset=0, uint64_t dst_offset=0,
                   bint release=False):
        """Read one slot of a contiguous cache of the peer into one of ours (semantics: contiguous to contiguous)."""
        cdef ldd_transfer what
        memset(&what, 0, sizeof(what))
        what.shape = SHAPE_SLOT
        what.cluster_id = cluster_id
        what.cache_id = cache_id
        what.local_slot = batch_index
        what.size = size
        what.remote_offset = src_offset
        what.local_offset = dst_offset
        what.release = release
        self._run(&what, key, src_tensors, dst_tensors, b"pull_cache")

    def pull_blocks(self, uint64_t cluster_id, key, int64_t cache_id, src_blocks, dst_blocks, src_tensors=None,
                    dst_tensors=None, bint release=False):
        """Read blocks of a blocks cache, or with no `src_blocks` one slot of a contiguous cache, into our blocks."""
        cdef ldd_transfer what
        cdef IndexList src = IndexList.parse(src_blocks, "src_blocks")
        cdef IndexList dst = IndexList.parse(dst_blocks, "dst_blocks")
        memset(&what, 0, sizeof(what))
        what.shape = SHAPE_BLOCKS if src.length else SHAPE_SLOT_TO_BLOCKS
        what.cluster_id = cluster_id
        what.cache_id = cache_id
        self._set_blocks(&what, src, dst, b"pull_blocks")
        what.release = release
        self._run(&what, key, src_tensors, dst_tensors, b"pull_blocks")

    cdef int _set_blocks(self, ldd_transfer* what, IndexList src, IndexList dst, const char* name) except -1:
        cdef ldd_detail detail
        if what.shape == SHAPE_BLOCKS and src.length != dst.length:
            start_detail(&detail)
            ldd_fail(&detail, LDD_E_PARAM, b"src_blocks has %zu entries and dst_blocks %zu: they pair by position",
                     src.length, dst.length)
            return raise_status(LDD_E_PARAM, &detail, name, self.v1)
        what.remote_blocks = dst.data if what.put else src.data
        what.local_blocks = src.data if what.put else dst.data
        what.num_blocks = dst.length
        return 0

    def push_cache(self, uint64_t cluster_id, key, int64_t cache_id, uint64_t src_batch_index=0, src_tensors=None,
                   dst_tensors=None, uint32_t tensors_per_step=0):
        """Write one slot of our contiguous cache into one of the peer's, step by step."""
        cdef ldd_transfer what
        memset(&what, 0, sizeof(what))
        what.shape = SHAPE_SLOT
        what.put = True
        what.cluster_id = cluster_id
        what.cache_id = cache_id
        what.local_slot = src_batch_index
        what.size = -1
        what.tensors_per_step = tensors_per_step
        self._run(&what, key, src_tensors, dst_tensors, b"push_cache")

    def push_blocks(self, uint64_t cluster_id, key, int64_t cache_id, src_blocks, dst_blocks, src_tensors=None,
                    dst_tensors=None, uint32_t tensors_per_step=0):
        """Write blocks of our blocks cache into the peer's, step by step."""
        cdef ldd_transfer what
        cdef IndexList src = IndexList.parse(src_blocks, "src_blocks")
        cdef IndexList dst = IndexList.parse(dst_blocks, "dst_blocks")
        memset(&what, 0, sizeof(what))
        what.shape = SHAPE_BLOCKS
        what.put = True
        what.cluster_id = cluster_id
        what.cache_id = cache_id
        what.tensors_per_step = tensors_per_step
        self._set_blocks(&what, src, dst, b"push_blocks")
        self._run(&what, key, src_tensors, dst_tensors, b"push_blocks")

    # ------------------------------------------------------------------------------------- local operations

    cdef ldd_status _begin_copy(self, int64_t* deadline_ns, ldd_detail* detail) noexcept nogil:
        """Wait for the turn of a local copy: the lock is for `_copy_planned` to give back."""
        cdef ldd_status status
        deadline_ns[0] = self._local_deadline()
        status = ldd_lock_interruptible(&self._copy_lock, deadline_ns[0])
        if status == LDD_E_TIMEOUT:
            return ldd_fail(detail, status, b"other local copies went on for all of %lld ms",
                            <long long>(self.node.sync_timeout_ns // 1000000))
        return status

    cdef aclrtMemcpyKind _copy_kind(self, bint from_host, bint to_host) noexcept nogil:
        """Older runtimes go by the kind alone; the host provider takes any address for either."""
        if self._provider.table.caps & LDD_CAP_ANY_LOCAL:
            return ACL_MEMCPY_DEFAULT
        if from_host:
            return ACL_MEMCPY_HOST_TO_HOST if to_host else ACL_MEMCPY_HOST_TO_DEVICE
        return ACL_MEMCPY_DEVICE_TO_HOST if to_host else ACL_MEMCPY_DEVICE_TO_DEVICE

    cdef ldd_status _copy_planned(self, ldd_status planned, aclrtMemcpyKind kind, int64_t deadline_ns,
                                  ldd_detail* detail) noexcept nogil:
        """Carry out ``_ops`` and give the lock back."""
        cdef aclrtContext before
        cdef ldd_status status = planned
        if status == LDD_OK:
            before = ldd_context_enter(&self.node)
            status = ldd_local_copy(self._provider.table, self._stream, self._ops.items, self._ops.count,
                                    kind, deadline_ns, detail)
            ldd_context_leave(&self.node, before)
        ldd_op_list_clear(&self._ops)
        ldd_unlock(&self._copy_lock)
        return status

    def copy_cache(self, int64_t dst_id, int64_t src_id, uint64_t dst_batch_index=0, uint64_t src_batch_index=0,
                   uint64_t offset=0, int64_t size=-1):
        """Copy one slot to another, tensor by tensor, within this process."""
        cdef ldd_detail detail
        cdef int64_t deadline_ns = 0
        cdef ldd_status status
        cdef ldd_cache_view src, dst
        cdef ldd_slots src_slots, dst_slots
        self.require_open()
        start_detail(&detail)
        with nogil:
            status = ldd_table_pin_local(self.table, src_id, &src, &detail)
            if status == LDD_OK:
                status = ldd_table_pin_local(self.table, dst_id, &dst, &detail)
                if status == LDD_OK:
                    _fill_slots(&src_slots, &src)
                    _fill_slots(&dst_slots, &dst)
                    status = self._begin_copy(&deadline_ns, &detail)
                    if status == LDD_OK:
                        status = ldd_plan_copy_cache(&self._ops, &dst_slots, dst_batch_index, &src_slots,
                                                     src_batch_index, offset, size, &detail)
                        status = self._copy_planned(status, self._copy_kind(src.host, dst.host), deadline_ns, &detail)
                    ldd_table_unpin(self.table, dst.slot, dst.generation)
                ldd_table_unpin(self.table, src.slot, src.generation)
        self.raise_for(status, &detail, b"copy_cache")

    def copy_blocks(self, int64_t cache_id, src_blocks, dst_blocks):
        """Copy blocks within one blocks cache, pair after pair."""
        cdef ldd_detail detail
        cdef int64_t deadline_ns = 0
        cdef ldd_status status
        cdef ldd_cache_view view
        cdef IndexList src = IndexList.parse(src_blocks, "copy_block_info keys")
        cdef IndexList dst = IndexList.parse(dst_blocks, "copy_block_info values")
        self.require_open()
        start_detail(&detail)
        with nogil:
            status = ldd_table_pin_local(self.table, cache_id, &view, &detail)
            if status == LDD_OK:
                status = self._begin_copy(&deadline_ns, &detail)
                if status == LDD_OK:
                    status = ldd_plan_copy_blocks(&self._ops, view.addrs, view.num_tensors, view.num_slots,
                                                  view.stride, src.data, dst.data, src.length, &detail)
                    status = self._copy_planned(status, self._copy_kind(view.host, view.host), deadline_ns, &detail)
                ldd_table_unpin(self.table, view.slot, view.generation)
        self.raise_for(status, &detail, b"copy_blocks")

    def swap_blocks(self, src, dst, uint32_t num_tensors, uint64_t block_bytes, src_blocks, dst_blocks):
        """Copy blocks between two caches, pair after pair.

        `src` and `dst` are each a cache id, or addresses of caller memory and how many blocks lie there. What a cache
        id names is pinned meanwhile, and its own record bounds the copy.
        """
        cdef ldd_detail detail
        cdef int64_t deadline_ns = 0
        cdef ldd_status status = LDD_OK
        cdef IndexList pair_src = IndexList.parse(src_blocks, "src_to_dst keys")
        cdef IndexList pair_dst = IndexList.parse(dst_blocks, "src_to_dst values")
        cdef ldd_swap_end ends[2]
        cdef uint32_t i
        self.require_open()
        start_detail(&detail)
        memset(ends, 0, sizeof(ends))
        try:
            for i, end in enumerate((src, dst)):
                if isinstance(end, int):
                    ends[i].cache_id = end
                else:
                    addrs, ends[i].slots.num_slots = end
                    ends[i].slots.addrs = ends[i].own = ldd_address_array(addrs)
                    ends[i].slots.num_tensors = <size_t>len(addrs)
                    ends[i].slots.stride = block_bytes
            with nogil:
                for i in range(2):
                    if status == LDD_OK:
                        status = _open_end(self.table, &ends[i], num_tensors, block_bytes, &detail)
                if status == LDD_OK:
                    status = self._begin_copy(&deadline_ns, &detail)
                if status == LDD_OK:
                    status = ldd_plan_swap_blocks(
                        &self._ops, ends[0].slots.addrs, pair_src.data, ends[0].slots.num_slots, ends[1].slots.addrs,
                        pair_dst.data, ends[1].slots.num_slots, num_tensors, block_bytes, pair_src.length, &detail)
                    status = self._copy_planned(status, self._copy_kind(_is_on_host(&ends[0]), _is_on_host(&ends[1])),
                                                deadline_ns, &detail)
                for i in range(2):
                    if ends[i].pinned:
                        ldd_table_unpin(self.table, ends[i].view.slot, ends[i].view.generation)
            self.raise_for(status, &detail, b"swap_blocks")
        finally:
            free(ends[0].own)
            free(ends[1].own)

    cdef int64_t _local_deadline(self) noexcept nogil:
        """Local operations have a time limit in the first generation alone."""
        return ldd_now_ns() + self.node.sync_timeout_ns if self.v1 else INT64_MAX


cdef void _fill_slots(ldd_slots* out, const ldd_cache_view* view) noexcept nogil:
    out.addrs = view.addrs
    out.num_tensors = view.num_tensors
    out.num_slots = view.num_slots
    out.stride = view.stride


cdef bint _is_on_host(const ldd_swap_end* end) noexcept nogil:
    return end.own != NULL or end.view.host     # what a caller names by address is a cpu cache


cdef ldd_status _open_end(ldd_table* table, ldd_swap_end* end, uint32_t num_tensors, uint64_t block_bytes,
                         ldd_detail* detail) noexcept nogil:
    """Pin what a cache id names, and hold either end against what the pairs will be planned with."""
    cdef ldd_status status
    if end.own == NULL:
        status = ldd_table_pin_local(table, end.cache_id, &end.view, detail)
        if status < 0:
            return status
        end.pinned = True
        _fill_slots(&end.slots, &end.view)
    if end.slots.num_tensors != num_tensors or end.slots.stride != block_bytes:
        return ldd_fail(detail, LDD_E_PARAM,
                        b"%u tensors with blocks of %llu bytes were described, but there are %zu with %llu",
                        num_tensors,
                        <unsigned long long>block_bytes, end.slots.num_tensors, <unsigned long long>end.slots.stride)
    return LDD_OK
