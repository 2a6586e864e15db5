"""`CacheManager`: every row of the API's error tables on pulls, pushes and layer-wise transfers, without a peer.

What needs a link ends with the link that is missing. A refused call leaves all bytes, and everything else, alone.
"""
import array

import numpy as np
import pytest
from support.engines import (
    BLOCKS,
    BY_ID,
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

from llm_datadist import (
    BlocksCacheKey,
    Cache,
    CacheKey,
    CacheKeyByIdAndIndex,
    CacheManager,
    LLMException,
    LLMStatusCode,
    TransferConfig,
    TransferWithCacheKeyConfig,
)

NO_RANGE = [([0, 1], "TE"), (1, "TE"), ("01", "TE")]


@pytest.fixture
def bench(benches):
    return benches("pools")


# -------------------------------------------------------------------------------------------------------------- pulls

def pull(**kwargs):
    """A pull_cache that is right but for `kwargs`, and that there is no link."""
    arguments = {"cache_key": KEY, "batch_index": 0, "size": -1, **kwargs}
    return lambda b: b.m.pull_cache(**{"cache": b.slots, **arguments})


def pull_blocks(**kwargs):
    """A pull_blocks that is right but for `kwargs`, and that there is no link."""
    arguments = {"src_cache_key": BLOCKS, "src_blocks": [0], "dst_blocks": [1], **kwargs}
    return lambda b: b.m.pull_blocks(**{"dst_cache": b.blocks, **arguments})


def given(**arguments):
    """Arguments of a call, by name."""
    return arguments


LAYERS = [
    *((given(tensor_num_per_layer=value), kind) for value, kind in NOT_UINT32), (given(tensor_num_per_layer=0), "PI"),
    *((given(src_layer_range=value), kind) for value, kind in NO_RANGE),
    *((given(dst_layer_range=value), kind) for value, kind in NO_RANGE),
    (given(src_layer_range=range(0, 4, 2)), "PI"), (given(dst_layer_range=range(3, 1, -1)), "PI"),
    (given(src_layer_range=range(-1, 1)), "PI"), (given(dst_layer_range=range(-2, 0)), "PI"),
    (given(src_layer_range=range(2), dst_layer_range=range(1)), "PI"),
    (given(src_layer_range=range(1), dst_layer_range=range(1), tensor_num_per_layer=3), "PI"),
    (given(src_layer_range=range(2**70)), "PI"), (given(dst_layer_range=range(2**32, 2**33)), "PI"),
    (given(src_layer_range=range(2**70), dst_layer_range=range(2**71)), "PI"),
]


@pytest.mark.parametrize("engine, call, kind", rows(
    (pull(cache_key="key"), "TE"), (pull(cache_key=None), "AE"), (pull(cache_key=BLOCKS), "TE"),
    (pull(cache_key=KEY), "TE", "remote"), (pull(cache_key=BLOCKS), "TE", "remote"),
    (pull(cache="cache"), "TE"), (pull(cache=None), "AE"),
    *((pull(batch_index=value), kind) for value, kind in NOT_UINT32),
    *((pull(size=value), kind) for value, kind in NOT_INT64),
    (pull(size=0), "PI"), (pull(size=-2), "PI"), (pull(size=-2**63), "PI"),
    (lambda b: b.m.pull_cache(KEY, b.blocks), "PI"), (lambda b: b.m.pull_cache(KEY, b.registered), "PI"),
    (lambda b: b.m.pull_cache(KEY, b.cpu), "PI"),
    (pull(cache_key=CacheKey(PEER, 1, 0, 2)), "PI"), (pull(cache_key=CacheKey(PEER, NO_ID)), "PI"),
    *((pull(**arguments), kind) for arguments, kind in LAYERS),
    *((pull(cache_key=BY_ID, **arguments), kind, "remote") for arguments, kind in LAYERS),
    # What the engine says, without a link and with the own cluster.
    (pull(), "NOT_YET_LINK"), (pull(cache_key=PREFIX), "NOT_YET_LINK"), (pull(cache_key=BY_ID), "NOT_YET_LINK"),
    (pull(cache_key=BY_ID), "NOT_YET_LINK", "remote"),
    (pull(src_layer_range=range(0), dst_layer_range=range(5, 5)), "NOT_YET_LINK"),
    (pull(src_layer_range=range(5, 2)), "NOT_YET_LINK"), (pull(src_layer_range=None), "NOT_YET_LINK"),
    (pull(cache_key=CacheKey(CLUSTER, 1)), "PI"), (pull(cache_key=CacheKeyByIdAndIndex(CLUSTER, 1)), "PI", "remote"),
    (lambda b: b.m.pull_cache(KEY, Cache(10**6, desc(), [1] * TENSORS, b.m, False, False)), "NOT_EXIST"),
))
def test_pull_cache_refuses(benches, assert_raises, engine, call, kind):
    refused(benches, assert_raises, engine, call, kind)


NO_BLOCKS = [
    None, 1, "01", b"01", bytearray(b"01"), {0: 1}, {0, 1}, iter([0]), [0, None], [0, "1"], [0.0], (1.5,),
    np.array([True]), np.array([0.5]), np.array(["a"]), array.array("d", [0.0]), np.array(3), object(),
]
NEGATIVE = [[-1], (-1,), range(-1, 1), np.array([-1]), array.array("i", [-1]), [2**63], np.array([2**63], np.uint64)]


@pytest.mark.parametrize("engine, call, kind", rows(
    (pull_blocks(src_cache_key="key"), "TE"), (pull_blocks(src_cache_key=None, src_blocks=[]), "AE"),
    (pull_blocks(dst_cache="cache"), "TE"), (pull_blocks(dst_cache=None), "AE"),
    (lambda b: b.m.pull_blocks(BLOCKS, b.slots, [0], [0]), "PI"),
    (lambda b: b.m.pull_blocks(BLOCKS, b.host_slots, [0], [0]), "PI"),
    *((pull_blocks(src_blocks=value), "TE") for value in NO_BLOCKS),
    *((pull_blocks(dst_blocks=value), "TE") for value in NO_BLOCKS),
    *((pull_blocks(src_blocks=value, dst_blocks=[0] * len(value)), "VE") for value in NEGATIVE),
    *((pull_blocks(src_blocks=[0] * len(value), dst_blocks=value), "VE") for value in NEGATIVE),
    (pull_blocks(dst_blocks=[]), "PI"), (pull_blocks(dst_blocks=()), "PI"), (pull_blocks(dst_blocks=range(0)), "PI"),
    (pull_blocks(dst_blocks=np.array([], np.int64)), "PI"), (lambda b: b.m.pull_blocks(BLOCKS, b.blocks), "PI"),
    (pull_blocks(src_blocks=[]), "PI"), (pull_blocks(src_blocks=np.array([], np.int32)), "PI"),
    (pull_blocks(src_cache_key=KEY), "PI"), (pull_blocks(src_cache_key=BY_ID), "PI"),
    (pull_blocks(src_cache_key=KEY, src_blocks=np.array([1])), "PI"),
    (pull_blocks(src_blocks=[0, 1]), "PI"), (pull_blocks(dst_blocks=[0, 1]), "PI"),
    (pull_blocks(src_cache_key=CacheKey(PEER, 1, 0, 2), src_blocks=[]), "PI"),
    (pull_blocks(src_cache_key=CacheKey(PEER, NO_ID), src_blocks=[]), "PI"),
    *((pull_blocks(src_cache_key=BlocksCacheKey(*ids)), "PI")
      for ids in [(None,), (-1,), (2**64,), (PEER, None), (PEER, -1), (PEER, 2**64)]),
    *((pull_blocks(**arguments), kind) for arguments, kind in LAYERS),
    *((pull_blocks(src_cache_key=KEY, src_blocks=(), **arguments), kind, "remote") for arguments, kind in LAYERS),
    (pull_blocks(), "NOT_YET_LINK"), (pull_blocks(), "NOT_YET_LINK", "remote"),
    (pull_blocks(src_cache_key=KEY, src_blocks=[]), "NOT_YET_LINK"),
    (pull_blocks(src_cache_key=BY_ID, src_blocks=range(0)), "NOT_YET_LINK", "remote"),
    (pull_blocks(src_cache_key=BlocksCacheKey(CLUSTER)), "PI"),
    (lambda b: b.m.pull_blocks(BLOCKS, b.cpu, [0], [0]), "NOT_EXIST"),
    (lambda b: b.m.pull_blocks(BLOCKS, Cache(10**6, desc(), [], b.m, False, True), [0], [0]), "NOT_EXIST"),
))
def test_pull_blocks_refuses(benches, assert_raises, engine, call, kind):
    refused(benches, assert_raises, engine, call, kind)


@pytest.mark.parametrize("blocks", [
    [0, 2], (0, 2), range(0, 4, 2), array.array("i", [0, 2]), array.array("l", [0, 2]), array.array("Q", [0, 2]),
    array.array("B", [0, 2]), memoryview(array.array("q", [0, 2])), np.array([0, 2]), np.array([0, 2], np.int32),
    np.array([0, 2], np.uint32), np.array([0, 2], np.uint64), np.array([0, 9, 2])[::2], [np.int64(0), np.int32(2)],
    [False, 2],
], ids=lambda blocks: f"{type(blocks).__name__}-{getattr(blocks, 'dtype', getattr(blocks, 'typecode', ''))}")
def test_block_lists_of_many_kinds_reach_the_engine(bench, assert_raises, blocks):
    """They pass every check of an argument: only the link is missing."""
    with bench.unchanged():
        assert_raises("NOT_YET_LINK", bench.m.pull_blocks, BLOCKS, bench.blocks, blocks, blocks)


def test_an_error_names_the_block(bench, assert_raises):
    error = assert_raises("VE", bench.m.pull_blocks, BLOCKS, bench.blocks, [0, 1], [2, -5])
    assert "dst_blocks[1]" in str(error) and "-5" in str(error)
    error = assert_raises("PI", bench.m.pull_blocks, BlocksCacheKey(PEER, -3), bench.blocks, [0], [2])
    assert "model_id=-3" in str(error)


# ------------------------------------------------------------------------------------------------------------- pushes

def push(**kwargs):
    """A push_cache that is right but for `kwargs`, and that there is no link."""
    arguments = {"dst_cache_key": BY_ID, **kwargs}
    return lambda b: b.m.push_cache(**{"src_cache": b.slots, **arguments})


def push_blocks(**kwargs):
    """A push_blocks that is right but for `kwargs`, and that there is no link."""
    arguments = {"dst_cache_key": BLOCKS, "src_blocks": [0], "dst_blocks": [1], **kwargs}
    return lambda b: b.m.push_blocks(**{"src_cache": b.blocks, **arguments})


PUSH_LAYERS = [
    *(row for row in LAYERS if "range" not in str(row[0]) or row[1] == "TE"),
    (given(src_layer_range=range(0, 4, 2)), "PI"), (given(dst_layer_range=range(3, 1, -1)), "PI"),
    (given(src_layer_range=range(-1, 1)), "PI"), (given(dst_layer_range=range(0)), "PI"),
    (given(src_layer_range=range(5, 5)), "PI"), (given(src_layer_range=range(2), dst_layer_range=range(1)), "PI"),
    (given(src_layer_range=range(1)), "PI"), (given(dst_layer_range=range(1)), "PI"),
    (given(src_layer_range=range(2**70), dst_layer_range=range(2**70)), "PI"),
]


@pytest.mark.parametrize("engine, call, kind", rows(
    (push(), "PI", "pools"), (push_blocks(), "PI", "pools"), (push(), "PI", "device only"),
    (push(dst_cache_key=None), "TE"), (push(dst_cache_key=KEY), "TE"), (push(dst_cache_key=BLOCKS), "TE"),
    (push(src_cache=None), "TE"), (push(src_cache="cache"), "TE"),
    *((push(src_batch_index=value), kind) for value, kind in NOT_UINT32),
    *((push(size=value), kind) for value, kind in NOT_INT64), (push(size=0), "PI"), (push(size=16), "PI"),
    (lambda b: b.m.push_cache(BY_ID, b.blocks), "PI"), (lambda b: b.m.push_cache(BY_ID, b.cpu), "PI"),
    *((push(**arguments), kind) for arguments, kind in PUSH_LAYERS),
    (push(), "NOT_YET_LINK"), (push(dst_cache_key=CacheKeyByIdAndIndex(CLUSTER, 1)), "PI"),
    (push(src_layer_range=range(1), dst_layer_range=range(1, 2)), "NOT_YET_LINK"),
    (lambda b: b.m.push_cache(BY_ID, Cache(10**6, desc(), [], b.m, False, False)), "NOT_EXIST"),
    (push_blocks(dst_cache_key=None), "TE"), (push_blocks(dst_cache_key=BY_ID), "TE"),
    (push_blocks(dst_cache_key=KEY), "TE"), (push_blocks(src_cache=None), "TE"), (push_blocks(src_cache=1), "TE"),
    (lambda b: b.m.push_blocks(BLOCKS, b.slots, [0], [0]), "PI"),
    *((push_blocks(src_blocks=value), "TE") for value in NO_BLOCKS),
    *((push_blocks(dst_blocks=value), "TE") for value in NO_BLOCKS),
    *((push_blocks(src_blocks=value, dst_blocks=[0] * len(value)), "VE") for value in NEGATIVE),
    (push_blocks(dst_blocks=[]), "PI"), (push_blocks(src_blocks=[]), "PI"), (push_blocks(src_blocks=[0, 1]), "PI"),
    *((push_blocks(dst_cache_key=BlocksCacheKey(*ids)), "PI") for ids in [(None,), (-1,), (PEER, None), (PEER, 2**64)]),
    *((push_blocks(**arguments), kind) for arguments, kind in PUSH_LAYERS),
    (push_blocks(), "NOT_YET_LINK"), (push_blocks(dst_cache_key=BlocksCacheKey(CLUSTER)), "PI"),
    (lambda b: b.m.push_blocks(BLOCKS, b.cpu, [0], [0]), "NOT_EXIST"),
    engine="remote",
))
def test_push_refuses(benches, assert_raises, engine, call, kind):
    refused(benches, assert_raises, engine, call, kind)


def test_push_needs_a_remote_accessible_source(benches, assert_raises):
    bench = benches("remote")
    cache = bench.m.register_blocks_cache(desc(), bench.addrs(), None, False)
    with bench.unchanged():
        assert_raises("PI", bench.m.push_blocks, BLOCKS, cache, [0], [0])
    bench.m.unregister_cache(cache.cache_id)


# ---------------------------------------------------------------------------------------------------------- transfers

def config(**kwargs):
    return TransferConfig(**{"dst_cluster_id": PEER, "dst_addrs": [4096] * TENSORS, **kwargs})


def keyed(cache_key=BY_ID, layers=range(2), **kwargs):
    return TransferWithCacheKeyConfig(cache_key, layers, kwargs.pop("dst_layer_range", layers), **kwargs)


def changed(made, **attributes):
    """A config after its setters."""
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


UNSET = object()


def transfer(*lists, configs=UNSET, **kwargs):
    """A transfer_cache_async that is right but for its arguments."""
    def call(bench):
        made = ([config()] if bench.name != "remote" else [keyed()]) if configs is UNSET else configs
        arguments = {"src_cache": bench.slots, "layer_synchronizer": Synchronizer(), "transfer_configs": made, **kwargs}
        arguments["src_cache"] = bench.blocks if arguments["src_cache"] == "blocks" else arguments["src_cache"]
        return bench.m.transfer_cache_async(*(arguments.pop(name) for name in list(arguments)[:3]), *lists, **arguments)
    return call


NO_LIST = [1, "01", {0}, range(1), np.array([0]), [None], ["0"], [0.0]]


@pytest.mark.parametrize("engine, call, kind", rows(
    (transfer(src_cache=None), "TE"), (transfer(src_cache="cache"), "TE"),
    (lambda b: transfer(src_cache=b.host_slots)(b), "PI"), (lambda b: transfer(src_cache=b.cpu)(b), "PI"),
    *((transfer(value, [0]), "TE") for value in NO_LIST), *((transfer(None, value, 16), "TE") for value in NO_LIST),
    *((transfer([value], [0]), "VE") for value in (-1, 2**64)), (transfer([0], [-1]), "VE"),
    *((transfer(None, [0], value), kind) for value, kind in NOT_UINT64 if value is not None),
    (transfer([0]), "PI"), (transfer([0], []), "PI"), (transfer([0, 1], [0]), "PI"), (transfer([0], [0, 1]), "PI"),
    (transfer(None, [0]), "PI"), (transfer([], [0]), "PI"), (transfer(None, [0], 0), "PI"),
    (transfer(None, None, 16), "PI"), (transfer([], [], 16), "PI"),
    (transfer(layer_synchronizer=None), "TE"), (transfer(layer_synchronizer=lambda layer, timeout: True), "TE"),
    *((transfer(configs=value), "TE") for value in (None, config(), "configs", {1: config()}, [None], [config(), 1])),
    (transfer(configs=[keyed()]), "TE"), (transfer(configs=(keyed(),)), "TE"),
    (transfer(configs=[config(), keyed()]), "TE", "remote"), (transfer(configs=[None]), "TE", "remote"),
    (transfer([0], [0], src_cache="blocks", configs=[config(src_batch_index=1)]), "PI"),
    (transfer(src_cache="blocks", configs=[config(src_batch_index=1)]), "PI"),
    (transfer([0], [0], src_cache="blocks", configs=[keyed(src_batch_index=1)]), "PI", "remote"),
    *((transfer(configs=[config(src_layer_range=layers)]), "PI") for layers in (range(3), range(2, 3), range(2**70))),
    (transfer(configs=[keyed(layers=range(3))]), "PI", "remote"),
    (transfer(configs=[config(dst_addrs=[4096] * 2)]), "PI"), (transfer(configs=[config(dst_addrs=[])]), "PI"),
    (transfer(configs=[config(src_layer_range=range(1))]), "PI"),
    (transfer(configs=[config(), config(dst_addrs=[4096])]), "PI"),
    # What the setters of a config let through, one at a time.
    (transfer(configs=[changed(keyed(), cache_key=None)]), "TE", "remote"),
    (transfer(configs=[changed(keyed(), src_layer_range=range(1))]), "PI", "remote"),
    (transfer(configs=[changed(keyed(), dst_layer_range=range(1, 2))]), "PI", "remote"),
    (transfer(configs=[changed(keyed(), dst_layer_range=range(2**70))]), "PI", "remote"),
    (transfer([0], [0], src_cache="blocks", configs=[changed(keyed(BLOCKS), src_batch_index=2)]), "PI", "remote"),
    (transfer(configs=[changed(keyed(BLOCKS), src_batch_index=2)]), "PI", "remote"),
    *((transfer(configs=[keyed(BlocksCacheKey(*ids))]), "PI", "remote")
      for ids in [(None,), (-1,), (2**64,), (PEER, None), (PEER, -1)]),
))
def test_transfer_refuses(benches, assert_raises, engine, call, kind):
    refused(benches, assert_raises, engine, call, kind)


def test_transfer_takes_whole_layers_only(bench, assert_raises):
    odd = bench.m.allocate_cache(desc(num_tensors=3))
    with bench.unchanged():
        assert_raises("PI", bench.m.transfer_cache_async, odd, Synchronizer(), [config(dst_addrs=[1, 2])])
    bench.m.deallocate_cache(odd)


@pytest.mark.parametrize("engine", ["pools", "remote"])
def test_a_transfer_reports_what_is_no_error_of_an_argument(benches, engine):
    bench = benches(engine)
    synchronizer = Synchronizer()
    mine = config() if engine == "pools" else keyed()
    mine.src_layer_range = None
    with bench.unchanged():
        task = bench.m.transfer_cache_async(bench.slots, synchronizer, [mine, mine])
        assert task.synchronize() is LLMStatusCode.LLM_NOT_YET_LINK
        assert task.get_results() == [LLMStatusCode.LLM_NOT_YET_LINK, None]
        assert synchronizer.layers == [(0, None)]
        assert isinstance(task.exception(), LLMException)
    assert mine.src_layer_range == range(TENSORS // 2)


@pytest.mark.parametrize("call", [
    transfer([0], [0]),                                                             # contiguous source, block to block
    transfer(None, [0], 16, src_cache="blocks"),                                    # blocks source, cut into blocks
    transfer(None, [0], SLOTS * SLOT_BYTES + 1),                                    # a block larger than a tensor
    transfer([0], [0], 8, src_cache="blocks"),                                      # another size than the source's
    transfer([0], [2**62], src_cache="blocks"),                                     # outside any address space
])
def test_a_transfer_of_a_shape_that_does_not_exist_is_reported_by_its_task(bench, call):
    with bench.unchanged():
        task = call(bench)
        assert task.get_results() == [LLMStatusCode.LLM_PARAM_INVALID]
        assert task.exception().status_code is LLMStatusCode.LLM_PARAM_INVALID


def test_a_transfer_by_address_also_in_remote_accessible_mode(benches):
    bench = benches("remote")
    assert transfer(configs=[config()])(bench).get_results() == [LLMStatusCode.LLM_NOT_YET_LINK]


def test_transfer_without_configs_has_nothing_to_do(bench):
    task = bench.m.transfer_cache_async(bench.slots, Synchronizer(), [])
    assert task.synchronize() is LLMStatusCode.LLM_SUCCESS and task.get_results() == []


def test_visible_helpers(bench, assert_raises):
    assert bench.dist.cache_manager is bench.m and isinstance(bench.m, CacheManager)
    CacheManager.check_cache_key(KEY)
    CacheManager.check_cache_key(PREFIX)
    for key in (CacheKey(1, NO_ID), CacheKey(1, 2, 0, 3)):
        assert_raises("PI", CacheManager.check_cache_key, key)
