from typing import Optional, Sequence, SupportsIndex, Tuple, Union, final

from llm_datadist.core.engine.block_keys import EngineBlockKeys

KEY_REQ: int
KEY_PREFIX: int
KEY_BLOCKS: int
KEY_BY_ID: int

_KeySpec = Tuple[int, int, int, int]  # slot, kind, id, model id
_Key = Tuple[int, int, int, int]  # kind, id, model id, batch index
_Blocks = Sequence[SupportsIndex]
_Tensors = Optional[Tuple[int, int]]  # [first, stop); None: all
_Swapped = Union[int, Tuple[Sequence[int], int]]  # a cache id, or addresses and number of blocks

@final
class Engine(EngineBlockKeys):
    @property
    def pool_memory(self) -> object: ...
    @property
    def is_host_addressable(self) -> bool: ...

    # Memory.
    def allocate(
        self, num_tensors: int, num_slots: int, tensor_bytes: int, host: bool, is_blocks: bool,
        keys: Sequence[_KeySpec] = (), lease_ms: int = 0, data_type: int = -1, shape: Sequence[int] = (),
    ) -> Tuple[int, Sequence[int]]: ...
    def deallocate(self, cache_id: int) -> None: ...
    def register(
        self, addrs: Sequence[int], num_slots: int, tensor_bytes: int, host: bool, is_blocks: bool,
        keys: Sequence[_KeySpec] = (), remote_accessible: bool = True, data_type: int = -1,
        shape: Sequence[int] = (),
    ) -> int: ...
    def unregister(self, cache_id: int) -> None: ...
    def remove_key(self, kind: int, id: int, model_id: int) -> None: ...
    def has_pool(self, host: Optional[bool] = None) -> bool: ...

    # Transfers.
    def pull_cache(
        self, cluster_id: int, key: _Key, cache_id: int, batch_index: int = 0, size: int = -1,
        src_tensors: _Tensors = None, dst_tensors: _Tensors = None, src_offset: int = 0, dst_offset: int = 0,
        release: bool = False,
    ) -> None: ...
    def pull_blocks(
        self, cluster_id: int, key: _Key, cache_id: int, src_blocks: _Blocks, dst_blocks: _Blocks,
        src_tensors: _Tensors = None, dst_tensors: _Tensors = None, release: bool = False,
    ) -> None: ...
    def push_cache(
        self, cluster_id: int, key: _Key, cache_id: int, src_batch_index: int = 0, src_tensors: _Tensors = None,
        dst_tensors: _Tensors = None, tensors_per_step: int = 0,
    ) -> None: ...
    def push_blocks(
        self, cluster_id: int, key: _Key, cache_id: int, src_blocks: _Blocks, dst_blocks: _Blocks,
        src_tensors: _Tensors = None, dst_tensors: _Tensors = None, tensors_per_step: int = 0,
    ) -> None: ...

    # Local operations.
    def copy_cache(
        self, dst_id: int, src_id: int, dst_batch_index: int = 0, src_batch_index: int = 0, offset: int = 0,
        size: int = -1,
    ) -> None: ...
    def copy_blocks(self, cache_id: int, src_blocks: _Blocks, dst_blocks: _Blocks) -> None: ...
    def swap_blocks(
        self, src: _Swapped, dst: _Swapped, num_tensors: int, block_bytes: int, src_blocks: _Blocks,
        dst_blocks: _Blocks,
    ) -> None: ...
