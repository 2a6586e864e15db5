"""Plans against the naive list: the same bytes end up in the same places, whatever order descriptors run in."""
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_datadist.status import LLMParamInvalidError, LLMStatusCode
from llm_datadist_probes.transfer import PlanProbe

BASE = 1 << 20
UINT64 = 2**64


class Side:
    """Tensors in a flat address space, some apart and some back to back, filled with bytes that tell where."""

    def __init__(self, num_tensors, tensor_bytes, gap, salt):
        self.addrs = [BASE + t * (tensor_bytes + gap) for t in range(num_tensors)]
        size = num_tensors * (tensor_bytes + gap)
        self.memory = np.random.default_rng(salt).integers(0, 256, size, dtype=np.uint8)

    def at(self, addr, nbytes):
        begin = addr - BASE
        assert 0 <= begin and begin + nbytes <= len(self.memory)
        return slice(begin, begin + nbytes)


def run(descs, remote, local, put):
    """Carry out a plan in random order and return the destination, having checked that no byte is written twice."""
    dst = (remote if put else local).memory.copy()
    written = np.zeros(len(dst), bool)
    for remote_addr, local_addr, nbytes in random.sample(descs, len(descs)):
        to, source = (remote.at(remote_addr, nbytes), local) if put else (local.at(local_addr, nbytes), remote)
        begin = source.at(local_addr if put else remote_addr, nbytes)
        assert nbytes > 0 and not written[to].any()
        written[to] = True
        dst[to] = source.memory[begin]
    return dst


def naive(pairs, src, dst):
    """Carry out (tensor, src offset, dst offset, bytes) in list order."""
    out = dst.memory.copy()
    for t, src_offset, dst_offset, nbytes in pairs:
        out[dst.at(dst.addrs[t] + dst_offset, nbytes)] = src.memory[src.at(src.addrs[t] + src_offset, nbytes)]
    return out


@st.composite
def block_lists(draw, num_src, num_dst):
    """Pairs made of rising, falling and scattered stretches; destinations may repeat."""
    pairs = []
    for _ in range(draw(st.integers(0, 6))):
        s, d = draw(st.integers(0, num_src - 1)), draw(st.integers(0, num_dst - 1))
        step = draw(st.sampled_from([1, 1, -1, 2]))
        for _ in range(draw(st.integers(1, 6))):
            if 0 <= s < num_src and 0 <= d < num_dst:
                pairs.append((s, d))
            s, d = s + step, d + step
    return pairs


@given(st.data(), st.booleans(), st.integers(1, 3), st.integers(1, 9), st.sampled_from([0, 0, 5]),
       st.sampled_from([0, 0, 7]))
def test_blocks_to_blocks(data, put, num_tensors, block_bytes, remote_gap, local_gap):
    num_remote, num_local = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 12))
    remote = Side(num_tensors, num_remote * block_bytes, remote_gap, 1)
    local = Side(num_tensors, num_local * block_bytes, local_gap, 2)
    src, dst = (local, remote) if put else (remote, local)
    pairs = data.draw(block_lists(*(num_local, num_remote) if put else (num_remote, num_local)))
    src_blocks, dst_blocks = [s for s, _ in pairs], [d for _, d in pairs]
    remote_blocks, local_blocks = (dst_blocks, src_blocks) if put else (src_blocks, dst_blocks)
    descs = PlanProbe().blocks(
        remote.addrs, remote_blocks, num_remote, local.addrs, local_blocks, num_local, block_bytes, put)
    expected = naive([(t, s * block_bytes, d * block_bytes, block_bytes) for t in range(num_tensors)
                      for s, d in pairs], src, dst)
    assert (run(descs, remote, local, put) == expected).all()
    assert sum(nbytes for *_, nbytes in descs) == len(set(dst_blocks)) * block_bytes * num_tensors
    for (r0, l0, n0), (r1, l1, _) in zip(descs, descs[1:]):
        assert (r0 + n0, l0 + n0) != (r1, l1), "neighbours were not merged"


@given(st.data(), st.booleans(), st.integers(1, 3), st.integers(1, 9), st.integers(1, 60), st.integers(0, 5),
       st.sampled_from([0, 5]))
def test_slot_to_blocks(data, put, num_tensors, block_bytes, slot_bytes, slot_offset, gap):
    num_blocks = data.draw(st.integers(1, 12))
    pieces = -(-slot_bytes // block_bytes)
    blocks = data.draw(st.one_of(
        st.lists(st.integers(0, num_blocks - 1), max_size=pieces),
        st.integers(0, num_blocks).map(lambda first: list(range(first, min(num_blocks, first + pieces))))))
    slots = Side(num_tensors, slot_offset + slot_bytes, gap, 1)
    pool = Side(num_tensors, num_blocks * block_bytes, gap, 2)
    descs = PlanProbe().slot_to_blocks(
        slots.addrs, slot_offset, slot_bytes, pool.addrs, blocks, num_blocks, block_bytes, put)
    expected = naive(
        [(t, slot_offset + i * block_bytes, block * block_bytes, min(block_bytes, slot_bytes - i * block_bytes))
         for t in range(num_tensors) for i, block in enumerate(blocks)], slots, pool)
    remote, local = (pool, slots) if put else (slots, pool)
    assert (run(descs, remote, local, put) == expected).all()


@pytest.mark.parametrize("num_blocks, slot_bytes, fits", [(3, 10, True), (4, 10, False), (2, 8, True), (3, 8, False)])
def test_a_slot_fills_no_more_blocks_than_it_has_pieces(num_blocks, slot_bytes, fits):
    plan = PlanProbe()
    if fits:
        descs = plan.slot_to_blocks([100], 0, slot_bytes, [1000], range(num_blocks), 9, 4, False)
        assert descs == [(100, 1000, slot_bytes)]
        return
    with pytest.raises(LLMParamInvalidError, match=f"dst_blocks has {num_blocks} blocks of 4 bytes.*{slot_bytes}"):
        plan.slot_to_blocks([100], 0, slot_bytes, [1000], range(num_blocks), 9, 4, False)


def test_the_tail_of_a_block_that_the_short_piece_fills_again():
    # Piece 1 fills block 7 whole, piece 3 then only its first 2 bytes: bytes 2 and 3 are piece 1's.
    descs = PlanProbe().slot_to_blocks([0], 0, 14, [1000], [6, 7, 8, 7], 9, 4, False)
    assert sorted(descs) == [(0, 1024, 4), (6, 1030, 6), (12, 1028, 2)]


def test_contiguous_and_whole_pool_merging():
    plan = PlanProbe()
    assert plan.contiguous([100, 300], 10, [1000, 2000], 20, 50) == [(110, 1020, 50), (310, 2020, 50)]
    assert plan.contiguous([100, 150], 10, [1000, 1050], 20, 50) == [(110, 1020, 100)]
    assert plan.contiguous([100], 10, [1000], 20, 0) == []
    assert plan.contiguous([], 10, [], 20, 5) == []
    assert plan.blocks([0, 40, 80], range(4), 4, [400, 440, 480], range(4), 4, 10, False) == [(0, 400, 120)]
    # Adjacent on one side only: nothing to merge across tensors.
    assert plan.blocks([0, 40], range(4), 4, [400, 441], range(4), 4, 10, True) == [(0, 400, 40), (40, 441, 40)]
    # The last run of one tensor meets the first of the next.
    assert plan.blocks([0, 40], [0, 2, 3], 4, [400, 440], [0, 2, 3], 4, 10, False) == [
        (0, 400, 10), (20, 420, 30), (60, 460, 20)]


def test_falling_lists_merge_too():
    assert PlanProbe().blocks([0], [5, 4, 3], 9, [1000], [8, 7, 6], 9, 10, False) == [(30, 1060, 30)]
    assert PlanProbe().blocks([0], [5, 4, 3], 9, [1000], [1, 2, 3], 9, 10, False) == [
        (50, 1010, 10), (40, 1020, 10), (30, 1030, 10)]


def test_the_last_writer_wins():
    plan = PlanProbe()
    assert plan.blocks([0], [1, 2, 3], 9, [1000], [5, 5, 5], 9, 10, False) == [(30, 1050, 10)]
    assert plan.blocks([0], [5, 5, 5], 9, [1000], [1, 2, 3], 9, 10, True) == [(50, 1030, 10)]
    # A repeated source is no repeat.
    assert plan.blocks([0], [5, 5], 9, [1000], [1, 2], 9, 10, False) == [(50, 1010, 10), (50, 1020, 10)]


def test_repeats_in_a_cache_too_large_for_the_kept_bitmap():
    far = 10**8
    descs = PlanProbe().blocks([0], [1, 2, 3, 4], 9, [0], [far, 7, far, 6], far + 1, 2, False)
    assert descs == [(4, 14, 2), (6, 2 * far, 2), (8, 12, 2)]


@pytest.mark.parametrize("put", [False, True])
@pytest.mark.parametrize("src, dst, name, bad, limit", [
    ([0, 5], [0, 1], "src_blocks", 5, 5), ([0, 1], [0, 8], "dst_blocks", 8, 7),
    ([0, 1], [0, 2**62], "dst_blocks", 2**62, 7),
])
def test_an_index_outside_names_list_position_and_range(put, src, dst, name, bad, limit):
    plan = PlanProbe()
    arguments = ([0], dst, 7, [0], src, 5, 4, True) if put else ([0], src, 5, [0], dst, 7, 4, False)
    with pytest.raises(LLMParamInvalidError, match=rf"{name}\[1\] is block {bad}, outside .* 0\.\.{limit - 1}") as info:
        plan.blocks(*arguments)
    assert info.value.status_code == LLMStatusCode.LLM_PARAM_INVALID
    assert plan.contiguous([1], 0, [2], 0, 3) == [(1, 2, 3)]


@pytest.mark.parametrize("call", [
    lambda plan: plan.blocks([0], [2**62], 2**63, [0], [0], 1, 8, False),
    lambda plan: plan.blocks([0], [0], 1, [0], [2**62], 2**63, 8, False),
    lambda plan: plan.blocks([0], [2**62], 2**63, [2**63 - 1], [2**62], 2**63, 2, False),
    lambda plan: plan.blocks([2**63 - 1], [2**60], 2**63, [0], [0], 1, 8, False),
    lambda plan: plan.contiguous([1], UINT64 - 1, [1], 0, 1),
    lambda plan: plan.contiguous([1], UINT64 - 4, [1], 0, 8),
    lambda plan: plan.contiguous([1], 0, [1], 8, UINT64 - 4),
    lambda plan: plan.slot_to_blocks([0], UINT64 - 8, 16, [0], [0, 2], 4, 8, False),
    lambda plan: plan.slot_to_blocks([2**63 - 1], 2**63 - 8, 16, [0], [0, 2], 4, 8, True),
    lambda plan: plan.slot_to_blocks([0], UINT64 - 4, 7, [0], [0], 4, 8, True),
    lambda plan: plan.slot_to_blocks([0], 0, 7, [0], [2**62], 2**63, 8, True),
    lambda plan: plan.blocks([0], [0], 1, [0], [0], 1, 0, False),
    lambda plan: plan.slot_to_blocks([0], 0, 7, [0], [0], 4, 0, True),
])
def test_nothing_wraps(call):
    with pytest.raises(LLMParamInvalidError, match=r"address space|block size"):
        call(PlanProbe())


def test_a_list_is_reused_from_plan_to_plan():
    plan = PlanProbe()
    shuffled = np.random.default_rng(3).permutation(5000)
    identity = np.arange(5000)
    for _ in range(3):
        assert len(plan.blocks([0], shuffled, 5000, [0], identity, 5000, 16, False)) >= 4000
        assert plan.blocks([0], identity, 5000, [0], identity, 5000, 16, False) == [(0, 0, 80000)]
        assert plan.blocks([0], [], 5000, [0], [], 5000, 16, False) == []


def test_a_falling_run_joins_the_run_it_comes_down_to():
    """Blocks 2, 4, 3: what 4 and 3 make together follows 2 at once."""
    for order in ([2, 4, 3], [2, 5, 4, 3], [1, 2, 4, 3, 5]):
        (desc,) = PlanProbe().blocks([1000], order, 6, [2000], order, 6, 10, False)
        assert desc == (1000 + 10 * min(order), 2000 + 10 * min(order), 10 * len(order))
