"""What to say about a name nobody knows: the closest one that is known, and all of them where there are few."""
from __future__ import annotations

import difflib
from typing import Iterable, Optional

__all__ = ["closest", "did_you_mean"]

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
