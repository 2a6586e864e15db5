"""The connector's logger: below vLLM's own, so that its records appear among vLLM's, in its format and at its level."""
from __future__ import annotations

import logging

__all__ = ["log"]

log = logging.getLogger("vllm.llm_datadist")
