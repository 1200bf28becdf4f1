# SPDX-License-Identifier: Apache-2.0
"""An owner of staged rows with several transports, and the transport that two sides agree on."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, cast

import pytest
import torch
from migrate.transports.test_onesided import Memory
from support.migrate_pulls import SMALL, Couple, Rows, Sides, sides
from support.waits import LIMIT, until

from portakv.errors import InvalidTerms, PeerError, TransferError, Unsupported
from portakv.migrate.channel import Channel, Peer
from portakv.migrate.messages import Answer, Gather, Hello, Message, Stop
from portakv.migrate.owner import Gathers
from portakv.migrate.transports import TRANSPORTS
from portakv.migrate.transports.distributed import Join, rendezvous
from portakv.migrate.transports.onesided import Taken, There, Where
from portakv.tasks import Wait, runtime


class Other(Memory):
    """A second library."""

    name = "other"


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[Sides]:
    for kind in (Memory, Other):
        monkeypatch.setitem(TRANSPORTS.targets, kind.name, kind)
    with sides() as those:
        yield those


def pulled(made: Sides, both: Couple, transport: str | None) -> str:
    """Pull twice by a separate reader; return its explanation."""
    local = Rows(8, 32, fill=-1)
    reader = made.reader(local.shard, transport=transport, timeout=5.0)
    for _ in range(2):
        reader.pull(both.offer().ticket, both.into, verify=True).synchronize(LIMIT)
    return reader.explain(both.offer().ticket)


def test_readers_of_one_owner_use_several_transports_at_once(made: Sides) -> None:
    """An owner of a GPU has one transport for readers on GPUs and another for readers on hosts."""
    both = Couple(made, "staging")
    readers = [
        made.reader(Rows(8, 32, fill=-1).shard, transport=name)
        for name in ("memory", "other", "distributed")
    ]
    for _ in range(3):
        for reader in readers:
            reader.pull(both.offer().ticket, both.into, verify=True).synchronize(LIMIT)


def test_a_rendezvous_of_the_owners_channel_and_pulls_leave_each_other_alone(made: Sides) -> None:
    both = Couple(made, "staging")
    both.pull(both.offer()).synchronize(LIMIT)
    here = rendezvous(both.owner.channel)
    pulled(made, both, None)
    there = rendezvous(both.reader.channel, both.owner.channel.address)
    here.set("key", b"1")
    there.wait(["key"], timedelta(seconds=5))
    assert here.num_keys() == 1


@pytest.mark.parametrize("by", ["name", "environment"])
def test_a_transport_that_the_owner_was_told_to_use_is_the_readers_as_well(
    made: Sides, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    if by == "environment":
        monkeypatch.setenv("PORTAKV_MOVER", "memory")
    both = Couple(made, "staging", **({"transport": "memory"} if by == "name" else {}))
    monkeypatch.delenv("PORTAKV_MOVER", raising=False)
    text = pulled(made, both, None)
    assert "memory sends the rows through staging buffers" in text
    assert "memory: accepted, it is here; it was requested by name" in text
    why = "The owner's transport 'memory': the reader uses 'distributed'; pass both the same"
    with pytest.raises(Unsupported, match=why):
        pulled(made, both, "distributed")


def test_a_transport_that_nobody_knows_is_refused_at_once(made: Sides) -> None:
    rows = Rows()
    for make in (made.owner, made.reader):
        with pytest.raises(InvalidTerms, match=r"Expected transport to be .*, got 'pigeon'"):
            make(rows.shard, transport="pigeon")


def test_who_agreed_upon_no_transport_is_not_answered(made: Sides) -> None:
    """Fault 12. The owner reports neither a group nor a place."""
    both = Couple(made, "staging")
    pulled(made, both, "memory")
    pulled(made, both, None)
    for requested in (Join("x"), Where(1), Taken(1)):
        with pytest.raises(PeerError, match="Expected the agreed transport"):
            both.reader.channel.ask(both.owner.channel.address, requested, Answer)


def test_a_reader_that_pairs_anew_finds_its_slots_free(
    made: Sides, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 20. Whatever it had not taken when its owner had other memory."""
    gate = threading.Event()
    monkeypatch.setattr(Other, "stuck", gate)
    both = Couple(made, "staging", transport="other")
    before = both.pull(both.offer())
    assert until(lambda: both.owner.statistics()["slots"] >= 2)
    both.owner.reallocate(both.src.shard)
    monkeypatch.setattr(Other, "stuck", None)
    both.pull(both.offer()).synchronize(LIMIT)  # while the first is stuck
    assert both.right()
    gate.set()
    with pytest.raises(PeerError):
        before.synchronize(LIMIT)


class Held(NamedTuple):
    """Work before an offer's rows: it lasts until an event or for some seconds, or fails."""

    event: threading.Event
    seconds: float = 20.0
    error: Exception | None = None

    @contextmanager
    def inside(self, _: object = None) -> Iterator[None]:
        self.event.wait(self.seconds)
        if self.error:
            raise self.error
        yield


@pytest.mark.parametrize("transport", ["other", "distributed"])
def test_an_owner_that_cannot_bring_rows_says_so_at_once(
    made: Sides, monkeypatch: pytest.MonkeyPatch, transport: str
) -> None:
    """Fault 27. It has no memory for a buffer, or fails as it fills one: the first, before
    transports have met, or a later one. Its reader does not wait; later there may be room."""
    both = Couple(made, "staging", transport=transport)
    error = torch.OutOfMemoryError("no room")

    def full(*_: Any) -> Any:
        raise error

    for at in ("staging", "first", "later"):
        offer = both.offer()
        with monkeypatch.context() as patch:
            if at == "staging":
                patch.setattr("portakv.migrate.staged_lanes.staging", full)
            else:
                offer.after = cast(Any, Held(threading.Event(), 0, error))
            with pytest.raises(PeerError):
                both.pull(offer, timeout=LIMIT).synchronize(2 * LIMIT)
        if at != "staging":
            both.pull(both.offer()).synchronize(LIMIT)
            assert both.right()


def test_an_owner_that_is_asked_for_no_rows_knows_of_a_pull_that_lasts(made: Sides) -> None:
    """Fault 7. Another one has all of them: its offer ends with the reader all the same."""
    both = Couple(made, "staging")
    gate = threading.Event()
    also = made.owner(both.src.shard, expose="staging", staging=SMALL)
    offers = [one.offer(both.blocks, tokens=both.tokens) for one in (both.owner, also)]
    for offer in offers:
        offer.after = cast(Any, Held(gate))
    pull = both.reader.pull([offer.ticket for offer in offers], both.into)
    assert until(lambda: all(offer.begun for offer in offers))
    gate.set()
    pull.synchronize(LIMIT)
    assert both.right()


@pytest.mark.parametrize("once", [False, True])
def test_only_the_memory_that_slots_have_now_is_registered(
    made: Sides, monkeypatch: pytest.MonkeyPatch, once: bool
) -> None:
    """Buffers grow with pulls; an owner whose readers learn of it once has all from the start."""
    monkeypatch.setattr(Other, "knows_once", once)
    both = Couple(made, "staging", transport="other")
    for both.tokens in (1, 10, 20, 40, 75, 3):
        both.pull(both.offer(), verify=True).synchronize(LIMIT)
        assert both.right()
    (connection,) = both.reader._owners._owners.values()
    carrier: Any = connection.staging.transport
    lines = both.owner._gathers._lines.values()
    transport: Any = next(iter(lines)).transport

    def only_these() -> bool:  # the next buffer releases what a buffer had before it grew
        both.pull(both.offer()).synchronize(LIMIT)
        free = [*connection.staging.buffers]
        memory = [buffer.memory for buffer in free]
        local = {(x.data_ptr(), x.nbytes) for x in memory if x.nbytes}
        used = [buffer.memory for line in lines for buffer in line.buffers.values()]
        remote = {(x.data_ptr(), x.nbytes) for x in used}
        remote = {(min(remote)[0], SMALL)} if once else remote
        return {*transport.entered} == remote and {*carrier.entered} == local

    assert until(only_these)
    assert not once or len(transport.log) == 1
    both.reader.close()
    assert until(lambda: not (transport.entered or carrier.entered))


def test_rows_of_a_pairing_before_are_not_taken_for_those_of_now(made: Sides) -> None:
    """Fault 20. What was still to be brought when the owner's memory was replaced, under the tags
    with which the next pairing begins."""
    both = Couple(made, "staging", transport="other")
    gate = threading.Event()
    offer = both.offer()
    offer.after = cast(Any, Held(gate))
    before = both.pull(offer)
    assert until(lambda: len(both.owner._gathers._tasks))
    both.src = Rows(fill=7)
    both.owner.reallocate(both.src.shard)
    offer = both.offer()
    offer.after = cast(Any, Held(threading.Event(), 0.2))
    pull = both.pull(offer)
    gate.set()
    pull.synchronize(LIMIT)  # longer than a lane's patience with a peer
    assert both.right()
    with pytest.raises(PeerError):
        before.synchronize(LIMIT)


class Late(Channel):
    """A channel of which messages of a ``kind`` wait, before they take the connection, until an
    event is set, as threads do that the host does not run."""

    kind: type[Message] | None = None

    def __init__(self, *terms: Any, **named: Any) -> None:
        self.event = threading.Event()
        self.waiting = 0
        self.places = set[int]()  # tags whose buffers were requested
        self.gathers = 0  # requests for rows that were answered
        super().__init__(*terms, **named)

    async def answer(self, address: str, message: Message, *terms: Any, **named: Any) -> Any:
        if self.waits(message):
            while not self.event.is_set():
                await Wait(until=runtime().time() + 0.01)
        if isinstance(message, Where):
            self.places.add(message.tag)
        answer: Any = await super().answer(address, message, *terms, **named)
        self.gathers += isinstance(message, Gather)
        return answer

    def tell(self, address: str, message: Message, *terms: Any) -> None:
        if self.waits(message):
            assert self.event.wait(LIMIT)
        super().tell(address, message, *terms)

    def waits(self, message: Message) -> bool:
        """Return True, and count the message, if it is of the kind."""
        held = self.kind is not None and isinstance(message, self.kind)
        self.waiting += held
        return held


@pytest.mark.parametrize("kind", [Taken, Stop])
def test_messages_of_a_pairing_before_are_not_sent_in_the_next(
    made: Sides, monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    """Fault 20. They name slices by the tags that the next pairing uses as well: its owner would
    drop the slices, or send zeros."""
    monkeypatch.setattr("support.migrate_pulls.Channel", Late)
    both = Couple(made, "staging", transport="other")
    late = cast(Late, both.reader.channel)
    late.kind = kind
    gate = threading.Event()
    offer = both.offer()
    offer.after = cast(Any, Held(gate, 60))
    before = both.pull(offer)
    assert until(lambda: late.places == {1, 2}, LIMIT)
    if kind is Taken:  # the owner does not answer, so the reader closes its lane
        monkeypatch.setattr("portakv.migrate.staged_reader.STOPPING", 0.2)
        both.owner.channel.serve(Stop, lambda *_: None)
    assert before.cancel()
    # Of two buffers that were requested, and of those after the last that has a receive.
    assert until(lambda: late.waiting == (3 if kind is Taken else 1), LIMIT)

    both.owner.reallocate(both.src.shard)
    offer = both.offer()
    offer.after = cast(Any, Held(gate, 60))
    pull = both.pull(offer)
    assert until(lambda: late.gathers == 2, LIMIT)
    late.event.set()
    with pytest.raises(TransferError):
        before.synchronize(LIMIT)
    gate.set()
    pull.synchronize(LIMIT)
    assert both.right()


def test_the_late_end_of_a_connection_leaves_the_next_one_of_its_reader_alone(made: Sides) -> None:
    """Fault 9. A network was cut: the owner notices it after the reader has come back."""
    channel = made.owner(Rows().shard, expose="staging").channel
    gathers = Gathers(channel, 1 << 14, None, torch.device("cpu"))
    hello = Hello("a model", "cpu", "memory")
    before = Peer(bytes(16))
    now = Peer(bytes(16))
    for peer in (before, now):
        gathers.agree(peer, hello, torch.device("cpu"))
    before.end()
    assert gathers._answer_transport(now, Where(1)) == There()
    gathers.close()


def test_all_parts_of_an_offer_share_the_ids(made: Sides) -> None:
    """Their ids are checked once, and sent to a device once, whatever the number of the parts."""
    both = Couple(made, "staging")
    offer = both.offer()
    gathered = list[Any]()
    send = Gathers.send

    def sent(self: Gathers, peer: Peer, gather: Any, offered: Any) -> Answer:
        gathered.extend(offered.rows(part)[1] for part in gather.parts)
        return send(self, peer, gather, offered)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Gathers, "send", sent)
        both.pull(offer).synchronize(LIMIT)
    assert both.right()
    assert len(gathered) > 1
    assert len({id(index._store) for index in gathered}) == 1
