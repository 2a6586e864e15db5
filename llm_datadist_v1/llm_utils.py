"""Older path of `llm_datadist.v2.llm_utils`: the very same objects."""
from typing import TYPE_CHECKING

from llm_datadist._lazy import lazy_attributes
from llm_datadist.v2.llm_utils import (
    CacheDescParser,
    calc_tensor_size,
    clone_cache_desc,
    is_invalid_id,
    is_valid_id,
    layer_range_to_tensor_indices,
    pack_block_cache_key,
    pack_cache_desc,
    pack_cache_key,
    pack_cache_key_by_id,
    pack_mem_info,
    parse_listen_ip_info,
)

if TYPE_CHECKING:
    from llm_datadist.managers.task import (
        TransferAsyncThread,
        TransferCacheJob,
        TransferCacheParameters,
        transfer_cache_async,
    )

__all__ = [
    "CacheDescParser", "calc_tensor_size", "clone_cache_desc", "is_invalid_id", "is_valid_id",
    "layer_range_to_tensor_indices", "pack_block_cache_key", "pack_cache_desc", "pack_cache_key",
    "pack_cache_key_by_id", "pack_mem_info", "parse_listen_ip_info", "TransferAsyncThread",
    "TransferCacheJob", "TransferCacheParameters", "transfer_cache_async",
]

__getattr__ = lazy_attributes(globals(), dict.fromkeys(
    ("TransferAsyncThread", "TransferCacheJob", "TransferCacheParameters", "transfer_cache_async"),
    "llm_datadist.managers.task"))
