"""Life cycle of an engine; see ``lifecycle.pyx``."""
from libc.stdint cimport uint64_t

from llm_datadist.core.base.provider cimport Provider, aclrtStream
from llm_datadist.core.base.status cimport ldd_detail, ldd_status
from llm_datadist.core.base.sync cimport ldd_mutex
from llm_datadist.core.link.links cimport ldd_node
from llm_datadist.core.link.service_conn cimport ldd_service
from llm_datadist.core.table.cache_table cimport ldd_table
from llm_datadist.core.table.pool cimport ldd_pool
from llm_datadist.core.transfer.local_copy cimport ldd_op_list


cdef class PoolMemory:
    cdef Provider _provider
    cdef int _device_id
    cdef int _pid
    cdef void* device
    cdef void* host

    cdef void keep(self) noexcept nogil


cdef class EngineCore:
    cdef Provider _provider
    cdef ldd_node node
    cdef ldd_service service
    cdef ldd_table* table
    cdef ldd_pool* device_pool
    cdef ldd_pool* host_pool
    cdef PoolMemory _memory
    cdef aclrtStream _stream
    cdef ldd_mutex _copy_lock                   # the stream and the plan below, one local operation at a time
    cdef ldd_op_list _ops
    cdef bint v1
    cdef bint _open
    cdef bint _device_set
    cdef bint _released                         # closed, and nothing used the tables any more
    cdef int _pid
    cdef int _device_id
    cdef int _listen_fd
    cdef dict _registered                       # cache id -> (addresses, tensor bytes) of registered caches
    cdef readonly object options
    cdef readonly object listener               # (ip, port) or None

    cdef int require_open(self) except -1
    cdef int raise_for(self, ldd_status status, const ldd_detail* detail, const char* what) except -1
    cdef int raise_for_peer(self, ldd_status status, const ldd_detail* detail, const char* what, uint64_t cluster_id,
                            const char* stage) except -1
    cdef ldd_status _take_device_memory(self, void** memory, uint64_t nbytes, ldd_detail* detail) noexcept nogil
    cdef void _release_tables(self) noexcept nogil
    cdef void _release_device(self) noexcept nogil
