"""Looking up, pinning and releasing a peer's caches in its shared table, without asking."""
from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from llm_datadist.core.base.status cimport ldd_detail, ldd_status
from llm_datadist.core.link.links cimport ldd_link
from llm_datadist.core.link.requests cimport ldd_remote_cache

cdef enum:
    LDD_READER_ASK = 1                            # the table cannot tell: ask the peer's service thread

# All need link.lock.

# Map the peer's table once, where the peer is on this host and shares it. Fails a caller only by LDD_E_INTERRUPTED.
cdef ldd_status ldd_reader_attach(ldd_link* link, int64_t deadline_ns) noexcept nogil
# The abstract Unix name under which an engine hands out its files.
cdef void ldd_shared_table_name(const uint8_t* instance, char* name, size_t size) noexcept nogil
# As ldd_request_resolve; LDD_OK pins the cache until ldd_reader_done. `release`: the pull will take its key. A cache of
# another data type than `dtype`, where both are known, is left to the owner, who describes it in full.
cdef ldd_status ldd_reader_resolve(ldd_link* link, uint32_t kind, uint64_t id, uint64_t model_id, uint64_t batch_index,
                                 bint write, bint release, uint16_t dtype, ldd_remote_cache* out,
                                 ldd_detail* detail) noexcept nogil
# Nothing of the pinned cache is touched any more; `take` releases the key it was found by.
cdef ldd_status ldd_reader_done(ldd_link* link, bint take, int64_t deadline_ns, ldd_detail* detail) noexcept nogil
# Keep what the peer told of a cache whose addresses the table does not hold.
cdef void ldd_reader_remember(ldd_link* link, const ldd_remote_cache* remote) noexcept nogil
