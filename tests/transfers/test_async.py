"""Layer-wise transfers to addresses in another process, byte for byte against the reference."""
from hypothesis import given
from hypothesis import strategies as st
from support import reference
from transfers.cases import block_lists, examples, specs, strides
from transfers.tasks import check_outcome, transfer

from llm_datadist import TransferConfig


def draw_layers(data, num_layers):
    """A range for ``src_layer_range``, None among them, and which layers it stands for."""
    if data.draw(st.booleans(), "all layers"):
        return None, range(num_layers)
    start = data.draw(st.integers(0, num_layers - 1), "first layer")
    chosen = range(start, data.draw(st.integers(start + 1, num_layers), "end of layers"))
    return chosen, chosen


def pick(model, layers):
    """The model of only those layers of a cache, sharing its bytes."""
    part = reference.Model([], model.num_slots)
    part.tensors = [model.tensors[2 * layer + i] for layer in layers for i in (0, 1)]
    return part


@examples
@given(data=st.data())
def test_contiguous_to_addresses(pair, data):
    """One stride of each tensor goes to wherever the addresses say, several configs to one cluster side by side."""
    sender, owner = pair.ends(data.draw(st.booleans(), "reverse"))
    num_layers = data.draw(st.integers(1, 4), "num_layers")
    stride = data.draw(strides, "stride")
    src = data.draw(specs(stride, num_tensors=2 * num_layers, may_be_host=False), "src")
    configs, wanted = [], []
    with pair.scene() as scene:
        _, source = scene.make(sender, "src", src)
        for number in range(data.draw(st.integers(1, 3), "configs")):
            given_range, layers = draw_layers(data, num_layers)
            slot = data.draw(st.integers(0, src.num_slots - 1), "src_batch_index")
            dst_stride = data.draw(st.one_of(st.just(stride), st.integers(1, 3000)), "dst_stride")
            # Slots enough for one whole source stride, which may start and end anywhere in a tensor.
            least = -(-stride // dst_stride)
            dst = data.draw(specs(dst_stride, num_tensors=2 * len(layers) + data.draw(st.integers(0, 2)),
                                  num_slots=least + data.draw(st.integers(0, 2)), is_blocks=data.draw(st.booleans()),
                                  remote_accessible=pair.remote_accessible), "dst")
            made, target = scene.make(owner, f"dst{number}", dst)
            tensors = data.draw(st.permutations(range(dst.num_tensors)), "tensors")[:2 * len(layers)]
            offset = data.draw(st.integers(0, dst.tensor_bytes - stride), "offset")
            configs.append(TransferConfig(owner.cluster_id, [made.addrs[tensor] + offset for tensor in tensors],
                                          given_range, slot))
            wanted.append(layers)
            for tensor, content in zip(tensors, pick(source, layers).tensors):
                target.tensors[tensor][offset:offset + stride] = content[slot * stride:(slot + 1) * stride]
        check_outcome(sender.call(transfer, "src", configs), wanted)
        scene.check()


@examples
@given(data=st.data())
def test_contiguous_to_blocks_by_address(pair, data):
    sender, owner = pair.ends(data.draw(st.booleans(), "reverse"))
    num_layers = data.draw(st.integers(1, 3), "num_layers")
    slot_bytes = data.draw(strides, "slot_bytes")
    src = data.draw(specs(slot_bytes, num_tensors=2 * num_layers, may_be_host=False), "src")
    block_bytes = data.draw(st.integers(max(1, slot_bytes // 8), min(slot_bytes + 9, src.tensor_bytes)), "block_bytes")
    given_range, layers = draw_layers(data, num_layers)
    slot = data.draw(st.integers(0, src.num_slots - 1), "src_batch_index")
    dst = data.draw(specs(block_bytes, num_tensors=2 * len(layers), is_blocks=True,
                          remote_accessible=pair.remote_accessible), "dst")
    most = -(-slot_bytes // block_bytes)
    blocks = data.draw(st.lists(st.integers(0, dst.num_slots - 1), min_size=1, max_size=most), "dst_block_indices")
    with pair.scene() as scene:
        _, source = scene.make(sender, "src", src)
        made, target = scene.make(owner, "dst", dst)
        config = TransferConfig(owner.cluster_id, made.addrs, given_range, slot)
        check_outcome(sender.call(transfer, "src", [config], None, blocks, block_bytes), [layers])
        reference.cut_slot(target, blocks, pick(source, layers), slot)
        scene.check()


@examples
@given(data=st.data())
def test_blocks_to_blocks_by_address(pair, data):
    sender, owner = pair.ends(data.draw(st.booleans(), "reverse"))
    num_layers = data.draw(st.integers(1, 3), "num_layers")
    stride = data.draw(strides, "block_bytes")
    src = data.draw(specs(stride, num_tensors=2 * num_layers, is_blocks=True, may_be_host=False), "src")
    given_range, layers = draw_layers(data, num_layers)
    dst = data.draw(specs(stride, num_tensors=2 * len(layers), is_blocks=True,
                          remote_accessible=pair.remote_accessible), "dst")
    src_blocks, dst_blocks = (list(map(int, blocks))
                              for blocks in data.draw(block_lists(src.num_slots, dst.num_slots), "blocks"))
    size = data.draw(st.sampled_from([None, 0, stride]), "dst_block_memory_size")
    with pair.scene() as scene:
        _, source = scene.make(sender, "src", src)
        made, target = scene.make(owner, "dst", dst)
        config = TransferConfig(owner.cluster_id, made.addrs, given_range)
        check_outcome(sender.call(transfer, "src", [config], src_blocks, dst_blocks, size), [layers])
        reference.copy_blocks(target, dst_blocks, pick(source, layers), src_blocks)
        scene.check()


@examples
@given(data=st.data())
def test_blocks_without_lists_send_block_0(pair, data):
    sender, owner = pair.ends(data.draw(st.booleans(), "reverse"))
    num_layers = data.draw(st.integers(1, 3), "num_layers")
    stride = data.draw(strides, "block_bytes")
    src = data.draw(specs(stride, num_tensors=2 * num_layers, is_blocks=True, may_be_host=False), "src")
    given_range, layers = draw_layers(data, num_layers)
    dst = data.draw(specs(stride, num_tensors=2 * len(layers), is_blocks=data.draw(st.booleans()),
                          remote_accessible=pair.remote_accessible), "dst")
    slot = data.draw(st.integers(0, dst.num_slots - 1), "slot in the destination")
    with pair.scene() as scene:
        _, source = scene.make(sender, "src", src)
        made, target = scene.make(owner, "dst", dst)
        config = TransferConfig(owner.cluster_id, [addr + slot * stride for addr in made.addrs], given_range)
        check_outcome(sender.call(transfer, "src", [config]), [layers])
        reference.copy_slot(target, slot, pick(source, layers), 0, stride)
        scene.check()
