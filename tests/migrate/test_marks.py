# SPDX-License-Identifier: Apache-2.0
"""Offers whose rows are still being written: a reader gets no row past the mark."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from math import inf
from secrets import token_bytes
from time import sleep
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from support.mark_cases import (
    LAYERS,
    POISON,
    TOKENS,
    UNTOUCHED,
    Trusting,
    Writing,
    end_of,
    steps_of,
)
from support.migrate_pulls import SMALL, Clock, Rows, Sides, sides
from support.named_memory import named_memory
from support.waits import LIMIT, until

from portakv import KVView
from portakv.copy.inside import copy_checked
from portakv.errors import (
    InvalidTerms,
    LayoutError,
    OfferGone,
    PeerError,
    TransferCancelled,
    TransferError,
    TransferTimeout,
)
from portakv.migrate import Shard, Ticket, messages
from portakv.migrate.channel import Channel
from portakv.migrate.connections import Source
from portakv.migrate.pull import Pull
from portakv.migrate.reader import incomplete, wait_for_events
from portakv.migrate.shared_memory import shared_empty

METHODS = pytest.mark.parametrize("method", ["mapped", "staging"])
UNITS = pytest.mark.parametrize("unit", ["layers", "tokens"])
BY_LAYER = pytest.mark.parametrize("by_layer", [False, True], ids=["whole", "by layer"])


@pytest.fixture
def made() -> Iterator[Sides]:
    with sides() as those:
        yield those


# --- rows follow the mark


@METHODS
@UNITS
@BY_LAYER
def test_rows_come_as_they_are_written(made: Sides, method: str, unit: Any, by_layer: bool) -> None:
    """Everything that is not complete is poison, and no reader gets it."""
    both = Writing(made, method)
    offer = both.offer(progress=unit)
    pulled = both.pull(offer, by_layer=by_layer, timeout=LIMIT)
    assert len(pulled.layers) == LAYERS * by_layer
    last = 0
    for mark in steps_of(unit):
        sleep(0.02)
        assert not pulled.ended
        assert not both.poisoned()
        both.write(unit, last, mark)
        assert offer.mark == last
        offer.raise_to(mark)
        assert offer.mark == mark
        last = mark
        if by_layer and unit == "layers":
            pulled.layers[mark - 1].synchronize(LIMIT)
            assert both.right_layer(mark - 1)
            assert not any(layer.done() for layer in pulled.layers[mark:])
            assert both.dst.whole[mark:].eq(UNTOUCHED).all()
    for layer in pulled.layers:
        layer.synchronize(LIMIT)
    assert both.right() or not by_layer
    pulled.synchronize(LIMIT)
    assert pulled.published
    assert both.right()
    assert both.spared()
    assert pulled.statistics.nbytes == 2 * LAYERS * TOKENS * 4 * 16
    assert offer.taken(LIMIT)
    assert offer.state == "taken"


@UNITS
def test_tokens_are_copied_before_all_of_them_are_complete(made: Sides, unit: Any) -> None:
    """A pull by layer does not wait for the end, in either unit."""
    both = Writing(made)
    offer = both.offer(progress=unit)
    both.pull(offer, by_layer=True, timeout=LIMIT)
    half = end_of(unit) // 2
    both.write(unit, 0, half)
    offer.raise_to(half)
    expected = (both.rows[:1] if unit == "layers" else both.rows)[:, :, both.blocks]
    expected = expected.flatten(2, 3)[:, :, : TOKENS if unit == "layers" else half]
    place = [slice(0, n) for n in expected.shape[:3]]
    there = both.dst.rows(both.into, TOKENS)
    assert until(lambda: torch.equal(both.dst.rows(both.into, TOKENS)[tuple(place)], expected))
    assert not there.eq(POISON).any()


@METHODS
@UNITS
@BY_LAYER
def test_without_the_guard_a_reader_gets_poison(
    made: Sides, method: str, unit: Any, by_layer: bool
) -> None:
    """The negative control of the tests above: the reader does not know of the mark; of rows that
    are sent the owner does not either."""
    both = Writing(made, method)
    if method == "staging":
        both.owner = Trusting(Channel(), both.src.shard, expose="staging", staging=SMALL)
        made.made += [both.owner.channel, both.owner]
    offer = both.offer(progress=unit)
    both.write(unit, 0, 1)
    offer.raise_to(1)
    pulled = both.reader.pull(both.unguarded(offer), both.into, by_layer=by_layer)
    pulled.synchronize(LIMIT)
    assert both.poisoned()


@UNITS
def test_an_owner_sends_no_row_past_the_mark(made: Sides, unit: Any) -> None:
    """Also to a reader that ignores the mark; the offer stays."""
    both = Writing(made, "staging")
    offer = both.offer(progress=unit)
    both.write(unit, 0, 1)
    offer.raise_to(1)
    for verify in (False, True):
        pulled = both.reader.pull(both.unguarded(offer), both.into, verify=verify)
        with pytest.raises(PeerError, match="past the mark"):
            pulled.synchronize(LIMIT)
    assert not both.poisoned()
    both.write(unit, 1, end_of(unit))
    offer.raise_to(end_of(unit))
    both.pull(offer, verify=True).synchronize(LIMIT)
    assert both.right()


@METHODS
@UNITS
def test_a_complete_offer_is_pulled_as_any_other(made: Sides, method: str, unit: Any) -> None:
    both = Writing(made, method)
    offer = both.offer(progress=unit)
    both.write(unit, 0, end_of(unit))
    offer.raise_to(end_of(unit))
    both.reader.prepare(both.owner.channel.address).synchronize(LIMIT)
    pulled = both.pull(offer, verify=True, by_layer=True)
    pulled.synchronize(LIMIT)
    assert both.right()


@METHODS
def test_a_checksum_is_compared_of_rows_that_followed_a_mark(made: Sides, method: str) -> None:
    both = Writing(made, method)
    offer = both.offer(progress="layers")
    pulled = both.pull(offer, by_layer=True, verify=True, timeout=LIMIT)
    for layer in range(LAYERS):
        both.write("layers", layer, layer + 1)
        offer.raise_to(layer + 1)
        sleep(0.02)
    pulled.synchronize(LIMIT)
    assert both.right()


@METHODS
@UNITS
def test_tokens_that_the_reader_has_are_skipped(made: Sides, method: str, unit: Any) -> None:
    both = Writing(made, method)
    both.write("layers", 0, LAYERS)
    offer = both.offer(progress=unit)
    pulled = both.pull(offer, first=40, by_layer=True, timeout=LIMIT)
    for mark in steps_of(unit):
        offer.raise_to(mark)
        sleep(0.01)
    pulled.synchronize(LIMIT)
    there = both.rows[:, :, both.blocks].flatten(2, 3)[:, :, 40:TOKENS]
    here = both.dst.rows(both.into, TOKENS)
    assert torch.equal(here[:, :, 40:], there)
    assert here[:, :, :40].eq(UNTOUCHED).all()


@METHODS
def test_opaque_pages_follow_whole(made: Sides, method: str) -> None:
    remote = shared_empty((3, 9, 640), torch.uint8).fill_(255)
    local = torch.zeros(3, 9, 640, dtype=torch.uint8)
    one, other = (KVView([*x], "layer | block page", block_size=64) for x in (remote, local))
    owner = made.owner(Shard(one), expose=method, staging=SMALL)
    reader = made.reader(Shard(other))
    blocks = [8, 1, 3]
    offer = owner.offer(blocks, tokens=192, progress="tokens")
    pulled = reader.pull(offer.ticket, [0, 7, 2], by_layer=True, timeout=LIMIT)
    last = 0
    for mark in (63, 64, 130, 192):
        pages = mark // 64
        remote[:, blocks[last:pages]] = mark
        last = pages
        offer.raise_to(mark)
        assert until(lambda n=pages: not local[:, [0, 7, 2][:n]].eq(0).any())
        assert not local.eq(255).any()
    pulled.synchronize(LIMIT)
    assert torch.equal(local[:, [0, 7, 2]], remote[:, blocks])


@METHODS
@UNITS
def test_a_rate_holds_for_all_rows(made: Sides, method: str, unit: Any) -> None:
    """A pull at a rate begins when all rows are complete, also by layer."""
    both = Writing(made, method)
    offer = both.offer(progress=unit)
    pulled = both.pull(offer, by_layer=True, max_gbps=1.0, timeout=LIMIT)
    both.write(unit, 0, 1)
    offer.raise_to(1)
    sleep(0.05)
    assert both.dst.whole.eq(UNTOUCHED).all()
    both.write(unit, 1, end_of(unit))
    offer.raise_to(end_of(unit))
    for layer in pulled.layers:
        layer.synchronize(LIMIT)
    pulled.synchronize(LIMIT)
    assert both.right()


# --- several owners, readers and shards


@METHODS
@BY_LAYER
def test_layers_of_shards_are_counted_together(made: Sides, method: str, by_layer: bool) -> None:
    """A mark is of the first layers of each shard; a shard with fewer layers is complete then."""
    remote = [Rows(fill=POISON), Rows(8, 8, fill=POISON)]
    local = [Rows(8, 32, fill=-1), Rows(16, 4, fill=-1)]
    short = [KVView([x.whole[0]], "layer | kv block token head dim") for x in (remote[1], local[1])]
    owner = made.owner(remote[0].shard, Shard(short[0]), expose=method, staging=SMALL)
    reader = made.reader(local[0].shard, Shard(short[1]))
    offer = owner.offer([9, 2, 4], [7, 0, 3, 2, 6], tokens=36, progress="layers")
    into = [[3, 5], [*range(9, 0, -1)]]
    pulled = reader.pull(offer.ticket, *into, by_layer=by_layer, timeout=LIMIT)
    with pytest.raises(InvalidTerms, match="at most 2"):
        offer.raise_to(3)
    remote[0].whole[0] = 3
    remote[1].whole[0] = 4
    offer.raise_to(1)
    if by_layer:
        assert len(pulled.layers) == 3
        pulled.layers[0].synchronize(LIMIT)
        pulled.layers[2].synchronize(LIMIT)
        assert not pulled.layers[1].done()
    remote[0].whole[1] = 5
    offer.raise_to(2)
    pulled.synchronize(LIMIT)
    rows = [one.rows(blocks, 36) for one, blocks in zip(local, into, strict=True)]
    assert rows[0][0].eq(3).all()
    assert rows[0][1].eq(5).all()
    assert rows[1][0].eq(4).all()


@METHODS
@UNITS
@pytest.mark.parametrize("complete", [None, 0, 1])
def test_owners_of_a_half_raise_separate_marks(
    made: Sides, method: str, unit: Any, complete: int | None
) -> None:
    """Each has one layer; ``complete``: the offer of this one was complete from the start."""
    src = Rows()
    rows = src.whole.clone()
    dst = Rows(8, 32, fill=-1)
    owners = [made.owner(src.half(n), expose=method, staging=SMALL) for n in range(LAYERS)]
    reader = made.reader(dst.shard)
    offers = [
        owner.offer([7, 3, 11], tokens=45, progress=None if n == complete else unit)
        for n, owner in enumerate(owners)
    ]
    for n in range(LAYERS):
        if n != complete:
            src.whole[n] = POISON
    pulled = reader.pull([x.ticket for x in offers], [6, 1], by_layer=True, timeout=LIMIT)
    if complete is not None:
        pulled.layers[complete].synchronize(LIMIT)
    for n in (1, 0):
        if n != complete:
            assert not pulled.layers[n].done()
            src.whole[n] = rows[n]
            offers[n].raise_to(1 if unit == "layers" else 45)
        pulled.layers[n].synchronize(LIMIT)
        assert torch.equal(dst.rows([6, 1], 45)[n], src.rows([7, 3, 11], 45)[n])
        assert not dst.whole.eq(POISON).any()
    pulled.synchronize(LIMIT)
    assert all(offer.taken(LIMIT) for offer in offers)


@METHODS
@UNITS
def test_several_readers_follow_one_offer(made: Sides, method: str, unit: Any) -> None:
    both = Writing(made, method)
    others = [Rows(8, 32, fill=-1) for _ in range(3)]
    readers = [made.reader(x.shard) for x in others]
    offer = both.offer(progress=unit, readers=4)
    pulls = [both.pull(offer, timeout=LIMIT)]
    for n, reader in enumerate(readers):
        pulls.append(reader.pull(offer.ticket, both.into, by_layer=n > 0, timeout=LIMIT))
    last = 0
    for mark in steps_of(unit):
        both.write(unit, last, mark)
        offer.raise_to(mark)
        last = mark
        sleep(0.01)
        assert not any(x.whole.eq(POISON).any() for x in (both.dst, *others))
    for pulled in pulls:
        pulled.synchronize(LIMIT)
    for one in (both.dst, *others):
        assert torch.equal(one.rows(both.into, TOKENS), both.src.rows(both.blocks, TOKENS))
    assert offer.taken(LIMIT)


@METHODS
@UNITS
@BY_LAYER
def test_a_pull_by_name_follows_the_mark(
    made: Sides, method: str, unit: Any, by_layer: bool
) -> None:
    both = Writing(made, method)
    name = token_bytes(16)
    ticket = Ticket.of(both.owner.channel.address, both.owner.epoch, name)
    pulled = both.reader.pull(ticket, both.into, by_layer=by_layer, timeout=LIMIT)
    offer = both.offer(progress=unit, name=name)
    last = 0
    for mark in steps_of(unit):
        sleep(0.02)
        assert not pulled.ended
        assert not both.poisoned()
        both.write(unit, last, mark)
        offer.raise_to(mark)
        last = mark
        if by_layer and unit == "layers":
            pulled.layers[mark - 1].synchronize(LIMIT)
            assert both.right_layer(mark - 1)
    pulled.synchronize(LIMIT)
    assert both.right()
    assert offer.taken(LIMIT)


def test_many_pulls_follow_together(made: Sides) -> None:
    """More than one question holds, and more than there are workers."""
    both = Writing(made, "staging")
    offers = [
        both.owner.offer([3], tokens=16, progress="layers") for _ in range(messages.MOST_NAMES + 20)
    ]
    pulls = [both.reader.pull(x.ticket, [0], by_layer=True, timeout=LIMIT) for x in offers]
    both.write("layers", 0, LAYERS)
    for layer in range(LAYERS):
        for offer in offers:
            offer.raise_to(layer + 1)
    for pulled in pulls:
        pulled.synchronize(LIMIT)
    assert torch.equal(both.rows[:, :, 3], both.dst.whole[:, :, 0, :16])


def test_rows_without_words_are_read_after_the_owners_answer(made: Sides) -> None:
    """Memory with a name is mapped, but only its owner can say what is complete."""
    shape = (2, 2, 16, 16, 4, 8)
    name = f"marks{os.getpid()}"
    rows = Rows().whole.clone()
    with named_memory(name, 2 * rows.numel()) as memory:
        whole = memory.view(torch.int16).view(shape).fill_(POISON)
        owner = made.owner(Rows.shard_of(whole))
        dst = Rows(8, 32, fill=UNTOUCHED)
        reader = made.reader(dst.shard)
        offer = owner.offer([7, 3], tokens=32, progress="layers")
        pulled = reader.pull(offer.ticket, [6], by_layer=True, timeout=LIMIT)
        for layer in range(LAYERS):
            sleep(0.02)
            assert not dst.whole.eq(POISON).any()
            assert not pulled.layers[layer].done()
            whole[layer] = rows[layer]
            offer.raise_to(layer + 1)
            pulled.layers[layer].synchronize(LIMIT)
        pulled.synchronize(LIMIT)
        assert pulled.statistics.strategy == "mapped"
        assert torch.equal(dst.whole[:, :, 6, :32], rows[:, :, [7, 3]].flatten(2, 3))
        for one in reversed(made.made):  # before the pool
            one.close()


# --- answers of owners


@pytest.mark.parametrize("lie", ["count", "gone", "other"])
def test_answers_that_do_not_fit_are_refused(made: Sides, lie: str) -> None:
    both = Writing(made, "staging")
    answers: dict[str, messages.Message] = {
        "count": messages.Marked((), ()),
        "gone": messages.Answer("gone", "it is a test"),
        "other": messages.Found((b"",), ("",)),
    }
    both.owner.channel.serve(messages.Marks, lambda *_: answers[lie])
    offer = both.offer(progress="layers")
    both.write("layers", 0, LAYERS)
    offer.raise_to(LAYERS)
    with pytest.raises(OfferGone if lie == "gone" else PeerError):
        both.pull(offer, by_layer=True, timeout=LIMIT).synchronize(LIMIT)
    assert not both.poisoned()


def test_a_mark_past_the_end_is_the_end(made: Sides) -> None:
    both = Writing(made, "staging")
    both.owner.channel.serve(messages.Marks, lambda *_: messages.Marked((1 << 31,), ("",)))
    offer = both.offer(progress="layers")
    both.write("layers", 0, LAYERS)
    offer.raise_to(LAYERS)
    both.pull(offer, by_layer=True, timeout=LIMIT).synchronize(LIMIT)
    assert both.right()


@METHODS
def test_rows_that_cannot_become_the_readers_are_refused_by_the_call(
    made: Sides, method: str
) -> None:
    """As for offers that are complete."""
    both = Writing(made, method)
    half = made.owner(both.src.half(0), expose=method, staging=SMALL)
    offer = half.offer(both.blocks, tokens=TOKENS, progress="layers")
    with pytest.raises(LayoutError):  # the owner is not connected: the pull has the error
        both.pull(offer, timeout=LIMIT).synchronize(LIMIT)
    assert until(lambda: both.reader.statistics()["pulls"] == 0)
    with pytest.raises(LayoutError):
        both.pull(offer, timeout=LIMIT)
    assert both.reader.statistics()["pulls"] == 0


# --- ends of pulls that follow


@METHODS
@BY_LAYER
@pytest.mark.parametrize("end", ["revoked", "expired", "reallocated", "closed"])
def test_an_offer_that_ends_before_it_is_complete_ends_the_pull(
    made: Sides, method: str, by_layer: bool, end: str
) -> None:
    both = Writing(made, method)
    lease = 0.3 if end == "expired" else 30.0
    offer = both.offer(progress="layers", lease=lease, max_lease=lease)
    pulled = both.pull(offer, by_layer=by_layer, timeout=LIMIT)
    both.write("layers", 0, 1)
    offer.raise_to(1)
    if by_layer:
        pulled.layers[0].synchronize(LIMIT)
    if end == "revoked":
        offer.revoke()
    elif end == "expired":
        assert offer.taken(LIMIT)
    elif end == "reallocated":
        both.owner.reallocate(both.src.shard)
    else:
        both.owner.close()
    with pytest.raises(OfferGone):
        pulled.synchronize(LIMIT)
    assert not pulled.published
    for layer in pulled.layers[1:]:
        with pytest.raises(OfferGone):
            layer.synchronize(LIMIT)
    assert not both.poisoned()
    assert both.dst.whole[1:].eq(UNTOUCHED).all()
    assert until(lambda: both.reader.statistics()["pulls"] == 0)


@METHODS
@BY_LAYER
@pytest.mark.parametrize("end", ["timeout", "cancelled", "closed"])
def test_a_pull_that_ends_before_its_offer_is_complete(
    made: Sides, method: str, by_layer: bool, end: str
) -> None:
    """The offer stays, and is pulled again."""
    both = Writing(made, method)
    offer = both.offer(progress="layers")
    timeout = 0.2 if end == "timeout" else None
    pulled = both.pull(offer, by_layer=by_layer, timeout=timeout)
    both.write("layers", 0, 1)
    offer.raise_to(1)
    if end == "cancelled":
        assert pulled.cancel()
    elif end == "closed":
        both.reader.close()
    with pytest.raises(TransferTimeout if end == "timeout" else TransferCancelled):
        pulled.synchronize(LIMIT)
    for layer in pulled.layers[1:]:
        with pytest.raises((TransferTimeout, TransferCancelled)):
            layer.synchronize(LIMIT)
    assert not both.poisoned()
    both.write("layers", 1, LAYERS)
    offer.raise_to(LAYERS)
    assert both.dst.whole[1:].eq(UNTOUCHED).all()
    reader = made.reader(both.dst.shard) if end == "closed" else both.reader
    reader.pull(offer.ticket, both.into, timeout=LIMIT).synchronize(LIMIT)
    assert both.right()


def test_a_pull_ends_after_its_rows_in_flight(made: Sides, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its caller may use the blocks again after the end."""
    go = threading.Event()
    begun = threading.Event()

    def held(*terms: Any) -> Any:
        begun.set()
        assert go.wait(LIMIT)
        return copy_checked(*terms)

    monkeypatch.setattr("portakv.migrate.staged_reader.copy_checked", held)
    both = Writing(made, "staging")
    offer = both.offer(progress="layers")
    pulled = both.pull(offer, by_layer=True, timeout=LIMIT)
    both.write("layers", 0, 1)
    offer.raise_to(1)
    assert begun.wait(LIMIT)
    offer.revoke()
    assert until(lambda: pulled.stopped)
    sleep(0.2)
    ended = pulled.ended
    go.set()
    assert not ended
    with pytest.raises(OfferGone):
        pulled.synchronize(LIMIT)


@METHODS
def test_a_pull_that_follows_holds_its_offer(made: Sides, method: str) -> None:
    """Its reader renews the lease until the rows are complete, and the end is seen."""
    both = Writing(made, method)
    clock = Clock(both.owner)
    both.reader.finished()
    offer = both.offer(progress="layers", lease=0.3)
    pulled = both.pull(offer, timeout=LIMIT)
    clock.outlast(offer, 0.3)
    assert offer.state == "held"
    both.write("layers", 0, LAYERS)
    offer.raise_to(LAYERS)
    assert until(lambda: both.reader.finished() == [pulled], LIMIT)
    assert pulled.error is None
    assert both.right()


def test_a_pull_that_nobody_follows_expires(made: Sides) -> None:
    """The control of the test above."""
    both = Writing(made)
    clock = Clock(both.owner)
    offer = both.offer(progress="layers", lease=0.3)
    clock.now += 2 * 0.9 * 0.3
    assert offer.state == "expired"


@pytest.mark.parametrize("unit", ["", "layers"])
def test_parts_that_follow_a_mark_wait_for_no_event_of_the_offer(unit: str) -> None:
    """The rows are complete when the mark is seen, and the event may be a later offer's by then: it
    stands for work that has nothing to do with the rows."""
    waits = list[object]()
    event: Any = SimpleNamespace(query=lambda: False, wait=waits.append)
    ticket: Any = SimpleNamespace(event=0, progress=unit)
    owner: Any = SimpleNamespace(events=[event])
    wait_for_events([Source(ticket, owner)], torch.device("cpu"))
    assert len(waits) == (0 if unit else 1)


@pytest.mark.parametrize("end", ["landed", "failed", "raised"])
def test_a_copy_that_fails_stops_a_pull_that_waits_for_marks(end: str) -> None:
    """No worker waits for the copy before the last mark."""

    def ended() -> bool:
        if end == "raised":
            raise RuntimeError("the device failed")
        return True

    error = TransferError("It failed.") if end == "failed" else None
    completion = SimpleNamespace(ended=ended, error=error)
    pull = Pull((), inf, lambda: None)
    pull.copies = [cast(Any, SimpleNamespace(completions=[completion], cancel=bool))]
    pull.look_at_copies()
    assert pull.stopped == (end != "landed")


@pytest.mark.slow
def test_a_reader_that_closes_while_a_worker_begins_a_pull(
    made: Sides, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker finds out last that rows are not complete, when no thread looks at marks."""
    entered = threading.Event()
    may = threading.Event()

    def late(sources: Any) -> bool:
        if threading.current_thread() is not threading.main_thread():
            entered.set()
            may.wait(LIMIT)
        return incomplete(sources)

    monkeypatch.setattr("portakv.migrate.reader.incomplete", late)
    both = Writing(made)
    offer = both.offer(progress="layers")
    pulled = both.pull(offer, by_layer=True)
    assert entered.wait(LIMIT)
    both.reader.close()
    may.set()
    with pytest.raises(TransferCancelled):
        pulled.synchronize(LIMIT)
    for layer in pulled.layers:
        with pytest.raises(TransferCancelled):
            layer.synchronize(LIMIT)
    assert not both.poisoned()
