"""Micro-benchmarks, by pytest-benchmark: skipped unless ``--benchmark`` is given and that plugin is there.

    make test PYTEST_ARGS="benchmarks --benchmark"
    make test PYTEST_ARGS="benchmarks --benchmark --benchmark-autosave --benchmark-compare"

They time single parts, to be compared with themselves from change to change. What the whole reaches, and against what,
is measured by ``llm-datadist bench``.
"""
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(config, items):
    """Skip what is in this directory, unless it was asked for and can run."""
    if not config.getoption("--benchmark"):
        reason = "a benchmark; run with --benchmark"
    elif not config.pluginmanager.hasplugin("benchmark"):
        reason = "pytest-benchmark is not installed"
    else:
        return
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))
