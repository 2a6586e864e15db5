"""What the two processes agree on before they start: model shape, prompts, layout, limits."""
from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from . import kv
from .model import ModelConfig, encode

PREFILL_CLUSTER_ID = 1
DECODE_CLUSTER_ID = 2
BLOCKS_MODEL_ID = 0
# Twice the blocks the requests need, so that their tables are scattered rather than merely shuffled.
_SPARE_BLOCKS_FACTOR = 2
_PAGE_SHIFT = 16


@dataclass(frozen=True)
class Settings:
    """One run of the demo; sent to the prefill process when it starts.

    Attributes
    ----------
    model : ModelConfig
    prompts : tuple of tuple of int
        Token ids per request; the request id is the position in this tuple.
    num_new_tokens : int
        Tokens to generate per request, at least 1.
    block_tokens : int
        Positions in one block of the paged layout, at least 1.
    sync_timeout_ms : int
        Deadline of a single pull.
    """

    model: ModelConfig
    prompts: tuple[tuple[int, ...], ...]
    num_new_tokens: int = 32
    block_tokens: int = 16
    sync_timeout_ms: int = 10_000

    def __post_init__(self) -> None:
        for name in ("num_new_tokens", "block_tokens", "sync_timeout_ms"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if not self.prompts or not all(self.prompts):
            raise ValueError("prompts: at least one is needed, and none may be empty")

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each prompt."""
        return tuple(len(prompt) for prompt in self.prompts)

    @property
    def num_tensors(self) -> int:
        """K and V of every layer."""
        return 2 * self.model.num_layers

    @property
    def slot_shape(self) -> list[int]:
        """Shape of a contiguous cache: one slot for the longest prompt and what it grows by."""
        return [1, max(self.lengths) + self.num_new_tokens, self.model.num_heads, self.model.head_size]

    @property
    def total_blocks(self) -> int:
        """Blocks in the paged cache of either side."""
        grown = (kv.num_blocks(length + self.num_new_tokens, self.block_tokens) for length in self.lengths)
        return _SPARE_BLOCKS_FACTOR * sum(grown)

    @property
    def blocks_shape(self) -> list[int]:
        """Shape of the paged cache of either side."""
        return [self.total_blocks, self.block_tokens, self.model.num_heads, self.model.head_size]

    def pool_config(self, num_slots: int) -> str:
        """Return `mem_pool_cfg` for one paged cache and `num_slots` contiguous ones."""
        tokens_per_tensor = (self.total_blocks * self.block_tokens, *[self.slot_shape[1]] * num_slots)
        page = 1 << _PAGE_SHIFT
        pages = sum(-(-tokens * self.model.token_bytes // page) for tokens in tokens_per_tensor)
        return f'{{"memory_size": {(self.num_tensors * pages) << _PAGE_SHIFT}, "page_shift": {_PAGE_SHIFT}}}'


def cut_prompts(text: str, num_requests: int, shortest: int, longest: int, seed: int) -> tuple[tuple[int, ...], ...]:
    """Cut a text into prompts whose lengths grow geometrically from `shortest` to `longest`.

    Parameters
    ----------
    text : str
        Its UTF-8 form has at least `shortest` bytes; `longest` is lowered to what it has.
    num_requests : int
        At least 1.
    shortest, longest : int
        Tokens, 1 <= shortest <= longest.
    seed : int
        Decides where in the text each prompt starts.

    Raises
    ------
    ValueError
        One of these rules is broken; the message names the value.
    """
    if num_requests < 1:
        raise ValueError(f"requests={num_requests}: at least 1 is needed")
    if not 1 <= shortest <= longest:
        raise ValueError(f"prompt lengths {shortest} to {longest}: need 1 <= shortest <= longest")
    tokens = encode(text)
    if len(tokens) < shortest:
        raise ValueError(f"the text has {len(tokens)} bytes: a prompt needs at least {shortest}")
    longest = min(longest, len(tokens))
    rng = random.Random(seed)
    prompts = []
    for index in range(num_requests):
        length = round(shortest * (longest / shortest) ** (index / max(1, num_requests - 1)))
        start = rng.randrange(len(tokens) - length + 1)
        prompts.append(tuple(tokens[start : start + length]))
    return tuple(prompts)


def default_text() -> str:
    """Return the text that ships with the demo."""
    return (Path(__file__).parent / "paged_kv.txt").read_text(encoding="utf-8")
