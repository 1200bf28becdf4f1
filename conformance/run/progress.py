# SPDX-License-Identifier: Apache-2.0
"""Show a run on standard error while it goes on: a bar, or plain lines."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from portakv_conformance.evidence.verdict import WRONG
from portakv_conformance.record import CaseRecord

_EVERY = 5.0  # seconds between two plain lines if nothing is wrong
_MOST_WRONG = 20  # failures that are shown while a run goes on; the summary groups all of them


class Progress:
    """A listener to the events of a run; this base class shows nothing."""

    _wrong = 0
    at = ""  # how far the run has come, if a line has to say it

    def listed(self, count: int) -> None:
        """Note how many cases the run has."""

    def started(self, id: str) -> None:
        """Note that a case begins."""

    def ended(self, case: CaseRecord) -> None:
        """Note the end of a case; show the first failures, and that there are more."""
        self._wrong += case.status in WRONG
        if case.status in WRONG and self._wrong <= _MOST_WRONG:
            self.say(f"{self.at}{case.status}: {case.id}")
        elif case.status in WRONG and self._wrong == _MOST_WRONG + 1:
            self.say(f"{self.at}More failures are shown at the end.")

    def say(self, sentence: str) -> None:
        """Print a sentence on the run itself."""


SILENT = Progress()


class Lines(Progress):
    """Plain lines: each failure immediately, and the progress every few seconds."""

    def __init__(self) -> None:
        self._count = 0
        self._done = 0
        self._shown_at = time.monotonic()

    def listed(self, count: int) -> None:
        self._count = count
        self.say("1 case" if count == 1 else f"{count} cases")

    def started(self, id: str) -> None:
        if time.monotonic() - self._shown_at > _EVERY:
            self.say(f"{self._done}/{self._count} {id}")

    def ended(self, case: CaseRecord) -> None:
        self._done += 1
        self.at = f"{self._done}/{self._count} "
        super().ended(case)

    def say(self, sentence: str) -> None:
        self._shown_at = time.monotonic()
        print(sentence, file=sys.stderr, flush=True)


class Bar(Progress):
    """A bar of rich with the running case; failures scroll by above it."""

    def __init__(self, progress: Any) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=None, case="loading the backend")

    def listed(self, count: int) -> None:
        self._progress.update(self._task, total=count)

    def started(self, id: str) -> None:
        self._progress.update(self._task, case=id.removeprefix("cases/"))

    def ended(self, case: CaseRecord) -> None:
        self._progress.advance(self._task)
        super().ended(case)

    def say(self, sentence: str) -> None:
        plain = {"markup": False, "emoji": False, "highlight": False, "soft_wrap": True}
        self._progress.console.print(sentence, **plain)


@contextmanager
def shown() -> Iterator[Progress]:
    """Show a bar if standard error is a terminal and rich is installed, else plain lines."""
    try:
        if not sys.stderr.isatty():
            raise ImportError
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as RichProgress
        from rich.table import Column
    except ImportError:
        yield Lines()
        return
    rest = Column(no_wrap=True, ratio=1)
    running = TextColumn("{task.fields[case]}", markup=False, table_column=rest)
    columns = (BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn(), running)
    console = Console(stderr=True)
    with RichProgress(*columns, console=console, transient=True, expand=True) as progress:
        yield Bar(progress)
