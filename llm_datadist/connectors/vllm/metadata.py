"""What the scheduler's half tells the workers' halves, each step, and what these tell it once."""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Dict, List, Mapping, Optional, Tuple

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorHandshakeMetadata, KVConnectorMetadata

__all__ = ["NULL_BLOCK", "Chunk", "Endpoint", "Expectation", "Metadata", "PullOrder", "PushOrder", "RemoteBlocks",
           "WorkerCard"]

NULL_BLOCK = 0                  # vLLM's placeholder where a sliding window has left a block behind


@dataclass(frozen=True)
class Endpoint:
    """One worker as its counterparts reach it."""

    cluster_id: int
    host: str
    port: int


@dataclass
class WorkerCard(KVConnectorHandshakeMetadata):
    """What a worker tells its scheduler once it is up: where it listens (port 0: nowhere), and its layout."""

    endpoint: Endpoint
    layout: str


@dataclass(frozen=True)
class RemoteBlocks:
    """The finished blocks of one request in a prefill engine, as its ``kv_transfer_params`` describe them.

    Parameters
    ----------
    request_id : str
        The request's name there.
    key : int
        The key by which the blocks are held; never used twice by one engine.
    endpoints : tuple of Endpoint
        Its workers by rank.
    layout : str
        Digest of its layout.
    block_ids : tuple of list of int
        Block table of each KV cache group, by position in the sequence; 0 where the window has left a block behind.
    num_tokens : int
        Tokens whose blocks are complete.
    """

    request_id: str
    key: int
    endpoints: Tuple[Endpoint, ...]
    layout: str
    block_ids: Tuple[List[int], ...]
    num_tokens: int

    def to_params(self) -> Dict[str, Any]:
        """Return the description as JSON-able values, under the names that proxies and other connectors use."""
        first = self.endpoints[0]
        return {
            "do_remote_prefill": True, "do_remote_decode": False, "transfer_mode": "pull",
            "remote_engine_id": f"llm_datadist-{first.cluster_id}", "remote_request_id": self.request_id,
            "remote_host": first.host, "remote_port": first.port, "tp_size": len(self.endpoints),
            "remote_block_ids": [list(ids) for ids in self.block_ids], "remote_num_tokens": self.num_tokens,
            "remote_workers": [[worker.cluster_id, worker.host, worker.port] for worker in self.endpoints],
            "remote_key": self.key, "remote_layout": self.layout,
        }

    @classmethod
    def from_params(cls, params: Mapping[str, Any]) -> Optional["RemoteBlocks"]:
        """Return what a request's ``kv_transfer_params`` describe; None where they are not of this connector."""
        try:
            workers = tuple(Endpoint(int(cluster), str(host), int(port))
                            for cluster, host, port in params["remote_workers"])
            blocks = tuple([int(block) for block in group] for group in params["remote_block_ids"])
            remote = cls(str(params["remote_request_id"]), int(params["remote_key"]), workers,
                         str(params["remote_layout"]), blocks, int(params["remote_num_tokens"]))
        except (KeyError, TypeError, ValueError):
            return None
        return remote if workers else None


@dataclass(frozen=True)
class PullOrder:
    """Fetch blocks for one request; without blocks, only tell the other side that they are not needed.

    Parameters
    ----------
    request_id : str
        The request here.
    remote : RemoteBlocks
        Where they are.
    src_blocks, dst_blocks : tuple of list of int
        Per KV cache group: block ids there and here, paired by position.
    waits : bool
        Whether the scheduler waits for the end of it.
    """

    request_id: str
    remote: RemoteBlocks
    src_blocks: Tuple[List[int], ...] = ()
    dst_blocks: Tuple[List[int], ...] = ()
    waits: bool = False


@dataclass(frozen=True)
class Expectation:
    """Blocks here that another engine will push into.

    Parameters
    ----------
    request_id : str
        The request here.
    transfer_id : int
        What both sides call the transfer.
    blocks : tuple of list of int
        Block table of each KV cache group, by position; `NULL_BLOCK` for one that is not needed.
    waits : bool
        Whether the scheduler waits for the end of it.
    """

    request_id: str
    transfer_id: int
    blocks: Tuple[List[int], ...]
    waits: bool


@dataclass(frozen=True)
class PushOrder:
    """A request here whose blocks are pushed.

    Parameters
    ----------
    request_id : str
        The request here.
    transfer_id : int
        What both sides call the transfer.
    endpoints : tuple of Endpoint
        The workers of the other engine by rank.
    """

    request_id: str
    transfer_id: int
    endpoints: Tuple[Endpoint, ...]


@dataclass(frozen=True)
class Chunk:
    """Blocks of a pushed request that are complete after this step.

    Parameters
    ----------
    request_id : str
        The request.
    first : tuple of int
        Per KV cache group: position of its first block.
    blocks : tuple of list of int
        Per KV cache group: block ids here, by position from `first` on.
    is_last : bool
        Whether the prompt is complete with them.
    """

    request_id: str
    first: Tuple[int, ...]
    blocks: Tuple[List[int], ...]
    is_last: bool


@dataclass
class Metadata(KVConnectorMetadata):
    """One step.

    Parameters
    ----------
    pulls : list of PullOrder
        Blocks to fetch.
    holds : dict of str to int
        Requests that compute blocks for others, and their keys.
    leases : list of str
        Those of them that have finished: their blocks wait for the other side.
    drops : list of str
        Those whose blocks nobody will fetch.
    expects : list of Expectation
        Blocks that another engine will push into.
    withdraws : list of str
        Requests of those that nobody waits for any more.
    pushes : list of PushOrder
        Requests whose blocks are pushed from here.
    chunks : list of Chunk
        Their blocks that this step completes.
    restarts : list of str
        Those that lost their blocks and begin anew.
    ends : dict of str to bool
        Those that have finished, and whether their blocks are kept until they are pushed.
    """

    pulls: List[PullOrder] = field(default_factory=list)
    holds: Dict[str, int] = field(default_factory=dict)
    leases: List[str] = field(default_factory=list)
    drops: List[str] = field(default_factory=list)
    expects: List[Expectation] = field(default_factory=list)
    withdraws: List[str] = field(default_factory=list)
    pushes: List[PushOrder] = field(default_factory=list)
    chunks: List[Chunk] = field(default_factory=list)
    restarts: List[str] = field(default_factory=list)
    ends: Dict[str, bool] = field(default_factory=dict)
