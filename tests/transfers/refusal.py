"""How a call is expected to fail."""
from __future__ import annotations

from typing import Any, Callable

import pytest

from llm_datadist import LLMStatusCode
from llm_datadist.status import LLMException, exception_for

INVALID = LLMStatusCode.LLM_PARAM_INVALID
NOT_EXIST = LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
NOT_LINKED = LLMStatusCode.LLM_NOT_YET_LINK


def refused(code: LLMStatusCode, call: Callable[..., Any], *args: Any, names: Any = (), **kwargs: Any) -> str:
    """The call fails with `code` and the class that belongs to it, and its text holds the offending value(s)."""
    with pytest.raises(LLMException) as caught:
        call(*args, **kwargs)
    error = caught.value
    assert error.status_code is code and isinstance(error, exception_for(code)), repr(error)
    for name in names if isinstance(names, (list, tuple)) else [names]:
        assert str(name) in str(error), f"{name} is not in: {error}"
    return str(error)
