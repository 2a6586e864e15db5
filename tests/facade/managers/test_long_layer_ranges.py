"""Ranges longer than any container, which ``len`` does not take."""
from llm_datadist import CacheKeyByIdAndIndex, TransferWithCacheKeyConfig

LONG = range(2**70)
KEY = CacheKeyByIdAndIndex(1, 1)


def test_equal_ranges_are_taken():
    assert TransferWithCacheKeyConfig(KEY, LONG, range(5, 5 + 2**70)).src_layer_range == LONG


def test_ranges_of_other_lengths_are_refused(assert_raises):
    assert_raises("PI", TransferWithCacheKeyConfig, KEY, LONG, range(2**70 + 1))
