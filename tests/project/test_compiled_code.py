"""Compiled-code hygiene: what runs without the interpreter's lock does not touch the interpreter.

The C files that Cython made of the core are read: those of the last build, or fresh ones where that is not at hand. In
the functions declared ``noexcept nogil``, the hot ones above all, no call may begin with ``Py`` or ``__Pyx``.
"""
import importlib.util
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "llm_datadist" / "core"
BUILT = ROOT / "build" / "cython" / "llm_datadist" / "core"

# What every transfer, lookup and answer goes through. A function that is renamed is renamed here.
HOT = {
    "replies": ["ldd_reply"],
    "requests": ["ldd_request_resolve", "ldd_request_release"],
    "block_plan": ["ldd_plan_blocks", "ldd_plan_contiguous", "ldd_plan_slot_to_blocks"],
    "cache_table": ["ldd_table_allocate", "ldd_table_deallocate", "ldd_table_pin_local", "ldd_table_remove_key",
                    "ldd_table_resolve", "ldd_table_take", "ldd_table_unpin"],
    "fitting": ["ldd_fit_ends", "ldd_fit_plan"],
    "one_pull": ["ldd_one_pull", "_assume", "_write_request"],
    "key_index": ["ldd_keys_find", "ldd_keys_find_shared"],
    "local_copy": ["ldd_local_copy"],
    "batch": ["ldd_batch_run", "ldd_batch_finish"],
    "shared_reader": ["ldd_reader_resolve", "ldd_reader_done"],
    "pool": ["ldd_pool_alloc_tensors", "ldd_pool_free"],
    "serve_pull": ["_on_begin", "_on_end", "_cut"],
    "service": ["_service_main", "_on_readable"],
    "steps": ["ldd_transfer_run", "_move_steps"],
    "wait": ["ldd_wait_complete"],
}
# Calls that need no interpreter, whatever their names say.
# Py_AddPendingCall is made for threads that have no lock.
HARMLESS = {"PyThread_get_thread_ident", "Py_AddPendingCall"}

_DECLARED = re.compile(r"^ *cdef (?:inline )?[^\n=(]*?\b(\w+)\((?:[^()]|\([^()]*\))*\)\s*noexcept nogil:", re.M)
_DEFINED = re.compile(r"^static [\w *]*?\b(\w*__pyx_f_\w+)\([^;{}]*\)\s*\{$(.*?)^\}$", re.M | re.S)
_CALLED = re.compile(r"\b((?:__)?Py\w*)\s*\(")


@pytest.fixture(scope="module")
def bodies(tmp_path_factory):
    """C bodies by module and function, comments removed; of the hot modules alone where they must be made first."""
    sources = sorted(SOURCES.rglob("*.pyx"))
    files = {source.stem: _built(source) for source in sources}
    if not all(files.values()):
        where = tmp_path_factory.mktemp("translated")
        hot = [source for source in sources if source.stem in HOT]
        with ThreadPoolExecutor(2) as pool:
            made = pool.map(lambda source: files[source.stem] or _translate(source, where), hot)
            files = {source.stem: path for source, path in zip(hot, made)}
    return {
        module: dict(_DEFINED.findall(re.sub(r"/\*.*?\*/", "", path.read_text(encoding="utf-8"), flags=re.S)))
        for module, path in files.items()
    }


def _built(source):
    """The C file of the last build, or None when the source is newer."""
    built = BUILT / source.relative_to(SOURCES).with_suffix(".c")
    newest = max(path.stat().st_mtime for path in (source, source.with_suffix(".pxd")) if path.exists())
    return built if built.exists() and built.stat().st_mtime >= newest else None


def _translate(source, where):
    if importlib.util.find_spec("Cython") is None:
        pytest.skip("the C files of the core are not at hand, and neither is Cython")
    target = where / f"{source.stem}.c"
    subprocess.run(
        [sys.executable, "-m", "cython", "-3", "-I", str(ROOT),
         "--module-name", ".".join(source.relative_to(ROOT).with_suffix("").parts),
         "-X", "cdivision=True,boundscheck=False,wraparound=False,initializedcheck=False", "-o", str(target),
         str(source)],
        check=True, timeout=60, cwd=ROOT,
    )
    return target


def source_of(module):
    """The file of a module; no two rooms have modules of one name."""
    source, = SOURCES.rglob(f"{module}.pyx")
    return source


def declared(module):
    """Functions of a module that are declared ``noexcept nogil``."""
    return _DECLARED.findall(source_of(module).read_text(encoding="utf-8"))


def named(found, module, function):
    """Bodies of a function or method; more than one where a fused type makes several of it."""
    parts = source_of(module).relative_to(ROOT).with_suffix("").parts
    prefix = r"(?:__pyx_fuse_\d+)?__pyx_f_" + "".join(f"{len(part)}{part}_" for part in parts)
    pattern = re.compile(rf"{prefix}(?:\d+[A-Z]\w*?_)?{function}")
    return [body for name, body in found.items() if pattern.fullmatch(name)]


@pytest.mark.parametrize("module", sorted(HOT))
def test_hot_functions_are_declared_and_compiled(bodies, module):
    for function in HOT[module]:
        assert function in declared(module), f"{module}.{function} is not declared noexcept nogil"
        assert named(bodies[module], module, function), f"{module}.{function} was not found in the C file"


def test_functions_without_the_lock_leave_python_alone(bodies):
    checked, guilty = 0, []
    for module, found in bodies.items():
        for function in declared(module):
            compiled = named(found, module, function)
            assert compiled, f"{module}.{function} was not found in the C file"
            checked += 1
            calls = {call for body in compiled for call in _CALLED.findall(body)} - HARMLESS
            if calls:
                guilty.append(f"{module}.{function} calls {', '.join(sorted(calls))}")
    assert not guilty, "\n".join(guilty)
    assert checked > 100                        # the pattern above still finds them


def test_the_check_sees_python():
    code = 'static int __pyx_f_4core_busy(int __pyx_v_n) {\n  __Pyx_INCREF(x);\n  PyList_New(0);\n}\n'
    (_, body), = _DEFINED.findall(code)
    assert set(_CALLED.findall(body)) == {"__Pyx_INCREF", "PyList_New"}


def test_no_function_takes_the_lock_after_every_call():
    """``except *``, and a void function without ``noexcept``, ask the interpreter after every call."""
    for source in sorted(SOURCES.rglob("*.p[yx][xd]")):
        text = source.read_text(encoding="utf-8")
        assert not re.search(r"except \*", text), source.name
        assert not re.search(r"^ *cdef (?:inline )?void \w+\([^)]*\)\s*nogil", text, re.M), source.name
