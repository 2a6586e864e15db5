"""`LLMDataDistConnector`: what vLLM calls, handed on to the half that it is."""
from __future__ import annotations

from typing import TYPE_CHECKING, Any, ContextManager, Dict, List, Optional, Set, Tuple

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from llm_datadist.connectors.vllm.block_tables import MAX_ENTRIES
from llm_datadist.connectors.vllm.layout import blocks_layouts, group_block_tokens, layer_places, layout_digest
from llm_datadist.connectors.vllm.metadata import Metadata, WorkerCard
from llm_datadist.connectors.vllm.push_scheduler import PushScheduler
from llm_datadist.connectors.vllm.scheduler import SchedulerHalf
from llm_datadist.connectors.vllm.settings import Settings
from llm_datadist.connectors.vllm.stats import PromMetrics, TransferStats
from llm_datadist.connectors.vllm.worker import WorkerHalf

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

__all__ = ["LLMDataDistConnector"]


class LLMDataDistConnector(KVConnectorBase_V1, SupportsHMA):
    """Moves the KV cache of requests between vLLM engines through this package.

    vLLM makes one instance in its scheduler and one in each worker.

    Parameters
    ----------
    vllm_config : VllmConfig
        ``kv_transfer_config.kv_connector_extra_config`` holds the options; see `Settings`.
    role : KVConnectorRole
        Which half this instance is.
    kv_cache_config : KVCacheConfig
        How the KV cache is laid out.

    Raises
    ------
    ValueError
        An option is not allowed, or the KV cache cannot be moved by block number.
    """

    _cache_hit_source = CacheHitSource.P2P
    _scheduler: SchedulerHalf           # of the instance with this role
    _worker: WorkerHalf

    def __init__(self, vllm_config: "VllmConfig", role: KVConnectorRole, kv_cache_config: "KVCacheConfig") -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._settings = Settings.read(self._kv_transfer_config.kv_connector_extra_config)
        pushes = self._settings.mode == "push"
        if role is KVConnectorRole.SCHEDULER:
            self._scheduler = SchedulerHalf(self._push_scheduler(vllm_config) if pushes else None)
        else:
            from vllm.distributed.parallel_state import get_tp_group

            layouts = blocks_layouts(kv_cache_config)
            digest = layout_digest(kv_cache_config, {**_facts(vllm_config), "mode": self._settings.mode})
            self._worker = WorkerHalf(self._settings, get_tp_group().rank_in_group, layouts, digest,
                                      pushes or self._kv_transfer_config.is_kv_producer,
                                      layer_places(kv_cache_config) if pushes else None)

    def _push_scheduler(self, vllm_config: "VllmConfig") -> PushScheduler:
        block_tokens = group_block_tokens(self._kv_cache_config)
        num_tokens = vllm_config.model_config.max_model_len
        longest = sum(-(-num_tokens // tokens) for tokens in block_tokens)
        if longest > MAX_ENTRIES:
            raise ValueError(f"a request of {num_tokens} tokens has {longest} blocks; with mode \"push\" it may have "
                             f"{MAX_ENTRIES}: enlarge --block-size, or shorten --max-model-len")
        return PushScheduler(block_tokens)

    # --------------------------------------------------------------------------------------- the scheduler's half

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> Tuple[Optional[int], bool]:
        """Tokens that another engine has beyond the computed ones; they are loaded in the background."""
        return self._scheduler.num_matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Note where the tokens of `get_num_new_matched_tokens` go."""
        self._scheduler.allocated(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> Metadata:
        """What the workers are to do in this step."""
        return self._scheduler.take_metadata(scheduler_output)

    def request_finished(self, request: Any, block_ids: List[int]) -> Tuple[bool, Optional[Dict[str, Any]]]:
        """Whether the blocks are kept, and how others find them; for one group."""
        return self._scheduler.finished(request, (block_ids,))

    def request_finished_all_groups(self, request: Any,
                                    block_ids: Tuple[List[int], ...]) -> Tuple[bool, Optional[Dict[str, Any]]]:
        """Whether the blocks are kept, and how others find them."""
        return self._scheduler.finished(request, block_ids)

    def get_loaded_kv_cache_group_ids(self, request: Any) -> Tuple[int, ...]:
        """All groups: what comes are the blocks of the request itself."""
        return tuple(self._kv_cache_config.transfer_group_ids)

    def set_xfer_handshake_metadata(self, metadata: Dict[int, WorkerCard]) -> None:
        """Take what the workers say about themselves."""
        self._scheduler.set_workers(metadata)

    # ----------------------------------------------------------------------------------------- the workers' half

    def get_mem_pool_context(self) -> Optional[ContextManager[Any]]:
        """Where vLLM allocates its KV cache; None leaves that to vLLM."""
        if not self._settings.kv_in_pool:
            return None
        from llm_datadist.connectors.vllm.pool import PoolAllocation

        return PoolAllocation(self._worker)

    def register_kv_caches(self, kv_caches: Dict[str, Any]) -> None:
        """Open the engine over vLLM's KV cache."""
        self._worker.register(next(iter(kv_caches.values())).untyped_storage().data_ptr())

    def get_handshake_metadata(self) -> Optional[WorkerCard]:
        """What the scheduler needs to know of this worker."""
        return self._worker.card()

    def bind_connector_metadata(self, connector_metadata: Metadata) -> None:
        """A step begins."""
        super().bind_connector_metadata(connector_metadata)
        if self._role is KVConnectorRole.WORKER:
            self._worker.bind(connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Start to fetch the blocks of requests that wait for them."""
        self._worker.start_pulls(self._get_connector_metadata())

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for: a request is computed once all of its blocks are here."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """A layer was computed: what is pushed may go. Blocks that are fetched are so from where they were computed."""
        self._worker.tick(layer_name)

    def wait_for_save(self) -> None:
        """All layers were computed. Nothing to wait for: blocks are kept until they have gone."""
        self._worker.end_step()

    def get_transfer_results(self, finished_req_ids: Set[str]) -> KVConnectorTransferResults:
        """Requests whose transfers have ended since the last step."""
        return KVConnectorTransferResults(*self._worker.take_results())

    def get_finished(self, finished_req_ids: Set[str]) -> Tuple[Optional[Set[str]], Optional[Set[str]]]:
        """The same for callers that know no failures."""
        sent, received, _ = self._worker.take_results()
        return sent or None, received or None

    def get_block_ids_with_load_errors(self) -> Set[int]:
        """Blocks that did not arrive."""
        return self._worker.take_failed_blocks()

    def get_kv_connector_stats(self) -> Optional[TransferStats]:
        """What the worker has counted since the last step."""
        return self._worker.take_stats() if self._role is KVConnectorRole.WORKER else None

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: Dict[str, Any]) -> bool:
        """Whether layers are followed one by one, which a graph of the whole model would skip."""
        return extra_config.get("mode") == "push"

    @classmethod
    def build_kv_connector_stats(cls, data: Optional[Dict[str, Any]] = None) -> TransferStats:
        """The counts in a form that can be added up."""
        return TransferStats(data)

    @classmethod
    def build_prom_metrics(cls, vllm_config: "VllmConfig", metric_types: Dict[Any, Any], labelnames: List[str],
                           per_engine_labelvalues: Dict[int, List[object]]) -> PromMetrics:
        """The counts on the Prometheus page."""
        return PromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def shutdown(self) -> None:
        """End transfers and the engine."""
        if self._role is KVConnectorRole.WORKER:
            self._worker.close()


def _facts(vllm_config: "VllmConfig") -> Dict[str, Any]:
    """What must be equal on both sides besides the KV cache's own layout."""
    return {
        "data type": vllm_config.model_config.dtype, "cache data type": vllm_config.cache_config.cache_dtype,
        "layout": vllm_config.cache_config.get_resolved_kv_cache_layout(),
        "tensor parallel size": vllm_config.parallel_config.tensor_parallel_size,
    }
