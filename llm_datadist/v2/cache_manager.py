"""Older path of ``llm_datadist.cache_manager``."""
from llm_datadist._lazy import lazy_attributes

__all__ = ["CacheManager"]

__getattr__ = lazy_attributes(globals(), dict.fromkeys(__all__, "llm_datadist.cache_manager"))
