"""Request keys that nobody pulled in time; see ``leases.pyx``."""
from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint64_t

from llm_datadist.core.table.cache_life cimport ldd_expired, ldd_table

# Release the request keys of a cache at this time, unless they are pulled before. Needs table.lease_fd.
cdef void ldd_table_lease(ldd_table* table, int64_t cache_id, int64_t end_ns) noexcept nogil
# Release what is overdue and set the timer anew; for the service thread, when `table.lease_fd` is readable.
cdef void ldd_table_expire(ldd_table* table) noexcept nogil
# Wait until keys have expired, and take up to `capacity` of them, oldest first; 0 once ldd_table_end_leases was called.
cdef size_t ldd_table_take_expired(ldd_table* table, ldd_expired* rows, size_t capacity) noexcept nogil
cdef void ldd_table_end_leases(ldd_table* table) noexcept nogil
# How many request keys of owned caches are bound.
cdef uint64_t ldd_table_count_unpulled(ldd_table* table) noexcept nogil
