"""``llm-datadist version``: the versions a problem report should name."""
from __future__ import annotations

import argparse
import importlib.metadata
import platform


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """This command has no options."""


def run(args: argparse.Namespace) -> int:
    """Print one line per component; return 0."""
    for distribution in ("llm-datadist", "numpy"):
        print(f"{distribution} {importlib.metadata.version(distribution)}")
    print(f"{platform.python_implementation()} {platform.python_version()}")
    print(platform.platform())
    return 0
