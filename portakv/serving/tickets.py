# SPDX-License-Identifier: Apache-2.0
"""`Tickets`: the scheduler's side of hand-overs. It knows which rows other engines keep for this
one, and plans what workers pull and offer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf
from secrets import token_bytes
from typing import NamedTuple

from portakv.migrate import Ticket
from portakv.serving.handover_terms import RemoteRows
from portakv.serving.plan import NO_HANDOVERS, Blocks, Handovers, OfferJob, PullJob, Renewal

#: How often a lease is renewed within its seconds.
RENEWALS = 3
#: The least seconds between two renewals, whatever lease a request carries.
SHORTEST = 0.1
#: Bytes of the name of an offer, which is random: who knows it may pull.
NAME = 32


class Endpoint(NamedTuple):
    """Where a worker offers rows.

    Attributes:
        address: of its channel.
        epoch: of its caches.
    """

    address: str
    epoch: bytes


@dataclass
class _Next:
    """What the next plan has."""

    pulls: list[PullJob] = field(default_factory=list)
    offers: list[OfferJob] = field(default_factory=list)
    released: list[bytes] = field(default_factory=list)
    revoked: bool = False
    withdrawn: list[bytes] = field(default_factory=list)  # only if `revoked`


@dataclass
class _Needed:
    """Rows that a request needs, and when their lease is renewed next."""

    rows: RemoteRows
    due: float


class Tickets:
    """Plans the hand-overs of one engine.

    Rows of another engine are needed from `expect` until `release`. Meanwhile their leases are
    renewed.

    Args:
        now: returns the time in seconds.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._endpoints: Sequence[Endpoint] = ()
        self._lease = 0.0
        self._needed = dict[str, _Needed]()  # by request
        self._soonest = inf  # when a lease is to be renewed
        self._next = _Next()

    @property
    def offers(self) -> bool:
        """Return whether this engine's workers can offer rows."""
        return bool(self._endpoints)

    def open(self, endpoints: Sequence[Endpoint], lease: float) -> None:
        """Take note of where workers offer rows, and for how many seconds."""
        self._endpoints = endpoints
        self._lease = lease

    def expect(self, request: str, rows: RemoteRows) -> None:
        """Take note that a request needs the rows of another engine."""
        due = self._now() + _interval(rows)
        self._needed[request] = _Needed(rows, due)
        self._soonest = min(self._soonest, due)

    def pull(self, job: PullJob) -> None:
        """Plan a pull of rows that a request expects."""
        self._next.pulls.append(job)

    def release(self, request: str) -> None:
        """Let the other engine use the blocks of the rows again that a request has needed."""
        needed = self._needed.pop(request, None)
        if needed is not None:
            self._next.released += needed.rows.tickets

    def offer(self, request: str, tokens: int, blocks: Blocks) -> RemoteRows:
        """Plan an offer of the first tokens of a request; return what another engine pulls."""
        name = token_bytes(NAME)
        self._next.offers.append(OfferJob(request, name, tokens, blocks, self._lease))
        tickets = [Ticket.of(each.address, each.epoch, name) for each in self._endpoints]
        return RemoteRows(tuple(tickets), tokens, self._lease)

    def revoke(self) -> None:
        """End all offers that were made, and make none of those that are planned."""
        self._next.withdrawn += [offer.name for offer in self._next.offers]
        self._next.offers = []
        self._next.revoked = True

    def plan(self) -> Handovers:
        """Return what the workers do in this step."""
        renewals = self._renewals()
        made = self._next
        if not (renewals or made.pulls or made.offers or made.released or made.revoked):
            return NO_HANDOVERS
        self._next = _Next()
        lists = tuple(made.pulls), tuple(made.offers), renewals, tuple(made.released)
        return Handovers(*lists, revoked=made.revoked, withdrawn=tuple(made.withdrawn))

    def _renewals(self) -> tuple[Renewal, ...]:
        """Return the leases that are to be renewed now."""
        if not self._needed:
            return ()
        now = self._now()
        if now < self._soonest:
            return ()
        made = list[Renewal]()
        for needed in self._needed.values():
            if needed.due <= now:
                needed.due = now + _interval(needed.rows)
                made.append(Renewal(needed.rows.tickets, needed.rows.lease))
        self._soonest = min(needed.due for needed in self._needed.values())
        return tuple(made)


def _interval(rows: RemoteRows) -> float:
    """Return the seconds between two renewals of rows."""
    return max(rows.lease / RENEWALS, SHORTEST)
