"""vLLM's side of a connector, for tests: requests, blocks and caches, and one engine's two halves.

Importing this makes the imitation of vLLM importable where vLLM itself is not.
"""
from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Dict, List, Optional, Sequence

import numpy as np
import pytest

HAS_VLLM = importlib.util.find_spec("vllm") is not None
IMITATION = Path(__file__).parent / "imitation"
if not HAS_VLLM:
    sys.path.append(str(IMITATION))
# Each process of such a test would import all of vLLM for two base classes; the real ones run in whole engines.
needs_imitation = pytest.mark.skipif(HAS_VLLM, reason="the halves are tested without vLLM, by make test")

from llm_datadist.connectors.vllm.layout import blocks_layouts, layer_places  # noqa: E402 - after the imitation
from llm_datadist.connectors.vllm.push_scheduler import PushScheduler  # noqa: E402
from llm_datadist.connectors.vllm.scheduler import SchedulerHalf  # noqa: E402
from llm_datadist.connectors.vllm.settings import Settings  # noqa: E402
from llm_datadist.connectors.vllm.worker import WorkerHalf  # noqa: E402

BLOCK_TOKENS, LAYERS, BLOCKS, BLOCK_BYTES = 16, 3, 32, 4096


def cache_config(num_groups: int = 1, num_blocks: int = BLOCKS, block_bytes: int = BLOCK_BYTES) -> Any:
    """A KV cache of `LAYERS` places; with several groups, each has a layer in every place."""
    layers = [[f"group{group}.layer{layer}" for layer in range(LAYERS)] for group in range(num_groups)]
    tensor = SimpleNamespace(size=LAYERS * num_blocks * block_bytes, layer_stride=num_blocks * block_bytes,
                             block_stride=block_bytes, offset=0)
    return SimpleNamespace(
        num_blocks=num_blocks, transfer_group_ids=tuple(range(num_groups)),
        kv_cache_tensors=[SimpleNamespace(**vars(tensor), layers=names) for names in layers],
        kv_cache_groups=[SimpleNamespace(layer_names=names, kv_cache_spec=SimpleNamespace(block_size=BLOCK_TOKENS))
                         for names in layers])


def request(name: str, num_tokens: int, params: Optional[Dict[str, Any]] = None,
            status: str = "FINISHED_LENGTH_CAPPED") -> Any:
    """A request as a scheduler knows it."""
    return SimpleNamespace(request_id=name, num_prompt_tokens=num_tokens, num_computed_tokens=num_tokens,
                           kv_transfer_params=params, status=SimpleNamespace(name=status))


def blocks(*groups: Sequence[int], hashed: int = 0) -> Any:
    """Allocated blocks; the first `hashed` of each group hold a cached prefix, and block 0 is the null block."""
    return SimpleNamespace(blocks=tuple(
        [SimpleNamespace(block_id=block, block_hash="hash" if index < hashed else None, is_null=block == 0)
         for index, block in enumerate(group)] for group in groups))


def scheduled(new: Optional[Dict[str, Any]] = None, more: Optional[Dict[str, Any]] = None, resumed: Sequence[str] = (),
              **num_tokens: int) -> Any:
    """A step of vLLM: `new` requests and `more` of running ones, as name to (blocks of each group, tokens before)."""
    more = more or {}
    return SimpleNamespace(
        scheduled_new_reqs=[SimpleNamespace(req_id=name, block_ids=ids, num_computed_tokens=count)
                            for name, (ids, count) in (new or {}).items()],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=list(more), new_block_ids=[ids for ids, _ in more.values()],
            num_computed_tokens=[count for _, count in more.values()], resumed_req_ids=set(resumed)),
        num_scheduled_tokens=num_tokens)


class EngineHalves:
    """Both halves of one engine, stepped as vLLM steps them."""

    def __init__(self, serves: bool = True, num_groups: int = 1, digest: str = "same", **settings: Any) -> None:
        self.config = cache_config(num_groups)
        self.memory = np.zeros(LAYERS * BLOCKS * BLOCK_BYTES, np.uint8)
        pushes = settings.get("mode") == "push"
        self.scheduler = SchedulerHalf(PushScheduler((BLOCK_TOKENS,) * num_groups) if pushes else None)
        self.worker = WorkerHalf(Settings(**settings), 0, blocks_layouts(self.config), digest, serves or pushes,
                                 layer_places(self.config) if pushes else None)
        pool = self.worker.take_from_pool(self.memory.nbytes) if settings.get("kv_in_pool") else None
        if pool is not None:
            self.memory = pool
        self.worker.register(self.memory.ctypes.data)
        self.scheduler.set_workers({0: self.worker.card()})
        self.sent: List[str] = []
        self.received: List[str] = []
        self.failed: List[str] = []
        self.failed_blocks: List[int] = []

    @property
    def places(self) -> Any:
        """The cache as (layer, block, byte)."""
        return self.memory.reshape(LAYERS, BLOCKS, BLOCK_BYTES)

    def step(self, output: Any = None, compute: Callable[[str], None] = lambda layer: None) -> None:
        """One step, which computes each layer of what vLLM's `output` says."""
        metadata = self.scheduler.take_metadata(output)
        self.worker.bind(metadata)
        for layer in [name for group in self.config.kv_cache_groups for name in group.layer_names] if output else []:
            compute(layer)
            self.worker.tick(layer)
        self.worker.start_pulls(metadata)
        self.worker.end_step()
        sent, received, failed = self.worker.take_results()
        self.sent += sorted(sent)
        self.received += sorted(received)
        self.failed += sorted(failed)
        self.failed_blocks += sorted(self.worker.take_failed_blocks())

    def close(self) -> None:
        """End the worker."""
        self.worker.close()
