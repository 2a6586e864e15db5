"""CRC32C as Python functions, and how many flipped bits it finds."""
from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t

cdef extern from "llm_datadist/ldd_crc32c.h" nogil:
    uint32_t ldd_crc32c_of(const void* data, size_t nbytes, bint by_table)


def crc32c(const uint8_t[::1] data, size_t start=0, bint by_table=False):
    """The checksum of data from `start` on."""
    return ldd_crc32c_of(&data[0] + start if start < <size_t>data.shape[0] else NULL, data.shape[0] - start, by_table)


def count_found_flips(uint8_t[::1] data, size_t block_bytes, uint32_t num_flips, uint64_t seed):
    """Flip one bit of one block at a time; of how many every checksum but that block's stayed, and its own did not."""
    cdef size_t num_blocks = data.shape[0] // block_bytes, at, block, other
    cdef uint32_t _i, found = 0
    cdef uint32_t sums[64]
    assert 2 <= num_blocks <= 64
    with nogil:
        for block in range(num_blocks):
            sums[block] = ldd_crc32c_of(&data[block * block_bytes], block_bytes, False)
        for _i in range(num_flips):
            seed ^= seed << 13
            seed ^= seed >> 7
            seed ^= seed << 17
            at = seed % (num_blocks * block_bytes)
            block = at // block_bytes
            other = (block + 1) % num_blocks
            data[at] ^= <uint8_t>(1 << (seed >> 40 & 7))
            found += (ldd_crc32c_of(&data[block * block_bytes], block_bytes, False) != sums[block]
                      and ldd_crc32c_of(&data[other * block_bytes], block_bytes, False) == sums[other])
            data[at] ^= <uint8_t>(1 << (seed >> 40 & 7))
    return found
