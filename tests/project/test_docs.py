"""Tables of the documentation against what they speak of."""
import re
from pathlib import Path

import pytest

from llm_datadist import LLMException, LLMStatusCode
from llm_datadist.status import exception_for

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"


def table(page, heading):
    """Rows of the table below a heading, as lists of cells."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


CODES = {row[0].strip("`| "): row for row in table("errors.md", "Codes")}


def test_every_code_has_a_row():
    assert list(CODES) == [code.name for code in LLMStatusCode]


@pytest.mark.parametrize("code", LLMStatusCode)
def test_row_of_a_code(code):
    _, kind, _, later, action = CODES[code.name]
    error = LLMException(status_code=code)
    assert later == ("yes" if error.recoverable else "no")
    assert kind.strip("`") == ("—" if code is LLMStatusCode.LLM_SUCCESS else exception_for(code).__name__)
    if error.hint is not None:
        assert action == error.hint


REFERENCES = [reference for page in ("compatibility.md", "reliability.md") for reference in
              re.findall(r"`([\w/]+\.py)::(\w+)`", (ROOT / "docs" / page).read_text(encoding="utf-8"))]


@pytest.mark.parametrize("path, name", sorted(set(REFERENCES)))
def test_pages_name_tests_that_exist(path, name):
    assert re.search(rf"^def {name}\(", (TESTS / path).read_text(encoding="utf-8"), re.M)


def test_every_row_of_compatibility_names_a_test():
    text = (ROOT / "docs/compatibility.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("|") and not re.match(r"\|(-|.*\| Tests \|$)", line)]
    assert len(rows) > 60 and [row for row in rows if "::test_" not in row] == []
    assert [int(row.split("|")[1]) for row in rows if re.match(r"\| \d+ \|", row)] == list(range(1, 23))


def test_every_fault_has_a_row_and_a_test_or_says_that_it_has_none():
    rows = table("reliability.md", "Faults")
    assert [int(row[0]) for row in rows] == list(range(1, 35))
    for _, fault, outcome, shown in rows:
        assert ("::test_" in shown) or (outcome, shown) == ("not measured", "—"), fault


def test_ascend_names_tests_that_exist():
    text = (ROOT / "docs/ascend.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_\w+)`", text))
    found = set(re.findall(r"^def (test_\w+)\(", (TESTS / "cann/test_rules.py").read_text(encoding="utf-8"), re.M))
    assert len(named) > 20 and named - found == set()
    assert [int(row) for row in re.findall(r"^\| (\d+) \|", text, re.M)] == list(range(1, 16))
    for path in re.findall(r"`([\w/]+/test_\w+\.py)`", text):
        assert (TESTS / path.removeprefix("tests/")).is_file(), path
