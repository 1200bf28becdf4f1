# SPDX-License-Identifier: Apache-2.0
"""`Chains` and the tiers that evict by it: no block goes before the blocks that follow it."""

from __future__ import annotations

import os
import random
import shutil
import struct
from collections.abc import Iterator
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from hypothesis.stateful import run_state_machine_as_test as run_model
from support import slot_cases as cases
from support.graph_ends import end_of_handle
from support.slot_cases import FORM, KEYS
from support.storage_cases import FakeTier, key_of, small_form
from support.waits import LIMIT

from portakv import KVView
from portakv.core.xxh3 import checksum
from portakv.errors import InvalidTerms, TransferError
from portakv.storage import image
from portakv.storage.eviction import FIRST, UNKNOWN, Chains, mark_of, marks_of
from portakv.storage.form import BlockForm
from portakv.storage.store import BlockStore
from portakv.storage.tiers.disk import Disk
from portakv.storage.tiers.folder import Slots

MANY = 100  # blocks of the views


def paged() -> KVView:
    """Return a cache whose blocks are those of `small_form`."""
    return KVView(torch.zeros(MANY, 4, 2, 2, 4, 32, dtype=torch.float16), small_form().layout)


def chained(numbers: range, chains: Chains[bytes], group: str = "a") -> None:
    """Add blocks, each of which follows the one before it."""
    for number in numbers:
        before = mark_of(key_of(number - 1)) if number else FIRST
        chains.add(key_of(number), mark_of(key_of(number)), before, group)


def evict_all(chains: Chains[bytes]) -> list[int]:
    """Remove the block that goes next until none can go; return the numbers in this order."""
    gone = list[int]()
    while (key := chains.next()) is not None:
        chains.remove(key)
        gone.append(struct.unpack("<I", key[:4])[0])
    return gone


# --- the structure ---


def test_the_end_of_a_chain_goes_first() -> None:
    """Also if its beginning was used least recently."""
    chains = Chains[bytes]()
    chained(range(5), chains)
    assert evict_all(chains) == [4, 3, 2, 1, 0]


def test_of_two_chains_the_one_used_least_recently_goes() -> None:
    chains = Chains[bytes]()
    chained(range(3), chains)
    chains.add(key_of(10), mark_of(key_of(10)), FIRST, "a")
    chains.add(key_of(11), mark_of(key_of(11)), mark_of(key_of(10)), "a")
    for number in (2, 1, 0):
        chains.touch(key_of(number))
    assert evict_all(chains) == [11, 10, 2, 1, 0]


def test_a_pin_and_a_successor_under_way_keep_a_block() -> None:
    chains = Chains[bytes]()
    chained(range(2), chains)
    chains.pin(key_of(1))
    assert chains.next() is None
    chains.unpin(key_of(1))
    chains.expect(mark_of(key_of(1)))
    assert chains.next() is None
    chains.unexpect(mark_of(key_of(1)))
    assert evict_all(chains) == [1, 0]


@pytest.mark.parametrize("seed", range(10))
def test_blocks_that_are_set_aside_are_those_that_go(seed: int) -> None:
    """Put back, they go in the same order."""
    draw = random.Random(seed)
    chains = Chains[bytes]()
    for number in range(30):
        before = mark_of(key_of(draw.randrange(30))) if draw.random() < 0.7 else FIRST
        chains.add(key_of(number), mark_of(key_of(number)), before, draw.choice("ab"))
    for number in draw.sample(range(30), 10):
        chains.touch(key_of(number))
    for _ in range(3):
        aside = list[bytes]()
        while len(aside) < draw.randrange(1, 31) and (key := chains.next()) is not None:
            chains.set_aside(key)
            aside.append(key)
        for key in reversed(aside):
            chains.put_back(key)
        for expected in aside[: draw.randrange(8)]:
            assert chains.next() == expected
            chains.remove(expected)
    left = [key for number in range(30) if (key := key_of(number)) in chains]
    assert len(evict_all(chains)) == len(left)


def test_blocks_of_unknown_predecessors_go_first() -> None:
    """Until a save names what they follow."""
    chains = Chains[bytes]()
    chained(range(2), chains)
    for number in (7, 8, 9):
        chains.add(key_of(number), mark_of(key_of(number)), UNKNOWN, "a")
    assert chains.learn(key_of(8), mark_of(key_of(7)))
    assert not chains.learn(key_of(8), mark_of(key_of(9))), "the first one stays"
    assert evict_all(chains) == [9, 1, 0, 8, 7]


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("circle", [1, 2, 7])
def test_a_circle_is_opened(circle: int, at_once: bool) -> None:
    """A caller may name any key: the blocks go in some order, and nothing hangs."""
    chains = Chains[bytes]()
    keys = [key_of(number) for number in range(circle)]
    marks = [mark_of(key) for key in keys]
    follows = [marks[number - 1] for number in range(circle)]
    if at_once:
        chains.fill(keys, marks, follows, "a")
    else:
        for key, mark, before in zip(keys, marks, follows, strict=True):
            chains.add(key, mark, before, "a")
    assert sorted(evict_all(chains)) == [*range(circle)]


def test_two_keys_of_one_mark() -> None:
    chains = Chains[bytes]()
    chains.add(key_of(0), 77, FIRST, "a")
    chains.add(key_of(1), 77, FIRST, "a")
    chains.add(key_of(2), 78, 77, "a")
    chains.fill([key_of(3)], [78], [77], "a")
    assert sorted(evict_all(chains)) == [0, 1, 2, 3]


def test_queues_stay_as_small_as_the_tier() -> None:
    """Whatever is used, pinned, moved and replaced: nothing grows with the number of calls."""
    chains = Chains[bytes]()
    chained(range(8), chains)
    draw = random.Random(1)
    for _ in range(5000):
        key = key_of(draw.randrange(8))
        chains.touch(key)
        chains.pin(key)
        chains.unpin(key)
        chains.remove(key)
        chains.add(key, mark_of(key), FIRST, draw.choice("ab"))
        chains.move(key, draw.choice("ab"))
    assert sum(len(queue) for queue in chains._queues.values()) < 300
    assert len(chains._blocks) == 8
    assert len(evict_all(chains)) == 8


class ChainsModel(RuleBasedStateMachine):
    """`Chains` against a dict that is searched whole."""

    def __init__(self) -> None:
        super().__init__()
        self.chains = Chains[int]()
        self.model = dict[int, Any]()
        self.uses = 0

    def may_go(self, group: str | None) -> list[int]:
        """Return the keys that may be evicted, the next one first."""
        followed = {block.follows for block in self.model.values()}
        keys = [
            key
            for key, block in self.model.items()
            if key not in followed and not block.pinned and group in (None, block.group)
        ]
        return sorted(keys, key=lambda key: (self.model[key].known, self.model[key].use))

    def leads_to(self, key: int, goal: int) -> bool:
        while key in self.model and key != goal:
            key = self.model[key].follows
        return key == goal

    def queue(self, key: int, follows: int) -> None:
        """Note a predecessor as `Chains` promises to."""
        block = self.model[key]
        block.known = block.known or follows != UNKNOWN
        if follows not in (UNKNOWN, FIRST) and not self.leads_to(follows, key):
            block.follows = follows

    NUMBERS = st.integers(1, 12)
    FOLLOWS = st.one_of(st.just(UNKNOWN), st.just(FIRST), NUMBERS)

    @rule(key=NUMBERS, follows=FOLLOWS, group=st.sampled_from("ab"))
    def add(self, key: int, follows: int, group: str) -> None:
        if key in self.model:
            return
        self.uses += 1
        block = SimpleNamespace(follows=None, group=group, known=False, pinned=False, use=self.uses)
        self.model[key] = block
        self.queue(key, follows)
        self.chains.add(key, key, follows, group)

    @rule(key=NUMBERS, follows=FOLLOWS)
    def learn(self, key: int, follows: int) -> None:
        if key in self.model:
            if self.model[key].follows is None:
                self.queue(key, follows)
            self.chains.learn(key, follows)

    @rule(key=NUMBERS)
    def touch(self, key: int) -> None:
        if key in self.model:
            self.uses += 1
            self.model[key].use = self.uses
            self.chains.touch(key)

    @rule(key=NUMBERS, pinned=st.booleans())
    def pin(self, key: int, pinned: bool) -> None:
        if key in self.model:
            self.model[key].pinned = pinned
            (self.chains.pin if pinned else self.chains.unpin)(key)

    @rule(key=NUMBERS, group=st.sampled_from("ab"))
    def move(self, key: int, group: str) -> None:
        if key in self.model:
            self.model[key].group = group
            self.chains.move(key, group)

    @rule(key=NUMBERS)
    def remove(self, key: int) -> None:
        if key in self.model:
            del self.model[key]
            self.chains.remove(key)

    @rule(group=st.sampled_from(("a", "b", None)))
    def evict(self, group: str | None) -> None:
        key = self.chains.next(group)
        assert key == next(iter(self.may_go(group)), None)
        if key is not None:
            self.remove(key)

    @invariant()
    def agrees(self) -> None:
        for group in ("a", "b", None):
            assert self.chains.next(group) == next(iter(self.may_go(group)), None)


def test_any_order_of_changes() -> None:
    run_model(ChainsModel, settings=settings(max_examples=60, stateful_step_count=40))


# --- records and images ---


def opened(folder: Path, slots: int = 8, form: BlockForm = FORM) -> Slots:
    return Slots(folder, form, slots * form.image_bytes, cases.Faulty())


def put(slots: Slots, number: int, follows: int) -> bool:
    """Write a block that follows a mark."""
    key = KEYS[number]
    row = cases.images(1, slots.form)[0]
    row[image.HEADER :] = 7
    sums = image.seal(row, slots.form, key, number + 1, follows)
    slot = slots.take(key, None, follows)
    if slot is None:
        return False
    os.pwrite(slots.fd, row, slot * slots.form.image_bytes)
    return slots.seal(slot, key, number + 1, sums)


def put_chain(slots: Slots, numbers: range) -> None:
    for number in numbers:
        assert put(slots, number, mark_of(KEYS[number - 1]) if number else FIRST)


@pytest.mark.parametrize("lost", ["nothing", "order", "table"])
@pytest.mark.parametrize("layers", [1, 20, 24, 30])  # 24 segments fill a record of 32 words
def test_predecessors_are_there_again(tmp_path: Path, layers: int, lost: str) -> None:
    """After a kill, and if the table is made again from headers."""
    form = FORM if layers == 1 else small_form(layers, 2, widths=(8192, 8192))
    slots = opened(tmp_path / "x", 4, form)
    put_chain(slots, range(4))
    slots.close(sync=lost == "nothing")
    if lost == "table":
        (tmp_path / "x" / "table").unlink()
    with closing(opened(tmp_path / "x", 4, form)) as slots:
        assert [slots.chains.next(), *slots.index] == [KEYS[3], *KEYS[:4]]
        for number in (3, 2, 1):
            assert put(slots, 10 + number, FIRST)
            slots.touch([KEYS[10 + number]])
            assert KEYS[number] not in slots.index
        assert KEYS[0] in slots.index


def as_older_release(folder: Path, slots: list[int], form: BlockForm = FORM) -> None:
    """Write records and headers as releases did that noted no predecessors."""
    size = form.image_bytes
    with open(folder / "table", "r+b") as table, open(folder / "slots", "r+b") as images:
        for slot in slots:
            record = np.frombuffer(os.pread(table.fileno(), 256, slot * 256), "<u8").copy()
            record[5] = form.payload_bytes
            record[-1] = checksum(record[:-1], slot)
            os.pwrite(table.fileno(), record.tobytes(), slot * 256)
            row = np.frombuffer(os.pread(images.fileno(), size, slot * size), np.uint8).copy()
            row[464:472] = 0
            row[4088:4096] = np.frombuffer(struct.pack("<Q", checksum(row[:4088])), np.uint8)
            os.pwrite(images.fileno(), row.tobytes(), slot * size)


@pytest.mark.parametrize("lost", [False, True])
def test_blocks_of_an_older_release_are_read_and_go_first(tmp_path: Path, lost: bool) -> None:
    """They share one table with new ones; the record is the same if it notes no predecessor."""
    folder = tmp_path / "x"
    slots = opened(folder, 4)
    put_chain(slots, range(4))
    old = [slots.index[key] for key in KEYS[:2]]
    slots.close()
    as_older_release(folder, old)
    if lost:
        (folder / "table").unlink()
    with closing(opened(folder, 4)) as slots:
        assert {*slots.index} == {*KEYS[:4]}
        (place,) = slots.pin(KEYS[:1])
        assert place is not None
        assert place[1].key == KEYS[0]
        slots.unpin(place)
        slots.touch([KEYS[0]])
        assert put(slots, 10, FIRST)
        assert KEYS[0] not in slots.index, "1 has a successor, and 0 has none that is known"


@pytest.mark.parametrize("killed", [False, True])
def test_a_save_names_what_older_blocks_follow(tmp_path: Path, killed: bool) -> None:
    """The records keep the predecessors from then on."""
    slots = opened(tmp_path / "x", 4)
    for number in range(3):
        assert put(slots, number, UNKNOWN)
    slots.touch(KEYS[:3], [FIRST, mark_of(KEYS[0]), mark_of(KEYS[1])])
    slots.close(sync=not killed)
    with closing(opened(tmp_path / "x", 4)) as slots:
        assert slots.chains.next() == KEYS[2]
        assert put(slots, 10, FIRST)
        slots.touch([KEYS[0]])
        slots.touch([KEYS[1]])
        slots.touch([KEYS[10]])
        assert slots.chains.next() == KEYS[2]


def test_an_older_release_reads_new_images() -> None:
    """It looks at neither the mark nor the word of the record."""
    row = cases.images(1, FORM)[0]
    sums = image.seal(row, FORM, KEYS[0], 3, mark_of(KEYS[1]))
    assert image.predecessor(row) == mark_of(KEYS[1])
    assert image.header(row, FORM) == (KEYS[0], 3, sums)
    other = cases.images(1, FORM)[0]
    image.seal(other, FORM, KEYS[0], 3)
    differ = np.flatnonzero(row != other)
    assert differ.min() >= 464
    assert {*differ.tolist()} <= {*range(464, 472), *range(4088, 4096)}


# --- stores ---


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Any]:
    """Return a function that makes stores of so many slots, in folders, and of so many rows of the
    host tier."""
    stores: list[BlockStore] = []

    def make(slots: int = 0, host: int = 0, folders: int = 1, tiers: Any = ()) -> BlockStore:
        form = small_form()
        size = form.image_bytes
        places = [tmp_path / str(number) for number in range(folders)]
        disks = [Disk(*places, capacity=slots * size, io="threads")] if slots else []
        terms: Any = {"staging": 8 * size, "host": host * size, "full": "wait"}
        stores.append(BlockStore(form, tiers=[*disks, *tiers], **terms))
        return stores[-1]

    yield make
    for store in stores:
        store.close(LIMIT)


def save(store: BlockStore, numbers: Any, after: int | None = None) -> list[bool]:
    """Save blocks of so many numbers; return which have landed."""
    some = [*numbers]
    before = None if after is None else key_of(after)
    handle = store.save(paged(), some, [key_of(i) for i in some], after=before)
    try:
        handle.synchronize(LIMIT)
    except TransferError:
        assert not handle.landed.all()
    return list(handle.landed.tolist())


def there(store: BlockStore, numbers: Any) -> list[bool]:
    """Return which blocks can be loaded, each by itself."""
    return [bool(store.lookup([key_of(i)])) for i in numbers]


@pytest.mark.parametrize("where", ["disk", "host"])
def test_landed_is_true_of_what_is_there(made: Any, where: str) -> None:
    """A save that finds its last blocks stored evicts them for its first ones."""
    store = made(**({"slots": 31} if where == "disk" else {"host": 31}))
    save(store, range(70, 100))
    landed = save(store, range(100))
    assert landed == there(store, range(100))
    assert landed == [number < 31 for number in range(100)]


def test_landed_of_a_save_that_joined_another(made: Any) -> None:
    """The one under way ends well, and its blocks are evicted before the second one ends."""
    store = made(slots=31)
    first = store.save(paged(), range(70, 100), [key_of(i) for i in range(70, 100)])
    second = store.save(paged(), range(100), [key_of(i) for i in range(100)])
    for handle in (first, second):
        try:
            handle.synchronize(LIMIT)
        except TransferError:
            assert not handle.landed.all()
    assert second.landed.tolist() == there(store, range(100))
    assert second.landed[:31].all()


@pytest.mark.parametrize("folders", [1, 3])
@pytest.mark.parametrize("where", ["disk", "host"])
@pytest.mark.parametrize("named", ["all keys", "new keys"])
def test_a_growing_prefix_keeps_its_beginning(
    made: Any, where: str, named: str, folders: int
) -> None:
    """Six turns of ten blocks, in room for 31."""
    slots = 31 if folders == 1 else 30
    store = made(folders=folders, **({"slots": slots} if where == "disk" else {"host": slots}))
    for turn in range(6):
        if named == "all keys":
            save(store, range(10 * turn + 10))
        else:
            save(store, range(10 * turn, 10 * turn + 10), 10 * turn - 1 if turn else None)
    assert store.lookup([key_of(i) for i in range(60)]) == slots
    assert sum(there(store, range(60))) == slots


@pytest.mark.parametrize("where", ["disk", "host"])
def test_another_prompt_takes_the_end_of_a_prefix(made: Any, where: str) -> None:
    """Although the end was saved last, and the beginning used least recently."""
    store = made(**({"slots": 20} if where == "disk" else {"host": 20}))
    save(store, range(10))
    save(store, range(10, 20), after=9)
    assert all(save(store, range(50, 55)))
    assert all(save(store, range(60, 65)))
    assert store.lookup([key_of(i) for i in range(20)]) == 10


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("where", ["disk", "host"])
def test_several_prompts_in_one_save(made: Any, where: str, named: bool) -> None:
    """The end of the one used least recently goes; as one chain the end of the last one does."""
    store = made(**({"slots": 8} if where == "disk" else {"host": 8}))
    numbers = [0, 1, 2, 3, 40, 41, 42]
    keys = [key_of(i) for i in numbers]
    after = [None, *keys[:3], None, *keys[4:6]]
    saved = store.save(paged(), numbers, keys, after=after if named else None)
    saved.synchronize(LIMIT)
    store.load(paged(), range(3), keys[4:]).synchronize(LIMIT)
    assert all(save(store, range(50, 53)))
    gone = [i for i, is_there in zip(numbers, there(store, numbers), strict=True) if not is_there]
    assert gone == ([2, 3] if named else [41, 42])


@pytest.mark.parametrize("where", ["disk", "host"])
def test_a_gap_of_one_prompt_stops_no_other_one_of_its_call(made: Any, where: str) -> None:
    """The first prompt follows a block that is nowhere: nothing goes for it, and it is left out."""
    store = made(**({"slots": 4} if where == "disk" else {"host": 4}))
    save(store, range(4))
    keys = [key_of(50), key_of(60), key_of(61)]
    saved = store.save(paged(), [50, 60, 61], keys, after=[key_of(49), None, key_of(60)])
    with pytest.raises(TransferError, match="2 of 3 blocks landed"):
        saved.synchronize(LIMIT)
    assert saved.landed.tolist() == there(store, [50, 60, 61]) == [False, True, True]


def test_blocks_after_what_is_nowhere_take_free_slots_alone(made: Any) -> None:
    """No lookup comes to them, so nothing goes for them."""
    store = made(slots=10)
    assert save(store, range(40, 44), after=39) == [True] * 4
    assert all(save(store, range(5)))
    assert save(store, range(50, 55), after=49) == [True] + [False] * 4
    assert store.lookup([key_of(i) for i in range(5)]) == 5


@pytest.mark.parametrize("count", [10, 30])
def test_of_blocks_after_a_gap_the_first_ones_stay(made: Any, count: int) -> None:
    """Several workers write them, and none evicts another block."""
    for turn in range(10):
        store = made(slots=12, folders=1 + turn % 2)
        where = store._tier_stores[0].where.split(", ")
        save(store, range(6))
        landed = save(store, range(50, 50 + count), after=49)
        assert landed == sorted(landed, reverse=True)
        assert sum(landed) == store.lookup([key_of(i) for i in range(50, 50 + count)]) >= 6
        store.close(LIMIT)
        for folder in where:
            shutil.rmtree(folder)


def test_what_a_remote_tier_may_have_counts_as_there(made: Any) -> None:
    store = made(slots=5, tiers=[FakeTier("remote")])
    save(store, range(5))
    assert save(store, range(50, 53), after=49) == [True] * 3
    assert store._tier_stores[0].known([key_of(50)]) == [True]


def test_a_folder_whose_blocks_all_have_successors(made: Any) -> None:
    """The block goes to another folder, in place of one that nothing follows."""
    store = made(slots=8, folders=2)
    tier_store: Any = store._tier_stores[0]
    first, second = tier_store.parts
    for number in range(8):
        queue = (first if number < 4 else second).queue
        row = cases.images(1, tier_store.form)[0]
        mark = mark_of(key_of(number - 1)) if number else FIRST
        sums = image.seal(row, tier_store.form, key_of(number), 1, mark)
        assert tier_store.write(queue, [key_of(number)], [row], [1], [sums]) == [True]
    assert (len(first.index), len(second.index)) == (4, 4)
    row = cases.images(1, tier_store.form)[0]
    sums = image.seal(row, tier_store.form, key_of(50), 1, FIRST)
    assert tier_store.write(first.queue, [key_of(50)], [row], [1], [sums]) == [True]
    assert {*first.index} == {key_of(i) for i in range(4)}
    assert {*second.index} == {key_of(i) for i in (4, 5, 6, 50)}


@pytest.mark.parametrize("where", ["disk", "host"])
def test_a_caller_that_lies_does_no_harm(made: Any, where: str) -> None:
    """A key that follows itself or its successor; other predecessors at each call."""
    store = made(**({"slots": 12} if where == "disk" else {"host": 12}))
    assert all(save(store, range(6), after=5))
    assert all(save(store, [0], after=0))
    assert all(save(store, [3, 1, 5, 0], after=2))
    for first in (20, 40, 60):
        assert all(save(store, range(first, first + 12)))
    assert there(store, range(6)) == [False] * 6


@pytest.mark.parametrize("after", [b"short", 5, "x" * 32, b"x" * 33, {b"x" * 32}, True])
def test_a_predecessor_that_is_not_a_key(made: Any, after: Any) -> None:
    store = made(host=4)
    with pytest.raises(InvalidTerms, match="Expected the key before the first one in `after`"):
        store.save(paged(), [0], [key_of(0)], after=after)


def test_predecessors_that_are_not_keys(made: Any) -> None:
    store = made(host=4)
    keys = [key_of(0), key_of(1)]
    with pytest.raises(InvalidTerms, match="for each of the 2 keys, got 1"):
        store.save(paged(), [0, 1], keys, after=[None])
    with pytest.raises(InvalidTerms, match="keys and None in `after`, 16 to 32 bytes, got an int"):
        store.save(paged(), [0, 1], keys, after=[None, 7])


def test_a_short_predecessor_is_filled_as_keys_are(made: Any) -> None:
    store = made(host=4)
    store.save(paged(), [0, 1], [b"a" * 16, b"b" * 16]).synchronize(LIMIT)
    store.save(paged(), [2], [b"c" * 16], after=b"b" * 16).synchronize(LIMIT)
    store.save(paged(), [3, 4], [key_of(3), key_of(4)]).synchronize(LIMIT)
    assert store.lookup([b"a" * 16, b"b" * 16, b"c" * 16]) == 2


# --- any sequence of calls ---


class StoreModel(RuleBasedStateMachine):
    """Saves, loads, lookups and restarts of several prompts that share beginnings. Whenever a block
    has gone, none of its followers is left in the tier."""

    folder: Path
    number = 0

    def __init__(self) -> None:
        super().__init__()
        self.store: Any = None
        self.view = paged()
        # What each key follows; those of one prompt stand in order, and share their beginning.
        self.prompts = [[*range(20)], [*range(8), *range(30, 42)], [*range(50, 60)]]
        self.follows = dict[int, int]()
        for prompt in self.prompts:
            self.follows.update((later, before) for before, later in pairwise(prompt))

    def tiers(self) -> list[set[int]]:
        """Return the numbers of the keys in each tier."""
        (tier_store,) = self.store._tier_stores
        disk = {key for slots in tier_store.parts for key in slots.index}
        host = {name[-32:] for name in self.store.rows.chains.by_use()}
        return [{struct.unpack("<I", key[:4])[0] for key in keys} for keys in (disk, host)]

    @initialize(slots=st.integers(3, 24), host=st.integers(0, 9), folders=st.integers(1, 3))
    def start(self, slots: int, host: int, folders: int) -> None:
        StoreModel.number += 1
        self.places = [self.folder / f"{StoreModel.number} {part}" for part in range(folders)]
        self.slots = max(slots, folders)
        self.host = host
        self.open()

    def open(self) -> None:
        form = small_form()
        size = form.image_bytes
        disk = Disk(*self.places, capacity=self.slots * size, io="threads", workers=1)
        terms: Any = {"staging": 4 * size, "host": self.host * size, "full": "wait"}
        self.store = BlockStore(form, tiers=[disk], **terms)

    def watched(self, work: Any) -> None:
        """Do what may evict, and check what has gone."""
        before = self.tiers()
        work()
        for old, new in zip(before, self.tiers(), strict=True):
            for gone in old - new:
                followers = {key for key in old & new if self.follows.get(key) == gone}
                assert not followers, f"{gone} has gone before {followers}"

    @rule(which=st.integers(0, 2), past=st.integers(1, 20), first=st.integers(0, 19))
    def save(self, which: int, past: int, first: int) -> None:
        prompt = self.prompts[which][:past]
        some = prompt[first:]
        if not some:
            return
        after = key_of(prompt[first - 1]) if first else None

        def work() -> None:
            keys = [key_of(i) for i in some]
            handle = self.store.save(self.view, some, keys, after=after, priority="urgent")
            assert end_of_handle(handle).wait(LIMIT)
            disk, _ = self.tiers()
            assert handle.landed.tolist() == [i in disk for i in some]

        self.watched(work)

    @rule(which=st.integers(0, 2), past=st.integers(1, 20))
    def load(self, which: int, past: int) -> None:
        some = self.prompts[which][:past]

        def work() -> None:
            count = self.store.lookup([key_of(i) for i in some])
            keys = [key_of(i) for i in some[:count]]
            self.store.load(self.view, some[:count], keys).synchronize(LIMIT)

        self.watched(work)

    @rule(which=st.integers(0, 2), past=st.integers(1, 20))
    def prefetch(self, which: int, past: int) -> None:
        if self.host:
            keys = [key_of(i) for i in self.prompts[which][:past]]
            self.watched(lambda: self.store.prefetch(keys).synchronize(LIMIT))

    @rule(kill=st.booleans())
    def restart(self, kill: bool) -> None:
        disk, _ = self.tiers()
        for slots in self.store._tier_stores[0].parts if kill else ():
            slots.close(sync=False)
        self.store.close(LIMIT)
        self.open()
        assert self.tiers()[0] == disk

    def teardown(self) -> None:
        if self.store is not None:
            self.store.close(LIMIT)


def run_store_model(folder: Path, examples: int) -> None:
    StoreModel.folder = folder
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large]
    terms: Any = {"stateful_step_count": 20, "deadline": None, "suppress_health_check": quiet}
    run_model(StoreModel, settings=settings(max_examples=examples, **terms))


def test_any_order_of_calls(tmp_path: Path) -> None:
    run_store_model(tmp_path, 12)


@pytest.mark.slow
def test_any_order_of_many_calls(tmp_path: Path) -> None:
    run_store_model(tmp_path, 300)


def test_marks_of_many_keys_are_those_of_each() -> None:
    keys = [key_of(number) for number in range(100)]
    assert marks_of(keys) == [mark_of(key) for key in keys]
    assert marks_of([]) == []
