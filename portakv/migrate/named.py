# SPDX-License-Identifier: Apache-2.0
"""Pulls that wait: for owners that are not connected, for offers by name, and for rows that are not
complete.

A caller looks into the tables of owners on this host. It asks the other owners, for a moment: most
offers exist by then, and each thread that has to wake costs as much as a small pull. For offers
that do not exist yet the reader's `Housekeeper` asks the owners which of the names they have
offered, all names of one owner in one request. It asks in the same way for marks, and wakes the
coroutines of pulls that need not wait any longer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from time import monotonic
from typing import Any, NamedTuple

from portakv.errors import (
    OfferGone,
    PeerError,
    PortaKVError,
    TransferTimeout,
)
from portakv.migrate.connections import (
    ANY,
    Connections,
    OwnerKey,
    Sources,
)
from portakv.migrate.messages import MOST_NAMES, Answer, Find, Found, Marked, Marks, Named, Ticket
from portakv.migrate.pull import Wanted
from portakv.runtime.bounded import Bounded

ASKING = 0.1  # the most seconds that a question may take, since other pulls wait meanwhile
PAUSE = 4e-3  # seconds between two questions to an owner about the same
BUSY = 0.5  # seconds without a question to an owner that did not answer in time
#: The most seconds for which a call waits for the answers of owners.
MOMENT = 1e-3
#: Seconds without a question by a call, to an owner that did not answer one in time.
LATE = 0.05


def incomplete(sources: Sources) -> bool:
    """Return True if rows of some offers are not complete, as far as this process can see."""
    for source in sources:  # noqa: SIM110 - each pull asks; a generator is two more calls
        if source.ticket.progress and source.mark < source.end:
            return True
    return False


class _Asked(NamedTuple):
    """A name or an offer of a pull, of which only its owner can say more, and its place."""

    wanted: Wanted
    at: int
    subject: Named | Ticket


class Finder:
    """Connects to owners, and asks them for the offers of names and for marks. One coroutine calls
    it; any thread may call `find_now`.

    Args:
        owners: of the reader.
    """

    def __init__(self, owners: Connections) -> None:
        self._owners = owners
        # Owners with the kind of the answer, or `Named` for a question by a call: the time of the
        # next question, and whether they were late with an answer.
        self._next: Bounded[tuple[OwnerKey, type], tuple[float, bool]] = Bounded(
            "owners of offers by name or with marks", 3072
        )

    def find_now(self, wanted: Wanted) -> bool:
        """Ask the owners of a pull's names, which are connected, and wait for a moment; return True
        if all offers exist. What else they answer, they answer again to `look`."""
        by_owner = _names_by_owner([wanted])
        now = monotonic()
        late = any(now < self._next.get((owner, Named), (0.0, False))[0] for owner in by_owner)
        if late or len(wanted.names) > MOST_NAMES:
            return False
        requests = [(owner[0], _request(owner[1], some)) for owner, some in by_owner.items()]
        kind: Any = Found | Answer
        answers = self._owners.channel.ask_all(requests, kind, MOMENT)
        for (owner, some), answer in zip(by_owner.items(), answers, strict=True):
            if isinstance(answer, TransferTimeout):
                self._next[owner, Named] = monotonic() + LATE, True
            elif isinstance(answer, Found) and len(answer.tickets) == len(some):
                self._next[owner, Found] = monotonic() + PAUSE, False
                for each, ticket in zip(some, answer.tickets, strict=True):
                    if ticket:
                        wanted.take(each.at, ticket)
        return not wanted.names

    async def look(self, waiting: Sequence[Wanted]) -> None:
        """Connect to the owners of pulls that wait, ask for their names and marks, and wake the
        coroutines of pulls that can go on."""
        marks = defaultdict[OwnerKey, list[_Asked]](list)
        for wanted in waiting:
            for owner in [*wanted.owners]:
                if self._owners.find(*owner):
                    del wanted.owners[owner]
                else:
                    self._connect(owner, wanted)
            for at, (ticket, _, word) in enumerate(wanted.sources):
                if word is None:  # also of complete offers, which may end meanwhile
                    marks[ticket.address, ticket.epoch].append(_Asked(wanted, at, ticket))

        due = {owner: some for owner, some in marks.items() if self.is_due(owner, Marked)}
        await self._ask(Found, self._due_names(_names_by_owner(waiting)))
        await self._ask(Marked, due)
        for wanted in waiting:
            wanted.look()

    def _due_names(
        self, names: Mapping[OwnerKey, Sequence[_Asked]]
    ) -> dict[OwnerKey, Sequence[_Asked]]:
        """Return the names that connected owners may get a question about now; connect to the other
        owners."""
        due = dict[OwnerKey, Sequence[_Asked]]()
        for owner, some in names.items():
            anyone = owner[0], ANY  # also an owner of another epoch answers
            if not self._owners.find(*anyone):
                for each in some:
                    self._connect(anyone, each.wanted)
            elif self.is_due(owner, Found):
                due[owner] = some
            elif self.is_due(owner, Found, first=True):
                due[owner] = [each for each in some if not each.wanted.queried]
        return due

    def _connect(self, owner: OwnerKey, wanted: Wanted) -> None:
        """Connect to an owner that a pull waits for; stop the pull if that failed."""
        error: PortaKVError | None = None
        attempt = wanted.attempts.get(owner)
        if attempt is None:
            wanted.attempts[owner] = self._owners.begin(owner)
        elif attempt.handle.done():
            del wanted.attempts[owner]
            # A pull does not end with a handshake that began before it: the next look begins
            # another. So does a pull whose owner's address has another epoch.
            if attempt.began >= wanted.since:
                error = attempt.error
        if isinstance(error, OfferGone) and owner in wanted.owners:
            # The owner answers. The pull gets the same answer when it begins, and the error names
            # its offer.
            del wanted.owners[owner]
        elif error is not None:
            wanted.pull.stop(error)

    def is_due(self, owner: OwnerKey, kind: type, first: bool = False) -> bool:
        """Return True if an owner may get a question now.

        ``first``: about something for the first time, which waits for a late owner alone.
        """
        due, late = self._next.get((owner, kind), (0.0, False))
        return monotonic() >= due or (first and not late)

    async def _ask(
        self, kind: type[Found | Marked], by_owner: Mapping[OwnerKey, Sequence[_Asked]]
    ) -> None:
        """Ask owners, all at a time, for tickets or marks, and take the answers."""
        batches = [
            (owner, some[first : first + MOST_NAMES])
            for owner, some in by_owner.items()
            for first in range(0, len(some), MOST_NAMES)
        ]
        if not batches:
            return
        requests = [(owner[0], _request(owner[1], some)) for owner, some in batches]
        kinds: Any = kind | Answer
        answers = await self._owners.channel.answers(requests, kinds, ASKING)
        for (owner, some), answer in zip(batches, answers, strict=True):
            late = isinstance(answer, TransferTimeout)
            self._next[owner, kind] = monotonic() + (BUSY if late else PAUSE), late
            for each in some:
                each.wanted.queried = True
            if not late:
                _take(answer, some)


def _names_by_owner(waiting: Sequence[Wanted]) -> dict[OwnerKey, list[_Asked]]:
    """Return the names that pulls wait for."""
    names = defaultdict[OwnerKey, list[_Asked]](list)
    for wanted in waiting:
        for at, named in wanted.names.items():
            names[named.address, named.epoch].append(_Asked(wanted, at, named))
    return names


def _request(epoch: bytes, some: Sequence[_Asked]) -> Find | Marks:
    """Return the request for the tickets of names, or for the marks of offers."""
    names = [each.subject.name for each in some if isinstance(each.subject, Named)]
    offers = [each.subject.offer for each in some if isinstance(each.subject, Ticket)]
    return Find(epoch, tuple(names)) if names else Marks(epoch, tuple(offers))


def _take(answer: Any, some: Sequence[_Asked]) -> None:
    """Keep the tickets or marks of an answer; stop the pulls of offers that do not hold."""
    if isinstance(answer, Answer):
        for each in some:
            each.wanted.pull.stop(each.subject.gone(answer.why))
        return
    error = answer
    if isinstance(answer, Found | Marked):
        found = isinstance(answer, Found)
        values: Sequence[bytes | int] = getattr(answer, "tickets" if found else "marks")
        if len(some) == len(values) == len(answer.why):
            for each, value, why in zip(some, values, answer.why, strict=True):
                if why:
                    each.wanted.pull.stop(each.subject.gone(why))
                elif value:
                    each.wanted.take(each.at, value)
            return
        subjects, what = ("names", "tickets") if found else ("offers", "marks")
        error = PeerError(
            f"Expected answers for {len(some)} {subjects}, got {len(values)} {what} and "
            f"{len(answer.why)} reasons. Use one release on both sides."
        )
    for each in some:
        each.wanted.pull.stop(error)
