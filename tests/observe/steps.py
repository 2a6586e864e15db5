"""What the processes of a pair do: runs there, by `Process.call`."""
import pytest

from llm_datadist import CacheDesc, CacheKey, DataType, LLMException

DESC = CacheDesc(2, [1, 4096], DataType.DT_UINT8)


def publish(node, first, count):
    for request in range(first, first + count):
        cache = node.cache_manager.allocate_cache(DESC, [CacheKey(2, request)])
        node.cache_manager.deallocate_cache(cache)


def pull(node, first, count):
    cache = node.cache_manager.allocate_cache(DESC)
    for request in range(first, first + count):
        node.cache_manager.pull_cache(CacheKey(2, request), cache)
    node.cache_manager.deallocate_cache(cache)


def pull_in_vain(node, request):
    cache = node.cache_manager.allocate_cache(DESC)
    with pytest.raises(LLMException):
        node.cache_manager.pull_cache(CacheKey(2, request), cache)
    node.cache_manager.deallocate_cache(cache)


def drop(node, first, count):
    for request in range(first, first + count):
        node.cache_manager.remove_cache_key(CacheKey(2, request))


def ping(node):
    return node.dist.ping(2)
