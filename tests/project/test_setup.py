"""The build logic itself: knobs, names of what is built, and where packages are found."""
import importlib.util
import sys
from pathlib import Path

import pytest

pytest.importorskip("setuptools")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def build():
    spec = importlib.util.spec_from_file_location("ldd_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["ldd_setup"] = module                         # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["ldd_setup"]


def test_without_knobs_the_build_is_optimised_and_unchecked(build):
    context = build.BuildContext.read({})
    assert context == build.BuildContext()
    assert "-O3" in context.compile_args and "-Werror" not in context.compile_args
    assert not any("march" in arg for arg in context.compile_args)
    assert context.directives["boundscheck"] is False and context.directives["language_level"] == 3


def test_debug_turns_every_check_on(build):
    context = build.BuildContext.read({"LDD_DEBUG": "1"})
    for check in ("boundscheck", "wraparound", "initializedcheck"):
        assert context.directives[check] is True
    assert "-O3" not in context.compile_args and "-UNDEBUG" in context.compile_args
    assert context.generated_dir != build.BuildContext().generated_dir


def test_sanitizers_reach_compiler_and_linker(build):
    context = build.BuildContext.read({"LDD_SANITIZE": "address,undefined"})
    assert "-fsanitize=address,undefined" in context.compile_args
    assert "-fsanitize=address,undefined" in context.link_args
    assert "-Wl,-z,defs" not in build.host_library(context).extra_link_args


def test_what_only_tests_and_benchmarks_use_is_compiled_on_demand(build):
    """And the packages of what is not compiled are not installed, but for the one that says so."""
    names = {module.name for module in build.cython_modules(build.BuildContext())}
    assert names == {".".join(path.relative_to(ROOT).with_suffix("").parts)
                     for path in (ROOT / "llm_datadist" / "core").rglob("*.pyx")}
    both = build.BuildContext.read({"LDD_WITH": "bench,tests"})
    more = {module.name for module in build.cython_modules(both)} - names
    assert {name.rpartition(".")[0] for name in more} == {package for package, _ in build.PARTS.values()}
    for _, folder in build.PARTS.values():
        assert {path.stem for path in (ROOT / folder).glob("*.pyx")} <= {name.rpartition(".")[2] for name in more}
    assert "llm_datadist_probes" in build.packages(both)[0]
    assert "llm_datadist_probes" not in build.packages(build.BuildContext.read({"LDD_WITH": "bench"}))[0]
    assert "llm_datadist.tools.bench.native" in build.packages(build.BuildContext())[0]


def test_a_build_forgets_what_an_earlier_one_has_left(build, tmp_path):
    """Otherwise a wheel for users would have the modules that were compiled for tests before."""
    from setuptools import Distribution

    library = build.host_library(build.BuildContext())
    command = build.BuildExt(Distribution({"ext_modules": [library]}))
    command.build_lib = str(tmp_path)
    command.ensure_finalized()
    made, left = tmp_path / "llm_datadist/host/libldd_host.so", tmp_path / "llm_datadist_probes/table.so"
    for path in (made, left):
        path.parent.mkdir(parents=True)
        path.write_bytes(b"")
    command.forget_others()
    assert made.exists() and not left.exists()


def test_objects_carry_no_symbols_but_for_a_debugger(build):
    assert "-g0" in build.BuildContext().compile_args and "-Wl,-s" in build.BuildContext().link_args
    for knobs in ({"LDD_DEBUG": "1"}, {"LDD_SANITIZE": "address"}):
        context = build.BuildContext.read(knobs)
        assert "-Wl,-s" not in context.link_args
        assert context.compile_args[::-1].index("-g") < ([*context.compile_args[::-1], "-g0"]).index("-g0")


def test_coverage_counts_without_losing_any(build):
    context = build.BuildContext.read({"LDD_COVERAGE": "1"})
    assert {"--coverage", "-fprofile-update=atomic"} <= set(context.compile_args)
    assert "--coverage" in context.link_args


def test_warnings_become_errors(build):
    assert "-Werror" in build.BuildContext.read({"LDD_WERROR": "1"}).compile_args


def test_links_of_the_index_page_are_absolute_where_the_project_has_a_place(build):
    import re

    assert build.urls(build.BuildContext()) == {} and "](docs/" in build.readme(build.BuildContext())
    context = build.BuildContext.read({"LDD_PROJECT_URL": "https://example.org/team/project/"})
    text = build.readme(context)
    assert "](https://example.org/team/project/blob/HEAD/docs/index.md)" in text
    assert [link for link in re.findall(r"\]\(([^)]*)\)", text) if not link.startswith("https://")] == []
    assert build.urls(context)["Issues"] == "https://example.org/team/project/issues"


def test_stubs_go_with_their_modules(build, tmp_path):
    """What setuptools would take by itself: stubs of modules that only measure."""
    import subprocess

    done = subprocess.run([sys.executable, "setup.py", "-q", "egg_info", "-e", str(tmp_path), "build_py", "-d",
                           str(tmp_path / "lib")], cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    found = {path.relative_to(tmp_path / "lib").as_posix() for path in (tmp_path / "lib").rglob("*.pyi")}
    assert "llm_datadist/core/engine/engine.pyi" in found
    assert [name for name in found if "bench" in name] == []


@pytest.mark.parametrize(("knob", "value"), [
    ("LDD_PROJECT_URL", "here"),
    ("LDD_DEBUG", "yes"), ("LDD_WERROR", "2"), ("LDD_SANITIZE", "memoryless"),
    ("LDD_WITH", "bench,all"), ("LDD_SANITIZE", "thread,address")])
def test_a_knob_with_a_meaningless_value_is_named(build, knob, value):
    with pytest.raises(ValueError, match=knob):
        build.BuildContext.read({knob: value})


def test_the_host_library_is_all_of_its_c_files(build):
    library = build.host_library(build.BuildContext())
    assert {Path(source).name for source in library.sources} == {
        path.name for path in (ROOT / "llm_datadist" / "host").rglob("*.c")}
    assert "include/llm_datadist/ldd_provider.h" in library.depends


def test_the_host_library_has_a_plain_name(build):
    from setuptools import Distribution

    command = build.BuildExt(Distribution({"ext_modules": [build.host_library(build.BuildContext())]}))
    command.ensure_finalized()
    assert command.get_ext_filename("llm_datadist.host.libldd_host") == "llm_datadist/host/libldd_host.so"
    assert command.get_ext_filename("libldd_host") == "libldd_host.so"
    assert command.get_ext_filename("llm_datadist.core.base.provider").endswith(".so")
    assert command.get_ext_filename("llm_datadist.core.base.provider") != "llm_datadist/core/base/provider.so"


def test_tools_and_headers_are_packages_of_their_own_place(build):
    names, places = build.packages(build.BuildContext())
    assert {"llm_datadist", "llm_datadist.core", "llm_datadist.tools", "llm_datadist.include",
            "llm_datadist_v1"} <= set(names)
    assert places == {"llm_datadist.tools": "tools", "llm_datadist.include": "include"}
    assert len(names) == len(set(names))
