"""What transfers and local operations do to bytes: a slow model that one can check by reading it.

A cache is a `Model`: one bytearray per tensor, and how many slots (or blocks) share it. Every function changes its
destination as the call of the same name must, and nothing else. Arguments are assumed to be valid.
"""
from __future__ import annotations

from typing import Dict, List, Optional, Sequence


class Model:
    """The bytes of a cache.

    Parameters
    ----------
    tensors : sequence of bytes
        Content of each tensor; copied.
    num_slots : int
        Batch slots or blocks of a tensor.
    """

    def __init__(self, tensors: Sequence[bytes], num_slots: int) -> None:
        self.tensors = [bytearray(tensor) for tensor in tensors]
        self.num_slots = num_slots

    @property
    def stride(self) -> int:
        """Bytes of one slot or block."""
        return len(self.tensors[0]) // self.num_slots

    def contents(self) -> List[bytes]:
        """The bytes now."""
        return [bytes(tensor) for tensor in self.tensors]


def _move(dst: bytearray, dst_at: int, src: bytearray, src_at: int, num_bytes: int) -> None:
    assert 0 <= dst_at and dst_at + num_bytes <= len(dst), "the case itself is wrong"
    assert 0 <= src_at and src_at + num_bytes <= len(src), "the case itself is wrong"
    for i in range(num_bytes):
        dst[dst_at + i] = src[src_at + i]


def _tensors(model: Model, layers: Optional[range], tensors_per_layer: int) -> List[bytearray]:
    if layers is None:
        return model.tensors
    return [model.tensors[layer * tensors_per_layer + i] for layer in layers for i in range(tensors_per_layer)]


def _pairs(dst: Model, src: Model, dst_layers: Optional[range], src_layers: Optional[range], tensors_per_layer: int):
    targets, sources = _tensors(dst, dst_layers, tensors_per_layer), _tensors(src, src_layers, tensors_per_layer)
    assert len(targets) == len(sources), "the case itself is wrong"
    return zip(targets, sources)


def copy_slot(dst: Model, dst_slot: int, src: Model, src_slot: int, num_bytes: int, *, dst_offset: int = 0,
              src_offset: int = 0, dst_layers: Optional[range] = None, src_layers: Optional[range] = None,
              tensors_per_layer: int = 2) -> None:
    """``pull_cache``, ``push_cache``, ``copy_cache``: the same bytes of one slot, for all selected tensors."""
    for target, source in _pairs(dst, src, dst_layers, src_layers, tensors_per_layer):
        _move(target, dst_slot * dst.stride + dst_offset, source, src_slot * src.stride + src_offset, num_bytes)


def copy_blocks(dst: Model, dst_blocks: Sequence[int], src: Model, src_blocks: Sequence[int], *,
                dst_layers: Optional[range] = None, src_layers: Optional[range] = None,
                tensors_per_layer: int = 2) -> None:
    """``pull_blocks``, ``push_blocks``, ``swap_blocks``: whole blocks, one pair after the other."""
    for target, source in _pairs(dst, src, dst_layers, src_layers, tensors_per_layer):
        for dst_block, src_block in zip(dst_blocks, src_blocks):
            _move(target, int(dst_block) * dst.stride, source, int(src_block) * src.stride, src.stride)


def cut_slot(dst: Model, dst_blocks: Sequence[int], src: Model, src_slot: int, *, dst_layers: Optional[range] = None,
             src_layers: Optional[range] = None, tensors_per_layer: int = 2) -> None:
    """``pull_blocks`` from a contiguous cache: piece i of the slot goes to ``dst_blocks[i]``, the last may be short."""
    for target, source in _pairs(dst, src, dst_layers, src_layers, tensors_per_layer):
        for i, block in enumerate(dst_blocks):
            begin, end = i * dst.stride, min((i + 1) * dst.stride, src.stride)
            assert begin < end, "the case itself is wrong"
            _move(target, int(block) * dst.stride, source, src_slot * src.stride + begin, end - begin)


def copy_blocks_within(cache: Model, info: Dict[int, List[int]]) -> None:
    """``copy_blocks`` of one cache: in dict order, then list order; later copies see earlier ones."""
    for tensor in cache.tensors:
        for source, destinations in info.items():
            for destination in destinations:
                _move(tensor, destination * cache.stride, tensor, source * cache.stride, cache.stride)
