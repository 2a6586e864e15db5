"""Pulls between two processes, byte for byte against the reference: contiguous, blocks, and slots cut into blocks."""
from hypothesis import given
from hypothesis import strategies as st
from support import reference
from transfers.caches import Named, invoke
from transfers.cases import block_lists, examples, layers, layers_of_model, specs, strides

from llm_datadist import BlocksCacheKey, CacheKey, CacheKeyByIdAndIndex

REQUEST, PREFIX, MODEL, NONE = 2**64 - 2, 7, 3, 2**64 - 1


def slot_key(data, owner, slot, may_be_by_key):
    """A key bound to `slot`, and the keys to make the cache with; None for the former stands for a key by id."""
    kinds = ["id"] + ["req", "prefix"] * may_be_by_key
    kind = data.draw(st.sampled_from(kinds), "kind of key")
    if kind == "id":
        return None, ()
    padding = [CacheKey(owner.cluster_id, NONE)] * slot
    key = CacheKey(owner.cluster_id, REQUEST, MODEL) if kind == "req" else \
        CacheKey(owner.cluster_id, NONE, MODEL, PREFIX)
    return key, (*padding, key)


@examples
@given(data=st.data())
def test_pull_cache(pair, data):
    accessible = pair.remote_accessible
    requester, owner = pair.ends(data.draw(st.booleans(), "reverse"))
    num_src, num_dst, arguments = data.draw(layers())
    src_stride, dst_stride = data.draw(strides, "src_stride"), data.draw(strides, "dst_stride")
    src = data.draw(specs(src_stride, num_tensors=num_src, remote_accessible=accessible), "src")
    dst = data.draw(specs(dst_stride, num_tensors=num_dst, remote_accessible=accessible), "dst")
    src_slot = data.draw(st.integers(0, src.num_slots - 1), "src_slot")
    dst_slot = data.draw(st.integers(0, dst.num_slots - 1), "dst_slot")
    sizes = st.integers(1, min(src_stride, dst_stride))
    size = data.draw(st.one_of(st.just(-1), sizes) if dst_stride <= src_stride else sizes, "size")
    key, keys = slot_key(data, owner, src_slot, not accessible)
    with pair.scene() as scene:
        made, source = scene.make(owner, "src", src._replace(keys=keys))
        _, target = scene.make(requester, "dst", dst)
        key = key or CacheKeyByIdAndIndex(owner.cluster_id, made.cache_id, src_slot)
        requester.call(invoke, "pull_cache", key, Named("dst"), dst_slot, size, **arguments)
        reference.copy_slot(target, dst_slot, source, src_slot, dst_stride if size == -1 else size,
                            **layers_of_model(arguments))
        scene.check()


@examples
@given(data=st.data())
def test_pull_blocks(pair, data):
    accessible = pair.remote_accessible
    requester, owner = pair.ends(data.draw(st.booleans(), "reverse"))
    num_src, num_dst, arguments = data.draw(layers())
    stride = data.draw(strides, "block_bytes")
    key = BlocksCacheKey(owner.cluster_id, MODEL)
    src = data.draw(specs(stride, num_tensors=num_src, is_blocks=True, remote_accessible=accessible, keys=(key,)),
                    "src")
    dst = data.draw(specs(stride, num_tensors=num_dst, is_blocks=True, remote_accessible=accessible), "dst")
    src_blocks, dst_blocks = data.draw(block_lists(src.num_slots, dst.num_slots), "blocks")
    with pair.scene() as scene:
        _, source = scene.make(owner, "src", src)
        _, target = scene.make(requester, "dst", dst)
        requester.call(invoke, "pull_blocks", key, Named("dst"), src_blocks, dst_blocks, **arguments)
        reference.copy_blocks(target, dst_blocks, source, src_blocks, **layers_of_model(arguments))
        scene.check()


@examples
@given(data=st.data())
def test_pull_blocks_of_a_slot(pair, data):
    requester, owner = pair.ends(data.draw(st.booleans(), "reverse"))
    num_src, num_dst, arguments = data.draw(layers())
    slot_bytes = data.draw(strides, "slot_bytes")
    block_bytes = data.draw(st.one_of(st.integers(max(1, slot_bytes // 8), slot_bytes + 9), strides), "block_bytes")
    src = data.draw(specs(slot_bytes, num_tensors=num_src, remote_accessible=pair.remote_accessible,
                          may_be_host=False), "src")
    dst = data.draw(specs(block_bytes, num_tensors=num_dst, is_blocks=True, remote_accessible=pair.remote_accessible),
                    "dst")
    src_slot = data.draw(st.integers(0, src.num_slots - 1), "src_slot")
    most = min(-(-slot_bytes // block_bytes), 10)
    dst_blocks = data.draw(st.lists(st.integers(0, dst.num_slots - 1), min_size=1, max_size=most), "dst_blocks")
    key, keys = slot_key(data, owner, src_slot, True)
    with pair.scene() as scene:
        made, source = scene.make(owner, "src", src._replace(keys=keys))
        _, target = scene.make(requester, "dst", dst)
        key = key or CacheKeyByIdAndIndex(owner.cluster_id, made.cache_id, src_slot)
        requester.call(invoke, "pull_blocks", key, Named("dst"), [], dst_blocks, **arguments)
        reference.cut_slot(target, dst_blocks, source, src_slot, **layers_of_model(arguments))
        scene.check()
