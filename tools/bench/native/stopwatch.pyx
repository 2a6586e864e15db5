"""Times single parts of the core from within, without the interpreter between two of them.

For benchmarks; nothing else uses it. A table and a pool made here are its own, over addresses that are never followed.
Objects are for one thread at a time.
"""
cimport cython
from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset

from array import array

from llm_datadist.core.base.provider cimport (
    HIXL_COMPLETE_STATUS_WAITING, HIXL_SUCCESS, CompleteHandle, HixlClientHandle, HixlCompleteStatus, HixlStatus,
    ldd_provider,
)
from llm_datadist.core.base.status cimport LDD_OK, check, ldd_detail, ldd_status
from llm_datadist.core.base.sync cimport ldd_now_ns
from llm_datadist.core.base.wait cimport ldd_wait_complete
from llm_datadist.core.plan.block_plan cimport (
    ldd_desc_list, ldd_desc_list_clear, ldd_desc_list_free, ldd_plan_blocks,
)
from llm_datadist.core.plan.index_list cimport IndexList
from llm_datadist.core.record.record cimport (
    LDD_EVENT_PULL, LDD_OP_PULL, LDD_RECORD_EVENTS, ldd_peer_record, ldd_record, ldd_record_count, ldd_record_create,
    ldd_record_destroy, ldd_record_peer, ldd_record_set_tracing, ldd_trace_span,
)
from llm_datadist.core.table.cache_life cimport ldd_cache_view, ldd_key_spec
from llm_datadist.core.table.cache_table cimport (
    ldd_table, ldd_table_allocate, ldd_table_clear, ldd_table_counts, ldd_table_create, ldd_table_deallocate,
    ldd_table_destroy, ldd_table_remove_key, ldd_table_resolve, ldd_table_stats, ldd_table_unpin,
)
from llm_datadist.core.table.key_index cimport KEY_REQ
from llm_datadist.core.table.pool cimport (
    LDD_NO_PAGE, ldd_pool, ldd_pool_alloc_tensors, ldd_pool_create, ldd_pool_destroy, ldd_pool_free, ldd_span,
)

cdef uint64_t BASE = <uint64_t>1 << 44             # no address of anybody
cdef enum:
    KEYS_PER_CACHE = 2


def time_parse(values, int64_t count):
    """Take a block list from Python `count` times and return the nanoseconds of one."""
    cdef int64_t _, start = ldd_now_ns()
    for _ in range(count):
        IndexList.parse(values, "values")
    return (ldd_now_ns() - start) / count


def time_plan(uint64_t num_tensors, uint64_t block_bytes, uint64_t num_blocks, src_blocks, dst_blocks, int64_t count):
    """Plan a pull of these blocks `count` times and return (nanoseconds of one, number of descriptors)."""
    cdef IndexList src = IndexList.parse(src_blocks, "src_blocks")
    cdef IndexList dst = IndexList.parse(dst_blocks, "dst_blocks")
    cdef ldd_detail detail
    cdef ldd_desc_list plan
    cdef ldd_status status = LDD_OK
    cdef uint64_t step = block_bytes * num_blocks, tensor
    cdef int64_t _, took_ns
    cdef uint64_t* addrs = <uint64_t*>malloc(max(num_tensors, <uint64_t>1) * sizeof(uint64_t))
    if addrs == NULL:
        raise MemoryError()
    if src.length != dst.length:
        free(addrs)
        raise ValueError(f"{src.length} source blocks and {dst.length} destination blocks")
    for tensor in range(num_tensors):
        addrs[tensor] = BASE + tensor * step
    memset(&plan, 0, sizeof(plan))
    try:
        with nogil:
            took_ns = ldd_now_ns()
            for _ in range(count):
                ldd_desc_list_clear(&plan)
                status = ldd_plan_blocks(&plan, addrs, src.data, num_blocks, addrs, dst.data, num_blocks, num_tensors,
                                         block_bytes, src.length, False, &detail)
                if status < 0:
                    break
            took_ns = ldd_now_ns() - took_ns
        check(status, &detail, b"plan")
        return took_ns / count, plan.count
    finally:
        ldd_desc_list_free(&plan)
        free(addrs)


def time_pool(uint32_t num_tensors, uint64_t tensor_bytes, uint32_t page_shift, int64_t count):
    """Take memory of a cache from a pool of its own and give it back, `count` times; nanoseconds of one pair."""
    cdef ldd_pool* pool = NULL
    cdef ldd_detail detail
    cdef ldd_status status
    cdef ldd_span span = LDD_NO_PAGE
    cdef int64_t _, took_ns
    cdef uint64_t* addrs = <uint64_t*>malloc(max(num_tensors, <uint32_t>1) * sizeof(uint64_t))
    if addrs == NULL:
        raise MemoryError()
    try:
        check(ldd_pool_create(BASE, <uint64_t>1 << 36, page_shift, &pool, &detail), &detail, b"create pool")
        status = LDD_OK
        with nogil:
            took_ns = ldd_now_ns()
            for _ in range(count):
                status = ldd_pool_alloc_tensors(pool, num_tensors, tensor_bytes, addrs, &span, &detail)
                if status < 0:
                    break
                ldd_pool_free(pool, span)
            took_ns = ldd_now_ns() - took_ns
        check(status, &detail, b"allocate")
        return took_ns / count
    finally:
        ldd_pool_destroy(pool)
        free(addrs)


cdef HixlStatus _not_yet(HixlClientHandle client, CompleteHandle handle, HixlCompleteStatus* state) noexcept nogil:
    state[0] = HIXL_COMPLETE_STATUS_WAITING
    return HIXL_SUCCESS


def wait_in_vain(int64_t limit_ns):
    """Wait as the transfer code does, with a provider that cannot sleep, for a batch that does not end."""
    cdef ldd_provider provider
    memset(&provider, 0, sizeof(provider))
    provider.hixl.HixlCSClientQueryCompleteStatus = _not_yet
    with nogil:
        ldd_wait_complete(&provider, NULL, NULL, ldd_now_ns() + limit_ns, NULL)


def time_record(int64_t count):
    """Record in memory of its own, `count` times each; nanoseconds by name: ``count`` one operation, ``off`` an event
    while events are off, ``event`` one while they are on, and ``clock`` a look at the clock, which is part of it."""
    cdef ldd_record record
    cdef ldd_detail detail
    cdef ldd_peer_record* peer
    cdef int64_t took_ns[4]
    cdef int64_t _, i
    check(ldd_record_create(&record, NULL, &detail), &detail, b"create record")
    if record.head == NULL:
        raise MemoryError()
    with nogil:
        peer = ldd_record_peer(&record, 1)
        for i in range(4):
            ldd_record_set_tracing(&record, i == 2)
            for _ in range(LDD_RECORD_EVENTS):      # pages are there and warm
                ldd_trace_span(&record, LDD_EVENT_PULL, 0, 1, 0, 0, 0, 0, 0)
            took_ns[i] = ldd_now_ns()
            if i == 0:
                for _ in range(count):
                    ldd_record_count(peer, LDD_OP_PULL, 1000 + (_ & 0xffff), 4096, False)
            elif i < 3:
                for _ in range(count):
                    ldd_trace_span(&record, LDD_EVENT_PULL, 0, 1, 0, <uint64_t>_, 0, 4096, 0)
            else:
                for _ in range(count):
                    ldd_now_ns()
            took_ns[i] = ldd_now_ns() - took_ns[i]
        ldd_record_destroy(&record)
    return {name: <double>took_ns[i] / count for i, name in enumerate(("count", "off", "event", "clock"))}


@cython.final
cdef class TableStopwatch:
    """A cache table that holds `num_caches` caches of one tensor, each with two request keys, 2 i and 2 i + 1.

    Parameters
    ----------
    num_caches : int
        At least 1.
    """
    cdef ldd_table* _table
    cdef ldd_pool* _pool
    cdef int64_t* _cache_ids
    cdef readonly int64_t num_caches

    def __init__(self, int64_t num_caches):
        cdef ldd_detail detail
        if self._cache_ids != NULL or num_caches < 1:
            raise ValueError(f"num_caches={num_caches}: at least 1, and given once")
        self._cache_ids = <int64_t*>malloc(num_caches * sizeof(int64_t))
        if self._cache_ids == NULL:
            raise MemoryError()
        check(ldd_table_create(&self._table, &detail), &detail, b"create cache table")
        check(ldd_pool_create(BASE, max(<uint64_t>num_caches * 1024, <uint64_t>1 << 20), 9, &self._pool, &detail),
              &detail, b"create pool")
        self.num_caches = num_caches
        self.allocate(array("q", range(num_caches)))

    def __dealloc__(self):
        ldd_table_destroy(self._table)
        ldd_pool_destroy(self._pool)
        free(self._cache_ids)

    def close(self):
        """Free what the table holds."""
        cdef ldd_detail detail
        check(ldd_table_clear(self._table, 0, &detail), &detail, b"clear cache table")

    def stats(self):
        """The counts of the table, by name."""
        cdef ldd_table_counts counts
        ldd_table_stats(self._table, &counts)
        return counts

    def allocate(self, const int64_t[::1] caches):
        """Allocate these caches, which are not there, with their keys; nanoseconds of one."""
        cdef ldd_detail detail
        cdef ldd_key_spec keys[KEYS_PER_CACHE]
        cdef ldd_status status = LDD_OK
        cdef int64_t took_ns, i
        cdef size_t k
        with nogil:
            took_ns = ldd_now_ns()
            for i in range(caches.shape[0]):
                for k in range(KEYS_PER_CACHE):
                    keys[k].slot = <uint32_t>k
                    keys[k].kind = KEY_REQ
                    keys[k].id = <uint64_t>(KEYS_PER_CACHE * caches[i]) + k
                    keys[k].model_id = 0
                status = ldd_table_allocate(self._table, self._pool, 1, KEYS_PER_CACHE, 2, 0, NULL, keys,
                                            KEYS_PER_CACHE, &self._cache_ids[caches[i]], NULL, 0, &detail)
                if status < 0:
                    break
            took_ns = ldd_now_ns() - took_ns
        check(status, &detail, b"allocate")
        return took_ns / max(caches.shape[0], 1)

    def resolve(self, const int64_t[::1] caches):
        """Find the first key of each of these caches, pin it and let it go; nanoseconds of one."""
        cdef ldd_detail detail
        cdef ldd_cache_view view
        cdef ldd_status status = LDD_OK
        cdef int64_t took_ns, i
        with nogil:
            took_ns = ldd_now_ns()
            for i in range(caches.shape[0]):
                status = ldd_table_resolve(self._table, KEY_REQ, KEYS_PER_CACHE * caches[i], 0, 0, &view, &detail)
                if status < 0:
                    break
                ldd_table_unpin(self._table, view.slot, view.generation)
            took_ns = ldd_now_ns() - took_ns
        check(status, &detail, b"resolve")
        return took_ns / max(caches.shape[0], 1)

    def remove_keys(self, const int64_t[::1] caches):
        """Remove both keys of each of these caches; nanoseconds of one key."""
        cdef ldd_detail detail
        cdef ldd_status status = LDD_OK
        cdef int64_t took_ns, i, k
        with nogil:
            took_ns = ldd_now_ns()
            for i in range(caches.shape[0]):
                for k in range(KEYS_PER_CACHE):
                    status = ldd_table_remove_key(self._table, KEY_REQ, KEYS_PER_CACHE * caches[i] + k, 0, 0, &detail)
                    if status < 0:
                        break
            took_ns = ldd_now_ns() - took_ns
        check(status, &detail, b"remove")
        return took_ns / (max(caches.shape[0], 1) * KEYS_PER_CACHE)

    def deallocate(self, const int64_t[::1] caches):
        """Deallocate these caches, whose keys were removed; nanoseconds of one."""
        cdef ldd_detail detail
        cdef ldd_status status = LDD_OK
        cdef int64_t took_ns, i
        with nogil:
            took_ns = ldd_now_ns()
            for i in range(caches.shape[0]):
                status = ldd_table_deallocate(self._table, self._cache_ids[caches[i]], 0, &detail)
                if status < 0:
                    break
            took_ns = ldd_now_ns() - took_ns
        check(status, &detail, b"deallocate")
        return took_ns / max(caches.shape[0], 1)
