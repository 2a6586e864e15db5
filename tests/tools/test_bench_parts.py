"""The parts of the benchmarks: cases and their blocks, patterns, statistics, goals, pictures."""
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_datadist.tools.bench import chart, goals, memory, models, plan, statistics
from llm_datadist.tools.bench.case import ALL_BLOCKS, Case, descriptors, parse_size, size_text, sweep
from llm_datadist.tools.bench.figures import FIGURES, value
from llm_datadist.tools.bench.measure import Samples, interleave, repeat_timed

BASE = Case("pull_blocks", "shm", "pool", 4096, 32, 1, 122, 1, 2, 2)


# Cases.

@given(st.integers(1, 200), st.integers(0, 16), st.integers(0, 3))
def test_block_lists_are_distinct_in_range_and_run_as_long_as_asked(num_blocks, run_blocks, link):
    case = replace(BASE, num_blocks=num_blocks, run_blocks=run_blocks)
    for blocks in case.block_lists(link):
        assert blocks.dtype == np.int64 and len(blocks) == len(set(blocks.tolist())) == num_blocks
        assert blocks.min() >= 0 and blocks.max() < case.capacity
        run = run_blocks or num_blocks
        assert all(blocks[i] == blocks[i - 1] + 1 for i in range(1, num_blocks) if i % run)
    again = case.block_lists(link)
    assert all(np.array_equal(a, b) for a, b in zip(case.block_lists(link), again))


@given(st.integers(1, 40), st.integers(0, 8), st.integers(1, 4), st.sampled_from([1, 64, 4096]))
def test_descriptors_cover_exactly_the_blocks(num_blocks, run_blocks, num_tensors, block_bytes):
    case = replace(BASE, num_blocks=num_blocks, run_blocks=run_blocks)
    src_blocks, dst_blocks = case.block_lists(0)
    step = 1 << 20
    src_addrs, dst_addrs = [(7 + t) * step for t in range(num_tensors)], [(99 + t) * step for t in range(num_tensors)]
    moved = {}
    for src, dst, length in descriptors(src_addrs, dst_addrs, src_blocks, dst_blocks, block_bytes).tolist():
        assert length % block_bytes == 0
        for offset in range(0, length, block_bytes):
            moved[src + offset] = dst + offset
    assert moved == {
        s + int(i) * block_bytes: d + int(j) * block_bytes
        for s, d in zip(src_addrs, dst_addrs) for i, j in zip(src_blocks, dst_blocks)
    }


def test_one_run_is_one_descriptor_even_across_tensors():
    case = replace(BASE, run_blocks=ALL_BLOCKS)
    blocks = case.block_lists(0)[0]
    size = case.num_blocks * case.block_bytes
    assert descriptors([0x1000, 0x1000 + size], [0x90000000, 0x90000000 + size], blocks, blocks, 4096).tolist() == [
        [0x1000, 0x90000000, 2 * size]]


@pytest.mark.parametrize("values, text", [
    ({"operation": "fetch"}, "operation"), ({"path": "rdma"}, "path"), ({"memory": "disk"}, "memory"),
    ({"block_bytes": 0}, "block_bytes"), ({"num_links": 65}, "num_links"), ({"num_threads": 0}, "num_threads"),
    ({"num_blocks": 1.5}, "num_blocks"), ({"memory": "registered"}, "map"),
    ({"operation": "pull_key", "path": "tcp", "memory": "registered", "num_blocks": 1}, "registered"),
    ({"operation": "pull_cache", "num_blocks": 2}, "slot"),
])
def test_insane_cases_are_refused(values, text):
    with pytest.raises(ValueError, match=text):
        Case.from_dict({**BASE.to_dict(), **values})


def test_a_case_survives_a_message():
    assert Case.from_dict({**BASE.to_dict(), "gb_per_s": 1.0}) == BASE
    with pytest.raises(ValueError, match="not a case"):
        Case.from_dict({"operation": "pull_blocks"})


def test_sweep_combines_and_says_what_is_impossible():
    found = list(sweep(BASE, {"operation": ["pull_blocks", "pull_cache"], "run_blocks": [1, 8],
                              "memory": ["pool", "registered"]}))
    assert len(found) == 6                                  # a slot has no runs
    assert [reason == "" for _, reason in found] == [case.memory == "pool" for case, _ in found]
    assert len({case.key for case, _ in found}) == 6


@pytest.mark.parametrize("text, size", [("1", 1), ("4096", 4096), ("16K", 16384), ("16KiB", 16384), ("1.5m", 1572864),
                                        ("2g", 2 << 30)])
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "K", "-1", "0", "0.3", "1T", "nan", "inf"])
def test_no_sizes(text):
    with pytest.raises(ValueError, match="bytes"):
        parse_size(text)


def test_size_text():
    assert [size_text(size) for size in (1, 1536, 1 << 20, 5 << 30)] == ["1 B", "1.5 KiB", "1 MiB", "5 GiB"]


# Presets and models.

@pytest.mark.parametrize("name", ["quick", "goals"])
def test_presets_can_be_measured(name):
    preset = plan.preset(name, threads=3, streams=1)
    for case in preset.cases:
        case.check()
        assert (case.num_threads, case.num_streams) == (3, 1)
    assert set(preset.figures) <= set(FIGURES)


def test_the_goals_preset_measures_every_goal():
    preset = plan.preset("goals", threads=2)
    groups = {case.group for case in preset.cases}
    for goal in goals.GOALS:
        assert goal.group in groups if goal.group else goal.figure in preset.figures
    wanted = {(size, run) for size in (16, 64, 128) for run in (1, 8)}
    assert {(case.block_bytes >> 10, case.run_blocks) for case in preset.cases
            if case.group == "pool" and case.is_paged and case.num_blocks == 32 and case.num_tensors == 122} == wanted
    for group in groups - {""}:
        assert any(case.num_bytes == 256 << 20 and not case.is_paged for case in preset.cases if case.group == group)


def test_models():
    assert models.MODELS["llama-3-8b"].token_bytes == 131072
    assert models.MODELS["deepseek-v3"].token_bytes == 61 * 576 * 2
    assert models.MODELS["llama-3-70b"].shard(4).token_bytes * 4 == models.MODELS["llama-3-70b"].token_bytes
    assert models.MODELS["qwen2.5-7b"].shard(8).kv_heads == 1


# Patterns.

def _views(num_tensors, capacity, block_bytes):
    return [np.zeros((capacity, block_bytes), dtype=np.uint8) for _ in range(num_tensors)]


@pytest.mark.parametrize("block_bytes", [100, 4096, (1 << 20) + 77])
def test_verification_accepts_the_right_bytes_only(block_bytes):
    src, dst = _views(2, 3, block_bytes), _views(2, 3, block_bytes)
    memory.fill(src, link=1)
    memory.clear(dst)
    pairs = [(2, 0), (0, 1)]
    for s, d in zip(src, dst):
        for i, j in pairs:
            d[j] = s[i]
    src_blocks, dst_blocks = zip(*pairs)
    assert memory.wrong_bytes(dst, 1, src_blocks, dst_blocks) == (0, "")
    assert memory.wrong_bytes(dst, 0, src_blocks, dst_blocks)[0] > 0            # another link's pattern
    assert memory.wrong_bytes(dst, 1, src_blocks, dst_blocks[::-1])[0] > 0      # blocks in each other's place
    dst[1][1, block_bytes - 1] ^= 1
    assert memory.wrong_bytes(dst, 1, src_blocks, dst_blocks) == (
        1, f"link 1, tensor 1, block 1, byte {block_bytes - 1}")
    dst[0][2, 5] = 0
    count, where = memory.wrong_bytes(dst, 1, src_blocks, dst_blocks)
    assert count == 2 and "block 2 (not part of the transfer)" in where


def test_private_memory_holds_tensors_apart():
    private = memory.PrivateMemory(3, 5000)
    views = memory.tensor_views(private.addrs, 1, 5000)
    for index, view in enumerate(views):
        view.fill(index + 1)
    assert [view[0, -1] for view in views] == [1, 2, 3] and all(addr % 4096 == 0 for addr in private.addrs)
    del views, view
    private.close()


# Statistics and measuring.

@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), st.floats(0, 1))
def test_quantile_agrees_with_numpy(samples, q):
    assert statistics.quantile(samples, q) == pytest.approx(float(np.quantile(samples, q)), abs=1e-6)


def test_statistics_of_little():
    assert math.isnan(statistics.median([])) and math.isnan(statistics.change([], [1.0])[0])
    assert statistics.slope([(1, 5.0), (2, 7.0), (3, 9.0)]) == pytest.approx((3.0, 2.0))
    assert statistics.slope([(1, 5.0), (1, 7.0)]) == (6.0, 0.0)


@given(st.lists(st.integers(0, 10**6), max_size=300), st.integers(2, 50))
def test_thinned_samples_keep_their_ends(samples, most):
    thinned = statistics.thin(samples, most)
    assert len(thinned) == min(len(samples), most) and thinned == sorted(thinned)
    if samples:
        assert (thinned[0], thinned[-1]) == (min(samples), max(samples))


def test_change_has_an_interval_around_it():
    before = [1.0 + 0.01 * (i % 7) for i in range(60)]
    ratio, low, high = statistics.change(before, [2 * each for each in before])
    assert ratio == pytest.approx(2.0) and low <= ratio <= high and low > 1.9
    assert statistics.change(before, before)[0] == 1.0


def test_interleaved_rounds_hold_all_samplers():
    calls = []
    samplers = {"slow": repeat_timed(lambda: calls.append("slow") or 2000), "fast": repeat_timed(lambda: 500)}
    samples = interleave(repeat_timed(lambda: calls.append("op") or 1000), samplers, 0.01)
    assert all(each == {"op": 1000, "slow": 2000, "fast": 500} for each in samples.rounds)
    assert samples.best_reference() == "fast"
    assert set(samples.ratios("fast")) == {0.5} and set(samples.excess("fast")) == {500}
    assert set(samples.latencies) == {1000} and samples.latency(0.99) == 1000
    assert {"op", "slow"} == set(calls)


def test_no_reference_at_all():
    assert Samples([{"op": 1.0}], [1]).best_reference() == ""


# Goals and pictures.

def _row(group, fraction, path="shm"):
    return {"group": group, "fraction": fraction, "label": f"<{group}> & more", "gb_per_s": 10 * fraction, "path": path,
            "reference": "memcpy", "references": {"memcpy": 10.0}}


def test_goals_are_judged_by_the_worst_row():
    verdicts = {each["text"]: each for each in goals.judge([_row("pool", 0.95), _row("pool", 0.85)], [])}
    pool = next(each for text, each in verdicts.items() if text.startswith("pool memory"))
    assert pool["reached"] is False and "1 of 2 rows below" in pool["measured"]
    assert all(each["reached"] is None for each in verdicts.values() if each is not pool)
    assert goals.judge([_row("pool", 0.95)], [])[0]["reached"] is True


def test_goals_on_figures_need_all_their_values():
    limits = next(goal for goal in goals.GOALS if goal.figure == "plan").limits

    def judged(numbers):
        values = [value(name, number, "us") for name, number in numbers.items()]
        return next(each for each in goals.judge([], [{"figure": "plan", "values": values}]) if "fixed" in each["text"])

    assert judged(limits)["reached"] is True
    assert judged({name: 2 * limit for name, limit in limits.items()})["reached"] is False
    assert judged(dict(list(limits.items())[:1]))["reached"] is None


def test_a_chart_shows_labels_values_and_bounds(monkeypatch):
    drawn = chart.figure([_row("pool", 0.9), _row("tcp", 1.2, "tcp")])
    bars, bounds = drawn.data
    assert list(bars.y) == ["&lt;pool&gt; &amp; more", "&lt;tcp&gt; &amp; more"] and list(bars.x) == [9.0, 12.0]
    assert list(bars.text) == ["9.0 (0.90)", "12.0 (1.20)"] and list(bounds.x) == [10.0, 10.0]
    assert "GB/s" in drawn.layout.xaxis.title.text and "bench" in drawn.layout.title.text
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(chart.ChartError, match=r"plotly.*llm-datadist\[tools\]"):
        chart.div([])
