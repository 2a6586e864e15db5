"""Older path of the types: `llm_datadist.types` and ``llm_datadist.managers.task``."""
from typing import TYPE_CHECKING

from llm_datadist._lazy import lazy_attributes
from llm_datadist.types import (
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
    "Placement", "RegisterMemStatus", "Memtype", "MemType", "MemInfo", "CacheDesc", "Cache", "KvCache", "CacheKey",
    "CacheKeyByIdAndIndex", "BlocksCacheKey", "LayerSynchronizer", "TransferConfig", "TransferWithCacheKeyConfig",
    "CacheTask", "PushType", "check_layer_range", "int_to_mem_status_dict",
]

# A task needs the compiled core, the types do not.
__getattr__ = lazy_attributes(globals(), {"CacheTask": "llm_datadist.managers.task"})
