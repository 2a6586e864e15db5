"""Older path of `llm_datadist.v2.llm_types`: the very same objects."""
from typing import TYPE_CHECKING

from llm_datadist._lazy import lazy_attributes
from llm_datadist.v2.llm_types import (
    BlocksCacheKey,
    Cache,
    CacheDesc,
    CacheKey,
    CacheKeyByIdAndIndex,
    KvCache,
    LayerSynchronizer,
    MemInfo,
    MemType,
    Memtype,
    Placement,
    PushType,
    RegisterMemStatus,
    TransferConfig,
    TransferWithCacheKeyConfig,
    check_layer_range,
    int_to_mem_status_dict,
)

if TYPE_CHECKING:
    from llm_datadist.managers.task import CacheTask

__all__ = [
    "BlocksCacheKey", "Cache", "CacheDesc", "CacheKey", "CacheKeyByIdAndIndex", "KvCache",
    "LayerSynchronizer", "MemInfo", "Memtype", "MemType", "Placement", "PushType", "RegisterMemStatus",
    "TransferConfig", "TransferWithCacheKeyConfig", "check_layer_range", "int_to_mem_status_dict", "CacheTask",
]

__getattr__ = lazy_attributes(globals(), dict.fromkeys(("CacheTask",), "llm_datadist.managers.task"))
