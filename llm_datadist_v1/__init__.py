"""The first generation under its older package name. Every name is the very object of `llm_datadist`."""
import llm_datadist
from llm_datadist._lazy import lazy_attributes

__all__ = [name for name in llm_datadist.__all__ if name != "Cache"]

__getattr__ = lazy_attributes(globals(), dict.fromkeys([*__all__, "MemType"], "llm_datadist"))
