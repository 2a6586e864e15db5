"""Block lists as users give them: what is read, what is read in place, and what is refused with which words."""
import array
import gc
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_datadist.status import LLMParamInvalidError
from llm_datadist_probes.transfer import PlanProbe, parse_indices

INT64_MAX = 2**63 - 1
indices = st.lists(st.one_of(st.integers(0, 300), st.integers(0, INT64_MAX)), max_size=200)
NARROW = [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32]


@given(indices)
def test_every_form_of_a_list_reads_the_same(values):
    int64 = np.array(values, dtype=np.int64)
    for form in (
        values,
        tuple(values),
        [np.uint64(v) for v in values],
        (np.int64(v) for v in values),
        array.array("q", values),
        array.array("Q", values),
        memoryview(array.array("l", values)),
        int64,
        int64.astype(np.uint64),
        np.repeat(int64, 3)[::3],
        int64[::-1].copy()[::-1],
    ):
        assert parse_indices(form, "blocks")[0] == values


@given(st.lists(st.integers(0, 127), max_size=200), st.sampled_from(NARROW), st.integers(1, 3))
def test_narrow_and_strided_buffers_are_widened(values, dtype, step):
    wide = np.repeat(np.array(values, dtype=dtype), step)
    assert parse_indices(wide[::step], "blocks") == (values, False)


@given(st.integers(0, 500), st.integers(0, 500), st.integers(-50, 50).filter(bool))
def test_ranges(start, stop, step):
    values = range(start, stop, step)
    if values and values[-1] < 0:
        with pytest.raises(ValueError, match="cannot be negative"):
            parse_indices(values, "blocks")
    else:
        assert parse_indices(values, "blocks") == (list(values), False)


@pytest.mark.parametrize("values", [range(5, -9, -3), range(-3, 4), range(0, -2, -1), range(-1, -2, -1)])
def test_a_range_names_its_first_negative_element(values):
    i = next(i for i, value in enumerate(values) if value < 0)
    with pytest.raises(ValueError, match=rf"blocks\[{i}\] is {values[i]},"):
        parse_indices(values, "blocks")


@pytest.mark.parametrize("values", [range(2**63, 2**63 + 2), range(0, 2**70, 2**69), range(7, 7 + 2**80, 2**80)])
def test_ranges_of_huge_numbers(values):
    if len(values) == 1 and values[0] <= INT64_MAX:
        assert parse_indices(values, "blocks")[0] == [7]
    else:
        with pytest.raises(ValueError, match="at most"):
            parse_indices(values, "blocks")


@pytest.mark.parametrize("dtype", [np.int64, np.uint64])
def test_64_bit_buffers_are_read_in_place_and_stay_exported_meanwhile(dtype):
    assert parse_indices(np.arange(100, dtype=dtype), "blocks") == (list(range(100)), True)
    growable = array.array("q", range(100))
    parse_indices(growable, "blocks")
    growable.append(1)  # raises BufferError while an export is alive
    raw = bytearray(np.arange(101, dtype=np.int64).tobytes())
    unaligned = np.frombuffer(memoryview(raw)[3:-5], dtype=np.int64)
    assert parse_indices(unaligned, "blocks") == (unaligned.tolist() if (unaligned >= 0).all() else [], False)


def test_a_refused_buffer_is_released():
    growable = array.array("q", [1, -2])
    for _ in range(3):
        with pytest.raises(ValueError, match=r"blocks\[1\] is -2"):
            parse_indices(growable, "blocks")
    growable.append(1)


def test_long_lists_and_the_inline_boundary():
    for n in (0, 1, 63, 64, 65, 1000):
        assert parse_indices(list(range(n)), "blocks")[0] == list(range(n))
        assert parse_indices([np.int32(i) for i in range(n)], "blocks")[0] == list(range(n))


def test_bools_and_int_subclasses_count_as_int():
    class Index(int):
        pass

    class Other:
        def __index__(self):
            return 9

    assert parse_indices([True, False, Index(5), Other(), 3], "blocks")[0] == [1, 0, 5, 9, 3]


@pytest.mark.parametrize("bad", [1.0, "1", None, b"1", [1], 1j, np.float32(1)])
@pytest.mark.parametrize("form", [list, tuple, iter])
def test_other_elements_are_named(bad, form):
    with pytest.raises(TypeError, match=r"src_blocks\[2\] must be int, got .*" + type(bad).__name__):
        parse_indices(form([0, 1, bad, 3]), "src_blocks")


@pytest.mark.parametrize(
    "bad", ["123", b"123", bytearray(b"1"), 5, None, 1.5, object(), np.zeros(3), np.zeros(3, bool), np.array(["a"])]
)
def test_other_containers_are_refused(bad):
    with pytest.raises(TypeError, match="src_blocks must"):
        parse_indices(bad, "src_blocks")


def test_foreign_byte_order_and_dimensions_are_refused():
    foreign = ">" if sys.byteorder == "little" else "<"
    with pytest.raises(TypeError, match="native"):
        parse_indices(np.arange(3).astype(foreign + "i8"), "blocks")
    for shape in ((), (2, 2)):
        with pytest.raises(ValueError, match="one-dimensional"):
            parse_indices(np.zeros(shape, np.int64), "blocks")


@given(st.lists(st.integers(0, 9), max_size=100), st.integers(-(2**80), -1))
def test_negative_values_are_named_and_never_wrap(good, bad):
    values = good + [bad] + good
    forms = [values, tuple(values)]
    if bad >= -(2**63):
        forms += [np.array(values, np.int64), [np.int64(v) for v in values], array.array("q", values)]
    if bad >= -128:
        forms.append(np.array(values, np.int8))
    for form in forms:
        with pytest.raises(ValueError, match=rf"blocks\[{len(good)}\] is {bad}, .*negative"):
            parse_indices(form, "blocks")


@given(st.lists(st.integers(0, 9), max_size=100), st.integers(2**63, 2**80))
def test_values_beyond_int64_are_named(good, bad):
    values = good + [bad]
    for form in (values, tuple(values)) + ((np.array(values, np.uint64),) if bad < 2**64 else ()):
        with pytest.raises(ValueError, match=rf"blocks\[{len(good)}\] is {bad}, .*at most {INT64_MAX}"):
            parse_indices(form, "blocks")


def test_an_element_may_change_the_list_it_is_in():
    class Spoiler:
        def __index__(self):
            values.clear()
            gc.collect()
            return 4

    values = [1, 2, Spoiler(), 3]
    assert parse_indices(values, "blocks")[0] == [1, 2, 4, 3]


def test_an_exception_of_an_element_comes_through():
    class Broken:
        def __index__(self):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        parse_indices([Broken()], "blocks")


@given(st.lists(st.integers(0, 50), max_size=50), st.integers(0, 60))
def test_the_range_check_names_the_first_offender(values, limit):
    def check():
        PlanProbe().blocks([0], range(len(values)), len(values), [0], values, limit, 1, False)

    bad = [(i, value) for i, value in enumerate(values) if value >= limit]
    if not bad:
        check()
        return
    with pytest.raises(LLMParamInvalidError, match=rf"dst_blocks\[{bad[0][0]}\] is block {bad[0][1]}, ") as info:
        check()
    assert (f"0..{limit - 1}" if limit else "no blocks") in str(info.value)


def test_reading_leaks_nothing():
    values = [np.int64(i) for i in range(500)]
    buffer = np.arange(500)
    before = [sys.getrefcount(values), sys.getrefcount(values[300]), sys.getrefcount(buffer)]
    for _ in range(50):
        parse_indices(values, "blocks")
        parse_indices(buffer, "blocks")
        with pytest.raises(ValueError):
            parse_indices(buffer - 1, "blocks")
    assert before == [sys.getrefcount(values), sys.getrefcount(values[300]), sys.getrefcount(buffer)]
