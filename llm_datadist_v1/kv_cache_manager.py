"""Older path of `llm_datadist.kv_cache_manager`: the very same objects."""
from llm_datadist._lazy import lazy_attributes

__all__ = ["KvCacheManager"]

__getattr__ = lazy_attributes(globals(), dict.fromkeys(__all__, "llm_datadist.kv_cache_manager"))
