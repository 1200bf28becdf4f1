# SPDX-License-Identifier: Apache-2.0
"""Rows of the sizes of their images: no two share a page, what is read stays, staging waits for
nothing in the host tier, and the same bytes hold more packed blocks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule
from hypothesis.stateful import run_state_machine_as_test as run_model
from support.storage_cases import key_of
from support.waits import LIMIT

from portakv import KVView, TransferError, copy_blocks
from portakv.host.pool import Extents
from portakv.storage import BlockForm, BlockStore, Disk, Remote
from portakv.storage.eviction import FIRST, mark_of
from portakv.storage.memory import ANY, MOST_EVICTED, Claim, Loan, Rows, Want
from portakv.storage.tiers.base import Tier

PAGE = 4096
SMALL = 3 * PAGE
LARGE = 4 * PAGE
STAGING = 4  # rows
HOST = 17  # pages


def rows_of(host: int = HOST, kind: type[Rows] = Rows) -> Rows:
    return kind({SMALL, LARGE}, STAGING * LARGE, host * PAGE, pin=False)


# --- free pages


steps_of_pages = st.tuples(st.integers(1, 9), st.integers(1, 3), st.booleans(), st.integers(0, 99))


@given(st.lists(steps_of_pages, max_size=60))
@settings(max_examples=60)
def test_runs_of_free_pages(steps: list[tuple[int, int, bool, int]]) -> None:
    """A set of pages is the model: runs lie in free pages of one piece, and are found if any do.
    Runs that are taken together are those that are taken one after the other."""
    pieces = [(10, 40), (40, 53), (60, 60)]
    other = Extents(pieces)
    extents = Extents(pieces)
    free = {page for first, past in pieces for page in range(first, past)}
    taken = list[range]()
    for count, most, evicted, pick in steps:
        if taken and pick % 3 == 0:
            run = taken.pop(pick % len(taken))
            for each in (extents, other):
                each.give(run.start, len(run), evicted)
            free |= {*run}
            continue
        together = extents.take(count, most)
        for begin in [*together, None][:most]:
            fits = [
                page
                for first, past in pieces
                for page in range(first, past - count + 1)
                if free.issuperset(range(page, page + count))
            ]
            assert other.take(count, 1) == [begin] * (begin is not None)
            assert (begin is None) == (not fits)
            if begin is not None:
                assert begin in fits
                taken.append(range(begin, begin + count))
                free -= {*taken[-1]}
        assert extents.free == other.free == len(free)


def test_a_run_takes_the_hole_that_fits_it_best() -> None:
    extents = Extents([(0, 20)])
    first = [extents.take(count, 1) for count in (3, 1, 4, 1)]
    assert first == [[0], [3], [4], [8]]
    extents.give(0, 3)
    extents.give(4, 4)
    assert extents.take(3, 1) == [0]
    assert extents.take(4, 1) == [4]
    assert extents.take(3, 1) == [9]


@pytest.mark.parametrize("descends", [False, True])
def test_a_run_takes_the_end_that_is_farther_from_the_run_that_goes_next(descends: bool) -> None:
    extents = Extents([(0, 12)])
    assert extents.take(3, 4) == [0, 3, 6, 9]
    for first in (9, 6) if descends else (0, 3):
        extents.give(first, 3, evicted=True)
    assert extents.take(4, 1) == [8 if descends else 0]
    extents.give(*((3, 3) if descends else (6, 3)))
    assert extents.take(4, 1) == [4]


# --- rows by a model


class Lease:
    """Rows that are lent together, with the bytes of their images."""

    def __init__(self, items: list[int], nbytes: int) -> None:
        self.items = items
        self.sizes = [nbytes] * len(items)


class Model(RuleBasedStateMachine):
    """Random steps; each live row is filled with a separate byte, and has it until it is free.

    The keys begin prompts of their own, so that they go in the order of their use.
    """

    kind = Rows
    leases = Bundle("leases")

    def __init__(self) -> None:
        super().__init__()
        self.rows = rows_of(kind=self.kind)
        self.fills = dict[int, tuple[int, int]]()  # by row: its bytes, and what they are
        self.cached = dict[bytes, int]()
        self.pins = list[tuple[bytes, Loan]]()
        self.lent = list[Lease]()
        self.count = 0

    def fill(self, item: int, nbytes: int) -> None:
        self.count += 1
        self.fills[item] = (nbytes, self.count % 251)
        self.rows.image(item, nbytes)[:] = self.count % 251

    def lost(self, before: list[bytes], most: int) -> None:
        """Drop the keys that went: the least recently used ones that nothing reads."""
        pinned = {key for key, _ in self.pins}
        gone = [key for key in before if key in self.cached and not self.rows.has(key)]
        may_go = [key for key in before if key not in pinned]
        assert gone == may_go[: len(gone)]
        assert len(gone) <= most
        for key in gone:
            del self.fills[self.cached.pop(key)]

    @rule(
        target=leases,
        nbytes=st.sampled_from([SMALL, LARGE]),
        count=st.integers(1, 3),
        store=st.booleans(),
        passing=st.booleans(),
    )
    def take(self, nbytes: int, count: int, store: bool, passing: bool) -> Lease:
        before = self.rows.chains.by_use()
        staged = sum(item < STAGING * 4 for lease in self.lent for item in lease.items)
        items = self.rows.take(count, Want(nbytes, store, passing=passing))
        self.lost(before, MOST_EVICTED * count)
        if items is None:
            assert staged + count > STAGING or store
            items = []
        assert len({*items}) == len(items) == (count if items else 0)
        for item in items:
            assert item not in self.fills
            self.fill(item, nbytes)
        lease = Lease(items, nbytes)
        self.lent.append(lease)
        return lease

    @rule(lease=leases, pick=st.integers(0, 2))
    def enlarge(self, lease: Lease, pick: int) -> None:
        """A block did not fit, so that its row has to be larger."""
        if lease not in self.lent or pick >= len(lease.items) or lease.sizes[pick] == LARGE:
            return
        before = self.rows.chains.by_use()
        del self.fills[lease.items[pick]]
        if self.rows.replace(lease.items, pick, Want(LARGE, True)):
            lease.sizes[pick] = LARGE
        self.lost(before, MOST_EVICTED)
        self.fill(lease.items[pick], lease.sizes[pick])

    @rule(lease=leases, pick=st.integers(0, 2), nbytes=st.sampled_from([SMALL, LARGE]))
    def settle(self, lease: Lease, pick: int, nbytes: int) -> None:
        """An image that is no larger than its row moves, if it may."""
        if lease not in self.lent or pick >= len(lease.items) or lease.sizes[pick] < nbytes:
            return
        before = self.rows.chains.by_use()
        _, byte = self.fills.pop(lease.items[pick])
        self.rows.settle(lease.items, pick, Want(nbytes, True))
        self.lost(before, MOST_EVICTED)
        lease.sizes[pick] = nbytes
        self.fills[lease.items[pick]] = (nbytes, byte)

    @rule(lease=consumes(leases), numbers=st.lists(st.integers(0, 7), min_size=3, max_size=3))
    def end(self, lease: Lease, numbers: list[int]) -> None:
        """Rows go back. Those of the host tier are cached unless their key is, or the image of an
        earlier row of staging took the place of the last ones."""
        if lease not in self.lent:
            return
        self.lent.remove(lease)
        before = self.rows.chains.by_use()
        known = {*self.cached}
        keys = [key_of(number) for number in numbers[: len(lease.items)]]
        kept = self.rows.keep(lease.items, keys, [FIRST] * len(keys), sizes=lease.sizes)
        self.rows.give(lease.items)
        self.lost(before, MOST_EVICTED * len(keys))
        staged = [item < STAGING * 4 for item in lease.items]
        left_out = [
            number
            for number, key in enumerate(keys)
            if not (kept[number] or staged[number] or key in known or key in keys[:number])
        ]
        if left_out:
            assert any(staged)
            assert not any(kept[min(left_out) :])
        images = [self.fills.pop(item) for item in lease.items]
        for number, key in enumerate(keys):
            assert not (kept[number] and key in known)
            row = self.rows.index.get(key) if kept[number] else None
            if row is None:  # it went in its turn
                continue
            assert row == lease.items[number] or staged[number]
            self.cached[key] = row
            self.fills[row] = images[number]

    @rule(number=st.integers(0, 7))
    def pin(self, number: int) -> None:
        key = key_of(number)
        loan = self.rows.pin([key])
        assert loan.rows == [self.cached.get(key)]
        if key in self.cached:
            self.pins.append((key, loan))
        else:
            loan.cancel()

    @rule(pick=st.integers(0, 9))
    def unpin(self, pick: int) -> None:
        if self.pins:
            _, loan = self.pins.pop(pick % len(self.pins))
            loan.cancel()

    @rule(numbers=st.lists(st.integers(0, 7), max_size=4))
    def touch(self, numbers: list[int]) -> None:
        self.rows.touch([key_of(number) for number in numbers])

    @rule(number=st.integers(0, 7))
    def delete(self, number: int) -> None:
        key = key_of(number)
        (gone,) = self.rows.delete([key])
        assert gone == (key in self.cached and key not in {name for name, _ in self.pins})
        if gone:
            del self.fills[self.cached.pop(key)]

    @invariant()
    def every_row_has_its_bytes(self) -> None:
        for item, (nbytes, byte) in self.fills.items():
            assert (self.rows.image(item, nbytes) == byte).all()

    @invariant()
    def all_bytes_count(self) -> None:
        kept = sum(self.fills[item][0] for item in self.cached.values())
        states = self.rows.nbytes_by_state()
        assert states["kept"] == kept
        assert sum(states.values()) == STAGING * LARGE + HOST * PAGE
        assert sum(self.rows.nbytes_by_form().values()) == kept

    def teardown(self) -> None:
        """Whatever is pinned, all of staging serves loads."""
        for lease in self.lent:
            self.rows.give(lease.items)
        items = self.rows.take(STAGING, Want(LARGE, False, passing=True))
        assert items is not None


def model(kind: type[Rows] = Rows) -> type[Model]:
    return type("Rows", (Model,), {"kind": kind})


def test_rows_of_two_sizes_by_a_model() -> None:
    run_model(model(), settings=settings(max_examples=30, stateful_step_count=25))


class TrimsTooMuch(Rows):
    """Frees a page of an image that is kept."""

    def _trim(self, item: int, pages: int) -> None:
        super()._trim(item, pages - 1)


class LosesPages(Rows):
    """Frees the former row of an image that moved, whatever its size, as the new one."""

    def settle(self, items: list[int], number: int, want: Want) -> None:
        old = items[number]
        if old in self._pages:
            self._pages[old] = want.nbytes // PAGE
        super().settle(items, number, want)


@pytest.mark.parametrize("kind", [TrimsTooMuch, LosesPages])
def test_the_model_finds_rows_with_a_bug(kind: type[Rows]) -> None:
    terms = settings(max_examples=200, stateful_step_count=25, phases=[Phase.generate])
    with pytest.raises((AssertionError, KeyError)):
        run_model(model(kind), settings=terms)


# --- eviction and staging


def fill(
    rows: Rows, numbers: range, nbytes: int, claim: Claim = ANY, chained: bool = False
) -> list[bool]:
    """Cache an image for each number, one after the other; chained ones follow each other."""
    result = list[bool]()
    follows = FIRST
    for number in numbers:
        want = Want(nbytes, True, claim)
        items = rows.take(1, want)
        assert items is not None
        result += rows.keep(items, [key_of(number)], [follows], want, [nbytes])
        rows.give(items)
        follows = mark_of(key_of(number)) if chained else FIRST
    rows.touch([key_of(number) for number in numbers] if chained else [])
    return result


def cached(rows: Rows, numbers: range) -> list[int]:
    return [number for number in numbers if rows.has(key_of(number))]


@pytest.mark.parametrize("chained", [True, False])
def test_both_sizes_share_the_bytes(chained: bool) -> None:
    """Blocks of a chain go from its end, others from the one used least recently."""
    rows = rows_of(host=48)
    for numbers, nbytes in ((range(16), SMALL), (range(20, 32), LARGE), (range(40, 56), SMALL)):
        assert fill(rows, numbers, nbytes, chained=chained) == [True] * len(numbers)
        assert {*numbers}.issuperset(cached(rows, range(56)))
        assert rows.nbytes_by_state()["free"] <= LARGE + STAGING * LARGE


def test_a_mix_of_sizes_wastes_little() -> None:
    """One block in eight is large: at least nine tenths of the bytes have images in the end."""
    rows = rows_of(host=400)
    for number in range(600):
        large = number % 8 == 5
        fill(rows, range(number, number + 1), LARGE if large else SMALL)
    assert rows.nbytes_by_state()["kept"] >= 0.9 * 400 * PAGE


def test_blocks_that_may_evict_none_take_staging_and_are_not_cached() -> None:
    rows = rows_of(host=12)
    assert fill(rows, range(4), SMALL) == [True] * 4
    assert fill(rows, range(4, 5), SMALL, Claim(evict=False)) == [False]
    own = {key_of(number): number for number in range(5)}
    items = rows.take(1, Want(SMALL, True, Claim(own), 4))
    assert items == [4], "no block evicts an earlier one of its call"
    rows.give(items)
    assert rows.take(1, Want(SMALL, True, Claim(own), -1)) == [STAGING * 4]
    assert cached(rows, range(5)) == [1, 2, 3]


def test_no_load_waits_for_rows_that_are_read() -> None:
    rows = rows_of(host=12)
    assert fill(rows, range(4), SMALL) == [True] * 4
    assert None not in rows.pin([key_of(number) for number in range(4)]).rows
    saved = rows.take(2, Want(LARGE, True))
    assert saved == [0, 4]
    assert rows.take(1, Want(LARGE, True)) is None, "saves have half of staging"
    assert rows.take(2, Want(LARGE, False)) == [8, 12]
    assert rows.take(1, Want(SMALL, False)) is None
    assert rows.lacks(1 + rows.host)


def test_an_image_in_staging_takes_the_place_of_the_last_ones() -> None:
    """So a block that did not fit ends no prompt."""
    rows = rows_of(host=18)
    items = rows.take(6, Want(SMALL, True))
    assert items is not None
    assert rows.replace(items, 1, Want(LARGE, True))
    assert items[1] == 0, "between rows that are lent there is no space for it"
    rows.image(items[1], LARGE)[:] = 7
    sizes = [SMALL, LARGE, SMALL, SMALL, SMALL, SMALL]
    keys = [key_of(number) for number in range(6)]
    claim = Claim({key: number for number, key in enumerate(keys)})
    kept = rows.keep(items, keys, [FIRST] * 6, Want(LARGE, True, claim), sizes)
    assert kept == [True, True, True, True, False, False]
    again = rows.take(1, Want(SMALL, True, Claim(evict=False)))
    assert again == [STAGING * 4 + 3], "the space of the row that was replaced"
    rows.give(items)
    rows.give(again)
    assert cached(rows, range(6)) == [0, 1, 2, 3]
    assert (rows.image(rows.index[key_of(1)], LARGE) == 7).all()


def test_prefetched_images_take_half_of_the_tier() -> None:
    rows = rows_of(host=12)
    fill(rows, range(1), SMALL)
    for number in range(1, 6):
        want = Want(SMALL, False, prefetched=True)
        items = rows.take(1, want)
        assert items is not None
        kept = rows.keep(items, [key_of(number)], [FIRST], want, [SMALL])
        assert kept == [True]
        rows.give(items)
    assert cached(rows, range(6)) == [0, 4, 5]


# --- stores


def cache(blocks: int, noise: tuple[int, ...] = ()) -> list[torch.Tensor]:
    """Return layers of bf16 rows; some blocks have a plane that no slot holds."""
    generator = torch.Generator(device="cpu").manual_seed(4)
    size = (2, blocks, 16, 8, 128)
    layers = [
        torch.randn(size, generator=generator, dtype=torch.float32, device="cpu").bfloat16()
        for _ in range(4)
    ]
    count = torch.arange(16 * 128, dtype=torch.int64, device="cpu") * 12345
    for block in noise:
        plane = count.to(torch.int16).view(torch.bfloat16).view(16, 128)
        layers[2][1, block, :, 5] = plane
    return layers


LAYOUT = "layer | kv block token head dim"
RAW = BlockForm.of(KVView(cache(1), LAYOUT), "org/model")
PACKED = BlockForm.of(KVView(cache(1), LAYOUT), "org/model", encoding="pack")
BOTH = {"packed": PACKED, "raw": RAW}
STORES: dict[str, BlockForm | dict[str, BlockForm]] = {"raw": RAW, "packed": BOTH}
KEYS = [key_of(number) for number in range(13)]


def loads_right(store: Any, layers: list[torch.Tensor], keys: list[bytes]) -> bool:
    """Return True if the blocks come back with every bit."""
    back = [torch.zeros_like(layer) for layer in layers]
    store.load(KVView(back, LAYOUT), range(len(keys)), keys).synchronize(LIMIT)
    many = len(keys)
    return all(
        torch.equal(a[:, :many].view(torch.int16), b[:, :many].view(torch.int16))
        for a, b in zip(layers, back, strict=True)
    )


def tiers_of(kind: str, folder: Path, nbytes: int) -> list[Tier]:
    return [Disk(folder, capacity=nbytes)] if kind == "disk" else []


@pytest.mark.parametrize("kind", ["host", "disk"])
def test_the_same_bytes_hold_1_3_times_the_tokens(kind: str, tmp_path: Path) -> None:
    layers = cache(13)
    view = KVView(layers, LAYOUT)
    nbytes = 10 * RAW.image_bytes
    held = dict[str, int]()
    for name, form in STORES.items():
        host = nbytes if kind == "host" else 0
        tiers = tiers_of(kind, tmp_path / name, nbytes)
        with BlockStore(form, staging=8 << 20, host=host, tiers=tiers) as store:
            each = store.of("packed") if name == "packed" else store
            with suppress(TransferError):  # the last ones find no room
                each.save(view, range(13), KEYS, full="wait").synchronize(LIMIT)
            held[name] = each.lookup(KEYS)
            assert loads_right(each, layers, KEYS[: held[name]])
    assert held["raw"] == 10
    assert held["packed"] >= 1.30 * held["raw"]


def test_the_same_tokens_take_1_3_times_fewer_bytes_of_a_bucket(tmp_path: Path) -> None:
    layers = cache(4)
    written = dict[str, int]()
    for name, form in STORES.items():
        folder = tmp_path / name
        bucket = Remote(f"file://{folder}")
        with BlockStore(form, staging=8 << 20, tiers=[bucket]) as store:
            each = store.of("packed") if name == "packed" else store
            each.save(KVView(layers, LAYOUT), range(4), KEYS[:4], full="wait").synchronize(LIMIT)
        sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
        written[name] = sum(size for size in sizes if size >= PACKED.image_bytes)
    assert written["raw"] >= 1.30 * written["packed"]


@pytest.mark.parametrize("reader", ["packed", "raw"])
def test_blocks_that_do_not_fit_share_the_tier(reader: str) -> None:
    layers = cache(8, noise=(1, 6))
    nbytes = 2 * RAW.image_bytes + 8 * PACKED.image_bytes
    with BlockStore(BOTH, staging=8 << 20, host=nbytes) as store:
        packed = store.of("packed")
        packed.save(KVView(layers, LAYOUT), range(8), KEYS[:8], full="wait").synchronize(LIMIT)
        kept = {x["form"]: x["value"] for x in store.statistics()["host_form_bytes"]}
        assert kept == {"packed": 6 * PACKED.image_bytes, "raw": 2 * RAW.image_bytes}
        assert loads_right(store.of(reader), layers, KEYS[:8])
        assert "each block takes the size of its form" in store.explain()


def test_a_block_without_room_for_its_raw_rows_does_not_land() -> None:
    """All of staging is lent, and the only block of the host tier is pinned."""
    layers = cache(2, noise=(1,))
    view = KVView(layers, LAYOUT)
    host = 2 * PACKED.image_bytes + PAGE
    with BlockStore(BOTH, staging=8 * RAW.image_bytes, host=host) as store:
        packed = store.of("packed")
        packed.save(view, [0], KEYS[:1], full="wait").synchronize(LIMIT)
        pins = packed.pin(KEYS[:1])
        rows = store.rows
        assert rows.sized
        lent = rows.take(rows.staging, Want(rows.row_bytes, False, passing=True))
        assert lent is not None
        with pytest.raises(TransferError, match="not packed"):
            packed.save(view, [1], KEYS[1:2]).synchronize(LIMIT)
        rows.give(lent)
        with pytest.raises(TransferError):
            packed.save(view, [1], KEYS[1:2]).synchronize(LIMIT)
        pins.release()
        packed.save(view, [1], KEYS[1:2]).synchronize(LIMIT)
        assert packed.lookup(KEYS[1:2]) == 1


def test_lent_saves_are_cached_in_their_size() -> None:
    layers = cache(4, noise=(2,))

    class Packer:
        """Packs blocks, and copies raw those that do not fit."""

        def begin(self, copy: Any) -> None:
            rows = store.rows.tensor
            raw = [block == 2 for block in copy.blocks]
            sides: list[tuple[Callable[..., KVView], bool]] = [(copy.form.view, False)]
            sides.append((copy.raw.view, True))
            for view, which in sides:
                places = [n for n, rough in enumerate(raw) if rough == which]
                items = [copy.rows[n] for n in places]
                source = KVView(layers, LAYOUT)
                copy_blocks(source, view(rows), [copy.blocks[n] for n in places], items)
            copy.end(raw=np.array(raw))

    nbytes = RAW.image_bytes + 3 * PACKED.image_bytes
    with BlockStore(BOTH, staging=8 << 20, host=nbytes) as store:
        packed = store.of("packed")
        packed.save_lent(Packer(), KEYS[:4], packs=True).synchronize(LIMIT)
        kept = {x["form"]: x["value"] for x in store.statistics()["host_form_bytes"]}
        assert kept == {"packed": 3 * PACKED.image_bytes, "raw": RAW.image_bytes}
        assert loads_right(packed, layers, KEYS[:4])
