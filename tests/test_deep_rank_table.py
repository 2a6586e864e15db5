"""A rank table that nests deeper than anything can parse is a bad table, not a crash of the caller."""
from llm_datadist.rank_table import parse_rank_table

DEEP = 200_000


def test_nesting_without_end(assert_raises):
    assert "JSON" in str(assert_raises("PI", parse_rank_table, "[" * DEEP + "]" * DEEP))
