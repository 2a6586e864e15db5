"""What this machine does at best: a reference for benchmarks, used by nothing else.

The copies here share no code with the providers. They get their descriptors beforehand, so that nothing but moving
bytes is timed: plain ``memcpy``, stores that bypass the cache, and ``process_vm_readv``/``writev``, each by a team of
threads that divide the bytes among them in chunks. Times are taken in C, around the work alone.

Addresses are the caller's and are followed as given: a wrong one ends the process. Objects are for one thread at a
time, own their threads, and release the GIL while they work.
"""
cimport cython
from libc.errno cimport EFAULT, errno
from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

import os

from llm_datadist.core.base.status cimport ldd_status
from llm_datadist.core.base.sync cimport ldd_now_ns

cdef extern from "team.h" nogil:
    enum:
        BOUND_MAX_THREADS
    ctypedef struct bound_desc:
        uint64_t src
        uint64_t dst
        uint64_t length
    ctypedef struct bound_team:
        pass
    ctypedef void (*bound_work)(void* context, int index) noexcept nogil
    ldd_status bound_team_start(bound_team* team, int num_threads)
    void bound_team_run(bound_team* team, bound_work work, void* context)
    void bound_team_stop(bound_team* team)

cdef extern from "<sys/types.h>" nogil:
    ctypedef int pid_t

cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void* iov_base
        size_t iov_len
    ssize_t process_vm_readv(pid_t pid, const iovec* local, unsigned long num_local, const iovec* remote,
                             unsigned long num_remote, unsigned long flags)
    ssize_t process_vm_writev(pid_t pid, const iovec* local, unsigned long num_local, const iovec* remote,
                              unsigned long num_remote, unsigned long flags)

cdef extern from * nogil:
    """
    #if defined(__x86_64__)
    #include <immintrin.h>
    #endif

    #if defined(__x86_64__)
    __attribute__((target("avx2"))) static void bound_stream_lines(char *dst, const char *src, size_t n) {
        for (size_t i = 0; i < n; i += 64) {
            __m256i low = _mm256_loadu_si256((const __m256i *)(src + i));
            __m256i high = _mm256_loadu_si256((const __m256i *)(src + i + 32));
            _mm256_stream_si256((__m256i *)(dst + i), low);
            _mm256_stream_si256((__m256i *)(dst + i + 32), high);
        }
        _mm_sfence();
    }
    static int bound_has_stream(void) { return __builtin_cpu_supports("avx2") != 0; }
    #elif defined(__aarch64__)
    static void bound_stream_lines(char *dst, const char *src, size_t n) {
        for (size_t i = 0; i < n; i += 64) {
            __asm__ volatile("ldp q0, q1, [%1]\\n\\t"
                             "ldp q2, q3, [%1, #32]\\n\\t"
                             "stnp q0, q1, [%0]\\n\\t"
                             "stnp q2, q3, [%0, #32]"
                             :
                             : "r"(dst + i), "r"(src + i)
                             : "v0", "v1", "v2", "v3", "memory");
        }
    }
    static int bound_has_stream(void) { return 1; }
    #else
    static void bound_stream_lines(char *dst, const char *src, size_t n) { memcpy(dst, src, n); }
    static int bound_has_stream(void) { return 0; }
    #endif

    /* Whole cache lines of the destination bypass the cache; what is left at either end does not. */
    static void bound_stream_copy(char *dst, const char *src, size_t n) {
        size_t head = (size_t)(-(uintptr_t)dst & 63), lines;
        if (n < head + 64) {
            memcpy(dst, src, n);
            return;
        }
        lines = (n - head) & ~(size_t)63;
        memcpy(dst, src, head);
        bound_stream_lines(dst + head, src + head, lines);
        memcpy(dst + head + lines, src + head + lines, n - head - lines);
    }

    #define bound_claim(counter) __atomic_fetch_add((counter), 1, __ATOMIC_RELAXED)
    """
    int bound_has_stream()
    void bound_stream_copy(char* dst, const char* src, size_t n)
    size_t bound_claim(size_t* counter)

cdef enum:
    MIN_CHUNK_BYTES = 1 << 18
    MAX_CHUNK_BYTES = 1 << 20
    IOVECS = 256                                # per system call; 64 to 1024 make no difference worth having

cdef enum bound_kernel:
    KERNEL_MEMCPY
    KERNEL_STREAM
    KERNEL_VM_READ
    KERNEL_VM_WRITE

_KERNELS = {"memcpy": KERNEL_MEMCPY, "stream": KERNEL_STREAM, "vm_read": KERNEL_VM_READ, "vm_write": KERNEL_VM_WRITE}

# `length` bytes from byte `offset` of descriptor `first` on.
ctypedef struct bound_chunk:
    size_t first
    uint64_t offset
    uint64_t length

ctypedef struct bound_job:
    const bound_desc* descs
    const bound_chunk* chunks
    size_t num_chunks
    size_t next                                 # atomic
    bound_kernel kernel
    pid_t pid
    int error                                   # errno of a failed chunk


def has_stream_copy():
    """Return whether this processor has stores that bypass the cache, as far as the "stream" kernel knows."""
    return bool(bound_has_stream())


@cython.final
cdef class CopyBound:
    """The same descriptors moved by the kernel of your choice.

    Parameters
    ----------
    descs : buffer of uint64, shape (n, 3), C-contiguous
        Rows (source address, destination address, bytes).
    num_threads : int
        1 to 64, the calling thread included.
    pid : int, optional
        The process whose memory "vm_read" reads sources from and "vm_write" writes destinations to.
    num_parts : int, optional
        Cut the rows into as many parts of equal number, each of which is moved on its own.
    """
    cdef const uint64_t[:, ::1] _rows           # whose memory the descriptors are read from
    cdef const bound_desc* _descs
    cdef size_t _num_descs
    cdef bound_chunk* _chunks
    cdef size_t* _part_ends                     # in chunks
    cdef readonly size_t num_parts
    cdef bound_team _team
    cdef bound_job _job
    cdef readonly uint64_t num_bytes

    def __cinit__(self):
        memset(&self._team, 0, sizeof(self._team))

    def __init__(self, descs, int num_threads, int pid=0, size_t num_parts=1):
        cdef ldd_status status
        cdef size_t i
        if self._part_ends != NULL:
            raise RuntimeError("a CopyBound is initialised once")
        if not 1 <= num_threads <= BOUND_MAX_THREADS:
            raise ValueError(f"num_threads={num_threads} is not allowed; it must be 1 to {BOUND_MAX_THREADS}")
        self._rows = descs
        self._num_descs = self._rows.shape[0]
        if self._rows.shape[1] != 3:
            raise ValueError(f"descriptors have shape ({self._num_descs}, {self._rows.shape[1]}); (n, 3) is needed")
        self._descs = <const bound_desc*>&self._rows[0, 0] if self._num_descs else NULL
        self.num_bytes = 0
        for i in range(self._num_descs):
            self.num_bytes += self._descs[i].length
        if num_parts < 1 or self._num_descs % num_parts:
            raise ValueError(f"num_parts={num_parts} does not divide {self._num_descs} descriptors")
        self.num_parts = num_parts
        self._part_ends = <size_t*>malloc(num_parts * sizeof(size_t))
        self._chunks = <bound_chunk*>malloc(
            (self.num_bytes // MIN_CHUNK_BYTES + self._num_descs + 1) * sizeof(bound_chunk))
        if self._part_ends == NULL or self._chunks == NULL:
            raise MemoryError()
        self._cut(num_threads)
        self._job.pid = pid
        with nogil:
            status = bound_team_start(&self._team, num_threads)
        if status < 0:
            raise MemoryError("cannot start the threads of a reference copy")

    def __dealloc__(self):
        with nogil:
            bound_team_stop(&self._team)
        free(self._part_ends)
        free(self._chunks)

    cdef void _cut(self, int num_threads) noexcept:
        """Cut each part into chunks of about equal length, several per thread; one thread takes a part at once."""
        cdef size_t per_part = self._num_descs // self.num_parts, part, i, at, end, count = 0
        cdef uint64_t total, want, offset, left, room
        cdef bound_chunk* chunk
        for part in range(self.num_parts):
            at = part * per_part
            end = at + per_part
            total = 0
            for i in range(at, end):
                total += self._descs[i].length
            want = total
            if num_threads > 1:
                want = min(max(total // (8 * <uint64_t>num_threads), <uint64_t>MIN_CHUNK_BYTES),
                           <uint64_t>MAX_CHUNK_BYTES)
            offset = 0
            while at < end:
                chunk = &self._chunks[count]
                count += 1
                chunk.first = at
                chunk.offset = offset
                chunk.length = 0
                while at < end and (chunk.length < want or self._descs[at].length == offset):
                    left = self._descs[at].length - offset
                    room = want - chunk.length
                    if left > room:
                        offset += room
                        chunk.length += room
                    else:
                        offset = 0
                        chunk.length += left
                        at += 1
            self._part_ends[part] = count

    def run(self, str kernel, size_t part=0):
        """Move one part once; by default there is one and it is everything.

        Parameters
        ----------
        kernel : {"memcpy", "stream", "vm_read", "vm_write"}
        part : int, optional
            0 .. `num_parts` - 1.

        Returns
        -------
        int
            Nanoseconds it took.

        Raises
        ------
        OSError
            The kernel refused to touch the other process.
        """
        cdef int64_t took_ns
        cdef size_t first
        if part >= self.num_parts:
            raise ValueError(f"part={part}: there are {self.num_parts}")
        first = self._part_ends[part - 1] if part else 0
        self._job.kernel = <bound_kernel><int>_KERNELS[kernel]
        self._job.descs = self._descs
        self._job.chunks = self._chunks + first
        self._job.num_chunks = self._part_ends[part] - first
        self._job.next = 0
        self._job.error = 0
        with nogil:
            took_ns = ldd_now_ns()
            if self._job.num_chunks == 1:
                _move_chunks(&self._job, 0)
            else:
                bound_team_run(&self._team, _move_chunks, &self._job)
            took_ns = ldd_now_ns() - took_ns
        if self._job.error:
            raise OSError(self._job.error, f"{kernel}: {os.strerror(self._job.error)}")
        return took_ns

    def run_each(self):
        """Copy the descriptors one after the other with ``memcpy``, in this thread.

        Returns
        -------
        list of int
            Nanoseconds of each, reading the clock included.
        """
        cdef size_t i
        cdef int64_t before, after
        cdef int64_t* took = <int64_t*>malloc(max(self._num_descs, <size_t>1) * sizeof(int64_t))
        if took == NULL:
            raise MemoryError()
        try:
            with nogil:
                before = ldd_now_ns()
                for i in range(self._num_descs):
                    memcpy(<void*>self._descs[i].dst, <const void*>self._descs[i].src, self._descs[i].length)
                    after = ldd_now_ns()
                    took[i] = after - before
                    before = after
            return [took[i] for i in range(self._num_descs)]
        finally:
            free(took)


# ------------------------------------------------------------------------------------------------------ kernels

cdef void _move_chunks(void* context, int index) noexcept nogil:
    cdef bound_job* job = <bound_job*>context
    cdef size_t at
    while True:
        at = bound_claim(&job.next)
        if at >= job.num_chunks:
            return
        if job.kernel == KERNEL_MEMCPY or job.kernel == KERNEL_STREAM:
            _copy_chunk(job, &job.chunks[at])
        else:
            _vm_chunk(job, &job.chunks[at])


cdef void _copy_chunk(const bound_job* job, const bound_chunk* chunk) noexcept nogil:
    cdef const bound_desc* desc = job.descs + chunk.first
    cdef uint64_t offset = chunk.offset, left = chunk.length, part
    while left > 0:
        part = min(left, desc.length - offset)
        if job.kernel == KERNEL_STREAM:
            bound_stream_copy(<char*>(desc.dst + offset), <const char*>(desc.src + offset), part)
        else:
            memcpy(<void*>(desc.dst + offset), <const void*>(desc.src + offset), part)
        left -= part
        offset = 0
        desc += 1


cdef void _vm_chunk(bound_job* job, const bound_chunk* chunk) noexcept nogil:
    cdef iovec src[IOVECS]
    cdef iovec dst[IOVECS]
    cdef const bound_desc* desc = job.descs + chunk.first
    cdef uint64_t offset = chunk.offset, left = chunk.length, part, batch
    cdef ssize_t moved
    cdef size_t n
    while left > 0:
        n = 0
        batch = 0
        while left > 0 and n < IOVECS:
            part = min(left, desc.length - offset)
            src[n].iov_base = <void*>(desc.src + offset)
            dst[n].iov_base = <void*>(desc.dst + offset)
            src[n].iov_len = dst[n].iov_len = part
            n += 1
            batch += part
            left -= part
            offset = 0
            desc += 1
        if job.kernel == KERNEL_VM_READ:
            moved = process_vm_readv(job.pid, dst, n, src, n, 0)
        else:
            moved = process_vm_writev(job.pid, src, n, dst, n, 0)
        if moved != <ssize_t>batch:             # a part is as bad as nothing: the time would mean something else
            job.error = errno if moved < 0 else EFAULT
            return
