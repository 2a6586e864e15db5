"""The engine behind one `LLMDataDist`: provider, device context, pools, cache table, links, service thread.

The facade above validates arguments and calls with plain numbers and sequences; here they become C structs,
the work runs without the GIL, and statuses become exceptions. Every method may be called from any thread but
`close`, which must not overlap others. A forked child gets an error from everything and frees nothing.
"""
cimport cython

import os

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memset

from .ask cimport ldd_ask_ping
from .cache_table cimport (LDD_CACHE_BLOCKS, LDD_CACHE_HOST, LDD_CACHE_LAST_KEY_WINS, LDD_CACHE_REMOTE,
                           ldd_cache_row, ldd_cache_view, ldd_key_spec, ldd_table_allocate, ldd_table_clear,
                           ldd_table_counts, ldd_table_create, ldd_table_deallocate, ldd_table_destroy,
                           ldd_table_pin_local, ldd_table_register, ldd_table_remove_key, ldd_table_set_epoch, ldd_table_snapshot,
                           ldd_table_stats, ldd_table_unpin, ldd_table_unregister)
from .cann cimport ACL_MEM_MALLOC_HUGE_FIRST, ACL_MEMCPY_DEFAULT, aclrtContext
from .connect cimport ldd_link_close, ldd_link_open, ldd_random
from .index_list cimport IndexList
from .key_index cimport KEY_BLOCKS as _BLOCKS, KEY_BY_ID as _BY_ID, KEY_PREFIX as _PREFIX, KEY_REQ as _REQ
from .local_copy cimport (ldd_local_copy, ldd_op_list_clear, ldd_op_list_free, ldd_plan_copy_blocks,
                          ldd_plan_copy_cache, ldd_plan_swap_blocks, ldd_slots)
from .net cimport net_listen
from .node cimport (ORIGIN_COMM, ldd_link, ldd_link_begin, ldd_link_end, ldd_link_existed, ldd_links_drop, ldd_node_close,
                    ldd_node_destroy, ldd_node_init)
from .peek cimport ldd_board_name
from .pool cimport ldd_pool_create, ldd_pool_destroy, ldd_pool_free_bytes, ldd_pool_largest_bytes
from .region cimport (ldd_regions_add, ldd_regions_close, ldd_regions_epoch, ldd_regions_init, ldd_regions_remove,
                      ldd_regions_serve, ldd_regions_set_endpoints)
from .service cimport ldd_service_listen, ldd_service_start, ldd_service_stop, ldd_service_unlisten
from .status cimport (LDD_E_FAILED, LDD_E_INTERRUPTED, LDD_E_LINK_BUSY, LDD_E_NO_MEMORY, LDD_E_PARAM, LDD_OK, check,
                      ldd_fail, raise_status)
from .sync cimport ldd_lock, ldd_lock_until, ldd_mutex_destroy, ldd_mutex_init, ldd_now_ns, ldd_unlock
from .transfer cimport (SHAPE_BLOCKS, SHAPE_SLOT, SHAPE_SLOT_TO_BLOCKS, ldd_context_enter, ldd_context_leave,
                        ldd_transfer, ldd_transfer_run)
from .wait cimport ldd_acl_result
from .welcome cimport ldd_service_forget, ldd_service_met, ldd_service_wish
from .wire cimport LDD_MODE_REMOTE_ACCESSIBLE

KEY_REQ, KEY_PREFIX, KEY_BLOCKS, KEY_BY_ID = _REQ, _PREFIX, _BLOCKS, _BY_ID

cdef enum:
    ACL_REPEAT_INITIALIZE = 100002
    LISTEN_BACKLOG = 1024
    CLOSE_GRACE_NS = 2000000000                 # on top of the time running transfers may still take


# One side of swap_blocks: a cache of the table, or memory of the caller.
ctypedef struct ldd_swap_end:
    int64_t cache_id                            # of the table, unless `own`
    uint64_t* own                               # addresses of caller memory
    bint pinned
    ldd_cache_view view
    ldd_slots slots


cdef inline void start_detail(ldd_detail* detail) noexcept nogil:
    detail.provider_code = 0
    detail.text[0] = 0


cdef ldd_key_spec* key_specs(object keys, uint32_t* count) except? NULL:
    """C array of (slot, kind, id, model id) tuples; the caller frees it. NULL without keys."""
    cdef uint32_t i, n = <uint32_t>len(keys)
    count[0] = n
    if n == 0:
        return NULL
    cdef ldd_key_spec* specs = <ldd_key_spec*>malloc(n * sizeof(ldd_key_spec))
    if specs == NULL:
        raise MemoryError()
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


cdef uint64_t* address_array(object addrs) except? NULL:
    cdef uint32_t i, n = <uint32_t>len(addrs)
    cdef uint64_t* out = <uint64_t*>malloc(max(n, 1) * sizeof(uint64_t))
    if out == NULL:
        raise MemoryError()
    try:
        for i in range(n):
            out[i] = addrs[i]
    except BaseException:
        free(out)
        raise
    return out


cdef object address_sequence(const uint64_t* addrs, uint32_t count):
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


cdef int set_range(object tensors, int64_t* first, int64_t* stop) except -1:
    if tensors is None:
        first[0] = stop[0] = -1
    else:
        first[0], stop[0] = tensors
    return 0


@cython.final
cdef class Engine:
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

    def __cinit__(self):
        self._listen_fd = -1
        self._registered = {}
        ldd_mutex_init(&self._copy_lock)
        memset(&self._ops, 0, sizeof(self._ops))

    def __init__(self, options, unsigned long long cluster_id):
        self.options = options
        self.v1 = options.generation == 1
        self._pid = os.getpid()
        self._device_id = options.device_id
        self._provider = Provider.open(options.provider)
        ldd_node_init(&self.node, self._provider.table, cluster_id)
        ldd_regions_init(&self.node.regions, self._provider.table)
        self._open = True
        try:
            self._open_all(options)
        except BaseException:
            self.close()
            raise

    def __dealloc__(self):
        ldd_mutex_destroy(&self._copy_lock)
        ldd_op_list_free(&self._ops)
        if self._provider is not None:
            ldd_node_destroy(&self.node)

    # ------------------------------------------------------------------------------------------ life cycle

    def _open_all(self, options):
        cdef ldd_detail detail
        cdef ldd_status status
        cdef char name[80]
        start_detail(&detail)
        ldd_random(self.node.instance, sizeof(self.node.instance))
        self.node.sync_timeout_ns = <int64_t>options.sync_timeout_ms * 1000000
        self.node.shares_table = shares_table(os.environ)
        self.node.mode = LDD_MODE_REMOTE_ACCESSIBLE if options.remote_cache_accessible else 0
        with nogil:
            status = ldd_table_create(&self.table, &detail)
        self.node.table = self.table
        self.raise_for(status, &detail, b"init")
        endpoints = b"".join(options.endpoints)
        status = ldd_regions_set_endpoints(&self.node.regions, <const char*>endpoints,
                                           <uint32_t>len(options.endpoints))
        self.raise_for(status, &detail, b"init")
        self._open_device()
        if options.device_pool is not None:
            self._open_pool(options.device_pool, False)
        if options.host_pool is not None:
            self._open_pool(options.host_pool, True)
        with nogil:
            status = ldd_service_start(&self.service, &self.node, &detail)
        self.raise_for(status, &detail, b"init")
        if self.node.shares_table:
            ldd_board_name(self.node.instance, name, sizeof(name))
            self.listen_at(name.decode(), 0)
        if options.listen is not None:
            self.set_listener(options.listen)

    def _open_device(self):
        cdef ldd_detail detail
        cdef aclrtContext before = NULL
        cdef int code
        cdef ldd_status status
        start_detail(&detail)
        with nogil:
            code = self._provider.table.acl.aclInit(NULL)
            status = LDD_OK
            if code != 0 and code != ACL_REPEAT_INITIALIZE:
                status = ldd_acl_result(self._provider.table, code, b"initialise the runtime", &detail)
            if status == LDD_OK:
                self._provider.table.acl.aclrtGetCurrentContext(&before)
                status = ldd_acl_result(self._provider.table, self._provider.table.acl.aclrtSetDevice(self._device_id),
                                        b"bind the device", &detail)
            if status == LDD_OK:
                self._device_set = True
                status = ldd_acl_result(
                    self._provider.table,
                    self._provider.table.acl.aclrtCreateContext(&self.node.context, self._device_id),
                    b"create a context", &detail)
            if status == LDD_OK:
                status = ldd_acl_result(self._provider.table,
                                        self._provider.table.acl.aclrtCreateStream(&self._stream),
                                        b"create a stream", &detail)
            if before != NULL:
                self._provider.table.acl.aclrtSetCurrentContext(before)
        self.raise_for(status, &detail, b"init")

    def _open_pool(self, pool_options, bint host):
        cdef uint64_t nbytes = pool_options.memory_size
        cdef uint32_t page_shift = pool_options.page_shift
        cdef ldd_detail detail
        cdef ldd_status status
        cdef aclrtContext before
        cdef void** memory = &self._host_memory if host else &self._device_memory
        cdef ldd_pool** pool = &self.host_pool if host else &self.device_pool
        start_detail(&detail)
        with nogil:
            before = ldd_context_enter(&self.node)
            if host:
                status = ldd_acl_result(self._provider.table,
                                        self._provider.table.acl.aclrtMallocHost(memory, nbytes),
                                        b"take the host pool", &detail)
            else:
                status = ldd_acl_result(
                    self._provider.table,
                    self._provider.table.acl.aclrtMalloc(memory, nbytes, ACL_MEM_MALLOC_HUGE_FIRST),
                    b"take the device pool", &detail)
            if status < 0:
                memory[0] = NULL
                status = LDD_E_FAILED if host else LDD_E_NO_MEMORY
            else:
                status = ldd_pool_create(<uint64_t>memory[0], nbytes, page_shift, pool, &detail)
                if status == LDD_OK:
                    status = ldd_regions_add(&self.node.regions, <uint64_t>memory[0], nbytes, host, &detail)
                    ldd_table_set_epoch(self.table, ldd_regions_epoch(&self.node.regions))
            ldd_context_leave(&self.node, before)
        self.raise_for(status, &detail, b"init")

    def close(self):
        """Unlink everything locally, stop serving, and give all memory back. Idempotent.

        Running transfers are waited for until their own time limits have passed.
        """
        cdef ldd_detail detail
        cdef ldd_status idle, status
        if not self._open:
            return
        self._open = False
        if os.getpid() != self._pid:
            return                              # a forked child: all of this is the parent's
        start_detail(&detail)
        with nogil:
            idle = ldd_node_close(&self.node, ldd_now_ns() + 2 * self.node.sync_timeout_ns + CLOSE_GRACE_NS)
            ldd_service_stop(&self.service)
            status = LDD_OK
            if self.table != NULL:
                status = ldd_table_clear(self.table, ldd_now_ns() + self.node.sync_timeout_ns, &detail)
            if idle == LDD_OK and status == LDD_OK:
                self._release_memory()
            # otherwise something still touches the pools: leaking them is better than pulling them away
        self._listen_fd = -1
        self.listener = None
        self._registered.clear()

    cdef void _release_memory(self) noexcept nogil:
        cdef aclrtContext before
        ldd_regions_close(&self.node.regions)
        ldd_table_destroy(self.table)
        self.table = self.node.table = NULL
        ldd_pool_destroy(self.device_pool)
        ldd_pool_destroy(self.host_pool)
        self.device_pool = self.host_pool = NULL
        if self.node.context != NULL:
            before = ldd_context_enter(&self.node)
            if self._device_memory != NULL:
                self._provider.table.acl.aclrtFree(self._device_memory)
            if self._host_memory != NULL:
                self._provider.table.acl.aclrtFreeHost(self._host_memory)
            if self._stream != NULL:
                self._provider.table.acl.aclrtDestroyStream(self._stream)
            if before != self.node.context:
                ldd_context_leave(&self.node, before)
            self._provider.table.acl.aclrtDestroyContext(self.node.context)
        if self._device_set:
            self._provider.table.acl.aclrtResetDevice(self._device_id)
        self._device_memory = self._host_memory = self._stream = self.node.context = NULL
        self._device_set = False

    def is_own_process(self):
        """False in a forked child, which must leave the engine alone."""
        return os.getpid() == self._pid

    def check_process(self):
        """Raise in a forked child, before anything is touched that a thread of the parent may have held."""
        if os.getpid() != self._pid:
            self.require_open()

    cdef int require_open(self) except -1:
        cdef ldd_detail detail
        if self._open and os.getpid() == self._pid:
            return 0
        start_detail(&detail)
        if os.getpid() == self._pid:
            ldd_fail(&detail, LDD_E_FAILED, b"the engine is finalized")
        else:
            ldd_fail(&detail, LDD_E_FAILED, b"the engine belongs to the parent process: a forked child cannot use it")
        return raise_status(LDD_E_FAILED, &detail, b"use engine", self.v1)

    cdef int raise_for(self, ldd_status status, const ldd_detail* detail, const char* what) except -1:
        return check(status, detail, what, self.v1)

    # ---------------------------------------------------------------------------------------------- memory

    def allocate(self, uint32_t num_tensors, uint64_t num_slots, uint64_t tensor_bytes, bint host, bint is_blocks,
                 keys=()):
        """Take a cache from a pool and bind its keys.

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
        self.require_open()
        start_detail(&detail)
        flags |= LDD_CACHE_REMOTE | (LDD_CACHE_LAST_KEY_WINS if self.v1 else 0)
        if pool == NULL:
            status = ldd_fail(&detail, LDD_E_PARAM, b"no %s pool is configured",
                              <const char*>b"host" if host else <const char*>b"device")
            return self.raise_for(status, &detail, b"allocate_cache")
        if not <uint64_t>num_tensors * sizeof(uint64_t) <= <uint64_t>1 << 31:
            status = ldd_fail(&detail, LDD_E_PARAM, b"num_tensors %u is beyond any pool", num_tensors)
            return self.raise_for(status, &detail, b"allocate_cache")
        cdef ldd_key_spec* specs = key_specs(keys, &num_keys)
        cdef uint64_t* addrs = <uint64_t*>malloc(max(num_tensors, <uint32_t>1) * sizeof(uint64_t))
        try:
            if addrs == NULL:
                raise MemoryError()
            with nogil:
                status = ldd_table_allocate(self.table, pool, num_tensors, num_slots, tensor_bytes, flags, specs,
                                            num_keys, &cache_id, addrs, ldd_now_ns() + self.node.sync_timeout_ns,
                                            &detail)
            self.raise_for(status, &detail, b"allocate_cache")
            return cache_id, address_sequence(addrs, num_tensors)
        finally:
            free(addrs)
            free(specs)

    def deallocate(self, int64_t cache_id):
        """Drop the handle's reference. Unknown or already deallocated ids are no-ops; never waits for a peer."""
        cdef ldd_detail detail
        cdef ldd_status status
        self.require_open()
        start_detail(&detail)
        status = ldd_table_deallocate(self.table, cache_id, 0, &detail)
        if status < 0:                          # somebody holds the table: wait without the GIL
            with nogil:
                status = ldd_table_deallocate(self.table, cache_id, ldd_now_ns() + self.node.sync_timeout_ns, &detail)
        self.raise_for(status, &detail, b"deallocate_cache")

    def register(self, addrs, uint64_t num_slots, uint64_t tensor_bytes, bint host, bint is_blocks, keys=(),
                 bint remote_accessible=True):
        """Describe memory of the caller as a cache and let peers reach it. Returns the cache id."""
        cdef ldd_detail detail
        cdef ldd_status status = LDD_OK
        cdef uint32_t num_keys = 0, num_tensors = <uint32_t>len(addrs), i, done = 0
        cdef int64_t cache_id = 0
        cdef uint32_t flags = ((LDD_CACHE_BLOCKS if is_blocks else 0) | (LDD_CACHE_HOST if host else 0)
                               | (LDD_CACHE_REMOTE if remote_accessible else 0))
        self.require_open()
        start_detail(&detail)
        cdef uint64_t* array = address_array(addrs)
        cdef ldd_key_spec* specs = NULL
        try:
            specs = key_specs(keys, &num_keys)
            with nogil:
                for i in range(num_tensors):
                    status = ldd_regions_add(&self.node.regions, array[i], tensor_bytes, host, &detail)
                    if status < 0:
                        break
                    done += 1
                # Before the cache can be found: a peer that finds it must know that there are new regions.
                ldd_table_set_epoch(self.table, ldd_regions_epoch(&self.node.regions))
                if status == LDD_OK:
                    status = ldd_table_register(self.table, array, num_tensors, num_slots, tensor_bytes, flags,
                                                specs, num_keys, &cache_id,
                                                ldd_now_ns() + self.node.sync_timeout_ns, &detail)
                if status < 0:
                    for i in range(done):
                        ldd_regions_remove(&self.node.regions, array[i], tensor_bytes)
            self.raise_for(status, &detail, b"register_cache")
            self._registered[cache_id] = (tuple(addrs), tensor_bytes)
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
                ldd_regions_remove(&self.node.regions, addr, nbytes)
        ldd_table_set_epoch(self.table, ldd_regions_epoch(&self.node.regions))

    def remove_key(self, uint32_t kind, uint64_t id, uint64_t model_id):
        """Unbind a key; its cache is freed when nothing else holds it. Unknown keys are no-ops."""
        cdef ldd_detail detail
        cdef ldd_status status
        self.require_open()
        start_detail(&detail)
        status = ldd_table_remove_key(self.table, kind, id, model_id, 0, &detail)
        if status < 0:
            with nogil:
                status = ldd_table_remove_key(self.table, kind, id, model_id,
                                              ldd_now_ns() + self.node.sync_timeout_ns, &detail)
        self.raise_for(status, &detail, b"remove_cache_key")

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
        cdef ldd_status status
        self.require_open()
        start_detail(&detail)
        what.kind, what.id, what.model_id, what.batch_index = key
        if what.put:
            set_range(src_tensors, &what.local_first, &what.local_stop)
            set_range(dst_tensors, &what.remote_first, &what.remote_stop)
        else:
            set_range(src_tensors, &what.remote_first, &what.remote_stop)
            set_range(dst_tensors, &what.local_first, &what.local_stop)
        with nogil:
            status = ldd_transfer_run(&self.node, what, &detail)
        return self.raise_for(status, &detail, name)

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

    cdef ldd_status _copy_planned(self, ldd_status planned, int64_t deadline_ns, ldd_detail* detail) noexcept nogil:
        """Carry out ``_ops`` and give the lock back."""
        cdef aclrtContext before
        cdef ldd_status status = planned
        if status == LDD_OK:
            before = ldd_context_enter(&self.node)
            status = ldd_local_copy(self._provider.table, self._stream, self._ops.items, self._ops.count,
                                    ACL_MEMCPY_DEFAULT, deadline_ns, detail)
            ldd_context_leave(&self.node, before)
        ldd_op_list_clear(&self._ops)
        ldd_unlock(&self._copy_lock)
        return status

    def copy_cache(self, int64_t dst_id, int64_t src_id, uint64_t dst_batch_index=0, uint64_t src_batch_index=0,
                   uint64_t offset=0, int64_t size=-1):
        """Copy one slot to another, tensor by tensor, within this process."""
        cdef ldd_detail detail
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
                    fill_slots(&src_slots, &src)
                    fill_slots(&dst_slots, &dst)
                    ldd_lock(&self._copy_lock)
                    status = ldd_plan_copy_cache(&self._ops, &dst_slots, dst_batch_index, &src_slots, src_batch_index,
                                                 offset, size, &detail)
                    status = self._copy_planned(status, ldd_now_ns() + self.node.sync_timeout_ns, &detail)
                    ldd_table_unpin(self.table, dst.slot, dst.generation)
                ldd_table_unpin(self.table, src.slot, src.generation)
        self.raise_for(status, &detail, b"copy_cache")

    def copy_blocks(self, int64_t cache_id, src_blocks, dst_blocks):
        """Copy blocks within one blocks cache, pair after pair."""
        cdef ldd_detail detail
        cdef ldd_status status
        cdef ldd_cache_view view
        cdef IndexList src = IndexList.parse(src_blocks, "copy_block_info keys")
        cdef IndexList dst = IndexList.parse(dst_blocks, "copy_block_info values")
        self.require_open()
        start_detail(&detail)
        with nogil:
            status = ldd_table_pin_local(self.table, cache_id, &view, &detail)
            if status == LDD_OK:
                ldd_lock(&self._copy_lock)
                status = ldd_plan_copy_blocks(&self._ops, view.addrs, view.num_tensors, view.num_slots, view.stride,
                                              src.data, dst.data, src.length, &detail)
                status = self._copy_planned(status, ldd_now_ns() + self.node.sync_timeout_ns, &detail)
                ldd_table_unpin(self.table, view.slot, view.generation)
        self.raise_for(status, &detail, b"copy_blocks")

    def swap_blocks(self, src, dst, uint32_t num_tensors, uint64_t block_bytes, src_blocks, dst_blocks):
        """Copy blocks between two caches, pair after pair.

        `src` and `dst` are each a cache id, or addresses of caller memory and how many blocks lie there. What a cache
        id names is pinned meanwhile, and its own record bounds the copy.
        """
        cdef ldd_detail detail
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
                    ends[i].slots.addrs = ends[i].own = address_array(addrs)
                    ends[i].slots.num_tensors = <size_t>len(addrs)
                    ends[i].slots.stride = block_bytes
            with nogil:
                for i in range(2):
                    if status == LDD_OK:
                        status = open_end(self.table, &ends[i], num_tensors, block_bytes, &detail)
                if status == LDD_OK:
                    ldd_lock(&self._copy_lock)
                    status = ldd_plan_swap_blocks(
                        &self._ops, ends[0].slots.addrs, pair_src.data, ends[0].slots.num_slots, ends[1].slots.addrs,
                        pair_dst.data, ends[1].slots.num_slots, num_tensors, block_bytes, pair_src.length, &detail)
                    status = self._copy_planned(status, ldd_now_ns() + self.node.sync_timeout_ns, &detail)
                for i in range(2):
                    if ends[i].pinned:
                        ldd_table_unpin(self.table, ends[i].view.slot, ends[i].view.generation)
            self.raise_for(status, &detail, b"swap_blocks")
        finally:
            free(ends[0].own)
            free(ends[1].own)

    # ----------------------------------------------------------------------------------------------- links

    def set_listener(self, address):
        """Open, move or close (None) the control listener; the port is free again when this returns."""
        cdef ldd_detail detail
        cdef ldd_status status
        cdef int fd = -1, port, bound = 0
        cdef uint32_t data_port = 0
        cdef bytes ip
        cdef const char* c_ip
        self.require_open()
        if address is not None:
            address = (address[0], address[1])
        if address == self.listener:
            return
        start_detail(&detail)
        if self._listen_fd >= 0:
            with nogil:
                ldd_service_unlisten(&self.service, self._listen_fd)
            self._listen_fd = -1
            self.listener = None
        if address is None:
            return
        ip, port = address[0].encode(), address[1]
        c_ip = ip
        with nogil:
            status = net_listen(c_ip, port, LISTEN_BACKLOG, &fd, &bound, &detail)
            if status == LDD_OK and ip_is_specific(c_ip):
                status = ldd_regions_serve(&self.node.regions, c_ip, &data_port, &detail)
            if status == LDD_OK:
                ldd_service_listen(&self.service, fd)
        self.raise_for(status, &detail, b"listen")
        self._listen_fd = fd
        self.listener = (address[0], bound)

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
            before = count_links(&self.node, cluster_id)
            if force:
                ldd_links_drop(&self.node, 0, -1, False, cluster_id)
                ldd_links_drop(&self.node, 1, -1, False, cluster_id)
            else:
                status = ldd_link_close(&self.node, c_ip, port, cluster_id, deadline_ns, &detail)
        if status == LDD_E_INTERRUPTED:
            self.raise_for(status, &detail, b"unlink")
        return status, detail.text.decode("utf-8", "replace") if status < 0 else "", before

    def was_linked(self, uint64_t cluster_id):
        """Whether a link to a cluster that `link_clusters` made, here or there, exists or existed."""
        self.require_open()
        return ldd_link_existed(&self.node, cluster_id)

    def ping(self, uint64_t cluster_id, int timeout_ms):
        """Ask the peer for a sign of life over the link; raises what is wrong with it."""
        cdef ldd_detail detail
        cdef ldd_status status
        self.require_open()
        start_detail(&detail)
        with nogil:
            status = ping_link(&self.node, cluster_id, ldd_now_ns() + <int64_t>timeout_ms * 1000000, &detail)
        self.raise_for(status, &detail, b"check_link_status")

    def links(self):
        """One dict per link: cluster_id, state, origin, comm_id, peer_ip, pulled_bytes, pushed_bytes, num_transfers."""
        cdef ldd_link* link
        rows = []
        self.require_open()
        ldd_lock(&self.node.lock)
        link = self.node.links
        while link != NULL:
            rows.append({
                "cluster_id": link.cluster_id, "state": ("opening", "active", "broken", "closed")[<int>link.state],
                "origin": ("local", "peer", "comm")[<int>link.origin], "comm_id": link.comm_id,
                "peer_ip": link.peer_ip.decode(), "pulled_bytes": link.pulled_bytes,
                "pushed_bytes": link.pushed_bytes, "num_transfers": link.num_transfers,
                "running": link.ops, "reason": link.reason.decode("utf-8", "replace"),
            })
            link = link.next
        ldd_unlock(&self.node.lock)
        return rows

    def num_links(self):
        """How many links there are, broken ones included."""
        self.require_open()
        return self.node.num_links

    # ----------------------------------------------------------------------------------- links by rank table

    def listen_at(self, str ip, int port):
        """Open one more listener ("@name" is an abstract Unix name) and return its handle, or None when it is taken."""
        cdef ldd_detail detail
        cdef int fd = -1, bound = 0
        cdef bytes address = ip.encode()
        self.require_open()
        start_detail(&detail)
        if net_listen(address, port, LISTEN_BACKLOG, &fd, &bound, &detail) < 0:
            return None
        with nogil:
            ldd_service_listen(&self.service, fd)
        return fd

    def unlisten(self, int handle):
        """Close a listener of `listen_at`."""
        self.require_open()
        with nogil:
            ldd_service_unlisten(&self.service, handle)

    def wish(self, bytes comm, uint64_t cluster_id, int64_t comm_id):
        """Let this peer open a link for this communicator."""
        cdef ldd_detail detail
        cdef ldd_status status
        self.require_open()
        start_detail(&detail)
        if len(comm) != 32:
            raise ValueError(f"comm: 32 bytes expected, {len(comm)} given")
        status = ldd_service_wish(&self.service, comm, cluster_id, comm_id)
        self.raise_for(status, &detail, b"link")

    def wish_met(self, int64_t comm_id, uint64_t cluster_id):
        """Whether that peer has come."""
        return self._open and ldd_service_met(&self.service, comm_id, cluster_id)

    def forget(self, int64_t comm_id):
        """Drop the wishes and links of a communicator on this side."""
        if self._open and os.getpid() == self._pid:
            with nogil:
                ldd_service_forget(&self.service, comm_id)
                ldd_links_drop(&self.node, ORIGIN_COMM, comm_id, True, 0)

    # ------------------------------------------------------------------------------------------ for operators

    def stats(self):
        """What is held right now: caches, keys, pins, pools, links."""
        cdef ldd_table_counts counts
        self.require_open()
        ldd_table_stats(self.table, &counts)
        return {
            "caches": counts.num_owned + counts.num_registered, "owned_caches": counts.num_owned,
            "registered_caches": counts.num_registered, "deferred_caches": counts.num_deferred,
            "keys": counts.num_keys, "pins": counts.num_pins,
            "device_pool": self._pool_stats(False), "host_pool": self._pool_stats(True),
            "links": self.node.num_links, "requests": self.service.num_requests,
            "rejected_frames": self.service.num_rejected_frames, "provider": self._provider.name,
        }

    def _pool_stats(self, bint host):
        cdef ldd_pool* pool = self.host_pool if host else self.device_pool
        if pool == NULL:
            return None
        return {"bytes": pool.memory_size, "free_bytes": ldd_pool_free_bytes(pool),
                "largest_free_bytes": ldd_pool_largest_bytes(pool)}

    def caches(self):
        """One dict per live cache: cache_id, bytes, num_tensors, keys, pins, owned, is_blocks, handle."""
        cdef size_t capacity, count, i
        cdef ldd_table_counts counts
        cdef ldd_cache_row* rows
        self.require_open()
        ldd_table_stats(self.table, &counts)
        capacity = counts.num_owned + counts.num_registered + 16
        rows = <ldd_cache_row*>calloc(capacity, sizeof(ldd_cache_row))
        if rows == NULL:
            raise MemoryError()
        try:
            count = min(ldd_table_snapshot(self.table, rows, capacity), capacity)
            return [{
                "cache_id": rows[i].cache_id, "bytes": rows[i].bytes, "num_tensors": rows[i].num_tensors,
                "keys": rows[i].num_keys, "pins": rows[i].pins, "owned": bool(rows[i].owned),
                "is_blocks": bool(rows[i].is_blocks), "handle": bool(rows[i].handle_ref),
            } for i in range(count)]
        finally:
            free(rows)


cdef ldd_status ping_link(ldd_node* node, uint64_t cluster_id, int64_t deadline_ns, ldd_detail* detail) noexcept nogil:
    cdef ldd_link* link = NULL
    cdef ldd_status status = ldd_link_begin(node, cluster_id, &link, detail)
    if status < 0:
        return status
    if ldd_lock_until(&link.lock, 0) < 0:
        status = ldd_fail(detail, LDD_E_LINK_BUSY, b"a transfer is running on the link to cluster %llu",
                          <unsigned long long>cluster_id)
    else:
        status = ldd_ask_ping(link, deadline_ns, detail)
        ldd_unlock(&link.lock)
    ldd_link_end(link)
    return status


def shares_table(environ):
    """Whether processes on this host look up each other's caches in shared memory.

    Variable ``LLM_DATADIST_SHARED_TABLE``: 1 (default) or 0; it goes with the shared mapping, so it is off where
    ``LLM_DATADIST_HOST_PATHS`` leaves "shm" out.
    """
    paths = environ.get("LLM_DATADIST_HOST_PATHS", "")
    if paths and "shm" not in paths.replace("|", ",").split(","):
        return False
    return environ.get("LLM_DATADIST_SHARED_TABLE", "1") != "0"


cdef void fill_slots(ldd_slots* out, const ldd_cache_view* view) noexcept nogil:
    out.addrs = view.addrs
    out.num_tensors = view.num_tensors
    out.num_slots = view.num_slots
    out.stride = view.stride


cdef ldd_status open_end(ldd_table* table, ldd_swap_end* end, uint32_t num_tensors, uint64_t block_bytes,
                         ldd_detail* detail) noexcept nogil:
    """Pin what a cache id names, and hold either end against what the pairs will be planned with."""
    cdef ldd_status status
    if end.own == NULL:
        status = ldd_table_pin_local(table, end.cache_id, &end.view, detail)
        if status < 0:
            return status
        end.pinned = True
        fill_slots(&end.slots, &end.view)
    if end.slots.num_tensors != num_tensors or end.slots.stride != block_bytes:
        return ldd_fail(detail, LDD_E_PARAM,
                        b"%u tensors with blocks of %llu bytes were described, but there are %zu with %llu", num_tensors,
                        <unsigned long long>block_bytes, end.slots.num_tensors, <unsigned long long>end.slots.stride)
    return LDD_OK


cdef bint ip_is_specific(const char* ip) noexcept nogil:
    """False for the wildcard addresses, whose data servers start at the address a peer came in by."""
    cdef const char* at = ip
    while at[0] == c'0' or at[0] == c'.' or at[0] == c':':
        at += 1
    return at[0] != 0


cdef uint32_t count_links(ldd_node* node, uint64_t cluster_id) noexcept nogil:
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
