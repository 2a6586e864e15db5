"""The stopwatch of the benchmarks does what it claims to time."""
import numpy as np
import pytest

from llm_datadist.tools.bench.native.stopwatch import TableStopwatch, time_parse, time_plan, time_pool, time_record


def test_plan_reports_descriptors():
    blocks = np.arange(8)
    took_ns, count = time_plan(3, 4096, 16, blocks, blocks, 10)
    assert took_ns > 0 and count == 3                       # one run, in each of three tensors
    assert time_plan(3, 4096, 16, [0, 2, 4], [1, 3, 5], 1)[1] == 9


def test_plan_refuses_what_the_planner_refuses():
    with pytest.raises(ValueError):
        time_plan(3, 4096, 16, [16], [0], 1)
    with pytest.raises(ValueError):
        time_plan(3, 4096, 16, [1, 2], [0], 1)


def test_parse_and_pool():
    assert time_parse([1, 2, 3], 10) > 0 and time_parse(np.arange(3), 10) > 0
    assert time_pool(122, 1 << 20, 16, 10) > 0
    with pytest.raises(TypeError):
        time_parse(["a"], 1)


def test_table_holds_what_it_says_through_a_round():
    watch = TableStopwatch(100)
    try:
        some = np.array([3, 99, 0, 50], dtype=np.int64)
        assert watch.stats()["num_keys"] == 200 and watch.stats()["num_owned"] == 100
        assert watch.resolve(some) > 0
        assert watch.stats()["num_pins"] == 0
        assert watch.remove_keys(some) > 0
        assert watch.stats()["num_keys"] == 192 and watch.stats()["num_owned"] == 100
        with pytest.raises(LookupError):
            watch.resolve(some)
        assert watch.deallocate(some) > 0
        assert watch.stats()["num_owned"] == 96
        assert watch.allocate(some) > 0
        assert watch.stats()["num_keys"] == 200 and watch.stats()["num_owned"] == 100
    finally:
        watch.close()
    assert watch.stats()["num_owned"] == 0


def test_a_table_without_caches_is_refused():
    with pytest.raises(ValueError):
        TableStopwatch(0)


def test_recording_is_timed_by_part():
    times = time_record(1000)
    assert set(times) == {"count", "off", "event", "clock"} and all(each > 0 for each in times.values())
