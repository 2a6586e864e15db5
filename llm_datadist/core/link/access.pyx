"""What a peer may do with a cache: the rules, once, for the owner who is asked and for a reader of its shared table."""
from llm_datadist.core.base.status cimport LDD_E_PARAM, LDD_OK, ldd_fail
from llm_datadist.core.link.wire cimport LDD_MODE_REMOTE_ACCESSIBLE
from llm_datadist.core.table.cache_life cimport ldd_cache_check_index
from llm_datadist.core.table.key_index cimport KEY_BY_ID


cdef ldd_status ldd_check_access(uint32_t mode, uint32_t kind, bint write, int64_t cache_id, uint64_t num_slots,
                                 bint is_blocks, bint remote_accessible, uint64_t batch_index,
                                 ldd_detail* detail) noexcept nogil:
    cdef ldd_status status = LDD_OK
    # A write names its slot as an argument, a read looks a slot up: the API wants different codes for a bad one.
    if write and batch_index >= num_slots:
        return ldd_fail(detail, LDD_E_PARAM, b"batch index %llu is outside cache %lld of %llu",
                        <unsigned long long>batch_index, <long long>cache_id, <unsigned long long>num_slots)
    if kind == KEY_BY_ID and not write:
        status = ldd_cache_check_index(cache_id, is_blocks, num_slots, batch_index, detail)
    if status == LDD_OK and mode & LDD_MODE_REMOTE_ACCESSIBLE and not remote_accessible:
        return ldd_fail(detail, LDD_E_PARAM, b"cache %lld is not remote accessible", <long long>cache_id)
    if status == LDD_OK and write and not mode & LDD_MODE_REMOTE_ACCESSIBLE:
        return ldd_fail(detail, LDD_E_PARAM, b"remote access to caches is not enabled here")
    return status
