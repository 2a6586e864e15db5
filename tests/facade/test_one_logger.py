"""Both packages log through one logger, as they are one set of classes."""
import logging

import pytest

import llm_datadist.utils.log
import llm_datadist_v1.utils.log
from llm_datadist import CacheDesc, CacheKey, DataType, LLMException


def test_both_packages_share_the_logger():
    logger = llm_datadist_v1.utils.log.get_logger()
    assert logger is llm_datadist.utils.log.get_logger()
    assert logger.name == "LLM_DATADIST"


@pytest.fixture
def records():
    """Records of the package during a test, at debug level."""
    logger, collected = llm_datadist.utils.log.get_logger(), []
    handler = logging.Handler()
    handler.emit = collected.append
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield lambda: [(record.levelname, record.getMessage()) for record in collected]
    logger.removeHandler(handler)
    logger.setLevel(before)


def fill(node, desc, key):
    node.cache_manager.deallocate_cache(node.cache_manager.allocate_cache(desc, [key]))


def test_what_is_told_at_debug_level(peers, records):
    there, here = peers.start(2), peers.here(1)
    key, desc = CacheKey(2, 5), CacheDesc(2, [1, 64], DataType.DT_INT8)
    there.call(fill, desc, key)
    peers.link(here, there)
    manager = here.node.cache_manager
    cache = manager.allocate_cache(desc)
    manager.pull_cache(key, cache)
    for refused in (lambda: manager.pull_cache(key, cache), lambda: manager.copy_blocks(cache, {0: [0]})):
        with pytest.raises(LLMException):
            refused()
    manager.deallocate_cache(cache)
    manager.remove_cache_key(key)
    told = records()
    for level, begin in [("INFO", "linked to cluster 2 at "), ("DEBUG", f"pulled {key} into slot 0 of Cache("),
                         ("DEBUG", f"pull_cache of {key} failed: "), ("DEBUG", "copy_blocks was refused: "),
                         ("DEBUG", "deallocated Cache("), ("DEBUG", f"removed {key}")]:
        assert [text for kind, text in told if kind == level and text.startswith(begin)], (begin, told)


def test_nothing_is_told_by_default(peers, records):
    llm_datadist.utils.log.get_logger().setLevel(logging.ERROR)
    here = peers.here(1)
    cache = here.node.cache_manager.allocate_cache(CacheDesc(2, [1, 64], DataType.DT_INT8))
    here.node.cache_manager.deallocate_cache(cache)
    assert records() == []
