# SPDX-License-Identifier: Apache-2.0
"""Rows that an owner sends in slices: one request, in step after a pull that ends early, and
nothing of rows whose offer has ended."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import pytest
import torch
from support.migrate_channels import until
from support.migrate_pulls import SMALL, Couple, Rows, Sides, sides

from portakv.errors import OfferGone, TransferCancelled, TransferError
from portakv.migrate.gathers import BUFFERS, Gathers
from portakv.migrate.messages import MOST_PARTS, Gather, Stop
from portakv.migrate.staged import Taker
from portakv.migrate.transports.distributed import Join

LIMIT = 60.0
SLOW = 4e-5  # 10^9 bytes a second: a pull of 75 tokens takes two seconds
SECRET = 0x5A5A


@pytest.fixture
def made() -> Iterator[Sides]:
    with sides() as those:
        yield those


class Held(NamedTuple):
    """Work before an offer's rows, which lasts until an event."""

    event: threading.Event
    entered: threading.Event

    @contextmanager
    def inside(self) -> Iterator[None]:
        self.entered.set()
        self.event.wait(LIMIT)
        yield


def counted(made: Sides, both: Couple, kind: type[Any]) -> list[Any]:
    """Return a list of the messages of a kind that the owner gets from now on."""
    seen = list[Any]()
    channel = both.owner.channel
    own = channel._answers[kind]

    def answer(peer: Any, message: Any) -> Any:
        seen.append(message)
        return own(peer, message)

    channel.serve(kind, answer)
    return seen


def test_a_pull_of_many_slices_is_one_request(made: Sides) -> None:
    both = Couple(made, "staging")
    requests = counted(made, both, Gather)
    stops = counted(made, both, Stop)
    pulled = both.pull(both.offer())
    pulled.synchronize(LIMIT)
    assert both.right()
    assert both.spared()
    assert pulled.statistics.slices == len(requests[0].parts) > BUFFERS
    assert (len(requests), stops) == (1, [])


def test_groups_of_one_offer_are_one_request(made: Sides) -> None:
    remote = [Rows(), Rows()]
    local = [Rows(8, 32, fill=-1), Rows(8, 32, fill=-1)]
    owner = made.owner(*(each.shard for each in remote), expose="staging", staging=SMALL)
    reader = made.reader(*(each.shard for each in local))
    requests = list[Gather]()
    real = owner.channel._answers[Gather]
    owner.channel.serve(Gather, lambda *x: (requests.append(x[1]), real(*x))[1])
    offer = owner.offer([1, 2], [3, 4], tokens=32)
    reader.pull(offer.ticket, [3], [4]).synchronize(LIMIT)
    for one, other, src, dst in zip(remote, local, ([1, 2], [3, 4]), ([3], [4]), strict=True):
        assert torch.equal(one.rows(src, 32), other.rows(dst, 32))
    assert {part.group for part in requests[0].parts} == {0, 1}
    assert len(requests) == 1


def test_a_pull_of_more_slices_than_a_request_holds_has_several(made: Sides) -> None:
    """A staging buffer holds one token of a layer."""
    remote, local = (torch.zeros(2, 2, 20, 16, 16, 64, dtype=torch.int16) for _ in range(2))
    remote.copy_(torch.arange(remote.numel()).view(remote.shape) % 30011)
    owner = made.owner(Rows.shard_of(remote), expose="staging", staging=BUFFERS << 12)
    reader = made.reader(Rows.shard_of(local))
    pulled = reader.pull(owner.offer(range(20), tokens=320).ticket, range(20))
    pulled.synchronize(LIMIT)
    assert torch.equal(remote, local)
    assert pulled.statistics.slices > MOST_PARTS


def pull_after_a_cancelled_one(made: Sides, both: Couple) -> bool:
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
    again = both.pull(both.offer())
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
    both = Couple(made, "staging", transport="distributed")
    both.pull(both.offer()).synchronize(LIMIT)
    joins = counted(made, both, Join)
    if not guarded:
        monkeypatch.setattr(Taker, "stop", lambda *_: None)
    assert pull_after_a_cancelled_one(made, both) == guarded
    assert joins == [] or not guarded


def test_pulls_that_are_cancelled_at_any_moment_leave_one_transport_in_step(made: Sides) -> None:
    both = Couple(made, "staging", transport="distributed")
    both.pull(both.offer()).synchronize(LIMIT)
    joins = counted(made, both, Join)
    seed = random.Random(7)
    cancelled = 0
    for turn in range(40):
        both.src.whole.fill_(turn)
        pulls = [both.pull(both.offer()) for _ in range(seed.randint(1, 3))]
        time.sleep(seed.random() * 0.02)
        for pulled in pulls:
            cancelled += pulled.cancel()
        both.src.whole.fill_(1000 + turn)
        both.dst.whole.fill_(-1)
        both.pull(both.offer()).synchronize(LIMIT)
        assert both.right()
        both.owner.revoke_all()
    assert cancelled
    assert joins == []


def revoked_in_the_middle(made: Sides) -> bool:
    """Revoke an offer while its rows are sent, and use its blocks again; return True if nothing of
    the new rows has come to the reader."""
    both = Couple(made, "staging")
    both.src.whole.fill_(7)
    offer = both.offer()
    pulled = both.pull(offer, max_gbps=SLOW)
    assert until(lambda: bool((both.dst.whole != -1).any()), LIMIT)
    offer.revoke()
    both.src.whole.fill_(SECRET)
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
    if not guarded:
        send: Callable[..., Any] = Gathers.send

        def unguarded(self: Gathers, peer: Any, gather: Any, offered: Any) -> Any:
            return send(self, peer, gather, offered._replace(holds=lambda: True))

        monkeypatch.setattr(Gathers, "send", unguarded)
    assert revoked_in_the_middle(made) == guarded


def test_an_owner_that_does_not_stop_loses_its_lane_and_not_the_next_pull(made: Sides) -> None:
    """Its channel answers no `Stop`: the group is made anew."""
    both = Couple(made, "staging", transport="distributed")
    both.pull(both.offer()).synchronize(LIMIT)
    joins = counted(made, both, Join)
    real = both.owner.channel._answers[Stop]
    both.owner.channel.serve(Stop, lambda *_: None)
    pulled = both.pull(both.offer(), max_gbps=SLOW)
    assert until(lambda: bool((both.dst.whole != -1).any()), LIMIT)
    assert pulled.cancel()
    with pytest.raises(TransferError):
        pulled.synchronize(LIMIT)
    both.owner.channel.serve(Stop, real)
    both.pull(both.offer()).synchronize(LIMIT)
    assert both.right()
    assert len(joins) == 1


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
    assert all(offer.taken(5) for offer in offers)
