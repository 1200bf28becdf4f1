# SPDX-License-Identifier: Apache-2.0
"""Pulls of offers by name: a name is known before its offer is.

The reader's `Housekeeper` asks the owners which of the names they have offered, all names of one
owner in one request, and starts a pull when all of its offers are there. The pull then has plain
tickets, and goes on in a worker.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import NamedTuple

from portakv.errors import PeerError, PortaKVError, TransferTimeout
from portakv.migrate.channel import Channel
from portakv.migrate.messages import MOST_NAMES, Answer, Find, Found, Named
from portakv.runtime.bounded import Bounded
from portakv.runtime.transfer import Completion, Transfer

ASKING = 0.1  # the most seconds that a question may take, since other pulls wait meanwhile
PAUSE = 4e-3  # the most seconds between two questions for a name
BUSY = 0.5  # seconds without a question to an owner that did not answer in time


@dataclass
class Wanted:
    """The tickets of a pull of which some are still names.

    ``start`` has a worker go on; it is called once, also if the pull has failed.
    """

    tickets: list[bytes]
    names: dict[int, Named]  # by their places among the tickets
    start: Callable[[], None] = lambda: None
    started: threading.Event = field(default_factory=threading.Event)

    @classmethod
    def of(cls, tickets: list[bytes]) -> Wanted | None:
        """Return tickets of which some are names; None if none is."""
        names = {at: name for at, one in enumerate(tickets) if (name := Named.read(one))}
        return cls(tickets, names) if names else None

    def begin(self) -> None:
        """Start the pull, which waits no more, once."""
        if not self.started.is_set():
            self.start()
            self.started.set()


class LateLayer(Transfer):
    """The end of a layer of a pull that has not begun, so that its copies do not exist yet."""

    def __init__(self) -> None:
        super().__init__([Completion(pendings=(self,))])
        self._known = threading.Event()
        self._layer = Transfer()
        self._error: PortaKVError | None = None

    def settle(self, layer: Transfer, error: PortaKVError | None = None) -> None:
        """Set the transfer that ends with the layer, or the error by which the pull did not
        begin."""
        self._layer = layer
        self._error = error
        self._known.set()

    def done(self) -> bool:
        """Return True once the layer has landed; raise the errors of the pull."""
        if not self._known.is_set() or not all(x.ended() for x in self._layer.completions):
            return False
        self._finish()
        return True

    def wait(self, stream: object = None) -> None:
        """Block the host until the layer has landed; raise the errors of the pull."""
        self.synchronize()

    def synchronize(self, timeout: float | None = None) -> None:
        """Block the host until the layer has landed; see `Transfer.synchronize`."""
        began = monotonic()
        if not self._known.wait(timeout):
            raise TransferTimeout(
                f"The layer has not landed after {timeout:g} s; the pull goes on. Wait longer."
            )
        left = None if timeout is None else max(0.0, timeout - (monotonic() - began))
        self._layer.synchronize(left)
        self._finish()

    def _finish(self) -> None:
        if self._error is not None:
            raise self._error


class _Place(NamedTuple):
    """A name of a pull, by its place among the tickets, and the function that stops the pull."""

    wanted: Wanted
    at: int
    stop: Callable[[PortaKVError], object]

    @property
    def named(self) -> Named:
        """Return the name."""
        return self.wanted.names[self.at]


class Finder:
    """Asks owners for the offers of names. One thread calls it."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        # Addresses, with the time of the next question.
        self._next: Bounded[str, float] = Bounded("owners with offers by name", 1024)

    def look(self, waiting: Sequence[tuple[Wanted, Callable[[PortaKVError], object]]]) -> None:
        """Ask for the names of pulls that wait, each with a function that stops the pull, and start
        the pulls that wait no more."""
        wanted_names = defaultdict[tuple[str, bytes], list[_Place]](list)
        for wanted, stop in waiting:
            for at, named in wanted.names.items():
                wanted_names[named.address, named.epoch].append(_Place(wanted, at, stop))
        for (address, epoch), places in wanted_names.items():
            if monotonic() >= self._next.get(address, 0.0):
                self._ask_owner(address, epoch, places)
        for wanted, _ in waiting:
            if not wanted.names:
                wanted.begin()

    def _ask_owner(self, address: str, epoch: bytes, places: Sequence[_Place]) -> None:
        """Ask an owner for names; stop the pulls that need it if it is gone."""
        pause = PAUSE
        try:
            for first in range(0, len(places), MOST_NAMES):
                self._ask(address, epoch, places[first : first + MOST_NAMES])
        except TransferTimeout:
            pause = BUSY
        except PortaKVError as error:
            for place in places:
                place.stop(error)
        self._next[address] = monotonic() + pause

    def _ask(self, address: str, epoch: bytes, places: Sequence[_Place]) -> None:
        """Ask an owner for names, and keep the tickets of those that it has offered."""
        names = tuple(place.named.name for place in places)
        answer = self._channel.ask(address, Find(epoch, names), Found | Answer, ASKING)  # type: ignore[arg-type]
        if isinstance(answer, Answer):
            for place in places:
                place.stop(place.named.gone(answer.why))
            return
        if not len(names) == len(answer.tickets) == len(answer.why):
            raise PeerError(
                f"Expected answers for {len(names)} names from {address}, got "
                f"{len(answer.tickets)}. Use one release on both sides."
            )
        for place, ticket, why in zip(places, answer.tickets, answer.why, strict=True):
            if ticket:
                place.wanted.tickets[place.at] = ticket
                del place.wanted.names[place.at]
            elif why:
                place.stop(place.named.gone(why))
