# SPDX-License-Identifier: Apache-2.0
"""The state of a run: its case list, the end of each case, and what could not be run."""

from __future__ import annotations

from collections import Counter

from portakv_conformance import SUITE_VERSION
from portakv_conformance.evidence.verdict import WRONG
from portakv_conformance.judge.waivers import judged
from portakv_conformance.record import CaseRecord, JsonObject, Status
from portakv_conformance.run.progress import Progress
from portakv_conformance.run.request import Options
from portakv_conformance.run.worker import Share


class SubjectUnavailable(Exception):
    """The backend cannot run here; the text is the probe's reason."""


class BadRequest(Exception):
    """The request is not valid: a malformed name, or an unknown case."""


class SuiteBroken(Exception):
    """The suite itself could not be run; the text holds what the worker printed."""


#: Failing examples that are kept as files, of drawn cases and of all others each; of a backend
#: that is wrong everywhere more say no more.
MOST_EXAMPLES = 20
_DRAWN = ("drawn", "metamorphic", "stateful")  # areas


class Journal:
    """The cases of a run and how they ended, over all of its workers."""

    def __init__(self, options: Options, progress: Progress) -> None:
        self._options = options
        self.progress = progress
        self._waivers = {waiver.id: waiver for waiver in options.waivers}
        self._about: dict[str, JsonObject] = {}
        self._examples: Counter[bool] = Counter()  # by whether the case draws them
        self.loading = False  # a worker has begun to load the backend: the suite is in order
        self.stopped = False  # after the first failure, if the run was to end there
        self.subject: JsonObject = {}  # the event that introduced what is judged
        self.ids: list[str] = []  # the case list, in the order of execution, once it is known
        self.cases: dict[str, CaseRecord] = {}  # by id, what has ended
        self.missing: list[str] = []  # sentences: what cannot be run here
        self.lone = 0  # cases that were left out since there is one real device only
        self.ran = 0  # cases that came to an end by themselves

    def left(self) -> list[str]:
        """Return the ids that have not ended, in their order."""
        return [id for id in self.ids if id not in self.cases]

    def waiting(self, share: Share) -> list[str]:
        """Return the ids that no worker has taken yet."""
        return [id for id in self.left() if not share.taken(id)]

    def take_list(self, event: JsonObject) -> None:
        """Take the case list that each worker reports; raises `BadRequest`, `SuiteBroken`."""
        self.lone = event["lone"]
        if self.ids:
            return
        stale = sorted(set(self._waivers) - set(event["profile"]))
        if stale and self._options.only:  # a whole run fails by it; in a part nothing else shows it
            raise BadRequest(
                f"Expected waivers of cases of the profile, got a waiver of {stale[0]!r}. "
                f"Remove it."
            )
        self._about = event["cases"]
        self.ids = list(event["cases"])
        if not self.ids:
            raise SuiteBroken(f"Expected cases in profile {self._options.profile!r}, got none.")
        self.progress.listed(len(self.ids))

    def take_end(self, values: JsonObject) -> str:
        """Take a case that ended by itself; return its id. `SuiteBroken`: it is not a record."""
        try:
            case = CaseRecord.read(values)
        except (ValueError, KeyError) as error:
            raise SuiteBroken(f"Expected a case record of a worker, got: {error}") from error
        self.ran += 1
        drawn = case.area in _DRAWN
        folder = self._options.examples
        self._examples[drawn] += bool(case.example)
        if case.example and folder is not None and self._examples[drawn] > MOST_EXAMPLES:
            (folder / case.example).unlink(missing_ok=True)
            case.example = ""
        self._settle(case)
        return case.id

    def lose(self, id: str, status: Status, reason: str, details: str) -> None:
        """Note a case whose worker was lost during it, or a case that never ran."""
        case = self.cases.get(id) or CaseRecord(id, **self._about[id])
        case.status = status
        case.reason = reason
        case.details = details
        self._settle(case)

    def miss(self, sentence: str) -> None:
        """Note a sentence on something that cannot run here."""
        if sentence not in self.missing:
            self.missing.append(sentence)

    def _settle(self, case: CaseRecord) -> None:
        """Return the status of a case after its waiver."""
        again = case.id in self.cases
        case.replay = self._options.command(case.id)
        case = judged(case, self._waivers.get(case.id), SUITE_VERSION)
        self.cases[case.id] = case
        if not again:
            self.progress.ended(case)
        self.stopped |= case.status in WRONG and self._options.exit_first
