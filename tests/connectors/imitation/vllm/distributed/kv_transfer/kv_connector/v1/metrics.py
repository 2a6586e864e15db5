"""Bases of what a connector counts."""
from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class KVConnectorStats:
    data: dict = field(default_factory=dict)


class Gauge:
    pass


class Counter:
    pass


class Histogram:
    pass


class KVConnectorPromMetrics:
    def __init__(self, vllm_config, metric_types, labelnames, per_engine_labelvalues):
        self._gauge_cls = metric_types[Gauge]
        self._counter_cls = metric_types[Counter]
        self._histogram_cls = metric_types[Histogram]
        self.per_engine_labelvalues = per_engine_labelvalues
