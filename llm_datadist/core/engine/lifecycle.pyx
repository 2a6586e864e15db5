"""Life cycle of an engine: provider, device context, pools, cache table, service thread.

Construction opens everything or leaves nothing behind; `close` gives everything back. A forked child gets an error
from everything and frees nothing.
"""
cimport cython

import os

from cpython.ref cimport Py_INCREF
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from llm_datadist.core.base.provider cimport (
    ACL_DEV_ATTR_SUPER_POD_DEVICE_ID, ACL_DEV_ATTR_SUPER_POD_ID, ACL_MEM_MALLOC_HUGE_FIRST, LDD_CAP_ANY_LOCAL,
    LDD_CAP_SHARED_MEMORY, aclError, aclrtContext, ldd_provider,
)
from llm_datadist.core.base.sockets cimport ldd_socket_listen, ldd_socket_set_silence
from llm_datadist.core.base.status cimport (
    LDD_E_FAILED, LDD_E_NOT_ENABLED, LDD_E_NO_MEMORY, LDD_E_PARAM, LDD_OK, check, ldd_fail, raise_status, start_detail,
)
from llm_datadist.core.base.sync cimport ldd_lock, ldd_mutex_destroy, ldd_mutex_init, ldd_now_ns, ldd_unlock
from llm_datadist.core.base.wait cimport ldd_acl_result
from llm_datadist.core.link.heal cimport ldd_heal_start
from llm_datadist.core.link.links cimport (
    LINK_ACTIVE, ORIGIN_COMM, ldd_link, ldd_link_state_of, ldd_node, ldd_node_close, ldd_node_destroy, ldd_node_init,
)
from llm_datadist.core.link.secret cimport ldd_random
from llm_datadist.core.link.region cimport (
    ldd_regions_add, ldd_regions_close, ldd_regions_configure, ldd_regions_end_fetches, ldd_regions_epoch,
    ldd_regions_init, ldd_regions_serve,
)
from llm_datadist.core.link.service cimport (
    ldd_service_listen, ldd_service_start, ldd_service_stop, ldd_service_unlisten,
)
from llm_datadist.core.link.shared_reader cimport ldd_shared_table_name
from llm_datadist.core.link.wire cimport LDD_MAX_ENDPOINTS, LDD_MODE_REMOTE_ACCESSIBLE, ldd_endpoint_record
from llm_datadist.core.record.record cimport (
    ldd_record, ldd_record_create, ldd_record_head, ldd_record_hide, ldd_record_set_tracing,
)
from llm_datadist.core.table.cache_table cimport (
    ldd_table_clear, ldd_table_close, ldd_table_create, ldd_table_destroy, ldd_table_set_epoch,
)
from llm_datadist.core.table.pool cimport ldd_pool_create, ldd_pool_destroy
from llm_datadist.core.table.shared_table cimport LDD_MAX_CACHES, LDD_MAX_KEYS
from llm_datadist.core.transfer.batch cimport ldd_context_enter, ldd_context_leave
from llm_datadist.core.transfer.local_copy cimport ldd_op_list_free
from llm_datadist.core.transfer.serve_pull cimport ldd_serve_pull

from llm_datadist import status as _public

cdef extern from "<unistd.h>" nogil:
    int close(int fd)
    int getpid()

cdef enum:
    ACL_REPEAT_INITIALIZE = 100002
    LISTEN_BACKLOG = 1024
    CLOSE_GRACE_NS = 2000000000                 # on top of the time running transfers may still take
    HUGE_PAGE_BYTES = 2 << 20
    # Of a network where nothing else was said: what CANN's own package passes.
    DEFAULT_TRAFFIC_CLASS = 132
    DEFAULT_SERVICE_LEVEL = 4


@cython.final
@cython.no_gc_clear                             # __dealloc__ needs _provider
cdef class PoolMemory:
    """The memory of both pools: freed with the last reference, so that a view of a tensor outlives its engine."""

    def __cinit__(self, Provider provider, int device_id):
        self._provider = provider
        self._device_id = device_id
        self._pid = getpid()

    cdef void keep(self) noexcept nogil:
        """Never free it: something may still write to it."""
        self.device = self.host = NULL

    def __dealloc__(self):
        cdef aclrtContext before = NULL
        if (self.device == NULL and self.host == NULL) or getpid() != self._pid:
            return
        with nogil:
            self._provider.table.acl.aclrtGetCurrentContext(&before)
            self._provider.table.acl.aclrtSetDevice(self._device_id)
            if self.device != NULL:
                self._provider.table.acl.aclrtFree(self.device)
            if self.host != NULL:
                self._provider.table.acl.aclrtFreeHost(self.host)
            self._provider.table.acl.aclrtResetDevice(self._device_id)
            if before != NULL:
                self._provider.table.acl.aclrtSetCurrentContext(before)


@cython.no_gc_clear                             # __dealloc__ needs _provider, and a LayerPush that outlives us too
cdef class EngineCore:
    """What every part of an engine stands on; see ``engine.pyx`` for the whole."""

    def __cinit__(self):
        self._listen_fd = -1
        self._registered = {}
        ldd_mutex_init(&self._copy_lock)
        memset(&self._ops, 0, sizeof(self._ops))

    def __init__(self, options, unsigned long long cluster_id):
        self.options = options
        self.v1 = options.generation == 1
        self._pid = getpid()
        self._device_id = options.device_id
        self._provider = Provider.open(options.provider)
        self._memory = PoolMemory(self._provider, self._device_id)
        ldd_node_init(&self.node, self._provider.table, cluster_id)
        ldd_regions_init(&self.node.regions, self._provider.table)
        ldd_serve_pull(&self.node)
        self._open = True
        try:
            self._open_all(options)
        except BaseException:
            self.close()
            raise

    def __dealloc__(self):
        if self._open and self._memory is not None:
            self._memory.keep()                 # never closed: its threads go on
        if self._released:
            ldd_table_destroy(self.table)
            ldd_pool_destroy(self.device_pool)
            ldd_pool_destroy(self.host_pool)
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
        # A provider that does not say whether memory may be shared does not forbid it.
        self.node.shares_table = (
            os.environ.get("LLM_DATADIST_SHARED_TABLE", "1") != "0"
            and (self._provider.table.ext.LddCapabilities == NULL
                 or self._provider.table.caps & <unsigned int>LDD_CAP_SHARED_MEMORY != 0))
        self.node.strict = options.strict
        self.node.verifies = options.checksum
        if options.checksum and not self._provider.table.caps & <unsigned int>LDD_CAP_ANY_LOCAL:
            status = ldd_fail(&detail, LDD_E_NOT_ENABLED, b"option llm.Checksum is on, but the CPU cannot read memory "
                              b"of this provider")
            self.raise_for(status, &detail, b"init")
        ldd_socket_set_silence(options.link_silence_ms)
        for secret in options.link_secrets:
            memcpy(self.node.secrets[self.node.num_secrets], <const char*><bytes>secret, sizeof(self.node.secrets[0]))
            self.node.num_secrets += 1
        self.node.mode = LDD_MODE_REMOTE_ACCESSIBLE if options.remote_cache_accessible else 0
        with nogil:
            status = ldd_table_create(&self.table, &detail)
        self.node.table = self.table
        self.raise_for(status, &detail, b"init")
        self._open_record(options)
        self._open_device()
        self.node.regions.context = self.node.context
        if self._provider.name == "cann":
            self._configure_network(options)
        if options.device_pool is not None:
            self._open_pool(options.device_pool, False)
        if options.host_pool is not None:
            self._open_pool(options.host_pool, True)
        with nogil:
            status = ldd_service_start(&self.service, &self.node, &detail)
        self.raise_for(status, &detail, b"init")
        ldd_heal_start(&self.node, &self.service, <int64_t>options.link_heal_ms * 1000000)
        if self.node.shares_table:
            ldd_shared_table_name(self.node.instance, name, sizeof(name))
            self.listen_at(name.decode(), 0)
        if options.listen is not None:
            self.set_listener(options.listen)

    def _open_record(self, options):
        """Begin to record; see ``core/record/record.pyx``."""
        cdef ldd_detail detail
        cdef ldd_status status
        cdef ldd_record* record = &self.node.record
        cdef bytes path = None, reason
        cdef const char* c_path = NULL
        start_detail(&detail)
        if options.trace_folder:
            try:
                os.makedirs(options.trace_folder, mode=0o700, exist_ok=True)
            except OSError as error:
                path, reason = os.fsencode(options.trace_folder), (error.strerror or str(error)).encode()
                status = ldd_fail(&detail, LDD_E_FAILED, b"LLM_DATADIST_TRACE: no folder for the trace: %s: %s",
                                  <const char*>reason, <const char*>path)
                self.raise_for(status, &detail, b"init")
            name = f"{getpid()}-{self.node.instance[:16].hex()}.ldd-record"
            path = os.fsencode(os.path.join(options.trace_folder, name))
            c_path = path
        with nogil:
            status = ldd_record_create(record, c_path, &detail)
        self.raise_for(status, &detail, b"init")
        self.table.record = self.node.holds.record = record
        if record.head == NULL:
            return
        record.head.cluster_id = self.node.cluster_id
        memcpy(record.head.instance, self.node.instance, sizeof(self.node.instance))
        if self.table.shared.head != NULL:
            record.head.table_fd = self.table.shared.table_fd
            record.head.marks_fd = self.table.shared.marks_fd
            record.head.keys_offset = <uint64_t>self.table.shared.keys - <uint64_t>self.table.shared.head
            record.head.caches_offset = <uint64_t>self.table.shared.caches - <uint64_t>self.table.shared.head
            record.head.max_keys = LDD_MAX_KEYS
            record.head.max_caches = LDD_MAX_CACHES
        record.head.generation = options.generation
        record.head.remote_accessible = options.remote_cache_accessible
        record.head.device_pool_bytes = options.device_pool.memory_size if options.device_pool is not None else 0
        record.head.host_pool_bytes = options.host_pool.memory_size if options.host_pool is not None else 0
        self.note(options.role, None)
        _copy_text(record.head.provider, sizeof(record.head.provider), self._provider.name)
        self.set_tracing(options.trace)

    def note(self, str role, address):
        """Have the record say which role (None: as before) this is, and where it listens (None: nowhere)."""
        cdef ldd_record_head* head = self.node.record.head
        if head == NULL:
            return
        if role is not None:
            _copy_text(head.role, sizeof(head.role), role)
        ip, port = address or ("", 0)
        text = f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"
        _copy_text(head.listener, sizeof(head.listener), text if address else "")

    def set_tracing(self, bint on):
        """Switch the recording of events on or off; returns whether it was on."""
        self.require_open()
        was_on = bool(self.node.record.tracing)
        ldd_record_set_tracing(&self.node.record, on)
        return was_on

    def record_fd(self):
        """The file with the record, open for reading, or -1; the engine's own."""
        self.require_open()
        return self.node.record.fd

    def _configure_network(self, options):
        """What servers and clients over hardware are created with."""
        cdef ldd_detail detail
        cdef ldd_status status
        start_detail(&detail)
        records = options.endpoints.records(**self._device_facts())
        if len(records) > LDD_MAX_ENDPOINTS:
            status = ldd_fail(&detail, LDD_E_PARAM, b"%d endpoints are given, at most %d are possible",
                              <int>len(records), <int>LDD_MAX_ENDPOINTS)
            self.raise_for(status, &detail, b"init")
        for name, value in (("rdma_traffic_class", options.rdma_traffic_class),
                            ("rdma_service_level", options.rdma_service_level)):
            if value is not None and value > 255:
                text = f"{name} is {value}, which no network takes: 0 to 255".encode()
                status = ldd_fail(&detail, LDD_E_PARAM, b"%s", <char*>text)
                self.raise_for(status, &detail, b"init")
        packed = b"".join(records)
        assert len(packed) == len(records) * sizeof(ldd_endpoint_record)
        config = options.global_resource_config.encode()
        traffic_class, service_level = options.rdma_traffic_class, options.rdma_service_level
        status = ldd_regions_configure(
            &self.node.regions, <const char*>packed, <uint32_t>len(records), config,
            <uint8_t>(DEFAULT_TRAFFIC_CLASS if traffic_class is None else traffic_class),
            <uint8_t>(DEFAULT_SERVICE_LEVEL if service_level is None else service_level))
        self.raise_for(status, &detail, b"init")

    def _device_facts(self):
        """What the runtime tells about the device; None for what it does not."""
        cdef ldd_detail detail
        cdef ldd_status status = LDD_OK
        cdef int32_t logical = self._device_id, physical
        cdef aclrtContext before
        start_detail(&detail)
        before = ldd_context_enter(&self.node)
        if self._provider.table.acl.aclrtGetLogicDevIdByUserDevId != NULL:
            status = ldd_acl_result(
                self._provider.table,
                self._provider.table.acl.aclrtGetLogicDevIdByUserDevId(self._device_id, &logical),
                b"ask for the logical device", &detail)
        physical = logical
        if status == LDD_OK and self._provider.table.acl.aclrtGetPhyDevIdByLogicDevId != NULL:
            status = ldd_acl_result(self._provider.table,
                                    self._provider.table.acl.aclrtGetPhyDevIdByLogicDevId(logical, &physical),
                                    b"ask for the physical device", &detail)
        facts = {
            "device_id": self._device_id,
            "physical_id": physical,
            "super_device_id": self._device_attribute(ACL_DEV_ATTR_SUPER_POD_DEVICE_ID),
            "super_pod": self._device_attribute(ACL_DEV_ATTR_SUPER_POD_ID),
        }
        ldd_context_leave(&self.node, before)
        if status != LDD_E_NOT_ENABLED:         # a runtime without such numbers has but one for each device
            self.raise_for(status, &detail, b"init")
        return facts

    def _device_attribute(self, int attribute):
        cdef int64_t value = -1
        if (self._provider.table.acl.aclrtGetDeviceInfo == NULL
                or self._provider.table.acl.aclrtGetDeviceInfo(<uint32_t>self._device_id, attribute, &value) != 0):
            return None
        return value if 0 <= value < 0xFFFFFFFF else None

    def _open_device(self):
        cdef ldd_detail detail
        cdef aclrtContext before = NULL
        cdef int code = 0
        cdef ldd_status status
        start_detail(&detail)
        with nogil:
            if self._provider.table.acl.aclInit != NULL:        # without it, the framework has done it
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
        cdef uint64_t nbytes = pool_options.memory_size, first
        cdef uint32_t page_shift = pool_options.page_shift
        cdef ldd_detail detail
        cdef ldd_status status
        cdef aclrtContext before
        cdef void** memory = &self._memory.host if host else &self._memory.device
        cdef ldd_pool** pool = &self.host_pool if host else &self.device_pool
        start_detail(&detail)
        with nogil:
            before = ldd_context_enter(&self.node)
            if host:
                status = ldd_acl_result(self._provider.table,
                                        self._provider.table.acl.aclrtMallocHost(memory, nbytes),
                                        b"take the host pool", &detail)
            else:
                status = self._take_device_memory(memory, nbytes, &detail)
            if status < 0:
                memory[0] = NULL
                status = LDD_E_FAILED if host else LDD_E_NO_MEMORY
            else:
                first = <uint64_t>memory[0]
                if not host and not self._provider.table.caps & LDD_CAP_ANY_LOCAL:
                    first = (first + HUGE_PAGE_BYTES - 1) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
                status = ldd_pool_create(first, nbytes, page_shift, pool, &detail)
                if status == LDD_OK:
                    status = ldd_regions_add(&self.node.regions, first, nbytes, host, &detail)
                    ldd_table_set_epoch(self.table, ldd_regions_epoch(&self.node.regions))
            ldd_context_leave(&self.node, before)
        self.raise_for(status, &detail, b"init")

    cdef ldd_status _take_device_memory(self, void** memory, uint64_t nbytes, ldd_detail* detail) noexcept nogil:
        """Memory for a pool; where hardware is to know it, so many bytes lie in it from a multiple of 2 MiB on."""
        cdef const ldd_provider* provider = self._provider.table
        cdef aclError code = provider.acl.aclrtMalloc(memory, nbytes, ACL_MEM_MALLOC_HUGE_FIRST)
        if code == 0 and not provider.caps & LDD_CAP_ANY_LOCAL and <uint64_t>memory[0] % HUGE_PAGE_BYTES:
            provider.acl.aclrtFree(memory[0])
            code = provider.acl.aclrtMalloc(memory, nbytes + HUGE_PAGE_BYTES, ACL_MEM_MALLOC_HUGE_FIRST)
        return ldd_acl_result(provider, code, b"take the device pool", detail)

    def close(self):
        """Unlink everything locally, stop serving, and give all memory back. Idempotent.

        Running transfers are waited for until their own time limits have passed. A thread may be past the check that
        the engine is open, and not have begun: what it then looks at stays, empty, as long as this object.
        """
        cdef ldd_detail detail
        cdef ldd_status idle, status
        cdef bint released
        if not self._open:
            return
        self._open = False
        if getpid() != self._pid:
            return                              # a forked child: all of this is the parent's
        start_detail(&detail)
        with nogil:
            idle = ldd_node_close(&self.node, ldd_now_ns() + 2 * self.node.sync_timeout_ns + CLOSE_GRACE_NS)
            status = LDD_OK
            if self.table != NULL:
                # Peers that read or write here just now see their links end, and say when they are done. Those that
                # do not are cut off with the service, though memory of the caller may then still be written to.
                ldd_table_clear(self.table, ldd_now_ns() + min(self.node.sync_timeout_ns, <int64_t>CLOSE_GRACE_NS),
                                &detail)
            ldd_service_stop(&self.service)
            ldd_regions_end_fetches(&self.node.regions)
            if self.table != NULL:
                status = ldd_table_clear(self.table, ldd_now_ns() + self.node.sync_timeout_ns, &detail)
            released = idle == LDD_OK and status == LDD_OK
            if released:
                self._release_tables()
            else:
                self._memory.keep()             # something still touches the pools: better leak than pull them away
        self._memory = None
        if released:
            with nogil:
                self._release_device()
        if idle != LDD_OK:
            Py_INCREF(self)                     # a call into the provider that was given up, and still needs us
        self._listen_fd = -1
        self.listener = None
        self._registered.clear()

    cdef void _release_tables(self) noexcept nogil:
        ldd_regions_close(&self.node.regions)
        self.node.regions.context = NULL
        if self.table != NULL:
            ldd_table_close(self.table)
        ldd_record_hide(&self.node.record)
        self._released = True

    cdef void _release_device(self) noexcept nogil:
        cdef aclrtContext before = NULL
        if self.node.context != NULL:
            before = ldd_context_enter(&self.node)
            if self._stream != NULL:
                self._provider.table.acl.aclrtDestroyStream(self._stream)
            if before == self.node.context:
                before = NULL
            ldd_context_leave(&self.node, before)
            self._provider.table.acl.aclrtDestroyContext(self.node.context)
        if self._device_set:
            self._provider.table.acl.aclrtResetDevice(self._device_id)
            if before != NULL:                  # the runtime may have taken the thread's away
                self._provider.table.acl.aclrtSetCurrentContext(before)
        self._stream = self.node.context = NULL
        self._device_set = False

    def is_own_process(self):
        """False in a forked child, which must leave the engine alone."""
        return getpid() == self._pid

    def check_process(self):
        """Raise in a forked child, before anything is touched that a thread of the parent may have held."""
        if getpid() != self._pid:
            self.require_open()

    cdef int require_open(self) except -1:
        cdef ldd_detail detail
        if self._open and getpid() == self._pid:
            return 0
        start_detail(&detail)
        if getpid() == self._pid:
            ldd_fail(&detail, LDD_E_FAILED, b"the engine is finalized")
        else:
            ldd_fail(&detail, LDD_E_FAILED, b"the engine belongs to the parent process: a forked child cannot use it")
        return raise_status(LDD_E_FAILED, &detail, b"use engine", self.v1)

    cdef int raise_for(self, ldd_status status, const ldd_detail* detail, const char* what) except -1:
        return check(status, detail, what, self.v1)

    cdef int raise_for_peer(self, ldd_status status, const ldd_detail* detail, const char* what, uint64_t cluster_id,
                            const char* stage) except -1:
        """The same for a call that concerns a peer: the exception also says with whom, and how far it had come."""
        if status >= 0:
            return 0
        try:
            return check(status, detail, what, self.v1)
        except _public.LLMException as error:
            error._complete(operation=what.decode(), peer=cluster_id,
                            stage=stage.decode() if stage != NULL else "check",
                            link=("none", "active", "broken", "heals")[_link_state(&self.node, cluster_id)])
            raise

    # ------------------------------------------------------------------------------------------- listeners

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
        if address is not None:
            self.options.check_listen(address[0])
        start_detail(&detail)
        if self._listen_fd >= 0:
            with nogil:
                ldd_service_unlisten(&self.service, self._listen_fd)
            self._listen_fd = -1
            self.listener = None
            self.note(None, None)
        if address is None:
            return
        ip, port = address[0].encode(), address[1]
        c_ip = ip
        with nogil:
            status = ldd_socket_listen(c_ip, port, LISTEN_BACKLOG, &fd, &bound, &detail)
            if status == LDD_OK and _ip_is_specific(c_ip):
                status = ldd_regions_serve(&self.node.regions, c_ip, &data_port, &detail)
            if status == LDD_OK:
                ldd_service_listen(&self.service, fd)
            elif fd >= 0:
                close(fd)
        self.raise_for(status, &detail, b"listen")
        self._listen_fd = fd
        self.listener = (address[0], bound)
        self.note(None, self.listener)

    def listen_at(self, str ip, int port):
        """Open one more listener ("@name" is an abstract Unix name) and return its handle, or None when it is taken."""
        cdef ldd_detail detail
        cdef int fd = -1, bound = 0
        cdef bytes address = ip.encode()
        self.require_open()
        start_detail(&detail)
        if ldd_socket_listen(address, port, LISTEN_BACKLOG, &fd, &bound, &detail) < 0:
            return None
        with nogil:
            ldd_service_listen(&self.service, fd)
        return fd

    def unlisten(self, int handle):
        """Close a listener of `listen_at`."""
        self.require_open()
        with nogil:
            ldd_service_unlisten(&self.service, handle)


cdef int _copy_text(char* out, size_t size, str text) except -1:
    """Cut to fit, with its end."""
    cdef bytes encoded = text.encode()[:size - 1] + b"\0"
    memcpy(out, <const char*>encoded, len(encoded))
    return 0


cdef int _link_state(ldd_node* node, uint64_t cluster_id) noexcept nogil:
    """0 without a link to that cluster, 1 with one that can be used, 2 with a broken one, 3 with one that will heal."""
    cdef ldd_link* link
    cdef int state = 0
    ldd_lock(&node.lock)
    link = node.links
    while link != NULL and state != 1:
        if link.cluster_id == cluster_id:
            if ldd_link_state_of(link) == LINK_ACTIVE:
                state = 1
            else:
                state = 3 if node.heal_ns and not link.left and link.origin != ORIGIN_COMM else 2
        link = link.next
    ldd_unlock(&node.lock)
    return state


cdef bint _ip_is_specific(const char* ip) noexcept nogil:
    """False for the wildcard addresses, whose data servers start at the address a peer came in by."""
    cdef const char* at = ip
    while at[0] == c'0' or at[0] == c'.' or at[0] == c':':
        at += 1
    return at[0] != 0
