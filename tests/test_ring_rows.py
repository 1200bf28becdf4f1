# SPDX-License-Identifier: Apache-2.0
"""The host's own half of a copy through pinned memory, against `reference`; and what crosses."""

from __future__ import annotations

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
    HostRows(src.form, dst.form, *steps, unit).copy(src, dst, src_index, dst_index, count)
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
    HostRows(slot.form, rows.form, 0, index.plan_step, 1).copy(slot, rows, Index(), index, 7)
    copy_rows(slot, judged, Index(), index, count=7)
    assert torch.equal(memory, twin)


def test_memory_that_was_replaced_is_refused() -> None:
    memory, rows = chunks((16, 16))
    mirror = mirror_of(rows.form)
    slot = mirror.view(torch.zeros(mirror.nbytes(8), dtype=torch.uint8), 8)
    half = HostRows(slot.form, rows.form, 0, 0, 1)
    half.copy(slot, rows, Index(), Index(), 8)
    memory.untyped_storage().resize_(0)
    with pytest.raises(LayoutError, match="replaced"):
        half.copy(slot, rows, Index(), Index(), 8)


def test_in_inference_mode_and_after_it() -> None:
    memory, rows = chunks((16, 16))
    mirror = mirror_of(rows.form)
    slot = mirror.view(torch.zeros(mirror.nbytes(24), dtype=torch.uint8), 24)
    half = HostRows(slot.form, rows.form, 0, 0, 1)
    with torch.inference_mode():
        half.copy(slot, rows, Index(), Index(), 8)
    half.copy(slot, rows, Index(), Index(), 24)
    assert not memory.any()


def test_consecutive_ids_are_one_plain_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = view_of(tensors_of(POOLS[2], 0, 1), POOLS[2])
    mirror = mirror_of(rows.form)
    slot = mirror.view(torch.zeros(mirror.nbytes(64), dtype=torch.uint8), 64)
    seen = []
    plain = host_rows._copy

    def noted(*arguments: Any) -> None:
        seen.append(arguments)
        plain(*arguments)

    monkeypatch.setattr(host_rows, "_copy", noted)
    half = HostRows(slot.form, rows.form, 0, BLOCK, BLOCK)
    half.copy(slot, rows, Index(), Index(list(range(4, 12)), step=BLOCK), 64)
    assert [(a[1], a[3]) for a in seen] == [(None, None)]


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
