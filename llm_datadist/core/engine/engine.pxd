"""The engine behind one LLMDataDist; see ``engine.pyx``."""
from libc.stdint cimport int64_t, uint32_t, uint64_t

from llm_datadist.core.base.provider cimport aclrtMemcpyKind
from llm_datadist.core.base.status cimport ldd_detail, ldd_status
from llm_datadist.core.engine.block_keys cimport EngineBlockKeys
from llm_datadist.core.plan.index_list cimport IndexList
from llm_datadist.core.table.cache_table cimport ldd_key_spec
from llm_datadist.core.transfer.fitting cimport ldd_transfer


cdef class Engine(EngineBlockKeys):
    cdef int _run(self, ldd_transfer* what, key, src_tensors, dst_tensors, const char* name) except -1
    cdef int _set_blocks(self, ldd_transfer* what, IndexList src, IndexList dst, const char* name) except -1
    cdef void _forget_range(self, uint64_t addr, uint64_t nbytes) noexcept nogil
    cdef ldd_status _begin_copy(self, int64_t* deadline_ns, ldd_detail* detail) noexcept nogil
    cdef aclrtMemcpyKind _copy_kind(self, bint from_host, bint to_host) noexcept nogil
    cdef ldd_status _copy_planned(self, ldd_status planned, aclrtMemcpyKind kind, int64_t deadline_ns,
                                  ldd_detail* detail) noexcept nogil
    cdef int64_t _local_deadline(self) noexcept nogil

# C arrays of what callers give as sequences; the caller frees them. Keys are (slot, kind, id, model id).
cdef ldd_key_spec* ldd_key_specs(object keys, uint32_t* count) except? NULL
cdef uint64_t* ldd_address_array(object addrs) except? NULL
