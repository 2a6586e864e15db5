"""What the connector counts, as vLLM logs it and shows it on its Prometheus page."""
from __future__ import annotations

from typing import Any, Dict, List, Union

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

__all__ = ["PromMetrics", "TransferStats"]

_SAMPLES = ("pull_seconds", "pull_bytes", "receive_seconds", "receive_bytes", "push_seconds", "push_bytes")
_COUNTS = ("failed_pulls", "failed_receives", "failed_pushes",
           "blocks_pulled", "blocks_released", "blocks_expired", "blocks_lost")
_TEXTS = {
    "pull_seconds": "Time from the order to fetch the blocks of a request to its end, s.",
    "pull_bytes": "Bytes fetched for a request.",
    "receive_seconds": "Time from the offer of blocks for a request to the end of the push into them, s.",
    "receive_bytes": "Bytes that another engine pushed for a request.",
    "push_seconds": "Time from the end of a prompt's computation to the end of its push, s.",
    "push_bytes": "Bytes pushed for a request.",
    "failed_pulls": "Requests whose blocks could not be fetched.",
    "failed_receives": "Requests whose blocks another engine did not push.",
    "failed_pushes": "Requests whose blocks could not be pushed.",
    "blocks_pulled": "Requests whose blocks another engine has fetched from here.",
    "blocks_released": "Requests whose blocks another engine did not need.",
    "blocks_expired": "Requests whose blocks nobody fetched within the lease.",
    "blocks_lost": "Requests whose blocks were being fetched by an engine that went away.",
}
_SECONDS = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0]
_BYTES = [float(1 << shift) for shift in range(16, 34, 2)]


class TransferStats(KVConnectorStats):
    """Counts of one interval: lists of samples, and numbers."""

    def __init__(self, data: Union[Dict[str, Any], None] = None) -> None:
        super().__init__(data=data or {})
        if not self.data:
            self.reset()

    def reset(self) -> None:
        """Start anew."""
        self.data: Dict[str, Any] = {**{name: [] for name in _SAMPLES}, **dict.fromkeys(_COUNTS, 0)}

    def record(self, what: str, seconds: float, num_bytes: int) -> None:
        """Blocks of a request have come or gone: by a "pull", a "receive" or a "push"."""
        self.data[f"{what}_seconds"].append(seconds)
        self.data[f"{what}_bytes"].append(num_bytes)

    def count(self, name: str) -> None:
        """One more of something."""
        self.data[name] += 1

    def aggregate(self, other: KVConnectorStats) -> "TransferStats":
        """Add those of another worker or interval."""
        for name in _SAMPLES:
            self.data[name].extend(other.data.get(name, []))
        for name in _COUNTS:
            self.data[name] += other.data.get(name, 0)
        return self

    def reduce(self) -> Dict[str, Union[int, float]]:
        """Return a summary for the log."""
        summary: Dict[str, Union[int, float]] = {}
        for what in ("pull", "receive", "push"):
            seconds: List[float] = sorted(self.data[f"{what}_seconds"])
            if seconds:
                summary[f"{what}: number"] = len(seconds)
                summary[f"{what}: MiB"] = round(sum(self.data[f"{what}_bytes"]) / 2**20, 1)
                summary[f"{what}: median, ms"] = round(1000 * seconds[len(seconds) // 2], 2)
                summary[f"{what}: longest, ms"] = round(1000 * seconds[-1], 2)
        summary.update({name.replace("_", " "): self.data[name] for name in _COUNTS if self.data[name]})
        return summary

    def is_empty(self) -> bool:
        """Whether nothing was counted."""
        return not any(self.data.values())


class PromMetrics(KVConnectorPromMetrics):
    """The same as metrics named ``vllm:llm_datadist_*``."""

    def __init__(self, vllm_config: Any, metric_types: Dict[Any, Any], labelnames: List[str],
                 per_engine_labelvalues: Dict[int, List[object]]) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._metrics: Dict[str, Dict[int, Any]] = {}
        for name in _SAMPLES:
            metric = self._histogram_cls(name=f"vllm:llm_datadist_{name}", documentation=_TEXTS[name],
                                         buckets=_SECONDS if name.endswith("_seconds") else _BYTES,
                                         labelnames=labelnames)
            self._metrics[name] = self._per_engine(metric)
        for name in _COUNTS:
            metric = self._counter_cls(name=f"vllm:llm_datadist_{name}", documentation=_TEXTS[name],
                                       labelnames=labelnames)
            self._metrics[name] = self._per_engine(metric)

    def _per_engine(self, metric: Any) -> Dict[int, Any]:
        return {engine: metric.labels(*values) for engine, values in self.per_engine_labelvalues.items()}

    def observe(self, transfer_stats_data: Dict[str, Any], engine_idx: int = 0) -> None:
        """Take in the counts of one interval."""
        for name in _SAMPLES:
            for sample in transfer_stats_data.get(name, []):
                self._metrics[name][engine_idx].observe(sample)
        for name in _COUNTS:
            self._metrics[name][engine_idx].inc(transfer_stats_data.get(name, 0))
