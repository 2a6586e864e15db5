"""Keys of blocks that are held for one request, and what became of them."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Optional, Tuple

from llm_datadist.status import NamedIntEnum
from llm_datadist.utils.utils import check_uint64

__all__ = ["HeldBlocksKey", "KeyEvent", "KeyOutcome"]


class HeldBlocksKey:
    """Key of a blocks cache for one request: good for as long as its owner holds the request's blocks.

    A `BlocksCacheKey` leads to all blocks of a cache at any time. This key ends when the blocks may be given to another
    request; a transfer that names it later, or is still at it when it ends, fails. Peers read the
    blocks by ``pull_blocks`` or, where remote access is enabled, write them by ``transfer_cache_async``.

    Parameters
    ----------
    cluster_id : int
        Cluster that owns the blocks, uint64.
    req_id : int
        The request, uint64.
    generation : int
        Tells uses of the same `req_id` apart, uint64. An owner that never uses a `req_id` twice may leave it 0.

    Raises
    ------
    TypeError, ValueError
        A value is no int, or does not fit uint64.

    Notes
    -----
    Compares by value.
    """

    _packed: Optional[Tuple[int, Tuple[int, int, int, int]]] = None     # how the engine names it, once it was used

    def __init__(self, cluster_id: int, req_id: int, generation: int = 0) -> None:
        self._cluster_id = check_uint64("cluster_id", cluster_id)
        self._req_id = check_uint64("req_id", req_id)
        self._generation = check_uint64("generation", generation)

    @property
    def cluster_id(self) -> int:
        """Cluster that owns the blocks."""
        return self._cluster_id

    @property
    def req_id(self) -> int:
        """The request."""
        return self._req_id

    @property
    def generation(self) -> int:
        """Which use of `req_id` it is."""
        return self._generation

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HeldBlocksKey) and self._fields() == other._fields()

    def __hash__(self) -> int:
        return hash(self._fields())

    def _fields(self) -> Tuple[int, int, int]:
        return self._cluster_id, self._req_id, self._generation

    def __repr__(self) -> str:
        return (f"HeldBlocksKey(cluster_id={self._cluster_id}, req_id={self._req_id}, "
                f"generation={self._generation})")


class KeyOutcome(NamedIntEnum):
    """How a `HeldBlocksKey` ended. ``str()`` gives ``KeyOutcome.PULLED``."""

    PULLED = 1
    RELEASED = 2
    EXPIRED = 3
    LOST = 4


@dataclass(frozen=True)
class KeyEvent:
    """The end of a key, for its owner.

    Parameters
    ----------
    key : HeldBlocksKey
        The key; it is gone.
    outcome : KeyOutcome
        PULLED: a peer has read the blocks, or written them. RELEASED: a peer said that it will not. EXPIRED: nobody
        came within the lease. LOST: the link of a peer ended while it was reading or writing.
    """

    key: HeldBlocksKey
    outcome: KeyOutcome
