"""The dependency directions of the design: facade -> core -> include/ <- provider, read from the sources."""
from __future__ import annotations

import ast
import graphlib
import io
import re
import tokenize
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
PACKAGE, INCLUDE, TOOLS = ROOT / "llm_datadist", ROOT / "include", ROOT / "tools"
CORE = sorted((PACKAGE / "core").rglob("*.p[yx][xd]"))
FACADE = sorted(PACKAGE.glob("*.py")) + [
    path for folder in ("caches", "links", "managers", "observe", "options", "utils")
    for path in sorted((PACKAGE / folder).glob("*.py"))]
SHIMS = sorted((PACKAGE / "v2").glob("*.py")) + sorted((ROOT / "llm_datadist_v1").rglob("*.py"))
HOST = sorted((PACKAGE / "host").rglob("*.[ch]"))
HEADERS = sorted(INCLUDE.rglob("*.h"))
PROGRAMS = sorted(TOOLS.rglob("*.py"))

FROM = re.compile(r"^\s*(?:from\s+(\S+)\s+(?:c?import)|c?import\s+(\S+))", re.MULTILINE)
INCLUDED = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)
EXTERN = re.compile(r'^cdef extern from "([^"<]+)"', re.MULTILINE)
SYMBOL = re.compile(r"\b(?:acl[A-Z]\w*|aclrt\w+|Hixl\w+|Hccl\w+|Hcomm\w+|Ldd[A-Z]\w+)\b")

# The rooms of the core, each of which uses itself and those before it.
ROOMS = ["base", "record", "table", "plan", "link", "transfer", "engine"]
# What of the core the facade calls.
ENTRANCES = {"llm_datadist.core.base.interrupt", "llm_datadist.core.base.status", "llm_datadist.core.engine.engine",
             "llm_datadist.core.engine.layer_push", "llm_datadist.core.record.record"}
# What of the core tools/bench looks at behind the public API; its compiled modules see all of it.
MEASURED = {"llm_datadist.core.engine.engine"}
COMPILED_TOOLS = sorted((TOOLS / "bench" / "native").glob("*.pyx"))
# The folders of the host provider, and what each may use beside itself.
HOST_ROOMS = {"base": set(), "copy": {"base"}, "acl": {"base", "copy"}, "hixl/shared": {"base", "acl"},
              "hixl/client": {"base", "acl", "copy", "hixl/shared"},
              "hixl/server": {"base", "acl", "hixl/shared"}}


def read(path):
    return path.read_text(encoding="utf-8")


def name_of(path):
    return str(path.relative_to(ROOT))


def compiled_imports(path):
    """Modules that a compiled module imports or cimports, dotted."""
    for first, second in FROM.findall(read(path)):
        yield first or second


def room_of(path):
    """The folder of a file of the core or of the host provider, below either."""
    return "/".join(path.relative_to(PACKAGE).parts[1:-1])


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
        assert not name.startswith("llm_datadist.core.") or name in ENTRANCES, name
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
        assert path.stem == "provider" or header.startswith("llm_datadist/") or not (INCLUDE / header).is_file(), header


@pytest.mark.parametrize("path", CORE, ids=name_of)
def test_a_room_of_the_core_uses_those_before_it(path):
    allowed = set(ROOMS[:ROOMS.index(room_of(path)) + 1])
    for name in compiled_imports(path):
        assert not name.startswith("."), f"{name}: modules of the core are named whole"
        if name.startswith("llm_datadist.core."):
            assert name.split(".")[2] in allowed, name


def test_no_circle_in_the_core():
    """Declarations can be put in an order in which each cimports only earlier ones."""
    graph = {".".join(path.relative_to(ROOT).with_suffix("").parts): set(compiled_imports(path))
             for path in CORE if path.suffix == ".pxd"}
    while graph:
        free = {module for module, needs in graph.items() if not needs & set(graph)}
        assert free, f"in a circle: {sorted(graph)}"
        graph = {module: needs for module, needs in graph.items() if module not in free}


def test_nothing_knows_what_only_tests_and_benchmarks_use():
    """It is not compiled for users: nothing that is may import it."""
    for path in [*CORE, *FACADE, *SHIMS, *PROGRAMS]:
        assert not any(name.split(".")[0] == "llm_datadist_probes" for name in compiled_imports(path)), path
    for path in [*CORE, *FACADE, *SHIMS]:
        assert not any(name.startswith("llm_datadist.tools") for name in compiled_imports(path)), path


@pytest.mark.parametrize("path", COMPILED_TOOLS, ids=name_of)
def test_measuring_modules_use_the_core_alone(path):
    ours = {name for name in compiled_imports(path) if name.startswith("llm_datadist")}
    assert ours and all(name.startswith("llm_datadist.core.") for name in ours)
    assert (TESTS / "tools" / "native" / f"test_{path.stem}.py").is_file()


@pytest.mark.parametrize("path", [path for path in CORE if path.stem != "provider"], ids=name_of)
def test_the_core_calls_the_provider_through_its_table_alone(path):
    """A type of the provider comes from provider.pxd; a function of it is a slot of one of the three tables."""
    text = re.sub(r'"""(?:.|\n)*?"""', "", read(path))
    text = re.sub(r"#.*", "", text)
    declarations = path.with_suffix(".pxd")                 # what it cimports is known in the module, too
    types = set()
    for group in re.findall(r"from llm_datadist\.core\.base\.provider cimport (\([^)]*\)|[^\n]*)",
                            text + (read(declarations) if declarations.is_file() else "")):
        types |= set(SYMBOL.findall(group))
    for match in SYMBOL.finditer(text):
        before = text[:match.start()]
        assert match.group() in types or re.search(r"\.(?:acl|hixl|ext)\.$", before), match.group()
    assert not re.search(r"\bdl(?:open|sym)\b", text)


# The tests of modules that are tested by what they are for, with the processes that this takes.
TESTED_BY = {
    "base/device_context": "cann/test_rules.py", "link/background": "cann/test_rules.py",
    "link/client": "cann/test_rules.py", "link/serve": "cann/test_slow_calls.py",
    "base/interrupt": "transfers/test_cancel.py",
    "base/sockets": "links/test_namespaces.py", "base/status": "facade/test_status.py",
    "link/access": "transfers/test_refusals.py",
    "link/checksums": "links/test_checksum_requests.py", "transfer/verify": "transfers/test_checksums.py",
    "link/accept": "links/test_rank_table_links.py", "link/fork": "links/test_forked_child.py",
    "link/heal": "links/test_heal.py",
    "link/links": "lifetime/test_lifetime.py", "link/open": "links/test_link_clusters.py", "link/region": "transfers",
    "link/replies": "links/test_listener.py", "link/requests": "links/test_link_clusters.py",
    "link/service": "links/test_listener.py", "link/service_conn": "links/test_listener.py",
    "transfer/batch": "transfers", "transfer/fitting": "transfers", "transfer/one_pull": "transfers/exchange",
    "transfer/serve_pull": "transfers/exchange", "transfer/steps": "transfers",
    "table/holds": "transfers/test_held_blocks.py", "table/leases": "transfers/test_leases.py",
    "transfer/release": "transfers/test_held_blocks.py",
    "engine/block_keys": "transfers/test_held_blocks.py",
    "link/secret": "links/test_secret.py", "link/refusals": "links/test_secret.py",
    "engine/lifecycle": "core/engine/test_engine.py", "engine/holdings": "core/engine/test_engine.py",
    "engine/linking": "links/test_rank_table_links.py",
}


def in_core(path):
    """The name of a module below the core, such as ``table/pool``."""
    return path.relative_to(PACKAGE / "core").with_suffix("").as_posix()


@pytest.mark.parametrize("path", [path for path in CORE if path.suffix == ".pyx"], ids=name_of)
def test_every_module_of_the_core_has_a_test(path):
    mirror = TESTS / "core" / room_of(path) / f"test_{path.stem}.py"
    assert mirror.is_file() != (in_core(path) in TESTED_BY), f"{mirror}, or a name here, and not both"
    assert mirror.is_file() or (TESTS / TESTED_BY[in_core(path)]).exists()


def test_no_test_stands_for_a_module_that_is_gone():
    assert set(TESTED_BY) <= {in_core(path) for path in CORE}


# -------------------------------------------------------------------------------------------------- seam and provider

@pytest.mark.parametrize("path", HEADERS, ids=name_of)
def test_the_seam_includes_nothing_but_itself(path):
    for name in INCLUDED.findall(read(path)):
        assert (INCLUDE / name).is_file(), name


@pytest.mark.parametrize("path", CORE + HOST, ids=name_of)
def test_a_loop_that_spins_pauses_by_the_one_macro_for_it(path):
    assert not re.search(r"ia32_pause|_mm_pause|asm\b[^;]*\b(?:yield|isb|pause)\b", read(path)), "ldd_cpu_relax"


def included(path):
    """The files of the host provider that one of its files includes."""
    return [PACKAGE / "host" / name for name in INCLUDED.findall(read(path)) if (PACKAGE / "host" / name).is_file()]


@pytest.mark.parametrize("path", HOST, ids=name_of)
def test_the_provider_includes_the_seam_and_itself(path):
    for name in INCLUDED.findall(read(path)):
        assert (PACKAGE / "host" / name).is_file() or (INCLUDE / name).is_file(), name
        assert name not in {"llm_datadist/ldd_wire.h", "llm_datadist/ldd_provider.h"}, "this is the core's"
    assert "Python.h" not in read(path)


@pytest.mark.parametrize("path", HOST, ids=name_of)
def test_the_folders_of_the_provider_use_those_below_them(path):
    assert {room_of(header) for header in included(path)} <= HOST_ROOMS[room_of(path)] | {room_of(path)}


def test_the_files_of_the_provider_include_each_other_in_one_direction():
    """A C file and its header are one; what includes a header uses that one."""
    uses = {}
    for path in HOST:
        uses.setdefault(path.with_suffix(""), set()).update(header.with_suffix("") for header in included(path))
    order = graphlib.TopologicalSorter({file: used - {file} for file, used in uses.items()})
    try:
        order.prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(name_of(file) for file in error.args[1]))


def test_every_function_of_the_provider_is_declared_by_the_header_of_its_file():
    """So that the includes tell who calls whom: no header speaks for the file of another."""
    defined = re.compile(r"^(?!static|LDD_EXPORT|typedef)[A-Za-z_][\w *]*?\b(\w+)\([^;{]*\)\s*{", re.MULTILINE)
    for path in HOST:
        if path.suffix == ".c":
            header = path.with_suffix(".h")
            declared = read(header) if header.is_file() else ""
            for name in defined.findall(read(path)):
                assert re.search(rf"\b{name}\(", declared), f"{name_of(path)}: {name}"


# ------------------------------------------------------------------------------------------------------------ tools

@pytest.mark.parametrize("path", PROGRAMS, ids=name_of)
def test_tools_use_the_public_api(path):
    """All but those that tell about providers, that measure, that watch, or that belong to one serving engine."""
    part = path.relative_to(TOOLS).parts[0]
    for name in imports(path):
        if name.startswith("llm_datadist.tools"):
            continue
        if part == "bench":
            assert not name.startswith("llm_datadist.core.") or name in MEASURED, name
        else:
            allowed = {"llm_datadist", "llm_datadist.core.base.provider"} if part in (
                "ascend_check.py", "doctor.py") else {"llm_datadist"}
            below = ("llm_datadist.observe.",) + (("llm_datadist.connectors.vllm.",) if part == "vllm" else ())
            assert name in allowed or name.startswith(below), name
    assert not {name for name in identifiers(read(path)) if SYMBOL.fullmatch(name)}
