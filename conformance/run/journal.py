# SPDX-License-Identifier: Apache-2.0
"""What is known of a run so far, from the events of its workers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from portakv_conformance import SUITE_VERSION
from portakv_conformance.evidence.verdict import WRONG
from portakv_conformance.judge.waivers import judged
from portakv_conformance.record import CaseRecord, Status
from portakv_conformance.run.progress import Progress
from portakv_conformance.run.request import Options, chosen
from portakv_conformance.run.worker import Share


class SubjectUnavailable(Exception):
    """The backend cannot run here; the text is the probe's reason."""


class BadRequest(Exception):
    """What was asked for cannot be understood: a malformed name, an unknown case."""


class SuiteBroken(Exception):
    """The suite itself could not be run; the text holds what the worker printed."""


#: Failing examples that are kept as files, of drawn cases and of all others each; of a backend
#: that is wrong everywhere more say no more.
MOST_EXAMPLES = 20
_DRAWN = ("drawn", "metamorphic", "stateful")  # areas


@dataclass
class Page:
    """What one worker has told.

    Attributes:
        running, latest: the id of the case that runs, and of the one that ended last; or empty.
        listed, finished: whether it collected its cases, and came to the end of its session.
        refusal: why it could not load what others have loaded; or empty.
        retired: why it ended itself behind a case that has failed; or empty.
    """

    running: str = ""
    latest: str = ""
    listed: bool = False
    finished: bool = False
    refusal: str = ""
    retired: str = ""


class Journal:
    """The cases of a run and how they ended, over all of its workers.

    Attributes:
        loading: a worker has begun to load the backend: the suite itself is in order.
        subject: the event that introduced what is judged.
        ids: the case list, in the order of execution; empty before it is known.
        cases: by id, what has ended.
        missing: sentences: what cannot be run here.
        lone: how many cases were left out since there is one real device only.
        ran: how many cases came to an end by themselves.
        stopped: the first failure was all that was asked for, and it happened.
    """

    def __init__(self, options: Options, progress: Progress) -> None:
        self._options = options
        self._progress = progress
        self._waivers = {waiver.id: waiver for waiver in options.waivers}
        self._about: dict[str, dict[str, Any]] = {}
        self.loading = False
        self.subject: dict[str, Any] = {}
        self.ids: list[str] = []
        self.cases: dict[str, CaseRecord] = {}
        self.missing: list[str] = []
        self.lone = self.ran = 0
        self.stopped = False
        self._examples = {True: 0, False: 0}  # by whether the case draws them

    def left(self) -> list[str]:
        """Ids that have not ended, in their order."""
        return [id for id in self.ids if id not in self.cases]

    def waiting(self, share: Share) -> list[str]:
        """Ids that nobody has taken yet."""
        return [id for id in self.left() if not share.taken(id)]

    def take(self, event: dict[str, Any], page: Page) -> None:
        """One event of the worker whose page it is.

        Raises:
            SubjectUnavailable, BadRequest: it tells that nothing can be judged.
            SuiteBroken: it is none that a suite of this version writes.
        """
        kind = event.get("event")
        if kind == "loading":
            self.loading = True
        elif kind == "subject":
            self.subject = self.subject or event
        elif kind in ("unavailable", "usage"):
            self._take_refusal(kind, event["reason"], page)
        elif kind == "list":
            page.listed = True
            self._take_list(event["cases"], event["profile"])
            self.lone = event["lone"]
        elif kind == "missing":
            self.miss(event["reason"])
        elif kind == "start":
            page.running = event["id"]
            self._progress.started(page.running)
        elif kind == "end":
            self._take_end(event["case"], page)
        elif kind == "finish":
            page.finished = True
        elif kind == "retired":
            page.retired = event["reason"]
        else:
            raise SuiteBroken(f"A worker told of {event!r}, which no suite of this version does.")

    def _take_refusal(self, kind: str, reason: str, page: Page) -> None:
        """A worker tells that there is nothing to judge. Where others found it, only it is lost."""
        if self.subject:
            page.refusal = reason
        elif kind == "usage":
            raise BadRequest(reason)
        else:
            raise SubjectUnavailable(reason)

    def _take_list(self, cases: dict[str, dict[str, Any]], profile: list[str]) -> None:
        if self.ids:
            return
        ids, self._about = list(cases), cases
        only = self._options.only
        stale = sorted(set(self._waivers) - set(profile)) if only else []
        if stale:  # a whole run fails by it; of a part nobody else would notice
            raise BadRequest(
                f"A waiver names {stale[0]!r}, but no case of the profile has that id; remove it."
            )
        self.ids, unknown = chosen(ids, only) if only else (ids, [])
        if unknown:
            raise BadRequest(
                f"Case {unknown[0]!r} was asked for, but the profile {self._options.profile!r} on "
                f"{self._options.device} has none of that name; `portakv conform --list` prints "
                f"the ids."
            )
        if not self.ids:
            raise SuiteBroken(f"The profile {self._options.profile!r} has no case here.")
        self._progress.listed(len(self.ids))

    def _take_end(self, values: dict[str, Any], page: Page) -> None:
        try:
            case = CaseRecord.read(values)
        except (ValueError, KeyError) as error:
            raise SuiteBroken(f"A worker told of a case that is no record: {error}") from error
        page.running, page.latest = "", case.id
        self.ran += 1
        if case.example and self._options.examples is not None:
            drawn = case.area in _DRAWN
            self._examples[drawn] += 1
            if self._examples[drawn] > MOST_EXAMPLES:
                (self._options.examples / case.example).unlink(missing_ok=True)
                case.example = ""
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
        case = self.cases.get(id) or CaseRecord(id, **self._about[id])
        case.status, case.reason, case.details = status, reason, details
        self.settle(case)

    def miss(self, sentence: str) -> None:
        """Something that could not be run here."""
        if sentence not in self.missing:
            self.missing.append(sentence)
