"""What is compiled for measuring alone: reference copies and stopwatches, which an installation for use lacks."""
from __future__ import annotations

import importlib.util


class NotBuiltError(ImportError):
    """This installation cannot measure."""


def require() -> None:
    """Raise `NotBuiltError`, which says how to get them, where the modules of this package were not compiled."""
    if importlib.util.find_spec(f"{__name__}.stopwatch") is None:
        raise NotBuiltError("this installation cannot measure, as what measures was not compiled: "
                            "install from the sources with LDD_WITH=bench pip install .")
