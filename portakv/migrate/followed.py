# SPDX-License-Identifier: Apache-2.0
"""The offers of a pull whose rows are not complete, and how far they are known to be.

The reader's `Housekeeper` reads the marks of owners whose memory is mapped, and asks the others. A
worker then issues the copies of the rows that have become complete.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

from portakv.errors import PeerError, PortaKVError
from portakv.graph.task import Task
from portakv.migrate.channel import Channel
from portakv.migrate.connections import Source, Sources
from portakv.migrate.messages import MOST_NAMES, Answer, Marked, Marks
from portakv.migrate.questions import OwnerKey, Questions

#: Stops a pull by an error.
Stop: TypeAlias = Callable[[PortaKVError], object]


def incomplete(sources: Sources) -> bool:
    """Return True if rows of some offers are not complete, as far as this process can see."""
    for source in sources:  # noqa: SIM110 - each pull asks; a generator is two more calls
        if source.ticket.progress and source.mark < source.end:
            return True
    return False


class Followed:
    """The marks of a pull's offers.

    Args:
        sources: of the pull.
        whole: a worker goes on only when all rows are complete.
        advance: has a worker issue what the marks allow, or end the pull; returns its task.

    Attributes:
        marks: the last known mark of each source.
        issued: set when nothing more will be issued.
    """

    def __init__(self, sources: Sources, whole: bool, advance: Callable[[], Task | None]) -> None:
        self.sources = sources
        self.marks = [0] * len(sources)
        self.issued = threading.Event()
        self._whole = whole
        self._advance = advance
        self._used: list[int] | None = None  # the marks that a worker has used
        self._turn = threading.Lock()  # a worker has it: no two issue copies of one pull
        self._task: Task | None = None  # of the last worker

    @property
    def complete(self) -> bool:
        """Return True if all rows of all offers are complete."""
        pairs = zip(self.sources, self.marks, strict=False)  # the sources may have been released
        return all(mark >= source.end for source, mark in pairs)

    def look(self) -> None:
        """Read the marks in shared memory; have a worker go on if it can."""
        for number, source in enumerate(self.sources):
            if source.ticket.progress:
                self.marks[number] = max(self.marks[number], source.mark)
        if self.complete or not (self._whole or self.marks == self._used):
            self.go_on()

    def go_on(self) -> None:
        """Have a worker issue copies or end the pull, unless one does."""
        if self._turn.acquire(blocking=False) or self._is_unrun():
            self._task = self._advance()

    def _is_unrun(self) -> bool:
        """Return True if the last worker never ran, since the reader was closed."""
        return self._task is not None and self._task.state == "cancelled"

    def take_marks(self) -> list[int]:
        """Return the marks for the worker whose turn it is."""
        self._used = [*self.marks]
        return self._used

    def end_turn(self) -> None:
        """Let the next worker go on."""
        self._turn.release()

    def end(self) -> None:
        """Issue nothing more, and release the owners' memory."""
        self._advance = lambda: None
        self.sources = ()
        self.issued.set()


class _Place(NamedTuple):
    """An offer of a pull, by its place among the sources."""

    followed: Followed
    at: int
    source: Source
    stop: Stop


class Marker:
    """Reads marks in shared memory, and asks owners for the others. One thread calls it."""

    def __init__(self, channel: Channel) -> None:
        self._questions = Questions(channel, "offers with marks", Marked)

    def look(self, following: Sequence[tuple[Followed, Stop]]) -> None:
        """Learn the marks of pulls, each with a function that stops the pull, and have workers go
        on with them."""
        batches = list[Sequence[_Place]]()
        requests = list[tuple[OwnerKey, Marks]]()
        for owner, places in _unknown(following).items():
            if not self._questions.is_due(owner):
                continue
            for first in range(0, len(places), MOST_NAMES):
                these = places[first : first + MOST_NAMES]
                batches.append(these)
                numbers = tuple(place.source.ticket.offer for place in these)
                requests.append((owner, Marks(owner[1], numbers)))
        for some, answer in zip(batches, self._questions.ask(requests), strict=True):
            if answer is not None:
                _take(answer, some)
        for followed, _ in following:
            followed.look()


def _unknown(following: Sequence[tuple[Followed, Stop]]) -> dict[OwnerKey, list[_Place]]:
    """Return the offers whose marks and ends only their owners can say, by owner."""
    offers = defaultdict[OwnerKey, list[_Place]](list)
    for followed, stop in following:
        for number, source in enumerate(followed.sources):
            if source.word is None:  # also of complete offers, which may end meanwhile
                owner = source.ticket.address, source.ticket.epoch
                offers[owner].append(_Place(followed, number, source, stop))
    return offers


def _take(answer: Any, places: Sequence[_Place]) -> None:
    """Keep the marks of an answer; stop the pulls of offers that do not hold."""
    if isinstance(answer, Answer):
        for place in places:
            place.stop(place.source.ticket.gone(answer.why))
        return
    error = answer
    if isinstance(answer, Marked):
        if len(places) == len(answer.marks) == len(answer.why):
            for place, mark, why in zip(places, answer.marks, answer.why, strict=True):
                if why:
                    place.stop(place.source.ticket.gone(why))
                else:
                    marks = place.followed.marks
                    marks[place.at] = max(marks[place.at], mark)
            return
        error = PeerError(
            f"Expected answers for {len(places)} offers, got {len(answer.marks)} marks and "
            f"{len(answer.why)} reasons. Use one release on both sides."
        )
    for place in places:
        place.stop(error)
