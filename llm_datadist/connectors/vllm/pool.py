"""vLLM's KV cache in the pool of this package, which peers on the same host map: ``kv_in_pool``."""
from __future__ import annotations

from typing import Any, Dict, Optional, Tuple

import torch
from torch.overrides import TorchFunctionMode

from llm_datadist.connectors.vllm.logger import log
from llm_datadist.connectors.vllm.worker import WorkerHalf

__all__ = ["PoolAllocation"]


class PoolAllocation(TorchFunctionMode):
    """While this is entered, the buffer of the KV cache comes from the worker's pool.

    vLLM takes it by one ``torch.zeros`` of as many bytes as its layers need. Everything else is left alone.

    Parameters
    ----------
    worker : WorkerHalf
        Whose pool it is.
    """

    def __init__(self, worker: WorkerHalf) -> None:
        super().__init__()
        self._worker = worker

    def __torch_function__(self, func: Any, types: Any, args: Tuple[Any, ...] = (),
                           kwargs: Optional[Dict[str, Any]] = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.zeros and kwargs.get("dtype") is torch.int8 and len(args) == 1 and isinstance(args[0], int):
            device = torch.device(kwargs.get("device") or "cpu")
            if device.type != "cpu":
                log.warning("kv_in_pool is for host memory; the KV cache on %s is registered as it is", device)
            else:
                memory = self._worker.take_from_pool(args[0])
                if memory is not None:
                    return torch.from_numpy(memory).view(torch.int8)
        return func(*args, **kwargs)
