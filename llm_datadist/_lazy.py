"""Resolve module attributes on first use, so that importing a module does not load what only some callers need."""
from __future__ import annotations

import importlib
from typing import Any, Callable, Dict, Mapping


def lazy_attributes(namespace: Dict[str, Any], sources: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a module ``__getattr__``.

    Parameters
    ----------
    namespace : dict
        ``globals()`` of the module; a resolved object is kept there.
    sources : mapping of str to str
        Attribute to the full name of the module that defines it.

    Raises
    ------
    AttributeError
        From the returned function, for a name that `sources` lacks.
    """
    def resolve(name: str) -> Any:
        source = sources.get(name)
        if source is None:
            raise AttributeError(f"module {namespace['__name__']!r} has no attribute {name!r}")
        namespace[name] = value = getattr(importlib.import_module(source), name)
        return value

    return resolve
