"""Pushes between two processes in remote-accessible mode, byte for byte against the reference."""
from hypothesis import given
from hypothesis import strategies as st
from support import reference
from transfers.caches import Named, Spec, invoke
from transfers.cases import block_lists, examples, specs, strides

from llm_datadist import BlocksCacheKey, CacheKey, CacheKeyByIdAndIndex


@st.composite
def push_layers(draw):
    """Tensor counts, the layer arguments of a push, and what they mean to the reference.

    A range that is missing stands for all layers of the source, for the destination too.
    """
    n = draw(st.integers(1, 3))
    given_src, given_dst = draw(st.booleans()), draw(st.booleans())
    arguments = {} if n == 2 and draw(st.booleans()) else {"tensor_num_per_layer": n}
    if not given_src and not given_dst:
        num_tensors = draw(st.integers(1, 5))
        return num_tensors, num_tensors, arguments, {}
    count = draw(st.integers(1, 2))
    src, dst = (range(start, start + count) for start in (draw(st.integers(0, 2)), draw(st.integers(0, 2))))
    src_layers, dst_layers = src.stop + draw(st.integers(0, 1)), dst.stop + draw(st.integers(0, 1))
    if not (given_src and given_dst):
        src, src_layers = range(count), count
    if not given_dst:
        dst, dst_layers = range(count), count + draw(st.integers(0, 1))
    if given_src:
        arguments["src_layer_range"] = src
    if given_dst:
        arguments["dst_layer_range"] = dst
    return src_layers * n, dst_layers * n, arguments, {"src_layers": src, "dst_layers": dst, "tensors_per_layer": n}


@examples
@given(data=st.data())
def test_push_cache(remote_accessible_pair, data):
    pair = remote_accessible_pair
    sender, owner = pair.ends(data.draw(st.booleans(), "reverse"))
    num_src, num_dst, arguments, selected = data.draw(push_layers())
    stride = data.draw(strides, "stride")
    src = data.draw(specs(stride, num_tensors=num_src, remote_accessible=True), "src")
    dst = data.draw(specs(stride, num_tensors=num_dst, remote_accessible=True), "dst")
    src_slot = data.draw(st.integers(0, src.num_slots - 1), "src_slot")
    dst_slot = data.draw(st.integers(0, dst.num_slots - 1), "dst_slot")
    with pair.scene() as scene:
        _, source = scene.make(sender, "src", src)
        made, target = scene.make(owner, "dst", dst)
        key = CacheKeyByIdAndIndex(owner.cluster_id, made.cache_id, dst_slot)
        sender.call(invoke, "push_cache", key, Named("src"), src_slot, **arguments)
        reference.copy_slot(target, dst_slot, source, src_slot, stride, **selected)
        scene.check()


@examples
@given(data=st.data())
def test_push_blocks(remote_accessible_pair, data):
    pair = remote_accessible_pair
    sender, owner = pair.ends(data.draw(st.booleans(), "reverse"))
    num_src, num_dst, arguments, selected = data.draw(push_layers())
    stride = data.draw(strides, "block_bytes")
    key = BlocksCacheKey(owner.cluster_id, 5)
    src = data.draw(specs(stride, num_tensors=num_src, is_blocks=True, remote_accessible=True), "src")
    dst = data.draw(specs(stride, num_tensors=num_dst, is_blocks=True, remote_accessible=True, keys=(key,)), "dst")
    src_blocks, dst_blocks = data.draw(block_lists(src.num_slots, dst.num_slots), "blocks")
    with pair.scene() as scene:
        _, source = scene.make(sender, "src", src)
        _, target = scene.make(owner, "dst", dst)
        sender.call(invoke, "push_blocks", key, Named("src"), src_blocks, dst_blocks, **arguments)
        reference.copy_blocks(target, dst_blocks, source, src_blocks, **selected)
        scene.check()


def test_push_without_ranges_sends_all_of_the_source(remote_accessible_pair):
    """Layers that only the destination has stay as they are."""
    pair = remote_accessible_pair
    with pair.scene() as scene:
        _, source = scene.make(pair.here, "src", Spec(4, 2, (16,)))
        made, target = scene.make(pair.there, "dst", Spec(6, 2, (16,), seed=1))
        pair.here.call(invoke, "push_cache", CacheKeyByIdAndIndex(pair.there.cluster_id, made.cache_id, 1),
                       Named("src"))
        reference.copy_slot(target, 1, source, 0, 16, src_layers=range(2), dst_layers=range(2))
        scene.check()


def test_push_keeps_keys(remote_accessible_pair):
    pair = remote_accessible_pair
    keys = (CacheKey(pair.there.cluster_id, 1), CacheKey(pair.there.cluster_id, 2))
    with pair.scene() as scene:
        scene.make(pair.here, "src", Spec(2, 1, (16,)))
        made, _ = scene.make(pair.there, "dst", Spec(2, 2, (16,), keys=keys))
        pair.here.call(invoke, "push_cache", CacheKeyByIdAndIndex(pair.there.cluster_id, made.cache_id, 1),
                       Named("src"))
        assert pair.there.stats()["keys"] == 2
