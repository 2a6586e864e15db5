"""What is in the caches: a pattern that tells every block from every other, and its verification.

A block holds a stretch of one random buffer, cut at an offset that depends on link, tensor and block. So a block that
went to the wrong place is noticed as surely as a wrong byte in it, at the speed of a comparison.
"""
from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

UNTOUCHED = 0xA5
_CHUNK = 1 << 20
_STEP = 64


class PrivateMemory:
    """Anonymous memory of this process for `num_tensors` tensors, page aligned, freed with `close`."""

    def __init__(self, num_tensors: int, tensor_bytes: int) -> None:
        step = -(-tensor_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self._map = mmap.mmap(-1, num_tensors * step, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        anchor = (ctypes.c_char * 1).from_buffer(self._map)
        base = ctypes.addressof(anchor)
        del anchor                              # an exported buffer would keep the map from being closed
        self.addrs = [base + index * step for index in range(num_tensors)]

    def close(self) -> None:
        """Give the memory back. Nothing may use its addresses any more."""
        self._map.close()


def tensor_views(addrs: Sequence[int], capacity: int, block_bytes: int) -> list[np.ndarray]:
    """Return one uint8 array of shape (capacity, block_bytes) per tensor, over memory that the caller keeps alive."""
    kind = ctypes.c_uint8 * (capacity * block_bytes)
    return [np.frombuffer(kind.from_address(addr), dtype=np.uint8).reshape(capacity, block_bytes) for addr in addrs]


def clear(views: Sequence[np.ndarray]) -> None:
    """Overwrite everything with a value that no pattern is made of alone."""
    for view in views:
        view.fill(UNTOUCHED)


def fill(views: Sequence[np.ndarray], link: int) -> None:
    """Write the pattern of a link into every block."""
    for tensor, view in enumerate(views):
        for block in range(len(view)):
            for start, stop, content in _chunks(link, tensor, block, view.shape[1]):
                view[block, start:stop] = content


def wrong_bytes(
    views: Sequence[np.ndarray], link: int, src_blocks: Sequence[int], dst_blocks: Sequence[int]
) -> tuple[int, str]:
    """Compare destination memory with what must be there after one transfer.

    Returns
    -------
    tuple of (int, str)
        How many bytes are wrong, those of blocks that nothing should have touched included; where the first one is.
    """
    count, where = 0, ""
    for tensor, view in enumerate(views):
        untouched = np.ones(len(view), dtype=bool)
        for src, dst in zip(src_blocks, dst_blocks):
            untouched[dst] = False
            for start, stop, content in _chunks(link, tensor, int(src), view.shape[1]):
                there = view[dst, start:stop]
                if not np.array_equal(there, content):
                    differs = there != content
                    where = where or f"link {link}, tensor {tensor}, block {dst}, byte {start + int(differs.argmax())}"
                    count += int(differs.sum())
        for block in np.flatnonzero(untouched):
            differs = view[block] != UNTOUCHED
            if differs.any():
                where = where or f"link {link}, tensor {tensor}, block {block} (not part of the transfer)"
                count += int(differs.sum())
    return count, where


@lru_cache(maxsize=1)
def _noise() -> np.ndarray:
    return np.random.default_rng(4099).integers(0, 256, 2 * _CHUNK, dtype=np.uint8)


def _chunks(link: int, tensor: int, block: int, size: int):
    """Yield (start, stop, content) of a block."""
    noise = _noise()
    for number, start in enumerate(range(0, size, _CHUNK)):
        stop = min(start + _CHUNK, size)
        # Odd factors: neighbours in any of the four directions differ, and few blocks share an offset.
        offset = (((link * 7919 + tensor) * 5003 + block) * 3001 + number * 1009) * _STEP % _CHUNK
        yield start, stop, noise[offset : offset + stop - start]
