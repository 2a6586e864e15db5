"""The scheduler's half: which requests take blocks from elsewhere, and which keep theirs for somebody.

Lives in vLLM's EngineCore. It decides and describes; the workers' half moves bytes. Its work per step is that of
requests that came, finished or were aborted since the last one, not of those that run.
"""
from __future__ import annotations

from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from llm_datadist.connectors.vllm.logger import log
from llm_datadist.connectors.vllm.metadata import NULL_BLOCK, Endpoint, Metadata, PullOrder, RemoteBlocks, WorkerCard
from llm_datadist.connectors.vllm.push_scheduler import PushScheduler, transfer_id_of

__all__ = ["SchedulerHalf"]

_FINISHED = ("FINISHED_LENGTH_CAPPED", "FINISHED_STOPPED")


class SchedulerHalf:
    """State of the requests that take part in transfers.

    Parameters
    ----------
    pushes : PushScheduler, optional
        Its part for pushes, in that mode.
    """

    def __init__(self, pushes: Optional[PushScheduler] = None) -> None:
        self._pushes = pushes
        self._endpoints: Tuple[Endpoint, ...] = ()
        self._layout = ""
        self._next = Metadata()
        self._keys: Dict[str, int] = {}         # requests that hold blocks for others, until they finish
        self._last_key = 0

    def set_workers(self, cards: Mapping[int, WorkerCard]) -> None:
        """Take what the workers say about themselves.

        Parameters
        ----------
        cards : mapping of int to WorkerCard
            One for each rank.

        Raises
        ------
        ValueError
            Ranks have different layouts.
        """
        layouts = {card.layout for card in cards.values()}
        if len(layouts) != 1:
            raise ValueError(f"the workers of this engine lay their KV caches out differently: {sorted(layouts)}")
        self._layout = layouts.pop()
        self._endpoints = tuple(cards[rank].endpoint for rank in sorted(cards))

    # ------------------------------------------------------------------------------------------ requests arrive

    def num_matched_tokens(self, request: Any, num_computed_tokens: int) -> Tuple[int, bool]:
        """Return how many tokens beyond the computed ones another engine has, and whether they come in the background.

        Called perhaps several times for a request; changes nothing.
        """
        params = request.kv_transfer_params
        if not params or not params.get("do_remote_prefill"):
            return 0, False
        if transfer_id_of(params) is not None:
            num_tokens = request.num_prompt_tokens if self._pushes is not None else 0
            if self._pushes is None:
                log.error("request %s: mode \"push\" is not set; its prompt is computed here", request.request_id)
        else:
            remote = self._usable(request, params)
            num_tokens = 0 if remote is None else min(remote.num_tokens, request.num_prompt_tokens)
        count = num_tokens - num_computed_tokens
        return (count, True) if count > 0 else (0, False)

    def _usable(self, request: Any, params: Mapping[str, Any]) -> Optional[RemoteBlocks]:
        """What the params describe, if its blocks can be used here. The reason why not is logged."""
        remote = RemoteBlocks.from_params(params)
        if remote is None:
            log.warning("request %s: kv_transfer_params are not those of this connector; its prompt is computed here",
                     request.request_id)
            return None
        if len(remote.endpoints) != len(self._endpoints):
            log.error("request %s: the other engine has %s workers, this one %s, which is not supported; its prompt "
                      "is computed here", request.request_id, len(remote.endpoints), len(self._endpoints))
            return None
        if remote.layout != self._layout:
            log.error("request %s: the KV cache of the other engine is laid out differently (digest %s, here %s): "
                      "model, data type, block size and layout must be equal; its prompt is computed here",
                      request.request_id, remote.layout, self._layout)
            return None
        return remote

    def allocated(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Note the blocks of a request that was admitted; called a second time once a load has ended."""
        params = request.kv_transfer_params
        if not params:
            return
        transfer_id = transfer_id_of(params)
        if params.get("do_remote_decode"):
            if transfer_id is None:
                self._hold(request.request_id)
            else:
                self._push(request, transfer_id, params)
        elif params.get("do_remote_prefill"):
            params["do_remote_prefill"] = False         # the second call, and a preempted request, load nothing
            if transfer_id is not None:
                if self._pushes is not None:
                    self._pushes.expect(request, transfer_id, blocks.blocks, num_external_tokens > 0, self._next)
                return
            remote = RemoteBlocks.from_params(params)
            if remote is None:
                return
            if num_external_tokens <= 0:
                self._release(request.request_id, remote)
                return
            src, dst = _pair(remote.block_ids, blocks.blocks)
            self._next.pulls.append(PullOrder(request.request_id, remote, src, dst, waits=True))

    def _hold(self, request_id: str) -> None:
        """Give a request that computes for others its key, before anybody can know of it."""
        if request_id not in self._keys:
            self._last_key += 1
            self._keys[request_id] = self._next.holds[request_id] = self._last_key

    def _push(self, request: Any, transfer_id: int, params: Mapping[str, Any]) -> None:
        """Have the blocks of a request pushed, unless the other side cannot take them."""
        try:
            endpoints = tuple(Endpoint(int(cluster), str(host), int(port))
                              for cluster, host, port in params["remote_workers"])
        except (KeyError, TypeError, ValueError):
            endpoints = ()
        reason = ""
        if self._pushes is None:
            reason = "mode \"push\" is not set here"
        elif len(endpoints) != len(self._endpoints):
            reason = f"the other engine has {len(endpoints)} workers, this one {len(self._endpoints)}"
        elif params.get("remote_layout") != self._layout:
            reason = ("the KV cache of the other engine is laid out differently "
                      f"(digest {params.get('remote_layout')}, here {self._layout}): "
                      "model, data type, block size, layout and mode must be equal")
        if reason or self._pushes is None:
            log.error("request %s is not pushed: %s", request.request_id, reason)
        else:
            self._pushes.push(request, transfer_id, endpoints, self._next)

    def _release(self, request_id: str, remote: RemoteBlocks) -> None:
        """Tell the other side that its blocks are not needed."""
        if len(remote.endpoints) == len(self._endpoints):
            self._next.pulls.append(PullOrder(request_id, remote))

    # ---------------------------------------------------------------------------------------------- and leave

    def finished(self, request: Any, block_ids: Sequence[Sequence[int]]) -> Tuple[bool, Optional[Dict[str, Any]]]:
        """Decide whether the blocks of a finished or aborted request are kept.

        Returns
        -------
        tuple of bool and dict or None
            Whether the workers will say when the blocks may be freed, and how others find them.
        """
        params = request.kv_transfer_params
        if not params:
            return False, None
        request_id = request.request_id
        if params.get("describe"):
            return False, self._describe()
        transfer_id = transfer_id_of(params)
        if params.get("do_remote_prefill"):             # aborted before it was admitted: nobody will fetch the blocks
            params["do_remote_prefill"] = False
            if transfer_id is not None:
                if self._pushes is not None:
                    self._pushes.refuse(request, transfer_id, self._next)
                return False, None
            remote = RemoteBlocks.from_params(params)
            if remote is not None:
                self._release(request_id, remote)
            return False, None
        if transfer_id is not None and self._pushes is not None:
            self._pushes.withdraw(request_id, self._next)
            is_good = request.status.name in _FINISHED and any(block_ids)
            pushed = self._pushes.finished(request_id, is_good, self._next)
            return pushed, {"transfer_mode": "push", "transfer_id": transfer_id} if pushed else None
        key = self._keys.pop(request_id, None)
        if key is None:
            return False, None
        if request.status.name not in _FINISHED or not any(block_ids) or not self._endpoints:
            self._drop(request_id)
            return False, None
        self._next.leases.append(request_id)
        remote = RemoteBlocks(request_id, key, self._endpoints, self._layout,
                              tuple(list(group) for group in block_ids), request.num_computed_tokens)
        return True, remote.to_params()

    def _describe(self) -> Dict[str, Any]:
        """How other engines reach this one, for a proxy that asks with ``{"describe": true}``."""
        return {"transfer_mode": "pull" if self._pushes is None else "push", "remote_layout": self._layout,
                "remote_workers": [[worker.cluster_id, worker.host, worker.port] for worker in self._endpoints]}

    def _drop(self, request_id: str) -> None:
        if self._next.holds.pop(request_id, None) is None:      # the workers know of it already
            self._next.drops.append(request_id)

    def take_metadata(self, output: Any = None) -> Metadata:
        """Return what came together since the last call, for the step that vLLM's `output` describes."""
        if self._pushes is not None and output is not None:
            self._pushes.step(output, self._next)
        metadata, self._next = self._next, Metadata()
        return metadata


def _pair(remote_ids: Sequence[Sequence[int]],
          local_blocks: Sequence[Sequence[Any]]) -> Tuple[Tuple[List[int], ...], Tuple[List[int], ...]]:
    """Pair blocks by position in the sequence, without those that are here already or that neither side keeps."""
    src: List[List[int]] = []
    dst: List[List[int]] = []
    for remote_group, local_group in zip(remote_ids, local_blocks):
        src.append([])
        dst.append([])
        for there, here in zip(remote_group, local_group):
            if here.block_hash is None and not here.is_null and there != NULL_BLOCK:
                src[-1].append(there)
                dst[-1].append(here.block_id)
    return tuple(src), tuple(dst)
