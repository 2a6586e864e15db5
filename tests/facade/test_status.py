"""Status codes and the exception tree: values, classes, texts, pickling."""
import copy
import logging
import pathlib
import pickle
import re
import subprocess
import sys

import pytest

from llm_datadist import status
from llm_datadist.status import (
    LLMChecksumError,
    LLMDeviceError,
    LLMException,
    LLMLinkError,
    LLMMemoryError,
    LLMNotEnabledError,
    LLMNotFoundError,
    LLMParamInvalidError,
    LLMStatusCode,
    LLMTimeoutError,
    Status,
    code_2_status,
    exception_for,
    handle_llm_status,
    raise_if_false,
    raise_if_true,
)
from llm_datadist.utils import log

ROOT = pathlib.Path(__file__).resolve().parents[2]
SUBCLASSES = {
    LLMTimeoutError: (TimeoutError, LLMStatusCode.LLM_TIMEOUT),
    LLMParamInvalidError: (ValueError, LLMStatusCode.LLM_PARAM_INVALID),
    LLMNotFoundError: (LookupError, LLMStatusCode.LLM_KV_CACHE_NOT_EXIST),
    LLMMemoryError: (MemoryError, LLMStatusCode.LLM_OUT_OF_MEMORY),
    LLMLinkError: (ConnectionError, LLMStatusCode.LLM_LINK_FAILED),
    LLMNotEnabledError: (RuntimeError, LLMStatusCode.LLM_FEATURE_NOT_ENABLED),
    LLMDeviceError: (RuntimeError, LLMStatusCode.LLM_DEVICE_MEM_ERROR),
}
FIELDS = {"operation": "pull_blocks", "peer": 7, "stage": "transfer", "provider_code": 507046, "recoverable": False,
          "hint": "wait"}


class ClientError(LLMTimeoutError):
    """A client's subclass whose constructor takes other arguments than its base."""

    def __init__(self, text, *, request):
        super().__init__(text, stage="decode")
        self.request = request


def test_a_difference_of_checksums_is_an_exception_of_its_own():
    error = LLMChecksumError("block 1 of tensor 0", operation="pull_blocks")
    assert (error.status_code, error.recoverable) == (LLMStatusCode.LLM_FAILED, True)
    assert "repeat the call" in error.hint and str(error).endswith(f"Hint: {error.hint}.")
    again = pickle.loads(pickle.dumps(LLMChecksumError("x", recoverable=False, hint="wait")))
    assert type(again) is LLMChecksumError and (again.recoverable, again.hint) == (False, "wait")


@pytest.mark.parametrize("code", LLMStatusCode)
def test_code_text_names_the_member(code):
    assert str(code) == f"{code}" == f"LLMStatusCode.{code.name}"
    assert f"{code:d}" == str(int(code)) and f"{code:>40}" == str(code).rjust(40)
    assert code_2_status(int(code)) is code
    assert pickle.loads(pickle.dumps(code)) is code


def test_block_of_codes_follows_its_scheme():
    block = [code for code in LLMStatusCode if int(code) >> 8 == 0x5010B0]
    assert len(block) == 24
    assert all(int(code) == 1 << 30 | 1 << 28 | 8 << 17 | 11 << 12 | int(code) & 0xFF for code in block)


@pytest.mark.parametrize("unknown", [1, -2, 0x5010B014, 0x5010B017, 2**40])
def test_unknown_code_is_failed(unknown):
    assert code_2_status(unknown) is LLMStatusCode.LLM_FAILED


def test_status():
    assert Status(LLMStatusCode.LLM_SUCCESS).is_ok()
    failed = Status(LLMStatusCode.LLM_TIMEOUT)
    assert not failed.is_ok() and failed.status_code is LLMStatusCode.LLM_TIMEOUT
    assert repr(failed) == "Status(LLMStatusCode.LLM_TIMEOUT)"


def test_plain_exception():
    error = LLMException("text with {braces}")
    assert isinstance(error, RuntimeError) and str(error) == "text with {braces}"
    assert error.status_code is LLMStatusCode.LLM_SUCCESS
    assert (error.operation, error.peer, error.stage, error.provider_code, error.hint) == (None,) * 5
    assert error.recoverable is False
    assert LLMException("a", 1).args == ("a", 1)
    with pytest.raises(AttributeError):
        error.status_code = LLMStatusCode.LLM_FAILED


@pytest.mark.parametrize("cls", SUBCLASSES)
def test_subclass_is_also_its_builtin(cls):
    builtin, code = SUBCLASSES[cls]
    error = cls("text")
    assert isinstance(error, LLMException) and isinstance(error, builtin)
    assert error.status_code is code and str(error) == "text"
    assert exception_for(code) is cls
    assert cls("text", status_code=LLMStatusCode.LLM_LINK_BUSY).status_code is LLMStatusCode.LLM_LINK_BUSY
    assert str(cls(2, "two")) == "(2, 'two')"   # OSError's kind would print [Errno 2] two


def test_not_found_is_no_key_error():
    assert not issubclass(LLMNotFoundError, KeyError)


@pytest.mark.parametrize("code", LLMStatusCode)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_exception_of_every_code_pickles(code, protocol):
    error = exception_for(code)("text", 2, status_code=code, **FIELDS)
    error.note = "added later"
    for other in (pickle.loads(pickle.dumps(error, protocol)), copy.copy(error), copy.deepcopy(error)):
        assert type(other) is type(error) and other.args == ("text", 2)
        assert other.status_code == error.status_code and other.note == "added later"
        assert {name: getattr(other, name) for name in FIELDS} == FIELDS


def test_clients_subclass_pickles():
    error = pickle.loads(pickle.dumps(ClientError("late", request=9)))
    assert (str(error), error.request, error.stage) == ("late", 9, "decode")
    assert error.status_code is LLMStatusCode.LLM_TIMEOUT


@pytest.mark.parametrize("code, recoverable", [
    (LLMStatusCode.LLM_TIMEOUT, True), (LLMStatusCode.LLM_WAIT_PROCESS_TIMEOUT, True),
    (LLMStatusCode.LLM_NOT_YET_LINK, True), (LLMStatusCode.LLM_LINK_BUSY, True),
    (LLMStatusCode.LLM_OUT_OF_MEMORY, True), (LLMStatusCode.LLM_PARAM_INVALID, False),
    (LLMStatusCode.LLM_KV_CACHE_NOT_EXIST, False), (LLMStatusCode.LLM_FAILED, False),
    (LLMStatusCode.LLM_FEATURE_NOT_ENABLED, False), (LLMStatusCode.LLM_UNKNOWN_ERROR, False),
])
def test_recoverable_default_and_override(code, recoverable):
    assert exception_for(code)(status_code=code).recoverable is recoverable
    assert exception_for(code)(status_code=code, recoverable=not recoverable).recoverable is not recoverable


def test_every_recoverable_code_has_a_hint():
    for code in LLMStatusCode:
        error = exception_for(code)(status_code=code)
        assert error.hint or not error.recoverable, code


def test_classes_agree_with_the_internal_statuses():
    """The list of the C header and the table of the facade name one class for one code, or one that is narrower."""
    header = (ROOT / "include" / "llm_datadist" / "ldd_status.h").read_text()
    rows = re.findall(r"^\s*X\((LDD_E_\w+), -?\d+, (\w+), (\w+), (\w+)\)", header, re.M)
    assert len(rows) >= 15
    for _, v2_code, v1_code, class_name in rows:
        for code in (v2_code, v1_code):
            expected = "LLMException" if class_name == "LLMChecksumError" else class_name
            assert exception_for(LLMStatusCode[code]).__name__ == expected


def test_handle_llm_status():
    handle_llm_status(0, "pull", "info")
    with pytest.raises(LLMTimeoutError) as caught:
        handle_llm_status(int(LLMStatusCode.LLM_TIMEOUT), "pull {}", {"block": 3})
    assert str(caught.value).startswith("pull {} failed, error code is LLMStatusCode.LLM_TIMEOUT, {'block': 3}. Hint: ")
    with pytest.raises(LLMException) as caught:
        handle_llm_status(77, "pull", "")
    assert caught.value.status_code is LLMStatusCode.LLM_FAILED


@pytest.fixture
def records():
    """The records that reach the logger of the package during a test."""
    class Collector(logging.Handler):
        def emit(self, record):
            collected.append(record)

    collected, collector, logger = [], Collector(), log.get_logger()
    logger.addHandler(collector)
    yield collected
    logger.removeHandler(collector)


@pytest.mark.parametrize("raiser, passes", [(raise_if_false, True), (raise_if_true, False)])
def test_raise_if(raiser, passes, records):
    assert raiser(passes, "never {missing}") is None
    with pytest.raises(LLMParamInvalidError) as caught:
        raiser(not passes, "{} of {total}", 3, total=5)
    assert str(caught.value) == "3 of 5" and caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID
    assert [(record.levelname, record.getMessage(), record.filename) for record in records] == [
        ("ERROR", "3 of 5", "test_status.py")]
    with pytest.raises(LLMMemoryError):
        raiser(not passes, "full", status_code=LLMStatusCode.LLM_OUT_OF_MEMORY)


def test_raise_if_formats_only_with_arguments():
    with pytest.raises(LLMParamInvalidError, match=r"^final \{text\} \{0\}$"):
        raise_if_false(False, "final {text} {0}")


@pytest.mark.parametrize("value, level", [
    ("0", logging.DEBUG), ("1", logging.INFO), ("2", logging.WARNING), ("3", logging.ERROR), ("x", logging.ERROR),
    (None, logging.ERROR)])
def test_log_level_comes_from_the_environment(value, level):
    code = ("from llm_datadist.utils import log; logger = log.get_logger(); print(logger.name, logger.level); "
            "log.error('shown %d', 1); log.warn('maybe'); log.info('maybe')")
    environ = {"PYTHONPATH": str(ROOT), **({} if value is None else {"ASCEND_GLOBAL_LOG_LEVEL": value})}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=60, check=True)
    lines = run.stdout.splitlines() + run.stderr.splitlines()
    assert lines[0] == f"LLM_DATADIST {level}" and lines[1].endswith("shown 1") and len(run.stdout.splitlines()) == 1
    assert len(lines) == 2 + (level <= logging.WARNING) + (level <= logging.INFO)


def test_logger_of_the_application_is_left_alone():
    code = ("import logging; mine = logging.NullHandler(); logger = logging.getLogger('LLM_DATADIST'); "
            "logger.addHandler(mine); logger.setLevel(5); from llm_datadist.utils import log; log.error('x'); "
            "assert log.get_logger() is logger and logger.handlers == [mine]; "
            "assert logger.level == 5 and logger.propagate")
    subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(ROOT)}, timeout=60, check=True)


def test_every_exception_is_exported():
    for name in status.__all__:
        assert getattr(status, name) is not None


def test_no_memory_is_said_in_words():
    """Also where the place that ran out left no text."""
    from llm_datadist.core.base.status import raise_for_status

    with pytest.raises(LLMMemoryError) as caught:
        raise_for_status(-4, "allocate_cache")
    assert "memory" in str(caught.value) and "LDD_E_" not in str(caught.value)
