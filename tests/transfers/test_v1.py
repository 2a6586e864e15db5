"""The first generation between a PROMPT and a DECODER: bytes against the reference, offsets, releases, refusals."""
import gc

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import reference
from support.peer import Peers, engine_options_v1
from transfers.caches import Named, Spec, invoke
from transfers.cases import block_lists, examples, layers, layers_of_model, specs, strides
from transfers.pair import HERE, PATHS_VARIABLE, THERE, Pair
from transfers.refusal import INVALID, NOT_EXIST, NOT_LINKED, refused
from transfers.tasks import Gate, check_outcome, transfer, transfer_through

from llm_datadist import (
    BlocksCacheKey,
    CacheDesc,
    CacheKey,
    CacheKeyByIdAndIndex,
    DataType,
    LLMRole,
    LLMStatusCode,
    TransferConfig,
)

NONE = 2**64 - 1
REQ, PREFIX, MODEL = 5, 6, 7
POOL_PAGE = 512


@pytest.fixture(scope="module", params=["shm", "tcp"])
def pair(request):
    """A PROMPT there and a DECODER here."""
    env = {PATHS_VARIABLE: request.param}
    with Peers() as peers:
        there = peers.start(THERE, engine_options_v1(llm_Strict="0"), role=LLMRole.PROMPT, env=env)
        here = peers.here(HERE, engine_options_v1(listen=False, llm_Strict="0"), role=LLMRole.DECODER, env=env)
        peers.link(here, there)
        yield Pair(peers, False, request.param, here, there)


@pytest.fixture
def scene(pair):
    with pair.scene() as scene:
        yield scene


def pooled(stride, **fields):
    """Specs of what this generation allocates: device memory of its one pool."""
    return specs(stride, may_be_host=False, **fields).map(lambda spec: spec._replace(is_registered=False))


def keys_of(there, kind, slot):
    """A key of that kind bound to a slot, and the keys to make the cache with."""
    if kind == "id":
        return None, ()
    key = CacheKey(there.cluster_id, REQ, MODEL) if kind == "req" else CacheKey(there.cluster_id, NONE, MODEL, PREFIX)
    return key, (*[CacheKey(there.cluster_id, NONE)] * slot, key)


@examples
@given(data=st.data())
def test_pull_cache(pair, data):
    num_src, num_dst, arguments = data.draw(layers())
    src_stride, dst_stride = data.draw(strides, "src_stride"), data.draw(strides, "dst_stride")
    src = data.draw(pooled(src_stride, num_tensors=num_src), "src")
    dst = data.draw(pooled(dst_stride, num_tensors=num_dst), "dst")
    src_slot = data.draw(st.integers(0, src.num_slots - 1), "src_slot")
    dst_slot = data.draw(st.integers(0, dst.num_slots - 1), "dst_slot")
    offsets = {"src_cache_offset": data.draw(st.none() | st.integers(0, src_stride - 1), "src_cache_offset"),
               "dst_cache_offset": data.draw(st.none() | st.integers(0, dst_stride - 1), "dst_cache_offset")}
    src_offset, dst_offset = offsets["src_cache_offset"] or 0, offsets["dst_cache_offset"] or 0
    room = dst_stride - dst_offset
    sizes = st.integers(1, min(src_stride - src_offset, room))
    size = data.draw(st.just(-1) | sizes if room <= src_stride - src_offset else sizes, "size")
    kind = data.draw(st.sampled_from(["id", "req", "prefix"]), "kind of key")
    key, keys = keys_of(pair.there, kind, src_slot)
    with pair.scene() as scene:
        made, source = scene.make(pair.there, "src", src._replace(keys=keys))
        _, target = scene.make(pair.here, "dst", dst)
        key = key or CacheKeyByIdAndIndex(pair.there.cluster_id, made.cache_id, src_slot)
        pair.here.call(invoke, "pull_cache", key, Named("dst"), dst_slot, size, **arguments, **offsets)
        reference.copy_slot(target, dst_slot, source, src_slot, room if size == -1 else size, src_offset=src_offset,
                            dst_offset=dst_offset, **layers_of_model(arguments))
        scene.check()
        if kind == "req":
            taken = layers_of_model(arguments)["src_layers"]
            has_all = taken is None or len(taken) * arguments.get("tensor_num_per_layer", 2) == num_src
            keeps = not has_all or set(offsets.values()) != {None}
            assert pair.there.settled()["keys"] == keeps


@examples
@given(data=st.data())
def test_pull_blocks(pair, data):
    num_src, num_dst, arguments = data.draw(layers())
    stride = data.draw(strides, "block_bytes")
    key = BlocksCacheKey(pair.there.cluster_id, MODEL)
    src = data.draw(pooled(stride, num_tensors=num_src, is_blocks=True, keys=(key,)), "src")
    dst = data.draw(pooled(stride, num_tensors=num_dst, is_blocks=True), "dst")
    src_blocks, dst_blocks = (list(map(int, blocks))
                              for blocks in data.draw(block_lists(src.num_slots, dst.num_slots), "blocks"))
    with pair.scene() as scene:
        _, source = scene.make(pair.there, "src", src)
        _, target = scene.make(pair.here, "dst", dst)
        pair.here.call(invoke, "pull_blocks", key, Named("dst"), src_blocks, dst_blocks, **arguments)
        reference.copy_blocks(target, dst_blocks, source, src_blocks, **layers_of_model(arguments))
        scene.check()
        assert pair.there.settled()["keys"] == 1


@examples
@given(data=st.data())
def test_transfer(pair, data):
    """A PROMPT writes to its DECODER over the link that the DECODER made."""
    num_layers = data.draw(st.integers(1, 3), "num_layers")
    stride = data.draw(strides, "stride")
    is_blocks = data.draw(st.booleans(), "is_blocks")
    src = data.draw(pooled(stride, num_tensors=2 * num_layers, is_blocks=is_blocks), "src")
    dst = data.draw(pooled(stride, num_tensors=2 * num_layers, is_blocks=is_blocks), "dst")
    first = data.draw(st.integers(0, num_layers - 1), "first layer")
    sent = range(first, num_layers)
    with pair.scene() as scene:
        _, source = scene.make(pair.there, "src", src)
        made, target = scene.make(pair.here, "dst", dst)
        if is_blocks:
            src_blocks, dst_blocks = (list(map(int, blocks)) for blocks in
                                      data.draw(block_lists(src.num_slots, dst.num_slots), "blocks"))
            config = TransferConfig(pair.here.cluster_id, made.addrs[2 * first:], sent)
            outcome = pair.there.call(transfer, "src", [config], src_blocks, dst_blocks)
            reference.copy_blocks(target, dst_blocks, source, src_blocks, src_layers=sent, dst_layers=sent)
        else:
            src_slot = data.draw(st.integers(0, src.num_slots - 1), "src_batch_index")
            dst_slot = data.draw(st.integers(0, dst.num_slots - 1), "slot in the destination")
            addrs = [addr + dst_slot * stride for addr in made.addrs[2 * first:]]
            outcome = pair.there.call(transfer, "src", [TransferConfig(pair.here.cluster_id, addrs, sent, src_slot)])
            reference.copy_slot(target, dst_slot, source, src_slot, stride, src_layers=sent, dst_layers=sent)
        check_outcome(outcome, [sent])
        scene.check()


# ---------------------------------------------------------------------------------------------------------- release

SPEC = Spec(2, 3, (POOL_PAGE,))


def used_pages(process):
    pool = process.stats()["device_pool"]
    return (pool["bytes"] - pool["free_bytes"]) // POOL_PAGE


@pytest.mark.parametrize("offsets", [
    {"src_cache_offset": 0}, {"dst_cache_offset": 0}, {"src_cache_offset": 0, "dst_cache_offset": 0},
    {"src_cache_offset": 8, "size": 4}, {"src_cache_offset": None, "dst_cache_offset": 0},
])
@pytest.mark.parametrize("by_id", [False, True])
def test_offsets_that_are_given_keep_the_key(pair, scene, offsets, by_id):
    key = CacheKey(pair.there.cluster_id, REQ)
    made, _ = scene.make(pair.there, "src", SPEC._replace(keys=(key,)))
    scene.make(pair.here, "dst", SPEC)
    if by_id:
        key = CacheKeyByIdAndIndex(pair.there.cluster_id, made.cache_id)
    for _ in range(2):
        pair.here.call(invoke, "pull_cache", key, Named("dst"), **offsets)
        assert pair.there.settled()["keys"] == 1
    pair.here.call(invoke, "pull_cache", key, Named("dst"), src_cache_offset=None, dst_cache_offset=None)
    assert pair.there.settled()["keys"] == 0


@pytest.mark.parametrize("kind, releases", [("req", True), ("prefix", False), ("id of req", True),
                                            ("id of prefix", False), ("id", False)])
def test_which_pulls_release(pair, scene, kind, releases):
    """And a cache that was deallocated goes with its last key."""
    there = pair.there
    bound = {"req": CacheKey(there.cluster_id, REQ), "prefix": CacheKey(there.cluster_id, NONE, 0, PREFIX)}
    keys = tuple(key for name, key in bound.items() if name in kind)
    made, source = scene.make(there, "src", SPEC._replace(keys=keys))
    _, target = scene.make(pair.here, "dst", SPEC._replace(seed=1))
    key = CacheKeyByIdAndIndex(there.cluster_id, made.cache_id) if kind.startswith("id") else bound[kind]
    pages = used_pages(there)
    if keys:
        there.call(deallocate, "src")
    assert used_pages(there) == pages
    pair.here.call(invoke, "pull_cache", key, Named("dst"))
    reference.copy_slot(target, 0, source, 0, POOL_PAGE)
    assert there.settled()["keys"] == len(keys) - releases
    assert used_pages(there) == pages - (6 if releases else 0)
    scene.lose("src")
    scene.check()


def deallocate(node, name):
    held = node.kept[name]
    held.guards.clear()
    node.cache_manager.deallocate_cache(held.cache)
    assert held.cache.per_device_tensor_addrs == []


def test_deallocate_twice_is_a_no_op(pair, scene):
    scene.make(pair.there, "src", SPEC)
    scene.lose("src")
    pair.there.call(deallocate, "src")
    before = pair.there.stats()
    pair.there.call(deallocate, "src")
    assert pair.there.settled()["caches"] == before["caches"]
    assert used_pages(pair.there) == 16          # the two guards around it


def test_the_last_of_equal_keys_counts(pair, scene):
    key = CacheKey(pair.there.cluster_id, REQ)
    _, source = scene.make(pair.there, "src", SPEC._replace(keys=(key, key, CacheKey(1, NONE))))
    assert pair.there.settled()["keys"] == 1
    _, target = scene.make(pair.here, "dst", SPEC._replace(seed=1))
    pair.here.call(invoke, "pull_cache", key, Named("dst"))
    reference.copy_slot(target, 0, source, 1, POOL_PAGE)
    scene.check()
    refused(NOT_EXIST, pair.here.call, invoke, "pull_cache", key, Named("dst"))


def test_layers_release_once_all_were_taken(pair, scene):
    key = CacheKey(pair.there.cluster_id, REQ)
    scene.make(pair.there, "src", SPEC._replace(num_tensors=6, keys=(key, CacheKey(1, REQ + 1))))
    scene.make(pair.here, "dst", SPEC)
    for count, layer in ((2, 2), (2, 0), (2, 2), (1, 1)):
        pair.here.call(invoke, "pull_cache", key, Named("dst"), src_layer_range=range(layer, layer + 1))
        assert pair.there.settled()["keys"] == count


def test_a_handle_that_is_collected_deallocates(pair):
    """Its keys keep the memory as they would after an explicit call."""
    there = pair.there
    there.call(forget_handle, (CacheKey(1, REQ),))
    assert (there.settled()["caches"], there.stats()["keys"], used_pages(there)) == (1, 1, 2)
    there.call(invoke, "remove_cache_key", CacheKey(1, REQ))
    there.call(forget_handle, ())
    assert (there.settled()["caches"], used_pages(there)) == (0, 0)


def forget_handle(node, keys):
    node.cache_manager.allocate_cache(CacheDesc(2, [1, POOL_PAGE], DataType.DT_UINT8), keys)
    gc.collect()


def test_cache_tensors_alias_the_memory(pair, scene):
    _, source = scene.make(pair.there, "src", SPEC._replace(data_type=DataType.DT_INT8))
    assert pair.there.call(tensor_bytes, "src", 1) == bytes(source.tensors[1])


def tensor_bytes(node, name, index):
    tensors = node.cache_manager.get_cache_tensors(node.kept[name].cache, index)
    assert len(tensors) == 1
    return tensors[0].numpy(copy=True).tobytes()


# --------------------------------------------------------------------------------------------------------- refusals

@pytest.mark.parametrize("code, names, arguments", [
    (INVALID, [512], {"src_cache_offset": 512}), (INVALID, [512], {"dst_cache_offset": 512}),
    (INVALID, [2**63 - 1], {"src_cache_offset": 2**63 - 1}), (INVALID, [2**63 - 1], {"dst_cache_offset": 2**63 - 1}),
    (INVALID, [513], {"size": 513}), (INVALID, [509, 4], {"src_cache_offset": 4, "size": 509}),
    (INVALID, [509, 4], {"dst_cache_offset": 4, "size": 509}), (INVALID, [512, 1], {"src_cache_offset": 1}),
    (INVALID, [3], {"batch_index": 3}), (INVALID, [6, 2], {"src_layer_range": range(3)}),
    (ValueError, [-1], {"src_cache_offset": -1}), (ValueError, [-1], {"dst_cache_offset": -1}),
    (ValueError, [2**63], {"dst_cache_offset": 2**63}), (TypeError, ["src_cache_offset"], {"src_cache_offset": 1.0}),
    (TypeError, ["dst_cache_offset"], {"dst_cache_offset": "0"}),
])
def test_pull_cache_refuses(pair, scene, code, names, arguments):
    key = CacheKey(pair.there.cluster_id, REQ)
    scene.make(pair.there, "src", SPEC._replace(keys=(key,)))
    scene.make(pair.here, "dst", SPEC._replace(seed=1))
    refuses(pair, scene, code, names, "pull_cache", key, Named("dst"), **arguments)


def refuses(pair, scene, code, names, method, *args, process=None, **kwargs):
    """The call is refused, releases nothing and moves nothing."""
    keys = pair.there.stats()["keys"]
    process = process or pair.here
    if code in (TypeError, ValueError):
        with pytest.raises(code) as caught:
            process.call(invoke, method, *args, **kwargs)
        assert all(str(name) in str(caught.value) for name in names), caught.value
    else:
        refused(code, process.call, invoke, method, *args, names=names, **kwargs)
    assert pair.there.settled()["keys"] == keys
    scene.check()


def test_other_refusals(pair, scene):
    there, here = pair.there.cluster_id, pair.here.cluster_id
    blocks_key = BlocksCacheKey(there, MODEL)
    scene.make(pair.there, "src", SPEC._replace(keys=(CacheKey(there, REQ),)))
    scene.make(pair.there, "blocks", SPEC._replace(is_blocks=True, keys=(blocks_key,)))
    dst, _ = scene.make(pair.here, "dst", SPEC._replace(seed=1))
    scene.make(pair.here, "dst blocks", SPEC._replace(is_blocks=True, seed=2))
    by_id = CacheKeyByIdAndIndex(there, 2**40)
    for code, names, method, key, cache, *lists in [
            (NOT_EXIST, [REQ + 1], "pull_cache", CacheKey(there, REQ + 1), "dst"),
            (NOT_EXIST, [2**40], "pull_cache", by_id, "dst"),
            (NOT_LINKED, [77], "pull_cache", CacheKey(77, REQ), "dst"),
            (INVALID, ["this one"], "pull_cache", CacheKey(here, REQ), "dst"),
            (INVALID, ["contiguous"], "pull_cache", CacheKey(there, REQ), "dst blocks"),
            (INVALID, ["blocks"], "pull_blocks", blocks_key, "dst", [0], [0]),
            (INVALID, [3], "pull_blocks", blocks_key, "dst blocks", [3], [0]),
            (INVALID, [3], "pull_blocks", blocks_key, "dst blocks", [0, 1], [0, 3]),
            (INVALID, [2, 1], "pull_blocks", blocks_key, "dst blocks", [0, 1], [0]),
            (INVALID, [0], "pull_blocks", blocks_key, "dst blocks", [], []),
            (ValueError, [-1], "pull_blocks", blocks_key, "dst blocks", [0], [-1]),
            (TypeError, ["prompt_blocks"], "pull_blocks", blocks_key, "dst blocks", (0,), [0]),
            (TypeError, ["prompt_cache_key"], "pull_blocks", CacheKey(there, REQ), "dst blocks", [0], [0]),
    ]:
        refuses(pair, scene, code, names, method, key, Named(cache), *lists)
    # What the other role may do.
    refuses(pair, scene, INVALID, ["PROMPT"], "pull_cache", CacheKey(here, 1), Named("src"), process=pair.there)
    refuses(pair, scene, INVALID, ["DECODER"], "remove_cache_key", CacheKey(there, REQ))
    refuses(pair, scene, INVALID, ["DECODER"], "transfer_cache_async", Named("dst"), None, [])
    outcome = pair.there.call(transfer, "src", [TransferConfig(pair.here.cluster_id,
                                                               [dst.addrs[0], dst.addrs[1] + 2 * POOL_PAGE + 1])])
    assert outcome.results == [INVALID]
    scene.check()


def test_waits_report_the_timeout_of_this_generation(pair, scene):
    """Tried where the task is, in the PROMPT."""
    scene.make(pair.there, "src", SPEC)
    made, _ = scene.make(pair.here, "dst", SPEC)
    codes = pair.there.call(wait_too_short, [TransferConfig(pair.here.cluster_id, made.addrs)])
    late, done = LLMStatusCode.LLM_WAIT_PROCESS_TIMEOUT, LLMStatusCode.LLM_SUCCESS
    assert codes == (late, [late], done)


def wait_too_short(node, configs):
    gate = Gate(0)
    task = transfer_through(node, gate, "src", configs)
    early = task.synchronize(1), task.get_results(1)
    gate.open.set()
    return (*early, task.synchronize())
