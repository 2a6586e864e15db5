"""CRC32C: by the instruction and by tables, against known values and a slow one written down here."""
import random

import pytest

from llm_datadist_probes.crc32c import count_found_flips, crc32c

# RFC 3720, appendix B.4, as numbers; and the usual check value.
KNOWN = [
    (bytes(32), 0x8A9136AA),
    (b"\xff" * 32, 0x62A8AB43),
    (bytes(range(32)), 0x46DD794E),
    (bytes(range(31, -1, -1)), 0x113FDB5C),
    (b"123456789", 0xE3069283),
]
LANE = 1024
RANDOM = random.Random(5)


def slow(data):
    register = 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ (0x82F63B78 if register & 1 else 0)
    return register ^ 0xFFFFFFFF


@pytest.mark.parametrize("by_table", [False, True])
def test_known_values(by_table):
    for data, value in KNOWN:
        assert crc32c(data, 0, by_table) == value == slow(data)
    assert crc32c(b"x", 1, by_table) == 0


@pytest.mark.parametrize("size", [1, 7, 8, 9, 63, 3 * LANE - 1, 3 * LANE, 3 * LANE + 1, 6 * LANE + 13, 9 * LANE + 8])
def test_every_length_and_place(size):
    data = RANDOM.randbytes(size + 8)
    for start in range(8):
        end = data[:start + size]
        assert crc32c(end, start) == crc32c(end, start, True) == slow(end[start:])


def test_every_flipped_bit_is_found_in_its_block_alone():
    """10^5 flips of one bit in blocks of a size that uses the lanes, and not only these."""
    data = bytearray(RANDOM.randbytes(16 * (3 * LANE + 40)))
    before = bytes(data)
    assert count_found_flips(data, 3 * LANE + 40, 100_000, 77) == 100_000
    assert data == before
