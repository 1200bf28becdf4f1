# SPDX-License-Identifier: Apache-2.0
"""Host memory that others registered in pieces: no copy crosses from one piece into another."""

from __future__ import annotations

import gc
import sys
from itertools import pairwise
from types import FrameType
from typing import Any

import pytest
import torch
from support.core_cases import noise
from support.device_cases import settle
from support.guarded_memory import check_sentence

from portakv import HostMemoryError, KVView, copy_rows, copy_runs
from portakv.host import pinned
from portakv.interconnect.link import CudaLink, Pieces, link_of

ROWS = 64
ROW = 96


@pytest.fixture
def crossed(accelerator: torch.device, monkeypatch: pytest.MonkeyPatch) -> list[Pieces]:
    """Record the pieces that torch copies. CUDA's driver rejects wrong ones itself."""
    link = link_of(accelerator)
    copied = list[Pieces]()
    copy: Any = link.copy

    def seen(pieces: Pieces, *rest: Any) -> None:
        copied.append(pieces)
        copy(pieces, *rest)

    monkeypatch.setattr(link, "copy", seen)
    return copied


def over(boundaries: list[int], pieces: Pieces) -> int:
    """Count the pieces that reach over a boundary on either side."""
    count = 0
    for start, pitch in ((pieces.src, pieces.src_pitch), (pieces.dst, pieces.dst_pitch)):
        past = start + (pieces.height - 1) * pitch + pieces.width
        for boundary in boundaries:
            count += int(((start < boundary) & (past > boundary)).sum())
    return count


@pytest.mark.parametrize("downward", [True, False], ids=["d2h", "h2d"])
@pytest.mark.parametrize("strategy", ["staged", "batched_memcpy", "runs"])
def test_copies_are_cut_where_pieces_meet(
    accelerator: torch.device, crossed: list[Pieces], strategy: str, downward: bool
) -> None:
    here = pinned.empty(ROWS * ROW, torch.uint8)
    here.copy_(noise(ROWS * ROW, dtype=torch.uint8))
    there = noise(ROWS * ROW, dtype=torch.uint8, seed=1).to(accelerator)
    settle(accelerator)
    src, dst = (there, here) if downward else (here, there)
    expected = src.cpu().clone()
    begin = here.data_ptr()
    cuts = [begin, begin + 1000, begin + 4096, begin + 4100, begin + ROWS * ROW]
    pieces = [(a, b - a) for a, b in pairwise(cuts)]
    with pinned.adopt(pieces[::-1]) as adopted:
        assert adopted.pieces == tuple(pieces)
        if strategy == "runs":
            sides: Any = {
                "src_device": src.device,
                "dst_device": dst.device,
                "backend": "batched_memcpy",
            }
            copy_runs([src.data_ptr()], [dst.data_ptr()], ROWS * ROW, **sides).synchronize()
        else:
            src_view, dst_view = (KVView(x.view(ROWS, ROW), "token dim") for x in (src, dst))
            copy_rows(src_view, dst_view, backend=strategy).synchronize()
    assert torch.equal(dst.cpu(), expected)
    assert crossed or isinstance(link_of(accelerator), CudaLink)
    assert not any(over(cuts[1:-1], each) for each in crossed)


def test_seams_last_as_long_as_somebody_tells_of_them() -> None:
    before = pinned.boundaries()
    pieces = [(1 << 20, 4096), ((1 << 20) + 4096, 4096), (1 << 22, 4096)]
    first = pinned.adopt(pieces)
    second = pinned.adopt(pieces)
    boundaries = tuple(sorted((*before, (1 << 20) + 4096)))
    assert pinned.boundaries() == boundaries, "pieces that do not touch have no boundary"
    first.close()
    first.close()
    assert pinned.boundaries() == boundaries
    second.close()
    assert pinned.boundaries() == before


def test_pieces_that_were_told_of_one_by_one_meet_as_well() -> None:
    before = pinned.boundaries()
    page = 4096
    adopted = [pinned.adopt([(at * page, page)]) for at in (300, 302, 301, 310)]
    assert {*pinned.boundaries()} - {*before} == {301 * page, 302 * page}
    adopted[0].close()
    assert {*pinned.boundaries()} - {*before} == {302 * page}
    for each in adopted:
        each.close()
    assert pinned.boundaries() == before


def test_pieces_are_forgotten_if_nothing_holds_them() -> None:
    before = pinned.boundaries()
    page = 4096
    adopted = pinned.adopt([(500 * page, page), (501 * page, page)])
    assert {*pinned.boundaries()} - {*before} == {501 * page}
    del adopted
    gc.collect()
    assert pinned.boundaries() == before


@pytest.mark.filterwarnings("ignore:Expected pinned host memory")
@pytest.mark.parametrize("registered", [True, False])
def test_a_finalizer_that_runs_while_seams_are_worked_out(registered: bool) -> None:
    """It may run at any place of a thread, also where that one holds the lock."""
    before = pinned.boundaries()
    page = 4096
    if registered:
        gone: Any = pinned.allocate(4 * page, largest=2 * page)
    else:
        gone = pinned.adopt([(600 * page, page), (601 * page, page)])

    def finalize(frame: FrameType, event: str, argument: object) -> None:
        if argument is sorted and frame.f_code.co_name == "count_pieces":
            sys.setprofile(None)
            gone.close()

    sys.setprofile(finalize)
    try:
        adopted = pinned.adopt([(500 * page, page), (501 * page, page)])
    finally:
        sys.setprofile(None)
    assert {*pinned.boundaries()} - {*before} == {501 * page}
    adopted.close()
    assert pinned.boundaries() == before


@pytest.mark.parametrize(
    "pieces", [[(0, 4096)], [(4096, 0)], [(4096, 1.5)], [4096], [(4096, 4096), (8000, 10)]], ids=str
)
def test_what_are_no_pieces(pieces: Any) -> None:
    before = pinned.boundaries()
    with pytest.raises(HostMemoryError) as refused:
        pinned.adopt(pieces)
    check_sentence(str(refused.value), "(address, bytes)")
    assert pinned.boundaries() == before
