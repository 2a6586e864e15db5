"""What a linked process can do on the data port of an owner, past every request: only what the caches allow."""
from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import struct

import pytest
from support.control_frames import HELLO, WELCOME, WELCOME_HEAD, frame, hello, read_frame
from support.hixl_frames import ADMIN, DATA, GET, LIST, PUT, REGION, Wire
from support.peer import engine_options

from llm_datadist import CacheDesc, DataType, Placement

NBYTES = 4096
DESC = CacheDesc(1, [4, NBYTES // 16], DataType.DT_FLOAT, Placement.DEVICE)


def register(node, accessible, byte):
    """A registered cache full of one byte; its address."""
    buffer = (ctypes.c_uint8 * NBYTES)(*[byte] * NBYTES)
    cache = node.cache_manager.register_cache(DESC, [ctypes.addressof(buffer)], remote_accessible=accessible)
    node.kept["buffer", byte], node.kept["cache", byte] = buffer, cache
    return ctypes.addressof(buffer)


def unregister(node, byte):
    node.cache_manager.unregister_cache(node.kept["cache", byte].cache_id)


def register_again(node, address):
    node.kept["again"] = node.cache_manager.register_cache(DESC, [address], remote_accessible=True)


def unregister_again(node):
    node.cache_manager.unregister_cache(node.kept.pop("again").cache_id)


def holds(node, byte):
    return bytes(node.kept["buffer", byte]) == bytes([byte]) * NBYTES


class Raw:
    """A link made by hand, and a session on the data port that obeys no rule of the API."""

    def __init__(self, stack, owner, mode):
        token, self.client = os.urandom(16), os.urandom(16)
        control = stack.enter_context(socket.create_connection(owner.address, timeout=10))
        control.sendall(frame(HELLO, hello(token=token, mode=mode, expected=owner.cluster_id)))
        type_, answer = read_frame(control)
        assert type_ == WELCOME and WELCOME_HEAD.unpack_from(answer)[0] == 0
        port = struct.unpack_from("<I", answer, WELCOME_HEAD.size)[0]
        self.admin = stack.enter_context(Wire(port))
        welcome = self.admin.hello(ADMIN, self.client, token=token)
        assert welcome[3] == 0
        self.data = stack.enter_context(Wire(port))
        assert self.data.hello(DATA, self.client, welcome[4], token=token)[3] == 0

    def regions(self):
        """Address -> (region, generation, bytes) of all that is announced."""
        self.admin.request(LIST)
        status, _, size, _ = self.admin.reply()
        assert status == 0
        payload, found, at = self.admin.receive(size), {}, 0
        while at < size:
            region, generation, address, nbytes, _, _, _, tag_bytes, _ = REGION.unpack_from(payload, at)
            found[address] = (region, generation, nbytes)
            at += REGION.size + tag_bytes
        return found

    def get(self, region, generation, size=16):
        self.data.request(GET, [(region, generation, 0, size)], size)
        status, _, size, _ = self.data.reply()
        return self.data.receive(size) if status == 0 else None

    def put(self, region, generation, data):
        self.data.request(PUT, [(region, generation, 0, len(data))], len(data), data=data)
        return self.data.reply()[0] == 0


@pytest.mark.parametrize("first", [True, False], ids=["accessible first", "accessible last"])
def test_memory_that_is_not_accessible_is_out_of_reach(peers, first):
    owner = peers.start(1, engine_options(remote_accessible=True))
    addresses = {accessible: owner.call(register, accessible, 0x10 + accessible) for accessible in (first, not first)}
    with contextlib.ExitStack() as stack:
        raw = Raw(stack, owner, 1)
        regions = raw.regions()
        assert addresses[True] in regions and addresses[False] not in regions
        assert not any(start <= addresses[False] < start + nbytes for start, (_, _, nbytes) in regions.items())
        assert raw.get(*regions[addresses[True]][:2]) == b"\x11" * 16
        # Every name that the region might have been given: none leads there.
        first_known = min(generation for _, generation, _ in regions.values())
        generations = range(first_known - 8, first_known + 8)
        known = {entry[:2] for entry in regions.values()}
        for name in ((region, generation) for region in range(8) for generation in generations):
            if name not in known:
                assert raw.get(*name) is None and not raw.put(*name, b"attack!!")
        assert owner.call(holds, 0x10) and owner.call(holds, 0x11)
    for byte in (0x10, 0x11):
        owner.call(unregister, byte)


def test_memory_registered_twice_is_as_accessible_as_its_caches(peers):
    """The accessible one opens the memory, and its end closes it."""
    owner = peers.start(1, engine_options(remote_accessible=True))
    address = owner.call(register, False, 0x20)
    owner.call(register_again, address)
    with contextlib.ExitStack() as stack:
        raw = Raw(stack, owner, 1)
        assert address in raw.regions()
        owner.call(unregister_again)
        assert address not in raw.regions()
    owner.call(unregister, 0x20)


def test_two_sided_caches_are_announced(peers):
    """There a push by address may write to any of them, under a lease."""
    owner = peers.start(1, engine_options(remote_accessible=False))
    address = owner.call(register, False, 0x30)
    with contextlib.ExitStack() as stack:
        assert address in Raw(stack, owner, 0).regions()
    owner.call(unregister, 0x30)
