"""What to say about a name nobody knows: the closest one that is known, and all of them where there are few."""
from __future__ import annotations

import difflib
import functools
import inspect
from typing import Any, Callable, Iterable, Mapping, Optional, TypeVar

__all__ = ["closest", "did_you_mean", "known_keywords", "refuse_unknown"]

_F = TypeVar("_F", bound=Callable[..., Any])
_LISTED = 8                         # so many known names are told where none is close


def closest(name: str, known: Iterable[str]) -> Optional[str]:
    """Return the member of `known` that `name` most probably means; None when none is close."""
    folded = {candidate.lower().replace("_", ""): candidate for candidate in known}
    found = difflib.get_close_matches(name.lower().replace("_", ""), folded, 1, 0.6)
    return folded[found[0]] if found else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the end of a sentence about `name`: the closest of `known`, or all of them when they are few."""
    names = list(known)
    meant = closest(name, names)
    if meant is not None:
        return f"did you mean {meant!r}?"
    if len(names) <= _LISTED:
        return f"known are {', '.join(names)}" if names else "it takes none"
    return "nothing known is called like that"


def refuse_unknown(operation: str, given: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raise `TypeError` for the first keyword in `given` that `known` lacks."""
    names = list(known)
    for name in given:
        if name not in names:
            raise TypeError(f"{operation}() got an unexpected keyword argument {name!r}; {did_you_mean(name, names)}")


def known_keywords(function: _F) -> _F:
    """Wrap a public call so that an unknown keyword is refused with the closest known one named.

    Python itself names only the wrong one, before 3.13. The signature stays that of `function`.
    """
    name = function.__qualname__
    names = [parameter.name for parameter in inspect.signature(function).parameters.values()
             if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)][1:]
    known = frozenset(names)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if kwargs and not known.issuperset(kwargs):
            refuse_unknown(name, kwargs, names)
        return function(*args, **kwargs)

    return call                                     # type: ignore[return-value]  # the same call, seen from outside
