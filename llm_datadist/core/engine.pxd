"""The engine behind one LLMDataDist; see ``engine.pyx``."""
from libc.stdint cimport int64_t

from .cache_table cimport ldd_table
from .cann cimport Provider, aclrtStream
from .conn cimport ldd_service
from .index_list cimport IndexList
from .local_copy cimport ldd_op_list
from .node cimport ldd_node
from .pool cimport ldd_pool
from .status cimport ldd_detail, ldd_status
from .sync cimport ldd_mutex
from .transfer cimport ldd_transfer


cdef class Engine:
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
    cdef int _run(self, ldd_transfer* what, key, src_tensors, dst_tensors, const char* name) except -1
    cdef int _set_blocks(self, ldd_transfer* what, IndexList src, IndexList dst, const char* name) except -1
    cdef ldd_status _copy_planned(self, ldd_status planned, int64_t deadline_ns, ldd_detail* detail) noexcept nogil
