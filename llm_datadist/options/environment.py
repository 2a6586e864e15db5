"""The environment variables of this package: what each may say, checked before anything is opened."""
from __future__ import annotations

from typing import Callable, Dict, List, Mapping

from llm_datadist.options.admission import check_secret, parse_open
from llm_datadist.options.values import INT32_MAX, integer_in, invalid, one_of

__all__ = ["PREFIX", "VARIABLES", "check_environment"]

PREFIX = "LLM_DATADIST_"
PATHS = ("shm", "cma", "tcp")


def _check_paths(variable: str, text: str) -> None:
    for word in text.replace("|", ",").split(","):
        if word not in PATHS:
            raise invalid(variable, text, f"it must hold {', '.join(PATHS)}, one or several, joined by commas")


# Variable -> a check of (name for the text, value); an empty value counts as absent.
VARIABLES: Dict[str, Callable[[str, str], object]] = {
    "LLM_DATADIST_PROVIDER": one_of("auto", "host", "cann"),
    "LLM_DATADIST_HOST_PATHS": _check_paths,
    "LLM_DATADIST_COPY_THREADS": integer_in(1, 64),
    "LLM_DATADIST_TCP_STREAMS": integer_in(1, 16),
    "LLM_DATADIST_SHARED_TABLE": one_of("0", "1"),
    "LLM_DATADIST_CACHE_KEY_LEASE_MS": integer_in(0, INT32_MAX),
    "LLM_DATADIST_LINK_SILENCE_MS": integer_in(2000, 3600000),
    "LLM_DATADIST_LINK_HEAL_MS": integer_in(0, INT32_MAX),
    "LLM_DATADIST_LINK_BASE_PORT": integer_in(1, 65535),
    "LLM_DATADIST_HOST_DEVICES": integer_in(0, 64),
    "LLM_DATADIST_STRICT": one_of("0", "1"),
    "LLM_DATADIST_CHECKSUM": one_of("0", "1"),
    "LLM_DATADIST_TRACE": lambda variable, text: text,              # a folder: it is made by the engine
    "LLM_DATADIST_RECORD": lambda variable, text: text,             # a folder, too
    "LLM_DATADIST_SECRET": check_secret,
    "LLM_DATADIST_SECRET_FILE": lambda variable, text: text,        # a path, too
    "LLM_DATADIST_OPEN": parse_open,
    "LLM_DATADIST_HCCN_CONF": lambda variable, text: text,          # a path: whether it can be read is asked later
}


def check_environment(environ: Mapping[str, str]) -> List[str]:
    """Check every variable of this package that is set, and return those that nobody reads.

    Raises
    ------
    LLMParamInvalidError
        A value is outside its range; the text names variable, value and range.
    """
    for variable, check in VARIABLES.items():
        text = environ.get(variable, "")
        if text:
            check(f"environment variable {variable}", text)
    return sorted(name for name in environ if name.startswith(PREFIX) and name not in VARIABLES)
