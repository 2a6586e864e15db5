"""The calls a new user gets wrong: each is refused, nothing changes, and the text has the value and what to do.

A row is a call, the kind of error (see ``assert_raises``), and parts of its text: the value at fault, the reason or the
remedy.
"""
import json
import re

import pytest
from support.engines import BLOCKS, BY_ID, CLUSTER, KEY, NO_ID, PEER, POOL_BYTES, TENSORS, desc, refused
from support.peer import engine_options

from llm_datadist import (
    BlocksCacheKey,
    Cache,
    CacheDesc,
    CacheKey,
    CacheKeyByIdAndIndex,
    DataType,
    KvCache,
    LLMClusterInfo,
    LLMConfig,
    LLMDataDist,
    LLMException,
    LLMRole,
    Placement,
    TransferConfig,
    TransferWithCacheKeyConfig,
)
from llm_datadist.options.parser import EngineOptions

HOST = Placement.HOST
HALF = CacheDesc(TENSORS, [3, 8], DataType.DT_FLOAT16, HOST)          # as many bytes as `desc`


def setting(name, value):
    return lambda b: setattr(LLMConfig(), name, value)


def option(generation=engine_options, environ=None, **options):
    made = generation(device_pool=0, listen=False) if not isinstance(generation, dict) else generation
    made = {**made, **{key.replace("_", ".", 1): value for key, value in options.items()}}
    return lambda b: EngineOptions.parse(made, LLMRole.PROMPT, CLUSTER, environ or {})


def address(ip, port=1):
    return lambda b: LLMClusterInfo().append_remote_ip_info(ip, port)


def cpu(b, made=HALF):
    return Cache.create_cpu_cache(made, b.addrs(made.num_tensors, made.size))


CALLS = [
    # Words that are misspelt.
    (lambda b: b.m.pull_cache(KEY, b.slots, src_layers=range(1)), "TE", "'src_layers'", "mean 'src_layer_range'?"),
    (lambda b: b.m.pull_cache(KEY, b.slots, batch=1), "TE", "'batch'", "known are"),
    (lambda b: b.m.pull_cache(KEY, b.slots, src_cache_offset=8), "TE", "'src_cache_offset'", "unexpected keyword"),
    (lambda b: b.m.pull_blocks(BLOCKS, b.blocks, [0], [1], tensor_per_layer=1), "TE", "tensor_per_layer",
     "did you mean 'tensor_num_per_layer'?"),
    (lambda b: b.m.allocate_cache(desc(), cache_key=[KEY]), "TE", "'cache_key'", "did you mean 'cache_keys'?"),
    (lambda b: b.m.allocate_blocks_cache(desc(), blocks_key=BLOCKS), "TE", "'blocks_key'", "'blocks_cache_key'?"),
    (lambda b: b.m.register_cache(desc(), addresses=[1]), "TE", "'addresses'", "did you mean 'addrs'?"),
    (lambda b: b.m.register_blocks_cache(desc(), b.addrs(), remote=True), "TE", "'remote'", "remote_accessible"),
    (lambda b: b.m.push_blocks(BLOCKS, b.blocks, [0], [0], tensors_per_layer=2), "TE", "'tensors_per_layer'",
     "'tensor_num_per_layer'?"),
    (lambda b: b.m.swap_blocks(b.blocks, b.cpu, mapping={0: 0}), "TE", "'mapping'", "src_to_dst"),
    (lambda b: b.m.copy_cache(b.slots, b.slots, batch_index=1), "TE", "'batch_index'", "_batch_index'?"),
    (lambda b: b.dist.link_clusters([], time_out=5), "TE", "'time_out'", "did you mean 'timeout'?"),
    (lambda b: b.dist.unlink_clusters([], forced=True), "TE", "'forced'", "did you mean 'force'?"),
    (lambda b: b.dist.switch_role(LLMRole.MIX, options={}), "TE", "'options'", "'switch_options'?"),
    (lambda b: CacheDesc(4, [3, 16], dtype=DataType.DT_INT8), "TE", "'dtype'", "'data_type'"),
    (lambda b: TransferConfig(PEER, [1], layers=range(1)), "TE", "'layers'", "TransferConfig"),
    (lambda b: CacheKeyByIdAndIndex(PEER, cacheid=1), "TE", "'cacheid'", "did you mean 'cache_id'?"),
    (lambda b: LLMDataDist(LLMRole.MIX, cluster=1), "TE", "'cluster'", "did you mean 'cluster_id'?"),
    (lambda b: CacheKey(cluster_id=1, request_id=2), "PI", "'request_id'", "did you mean 'req_id'?"),
    (lambda b: BlocksCacheKey(cluster_id=1, req_id=2), "PI", "'req_id'", "known are"),
    # Keys.
    (lambda b: CacheKey(req_id=2), "PI", "CacheKey", "cluster_id is required"),
    (lambda b: CacheKey(cluster_id=2), "PI", "CacheKey", "req_id is required"),
    (lambda b: BlocksCacheKey(), "PI", "BlocksCacheKey", "cluster_id is required"),
    (lambda b: CacheKey(-1, 2), "VE", "cluster_id=-1", "uint64"),
    (lambda b: CacheKey(1, "7"), "TE", "req_id", "only support type int"),
    (lambda b: b.m.pull_cache(CacheKey(PEER, NO_ID), b.slots), "PI", str(NO_ID), "exactly one of req_id and prefix_id"),
    (lambda b: b.m.pull_cache(CacheKey(PEER, 1, 0, 2), b.slots), "PI", "prefix_id=2", "exactly one"),
    (lambda b: b.m.allocate_cache(desc(), [KEY] * 4), "PI", "4 keys", "3 batch slots"),
    (lambda b: b.m.allocate_cache(desc(), [KEY, KEY]), "PI", "req", "twice"),
    # Descriptors.
    (lambda b: CacheDesc(4, [], DataType.DT_INT8), "PI", "batch_dim_index=0", "shape=[]"),
    (lambda b: CacheDesc(4, (3, 16), "int8"), "TE", "data_type", "only support type DataType"),
    (lambda b: CacheDesc(4, [3, 16], DataType.DT_INT8, batch_dim_index=2), "PI", "batch_dim_index=2", "[0, 2)"),
    (lambda b: CacheDesc(-4, [3, 16], DataType.DT_INT8), "VE", "num_tensors=-4", "uint32"),
    (lambda b: b.m.allocate_cache(CacheDesc(4, [0, 16], DataType.DT_INT8)), "PI", "[0, 16]", "at least 1"),
    (lambda b: b.m.allocate_cache(CacheDesc(0, [3, 16], DataType.DT_INT8)), "PI", "num_tensors=0", "at least one"),
    (lambda b: b.m.allocate_cache(desc(1, (1, POOL_BYTES * 2))), "OUT_OF_MEMORY", str(POOL_BYTES * 2), "larger pool"),
    # Block lists and layers.
    (lambda b: b.m.pull_blocks(BLOCKS, b.blocks, [0, 1], [1]), "PI", "2 entries", "pair by position"),
    (lambda b: b.m.pull_blocks(BLOCKS, b.blocks, [], []), "PI", "dst_blocks", "at least one block"),
    (lambda b: b.m.pull_blocks(BLOCKS, b.blocks, [0], [-1]), "VE", "-1", "dst_blocks"),
    (lambda b: b.m.pull_blocks(BLOCKS, b.blocks, "01", [0, 1]), "TE", "src_blocks", "but got str"),
    (lambda b: b.m.pull_blocks(BLOCKS, b.slots, [0], [0]), "PI", "contiguous cache", "use pull_cache"),
    (lambda b: b.m.pull_cache(KEY, b.blocks), "PI", "blocks cache", "use pull_blocks"),
    (lambda b: b.m.pull_cache(KEY, b.slots, size=0), "PI", "size=0", "-1 or positive"),
    (lambda b: b.m.pull_cache(KEY, b.slots, src_layer_range=range(0, 4, 2)), "PI", "range(0, 4, 2)", "step 1"),
    (lambda b: b.m.pull_cache(KEY, b.slots, src_layer_range=range(2), dst_layer_range=range(1)), "PI", "range(0, 2)",
     "equal lengths"),
    (lambda b: b.m.pull_cache(KEY, b.slots, tensor_num_per_layer=0), "PI", "tensor_num_per_layer=0", "at least one"),
    (lambda b: b.m.copy_blocks(b.blocks, {0: [3]}), "PI", "block 3", "[0, 3)"),
    (lambda b: b.m.copy_blocks(b.blocks, {0: [1], 2: [1]}), "PI", "block 1", "name each destination block once"),
    (lambda b: b.m.copy_blocks(b.blocks, {0: 1}), "TE", "copy_block_info", "only support type list"),
    (lambda b: b.m.copy_blocks(b.slots, {0: [1]}), "PI", "contiguous cache", "use copy_cache"),
    (lambda b: b.m.copy_cache(b.blocks, b.blocks), "PI", "copy_cache", "use copy_blocks or swap_blocks"),
    (lambda b: b.m.copy_cache(b.slots, b.slots, 0, 3), "PI", "3", "batch"),
    # Caches that do not fit each other.
    (lambda b: b.m.swap_blocks(b.blocks, cpu(b), {0: 0}), "PI", "DataType.DT_FLOAT16", "data types"),
    (lambda b: b.m.copy_cache(b.slots, Cache(10**6, CacheDesc(4, [3, 8], DataType.DT_FLOAT16), [1] * 4, b.m, False,
                                             False)), "PI", "DataType.DT_UINT8", "llm.Strict"),
    (lambda b: b.m.swap_blocks(b.blocks, b.cpu, {0: 1, 2: 1}), "PI", "block 1", "name each destination block once"),
    (lambda b: b.m.swap_blocks(b.blocks, b.host_blocks, {0: 3}), "PI", "block 3", "[0, 3)"),
    (lambda b: b.m.swap_blocks(b.blocks, b.blocks, {0: 1}), "PI", "Placement.DEVICE", "one side must be HOST"),
    (lambda b: Cache.create_cpu_cache(desc(), b.addrs()), "PI", "Placement.DEVICE", "placement HOST"),
    (lambda b: Cache.create_cpu_cache(desc(placement=HOST), [1, 2]), "PI", "2 addresses", "num_tensors=4"),
    (lambda b: KvCache.create_cpu_cache(desc(placement=HOST), [1, [2], 3, 4]), "PI", "[1, [2], 3, 4]",
     "should be consistent"),
    # Registered memory.
    (lambda b: b.m.register_cache(desc(), [1, 2]), "PI", "2 addresses", "num_tensors=4"),
    (lambda b: b.m.register_cache(desc(), [0] * TENSORS), "PI", "addrs[0]=0", "positive"),
    (lambda b: b.m.register_cache(desc(), [bytearray(8) for _ in range(TENSORS)]), "PI", "8 bytes", "48 bytes per"),
    (lambda b: b.m.register_cache(desc(), [bytes(48) for _ in range(TENSORS)]), "PI", "read only", "write"),
    # Modes, links and life.
    (lambda b: b.m.push_cache(BY_ID, b.slots), "PI", "llm.EnableRemoteCacheAccessible", "pushes need option"),
    (lambda b: b.dist.kv_cache_manager, "PI", "kv_cache_manager", "llm.EnableCacheManager"),
    (lambda b: b.m.pull_cache(KEY, b.slots), "NOT_YET_LINK", f"cluster {PEER} is not linked", "Hint: link the peer"),
    (lambda b: b.m.pull_cache(CacheKey(CLUSTER, 1), b.slots), "PI", f"cluster {CLUSTER} is this one", "local copies"),
    (lambda b: b.dist.link_clusters([], 0), "PI", "timeout=0", "positive, in milliseconds"),
    (lambda b: LLMDataDist(LLMRole.MIX, 9).init({}), "FAILED", f"cluster {CLUSTER}", "finalize that one first"),
    (lambda b: LLMDataDist(LLMRole.MIX, 9).cache_manager, "FAILED", "llm datadist", "not initialized"),
    (lambda b: TransferWithCacheKeyConfig(BLOCKS, range(1), range(2)), "PI", "range(0, 2)", "differ in length"),
    # Options and variables.
    (setting("sync_kv_timeout", "1s"), "PI", "'1s'", "digits only"),
    (setting("device_id", -1), "PI", "device_id=-1", "must not be negative"),
    (setting("mem_utilization", 1.5), "PI", "mem_utilization=1.5", "[0.0, 1.0]"),
    (setting("link_retry_count", 0), "PI", "link_retry_count=0", "[1, 100]"),
    (option(llm_listenIpInfo="127.0.0.1"), "PI", "'127.0.0.1'", "host:port"),
    (option(llm_listenIpInfo="::1:26000"), "PI", "'::1:26000'", "[::1]:26000"),
    (option(llm_listenIpInfo="127.0.0.1:70000"), "PI", "70000", "[0, 65535]"),
    (option(llm_MemPoolConfig=json.dumps({"size": 1})), "PI", "llm.MemPoolConfig", "memory_size"),
    (option(llm_MemPoolConfig="{"), "PI", "llm.MemPoolConfig", "no JSON"),
    (option(llm_Strict="yes"), "PI", "'yes'", "0"),
    (option(environ={"LLM_DATADIST_TCP_STREAMS": "99"}), "PI", "LLM_DATADIST_TCP_STREAMS='99'", "[1, 16]"),
    (option(environ={"LLM_DATADIST_HOST_PATHS": "rdma"}), "PI", "'rdma'", "shm, cma, tcp"),
    (option({"llm.listenIpInfo": "127.0.0.1:1"}), "PI", "ge.exec.deviceId", "LLMConfig.device_id"),
    (option({"ge.exec.deviceId": "0"}, llm_listenIpInfo="127.0.0.1:1;127.0.0.1:2"), "PI", "2 addresses", "1 devices"),
    (address("1.2.3.x"), "RE", "'1.2.3.x'", "Can not parse ip str"),
    (address("1.2.3.4", 70000), "VE", "port=70000", "uint16"),
]


def test_there_are_enough():
    assert len(CALLS) >= 75


@pytest.mark.parametrize("call, kind, value, remedy", CALLS, ids=[f"{row[1]}-{row[2]}" for row in CALLS])
def test_wrong_call(benches, assert_raises, call, kind, value, remedy):
    error = refused(benches, assert_raises, "pools", call, kind)
    text = str(error)
    assert value in text and remedy in text, text
    if isinstance(error, LLMException):
        assert not error.recoverable or error.hint in text
        # A setting or an option names itself, a call is named by the exception; options are parsed here without `init`.
        assert error.operation or re.match(r"option |environment variable |llm datadist |\w+=", text), text


LENIENT = [
    lambda b: b.m.copy_blocks(b.blocks, {0: [1], 2: [1]}),
    lambda b: b.m.swap_blocks(b.blocks, cpu(b), {0: 0, 2: 0}),
    lambda b: b.m.copy_cache(b.slots, b.m.register_cache(CacheDesc(4, [3, 8], DataType.DT_FLOAT16), b.addrs())),
]


@pytest.mark.parametrize("call", LENIENT)
def test_the_switch_lets_through_what_the_original_does(benches, call):
    call(benches("lenient"))


def test_the_switch_keeps_unknown_keywords_of_pulls_from_mattering(benches, assert_raises):
    assert_raises("NOT_YET_LINK", benches("lenient").m.pull_cache, KEY, benches("lenient").slots, anything="else")


def test_every_keyword_of_a_pull_is_taken(benches, assert_raises):
    bench = benches("pools")
    layers = {"src_layer_range": range(1), "dst_layer_range": range(1), "tensor_num_per_layer": 2}
    assert_raises("NOT_YET_LINK", bench.m.pull_cache, cache_key=KEY, cache=bench.slots, batch_index=0, size=-1,
                  **layers)
    assert_raises("NOT_YET_LINK", bench.m.pull_blocks, src_cache_key=BLOCKS, dst_cache=bench.blocks, src_blocks=[0],
                  dst_blocks=[0], **layers)
    bench = benches("decoder")
    assert_raises("NOT_YET_LINK", bench.m.pull_cache, cache_key=KEY, kv_cache=bench.slots, batch_index=0, size=8,
                  src_cache_offset=0, dst_cache_offset=8, **layers)
    assert_raises("NOT_YET_LINK", bench.m.pull_blocks, prompt_cache_key=BLOCKS, decoder_kv_cache=bench.blocks,
                  prompt_blocks=[0], decoder_blocks=[0], **layers)
