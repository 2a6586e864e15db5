"""Names of the error kinds in the tables of the API, and the assertion that a call fails with one of them."""
from __future__ import annotations

import pytest

from llm_datadist.status import LLMException, LLMStatusCode, exception_for

BUILTIN = {"TE": TypeError, "VE": ValueError, "AE": AttributeError, "RE": RuntimeError}
CODE = {"PI": LLMStatusCode.LLM_PARAM_INVALID, "NOT_EXIST": LLMStatusCode.LLM_KV_CACHE_NOT_EXIST,
        "NOT_ENABLED": LLMStatusCode.LLM_FEATURE_NOT_ENABLED}


def assert_raises(kind, call, *args, **kwargs):
    """Assert that the call raises `kind`, and return the exception. A builtin kind excludes an LLMException."""
    with pytest.raises(Exception) as caught:
        call(*args, **kwargs)
    error = caught.value
    if kind in BUILTIN:
        assert isinstance(error, BUILTIN[kind]) and not isinstance(error, LLMException), repr(error)
    else:
        assert isinstance(error, exception_for(CODE[kind])), repr(error)
        assert error.status_code is CODE[kind]
    return error
