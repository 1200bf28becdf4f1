# SPDX-License-Identifier: Apache-2.0
"""`Disk` and its stores: blocks come back whole and right, or not at all, whatever is done to the
files, the device or the process."""

from __future__ import annotations

import errno
import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support import slot_cases as cases
from support.slot_cases import FORM, KEYS, LARGE, Faulty, Tally

from portakv.errors import InvalidTerms, StoreBusy, StoreError
from portakv.storage import image
from portakv.storage.form import BlockForm
from portakv.storage.io.base import Engine, Request
from portakv.storage.tiers.disk import Disk, DiskStore
from portakv.storage.tiers.folder import lock
from portakv.storage.work import Graph

GRAPH: Any = Tally
NO_ROWS = SimpleNamespace(memory=())
Open = Callable[..., DiskStore]


def disk(*folders: Path, blocks: int = 8, of: BlockForm = FORM, **more: Any) -> Disk:
    return Disk(*folders, capacity=len(folders) * blocks * of.image_bytes, **more)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Open]:
    """Return an opener for the store of a tier of a form; close the stores at the end."""
    opened: list[DiskStore] = []

    def make(of: BlockForm = FORM, *names: str, graph: Any = None, **more: Any) -> DiskStore:
        places = [tmp_path / name for name in names or ("a",)]
        tier = disk(*places, of=of, **{"io": Faulty(), **more})
        opened.extend(tier.open(graph or GRAPH(), NO_ROWS, [of]))
        return opened[-1]

    yield make
    for each in opened:
        each.close()


def save(store: DiskStore, keys: Sequence[bytes], generation: int = 1) -> list[bool]:
    rows = cases.images(len(keys), store.form)
    pairs = zip(rows, keys, strict=True)
    sums = [cases.fill(row, store.form, key, generation) for row, key in pairs]
    queue = store.queue_for_write(rows.nbytes)
    return store.write(queue, keys, [*rows], [generation] * len(keys), sums)


def load(store: DiskStore, keys: Sequence[bytes]) -> list[bool]:
    """Return whether each block landed, and check the landed ones."""
    rows = cases.images(len(keys), store.form)
    landed = store.read(keys, [*rows])
    for row, key, there in zip(rows, keys, landed, strict=True):
        assert not there or cases.holds(row, store.form, key)
    return landed


def counts(store: DiskStore) -> dict[tuple[str, str], int]:
    graph: Any = store.graph
    return dict(+graph.counts)


def slot_of(store: DiskStore, key: bytes) -> tuple[Path, int]:
    """Return the file of blocks, and the offset of a block in it."""
    slots = next(slots for slots in store.parts if key in slots.index)
    return slots.folder / "slots", slots.index[key] * store.form.image_bytes


@pytest.mark.parametrize("io", ["ring", "threads", Faulty()], ids=["ring", "threads", "plain"])
@pytest.mark.parametrize("of", [FORM, LARGE], ids=["small", "large"])
def test_blocks_come_back(store: Open, io: str | Engine, of: BlockForm) -> None:
    one = store(of, io=io, blocks=6)
    assert save(one, KEYS[:6]) == [True] * 6
    assert one.has(KEYS[3:9]) == [True] * 3 + [False] * 3
    assert load(one, KEYS[2:8]) == [True] * 4 + [False] * 2
    assert counts(one) == {("save", "hit"): 6, ("load", "hit"): 4, ("load", "miss"): 2}
    one.close()
    again = store(of, io=io, blocks=6)
    assert load(again, KEYS[:6]) == [True] * 6
    assert save(again, KEYS[:6], 9) == [True] * 6  # they are there: nothing is written
    assert counts(again) == {("load", "hit"): 6}


def test_segments_alone(store: Open) -> None:
    """A segment is read by itself, and verified by the record; the first one with the header."""
    one = store(LARGE)
    save(one, KEYS[:2])
    first, second = LARGE.segments
    for segments, begin, end in [([1], second.offset, None), ([0], -image.HEADER, first.nbytes)]:
        rows = cases.images(1, LARGE)
        assert one.read(KEYS[:1], [*rows], segments) == [True]
        piece = slice(begin + image.HEADER, None if end is None else end + image.HEADER)
        whole = cases.images(1, LARGE)
        one.read(KEYS[:1], [*whole])
        assert np.array_equal(rows[0, piece], whole[0, piece])
        assert np.count_nonzero(rows) <= len(whole[0, piece])
    path, begin = slot_of(one, KEYS[0])
    flip(path, begin + image.HEADER + second.offset)
    assert one.read(KEYS[:2], [*cases.images(2, LARGE)], [0]) == [True, True]
    assert one.read(KEYS[:2], [*cases.images(2, LARGE)], [0, 1]) == [False, True]
    assert one.has(KEYS[:2]) == [False, True]
    path, begin = slot_of(one, KEYS[1])
    flip(path, begin + 40)  # of the header
    assert one.read(KEYS[1:2], [*cases.images(1, LARGE)], [1]) == [True]
    assert one.read(KEYS[1:2], [*cases.images(1, LARGE)], [0]) == [False]


def test_links_and_counts_of_a_graph(store: Open) -> None:
    graph = Graph()
    one = store(FORM, "a", "b", graph=graph, workers=3)
    save(one, KEYS[:2])
    assert [queue.width for queue in graph.queues.values()] == [3, 3]
    assert one.queue_for_write(1) in graph.queues.values()
    moved = graph.statistics()["tier_bytes_total"]
    assert {"tier": "disk", "op": "save", "value": 2 * FORM.image_bytes} in moved
    graph.close()


def flip(path: Path, offset: int, bit: int = 0) -> None:
    with open(path, "r+b") as file:
        old = os.pread(file.fileno(), 1, offset)[0]
        os.pwrite(file.fileno(), bytes([old ^ 1 << bit]), offset)


@pytest.mark.parametrize("at", [0, 40, 70, 4095, 4096, 4350], ids=lambda at: f"byte {at}")
def test_one_bit_of_an_image(store: Open, at: int) -> None:
    """Faults 1 and 2. The block is a miss, its slot is free, and it is counted."""
    one = store(blocks=3)
    save(one, KEYS[:3])
    path, begin = slot_of(one, KEYS[1])
    flip(path, begin + at, at % 8)
    assert load(one, KEYS[:3]) == [True, False, True]
    assert counts(one)["load", "fault"] == 1
    assert one.has(KEYS[:3]) == [True, False, True]
    assert save(one, [KEYS[5]]) == [True]
    assert load(one, [KEYS[0], KEYS[5], KEYS[2]]) == [True] * 3


def test_sectors_that_were_torn_back(store: Open) -> None:
    """Fault 4. Each 512 bytes of an image as they were before, one after the other."""
    one = store(blocks=1)
    save(one, KEYS[:1], 1)
    path, _ = slot_of(one, KEYS[0])
    old = path.read_bytes()
    for sector in range(0, FORM.image_bytes, 512):
        save(one, KEYS[1:2], 2)
        new = path.read_bytes()
        torn = new[:sector] + old[sector : sector + 512] + new[sector + 512 :]
        path.write_bytes(torn)
        assert load(one, KEYS[1:2]) == [torn == new]
        save(one, KEYS[:1], 1)
        assert path.read_bytes() == old


def test_an_image_in_the_slot_of_another(store: Open) -> None:
    """Fault 6."""
    one = store()
    save(one, KEYS[:2])
    (path, a), (_, b) = (slot_of(one, key) for key in KEYS[:2])
    content = path.read_bytes()
    with open(path, "r+b") as file:
        os.pwrite(file.fileno(), content[a : a + FORM.image_bytes], b)
    assert load(one, KEYS[:2]) == [True, False]


@pytest.mark.parametrize("result", [-errno.EIO, -errno.ENODATA, -errno.EUCLEAN, 4096])
def test_a_read_that_fails(store: Open, result: int) -> None:
    """Fault 19. It is a miss, the block is forgotten, and others come."""
    io = Faulty()
    one = store(io=io)
    save(one, KEYS[:3])
    _, bad = slot_of(one, KEYS[1])
    io.fail = lambda ask: result if ask.offset == bad else None
    assert load(one, KEYS[:3]) == [True, False, True]
    assert counts(one)["load", "fault"] == 1
    io.fail = lambda ask: None
    assert load(one, KEYS[:3]) == [True, False, True]


@pytest.mark.parametrize("code", [errno.ECANCELED, errno.ENOMEM, errno.EBADFD])
@pytest.mark.parametrize("segments", [None, [0, 1]])
def test_a_read_that_was_not_carried_out(
    store: Open, code: int, segments: list[int] | None
) -> None:
    """It is a miss this time, and the block is there the next time: the engine was closed, the
    interpreter ends, a ring failed, or memory was short."""
    io = Faulty()
    rows = cases.images(3, LARGE)
    one = store(LARGE, io=io)
    save(one, KEYS[:3])
    _, at = slot_of(one, KEYS[1])
    io.fail = lambda ask: -code if at <= ask.offset < at + LARGE.image_bytes else None
    assert one.read(KEYS[:3], [*rows], segments) == [True, False, True]
    assert (counts(one)["load", "late"], one.has(KEYS[:3])) == (1, [True] * 3)
    io.fail = lambda ask: None
    assert load(one, KEYS[:3]) == [True] * 3
    one.close()
    assert store(LARGE).has(KEYS[:3]) == [True] * 3


SECOND = image.HEADER + LARGE.segments[1].offset


@pytest.mark.parametrize(
    ("segments", "at"), [(None, 0), ([0], 0), ([1], SECOND), ([0, 1], 0), ([0, 1], SECOND)]
)
def test_a_block_of_which_a_span_fails_is_bad(
    store: Open, segments: list[int] | None, at: int
) -> None:
    rows = cases.images(3, LARGE)
    io = Faulty()
    one = store(LARGE, io=io)
    save(one, KEYS[:3])
    _, bad = slot_of(one, KEYS[1])
    io.fail = lambda ask: -errno.EIO if ask.offset == bad + at else None
    assert one.read(KEYS[:3], [*rows], segments) == [True, False, True]
    assert one.has(KEYS[:3]) == [True, False, True]


def test_a_read_that_raises_keeps_its_blocks(store: Open) -> None:
    """Nothing proves that any of them is bad."""
    io = Faulty()
    one = store(io=io)
    save(one, KEYS[:3])

    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    io.fail = interrupt
    with pytest.raises(KeyboardInterrupt):
        load(one, KEYS[:3])
    io.fail = lambda ask: None
    assert load(one, KEYS[:3]) == [True] * 3


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_write_that_fails(store: Open, code: int) -> None:
    """Fault 20. The key is not entered; after an error of the device the slot is out of use."""
    io = Faulty()
    one = store(io=io, blocks=3)
    io.fail = lambda ask: -code if ask.offset == FORM.image_bytes else None
    assert save(one, KEYS[:3]) == [True, False, True]
    assert one.has(KEYS[:3]) == [True, False, True]
    assert counts(one) == {("save", "hit"): 2, ("save", "fault"): 1}
    io.fail = lambda ask: None
    assert save(one, KEYS[1:2]) == [True]
    (numbers,) = one.statistics().values()
    bad = int(code == errno.EIO)
    assert (numbers["broken"], numbers["evicted"], numbers["used"]) == (bad, bad, 3 - bad)


def test_a_store_when_all_slots_are_pinned(store: Open) -> None:
    """Fault 59. It is dropped, and counted."""
    one = store(blocks=1)
    save(one, KEYS[:1])
    slots = one.parts[0]
    (entry,) = slots.pin(KEYS[:1])
    assert save(one, KEYS[1:3]) == [False, False]
    assert counts(one) == {("save", "hit"): 1, ("save", "dropped"): 2}
    slots.unpin(entry or pytest.fail("it is gone"))
    assert save(one, KEYS[1:2]) == [True]


def test_evicted_while_it_is_read(store: Open) -> None:
    """Fault 58. A block that is read stays until the read has ended."""
    io = Faulty()
    one = store(io=io, blocks=2)
    save(one, KEYS[:2])

    def crowd(ask: Any) -> None:
        if not ask.write:
            io.fail = lambda ask: None
            assert [save(one, [key]) for key in KEYS[2:6]] == [[True]] * 4

    io.fail = crowd
    assert load(one, KEYS[1:2]) == [True]
    assert one.has(KEYS[:6]) == [False, True, False, False, False, True]


@pytest.mark.parametrize("steps", [300, pytest.param(20_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("io", ["ring", "threads"])
def test_threads_at_once(store: Open, io: str, steps: int) -> None:
    """Saves, loads, evictions and damage at random from four threads: what lands is right, and at
    the end each slot is in use or free."""
    one = store(io=io, blocks=10)
    path = one.parts[0].folder / "slots"

    def work(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(steps):
            keys = draw.sample(KEYS[:20], draw.randint(1, 4))
            if draw.random() < 0.5:
                save(one, keys, draw.randint(1, 100))
            elif draw.random() < 0.9:
                load(one, keys)
            else:
                flip(path, draw.randrange(10 * FORM.image_bytes))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert save(one, KEYS[20:30], 1) == [True] * 10
    assert load(one, KEYS[20:30]) == [True] * 10
    one.close()
    assert load(store(io=io, blocks=10), KEYS[20:30]) == [True] * 10


def test_a_read_that_comes_too_late(store: Open) -> None:
    io = Faulty()
    one = store(io=io)
    save(one, KEYS[:2])
    io.received.clear()
    rows = cases.images(2, FORM)
    assert one.read(KEYS[:2], [*rows], None, lambda: True) == [False, False]
    assert not io.received
    assert counts(one)["load", "late"] == 2
    assert load(one, KEYS[:2]) == [True, True]


def test_several_folders(store: Open) -> None:
    """A block goes where the fewest bytes are queued; a folder may be lost, and another added."""
    one = store(FORM, "a", "b")
    graph: Any = one.graph
    a, b = graph.queues.values()
    assert save(one, KEYS[:1]) == [True]
    a.queued_bytes = 1
    assert save(one, KEYS[1:2]) == [True]
    assert [one.queue(key) for key in KEYS[:2]] == [a, b]
    assert load(one, KEYS[:3]) == [True, True, False]
    assert [each["used"] for each in one.statistics().values()] == [1, 1]
    one.close()
    assert load(store(FORM, "c", "b"), KEYS[:2]) == [False, True]


@pytest.mark.parametrize("event", ["nothing", "eviction", "damage", "removal"])
def test_folders_that_were_used_apart_have_the_same_blocks(store: Open, event: str) -> None:
    """Opened together they hold each block once, whatever becomes of it."""
    for name in ("a", "b"):
        one = store(FORM, name)
        assert save(one, KEYS[:6]) == [True] * 6
        one.close()
    both = store(FORM, "a", "b")
    assert [each["used"] for each in both.statistics().values()] == [6, 0]
    if event == "eviction":
        for key in KEYS[10:50]:
            assert save(both, [key]) == [True]
        assert not any(both.has(KEYS[:6]))
    if event == "damage":
        slots = both.parts[0].folder / "slots"
        slots.write_bytes(bytes(slots.stat().st_size))
        assert load(both, KEYS[:6]) == [False] * 6
    if event == "removal":
        assert both.parts[0].cut(1)  # empty slots, and then those with blocks
        assert both.parts[0].cut(6 * FORM.image_bytes)
        assert both.has(KEYS[:6]) == [False] * 6
    both.touch(KEYS[:6])
    assert save(both, KEYS[:6], 2) == [True] * 6
    assert load(both, KEYS[:6]) == [True] * 6
    both.close()
    assert load(store(FORM, "b", "a"), KEYS[:6]) == [True] * 6


def test_a_block_that_two_saves_write_at_once_stays_in_one_folder(store: Open) -> None:
    io = Faulty()
    one = store(FORM, "a", "b", io=io)
    graph: Any = one.graph
    a, _ = graph.queues.values()
    other = list[list[bool]]()

    def save_elsewhere(_: Request) -> None:
        io.fail = lambda ask: None
        a.queued_bytes = 1  # the other save goes to the second folder
        other.append(save(one, KEYS[:1], 2))

    io.fail = save_elsewhere
    assert save(one, KEYS[:1]) == [True]
    assert other == [[True]]
    assert [each["used"] for each in one.statistics().values()] == [0, 1]
    assert load(one, KEYS[:1]) == [True]
    for key in KEYS[10:40]:
        assert save(one, [key]) == [True]
    assert one.has(KEYS[:1]) == [False]


def test_a_prefix_is_the_last_to_go(store: Open) -> None:
    """This holds for blocks that were written together, and after a kill as well."""
    one = store()
    save(one, KEYS[:4])
    save(one, KEYS[4:6], 2)
    order = [*KEYS[3::-1], KEYS[5], KEYS[4]]
    assert one.parts[0].by_use() == order
    one.parts[0].close(sync=False)
    assert store().parts[0].by_use() == order


def test_a_folder_with_free_slots_comes_before_one_that_evicts(store: Open) -> None:
    one = store(FORM, "a", "b", blocks=4)
    graph: Any = one.graph
    _, b = graph.queues.values()
    b.queued_bytes = 1
    assert save(one, KEYS[:4]) == [True] * 4
    assert save(one, KEYS[4:8]) == [True] * 4
    assert [each["used"] for each in one.statistics().values()] == [4, 4]
    assert one.has(KEYS[:8]) == [True] * 8


def test_folders_fill_alike_if_nothing_is_queued(store: Open) -> None:
    one = store(FORM, "a", "b", blocks=4)
    for key in KEYS[:20]:
        assert save(one, [key]) == [True]
    assert [each["used"] for each in one.statistics().values()] == [4, 4]
    assert one.has(KEYS[:20]) == [False] * 12 + [True] * 8


def test_a_write_that_raises_gives_its_slots_back(store: Open) -> None:
    io = Faulty()
    one = store(io=io, blocks=3)

    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    io.fail = interrupt
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            save(one, KEYS[:2])
    io.fail = lambda ask: None
    assert save(one, KEYS[:3]) == [True] * 3


def test_a_save_uses_the_blocks_that_it_finds(store: Open) -> None:
    """The block used longest ago is the save's own: another one goes for the new block."""
    one = store(blocks=3)
    assert all(save(one, [key]) == [True] for key in KEYS[:3])
    rows = cases.images(2, FORM)
    sums = [
        cases.fill(row, FORM, key, 2) for row, key in zip(rows, (KEYS[0], KEYS[8]), strict=True)
    ]
    own = {KEYS[0]: 0, KEYS[8]: 1}
    assert one.write(one.queue(KEYS[0]), [*own], [*rows], [2, 2], sums, own) == [True, True]
    assert one.has([KEYS[0], KEYS[1], KEYS[2], KEYS[8]]) == [True, False, True, True]


def test_other_forms_of_the_same_cache(tmp_path: Path, store: Open) -> None:
    """They are found and read; one that a killed process still writes is left out, with a note."""
    heads = [replace(FORM, heads=(i, i + 1, 4)) for i in range(4)]
    stranger = replace(heads[0], model="another")
    for form in (*heads[:3], stranger):
        one = store(form)
        assert save(one, KEYS[:2]) == [True, True]
        one.close()
    late = lock(tmp_path / "a" / heads[2].name / "slots")
    (tmp_path / "a" / "junk").mkdir()
    (tmp_path / "a" / "junk" / "form.json").write_text(replace(FORM, heads=(0, 2, 4)).json())
    tier = disk(tmp_path / "a", tmp_path / "none", io=Faulty())
    assert {*tier.forms(heads[3])} == {*heads[:3]}
    own, *others = every = tier.open(GRAPH(), NO_ROWS, [heads[3], *tier.forms(heads[3])])
    assert (own.form, own.writable) == (heads[3], True)
    assert {each.form for each in others} == {*heads[:2]}
    assert not any(each.writable for each in others)
    assert [load(each, KEYS[:2]) for each in others] == [[True, True]] * 2
    assert any("without I/O in flight" in note for note in own.notes)
    os.close(late)
    engine: Any = tier.io
    for each in reversed(every):
        assert not engine.closed
        each.close()
    assert engine.closed


def test_one_store_has_a_folder(tmp_path: Path, store: Open) -> None:
    """Fault 12. Ranks or models that share it get an error at their first start, with the owner's
    name, until the first one has closed; also through a link."""
    other = replace(FORM, model="another")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    one = store()
    for name in ("a", "link"):
        with pytest.raises(StoreBusy, match="this process has open already"):
            store(other, name)

    def child() -> None:
        with pytest.raises(StoreBusy, match=f"process {os.getppid()} has open already"):
            store(other)

    assert cases.ended_well(cases.forked(child))
    assert not (tmp_path / "a" / other.name).exists()
    one.close()
    with pytest.raises(StoreError, match="Increase the capacity"):  # which leaves nothing locked
        store(LARGE, blocks=0.5)
    assert save(store(other, "link"), KEYS[:1]) == [True]


def test_a_busy_folder_after_the_first_is_left_out(store: Open) -> None:
    """A note names it. The first folder must be free."""
    store(FORM, "b")
    one = store(FORM, "a", "b")
    assert any("does without" in note and "has open already" in note for note in one.notes)
    assert save(one, KEYS[:2]) == [True, True]
    with pytest.raises(StoreBusy):
        store(FORM, "b", "c")


@pytest.mark.parametrize(
    ("folders", "terms", "name"),
    [
        ((None,), {}, "folders"),
        ((5,), {}, "folders"),
        (("s3://b/x",), {}, "folders"),
        ((), {}, "folders"),
        (("x",), {"track": 5}, "track"),
        (("x",), {"io": "uring"}, "io"),
        (("x",), {"io": 5}, "io"),
        (("x",), {"capacity": "1"}, "capacity"),
        (("x",), {"capacity": float("nan")}, "capacity"),
        (("x",), {"workers": 0}, "workers"),
        (("x",), {"workers": 1 << 31}, "workers"),
        (("a\0b",), {}, "folders"),
        (("\ud800",), {}, "folders"),
        (("x",), {"admit": "third"}, "admit"),
    ],
)
def test_a_wrong_argument_is_named(folders: Any, terms: dict[str, Any], name: str) -> None:
    """The error comes from making the tier, not from opening it."""
    with pytest.raises(InvalidTerms, match=rf"^Expected {name}"):
        Disk(*folders, **{"capacity": 1 << 20, **terms})


def test_a_tier_that_cannot_be_opened(tmp_path: Path, store: Open) -> None:
    """Nothing of it stays open."""
    (tmp_path / "b").write_text("")
    engine = Faulty()
    with pytest.raises(StoreError):
        store(FORM, "a", "b", io=engine)
    assert engine.closed
    save(store(FORM, "a"), KEYS[:1])
    with pytest.raises(StoreBusy):
        store(FORM, "a")
    wrong: list[dict[str, Any]] = [{"admit": "third"}, {"workers": 0}, {"capacity": 0}]
    wrong += [{"workers": x} for x in (1.5, "8", None)]
    for terms in [*wrong, *({"capacity": x} for x in (float("inf"), "1G", None))]:
        with pytest.raises(InvalidTerms, match=r"^Expected (admit|workers|capacity)"):
            Disk("x", **{"capacity": 1, **terms})
    for urls in ((), ("s3://bucket/kv",), ("x", "file:///x")):
        with pytest.raises(InvalidTerms, match=r"^Expected (folders|a folder)"):
            Disk(*urls, capacity=1)
    assert Disk("x" * 300, capacity=1).forms(FORM) == []


def test_a_child_of_the_process_reads_and_writes_nothing(store: Open) -> None:
    """Fault 13."""
    one = store(io="threads")
    save(one, KEYS[:1])

    def child() -> None:
        for use in (load, save):
            with pytest.raises(StoreError, match="forked"):
                use(one, KEYS[:1] if use is load else KEYS[1:2])

    assert cases.ended_well(cases.forked(child))
    assert load(one, KEYS[:1]) == [True]


def test_the_end_of_a_call_evicts_none_of_its_beginning(store: Open) -> None:
    """`write` hands on which blocks are of one call: a later one finds no slot."""
    one = store(blocks=2)
    for key, there in zip(KEYS[:3], [True, True, False], strict=True):
        rows = cases.images(1, FORM)
        sums = [cases.fill(rows[0], FORM, key, 1)]
        of_call = {each: i for i, each in enumerate(KEYS[:3])}
        assert one.write(one.parts[0].queue, [key], [*rows], [1], sums, of_call) == [there]
    assert one.has(KEYS[:3]) == [True, True, False]
    assert counts(one) == {("save", "hit"): 2, ("save", "dropped"): 1}


def test_a_recovery_tells_how_far_it_is(store: Open, tmp_path: Path) -> None:
    save(one := store(), KEYS[:2])
    one.close()
    (tmp_path / "a" / FORM.name / "table").unlink()
    reports = list[tuple[str, int]]()

    def track(items: Sequence[int], what: str) -> Sequence[int]:
        reports.append((what, len(items)))
        return items

    assert load(store(track=track), KEYS[:2]) == [True, True]
    assert reports == [("records", 0), ("headers", 1)]


def test_a_folder_that_is_removed(store: Open, tmp_path: Path) -> None:
    """Fault 21. The store only reads the files that it holds; cut short, its blocks are misses."""
    one = store()
    save(one, KEYS[:2])
    path, _ = slot_of(one, KEYS[0])
    path.rename(tmp_path / "away")
    path.parent.rename(tmp_path / "gone")
    assert load(one, KEYS[:2]) == [True, True]
    assert save(one, KEYS[2:4]) == [False, False]
    os.truncate(tmp_path / "away", 0)
    assert load(one, KEYS[:2]) == [False, False]
    assert save(one, KEYS[:2]) == [False, False]


def writer(folder: Path, io: str) -> Callable[[int], None]:
    """Overwrite a store in a child until it is killed, eight blocks at a time."""

    def work(ready: int) -> None:
        of = LARGE
        draw = random.Random(os.getpid())
        (one,) = disk(folder, blocks=12, of=of, io=io).open(GRAPH(), NO_ROWS, [of])
        rows = cases.images(8, of)
        for generation in range(one.generation + 1, 10**6):
            keys = draw.sample(KEYS, 8)
            sums = [
                cases.fill(row, of, key, generation) for row, key in zip(rows, keys, strict=True)
            ]
            one.write(one.queue(keys[0]), keys, [*rows], [generation] * 8, sums)
            os.write(ready, b"x")

    return work


@pytest.mark.parametrize("io", ["ring", "threads"])
@pytest.mark.parametrize(
    "rounds", [5, pytest.param(100, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_killed_at_random(tmp_path: Path, io: str, rounds: int) -> None:
    """Fault 10. Every block of a sealed record is there, whole and right."""
    checked = 0
    for _ in range(rounds):
        cases.kill_writer(writer(tmp_path, io), 0.03)
        one = cases.reopened(disk(tmp_path, blocks=12, of=LARGE, io=io), LARGE)
        try:
            stored = [key for key, there in zip(KEYS, one.has(KEYS), strict=True) if there]
            assert load(one, stored) == [True] * len(stored)
        finally:
            one.close()
        checked += len(stored)
    assert checked >= 4 * rounds  # eight of twelve slots may have been under way


@pytest.mark.parametrize("io", ["ring", "threads"])
def test_restarted_while_writes_are_in_flight(tmp_path: Path, io: str) -> None:
    """Fault 11. 64 of them. Once the folder can be had, nothing changes any more but by its new
    owner."""
    many = 64

    def work(tell: int) -> None:
        (one,) = disk(tmp_path, blocks=many, of=LARGE, io=io).open(GRAPH(), NO_ROWS, [LARGE])
        rows = cases.images(many, LARGE)
        for generation in range(10**6):
            rows[:] = generation % 251
            keys = [random.randbytes(32) for _ in rows]
            os.write(tell, b"x")
            one.write(one.queue(keys[0]), keys, [*rows], [generation] * many, [[0, 0]] * many)

    for _ in range(3):
        pid, readable = cases.telling(work)
        for _ in range(3):
            assert os.read(readable, 1) == b"x"
        time.sleep(random.random() * 0.01)
        os.kill(pid, signal.SIGKILL)
        one = cases.reopened(disk(tmp_path, blocks=many, of=LARGE, io=io), LARGE)
        path = tmp_path / LARGE.name / "slots"
        before = path.read_bytes()
        time.sleep(0.05)
        assert path.read_bytes() == before
        one.close()
        os.waitpid(pid, 0)
