"""Older path of `llm_datadist.caches.tensor`: the very same objects."""
from typing import TYPE_CHECKING

from llm_datadist._lazy import lazy_attributes

if TYPE_CHECKING:
    from llm_datadist.caches.tensor import Tensor, TensorDesc

__all__ = ["Tensor", "TensorDesc"]

__getattr__ = lazy_attributes(globals(), dict.fromkeys(__all__, "llm_datadist.caches.tensor"))
