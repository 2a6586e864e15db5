"""Older path of `llm_datadist.datadist`: the very same objects."""
from typing import TYPE_CHECKING

from llm_datadist._lazy import lazy_attributes

if TYPE_CHECKING:
    from llm_datadist.datadist import LLMDataDist, _shutdown_handler

__all__ = ["LLMDataDist", "_shutdown_handler"]

__getattr__ = lazy_attributes(globals(), dict.fromkeys(__all__, "llm_datadist.datadist"))
