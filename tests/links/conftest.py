"""Processes that link to each other."""
import pytest
from support.link_steps import drop_links, wait_links


@pytest.fixture
def pair(processes):
    """The two `processes` of a module, without links before and after."""
    yield processes
    for process in processes:
        process.call(drop_links)
    for process in processes:
        assert process.call(wait_links, []) == []
