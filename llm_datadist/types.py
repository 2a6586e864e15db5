"""The public types in one place: descriptors, keys, cache handles and transfer configs."""
from __future__ import annotations

from llm_datadist.caches.descriptors import (
    CacheDesc,
    MemInfo,
    MemType,
    Memtype,
    Placement,
    RegisterMemStatus,
    int_to_mem_status_dict,
)
from llm_datadist.caches.handles import Cache, KvCache
from llm_datadist.caches.keys import BlocksCacheKey, CacheKey, CacheKeyByIdAndIndex
from llm_datadist.managers.transfer_config import (
    LayerSynchronizer,
    PushType,
    TransferConfig,
    TransferWithCacheKeyConfig,
    check_layer_range,
)

__all__ = [
    "Placement", "RegisterMemStatus", "Memtype", "MemType", "MemInfo", "CacheDesc", "Cache", "KvCache", "CacheKey",
    "CacheKeyByIdAndIndex", "BlocksCacheKey", "LayerSynchronizer", "TransferConfig", "TransferWithCacheKeyConfig",
    "PushType", "check_layer_range", "int_to_mem_status_dict",
]
