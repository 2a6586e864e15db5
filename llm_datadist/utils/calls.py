"""What every public call does alike: it refuses keywords it does not know, and its exceptions say which call failed."""
from __future__ import annotations

import functools
import inspect
from typing import Any, Callable, Iterable, Mapping, TypeVar

from llm_datadist.status import LLMException
from llm_datadist.utils import log
from llm_datadist.utils.spelling import did_you_mean

__all__ = ["public_call", "refuse_unknown"]

_F = TypeVar("_F", bound=Callable[..., Any])


def refuse_unknown(operation: str, given: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raise `TypeError` for the first keyword in `given` that `known` lacks."""
    names = list(known)
    for name in given:
        if name not in names:
            raise TypeError(f"{operation}() got an unexpected keyword argument {name!r}; {did_you_mean(name, names)}")


def public_call(function: _F) -> _F:
    """Wrap a public call: an unknown keyword is refused with the closest known one, and an exception names the call.

    Python itself names only the wrong keyword, before 3.13. The signature stays that of `function`.
    """
    is_constructor = function.__name__ == "__init__"
    name = function.__qualname__[:-len(".__init__")] if is_constructor else function.__name__
    names = [parameter.name for parameter in inspect.signature(function).parameters.values()
             if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)][1:]
    known = frozenset(names)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if kwargs and not known.issuperset(kwargs):
            refuse_unknown(name, kwargs, names)
        try:
            return function(*args, **kwargs)
        except LLMException as error:
            error._complete(operation=name)
            log.debug("%s was refused: %s", name, error)
            raise

    return call                                     # type: ignore[return-value]  # the same call, seen from outside
