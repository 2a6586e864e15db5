"""Life cycle of an engine; see ``engine_core.pyx``."""
from .cache_table cimport ldd_table
from .cann cimport Provider, aclrtStream
from .conn cimport ldd_service
from .local_copy cimport ldd_op_list
from .node cimport ldd_node
from .pool cimport ldd_pool
from .status cimport ldd_detail, ldd_status
from .sync cimport ldd_mutex


cdef class EngineCore:
    cdef Provider _provider
    cdef ldd_node node
    cdef ldd_service service
    cdef ldd_table* table
    cdef ldd_pool* device_pool
    cdef ldd_pool* host_pool
    cdef void* _device_memory
    cdef void* _host_memory
    cdef aclrtStream _stream
    cdef ldd_mutex _copy_lock                   # the stream and the plan below, one local operation at a time
    cdef ldd_op_list _ops
    cdef bint v1
    cdef bint _open
    cdef bint _device_set
    cdef int _pid
    cdef int _device_id
    cdef int _listen_fd
    cdef dict _registered                       # cache id -> (addresses, tensor bytes) of registered caches
    cdef readonly object options
    cdef readonly object listener               # (ip, port) or None

    cdef int require_open(self) except -1
    cdef int raise_for(self, ldd_status status, const ldd_detail* detail, const char* what) except -1
    cdef void _release_memory(self) noexcept nogil
