"""Page pools and cache tables as Python objects, and a way to keep an engine's table locked.

Methods raise what the statuses of the calls below them stand for; none blocks with the GIL held.
"""
cimport cython
from libc.stddef cimport size_t
from libc.stdint cimport UINT64_MAX, int64_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport free, malloc

from llm_datadist.core.base.status cimport LDD_E_TIMEOUT, check, ldd_detail, ldd_fail, ldd_status
from llm_datadist.core.base.sync cimport ldd_lock, ldd_now_ns, ldd_unlock
from llm_datadist.core.engine.engine cimport ldd_address_array, ldd_key_specs
from llm_datadist.core.engine.lifecycle cimport EngineCore
from llm_datadist.core.table.cache_table cimport (
    ldd_cache_row, ldd_cache_view, ldd_key_spec, ldd_table, ldd_table_allocate, ldd_table_clear, ldd_table_counts,
    ldd_table_create, ldd_table_deallocate, ldd_table_destroy, ldd_table_pin_local, ldd_table_pin_range,
    ldd_table_register, ldd_table_remove_key, ldd_table_resolve, ldd_table_snapshot, ldd_table_stats, ldd_table_take,
    ldd_table_unpin, ldd_table_unregister,
)
from llm_datadist.core.table.key_index cimport LDD_NO_KEY
from llm_datadist.core.table.pool cimport (
    LDD_BIN_BITS, LDD_NO_PAGE, LDD_NUM_BINS, LDD_NUM_LEVELS, ldd_page, ldd_pool, ldd_pool_alloc_tensors,
    ldd_pool_create, ldd_pool_destroy, ldd_pool_free, ldd_pool_free_bytes, ldd_pool_largest_bytes, ldd_span,
)
from llm_datadist.core.table.shared_table cimport ldd_shared_table_bytes

import contextlib
from typing import NamedTuple, Optional

from llm_datadist.status import LLMMemoryError


# The tags of a page, see pool.pyx.
cdef enum:
    FREE_FIRST = 1
    FREE_LAST = 2
    USED = 4


@contextlib.contextmanager
def hold_table(EngineCore engine):
    """Keep an engine's cache table locked for a while, so that everybody else runs into their time limits."""
    with nogil:
        ldd_lock(&engine.table.mutex)
    try:
        yield
    finally:
        ldd_unlock(&engine.table.mutex)


@cython.final
cdef class PagePool:
    """A page pool of its own.

    Parameters
    ----------
    base : int
        First address. Nothing is ever read or written there.
    memory_size : int
        Bytes; a tail smaller than a page stays unused.
    page_shift : int
        Pages of ``1 << page_shift`` bytes, 9..30.

    Raises
    ------
    LLMParamInvalidError
        A value outside the ranges above.
    """

    cdef ldd_pool* pool

    def __init__(self, base, memory_size, page_shift):
        cdef ldd_detail detail
        if self.pool != NULL:
            raise TypeError("a PagePool is initialised once")
        check(ldd_pool_create(base, memory_size, page_shift, &self.pool, &detail), &detail, b"create pool")

    def __dealloc__(self):
        ldd_pool_destroy(self.pool)

    def alloc(self, num_pages):
        """Return the span of one run of `num_pages` pages, or None when no free run is that long."""
        if num_pages > UINT64_MAX >> self.pool.page_shift:
            return None
        try:
            return self.alloc_tensors(1, num_pages << self.pool.page_shift)[0]
        except LLMMemoryError:
            return None

    def alloc_tensors(self, uint32_t num_tensors, uint64_t tensor_bytes):
        """Return (span, [address per tensor]); raise ``LLMMemoryError`` with the pool as it was."""
        cdef ldd_detail detail
        cdef ldd_span span
        cdef ldd_status st
        cdef uint64_t* addrs = <uint64_t*>malloc(<size_t>(num_tensors or 1) * sizeof(uint64_t))
        if addrs == NULL:
            raise MemoryError
        detail.provider_code = 0
        try:
            with nogil:
                st = ldd_pool_alloc_tensors(self.pool, num_tensors, tensor_bytes, addrs, &span, &detail)
            check(st, &detail, b"allocate tensors")
            return span, [addrs[i] for i in range(num_tensors)]
        finally:
            free(addrs)

    def free(self, ldd_span span):
        """Give a span back; raise ``LLMParamInvalidError`` when it is not one in use."""
        cdef ldd_detail detail
        detail.provider_code = 0
        cdef ldd_status st = ldd_pool_free(self.pool, span)
        ldd_fail(&detail, st, b"page %u does not start a span in use", span)
        check(st, &detail, b"free span")

    @property
    def free_bytes(self):
        """Bytes in free pages."""
        return ldd_pool_free_bytes(self.pool)

    @property
    def largest_bytes(self):
        """Bytes of the largest free run."""
        return ldd_pool_largest_bytes(self.pool)

    @property
    def num_pages(self):
        """Pages of the whole range."""
        return self.pool.num_pages

    def runs(self):
        """Return [(first page, pages, in use)] in address order, after checking tags, bins and counts against it.

        Raises
        ------
        AssertionError
            The records contradict each other. One pass with the mutex held; for tests and for operators.
        """
        ldd_lock(&self.pool.mutex)
        try:
            return _runs(self.pool)
        finally:
            ldd_unlock(&self.pool.mutex)


def _bin_of(num_pages):
    """(level, bin) of runs of so many pages: bins of level 0 hold one size each, above they cut a power of two."""
    if num_pages < LDD_NUM_BINS:
        return 0, num_pages
    level = num_pages.bit_length() - LDD_BIN_BITS
    return level, (num_pages >> (level - 1)) - LDD_NUM_BINS


cdef list _runs(ldd_pool* pool):
    cdef uint32_t page = 0, level, bin, run
    cdef ldd_page* at
    found = []
    free_runs = set()
    binned = set()
    after_free = False
    while page < pool.num_pages:
        at = &pool.pages[page]
        used = bool(at.tag & USED)
        assert used or at.tag & FREE_FIRST, f"page {page} starts no run"
        assert 0 < at.num_pages <= pool.num_pages - page, f"run at page {page} has {at.num_pages} pages"
        if not used:
            assert not after_free, f"free runs meet at page {page}"
            assert pool.pages[page + at.num_pages - 1].tag & FREE_LAST, f"run at page {page} has no end"
            assert pool.pages[page + at.num_pages - 1].num_pages == at.num_pages
            free_runs.add((page, at.num_pages))
        found.append((page, at.num_pages, used))
        after_free = not used
        page += at.num_pages
    for level in range(<uint32_t>LDD_NUM_LEVELS):
        assert bool(pool.level_map >> level & 1) == bool(pool.bin_maps[level])
        for bin in range(<uint32_t>LDD_NUM_BINS):
            run = pool.heads[level][bin]
            assert bool(pool.bin_maps[level] >> bin & 1) == (run != LDD_NO_PAGE)
            while run != LDD_NO_PAGE:
                assert _bin_of(pool.pages[run].num_pages) == (level, bin), f"run at page {run} is in the wrong bin"
                binned.add((run, pool.pages[run].num_pages))
                run = pool.pages[run].next
    assert binned == free_runs, "bins and runs differ"
    assert sum([pages for _, pages in free_runs]) == pool.num_free_pages
    return found


class Pinned(NamedTuple):
    """A pinned cache as Python sees it; fields as in ``ldd_cache_view``, addresses copied."""

    cache_id: int
    slot: int
    generation: int
    num_tensors: int
    num_slots: int
    tensor_bytes: int
    stride: int
    step: int
    addrs: tuple
    batch_index: int
    key: Optional[tuple]
    key_kind: int
    tensor: int
    offset: int
    owned: bool
    is_blocks: bool
    host: bool
    remote_accessible: bool


@cython.final
cdef class CacheTable:
    """A cache table of its own.

    Safe from any thread. `keys` are (batch slot, kind, id, model id).
    """
    cdef ldd_table* t

    def __cinit__(self):
        self.t = NULL

    def __init__(self):
        cdef ldd_detail detail
        if self.t != NULL:
            raise TypeError("a CacheTable is initialised once")
        check(ldd_table_create(&self.t, &detail), &detail, b"create cache table")

    def __dealloc__(self):
        ldd_table_destroy(self.t)

    def allocate(self, PagePool pool, uint32_t num_tensors, uint64_t num_slots, uint64_t tensor_bytes, keys=(),
                 uint32_t flags=0, timeout_ms=1000):
        """Return (cache id, [address per tensor]) of a new owned cache."""
        cdef ldd_detail detail
        cdef int64_t cache_id = 0, deadline = _deadline(timeout_ms)
        cdef ldd_status st
        cdef uint32_t num_keys = 0
        cdef ldd_pool* memory = NULL if pool is None else pool.pool
        cdef uint64_t* addrs = <uint64_t*>malloc(<size_t>num_tensors * sizeof(uint64_t) + 1)
        cdef ldd_key_spec* specs = NULL
        detail.provider_code = 0
        try:
            specs = ldd_key_specs(keys, &num_keys)
            if addrs == NULL:
                raise MemoryError
            st = ldd_table_allocate(self.t, memory, num_tensors, num_slots, tensor_bytes, flags, NULL, specs,
                                    num_keys, &cache_id, addrs, 0, &detail)
            if st == LDD_E_TIMEOUT:
                with nogil:
                    st = ldd_table_allocate(self.t, memory, num_tensors, num_slots, tensor_bytes, flags, NULL, specs,
                                            num_keys, &cache_id, addrs, deadline, &detail)
            check(st, &detail, b"allocate cache")
            return cache_id, [addrs[i] for i in range(num_tensors)]
        finally:
            free(addrs)
            free(specs)

    def register(self, addrs, uint64_t num_slots, uint64_t tensor_bytes, keys=(), uint32_t flags=0, timeout_ms=1000):
        """Return the id of a new registered cache over tensors at `addrs`."""
        cdef ldd_detail detail
        cdef int64_t cache_id = 0, deadline = _deadline(timeout_ms)
        cdef ldd_status st
        cdef uint32_t num_tensors = len(addrs), num_keys = 0
        cdef uint64_t* values = ldd_address_array(addrs)
        cdef ldd_key_spec* specs = NULL
        detail.provider_code = 0
        try:
            specs = ldd_key_specs(keys, &num_keys)
            with nogil:
                st = ldd_table_register(self.t, values, num_tensors, num_slots, tensor_bytes, flags, NULL, specs,
                                        num_keys, &cache_id, deadline, &detail)
            check(st, &detail, b"register cache")
            return cache_id
        finally:
            free(values)
            free(specs)

    def deallocate(self, int64_t cache_id, timeout_ms=1000):
        """Give up the handle of an owned cache."""
        cdef ldd_detail detail
        cdef int64_t deadline = _deadline(timeout_ms)
        cdef ldd_status st
        detail.provider_code = 0
        with nogil:
            st = ldd_table_deallocate(self.t, cache_id, deadline, &detail)
        check(st, &detail, b"deallocate cache")

    def unregister(self, int64_t cache_id, timeout_ms=1000):
        """Forget a registered cache once nothing reads or writes it."""
        cdef ldd_detail detail
        cdef int64_t deadline = _deadline(timeout_ms)
        cdef ldd_status st
        detail.provider_code = 0
        with nogil:
            st = ldd_table_unregister(self.t, cache_id, deadline, &detail)
        check(st, &detail, b"unregister cache")

    def remove_key(self, uint32_t kind, uint64_t id, uint64_t model_id, timeout_ms=1000):
        """Unbind a key."""
        cdef ldd_detail detail
        cdef int64_t deadline = _deadline(timeout_ms)
        cdef ldd_status st
        detail.provider_code = 0
        with nogil:
            st = ldd_table_remove_key(self.t, kind, id, model_id, deadline, &detail)
        check(st, &detail, b"remove cache key")

    def resolve(self, uint32_t kind, uint64_t id, uint64_t model_id=0, uint64_t batch_index=0):
        """Find, pin and describe a cache; give the result to `unpin`."""
        cdef ldd_detail detail
        cdef ldd_cache_view view
        cdef ldd_status st
        detail.provider_code = 0
        with nogil:
            st = ldd_table_resolve(self.t, kind, id, model_id, batch_index, &view, &detail)
        check(st, &detail, b"resolve cache")
        return _pinned(&view)

    def pin_local(self, int64_t cache_id):
        """Pin a cache by id."""
        cdef ldd_detail detail
        cdef ldd_cache_view view
        cdef ldd_status st
        detail.provider_code = 0
        with nogil:
            st = ldd_table_pin_local(self.t, cache_id, &view, &detail)
        check(st, &detail, b"pin cache")
        return _pinned(&view)

    def pin_range(self, uint64_t addr, uint64_t num_bytes):
        """Pin the cache with a tensor around an address range."""
        cdef ldd_detail detail
        cdef ldd_cache_view view
        cdef ldd_status st
        detail.provider_code = 0
        with nogil:
            st = ldd_table_pin_range(self.t, addr, num_bytes, &view, &detail)
        check(st, &detail, b"pin range")
        return _pinned(&view)

    def unpin(self, pinned):
        """Drop a pin."""
        cdef uint32_t slot = pinned.slot, generation = pinned.generation
        with nogil:
            ldd_table_unpin(self.t, slot, generation)

    def take(self, key, uint32_t first_tensor, uint32_t num_tensors):
        """Report a successful pull of a range of tensors; `key` is ``Pinned.key``, or None."""
        cdef uint32_t index, generation
        cdef ldd_status st
        index, generation = (LDD_NO_KEY, 0) if key is None else key
        with nogil:
            st = ldd_table_take(self.t, index, generation, first_tensor, num_tensors)
        check(st, NULL, b"take tensors")

    def clear(self, timeout_ms=1000):
        """Free everything once nothing is read or written."""
        cdef ldd_detail detail
        cdef int64_t deadline = _deadline(timeout_ms)
        cdef ldd_status st
        detail.provider_code = 0
        with nogil:
            st = ldd_table_clear(self.t, deadline, &detail)
        check(st, &detail, b"clear cache table")

    def stats(self):
        """Return the counts as a dict."""
        cdef ldd_table_counts counts
        with nogil:
            ldd_table_stats(self.t, &counts)
        return counts

    def snapshot(self):
        """Return one dict per live cache, in no order."""
        cdef ldd_cache_row* rows = NULL
        cdef size_t capacity = 64, count
        while True:
            rows = <ldd_cache_row*>malloc(capacity * sizeof(ldd_cache_row))
            if rows == NULL:
                raise MemoryError
            try:
                with nogil:
                    count = ldd_table_snapshot(self.t, rows, capacity)
                if count <= capacity:
                    return [rows[i] for i in range(count)]
            finally:
                free(rows)
            capacity = count + (count >> 2)

    def shared_memory(self):
        """Return (address, bytes, table and marks descriptor) of what peers see; None where nothing is shared."""
        if self.t.shared.head == NULL:
            return None
        return (<uintptr_t>self.t.shared.head, ldd_shared_table_bytes(), self.t.shared.table_fd,
                self.t.shared.marks_fd)

    @contextlib.contextmanager
    def hold(self):
        """Keep the mutex for a while, so that everybody else runs into their deadlines."""
        with nogil:
            ldd_lock(&self.t.mutex)
        try:
            yield
        finally:
            ldd_unlock(&self.t.mutex)


cdef int64_t _deadline(timeout_ms) except -1:
    return ldd_now_ns() + <int64_t>timeout_ms * 1000000


cdef object _pinned(const ldd_cache_view* view):
    return Pinned(
        view.cache_id, view.slot, view.generation, view.num_tensors, view.num_slots, view.tensor_bytes, view.stride,
        view.step, tuple([view.addrs[i] for i in range(view.num_tensors)]), view.batch_index,
        None if view.key_index == LDD_NO_KEY else (view.key_index, view.key_generation), view.key_kind, view.tensor,
        view.offset, bool(view.owned), bool(view.is_blocks), bool(view.host), bool(view.remote_accessible),
    )
