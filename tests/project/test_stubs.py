"""The stubs of the compiled modules say what is there; type checkers of clients read them instead of the modules."""
import importlib
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

import llm_datadist

pytest.importorskip("mypy.stubtest")

PACKAGE = Path(llm_datadist.__file__).parent
COMPILED_PACKAGES = [PACKAGE / "core", PACKAGE / "tools" / "bench" / "native"]


def module_names(suffix):
    """The full names of the modules of files in those packages, sorted."""
    paths = [path for folder in COMPILED_PACKAGES for path in folder.rglob(f"*{suffix}")]
    return sorted({".".join((*path.parent.relative_to(PACKAGE.parent).parts, path.name.partition(".")[0]))
                   for path in paths})


STUBBED = module_names(".pyi")
COMPILED = module_names(".so")

# What Cython adds to a module or class; that it shows any arguments for a constructor that takes none; and that no
# class can inherit from this one and another with fields of its own, for which older type checkers lack a word.
ALLOWED = r"""
.*\.__pyx_capi__
.*\.__reduce_cython__
.*\.__setstate_cython__
.*\.__test__
llm_datadist\.core\.plan\.index_list\.IndexList\.__init__
llm_datadist\.core\.base\.provider\.Provider\.__init__
llm_datadist\.core\.engine\.lifecycle\.(EngineCore|PoolMemory)
llm_datadist\.core\.engine\.holdings\.EngineHoldings
"""


def public_names(name_of_module):
    module = importlib.import_module(name_of_module)
    return [name for name, value in vars(module).items()
            if not name.startswith("_") and not inspect.ismodule(value)
            and getattr(value, "__module__", module.__name__) == module.__name__]


def test_every_module_with_something_to_import_has_a_stub():
    assert COMPILED
    assert [name for name in COMPILED if public_names(name)] == STUBBED


def test_stubs_fit_the_modules(tmp_path):
    allowlist = tmp_path / "allowlist"
    allowlist.write_text(ALLOWED, encoding="utf-8")
    root = str(PACKAGE.parent)
    # mypy finds an installed package by itself, and refuses to be shown it again.
    shown = {} if "site-packages" in root else {"MYPYPATH": root}
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "mypy.stubtest", "--concise", "--allowlist", str(allowlist), "--ignore-unused-allowlist",
         *STUBBED],
        capture_output=True, text=True, timeout=100, check=False, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path, **shown})
    assert done.returncode == 0, done.stdout + done.stderr
