# SPDX-License-Identifier: Apache-2.0
"""One worker under watch: its events are taken until it ends, crashes, or is silent for too long.

Where it crashes or has to be ended, the case that it ran has failed, with the stacks.
"""

from __future__ import annotations

import time

from portakv_conformance.run.journal import (
    BadRequest,
    Journal,
    Page,
    SubjectUnavailable,
    SuiteBroken,
)
from portakv_conformance.run.record import Status
from portakv_conformance.run.request import Options
from portakv_conformance.run.sharing import Share
from portakv_conformance.run.supervise import Worker

# Seconds before the first case: torch and the backend load, the simulated device may be built.
_STARTING = 600.0
# Seconds that a worker may take to end after its last case.
_ENDING = 60.0
_PYTEST_USAGE = 4  # pytest's exit code where an option, such as an id, makes no sense


class Watch:
    """A worker and what it has told.

    Args:
        worker: the running worker.
        journal: what is known of the whole run.
        share: who has which case.
        options: what was asked for.
    """

    def __init__(self, worker: Worker, journal: Journal, share: Share, options: Options) -> None:
        self.page = Page()
        self._worker, self._journal, self._share = worker, journal, share
        self._options = options
        self._began = self._heard = time.monotonic()
        self._ready = 0.0  # seconds until it had its case list

    def look(self, *, alone: bool = True) -> str | None:
        """Take what the worker has told since: None while it goes on, else how it was lost, a
        sentence, or an empty one where it ended well.

        Args:
            alone: no other worker is there to run what this one does not.

        Raises:
            SubjectUnavailable, BadRequest, SuiteBroken: nothing can be judged.
        """
        ended = self._worker.ended  # asked before reading: what it wrote last must not be missed
        events = self._worker.events(0)
        for event in events:
            self._journal.take(event, self.page)
            if self._journal.stopped:
                return ""
        if events:
            self._heard = time.monotonic()
            self._ready = self._ready or (self._heard - self._began if self.page.listed else 0.0)
            return None
        if ended:
            return self._ended(alone)
        if time.monotonic() - self._heard > self._allowed():
            return self._too_long(alone)
        return None

    def wasted(self) -> float:
        """Seconds that its loss costs: its start, and how long it was silent at its end."""
        return self._ready + time.monotonic() - self._heard

    def stop(self) -> None:
        """End the worker."""
        self._worker.stop()

    def _allowed(self) -> float:
        """Seconds that may pass before the next event."""
        if not self.page.listed:
            return _STARTING
        return _ENDING if self.page.finished else self._options.seconds

    def _over(self) -> bool:
        """It came to the end of its session, and nobody has to run what it was given."""
        if not self.page.finished or self.page.running:
            return False
        return bool(self._journal.ids) and not self._journal.waiting(self._share)

    def _ended(self, alone: bool) -> str:
        """It has ended by itself: well, or with a case."""
        if self._over():
            if self._worker.how.startswith("was killed"):
                self._journal.miss(
                    f"The worker {self._worker.how} after the last case; memory may have been "
                    f"corrupted before."
                )
            return ""
        what = f"The worker process {self._worker.how}"
        if self.page.refusal:
            what = f"A worker could not load the backend, which others could ({self.page.refusal}),"
        return self._lost(what, self._worker.ask_stacks(), alone)

    def _too_long(self, alone: bool) -> str:
        """It is silent: take its stacks, and end it."""
        if self._over():
            self._journal.miss(f"The worker did not end within {_ENDING:g} s of its last case.")
            return ""
        stacks = self._worker.ask_stacks()
        self._worker.stop()
        limit = self._allowed()
        what = f"It took longer than its limit of {limit:g} s; the worker process was killed"
        return self._lost(what, stacks, alone)

    def _lost(self, what: str, stacks: str, alone: bool) -> str:
        """Name the case that it was lost with; returns a sentence for the user."""
        if self.page.retired:
            return f"The device failed behind {self.page.latest} ({self.page.retired})."
        details = "\n\n".join(part for part in (stacks, self._worker.printed()) if part)
        if not self._journal.ids:
            raise self._nothing_begun(what, details)
        if not (self.page.listed or alone):
            return f"{what} before it was ready; the others go on."
        id, status, when = self._at_fault()
        if not id:
            return f"{what} {when}."
        went_on = "; another worker went on with the rest" if self._journal.left_but(id) else ""
        self._journal.lose(id, status, f"{what} {when}{went_on}.", details)
        return f"{what} {when}: {id}"

    def _nothing_begun(self, what: str, details: str) -> Exception:
        """Why a worker was lost before anybody knew the case list."""
        if not self._journal.loading:
            return SuiteBroken(f"{what} before it loaded anything.\n{details}")
        if not self._journal.subject:
            return SubjectUnavailable(f"{what} while the backend was loaded and probed.\n{details}")
        if self._worker.code == _PYTEST_USAGE:
            return BadRequest(self._worker.printed().rpartition("ERROR: ")[2])
        return SuiteBroken(f"{what} before the cases were collected.\n{details}")

    def _at_fault(self) -> tuple[str, Status, str]:
        """The case that it was lost with, how that ended, and when it was, as a clause."""
        if self.page.running:
            return self.page.running, "failed", "while this case ran"
        if self.page.latest:
            return self.page.latest, "failed", "right after this case"
        # None is to blame; one is named, so that a worker that never begins is no endless loop.
        next_one = next((id for id in self._journal.left() if self._share.take(id)), "")
        began = "before this case began" if self.page.listed else "before it was ready"
        return next_one, "error", began
