# SPDX-License-Identifier: Apache-2.0
"""The second hop of `ring`: as which calls of torch rows are copied inside the host, memory that
was replaced, and what of dense rows crosses. All its bytes are judged in `test_staged.py`."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import numpy as np
import pytest
import torch
from support.engine_cases import BLOCK, CHUNKS, POOLS, tensors_of, view_of

from portakv import Index, KVView, LayoutError, copy_rows
from portakv.backends import strided
from portakv.backends.strided import HostRows
from portakv.engines.pageable import extent
from portakv.engines.staging import dense_rows
from portakv.plan.plan import CopyPlan

OUTWARD = pytest.mark.parametrize("outward", [True, False], ids=["to rows", "from rows"])


def moved(src: KVView, dst: KVView, mine: Index, theirs: Index, count: int, unit: int = 1) -> None:
    """Copy positions between two views on the host."""
    steps = mine.plan_step, theirs.plan_step
    HostRows(src.form, dst.form, *steps, unit).copy(src, dst, mine, theirs, count)


def dense_of(rows: KVView, slots: int, fill: int | None = None) -> tuple[torch.Tensor, KVView]:
    """Memory for dense rows of a view, random unless it is filled, and the view of it."""
    dense = dense_rows(rows.form)
    noise = torch.Generator().manual_seed(3)
    memory = torch.randint(0, 256, (dense.nbytes(slots),), dtype=torch.uint8, generator=noise)
    if fill is not None:
        memory.fill_(fill)
    return memory, dense.view(memory, slots)


def chunks(widths: tuple[int, int], tokens: int = 24) -> tuple[torch.Tensor, KVView]:
    """Rows of unequal widths for the two kv, two layers."""
    nbytes = 2 * tokens * sum(widths)
    memory = torch.arange(nbytes, dtype=torch.int32).view(torch.uint8)[:nbytes].clone()
    shape = (2, tokens, sum(widths))
    return memory, KVView(memory.view(shape), "layer token (kv head dim)", kv=2, heads=1,
                          dim=widths)  # fmt: skip


@pytest.mark.parametrize("widths", [(16, 48), (3, 5), (20, 4), (6, 2)])
@pytest.mark.parametrize("index", [Index(offset=3), Index([20, 3, 4, 5, 11, 0, 9])])
def test_rows_of_unequal_widths_and_of_any_alignment(widths: tuple[int, int], index: Index) -> None:
    (memory, rows), (twin, judged) = chunks(widths), chunks(widths)
    _, slot = dense_of(rows, 8)
    moved(slot, rows, Index(), index, 7)
    copy_rows(slot, judged, Index(), index, count=7)
    assert torch.equal(memory, twin)


def test_in_inference_mode_and_after_it() -> None:
    memory, rows = chunks((16, 16))
    _, slot = dense_of(rows, 24, 0)
    with torch.inference_mode():
        moved(slot, rows, Index(), Index(), 8)
    moved(slot, rows, Index(), Index(), 24)
    assert not memory.any()


@pytest.fixture(params=[1, 4])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """How many torch may use."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[int, ...], bool]]:
    """The copies that are made: the shape of what is written, axes of one element left out, and
    whether ids pick its rows or those that are read."""
    seen: list[tuple[tuple[int, ...], bool]] = []
    ops = strided._HERE

    def note(target: torch.Tensor, indexed: bool) -> None:
        seen.append((tuple(n for n in target.shape if n != 1), indexed))

    def select(*given: Any, out: torch.Tensor | None = None) -> torch.Tensor:
        if out is not None:
            note(out, True)
        return ops.select(*given, out=out)

    def put(target: torch.Tensor, *given: Any) -> None:
        note(target, True)
        ops.put(target, *given)

    def copy(target: torch.Tensor, source: torch.Tensor) -> None:
        note(target.view(torch.uint8), False)
        ops.copy(target, source)

    noted = ops._replace(select=select, put=put, copy=copy)
    monkeypatch.setattr(strided, "_HERE", noted)
    return seen


def test_consecutive_ids_are_one_plain_copy(made: list[Any]) -> None:
    rows = view_of(tensors_of(POOLS[2], 0, 1), POOLS[2])
    dense, slot = dense_of(rows, 64)
    moved(slot, rows, Index(), Index(list(range(4, 12)), step=BLOCK), 64, BLOCK)
    assert [indexed for _, indexed in made] == [False]
    assert prod(made[0][0]) == dense.numel()  # by bytes, which torch spreads furthest


@pytest.mark.usefixtures("threads")
def test_dense_rows_are_one_plain_copy(made: list[Any]) -> None:
    """Rows of 4 KiB, which lie together in each of 8 planes."""
    tokens, width = 256, 4096
    memory = torch.arange(8 * 2 * tokens * width // 8).view(torch.uint8)
    rows = KVView(memory.view(2, 4, 2 * tokens, width), "kv layer token (head dim)", heads=1)
    dense, slot = dense_of(rows, tokens)
    moved(rows, slot, Index(offset=7), Index(), tokens)
    assert len(made) == 1
    assert torch.equal(dense, memory.view(8, -1, width)[:, 7 : 7 + tokens].reshape(-1))


@OUTWARD
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("run", [16, 48, 4096, 512 << 10])
def test_scattered_rows_are_one_indexed_copy(
    outward: bool, run: int, inference: bool, made: list[Any]
) -> None:
    """Of any width, in the widest elements that there are."""
    count = max(4, (4 << 20) // run)
    memory = torch.randint(0, 256, (2 * count, run), dtype=torch.uint8)
    order = torch.randperm(2 * count)[:count]
    rows = KVView(memory[None], "layer token (kv head dim)", kv=1, heads=1)
    dense, slot = dense_of(rows, count)
    index, wanted = Index(order), memory.clone()
    with torch.inference_mode(inference):
        if outward:
            wanted[order] = dense.view(count, run)
            moved(slot, rows, Index(), index, count)
        else:
            moved(rows, slot, index, Index(), count)
    assert torch.equal(memory, wanted)
    assert torch.equal(dense.view(count, run), memory[order])
    ((shape, indexed),) = made
    assert indexed
    assert prod(shape[1:]) == run // 16


def tokens_of(number: int, width: int = 100) -> tuple[torch.Tensor, KVView]:
    """Random dense rows of so many bytes."""
    memory = torch.randint(0, 256, (number, width), dtype=torch.uint8)
    return memory, KVView(memory, "token dim")


@pytest.mark.parametrize("ids", [[7], [7, 2, 4], [2, 3, 4], [2, 4, 6], [6, 4, 2]])
def test_blocks_at_one_pitch_are_a_plain_copy_and_others_an_indexed_one(
    ids: list[int], made: list[Any]
) -> None:
    source = torch.randint(0, 256, (10, 5, 8), dtype=torch.uint8)  # room behind each block
    target, theirs = tokens_of(50, 8)
    wanted = target.clone()
    wanted[: 4 * len(ids)] = source[ids, :4].reshape(-1, 8)
    rows = KVView(source[:, :4], "block token dim")
    moved(rows, theirs, Index(ids, 4), Index(), 4 * len(ids), 4)
    assert torch.equal(target, wanted)
    assert [indexed for _, indexed in made] == [ids in ([7, 2, 4], [6, 4, 2])]


def test_planes_that_are_memory_of_their_own_are_copies_of_their_own(made: list[Any]) -> None:
    source = [torch.randint(0, 256, (2, 6, 4, 1, 16), dtype=torch.uint8) for _ in range(3)]
    rows = KVView(source, "layer | kv block token head dim")
    dense, slot = dense_of(rows, 12)
    moved(rows, slot, Index([5, 0, 3], 4), Index(), 12, 4)
    assert len(made) == 3
    assert torch.equal(dense, torch.stack([x[:, [5, 0, 3]] for x in source]).reshape(-1))


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
    ends: tuple[int, int] | None, bytes_left: int | None, outward: bool, gap: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """20 rows in the middle third of an arena of 60, whose storage then holds other rows, before
    them, behind them, or not up to the last one, or is resized: nothing is touched. If it grew
    around them, they are the same rows."""
    arena = torch.from_numpy(np.random.default_rng(2).integers(0, 256, (60, 20), dtype=np.uint8))
    whole = arena[20:40].clone() if ends is None else torch.from_numpy(arena.numpy()[20:40])
    rows = KVView(whole[:, : 20 - gap], "token dim")
    target, others = tokens_of(20, 20 - gap)
    sides = (others, rows) if outward else (rows, others)
    moved(*sides, Index(), Index(), 20)
    before, there = arena.clone(), target.clone()
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
    mirror, held = dense_rows(rows.form), 24
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
        assert crossing.sum() == mirror.nbytes(units * mirror.block_size)
