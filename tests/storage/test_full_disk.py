# SPDX-License-Identifier: Apache-2.0
"""A save into a full disk keeps its first blocks, in whatever order its writes end."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from contextlib import ExitStack
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from support import slot_cases as cases
from support.slot_cases import FORM, KEYS, Faulty, Tally
from support.waits import LIMIT, until

from portakv.storage import image
from portakv.storage.eviction import FIRST, Chains, mark_of
from portakv.storage.io.base import Engine
from portakv.storage.tiers.disk import DiskStore
from portakv.storage.tiers.folder import PATIENCE, Slots

CALL = {key: place for place, key in enumerate(KEYS[:8])}
OTHER = KEYS[20:30]  # blocks of another call


class Unordered(Chains[bytes]):
    """A negative control: the block used least recently goes, wherever it stands in its call."""

    def _use_in_order(self, call: Mapping[bytes, int]) -> None:
        pass


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Any]:
    """Return a function that opens folders of so many slots each, as the folders of one form."""
    with ExitStack() as stack:

        def make(
            *counts: int, chains: Chains[bytes] | None = None, kind: type[Slots] = Slots
        ) -> list[Slots]:
            chains = chains or Chains[bytes]()
            made = list[Slots]()
            for number, count in enumerate(counts):
                folder = tmp_path / str(number) / FORM.name
                capacity = count * FORM.image_bytes
                made.append(kind(folder, FORM, capacity, Faulty(), chains=chains))
                stack.callback(made[-1].close)
            for each in made:
                each.fit(made)
            return made

        yield make


def put(slots: Slots, *keys: bytes, follows: int = FIRST) -> None:
    """Seal blocks one after the other, in slots that are free."""
    for key in keys:
        slot = slots.take(key, None, follows, evict=False)
        assert slot is not None
        assert slots.seal(slot, key, 1, (1,))


@pytest.mark.parametrize("kind", [Chains, Unordered], ids=["chains", "negative control"])
def test_the_last_block_goes_for_an_early_one(opened: Any, kind: type[Chains[bytes]]) -> None:
    """The next block by use is an earlier one of the call, and later ones are sealed."""
    (slots,) = opened(4, chains=kind())
    put(slots, KEYS[0], KEYS[6], KEYS[7], KEYS[5])
    last = slots.index[KEYS[7]]
    if kind is Unordered:
        assert slots.take(KEYS[1], CALL) is None
        return
    assert slots.take(KEYS[1], CALL) == last
    assert {*slots.index} == {KEYS[0], KEYS[5], KEYS[6]}
    assert slots.take(KEYS[2], CALL) is not None
    assert slots.take(KEYS[3], CALL) is not None
    assert {*slots.index} == {KEYS[0]}
    assert slots.take(KEYS[4], {**CALL}) is None  # another object of the same call
    assert slots.take(KEYS[4], CALL) is None
    assert slots.evicted == 3


def test_blocks_of_other_calls_go_before_blocks_of_the_call(opened: Any) -> None:
    """Although they were used later."""
    (slots,) = opened(3)
    put(slots, KEYS[0], KEYS[7], OTHER[0])
    other = slots.index[OTHER[0]]
    assert slots.take(KEYS[1], CALL) == other
    assert {*slots.index} == {KEYS[0], KEYS[7]}


def test_a_block_that_is_read_or_has_a_successor_stays(opened: Any) -> None:
    (slots,) = opened(4)
    put(slots, KEYS[0], KEYS[7], KEYS[5])
    put(slots, KEYS[6], follows=mark_of(KEYS[5]))
    (place,) = slots.pin([KEYS[7]])
    assert place is not None
    assert slots.take(KEYS[1], CALL) is not None
    assert {*slots.index} == {KEYS[0], KEYS[5], KEYS[7]}
    assert slots.take(KEYS[2], CALL) is not None
    assert slots.take(KEYS[3], CALL) is None
    slots.unpin(place)
    assert slots.take(KEYS[3], CALL) == place.slot


def test_a_block_that_another_call_has_evicted_is_no_hindrance(opened: Any) -> None:
    (slots,) = opened(3)
    put(slots, KEYS[7], KEYS[0], KEYS[6])
    assert slots.take(OTHER[0], {OTHER[0]: 0}) is not None
    assert {*slots.index} == {KEYS[0], KEYS[6]}
    assert slots.take(KEYS[1], CALL) is not None
    assert {*slots.index} == {KEYS[0]}


def test_no_sealed_block_goes_while_a_later_one_is_written(opened: Any) -> None:
    """The one that is written may be the last one."""
    (slots,) = opened(3)
    put(slots, KEYS[6], KEYS[0])  # in the order of use the late one is next
    late = slots.take(KEYS[7], CALL)
    assert late is not None
    with ThreadPoolExecutor() as pool:
        early = pool.submit(slots.take, KEYS[1], CALL)
        with pytest.raises(TimeoutError):
            early.result(0.1)
        assert slots.seal(late, KEYS[7], 1, (1,))
        assert early.result(LIMIT) == late
    assert {*slots.index} == {KEYS[0], KEYS[6]}


def test_a_write_that_does_not_end(opened: Any) -> None:
    """After two seconds the last sealed block goes in place of the one that is written."""
    (slots,) = opened(3)
    put(slots, KEYS[0], KEYS[6])
    assert slots.take(KEYS[7], CALL) is not None
    assert slots.take(KEYS[1], CALL) is not None
    assert {*slots.index} == {KEYS[0]}


def test_of_several_folders_the_one_with_the_last_block_evicts_it(opened: Any) -> None:
    first, second = opened(2, 3)
    put(first, KEYS[0], KEYS[6])
    put(second, KEYS[5], KEYS[7], OTHER[0])
    assert first.take(KEYS[1], CALL) is None  # the block of another call goes before
    assert second.take(KEYS[1], CALL) is not None
    assert OTHER[0] not in second.index
    assert first.take(KEYS[2], CALL) is None
    assert second.take(KEYS[2], CALL) is not None
    assert KEYS[7] not in second.index
    assert second.take(KEYS[3], CALL) is None
    assert first.take(KEYS[3], CALL) is not None
    assert {*first.index, *second.index} == {KEYS[0], KEYS[5]}


def test_a_block_waits_for_later_ones_in_other_folders(opened: Any) -> None:
    first, second = opened(1, 1)
    put(first, KEYS[0])
    late = second.take(KEYS[7], CALL)
    with ThreadPoolExecutor() as pool:
        early = pool.submit(first.take, KEYS[1], CALL)
        with pytest.raises(TimeoutError):
            early.result(0.1)
        assert second.seal(late, KEYS[7], 1, (1,))
        assert early.result(LIMIT) is None
    assert second.take(KEYS[1], CALL) == late


@pytest.mark.parametrize("waits", [True, False], ids=["waits", "negative control"])
def test_a_block_waits_for_writes_of_other_calls(opened: Any, waits: bool) -> None:
    """All that is stored leads to blocks that are being written. A first block that found no slot
    then would make all others useless."""
    (slots,) = opened(3)
    put(slots, OTHER[0])
    late = [slots.take(key, None, mark_of(OTHER[0])) for key in OTHER[1:3]]
    if not waits:
        assert slots.take(KEYS[0], CALL, FIRST, True, False) is None
        return
    with ThreadPoolExecutor() as pool:
        early = pool.submit(slots.take, KEYS[0], CALL)
        with pytest.raises(TimeoutError):
            early.result(0.1)
        assert slots.seal(late[0], OTHER[1], 1, (1,))
        assert early.result(LIMIT) == late[0]
    assert {*slots.index} == {OTHER[0]}


def test_slots_are_sealed_before_a_write_waits(opened: Any) -> None:
    """Another call may wait for them."""
    (slots,) = opened(2)
    store = store_of([slots])
    late = slots.take(OTHER[0])
    with ThreadPoolExecutor() as pool:
        written = pool.submit(write, store, *KEYS[:2])
        while not store.has(KEYS[:1])[0]:
            assert not written.done()
        assert slots.seal(late, OTHER[0], 1, (1,))
        assert written.result(LIMIT) == [True, True]
    assert {*slots.index} == {*KEYS[:2]}


class Waits(Slots):
    """Slots that note how long blocks would wait for writes of other calls."""

    def noted(self) -> list[float]:
        """Note the seconds of each wait from now on, in the list that is returned."""
        waits = list[float]()
        written: Any = self.chains.written
        wait = written.wait

        def noted(seconds: float) -> bool:
            waits.append(seconds)
            return bool(wait(seconds))

        written.wait = noted
        return waits


class WaitsForEach(Waits):
    """A negative control: each block waits as long for writes that do not end."""

    def take(self, key: bytes, *terms: Any) -> int | None:
        for write in self._writes.values():
            write.late = False
        return super().take(key, *terms)


@pytest.mark.parametrize("kind", [Waits, WaitsForEach], ids=["once", "negative control"])
def test_blocks_wait_once_for_writes_that_do_not_end(opened: Any, kind: type[Waits]) -> None:
    """The first blocks of several prompts, of which none follows another one."""
    (slots,) = opened(1, kind=kind)
    late = slots.take(OTHER[0])
    waits = slots.noted()
    assert write(store_of([slots]), *KEYS[:3]) == [False] * 3
    assert waits == [PATIENCE] * (1 if kind is Waits else 3)
    assert slots.seal(late, OTHER[0], 1, (1,))
    with ThreadPoolExecutor() as pool:  # the next write in the slot is waited for again
        assert slots.take(OTHER[1]) == late
        early = pool.submit(slots.take, KEYS[0], CALL)
        with pytest.raises(TimeoutError):
            early.result(0.1)
        slots.give(late)
        assert early.result(LIMIT) == late


class Refuses(Slots):
    """Slots that take none for one block, as they were full at that moment."""

    def take(self, key: bytes, *terms: Any, **named: Any) -> int | None:
        return None if key == KEYS[1] else super().take(key, *terms, **named)


@pytest.mark.parametrize("chained", [True, False], ids=["chained", "negative control"])
def test_a_block_after_a_gap_evicts_none(opened: Any, chained: bool) -> None:
    (slots,) = opened(4, kind=Refuses)
    put(slots, *OTHER[:2])
    landed = write(store_of([slots]), *KEYS[:6], chained=chained)
    if chained:
        assert landed == [True, False, True, False, False, False], "a free slot is taken"
        assert {*slots.index} == {*OTHER[:2], KEYS[0], KEYS[2]}
    else:
        assert landed == [True, False, True, True, True, False]


@pytest.mark.parametrize("chained", [True, False], ids=["chained", "negative control"])
def test_a_block_after_a_block_that_could_not_be_written_evicts_none(
    opened: Any, chained: bool
) -> None:
    """The first write fills the free slots, and the second one has to wait."""
    (slots,) = opened(3)
    late = slots.take(OTHER[0])
    faults = iter([-errno.ENOSPC])
    store = store_of([slots], Faulty(lambda _: next(faults, None)))
    with ThreadPoolExecutor() as pool:
        written = pool.submit(write, store, *KEYS[:4], chained=chained)
        assert until(lambda: store.has(KEYS[2:3])[0], LIMIT)
        assert slots.seal(late, OTHER[0], 1, (1,))
        landed = written.result(LIMIT)
    assert landed == [False, True, True, not chained]
    assert (OTHER[0] in slots.index) == chained


class Held(Slots):
    """Slots that take none for one block before the test lets them."""

    began: Event
    go_on: Event

    def take(self, key: bytes, *terms: Any, **named: Any) -> int | None:
        if key == KEYS[1]:
            self.began.set()
            assert self.go_on.wait(LIMIT)
        return super().take(key, *terms, **named)


@pytest.mark.parametrize("folders", [1, 2])
def test_a_write_whose_later_blocks_are_sealed_first(opened: Any, folders: int) -> None:
    """The write of an early block has noted the use of its call, and finds the disk full."""
    Held.began = Event()
    Held.go_on = Event()
    parts = opened(*[4 // folders] * folders, kind=Held)
    store = store_of(parts)
    assert write(store, KEYS[0]) == [True]
    with ThreadPoolExecutor() as pool:
        early = pool.submit(write, store, KEYS[1])
        assert Held.began.wait(LIMIT)
        assert write(store, *KEYS[5:8]) == [True] * 3
        Held.go_on.set()
        assert early.result(LIMIT) == [True]
    assert [key for key in CALL if store.has([key])[0]] == [*KEYS[:2], *KEYS[5:7]]
    assert write(store, *KEYS[2:5]) == [True, True, False]
    assert store.has([*CALL]) == [True] * 4 + [False] * 4


def store_of(parts: list[Slots], engine: Engine | None = None) -> DiskStore:
    graph: Any = Tally()
    for slots in parts:
        slots.queue = graph.queue(f"disk:{slots.folder}")
    return DiskStore(graph, FORM, parts, engine or Faulty(), True, [])


def write(store: DiskStore, *keys: bytes, chained: bool = False) -> list[bool]:
    """Write blocks of the call as one of its tasks does; chained ones follow each other."""
    rows = cases.images(len(keys), FORM)
    follows = [FIRST, *(mark_of(key) if chained else FIRST for key in keys[:-1])]
    sums = [
        image.seal(row, FORM, key, 1, mark)
        for row, key, mark in zip(rows, keys, follows, strict=True)
    ]
    queue = store.queue_for_write(rows.nbytes)
    return store.write(queue, keys, [*rows], [1] * len(keys), sums, CALL)
