"""Block tables on their way from a decode engine to the prefill engine that pushes into its blocks.

Each is a record in a slot of its own: a blocks cache of one block, which is held for the transfer. Slots are registered
once, before any link is made.
"""
from __future__ import annotations

import threading
from typing import List, Optional, Sequence, Tuple

import numpy as np

from llm_datadist import Cache, CacheDesc, DataType, HeldBlocksKey, LLMDataDist

__all__ = ["MAX_ENTRIES", "TABLE_GENERATION", "BlockTables"]

TABLE_GENERATION = 1 << 16          # of the key of a block table; those of blocks count from 0
_SLOT_BYTES = 1 << 16               # equal on both sides, as blocks of a transfer are
_NUM_SLOTS = 64
_HEADER_ENTRIES = 32
MAX_ENTRIES = _SLOT_BYTES // 4 - _HEADER_ENTRIES


class BlockTables:
    """The slots of one engine, for tables that are read from here and those that are fetched. Safe from any thread.

    Parameters
    ----------
    engine : LLMDataDist
        The engine; remote access to caches is enabled.
    """

    def __init__(self, engine: LLMDataDist) -> None:
        self._manager = engine.cache_manager
        self._memory = np.zeros((_NUM_SLOTS, _SLOT_BYTES // 4), np.uint32)
        desc = CacheDesc(1, [1, _SLOT_BYTES], DataType.DT_UINT8)
        self._caches: List[Cache] = [self._manager.register_blocks_cache(desc, [row.ctypes.data], None, True)
                                     for row in self._memory]
        self._free = list(range(_NUM_SLOTS))
        self._lock = threading.Lock()

    def take_slot(self) -> Optional[int]:
        """Return a slot that is nobody's until `free_slot`, or None."""
        with self._lock:
            return self._free.pop() if self._free else None

    def free_slot(self, slot: int) -> None:
        """Give a slot back."""
        with self._lock:
            self._free.append(slot)

    def offer(self, slot: int, key: HeldBlocksKey, groups: Sequence[Sequence[int]], lease_ms: int) -> None:
        """Write a table into a slot and let peers read it.

        Parameters
        ----------
        slot : int
            Of `take_slot`.
        key : HeldBlocksKey
            Its key.
        groups : sequence of sequence of int
            Block numbers by KV cache group and position; together at most `MAX_ENTRIES`.
        lease_ms : int
            How long it may be read.
        """
        record = [len(groups), *map(len, groups)]
        for group in groups:
            record += group
        self._memory[slot, :len(record)] = record
        self._manager.hold_blocks(self._caches[slot], key, lease_ms)

    def end(self, slot: int, key: HeldBlocksKey) -> None:
        """Refuse who comes from now on; the key ends by an event."""
        self._manager.hold_blocks(self._caches[slot], key, 0)

    def fetch(self, slot: int, key: HeldBlocksKey) -> Tuple[List[int], ...]:
        """Read the table of a peer through a slot.

        Raises
        ------
        LLMNotFoundError
            The peer has none under this key.
        LLMLinkError, LLMTimeoutError
            As for ``pull_blocks``.
        """
        self._manager.pull_blocks(key, self._caches[slot], [0], [0])
        record = self._memory[slot].tolist()
        stop = 1 + record[0]
        groups = []
        for length in record[1:1 + record[0]]:
            groups.append(record[stop:stop + length])
            stop += length
        return tuple(groups)

    def close(self) -> None:
        """Unregister the slots."""
        for cache in self._caches:
            self._manager.unregister_cache(cache.cache_id)
        self._caches = []
