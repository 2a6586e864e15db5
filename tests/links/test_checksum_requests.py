"""Requests for checksums, by hand: right for leased memory, refused for any other, and bounded."""
import contextlib
import os
import struct

import pytest
from links.test_intruders import addresses, link_by_hand
from support.control_frames import CHECKSUM, CHECKSUMS, LEASE, RANGES, RELEASE, frame, read_frame
from support.link_steps import BLOCK_BYTES, DESC, offer, until, withdraw
from transfers.caches import bytes_at

from llm_datadist_probes.crc32c import crc32c

PARAM_INVALID = -2


@pytest.fixture(scope="module")
def owner(module_peers):
    owner = module_peers.start(1)
    owner.call(offer)
    yield owner
    owner.call(withdraw)


@contextlib.contextmanager
def leased(owner, *ranges):
    """A link by hand with a lease on ranges: the connection, and the lease's number."""
    with contextlib.ExitStack() as stack:
        sock, status = link_by_hand(stack, owner, token=os.urandom(16), cluster=95)
        assert status == 0
        sock.sendall(frame(RANGES, bytes(8) + b"".join(struct.pack("<QQ", *item) for item in ranges)))
        type_, payload = read_frame(sock)
        status, lease = struct.unpack_from("<iI", payload)
        assert (type_, status) == (LEASE, 0)
        yield sock, lease
    assert until(lambda: owner.stats()["pins"] == 0)


def ask(sock, lease, *ranges):
    """Status and checksums of ranges: address, bytes, number of the pin."""
    sock.sendall(frame(CHECKSUM, struct.pack("<II", lease, len(ranges))
                       + b"".join(struct.pack("<QII", *item) for item in ranges)))
    type_, payload = read_frame(sock)
    status, count, *sums = struct.unpack(f"<iI{len(ranges)}I", payload)
    assert type_ == CHECKSUMS and count == len(ranges)
    return status, sums


def test_checksums_of_leased_memory(owner):
    first, second = owner.call(addresses)[:2]
    with leased(owner, (first, 1), (second + 5, 1)) as (sock, lease):
        ranges = [(second + 7, 100, 1), (first, DESC.size, 0), (second, 1, 0), (first + BLOCK_BYTES, BLOCK_BYTES, 1)]
        status, sums = ask(sock, lease, *ranges)
        assert status == 0
        assert sums == [owner.call(checksum, address, count) for address, count, _ in ranges]


def checksum(node, address, count):
    return crc32c(bytes_at(address, count))


def test_refused(owner):
    found, size = owner.call(addresses), DESC.size
    first, second, last = found[0], found[1], max(found)
    most = 2 << 20
    with leased(owner, (first, 1)) as (sock, lease):
        for wrong in ([(first, size + 1, 0)], [(first - 1, 1, 0)], [(last + size, 1, 0)], [(first + size - 1, 2, 0)],
                      [(first, 0, 0)], [(first, 8, 1)], [(first, 8, 2**32 - 1)], [(4096, 8, 0)],
                      [(2**64 - 8, 16, 0)], [(first, 2**32 - 1, 0)], [(first, 8, 0), (4096, 8, 0)],
                      (most // size + 1) * [(first, size, 0)]):
            assert ask(sock, lease, *wrong)[0] == PARAM_INVALID, wrong
        assert ask(sock, lease, *(most // size * [(second, size, 0)]))[0] == 0
        assert ask(sock, lease + 1, (first, 8, 0))[0] == PARAM_INVALID
        assert ask(sock, 0, (first, 8, 0))[0] == PARAM_INVALID
        sock.sendall(frame(RELEASE, struct.pack("<IIII", lease, 0, 0, 0)))
        read_frame(sock)
        assert ask(sock, lease, (first, 8, 0))[0] == PARAM_INVALID
