"""Where memory lies, and how it is copied: pools, cpu caches, swaps between host and device."""
import ctypes
import os

import numpy as np
import pytest
from cann import steps
from support.peer import engine_options
from support.strict import Strict, build

from llm_datadist import Cache, CacheDesc, DataType, LLMException, Placement

HUGE = 2 << 20
BLOCK = 4 << 20                 # large enough to be queued on a stream


@pytest.fixture
def engine(machines):
    return machines.start(2, options=engine_options(device_pool=64 << 20, host_pool=64 << 20))


def first_address(node):
    cache = node.cache_manager.allocate_cache(CacheDesc(1, [1, 4096], DataType.DT_UINT8))
    try:
        return cache.tensor_addrs[0]
    finally:
        node.cache_manager.deallocate_cache(cache)


def test_device_pools_start_at_a_huge_page_and_ask_for_huge_pages_first(engine):
    assert engine.call(first_address) % HUGE == 0       # the runtime itself promises no more than 64 bytes
    assert engine.call(steps.strict_noted, "policy") == 0


def test_host_pools_are_pinned_by_the_runtime(engine):
    made = [call.function for call in engine.call(steps.strict_calls)]
    assert made.count("aclrtMallocHost") == 1


def swap_around(node):
    """Caches on host and device, each copied into the next; what the last one holds."""
    desc = {placement: CacheDesc(1, [2, BLOCK], DataType.DT_UINT8, placement) for placement in Placement}
    memory = np.full(2 * BLOCK, 5, np.uint8)
    cpu = Cache.create_cpu_cache(desc[Placement.HOST], [memory.ctypes.data])
    back = np.zeros(2 * BLOCK, np.uint8)
    last = Cache.create_cpu_cache(desc[Placement.HOST], [back.ctypes.data])
    manager = node.cache_manager
    host, device = (manager.allocate_blocks_cache(desc[placement]) for placement in (Placement.HOST, Placement.DEVICE))
    other = manager.allocate_blocks_cache(desc[Placement.DEVICE])
    for src, dst in ((cpu, device), (device, host), (host, other), (other, last)):
        manager.swap_blocks(src, dst, {0: 1, 1: 0})
        memory[:] = 0                                   # nothing looks there again
    manager.copy_blocks(device, {0: [1]})
    manager.copy_blocks(host, {0: [1]})
    for cache in (host, device, other):
        manager.deallocate_blocks_cache(cache)
    return set(back.tolist())


def test_copies_between_host_and_device_name_the_kind_that_the_runtime_wants(engine):
    assert engine.call(swap_around, limit_s=60.0) == {5}
    assert {call.code for call in engine.call(steps.strict_calls) if call.function.startswith("aclrtMemcpy")} == {0}


def late_copy(node):
    """Copy by the stream, whose end comes late; the error, and how often the end was waited for."""
    desc = CacheDesc(1, [2, BLOCK], DataType.DT_UINT8)
    cache = node.cache_manager.allocate_blocks_cache(desc)
    strict = Strict()
    strict.forget()
    strict.fail("aclrtSynchronizeStreamWithTimeout", 1, 507046)
    try:
        node.cache_manager.copy_blocks(cache, {0: [1]})
    except LLMException as error:
        waits = [call.code for call in strict.calls() if call.function == "aclrtSynchronizeStreamWithTimeout"]
        return error.status_code.name, waits
    finally:
        node.cache_manager.deallocate_blocks_cache(cache)
    return "", []


def test_copies_that_cannot_be_dropped_have_ended_before_their_memory_is_free(machines, tmp_path):
    home = build(tmp_path / "cann", hidden=("aclrtStreamAbort",))
    engine = machines.start(2, options=engine_options(device_pool=64 << 20), home=home)
    assert engine.call(late_copy) == ("LLM_TIMEOUT", [507046, 0])


def register_too_much(node, num_bytes):
    """Register one tensor of so many bytes; the memory is not there, and must not be needed."""
    memory = ctypes.create_string_buffer(16)
    node.cache_manager.register_cache(CacheDesc(1, [1, num_bytes], DataType.DT_UINT8), [ctypes.addressof(memory)])


def test_a_registration_beyond_the_limit_is_refused_before_the_call(engine):
    with pytest.raises(ValueError, match=r"one registration of device memory has at most 53687091200 bytes"):
        engine.call(register_too_much, (50 << 30) + 1)


def register_device_memory(node):
    """Register memory of the runtime that starts at no multiple of 2 MiB."""
    runtime = ctypes.CDLL(f"{os.environ['ASCEND_HOME_PATH']}/lib64/libacl_rt.so")
    memory = ctypes.c_void_p()
    assert runtime.aclrtSetDevice(0) == 0
    assert runtime.aclrtMalloc(ctypes.byref(memory), ctypes.c_size_t(HUGE), 0) == 0
    try:
        cache = node.cache_manager.register_cache(CacheDesc(1, [1, 4096], DataType.DT_UINT8), [memory.value])
        node.cache_manager.unregister_cache(cache.cache_id)
    finally:
        assert runtime.aclrtFree(memory) == 0
        assert runtime.aclrtResetDevice(0) == 0


@pytest.mark.parametrize(("kind", "page_bytes", "is_allowed"), [
    ("device-hccs", 4096, False), ("device-hccs", HUGE, True), ("device-roce", 4096, True)])
def test_hccs_takes_memory_on_huge_pages_alone(machines, kind, page_bytes, is_allowed):
    engine = machines.start(2, kind, strange=False, LDD_STRICT_PAGE_BYTES=str(page_bytes))
    if is_allowed:
        engine.call(register_device_memory)
    else:
        with pytest.raises(ValueError, match="HCCS needs huge pages"):
            engine.call(register_device_memory)
