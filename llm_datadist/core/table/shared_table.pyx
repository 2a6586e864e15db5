"""The cache table as peers on this host see it: the shared files and their layout.

Three kinds of sparse, sealed memory files, passed over a Unix socket: the table, which peers map read-only and which
nobody but the owner's own mapping can write; one file of release marks per owner; and one lane per link. What the
owner acts on is private to it: the table's file is a copy for readers, and what peers write into marks and lanes is
only ever a hint that the owner checks. The protocol is ``docs/protocol.md``.
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
    #ifndef F_SEAL_FUTURE_WRITE
    #define F_SEAL_FUTURE_WRITE 16              /* Linux 5.1 */
    #endif

    /* A sparse file of this size that nobody can resize, mapped for writing; NULL without one. */
    static void *ldd_shared_file(const char *name, size_t size, mode_t mode, int more_seals, int *out) {
        void *at = MAP_FAILED;
        int fd = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING);
        *out = -1;
        if (fd < 0) return NULL;
        if (fchmod(fd, mode) == 0 && ftruncate(fd, (off_t)size) == 0)
            at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
        if (at != MAP_FAILED &&
            fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL | more_seals) == 0) {
            *out = fd;
            return at;
        }
        if (at != MAP_FAILED) munmap(at, size);
        close(fd);
        return NULL;
    }

    /* The same file, opened for reading only. */
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
    int F_SEAL_FUTURE_WRITE
    void* ldd_shared_file(const char* name, size_t size, unsigned int mode, int more_seals, int* out)
    int ldd_shared_read_only(int fd)
    void* ldd_shared_mmap(int fd, size_t size, int writable)
    bint ldd_shared_fits(int fd, size_t size)
    int munmap(void* at, size_t size)
    int close(int fd)

cdef enum:
    HEAD_BYTES = 4096
    LANE_BYTES = 4096


cdef uint64_t _layout() noexcept nogil:
    """A hash of every size, offset and bit field that both sides must agree on: builds that differ do not meet."""
    cdef ldd_shared_head head
    cdef ldd_shared_key key
    cdef ldd_shared_cache cache
    cdef ldd_release_marks marks
    cdef ldd_lane lane
    cdef uint64_t facts[37]
    cdef uint64_t value = <uint64_t>0xcbf29ce484222325
    cdef int i
    facts[0] = LDD_MAX_KEYS
    facts[1] = LDD_MAX_CELLS
    facts[2] = LDD_MAX_CACHES
    facts[3] = LDD_LANE_RING
    facts[4] = sizeof(head)
    facts[5] = <size_t>&head.magic - <size_t>&head
    facts[6] = <size_t>&head.seq - <size_t>&head
    facts[7] = <size_t>&head.region_epoch - <size_t>&head
    facts[8] = <size_t>&head.mask - <size_t>&head
    facts[9] = sizeof(key)
    facts[10] = <size_t>&key.id - <size_t>&key
    facts[11] = <size_t>&key.model_id - <size_t>&key
    facts[12] = <size_t>&key.kind - <size_t>&key
    facts[13] = <size_t>&key.generation - <size_t>&key
    facts[14] = <size_t>&key.cache_slot - <size_t>&key
    facts[15] = <size_t>&key.batch_slot - <size_t>&key
    facts[16] = sizeof(cache)
    facts[17] = <size_t>&cache.cache_id - <size_t>&cache
    facts[18] = <size_t>&cache.num_slots - <size_t>&cache
    facts[19] = <size_t>&cache.tensor_bytes - <size_t>&cache
    facts[20] = <size_t>&cache.step - <size_t>&cache
    facts[21] = <size_t>&cache.base - <size_t>&cache
    facts[22] = <size_t>&cache.generation - <size_t>&cache
    facts[23] = <size_t>&cache.num_tensors - <size_t>&cache
    facts[24] = <size_t>&cache.num_keys - <size_t>&cache
    facts[25] = <size_t>&cache.flags - <size_t>&cache
    facts[26] = <size_t>&marks.doorbell - <size_t>&marks
    facts[27] = <size_t>&marks.marks[0] - <size_t>&marks
    facts[28] = sizeof(lane)
    facts[29] = <size_t>&lane.hazard - <size_t>&lane
    facts[30] = <size_t>&lane.ring_head - <size_t>&lane
    facts[31] = <size_t>&lane.ring_tail - <size_t>&lane
    facts[32] = <size_t>&lane.closed - <size_t>&lane
    facts[33] = <size_t>&lane.ring[0] - <size_t>&lane
    facts[34] = <size_t>&lane.ring[0].key_index - <size_t>&lane.ring[0]
    facts[35] = <size_t>&lane.ring[0].key_generation - <size_t>&lane.ring[0]
    facts[36] = LDD_SHOWN_DTYPE_SHIFT
    for i in range(37):
        value = (value ^ facts[i]) * <uint64_t>0x100000001b3
    return value


cdef size_t ldd_shared_table_bytes() noexcept nogil:
    return (HEAD_BYTES + <size_t>LDD_MAX_CELLS * sizeof(uint64_t) + <size_t>LDD_MAX_KEYS * sizeof(ldd_shared_key)
            + <size_t>LDD_MAX_CACHES * sizeof(ldd_shared_cache))


cdef size_t _marks_bytes() noexcept nogil:
    return LDD_CACHE_LINE + <size_t>LDD_MAX_KEYS * sizeof(uint32_t)


cdef void _place(ldd_shared_table* shared, void* table) noexcept nogil:
    cdef char* at = <char*>table + HEAD_BYTES
    shared.head = <ldd_shared_head*>table
    shared.cells = <uint64_t*>at
    at += <size_t>LDD_MAX_CELLS * sizeof(uint64_t)
    shared.keys = <ldd_shared_key*>at
    shared.caches = <ldd_shared_cache*>(at + <size_t>LDD_MAX_KEYS * sizeof(ldd_shared_key))


cdef void ldd_shared_table_create(ldd_shared_table* shared) noexcept nogil:
    cdef int fd = -1
    cdef void* table
    memset(shared, 0, sizeof(ldd_shared_table))
    shared.table_fd = shared.marks_fd = -1
    # No other mapping can write from now on, whoever opens the file anew. A kernel that cannot promise this shares
    # nothing.
    table = ldd_shared_file(b"llm_datadist-table", ldd_shared_table_bytes(), 0o400, F_SEAL_FUTURE_WRITE, &fd)
    if table == NULL:
        return
    _place(shared, table)
    shared.table_fd = ldd_shared_read_only(fd)
    close(fd)
    shared.marks = <ldd_release_marks*>ldd_shared_file(b"llm_datadist-marks", _marks_bytes(), 0o600, 0,
                                                       &shared.marks_fd)
    if shared.table_fd < 0 or shared.marks == NULL:
        ldd_shared_table_destroy(shared)
        return
    shared.head.magic = _layout()


cdef void ldd_shared_table_destroy(ldd_shared_table* shared) noexcept nogil:
    if shared.head != NULL:
        munmap(shared.head, ldd_shared_table_bytes())
    if shared.marks != NULL:
        munmap(shared.marks, _marks_bytes())
    if shared.table_fd >= 0:
        close(shared.table_fd)
    if shared.marks_fd >= 0:
        close(shared.marks_fd)
    memset(shared, 0, sizeof(ldd_shared_table))
    shared.table_fd = shared.marks_fd = -1


cdef ldd_status ldd_shared_table_map(ldd_shared_table* shared, int table_fd, int marks_fd,
                                     ldd_detail* detail) noexcept nogil:
    cdef void* table
    memset(shared, 0, sizeof(ldd_shared_table))
    shared.table_fd = shared.marks_fd = -1
    if not ldd_shared_fits(table_fd, ldd_shared_table_bytes()) or not ldd_shared_fits(marks_fd, _marks_bytes()):
        return ldd_fail(detail, LDD_E_FAILED, b"the peer's table has another size than this build's")
    table = ldd_shared_mmap(table_fd, ldd_shared_table_bytes(), False)
    if table != NULL:
        _place(shared, table)
    shared.marks = <ldd_release_marks*>ldd_shared_mmap(marks_fd, _marks_bytes(), True)
    if table == NULL or shared.marks == NULL:
        ldd_shared_table_destroy(shared)
        return ldd_fail(detail, LDD_E_NO_MEMORY, b"cannot map %zu bytes of address space for a peer's table",
                        ldd_shared_table_bytes())
    if shared.head.magic != _layout():
        ldd_shared_table_destroy(shared)
        return ldd_fail(detail, LDD_E_FAILED, b"the peer's table has another layout than this build's")
    return LDD_OK


cdef ldd_lane* ldd_lane_create(int* fd) noexcept nogil:
    return <ldd_lane*>ldd_shared_file(b"llm_datadist-lane", LANE_BYTES, 0o600, 0, fd)


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
