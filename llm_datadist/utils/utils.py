"""Argument checkers. They decide everywhere between `TypeError` (wrong type) and `ValueError` (outside the range).

An integer is a Python `int`, and so also a `bool`; NumPy integers are refused, because they wrap around silently
when they are added up to addresses. Each checker returns the value it has checked.
"""
from __future__ import annotations

from typing import Any, Dict, Iterable, NoReturn, Optional, Sequence, Tuple, Type, TypeVar, Union

__all__ = [
    "check_isinstance", "check_dict", "check_inner", "check_type", "check_uint8", "check_uint16", "check_uint32",
    "check_uint64", "check_int32", "check_int64", "check_list_int32", "check_list_int64", "check_list_uint64",
    "check_positive_or_set_default",
]

_T = TypeVar("_T")
_Classes = Union[Type[Any], Sequence[Type[Any]]]


def _allowed(classes: _Classes) -> Union[Type[Any], Tuple[Type[Any], ...]]:
    """What `isinstance` takes; a tuple passes as it is, as checks are on the way of every call."""
    return classes if isinstance(classes, (type, tuple)) else tuple(classes)


def _names(classes: Union[Type[Any], Tuple[Type[Any], ...]]) -> str:
    return " or ".join(cls.__name__ for cls in (classes if isinstance(classes, tuple) else (classes,)))


def check_isinstance(
    arg_name: str, arg_value: _T, classes: _Classes, inner_class: Optional[_Classes] = None, extra_fmt: str = "",
    allow_none: bool = True,
) -> _T:
    """Check the type of an argument, and of its elements.

    Parameters
    ----------
    arg_name : str
        Name of the argument, for the text.
    arg_value : object
        The argument.
    classes : type or sequence of type
        What `arg_value` may be an instance of.
    inner_class : type or sequence of type, optional
        What every element of `arg_value` must be an instance of.
    extra_fmt : str
        Put into the text behind the allowed types.
    allow_none : bool
        Whether None passes, which it does by default.

    Raises
    ------
    TypeError
        The text says what is supported and what came.
    """
    if arg_value is None and allow_none:
        return arg_value
    if type(arg_value) is classes and inner_class is None:      # the usual case, on the way of every call
        return arg_value
    allowed = _allowed(classes)
    if not isinstance(arg_value, allowed):
        raise TypeError(
            f"{arg_name} only support type {_names(allowed)}{extra_fmt}, but got {type(arg_value).__name__}")
    if inner_class is not None:
        check_inner(arg_name, arg_value, inner_class)
    return arg_value


def check_inner(arg_name: str, arg_value: Iterable[Any], inner_class: _Classes) -> Iterable[Any]:
    """Check the type of every element of `arg_value`.

    Parameters
    ----------
    arg_name : str
        Name of the argument, for the text.
    arg_value : iterable
        The argument.
    inner_class : type or sequence of type
        What each element must be an instance of.

    Raises
    ------
    TypeError
        The text names the first element that is something else.
    """
    allowed = _allowed(inner_class)
    for index, element in enumerate(arg_value):
        if not isinstance(element, allowed):
            raise TypeError(f"{arg_name} inner type only support {_names(allowed)}, "
                            f"but got {type(element).__name__} at position {index}")
    return arg_value


def check_dict(
    arg_name: str, arg_value: Dict[Any, Any], k_class: _Classes, v_class: _Classes,
    v_inner_class: Optional[_Classes] = None,
) -> Dict[Any, Any]:
    """Check a dict, its keys, its values, and the elements of its values.

    Parameters
    ----------
    arg_name : str
        Name of the argument, for the text.
    arg_value : dict
        The argument.
    k_class, v_class : type or sequence of type
        What keys and values must be instances of.
    v_inner_class : type or sequence of type, optional
        What the elements of each value must be instances of.

    Raises
    ------
    TypeError
        Something has another type.
    AttributeError
        `arg_value` is None.
    """
    check_isinstance(arg_name, arg_value, dict)
    for key, value in arg_value.items():
        check_isinstance(f"key of {arg_name}", key, k_class, allow_none=False)
        check_isinstance(f"{arg_name}[{key!r}]", value, v_class, v_inner_class, allow_none=False)
    return arg_value


def check_type(obj: object, cls: Type[Any]) -> bool:
    """Return whether `obj` is an instance of `cls`."""
    return isinstance(obj, cls)


def _refuse_type(arg_name: str, arg_value: object, kind: str) -> NoReturn:
    raise TypeError(f"{arg_name} only support type int ({kind}), but got {type(arg_value).__name__}")


def _check_integer(arg_name: str, arg_value: int, low: int, high: int, kind: str) -> int:
    if not isinstance(arg_value, int):
        _refuse_type(arg_name, arg_value, kind)
    if not low <= arg_value <= high:
        raise ValueError(f"{arg_name}={arg_value} is outside the range of {kind}, [{low}, {high}]")
    return arg_value


def check_uint8(arg_name: str, arg_value: int) -> int:
    """Check that `arg_value`, called `arg_name`, is an int (TypeError) of [0, 2**8 - 1] (ValueError)."""
    return _check_integer(arg_name, arg_value, 0, 0xFF, "uint8")


def check_uint16(arg_name: str, arg_value: int) -> int:
    """Check that `arg_value`, called `arg_name`, is an int (TypeError) of [0, 2**16 - 1] (ValueError)."""
    return _check_integer(arg_name, arg_value, 0, 0xFFFF, "uint16")


def check_uint32(arg_name: str, arg_value: int) -> int:
    """Check that `arg_value`, called `arg_name`, is an int (TypeError) of [0, 2**32 - 1] (ValueError)."""
    return _check_integer(arg_name, arg_value, 0, 0xFFFFFFFF, "uint32")


def check_uint64(arg_name: str, arg_value: int) -> int:
    """Check that `arg_value`, called `arg_name`, is an int (TypeError) of [0, 2**64 - 1] (ValueError)."""
    return _check_integer(arg_name, arg_value, 0, 0xFFFFFFFFFFFFFFFF, "uint64")


def check_int32(arg_name: str, arg_value: int) -> int:
    """Check that `arg_value`, called `arg_name`, is an int (TypeError) of [-2**31, 2**31 - 1] (ValueError)."""
    return _check_integer(arg_name, arg_value, -0x80000000, 0x7FFFFFFF, "int32")


def check_int64(arg_name: str, arg_value: int) -> int:
    """Check that `arg_value`, called `arg_name`, is an int (TypeError) of [-2**63, 2**63 - 1] (ValueError)."""
    return _check_integer(arg_name, arg_value, -0x8000000000000000, 0x7FFFFFFFFFFFFFFF, "int64")


def check_list_int32(arg_name: str, arg_value: Sequence[int]) -> Sequence[int]:
    """Check every element of `arg_value`, called `arg_name`, as `check_int32` does."""
    for index, element in enumerate(arg_value):
        check_int32(f"{arg_name}[{index}]", element)
    return arg_value


def check_list_int64(arg_name: str, arg_value: Sequence[int]) -> Sequence[int]:
    """Check every element of `arg_value`, called `arg_name`, as `check_int64` does."""
    for index, element in enumerate(arg_value):
        check_int64(f"{arg_name}[{index}]", element)
    return arg_value


def check_list_uint64(arg_name: str, arg_value: Sequence[int]) -> Sequence[int]:
    """Check every element of `arg_value`, called `arg_name`, as `check_uint64` does."""
    for index, element in enumerate(arg_value):
        check_uint64(f"{arg_name}[{index}]", element)
    return arg_value


def check_positive_or_set_default(arg_name: str, arg_value: Optional[int], default: int = -1) -> int:
    """Check an optional int that must not be negative.

    Parameters
    ----------
    arg_name : str
        Name of the argument, for the text.
    arg_value : int, optional
        The argument.
    default : int
        Returned for None.

    Raises
    ------
    TypeError
        `arg_value` is neither an int nor None.
    ValueError
        `arg_value` is negative or does not fit int64.
    """
    if arg_value is None:
        return default
    check_int64(arg_name, arg_value)
    if arg_value < 0:
        raise ValueError(f"{arg_name}={arg_value} is negative; allowed are None and 0 or more")
    return arg_value
