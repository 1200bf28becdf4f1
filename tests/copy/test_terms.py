# SPDX-License-Identifier: Apache-2.0
"""Copies of rows on terms: every way that blocks can be issued, by slots and by parts of blocks."""

from __future__ import annotations

import re
import sys
from types import FrameType
from typing import Any

import pytest
import torch
from support.block_cases import BLOCKS, METHODS, SIZE, SLICED, Cache, block_first, layered
from support.guarded_memory import refused
from support.whole_copies import needs_whole_copies

from portakv import Index, InvalidTerms, SlotError, Unsupported, copy_blocks, copy_rows
from portakv.copy import submit

SRC_IDS = [5, -1, 31, 8, 9, 10]
DST_IDS = [0, 3, 2, 17, 18, 30]
DOWNWARD = pytest.mark.parametrize("downward", [True, False], ids=["d2h", "h2d"])
PARTS = [
    # blocks of the source and destination, skip, count, the first slots, how many
    ([5, 0, 7], [1, 6, 0], 0, 7),
    ([5, 0, 7], [1, 6, 0], 3, None),
    ([5, 0, 7], [1, 6, 0], 2, 5),
    ([5, 0, 7], [1, 6, 0, 2], (1, 3), 9),
    ([5, 0, 7], [1, 6, 0], 12, None),
]


@pytest.fixture(params=METHODS)
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    return METHODS[request.param]


@pytest.fixture
def _small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "SLICE", 1024)


def sides(device: torch.device, downward: bool) -> tuple[Cache, Cache]:
    there = layered(device)
    here = block_first(pin=device.type != "cpu")
    return (there, here) if downward else (here, there)


def moved(src: Cache, dst: Cache, src_ids: list[int], dst_ids: list[int]) -> torch.Tensor:
    """The destination's rows once slots were copied; a negative one skips its position."""
    result = dst.rows()
    rows = src.rows()
    for a, b in zip(src_ids, dst_ids, strict=True):
        if a >= 0 and b >= 0:
            result[:, :, b] = rows[:, :, a]
    return result


@DOWNWARD
@pytest.mark.usefixtures("_small_slices")
def test_slots(device: torch.device, downward: bool, options: dict[str, Any]) -> None:
    src, dst = sides(device, downward)
    expected = moved(src, dst, SRC_IDS, DST_IDS)
    transfer = copy_rows(src.view, dst.view, SRC_IDS, DST_IDS, **options)
    transfer.synchronize()
    assert torch.equal(dst.rows(), expected)
    statistics = transfer.statistics
    assert (statistics.blocks, statistics.blocks_requested) == (5, 5), (
        "a slot that is skipped does not count"
    )
    assert statistics.nbytes == 5 * src.view.form.token_bytes
    assert len(transfer.layers if "by_layer" in options else "one") == 3


@DOWNWARD
@pytest.mark.usefixtures("_small_slices")
@pytest.mark.parametrize(("src_ids", "dst_ids", "skip", "count"), PARTS, ids=str)
def test_blocks_in_part(
    device: torch.device,
    downward: bool,
    options: dict[str, Any],
    src_ids: list[int],
    dst_ids: list[int],
    skip: Any,
    count: int | None,
) -> None:
    src, dst = sides(device, downward)
    first, second = skip if isinstance(skip, tuple) else (skip, skip)
    slots = [
        side.slots(ids)[at:] for side, ids, at in ((src, src_ids, first), (dst, dst_ids, second))
    ]
    slots = [each[:count] for each in slots]
    expected = moved(src, dst, *slots)
    copy_blocks(
        src.view, dst.view, src_ids, dst_ids, skip=skip, count=count, **options
    ).synchronize()
    assert torch.equal(dst.rows(), expected)


def test_blocks_of_two_sizes_in_part() -> None:
    """A chunk of several blocks of which the first and the last one are partial."""
    pages = layered()
    chunks = block_first(size=3 * SIZE)
    src_ids = [4, 0, 6, 1, 2]
    dst_ids = [5, 2]
    skip = 2 * SIZE
    slots = pages.slots(src_ids), chunks.slots(dst_ids)[skip:][: 5 * SIZE]
    slots = slots[0][: len(slots[1])], slots[1]
    expected = moved(pages, chunks, *slots)
    copy_blocks(
        pages.view, chunks.view, src_ids, dst_ids, skip=(0, skip), count=len(slots[1])
    ).synchronize()
    assert torch.equal(chunks.rows(), expected)


@pytest.mark.parametrize("skip", [-1, 1.5, 0.0, (1,), (0, -2), "two", None], ids=str)
def test_what_is_no_number_of_tokens_to_skip(skip: Any) -> None:
    src = layered()
    dst = layered()
    with refused(SlotError, "Expected skip", watch=dst.tensors):
        copy_blocks(src.view, dst.view, [1], [2], skip=skip)


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize(("skip", "side"), [(99, "source"), ((99, 0), "source"), ((0, 99), "dest")])
def test_more_tokens_to_skip_than_a_side_has(skip: Any, side: str, listed: bool) -> None:
    """The error names the argument, not the index that a caller never made."""
    src = layered()
    dst = layered()
    ids = ([1], [2]) if listed else (None, None)
    most = SIZE if listed else src.view.slots
    with refused(SlotError, f"Expected skip to be at most {most}", side, watch=dst.tensors):
        copy_blocks(src.view, dst.view, *ids, skip=skip)
    nothing = copy_blocks(src.view, dst.view, *ids, skip=most)
    assert nothing.statistics.nbytes == 0


def test_tokens_to_skip_of_an_index_that_begins_after_its_end() -> None:
    src = layered()
    dst = layered()
    index = Index([1], step=SIZE).shifted(2 * SIZE)
    with refused(SlotError, "Expected skip to be at most 0", watch=dst.tensors):
        copy_blocks(src.view, dst.view, index, index, skip=1)


def test_more_than_the_lists_hold() -> None:
    src = layered()
    dst = layered()
    part: Any
    for part in ({"count": SIZE + 1}, {"skip": 1, "count": SIZE}, {"skip": SIZE + 1}):
        with refused(SlotError, watch=dst.tensors):
            copy_blocks(src.view, dst.view, [1], [2], **part)


@pytest.mark.parametrize(
    ("terms", "words"),
    [({"overlap": "none"}, "overlap"), ({"max_gbps": 0}, "max_gbps"),
     ({"max_gbps": True}, "max_gbps"), ({"max_thread_blocks": 0}, "max_thread_blocks"),
     ({"max_thread_blocks": True}, "max_thread_blocks"), ({"detached": 1}, "detached")],
    ids=str,
)  # fmt: skip
def test_terms_that_nobody_can_keep(terms: dict[str, Any], words: str) -> None:
    src = layered()
    dst = layered()
    with refused(InvalidTerms, f"Expected {words} to be", watch=dst.tensors):
        copy_rows(src.view, dst.view, [1], [2], **terms)


def test_limits_where_no_kernel_reads_host_memory(device: torch.device) -> None:
    src = layered(device)
    dst = block_first(device)
    with refused(Unsupported, "max_thread_blocks=4", "Leave it out", watch=dst.tensors):
        copy_rows(src.view, dst.view, [1], [2], max_thread_blocks=4)


def test_a_rate_is_kept_by_a_worker_that_can_be_cancelled() -> None:
    src = layered()
    dst = layered()
    transfer = copy_rows(
        src.view, dst.view, range(BLOCKS * SIZE), range(BLOCKS * SIZE), max_gbps=1e-6
    )
    assert transfer.cancel()
    assert transfer.statistics.blocks_requested == BLOCKS * SIZE
    assert SLICED


def test_an_index_is_kept_as_it_was() -> None:
    src = layered()
    dst = layered()
    index = Index([1, 2], SIZE)
    copy_blocks(src.view, dst.view, index, index, skip=1, count=2).synchronize()
    assert (index.offset, index.length) == (0, 2 * SIZE)


@needs_whole_copies
def test_blocks_cost_the_host_what_rows_do() -> None:
    """And one more call. Above backends rows cost few calls; a side without ids costs none."""
    src = layered()
    dst = layered()
    index = Index([1, 2], SIZE)

    def calls(copy: Any, dst_index: Index | None = index) -> int:
        for _ in range(2):  # launches are prepared now
            copy(src.view, dst.view, index, dst_index, count=SIZE)
        seen: list[str] = []

        def called(frame: FrameType, event: str, argument: object) -> None:
            if event == "call" and not re.search("backends|<string>", frame.f_code.co_filename):
                seen.append(frame.f_code.co_name)

        sys.setprofile(called)
        try:
            copy(src.view, dst.view, index, dst_index, count=SIZE)
        finally:
            sys.setprofile(None)
        return len(seen)

    # One of them raises the versions of the destination, and one (of blocks two) asks whether the
    # core checks the copy.
    assert calls(copy_rows) <= 16
    assert calls(copy_blocks) <= calls(copy_rows) + 1
    assert calls(copy_rows, None) <= calls(copy_rows, Index())
