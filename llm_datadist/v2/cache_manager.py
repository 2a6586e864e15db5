"""Older path of `llm_datadist.managers.cache`: the very same object."""
from typing import TYPE_CHECKING

from llm_datadist._lazy import lazy_attributes

if TYPE_CHECKING:
    from llm_datadist.managers.cache import CacheManager

__all__ = ["CacheManager"]

__getattr__ = lazy_attributes(globals(), dict.fromkeys(__all__, "llm_datadist.managers.cache"))
