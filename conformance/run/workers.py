# SPDX-License-Identifier: Apache-2.0
"""The workers of a run: as many at a time as were asked for, others for those that are lost."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from portakv_conformance.run.journal import Journal
from portakv_conformance.run.progress import Progress
from portakv_conformance.run.request import Options
from portakv_conformance.run.sharing import Share
from portakv_conformance.run.supervise import Worker
from portakv_conformance.run.watch import Watch

# A backend that crashes or hangs everywhere is not worth hours: so many losses in a row, without a
# case between them that came to its end, or so many seconds lost in all.
_MOST_LOSSES = 20
_MOST_SECONDS = 1800.0
_PROGRESS = 2  # cases that have to end between two losses, so that they are not in a row
_POLL = 0.02  # seconds between two looks at the workers
# Threads of each of several workers at once: two, so that kernels with threads still run so.
_LEAST_THREADS = 2


class Crew:
    """Workers that share one case list.

    Args:
        journal: what is known of the run.
        options: what was asked for.
        progress: who is told of workers that were lost.
        folder: an empty folder for the files of all workers.
        command: what runs a worker, to which the file of its orders is added.
    """

    def __init__(
        self,
        journal: Journal,
        options: Options,
        progress: Progress,
        folder: Path,
        command: Sequence[str],
    ) -> None:
        self._journal, self._options, self._progress = journal, options, progress
        self._folder, self._command = folder, command
        (folder / "taken").mkdir()
        self._share = Share(folder / "taken")
        self._watches: list[Watch] = []
        self._jobs = options.jobs
        self._started = self._losses = self._ran = 0
        self._seconds = 0.0  # that losses have cost: workers that began, cases that hung

    def work(self) -> None:
        """Run every case of the list, or up to the first failure where that is enough.

        Raises:
            SubjectUnavailable, BadRequest, SuiteBroken: nothing can be judged.
        """
        try:
            while not self._journal.stopped and self._go_on():
                if not self._look():
                    time.sleep(_POLL)
        finally:
            for watch in self._watches:
                watch.stop()

    def _go_on(self) -> bool:
        """Start the workers that are wanting; False where there is nothing left to do."""
        why = self._hopeless()
        if why:
            self._give_up(why)
            return False
        if not self._watches:
            for id in self._journal.left():  # taken by a worker that was lost before it began
                self._share.give_back(id)
        while len(self._watches) < self._jobs and self._wanting():
            self._watches.append(self._start())
        return bool(self._watches)

    def _wanting(self) -> bool:
        """Whether another worker would find a case to run. The first one lists them, alone."""
        if not self._journal.ids:
            return not self._watches
        starting = sum(not watch.page.listed for watch in self._watches)
        return len(self._journal.waiting(self._share)) > starting

    def _start(self) -> Watch:
        self._started += 1
        folder = self._folder / str(self._started)
        told = [*self._options.suite_options(), "--portakv-share", str(self._folder / "taken")]
        if self._options.only:
            only = folder.with_suffix(".only")
            only.write_text("".join(f"{id}\n" for id in self._options.only), encoding="utf-8")
            told += ["--portakv-only", str(only)]
        asked = self._options
        worker = Worker(
            self._command, folder, asked.backend, asked.device, asked.emulated, told,
            surroundings(asked.jobs),
        )  # fmt: skip
        return Watch(worker, self._journal, self._share, asked)

    def _look(self) -> bool:
        """Look at every worker once; False where none of them is done."""
        done = False
        for watch in list(self._watches):
            lost = watch.look(alone=len(self._watches) == 1)
            if self._journal.stopped:
                return True
            if lost is not None:
                done = True
                self._remove(watch, lost)
        return done

    def _remove(self, watch: Watch, lost: str) -> None:
        watch.stop()
        self._watches.remove(watch)
        if not lost:
            return
        self._progress.say(lost)
        if self._watches and not watch.page.listed:
            self._jobs -= 1  # there is no room for so many, on the device or in memory
        else:
            # A worker that ended with the first case that it took has got the run no further.
            between = self._journal.ran - self._ran
            self._losses = self._losses + 1 if between < _PROGRESS else 1
            self._ran = self._journal.ran
            self._seconds += watch.wasted()

    def _hopeless(self) -> str:
        """Why it makes no sense to go on, as a clause; empty where it does."""
        if self._losses >= _MOST_LOSSES:
            return f"the worker had been lost {_MOST_LOSSES} times in a row"
        if self._losses and self._seconds > _MOST_SECONDS:
            return f"lost workers had cost more than {_MOST_SECONDS / 60:g} minutes"
        return ""

    def _give_up(self, why: str) -> None:
        self._progress.say(f"The other cases are not run: {why}.")
        for id in self._journal.left():
            self._journal.lose(id, "error", f"It was not run: {why}.", "")


def surroundings(jobs: int) -> dict[str, str]:
    """Variables that keep several workers from fighting for the cores; what the user set stands."""
    if jobs == 1:
        return {}
    threads = max(_LEAST_THREADS, len(os.sched_getaffinity(0)) // jobs)
    wanted = {"OMP_NUM_THREADS": str(threads), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    return {name: value for name, value in wanted.items() if name not in os.environ}
