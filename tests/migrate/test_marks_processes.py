# SPDX-License-Identifier: Apache-2.0
"""Owners and readers of other processes, which write, follow and die: no row past a mark comes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from time import sleep
from typing import Any

import pytest
import torch
from support.mark_cases import (
    LAYERS,
    POISON,
    TOKENS,
    UNTOUCHED,
    Writing,
    end_of,
    steps_of,
)
from support.migrate_nursery import Nursery
from support.migrate_pulls import Rows, Sides, sides
from support.waits import LIMIT, until

from portakv.errors import OfferGone, PeerError, PortaKVError
from portakv.migrate import Ticket
from portakv.migrate.owner import Offer

INTO = [6, 1, 4]
METHODS = pytest.mark.parametrize("method", ["mapped", "staging"])
UNITS = pytest.mark.parametrize("unit", ["layers", "tokens"])
BY_LAYER = pytest.mark.parametrize("by_layer", [False, True], ids=["whole", "by layer"])
OWNER = """
from time import sleep
from support.mark_cases import *
both = Writing(Sides(), method)
offers = [both.offer(progress=unit, name=name) for name in names]
shown = both.unguarded if unguarded else lambda offer: offer.ticket
tell(([shown(offer) for offer in offers], both.owner.channel.address, both.owner.epoch))
last = 0
for mark in marks:
    sleep(pause)
    both.write(unit, last, mark)
    for offer in offers:
        offer.raise_to(mark)
    last = mark
"""
READER = """
from support.mark_cases import *
from support.migrate_pulls import Rows
made, rows = Sides(), Rows(8, 32, fill=UNTOUCHED)
reader = made.reader(rows.shard)
pulled = reader.pull(ticket, [6, 1, 4], by_layer=by_layer)
tell(None)
try:
    pulled.synchronize(30)
    tell(rows.rows([6, 1, 4], TOKENS).numpy())
except Exception as error:
    tell(type(error).__name__)
"""


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as those:
        yield those


@pytest.fixture
def made() -> Iterator[Sides]:
    with sides() as those:
        yield those


class Here:
    """A reader of this process, and what it should get."""

    def __init__(self, made: Sides) -> None:
        self.dst = Rows(8, 32, fill=UNTOUCHED)
        self.reader = made.reader(self.dst.shard)
        self.expected = Rows().rows([7, 3, 11, 0, 5], TOKENS)

    def right(self) -> bool:
        return torch.equal(self.dst.rows(INTO, TOKENS), self.expected)

    def poisoned(self) -> bool:
        return bool(self.dst.whole.eq(POISON).any())


def owned(nursery: Nursery, method: str, unit: str, marks: list[int], **terms: Any) -> Any:
    """Return a process that owns rows and writes them, and its tickets."""
    options = {"pause": 0.05, "names": [None], "unguarded": False, **terms}
    return nursery.born(OWNER, method=method, unit=unit, marks=marks, **options)


@METHODS
@UNITS
@BY_LAYER
def test_rows_of_another_process_come_as_it_writes_them(
    nursery: Nursery, made: Sides, method: str, unit: str, by_layer: bool
) -> None:
    here = Here(made)
    pid, (tickets, *_) = owned(nursery, method, unit, steps_of(unit))
    pulled = here.reader.pull(tickets, INTO, by_layer=by_layer, verify=True, timeout=LIMIT)
    while not pulled.ended:
        assert not here.poisoned()
        for number, layer in enumerate(pulled.layers):
            if layer.done():
                assert torch.equal(here.dst.rows(INTO, TOKENS)[number], here.expected[number])
    pulled.synchronize(LIMIT)
    assert here.right()
    nursery.end(pid)


@METHODS
def test_another_process_makes_the_named_offer_and_writes_it(
    nursery: Nursery, made: Sides, method: str
) -> None:
    here = Here(made)
    name = bytes(range(16))
    pid, (_, address, epoch) = owned(nursery, method, "layers", [1, 2], names=[name])
    ticket = Ticket.of(address, epoch, name)
    here.reader.pull(ticket, INTO, by_layer=True, timeout=LIMIT).synchronize(LIMIT)
    assert here.right()
    nursery.end(pid)


@METHODS
@BY_LAYER
def test_an_owner_that_is_killed_before_its_rows_are_complete(
    nursery: Nursery, made: Sides, method: str, by_layer: bool
) -> None:
    here = Here(made)
    pid, (tickets, *_) = owned(nursery, method, "layers", [1])
    pulled = here.reader.pull(tickets, INTO, by_layer=by_layer, timeout=LIMIT)
    if by_layer:
        pulled.layers[0].synchronize(LIMIT)
    else:
        sleep(0.2)
    nursery.end(pid)
    with pytest.raises(PeerError) as raised:
        pulled.synchronize(LIMIT)
    assert not isinstance(raised.value, OfferGone)
    for layer in pulled.layers[1:]:
        with pytest.raises(PeerError):
            layer.synchronize(LIMIT)
    assert not pulled.published
    assert not here.poisoned()
    assert here.dst.whole[1:].eq(UNTOUCHED).all()
    assert until(lambda: here.reader.statistics()["pulls"] == 0)


@METHODS
@BY_LAYER
def test_a_reader_that_is_killed_while_it_follows_is_lost(
    nursery: Nursery, made: Sides, method: str, by_layer: bool
) -> None:
    both = Writing(made, method)
    offer = both.offer(progress="layers", readers=2)
    pid, _ = nursery.born(READER, ticket=offer.ticket, by_layer=by_layer)
    assert until(lambda: len(offer.begun) == 1)
    pulled = both.pull(offer, by_layer=by_layer, timeout=LIMIT)
    assert until(lambda: len(offer.begun) == 2)
    nursery.end(pid)
    assert until(lambda: len(offer.begun) == 1, LIMIT)
    both.write("layers", 0, LAYERS)
    offer.raise_to(LAYERS)
    pulled.synchronize(LIMIT)
    assert both.right()
    assert offer.taken(LIMIT)


@METHODS
@BY_LAYER
def test_rows_of_this_process_come_to_another(
    nursery: Nursery, made: Sides, method: str, by_layer: bool
) -> None:
    both = Writing(made, method)
    offer = both.offer(progress="tokens")
    pid, _ = nursery.born(READER, ticket=offer.ticket, by_layer=by_layer)
    last = 0
    for mark in steps_of("tokens"):
        sleep(0.02)
        both.write("tokens", last, mark)
        offer.raise_to(mark)
        last = mark
    read = torch.from_numpy(nursery.hear(pid))
    assert torch.equal(read, both.rows[:, :, both.blocks].flatten(2, 3)[:, :, :TOKENS])
    assert offer.taken(LIMIT)
    nursery.end(pid)


# --- ends at any moment


def judge(pulled: Any, here: Here) -> None:
    """Follow a pull to its end: its rows are right, or it fails; never does poison come."""
    while not pulled.ended:
        assert not here.poisoned(), "a row past the mark came"
    assert not here.poisoned(), "a row past the mark came"
    try:
        pulled.synchronize(LIMIT)
    except PortaKVError:
        assert not pulled.published
    else:
        assert here.right(), "other rows were committed"


def end_one(seed: random.Random, both: Writing, offer: Offer, pulled: Any) -> None:
    """End an offer or a pull of this process in one of several ways, or neither."""
    how = seed.choice(("revoke", "cancel", "none", "reallocate"))
    if how == "revoke":
        offer.revoke()
    elif how == "cancel":
        pulled.cancel()
    elif how == "reallocate":
        both.owner.reallocate(both.src.shard)


def one_round(
    seed: random.Random, nursery: Nursery, here: Here, method: str, unguarded: bool = False
) -> None:
    """Pull from an owner that writes meanwhile, and is killed at some moment or lives."""
    unit = seed.choice(("layers", "tokens"))
    marks = sorted({seed.randint(1, end_of(unit)) for _ in range(4)} | {end_of(unit)})
    pause = seed.random() * 0.01
    here.dst.whole.fill_(UNTOUCHED)
    terms = {"pause": pause, "unguarded": unguarded}
    pid, (tickets, *_) = owned(nursery, method, unit, marks, **terms)
    try:
        pulled = here.reader.pull(tickets, INTO, by_layer=seed.random() < 0.7, timeout=LIMIT)
        sleep(seed.random() * 0.04)
        if seed.random() < 0.5:
            nursery.end(pid)
            pid = 0
        judge(pulled, here)
    except (PeerError, OfferGone):
        assert not here.poisoned()
    finally:
        if pid:
            nursery.end(pid)


ROUNDS = pytest.mark.parametrize("rounds", [6, pytest.param(300, marks=pytest.mark.slow)])


@METHODS
@ROUNDS
def test_owners_that_are_killed_at_any_moment(
    nursery: Nursery, made: Sides, method: str, rounds: int
) -> None:
    seed = random.Random(f"{method} 7")
    here = Here(made)
    for _ in range(rounds):
        one_round(seed, nursery, here, method)


def test_rounds_without_the_guard_find_poison(nursery: Nursery, made: Sides) -> None:
    """The negative control: the reader does not know of the marks."""
    seed = random.Random(7)
    here = Here(made)

    def rounds() -> None:
        for _ in range(30):
            one_round(seed, nursery, here, "mapped", unguarded=True)

    with pytest.raises(AssertionError, match=r"came|committed"):
        rounds()


@METHODS
@ROUNDS
def test_offers_and_pulls_that_end_at_any_moment(made: Sides, method: str, rounds: int) -> None:
    seed = random.Random(f"{method} 3")
    here = Here(made)
    both = Writing(made, method)
    for _ in range(rounds):
        unit: Any = seed.choice(("layers", "tokens"))
        marks = sorted({seed.randint(1, end_of(unit)) for _ in range(3)} | {end_of(unit)})
        here.dst.whole.fill_(UNTOUCHED)
        both.src.whole.fill_(POISON)
        offer = both.offer(progress=unit)
        pulled = here.reader.pull(offer.ticket, INTO, by_layer=seed.random() < 0.7, timeout=LIMIT)
        stop = seed.randint(0, 2 * len(marks))
        last = 0
        try:
            for number, mark in enumerate(marks):
                if number == stop:
                    end_one(seed, both, offer, pulled)
                both.write(unit, last, mark)
                offer.raise_to(mark)
                last = mark
                sleep(seed.random() * 0.005)
        except OfferGone:
            assert offer.state != "held"
        judge(pulled, here)
        offer.revoke()
        sleep(seed.random() * 0.002)
