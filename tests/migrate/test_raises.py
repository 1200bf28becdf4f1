# SPDX-License-Identifier: Apache-2.0
"""The owner's side of marks: the words that readers map, and raises that wait or are refused."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from time import monotonic, sleep
from typing import Any

import pytest
import torch
from support.mark_cases import Writing, end_of
from support.migrate_pulls import Rows, Sides, sides
from support.waits import LIMIT, until

from portakv.errors import InvalidTerms, OfferGone, Unsupported
from portakv.migrate import shared_memory
from portakv.migrate.owner import Progress, Raise, Raises
from portakv.migrate.words import Place, Words, WordsOfOwner
from portakv.tasks import runtime

UNITS = pytest.mark.parametrize("unit", ["layers", "tokens"])


@pytest.fixture
def made() -> Iterator[Sides]:
    with sides() as those:
        yield those


# --- the second word


def test_a_mark_is_of_one_offer() -> None:
    words = Words(4)
    remote = WordsOfOwner(words.export(shared_memory.SharedFiles()).handle)
    places = [words.take(os.urandom(16), ()) for _ in range(4)]
    assert [remote.mark(place) for place in places] == [0] * 4  # it was never written
    for number, place in enumerate(places):
        words.mark(place, number + (1 << 31) - 3)
    assert [remote.mark(x) for x in places] == [(1 << 31) - 3 + n for n in range(4)]
    assert [remote.state(x) for x in places] == ["held"] * 4
    for tag in (places[0].tag ^ 1, 0, 1 << 59):
        assert remote.mark(Place(0, tag)) == 0
    assert not remote.has(Place(4, places[0].tag))


def test_an_offer_begins_without_the_mark_of_the_last_one_at_its_place() -> None:
    words = Words(1)
    remote = WordsOfOwner(words.export(shared_memory.SharedFiles()).handle)
    first = words.take(os.urandom(16), ())
    words.mark(first, 7)
    words.end(first, "taken")
    second = words.take(os.urandom(16), ())
    assert second.number == first.number
    assert remote.mark(second) == 0
    words.mark(second, 0)
    assert remote.mark(first) == 0
    words.mark(Place(), 3)  # an offer without a place
    assert remote.mark(second) == 0


# --- raises that are refused


@UNITS
def test_a_mark_only_rises_up_to_the_end(made: Sides, unit: Any) -> None:
    both = Writing(made)
    offer = both.offer(progress=unit)
    wrong: Any
    offer.raise_to(1)
    offer.raise_to(1)
    for wrong in (0, -1, end_of(unit) + 1, "1", None, 1.5, True):
        with pytest.raises(InvalidTerms, match="mark"):
            offer.raise_to(wrong)
    assert offer.mark == 1
    offer.raise_to(end_of(unit))
    with pytest.raises(InvalidTerms, match=f"at least {end_of(unit)}"):
        offer.raise_to(1)
    for wrong in ("rows", "", 3, "layer"):
        with pytest.raises(InvalidTerms, match="progress"):
            both.offer(progress=wrong)


def test_an_offer_of_complete_rows_has_no_mark(made: Sides) -> None:
    both = Writing(made)
    offer = both.offer()
    assert offer.mark is None
    with pytest.raises(InvalidTerms, match="progress="):
        offer.raise_to(1)


@pytest.mark.parametrize("end", ["revoked", "expired", "closed", "reallocated"])
def test_a_mark_of_an_ended_offer_is_not_raised(made: Sides, end: str) -> None:
    both = Writing(made)
    offer = both.offer(progress="layers", lease=30.0, max_lease=30.0)
    offer.raise_to(1)
    if end == "revoked":
        offer.revoke()
    elif end == "expired":
        both.owner.now = lambda: monotonic() + 60
    elif end == "closed":
        both.owner.close()
    else:
        both.owner.reallocate(both.src.shard)
    with pytest.raises(OfferGone):
        offer.raise_to(2)
    assert offer.mark == 1
    later = None if end == "closed" else both.offer(progress="layers")
    assert later is None or later.mark == 0


def test_a_late_raise_does_not_mark_a_later_offer() -> None:
    """Its event ends after the offer, whose place another offer has."""
    lock = runtime().lock
    event: Any = Event()
    shown = list[str]()
    with closing(Raises()) as raises:
        with lock:
            raises.add(
                Raise(
                    Progress("layers", 3),
                    event,
                    torch.device("cpu"),
                    show=lambda: shown.append("shown"),
                    fail=lambda: shown.append("failed"),
                )
            )
        assert until(lambda: event.queries > 3)
        assert shown == []
    event.ended = True
    sleep(0.02)
    assert shown == []


class Event:
    """An event that ends, or fails, when a test says so."""

    def __init__(self) -> None:
        self.ended = False
        self.error: Exception | None = None
        self.queries = 0

    def query(self) -> bool:
        self.queries += 1
        if self.error is not None:
            raise self.error
        return self.ended


def test_raises_of_one_offer_are_shown_in_their_order() -> None:
    """The event of the later one ends first; another offer's does not wait for either."""
    lock = runtime().lock
    events: Any = [Event() for _ in range(4)]
    shown = list[int]()
    device = torch.device("cpu")
    one = Progress("layers", 4)
    other = Progress("layers", 4)
    with closing(Raises()) as raises:
        for n, progress in enumerate((one, one, other, one)):
            with lock:
                show: Any = lambda n=n: shown.append(n)  # noqa: E731
                raises.add(Raise(progress, events[n], device, show, list))
        events[1].ended = events[2].ended = True
        assert until(lambda: shown == [2])
        sleep(0.02)
        assert shown == [2]
        events[0].ended = True
        assert until(lambda: shown == [2, 0, 1])
        events[3].error = RuntimeError("the device failed")
        with lock:
            another: Any = Event()
            raises.add(Raise(other, another, device, list, list))
        assert until(lambda: events[3].queries > 0)


def test_a_device_that_fails_ends_the_offer(made: Sides) -> None:
    both = Writing(made)
    offer = both.offer(progress="layers")
    event: Any = Event()
    event.error = RuntimeError("the device failed")
    pulled = both.pull(offer, by_layer=True, timeout=LIMIT)
    with both.owner.lock:
        both.owner.raises.add(
            Raise(Progress("layers", 2), event, torch.device("cpu"), list, offer.revoke)
        )
    with pytest.raises(OfferGone, match="revoked"):
        pulled.synchronize(LIMIT)
    assert offer.state == "revoked"


def test_no_mark_is_raised_inside_graph_capture(
    made: Sides, monkeypatch: pytest.MonkeyPatch, accelerator: torch.device
) -> None:
    whole = torch.zeros((2, 2, 16, 16, 4, 8), dtype=torch.int16, device=accelerator)
    offer = made.owner(Rows.shard_of(whole)).offer([1], tokens=16, progress="layers")
    monkeypatch.setattr("portakv.migrate.owner.capturing", lambda _: True)
    with pytest.raises(Unsupported, match="inside graph capture"):
        offer.raise_to(1)
    assert offer.mark == 0
