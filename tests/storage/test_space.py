# SPDX-License-Identifier: Apache-2.0
"""One bound holds over the slots of all forms in a folder, and what a form gives back for another
one leaves no block without those that it follows."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import slot_cases as cases
from support.core_cases import noise
from support.slot_cases import FORM, KEYS, Faulty, Tally
from support.storage_cases import key_of, small_form
from support.waits import LIMIT

from portakv import KVView
from portakv.runtime import resources
from portakv.storage import BlockForm, BlockStore, Disk, Remote, prefix_keys
from portakv.storage.eviction import FIRST, mark_of
from portakv.storage.tiers.disk import DiskStore
from portakv.storage.tiers.folder import Slots, Space

IMAGE = FORM.image_bytes
ROOM = 1 << 20  # of a folder: 128 blocks
GRAPH: Any = Tally
NO_ROWS = SimpleNamespace(memory=())
ALL = [key_of(number) for number in range(1, 301)]


def form_of(model: int) -> BlockForm:
    return replace(FORM, model=f"model {model}")


def opened(folder: Path, form: BlockForm, capacity: int | None = ROOM, **more: Any) -> Slots:
    return Slots(folder / form.name, form, capacity, Faulty(), **more)


def put(slots: Slots, key: bytes, follows: int = FIRST) -> bool:
    """Write a block as `DiskStore.write` does."""
    row = cases.images(1, slots.form)[0]
    sums = cases.fill(row, slots.form, key, 1)
    slot = slots.take(key, follows=follows)
    if slot is None:
        return False
    os.pwrite(slots.fd, row.data, slot * slots.form.image_bytes)
    return slots.seal(slot, key, 1, sums)


def put_chain(slots: Slots, keys: Sequence[bytes]) -> list[bool]:
    marks = [FIRST, *map(mark_of, keys[:-1])]
    return [put(slots, key, mark) for key, mark in zip(keys, marks, strict=True)]


def fill(folder: Path, form: BlockForm, keys: Sequence[bytes] = ALL[:128], **more: Any) -> None:
    """Fill a closed form with one chain of blocks."""
    space = Space(folder, ROOM)
    with closing(opened(folder, form, space=space, **more)) as slots:
        assert all(put_chain(slots, keys))


def allocated(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*/slots"))


def is_beginning(blocks: Sequence[bytes], chain: Sequence[bytes]) -> bool:
    """Return whether blocks are the first ones of a chain."""
    return {*blocks} == {*chain[: len(blocks)]}


def stored_keys(folder: Path, form: BlockForm) -> list[bytes]:
    """Return the keys of a form, and check that each block is right."""
    with closing(opened(folder, form, None)) as slots:
        keys = [*slots.index]
        row = cases.images(1, form)[0]
        for key in keys:
            (place,) = slots.pin([key])
            assert place is not None
            os.preadv(slots.fd, [row.data], place[0] * form.image_bytes)
            assert cases.holds(row, form, key)
            slots.unpin(place)
        return keys


def shuffled(keys: Sequence[bytes]) -> list[bytes]:
    return random.Random(5).sample([*keys], len(keys))


@pytest.mark.parametrize("bounded", [True, False])
def test_one_bound_holds_over_all_forms(tmp_path: Path, bounded: bool) -> None:
    """Control: without the bound four forms take four times the space."""
    spaces = Space(tmp_path, ROOM) if bounded else None
    for model in range(4):
        with closing(opened(tmp_path, form_of(model), space=spaces)) as slots:
            for number, key in enumerate(ALL[:128]):
                assert put(slots, key, mark_of(ALL[number - 1]) if number else FIRST)
                assert not bounded or allocated(tmp_path) <= ROOM
            assert slots.evicted == 0
    assert allocated(tmp_path) == (1 if bounded else 4) * ROOM
    keys = [stored_keys(tmp_path, form_of(model)) for model in range(4)]
    assert all(is_beginning(some, ALL) for some in keys)
    assert len(keys[3]) == 128


def test_a_form_gives_only_what_is_needed(tmp_path: Path) -> None:
    """An eighth at a time, the first blocks of a chain last."""
    fill(tmp_path, form_of(0))
    fill(tmp_path, form_of(1), ALL[:10])
    keys = stored_keys(tmp_path, form_of(0))
    assert is_beginning(keys, ALL)
    assert 90 < len(keys) < 128


@pytest.mark.parametrize("asked", [1, 3, 4, 9])
def test_a_form_that_is_read_gives_at_most_what_it_has(tmp_path: Path, asked: int) -> None:
    """Also if a form of larger blocks asks for more, whose save would fail else.

    Controls: it gives no more than it is asked for."""
    fill(tmp_path, form_of(0), ALL[:3])
    with closing(opened(tmp_path, form_of(0))) as slots:
        slots.cut(0)  # the empty slots
    with closing(opened(tmp_path, form_of(0), None)) as slots:
        assert slots.count == 3
        assert slots.cut(asked * FORM.image_bytes)
        assert slots.count == len(slots.index) == max(0, 3 - asked)
        assert allocated(tmp_path) == slots.nbytes


def test_blocks_go_with_those_that_follow_from_them(tmp_path: Path) -> None:
    """Wherever they lie: the last slots had blocks from the middle of the chains."""
    with closing(opened(tmp_path, form_of(0))) as slots:
        for chain in (ALL[:64], ALL[64:128]):
            marks = dict(zip(chain, [FIRST, *map(mark_of, chain)], strict=False))
            assert all(put(slots, key, marks[key]) for key in shuffled(chain))
    with closing(opened(tmp_path, form_of(0))) as slots:
        assert len(slots.index) == 128
    fill(tmp_path, form_of(1), ALL[:40])
    keys = {*stored_keys(tmp_path, form_of(0))}
    assert 0 < len(keys) < 128
    for chain in (ALL[:64], ALL[64:128]):
        assert is_beginning([key for key in chain if key in keys], chain)


def test_the_form_that_was_opened_last_gives_way_last(tmp_path: Path) -> None:
    for model in (0, 1):
        fill(tmp_path, form_of(model), ALL[:60])
    with closing(opened(tmp_path, form_of(0))):
        pass
    before = [len(stored_keys(tmp_path, form_of(model))) for model in (0, 1)]
    fill(tmp_path, form_of(2), ALL[:40])
    after = [len(stored_keys(tmp_path, form_of(model))) for model in (0, 1)]
    assert before == [60, 60]
    assert after[0] == 60
    assert after[1] < 60


def test_empty_slots_go_before_blocks(tmp_path: Path) -> None:
    """A folder that an older release allocated whole has such slots."""
    old = tmp_path / form_of(0).name
    fill(tmp_path, form_of(0), ALL[:20])
    for name, width in (("slots", IMAGE), ("table", 256)):
        with (old / name).open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, 128 * width)
    assert allocated(tmp_path) == ROOM
    with closing(opened(tmp_path, form_of(0))) as slots:
        assert slots.count == 128
        assert {*slots.index} == {*ALL[:20]}
    fill(tmp_path, form_of(1), ALL[:100])
    assert allocated(tmp_path) <= ROOM
    assert len(stored_keys(tmp_path, form_of(0))) == 20
    assert len(stored_keys(tmp_path, form_of(1))) == 100


def test_folders_of_an_older_release_are_made_to_fit(tmp_path: Path) -> None:
    """There each form had the whole bound."""
    for model in range(3):
        with closing(opened(tmp_path, form_of(model))) as slots:
            assert all(put_chain(slots, ALL[:128]))
    assert allocated(tmp_path) == 3 * ROOM
    with closing(opened(tmp_path, form_of(3), space=Space(tmp_path, ROOM))) as slots:
        assert allocated(tmp_path) == 3 * ROOM  # opening removes nothing
        assert put(slots, KEYS[0])
    assert allocated(tmp_path) <= ROOM
    assert all(is_beginning(stored_keys(tmp_path, form_of(model)), ALL) for model in range(3))


def test_a_smaller_capacity_leaves_the_beginning_of_chains(tmp_path: Path) -> None:
    marks = dict(zip(ALL[:128], [FIRST, *map(mark_of, ALL)], strict=False))
    with closing(opened(tmp_path, FORM)) as slots:
        assert all(put(slots, key, marks[key]) for key in shuffled(ALL[:128]))
    opened(tmp_path, FORM, ROOM // 2).close()
    assert allocated(tmp_path) == ROOM // 2
    assert is_beginning(stored_keys(tmp_path, FORM), ALL)


def test_what_is_read_stays(tmp_path: Path) -> None:
    """A form that this store has open to read gives way, but for a pinned block."""
    fill(tmp_path, form_of(0))
    space = Space(tmp_path, ROOM)
    with (
        closing(opened(tmp_path, form_of(1), space=space)) as own,
        closing(opened(tmp_path, form_of(0), None)) as reader,
    ):
        space.readers.add(reader)
        (place,) = reader.pin([ALL[40]])
        assert place is not None
        assert sum(put_chain(own, ALL[:128])) == 128
        assert own.evicted > 0
        assert allocated(tmp_path) <= ROOM
        assert is_beginning([*reader.index], ALL)
        assert len(reader.index) == 41
        row = cases.images(1, FORM)[0]
        os.preadv(reader.fd, [row.data], place[0] * IMAGE)
        assert cases.holds(row, FORM, ALL[40])
        reader.unpin(place)
        assert put(own, ALL[200])
    assert is_beginning(stored_keys(tmp_path, form_of(0)), ALL)


class Killed(Exception):
    """Stands for the end of the process."""


@pytest.mark.parametrize("step", range(12))
def test_a_kill_while_a_form_gives_way(
    tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kill comes at each call that changes a file. Whole blocks and beginnings of chains are
    left."""
    marks = dict(zip(ALL[:128], [FIRST, *map(mark_of, ALL)], strict=False))
    with closing(opened(tmp_path, form_of(0))) as slots:
        assert all(put(slots, key, marks[key]) for key in shuffled(ALL[:128]))
    left = [step]

    def ends(call: Any) -> Any:
        def ending(*arguments: Any) -> Any:
            if not left[0]:
                raise Killed
            left[0] -= 1
            return call(*arguments)

        return ending

    slots = opened(tmp_path, form_of(1), space=Space(tmp_path, ROOM))
    with monkeypatch.context() as patch:
        for name in ("ftruncate", "pwrite"):
            patch.setattr(os, name, ends(getattr(os, name)))
        patch.setattr(resources, "fallocate", ends(resources.fallocate))
        with pytest.raises(Killed):
            put_chain(slots, ALL[:30])
    slots.close(sync=False)
    assert is_beginning(stored_keys(tmp_path, form_of(0)), ALL)
    assert is_beginning(stored_keys(tmp_path, form_of(1)), ALL)


def test_a_form_that_cannot_be_read_stays(tmp_path: Path) -> None:
    """It is not known what its bytes are; `portakv store wipe` removes it."""
    fill(tmp_path, form_of(0))
    (tmp_path / form_of(0).name / "form.json").write_text("of another release")
    with closing(opened(tmp_path, form_of(1), space=Space(tmp_path, ROOM))) as slots:
        assert not put(slots, ALL[0])
    assert allocated(tmp_path) == ROOM


def tier_stores(folder: Path, form: BlockForm) -> Iterator[DiskStore]:
    tier = Disk(folder, capacity=ROOM, io=Faulty())
    yield from tier.open(GRAPH(), NO_ROWS, [form, *tier.forms(form)])


def test_reading_in_other_parts_allocates_nothing(tmp_path: Path) -> None:
    """Each part and block size is a separate form, which has no slots before it is saved."""
    whole = small_form(4, 8)
    fill(tmp_path, whole, ALL[:10])
    before = allocated(tmp_path)
    for heads in (4, 2, 1):
        for size in (4, 8, 16):
            part = replace(whole, heads=(0, heads, 8), block_size=size)
            for tier_store in reversed([*tier_stores(tmp_path, part)]):
                tier_store.close()
    assert len([*tmp_path.glob("*/form.json")]) == 10
    assert allocated(tmp_path) == before


# another block size


def cache(block_size: int) -> KVView:
    tensors = [noise(12, 2, block_size, 2, 32, dtype=torch.float16) for _ in range(4)]
    return KVView(tensors, "layer | block kv token head dim")


@pytest.mark.parametrize("where", ["disk", "remote"])
def test_another_block_size_is_named(
    tmp_path: Path, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Blocks of 16 tokens lie there, and the view has blocks of 32: a note and the log say so, and
    what they say to do finds the blocks."""
    tokens = list(range(96))

    def tier() -> Any:
        if where == "disk":
            return Disk(tmp_path, capacity=1 << 20)
        pytest.importorskip("obstore")
        return Remote(f"file://{tmp_path}")

    def store(view: KVView, **more: Any) -> BlockStore:
        form = BlockForm.of(view, "org/model@1", **more)
        return BlockStore(form, staging=8 * form.image_bytes, tiers=[tier()], full="wait")

    keys = prefix_keys(tokens, block_size=16)
    with store(cache(16)) as first:
        assert "is here in blocks" not in first.explain()
        first.save(cache(16), range(6), keys).synchronize(LIMIT)
    caplog.set_level(logging.WARNING, "portakv.storage")
    caplog.clear()
    with store(cache(32)) as second:
        assert second.lookup(prefix_keys(tokens, block_size=32)) == 0
        note = "org/model@1 is here in blocks of 16 tokens"
        assert note in second.explain()
        assert "Pass block_size=16 to BlockForm.of and prefix_keys." in second.explain()
        assert note in caplog.text
        assert str(tmp_path) in caplog.text
    with store(cache(32), block_size=16) as third:
        assert third.lookup(keys) == 6


@pytest.mark.parametrize("by", ["another model", "the whole form", "a smaller capacity"])
def test_a_chain_in_two_folders_loses_its_end(tmp_path: Path, by: str) -> None:
    """Whichever folder gives slots back, blocks that follow from them go in the other one too."""
    half = small_form(heads=2, model="whole")
    half = replace(half, heads=(0, 1, 2))
    folders = [tmp_path / "a", tmp_path / "b"]
    capacity = 2 * 18 * half.image_bytes
    terms: Any = {"staging": 1 << 20, "full": "wait"}
    view = KVView(torch.zeros(64, 4, 1, 2, 4, 32, dtype=torch.float16), half.layout)
    keys = ALL[:36]

    def chain() -> list[bytes]:
        with BlockStore(half, tiers=[Disk(*folders, capacity=capacity)], **terms) as store:
            tier_store = store._tier_stores[0]
            return [key for key, there in zip(keys, tier_store.has(keys), strict=True) if there]

    with BlockStore(half, tiers=[Disk(*folders, capacity=capacity)], **terms) as store:
        for i in range(0, 36, 3):
            after = keys[i - 1] if i else None
            store.save(view, range(i, i + 3), keys[i : i + 3], after=after).synchronize(LIMIT)
    assert chain() == keys
    if by == "a smaller capacity":
        capacity = 2 * 17 * half.image_bytes
    else:
        other = replace(half, model="other") if by == "another model" else small_form(model="whole")
        heads = other.heads[1] - other.heads[0]
        rows = KVView(torch.zeros(8, 4, heads, 2, 4, 32, dtype=torch.float16), other.layout)
        with BlockStore(other, tiers=[Disk(*folders, capacity=capacity)], **terms) as store:
            store.save(rows, [0], ALL[100:101]).synchronize(LIMIT)
            tier_store = store._tier_stores[-1]
            if by == "the whole form":
                left = [key for key, there in zip(keys, tier_store.has(keys), strict=True) if there]
                assert is_beginning(left, keys)
    left = chain()
    assert is_beginning(left, keys)
    assert 0 < len(left) < 36
