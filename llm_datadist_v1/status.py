"""Older path of `llm_datadist.status`: the very same objects."""
from llm_datadist.status import (
    LLMException,
    LLMStatusCode,
    Status,
    code_2_status,
    handle_llm_status,
    raise_if_false,
    raise_if_true,
)

__all__ = [
    "LLMException", "LLMStatusCode", "Status", "code_2_status", "handle_llm_status", "raise_if_false",
    "raise_if_true",
]
