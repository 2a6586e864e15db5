"""`KvCacheManager`: the role matrix, every row of the API's error tables, its codes, and its finaliser.

Bytes that move are compared in ``transfers/``; here a refused call leaves all of them, and everything else, alone.
"""
import gc
import os
import threading
import warnings

import numpy as np
import pytest
from support.engines import (
    BLOCKS,
    BY_ID,
    BYTES,
    CLUSTER,
    KEY,
    NO_ID,
    NOT_INT64,
    NOT_UINT32,
    NOT_UINT64,
    PEER,
    PREFIX,
    SLOT_BYTES,
    SLOTS,
    TENSORS,
    Synchronizer,
    desc,
    refused,
    rows,
)
from support.peer import engine_options_v1, finalize
from transfers.caches import bytes_at

from llm_datadist import (
    BlocksCacheKey,
    Cache,
    CacheDesc,
    CacheKey,
    CacheKeyByIdAndIndex,
    DataType,
    KvCache,
    KvCacheManager,
    LLMRole,
    LLMStatusCode,
    Placement,
    Tensor,
    TransferConfig,
)

HOST = Placement.HOST
ROLES = ["prompt", "decoder", "mix"]


@pytest.fixture
def bench(benches):
    return benches("prompt")


def config(**kwargs):
    return TransferConfig(**{"dst_cluster_id": PEER, "dst_addrs": [4096] * TENSORS, **kwargs})


def gone():
    """A handle of a cache that never was."""
    return KvCache(10**6, desc(), [[1] * TENSORS], None)


# ------------------------------------------------------------------------------------------------- role matrix

MATRIX = {
    "allocate_cache with keys": (lambda b: b.m.allocate_cache(desc(), [KEY]), {"prompt"}),
    "allocate_blocks_cache with a key": (lambda b: b.m.allocate_blocks_cache(desc(), BLOCKS), {"prompt", "mix"}),
    "allocate_cache without keys": (lambda b: b.m.allocate_cache(desc()), set(ROLES)),
    "allocate_cache with no key in the list": (lambda b: b.m.allocate_cache(desc(), []), set(ROLES)),
    "allocate_blocks_cache": (lambda b: b.m.allocate_blocks_cache(desc()), set(ROLES)),
    "deallocate_cache": (lambda b: b.m.deallocate_cache(gone()), set(ROLES)),
    "copy_cache": (lambda b: b.m.copy_cache(b.slots, b.slots, 1, 1), set(ROLES)),
    "copy_blocks": (lambda b: b.m.copy_blocks(b.blocks, {0: [0]}), set(ROLES)),
    "swap_blocks": (lambda b: b.m.swap_blocks(b.cpu, b.blocks, {}), set(ROLES)),
    "get_cache_tensors": (lambda b: b.m.get_cache_tensors(b.slots), set(ROLES)),
    "remove_cache_key": (lambda b: b.m.remove_cache_key(KEY), {"prompt"}),
    # There is no link: where the role permits the call, that is what is wrong with it.
    "pull_cache": (lambda b: b.m.pull_cache(KEY, b.slots), {"decoder"}),
    "pull_blocks": (lambda b: b.m.pull_blocks(BLOCKS, b.blocks, [0], [0]), {"decoder"}),
    "transfer_cache_async": (lambda b: b.m.transfer_cache_async(b.slots, Synchronizer(), [config()]), {"prompt"}),
    "check_link_status": (lambda b: b.dist.check_link_status(PEER), {"decoder"}),
}
NEEDS_LINK = {"pull_cache", "pull_blocks", "check_link_status"}


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("operation", MATRIX)
def test_role_matrix(benches, assert_raises, operation, role):
    call, roles = MATRIX[operation]
    bench = benches(role)
    with bench.unchanged():
        if role not in roles:
            error = assert_raises("PI", call, bench)
            assert f"LLMRole.{role.upper()}" in str(error)
        elif operation in NEEDS_LINK:
            assert_raises("NOT_YET_LINK", call, bench)
        else:
            result = call(bench)
            if isinstance(result, KvCache):
                bench.m.deallocate_cache(result)
                if role == "prompt":
                    bench.m.remove_cache_key(KEY)
            elif operation == "transfer_cache_async":
                assert result.synchronize() is LLMStatusCode.LLM_NOT_YET_LINK


@pytest.mark.parametrize("role", ["prompt", "mix"])
def test_pulls_check_the_role_before_anything_else(benches, assert_raises, role):
    for call in (lambda b: b.m.pull_cache(None, None), lambda b: b.m.pull_blocks(None, None, None, None),
                 lambda b: b.m.pull_cache("key", "cache", "0", "all")):
        refused(benches, assert_raises, role, call, "PI")


# -------------------------------------------------------------------------------------------------- allocation

@pytest.mark.parametrize("engine, call, kind", rows(
    (lambda b: b.m.allocate_cache("desc"), "TE"), (lambda b: b.m.allocate_cache(None), "AE"),
    (lambda b: b.m.allocate_cache(desc(), CacheKey(1, 1)), "TE"), (lambda b: b.m.allocate_cache(desc(), None), "TE"),
    (lambda b: b.m.allocate_cache(desc(), [BLOCKS]), "TE"), (lambda b: b.m.allocate_cache(desc(), [None]), "TE"),
    (lambda b: b.m.allocate_cache(desc(num_tensors=0)), "PI"),
    (lambda b: b.m.allocate_cache(desc(placement=HOST)), "PI"),
    (lambda b: b.m.allocate_cache(desc(shape=[0, 1])), "PI"),
    (lambda b: b.m.allocate_cache(desc(shape=[1] * 32)), "PI"),
    (lambda b: b.m.allocate_cache(desc(), [CacheKey(1, i) for i in range(SLOTS + 1)]), "PI"),
    (lambda b: b.m.allocate_cache(desc(shape=[1, 2 << 20]), [KEY]), "DEVICE_OUT_OF_MEMORY"),
    (lambda b: b.m.allocate_blocks_cache("desc"), "TE"), (lambda b: b.m.allocate_blocks_cache(None), "AE"),
    (lambda b: b.m.allocate_blocks_cache(desc(), KEY), "TE"),
    (lambda b: b.m.allocate_blocks_cache(desc(placement=HOST)), "PI"),
    (lambda b: b.m.allocate_blocks_cache(desc(num_tensors=0)), "PI"),
    (lambda b: b.m.allocate_blocks_cache(desc(), BlocksCacheKey(1, None)), "PI"),
    (lambda b: b.m.allocate_blocks_cache(desc(), BlocksCacheKey(1, 2**64)), "PI"),
    (lambda b: b.m.allocate_blocks_cache(desc(shape=[1, 2 << 20])), "DEVICE_OUT_OF_MEMORY"),
    (lambda b: b.m.deallocate_cache(1), "TE"), (lambda b: b.m.deallocate_cache(None), "AE"),
    (lambda b: b.m.deallocate_cache(b.cpu), "PI"),
    (lambda b: b.m.deallocate_cache(Cache(1, desc(), [1], None, False, False)), "TE"),
    (lambda b: b.m.remove_cache_key(1), "TE"), (lambda b: b.m.remove_cache_key(None), "AE"),
    (lambda b: b.m.remove_cache_key(BLOCKS), "TE"),
    engine="prompt",
))
def test_memory_refuses(benches, assert_raises, engine, call, kind):
    refused(benches, assert_raises, engine, call, kind)


def test_of_equal_keys_the_last_slot_counts(bench):
    with bench.unchanged():
        cache = bench.m.allocate_cache(desc(), [CacheKey(1, 5), CacheKey(1, 6), CacheKey(1, 5)])
        assert bench.dist.stats()["keys"] == 2
        for key in (CacheKey(1, 5), CacheKey(1, 6)):
            bench.m.remove_cache_key(key)
        bench.m.deallocate_cache(cache)


def test_a_bound_key_is_refused(bench, assert_raises):
    slots = bench.m.allocate_cache(desc(), [CacheKey(1, 5)])
    blocks = bench.m.allocate_blocks_cache(desc(), BLOCKS)
    with bench.unchanged():
        assert_raises("PI", bench.m.allocate_cache, desc(), [CacheKey(1, 4), CacheKey(1, 5)])
        assert_raises("PI", bench.m.allocate_blocks_cache, desc(), BLOCKS)
    bench.m.remove_cache_key(CacheKey(1, 5))
    for cache in (slots, blocks):
        bench.m.deallocate_cache(cache)


def test_deallocate_frees_either_layout_and_twice_is_nothing(bench):
    with bench.unchanged():
        for cache in (bench.m.allocate_cache(desc()), bench.m.allocate_blocks_cache(desc(), BLOCKS)):
            bench.m.deallocate_cache(cache)
            assert cache.per_device_tensor_addrs == [] and repr(cache).endswith("num_devices = 0)")
            bench.m.deallocate_cache(cache)
        bench.m.deallocate_cache(gone())


def test_a_key_outlives_its_handle(bench):
    with bench.unchanged():
        bench.m.deallocate_cache(bench.m.allocate_cache(desc(), [CacheKey(1, 5)]))
        assert bench.dist.stats()["deferred_caches"] == 1
        bench.m.remove_cache_key(CacheKey(1, 5))
        bench.m.remove_cache_key(CacheKey(1, 5))


def test_tensors_lie_at_multiples_of_512_bytes(bench):
    cache = bench.m.allocate_cache(CacheDesc(3, [1, 100], BYTES))
    (addrs,) = cache.per_device_tensor_addrs
    assert len(addrs) == 3 and all(address % 512 == 0 for address in addrs)
    assert repr(cache) == f"KvCache(cache_id = {cache.cache_id}, num_devices = 1)"
    bench.m.deallocate_cache(cache)


# --------------------------------------------------------------------------------------------------- finaliser

def test_a_handle_that_is_collected_frees_its_cache(bench):
    with bench.unchanged():
        bench.m.allocate_cache(desc())
        cycle = [bench.m.allocate_blocks_cache(desc(), BLOCKS)]
        cycle.append(cycle)
        del cycle
        gc.collect()


def test_an_array_keeps_its_handle(bench):
    with bench.unchanged():
        tensor = bench.m.allocate_cache(desc()).tensors()[0]
        gc.collect()
        tensor[:] = 1
        assert bench.dist.stats()["caches"] == 3
        del tensor
        gc.collect()


def test_a_handle_that_was_deallocated_frees_nothing_when_collected(bench):
    with bench.unchanged():
        first = bench.m.allocate_cache(desc())
        bench.m.deallocate_cache(first)
        del first
        gc.collect()


def test_a_handle_that_outlives_its_engine_does_nothing(benches, peers):
    benches.close()
    here = peers.here(CLUSTER, engine_options_v1(device_pool=1 << 20), role=LLMRole.PROMPT)
    dist = here.node.dist
    old = dist.kv_cache_manager.allocate_cache(desc())
    finalize(dist)
    dist.init(engine_options_v1(device_pool=1 << 20))
    new = dist.kv_cache_manager.allocate_cache(desc())
    assert new.cache_id == old.cache_id
    del old
    gc.collect()
    assert dist.stats()["caches"] == 1
    del new
    gc.collect()
    assert dist.stats()["caches"] == 0


def test_a_forked_child_frees_nothing(bench):
    with bench.unchanged():
        cache = bench.m.allocate_cache(desc())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)     # of fork with threads, which is what is tested
            pid = os.fork()
        if pid == 0:
            try:
                del cache
                gc.collect()
            finally:
                os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        bench.m.deallocate_cache(cache)


# ------------------------------------------------------------------------------------------------------- pulls

def given(**arguments):
    """Arguments of a call, by name."""
    return arguments


def pull(**kwargs):
    """A pull_cache that is right but for `kwargs`, and that there is no link."""
    return lambda b: b.m.pull_cache(**{"cache_key": KEY, "kv_cache": b.slots, **kwargs})


def pull_blocks(**kwargs):
    """A pull_blocks that is right but for `kwargs`, and that there is no link."""
    return lambda b: b.m.pull_blocks(**{"prompt_cache_key": BLOCKS, "decoder_kv_cache": b.blocks, "prompt_blocks": [0],
                                        "decoder_blocks": [1], **kwargs})


LAYERS = [
    *((given(tensor_num_per_layer=value), kind) for value, kind in NOT_UINT32), (given(tensor_num_per_layer=0), "PI"),
    *((given(src_layer_range=value), "TE") for value in ([0, 1], 1)), (given(dst_layer_range="01"), "TE"),
    (given(src_layer_range=range(0, 4, 2)), "PI"), (given(dst_layer_range=range(-1, 1)), "PI"),
    (given(src_layer_range=range(2), dst_layer_range=range(1)), "PI"), (given(src_layer_range=range(2**70)), "PI"),
    (given(src_layer_range=range(1), dst_layer_range=range(1), tensor_num_per_layer=3), "PI"),
]
OFFSETS = [("0", "TE"), (0.0, "TE"), ([0], "TE"), (-1, "VE"), (2**63, "VE")]


@pytest.mark.parametrize("engine, call, kind", rows(
    (pull(cache_key="key"), "TE"), (pull(cache_key=None), "AE"), (pull(cache_key=BLOCKS), "TE"),
    (pull(kv_cache="cache"), "TE"), (pull(kv_cache=None), "AE"), (lambda b: b.m.pull_cache(KEY, b.cpu), "PI"),
    *((pull(batch_index=value), kind) for value, kind in NOT_UINT32),
    *((pull(size=value), kind) for value, kind in NOT_INT64), (pull(size=0), "PI"), (pull(size=-2), "PI"),
    *((pull(src_cache_offset=value), kind) for value, kind in OFFSETS),
    *((pull(dst_cache_offset=value), kind) for value, kind in OFFSETS),
    (pull(cache_key=CacheKey(PEER, 1, 0, 2)), "PI"), (pull(cache_key=CacheKey(PEER, NO_ID)), "PI"),
    *((pull(**arguments), kind) for arguments, kind in LAYERS),
    (pull(), "NOT_YET_LINK"), (pull(cache_key=PREFIX), "NOT_YET_LINK"), (pull(cache_key=BY_ID), "NOT_YET_LINK"),
    (pull(src_cache_offset=None, dst_cache_offset=4), "NOT_YET_LINK"),
    (pull(src_cache_offset=0, dst_cache_offset=0), "NOT_YET_LINK"),
    (pull(cache_key=CacheKey(CLUSTER, 1)), "PI"), (pull(cache_key=CacheKeyByIdAndIndex(CLUSTER, 1)), "PI"),
    (lambda b: b.m.pull_cache(KEY, gone()), "NOT_EXIST"),
    (pull_blocks(prompt_cache_key="key"), "TE"), (pull_blocks(prompt_cache_key=KEY), "TE"),
    (pull_blocks(prompt_cache_key=BY_ID), "TE"), (pull_blocks(prompt_cache_key=None), "AE"),
    (pull_blocks(decoder_kv_cache="cache"), "TE"), (pull_blocks(decoder_kv_cache=None), "AE"),
    (lambda b: b.m.pull_blocks(BLOCKS, b.cpu, [0], [0]), "PI"),
    *((pull_blocks(prompt_blocks=value), "TE") for value in (None, (0,), range(1), "0", np.array([0]), ["0"], [None])),
    *((pull_blocks(decoder_blocks=value), "TE") for value in (None, (0,), range(1), "0", np.array([0]), [0.0])),
    (pull_blocks(prompt_blocks=[]), "PI"), (pull_blocks(decoder_blocks=[]), "PI"),
    (pull_blocks(prompt_blocks=[], decoder_blocks=[]), "PI"), (pull_blocks(prompt_blocks=[0, 1]), "PI"),
    (pull_blocks(prompt_blocks=[-1]), "VE"), (pull_blocks(decoder_blocks=[2**63]), "VE"),
    *((pull_blocks(prompt_cache_key=BlocksCacheKey(*ids)), "PI")
      for ids in [(None,), (-1,), (PEER, None), (PEER, 2**64)]),
    *((pull_blocks(**arguments), kind) for arguments, kind in LAYERS),
    (pull_blocks(), "NOT_YET_LINK"), (pull_blocks(prompt_cache_key=BlocksCacheKey(CLUSTER)), "PI"),
    engine="decoder",
))
def test_pulls_refuse(benches, assert_raises, engine, call, kind):
    refused(benches, assert_raises, engine, call, kind)


# -------------------------------------------------------------------------------------------- local operations

def copy(**kwargs):
    """A copy_cache that is right but for `kwargs`."""
    return lambda b: b.m.copy_cache(**{"dst": b.slots, "src": b.slots, "dst_batch_index": 1, **kwargs})


@pytest.mark.parametrize("engine, call, kind", rows(
    (copy(dst="cache"), "TE"), (copy(src="cache"), "TE"), (copy(dst=None), "AE"), (copy(src=None), "AE"),
    *((copy(dst_batch_index=value), kind) for value, kind in NOT_UINT32),
    *((copy(src_batch_index=value), kind) for value, kind in NOT_UINT32),
    *((copy(offset=value), kind) for value, kind in NOT_UINT64),
    *((copy(size=value), kind) for value, kind in NOT_INT64), (copy(size=0), "PI"), (copy(size=-2), "PI"),
    (copy(req_id="1"), "TE"), (copy(req_id=1.0), "TE"),
    (lambda b: b.m.copy_cache(b.cpu, b.slots), "PI"), (lambda b: b.m.copy_cache(b.slots, b.cpu), "PI"),
    (copy(dst_batch_index=SLOTS), "PI"), (copy(src_batch_index=SLOTS), "PI"), (copy(offset=SLOT_BYTES), "PI"),
    (copy(size=SLOT_BYTES + 1), "PI"), (copy(offset=2**64 - 1), "PI"),
    (lambda b: b.m.copy_cache(b.slots, gone()), "NOT_EXIST"),
    (lambda b: b.m.copy_blocks("cache", {0: [1]}), "TE"), (lambda b: b.m.copy_blocks(None, {0: [1]}), "AE"),
    (lambda b: b.m.copy_blocks(b.blocks, None), "AE"), (lambda b: b.m.copy_blocks(b.blocks, [(0, 1)]), "TE"),
    (lambda b: b.m.copy_blocks(b.blocks, {0: 1}), "TE"), (lambda b: b.m.copy_blocks(b.blocks, {0: ["1"]}), "TE"),
    (lambda b: b.m.copy_blocks(b.blocks, {0: [-1]}), "VE"), (lambda b: b.m.copy_blocks(b.blocks, {-1: [0]}), "VE"),
    (lambda b: b.m.copy_blocks(b.blocks, {0: [2**64]}), "VE"), (lambda b: b.m.copy_blocks(b.blocks, {2**64: []}), "VE"),
    (lambda b: b.m.copy_blocks(b.cpu, {0: [1]}), "PI"), (lambda b: b.m.copy_blocks(b.blocks, {0: [SLOTS]}), "PI"),
    (lambda b: b.m.copy_blocks(b.blocks, {SLOTS: [0]}), "PI"),
    (lambda b: b.m.copy_blocks(gone(), {0: [1]}), "NOT_EXIST"),
    (lambda b: b.m.swap_blocks("cache", b.blocks, {0: 0}), "TE"), (lambda b: b.m.swap_blocks(b.cpu, 1, {0: 0}), "TE"),
    (lambda b: b.m.swap_blocks(None, b.blocks, {0: 0}), "AE"), (lambda b: b.m.swap_blocks(b.cpu, None, {0: 0}), "AE"),
    (lambda b: b.m.swap_blocks(b.cpu, b.blocks, None), "AE"), (lambda b: b.m.swap_blocks(b.cpu, b.blocks, [0]), "TE"),
    (lambda b: b.m.swap_blocks(b.cpu, b.blocks, {"0": 0}), "TE"),
    (lambda b: b.m.swap_blocks(b.cpu, b.blocks, {0: [0]}), "TE"),
    (lambda b: b.m.swap_blocks(b.cpu, b.blocks, {0: SLOTS}), "PI"),
    (lambda b: b.m.swap_blocks(b.cpu, b.blocks, {-1: 0}), "PI"),
    (lambda b: b.m.swap_blocks(b.cpu, b.cpu, {0: 1}), "PI"),
    (lambda b: b.m.swap_blocks(b.slots, b.blocks, {0: 0}), "PI"),
    (lambda b: b.m.swap_blocks(cpu(b, shape=[SLOTS, 8]), b.blocks, {0: 0}), "PI"),
    (lambda b: b.m.swap_blocks(cpu(b, num_tensors=2), b.blocks, {0: 0}), "PI"),
    (lambda b: b.m.swap_blocks(cpu(b, addrs=[0] * 4), b.blocks, {0: 0}), "PI"),
    (lambda b: b.m.swap_blocks(cpu(b), KvCache(10**6, desc(), [[1] * TENSORS], None), {0: 0}), "NOT_EXIST"),
    *((lambda b, value=value: b.m.get_cache_tensors(b.slots, value), kind)
      for value, kind in [("0", "TE"), (None, "TE"), (0.0, "TE"), (2**31, "VE"), (-1, "PI"), (TENSORS, "PI")]),
    (lambda b: b.m.get_cache_tensors("cache"), "TE"), (lambda b: b.m.get_cache_tensors(None), "AE"),
    (lambda b: b.m.get_cache_tensors(b.cpu), "PI"),
    engine="mix",
))
def test_local_operations_refuse(benches, assert_raises, engine, call, kind):
    refused(benches, assert_raises, engine, call, kind)


def cpu(bench, num_tensors=TENSORS, shape=(SLOTS, SLOT_BYTES), addrs=None):
    """A cpu cache."""
    made = bench.addrs(num_tensors) if addrs is None else addrs
    return KvCache.create_cpu_cache(desc(num_tensors, shape, HOST), made)


def test_req_id_is_any_integer(bench):
    with bench.unchanged():
        bench.m.copy_cache(bench.slots, bench.slots, 1, 1, req_id=-2**70)


def test_copy_blocks_and_swap_take_either_layout(bench):
    """The second generation refuses these; this one counts the slots of a contiguous cache like blocks."""
    cache = bench.m.allocate_cache(desc())
    for tensor in cache.tensors():
        tensor[:] = np.arange(SLOTS)[:, None]
    bench.m.copy_blocks(cache, {2: [0]})
    assert [tensor[:, 0].tolist() for tensor in cache.tensors()] == [[2, 1, 2]] * TENSORS
    out = cpu(bench)
    bench.m.swap_blocks(cache, out, {1: 2})
    assert [bytes_at(address + 2 * SLOT_BYTES, SLOT_BYTES).tolist() for address in out.per_device_tensor_addrs[0]] == [
        [1] * SLOT_BYTES] * TENSORS
    del tensor
    bench.m.deallocate_cache(cache)


@pytest.mark.parametrize("index", range(2))
def test_cache_tensors_alias_the_memory(bench, index):
    cache = bench.m.allocate_cache(CacheDesc(2, [2, 3], DataType.DT_INT32))
    (tensor,) = bench.m.get_cache_tensors(cache, index)
    assert isinstance(tensor, Tensor)
    cache.tensors()[index][:] = [[1, 2, 3], [4, 5, 6]]
    assert tensor.numpy().tolist() == [[1, 2, 3], [4, 5, 6]]
    assert tensor.numpy().ctypes.data == cache.per_device_tensor_addrs[0][index]
    cache.tensors()[index][1] = 9
    assert tensor.numpy().tolist() == [[1, 2, 3], [9, 9, 9]]
    bench.m.deallocate_cache(cache)


def test_cache_tensors_of_a_deallocated_cache(bench, assert_raises):
    cache = bench.m.allocate_cache(desc())
    bench.m.deallocate_cache(cache)
    assert_raises("NOT_EXIST", bench.m.get_cache_tensors, cache)


# --------------------------------------------------------------------------------------------------- transfers

UNSET = object()


def transfer(*lists, configs=UNSET, **kwargs):
    """A transfer_cache_async that is right but for its arguments."""
    def call(bench):
        arguments = {"src_cache": bench.slots, "layer_synchronizer": Synchronizer(),
                     "transfer_configs": [config()] if configs is UNSET else configs, **kwargs}
        arguments["src_cache"] = bench.blocks if arguments["src_cache"] == "blocks" else arguments["src_cache"]
        return bench.m.transfer_cache_async(*arguments.values(), *lists)
    return call


@pytest.mark.parametrize("engine, call, kind", rows(
    (transfer(src_cache=None), "TE"), (transfer(src_cache="cache"), "TE"),
    (lambda b: transfer(src_cache=b.cpu)(b), "PI"),
    *((transfer(value, [0]), "TE") for value in (1, "01", {0}, range(1), ["0"])),
    (transfer(None, {0}), "TE"), (transfer(None, 5), "TE"), (transfer([-1], [0]), "VE"), (transfer([0], [2**64]), "VE"),
    *((transfer([0], [0], value), kind) for value, kind in NOT_UINT64 if value is not None),
    (transfer([0]), "PI"), (transfer([0, 1], [0]), "PI"), (transfer(None, None, 16), "PI"),
    # A batch slot cut into blocks is for the second generation.
    (transfer(None, [0], 16), "PI"), (transfer(None, [0]), "PI"), (transfer([], [0], 16), "PI"),
    (transfer(None, [0], 16, src_cache="blocks"), "PI"),
    (transfer(layer_synchronizer=None), "TE"), (transfer(layer_synchronizer=print), "TE"),
    *((transfer(configs=value), "TE") for value in (None, config(), "configs", [None], [config(), 1])),
    (transfer([0], [0], src_cache="blocks", configs=[config(src_batch_index=1)]), "PI"),
    (transfer(configs=[config(src_layer_range=range(3))]), "PI"), (transfer(configs=[config(dst_addrs=[1])]), "PI"),
    engine="prompt",
))
def test_transfer_refuses(benches, assert_raises, engine, call, kind):
    refused(benches, assert_raises, engine, call, kind)


class Blocked(Synchronizer):
    """Waits until it is let go."""

    def __init__(self, event):
        super().__init__()
        self.event = event

    def synchronize_layer(self, layer_index, timeout_in_millis):
        self.event.wait()
        return super().synchronize_layer(layer_index, timeout_in_millis)


def test_a_wait_for_a_transfer_runs_out_with_the_code_of_this_generation(bench):
    event = threading.Event()
    try:
        task = bench.m.transfer_cache_async(bench.slots, Blocked(event), [config(), config()])
        assert task.synchronize(1) is LLMStatusCode.LLM_WAIT_PROCESS_TIMEOUT
        assert task.get_results(0) == [LLMStatusCode.LLM_WAIT_PROCESS_TIMEOUT] * 2
    finally:
        event.set()
    assert task.synchronize() is LLMStatusCode.LLM_NOT_YET_LINK


# -------------------------------------------------------------------------------------------------- life cycle

def test_visible_helpers(bench, assert_raises):
    assert isinstance(bench.m, KvCacheManager) and bench.m.is_initialized()
    assert bench.dist.kv_cache_manager is bench.m
    KvCacheManager.check_cache_key(KEY)
    assert_raises("PI", KvCacheManager.check_cache_key, CacheKey(1, NO_ID))


def test_a_manager_of_a_finalised_engine_fails(benches, peers, assert_raises):
    benches.close()
    here = peers.here(CLUSTER, engine_options_v1(device_pool=1 << 20), role=LLMRole.PROMPT)
    manager = here.node.cache_manager
    cache = manager.allocate_cache(desc())
    finalize(here.node.dist)
    assert not manager.is_initialized()
    for call in (lambda: manager.allocate_cache(desc()), lambda: manager.allocate_blocks_cache(desc()),
                 lambda: manager.deallocate_cache(cache), lambda: manager.remove_cache_key(KEY),
                 lambda: manager.copy_cache(cache, cache, 0, 1), lambda: manager.copy_blocks(cache, {0: [1]}),
                 lambda: manager.get_cache_tensors(cache),
                 lambda: manager.transfer_cache_async(cache, Synchronizer(), [config()])):
        assert_raises("FAILED", call)
