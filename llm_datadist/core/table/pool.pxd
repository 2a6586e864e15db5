"""A page allocator over an address range it does not own; see ``pool.pyx``."""
from libc.stdint cimport uint32_t, uint64_t

from llm_datadist.core.base.status cimport ldd_detail, ldd_status
from llm_datadist.core.base.sync cimport ldd_mutex

cdef extern from *:
    """
    /* Two-level size bins: powers of two, each cut into 1 << LDD_BIN_BITS steps. */
    #define LDD_BIN_BITS 5
    #define LDD_NUM_BINS (1 << LDD_BIN_BITS)
    #define LDD_NUM_LEVELS (33 - LDD_BIN_BITS)
    #define LDD_NO_PAGE UINT32_MAX
    """
    enum:
        LDD_BIN_BITS
        LDD_NUM_BINS
        LDD_NUM_LEVELS
    const uint32_t LDD_NO_PAGE

# The runs one caller got from one call, chained through the pool's own page records: the first page of the first
# run, or LDD_NO_PAGE for none. So owning memory costs its holder four bytes, whatever the number of runs.
ctypedef uint32_t ldd_span

ctypedef struct ldd_page:
    uint32_t num_pages      # first page of a run, and last page of a free one: length of the run
    uint32_t prev           # first page of a free run: neighbours in its bin
    uint32_t next           # ... and of a used run: next run of the same span
    uint32_t tag            # what this page starts or ends; 0 inside a run

ctypedef struct ldd_pool:
    ldd_mutex mutex
    uint64_t base
    uint64_t memory_size    # bytes, as given
    uint32_t page_shift
    uint32_t num_pages
    uint64_t num_free_pages
    ldd_page* pages
    uint32_t level_map      # bit l: some bin of level l is not empty
    uint32_t bin_maps[LDD_NUM_LEVELS]
    uint32_t heads[LDD_NUM_LEVELS][LDD_NUM_BINS]

# Every function below may be called from any thread: the pool has its own mutex, held for one call, and calls
# nothing else meanwhile (so it comes last in every lock order). Memory contents are never read or written.

# Take over [base, base + memory_size). LDD_E_PARAM: page_shift outside 9..30, page larger than the range, 2**32-1 pages
# or more, or a range that wraps. LDD_E_NO_MEMORY: no room for the page records.
cdef ldd_status ldd_pool_create(uint64_t base, uint64_t memory_size, uint32_t page_shift, ldd_pool** out,
                                ldd_detail* detail) noexcept nogil
# Free the records; outstanding spans become meaningless. NULL is allowed.
cdef void ldd_pool_destroy(ldd_pool* pool) noexcept nogil

# num_tensors times tensor_bytes, each page aligned: addrs[0..num_tensors) and one span for all of them. One run
# at equal steps when there is one that long, otherwise as few runs as the largest ones allow. All or nothing:
# LDD_E_NO_MEMORY names bytes wanted, bytes free and the largest run.
cdef ldd_status ldd_pool_alloc_tensors(ldd_pool* pool, uint32_t num_tensors, uint64_t tensor_bytes, uint64_t* addrs,
                                       ldd_span* span, ldd_detail* detail) noexcept nogil
# Give back every run of a span; LDD_NO_PAGE is a no-op. LDD_E_PARAM: not the start of a used run (nothing changed).
cdef ldd_status ldd_pool_free(ldd_pool* pool, ldd_span span) noexcept nogil

cdef uint64_t ldd_pool_free_bytes(ldd_pool* pool) noexcept nogil
cdef uint64_t ldd_pool_largest_bytes(ldd_pool* pool) noexcept nogil

cdef inline uint64_t ldd_page_addr(const ldd_pool* pool, uint32_t page) noexcept nogil:
    return pool.base + (<uint64_t>page << pool.page_shift)

cdef inline uint64_t ldd_tensor_pages(const ldd_pool* pool, uint64_t tensor_bytes) noexcept nogil:
    """Pages of one tensor, rounded up without overflow."""
    cdef uint64_t whole = tensor_bytes >> pool.page_shift
    return whole + ((whole << pool.page_shift) != tensor_bytes)
