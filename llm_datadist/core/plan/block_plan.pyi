from typing import List, Sequence, Tuple, final

_Descriptor = Tuple[int, int, int]  # remote, local, len

@final
class PlanProbe:
    def __init__(self) -> None: ...
    def contiguous(
        self, remote_addrs: Sequence[int], remote_offset: int, local_addrs: Sequence[int], local_offset: int,
        nbytes: int,
    ) -> List[_Descriptor]: ...
    def blocks(
        self, remote_addrs: Sequence[int], remote_blocks: Sequence[int], num_remote: int, local_addrs: Sequence[int],
        local_blocks: Sequence[int], num_local: int, block_bytes: int, put: bool,
    ) -> List[_Descriptor]: ...
    def slot_to_blocks(
        self, slot_addrs: Sequence[int], slot_offset: int, slot_bytes: int, block_addrs: Sequence[int],
        blocks: Sequence[int], num_blocks: int, block_bytes: int, put: bool,
    ) -> List[_Descriptor]: ...
