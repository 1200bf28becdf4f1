# SPDX-License-Identifier: Apache-2.0
"""A pull through staging buffers asks about its offer once, after the last bytes have left the
owner, and renews an offer meanwhile that it waits for."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from migrate.test_staged import Watching, messages
from migrate.transports.test_onesided import Memory
from support.migrate_channels import Ping, Pong
from support.migrate_pulls import Clock, Couple, Sides, sides
from support.waits import LIMIT, until

from portakv.copy.handle import BlockTransfer
from portakv.copy.inside import copy_checked
from portakv.errors import OfferGone, TransferCancelled, TransferTimeout
from portakv.migrate import staged_reader
from portakv.migrate.messages import Answer, Check, Renew, Ticket
from portakv.migrate.owner import Offer
from portakv.migrate.pull import Pull
from portakv.migrate.transports import TRANSPORTS

LEASE = 0.5


class Held(Memory):
    """A library whose reads wait until a gate opens."""

    name = "held"


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[Sides]:
    monkeypatch.setitem(TRANSPORTS.targets, Held.name, Held)
    monkeypatch.setattr("support.migrate_pulls.Channel", Watching)
    with sides() as those:
        yield those


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    gate = threading.Event()
    monkeypatch.setattr(Held, "stuck", gate)
    monkeypatch.setattr(Held, "reads", threading.Event())
    yield gate
    gate.set()


def couple(made: Sides) -> Couple:
    """Return an owner and a reader whose pulls are one slice."""
    return Couple(made, "staging", transport=Held.name, staging=1 << 20)


def held_pull(both: Couple, **terms: Any) -> tuple[Offer, Pull]:
    """Return an offer and a pull of it whose bytes wait for the gate.

    ``terms``: of the offer.
    """
    offer = both.offer(**terms)
    pulled = both.pull(offer)
    assert Held.reads.wait(LIMIT)
    return offer, pulled


def answered_before(both: Couple, offer: Offer) -> Answer:
    """Return what the owner of an offer answers about it now."""
    ticket = Ticket.read(offer.ticket)
    check = Check(ticket.epoch, ticket.offer)
    return both.reader.channel.ask(both.owner.channel.address, check, Answer)


async def nothing(*_: object) -> None:
    """Renew no offer."""


@pytest.mark.parametrize("guarded", [True, False])
def test_an_offer_that_ends_while_its_last_bytes_cross_is_not_committed(
    made: Sides, gate: threading.Event, monkeypatch: pytest.MonkeyPatch, guarded: bool
) -> None:
    """The pull asks after its last bytes. A question before them would commit it."""
    both = couple(made)
    if not guarded:
        monkeypatch.setattr(Pull, "renew", nothing)
    offer, pulled = held_pull(both)
    assert messages(both.owner, Check) == []
    if not guarded:
        assert answered_before(both, offer).state == "held"

        async def asked(*_: object) -> None:
            """Know no reason against the commit, by the answer before the end."""

        monkeypatch.setattr(Pull, "ask", asked)
    offer.revoke()
    gate.set()
    if guarded:
        with pytest.raises(OfferGone, match="revoked"):
            pulled.synchronize(LIMIT)
    else:
        pulled.synchronize(LIMIT)


@pytest.mark.parametrize("guarded", [True, False])
def test_requests_to_an_owner_do_not_wait_for_the_last_copy(
    made: Sides, gate: threading.Event, monkeypatch: pytest.MonkeyPatch, guarded: bool
) -> None:
    """False is the control: a request that is not answered yet has the connection."""
    both = couple(made)
    other = Ticket.read(both.offer().ticket)
    address = both.owner.channel.address
    channel = both.reader.channel
    gate.set()
    both.pull(both.offer()).synchronize(LIMIT)
    copying = threading.Event()
    asked = threading.Event()
    end = threading.Event()

    def copy(*terms: Any) -> BlockTransfer:
        copying.set()
        assert end.wait(LIMIT)
        return copy_checked(*terms)

    def silent(*_: object) -> Pong:
        asked.set()
        assert end.wait(LIMIT)
        return Pong(b"", 1)

    both.owner.channel.serve(Ping, silent)
    monkeypatch.setattr(staged_reader, "copy_checked", copy)
    pulled = both.pull(both.offer())
    assert copying.wait(LIMIT)
    renewal = Renew(other.epoch, other.offer, LEASE)
    try:
        if guarded:
            assert channel.ask(address, renewal, Answer, LIMIT).state == "held"
        else:
            threading.Thread(target=channel.ask, args=(address, Ping(b""), Pong)).start()
            assert asked.wait(LIMIT)
            with pytest.raises(TransferTimeout, match="earlier request"):
                channel.ask(address, renewal, Answer, 0.1)
    finally:
        end.set()
    pulled.synchronize(LIMIT)
    assert both.right()


def test_one_question_ends_a_pull(made: Sides, gate: threading.Event) -> None:
    both = couple(made)
    gate.set()
    for turn in range(1, 4):
        offer = both.offer()
        pulled = both.pull(offer)
        pulled.synchronize(LIMIT)
        assert both.right()
        assert both.spared()
        assert pulled.statistics.slices == 1
        assert len(messages(both.owner, Check)) == turn
        assert until(lambda offer=offer: offer.state == "taken", LIMIT)


def test_a_pull_that_has_ended_retains_nothing_of_what_took_its_rows(
    made: Sides, gate: threading.Event
) -> None:
    both = couple(made)
    gate.set()
    both.pull(both.offer()).synchronize(LIMIT)
    gate.clear()
    pulled = both.pull(both.offer())
    assert until(lambda: pulled.crossing, LIMIT)
    assert takers() > 0
    gate.set()
    pulled.synchronize(LIMIT)
    assert until(lambda: pulled.sources == [], LIMIT)  # its end is reported
    assert until(lambda: takers() == 0)


def takers() -> int:
    """Return the number of objects that take rows."""
    gc.collect()
    return sum(isinstance(each, staged_reader.StagedReceiver) for each in gc.get_objects())


@pytest.mark.parametrize("guarded", [True, False])
def test_a_pull_that_waits_for_its_bytes_renews_its_offer(
    made: Sides, gate: threading.Event, monkeypatch: pytest.MonkeyPatch, guarded: bool
) -> None:
    both = couple(made)
    clock = Clock(both.owner)
    if not guarded:
        monkeypatch.setattr(Pull, "renew", nothing)
    offer, pulled = held_pull(both, lease=LEASE)
    if guarded:
        clock.outlast(offer, LEASE)
        gate.set()
        pulled.synchronize(LIMIT)
        assert until(lambda: offer.state == "taken", LIMIT)
        assert both.right()
    else:
        clock.now += 2 * LEASE
        gate.set()
        with pytest.raises(OfferGone, match="lease"):
            pulled.synchronize(LIMIT)


def test_a_pull_that_waits_for_its_bytes_learns_of_the_end_of_its_offer(
    made: Sides, gate: threading.Event
) -> None:
    """Before the bytes come: a renewal brings it."""
    both = couple(made)
    offer, pulled = held_pull(both)
    offer.revoke()
    assert until(lambda: pulled.ended, LIMIT)
    assert isinstance(pulled.error, OfferGone)
    assert messages(both.owner, Check) == []


def test_a_pull_that_is_cancelled_while_its_bytes_cross_asks_nothing(
    made: Sides, gate: threading.Event
) -> None:
    both = couple(made)
    offer, pulled = held_pull(both)
    assert pulled.cancel()
    with pytest.raises(TransferCancelled):
        pulled.synchronize(LIMIT)
    assert messages(both.owner, Check) == []
    gate.set()
    both.pull(offer).synchronize(LIMIT)
    assert both.right()
