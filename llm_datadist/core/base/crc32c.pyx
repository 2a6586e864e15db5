"""CRC32C, here once for all that need it: its tables are 12 KiB."""

cdef extern from "llm_datadist/ldd_crc32c.h" nogil:
    uint32_t ldd_crc32c_of(const void* data, size_t nbytes, bint by_table)


cdef uint32_t ldd_crc32c(const void* data, size_t nbytes) noexcept nogil:
    return ldd_crc32c_of(data, nbytes, False)
