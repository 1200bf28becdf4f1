# SPDX-License-Identifier: Apache-2.0
"""What is known of a run so far, from the events of its workers."""

from __future__ import annotations

from typing import Any

from . import SUITE_VERSION
from .progress import Progress
from .records import CaseRecord, Status
from .request import Options
from .verdict import WRONG
from .waivers import judged


class SubjectUnavailable(Exception):
    """The backend cannot run here; the text is the probe's reason."""


class BadRequest(Exception):
    """What was asked for cannot be understood: a malformed name, an unknown case."""


class SuiteBroken(Exception):
    """The suite itself could not be run; the text holds what the worker printed."""


class Journal:
    """The cases of a run and how they ended, over all of its workers.

    Attributes:
        loading: a worker has begun to load the backend: the suite itself is in order.
        subject: the event that introduced what is judged.
        ids: the case list, in the order of execution; empty before it is known.
        cases: by id, what has ended.
        missing: sentences: what cannot be run here.
        running, latest: of the present worker, the id of the case that runs, and that of the one
            that ended last; or empty.
        listed, finished: of the present worker, whether it collected its cases and whether it
            came to the end of its session.
        stopped: the first failure was all that was asked for, and it happened.
    """

    def __init__(self, options: Options, progress: Progress) -> None:
        self._options = options
        self._progress = progress
        self._waivers = {waiver.id: waiver for waiver in options.waivers}
        self._described: dict[str, dict[str, Any]] = {}
        self.loading = False
        self.subject: dict[str, Any] = {}
        self.ids: list[str] = []
        self.cases: dict[str, CaseRecord] = {}
        self.missing: list[str] = []
        self.stopped = False
        self.turn_the_page()

    def turn_the_page(self) -> None:
        """A new worker begins."""
        self.running = self.latest = ""
        self.listed = self.finished = False

    @property
    def over(self) -> bool:
        """The present worker came to the end of its session, and nothing is left to run."""
        return self.finished and bool(self.ids) and not self.left()

    def left(self) -> list[str]:
        """Ids that have not ended, in their order."""
        return [id for id in self.ids if id not in self.cases]

    def take(self, event: dict[str, Any]) -> None:
        """One event of the present worker.

        Raises:
            SubjectUnavailable, BadRequest: it tells that nothing can be judged.
            SuiteBroken: it is none that a suite of this version writes.
        """
        kind = event.get("event")
        if kind == "loading":
            self.loading = True
        elif kind == "subject":
            self.subject = self.subject or event
        elif kind == "unavailable":
            raise SubjectUnavailable(event["reason"])
        elif kind == "usage":
            raise BadRequest(event["reason"])
        elif kind == "list":
            self._take_list(event["ids"])
        elif kind == "missing":
            self.miss(event["reason"])
        elif kind == "described":
            self._described |= event["cases"]
        elif kind == "start":
            self.running = event["id"]
            self._progress.started(self.running)
        elif kind == "end":
            self._take_end(event["case"])
        elif kind == "finish":
            self.finished = True
        else:
            raise SuiteBroken(f"A worker told of {event!r}, which no suite of this version does.")

    def _take_list(self, ids: list[str]) -> None:
        self.listed = True
        if self.ids:
            return
        unknown = [id for id in self._options.only if id not in ids]
        if unknown:
            raise BadRequest(
                f"Case {unknown[0]!r} was asked for, but the profile {self._options.profile!r} on "
                f"{self._options.device} has none of that name; a report lists the ids."
            )
        self.ids = [id for id in ids if not self._options.only or id in self._options.only]
        if not self.ids:
            raise SuiteBroken(f"The profile {self._options.profile!r} has no case here.")
        self._progress.listed(len(self.ids))

    def _take_end(self, values: dict[str, Any]) -> None:
        try:
            case = CaseRecord.read(values)
        except (ValueError, KeyError) as error:
            raise SuiteBroken(f"A worker told of a case that is no record: {error}") from error
        self.running, self.latest = "", case.id
        self.settle(case)

    def settle(self, case: CaseRecord) -> None:
        """How a case ended, after its waiver."""
        again = case.id in self.cases
        case.replay = self._options.command(case.id)
        case = judged(case, self._waivers.get(case.id), SUITE_VERSION)
        self.cases[case.id] = case
        if not again:
            self._progress.ended(case)
        if case.status in WRONG and self._options.exit_first:
            self.stopped = True

    def lose(self, id: str, status: Status, reason: str, details: str) -> None:
        """A case that its worker was lost with, or that was never run."""
        case = self.cases.get(id)
        if case is None:
            told = self._described.get(id, {"area": "core", "profile": self._options.profile})
            case = CaseRecord(id, **told)
        case.status, case.reason, case.details = status, reason, details
        self.settle(case)

    def miss(self, sentence: str) -> None:
        """Something that could not be run here."""
        if sentence not in self.missing:
            self.missing.append(sentence)
