"""The cache table as peers on this host see it: the shared files and their layout.

Three kinds of sparse, sealed memory files, passed over a Unix socket: the table itself, which peers map read-only and
read under a sequence lock; one file of release marks per owner, where peers say that they released a key; and one lane
per link, where its peer publishes which cache it touches (a hazard) and queues the keys it released. A hazard that a
dead peer left goes with its lane, so no count can leak. What peers write is only ever a hint that the owner checks.
"""
from libc.stddef cimport size_t
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memset

from llm_datadist.core.base.status cimport LDD_E_FAILED, LDD_E_NO_MEMORY, LDD_OK, ldd_fail

cdef extern from * nogil:
    """
    #include <fcntl.h>
    #include <stdio.h>
    #include <sys/mman.h>
    #include <sys/stat.h>
    #include <unistd.h>

    #ifndef F_ADD_SEALS
    #define F_ADD_SEALS 1033
    #define F_GET_SEALS 1034
    #define F_SEAL_SEAL 1
    #define F_SEAL_SHRINK 2
    #define F_SEAL_GROW 4
    #endif

    /* A sparse file of this size that nobody can resize. */
    static int ldd_shared_file(const char *name, size_t size) {
        int fd = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING);
        if (fd < 0) return -1;
        if (ftruncate(fd, (off_t)size) < 0 || fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) < 0) {
            close(fd);
            return -1;
        }
        return fd;
    }

    /* The same file, opened for reading only: a peer cannot make more of it. */
    static int ldd_shared_read_only(int fd) {
        char path[64];
        snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
        return open(path, O_RDONLY | O_CLOEXEC);
    }

    static void *ldd_shared_mmap(int fd, size_t size, int writable) {
        void *at = mmap(NULL, size, writable ? PROT_READ | PROT_WRITE : PROT_READ, MAP_SHARED | MAP_NORESERVE, fd, 0);
        return at == MAP_FAILED ? NULL : at;
    }

    /* Whether the file has exactly this size and cannot shrink under a mapping. */
    static int ldd_shared_fits(int fd, size_t size) {
        struct stat status;
        int seals = fcntl(fd, F_GET_SEALS);
        return fstat(fd, &status) == 0 && (uint64_t)status.st_size == size && seals >= 0 && (seals & F_SEAL_SHRINK);
    }
    """
    int ldd_shared_file(const char* name, size_t size)
    int ldd_shared_read_only(int fd)
    void* ldd_shared_mmap(int fd, size_t size, int writable)
    bint ldd_shared_fits(int fd, size_t size)
    int munmap(void* at, size_t size)
    int close(int fd)

cdef enum:
    HEAD_BYTES = 4096
    DESK_HEAD_BYTES = 4096
    LANE_BYTES = 4096


cdef uint64_t _layout_magic(size_t cell_bytes, size_t key_bytes, size_t cache_bytes) noexcept nogil:
    """Changes with every size that both sides must agree on."""
    return (<uint64_t>0x3142444c << 32) ^ (<uint64_t>cell_bytes << 24) ^ (<uint64_t>key_bytes << 12) ^ cache_bytes \
        ^ (<uint64_t>LDD_MAX_KEYS << 5) ^ (<uint64_t>sizeof(ldd_lane) << 40)


cdef size_t _table_bytes(size_t cell_bytes, size_t key_bytes, size_t cache_bytes) noexcept nogil:
    return (HEAD_BYTES + 2 * <size_t>LDD_MAX_CELLS * cell_bytes + <size_t>LDD_MAX_KEYS * key_bytes
            + <size_t>LDD_MAX_CACHES * cache_bytes)


cdef size_t _marks_bytes() noexcept nogil:
    return DESK_HEAD_BYTES + <size_t>LDD_MAX_KEYS * sizeof(uint32_t)


cdef void _place(ldd_shared_table* shared, void* table, size_t cell_bytes, size_t key_bytes) noexcept nogil:
    cdef char* at = <char*>table + HEAD_BYTES
    shared.head = <ldd_shared_head*>table
    shared.cells[0] = at
    shared.cells[1] = at + LDD_MAX_CELLS * cell_bytes
    shared.entries = at + 2 * <size_t>LDD_MAX_CELLS * cell_bytes
    shared.caches = at + 2 * <size_t>LDD_MAX_CELLS * cell_bytes + <size_t>LDD_MAX_KEYS * key_bytes


cdef ldd_status ldd_shared_table_create(ldd_shared_table* shared, size_t cell_bytes, size_t key_bytes,
                                        size_t cache_bytes,
                                 ldd_detail* detail) noexcept nogil:
    cdef size_t size = _table_bytes(cell_bytes, key_bytes, cache_bytes)
    cdef int fd = ldd_shared_file(b"llm_datadist-table", size)
    cdef void* table
    memset(shared, 0, sizeof(ldd_shared_table))
    shared.table_fd = shared.marks_fd = -1
    shared.cache_bytes = cache_bytes
    if fd < 0:
        return ldd_fail(detail, LDD_E_NO_MEMORY, b"cannot make a memory file for the cache table")
    table = ldd_shared_mmap(fd, size, True)
    shared.table_fd = ldd_shared_read_only(fd)        # -1 without /proc: the table is then not shared
    close(fd)
    shared.marks_fd = ldd_shared_file(b"llm_datadist-marks", _marks_bytes())
    if shared.marks_fd >= 0:
        shared.marks = <ldd_release_marks*>ldd_shared_mmap(shared.marks_fd, _marks_bytes(), True)
    if table != NULL:
        _place(shared, table, cell_bytes, key_bytes)
        shared.head.magic = _layout_magic(cell_bytes, key_bytes, cache_bytes)
    if table == NULL or shared.marks == NULL:
        ldd_shared_unmap(shared, size)
        return ldd_fail(detail, LDD_E_NO_MEMORY, b"cannot map %zu bytes of address space for the cache table", size)
    return LDD_OK


cdef void ldd_shared_unmap(ldd_shared_table* shared, size_t size) noexcept nogil:
    if shared.head != NULL:
        munmap(shared.head, size)
    if shared.marks != NULL:
        munmap(shared.marks, _marks_bytes())
    if shared.table_fd >= 0:
        close(shared.table_fd)
    if shared.marks_fd >= 0:
        close(shared.marks_fd)
    memset(shared, 0, sizeof(ldd_shared_table))
    shared.table_fd = shared.marks_fd = -1


cdef void ldd_shared_table_destroy(ldd_shared_table* shared) noexcept nogil:
    cdef size_t size
    if shared.head == NULL:
        return
    size = <size_t>shared.caches + <size_t>LDD_MAX_CACHES * shared.cache_bytes - <size_t>shared.head
    ldd_shared_unmap(shared, size)


cdef ldd_status ldd_shared_table_map(ldd_shared_table* shared, int table_fd, int marks_fd, size_t cell_bytes,
                                     size_t key_bytes,
                              size_t cache_bytes, ldd_detail* detail) noexcept nogil:
    cdef size_t size = _table_bytes(cell_bytes, key_bytes, cache_bytes)
    cdef void* table
    memset(shared, 0, sizeof(ldd_shared_table))
    shared.table_fd = shared.marks_fd = -1
    shared.cache_bytes = cache_bytes
    if not ldd_shared_fits(table_fd, size) or not ldd_shared_fits(marks_fd, _marks_bytes()):
        return ldd_fail(detail, LDD_E_FAILED, b"the peer's table has another size than this build's")
    table = ldd_shared_mmap(table_fd, size, False)
    shared.marks = <ldd_release_marks*>ldd_shared_mmap(marks_fd, _marks_bytes(), True)
    if table != NULL:
        _place(shared, table, cell_bytes, key_bytes)
    if table == NULL or shared.marks == NULL:
        ldd_shared_unmap(shared, size)
        return ldd_fail(detail, LDD_E_NO_MEMORY, b"cannot map %zu bytes of address space for a peer's table", size)
    if shared.head.magic != _layout_magic(cell_bytes, key_bytes, cache_bytes):
        ldd_shared_unmap(shared, size)
        return ldd_fail(detail, LDD_E_FAILED, b"the peer's table has another layout than this build's")
    return LDD_OK


cdef ldd_lane* ldd_lane_create(int* fd) noexcept nogil:
    cdef ldd_lane* lane
    fd[0] = ldd_shared_file(b"llm_datadist-lane", LANE_BYTES)
    if fd[0] < 0:
        return NULL
    lane = <ldd_lane*>ldd_shared_mmap(fd[0], LANE_BYTES, True)
    if lane == NULL:
        close(fd[0])
        fd[0] = -1
    return lane


cdef ldd_lane* ldd_lane_map(int fd) noexcept nogil:
    return <ldd_lane*>ldd_shared_mmap(fd, LANE_BYTES, True) if ldd_shared_fits(fd, LANE_BYTES) else NULL


cdef void ldd_lane_unmap(ldd_lane* lane) noexcept nogil:
    if lane != NULL:
        munmap(lane, LANE_BYTES)


cdef void ldd_reader_free(ldd_shared_reader* reader) noexcept nogil:
    if reader == NULL:
        return
    ldd_lane_unmap(reader.lane)
    ldd_shared_table_destroy(&reader.shared)
    free(reader.known_addrs)
    free(reader)
