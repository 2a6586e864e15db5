"""Hypothesis strategies: what tests of transfers draw."""
from __future__ import annotations

import math
import os
from typing import Any, Optional, Tuple

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from transfers.caches import Spec

from llm_datadist import DataType

# More examples for a longer search: LDD_TEST_EXAMPLES=1000.
examples = settings(max_examples=int(os.environ.get("LDD_TEST_EXAMPLES", "25")), deadline=None,
                    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])

ITEM_BYTES = {
    DataType.DT_FLOAT: 4, DataType.DT_FLOAT16: 2, DataType.DT_INT8: 1, DataType.DT_INT32: 4, DataType.DT_UINT8: 1,
    DataType.DT_INT16: 2, DataType.DT_UINT16: 2, DataType.DT_UINT32: 4, DataType.DT_INT64: 8, DataType.DT_UINT64: 8,
    DataType.DT_DOUBLE: 8, DataType.DT_BOOL: 1, DataType.DT_BF16: 2,
}

# Bytes of a slot or block: mostly small, also around a page.
strides = st.one_of(st.integers(1, 40), st.sampled_from([1, 64, 512, 4095, 4096, 4097]), st.integers(1, 3000))


@st.composite
def specs(draw: Any, stride: int, *, num_tensors: int, is_blocks: bool = False, num_slots: Optional[int] = None,
          remote_accessible: bool = False, may_be_host: bool = True, **fields: Any) -> Spec:
    """A cache with slots of `stride` bytes, of any data type and shape, in a pool or registered."""
    data_type = draw(st.sampled_from([kind for kind, size in ITEM_BYTES.items() if stride % size == 0]))
    num_items = stride // ITEM_BYTES[data_type]
    inner = math.gcd(num_items, draw(st.integers(1, 12)))
    slot_shape = draw(st.sampled_from([(num_items,), (num_items // inner, inner), (1, inner, num_items // inner)]))
    is_registered = draw(st.booleans())
    return Spec(
        num_tensors, draw(st.integers(1, 5)) if num_slots is None else num_slots, slot_shape, data_type, is_blocks,
        is_registered, may_be_host and draw(st.booleans()),
        remote_accessible=True if is_registered and remote_accessible else None, seed=draw(st.integers(0, 2**32 - 1)),
        **fields)


@st.composite
def layers(draw: Any) -> Tuple[int, int, dict]:
    """Tensor counts of source and destination, and the layer arguments that fit them."""
    n = draw(st.integers(1, 3))
    given_src, given_dst = draw(st.booleans()), draw(st.booleans())
    arguments: dict = {} if n == 2 and draw(st.booleans()) else {"tensor_num_per_layer": n}
    if not given_src and not given_dst:
        num_tensors = draw(st.integers(1, 5))       # also no whole number of layers
        return num_tensors, num_tensors, arguments
    count = draw(st.integers(1, 2))
    num_layers = {}
    for side, given in (("src", given_src), ("dst", given_dst)):
        start, more = (draw(st.integers(0, 2)), draw(st.integers(0, 1))) if given else (0, 0)
        num_layers[side] = start + count + more
        if given:
            arguments[f"{side}_layer_range"] = range(start, start + count)
    return num_layers["src"] * n, num_layers["dst"] * n, arguments


def layers_of_model(arguments: dict) -> dict:
    """The same as the arguments of ``reference``."""
    return {"src_layers": arguments.get("src_layer_range"), "dst_layers": arguments.get("dst_layer_range"),
            "tensors_per_layer": arguments.get("tensor_num_per_layer", 2)}


@st.composite
def block_lists(draw: Any, *num_blocks: int) -> Tuple[Any, ...]:
    """Equally long lists of block numbers, one per count: repeats, runs and any order, in various types."""
    length = draw(st.integers(1, 12))
    return tuple(draw(_as_sequence(draw(_numbers(count, length)))) for count in num_blocks)


@st.composite
def _numbers(draw: Any, count: int, length: int) -> Any:
    if draw(st.booleans()):                         # a rising or falling run, clipped: merges into few copies
        start, step = draw(st.integers(0, count - 1)), draw(st.sampled_from([1, -1]))
        return [min(max(start + step * i, 0), count - 1) for i in range(length)]
    return draw(st.lists(st.integers(0, count - 1), min_size=length, max_size=length))


def _as_sequence(numbers: Any) -> Any:
    return st.sampled_from([numbers, tuple(numbers), np.array(numbers, np.int32), np.array(numbers, np.int64),
                            np.array(numbers, np.uint64), [np.int64(number) for number in numbers]])
