"""The dependency directions of the design: facade -> core -> include/ <- provider, read from the sources."""
from __future__ import annotations

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
PACKAGE, INCLUDE, TOOLS = ROOT / "llm_datadist", ROOT / "include", ROOT / "tools"
CORE = sorted((PACKAGE / "core").glob("*.p[yx][xd]"))
FACADE = sorted(PACKAGE.glob("*.py")) + sorted((PACKAGE / "utils").glob("*.py"))
SHIMS = sorted((PACKAGE / "v2").glob("*.py")) + sorted((ROOT / "llm_datadist_v1").rglob("*.py"))
HOST = sorted((PACKAGE / "host").glob("*.[ch]"))
HEADERS = sorted(INCLUDE.rglob("*.h"))
PROGRAMS = sorted(TOOLS.rglob("*.py"))

FROM = re.compile(r"^\s*(?:from\s+(\S+)\s+(?:c?import)|c?import\s+(\S+))", re.MULTILINE)
INCLUDED = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)
EXTERN = re.compile(r'^cdef extern from "([^"<]+)"', re.MULTILINE)
SYMBOL = re.compile(r"\b(?:acl[A-Z]\w*|aclrt\w+|Hixl\w+|Hccl\w+|Hcomm\w+|Ldd[A-Z]\w+)\b")

# The parts of the core that only measure, and what they measure; tools/bench may look behind the public API.
MEASURED = {"bound", "bound_tcp", "stopwatch", "wait", "engine"}


def read(path):
    return path.read_text(encoding="utf-8")


def name_of(path):
    return str(path.relative_to(ROOT))


def compiled_imports(path):
    """Modules that a compiled module imports or cimports, dotted, with relative names resolved."""
    for first, second in FROM.findall(read(path)):
        name = first or second
        yield f"llm_datadist.core{name}" if name.startswith(".") else name


def imports(path):
    """Modules of ours that a Python module imports anywhere, dotted, but for those that only type checkers import."""
    tree = ast.parse(read(path))
    for_checkers = {id(node) for block in ast.walk(tree) if isinstance(block, ast.If)
                    and isinstance(block.test, ast.Name) and block.test.id == "TYPE_CHECKING"
                    for node in ast.walk(block)}
    for node in ast.walk(tree):
        if id(node) in for_checkers:
            continue
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            modules = [node.module or ""]
            modules += [f"{node.module}.{alias.name}" for alias in node.names
                        if (ROOT.joinpath(*node.module.split("."), f"{alias.name}.py")).is_file()]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        else:
            continue
        yield from (name for name in modules if name.split(".")[0].startswith("llm_datadist"))


def identifiers(text):
    """The names in Python code, without comments and texts."""
    return {token.string for token in tokenize.generate_tokens(io.StringIO(text).readline)
            if token.type == tokenize.NAME}


def test_there_is_something_to_read():
    assert all((CORE, FACADE, SHIMS, HOST, HEADERS, PROGRAMS))


# ----------------------------------------------------------------------------------------------------------- facade

@pytest.mark.parametrize("path", FACADE, ids=name_of)
def test_the_facade_reaches_the_provider_through_the_core_alone(path):
    for name in imports(path):
        assert not name.startswith(("llm_datadist.host", "llm_datadist.tools", "llm_datadist.v2", "llm_datadist_v1"))
        assert not name.startswith("llm_datadist.core.") or name.split(".")[2] in {"engine", "put", "status"}, name
    assert not {name for name in identifiers(read(path)) if SYMBOL.fullmatch(name)}


@pytest.mark.parametrize("path", SHIMS, ids=name_of)
def test_the_shims_of_old_paths_stand_on_the_facade(path):
    assert not any(name.startswith(("llm_datadist.core", "llm_datadist.host", "llm_datadist.tools"))
                   for name in imports(path))


def test_the_leaves():
    """Anybody may import these, so they import nobody but the logger."""
    assert set(imports(PACKAGE / "utils" / "log.py")) == set()
    assert set(imports(PACKAGE / "status.py")) <= {"llm_datadist.utils", "llm_datadist.utils.log"}


def test_no_circle_of_imports():
    """The modules of the facade can be put in an order in which each imports only earlier ones."""
    graph = {}
    for path in FACADE:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        graph[module] = {name for name in imports(path) if name != module}
    ordered = set()
    while graph:
        free = {module for module, needs in graph.items() if not needs & (set(graph) - {"llm_datadist.__init__"})}
        assert free, f"in a circle: {graph}"
        ordered |= free
        graph = {module: needs for module, needs in graph.items() if module not in free}


# ------------------------------------------------------------------------------------------------------------- core

@pytest.mark.parametrize("path", CORE, ids=name_of)
def test_the_core_knows_the_facade_by_its_exceptions_alone(path):
    ours = {name for name in compiled_imports(path) if name.split(".")[0] == "llm_datadist"}
    facade = {name for name in ours if not name.startswith("llm_datadist.core")}
    assert facade <= {"llm_datadist", "llm_datadist.status"}
    if "llm_datadist" in ours:
        assert re.findall(r"^from llm_datadist import (.*)$", read(path), re.MULTILINE) == ["status as _public"]
    for header in EXTERN.findall(read(path)):
        assert (INCLUDE / header).is_file() or header in {"Python.h", "unistd.h"}, header
        assert path.stem == "cann" or header.startswith("llm_datadist/") or not (INCLUDE / header).is_file(), header


@pytest.mark.parametrize("path", [path for path in CORE if path.stem != "cann"], ids=name_of)
def test_the_core_calls_the_provider_through_its_table_alone(path):
    """A type of the provider comes from cann.pxd; a function of it is a slot of one of the three tables."""
    text = re.sub(r'"""(?:.|\n)*?"""', "", read(path))
    text = re.sub(r"#.*", "", text)
    declarations = path.with_suffix(".pxd")                 # what it cimports is known in the module, too
    types = set()
    for group in re.findall(r"from (?:\.|llm_datadist\.core\.)cann cimport (\([^)]*\)|[^\n]*)",
                            text + (read(declarations) if declarations.is_file() else "")):
        types |= set(SYMBOL.findall(group))
    for match in SYMBOL.finditer(text):
        before = text[:match.start()]
        assert match.group() in types or re.search(r"\.(?:acl|hixl|ext)\.$", before), match.group()
    assert not re.search(r"\bdl(?:open|sym)\b", text)


# The tests of modules that are tested by what they are for, with the processes that this takes.
TESTED_BY = {
    "answer": "test_listener.py", "ask": "links/test_link_clusters.py", "board": "core/test_peek.py",
    "cache_object": "core/test_cache_table.py", "conn": "test_listener.py", "connect": "links/test_link_clusters.py",
    "engine_core": "core/test_engine.py", "engine_links": "links/test_rank_table_links.py",
    "fetch": "transfers/exchange", "fork": "links/test_forked_child.py", "move": "transfers",
    "net": "links/test_namespaces.py", "node": "test_lifetime.py", "region": "transfers",
    "serve_fetch": "transfers/exchange", "service": "test_listener.py",
    "status": "test_status.py", "transfer": "transfers", "welcome": "links/test_rank_table_links.py",
}


@pytest.mark.parametrize("path", [path for path in CORE if path.suffix == ".pyx"], ids=name_of)
def test_every_module_of_the_core_has_a_test(path):
    mirror = TESTS / "core" / f"test_{path.stem}.py"
    assert mirror.is_file() != (path.stem in TESTED_BY), f"{mirror}, or a name here, and not both"
    assert mirror.is_file() or (TESTS / TESTED_BY[path.stem]).exists()


def test_no_test_stands_for_a_module_that_is_gone():
    assert set(TESTED_BY) <= {path.stem for path in CORE}


# -------------------------------------------------------------------------------------------------- seam and provider

@pytest.mark.parametrize("path", HEADERS, ids=name_of)
def test_the_seam_includes_nothing_but_itself(path):
    for name in INCLUDED.findall(read(path)):
        assert (INCLUDE / name).is_file(), name


@pytest.mark.parametrize("path", HOST, ids=name_of)
def test_the_provider_includes_the_seam_and_itself(path):
    for name in INCLUDED.findall(read(path)):
        assert (path.parent / name).is_file() or (INCLUDE / name).is_file(), name
        assert name not in {"llm_datadist/ldd_wire.h", "llm_datadist/ldd_table.h"}, "this is the core's"
    assert "Python.h" not in read(path)


# ------------------------------------------------------------------------------------------------------------ tools

@pytest.mark.parametrize("path", PROGRAMS, ids=name_of)
def test_tools_use_the_public_api(path):
    """All but the one that tells about providers, and the one that measures."""
    part = path.relative_to(TOOLS).parts[0]
    for name in imports(path):
        if name.startswith("llm_datadist.tools"):
            continue
        if part == "bench":
            assert not name.startswith("llm_datadist.core.") or name.split(".")[2] in MEASURED, name
        else:
            allowed = {"llm_datadist", "llm_datadist.core.cann"} if part == "doctor.py" else {"llm_datadist"}
            assert name in allowed, name
    assert not {name for name in identifiers(read(path)) if SYMBOL.fullmatch(name)}
