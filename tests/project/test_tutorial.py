"""The programs of the tutorial, in both languages, print what their pages show."""
import pytest
from support.pages import DOCS, programs, run_pair, shown

COMMON = programs(DOCS / "tutorial/index.md")
PAGES = [*sorted(page for page in (DOCS / "tutorial").glob("*.md") if page.name != "index.md"),
         DOCS / "zh/quickstart.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}-{page.stem}")
def test_the_page_shows_what_its_programs_print(page, tmp_path):
    code = programs(page)
    assert set(code) - {"common.py"} == {"prefill.py", "decode.py"}
    outputs = shown(page)
    second, first = [name for name, _ in outputs]           # the one that waits ends last
    assert run_pair(tmp_path, {**COMMON, **code}, first, second) == dict(outputs)


def test_every_page_is_in_the_list():
    text = (DOCS / "tutorial/index.md").read_text(encoding="utf-8")
    assert set(COMMON) == {"common.py"} and len(PAGES) == 7
    assert [page for page in PAGES[:-1] if f"]({page.name})" not in text] == []
