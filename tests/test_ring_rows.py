# SPDX-License-Identifier: Apache-2.0
"""The host's own half of a copy through pinned memory, against `reference`; and what crosses."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from time import sleep
from typing import Any

import numpy as np
import pytest
import torch
from engine_cases import (
    BLOCK,
    BLOCKS,
    CHUNKS,
    POOLS,
    index_of,
    leaves,
    mapped,
    scattered,
    tensors_of,
    view_of,
)

from portakv import Index, KVView, LayoutError, copy_rows
from portakv.host.engines import host_rows
from portakv.host.engines.host_rows import HostRows
from portakv.host.engines.mirror import mirror_of
from portakv.host.engines.ring import extent
from portakv.plan import CopyPlan

#: Layout, ids of the rows (list, step), offset, count, unit.
CASES: list[tuple[str, Any, int, int, int]] = [
    *((layout, None, offset, 37, 1) for layout in CHUNKS for offset in (0, 5)),
    *((layout, None, offset, 40, 1) for layout in POOLS for offset in (0, 3, 16)),
    *((layout, None, 8, 40, BLOCK) for layout in POOLS),
    *((layout, scattered(64, BLOCK), 0, 64, BLOCK) for layout in POOLS),
    *((layout, scattered(64, BLOCK), offset, 43, 1) for layout in POOLS for offset in (0, 3)),
    *((layout, scattered(41, 1), 2, 39, 1) for layout in (*POOLS, *CHUNKS)),
    *((layout, (range(3, 12), BLOCK), 0, 70, 1) for layout in POOLS),
    *((layout, (range(11, 2, -1), BLOCK), 0, 72, BLOCK) for layout in POOLS),
    *((layout, (range(0, 80, 2), 1), 0, 40, 1) for layout in (*POOLS, *CHUNKS)),
]


@pytest.fixture(params=["stretches", "indexed"])
def calls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether scattered rows are calls of their own, or one indexed call."""
    least = 1 if request.param == "stretches" else 1 << 60
    monkeypatch.setattr(host_rows, "LEAST_STRETCH", least)
    return str(request.param)


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
@pytest.mark.parametrize("outward", [True, False], ids=["to rows", "from rows"])
def test_every_byte(case: tuple[str, Any, int, int, int], outward: bool, calls: str) -> None:
    layout, ids, offset, count, unit = case
    here = tensors_of(layout, BLOCK * BLOCKS, 1)
    rows = view_of(here, layout)
    index = index_of(ids, offset) if ids is None else Index(list(ids[0]), ids[1], offset)
    mirror = mirror_of(rows.form)
    block = mirror.block_size
    behind = Index(offset=offset % block)
    held = -(-(count + behind.offset) // block) * block
    noise = torch.Generator().manual_seed(3)
    dense = torch.randint(0, 256, (mirror.nbytes(held),), dtype=torch.uint8, generator=noise)
    slot, twin = mirror.view(dense, held), dense.clone()
    expected = mapped(here, torch.Tensor.clone)
    sides = (slot, rows), (behind, index)
    judged = (mirror.view(twin, held), view_of(expected, layout)), (behind, index)
    if not outward:
        sides, judged = tuple(x[::-1] for x in sides), tuple(x[::-1] for x in judged)  # type: ignore[assignment]
    copy_rows(*judged[0], *judged[1], count=count)
    (src, dst), (src_index, dst_index) = sides
    steps = src_index.plan_step, dst_index.plan_step
    HostRows(src.form, dst.form, *steps, unit).batch(src, dst, src_index, dst_index, count).wait()
    assert torch.equal(dense, twin)
    for found, wanted in zip(leaves(here), leaves(expected), strict=True):
        assert torch.equal(found, wanted)


def chunks(widths: tuple[int, int], tokens: int = 24) -> tuple[torch.Tensor, KVView]:
    """Rows of unequal widths for the two kv, two layers."""
    memory = torch.arange(2 * tokens * sum(widths), dtype=torch.int32).view(torch.uint8)
    memory = memory[: 2 * tokens * sum(widths)].clone()
    shape = (2, tokens, sum(widths))
    return memory, KVView(memory.view(shape), "layer token (kv head dim)", kv=2, heads=1,
                          dim=widths)  # fmt: skip


@pytest.mark.parametrize("widths", [(16, 48), (3, 5), (20, 4), (6, 2)])
@pytest.mark.parametrize("index", [Index(offset=3), Index([20, 3, 4, 5, 11, 0, 9])])
def test_rows_of_unequal_widths_and_of_any_alignment(widths: tuple[int, int], index: Index) -> None:
    memory, rows = chunks(widths)
    twin = memory.clone()
    judged = KVView(twin.view(2, 24, -1), rows.layout.text, kv=2, heads=1, dim=widths)
    mirror = mirror_of(rows.form)
    dense = torch.arange(mirror.nbytes(8)).to(torch.uint8).flip(0).contiguous()
    slot = mirror.view(dense, 8)
    half = HostRows(slot.form, rows.form, 0, index.plan_step, 1)
    half.batch(slot, rows, Index(), index, 7).wait()
    copy_rows(slot, judged, Index(), index, count=7)
    assert torch.equal(memory, twin)


def test_memory_that_was_replaced_is_refused() -> None:
    memory, rows = chunks((16, 16))
    mirror = mirror_of(rows.form)
    slot = mirror.view(torch.zeros(mirror.nbytes(8), dtype=torch.uint8), 8)
    half = HostRows(slot.form, rows.form, 0, 0, 1)
    half.batch(slot, rows, Index(), Index(), 8).wait()
    memory.untyped_storage().resize_(0)
    with pytest.raises(LayoutError, match="replaced"):
        half.batch(slot, rows, Index(), Index(), 8).wait()


def test_in_inference_mode_and_after_it() -> None:
    memory, rows = chunks((16, 16))
    mirror = mirror_of(rows.form)
    slot = mirror.view(torch.zeros(mirror.nbytes(24), dtype=torch.uint8), 24)
    half = HostRows(slot.form, rows.form, 0, 0, 1)
    with torch.inference_mode():
        half.batch(slot, rows, Index(), Index(), 8).wait()
    half.batch(slot, rows, Index(), Index(), 24).wait()
    assert not memory.any()


@pytest.fixture
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def plain_copies(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the copies that are made, axes of one element left out; 1 and bytes
    where by `memmove`."""
    seen: list[tuple[int, ...]] = []
    plain, moved = np.copyto, ctypes.memmove

    def noted(target: np.ndarray[Any, Any], source: np.ndarray[Any, Any]) -> None:
        seen.append(tuple(n for n in target.shape if n != 1))
        plain(target, source)

    def noted_move(target: int, source: int, nbytes: int) -> None:
        seen.append((1, nbytes))
        moved(target, source, nbytes)

    monkeypatch.setattr(np, "copyto", noted)
    monkeypatch.setattr(ctypes, "memmove", noted_move)
    return seen


def test_consecutive_ids_are_one_plain_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = view_of(tensors_of(POOLS[2], 0, 1), POOLS[2])
    mirror = mirror_of(rows.form)
    slot = mirror.view(torch.zeros(mirror.nbytes(64), dtype=torch.uint8), 64)
    seen = plain_copies(monkeypatch)
    half = HostRows(slot.form, rows.form, 0, BLOCK, BLOCK)
    half.batch(slot, rows, Index(), Index(list(range(4, 12)), step=BLOCK), 64).wait()
    assert seen == [(1, mirror.nbytes(64))]  # blocks that are dense, and in one order


@pytest.mark.usefixtures("four_threads")
def test_dense_rows_are_cut_into_shares_plane_by_plane(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each of few long pieces: rows of 4 KiB, which lie together in each of 8 planes."""
    tokens, width = 256, 4096
    memory = torch.arange(8 * 2 * tokens * width // 8).view(torch.uint8)
    rows = KVView(memory.view(2, 4, 2 * tokens, width), "kv layer token (head dim)", heads=1)
    mirror = mirror_of(rows.form)
    dense = torch.zeros(mirror.nbytes(tokens), dtype=torch.uint8)
    slot = mirror.view(dense, tokens)
    seen = plain_copies(monkeypatch)
    half = HostRows(rows.form, slot.form, 0, 0, 1)
    half.batch(rows, slot, Index(offset=7), Index(), tokens).wait()
    assert seen == [(2, tokens, width)] * 4
    assert 2 * tokens * width == host_rows.SHARE
    assert torch.equal(dense, memory.view(8, -1, width)[:, 7 : 7 + tokens].reshape(-1))


@pytest.mark.usefixtures("four_threads")
@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("run", [16, 4096, 512 << 10])
@pytest.mark.parametrize("outward", [True, False], ids=["to rows", "from rows"])
def test_scattered_rows_by_several_threads(
    outward: bool, run: int, inference: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Arrays of their own or indexed calls, and none so large that torch would spread it."""
    count = max(4, (4 << 20) // run)
    memory = torch.randint(0, 256, (2 * count, run), dtype=torch.uint8)
    order = torch.randperm(2 * count)[:count]
    rows = KVView(memory[None], "layer token (kv head dim)", kv=1, heads=1)
    mirror = mirror_of(rows.form)
    dense = torch.randint(0, 256, (mirror.nbytes(count),), dtype=torch.uint8)
    slot, index, wanted = mirror.view(dense, count), Index(order), memory.clone()
    if outward:
        wanted[order] = dense.view(count, run)
    indexed, plain, largest = host_rows._copy, plain_copies(monkeypatch), [0]

    def noted(*arguments: Any) -> None:
        rows = next(x for x in arguments[2:] if x is not None)
        largest[0] = max(largest[0], rows.numel() * (run // 16))
        indexed(*arguments)

    monkeypatch.setattr(host_rows, "_copy", noted)
    with torch.inference_mode(inference):
        if outward:
            half = HostRows(slot.form, rows.form, 0, 1, 1)
            batch = half.batch(slot, rows, Index(), index, count)
        else:
            half = HostRows(rows.form, slot.form, 1, 0, 1)
            batch = half.batch(rows, slot, index, Index(), count)
        batch.start()
        batch.wait()
    assert torch.equal(memory, wanted)
    assert torch.equal(dense.view(count, run), memory[order])
    assert largest[0] <= host_rows.GRAIN
    assert bool(plain) == (run >= host_rows.LEAST_STRETCH)


def moved(
    rows: KVView, target: KVView, mine: Index, theirs: Index, count: int, start: bool = False
) -> None:
    """Copy positions between two views on the host."""
    half = HostRows(rows.form, target.form, mine.plan_step, theirs.plan_step, 1)
    batch = half.batch(rows, target, mine, theirs, count)
    if start:
        batch.start()
    batch.wait()


def tokens_of(number: int, width: int = 100) -> tuple[torch.Tensor, KVView]:
    """Random dense rows of so many bytes."""
    memory = torch.randint(0, 256, (number, width), dtype=torch.uint8)
    return memory, KVView(memory, "token dim")


@pytest.mark.usefixtures("four_threads")
@pytest.mark.parametrize(("count", "last"), [(9, 900), (10, 1000), (11, 100), (37, 700)])
def test_dense_rows_move_in_shares(count: int, last: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_rows, "SHARE", 1000)
    source, rows = tokens_of(50)
    target, theirs = tokens_of(50)
    wanted, seen = target.clone(), plain_copies(monkeypatch)
    wanted[5 : 5 + count] = source[3 : 3 + count]
    moved(rows, theirs, Index(offset=3), Index(offset=5), count, start=True)
    shares = -(-100 * count // 1000)
    assert sorted(seen) == sorted([(1, 1000)] * (shares - 1) + [(1, last)])
    assert torch.equal(target, wanted)


@pytest.mark.parametrize("ids", [[7], [7, 2, 4], [2, 3, 4]])
def test_a_block_that_stands_alone_is_dense_whatever_the_pitch(
    ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scattered blocks are a unit each, and move as one; neighbours lie at a pitch."""
    monkeypatch.setattr(host_rows, "LEAST_STRETCH", 1)
    source = torch.randint(0, 256, (10, 5, 8), dtype=torch.uint8)  # room behind each block
    rows = KVView(source[:, :4], "block token dim")
    target, theirs = tokens_of(50, 8)
    wanted, seen = target.clone(), plain_copies(monkeypatch)
    wanted[: 4 * len(ids)] = source[ids, :4].reshape(-1, 8)
    half = HostRows(rows.form, theirs.form, 4, 0, 4)
    half.batch(rows, theirs, Index(ids, 4), Index(), 4 * len(ids)).wait()
    assert seen == ([(3, 32)] if ids == [2, 3, 4] else [(1, 32)] * len(ids))
    assert torch.equal(target, wanted)


def test_rows_in_another_order_are_no_move(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block is dense on both sides, but its heads lie the other way round on one."""
    source, target = (torch.randint(0, 256, (6, 4, 2, 8), dtype=torch.uint8) for _ in range(2))
    rows = KVView(source, "block token head dim")
    turned = KVView(target.view(6, 2, 4, 8), "block head token dim")
    seen = plain_copies(monkeypatch)
    half = HostRows(rows.form, turned.form, 4, 4, 4)
    half.batch(rows, turned, Index([3, 4], 4), Index([0, 1], 4), 8).wait()
    assert seen
    assert all(shape[0] > 1 for shape in seen)
    assert torch.equal(target.view(6, 2, 4, 8)[:2], source[3:5].transpose(1, 2))


@pytest.mark.usefixtures("four_threads")
def test_an_error_in_one_share_ends_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_rows, "SHARE", 10)
    source, rows = tokens_of(50)
    target, theirs = tokens_of(50)
    plain, calls = ctypes.memmove, list[int]()

    def failing(into: int, out_of: int, nbytes: int) -> None:
        if into == target.data_ptr() + 30:
            raise OSError("a page could not be read")
        calls.append(into)
        sleep(0.001)
        plain(into, out_of, nbytes)

    monkeypatch.setattr(ctypes, "memmove", failing)
    with pytest.raises(OSError, match="a page could not be read"):
        moved(rows, theirs, Index(), Index(), 50, start=True)
    made = len(calls)
    assert made < 400  # of 499
    sleep(0.01)
    assert len(calls) == made
    assert not torch.equal(target[-5:], source[-5:])


#: Rows in one piece, which `memmove` copies; and with gaps between them, which it does not.
STEADY = pytest.mark.parametrize("gap", [0, 4], ids=["moved", "strided"])


def within(arena: np.ndarray[Any, Any], gap: int) -> KVView:
    """20 rows in the middle third of an arena of 60."""
    return KVView(torch.from_numpy(arena[20:40])[:, : 20 - gap], "token dim")


@STEADY
@pytest.mark.parametrize("outward", [True, False], ids=["to rows", "from rows"])
@pytest.mark.parametrize("ends", [(0, 20), (40, 60), (0, 30), (20, 39)])
def test_memory_that_is_elsewhere_or_too_short_is_refused(
    ends: tuple[int, int], outward: bool, gap: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the rows, behind them, or not up to the last one: nothing is touched."""
    arena = np.random.default_rng(2).integers(0, 256, (60, 20), dtype=np.uint8)
    rows = within(arena, gap)
    _, others = tokens_of(20, 20 - gap)
    sides = (others, rows) if outward else (rows, others)
    moved(*sides, Index(), Index(), 20)  # what it was before is kept with the view
    rows.owners[0].set_(torch.from_numpy(arena[slice(*ends)]).untyped_storage())
    before = arena.copy()
    # It may also happen between that and the copy, as by another thread.
    monkeypatch.setattr(KVView, "check_memory", lambda self: None)
    with pytest.raises(LayoutError, match="replaced"):
        moved(*sides, Index(), Index(), 20)
    assert np.array_equal(arena, before)


@STEADY
def test_memory_that_grew_around_the_rows_is_the_same_rows(gap: int) -> None:
    arena = np.random.default_rng(2).integers(0, 256, (60, 20), dtype=np.uint8)
    rows = within(arena, gap)
    target, others = tokens_of(20, 20 - gap)
    rows.owners[0].set_(torch.from_numpy(arena).untyped_storage())
    moved(rows, others, Index(), Index(), 20)
    assert np.array_equal(target.numpy(), arena[20:40, : 20 - gap])


@STEADY
def test_a_storage_that_shrank_is_refused(gap: int) -> None:
    memory = torch.zeros(20, 20, dtype=torch.uint8)
    rows = KVView(memory[:, : 20 - gap], "token dim")
    _, others = tokens_of(20, 20 - gap)
    memory.untyped_storage().resize_(390)
    with pytest.raises(LayoutError, match="replaced"):
        moved(others, rows, Index(), Index(), 20)


def test_storages_can_still_be_resized() -> None:
    memory, rows = chunks((16, 16))
    mirror = mirror_of(rows.form)
    slot = mirror.view(torch.zeros(mirror.nbytes(8), dtype=torch.uint8), 8)
    half = HostRows(slot.form, rows.form, 0, 0, 1)
    half.batch(slot, rows, Index(), Index(), 8).wait()
    memory.untyped_storage().resize_(128)
    with pytest.raises(LayoutError, match="replaced"):
        half.batch(slot, rows, Index(), Index(), 8)


@pytest.mark.parametrize("layout", [*CHUNKS, *POOLS, "layer token (kv head dim)"])
@pytest.mark.parametrize(("first", "count"), [(0, 1), (0, 16), (3, 5), (3, 12), (0, 24)])
def test_an_extent_covers_its_positions(layout: str, first: int, count: int) -> None:
    rows = chunks((16, 48))[1] if "(kv" in layout else view_of(tensors_of(layout, 24, 1), layout)
    mirror, held = mirror_of(rows.form), 24
    buffer = torch.zeros(mirror.nbytes(held), dtype=torch.uint8)
    dense = mirror.view(buffer, held)
    first %= mirror.block_size  # rows begin as far into a block as they do on the host
    plan = CopyPlan(dense.form, dense.form, 0, 0, 1)
    runs = plan.runs(dense, dense, Index(offset=first), Index(offset=first), count)
    needed = np.zeros(buffer.numel(), dtype=bool)
    for at, nbytes in zip(runs.src - dense.origins[0], runs.nbytes, strict=True):
        needed[at : at + nbytes] = True
    found = extent(dense.form, held, first, count)
    crossing = np.zeros(buffer.numel(), dtype=bool)
    for row in range(found.height):
        at = found.start + row * found.pitch
        assert at >= 0
        assert at + found.width <= buffer.numel()
        crossing[at : at + found.width] = True
    assert not (needed & ~crossing).any()
    if "(kv" not in layout:
        units = -(-(first + count) // mirror.block_size) - first // mirror.block_size
        assert crossing.sum() == units * mirror.block_size * mirror.slot_bytes
