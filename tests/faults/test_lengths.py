"""Frames that announce absurd lengths are refused before anything is allocated for them."""
import socket

import pytest
from support.control_frames import HELLO, frame, hello, read_all
from support.link_steps import until

LENGTHS = (2**32 - 1, 2**31, (4 << 20) + 1)


def resident_bytes(node):
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1]) * 4096


@pytest.fixture(scope="module")
def owner(module_peers):
    return module_peers.start(1)


def test_a_thousand_absurd_lengths_take_no_memory(owner):
    def ask(length):
        with socket.create_connection(owner.address) as sock:
            sock.settimeout(20)
            sock.sendall(frame(HELLO, hello(), length=length))
            read_all(sock)                      # the owner ends it

    for length in LENGTHS:
        ask(length)                             # whatever a first one takes
    before = owner.call(resident_bytes)
    for number in range(1000):
        ask(LENGTHS[number % len(LENGTHS)])
    assert owner.call(resident_bytes) - before < 1 << 20
    assert until(lambda: not owner.stats()["links"])
