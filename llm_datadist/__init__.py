"""Move KV caches of large language models between processes and hosts, with the API of LLM-DataDist.

Importing the package touches no device and loads neither NumPy nor a compiled module: the classes that need them
are resolved when first used.
"""
from __future__ import annotations

import os
from typing import TYPE_CHECKING, List

from llm_datadist._lazy import lazy_attributes
from llm_datadist.caches.held_blocks import HeldBlocksKey as HeldBlocksKey
from llm_datadist.caches.held_blocks import KeyEvent as KeyEvent
from llm_datadist.caches.held_blocks import KeyOutcome as KeyOutcome
from llm_datadist.configs import LLMClusterInfo, LLMConfig, LlmConfig, LLMRole
from llm_datadist.data_type import DataType
from llm_datadist.status import LLMChecksumError as LLMChecksumError
from llm_datadist.status import LLMDeviceError as LLMDeviceError
from llm_datadist.status import LLMException, LLMStatusCode, Status
from llm_datadist.status import LLMLinkError as LLMLinkError
from llm_datadist.status import LLMMemoryError as LLMMemoryError
from llm_datadist.status import LLMNotEnabledError as LLMNotEnabledError
from llm_datadist.status import LLMNotFoundError as LLMNotFoundError
from llm_datadist.status import LLMParamInvalidError as LLMParamInvalidError
from llm_datadist.status import LLMTimeoutError as LLMTimeoutError
from llm_datadist.types import (
    BlocksCacheKey,
    Cache,
    CacheDesc,
    CacheKey,
    CacheKeyByIdAndIndex,
    KvCache,
    LayerSynchronizer,
    MemInfo,
    Memtype,
    Placement,
    RegisterMemStatus,
    TransferConfig,
    TransferWithCacheKeyConfig,
)
from llm_datadist.types import MemType as MemType

if TYPE_CHECKING:
    from llm_datadist.caches.tensor import Tensor, TensorDesc
    from llm_datadist.datadist import LLMDataDist
    from llm_datadist.managers.cache import CacheManager as CacheManager
    from llm_datadist.managers.cache_task import CacheTask
    from llm_datadist.managers.cancel import CancelScope as CancelScope
    from llm_datadist.managers.kv_cache import KvCacheManager
    from llm_datadist.observe.context import trace_context as trace_context

    __version__: str

# Read by the acl runtime when a provider opens it. Clients of the original package rely on this import to set it.
os.environ.setdefault("AUTO_USE_UC_MEMORY", "0")

__all__ = [
    "LLMClusterInfo", "LLMStatusCode", "LLMException", "LLMRole", "LlmConfig", "LLMConfig", "DataType", "Status",
    "CacheDesc", "CacheKey", "CacheKeyByIdAndIndex", "KvCache", "Cache", "BlocksCacheKey", "LLMDataDist", "Placement",
    "RegisterMemStatus", "LayerSynchronizer", "TransferConfig", "CacheTask", "TransferWithCacheKeyConfig", "Memtype",
    "MemInfo", "TensorDesc", "Tensor", "KvCacheManager",
]
v2_list = [name for name in __all__ if name not in ("TensorDesc", "Tensor", "KvCacheManager")]

_LAZY = {
    "LLMDataDist": "llm_datadist.datadist",
    "CacheManager": "llm_datadist.managers.cache",
    "KvCacheManager": "llm_datadist.managers.kv_cache",
    "CacheTask": "llm_datadist.managers.task",
    "CancelScope": "llm_datadist.managers.cancel",
    "__version__": "llm_datadist.utils.version",
    "Tensor": "llm_datadist.caches.tensor",
    "TensorDesc": "llm_datadist.caches.tensor",
    "trace_context": "llm_datadist.observe.context",
}

__getattr__ = lazy_attributes(globals(), _LAZY)


def __dir__() -> List[str]:
    return sorted({*globals(), *_LAZY})
