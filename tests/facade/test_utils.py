"""Argument checkers: they decide between TypeError and ValueError everywhere."""
import numpy as np
import pytest

from llm_datadist.utils import utils

INTEGER_RANGES = {
    "check_uint8": (0, 2**8 - 1), "check_uint16": (0, 2**16 - 1), "check_uint32": (0, 2**32 - 1),
    "check_uint64": (0, 2**64 - 1), "check_int32": (-2**31, 2**31 - 1), "check_int64": (-2**63, 2**63 - 1),
}
LISTS = {"check_list_int32": "check_int32", "check_list_int64": "check_int64", "check_list_uint64": "check_uint64"}


@pytest.mark.parametrize("name", INTEGER_RANGES)
@pytest.mark.parametrize("value", [None, 1.0, "1", np.int64(1), np.uint8(1), [1], b"1"])
def test_integer_checks_refuse_other_types(name, value, assert_raises):
    error = assert_raises("TE", getattr(utils, name), "count", value)
    assert "count" in str(error) and type(value).__name__ in str(error)


@pytest.mark.parametrize("name", INTEGER_RANGES)
def test_integer_checks_know_their_range(name, assert_raises):
    check, (low, high) = getattr(utils, name), INTEGER_RANGES[name]
    assert check("count", low) == low and check("count", high) == high and check("count", True) is True
    for value in (low - 1, high + 1):
        error = assert_raises("VE", check, "count", value)
        assert f"count={value}" in str(error) and str(high) in str(error)


@pytest.mark.parametrize("name", LISTS)
def test_list_checks_are_element_wise(name, assert_raises):
    check, (low, high) = getattr(utils, name), INTEGER_RANGES[LISTS[name]]
    for sequence in ([], (), [low, high], (0, True)):
        assert check("counts", sequence) is sequence
    assert "counts[1]" in str(assert_raises("VE", check, "counts", [0, high + 1]))
    assert "counts[1]" in str(assert_raises("VE", check, "counts", [0, low - 1]))
    assert "counts[2]" in str(assert_raises("TE", check, "counts", [0, 1, None]))
    assert_raises("TE", check, "counts", [np.int32(1)])
    assert_raises("TE", check, "counts", None)


@pytest.mark.parametrize("value, classes, inner", [
    (1, int, None), (True, int, None), ("a", [int, str], None), ([1, 2], list, int), ((1,), (list, tuple), int),
    ([1, "a"], list, [int, str]), ([], list, int), (None, int, None), (None, list, int),
])
def test_check_isinstance_returns_the_value(value, classes, inner):
    assert utils.check_isinstance("arg", value, classes, inner) is value


@pytest.mark.parametrize("value, classes, inner, text", [
    ("a", int, None, "only support"), (1, [str, list], None, "only support"), (1.0, int, None, "but got"),
    ([1, "a"], list, int, "inner type only support"), ([None], list, int, "inner type only support"),
    ((1,), list, int, "only support"),
])
def test_check_isinstance_refuses(value, classes, inner, text, assert_raises):
    error = assert_raises("TE", utils.check_isinstance, "arg", value, classes, inner)
    assert text in str(error) and "but got" in str(error) and "arg" in str(error)


def test_check_isinstance_none_only_where_allowed(assert_raises):
    error = assert_raises("TE", utils.check_isinstance, "arg", None, int, extra_fmt=" of ms", allow_none=False)
    assert "int of ms" in str(error)


def test_check_inner(assert_raises):
    assert utils.check_inner("arg", [1, 2], int) == [1, 2]
    assert "position 1" in str(assert_raises("TE", utils.check_inner, "arg", [1, "a"], int))


@pytest.mark.parametrize("value, kind", [
    (None, "AE"), ([], "TE"), ("a", "TE"), ({"a": [1]}, "TE"), ({1: 2}, "TE"), ({1: ["a"]}, "TE"), ({1: None}, "TE"),
    ({None: [1]}, "TE"),
])
def test_check_dict_refuses(value, kind, assert_raises):
    assert_raises(kind, utils.check_dict, "arg", value, int, list, int)


def test_check_dict_returns_the_dict():
    for value in ({}, {1: [2, 3]}, {1: []}):
        assert utils.check_dict("arg", value, int, list, int) is value
    assert utils.check_dict("arg", {1: "a", 2: 3}, int, [str, int]) == {1: "a", 2: 3}


def test_check_type():
    assert utils.check_type(True, int) and not utils.check_type("1", int)


def test_check_positive_or_set_default(assert_raises):
    check = utils.check_positive_or_set_default
    assert check("offset", None) == -1 and check("offset", None, 7) == 7
    assert check("offset", 0) == 0 and check("offset", 2**63 - 1) == 2**63 - 1
    assert_raises("VE", check, "offset", -1)
    assert_raises("VE", check, "offset", 2**63)
    assert_raises("TE", check, "offset", "1")
    assert_raises("TE", check, "offset", np.int64(1))
