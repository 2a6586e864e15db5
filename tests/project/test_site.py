"""Pages of the site against the package: names, options, links, and examples that are said twice."""
import importlib
import re

import pytest
from support.pages import DOCS, ROOT, blocks, programs

import llm_datadist
from llm_datadist.options.environment import VARIABLES
from llm_datadist.options.parser import KNOWN

PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])
REFERENCE = [page for page in PAGES if page.parent.name == "reference"]
OPTIONS = (DOCS / "options.md").read_text(encoding="utf-8")


def public_names():
    """Names of the package root: what it exports, and the classes and functions that it has besides."""
    named = {*llm_datadist.__all__, *llm_datadist._LAZY, "MemType"} - {"__version__"}
    return named | {name for name, value in vars(llm_datadist).items()
                    if isinstance(value, type) and not name.startswith("_")}


def test_every_public_name_is_in_the_reference():
    text = "\n".join(page.read_text(encoding="utf-8") for page in REFERENCE)
    shown = re.findall(r"^\.\. (?:autoclass|autoexception|autofunction|py:data):: llm_datadist\.(\w+)$", text, re.M)
    assert len(shown) == len(set(shown)) and set(shown) == public_names()


def test_every_older_path_leads_to_its_names():
    rows = re.findall(r"^\| `(llm_datadist[\w.]*)` \| (.*) \|$", (DOCS / "reference/paths.md").read_text("utf-8"), re.M)
    assert len(rows) > 20
    for path, names in rows:
        module = importlib.import_module(path)
        assert [name for name in re.findall(r"`(\w+)`", names) if name not in ("llm_datadist", "Cache")
                and not hasattr(module, name)] == [], path


def test_every_option_is_on_the_page():
    named = set(re.findall(r"`(llm\.\w+|ge\.\w+[\w.]*)`", OPTIONS))
    assert set(KNOWN) - named == set()
    assert {name for name in named if name.startswith("llm.")} == set(KNOWN)
    properties = {name for name, value in vars(llm_datadist.LlmConfig).items() if type(value).__name__ == "_Setting"}
    assert {name for name in properties if f"`{name}`" not in OPTIONS} == set()


def test_every_variable_of_the_sources_is_on_the_page():
    pattern = re.compile(r'"((?:LLM_DATADIST|ASCEND|HCCL|AUTO_USE)_[A-Z_]*[A-Z])"')
    read = {name for folder in ("llm_datadist", "tools") for suffix in ("py", "pyx", "c")
            for path in (ROOT / folder).rglob(f"*.{suffix}") for name in pattern.findall(path.read_text("utf-8"))}
    assert set(VARIABLES) <= read and "HCCL_RDMA_TC" in read
    assert {name for name in read if f"`{name}`" not in OPTIONS} == set()


def anchors(page):
    """Names of the headings of a page, as they are made in a browser."""
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
            for heading in re.findall(r"^#+ (.*)$", text, re.M)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"^ *```.*?^ *```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", text):
        path = (page.parent / target) if target else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), f"{target}#{anchor}"


def test_every_page_is_in_the_navigation():
    contents = (DOCS / "conf.py").read_text(encoding="utf-8").partition("CONTENTS = {")[2]
    listed = set(re.findall(r'"((?:\.\./)?[\w/]+)"', contents))
    pages = {page.relative_to(DOCS).with_suffix("").as_posix() for page in DOCS.rglob("*.md")
             if page.parent.name not in ("reference", "tutorial")} - {"index"}
    assert pages - listed == set()


def test_the_rate_of_a_call(monkeypatch):
    found = {}
    exec(blocks(DOCS / "tuning.md")[0], found)
    times = iter([0, 4, 0, 2, 0, 2])
    monkeypatch.setattr(found["time"], "perf_counter", lambda: next(times))
    assert found["rate"](lambda: None, 2 * 10**9, repeats=3) == 1.0


def test_both_languages_say_the_same():
    english, chinese = DOCS / "migration.md", DOCS / "zh/migration.md"
    assert blocks(english) == blocks(chinese)
    found = {}
    exec(blocks(english)[0], found)
    assert found["missing"](["LLMDataDist", "Nothing"]) == ["Nothing"] and found["is_this_package"]()
    rows = [[line for line in page.read_text("utf-8").splitlines() if line.startswith(("|", "## ", "1. ", "2. "))]
            for page in (english, chinese)]
    assert len(rows[0]) == len(rows[1])
    assert programs(DOCS / "zh/quickstart.md")["common.py"] == programs(DOCS / "tutorial/index.md")["common.py"]


def test_every_page_with_examples_is_named_by_a_test_that_runs_them():
    """What engines.md has is a sketch with an ellipsis."""
    tests = "\n".join(path.read_text("utf-8") for path in (ROOT / "tests/project").glob("*.py"))
    shown = [page for page in PAGES if any("\n...\n" not in code for code in blocks(page))]
    assert len(shown) >= 13
    assert [page for page in shown if page.parent.name != "tutorial"
            and f'{page.relative_to(DOCS if DOCS in page.parents else ROOT)}"' not in tests] == []


def test_the_list_of_pages_is_whole():
    assert len(REFERENCE) == 8 and ROOT / "README.md" in PAGES
