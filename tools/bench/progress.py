"""A progress line on a terminal; nothing elsewhere."""
from __future__ import annotations

import sys
import time
from typing import TextIO

_WIDTH = 24
_LEAST_SECONDS = 0.1


class Progress:
    """Counts steps; leaving the context clears the line.

    Parameters
    ----------
    num_steps : int
    stream : TextIO, optional
        Default: standard error. One that is no terminal gets nothing.
    """

    def __init__(self, num_steps: int, stream: TextIO | None = None) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._num_steps, self._step, self._text = max(1, num_steps), 0, ""
        self._start = time.monotonic()
        self._shown = 0.0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_exception) -> None:
        self.clear()

    def begin(self, text: str) -> None:
        """Name the step that begins."""
        self._text = text
        self._show(0.0, force=True)

    def within(self, fraction: float) -> None:
        """Say how far the current step is."""
        self._show(min(max(fraction, 0.0), 1.0))

    def end(self) -> None:
        """Count the current step as done."""
        self._step += 1

    def clear(self) -> None:
        """Remove the line, so that something else can be printed."""
        if self._stream.isatty():
            print("\r\x1b[K", end="", file=self._stream, flush=True)

    def _show(self, fraction: float, force: bool = False) -> None:
        now = time.monotonic()
        if not self._stream.isatty() or (not force and now - self._shown < _LEAST_SECONDS):
            return
        self._shown = now
        done = min(1.0, (self._step + fraction) / self._num_steps)
        bar = "#" * round(_WIDTH * done)
        passed = now - self._start
        left = f"{passed / done - passed:4.0f} s left" if done > 0.05 else ""
        print(f"\r\x1b[K[{bar:<{_WIDTH}}] {100 * done:3.0f} % {left}  {self._text[:60]}", end="", file=self._stream,
              flush=True)
