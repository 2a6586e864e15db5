"""vLLM serves prefill and decode through this package: `LLMDataDistConnector`.

vLLM finds the connector by its module::

    vllm serve MODEL --kv-transfer-config '{"kv_connector": "LLMDataDistConnector", "kv_role": "kv_producer",
        "kv_connector_module_path": "llm_datadist.connectors.vllm"}'

or, as the package registers it through the entry point ``vllm.general_plugins``, by its name alone. Importing this
package imports neither vLLM nor a compiled module; the class is made when it is first asked for. ``docs/engines.md``
has the options and the life of a request.
"""
from __future__ import annotations

from typing import Any

__all__ = ["LLMDataDistConnector", "TESTED_VERSIONS", "register"]

TESTED_VERSIONS = ("0.32.0",)       # of vLLM; its connector API is declared experimental and does change
_NAME = "LLMDataDistConnector"


def register() -> None:
    """Tell vLLM the connector's name; called by vLLM itself when it loads its plugins. A second call does nothing."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if _NAME not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(_NAME, f"{__name__}.connector", _NAME)


def __getattr__(name: str) -> Any:
    if name != _NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from llm_datadist.connectors.vllm.connector import LLMDataDistConnector
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "vllm":
            raise
        raise ImportError(f"{_NAME} needs vLLM, which cannot be imported here ({error}); it was tested with "
                          f"{', '.join(TESTED_VERSIONS)}", name=error.name) from error
    return LLMDataDistConnector
