"""Where the model keeps keys and values: one contiguous slot per request, or blocks found through a block table.

Both are views over memory somebody else owns (a cache of the engine, or plain arrays), never copies. A view must not be
used after its cache was deallocated and its last key released.
"""
from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np


class ContiguousKV:
    """K and V of one request in one slot per tensor.

    Parameters
    ----------
    tensors : sequence of numpy.ndarray, each of shape (1, max_tokens, heads, head_size)
        K and V of layer 0, of layer 1 and so on.
    """

    def __init__(self, tensors: Sequence[np.ndarray]) -> None:
        self._tensors = tensors

    @classmethod
    def private(cls, num_layers: int, max_tokens: int, num_heads: int, head_size: int) -> ContiguousKV:
        """Return a store over arrays of its own."""
        shape = (1, max_tokens, num_heads, head_size)
        return cls([np.zeros(shape, dtype=np.float32) for _ in range(2 * num_layers)])

    @property
    def num_layers(self) -> int:
        return len(self._tensors) // 2

    def write(self, layer: int, start: int, keys: np.ndarray, values: np.ndarray) -> None:
        """Store K and V, shape (n, heads, head_size), of the positions from `start` on."""
        stop = start + len(keys)
        self._tensors[2 * layer][0, start:stop] = keys
        self._tensors[2 * layer + 1][0, start:stop] = values

    def read(self, layer: int, num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Return views of K and V of the first `num_tokens` positions, shape (num_tokens, heads, head_size)."""
        return self._tensors[2 * layer][0, :num_tokens], self._tensors[2 * layer + 1][0, :num_tokens]


class PagedKV:
    """K and V of one request in blocks that may lie anywhere in tensors shared by all requests.

    Parameters
    ----------
    tensors : sequence of numpy.ndarray, each of shape (num_blocks, block_tokens, heads, head_size)
        K and V of layer 0, of layer 1 and so on.
    block_table : array of int, shape (n,)
        Block that holds positions i*block_tokens to (i+1)*block_tokens-1, for each i.
    """

    def __init__(self, tensors: Sequence[np.ndarray], block_table: np.ndarray) -> None:
        self._tensors = tensors
        self._table = np.asarray(block_table, dtype=np.intp)
        self._block_tokens = tensors[0].shape[1]

    @property
    def num_layers(self) -> int:
        return len(self._tensors) // 2

    def write(self, layer: int, start: int, keys: np.ndarray, values: np.ndarray) -> None:
        """Store K and V, shape (n, heads, head_size), of the positions from `start` on."""
        positions = np.arange(start, start + len(keys))
        blocks, offsets = self._table[positions // self._block_tokens], positions % self._block_tokens
        self._tensors[2 * layer][blocks, offsets] = keys
        self._tensors[2 * layer + 1][blocks, offsets] = values

    def read(self, layer: int, num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Return K and V of the first `num_tokens` positions, gathered, shape (num_tokens, heads, head_size)."""
        blocks = self._table[: num_blocks(num_tokens, self._block_tokens)]
        keys, values = self._tensors[2 * layer][blocks], self._tensors[2 * layer + 1][blocks]
        token_shape = (-1,) + keys.shape[2:]
        return keys.reshape(token_shape)[:num_tokens], values.reshape(token_shape)[:num_tokens]


def poison(tensors: Sequence[np.ndarray]) -> None:
    """Fill the tensors with NaN, so that a token nobody delivered spoils every later one, instead of passing for 0."""
    for tensor in tensors:
        tensor.fill(np.nan)


def copy_tokens(source, target, num_tokens: int) -> None:
    """Copy K and V of the first `num_tokens` positions from one store into another."""
    for layer in range(source.num_layers):
        target.write(layer, 0, *source.read(layer, num_tokens))


def digest(store, num_tokens: int) -> str:
    """Return a hex digest over K and V of the first `num_tokens` positions, the same for every layout."""
    state = hashlib.blake2b(digest_size=16)
    for layer in range(store.num_layers):
        for tensor in store.read(layer, num_tokens):
            state.update(np.ascontiguousarray(tensor).tobytes())
    return state.hexdigest()


def flip_byte(store, num_tokens: int) -> None:
    """Damage one byte: the exponent of one value of the last prompt position in layer 0."""
    keys, values = (tensor.copy() for tensor in store.read(0, num_tokens))
    values[-1, 0].view(np.uint8)[3] ^= 0x7F
    store.write(0, 0, keys, values)


def num_blocks(num_tokens: int, block_tokens: int) -> int:
    """Return how many blocks `num_tokens` positions take."""
    return -(-num_tokens // block_tokens)


def scatter_tables(num_tokens: Sequence[int], block_tokens: int, total_blocks: int, seed: int) -> list[np.ndarray]:
    """Deal disjoint, randomly placed blocks to requests.

    Parameters
    ----------
    num_tokens : sequence of int
        Positions each request needs room for.
    total_blocks : int
        Blocks in the cache, at least the sum of what the requests need.
    seed : int
        Placement; the two sides use different ones, so that no block keeps its number on its way.

    Returns
    -------
    list of numpy.ndarray, int64
        One block table per request.
    """
    counts = [num_blocks(count, block_tokens) for count in num_tokens]
    if sum(counts) > total_blocks:
        raise ValueError(f"total_blocks={total_blocks}: the requests need {sum(counts)}")
    order = np.random.default_rng(seed).permutation(total_blocks).astype(np.int64)
    ends = np.cumsum(counts)
    return [order[end - count : end] for count, end in zip(counts, ends)]
