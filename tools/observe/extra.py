"""What only some tools need, and what to say where it is missing."""
from __future__ import annotations

import argparse
import importlib
from types import ModuleType
from typing import Any


class MissingExtra(RuntimeError):
    """A package of the extra ``tools`` is not installed; the text says what to do."""


def require(name: str, what_for: str) -> ModuleType:
    """Import a module of the extra ``tools``.

    Raises
    ------
    MissingExtra
        It is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise MissingExtra(f"{what_for} needs the package {package}, which is not installed: "
                           "pip install 'llm-datadist[tools]'") from None


def console() -> Any:
    """A console of ``rich`` that does not squeeze tables into 80 columns where nobody looks at a terminal.

    Raises
    ------
    MissingExtra
        It is not installed.
    """
    made = require("rich.console", "this view").Console()
    if not made.is_terminal:
        made.width = 160
    return made


def seconds(text: str) -> float:
    """A duration for an option: a number of seconds, not negative."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds")
    return number
