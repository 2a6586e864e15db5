"""What the demo prints: one row per request as soon as it is done, totals, verdicts and what is left."""
from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from .outcome import Outcome, Transfer
    from .workload import Settings

_WAY_HEADER = f"{'bytes':>12}{'ms':>9}{'GB/s':>8}  {'verdict':<17}"
_COUNT_NAMES = {"caches": "caches", "keys": "keys", "pins": "pins", "pool_bytes": "pool bytes"}


class Report:
    """Writes to `stream`; the step at hand is shown on `progress_stream` when that is a terminal."""

    def __init__(self, stream: TextIO | None = None, progress_stream: TextIO | None = None) -> None:
        self._stream = stream if stream is not None else sys.stdout
        self._progress = progress_stream if progress_stream is not None else sys.stderr

    def header(self, settings: Settings, source: str) -> None:
        """Describe the run."""
        model, lengths = settings.model, settings.lengths
        kib = settings.num_tensors * model.token_bytes / 1024
        self._line(
            f"text: {source}; {len(lengths)} requests of {min(lengths)} to {max(lengths)} tokens, "
            f"{settings.num_new_tokens} new tokens each"
        )
        self._line(
            f"model: {model.num_layers} layers, {model.num_heads} heads of {model.head_size}, float32, "
            f"seed {model.seed}; {kib:g} KiB of keys and values per token, blocks of {settings.block_tokens} tokens"
        )

    def linked(self, pid: int, address: str) -> None:
        """Say that the processes found each other, and open the table."""
        self._line(f"prefill process {pid} listens on {address}; this process decodes and is linked to it\n")
        self._line(f"{'':17}{'one slot per request':<48}scattered blocks")
        self._line(f"{'request':>7}{'tokens':>8}{_WAY_HEADER}{_WAY_HEADER}")

    def row(self, request: int, num_tokens: int, transfers: tuple[Transfer, Transfer]) -> None:
        """Print one request."""
        self._line(f"{request:>7}{num_tokens:>8}{''.join(_way(t) for t in transfers)}")

    def progress(self, text: str) -> None:
        """Show what is going on now; the next line replaces it."""
        if self._progress.isatty():
            print(f"\r\x1b[K{text} ...", end="", file=self._progress, flush=True)

    def end(self) -> None:
        """Clear the progress line."""
        if self._progress.isatty():
            print("\r\x1b[K", end="", file=self._progress, flush=True)

    def summary(self, outcome: Outcome) -> None:
        """Print totals, verdicts and what either engine still holds."""
        for name, transfers in zip(("one slot per request", "scattered blocks"), zip(*outcome.transfers)):
            num_bytes, seconds = sum(t.num_bytes for t in transfers), sum(t.seconds for t in transfers)
            num_good = sum(t.good for t in transfers)
            self._line(
                f"{name}: {num_good} of {len(transfers)} requests equal the single-process run; "
                f"{num_bytes} bytes at {num_bytes / seconds / 1e9:.2f} GB/s"
            )
        self._line(f"held by prefill at most: {_counts(outcome.most_held)}")
        for name, left in outcome.left.items():
            self._line(f"left in {name}: {_counts(left)}")
        references = sum(left[name] for left in outcome.left.values() for name in ("caches", "keys", "pins"))
        self._line(f"references left: {references}")
        self._line("demo passed" if outcome.good else "demo FAILED")

    def _line(self, text: str) -> None:
        self.end()
        print(text.rstrip(" "), file=self._stream, flush=True)


def _way(transfer: Transfer) -> str:
    milliseconds, rate = transfer.seconds * 1e3, transfer.num_bytes / transfer.seconds / 1e9
    faults = [] if transfer.bytes_equal else ["bytes"]
    faults += [] if transfer.tokens_equal else ["tokens"]
    verdict = f"{'+'.join(faults).upper()} DIFFER" if faults else "same"
    return f"{transfer.num_bytes:>12}{milliseconds:>9.3f}{rate:>8.2f}  {verdict:<17}"


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{text} {counts[name]}" for name, text in _COUNT_NAMES.items())
