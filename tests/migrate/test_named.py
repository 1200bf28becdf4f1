# SPDX-License-Identifier: Apache-2.0
"""Pulls by names: they wait for offers that do not exist yet, and end with every kind of owner."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from secrets import token_bytes
from time import sleep
from typing import Any

import pytest
import torch
from support.device_cases import on
from support.migrate_nursery import Nursery
from support.migrate_pulls import SMALL, Clock, Rows, Sides, sides
from support.stopping import go_on, stop
from support.waits import LIMIT, until
from torch.cuda import _sleep

from portakv import Index
from portakv.errors import (
    InvalidTerms,
    OfferGone,
    PeerError,
    SlotError,
    TransferCancelled,
    TransferTimeout,
)
from portakv.migrate import Channel, Ticket, messages
from portakv.migrate.channel import Peer
from portakv.migrate.owner import Owner
from portakv.migrate.reader import MOMENT, Finder, Reader
from portakv.migrate.shared_memory import shared_empty
from portakv.migrate.words import NamesOfOwner
from portakv_conformance import simdev

BLOCKS = [7, 3, 11]
INTO = [6, 1]
TOKENS = 45
METHODS = pytest.mark.parametrize("expose", ["mapped", "staging"])
OWNER = """
from support.migrate_pulls import *
made, rows = Sides(), Rows()
owner = made.owner(rows.shard)
tell((owner.channel.address, owner.epoch))
"""


@pytest.fixture
def made() -> Iterator[Sides]:
    with sides() as those:
        yield those


@pytest.fixture
def no_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers find no name in a table, so that they have to ask."""
    monkeypatch.setattr(NamesOfOwner, "find", lambda *_: b"")


class Pair:
    """An owner and a reader of other block sizes."""

    def __init__(self, made: Sides, expose: str = "mapped") -> None:
        self.src = Rows()
        self.dst = Rows(8, 32, fill=-1)
        terms: dict[str, Any] = {"expose": expose, "staging": SMALL} if expose == "staging" else {}
        self.owner: Owner = made.owner(self.src.shard, **terms)
        self.reader: Reader = made.reader(self.dst.shard)

    def ticket(self, name: bytes) -> bytes:
        return Ticket.of(self.owner.channel.address, self.owner.epoch, name)

    def right(self) -> bool:
        return torch.equal(self.src.rows(BLOCKS, TOKENS), self.dst.rows(INTO, TOKENS))


@METHODS
@pytest.mark.parametrize("by_layer", [False, True])
@pytest.mark.parametrize("first", ["offer", "pull"])
def test_an_offer_is_found_by_its_name(
    made: Sides, expose: str, by_layer: bool, first: str
) -> None:
    pair = Pair(made, expose)
    name = token_bytes(16)
    offers = []
    if first == "offer":
        offers.append(pair.owner.offer(BLOCKS, tokens=TOKENS, name=name))
    pulled = pair.reader.pull(pair.ticket(name), INTO, by_layer=by_layer, verify=True)
    if first == "pull":
        sleep(0.05)
        assert not pulled.ended
        assert not any(layer.done() for layer in pulled.layers)
        offers.append(pair.owner.offer(BLOCKS, tokens=TOKENS, name=name))
    assert len(pulled.layers) == 2 * by_layer
    for layer in pulled.layers:
        layer.synchronize(LIMIT)
    pulled.synchronize(LIMIT)
    assert pair.right()
    assert pulled.statistics.blocks == 2
    assert offers[0].taken(LIMIT)
    assert offers[0].state == "taken"


def test_an_offer_that_is_not_found_is_not_pulled(made: Sides) -> None:
    """The control of the tests above."""
    pair = Pair(made)
    pair.owner.channel.serve(messages.Find, lambda *_: messages.Found((b"",), ("",)))
    name = token_bytes(16)
    pair.owner.offer(BLOCKS, tokens=TOKENS, name=name)
    with pytest.raises(TransferTimeout):
        pair.reader.pull(pair.ticket(name), INTO, timeout=0.3).synchronize(LIMIT)


def test_a_pull_waits_until_its_timeout(made: Sides) -> None:
    pair = Pair(made)
    pulled = pair.reader.pull(pair.ticket(token_bytes(16)), INTO, by_layer=True, timeout=0.2)
    with pytest.raises(TransferTimeout):
        pulled.synchronize(LIMIT)
    with pytest.raises(TransferTimeout):
        pulled.layers[0].synchronize(LIMIT)
    assert until(lambda: pair.reader.statistics()["pulls"] == 0, LIMIT)


def test_a_pull_that_waits_is_cancelled(made: Sides) -> None:
    pair = Pair(made)
    pulled = pair.reader.pull(pair.ticket(token_bytes(16)), INTO)
    assert pulled.cancel()
    with pytest.raises(TransferCancelled):
        pulled.synchronize(LIMIT)
    assert pair.dst.whole.eq(-1).all()


def test_a_reader_that_closes_cancels_pulls_that_wait(made: Sides) -> None:
    pair = Pair(made)
    pulls = [pair.reader.pull(pair.ticket(token_bytes(16)), INTO) for _ in range(3)]
    pair.reader.close()
    assert [type(pulled.error) for pulled in pulls] == [TransferCancelled] * 3


def test_a_name_of_an_ended_offer_says_why(made: Sides) -> None:
    pair = Pair(made)
    for end, why in (("taken", "have taken it"), ("revoked", "revoked"), ("expired", "expired")):
        name = token_bytes(16)
        lease = 0.05 if end == "expired" else LIMIT
        offer = pair.owner.offer(BLOCKS, tokens=TOKENS, name=name, lease=lease)
        if end == "taken":
            pair.reader.pull(offer.ticket, INTO).synchronize(LIMIT)
            assert offer.taken(LIMIT)
        elif end == "revoked":
            assert pair.owner.revoke(pair.ticket(name))
        else:
            sleep(0.1)
        assert not pair.owner.revoke(pair.ticket(name))
        with pytest.raises(OfferGone, match=why):
            pair.reader.pull(pair.ticket(name), INTO).synchronize(LIMIT)
        # Afterwards another offer may have it.
        pair.owner.offer(BLOCKS, tokens=TOKENS, name=name)
        pair.reader.pull(pair.ticket(name), INTO).synchronize(LIMIT)
        assert pair.right()


def test_a_name_is_of_one_offer(made: Sides) -> None:
    pair = Pair(made)
    name = token_bytes(16)
    offer = pair.owner.offer(BLOCKS, tokens=TOKENS, name=name)
    with pytest.raises(InvalidTerms, match="an offer that holds"):
        pair.owner.offer([1], tokens=4, name=name)
    pair.reader.pull(pair.ticket(name), INTO).synchronize(LIMIT)
    assert pair.right()
    assert offer.taken(LIMIT)
    assert pair.owner.statistics()["held"] == 0


@pytest.mark.parametrize("name", [b"", b"x" * 15, b"x" * 65, "x" * 16, 7])
def test_names_are_16_to_64_bytes(made: Sides, name: Any) -> None:
    pair = Pair(made)
    with pytest.raises(InvalidTerms, match="name"):
        pair.owner.offer(BLOCKS, tokens=TOKENS, name=name)
    with pytest.raises(InvalidTerms, match="name"):
        pair.ticket(name)
    with pytest.raises(InvalidTerms, match="epoch"):
        Ticket.of(pair.owner.channel.address, b"short", b"x" * 16)


def test_tickets_by_name_and_plain_ones_are_pulled_together(made: Sides) -> None:
    """Each owner has one of the two layers."""
    src = Rows()
    dst = Rows(8, 32, fill=-1)
    halves = [src.half(layer) for layer in (0, 1)]
    owners = [made.owner(half) for half in halves]
    reader = made.reader(dst.shard)
    name = token_bytes(32)
    plain = owners[0].offer(BLOCKS, tokens=TOKENS)
    by_name = Ticket.of(owners[1].channel.address, owners[1].epoch, name)
    pulled = reader.pull([plain.ticket, by_name], INTO)
    sleep(0.05)
    assert not pulled.ended
    owners[1].offer(BLOCKS, tokens=TOKENS, name=name)
    pulled.synchronize(LIMIT)
    assert torch.equal(src.rows(BLOCKS, TOKENS), dst.rows(INTO, TOKENS))


def test_many_pulls_wait_together_for_offers_in_any_order(made: Sides) -> None:
    """More than one question holds."""
    pair = Pair(made)
    names = [token_bytes(16) for _ in range(messages.MOST_NAMES + 40)]
    pulls = [pair.reader.pull(pair.ticket(name), [0], timeout=LIMIT) for name in names]
    random.Random(1).shuffle(names)
    for name in names:
        pair.owner.offer([3], tokens=16, name=name)
    for pulled in pulls:
        pulled.synchronize(LIMIT)
    assert torch.equal(pair.src.rows([3], 16), pair.dst.rows([0], 16))
    assert until(lambda: pair.owner.statistics()["held"] == 0, LIMIT)


@pytest.mark.usefixtures("no_tables")
@pytest.mark.parametrize("asked", [False, True])
def test_a_new_name_does_not_wait_for_the_pause_between_questions(
    made: Sides, monkeypatch: pytest.MonkeyPatch, asked: bool
) -> None:
    """``asked``: the control, in which all names wait for the pause, which does not end."""
    pair = Pair(made)
    monkeypatch.setattr("portakv.migrate.reader.PAUSE", 3600.0)
    monkeypatch.setattr(Finder, "find_now", lambda *_: False)
    if asked:
        is_due = Finder.is_due
        monkeypatch.setattr(
            Finder, "is_due", lambda self, owner, kind, first=False: is_due(self, owner, kind)
        )
    for turn in range(3):
        name = token_bytes(16)
        pair.owner.offer(BLOCKS, tokens=TOKENS, name=name)
        if asked and turn:
            with pytest.raises(TransferTimeout):
                pair.reader.pull(pair.ticket(name), INTO, timeout=0.3).synchronize(LIMIT)
        else:
            pair.reader.pull(pair.ticket(name), INTO, timeout=LIMIT).synchronize(LIMIT)
            assert pair.right()


class Asked:
    """The questions about names that calls of `Reader.pull` have asked, and no other thread."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.many = 0
        ask_all = Channel.ask_all

        def counted(channel: Channel, requests: Any, kind: Any, timeout: float) -> Any:
            self.many += timeout == MOMENT
            return ask_all(channel, requests, kind, timeout)

        monkeypatch.setattr(Channel, "ask_all", counted)


def known_pair(made: Sides) -> Pair:
    """Return an owner and a reader that are connected."""
    pair = Pair(made)
    pair.reader.prepare(pair.owner.channel.address).synchronize(LIMIT)
    return pair


@pytest.mark.usefixtures("no_tables")
@pytest.mark.parametrize("calls_ask", [True, False])
def test_a_call_finds_an_offer_that_exists(
    made: Sides, monkeypatch: pytest.MonkeyPatch, calls_ask: bool
) -> None:
    """``calls_ask`` False: the control. The reader's thread finds no offer in both cases."""
    pair = known_pair(made)
    monkeypatch.setattr(Finder, "is_due", lambda *_, **__: False)
    if not calls_ask:
        monkeypatch.setattr(Finder, "find_now", lambda *_: False)
    monkeypatch.setattr("portakv.migrate.reader.MOMENT", LIMIT)
    name = token_bytes(16)
    pair.owner.offer(BLOCKS, tokens=TOKENS, name=name)
    pulled = pair.reader.pull(pair.ticket(name), INTO, timeout=LIMIT if calls_ask else 0.3)
    if calls_ask:
        pulled.synchronize(LIMIT)
        assert pair.right()
    else:
        with pytest.raises(TransferTimeout):
            pulled.synchronize(LIMIT)


def test_pulls_that_begin_together_are_asked_for_by_one_call(
    made: Sides, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("portakv.migrate.reader.LATE", 0.0)
    pair = known_pair(made)
    asked = Asked(monkeypatch)
    names = [token_bytes(16) for _ in range(3)]
    pulls = [pair.reader.pull(pair.ticket(name), INTO) for name in names]
    assert asked.many == 1
    for name in names:
        pair.owner.offer(BLOCKS, tokens=TOKENS, name=name)
    for pulled in pulls:
        pulled.synchronize(LIMIT)
    assert pair.right()
    pair.reader.pull(pair.ticket(token_bytes(16)), INTO).cancel()
    assert asked.many == 2


@pytest.mark.usefixtures("no_tables")
@pytest.mark.parametrize("late", [3600.0, 0.0])
def test_calls_do_not_wait_for_an_owner_that_is_late(
    made: Sides, monkeypatch: pytest.MonkeyPatch, late: float
) -> None:
    """0: the control, in which each call asks."""
    monkeypatch.setattr("portakv.migrate.reader.LATE", late)
    pair = known_pair(made)
    asked = Asked(monkeypatch)
    goes_on = threading.Event()
    name = token_bytes(16)
    offer = pair.owner.offer(BLOCKS, tokens=TOKENS, name=name)

    def held(_: Peer, find: messages.Find) -> messages.Found:
        goes_on.wait(LIMIT)
        return messages.Found((offer.ticket,) * len(find.names), ("",) * len(find.names))

    pair.owner.channel.serve(messages.Find, held)
    try:
        first = pair.reader.pull(pair.ticket(name), INTO)
        assert asked.many == 1
        first.cancel()
        assert until(lambda: first.ended, LIMIT)
        pulled = pair.reader.pull(pair.ticket(name), INTO)
        assert asked.many == (1 if late else 2)
        assert not pulled.ended
    finally:
        goes_on.set()
    pulled.synchronize(LIMIT)
    assert pair.right()


@pytest.mark.parametrize("by_layer", [False, True])
def test_a_pull_by_name_ends_with_its_error(made: Sides, by_layer: bool) -> None:
    """As one whose offer came later; no call raises it."""
    pair = known_pair(made)
    pair.reader.finished()
    name = token_bytes(16)
    pair.owner.offer(BLOCKS, tokens=TOKENS, name=name)
    pulled = pair.reader.pull(pair.ticket(name), [4], by_layer=by_layer)
    with pytest.raises(SlotError):
        pulled.synchronize(LIMIT)
    assert len(pulled.layers) == 2 * by_layer
    for layer in pulled.layers:
        with pytest.raises(SlotError):
            layer.synchronize(LIMIT)
    assert until(lambda: pulled in pair.reader.finished(), LIMIT)
    assert not pair.reader.finished()


def test_a_reallocation_ends_the_wait(made: Sides) -> None:
    pair = Pair(made)
    pulled = pair.reader.pull(pair.ticket(token_bytes(16)), INTO, by_layer=True)
    pair.owner.reallocate(pair.src.shard)
    with pytest.raises(OfferGone, match="restarted, or has other memory"):
        pulled.synchronize(LIMIT)
    with pytest.raises(OfferGone):
        pulled.layers[1].synchronize(LIMIT)


def test_an_owner_that_closes_ends_the_wait(made: Sides) -> None:
    pair = Pair(made)
    pulled = pair.reader.pull(pair.ticket(token_bytes(16)), INTO)
    pair.owner.close()
    with pytest.raises(OfferGone):
        pulled.synchronize(LIMIT)


def test_an_owner_that_is_killed_ends_the_wait_of_its_pulls_alone(made: Sides) -> None:
    pair = Pair(made)
    name = token_bytes(16)
    with Nursery() as nursery:
        pid, (address, epoch) = nursery.born(OWNER)
        lost = pair.reader.pull(Ticket.of(address, epoch, name), INTO)
        other = pair.reader.pull(pair.ticket(name), INTO)
        sleep(0.1)
        nursery.end(pid)
        with pytest.raises(PeerError):
            lost.synchronize(LIMIT)
        pair.owner.offer(BLOCKS, tokens=TOKENS, name=name)
        other.synchronize(LIMIT)
    assert pair.right()


def test_an_owner_that_is_stopped_delays_no_other(made: Sides) -> None:
    pair = Pair(made)
    name = token_bytes(16)
    with Nursery() as nursery:
        pid, (address, epoch) = nursery.born(OWNER)
        stopped = pair.reader.pull(Ticket.of(address, epoch, name), INTO, timeout=2.0)
        sleep(0.1)
        stop(pid)
        try:
            other = pair.reader.pull(pair.ticket(name), INTO)
            pair.owner.offer(BLOCKS, tokens=TOKENS, name=name)
            other.synchronize(LIMIT)
            assert pair.right()
            with pytest.raises((TransferTimeout, PeerError)):
                stopped.synchronize(LIMIT)
        finally:
            go_on(pid)


@pytest.mark.parametrize("by_layer", [False, True])
def test_on_a_device_the_rows_come_after_the_work_of_the_callers_stream(
    made: Sides, accelerator: torch.device, by_layer: bool
) -> None:
    device = accelerator
    shape = (2, 2, 16, 16, 4, 8)
    src = torch.randint(0, 1 << 14, shape, dtype=torch.int16).to(device)
    dst = torch.zeros(shape, dtype=torch.int16, device=device)
    owner = made.owner(Rows.shard_of(src))
    reader = made.reader(Rows.shard_of(dst))
    callers = torch.Stream(device)
    for turn in range(3):
        name = token_bytes(16)
        ticket = Ticket.of(owner.channel.address, owner.epoch, name)
        with on(callers):
            if device.type == "cuda":
                _sleep(500_000_000)
            else:
                simdev.delay(callers, 300)
            dst.fill_(turn)  # the last use of these rows before the pull
            pulled = reader.pull(ticket, INTO, by_layer=by_layer)
        src.add_(1)
        owner.offer([4, 9], tokens=32, name=name)
        for layer in pulled.layers:
            layer.synchronize(LIMIT)
        pulled.synchronize(LIMIT)
        torch.accelerator.synchronize(device)
        assert torch.equal(dst[:, :, INTO].cpu(), src[:, :, [4, 9]].cpu())
        assert bool(dst[:, :, 0].cpu().eq(turn).all())


def reached_first(made: Sides, device: torch.device, delay: int) -> bool:
    """Pull rows that their owner's stream still writes; return whether the caller's stream is done
    before the owner's."""
    rows = [torch.zeros(2, 2, 16, 16, 4, 8, dtype=torch.int16, device=device) for _ in range(2)]
    owner = made.owner(Rows.shard_of(rows[0]))
    reader = made.reader(Rows.shard_of(rows[1]))
    reader.prepare(owner.channel.address).synchronize(LIMIT)
    writes = torch.Stream(device)
    with on(writes):
        if device.type == "cuda":
            _sleep(delay * 1_000_000)
        else:
            simdev.delay(writes, delay)
        theirs = torch.Event(device)
        theirs.record()
        name = token_bytes(16)
        owner.offer([4, 9], tokens=32, name=name)
    ticket = Ticket.of(owner.channel.address, owner.epoch, name)
    with on(torch.Stream(device)):
        pulled = reader.pull(ticket, INTO)
        mine = torch.Event(device)
        mine.record()
    while not mine.query():
        sleep(1e-3)
    first = not theirs.query()
    pulled.synchronize(LIMIT)
    assert theirs.query()
    return first


def test_the_callers_stream_waits_for_no_owner(
    made: Sides, accelerator: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A delay may be over too early. Rows of the same process are sent, not mapped."""
    monkeypatch.setattr("portakv.migrate.reader.MOMENT", LIMIT)
    assert any(reached_first(made, accelerator, delay) for delay in (300, 1000, 3000))


@pytest.mark.parametrize("lie", ["count", "bytes", "other"])
def test_answers_that_do_not_fit_are_refused(made: Sides, lie: str) -> None:
    pair = Pair(made)
    offer = pair.owner.offer(BLOCKS, tokens=TOKENS)
    found = {
        "count": messages.Found((), ()),
        "bytes": messages.Found((b"not a ticket of this release",), ("",)),
        "other": messages.Found((offer.ticket[:16] + offer.ticket[:-1] + b"x",), ("",)),
    }[lie]
    pair.owner.channel.serve(messages.Find, lambda *_: found)
    with pytest.raises(PeerError):
        pair.reader.pull(pair.ticket(token_bytes(16)), INTO).synchronize(LIMIT)
    assert pair.dst.whole.eq(-1).all()


def test_long_lists_of_slots(made: Sides) -> None:
    """One is too long for an answer, two are too long for one answer."""
    slots = 144_000
    whole = shared_empty((1, 2, slots // 16, 16, 1, 1), torch.int16)
    whole.copy_(torch.arange(2 * slots).view(whole.shape) & 0x7FFF)
    into = shared_empty((1, 2, slots // 16, 16, 1, 1), torch.int16)
    owner = made.owner(Rows.shard_of(whole))
    reader = made.reader(Rows.shard_of(into))
    listed = torch.randperm(slots, generator=torch.Generator().manual_seed(1))
    with pytest.raises(SlotError, match="bytes of ids for an offer with a name"):
        owner.offer(Index(listed), tokens=slots, name=token_bytes(16))
    assert owner.statistics()["held"] == 0
    names = [token_bytes(16) for _ in range(3)]
    tokens = slots // 2
    for name in names:
        owner.offer(Index(listed[:tokens]), tokens=tokens, name=name)
    tickets = [Ticket.of(owner.channel.address, owner.epoch, name) for name in names]
    for pulled in [reader.pull(ticket, Index()) for ticket in tickets]:
        pulled.synchronize(LIMIT)
    rows = whole.flatten(2, 3)[:, :, listed[:tokens]]
    assert torch.equal(into.flatten(2, 3)[:, :, :tokens], rows)


def test_a_name_of_an_offer_whose_lease_is_over_is_free(made: Sides) -> None:
    """The owner's own thread looks at it, and must not wait for itself."""
    pair = Pair(made)
    name = token_bytes(16)
    pair.owner.offer(BLOCKS, tokens=TOKENS, name=name, lease=0.02)
    sleep(0.05)
    second = pair.owner.offer(BLOCKS, tokens=TOKENS, name=name)
    assert second.state == "held"
    assert pair.owner.statistics()["expired"] == 1


def test_a_refused_name_ends_no_offer(made: Sides) -> None:
    pair = Pair(made)
    name = token_bytes(16)
    pair.owner.finished()
    pair.owner.offer(BLOCKS, tokens=TOKENS, name=name)
    with pytest.raises(InvalidTerms) as refused:
        pair.owner.offer([1], tokens=4, name=name)
    assert repr(name) not in str(refused.value)
    assert pair.owner.finished() == []
    assert pair.owner.statistics()["held"] == 1


def test_a_layer_that_did_not_come_is_not_done(made: Sides) -> None:
    pair = Pair(made, "staging")
    name = token_bytes(16)
    pair.owner.channel.serve(messages.Gather, lambda *_: messages.Answer("gone", "it is a test"))
    pair.owner.offer(BLOCKS, tokens=TOKENS, name=name)
    pulled = pair.reader.pull(pair.ticket(name), INTO, by_layer=True)
    with pytest.raises(OfferGone):
        pulled.synchronize(LIMIT)
    for layer in pulled.layers:
        with pytest.raises((OfferGone, TransferCancelled)):
            layer.done()
        wrong: Any
        for wrong in ("a", -1):
            with pytest.raises(InvalidTerms):
                layer.synchronize(wrong)


def test_another_epoch_of_an_address_is_asked_for_as_well(made: Sides) -> None:
    pair = Pair(made)
    waits = pair.reader.pull(pair.ticket(token_bytes(16)), INTO)
    old = Ticket.of(pair.owner.channel.address, bytes(16), token_bytes(16))
    with pytest.raises(OfferGone):
        pair.reader.pull(old, INTO).synchronize(LIMIT)
    assert not waits.ended


def test_an_owner_that_wakes_late_is_waited_for(made: Sides) -> None:
    """The first connection may take longer than a question, for plain tickets too."""
    pair = Pair(made)
    name = token_bytes(16)
    with Nursery() as nursery:
        pid, (address, epoch) = nursery.born(OWNER)
        stop(pid)
        pulled = pair.reader.pull(Ticket.of(address, epoch, name), INTO, timeout=2.0)
        sleep(0.4)
        go_on(pid)
        with pytest.raises(TransferTimeout):  # it makes no offer; nothing else failed
            pulled.synchronize(LIMIT)


def test_a_wrong_ticket_beside_a_name_is_refused_at_the_call(made: Sides) -> None:
    pair = Pair(made)
    with pytest.raises(PeerError, match="not a ticket"):
        pair.reader.pull([pair.ticket(token_bytes(16)), b"x" * 40], INTO)


@pytest.mark.parametrize("end", ["cancel", "close"])
def test_nothing_is_written_after_a_pull_was_stopped_during_its_handshake(
    made: Sides, end: str
) -> None:
    pair = Pair(made)
    name = token_bytes(16)
    pair.owner.offer(BLOCKS, tokens=TOKENS, name=name)
    with Nursery() as nursery:
        pid, (address, epoch) = nursery.born(OWNER)
        stop(pid)
        both = [pair.ticket(name), Ticket.of(address, epoch, name)]
        pulled = pair.reader.pull(both, INTO, by_layer=True)
        sleep(0.2)
        if end == "cancel":
            assert pulled.cancel()
        else:
            pair.reader.close()
        go_on(pid)
        with pytest.raises(TransferCancelled):
            pulled.synchronize(LIMIT)
        with pytest.raises(TransferCancelled):
            pulled.layers[0].synchronize(LIMIT)
        sleep(0.3)
        assert pair.dst.whole.eq(-1).all()


def test_stopped_owners_are_asked_together(made: Sides) -> None:
    """Each alone would take the thread a tenth of a second, in which no other pull begins."""
    pair = Pair(made)
    name = token_bytes(16)
    pair.reader.pull(pair.owner.offer([1], tokens=16).ticket, [3]).synchronize(LIMIT)
    with Nursery() as nursery:
        born = [nursery.born(OWNER) for _ in range(4)]
        stopped = [
            pair.reader.pull(Ticket.of(address, epoch, name), INTO, timeout=2 * LIMIT)
            for _, (address, epoch) in born
        ]
        assert until(lambda: pair.reader.statistics()["owners"] == 5, LIMIT)
        for pid, _ in born:
            stop(pid)
        try:
            sleep(0.2)
            for number in range(4):
                name = bytes([number]) * 16
                pair.owner.offer(BLOCKS, tokens=TOKENS, name=name)
                pair.reader.pull(pair.ticket(name), INTO).synchronize(LIMIT)
            assert not any(pulled.ended for pulled in stopped)
            assert pair.right()
        finally:
            for pid, _ in born:
                go_on(pid)
        for pulled in stopped:
            pulled.cancel()
            with pytest.raises((TransferCancelled, PeerError)):
                pulled.synchronize(LIMIT)


# --- leases by name


def test_leases_are_renewed_by_name(made: Sides) -> None:
    """Of offers that exist, in this epoch, at most to the longest lease."""
    pair = Pair(made)
    clock = Clock(pair.owner)
    names = [token_bytes(16) for _ in range(3)]
    offers = [
        pair.owner.offer(BLOCKS, tokens=TOKENS, lease=1.0, max_lease=20.0, name=name)
        for name in names[:2]
    ]
    address = pair.owner.channel.address
    tell = pair.reader.channel.tell
    tell(address, messages.RenewNamed(token_bytes(16), (names[0],), 50.0))
    tell(address, messages.RenewNamed(pair.owner.epoch, (names[0], names[2]), 50.0))
    assert until(lambda: offers[0].lease.until > clock.now + 1.0)
    assert offers[0].lease.until == clock.now + 20.0
    clock.now += 2.0
    assert [offer.state for offer in offers] == ["held", "expired"]
    tell(address, messages.RenewNamed(pair.owner.epoch, tuple(names), 0.0))
    tell(address, messages.EndNamed(pair.owner.epoch, (names[0],)))
    assert until(lambda: offers[0].state == "taken")


@pytest.mark.parametrize("released", [False, True])
def test_an_offer_that_readers_released_before_it_was_made_ends(
    made: Sides, released: bool
) -> None:
    """Later offers of the name hold."""
    pair = Pair(made)
    owner = pair.owner
    name = token_bytes(16)
    epoch = owner.epoch if released else token_bytes(16)
    pair.reader.channel.tell(owner.channel.address, messages.EndNamed(epoch, (name,)))
    pair.reader.channel.ask(
        owner.channel.address, messages.Find(owner.epoch, (name,)), messages.Found
    )
    owner.finished()
    offer = owner.offer(BLOCKS, tokens=TOKENS, readers=1 << 31, name=name)
    assert offer.state == ("taken" if released else "held")
    assert [each.offer for each in owner.finished()] == [offer] * released
    if released:
        with pytest.raises(OfferGone):
            pair.reader.pull(pair.ticket(name), INTO).synchronize(LIMIT)
        offer = owner.offer(BLOCKS, tokens=TOKENS, readers=1 << 31, name=name)
        assert offer.state == "held"
    pair.reader.pull(pair.ticket(name), INTO).synchronize(LIMIT)
    assert pair.right()


def test_offers_of_many_readers_end_by_name(made: Sides) -> None:
    """Each of two readers has the rows; the owner learns that there is no third."""
    pair = Pair(made)
    name = token_bytes(16)
    offer = pair.owner.offer(BLOCKS, tokens=TOKENS, readers=1 << 31, name=name)
    for _ in range(2):
        other = made.reader(pair.dst.shard)
        other.pull(pair.ticket(name), INTO).synchronize(LIMIT)
        assert pair.right()
    address = pair.owner.channel.address
    tell = pair.reader.channel.tell
    tell(address, messages.EndNamed(token_bytes(16), (name,)))
    pair.reader.pull(pair.ticket(name), INTO).synchronize(LIMIT)
    assert offer.state == "held"
    tell(address, messages.EndNamed(pair.owner.epoch, (name,)))
    assert until(lambda: offer.state == "taken")
    with pytest.raises(OfferGone, match="its readers have taken it"):
        pair.reader.pull(pair.ticket(name), INTO).synchronize(LIMIT)
