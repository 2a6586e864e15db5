"""Asynchronous transfers of a test, and synchronisers that tests steer; run in either process."""
from __future__ import annotations

import threading
from typing import Any, List, NamedTuple, Optional, Tuple

from support import reference
from support.peer import Node
from transfers.caches import Named, Spec, invoke

from llm_datadist import LayerSynchronizer, LLMStatusCode


class Outcome(NamedTuple):
    """What a transfer reported in the end."""

    code: LLMStatusCode
    results: List[Optional[LLMStatusCode]]
    error: Optional[BaseException]
    asked: List[Tuple[int, Optional[int]]]      # arguments of the synchroniser's calls


class Recorder(LayerSynchronizer):
    """Says yes to every layer, but False to one and raises at another."""

    def __init__(self, false_at: Optional[int] = None, raise_at: Optional[int] = None) -> None:
        self.asked: List[Tuple[int, Optional[int]]] = []
        self._false_at = false_at
        self._raise_at = raise_at

    def synchronize_layer(self, layer_index: int, timeout_in_millis: Optional[int]) -> bool:
        """Answer for one layer."""
        self.asked.append((layer_index, timeout_in_millis))
        if layer_index == self._raise_at:
            raise ArithmeticError(f"layer {layer_index} did not converge")
        return layer_index != self._false_at


class Gate(LayerSynchronizer):
    """Keeps one layer back until the test opens it."""

    def __init__(self, closed_at: int) -> None:
        self._closed_at = closed_at
        self.reached = threading.Event()
        self.open = threading.Event()

    def synchronize_layer(self, layer_index: int, timeout_in_millis: Optional[int]) -> bool:
        """Wait at the closed layer."""
        if layer_index == self._closed_at:
            self.reached.set()
            return self.open.wait(30)
        return True


def transfer(node: Node, name: str, configs: Any, *lists: Any, false_at: Optional[int] = None,
             raise_at: Optional[int] = None) -> Outcome:
    """Send cache `name` to `configs` and wait."""
    recorder = Recorder(false_at, raise_at)
    task = invoke(node, "transfer_cache_async", Named(name), recorder, configs, *lists)
    results = task.get_results()
    return Outcome(task.synchronize(), results, task.exception(), recorder.asked)


def transfer_through(node: Node, gate: Gate, name: str, configs: Any, *lists: Any) -> Any:
    """Start a transfer and return its task once it waits at the gate."""
    task = invoke(node, "transfer_cache_async", Named(name), gate, configs, *lists)
    assert gate.reached.wait(30)
    return task


def check_outcome(outcome: Outcome, wanted: List[range]) -> None:
    """All arrived, and the synchroniser was asked once for each layer that somebody wants, in order."""
    assert outcome.results == [LLMStatusCode.LLM_SUCCESS] * len(wanted), outcome
    assert outcome.code == LLMStatusCode.LLM_SUCCESS and outcome.error is None
    assert outcome.asked == [(layer, None) for layer in sorted(set().union(*wanted))]


# Source and destination of the tests that follow the layers of a model, two tensors each.
LAYERS, STRIDE = 3, 64
SRC = Spec(2 * LAYERS, 2, (STRIDE,))
DST = Spec(2 * LAYERS, 2, (STRIDE,), seed=1)


def layer(addrs, first, stop):
    """Addresses of the tensors of some layers."""
    return addrs[2 * first:2 * stop]


def sent(target, source, layers, dst_layers=None):
    """What the transfer of slot 0 to slot 0 does to the model."""
    reference.copy_slot(target, 0, source, 0, STRIDE, src_layers=layers, dst_layers=dst_layers or layers)
