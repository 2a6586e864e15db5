"""Helpers of both managers: keys, layer ranges, block maps, and the words in which they refuse."""
import pytest
from support.engines import NO_ID, desc

from llm_datadist import BlocksCacheKey, CacheDesc, CacheKey, CacheKeyByIdAndIndex, DataType
from llm_datadist.managers.base import (
    KEY_BLOCKS,
    KEY_BY_ID,
    KEY_PREFIX,
    KEY_REQ,
    MAX_TENSORS,
    block_pairs,
    blocks_key_specs,
    check_desc,
    cluster_of,
    key_specs,
    layers_of_pull,
    remote_key,
    tensors_of,
)


def test_key_kinds_are_those_of_the_core():
    from llm_datadist.core.engine import engine

    assert (KEY_REQ, KEY_PREFIX, KEY_BLOCKS, KEY_BY_ID) == (
        engine.KEY_REQ, engine.KEY_PREFIX, engine.KEY_BLOCKS, engine.KEY_BY_ID)


@pytest.mark.parametrize("keys, specs", [
    ([], []), ((), []),
    ([CacheKey(9, 5)], [(0, KEY_REQ, 5, 0)]),
    ([CacheKey(9, NO_ID), CacheKey(9, 5, 7)], [(1, KEY_REQ, 5, 7)]),
    ([CacheKey(9, 5, 1, 6)], [(0, KEY_PREFIX, 6, 1)]),                  # a prefix wins over a request
    ([CacheKey(9, NO_ID)] * 3, []),
    ([CacheKey(9, 0), CacheKey(9, NO_ID, 0, 0)], [(0, KEY_REQ, 0, 0), (1, KEY_PREFIX, 0, 0)]),
])
def test_key_specs(keys, specs):
    assert key_specs(desc(), keys) == specs


def test_more_keys_than_slots(assert_raises):
    error = assert_raises("PI", key_specs, desc(shape=[2, 1]), [CacheKey(1, i) for i in range(3)])
    assert "3" in str(error) and "2" in str(error)


@pytest.mark.parametrize("key, name", [
    (CacheKey(9, 5, 7), (KEY_REQ, 5, 7, 0)), (CacheKey(9, NO_ID, 7, 5), (KEY_PREFIX, 5, 7, 0)),
    (CacheKeyByIdAndIndex(9, 3, 2), (KEY_BY_ID, 3, 0, 2)), (CacheKeyByIdAndIndex(9, -3, 2), (KEY_BY_ID, 0, 0, 2)),
    (BlocksCacheKey(9, 7), (KEY_BLOCKS, NO_ID, 7, 0)), (BlocksCacheKey(prompt_cluster_id=9), (KEY_BLOCKS, NO_ID, 0, 0)),
])
def test_remote_key(key, name):
    assert remote_key(key) == name and cluster_of(key) == 9


@pytest.mark.parametrize("value", [None, -1, 2**64, 2**70])
def test_a_blocks_key_is_checked_when_it_is_used(assert_raises, value):
    for call in (remote_key, blocks_key_specs):
        assert f"model_id={value}" in str(assert_raises("PI", call, BlocksCacheKey(1, value)))
    assert f"cluster_id={value}" in str(assert_raises("PI", cluster_of, BlocksCacheKey(value)))
    assert blocks_key_specs(BlocksCacheKey(value, 3)) == [(0, KEY_BLOCKS, NO_ID, 3)]       # which cluster is no matter
    assert blocks_key_specs(None) == []


def test_check_desc(assert_raises):
    assert check_desc(CacheDesc(1, [2, 3], DataType.DT_INT64)) == 48
    assert check_desc(desc(shape=[1] * 31)) == 1 and check_desc(desc(shape=[7])) == 7
    for bad in (desc(num_tensors=0), desc(shape=[1] * 32), desc(shape=[1, 0])):
        assert_raises("PI", check_desc, bad)


@pytest.mark.parametrize("kwargs, tensors", [
    ({}, (None, None)),
    ({"src_layer_range": range(1, 3)}, ((2, 6), None)), ({"dst_layer_range": range(1)}, (None, (0, 2))),
    ({"src_layer_range": range(2), "dst_layer_range": range(1, 3)}, ((0, 4), (2, 6))),
    ({"src_layer_range": range(0), "dst_layer_range": range(5, 3)}, (None, None)),
    ({"src_layer_range": range(3, 3, 2)}, (None, None)),
])
def test_layers_of_pull(kwargs, tensors):
    assert layers_of_pull(desc(num_tensors=6), 2, kwargs) == tensors


def test_the_destination_must_have_whole_layers_where_a_range_is_given(assert_raises):
    assert layers_of_pull(desc(num_tensors=3), 2, {}) == (None, None)
    assert_raises("PI", layers_of_pull, desc(num_tensors=3), 2, {"src_layer_range": range(1)})


def test_tensors_of(assert_raises):
    assert tensors_of("layers", range(1, 3), 3) == (3, 9) and tensors_of("layers", None, 3) is None
    assert tensors_of("layers", range(MAX_TENSORS), 1) == (0, MAX_TENSORS)
    for layers, each in ((range(MAX_TENSORS + 1), 1), (range(2**31 + 1), 2), (range(2**70, 2**70 + 1), 2)):
        assert str(layers) in str(assert_raises("PI", tensors_of, "layers", layers, each))


def test_block_pairs_keep_the_order():
    assert block_pairs("info", {2: [0, 1], 0: [], 1: [2]}, 3, True) == ([2, 2, 1], [0, 1, 2])
    assert block_pairs("info", {}, 0, True) == ([], [])


@pytest.mark.parametrize("info", [{0: [1, 1]}, {0: [1], 2: [1]}])
def test_block_pairs_name_a_destination_that_repeats(assert_raises, info):
    assert "block 1 " in str(assert_raises("PI", block_pairs, "info", info, 3, True))
    assert block_pairs("info", info, 3, False)[1] == [1, 1]


@pytest.mark.parametrize("info, block", [({3: [0]}, 3), ({3: []}, 3), ({0: [1, -1]}, -1), ({0: [0, -1]}, -1),
                                         ({-1: [0]}, -1),
                                         ({0: [2**64]}, 2**64)])
def test_block_pairs_name_what_is_outside(assert_raises, info, block):
    error = assert_raises("PI", block_pairs, "info", info, 3, True)
    assert f"block {block} " in str(error) and "[0, 3)" in str(error)
