"""Page allocator of the memory pools: runs of pages out of one address range.

Two-level segregated fit: free runs hang in bins by size (powers of two cut into 32 steps) and bitmaps find a bin that
is large enough, so allocating and freeing touch a handful of records whatever the size of the pool. Runs carry their
length at both ends (boundary tags), which is how freed neighbours find each other. The records live in a zeroed array
beside the memory, one per page, and a page inside a run is never looked at: a pool costs real memory for the ends of
its runs only.

The pool neither owns nor touches the memory it hands out, because that may be device memory; the engine that took it
from the provider frees it after the pool. Any thread; one short mutex per call; nothing here waits for anything else.
"""
from libc.stdint cimport UINT64_MAX, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from llm_datadist.core.base.status cimport LDD_E_NO_MEMORY, LDD_E_PARAM, LDD_OK, ldd_detail, ldd_fail, ldd_status
from llm_datadist.core.base.sync cimport ldd_lock, ldd_mutex_destroy, ldd_mutex_init, ldd_unlock

cdef extern from *:
    int __builtin_clz(unsigned int x) nogil
    int __builtin_ctz(unsigned int x) nogil

cdef enum:
    MIN_PAGE_SHIFT = 9          # the first generation aligns tensors to 512 bytes
    MAX_PAGE_SHIFT = 30
    FREE_FIRST = 1              # tags; a free run of one page is both first and last
    FREE_LAST = 2
    USED = 4
    SPAN_HEAD = 8               # first run of a span, the only page ldd_pool_free accepts


cdef ldd_status ldd_pool_create(uint64_t base, uint64_t memory_size, uint32_t page_shift, ldd_pool** out,
                                ldd_detail* detail) noexcept nogil:
    cdef ldd_pool* pool
    cdef uint64_t num_pages
    out[0] = NULL
    if page_shift < MIN_PAGE_SHIFT or page_shift > MAX_PAGE_SHIFT:
        return ldd_fail(detail, LDD_E_PARAM, b"page_shift is %u; allowed are %d to %d", page_shift, MIN_PAGE_SHIFT,
                        MAX_PAGE_SHIFT)
    num_pages = memory_size >> page_shift
    if num_pages == 0:
        return ldd_fail(detail, LDD_E_PARAM, b"memory_size is %llu bytes, smaller than a page of %llu bytes",
                        <unsigned long long>memory_size, <unsigned long long>1 << page_shift)
    if num_pages >= LDD_NO_PAGE:
        return ldd_fail(detail, LDD_E_PARAM,
                        b"memory_size of %llu bytes makes %llu pages of %llu bytes; a pool takes fewer than 4294967295",
                        <unsigned long long>memory_size, <unsigned long long>num_pages,
                        <unsigned long long>1 << page_shift)
    if memory_size > UINT64_MAX - base:
        return ldd_fail(detail, LDD_E_PARAM, b"%llu bytes from 0x%llx pass the end of the address space",
                        <unsigned long long>memory_size, <unsigned long long>base)
    pool = <ldd_pool*>calloc(1, sizeof(ldd_pool))
    if pool != NULL:
        pool.pages = <ldd_page*>calloc(num_pages, sizeof(ldd_page))
    if pool == NULL or pool.pages == NULL or ldd_mutex_init(&pool.mutex) != LDD_OK:
        if pool != NULL:
            free(pool.pages)
        free(pool)
        return ldd_fail(detail, LDD_E_NO_MEMORY, b"no room for the records of %llu pages",
                        <unsigned long long>num_pages)
    pool.base = base
    pool.memory_size = memory_size
    pool.page_shift = page_shift
    pool.num_pages = <uint32_t>num_pages
    memset(pool.heads, 0xff, sizeof(pool.heads))         # LDD_NO_PAGE everywhere
    _insert(pool, 0, pool.num_pages)
    out[0] = pool
    return LDD_OK


cdef void ldd_pool_destroy(ldd_pool* pool) noexcept nogil:
    if pool != NULL:
        ldd_mutex_destroy(&pool.mutex)
        free(pool.pages)
        free(pool)


cdef ldd_status ldd_pool_alloc_tensors(ldd_pool* pool, uint32_t num_tensors, uint64_t tensor_bytes, uint64_t* addrs,
                                       ldd_span* span, ldd_detail* detail) noexcept nogil:
    cdef uint64_t pages = ldd_tensor_pages(pool, tensor_bytes)
    cdef uint32_t left = num_tensors, count, i
    cdef uint32_t run, head = LDD_NO_PAGE, tail = LDD_NO_PAGE
    cdef uint64_t step, addr
    cdef ldd_status st
    span[0] = LDD_NO_PAGE
    if num_tensors == 0 or tensor_bytes == 0:
        return ldd_fail(detail, LDD_E_PARAM, b"%u tensors of %llu bytes were asked for; both must be at least 1",
                        num_tensors, <unsigned long long>tensor_bytes)
    ldd_lock(&pool.mutex)
    # In this order the product cannot overflow: both factors are below 2**32.
    if pages > pool.num_free_pages or pages * num_tensors > pool.num_free_pages:
        st = _no_room(pool, num_tensors, tensor_bytes, detail)
        ldd_unlock(&pool.mutex)
        return st
    step = pages << pool.page_shift
    while left:
        count = left
        run = _find(pool, pages * count)
        if run == LDD_NO_PAGE:
            # As many as fit into the largest run: greedy is exact here, since every tensor has the same size.
            run = _largest(pool)
            count = <uint32_t>(pool.pages[run].num_pages // pages) if run != LDD_NO_PAGE else 0
            if count == 0:
                _release_chain(pool, head)
                st = _no_room(pool, num_tensors, tensor_bytes, detail)
                ldd_unlock(&pool.mutex)
                return st
        _take(pool, run, <uint32_t>(pages * count))
        if head == LDD_NO_PAGE:
            head = run
        else:
            pool.pages[tail].next = run
        tail = run
        addr = ldd_page_addr(pool, run)
        for i in range(count):
            addrs[i] = addr
            addr += step
        addrs += count
        left -= count
    pool.pages[head].tag |= SPAN_HEAD
    ldd_unlock(&pool.mutex)
    span[0] = head
    return LDD_OK


cdef ldd_status ldd_pool_free(ldd_pool* pool, ldd_span span) noexcept nogil:
    cdef ldd_status st = LDD_E_PARAM
    if span == LDD_NO_PAGE:
        return LDD_OK
    ldd_lock(&pool.mutex)
    if span < pool.num_pages and pool.pages[span].tag & SPAN_HEAD:
        _release_chain(pool, span)
        st = LDD_OK
    ldd_unlock(&pool.mutex)
    return st


cdef uint64_t ldd_pool_free_bytes(ldd_pool* pool) noexcept nogil:
    cdef uint64_t num_pages
    ldd_lock(&pool.mutex)
    num_pages = pool.num_free_pages
    ldd_unlock(&pool.mutex)
    return num_pages << pool.page_shift


cdef uint64_t ldd_pool_largest_bytes(ldd_pool* pool) noexcept nogil:
    cdef uint64_t num_bytes
    ldd_lock(&pool.mutex)
    num_bytes = _largest_bytes(pool)
    ldd_unlock(&pool.mutex)
    return num_bytes


# Everything below runs with the mutex held.

cdef inline void _bin_of(uint32_t num_pages, uint32_t* level, uint32_t* bin) noexcept nogil:
    """The bin that holds runs of `num_pages`; bins of level 0 hold one size each."""
    cdef uint32_t top
    if num_pages < LDD_NUM_BINS:
        level[0] = 0
        bin[0] = num_pages
    else:
        top = 31 - __builtin_clz(num_pages)
        level[0] = top - LDD_BIN_BITS + 1
        bin[0] = (num_pages >> (top - LDD_BIN_BITS)) - LDD_NUM_BINS


cdef void _insert(ldd_pool* pool, uint32_t run, uint32_t num_pages) noexcept nogil:
    """Tag [run, run + num_pages) as one free run and put it into its bin."""
    cdef uint32_t level, bin, head
    cdef ldd_page* page = &pool.pages[run]
    _bin_of(num_pages, &level, &bin)
    head = pool.heads[level][bin]
    pool.pages[run + num_pages - 1].num_pages = num_pages
    page.num_pages = num_pages
    page.tag = 0                            # before the last page's tag, which may be this very record
    pool.pages[run + num_pages - 1].tag = FREE_LAST
    page.tag |= FREE_FIRST
    page.prev = LDD_NO_PAGE
    page.next = head
    if head != LDD_NO_PAGE:
        pool.pages[head].prev = run
    pool.heads[level][bin] = run
    pool.level_map |= <uint32_t>1 << level
    pool.bin_maps[level] |= <uint32_t>1 << bin
    pool.num_free_pages += num_pages


cdef void _remove(ldd_pool* pool, uint32_t run) noexcept nogil:
    """Take a free run out of its bin and clear its tags."""
    cdef uint32_t level, bin
    cdef ldd_page* page = &pool.pages[run]
    _bin_of(page.num_pages, &level, &bin)
    if page.next != LDD_NO_PAGE:
        pool.pages[page.next].prev = page.prev
    if page.prev != LDD_NO_PAGE:
        pool.pages[page.prev].next = page.next
    else:
        pool.heads[level][bin] = page.next
        if page.next == LDD_NO_PAGE:
            pool.bin_maps[level] &= ~(<uint32_t>1 << bin)
            if pool.bin_maps[level] == 0:
                pool.level_map &= ~(<uint32_t>1 << level)
    pool.num_free_pages -= page.num_pages
    pool.pages[run + page.num_pages - 1].tag = 0
    page.tag = 0


cdef uint32_t _find(ldd_pool* pool, uint64_t num_pages) noexcept nogil:
    """A free run of at least `num_pages` pages, or LDD_NO_PAGE when there is none."""
    cdef uint32_t level, bin, own_level, own_bin, run, bins, levels
    cdef uint64_t rounded
    if num_pages > pool.num_free_pages:
        return LDD_NO_PAGE
    _bin_of(<uint32_t>num_pages, &own_level, &own_bin)
    # The latest run of the own bin often has the very size, when caches of one shape come and go.
    run = pool.heads[own_level][own_bin]
    if run != LDD_NO_PAGE and pool.pages[run].num_pages >= num_pages:
        return run
    # From the next bin boundary up, any run will do.
    rounded = num_pages
    if own_level:
        rounded += (<uint64_t>1 << (own_level - 1)) - 1
    if rounded < LDD_NO_PAGE:
        _bin_of(<uint32_t>rounded, &level, &bin)
        bins = pool.bin_maps[level] & (~<uint32_t>0 << bin)
        if bins == 0:
            levels = pool.level_map & (~<uint32_t>0 << (level + 1))
            if levels:
                level = __builtin_ctz(levels)
                bins = pool.bin_maps[level]
        if bins:
            return pool.heads[level][__builtin_ctz(bins)]
    # Nothing larger is left: look through the own bin, whose runs differ by 3 % at most, rather than refuse what fits.
    while run != LDD_NO_PAGE and pool.pages[run].num_pages < num_pages:
        run = pool.pages[run].next
    return run


cdef uint32_t _largest(ldd_pool* pool) noexcept nogil:
    """The largest free run, or LDD_NO_PAGE: the longest of the topmost bin."""
    cdef uint32_t level, run, best
    if pool.level_map == 0:
        return LDD_NO_PAGE
    level = 31 - __builtin_clz(pool.level_map)
    best = run = pool.heads[level][31 - __builtin_clz(pool.bin_maps[level])]
    while run != LDD_NO_PAGE:
        if pool.pages[run].num_pages > pool.pages[best].num_pages:
            best = run
        run = pool.pages[run].next
    return best


cdef void _take(ldd_pool* pool, uint32_t run, uint32_t num_pages) noexcept nogil:
    """Use the first `num_pages` of a free run and put the rest back."""
    cdef uint32_t whole = pool.pages[run].num_pages
    _remove(pool, run)
    if whole > num_pages:
        _insert(pool, run + num_pages, whole - num_pages)
    pool.pages[run].num_pages = num_pages
    pool.pages[run].next = LDD_NO_PAGE
    pool.pages[run].tag = USED


cdef void _release_chain(ldd_pool* pool, uint32_t run) noexcept nogil:
    """Free every run from `run` on, each merged with its free neighbours."""
    cdef uint32_t first, num_pages, end, next
    while run != LDD_NO_PAGE:
        next = pool.pages[run].next
        first = run
        num_pages = pool.pages[run].num_pages
        pool.pages[run].tag = 0
        end = run + num_pages
        if end < pool.num_pages and pool.pages[end].tag & FREE_FIRST:
            num_pages += pool.pages[end].num_pages
            _remove(pool, end)
        if run > 0 and pool.pages[run - 1].tag & FREE_LAST:
            first = run - pool.pages[run - 1].num_pages
            num_pages += pool.pages[first].num_pages
            _remove(pool, first)
        _insert(pool, first, num_pages)
        run = next


cdef uint64_t _largest_bytes(ldd_pool* pool) noexcept nogil:
    cdef uint32_t run = _largest(pool)
    return <uint64_t>pool.pages[run].num_pages << pool.page_shift if run != LDD_NO_PAGE else 0


cdef ldd_status _no_room(ldd_pool* pool, uint32_t num_tensors, uint64_t tensor_bytes,
                         ldd_detail* detail) noexcept nogil:
    return ldd_fail(detail, LDD_E_NO_MEMORY,
                    b"%u tensors of %llu bytes in pages of %llu bytes were asked for; of %llu bytes %llu are free, "
                    b"the largest run has %llu",
                    num_tensors, <unsigned long long>tensor_bytes, <unsigned long long>1 << pool.page_shift,
                    <unsigned long long>pool.memory_size,
                    <unsigned long long>(pool.num_free_pages << pool.page_shift),
                    <unsigned long long>_largest_bytes(pool))
