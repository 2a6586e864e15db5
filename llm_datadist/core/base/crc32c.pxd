"""CRC32C; see ``ldd_crc32c.h``."""
from libc.stddef cimport size_t
from libc.stdint cimport uint32_t

cdef uint32_t ldd_crc32c(const void* data, size_t nbytes) noexcept nogil
