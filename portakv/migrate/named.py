# SPDX-License-Identifier: Apache-2.0
"""Pulls of offers by name: a name is known before its offer is.

A caller looks into the tables of owners on this host. It asks the other owners, for a moment: most
offers exist by then, and each thread that has to wake costs as much as a small pull. For offers
that do not exist yet the reader's `Housekeeper` asks the owners which of the names they have
offered, all names of one owner in one request, and starts a pull when all of its offers are there.
The pull then has plain tickets, and goes on in a worker.

A pull of plain tickets waits in the same way for handshakes with their owners.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, NamedTuple, TypeAlias

from portakv import arguments
from portakv.errors import (
    OfferGone,
    PeerError,
    PortaKVError,
    TransferError,
    TransferTimeout,
)
from portakv.graph.task import Task
from portakv.migrate.channel import Channel
from portakv.migrate.connections import (
    ANY,
    Attempt,
    Connector,
    OwnerKey,
    Questions,
    Source,
    Sources,
)
from portakv.migrate.messages import MOST_NAMES, Answer, Find, Found, Marked, Marks, Named, Ticket
from portakv.runtime.bounded import Bounded
from portakv.runtime.devices import this_process
from portakv.runtime.transfer import Completion, Transfer

# ------------------------------------------------------------------------------------------------
# The offers of a pull whose rows are not complete, and how far they are known to be.

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


class _Unknown(NamedTuple):
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
        batches = list[Sequence[_Unknown]]()
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
                _take_names(answer, some)
        for followed, _ in following:
            followed.look()


def _unknown(following: Sequence[tuple[Followed, Stop]]) -> dict[OwnerKey, list[_Unknown]]:
    """Return the offers whose marks and ends only their owners can say, by owner."""
    offers = defaultdict[OwnerKey, list[_Unknown]](list)
    for followed, stop in following:
        for number, source in enumerate(followed.sources):
            if source.word is None:  # also of complete offers, which may end meanwhile
                owner = source.ticket.address, source.ticket.epoch
                offers[owner].append(_Unknown(followed, number, source, stop))
    return offers


def _take_names(answer: Any, places: Sequence[_Unknown]) -> None:
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


#: The most seconds for which a call waits for the answers of owners.
MOMENT = 1e-3
#: Seconds without a question by a call, to an owner that did not answer one in time.
LATE = 0.05


@dataclass
class Wanted:
    """The tickets of a pull of which some are still names or of owners that are not connected, and
    offers that are not complete.

    ``start`` is called once, when no name and no such owner is left: it has a worker go on, or ends
    a pull that has failed. ``followed`` is None before that, and if all offers are complete.
    ``queried``: the owners have had the names in a request once. ``owners``: those of plain tickets
    that are not known to be connected, with a ticket of each. ``attempts``: the handshakes that the
    pull waits for. ``since``: when the pull was called. ``task``: begins the pull in a worker, once
    it is started; None: the caller did.
    """

    tickets: list[bytes]
    names: dict[int, Named]  # by their places among the tickets
    owners: dict[OwnerKey, Ticket] = field(default_factory=dict)
    attempts: dict[OwnerKey, Attempt] = field(default_factory=dict)
    since: float = field(default_factory=monotonic)
    start: Callable[[bool], object] = bool
    started: threading.Event = field(default_factory=threading.Event)
    once: threading.Lock = field(default_factory=threading.Lock)
    followed: Followed | None = None
    queried: bool = False
    task: Task | None = None

    @property
    def waits(self) -> bool:
        """Return True if the pull waits for an offer or a mark."""
        followed = self.followed
        return not self.started.is_set() or (followed is not None and not followed.issued.is_set())

    @property
    def handshakes(self) -> list[str]:
        """Return the addresses of owners whose handshake is under way."""
        attempts = [*self.attempts.items()]
        return [address for (address, _), attempt in attempts if not attempt.task.ended]

    def wait(self) -> None:
        """Block the host until the pull waits for no offer and no mark."""
        self.started.wait()
        if self.followed is not None:
            self.followed.issued.wait()

    @classmethod
    def of(cls, tickets: list[bytes]) -> Wanted:
        """Return tickets of which some may be names; raise `PeerError` for other bytes."""
        wanted = cls(tickets, {})
        for at, data in enumerate(tickets):
            named = Named.read(data)
            if named is not None:
                wanted.names[at] = named
            else:
                ticket = Ticket.read(data)
                wanted.owners[ticket.address, ticket.epoch] = ticket
        return wanted

    def look_up(self, ticket_of: Callable[[Named], bytes]) -> None:
        """Find offers in the tables of their owners."""
        for at, named in [*self.names.items()]:
            ticket = ticket_of(named)
            if ticket:
                self.tickets[at] = ticket
                del self.names[at]

    def begin(self, ended: bool = False) -> None:
        """Start the pull, which waits no more, or end it; only the first call does."""
        if self.once.acquire(blocking=False):
            self.start(ended)
            self.start = bool  # the pull retains no task that has ended
            task = self.task
            if task is not None and task.schedule.graph is None:
                self.task = None  # it was not submitted
            self.attempts.clear()
            self.started.set()

    def end(self) -> None:
        """End a pull that was stopped while it waits; a worker does if it follows marks."""
        if not self.started.is_set():
            self.begin(ended=True)
        elif self.followed is not None:
            self.followed.go_on()


class LateLayer(Transfer):
    """The end of a layer of a pull that has not begun, so that its copies do not exist yet."""

    def __init__(self) -> None:
        super().__init__([Completion(pendings=(self,))])
        self._process = this_process()
        self._known = threading.Event()
        self._layer = Transfer()
        self._error: PortaKVError | None = None

    def settle(self, layer: Transfer, error: PortaKVError | None = None) -> None:
        """Set the transfer that ends with the layer, or the error by which the pull did not begin.
        The first call counts."""
        if not self._known.is_set():
            self._layer = layer
            self._error = error
            self._known.set()

    def done(self) -> bool:
        """Return True once the layer has landed; raise the errors of the pull."""
        self._refuse_fork()
        if not self._known.is_set():
            return False
        self._finish()
        return self._layer.done()

    def wait(self, stream: object = None) -> None:
        """Block the host until the layer has landed; raise the errors of the pull."""
        self.synchronize()

    def synchronize(self, timeout: float | None = None) -> None:
        """Block the host until the layer has landed; see `Transfer.synchronize`."""
        self._refuse_fork()
        seconds = arguments.seconds("timeout", timeout, optional=True)
        until = monotonic() + seconds
        if not self._known.wait(min(seconds, threading.TIMEOUT_MAX)):
            raise TransferTimeout(
                f"Expected the layer within {seconds:g} s, got no end; the pull goes on. Wait "
                f"longer."
            )
        self._finish()
        self._layer.synchronize(None if timeout is None else max(0.0, until - monotonic()))

    def _refuse_fork(self) -> None:
        """Raise in a process that was forked from the reader's, where nothing sets the layer."""
        if self._process.forked:
            raise forked_error()

    def _finish(self) -> None:
        if self._error is not None:
            raise self._error


def forked_error() -> TransferError:
    """Return the error of a pull in a process that was forked from the reader's."""
    return TransferError(
        "The pull runs in the process that this one was forked from. Wait for it there."
    )


class _Place(NamedTuple):
    """A name of a pull, by its place among the tickets, and the function that stops the pull."""

    wanted: Wanted
    at: int
    stop: Stop

    @property
    def named(self) -> Named:
        """Return the name."""
        return self.wanted.names[self.at]


class Finder:
    """Asks owners for the offers of names, and for marks. One thread calls it; any may call
    `find_now`.

    Args:
        channel: of the reader.
        connector: connects to owners, in workers.
    """

    def __init__(self, channel: Channel, connector: Connector) -> None:
        self.marker = Marker(channel)
        self._channel = channel
        # Owners that were late with an answer, with the time of the next question by a call.
        self._late: Bounded[OwnerKey, float] = Bounded("owners that were late", 1024)
        self._questions = Questions(channel, "offers by name", Found)
        self._connector = connector

    def find_now(self, wanted: Wanted) -> bool:
        """Ask the owners of a pull's names, which are connected, and wait for a moment; return True
        if all offers exist. What else they answer, they answer again to `look`."""
        by_owner = defaultdict[OwnerKey, list[int]](list)
        for at, named in wanted.names.items():
            by_owner[named.address, named.epoch].append(at)
        now = monotonic()
        if len(wanted.names) > MOST_NAMES or any(
            now < self._late.get(owner, 0.0) for owner in by_owner
        ):
            return False
        requests = [
            (address, Find(epoch, tuple(wanted.names[at].name for at in places)))
            for (address, epoch), places in by_owner.items()
        ]
        kind: Any = Found | Answer
        answers = self._channel.ask_all(requests, kind, MOMENT)
        for (owner, places), answer in zip(by_owner.items(), answers, strict=True):
            if isinstance(answer, TransferTimeout):
                self._late[owner] = monotonic() + LATE
            elif isinstance(answer, Found) and len(answer.tickets) == len(places):
                self._questions.note(owner)
                for at, ticket in zip(places, answer.tickets, strict=True):
                    if ticket:
                        wanted.tickets[at] = ticket
                        del wanted.names[at]
        return not wanted.names

    def look(self, waiting: Sequence[tuple[Wanted, Stop]]) -> None:
        """Connect to the owners of pulls that wait, each with a function that stops the pull. Ask
        for their names, and start the pulls that wait no more."""
        for wanted, stop in waiting:
            for owner in [*wanted.owners]:
                if self._connector.has(owner):
                    del wanted.owners[owner]
                else:
                    self._connect(owner, wanted, stop)
        self._ask(self._due_questions(waiting))
        for wanted, _ in waiting:
            if not wanted.names and not wanted.owners:
                wanted.begin()

    def _due_questions(
        self, waiting: Sequence[tuple[Wanted, Stop]]
    ) -> list[tuple[OwnerKey, Sequence[_Place]]]:
        """Return the names that connected owners may get a question about now, by owner; connect to
        the other owners."""
        wanted_names = defaultdict[OwnerKey, list[_Place]](list)
        for wanted, stop in waiting:
            for at, named in wanted.names.items():
                wanted_names[named.address, named.epoch].append(_Place(wanted, at, stop))
        questions = list[tuple[OwnerKey, Sequence[_Place]]]()
        for owner, places in wanted_names.items():
            anyone = owner[0], ANY  # also an owner of another epoch answers
            if not self._connector.has(anyone):
                for place in places:
                    self._connect(anyone, place.wanted, place.stop)
                continue
            if not self._questions.is_due(owner):
                places = [place for place in places if not place.wanted.queried]
                if not self._questions.is_due(owner, first=True):
                    continue
            starts = range(0, len(places), MOST_NAMES)
            questions += [(owner, places[first : first + MOST_NAMES]) for first in starts]
        return questions

    def _connect(self, owner: OwnerKey, wanted: Wanted, stop: Stop) -> None:
        """Have a worker connect to an owner that a pull waits for; stop the pull if that failed."""
        error: PortaKVError | None = None
        attempt = wanted.attempts.get(owner)
        if attempt is None:
            try:
                wanted.attempts[owner] = self._connector.begin(owner)
            except PortaKVError as closed:  # the reader is
                error = closed
        elif attempt.task.ended:
            del wanted.attempts[owner]
            # A pull does not end with a handshake that began before it: the next look begins
            # another. So does a pull whose owner's address has another epoch.
            if attempt.began >= wanted.since:
                error = attempt.error
        if isinstance(error, OfferGone) and owner in wanted.owners:
            # The owner answers. The worker that begins the pull gets the same answer, and the
            # error names the offer of this pull.
            del wanted.owners[owner]
        elif error is not None:
            stop(error)

    def _ask(self, questions: Sequence[tuple[OwnerKey, Sequence[_Place]]]) -> None:
        """Ask owners, all at a time, for the offers of names; take the answers."""
        requests = [
            (owner, Find(owner[1], tuple(place.named.name for place in places)))
            for owner, places in questions
        ]
        answers = self._questions.ask(requests)
        for (_, places), answer in zip(questions, answers, strict=True):
            for place in places:
                place.wanted.queried = True
            if answer is not None:
                _take(answer, places)


def _take(answer: Any, places: Sequence[_Place]) -> None:
    """Keep the tickets of the offers that exist; stop the pulls of those that do not hold."""
    if isinstance(answer, Answer):
        for place in places:
            place.stop(place.named.gone(answer.why))
        return
    error = answer
    if isinstance(answer, Found):
        if len(places) == len(answer.tickets) == len(answer.why):
            for place, ticket, why in zip(places, answer.tickets, answer.why, strict=True):
                _take_one(place, ticket, why)
            return
        error = PeerError(
            f"Expected answers for {len(places)} names, got {len(answer.tickets)} tickets and "
            f"{len(answer.why)} reasons. Use one release on both sides."
        )
    for place in places:
        place.stop(error)


def _take_one(place: _Place, ticket: bytes, why: str) -> None:
    if ticket:
        place.wanted.tickets[place.at] = ticket
        del place.wanted.names[place.at]
    elif why:
        place.stop(place.named.gone(why))
