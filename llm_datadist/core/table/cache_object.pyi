from contextlib import AbstractContextManager
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple, final

from llm_datadist.core.table.pool import PagePool

_KeySpec = Tuple[int, int, int, int]  # batch slot, kind, id, model id

class Pinned(NamedTuple):
    cache_id: int
    slot: int
    generation: int
    num_tensors: int
    num_slots: int
    tensor_bytes: int
    stride: int
    step: int
    addrs: Tuple[int, ...]
    batch_index: int
    key: Optional[Tuple[int, int]]
    key_kind: int
    tensor: int
    offset: int
    owned: bool
    is_blocks: bool
    host: bool
    remote_accessible: bool

@final
class CacheTable:
    def __init__(self) -> None: ...
    def allocate(
        self, pool: Optional[PagePool], num_tensors: int, num_slots: int, tensor_bytes: int,
        keys: Sequence[_KeySpec] = (), flags: int = 0, timeout_ms: int = 1000,
    ) -> Tuple[int, List[int]]: ...
    def register(
        self, addrs: Sequence[int], num_slots: int, tensor_bytes: int, keys: Sequence[_KeySpec] = (), flags: int = 0,
        timeout_ms: int = 1000,
    ) -> int: ...
    def deallocate(self, cache_id: int, timeout_ms: int = 1000) -> None: ...
    def unregister(self, cache_id: int, timeout_ms: int = 1000) -> None: ...
    def remove_key(self, kind: int, id: int, model_id: int, timeout_ms: int = 1000) -> None: ...
    def resolve(self, kind: int, id: int, model_id: int = 0, batch_index: int = 0) -> Pinned: ...
    def pin_local(self, cache_id: int) -> Pinned: ...
    def pin_range(self, addr: int, num_bytes: int) -> Pinned: ...
    def unpin(self, pinned: Pinned) -> None: ...
    def take(self, key: Optional[Tuple[int, int]], first_tensor: int, num_tensors: int) -> None: ...
    def clear(self, timeout_ms: int = 1000) -> None: ...
    def stats(self) -> Dict[str, int]: ...
    def snapshot(self) -> List[Dict[str, int]]: ...
    def hold(self) -> AbstractContextManager[None]: ...
