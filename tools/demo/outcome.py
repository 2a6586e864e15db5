"""What a run of the demo found: each pull and its verdict, and what was left behind."""
from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Transfer:
    """One pull and what came of it.

    Attributes
    ----------
    num_bytes : int
        Bytes pulled.
    seconds : float
        Time the pull call took.
    bytes_equal : bool
        Keys and values of the prompt are those the prefill process wrote.
    tokens_equal : bool
        The generated tokens are those of the single-process run.
    """

    num_bytes: int
    seconds: float
    bytes_equal: bool
    tokens_equal: bool

    @property
    def good(self) -> bool:
        return self.bytes_equal and self.tokens_equal


@dataclass
class Outcome:
    """What a run found.

    Attributes
    ----------
    transfers : list of (Transfer, Transfer)
        Per request: contiguous, paged.
    left : dict of str to dict
        Per process, what its engine still held at the end (`engine.counts`).
    most_held : dict
        The largest counts the prefill process reported on the way; they show that there was something to release.
    """

    transfers: list[tuple[Transfer, Transfer]] = field(default_factory=list)
    left: dict[str, dict[str, int]] = field(default_factory=dict)
    most_held: dict[str, int] = field(default_factory=dict)

    @property
    def good(self) -> bool:
        return all(t.good for pair in self.transfers for t in pair) and not any(
            count for left in self.left.values() for count in left.values()
        )
