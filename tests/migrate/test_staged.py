# SPDX-License-Identifier: Apache-2.0
"""Rows that an owner sends in slices: one request, in step after a pull that ends early, and
nothing of rows whose offer has ended."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeVar, cast

import pytest
import torch
from msgspec.structs import replace
from support.migrate_pulls import SMALL, Couple, Rows, Sides, sides
from support.waits import LIMIT, until

from portakv.errors import OfferGone, PeerError, TransferCancelled, TransferError
from portakv.migrate.channel import Channel
from portakv.migrate.connections import StagingBuffer
from portakv.migrate.messages import MOST_PARTS, Answer, BoxPart, Gather, Renew, Stop, Ticket
from portakv.migrate.owner import Gathers, Owner
from portakv.migrate.staged_lanes import BUFFERS, MOST_WAITING
from portakv.migrate.staged_reader import BATCH, StagedReceiver
from portakv.migrate.transports.base import Moving, MovingStage
from portakv.migrate.transports.distributed import Join

NEVER = 1e-9  # 10^9 bytes a second: a pull of 75 tokens takes hours
SECRET = 0x5A5A
T = TypeVar("T")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[Sides]:
    monkeypatch.setattr("support.migrate_pulls.Channel", Watching)
    with sides() as those:
        yield those


async def nothing(*_: object) -> None:
    """Stop no request."""


class Held(NamedTuple):
    """Work before an offer's rows, which lasts until an event."""

    event: threading.Event
    entered: threading.Event

    @contextmanager
    def inside(self, _: object = None) -> Iterator[None]:
        self.entered.set()
        self.event.wait(LIMIT)
        yield


class Watching(Channel):
    """A channel that keeps all messages that it gets, and answers none of some kinds."""

    def __init__(self, *address: str, **terms: Any) -> None:
        self.seen = list[Any]()
        self.silent = set[type[Any]]()
        super().__init__(*address, **terms)

    def serve(self, kind: type[Any], answer: Callable[[Any, Any], Any]) -> None:
        def watched(peer: Any, message: Any) -> Any:
            self.seen.append(message)
            return None if kind in self.silent else answer(peer, message)

        super().serve(kind, watched)


def messages(owner: Owner, kind: type[T]) -> list[T]:
    """Return the messages of a kind that an owner got."""
    channel = cast(Watching, owner.channel)
    return [message for message in channel.seen if isinstance(message, kind)]


def test_a_pull_of_many_slices_is_one_request(made: Sides) -> None:
    both = Couple(made, "staging")
    pulled = both.pull(both.offer())
    pulled.synchronize(LIMIT)
    requests = messages(both.owner, Gather)
    assert both.right()
    assert both.spared()
    assert pulled.statistics.slices == len(requests[0].parts) > BUFFERS
    assert len(requests) == 1
    assert messages(both.owner, Stop) == []


def test_groups_of_one_offer_are_one_request(made: Sides) -> None:
    remote = [Rows(), Rows()]
    local = [Rows(8, 32, fill=-1), Rows(8, 32, fill=-1)]
    owner = made.owner(*(each.shard for each in remote), expose="staging", staging=SMALL)
    reader = made.reader(*(each.shard for each in local))
    offer = owner.offer([1, 2], [3, 4], tokens=32)
    reader.pull(offer.ticket, [3], [4]).synchronize(LIMIT)
    requests = messages(owner, Gather)
    for one, other, src, dst in zip(remote, local, ([1, 2], [3, 4]), ([3], [4]), strict=True):
        assert torch.equal(one.rows(src, 32), other.rows(dst, 32))
    assert {part.group for part in requests[0].parts} == {0, 1}
    assert len(requests) == 1


def test_a_pull_of_very_many_slices_lets_others_take_turns(made: Sides) -> None:
    """A staging buffer holds one token of a layer; a small pull does not wait for all of them."""
    remote, local = (torch.zeros(2, 2, 20, 16, 16, 64, dtype=torch.int16) for _ in range(2))
    remote.copy_(torch.arange(remote.numel()).view(remote.shape) % 30011)
    owner = made.owner(Rows.shard_of(remote), expose="staging", staging=BUFFERS << 12)
    reader = made.reader(Rows.shard_of(local))
    small = owner.offer([3], tokens=1, readers=9)
    pulled = reader.pull(owner.offer(range(20), tokens=320).ticket, range(20))
    assert until(lambda: len(messages(owner, Gather)) > 1, LIMIT)
    reader.pull(small.ticket, [3]).synchronize(LIMIT)
    assert not pulled.ended
    pulled.synchronize(LIMIT)
    assert torch.equal(remote, local)
    assert pulled.statistics.slices > MOST_PARTS
    assert max(len(request.parts) for request in messages(owner, Gather)) == BATCH


def pull_after_a_cancelled_one(both: Couple, timeout: float) -> bool:
    """Cancel a pull of which the owner has sent nothing yet, then pull other rows; return True if
    these are right."""
    gate = threading.Event()
    entered = threading.Event()
    offer = both.offer()
    offer.after = cast(Any, Held(gate, entered))
    pulled = both.pull(offer)
    assert entered.wait(LIMIT)
    time.sleep(0.1)  # the reader waits for slices in all of its buffers
    assert pulled.cancel()
    with pytest.raises(TransferCancelled):
        pulled.synchronize(LIMIT)
    offer.revoke()
    both.src.whole.add_(1)
    again = both.pull(both.offer(), timeout=timeout)
    gate.set()
    try:
        again.synchronize(LIMIT)
    except TransferError:
        return False
    return both.right()


@pytest.mark.parametrize("guarded", [True, False])
def test_slices_of_a_cancelled_pull_are_not_taken_for_those_of_the_next(
    made: Sides, monkeypatch: pytest.MonkeyPatch, guarded: bool
) -> None:
    """Both sides stay in step by one transport. Without `Stop` the next pull gets old rows."""
    monkeypatch.setattr("portakv.migrate.staged_reader.STOPPING", LIMIT)  # also on a busy machine
    both = Couple(made, "staging", transport="distributed")
    both.pull(both.offer()).synchronize(LIMIT)
    if not guarded:
        monkeypatch.setattr(StagedReceiver, "stop", nothing)
    assert pull_after_a_cancelled_one(both, LIMIT if guarded else 3.0) == guarded
    assert len(messages(both.owner, Join)) == 1 or not guarded


def test_pulls_that_are_cancelled_at_any_moment_leave_one_transport_in_step(
    made: Sides, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("portakv.migrate.staged_reader.STOPPING", LIMIT)  # also on a busy machine
    both = Couple(made, "staging", transport="distributed")
    both.pull(both.offer()).synchronize(LIMIT)
    seed = random.Random(7)
    cancelled = 0
    for turn in range(40):
        both.src.whole.fill_(turn)
        # Into other rows: a copy under way may write until its pull has ended.
        count = seed.randint(1, 3)
        pulls = [both.reader.pull(both.offer().ticket, [0, 2, 3]) for _ in range(count)]
        time.sleep(seed.random() * 0.02)
        for pulled in pulls:
            cancelled += pulled.cancel()
        both.src.whole.fill_(1000 + turn)
        both.dst.whole.fill_(-1)
        both.pull(both.offer()).synchronize(LIMIT)
        assert both.right()
        both.owner.revoke_all()
    assert cancelled
    assert len(messages(both.owner, Join)) == 1


class Middle:
    """The moment before the second slice of a request, which an owner's worker waits in."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.over = threading.Event()
        self._slices = 0

    def wait(self) -> None:
        """Wait, unless this is not the second slice."""
        self._slices += 1
        if self._slices == 2:
            self.reached.set()
            assert self.over.wait(LIMIT)


def revoked_in_the_middle(made: Sides, middle: Middle) -> bool:
    """Revoke an offer while its rows are sent, and use its blocks again; return True if nothing of
    the new rows has come to the reader."""
    both = Couple(made, "staging")
    # Only the last question says that the offer is gone: the reader takes all that it gets.
    both.owner.channel.serve(Renew, lambda *_: Answer("held", seconds=30.0))
    both.src.whole.fill_(7)
    offer = both.offer()
    pulled = both.pull(offer)
    assert middle.reached.wait(LIMIT)
    offer.revoke()
    both.src.whole.fill_(SECRET)
    middle.over.set()
    with pytest.raises(OfferGone, match="revoked"):
        pulled.synchronize(LIMIT)
    assert not pulled.published
    assert both.spared()
    return not bool((both.dst.whole == SECRET).any())


@pytest.mark.parametrize("guarded", [True, False])
def test_rows_are_not_read_after_the_end_of_their_offer(
    made: Sides, monkeypatch: pytest.MonkeyPatch, guarded: bool
) -> None:
    """The owner looks before each slice. If it does not, the reader gets another's rows."""
    middle = Middle()
    send: Callable[..., Any] = Gathers.send

    def waiting(self: Gathers, peer: Any, gather: Any, offered: Any) -> Any:
        def holds() -> bool:
            middle.wait()
            return not guarded or offered.holds()

        watched = copy(offered)
        watched.holds = holds
        return send(self, peer, gather, watched)

    monkeypatch.setattr(Gathers, "send", waiting)
    assert revoked_in_the_middle(made, middle) == guarded


def test_an_owner_that_does_not_stop_loses_its_lane_and_not_the_next_pull(made: Sides) -> None:
    """Its channel answers no `Stop`: the group is made anew."""
    both = Couple(made, "staging", transport="distributed")
    both.pull(both.offer()).synchronize(LIMIT)
    channel = cast(Watching, both.owner.channel)
    channel.silent.add(Stop)
    pulled = both.pull(both.offer(), max_gbps=NEVER)
    assert until(lambda: len(messages(both.owner, Gather)) == 2, LIMIT)
    assert pulled.cancel()
    with pytest.raises(TransferError):
        pulled.synchronize(LIMIT)
    channel.silent.clear()
    both.pull(both.offer()).synchronize(LIMIT)
    assert both.right()
    assert len(messages(both.owner, Join)) == 2


def test_a_reader_that_takes_nothing_is_busy_after_some_requests(made: Sides) -> None:
    """Fault 27. One who asks again and again does not hold up the others, and fills no memory."""
    both = Couple(made, "staging")
    offer = both.offer(readers=2)
    both.reader.explain(offer.ticket)
    parsed = Ticket.read(offer.ticket)
    channel = both.reader.channel
    parts = (BoxPart(0, (0, 2), (0, 4), 0, 16),)
    gather = Gather(parsed.epoch, parsed.offer, parts, "distributed", 1)
    answers = [
        channel.ask(parsed.address, replace(gather, tag=tag), Answer)
        for tag in range(1, MOST_WAITING + 3)
    ]
    assert {answer.state for answer in answers[:MOST_WAITING]} == {"done"}
    busy = answers[-1]
    assert busy.state == "busy"
    assert busy.seconds > 0
    assert both.owner.statistics()["slots"] == 1
    other = Rows(8, 32, fill=-1)
    made.reader(other.shard).pull(offer.ticket, both.into).synchronize(LIMIT)
    assert torch.equal(other.rows(both.into, 75), both.src.rows(both.blocks, 75))


@pytest.mark.parametrize("on", ["a device", "the host"])
@pytest.mark.parametrize(
    ("before", "nbytes", "expected"),
    [
        ("nothing", 64, []),
        ("a pull of the same lane", 64, ["copy is followed"]),
        ("a pull of the same lane", 128, ["bytes are awaited", "copy is awaited"]),
        ("a pull of another lane", 64, ["bytes are awaited", "copy is followed"]),
        ("a pull that ended early", 64, ["bytes are awaited"]),
    ],
)
def test_a_buffer_is_used_again_after_its_last_use(
    before: str, nbytes: int, expected: list[str], on: str
) -> None:
    """On a device by a stream, whichever helper has used it; else the host waits."""
    device = torch.device("cpu" if on == "the host" else "meta")
    if on == "the host":  # the transport writes it in no stream's order
        expected = [each.replace("followed", "awaited") for each in expected]
    log = list[str]()
    lane, other = (cast(Any, SimpleNamespace()) for _ in range(2))
    buffer = StagingBuffer(torch.zeros(64, dtype=torch.uint8, device=device), device)
    if before != "nothing":
        buffer.moving = Moving(buffer.memory, LIMIT)
        buffer.lane = other if "another" in before else lane
    if "lane" in before:
        ends: Any = {
            "wait": lambda: log.append("copy is followed"),
            "synchronize": lambda: log.append("copy is awaited"),
        }
        buffer.copy = cast(Any, SimpleNamespace(**ends))
    if buffer.must_be_free(lane, nbytes):
        log.append("bytes are awaited")
    buffer.prepare(nbytes, 1 << 20)
    assert log == expected
    assert buffer.memory.nbytes >= nbytes
    assert buffer.copy is None


def test_who_waits_for_a_buffer_is_called_once_when_it_is_free() -> None:
    moving = Moving(torch.zeros(8, dtype=torch.uint8), LIMIT)
    calls = list[str]()
    assert moving.begin()
    moving.on(MovingStage.FREE, lambda: calls.append("before"))
    moving.end(PeerError("The peer is gone."))
    assert calls == []  # a library touches it still
    moving.end(untouched=True)
    moving.end(untouched=True)
    moving.on(MovingStage.FREE, lambda: calls.append("after"))
    assert calls == ["before", "after"]
    with pytest.raises(PeerError, match="is gone"):
        moving.follow(0.0)


@pytest.mark.parametrize("terms", [{}, {"max_gbps": 2e-4}])
def test_layers_that_are_sent_end_one_by_one(made: Sides, terms: Any) -> None:
    both = Couple(made, "staging")
    pulled = both.pull(both.offer(), by_layer=True, **terms)
    expected = both.src.rows(both.blocks, both.tokens)
    for number, layer in enumerate(pulled.layers):
        layer.synchronize(LIMIT)
        assert torch.equal(both.dst.rows(both.into, both.tokens)[number], expected[number])
    pulled.synchronize(LIMIT)
    assert both.right()


def test_small_pulls_of_one_owner_end_beside_each_other(made: Sides) -> None:
    both = Couple(made, "staging")
    offers = [both.offer() for _ in range(12)]
    pulls = [both.pull(offer) for offer in offers]
    for pulled in pulls:
        pulled.synchronize(LIMIT)
    assert both.right()
    assert all(offer.taken(LIMIT) for offer in offers)
