"""Carrying out a plan: sessions per data path, rows and figures one after the other, failures kept beside results."""
from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from . import goals, results
from .case import Case
from .channel import ChannelError
from .engine import limit_paths
from .figures import FIGURES
from .plan import Plan, default_threads
from .progress import Progress
from .session import Session


@dataclass
class Runner:
    """Measures a plan.

    Parameters
    ----------
    remote : tuple of (str, int), optional
        Where peers are started; default: on this host.
    corrupt : int, optional
        Diagnostic: the row in whose result one byte is damaged before it is verified.
    on_row, on_figure, on_failure : callable
        Called with what has just been measured, or with (name, text) of what failed.
    """

    remote: tuple[str, int] | None = None
    corrupt: int | None = None
    on_row: Callable[[dict], None] = lambda row: None
    on_figure: Callable[[dict], None] = lambda figure: None
    on_failure: Callable[[str, str], None] = lambda name, text: None
    failures: list[dict] = field(default_factory=list)

    def run(self, plan: Plan, progress: Progress) -> dict:
        """Return the result of a run, ready to be written."""
        started, load_before, begin = time.strftime("%Y-%m-%dT%H:%M:%S%z"), results.load(), time.monotonic()
        rows = self._rows(plan, progress)
        figures = self._figures(plan, progress)
        return {
            "format": results.FORMAT, "command": results.command_line(sys.argv[1:]), "started": started,
            "seconds": round(time.monotonic() - begin, 1), "machine": results.machine(),
            "load": {"before": load_before, "after": results.load()}, "rows": rows, "figures": figures,
            "goals": goals.judge(rows, figures), "failures": self.failures, "skipped": list(plan.skipped),
        }

    def _rows(self, plan: Plan, progress: Progress) -> list[dict]:
        found = []
        numbered = list(enumerate(plan.cases))
        for settings, group in itertools.groupby(numbered, lambda each: _settings(each[1])):
            cases = list(group)
            num_peers = max(case.num_links for _, case in cases)
            session: Session | None = None
            try:
                for index, case in cases:
                    progress.begin(case.label)
                    try:
                        if session is None:
                            session = Session(limit_paths(*settings), num_peers, self.remote)
                        row = session.measure(case, plan.seconds, index == self.corrupt, progress.within)
                    except ChannelError as error:
                        self._failed(case.label, str(error), progress)
                        session = _abandon(session)
                    else:
                        found.append(row)
                        progress.clear()
                        self.on_row(row)
                    progress.end()
            except BaseException:
                _abandon(session)
                raise
            if session is not None:
                session.close()
        return found

    def _figures(self, plan: Plan, progress: Progress) -> list[dict]:
        found = []
        for name in plan.figures:
            figure = FIGURES[name]
            progress.begin(figure.text)
            session: Session | None = None
            try:
                session = Session(limit_paths(figure.path, default_threads(), 1), figure.num_peers)
                measured = session.figure(name, plan.seconds, progress.within)
            except ChannelError as error:
                self._failed(figure.text, str(error), progress)
                _abandon(session)
            except BaseException:
                _abandon(session)
                raise
            else:
                found.append({"figure": name, "text": figure.text, **measured})
                progress.clear()
                self.on_figure(found[-1])
                session.close()
            progress.end()
        return found

    def _failed(self, name: str, text: str, progress: Progress) -> None:
        self.failures.append({"name": name, "text": text})
        progress.clear()
        self.on_failure(name, text)


def _settings(case: Case) -> tuple[str, int, int]:
    return case.path, case.num_threads, case.num_streams


def _abandon(session: Session | None) -> None:
    """End a session whose state is unknown."""
    if session is not None:
        session.kill()
