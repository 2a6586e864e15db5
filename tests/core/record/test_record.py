"""The record's layout and histogram, as the core has them, against what readers in Python assume."""
import numpy as np
import pytest

from llm_datadist.core.record import record as core_record
from llm_datadist.observe import layout


def test_the_layout_is_that_of_the_core():
    sizes = core_record.layout()
    dtypes = {"head": layout.HEAD, "op": layout.OP, "event": layout.EVENT, "peer": layout.PEER_HEAD}
    for name, value in sizes.items():
        part, _, field = name.partition(".")
        if name == "peer":
            assert value == layout.PEER_HEAD.itemsize + len(layout.OPERATIONS) * layout.OP.itemsize
        elif name == "peer.ops":
            assert value == layout.PEER_HEAD.itemsize
        elif field:
            assert dtypes[part].fields[field][1] == value, name
        else:
            assert dtypes[part].itemsize == value, name


def test_buckets_are_those_of_the_core():
    durations = [*range(0, 3000, 7), *(int(1.07**n) for n in range(120, 520)), 2**62, -5]
    for duration in durations:
        index = core_record.bucket(duration)
        assert index == layout.NUM_BUCKETS - 1 or duration < layout.BUCKET_BOUNDS_NS[index]
        assert index == 0 or duration >= layout.BUCKET_BOUNDS_NS[index - 1]
    counted = np.zeros(layout.NUM_BUCKETS, dtype=np.uint64)
    for duration in range(1000, 2000):
        counted[core_record.bucket(duration)] += 1
    assert layout.quantile_ns(counted, 0.5) == pytest.approx(1500, rel=0.07)
    assert layout.quantile_ns(counted[:0], 0.5) == 0.0
