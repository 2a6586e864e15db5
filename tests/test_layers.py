"""The dependency directions of the design: facade -> core -> include/ <- provider, read from the sources."""
import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE, INCLUDE = ROOT / "llm_datadist", ROOT / "include"
CORE = sorted((PACKAGE / "core").glob("*.p[yx][xd]")) + sorted((PACKAGE / "core").glob("*.pxd"))
FACADE = sorted(PACKAGE.glob("*.py")) + sorted((PACKAGE / "utils").glob("*.py"))
HOST = sorted((PACKAGE / "host").glob("*.[ch]"))
FROM = re.compile(r"^\s*(?:from\s+(\S+)\s+(?:c?import)|c?import\s+(\S+))", re.MULTILINE)
INCLUDED = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)


def imports_of(path):
    """Modules that a compiled module imports or cimports, dotted, with relative names resolved."""
    for first, second in FROM.findall(path.read_text(encoding="utf-8")):
        name = first or second
        yield f"llm_datadist.core{name}" if name.startswith(".") else name


def test_there_is_something_to_read():
    assert CORE and FACADE and HOST and INCLUDE.is_dir()


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.name)
def test_the_core_knows_the_facade_by_its_exceptions_alone(path):
    ours = {name for name in imports_of(path) if name.split(".")[0] == "llm_datadist"}
    outside = {name for name in ours if not name.startswith("llm_datadist.core")}
    assert outside <= {"llm_datadist", "llm_datadist.status"}
    if "llm_datadist" in ours:
        assert re.findall(r"^from llm_datadist import (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE) \
            == ["status as _public"]


@pytest.mark.parametrize("path", HOST, ids=lambda path: path.name)
def test_the_provider_includes_the_seam_and_itself(path):
    for name in INCLUDED.findall(path.read_text(encoding="utf-8")):
        assert (path.parent / name).is_file() or (INCLUDE / name).is_file(), name
    assert "Python.h" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted(INCLUDE.rglob("*.h")), ids=lambda path: path.name)
def test_the_seam_includes_nothing_but_itself(path):
    for name in INCLUDED.findall(path.read_text(encoding="utf-8")):
        assert (INCLUDE / name).is_file(), name


@pytest.mark.parametrize("path", FACADE, ids=lambda path: path.name)
def test_the_facade_reaches_the_provider_through_the_core_alone(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else \
            [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            assert not name.startswith(("llm_datadist.host", "llm_datadist.tools", "llm_datadist_v1")), name
