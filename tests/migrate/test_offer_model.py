# SPDX-License-Identifier: Apache-2.0
"""Compare offers and pulls with a simple model, by any order of calls that Hypothesis draws.

Two owners have one layer each, and two readers pull both. Offers expire, are revoked, taken or lost
before, while and after they are read, and their owners use the blocks again immediately. Rows are
committed only if both offers held after the copy.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any, NamedTuple

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from hypothesis.stateful import run_state_machine_as_test as run_machine
from msgspec.structs import replace
from support.migrate_pulls import Couple, sides
from support.offer_model import (
    PATIENCE,
    REASONS,
    Clock,
    Known,
    PacedCopies,
    PacedOwner,
    Puller,
    Side,
)
from support.peer_cases import reading
from support.waits import LIMIT, until

from portakv.errors import OfferGone, TransferCancelled
from portakv.migrate.channel import Peer
from portakv.migrate.messages import Answer, Begin, Check, Close, Renew
from portakv.migrate.owner import Offer

AT = st.integers(0, 99)
EXPOSED = st.sampled_from(("mapped", "mapped", "staging"))
ENDING = st.sampled_from(("revoke", "revoke", "reallocate", "replace", "wait", "wait"))
MESSAGE = st.sampled_from(("begin", "begin", "leave", 0.0, 4.0, 30.0))
HANGING = st.sampled_from(((), (0,), (1,), (0, 1)))


class Terms(NamedTuple):
    """The terms of an offer."""

    lease: float
    max_lease: float
    readers: int


TERMS = st.sampled_from(
    (Terms(5.0, 5.0, 1), Terms(20.0, 20.0, 1), Terms(20.0, 60.0, 2), Terms(60.0, 60.0, 2))
)


class InFlight(NamedTuple):
    """A pull whose offers are not confirmed yet."""

    pulled: Any
    puller: Puller
    pair: list[Known]
    block: int
    #: The states that the owners which send rows and do not hang have confirmed.
    confirmed: list[str | None]


class OfferMachine(RuleBasedStateMachine):
    """Offers of two owners, and pulls of two readers."""

    def __init__(self, kind: type[PacedOwner]) -> None:
        super().__init__()
        self.kind = kind
        self.clock = Clock()
        self.sides = list[Side]()
        self.pullers = list[Puller]()
        self.in_flight: InFlight | None = None
        self.cancelled = False

    @initialize(exposed=st.tuples(EXPOSED, EXPOSED))
    def begin(self, exposed: tuple[str, str]) -> None:
        """Make the owners and the readers."""
        for layer, expose in enumerate(self.kind.exposed or exposed):
            self.sides.append(Side(self.kind, layer, expose, self.clock))
        self.pullers += Puller(self.sides), Puller(self.sides)

    # --- offers

    @rule(terms=TERMS, sides=st.sampled_from(((0, 1), (0, 1), (0,), (1,))))
    def offer(self, terms: Terms, sides: tuple[int, ...]) -> None:
        """Offer rows, usually by both owners."""
        for at in sides:
            if len(self.sides[at].free) >= 2:
                self.sides[at].offer(*terms)

    def chosen(self, side: Side, at: int) -> Known:
        """Return one of the last offers of an owner, ended or not."""
        last = side.offers[-6:]
        return last[-1 - at % len(last)]

    @precondition(lambda self: any(side.current for side in self.sides))
    @rule(of=AT, at=AT, how=ENDING)
    def end(self, of: int, at: int, how: str) -> None:
        """Revoke an offer, give its owner other memory, replace the owner, or let time pass."""
        side = self.sides[of % 2]
        if how == "revoke" and side.offers:
            known = self.chosen(side, at)
            known.offer.revoke()
            if known.state == "held":
                known.end("revoked")
        elif how == "reallocate":
            side.owner.reallocate(side.shard)
            side.revoke_all()
        elif how == "replace" and self.in_flight is None:
            side.replace()
        elif how == "wait":
            self.advance(float(1 + at % 25))

    def advance(self, seconds: float) -> None:
        """Let time pass for the owners."""
        for side in self.sides:
            side.renew()
        self.clock.now += seconds
        for side in self.sides:
            side.expire()

    # --- messages of readers

    @precondition(lambda self: self.in_flight is None and all(x.offers for x in self.sides))
    @rule(by=AT, of=AT, at=AT, kind=MESSAGE)
    def send(self, by: int, of: int, at: int, kind: str | float) -> None:
        """Let a reader renew a lease, start to read an offer, or go."""
        puller = self.pullers[by % 2]
        known = self.chosen(self.sides[of % 2], at)
        if kind == "begin":
            message = Begin(known.epoch, known.offer.number)
            puller.channel.tell(known.side.channel.address, message)
            self.synchronize(puller, known)
            if known.state == "held":
                known.begun.add(puller.channel.id)
        elif kind == "leave":
            self.leave(puller)
        else:
            self.renew(puller, known, float(kind))

    def renew(self, puller: Puller, known: Known, seconds: float) -> None:
        """Renew a lease."""
        request = Renew(known.epoch, known.offer.number, seconds)
        answer = puller.channel.ask(known.side.channel.address, request, Answer)
        known.side.renew()
        if known.state == "held":
            assert (answer.state, answer.seconds) == ("held", known.until - self.clock())
        else:
            assert answer.state == "gone"
            self.check_reason(known, answer.why)

    def leave(self, puller: Puller) -> None:
        """Let a reader go, and another come: offers that it has begun to read may be lost."""
        reader = puller.channel.id
        puller.close()
        for side in self.sides:
            for known in side.current:
                if reader in known.begun:
                    known.pass_by(reader, "lost")
            ended = [known.offer for known in side.offers if known.state != "held"]
            assert until(lambda x=ended: all(each.taken(0) for each in x))
            begun = [x.offer.begun for x in side.current]
            assert until(lambda x=begun: not any(reader in each for each in x))
        puller.open()

    def synchronize(self, puller: Puller, known: Known) -> None:
        """Wait until an owner has processed a reader's messages."""
        request = Renew(known.epoch, known.offer.number, 0.0)
        puller.channel.ask(known.side.channel.address, request, Answer)

    # --- pulls

    @precondition(lambda self: self.in_flight is None)
    @rule(
        by=AT,
        fresh=st.none() | TERMS,
        at=st.tuples(AT, AT),
        block=st.integers(0, 7),
        verify=st.booleans(),
        hang=HANGING,
    )
    def pull(
        self,
        by: int,
        fresh: Terms | None,
        at: tuple[int, int],
        block: int,
        verify: bool,
        hang: tuple[int, ...],
    ) -> None:
        """Pull both layers; owners may hang when they have to confirm their offers, or the copy
        of rows that are mapped lasts until then."""
        puller = self.pullers[by % 2]
        if fresh or not all(side.offers for side in self.sides):
            self.offer(fresh or Terms(20.0, 20.0, 2), (0, 1))
            at = (0, 0)
        pair = [self.chosen(side, n) for side, n in zip(self.sides, at, strict=True)]
        holds = all(known.state == "held" for known in pair)
        before = [side.owner.confirmed for side in self.sides]
        requested = [side.owner.requested for side in self.sides]
        lasts = False
        if hang and holds:  # else the copies might not have begun
            puller.connect(pair)
        for n in hang if holds else ():
            self.sides[n].owner.go.clear()
            if not self.sides[n].terms:
                lasts = True
                PacedCopies.go.clear()
        tickets = [known.offer.ticket for known in pair]
        try:
            pulled = puller.reader.pull(tickets, [block], verify=verify)
        except OfferGone as error:
            if holds:
                raise
            self.check_reason_of_one(pair, str(error))
            puller.learn(block, pair, False)
            return
        flying = InFlight(pulled, puller, pair, block, [None, None])
        self.cancelled = False
        if not (hang and holds):
            self.finish(flying)
            return
        self.await_questions(flying, before, requested, lasts)
        self.in_flight = flying

    def await_questions(
        self, flying: InFlight, before: list[int], requested: list[int], lasts: bool
    ) -> None:
        """Wait until owners that send rows were asked to confirm their offers, or know of a pull
        whose copy ``lasts``."""
        reader = flying.puller.channel.id
        for n, side in enumerate(self.sides):
            owner = side.owner
            if not side.terms:
                continue  # its word is read last
            begun = flying.pair[n].offer.begun
            assert until(lambda x=begun: reader in x, PATIENCE)  # by a request for rows
            flying.pair[n].begun.add(reader)
            if lasts:
                continue  # no question comes before the copies have ended
            assert until(lambda o=owner, m=n: o.requested > requested[m], PATIENCE)
            if owner.go.is_set():
                assert until(lambda o=owner, m=n: o.confirmed > before[m], PATIENCE)
                flying.confirmed[n] = "held"

    @precondition(lambda self: self.in_flight is not None)
    @rule()
    def cancel(self) -> None:
        """Cancel the pull whose offers are not confirmed yet.

        A pull that was cancelled before may have ended since.
        """
        assert self.in_flight is not None
        assert self.in_flight.pulled.cancel() or self.cancelled
        self.cancelled = True

    @precondition(lambda self: self.in_flight is not None)
    @rule()
    def confirm(self) -> None:
        """Let the owners confirm the offers of the pull in flight."""
        assert self.in_flight is not None
        flying = self.in_flight
        self.in_flight = None
        assert not flying.pulled.published
        self.finish(flying)

    def finish(self, flying: InFlight) -> None:
        """Wait for the end of a pull, and compare it with the model."""
        pulled, puller, pair, block, confirmed = flying
        states = [each or known.state for each, known in zip(confirmed, pair, strict=True)]
        holds = all(state == "held" for state in states)
        self.go_on()
        kind: type[Exception] | None = None
        try:
            pulled.synchronize(PATIENCE)
        except (OfferGone, TransferCancelled) as error:
            kind = type(error)
            if isinstance(error, OfferGone):
                self.check_reason_of_one(pair, str(error))
        # Of a cancelled pull whose offer ends, too, the first that the reader notices counts.
        expected = set[type[Exception]]()
        if self.cancelled:
            expected.add(TransferCancelled)
        if not holds:
            expected.add(OfferGone)
        assert kind in expected if expected else kind is None, (
            f"a pull of {states} offers ended by {kind}"
        )
        assert pulled.published == (not expected)
        assert bool(pulled.statistics.nbytes) == pulled.published
        assert not pulled.cancel()
        puller.learn(block, pair, pulled.published)
        assert puller.reported()
        for known in pair:
            self.synchronize(puller, known)
            known.side.renew()
            if known.state == "held" and pulled.published:
                known.pass_by(puller.channel.id, "taken")
            known.begun.discard(puller.channel.id)

    def go_on(self) -> None:
        """Let copies end, and owners confirm their offers."""
        PacedCopies.go.set()
        for side in self.sides:
            side.owner.go.set()

    def check_reason(self, known: Known, text: str) -> None:
        """Check that a reader gets the reason of the end, if the owner can know it."""
        owner = known.side.owner
        if known.epoch == owner.epoch and known.state != "held":
            assert REASONS[known.state] in text, f"{known.state}: {text}"

    def check_reason_of_one(self, pair: list[Known], text: str) -> None:
        """Check that the error names the end of one of the offers."""
        ended = [x for x in pair if x.offer.number.hex()[:8] in text]
        assert len(ended) == 1, text
        self.check_reason(ended[0], text)

    # --- always

    @invariant()
    def every_end_is_reported_once(self) -> None:
        """Compare all owners and readers with the model."""
        for side in self.sides:
            side.renew()
            side.check()
        if self.in_flight is None:
            for puller in self.pullers:
                puller.check()

    def teardown(self) -> None:
        """Confirm what is in flight, revoke what is left, and close everything."""
        self.go_on()
        with suppress(OfferGone, TransferCancelled):
            if self.in_flight:
                self.in_flight.pulled.synchronize(PATIENCE)
        for puller in self.pullers:
            puller.close()
        for side in self.sides:
            side.close()


def run(kind: type[PacedOwner], examples: int) -> None:
    """Run the machine with owners of a class."""
    # Messages of an example that failed may arrive otherwise in its repetition: do not shrink.
    terms = settings(max_examples=examples, stateful_step_count=25, phases=[Phase.generate])
    machine: Any = lambda: OfferMachine(kind)  # noqa: E731
    PacedCopies.go.set()
    with sides() as made, reading(PacedCopies):
        both = Couple(made)  # the backend is checked at its first copy, which no walk may hold up
        both.pull(both.offer()).synchronize(LIMIT)
        run_machine(machine, settings=terms)


@pytest.mark.parametrize("examples", [30, pytest.param(600, marks=pytest.mark.full)])
def test_any_order_of_offers_and_pulls(examples: int) -> None:
    run(PacedOwner, examples)


# --- the machine finds owners with a bug


class Trusting(PacedOwner):
    """An owner that confirms every offer to readers of staged rows."""

    exposed = ("staging", "staging")

    def _check(self, peer: Peer, check: Check) -> Answer:
        super()._check(peer, check)
        return Answer("held")


class Silent(PacedOwner):
    """An owner that does not write into its page of words when an offer ends."""

    exposed = ("mapped", "mapped")

    def __init__(self, *shards: Any, **options: Any) -> None:
        super().__init__(*shards, **options)
        self.words.end = lambda *_: None  # type: ignore[method-assign]


class Hasty(PacedOwner):
    """An owner that takes a failed pull for one that has the rows."""

    def _close(self, peer: Peer, close: Close) -> None:
        super()._close(peer, replace(close, taken=True))


class Counting(PacedOwner):
    """An owner that counts a reader each time."""

    def _less(self, offer: Offer, reader: bytes, state: str) -> None:
        super()._less(offer, reader + bytes([len(offer.through)]), state)


@pytest.mark.parametrize(
    "kind",
    [pytest.param(x, marks=pytest.mark.full) for x in (Trusting, Silent, Hasty, Counting)],
)
def test_the_machine_finds_an_owner_with_a_bug(kind: type[PacedOwner]) -> None:
    with pytest.raises(AssertionError):
        run(kind, 100)
