"""Older path of `llm_datadist.managers.kv_cache`: the very same object."""
from typing import TYPE_CHECKING

from llm_datadist._lazy import lazy_attributes

if TYPE_CHECKING:
    from llm_datadist.managers.kv_cache import KvCacheManager

__all__ = ["KvCacheManager"]

__getattr__ = lazy_attributes(globals(), dict.fromkeys(__all__, "llm_datadist.managers.kv_cache"))
