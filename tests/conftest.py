"""Fixtures shared by the tests of the facade."""
from __future__ import annotations

import os
import signal

import pytest
from support.engines import Benches
from support.peer import Peers
from support.strict import NOT_OVER_CANN, whole_session

from llm_datadist.status import LLMException, LLMStatusCode, exception_for

# A shell that starts the tests in the background has SIGINT ignored, which child processes would inherit.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

_BUILTIN = {"TE": TypeError, "VE": ValueError, "AE": AttributeError, "RE": RuntimeError}
_CODE = {
    "PI": LLMStatusCode.LLM_PARAM_INVALID,
    "NOT_EXIST": LLMStatusCode.LLM_KV_CACHE_NOT_EXIST,
    "NOT_ENABLED": LLMStatusCode.LLM_FEATURE_NOT_ENABLED,
}


def pytest_addoption(parser):
    """``--benchmark`` runs ``benchmarks/`` as well, which is skipped otherwise."""
    parser.addoption("--benchmark", action="store_true", help="run the micro-benchmarks (needs pytest-benchmark)")


def pytest_collection_modifyitems(config, items):
    """Skip what CANN has not, where everything runs over the stand-in for it."""
    if os.environ.get("LDD_TEST_STRICT") != "cann":
        return
    for item in items:
        for start, reason in NOT_OVER_CANN.items():
            if start in item.nodeid:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session", autouse=True)
def provider_of_the_session():
    """With ``LDD_TEST_STRICT=cann`` everything runs over the stand-in for CANN; see ``support/strict.py``."""
    with whole_session(os.environ):
        yield


@pytest.fixture
def assert_raises():
    """Assert that a call fails with the named kind of error, as the tables of the API name them.

    A builtin kind (TE, VE, AE, RE) excludes an LLMException; the other kinds stand for a status code, of which they
    may also be the name without ``LLM_``, and the exception must have the class of that code. Returns the exception.
    """
    def check(kind, call, *args, **kwargs):
        with pytest.raises(Exception) as caught:
            call(*args, **kwargs)
        error = caught.value
        if kind in _BUILTIN:
            assert isinstance(error, _BUILTIN[kind]) and not isinstance(error, LLMException), repr(error)
        else:
            code = _CODE[kind] if kind in _CODE else LLMStatusCode[f"LLM_{kind}"]
            assert type(error) is exception_for(code), repr(error)
            assert error.status_code is code, repr(error)
        return error

    return check


@pytest.fixture
def peers():
    """Processes with one engine each, for one test; see ``peer.py``. Nothing may be left in them at the end."""
    with Peers() as group:
        yield group


@pytest.fixture(scope="module")
def module_peers():
    """The same for all tests of a module."""
    with Peers() as group:
        yield group


@pytest.fixture(scope="module")
def benches():
    """Engines of this process with caches, by name; see ``engines.py``."""
    with Benches() as made:
        yield made
