"""The cache table as peers on this host see it: the shared files and their layout.

Three kinds of sparse, sealed memory files, passed over a Unix socket: the table itself, which peers map read-only and
read under a sequence lock; one desk per owner, where peers say that they released a key; and one lane per link, where
its peer publishes which cache it touches (a hazard) and queues the keys it released. A hazard that a dead peer left
goes with its lane, so no count can leak. What peers write is only ever a hint that the owner checks.
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
    static int ldd_board_file(const char *name, size_t size) {
        int fd = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING);
        if (fd < 0) return -1;
        if (ftruncate(fd, (off_t)size) < 0 || fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) < 0) {
            close(fd);
            return -1;
        }
        return fd;
    }

    /* The same file, opened for reading only: a peer cannot make more of it. */
    static int ldd_board_read_only(int fd) {
        char path[64];
        snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
        return open(path, O_RDONLY | O_CLOEXEC);
    }

    static void *ldd_board_mmap(int fd, size_t size, int writable) {
        void *at = mmap(NULL, size, writable ? PROT_READ | PROT_WRITE : PROT_READ, MAP_SHARED | MAP_NORESERVE, fd, 0);
        return at == MAP_FAILED ? NULL : at;
    }

    /* Whether the file has exactly this size and cannot shrink under a mapping. */
    static int ldd_board_fits(int fd, size_t size) {
        struct stat status;
        int seals = fcntl(fd, F_GET_SEALS);
        return fstat(fd, &status) == 0 && (uint64_t)status.st_size == size && seals >= 0 && (seals & F_SEAL_SHRINK);
    }
    """
    int ldd_board_file(const char* name, size_t size)
    int ldd_board_read_only(int fd)
    void* ldd_board_mmap(int fd, size_t size, int writable)
    bint ldd_board_fits(int fd, size_t size)
    int munmap(void* at, size_t size)
    int close(int fd)

cdef enum:
    HEAD_BYTES = 4096
    DESK_HEAD_BYTES = 4096
    LANE_BYTES = 4096


cdef uint64_t layout_magic(size_t cell_bytes, size_t key_bytes, size_t cache_bytes) noexcept nogil:
    """Changes with every size that both sides must agree on."""
    return (<uint64_t>0x3142444c << 32) ^ (<uint64_t>cell_bytes << 24) ^ (<uint64_t>key_bytes << 12) ^ cache_bytes \
        ^ (<uint64_t>LDD_MAX_KEYS << 5) ^ (<uint64_t>sizeof(ldd_lane) << 40)


cdef size_t table_bytes(size_t cell_bytes, size_t key_bytes, size_t cache_bytes) noexcept nogil:
    return (HEAD_BYTES + 2 * <size_t>LDD_MAX_CELLS * cell_bytes + <size_t>LDD_MAX_KEYS * key_bytes
            + <size_t>LDD_MAX_CACHES * cache_bytes)


cdef size_t desk_bytes() noexcept nogil:
    return DESK_HEAD_BYTES + <size_t>LDD_MAX_KEYS * sizeof(uint32_t)


cdef void place(ldd_board* board, void* table, size_t cell_bytes, size_t key_bytes) noexcept nogil:
    cdef char* at = <char*>table + HEAD_BYTES
    board.head = <ldd_board_head*>table
    board.cells[0] = at
    board.cells[1] = at + LDD_MAX_CELLS * cell_bytes
    board.entries = at + 2 * <size_t>LDD_MAX_CELLS * cell_bytes
    board.caches = at + 2 * <size_t>LDD_MAX_CELLS * cell_bytes + <size_t>LDD_MAX_KEYS * key_bytes


cdef ldd_status ldd_board_create(ldd_board* board, size_t cell_bytes, size_t key_bytes, size_t cache_bytes,
                                 ldd_detail* detail) noexcept nogil:
    cdef size_t size = table_bytes(cell_bytes, key_bytes, cache_bytes)
    cdef int fd = ldd_board_file(b"llm_datadist-table", size)
    cdef void* table
    memset(board, 0, sizeof(ldd_board))
    board.table_fd = board.desk_fd = -1
    board.cache_bytes = cache_bytes
    if fd < 0:
        return ldd_fail(detail, LDD_E_NO_MEMORY, b"cannot make a memory file for the cache table")
    table = ldd_board_mmap(fd, size, True)
    board.table_fd = ldd_board_read_only(fd)        # -1 without /proc: the table is then not shared
    close(fd)
    board.desk_fd = ldd_board_file(b"llm_datadist-desk", desk_bytes())
    if board.desk_fd >= 0:
        board.desk = <ldd_desk*>ldd_board_mmap(board.desk_fd, desk_bytes(), True)
    if table != NULL:
        place(board, table, cell_bytes, key_bytes)
        board.head.magic = layout_magic(cell_bytes, key_bytes, cache_bytes)
    if table == NULL or board.desk == NULL:
        ldd_board_unmap(board, size)
        return ldd_fail(detail, LDD_E_NO_MEMORY, b"cannot map %zu bytes of address space for the cache table", size)
    return LDD_OK


cdef void ldd_board_unmap(ldd_board* board, size_t size) noexcept nogil:
    if board.head != NULL:
        munmap(board.head, size)
    if board.desk != NULL:
        munmap(board.desk, desk_bytes())
    if board.table_fd >= 0:
        close(board.table_fd)
    if board.desk_fd >= 0:
        close(board.desk_fd)
    memset(board, 0, sizeof(ldd_board))
    board.table_fd = board.desk_fd = -1


cdef void ldd_board_destroy(ldd_board* board) noexcept nogil:
    cdef size_t size
    if board.head == NULL:
        return
    size = <size_t>board.caches + <size_t>LDD_MAX_CACHES * board.cache_bytes - <size_t>board.head
    ldd_board_unmap(board, size)


cdef ldd_status ldd_board_map(ldd_board* board, int table_fd, int desk_fd, size_t cell_bytes, size_t key_bytes,
                              size_t cache_bytes, ldd_detail* detail) noexcept nogil:
    cdef size_t size = table_bytes(cell_bytes, key_bytes, cache_bytes)
    cdef void* table
    memset(board, 0, sizeof(ldd_board))
    board.table_fd = board.desk_fd = -1
    board.cache_bytes = cache_bytes
    if not ldd_board_fits(table_fd, size) or not ldd_board_fits(desk_fd, desk_bytes()):
        return ldd_fail(detail, LDD_E_FAILED, b"the peer's table has another size than this build's")
    table = ldd_board_mmap(table_fd, size, False)
    board.desk = <ldd_desk*>ldd_board_mmap(desk_fd, desk_bytes(), True)
    if table != NULL:
        place(board, table, cell_bytes, key_bytes)
    if table == NULL or board.desk == NULL:
        ldd_board_unmap(board, size)
        return ldd_fail(detail, LDD_E_NO_MEMORY, b"cannot map %zu bytes of address space for a peer's table", size)
    if board.head.magic != layout_magic(cell_bytes, key_bytes, cache_bytes):
        ldd_board_unmap(board, size)
        return ldd_fail(detail, LDD_E_FAILED, b"the peer's table has another layout than this build's")
    return LDD_OK


cdef ldd_lane* ldd_lane_create(int* fd) noexcept nogil:
    cdef ldd_lane* lane
    fd[0] = ldd_board_file(b"llm_datadist-lane", LANE_BYTES)
    if fd[0] < 0:
        return NULL
    lane = <ldd_lane*>ldd_board_mmap(fd[0], LANE_BYTES, True)
    if lane == NULL:
        close(fd[0])
        fd[0] = -1
    return lane


cdef ldd_lane* ldd_lane_map(int fd) noexcept nogil:
    return <ldd_lane*>ldd_board_mmap(fd, LANE_BYTES, True) if ldd_board_fits(fd, LANE_BYTES) else NULL


cdef void ldd_lane_unmap(ldd_lane* lane) noexcept nogil:
    if lane != NULL:
        munmap(lane, LANE_BYTES)


cdef void ldd_peek_free(ldd_peek* peek) noexcept nogil:
    if peek == NULL:
        return
    ldd_lane_unmap(peek.lane)
    ldd_board_destroy(&peek.board)
    free(peek.known_addrs)
    free(peek)
