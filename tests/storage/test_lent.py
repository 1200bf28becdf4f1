# SPDX-License-Identifier: Apache-2.0
"""Blocks whose copies others make: the right bytes, from rows that others have mapped."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from support.ambient import STATES
from support.lent_copies import (
    FORM,
    KEYS,
    LAYOUT,
    OTHERS,
    SIZE,
    SOURCE,
    Hands,
    cache,
    held,
    lent_rows,
    loaded,
    make,
    opened,
    same,
)
from support.peer_process import Peer
from support.pinned_runtime import claimed, installed
from support.storage_cases import FakeTier, key_of, rows_in_use, small_form
from support.waits import LIMIT, until

from portakv import KVView
from portakv.errors import (
    InvalidTerms,
    StoreError,
    TransferError,
    Unsupported,
)
from portakv.migrate import open_shared, share
from portakv.storage import BlockStore, Disk
from portakv.storage.calls import SLICE
from portakv.storage.lent import LentCopy
from portakv.storage.memory import Rows


@pytest.fixture
def tier() -> FakeTier:
    return FakeTier()


# --- rows that others map


def test_rows_are_mapped_by_others_under_the_same_numbers() -> None:
    with opened(staging=3, host=2) as store:
        rows = store.rows.tensor
        mapped = open_shared(share(rows))
        assert rows.data_ptr() % 4096 == 0
        assert mapped.shape == rows.shape == (5, SIZE)
        assert mapped.data_ptr() != rows.data_ptr()
        for row in range(5):
            mapped[row] = 10 + row
            rows[row, 7] = 90 + row
        assert [row[0].item() for row in rows] == [10, 11, 12, 13, 14]
        assert [row[7].item() for row in mapped] == [90, 91, 92, 93, 94]


def test_rows_are_private_by_default() -> None:
    with opened(host=2, shared=False) as store, pytest.raises(Unsupported):
        share(store.rows.tensor)


def test_shared_rows_are_registered_while_they_live(monkeypatch: pytest.MonkeyPatch) -> None:
    library = installed(monkeypatch)
    before = claimed()
    rows = Rows([SIZE], 3 * SIZE, 2 * SIZE, shared=True)
    assert rows.pinned
    assert [nbytes for nbytes, _ in library.registered.values()] == [5 * SIZE]
    assert [*library.registered] == [rows.tensor.data_ptr()]
    share(rows.tensor)
    tensor = rows.tensor[1]
    del rows
    assert library.registered
    tensor[3] = 5  # it retains the memory
    del tensor
    assert until(lambda: not library.registered, LIMIT)
    assert claimed() == before


@pytest.mark.filterwarnings("ignore:Expected pinned host memory")  # the simulated device
def test_shared_rows_serve_a_device(accelerator: torch.device, tier: FakeTier) -> None:
    source, target = (
        KVView([each.to(accelerator) for each in cache(seed).tensors], LAYOUT) for seed in (0, 50)
    )
    with opened(host=4, tiers=[tier]) as store:
        store.save(source, range(8), KEYS, full="wait").synchronize(LIMIT)
        store.load(target, range(8), KEYS).synchronize(LIMIT)
        share(store.rows.tensor)
    host = KVView([each.cpu() for each in target.tensors], LAYOUT)
    assert same(host, range(8), SOURCE, range(8))


def test_a_flag_is_a_flag() -> None:
    shared: Any = "yes"
    with pytest.raises(InvalidTerms, match="shared"):
        opened(shared=shared)


# --- the bytes


def stores(folder: Path) -> dict[str, Callable[[], BlockStore]]:
    """Return the makers of stores with other tiers."""
    return {
        "host": lambda: opened(host=8),
        "disk": lambda: opened(tiers=[Disk(folder, capacity=64 * SIZE)]),
        "disk, host": lambda: opened(host=4, tiers=[Disk(folder, capacity=64 * SIZE)]),
        "tier": lambda: opened(tiers=[FakeTier()]),
    }


TIERS = [*stores(Path())]


@pytest.mark.parametrize("kind", TIERS)
@pytest.mark.parametrize("now", [True, False], ids=["as they begin", "later"])
def test_blocks_come_back(kind: str, now: bool, tmp_path: Path) -> None:
    with stores(tmp_path / "disk")[kind]() as store:
        source = Hands(store, SOURCE, range(2, 10), now)
        saved = store.save_lent(source, KEYS, full="wait")
        while not saved.done():
            source.finish()
        assert saved.landed.all()
        assert sorted(source.rows()) == sorted({*source.rows()})
        target = cache(50)
        hands = Hands(store, target, range(1, 9), now)
        handle = store.load_lent(hands, KEYS)
        while not handle.done():
            hands.finish()
        assert handle.landed.all()
        assert same(target, range(1, 9), SOURCE, range(2, 10))
        assert same(target, [0, 9, 10, 11], cache(50), [0, 9, 10, 11])
        assert sorted(i for copy in hands.copies for i in copy.blocks) == [*range(8)]
        assert {copy.kind for copy in hands.copies} == {"load"}
        assert not lent_rows(store)
        assert not rows_in_use(store.rows)


@pytest.mark.parametrize("lent", ["save", "load"])
@pytest.mark.parametrize("kind", TIERS)
def test_a_store_copies_what_others_copied_and_the_reverse(
    kind: str, lent: str, tmp_path: Path
) -> None:
    target = cache(50)
    with stores(tmp_path / "disk")[kind]() as store:
        if lent == "save":
            store.save_lent(Hands(store, SOURCE, range(8)), KEYS, full="wait").synchronize(LIMIT)
            store.load(target, range(8), KEYS).synchronize(LIMIT)
        else:
            store.save(SOURCE, range(8), KEYS, full="wait").synchronize(LIMIT)
            store.load_lent(Hands(store, target, range(8)), KEYS).synchronize(LIMIT)
    assert same(target, range(8), SOURCE, range(8))


def test_another_store_finds_the_blocks_in_the_folder(tmp_path: Path) -> None:
    disk: dict[str, Any] = {"tiers": [Disk(tmp_path / "disk", capacity=64 * SIZE)]}
    with opened(**disk) as store:
        store.save_lent(Hands(store, SOURCE, range(8)), KEYS, full="wait").synchronize(LIMIT)
    with opened(shared=False, **disk) as store:
        assert store.lookup(KEYS) == 8
        assert same(loaded(store), range(8), SOURCE, range(8))


def test_forms_of_one_store_have_their_own_rows() -> None:
    forms = {"full": FORM, "window": small_form(layers=2, notes="a window")}
    caches = {"full": SOURCE, "window": cache(30, layers=2)}
    with BlockStore(forms, staging=16 * SIZE, host=16 * SIZE, shared=True) as store:
        for name, view in caches.items():
            hands = Hands(store, view, range(8))
            store.of(name).save_lent(hands, KEYS, full="wait").synchronize(LIMIT)
            assert {copy.form for copy in hands.copies} == {forms[name]}
        for name, view in caches.items():
            target = cache(70, layers=len(view.tensors))
            store.of(name).load_lent(Hands(store, target, range(8)), KEYS).synchronize(LIMIT)
            assert same(target, range(8), view, range(8))
        queues = {ran.queue for ran in store.graph.trace.ran}
        assert {"lent:full", "lent:window"} <= queues


# --- blocks that were saved in other parts

HALVES = [replace(FORM, heads=(0, 2, 4)), replace(FORM, heads=(2, 4, 4))]
WHOLE = replace(FORM, heads=(0, 4, 4))


def in_parts(store: BlockStore, wide: KVView) -> None:
    """Save the halves of a cache under the same keys."""
    for number in range(2):
        part = wide.slice(heads=slice(2 * number, 2 * number + 2))
        store.of(str(number)).save(part, range(8), KEYS, full="wait").synchronize(LIMIT)


def of_ranks() -> BlockStore:
    """Return a store of two ranks and of the whole."""
    forms = {"0": HALVES[0], "1": HALVES[1], "whole": WHOLE}
    staging = 32 * WHOLE.image_bytes
    return BlockStore(forms, staging=staging, host=staging, shared=True)


def test_a_whole_comes_from_the_rows_of_its_parts() -> None:
    wide = cache(0, heads=4)
    target = cache(50, heads=4)
    with of_ranks() as store:
        in_parts(store, wide)
        hands = Hands(store, target, range(8))
        store.of("whole").load_lent(hands, KEYS).synchronize(LIMIT)
        assert {copy.form for copy in hands.copies} == {*HALVES}
        assert [copy.outer["heads"] for copy in hands.copies] == [slice(0, 2), slice(2, 4)]
    assert same(target, range(8), wide, range(8))


def test_a_part_comes_from_the_rows_of_a_whole() -> None:
    wide = cache(0, heads=4)
    target = cache(50)
    with of_ranks() as store:
        store.of("whole").save_lent(Hands(store, wide, range(8)), KEYS, full="wait").synchronize(
            LIMIT
        )
        hands = Hands(store, target, range(8))
        store.of("1").load_lent(hands, KEYS).synchronize(LIMIT)
        assert {copy.form for copy in hands.copies} == {WHOLE}
        assert [copy.inner["heads"] for copy in hands.copies] == [slice(2, 4)]
    half = KVView([tensor[:, :, :, 2:] for tensor in wide.tensors], LAYOUT)
    assert same(target, range(8), half, range(8))


def test_a_block_lands_with_the_last_of_its_parts() -> None:
    with of_ranks() as store:
        in_parts(store, cache(0, heads=4))
        hands = held(store, cache(50, heads=4))
        handle = store.of("whole").load_lent(hands, KEYS)
        first, second = hands.copies
        first.end([i != 3 for i in first.blocks])
        assert not handle.done()
        second.end([i != 5 for i in second.blocks])
        handle.synchronize(LIMIT)
        assert handle.landed.tolist() == [i not in (3, 5) for i in range(8)]


# --- another process

THERE = """
import torch
from portakv import KVView
from portakv.migrate import open_shared
from portakv.storage import BlockForm
from support.core_cases import noise
from support.lent_copies import make

def cache(seed):
    shape = (12, 2, 4, 2, 32)
    tensors = [noise(*shape, dtype=torch.float16, seed=seed + i) for i in range(4)]
    return KVView(tensors, "layer | block kv token head dim")

class Described:
    def __init__(self, kind, rows, blocks, form, inner, outer):
        self.kind = kind
        self.rows = rows
        self.blocks = blocks
        self.form = BlockForm.from_json(form)
        self.inner = inner
        self.outer = outer

rows = open_shared(data)
source = cache(0)
target = cache(50)
"""


class Remote:
    """A copier whose copies another process makes."""

    def __init__(self, peer: Peer, view: str) -> None:
        self.copies = list[LentCopy]()
        self._peer = peer
        self._view = view

    def begin(self, copy: LentCopy) -> None:
        self.copies.append(copy)

    def finish(self) -> None:
        """Have the other process make the copies that began, and end them."""
        for copy in [*self.copies]:
            self.copies.remove(copy)
            described = copy.kind, [*copy.rows], [*copy.blocks], copy.form.json()
            self._peer.do(
                f"make(rows, {self._view}, range(2, 10), Described(*described))",
                described=(*described, copy.inner, copy.outer),
            )
            copy.end()


def test_another_process_makes_the_copies(tmp_path: Path) -> None:
    disk = Disk(tmp_path / "disk", capacity=64 * SIZE)
    with opened(host=4, tiers=[disk]) as store, Peer() as peer:
        peer.do(THERE, data=share(store.rows.tensor))
        source = Remote(peer, "source")
        saved = store.save_lent(source, KEYS, full="wait")
        while not saved.done():
            source.finish()
        assert same(loaded(store), range(8), SOURCE, range(2, 10))
        target = Remote(peer, "target")
        handle = store.load_lent(target, KEYS)
        while not handle.done():
            target.finish()
        assert handle.landed.all()
        right = "all(torch.equal(a[2:10].view(torch.int16), b[2:10].view(torch.int16)) "
        right += "for a, b in zip(source.tensors, target.tensors))"
        assert peer.do(f"answer = {right}")


def test_what_a_killed_process_did_not_copy_is_not_stored(tier: FakeTier) -> None:
    with opened(tiers=[tier]) as store:
        with Peer() as peer:
            peer.do(THERE, data=share(store.rows.tensor))
            source = Remote(peer, "source")
            saved = store.save_lent(source, KEYS[:2])
            peer.kill()
            for copy in source.copies:
                copy.end([False] * len(copy.rows))
        with pytest.raises(TransferError, match="0 of 2"):
            saved.synchronize(LIMIT)
        assert not tier.blocks
        assert store.lookup(KEYS) == 0
        again = store.save_lent(Hands(store, SOURCE, range(8)), KEYS[:2])
        again.synchronize(LIMIT)
        assert same(loaded(store, KEYS[:2]), [0, 1], SOURCE, [0, 1])


# --- ends


def test_only_blocks_that_landed_are_stored(tier: FakeTier) -> None:
    with opened(tiers=[tier]) as store:
        hands = held(store)
        saved = store.save_lent(hands, KEYS)
        hands.finish(lambda copy: [i not in (2, 5) for i in copy.blocks])
        with pytest.raises(TransferError, match=r"6 of 8 blocks landed. 2 failed \(lent\)"):
            saved.synchronize(LIMIT)
        expected = [i not in (2, 5) for i in range(8)]
        assert saved.landed.tolist() == expected
        assert [store.has(key) for key in KEYS] == expected
        target = cache(50)
        store.load(target, range(8), KEYS, missing="skip").synchronize(LIMIT)
        some = [i for i in range(8) if expected[i]]
        assert same(target, some, SOURCE, some)


def test_only_blocks_that_landed_are_loaded() -> None:
    with opened(host=8) as store:
        store.save(SOURCE, range(8), KEYS, full="wait").synchronize(LIMIT)
        hands = held(store, cache(50))
        handle = store.load_lent(hands, KEYS, missing="raise")
        hands.finish(lambda copy: np.array([i % 2 == 0 for i in copy.blocks]))
        with pytest.raises(TransferError, match=r"4 of 8 blocks landed. 4 failed \(lent\)"):
            handle.synchronize(LIMIT)
        assert handle.landed.tolist() == [True, False] * 4
        assert not rows_in_use(store.rows)


@pytest.mark.parametrize("first", [True, False])
def test_the_first_end_counts(first: bool, tier: FakeTier) -> None:
    with opened(tiers=[tier]) as store:
        hands = held(store)
        saved = store.save_lent(hands, KEYS)
        hands.finish(lambda copy: [first] * len(copy.rows))
        for copy in hands.copies:
            copy.end([not first] * len(copy.rows))
        assert until(saved.released.done, LIMIT) if saved.released else False
        with suppress(TransferError):
            saved.synchronize(LIMIT)
        assert saved.landed.all() == first
        assert [store.has(key) for key in KEYS] == [first] * 8


@pytest.mark.parametrize("wrong", [True, [], [True], [1, 0], "ab", [None, None], [[True], [True]]])
def test_a_wrong_mask_ends_nothing(wrong: Any, tier: FakeTier) -> None:
    with opened(tiers=[tier]) as store:
        hands = held(store)
        saved = store.save_lent(hands, KEYS[:4])  # two copies of two blocks
        with pytest.raises(InvalidTerms, match="landed"):
            hands.copies[0].end(wrong)
        assert lent_rows(store) == 4
        assert not saved.done()
        hands.finish()
        saved.synchronize(LIMIT)


def test_a_copier_that_refuses_ends_the_copy(tier: FakeTier) -> None:
    class Refuses:
        def begin(self, copy: LentCopy) -> None:
            raise ConnectionError("the rank is gone")

    with opened(host=8, tiers=[tier]) as store:
        saved = store.save_lent(Refuses(), KEYS)
        with pytest.raises(TransferError, match="the rank is gone"):
            saved.synchronize(LIMIT)
        assert not tier.blocks
        store.save(SOURCE, range(8), KEYS, full="wait").synchronize(LIMIT)
        handle = store.load_lent(Refuses(), KEYS, missing="raise")
        with pytest.raises(TransferError, match="the rank is gone"):
            handle.synchronize(LIMIT)
        assert same(loaded(store), range(8), SOURCE, range(8))
        assert not lent_rows(store)
        assert not rows_in_use(store.rows)


@pytest.mark.parametrize("copier", [None, object(), Hands, 5])
def test_a_copier_begins_copies(copier: Any) -> None:
    with opened(host=8) as store:
        for call in (store.save_lent, store.load_lent):
            if copier is Hands:
                continue
            with pytest.raises(InvalidTerms, match="copier"):
                call(copier, KEYS)


def test_copies_that_end_as_they_begin_are_not_nested(tier: FakeTier) -> None:
    """Each end makes the next copy ready: in a nested way they would exceed Python's stack."""
    many = 2 * SLICE
    keys = [key_of(i) for i in range(many)]

    class Ends:
        depth = 0
        deepest = 0
        count = 0

        def begin(self, copy: LentCopy) -> None:
            self.depth += 1
            self.count += 1
            assert not copy.cancelled
            self.deepest = max(self.deepest, self.depth)
            copy.end()
            self.depth -= 1

    with opened(staging=4, host=many, tiers=[tier], full="wait") as store:
        saves = Ends()
        store.save_lent(saves, keys).synchronize(LIMIT)
        loads = Ends()
        handle = store.load_lent(loads, keys)
        handle.synchronize(LIMIT)
        assert handle.landed.all()
        for ends in (saves, loads):
            assert ends.count >= many // 4
            assert ends.deepest == 1


# --- rows of the host tier, which are borrowed at once


def test_borrowed_rows_have_the_blocks_until_they_are_given_back() -> None:
    """No save gets them meanwhile, and no eviction takes them."""
    with opened(staging=4, host=4) as store:
        store.save(SOURCE, range(4), KEYS[:4], full="wait").synchronize(LIMIT)
        borrowed = store.borrow(KEYS[:3])
        assert borrowed is not None
        target = cache(50)
        make(store.rows.tensor, target, range(3), borrowed)
        assert same(target, range(3), SOURCE, range(3))
        before = store.rows.tensor[[*borrowed.rows]].clone()
        for key in OTHERS:  # as many as evict all others
            store.save(cache(60), [0], [key], full="wait").synchronize(LIMIT)
        assert torch.equal(store.rows.tensor[[*borrowed.rows]], before)
        assert store.rows.loans() == 1
        assert not borrowed.cancelled
        borrowed.end()
        borrowed.end([False] * 3)
        assert store.rows.loans() == 0
        for number in range(60, 76):
            store.save(cache(60), [0], [key_of(number)], full="wait").synchronize(LIMIT)
        assert not torch.equal(store.rows.tensor[[*borrowed.rows]], before)


def test_rows_are_borrowed_if_the_host_tier_has_all_blocks() -> None:
    with opened(staging=4, host=4) as store:
        store.save(SOURCE, range(2), KEYS[:2], full="wait").synchronize(LIMIT)
        assert store.borrow(KEYS[:3]) is None
        assert store.rows.loans() == 0
        assert store.borrow(KEYS[:2]) is not None
        hits = {x["op"]: x["value"] for x in store.statistics()["tier_blocks_total"]}
        assert hits["load"] == 2
    with opened(staging=4, tiers=[FakeTier()]) as store:
        store.save(SOURCE, range(2), KEYS[:2], full="wait").synchronize(LIMIT)
        assert store.borrow(KEYS[:2]) is None


def test_a_store_waits_for_borrowed_rows() -> None:
    store = opened(staging=4, host=4)
    store.save(SOURCE, range(2), KEYS[:2], full="wait").synchronize(LIMIT)
    borrowed = store.borrow(KEYS[:2])
    assert borrowed is not None
    closing = Thread(target=store.close)
    closing.start()
    assert until(lambda: store.graph.closed, LIMIT)
    assert closing.is_alive()
    borrowed.end()
    closing.join(LIMIT)
    assert not closing.is_alive()
    with pytest.raises(StoreError, match="closed"):
        store.borrow(KEYS[:2])


# --- figures, and other settings


def test_lent_copies_are_in_the_trace_and_in_the_figures(tier: FakeTier) -> None:
    with opened(host=8, tiers=[tier]) as store:
        hands = held(store)
        saved = store.save_lent(hands, KEYS)
        hands.finish()
        saved.synchronize(LIMIT)
        store.load_lent(Hands(store, cache(50), range(8)), KEYS).synchronize(LIMIT)
        ran = [x for x in store.graph.trace.ran if x.queue == "lent"]
        assert sum(x.blocks for x in ran) == 16
        saves = [x for x in ran if x.name == "save"]
        assert {x.worker for x in saves} == {*range(1, len(hands.copies) + 1)}  # side by side
        seconds = store.statistics()["tier_seconds_count"]
        kinds = {x["op"]: x["value"] for x in seconds if x["tier"] == "lent"}
        assert kinds == {"save": len(saves), "load": len(ran) - len(saves)}


@pytest.mark.parametrize("name", [*STATES])
def test_ambient_settings_change_nothing(name: str, tier: FakeTier) -> None:
    target = cache(50)
    with STATES[name](torch.device("cpu")), opened(host=4, tiers=[tier]) as store:
        store.save_lent(Hands(store, SOURCE, range(8)), KEYS, full="wait").synchronize(LIMIT)
        store.load_lent(Hands(store, target, range(8)), KEYS).synchronize(LIMIT)
        assert not store.rows.tensor.is_inference()
    assert same(target, range(8), SOURCE, range(8))
