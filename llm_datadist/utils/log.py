"""The logger of the package: name ``LLM_DATADIST``, one handler that writes to standard error.

The level comes from the environment variable ``ASCEND_GLOBAL_LOG_LEVEL`` when the logger is first asked for:
``"0"`` debug, ``"1"`` info, ``"2"`` warning, ``"3"`` error; anything else, or nothing, means error.
Handlers and a level that the application has set before are left alone.

Error: a link or a transfer in the background failed, which no exception tells. Warning: what the caller should know
and nothing raises. Info: the life of engines and links. Debug: every pull, push, release and refused call.
"""
from __future__ import annotations

import logging
import os
import sys
import threading
from typing import TYPE_CHECKING, TextIO

LOGGER_NAME = "LLM_DATADIST"
LEVEL_VARIABLE = "ASCEND_GLOBAL_LOG_LEVEL"

_LEVELS = {"0": logging.DEBUG, "1": logging.INFO, "2": logging.WARNING, "3": logging.ERROR}
_FORMAT = "[%(levelname)s] LLM_DATADIST(%(process)d,%(threadName)s):%(asctime)s [%(filename)s:%(lineno)d] %(message)s"

_lock = threading.Lock()
_configured = False

DEBUG = logging.DEBUG
# Its level is compared with `DEBUG` where even a call that does nothing would cost too much. It is NOTSET, and so lets
# everything through, until `get_logger` has set it up.
logger = logging.getLogger(LOGGER_NAME)

if TYPE_CHECKING:
    _StreamHandler = logging.StreamHandler[TextIO]
else:
    _StreamHandler = logging.StreamHandler


class _StderrHandler(_StreamHandler):
    """Writes to whatever ``sys.stderr`` is when a record comes: a redirected stream may be closed by then."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


def get_logger() -> logging.Logger:
    """Return the logger of the package, set up on the first call.

    Returns
    -------
    logging.Logger
        The logger named ``LLM_DATADIST``. With our handler it does not propagate, so that an application that
        configures the root logger sees each record once.

    Notes
    -----
    Safe from any thread. Source: names and levels of the ``ASCEND_GLOBAL_LOG_LEVEL`` convention of CANN.
    """
    global _configured
    if _configured:
        return logger
    with _lock:
        if not _configured:
            if not logger.handlers:
                handler = _StderrHandler()
                handler.setFormatter(logging.Formatter(_FORMAT))
                logger.addHandler(handler)
                logger.propagate = False
            if logger.level == logging.NOTSET:
                logger.setLevel(_LEVELS.get(os.environ.get(LEVEL_VARIABLE, ""), logging.ERROR))
            _configured = True
    return logger


def debug(message: str, *args: object) -> None:
    """Log `message` at debug level; `args` are merged with ``%`` only when the level is on."""
    get_logger().debug(message, *args, stacklevel=2)


def info(message: str, *args: object) -> None:
    """Log `message` at info level; `args` are merged with ``%`` only when the level is on."""
    get_logger().info(message, *args, stacklevel=2)


def warn(message: str, *args: object) -> None:
    """Log `message` at warning level; `args` are merged with ``%`` only when the level is on."""
    get_logger().warning(message, *args, stacklevel=2)


def error(message: str, *args: object) -> None:
    """Log `message` at error level; `args` are merged with ``%`` only when the level is on."""
    get_logger().error(message, *args, stacklevel=2)
