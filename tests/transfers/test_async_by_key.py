"""Layer-wise transfers to caches that keys name, byte for byte against the reference; remote-accessible mode only."""
from hypothesis import given
from hypothesis import strategies as st
from support import reference
from transfers.caches import Spec
from transfers.cases import block_lists, examples, specs, strides
from transfers.tasks import check_outcome, transfer

from llm_datadist import BlocksCacheKey, CacheKeyByIdAndIndex, TransferWithCacheKeyConfig


@st.composite
def keyed_layers(draw, num_layers, num_dst_layers):
    """Source and destination layers of a config with a key: equally many, at different places."""
    count = draw(st.integers(1, min(num_layers, num_dst_layers)))
    starts = (draw(st.integers(0, total - count)) for total in (num_layers, num_dst_layers))
    return [range(start, start + count) for start in starts]


@examples
@given(data=st.data())
def test_contiguous_by_key(remote_accessible_pair, data):
    """Layer i of the source range goes to layer i of the destination range, whatever their starts."""
    pair = remote_accessible_pair
    sender, owner = pair.ends(data.draw(st.booleans(), "reverse"))
    num_layers, num_dst_layers = (data.draw(st.integers(1, 4), name) for name in ("num_layers", "num_dst_layers"))
    stride = data.draw(strides, "stride")
    src = data.draw(specs(stride, num_tensors=2 * num_layers, may_be_host=False, remote_accessible=True), "src")
    configs, wanted = [], []
    with pair.scene() as scene:
        _, source = scene.make(sender, "src", src)
        for number in range(data.draw(st.integers(1, 3), "configs")):
            dst = data.draw(specs(stride, num_tensors=2 * num_dst_layers, remote_accessible=True), "dst")
            src_layers, dst_layers = data.draw(keyed_layers(num_layers, num_dst_layers), "layers")
            src_slot = data.draw(st.integers(0, src.num_slots - 1), "src_batch_index")
            dst_slot = data.draw(st.integers(0, dst.num_slots - 1), "batch_index of the key")
            made, target = scene.make(owner, f"dst{number}", dst)
            configs.append(TransferWithCacheKeyConfig(
                CacheKeyByIdAndIndex(owner.cluster_id, made.cache_id, dst_slot), src_layers, dst_layers, src_slot))
            wanted.append(src_layers)
            reference.copy_slot(target, dst_slot, source, src_slot, stride, src_layers=src_layers,
                                dst_layers=dst_layers)
        check_outcome(sender.call(transfer, "src", configs), wanted)
        scene.check()


@examples
@given(data=st.data())
def test_blocks_by_key(remote_accessible_pair, data):
    """Blocks, or a slot cut into blocks, to a blocks cache."""
    pair = remote_accessible_pair
    sender, owner = pair.ends(data.draw(st.booleans(), "reverse"))
    num_layers, num_dst_layers = (data.draw(st.integers(1, 3), name) for name in ("num_layers", "num_dst_layers"))
    stride = data.draw(strides, "stride")
    from_blocks = data.draw(st.booleans(), "from blocks")
    src = data.draw(specs(stride, num_tensors=2 * num_layers, may_be_host=False, is_blocks=from_blocks,
                          remote_accessible=True), "src")
    block_bytes = stride if from_blocks else data.draw(
        st.integers(max(1, stride // 8), min(stride + 9, src.tensor_bytes)), "block_bytes")
    key = BlocksCacheKey(owner.cluster_id, 11)
    dst = data.draw(specs(block_bytes, num_tensors=2 * num_dst_layers, is_blocks=True, remote_accessible=True,
                          keys=(key,)), "dst")
    src_layers, dst_layers = data.draw(keyed_layers(num_layers, num_dst_layers), "layers")
    by_id = not from_blocks and data.draw(st.booleans(), "by id")
    slot = data.draw(st.integers(0, src.num_slots - 1), "src_batch_index") if by_id else 0
    with pair.scene() as scene:
        _, source = scene.make(sender, "src", src)
        made, target = scene.make(owner, "dst", dst)
        if by_id:
            key = CacheKeyByIdAndIndex(owner.cluster_id, made.cache_id)
        config = TransferWithCacheKeyConfig(key, src_layers, dst_layers, slot)
        if from_blocks:
            src_blocks, dst_blocks = (list(map(int, blocks)) for blocks in
                                      data.draw(block_lists(src.num_slots, dst.num_slots), "blocks"))
            outcome = sender.call(transfer, "src", [config], src_blocks, dst_blocks)
            reference.copy_blocks(target, dst_blocks, source, src_blocks, src_layers=src_layers, dst_layers=dst_layers)
        else:
            blocks = data.draw(st.lists(st.integers(0, dst.num_slots - 1), min_size=1,
                                        max_size=-(-stride // block_bytes)), "dst_block_indices")
            outcome = sender.call(transfer, "src", [config], None, blocks, block_bytes)
            reference.cut_slot(target, blocks, source, slot, src_layers=src_layers, dst_layers=dst_layers)
        check_outcome(outcome, [src_layers])
        scene.check()


def test_blocks_without_lists_send_block_0_by_key(remote_accessible_pair):
    """The peer's cache is a blocks cache, too: its block 0 is written."""
    pair = remote_accessible_pair
    key = BlocksCacheKey(pair.there.cluster_id, 3)
    with pair.scene() as scene:
        _, source = scene.make(pair.here, "src", Spec(4, 3, (40,), is_blocks=True))
        _, target = scene.make(pair.there, "dst", Spec(4, 2, (40,), is_blocks=True, keys=(key,), seed=1))
        check_outcome(pair.here.call(transfer, "src", [TransferWithCacheKeyConfig(key, range(2), range(2))]),
                      [range(2)])
        reference.copy_slot(target, 0, source, 0, 40)
        scene.check()
