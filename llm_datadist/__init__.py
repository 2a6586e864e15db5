"""Move KV caches of large language models between processes and hosts, with the API of LLM-DataDist.

Importing the package touches no device and loads neither NumPy nor a compiled module: the classes that need them
are resolved when first used.
"""
from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, List

# Read by the acl runtime when it opens: device memory that the host maps uncached breaks one-sided reads.
os.environ.setdefault("AUTO_USE_UC_MEMORY", "0")

from llm_datadist.status import LLMException, LLMStatusCode, Status  # noqa: E402

_LAZY = {
    "LLMClusterInfo": "configs", "LLMRole": "configs", "LlmConfig": "configs", "LLMConfig": "configs",
    "DataType": "data_type",
    **dict.fromkeys((
        "CacheDesc", "CacheKey", "CacheKeyByIdAndIndex", "KvCache", "Cache", "BlocksCacheKey", "Placement",
        "RegisterMemStatus", "LayerSynchronizer", "TransferConfig", "TransferWithCacheKeyConfig", "Memtype", "MemType",
        "MemInfo"), "types"),
    "LLMDataDist": "datadist", "CacheTask": "task", "CacheManager": "cache_manager",
    "KvCacheManager": "kv_cache_manager", "TensorDesc": "tensor", "Tensor": "tensor",
}

v2_list = [
    "LLMClusterInfo", "LLMStatusCode", "LLMException", "LLMRole", "LlmConfig", "LLMConfig", "DataType", "Status",
    "CacheDesc", "CacheKey", "CacheKeyByIdAndIndex", "KvCache", "Cache", "BlocksCacheKey", "LLMDataDist", "Placement",
    "RegisterMemStatus", "LayerSynchronizer", "TransferConfig", "CacheTask", "TransferWithCacheKeyConfig", "Memtype",
    "MemInfo",
]
__all__ = [*v2_list, "TensorDesc", "Tensor", "KvCacheManager"]


def __getattr__(name: str) -> object:
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> List[str]:
    return sorted({*globals(), *_LAZY})
