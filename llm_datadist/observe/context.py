"""The trace of which the caller's work is a part: W3C trace context, as a client or a gateway sends it along."""
from __future__ import annotations

import re
from contextlib import contextmanager
from typing import Iterator, Optional

from llm_datadist.status import LLMParamInvalidError
from llm_datadist.utils.utils import check_isinstance

__all__ = ["trace_context"]

_TRACEPARENT = re.compile(r"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-[0-9a-f]{2}(-.*)?")


@contextmanager
def trace_context(traceparent: Optional[str]) -> Iterator[None]:
    """Let pulls and pushes within the block belong to a trace: events carry its id, here and at the owner.

    Parameters
    ----------
    traceparent : str, optional
        ``"00-<trace id>-<parent id>-<flags>"``, the header of W3C trace context. None: no trace, so that the header
        of a request can be handed on as it is.

    Raises
    ------
    TypeError
        `traceparent` is no str.
    LLMParamInvalidError
        It is no such header.

    Notes
    -----
    Holds for the thread or asyncio task that it is in, and for tasks that are made within; blocks may be nested. A
    transfer looks at it only where events are recorded: option ``llm.Trace``, `LLMDataDist.trace`, ``llm-datadist
    trace``. The flags are not looked at.
    """
    from llm_datadist.core.record.record import trace_context as current

    check_isinstance("traceparent", traceparent, str)
    token = current.set(None if traceparent is None else _parsed(traceparent))
    try:
        yield
    finally:
        current.reset(token)


def _parsed(traceparent: str) -> "tuple[int, int, int]":
    """Trace id, high and low, and the caller's span."""
    match = _TRACEPARENT.fullmatch(traceparent)
    if match is None or (match[1] == "00" and match[4]):
        raise LLMParamInvalidError(
            f"traceparent={traceparent!r} is not allowed; it must be '00-<32 hex digits>-<16 hex digits>-<2 hex "
            "digits>' in lower case, with ids that are not 0", operation="trace_context")
    trace = int(match[2], 16)
    return trace >> 64, trace & 0xFFFFFFFFFFFFFFFF, int(match[3], 16)
