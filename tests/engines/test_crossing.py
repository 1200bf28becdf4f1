# SPDX-License-Identifier: Apache-2.0
"""Folding runs into pieces: exactly their bytes, each once, in as few pieces as they allow."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.crossing_cases import bytes_of_pieces, bytes_of_runs, drawn_runs, runs_of

from portakv import KVView
from portakv.engines.pieces import LEAST_HEIGHT, Pieces, to_2d_copies
from portakv.host import pinned
from portakv.host._pages import PAGE
from portakv.host.memcpy import MAX_PITCH
from portakv.plan.runs import Runs

LAYERS, BLOCKS = 12, 40


def shapes(pieces: Pieces) -> list[tuple[int, int, int, int]]:
    """Width, height and pitches of each piece."""
    columns = pieces.width, pieces.height, pieces.dst_pitch, pieces.src_pitch
    return list(zip(*(column.tolist() for column in columns), strict=True))


def judge(runs: Runs, pieces: Pieces) -> None:
    assert bytes_of_pieces(pieces) == bytes_of_runs(runs)
    assert pieces.nbytes == runs.nbytes.sum()
    assert {column.dtype for column in pieces} == {np.dtype(np.int64)}
    assert {column.size for column in pieces} == {pieces.number}
    for pitch in (pieces.dst_pitch, pieces.src_pitch):
        assert ((pieces.width <= pitch) & ((pitch <= MAX_PITCH) | (pieces.height == 1))).all()


@given(drawn_runs())
def test_pieces_are_the_runs(runs: Runs) -> None:
    pieces = to_2d_copies(runs)
    judge(runs, pieces)
    assert pieces.number <= runs.nbytes.size


@given(drawn_runs(), st.lists(st.integers(0, 400), max_size=6, unique=True))
def test_no_piece_reaches_over_a_seam(runs: Runs, seams: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pinned, "seams", lambda: tuple(sorted(seams)))
        pieces = to_2d_copies(runs)
    judge(runs, pieces)
    for start, pitch in ((pieces.src, pieces.src_pitch), (pieces.dst, pieces.dst_pitch)):
        past = start + (pieces.height - 1) * pitch + pieces.width
        for seam in seams:
            assert not ((start < seam) & (seam < past)).any()


def test_nothing_and_a_single_run() -> None:
    assert to_2d_copies(runs_of([], [], 8)).number == 0
    assert shapes(to_2d_copies(runs_of([64], [0], 8))) == [(8, 1, 8, 8)]


def test_rows_at_a_pitch_are_one_piece() -> None:
    runs = runs_of(range(0, 6400, 64), range(0, 1600, 16), 16)
    assert shapes(to_2d_copies(runs)) == [(16, 100, 16, 64)]


@pytest.mark.parametrize("height", range(1, 2 * LEAST_HEIGHT))
def test_few_rows_stay_plain(height: int) -> None:
    pieces = to_2d_copies(runs_of(range(0, 64 * height, 64), range(0, 32 * height, 32), 16))
    assert pieces.number == (1 if height >= LEAST_HEIGHT else height)


def test_groups_of_rows_with_jumps_between() -> None:
    """Folded whichever way makes fewer pieces."""
    for groups, rows, expected in ((6, 9, (16, 9, 16, 64)), (9, 6, (16, 9, 96, 4096))):
        starts = [group * 4096 + row * 64 for group in range(groups) for row in range(rows)]
        runs = runs_of(starts, range(0, 54 * 16, 16), 16)
        assert shapes(to_2d_copies(runs)) == [expected] * 6


@pytest.mark.parametrize("kv", [1, 2])
def test_scattered_blocks_fold_over_their_planes(kv: int) -> None:
    """Whatever the order of the blocks, each is a piece over all layers; K and V may lie anyhow."""
    blocks = np.random.default_rng(3).permutation(200)[:BLOCKS]
    where = np.arange(LAYERS) * 200 * 64
    src = np.concatenate([far + where[:, None] + blocks * 64 for far in (0, 9_999_936)[:kv]])
    dst = np.arange(kv * LAYERS * BLOCKS) * 64
    pieces = to_2d_copies(runs_of(src.reshape(-1).tolist(), dst.tolist(), 64))
    assert pieces.number == kv * BLOCKS
    assert set(shapes(pieces)) == {(64, LAYERS, BLOCKS * 64, 200 * 64)}


def test_layers_at_irregular_distances_stay_apart() -> None:
    rng = np.random.default_rng(4)
    where = np.cumsum(rng.integers(300, 900, LAYERS)) * 64
    src = where[:, None] + np.sort(rng.permutation(200)[:BLOCKS]) * 64
    runs = runs_of(src.reshape(-1).tolist(), (rng.permutation(src.size) * 64).tolist(), 64)
    assert to_2d_copies(runs).number == runs.nbytes.size


@pytest.mark.parametrize(
    ("src_step", "dst_step"), [(64, -64), (1, 64), (64, MAX_PITCH + 1), (MAX_PITCH + 1, 64)]
)
def test_what_no_copy_of_rows_takes(src_step: int, dst_step: int) -> None:
    """Destinations backwards, sources over each other, pitches beyond the driver's limit."""
    src, dst = [at * src_step for at in range(8)], [2**40 + at * dst_step for at in range(8)]
    runs = runs_of(src, dst, 16)
    judge(runs, to_2d_copies(runs))
    assert to_2d_copies(runs).number == 8


def test_one_source_for_many_destinations() -> None:
    runs = runs_of([0] * 8, range(0, 512, 64), 16)
    judge(runs, to_2d_copies(runs))
    assert to_2d_copies(runs).number == 8


def test_allocations_are_never_joined() -> None:
    """Of two tensors that touch, the rows of each are a piece; one over both is cut."""
    memory = np.zeros((2, 64, 16), dtype=np.uint8)
    halves = [torch.frombuffer(half, dtype=torch.uint8).view(64, 16) for half in memory]
    src = KVView(halves, "layer | token dim")
    first = halves[0].data_ptr()
    assert halves[1].untyped_storage().data_ptr() == first + 1024
    rows = runs_of(range(first, first + 2048, 32), range(0, 1024, 16), 16)
    assert shapes(to_2d_copies(rows)) == [(16, 64, 16, 32)]
    assert shapes(to_2d_copies(rows, src)) == [(16, 32, 16, 32)] * 2
    one = runs_of([first], [0], 2048)
    assert shapes(to_2d_copies(one, src)) == [(1024, 1, 1024, 1024)] * 2
    judge(one, to_2d_copies(one, src))


@pytest.mark.filterwarnings("ignore:Host memory was asked to be pinned")
def test_seams_between_registrations() -> None:
    before = pinned.seams()
    with pinned.allocate(4 * PAGE, largest=2 * PAGE) as memory:
        cuts = tuple(memory.address + seam for seam in memory.seams)
        assert pinned.seams() == tuple(sorted((*before, *cuts)))
        pieces = to_2d_copies(runs_of([memory.address], [0], 4 * PAGE))
        # Torch's own pinned memory, on a device that has such, is registered in one.
        assert pieces.number == 1 + len(cuts)
    del memory
    assert pinned.seams() == before


def test_nothing_is_done_run_by_run() -> None:
    src = np.random.default_rng(5).permutation(20_000)[:8000] * 64
    runs = runs_of(src.tolist(), range(0, 64 * src.size, 64), 64)
    calls: list[str] = []
    sys.setprofile(lambda frame, event, argument: calls.append(event))
    try:
        pieces = to_2d_copies(runs)
    finally:
        sys.setprofile(None)
    assert pieces.number == 8000
    assert 0 < len(calls) < 800
