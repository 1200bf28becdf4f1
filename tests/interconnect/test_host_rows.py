# SPDX-License-Identifier: Apache-2.0
"""The second hop of `pageable`: as which calls of torch rows are copied inside the host, memory
that was replaced, and what of dense rows crosses. All its bytes are judged in `test_staged.py`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from support.engine_cases import BLOCK, CHUNKS, POOLS, tensors_of, view_of

from portakv import Index, KVView, LayoutError, copy_rows
from portakv.backends import strided
from portakv.backends.strided import HOST_OPS, Copies, calls_on_host, copy_on_host
from portakv.interconnect.pageable import extent
from portakv.interconnect.staging import DenseRows
from portakv.plan.plan import CopyPlan, Move
from portakv.view.bound import bind_layout

OUTWARD = pytest.mark.parametrize("outward", [True, False], ids=["to rows", "from rows"])


def moved(src: KVView, dst: KVView, src_index: Index, dst_index: Index, count: int) -> None:
    move = Move(src, dst, src_index, dst_index, count)
    copy_on_host(calls_on_host(Copies(move, HOST_OPS), move))


def dense_of(rows: KVView, slots: int, fill: int | None = None) -> tuple[torch.Tensor, KVView]:
    """Memory for dense rows of a view, random unless it is filled, and the view of it."""
    dense = DenseRows(rows.form)
    noise = torch.Generator().manual_seed(3)
    memory = torch.randint(0, 256, (dense.nbytes(slots),), dtype=torch.uint8, generator=noise)
    if fill is not None:
        memory.fill_(fill)
    return memory, dense.view(memory, slots)


def chunks(widths: tuple[int, int], tokens: int = 24) -> tuple[torch.Tensor, KVView]:
    nbytes = 2 * tokens * sum(widths)
    memory = torch.arange(nbytes, dtype=torch.int32).view(torch.uint8)[:nbytes].clone()
    shape = (2, tokens, sum(widths))
    return memory, KVView(
        memory.view(shape), "layer token (kv head dim)", kv=2, heads=1, dim=widths
    )


@pytest.mark.parametrize("widths", [(16, 48), (3, 5), (20, 4), (6, 2)])
@pytest.mark.parametrize("index", [Index(offset=3), Index([20, 3, 4, 5, 11, 0, 9])])
def test_rows_of_unequal_widths_and_of_any_alignment(widths: tuple[int, int], index: Index) -> None:
    (memory, rows) = chunks(widths)
    (twin, judged) = chunks(widths)
    _, slot = dense_of(rows, 8)
    moved(slot, rows, Index(), index, 7)
    copy_rows(slot, judged, Index(), index, count=7)
    assert torch.equal(memory, twin)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """The copies that are made: how many elements, and whether ids pick the rows that are written
    or those that are read."""
    seen = list[tuple[int, bool]]()
    ops = strided.HOST_OPS

    def select(*arguments: Any, out: torch.Tensor | None = None) -> torch.Tensor:
        if out is not None:
            seen.append((out.numel(), True))
        return ops.select(*arguments, out=out)

    def put(target: torch.Tensor, _: int, rows: torch.Tensor, source: torch.Tensor) -> None:
        seen.append((source.numel(), True))
        ops.put(target, 0, rows, source)

    def copy(target: torch.Tensor, source: torch.Tensor) -> None:
        seen.append((target.nbytes, False))
        ops.copy(target, source)

    monkeypatch.setattr(strided, "HOST_OPS", ops._replace(select=select, put=put, copy=copy))
    return seen


class Rows(NamedTuple):
    """Rows that an index names, and in how many calls of torch they are copied: of bytes, which
    torch spreads furthest, or ``indexed``, of the widest elements."""

    view: KVView
    ids: Index
    tokens: int
    indexed: bool
    calls: int = 1


def random(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def scattered(width: int) -> Rows:
    count = max(4, (4 << 20) // width)
    view = KVView(random(1, 2 * count, width), "layer token (kv head dim)", kv=1, heads=1)
    return Rows(view, Index(torch.randperm(2 * count)[:count]), count, True)


def blocks(*ids: int) -> Rows:
    view = KVView(random(10, 5, 16)[:, :4], "block token dim")
    return Rows(view, Index(ids, 4), 4 * len(ids), ids in ((7, 2, 4), (6, 4, 2)))


def pool(*ids: int) -> Rows:
    view = view_of(tensors_of(POOLS[2], 0, 1), POOLS[2])
    return Rows(view, Index(ids, BLOCK), BLOCK * len(ids), False)


def dense() -> Rows:
    view = KVView(random(2, 4, 512, 4096), "kv layer token (head dim)", heads=1)
    return Rows(view, Index(offset=7), 256, False)


def apart() -> Rows:
    view = KVView([random(2, 6, 4, 1, 16) for _ in range(3)], "layer | kv block token head dim")
    return Rows(view, Index([5, 0, 3], 4), 12, True, calls=3)


ROWS: dict[str, Callable[[], Rows]] = {
    **{f"scattered, of {x} B": partial(scattered, x) for x in (16, 48, 4096, 512 << 10)},
    **{
        f"blocks {ids}": partial(blocks, *ids)
        for ids in ((7,), (7, 2, 4), (2, 3, 4), (2, 4, 6), (6, 4, 2))
    },
    "consecutive blocks": partial(pool, *range(4, 12)),
    "dense": dense,
    "layers apart": apart,
}


@OUTWARD
@pytest.mark.parametrize("name", ROWS)
def test_by_which_calls_of_torch(name: str, outward: bool, made: list[tuple[int, bool]]) -> None:
    view, index, count, indexed, calls = ROWS[name]()
    (memory, slot) = dense_of(view, count)
    (twin, other) = dense_of(view, count, 0)
    for inference in (True, False):
        made.clear()
        with torch.inference_mode(inference):
            if outward:
                moved(slot, view, Index(), index, count)
            else:
                moved(view, slot, index, Index(), count)
        each = memory.numel() // calls
        assert made == [(each // 16 if indexed else each, indexed)] * calls
        copy_rows(view, other, index, Index(), count=count)
        assert torch.equal(memory, twin)


def test_views_keep_nothing_of_a_copy() -> None:
    view, index, count, _, _ = ROWS["layers apart"]()
    _, slot = dense_of(view, count)
    moved(view, slot, index, Index(), count)
    before = len(view.derived), len(slot.derived)
    moved(view, slot, index, Index(), count)
    assert (len(view.derived), len(slot.derived)) == before


@pytest.mark.parametrize("order", [None, [0, 3, 1, 2, 7, 5]], ids=["plain", "indexed"])
def test_nothing_is_touched_where_one_part_of_the_rows_is_refused(
    order: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two parts of unequal widths; what is left of the memory holds the first one alone."""
    memory, rows = chunks((16, 48), tokens=8)
    _, slot = dense_of(rows, 6, 0xA5)
    memory.untyped_storage().resize_(memory.numel() - 150)
    before = memory.untyped_storage().tolist()
    monkeypatch.setattr(KVView, "check_memory", lambda self: None)
    with pytest.raises(LayoutError, match="replaced"):
        moved(slot, rows, Index(), Index() if order is None else Index(order), 6)
    assert memory.untyped_storage().tolist() == before


@pytest.mark.parametrize("gap", [0, 4], ids=["dense", "gaps"])
@OUTWARD
@pytest.mark.parametrize(
    ("ends", "bytes_left"),
    [((0, 20), None), ((40, 60), None), ((0, 30), None), ((20, 39), None), ((0, 0), None),
     ((0, 60), None), *((None, left) for left in (390, 128, 0))],
    ids=str,
)  # fmt: skip
def test_memory_that_is_elsewhere_or_too_short_is_refused(
    ends: tuple[int, int] | None,
    bytes_left: int | None,
    outward: bool,
    gap: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """20 rows in the middle third of an arena of 60, whose storage then holds other rows, before
    them, after them, or not up to the last one, or is resized: nothing is touched. If it grew
    around them, they are the same rows."""
    arena = torch.from_numpy(np.random.default_rng(2).integers(0, 256, (60, 20), dtype=np.uint8))
    whole = arena[20:40].clone() if ends is None else torch.from_numpy(arena.numpy()[20:40])
    # A view for one call retains no storage: its tensor decides which memory it has.
    rows = KVView.through(bind_layout("token dim"), whole[:, : 20 - gap])
    target = random(20, 20 - gap)
    others = KVView(target, "token dim")
    sides = (others, rows) if outward else (rows, others)
    moved(*sides, Index(), Index(), 20)
    before = arena.clone()
    there = target.clone()
    if ends is None:
        whole.untyped_storage().resize_(bytes_left or 0)
    else:
        rows.owners[0].set_(torch.from_numpy(arena.numpy()[slice(*ends)]).untyped_storage())
    for _ in range(2):
        if ends == (0, 60):
            moved(*sides, Index(), Index(), 20)
        else:
            with pytest.raises(LayoutError, match="replaced"):
                moved(*sides, Index(), Index(), 20)
        # It may also happen between the look at memory and the copy, as by another thread.
        monkeypatch.setattr(KVView, "check_memory", lambda self: None)
    assert torch.equal(arena, before)
    assert torch.equal(target, there)
    assert ends != (0, 60) or torch.equal(target, arena[20:40, : 20 - gap])


@pytest.mark.parametrize("layout", [*CHUNKS, *POOLS, "layer token (kv head dim)"])
@pytest.mark.parametrize(("first", "count"), [(0, 1), (0, 16), (3, 5), (3, 12), (0, 24)])
def test_an_extent_covers_its_positions(layout: str, first: int, count: int) -> None:
    rows = chunks((16, 48))[1] if "(kv" in layout else view_of(tensors_of(layout, 24, 1), layout)
    mirror = DenseRows(rows.form)
    slots = 24
    buffer = torch.zeros(mirror.nbytes(slots), dtype=torch.uint8)
    dense = mirror.view(buffer, slots)
    first %= mirror.block_size  # rows begin as far into a block as they do on the host
    plan = CopyPlan(dense.form, dense.form, 0, 0, 1)
    runs = plan.runs(dense, dense, Index(offset=first), Index(offset=first), count)
    begins = runs.src - dense.origins[0]
    needed = [np.arange(at, at + n) for at, n in zip(begins, runs.nbytes, strict=True)]
    result = extent(dense.form, slots, first, count)
    rows_at = result.start + result.pitch * np.arange(result.height)
    crossing = rows_at[:, None] + np.arange(result.width)
    assert crossing.min() >= 0
    assert crossing.max() < buffer.numel()
    assert np.isin(np.concatenate(needed), crossing).all()
    if "(kv" not in layout:
        units = -(-(first + count) // mirror.block_size) - first // mirror.block_size
        assert crossing.size == mirror.nbytes(units * mirror.block_size)
