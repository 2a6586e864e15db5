"""What peers may map: nobody but the owner can write its table, and nothing that is written there moves the owner."""
import ctypes
import json
import os
import random
import subprocess
import sys
import textwrap

import pytest
from support.denied import need_limited_address_space
from support.scripts import output_of

from llm_datadist_probes.table import CacheTable, PagePool

KEY_REQ, KEY_PREFIX, KEY_BLOCKS, KEY_BY_ID = range(4)
BASE = 1 << 40

# What succeeds of all the ways to write a file by its descriptor; run in a process of its own.
ATTACK = textwrap.dedent("""
    import ctypes, json, mmap, os, sys
    fd, size = int(sys.argv[1]), int(sys.argv[2])
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
    opened = {"given": fd}
    for name, path, mode in [("again", f"/proc/self/fd/{fd}", None), ("after chmod", f"/proc/self/fd/{fd}", 0o777),
                             ("by the parent", f"/proc/{os.getppid()}/fd/{fd}", None)]:
        try:
            if mode is not None:
                os.fchmod(fd, mode)
            opened[name] = os.open(path, os.O_RDWR)
        except OSError:
            pass
    def can(function, *args):
        try:
            function(*args)
        except OSError:
            return False
        return True
    def map_for_writing(fd):
        mmap.mmap(fd, size).close()
    def make_writable(fd):
        at = libc.mmap(None, 4096, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
        if at in (None, 2**64 - 1) or libc.mprotect(at, 4096, mmap.PROT_READ | mmap.PROT_WRITE):
            raise OSError
    def punch(fd):
        if libc.fallocate(fd, 3, 0, 4096):
            raise OSError
    found = []
    for name, file in opened.items():
        for what in (map_for_writing, make_writable, punch):
            if can(what, file):
                found.append((name, what.__name__))
        if can(os.pwrite, file, b"x", size - 1):
            found.append((name, "write"))
        if can(os.ftruncate, file, 0) or can(os.ftruncate, file, 2 * size):
            found.append((name, "resize"))
    print(json.dumps([sorted(opened), found]))
""")


def attack(fd, size):
    done = subprocess.run([sys.executable, "-c", ATTACK, str(fd), str(size)], pass_fds=(fd,), text=True, check=True,
                          capture_output=True, timeout=60)
    return json.loads(done.stdout)


@pytest.fixture
def table():
    made = CacheTable()
    if made.shared_memory() is None:
        pytest.skip("this kernel cannot seal memory files against later writers")
    return made


def test_no_other_process_can_write_the_table(table):
    """However it opens the file anew; the same ways do open one that peers are meant to write."""
    _, size, table_fd, marks_fd = table.shared_memory()
    _, found = attack(table_fd, size)
    assert found == []
    assert os.fstat(table_fd).st_mode & 0o222 == 0 or os.geteuid() == 0     # root was let to change the mode above
    opened, found = attack(marks_fd, os.fstat(marks_fd).st_size)
    assert "again" in opened and ["again", "map_for_writing"] in found and ["given", "make_writable"] in found
    assert not [what for _, what in found if what == "resize"]


def test_the_owner_believes_nothing_that_lies_there(table):
    """Its own table under whatever is written into the shared one, by somebody who can."""
    address, size, _, _ = table.shared_memory()
    rng, pool = random.Random(4), PagePool(BASE, 4096 << 9, 9)
    garbage = [b"\xff" * (1 << 20), bytes(1 << 20), rng.randbytes(1 << 20)]
    ids, bound = [], []
    for turn in range(60):
        keys = [(slot, KEY_REQ, turn * 8 + slot, 1) for slot in range(8)]
        ids.append(table.allocate(pool, 3, 8, 64, keys)[0])
        bound += [key[2] for key in keys]
        for at in range(0, min(size, 24 << 20), 1 << 20):
            ctypes.memmove(address + at, garbage[turn % 3], 1 << 20)
        for _ in range(8):
            name = bound.pop(rng.randrange(len(bound)))
            pin = table.resolve(KEY_REQ, name, 1)
            assert (pin.batch_index, pin.num_slots, pin.tensor_bytes) == (name % 8, 8, 64)
            assert pin.cache_id == ids[name // 8] and all(BASE <= addr < BASE + (4096 << 9) for addr in pin.addrs)
            if rng.randrange(2):
                table.remove_key(KEY_REQ, name, 1)
            else:
                table.take(pin.key, 0, 3)
            table.unpin(pin)
        if turn % 2:
            table.deallocate(ids[rng.randrange(len(ids))])
    for cache_id in ids:
        table.deallocate(cache_id)
    for name in bound:
        table.remove_key(KEY_REQ, name, 1)
    stats = table.stats()
    assert not any(value for name, value in stats.items() if name != "key_bytes"), stats
    assert pool.free_bytes == 4096 << 9


def test_more_keys_than_the_shared_table_holds(table):
    """Peers are told to ask; the owner finds and frees all of them as before."""
    pool, batch, turns = PagePool(BASE, 1 << 22, 9), 1 << 16, 33
    mask = ctypes.c_uint32.from_address(table.shared_memory()[0] + 24)
    for turn in range(turns):
        table.allocate(pool, 1, batch, batch, [(slot, KEY_REQ, turn * batch + slot, 0) for slot in range(batch)])
        assert (mask.value == 2**32 - 1) == (turn >= 31)         # each cache has a key of its own, too: by its id
    for name in range(0, batch * turns, 9999):
        pin = table.resolve(KEY_REQ, name)
        assert (pin.cache_id, pin.batch_index) == (name // batch + 1, name % batch)
        table.unpin(pin)
    table.clear(5000)
    assert table.stats()["num_keys"] == 0 and pool.free_bytes == 1 << 22
    assert mask.value == 2**32 - 1


def test_engine_without_room_for_a_shared_table():
    """A limit on address space turns sharing off, and nothing else."""
    need_limited_address_space()
    assert output_of("""
        import resource
        from llm_datadist_probes.table import CacheTable, PagePool
        with open("/proc/self/statm") as statm:
            used = int(statm.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (24 << 20),) * 2)
        table, pool = CacheTable(), PagePool(1 << 40, 64 << 9, 9)
        print(table.shared_memory())
        cache_id, _ = table.allocate(pool, 2, 4, 64, [(1, 0, 7, 0)])
        pin = table.resolve(0, 7)
        print(pin.cache_id == cache_id, pin.batch_index)
        table.unpin(pin)
        table.deallocate(cache_id)
        table.remove_key(0, 7, 0)
        print(table.stats()["num_owned"], pool.free_bytes == 64 << 9)
    """).split("\n")[:3] == ["None", "True 1", "0 True"]
