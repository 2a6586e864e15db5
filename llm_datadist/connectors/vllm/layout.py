"""How vLLM's KV cache lies in memory, as blocks caches of this package.

vLLM allocates one buffer and places every layer in it: block b of a layer starts at ``offset + layer * layer_stride +
b * block_stride``. Layers of different groups may share their place, as a block belongs to one group at a time. What is
moved are whole blocks of every such place, so heads, tokens and data type need not be understood here; a digest of
them makes sure that both sides mean the same.
"""
from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Dict, FrozenSet, Iterator, List, Mapping, Set, Tuple

__all__ = ["BlocksLayout", "blocks_layouts", "group_block_tokens", "layer_places", "layout_digest"]

_Place = Tuple[int, int, int]           # block bytes, blocks, offset


@dataclass(frozen=True)
class BlocksLayout:
    """One blocks cache: places of equal block size that are indexed by the same block ids.

    Parameters
    ----------
    block_bytes : int
        Size of a block in one place.
    num_blocks : int
        Blocks of each place.
    offsets : tuple of int
        Where each place starts, bytes from the start of the buffer, ascending.
    groups : frozenset of int
        The KV cache groups whose block ids count here.
    """

    block_bytes: int
    num_blocks: int
    offsets: Tuple[int, ...]
    groups: FrozenSet[int]

    @property
    def place_bytes(self) -> int:
        """Size of one place."""
        return self.block_bytes * self.num_blocks


def blocks_layouts(kv_cache_config: Any) -> List[BlocksLayout]:
    """Return the blocks caches that make up a KV cache.

    Parameters
    ----------
    kv_cache_config : vllm.v1.kv_cache_interface.KVCacheConfig
        What vLLM allocates.

    Returns
    -------
    list of BlocksLayout
        In an order that both sides of a transfer agree on.

    Raises
    ------
    ValueError
        Places overlap that are not the same, so that blocks cannot be moved by number.
    """
    group_of = {layer: index for index, group in enumerate(kv_cache_config.kv_cache_groups)
                for layer in group.layer_names}
    groups_at: Dict[_Place, Set[int]] = {}
    for layer, place in _places(kv_cache_config):
        groups_at.setdefault(place, set()).add(group_of[layer])
    _check_apart(list(groups_at))
    shapes = sorted({(block_bytes, num_blocks) for block_bytes, num_blocks, _ in groups_at})
    layouts = []
    for shape in shapes:
        places = {place[2]: groups for place, groups in groups_at.items() if place[:2] == shape}
        layouts.append(BlocksLayout(*shape, tuple(sorted(places)), frozenset().union(*places.values())))
    return layouts


def _places(kv_cache_config: Any) -> Iterator[Tuple[str, _Place]]:
    """Each layer and where its blocks lie."""
    for tensor in kv_cache_config.kv_cache_tensors:
        num_blocks = _num_blocks_of(kv_cache_config, tensor)
        packed = tensor.layer_stride < tensor.block_stride      # a block holds the pages of all layers side by side
        for index, layer in enumerate(tensor.layers):
            offset = 0 if packed else tensor.offset + index * tensor.layer_stride
            if packed and tensor.size < tensor.block_stride * num_blocks:
                raise ValueError(f"{num_blocks} blocks of {tensor.block_stride} bytes do not fit {tensor.size} bytes")
            yield layer, (tensor.block_stride, num_blocks, offset)


def layer_places(kv_cache_config: Any) -> Dict[str, Tuple[int, int]]:
    """Return for each layer the position of its blocks cache in `blocks_layouts`, and of its place in that."""
    layouts = blocks_layouts(kv_cache_config)
    positions = {(layout.block_bytes, layout.num_blocks, offset): (cache, place)
                 for cache, layout in enumerate(layouts) for place, offset in enumerate(layout.offsets)}
    return {layer: positions[place] for layer, place in _places(kv_cache_config)}


def group_block_tokens(kv_cache_config: Any) -> Tuple[int, ...]:
    """Return for each KV cache group how many tokens a block has."""
    return tuple(int(group.kv_cache_spec.block_size) for group in kv_cache_config.kv_cache_groups)


def _num_blocks_of(kv_cache_config: Any, tensor: Any) -> int:
    count = getattr(kv_cache_config, "num_blocks_of", None)
    return int(count(tensor) if count is not None else kv_cache_config.num_blocks)


def _check_apart(places: List[Tuple[int, int, int]]) -> None:
    ordered = sorted((offset, offset + block_bytes * num_blocks) for block_bytes, num_blocks, offset in places)
    for (first, end), (second, _) in zip(ordered, ordered[1:]):
        if second < end:
            raise ValueError(f"layers at bytes {first} and {second} of the KV cache overlap: their blocks cannot be "
                             "moved by number")


def layout_digest(kv_cache_config: Any, facts: Mapping[str, Any]) -> str:
    """Return what must be equal on both sides of a transfer, hashed.

    Parameters
    ----------
    kv_cache_config : vllm.v1.kv_cache_interface.KVCacheConfig
        Its groups and layers count; the number of blocks may differ.
    facts : mapping of str to object
        What else must agree: data type, memory layout, ranks.

    Returns
    -------
    str
        32 hexadecimal digits.
    """
    places = [[layout.block_bytes, len(layout.offsets), sorted(layout.groups)]
              for layout in blocks_layouts(kv_cache_config)]
    groups = [[_spec_text(group.kv_cache_spec), list(group.layer_names)] for group in kv_cache_config.kv_cache_groups]
    text = json.dumps([places, groups, {key: str(value) for key, value in sorted(facts.items())}])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _spec_text(spec: Any) -> List[str]:
    """Kind, block size, heads, head size, data type and window of a layer's cache, as far as it has them."""
    names = ("block_size", "num_kv_heads", "head_size", "dtype", "sliding_window", "page_size_bytes")
    return [type(spec).__name__] + [f"{name}={getattr(spec, name)}" for name in names if hasattr(spec, name)]
