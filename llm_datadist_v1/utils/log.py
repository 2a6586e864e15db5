"""Older path of `llm_datadist.utils.log`: the very same objects."""
from llm_datadist.utils.log import error, get_logger, info, warn

__all__ = ["error", "get_logger", "info", "warn"]
