"""JSON that nests deeper than anything can parse is a bad value, not a crash of the caller."""
import pytest

from llm_datadist import LLMConfig
from llm_datadist.links.rank_table import parse_rank_table

DEEP = 200_000


def set_cluster_info(text):
    LLMConfig().cluster_info = text


@pytest.mark.parametrize("parse", [parse_rank_table, set_cluster_info])
def test_nesting_without_end(assert_raises, parse):
    assert "JSON" in str(assert_raises("PI", parse, "[" * DEEP + "]" * DEEP))
