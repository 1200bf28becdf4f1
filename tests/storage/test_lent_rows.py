# SPDX-License-Identifier: Apache-2.0
"""Rows of lent copies: none is reused before its copy has ended, whatever happens meanwhile."""

from __future__ import annotations

import random
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from support.lent_copies import (
    FORM,
    KEYS,
    OTHERS,
    SIZE,
    SOURCE,
    Hands,
    cache,
    held,
    lent_rows,
    loaded,
    opened,
    same,
)
from support.seeded_loop import SetLoop
from support.storage_cases import FakeTier, key_of, rows_in_use
from support.waits import LIMIT, until

from portakv import KVView
from portakv.errors import (
    StoreError,
    TransferCancelled,
    TransferError,
    TransferTimeout,
)
from portakv.storage import Disk
from portakv.storage.lent import LentCopy
from portakv.storage.work import Graph


@pytest.fixture
def tier() -> FakeTier:
    return FakeTier()


# --- copies that do not end


def test_saves_find_no_staging_and_loads_go_on(tier: FakeTier) -> None:
    with opened(staging=8, tiers=[tier]) as store:
        store.save(SOURCE, range(4), KEYS[:4], full="wait").synchronize(LIMIT)
        hands = held(store)
        stuck = store.save_lent(hands, OTHERS[:4])
        assert lent_rows(store) == 4
        for _ in range(3):
            dropped = store.save(SOURCE, range(4, 8), KEYS[4:])
            with pytest.raises(TransferError, match="staging was full"):
                dropped.synchronize(LIMIT)
            lent = store.save_lent(held(store), KEYS[4:])
            with pytest.raises(TransferError, match="staging was full"):
                lent.synchronize(LIMIT)
            assert same(loaded(store, KEYS[:4]), range(4), SOURCE, range(4))
        hands.finish()
        stuck.synchronize(LIMIT)
        store.save(SOURCE, range(4, 8), KEYS[4:]).synchronize(LIMIT)
        assert same(loaded(store), range(8), SOURCE, range(8))
        assert same(loaded(store, OTHERS[:4]), range(4), SOURCE, range(4))


def late_writer(guard: bool) -> bool:
    """Cancel a lent save, save other blocks, and let the copier write only then; return True if the
    other blocks are right. Without the guard the copy ends with the cancel."""
    keys = [key_of(100 + i) for i in range(24)]
    wide = cache(20, blocks=24)
    with opened(staging=8, host=16) as store:
        hands = held(store)
        stuck = store.save_lent(hands, KEYS[:2])
        stuck.cancel()
        if not guard:
            for copy in hands.copies:
                copy.end([False] * len(copy.rows))
        for first in range(0, 24, 2):
            blocks = range(first, first + 2)
            store.save(wide, blocks, keys[first : first + 2], full="wait").synchronize(LIMIT)
        store.rows.tensor[hands.rows()] = 0xEE
        for copy in hands.copies:
            copy.end()
        with pytest.raises(TransferCancelled):
            stuck.synchronize(LIMIT)
        assert not any(store.has(key) for key in KEYS)
        target = cache(50, blocks=24)
        handle = store.load(target, range(24), keys, missing="skip")
        handle.synchronize(LIMIT)
        there = [i for i in range(24) if handle.landed[i]]
        assert len(there) == 16
        return same(target, there, wide, there)


def test_rows_of_a_cancelled_save_are_not_reused_before_the_end() -> None:
    assert late_writer(guard=True)


def test_rows_of_a_copy_that_ends_too_early_are_reused() -> None:
    """The negative control."""
    assert not late_writer(guard=False)


def late_reader(guard: bool, where: str) -> bool:
    """Cancel a lent load, bring other blocks into rows, and let the copier read only then; return
    True if it finds the right bytes. Without the guard the copy ends with the cancel."""
    wide = cache(20, blocks=32)
    keys = [key_of(100 + i) for i in range(32)]
    tier = FakeTier()
    with opened(staging=8, host=4 if where == "host" else 0, tiers=[tier]) as store:
        store.save(wide, range(32), keys, full="wait").synchronize(LIMIT)
        store.save(SOURCE, range(2), KEYS[:2], full="wait").synchronize(LIMIT)
        target = cache(50)
        hands = held(store, target)
        stuck = store.load_lent(hands, KEYS[:2])
        assert until(lambda: len(hands.rows()) == 2, LIMIT)
        stuck.cancel()
        if not guard:
            for copy in hands.copies:
                copy.end([False] * len(copy.rows))
        for first in range(0, 32, 2):
            some = cache(60)
            store.load(some, [0, 1], keys[first : first + 2]).synchronize(LIMIT)
            assert same(some, [0, 1], wide, [first, first + 1])
        hands.finish()
        with suppress(TransferCancelled):
            stuck.synchronize(LIMIT)
        return same(target, [0, 1], SOURCE, [0, 1])


@pytest.mark.parametrize("where", ["host", "staging"])
def test_rows_of_a_cancelled_load_are_not_reused_before_the_end(where: str) -> None:
    assert late_reader(True, where)


@pytest.mark.parametrize("where", ["host", "staging"])
def test_rows_of_a_load_that_ends_too_early_are_reused(where: str) -> None:
    """The negative control."""
    assert not late_reader(False, where)


def test_a_cancel_is_a_flag_for_the_copier(tier: FakeTier) -> None:
    with opened(tiers=[tier]) as store:
        hands = held(store)
        saved = store.save_lent(hands, KEYS)
        assert saved.released is not None
        assert not any(copy.cancelled for copy in hands.copies)
        assert saved.cancel()
        assert all(copy.cancelled for copy in hands.copies)
        assert not saved.done()
        assert not saved.released.done()
        with pytest.raises(TransferTimeout):
            saved.synchronize(0.0)
        hands.finish()
        saved.released.synchronize(LIMIT)
        with pytest.raises(TransferCancelled):
            saved.synchronize(LIMIT)
        assert not any(copy.cancelled for copy in hands.copies)
        assert not tier.blocks
        assert not lent_rows(store)


def test_a_deadline_is_a_flag_for_the_copier(tier: FakeTier) -> None:
    with Clock() as clock, opened(tiers=[tier], graph=clock.graph) as store:
        hands = held(store)
        saved = store.save_lent(hands, KEYS, deadline=5.0)
        assert not any(copy.cancelled for copy in hands.copies)
        clock.loop.set(10.0)
        assert all(copy.cancelled for copy in hands.copies)
        assert not saved.done()
        hands.finish()
        assert until(lambda: not lent_rows(store), LIMIT)
        with pytest.raises(TransferError, match="late"):
            saved.done()
        assert not tier.blocks


class Clock:
    """A clock that the test sets, and a graph with it, closed at the end."""

    def __init__(self) -> None:
        self.loop = SetLoop()
        self.graph = Graph(runtime=self.loop.runtime)

    def __enter__(self) -> Clock:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.graph.close(LIMIT)
        self.loop.end()


def test_a_load_that_is_late_begins_no_copy(tier: FakeTier) -> None:
    with Clock() as clock, opened(tiers=[tier], graph=clock.graph) as store:
        store.save(SOURCE, range(2), KEYS[:2], full="wait").synchronize(LIMIT)
        go = threading.Event()
        reads = threading.Event()

        def wait() -> None:
            reads.set()
            go.wait(LIMIT)

        tier.faults = {key: [wait] for key in KEYS[:2]}
        hands = held(store, cache(50))
        handle = store.load_lent(hands, KEYS[:2], deadline=5.0)
        assert reads.wait(LIMIT)
        clock.loop.set(10.0)
        go.set()
        assert until(handle.done, LIMIT)
        assert not handle.landed.any()
        assert not hands.copies


# --- calls that meet


def test_a_second_save_joins_the_first(tier: FakeTier) -> None:
    with opened(tiers=[tier]) as store:
        first = held(store)
        saved = store.save_lent(first, KEYS)
        second = held(store, cache(90))
        joined = store.save_lent(second, KEYS)
        by_store = store.save(cache(91), range(8), KEYS)
        assert joined.released is not None
        assert joined.released.done()
        assert not second.copies
        saved.cancel()
        assert not any(copy.cancelled for copy in first.copies)  # the second waits for them
        first.finish()
        joined.synchronize(LIMIT)
        by_store.synchronize(LIMIT)
        assert same(loaded(store), range(8), SOURCE, range(8))
        third = held(store)
        store.save_lent(third, KEYS).synchronize(LIMIT)
        assert not third.copies


def test_a_block_that_did_not_land_fails_for_all_that_joined(tier: FakeTier) -> None:
    with opened(tiers=[tier]) as store:
        first = held(store)
        store.save_lent(first, KEYS)
        joined = store.save_lent(held(store), KEYS)
        target = cache(50)
        load = store.load(target, range(8), KEYS, missing="skip")
        first.finish(lambda copy: [i != 3 for i in copy.blocks])
        with pytest.raises(TransferError, match=r"7 of 8 blocks landed. 1 failed \(lent\)"):
            joined.synchronize(LIMIT)
        load.synchronize(LIMIT)
        some = [i for i in range(8) if i != 3]
        assert [i for i in range(8) if load.landed[i]] == some
        assert same(target, some, SOURCE, some)
        assert same(target, [3], cache(50), [3])


@pytest.mark.parametrize("lent", ["save", "load", "both"])
def test_a_load_joins_a_save(lent: str, tier: FakeTier) -> None:
    """No tier has the blocks when the load ends."""
    tier.hold = threading.Event()
    target = cache(50)
    with opened(tiers=[tier]) as store:
        source = held(store)
        hands = Hands(store, target, range(8))
        try:
            if lent == "load":
                saved = store.save(SOURCE, range(8), KEYS)
            else:
                saved = store.save_lent(source, KEYS)
            if lent == "save":
                load = store.load(target, range(8), KEYS)
            else:
                load = store.load_lent(hands, KEYS)
            source.finish()
            load.synchronize(LIMIT)
            assert load.landed.all()
            assert not tier.blocks
        finally:
            tier.hold.set()
        saved.synchronize(LIMIT)
    assert same(target, range(8), SOURCE, range(8))


def test_a_row_that_two_read_stays_until_both_end(tier: FakeTier) -> None:
    with opened(tiers=[tier]) as store:
        store.save(SOURCE, range(2), KEYS[:2], full="wait").synchronize(LIMIT)
        go = threading.Event()
        tier.faults = {key: [lambda: go.wait(LIMIT)] for key in KEYS[:2]}
        all_hands = [held(store, cache(50 + i)) for i in range(2)]
        handles = [store.load_lent(hands, KEYS[:2]) for hands in all_hands]
        go.set()
        assert until(lambda: all(len(hands.rows()) == 2 for hands in all_hands), LIMIT)
        assert sorted(all_hands[0].rows()) == sorted(all_hands[1].rows())
        for hands, handle, left in zip(all_hands, handles, (2, 0), strict=True):
            hands.finish()
            handle.synchronize(LIMIT)
            assert until(lambda left=left: lent_rows(store) == left, LIMIT)


def test_the_blocks_may_be_written_after_the_release(tier: FakeTier) -> None:
    tier.hold = threading.Event()
    with opened(tiers=[tier]) as store:
        source = cache()
        hands = held(store, source)
        try:
            saved = store.save_lent(hands, KEYS)
            assert saved.released is not None
            assert not saved.released.done()
            hands.finish()
            saved.released.synchronize(LIMIT)
            assert not saved.done()
            for tensor in source.tensors:
                tensor.zero_()
        finally:
            tier.hold.set()
        saved.synchronize(LIMIT)
        assert same(loaded(store), range(8), SOURCE, range(8))


# --- damage, and the end of the store


def test_a_damaged_block_is_in_no_copy(tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    disk: dict[str, Any] = {"tiers": [Disk(folder, capacity=64 * SIZE)]}
    with opened(**disk) as store:
        store.save(SOURCE, range(8), KEYS, full="wait").synchronize(LIMIT)
    (data,) = [path for path in folder.rglob("*") if path.is_file() and has(path, KEYS[3])]
    content = bytearray(data.read_bytes())
    content[content.find(FORM.digest + KEYS[3]) - 8 + 4096 + 77] ^= 1
    data.write_bytes(content)
    target = cache(50)
    with opened(**disk) as store:
        hands = Hands(store, target, range(8))
        handle = store.load_lent(hands, KEYS)
        handle.synchronize(LIMIT)
        assert [i for i in range(8) if not handle.landed[i]] == [3]
        assert sorted(i for copy in hands.copies for i in copy.blocks) == [0, 1, 2, 4, 5, 6, 7]
    some = [i for i in range(8) if i != 3]
    assert same(target, some, SOURCE, some)
    assert same(target, [3], cache(50), [3])


def has(path: Path, key: bytes) -> bool:
    """Return True if a file has the image of a block."""
    return FORM.digest + key in path.read_bytes()


@pytest.mark.parametrize("kind", ["save", "load of the host tier", "load of the disk"])
@pytest.mark.parametrize("own", [True, False], ids=["own graph", "shared graph"])
def test_a_copy_outlives_its_store(kind: str, own: bool, tmp_path: Path) -> None:
    """The folder is free again, and what is copied late is stored nowhere."""
    folder = tmp_path / "disk"
    disk: dict[str, Any] = {"tiers": [Disk(folder, capacity=64 * SIZE)]}
    graph = None if own else Graph()
    store = opened(host=8 if "host" in kind else 0, graph=graph, **disk)
    store.save(SOURCE, range(4), KEYS[:4], full="wait").synchronize(LIMIT)
    target = cache(50)
    if kind == "save":
        hands = held(store, SOURCE, range(4, 8))
        handle = store.save_lent(hands, KEYS[4:])
    else:
        hands = held(store, target, range(4))
        handle = store.load_lent(hands, KEYS[:4])
    assert until(lambda: len(hands.rows()) == 4, LIMIT)
    store.close(0.0)
    with opened(**disk) as second:
        assert second.lookup(KEYS) == 4
        assert not handle.done()
        assert all(copy.cancelled for copy in hands.copies)
        with pytest.raises(StoreError):
            store.load_lent(hands, KEYS)
        hands.finish()
        with suppress(TransferCancelled):
            handle.synchronize(LIMIT)
        if kind == "save":
            assert not handle.landed.any()
        else:
            assert same(target, range(4), SOURCE, range(4))
        assert second.lookup(KEYS) == 4
        store.close(0.0)
    if graph is not None:
        assert graph.close(LIMIT)
    with opened(**disk) as third:
        assert third.lookup(KEYS) == 4
        assert same(loaded(third, KEYS[:4]), range(4), SOURCE, range(4))


def test_a_copy_that_ended_before_the_close_is_stored(tmp_path: Path) -> None:
    """The control of what a close leaves out."""
    disk: dict[str, Any] = {"tiers": [Disk(tmp_path / "disk", capacity=64 * SIZE)]}
    store = opened(**disk)
    hands = held(store)
    store.save_lent(hands, KEYS)
    hands.finish()
    store.close(LIMIT)
    with opened(**disk) as second:
        assert second.lookup(KEYS) == 8


def test_a_tier_that_hangs_stays_open_and_a_copy_does_not_hide_it(tier: FakeTier) -> None:
    tier.hold = threading.Event()
    store = opened(tiers=[tier])
    saved = store.save(SOURCE, range(4), KEYS[:4])
    assert tier.began.wait(LIMIT)
    hands = held(store)
    store.save_lent(hands, OTHERS[:4])
    with pytest.raises(TransferTimeout):
        store.close(0.0)
    assert not tier.closed
    tier.hold.set()
    with suppress(TransferError):
        saved.synchronize(LIMIT)
    store.close(0.0)
    assert tier.closed
    hands.finish()


# --- any order


@pytest.mark.parametrize("seed", range(6))
def test_no_row_has_two_owners_in_any_order(seed: int, tmp_path: Path) -> None:
    Walk(seed, tmp_path / "disk").run(150)


class Walk:
    """Random calls of a store, and random ends of their lent copies, also late and partial.

    A copy that did not end may write its rows or read them at any time: before its end each save
    fills its rows with a pattern that no other block has.
    """

    def __init__(self, seed: int, folder: Path) -> None:
        self.random = random.Random(seed)
        self.keys = [key_of(i) for i in range(24)]
        self.truth = cache(20, blocks=24)
        disk = Disk(folder, capacity=16 * SIZE, io="threads", workers=2)
        self.store = opened(staging=12, host=6, tiers=[disk])
        self.begun = list[tuple[LentCopy, list[int], KVView | None]]()
        self.lock = threading.Lock()

    def run(self, steps: int) -> None:
        acts = [
            self.save,
            self.save,
            self.load,
            self.load,
            self.end,
            self.end,
            self.end,
            self.check,
        ]
        for _ in range(steps):
            self.random.choice(acts)()
            self.check_rows()
        assert until(self.has_ended, LIMIT)
        for _ in range(4):
            self.check()
        self.store.close(LIMIT)

    def has_ended(self) -> bool:
        """End all copies, also those that begin meanwhile; return True if no row is in use."""
        while self.begun:
            self.end()
        rows = self.store.rows
        return not (lent_rows(self.store) or rows_in_use(rows) or self.store.graph.live)

    def some(self) -> list[int]:
        first = self.random.randrange(24)
        return [(first + i) % 24 for i in range(self.random.randint(1, 4))]

    def begin(self, at: list[int], view: KVView | None) -> Any:
        walk = self

        class Holds:
            def begin(self, copy: LentCopy) -> None:
                with walk.lock:
                    walk.begun.append((copy, at, view))

        return Holds()

    def save(self) -> None:
        at = self.some()
        handle = self.store.save_lent(self.begin(at, None), [self.keys[i] for i in at])
        if self.random.random() < 0.3:
            handle.cancel()

    def load(self) -> None:
        at = self.some()
        view = cache(50)
        handle = self.store.load_lent(self.begin(at, view), [self.keys[i] for i in at])
        if self.random.random() < 0.3:
            handle.cancel()

    def check(self) -> None:
        """Load blocks by the store, which are right, or not there."""
        at = self.some()
        view = cache(50)
        deadline = 0.05  # a save that it joins may not end before
        keys = [self.keys[i] for i in at]
        handle = self.store.load(view, range(len(at)), keys, missing="skip", deadline=deadline)
        handle.synchronize(LIMIT)
        there = [n for n in range(len(at)) if handle.landed[n]]
        assert same(view, there, self.truth, [at[n] for n in there])

    def check_rows(self) -> None:
        """Check that rows into which a copy writes belong to no other copy."""
        with self.lock:
            begun = [*self.begun]
        writes = [row for copy, _, view in begun if view is None for row in copy.rows]
        reads = {row for copy, _, view in begun if view is not None for row in copy.rows}
        assert len(writes) == len({*writes})
        assert not reads & {*writes}

    def end(self) -> None:
        """Make a copy, of which some blocks fail, and end it."""
        with self.lock:
            if not self.begun:
                return
            copy, at, view = self.begun.pop(self.random.randrange(len(self.begun)))
        rows = self.store.rows.tensor
        blocks = [at[i] for i in copy.blocks]
        if view is None:
            rows[[*copy.rows]] = self.random.randrange(256)
            landed = [self.random.random() < 0.8 for _ in blocks]
            Hands(self.store, self.truth, at).make(copy)
            for row, there in zip(copy.rows, landed, strict=True):
                if not there:
                    rows[row] = 0xEE
        else:
            landed = [True] * len(blocks)
            Hands(self.store, view, range(4)).make(copy)
            assert same(view, copy.blocks, self.truth, blocks)
        copy.end(landed)
