"""Descriptors, keys, cache handles and transfer configs: what they accept, show and refuse."""
import ctypes
import gc
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llm_datadist import (
    BlocksCacheKey,
    Cache,
    CacheDesc,
    CacheKey,
    CacheKeyByIdAndIndex,
    DataType,
    KvCache,
    LayerSynchronizer,
    MemInfo,
    MemType,
    Memtype,
    Placement,
    RegisterMemStatus,
    TransferConfig,
    TransferWithCacheKeyConfig,
)
from llm_datadist.caches.descriptors import calc_tensor_size, clone_cache_desc
from llm_datadist.caches.keys import is_invalid_id, is_valid_id
from llm_datadist.caches.tensor_view import TensorView
from llm_datadist.managers.transfer_config import layer_range_to_tensor_indices
from llm_datadist.types import PushType, check_layer_range, int_to_mem_status_dict

NO_ID = 2**64 - 1
NOT_UINT64 = [(None, "TE"), ("1", "TE"), (1.0, "TE"), (np.int64(1), "TE"), (-1, "VE"), (2**64, "VE")]
NOT_UINT32 = [(None, "TE"), ("1", "TE"), (1.0, "TE"), (np.uint32(1), "TE"), (-1, "VE"), (2**32, "VE")]
NOT_INT64 = [(None, "TE"), ("1", "TE"), (1.0, "TE"), (2**63, "VE"), (-2**63 - 1, "VE")]
NOT_INT32 = [(None, "TE"), ("1", "TE"), (1.0, "TE"), (2**31, "VE"), (-2**31 - 1, "VE")]
BAD_LAYER_RANGES = [
    ([0, 1], "TE"), (2, "TE"), ((0, 2), "TE"), (range(0, 4, 2), "PI"), (range(0), "PI"), (range(2, 1), "PI"),
    (range(-1, 2), "PI"), (range(3, 1, -1), "PI"),
]


def desc(num_tensors=2, shape=(3, 4), data_type=DataType.DT_FLOAT16, placement=Placement.HOST, **kwargs):
    return CacheDesc(num_tensors, list(shape), data_type, placement, **kwargs)


def named(name, rows):
    return [(name, value, kind) for value, kind in rows]


# Enumerations

@pytest.mark.parametrize("enum, members", [
    (Placement, {"HOST": 0, "DEVICE": 1}), (RegisterMemStatus, {"OK": 0, "PREPARING": 1, "FAILED": 2}),
    (Memtype, {"MEM_TYPE_DEVICE": 0, "MEM_TYPE_HOST": 1}),
    (PushType, {"NO_CACHE_KEY": 0, "BLOCKS_CACHE_KEY": 1, "CACHE_KEY_BY_ID": 2}),
])
def test_enum(enum, members):
    assert {member.name: member.value for member in enum} == members
    assert all(str(member) == f"{member}" == f"{enum.__name__}.{member.name}" for member in enum)


def test_enum_helpers():
    assert MemType is Memtype
    assert int_to_mem_status_dict == {
        0: RegisterMemStatus.OK, 1: RegisterMemStatus.PREPARING, 2: RegisterMemStatus.FAILED}


# CacheDesc

def test_cache_desc_properties():
    shape = [2, 8]
    made = CacheDesc(1, shape, DataType.DT_FLOAT16)
    assert made.shape is shape and made.size == 32 and made.num_tensors == 1
    assert (made.data_type, made.placement) == (DataType.DT_FLOAT16, Placement.DEVICE)
    assert (made.batch_dim, made.batch_size, made.seq_len_dim_index, made.kv_tensor_format) == (0, 2, -1, None)
    assert str(made) == repr(made) == (
        "CacheDesc(num_tensors=1, shape=[2, 8], data_type=DataType.DT_FLOAT16, placement=Placement.DEVICE, "
        "batch_dim_index=0, seq_len_dim_index=-1,kv_tensor_format=None)")
    assert CacheDesc(0, (2, 8), None, None).num_tensors == 0
    other = CacheDesc(1, (2, 8), DataType.DT_INT8, Placement.HOST, 1, 1, "NZ")
    assert (other.batch_size, other.seq_len_dim_index, other.kv_tensor_format) == (8, 1, "NZ")


@pytest.mark.parametrize("name, value, kind", [
    *named("num_tensors", NOT_UINT32),
    ("shape", None, "TE"), ("shape", 3, "TE"), ("shape", "22", "TE"), ("shape", {2: 2}, "TE"),
    ("shape", [2, None], "TE"), ("shape", [2, 1.0], "TE"), ("shape", [np.int64(2)], "TE"), ("shape", [2, 2**63], "VE"),
    ("shape", (-2**63 - 1,), "VE"),
    ("shape", [], "PI"), ("shape", (), "PI"),
    ("data_type", 1, "TE"), ("data_type", "DT_FLOAT", "TE"), ("placement", 1, "TE"), ("placement", "HOST", "TE"),
    ("batch_dim_index", None, "TE"), ("batch_dim_index", "0", "TE"), ("batch_dim_index", -1, "PI"),
    ("batch_dim_index", 2, "PI"), ("batch_dim_index", 2**40, "PI"),
    *named("seq_len_dim_index", NOT_INT32), ("seq_len_dim_index", -2, "PI"), ("seq_len_dim_index", 2, "PI"),
    ("kv_tensor_format", 1, "TE"),
])
def test_bad_cache_desc(name, value, kind, assert_raises):
    good = {"num_tensors": 1, "shape": [2, 8], "data_type": DataType.DT_FLOAT16}
    error = assert_raises(kind, CacheDesc, **{**good, name: value})
    assert name in str(error) or name == "shape"


@pytest.mark.parametrize("shape, data_type", [
    ([0, 2], DataType.DT_INT8), ([2, -1], DataType.DT_INT8), ([2**31, 2**32], DataType.DT_INT8),
    ([2**60, 1], DataType.DT_INT64), ([2, 2], None)])
def test_shape_without_a_size(shape, data_type, assert_raises):
    made = CacheDesc(1, shape, data_type)
    assert_raises("PI", getattr, made, "size")
    assert_raises("PI", calc_tensor_size, shape, data_type)


@pytest.mark.parametrize("data_type", DataType)
def test_size_of_every_type(data_type):
    assert CacheDesc(1, [3, 5], data_type).size == 15 * (16 if data_type is DataType.DT_STRING else
                                                         calc_tensor_size([1], data_type))
    assert calc_tensor_size([2**62], DataType.DT_INT8) == 2**62


def test_update_dim(assert_raises):
    shape = [2, 8]
    made = CacheDesc(1, shape, DataType.DT_INT8)
    assert made.size == 16
    made.update_dim(0, 4)
    assert shape == [4, 8] and made.size == 32 and made.batch_size == 2
    for index, value, kind in [(2, 1, "PI"), (-1, 1, "PI"), (None, 1, "TE"), (0, None, "TE"), (0, 2**63, "VE")]:
        assert_raises(kind, made.update_dim, index, value)
    assert shape == [4, 8]
    assert_raises("TE", CacheDesc(1, (2, 8), DataType.DT_INT8).update_dim, 0, 4)


def test_clone_has_its_own_shape():
    made = CacheDesc(3, (2, 8), DataType.DT_BF16, Placement.HOST, 1, 0, "ND")
    clone = clone_cache_desc(made)
    clone.update_dim(0, 9)
    assert made.shape == (2, 8) and clone.shape == [9, 8]
    clone.update_dim(0, 2)
    assert repr(clone) == repr(made).replace("(2, 8)", "[2, 8]")
    assert repr(pickle.loads(pickle.dumps(made))) == repr(made)


# Keys

def test_cache_key():
    key = CacheKey(1, 2)
    assert (key.cluster_id, key.prompt_cluster_id, key.req_id, key.model_id, key.prefix_id) == (1, 1, 2, 0, NO_ID)
    assert repr(key) == "CacheKey(cluster_id=1, req_id=2, prefix_id=18446744073709551615, model_id=0)"
    full = CacheKey(1, 2, 3, 4)
    assert (full.model_id, full.prefix_id) == (3, 4)
    assert CacheKey(prompt_cluster_id=5, req_id=NO_ID).cluster_id == 5
    assert CacheKey(cluster_id=6, prompt_cluster_id=5, req_id=1).prompt_cluster_id == 6
    assert CacheKey(0, prefix_id=1, req_id=0).prefix_id == 1
    assert CacheKey(1, 2) != CacheKey(1, 2) and len({key, CacheKey(1, 2)}) == 2


@pytest.mark.parametrize("args, kwargs", [
    ((), {}), ((1,), {}), ((), {"req_id": 1}), ((), {"cluster_id": 1}), ((1, 2, 3, 4, 5), {}),
    ((1, 2, 3, 4), {"prefix_id": 1}), ((1, 2), {"cache_id": 1}), ((1, 2), {"req_id": 3}),
    ((), {"cluster_id": 1, "prompt_cluster_id": 1, "req_id": 1, "model_id": 1, "prefix_id": 1}),
])
def test_cache_key_arguments(args, kwargs, assert_raises):
    assert_raises("PI", CacheKey, *args, **kwargs)


@pytest.mark.parametrize("name", ["cluster_id", "prompt_cluster_id", "req_id", "model_id", "prefix_id"])
@pytest.mark.parametrize("value, kind", NOT_UINT64)
def test_cache_key_values(name, value, kind, assert_raises):
    good = {"req_id": 1} if name in ("cluster_id", "prompt_cluster_id") else {"cluster_id": 1, "req_id": 1}
    assert_raises(kind, CacheKey, **{**good, name: value})


def test_cache_key_by_id():
    key = CacheKeyByIdAndIndex(1, 2)
    assert (key.cluster_id, key.cache_id, key.batch_index) == (1, 2, 0)
    assert repr(key) == "CacheKeyByIdAndIndex(cluster_id=1, cache_id=2, batch_index=0)"
    assert CacheKeyByIdAndIndex(cluster_id=1, cache_id=-1, batch_index=2**32 - 1).batch_index == 2**32 - 1


@pytest.mark.parametrize("name, value, kind", [
    *named("cluster_id", NOT_UINT64), *named("cache_id", NOT_INT64), *named("batch_index", NOT_UINT32)])
def test_cache_key_by_id_values(name, value, kind, assert_raises):
    assert_raises(kind, CacheKeyByIdAndIndex, **{"cluster_id": 1, "cache_id": 1, name: value})


def test_blocks_cache_key():
    key = BlocksCacheKey(1)
    assert (key.cluster_id, key.prompt_cluster_id, key.model_id) == (1, 1, 0)
    assert repr(key) == repr(BlocksCacheKey(cluster_id=1)) == "BlocksCacheKey(cluster_id=1, model_id=0)"
    older = BlocksCacheKey(prompt_cluster_id=1, model_id=2)
    assert older.cluster_id == 1 and repr(older) == "BlocksCacheKey(prompt_cluster_id=1, model_id=2)"
    assert BlocksCacheKey(cluster_id=1, prompt_cluster_id=2).cluster_id == 1
    assert BlocksCacheKey(None, None).cluster_id is None and BlocksCacheKey(-1, 2**70).model_id == 2**70


@pytest.mark.parametrize("args, kwargs, kind", [
    ((), {}, "PI"), ((), {"model_id": 1}, "PI"), ((1, 2, 3), {}, "PI"), ((1,), {"req_id": 1}, "PI"),
    ((1,), {"cluster_id": 1}, "PI"), (("1",), {}, "TE"), ((1.0,), {}, "TE"), ((1, "2"), {}, "TE"),
    ((np.int64(1),), {}, "TE"), ((), {"prompt_cluster_id": "1"}, "TE"),
])
def test_bad_blocks_cache_key(args, kwargs, kind, assert_raises):
    assert_raises(kind, BlocksCacheKey, *args, **kwargs)


@pytest.mark.parametrize("key, name", [
    (CacheKey(1, 2), "req_id"), (BlocksCacheKey(1), "model_id"), (CacheKeyByIdAndIndex(1, 2), "cache_id")])
def test_keys_are_read_only_and_pickle(key, name):
    with pytest.raises(AttributeError):
        setattr(key, name, 1)
    assert repr(pickle.loads(pickle.dumps(key))) == repr(key)


def test_ids():
    assert is_valid_id(0) and is_valid_id(NO_ID - 1) and not is_valid_id(NO_ID)
    assert is_invalid_id(NO_ID) and not is_invalid_id(0)


# MemInfo

def test_mem_info(assert_raises):
    info = MemInfo(Memtype.MEM_TYPE_DEVICE, 1, 2)
    assert (info.mem_type, info.addr, info.size) == (Memtype.MEM_TYPE_DEVICE, 1, 2)
    assert str(info) == "MemInfo(mem_type=Memtype.MEM_TYPE_DEVICE, addr=1, size=2)"
    assert MemInfo(None, None, None).addr is None
    for args in [(0, 1, 2), (Placement.HOST, 1, 2), (Memtype.MEM_TYPE_HOST, "1", 2), (Memtype.MEM_TYPE_HOST, 1, 2.0)]:
        assert_raises("TE", MemInfo, *args)


# Cache handles

class Manager:
    """What a handle needs of its manager."""

    def __init__(self, is_host_addressable=True):
        self.is_host_addressable = is_host_addressable
        self.pool_memory = None
        self.initialized = True
        self.deallocated = []

    def is_initialized(self):
        return self.initialized

    def deallocate_cache(self, cache):
        self.deallocated.append(cache.cache_id)
        cache._forget_memory()


def memory_of(cache_desc):
    """A buffer per tensor, and their addresses."""
    buffers = [ctypes.create_string_buffer(cache_desc.size) for _ in range(cache_desc.num_tensors)]
    return buffers, [ctypes.addressof(buffer) for buffer in buffers]


def test_cache_properties():
    manager, of = Manager(), desc()
    cache = Cache(3, of, [10, 20], manager, True, False)
    assert (cache.cache_id, cache.cache_desc, cache.tensor_addrs) == (3, of, [10, 20])
    assert cache.is_registered is True and cache.is_blocks_cache is False
    assert str(cache) == repr(cache) == "Cache(cache_id = 3, device_tensor_addrs = 2, is_blocks_cache = False)"
    with pytest.raises(AttributeError):
        cache.tensor_addrs = []
    cache._forget_memory()
    assert cache.tensor_addrs == [] and cache.cache_id == 3
    del cache
    gc.collect()
    assert manager.deallocated == []


@pytest.mark.parametrize("make, read", [
    (lambda source: Cache(1, desc(), source, None, False, False), lambda cache: cache.tensor_addrs),
    (lambda source: KvCache(1, desc(), source, None), lambda cache: cache.per_device_tensor_addrs),
])
def test_addresses_are_made_once_and_when_asked_for(make, read):
    calls = []

    def source():
        calls.append(1)
        return [[7, 8]]

    cache = make(source)
    assert not calls and read(cache) == [[7, 8]] and read(cache) is read(cache) and len(calls) == 1
    cache._forget_memory()
    assert read(cache) == []
    never = make(source)
    never._forget_memory()
    assert read(never) == [] and len(calls) == 1


def test_cpu_cache():
    of = desc(2)
    cache = Cache.create_cpu_cache(of, [16, 32])
    assert (cache.cache_id, cache.tensor_addrs, cache.is_blocks_cache, cache.cache_desc) == (-1, [16, 32], True, of)
    kv_cache = KvCache.create_cpu_cache(of, [16, 32])
    assert (kv_cache.cache_id, kv_cache.per_device_tensor_addrs) == (-1, [[16, 32]])
    assert KvCache.create_cpu_cache(of, [[16, 32], [48, 64]]).per_device_tensor_addrs == [[16, 32], [48, 64]]
    assert str(kv_cache) == repr(kv_cache) == "KvCache(cache_id = -1, num_devices = 1)"


@pytest.mark.parametrize("cls", [Cache, KvCache])
@pytest.mark.parametrize("cache_desc, addrs, kind", [
    (None, [1, 2], "AE"), ("desc", [1, 2], "TE"), (desc(), None, "TE"), (desc(), (1, 2), "TE"),
    (desc(), ["1", 2], "TE"),
    (desc(), [1.0, 2], "TE"), (desc(), [None, None], "TE"), (desc(), [np.int64(1), 2], "TE"), (desc(), [1], "PI"),
    (desc(), [], "PI"), (desc(), [1, 2, 3], "PI"), (desc(placement=Placement.DEVICE), [1, 2], "PI"),
])
def test_bad_cpu_cache(cls, cache_desc, addrs, kind, assert_raises):
    assert_raises(kind, cls.create_cpu_cache, cache_desc, addrs)


@pytest.mark.parametrize("addrs, kind", [
    ([1, [2]], "PI"), ([[1, 2], 3], "PI"), ([[]], "PI"), ([[1]], "PI"), ([[1, 2], [3]], "PI"), ([[1, "2"]], "TE"),
    ([(1, 2)], "TE"),
])
def test_bad_cpu_kv_cache(addrs, kind, assert_raises):
    assert_raises(kind, KvCache.create_cpu_cache, desc(), addrs)


def test_kv_cache_finaliser_deallocates():
    manager = Manager()
    cache = KvCache(3, desc(), [[10, 20]], manager, is_blocks_cache=True)
    assert (cache.cache_id, cache.per_device_tensor_addrs, cache.is_blocks_cache) == (3, [[10, 20]], True)
    del cache
    gc.collect()
    assert manager.deallocated == [3]


def test_kv_cache_finaliser_keeps_still():
    """Already deallocated, or a manager that is down, or one that raises."""
    manager = Manager()
    cache = KvCache(3, desc(), [[10, 20]], manager)
    manager.deallocate_cache(cache)
    del cache
    late = KvCache(4, desc(), [[10, 20]], manager)
    manager.initialized = False
    del late
    broken = Manager()
    broken.deallocate_cache = None
    raising = KvCache(5, desc(), [[10, 20]], broken)
    del raising
    KvCache.create_cpu_cache(desc(), [1, 2])
    KvCache.__new__(KvCache)
    gc.collect()
    assert manager.deallocated == [3]


# The runner may have a thread of its own; the child exits at once.
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_kv_cache_finaliser_in_a_forked_child_does_nothing():
    manager = Manager()
    cache = KvCache(3, desc(), [[10, 20]], manager)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            del cache
            gc.collect()
            code = len(manager.deallocated)
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    del cache
    gc.collect()
    assert manager.deallocated == [3]


def test_kv_cache_finaliser_at_interpreter_exit():
    code = """
import sys
from llm_datadist import CacheDesc, DataType, KvCache
class Manager:
    def is_initialized(self): raise RuntimeError("asked at exit")
    deallocate_cache = is_initialized
cache = KvCache(1, CacheDesc(1, [2], DataType.DT_INT8), [[1]], Manager())
cycle = [cache]; cycle.append(cycle)
sys.modules["keep"] = cycle
"""
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60,
        check=True)
    assert run.stderr == "" and run.stdout == ""


@pytest.mark.parametrize("data_type, numpy_type", [
    (DataType.DT_FLOAT, np.float32), (DataType.DT_FLOAT16, np.float16), (DataType.DT_BOOL, np.bool_),
    (DataType.DT_BF16, np.uint16), (DataType.DT_INT64, np.int64)])
@pytest.mark.parametrize("placement", Placement)
@pytest.mark.parametrize("kv", [False, True])
def test_tensors_alias_the_memory(data_type, numpy_type, placement, kv):
    of = desc(2, (3, 4), data_type, placement)
    buffers, addrs = memory_of(of)
    manager = Manager()
    cache = KvCache(1, of, lambda: [addrs], manager) if kv else Cache(1, of, lambda: addrs, manager, False, True)
    arrays = cache.tensors()
    assert [array.shape for array in arrays] == [(3, 4)] * 2 and all(array.dtype == numpy_type for array in arrays)
    arrays[1][2, 3] = 1
    assert buffers[1].raw == arrays[1].tobytes() and buffers[0].raw == bytes(of.size)
    assert [array.ctypes.data for array in arrays] == addrs
    buffers[0][0] = b"\1"
    assert arrays[0].tobytes()[0] == 1
    view = cache.tensor_views()[0]
    assert np.from_dlpack(view).ctypes.data == addrs[0] == view.address and np.from_dlpack(view).shape == view.shape
    assert view.data_type is data_type and f"{addrs[0]:#x}" in repr(view)


def test_array_keeps_the_kv_cache_alive():
    manager, of = Manager(), desc(1)
    buffers, addrs = memory_of(of)
    array = KvCache(9, of, [addrs], manager).tensors()[0][1:]
    gc.collect()
    assert manager.deallocated == []
    array[:] = 1
    del array
    gc.collect()
    assert manager.deallocated == [9] and len(buffers) == 1


def test_tensors_that_cannot_be_shown(assert_raises):
    of = desc(1, placement=Placement.DEVICE)
    assert_raises("NOT_ENABLED", Cache(1, of, [16], Manager(False), False, False).tensors)
    assert_raises("NOT_ENABLED", Cache(1, of, [16], None, False, False).tensors)
    cache = Cache(1, of, [16], Manager(), False, False)
    cache._forget_memory()
    assert_raises("NOT_EXIST", cache.tensors)
    kv_cache = KvCache(1, of, [[16]], None)
    assert_raises("PI", kv_cache.tensors, 1)
    assert_raises("PI", kv_cache.tensors, -1)
    kv_cache._forget_memory()
    assert_raises("NOT_EXIST", kv_cache.tensors)
    assert_raises("PI", Cache.create_cpu_cache(desc(1), [0]).tensors)
    assert_raises("PI", Cache.create_cpu_cache(desc(1, data_type=DataType.DT_STRING), [16]).tensors)
    assert_raises("PI", TensorView, -5, DataType.DT_INT8, (1,), None)


# Layers and transfer configs

@pytest.mark.parametrize("layers, kind", BAD_LAYER_RANGES)
def test_bad_layer_range(layers, kind, assert_raises):
    assert "layers" in str(assert_raises(kind, check_layer_range, "layers", layers))
    assert_raises(kind, TransferConfig, 1, [1, 2], layers)
    config = TransferConfig(1, [1, 2])
    assert_raises(kind, setattr, config, "src_layer_range", layers)
    assert config.src_layer_range is None
    key = BlocksCacheKey(1)
    assert_raises(kind, TransferWithCacheKeyConfig, key, layers, range(1))
    assert_raises(kind, TransferWithCacheKeyConfig, key, range(1), layers)
    with_key = TransferWithCacheKeyConfig(key, range(1), range(1))
    assert_raises(kind, setattr, with_key, "src_layer_range", layers)
    assert_raises(kind, setattr, with_key, "dst_layer_range", layers)


def test_layer_range_none(assert_raises):
    assert check_layer_range("layers", None) is None and check_layer_range("layers", range(2, 5)) is None
    assert_raises("TE", check_layer_range, "layers", None, False)


def test_layer_range_to_tensor_indices():
    assert layer_range_to_tensor_indices(range(1, 3), None) == ([2, 3, 4, 5], [])
    assert layer_range_to_tensor_indices(None, range(2, 3), 3) == ([], [6, 7, 8])
    assert layer_range_to_tensor_indices(None, None) == ([], [])


class EveryLayer(LayerSynchronizer):
    def synchronize_layer(self, layer_index, timeout_in_millis):
        return True


def test_layer_synchronizer():
    with pytest.raises(TypeError):
        LayerSynchronizer()
    assert EveryLayer().synchronize_layer(0, None) is True


def test_transfer_config():
    addrs = [1, 2]
    config = TransferConfig(5, addrs)
    assert (config.dst_cluster_id, config.src_layer_range, config.src_batch_index) == (5, None, 0)
    assert config.dst_addrs is addrs and config.dst_layer_range is None
    config.dst_cluster_id, config.dst_addrs, config.src_layer_range, config.src_batch_index = 6, (3,), range(1, 2), 7
    assert repr(config) == (
        "TransferConfig(dst_cluster_id=6, dst_addrs=(3,), src_layer_range=range(1, 2), src_batch_index=7)")
    config.src_layer_range = None


@pytest.mark.parametrize("name, value, kind", [
    *named("dst_cluster_id", NOT_UINT64), *named("src_batch_index", NOT_UINT32),
    ("dst_addrs", None, "TE"), ("dst_addrs", 1, "TE"), ("dst_addrs", {1}, "TE"), ("dst_addrs", [None], "TE"),
    ("dst_addrs", ["1"], "TE"), ("dst_addrs", [-1], "VE"), ("dst_addrs", (2**64,), "VE"),
])
def test_bad_transfer_config(name, value, kind, assert_raises):
    assert_raises(kind, TransferConfig, **{"dst_cluster_id": 1, "dst_addrs": [1], name: value})
    assert_raises(kind, setattr, TransferConfig(1, [1]), name, value)


def test_transfer_with_cache_key_config():
    config = TransferWithCacheKeyConfig(CacheKeyByIdAndIndex(1, 2), range(2), range(3, 5), 4)
    assert (config.src_layer_range, config.dst_layer_range, config.src_batch_index) == (range(2), range(3, 5), 4)
    assert config.dst_cluster_id == 1 and "CacheKeyByIdAndIndex(cluster_id=1" in repr(config)
    config.cache_key = key = BlocksCacheKey(9)
    assert config.dst_cluster_id == 9 and config.cache_key is key
    config.cache_key = config.src_layer_range = config.dst_layer_range = None
    assert config.dst_cluster_id is None and config.cache_key is None
    config.src_layer_range, config.dst_layer_range, config.src_batch_index = range(1), range(2), 5
    assert config.src_batch_index == 5


@pytest.mark.parametrize("args, kind", [
    ((None, range(1), range(1)), "TE"), ((CacheKey(1, 2), range(1), range(1)), "TE"), ((BlocksCacheKey(1),), "TE"),
    ((BlocksCacheKey(1), range(1)), "TE"), ((BlocksCacheKey(1), None, range(1)), "TE"),
    ((BlocksCacheKey(1), range(1), range(2)), "PI"), ((BlocksCacheKey(1), range(1), range(1), 1), "PI"),
    *(((CacheKeyByIdAndIndex(1, 2), range(1), range(1), value), kind) for value, kind in NOT_UINT32),
])
def test_bad_transfer_with_cache_key_config(args, kind, assert_raises):
    assert_raises(kind, TransferWithCacheKeyConfig, *args)


@pytest.mark.parametrize("name, value, kind", [
    ("cache_key", CacheKey(1, 2), "TE"), ("cache_key", 1, "TE"), *named("src_batch_index", NOT_UINT32)])
def test_bad_transfer_with_cache_key_setter(name, value, kind, assert_raises):
    assert_raises(kind, setattr, TransferWithCacheKeyConfig(BlocksCacheKey(1), range(1), range(1)), name, value)
