"""The scheduler's half of pushes: which requests are pushed from here, and which are awaited.

A proxy sends such a request to both engines at once, under a transfer id of its own. The decode engine allocates blocks
and offers their table under that id; the prefill engine fetches it, and writes into them what each step has computed.
"""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

from llm_datadist.connectors.vllm.logger import log
from llm_datadist.connectors.vllm.metadata import NULL_BLOCK, Chunk, Endpoint, Expectation, Metadata, PushOrder

__all__ = ["MIN_TRANSFER_ID", "PushScheduler", "transfer_id_of"]

MIN_TRANSFER_ID = 1 << 32           # smaller ones are keys of requests that are pulled


def transfer_id_of(params: Mapping[str, Any]) -> Optional[int]:
    """Return the transfer id in the ``kv_transfer_params`` of a request that is to be pushed, None for others."""
    transfer_id = params.get("transfer_id")
    if params.get("transfer_mode") != "push" or isinstance(transfer_id, bool) or not isinstance(transfer_id, int):
        return None
    return transfer_id if MIN_TRANSFER_ID <= transfer_id < 1 << 63 else None


@dataclass
class _Pushed:
    """A request here that is pushed as it is computed."""

    num_tokens: int
    blocks: List[List[int]] = field(default_factory=list)       # by KV cache group
    num_pushed: List[int] = field(default_factory=list)
    is_complete: bool = False


class PushScheduler:
    """State of the requests that take part in pushes. Work per step is that of prompts which are being computed.

    Parameters
    ----------
    block_tokens : tuple of int
        Tokens of a block, by KV cache group.
    """

    def __init__(self, block_tokens: Tuple[int, ...]) -> None:
        self._block_tokens = block_tokens
        self._pushed: Dict[str, _Pushed] = {}
        self._awaited: Dict[str, int] = {}

    # --------------------------------------------------------------------------------------------- the side that waits

    def expect(self, request: Any, transfer_id: int, blocks: Sequence[Sequence[Any]], waits: bool,
               metadata: Metadata) -> None:
        """Offer the blocks that were allocated for a request."""
        table = tuple([block.block_id if waits and block.block_hash is None and not block.is_null else NULL_BLOCK
                       for block in group[:-(-request.num_prompt_tokens // tokens)]]
                      for group, tokens in zip(blocks, self._block_tokens))
        if waits:
            self._awaited[request.request_id] = transfer_id
        metadata.expects.append(Expectation(request.request_id, transfer_id, table, waits))

    def refuse(self, request: Any, transfer_id: int, metadata: Metadata) -> None:
        """Tell the other side that a request needs nothing from it: it left before it had blocks."""
        metadata.expects.append(Expectation(request.request_id, transfer_id, tuple([] for _ in self._block_tokens),
                                            False))

    def withdraw(self, request_id: str, metadata: Metadata) -> None:
        """A request has finished; if its blocks are still awaited, they need not come."""
        if self._awaited.pop(request_id, None) is not None:
            metadata.withdraws.append(request_id)

    # -------------------------------------------------------------------------------------------- the side that pushes

    def push(self, request: Any, transfer_id: int, endpoints: Tuple[Endpoint, ...], metadata: Metadata) -> None:
        """A request was admitted whose blocks are pushed."""
        if request.request_id not in self._pushed:
            self._pushed[request.request_id] = _Pushed(request.num_prompt_tokens)
            metadata.pushes.append(PushOrder(request.request_id, transfer_id, endpoints))

    def step(self, output: Any, metadata: Metadata) -> None:
        """Note which blocks a step completes.

        Parameters
        ----------
        output : vllm.v1.core.sched.output.SchedulerOutput
            The step.
        metadata : Metadata
            Takes the chunks.
        """
        if not self._pushed:
            return
        for request_id, block_ids, num_computed, is_anew in self._scheduled(output):
            pushed = self._pushed[request_id]
            if is_anew:
                if pushed.blocks:                               # it was preempted, and its blocks were given away
                    metadata.restarts.append(request_id)
                pushed.blocks = [list(group) for group in block_ids]
                pushed.num_pushed = [0] * len(pushed.blocks)
                pushed.is_complete = False
            else:
                for group, new in zip(pushed.blocks, block_ids):
                    group += new
            self._add_chunk(request_id, pushed, num_computed + output.num_scheduled_tokens[request_id], metadata)

    def _scheduled(self, output: Any) -> Iterator[Tuple[str, Sequence[Sequence[int]], int, bool]]:
        """Prompts that a step computes: new blocks, tokens before it, and whether the blocks are all there are."""
        pushed = self._pushed
        for new in output.scheduled_new_reqs:
            if new.req_id in pushed:
                yield new.req_id, new.block_ids, new.num_computed_tokens, True
        cached = output.scheduled_cached_reqs
        for index, request_id in enumerate(cached.req_ids):         # of all that run
            if request_id in pushed:
                is_anew = request_id in cached.resumed_req_ids
                if is_anew or not pushed[request_id].is_complete:
                    yield request_id, cached.new_block_ids[index] or (), cached.num_computed_tokens[index], is_anew

    def _add_chunk(self, request_id: str, pushed: _Pushed, num_tokens: int, metadata: Metadata) -> None:
        pushed.is_complete = num_tokens >= pushed.num_tokens
        first = tuple(pushed.num_pushed)
        for group, tokens in enumerate(self._block_tokens):
            pushed.num_pushed[group] = -(-pushed.num_tokens // tokens) if pushed.is_complete else num_tokens // tokens
        blocks = tuple(ids[start:stop] for ids, start, stop in zip(pushed.blocks, first, pushed.num_pushed))
        if pushed.is_complete or any(blocks):
            metadata.chunks.append(Chunk(request_id, first, blocks, pushed.is_complete))

    def finished(self, request_id: str, is_good: bool, metadata: Metadata) -> bool:
        """A request has finished or was aborted; whether its blocks are kept until they are pushed."""
        pushed = self._pushed.pop(request_id, None)
        if pushed is None:
            return False
        keeps = is_good and pushed.is_complete
        if not keeps and is_good:
            log.error("request %s finished, but its prompt was not computed; nothing is pushed", request_id)
        metadata.ends[request_id] = keeps
        return keeps
