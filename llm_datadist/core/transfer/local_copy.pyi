from typing import Iterable, List, Optional, Sequence, Tuple, final

from llm_datadist.core.base.wait import TableProbe

_Copy = Tuple[int, int, int]  # dst, src, bytes
_Shape = Tuple[int, int]  # number of slots, stride

@final
class CopyProbe:
    def __init__(self) -> None: ...
    def copy_cache(
        self, dst_addrs: Sequence[int], dst_shape: _Shape, dst_slot: int, src_addrs: Sequence[int], src_shape: _Shape,
        src_slot: int, offset: int, nbytes: int,
    ) -> List[_Copy]: ...
    def copy_blocks(
        self, addrs: Sequence[int], num_blocks: int, block_bytes: int, src_blocks: Sequence[int],
        dst_blocks: Sequence[int],
    ) -> List[_Copy]: ...
    def swap_blocks(
        self, src_addrs: Sequence[int], src_blocks: Sequence[int], num_src: int, dst_addrs: Sequence[int],
        dst_blocks: Sequence[int], num_dst: int, block_bytes: int,
    ) -> List[_Copy]: ...
    def copy(
        self, provider: TableProbe, stream: int, ops: Iterable[_Copy], kind: int, timeout_ns: Optional[int] = None,
    ) -> None: ...
