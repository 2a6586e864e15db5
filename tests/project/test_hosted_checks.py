"""The files that a hosting service reads say the same as the files that they are about."""
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
WORKFLOW = (ROOT / ".github/workflows/check.yml").read_text(encoding="utf-8")


def test_the_oldest_and_the_newest_python_are_checked_on_both_processors():
    supported = re.findall(r"Python :: (3\.\d+)\"", PROJECT)
    assert re.search(r'requires-python = ">=(3\.\d+)"', PROJECT).group(1) == supported[0]
    assert re.search(r"python: \[(.*)\]", WORKFLOW).group(1) == f'"{supported[0]}", "{supported[-1]}"'
    wheels = re.search(r'^build = "cp3{([\d,]+)}-manylinux_\*"$', PROJECT, re.M).group(1).split(",")
    assert [f"3.{minor}" for minor in wheels] == supported
    assert re.findall(r"runner: \[(.*)\]", WORKFLOW) == ["ubuntu-24.04, ubuntu-24.04-arm"] * 2


def test_it_runs_what_the_makefile_has():
    targets = set(re.search(r"^\.PHONY: ((?:.*\\\n)*.*)$", MAKEFILE, re.M).group(1).replace("\\", "").split())
    run = set(re.findall(r"run: make ([\w-]+)", WORKFLOW))
    assert {"lint", "docs", "test", "demo", "coverage", "check-free-threaded"} <= run <= targets


def test_hooks_run_the_linters_of_the_makefile():
    tools = re.search(r"^LINT_TOOLS := (.*)$", MAKEFILE, re.M).group(1).split()
    pinned = tools + re.search(r"^DOCS_TOOLS := (.*)$", MAKEFILE, re.M).group(1).split()
    assert all(re.fullmatch(r"[\w-]+==[\d.]+", tool) for tool in pinned), "pinned"
    hooks = re.findall(r"^ +entry: ([\w-]+)", (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"), re.M)
    assert {tool.partition("==")[0] for tool in tools} == set(hooks) - {"make"}
