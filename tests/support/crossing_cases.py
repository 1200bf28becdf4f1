# SPDX-License-Identifier: Apache-2.0
"""Runs and pieces for tests of crossings: drawn, expanded byte by byte, and the buffers that they
cross between."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from hypothesis import strategies as st

from portakv import CopyPlan, Index, KVView
from portakv.interconnect.link import ALL, Pieces, pieces_of
from portakv.plan.plan import Int64, Move, Runs


def runs_of(src: Sequence[int], dst: Sequence[int], nbytes: int | Sequence[int]) -> Runs:
    """Return runs of plain numbers, in the order of the source."""
    sizes = [nbytes] * len(src) if isinstance(nbytes, int) else nbytes
    columns = [np.array(each, dtype=np.int64) for each in (src, dst, sizes)]
    order = np.lexsort((columns[1], columns[0]))
    return Runs(*(column[order] for column in columns))


#: Pieces of runs are made at addresses that are higher by so much.
SHIFT = 1 << 20


def pieces_of_runs(runs: Runs, below: int = ALL) -> Pieces:
    """Return runs as few pieces: those of a plan whose tokens are the largest parts of all runs."""
    firsts = [int(at.min()) if at.size else 0 for at in (runs.src, runs.dst)]
    offsets = [at - first for at, first in zip((runs.src, runs.dst), firsts, strict=True)]
    width = int(np.gcd.reduce(np.concatenate([*offsets, runs.nbytes]))) or 1
    sizes = runs.nbytes // width
    within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    views = []
    indices = []
    for first, offset in zip(firsts, offsets, strict=True):
        ids = np.repeat(offset // width, sizes) + within
        tokens = int(ids.max(initial=0)) + 1
        views.append(
            KVView.at(
                first + SHIFT,
                "token dim",
                shape=(tokens, width),
                dtype=torch.uint8,
                device="cpu",
                pinned=True,
            )
        )
        indices.append(Index(ids))
    move = Move(views[0], views[1], indices[0], indices[1], within.size)
    plan = CopyPlan(views[0].form, views[1].form, 1, 1)
    pieces = pieces_of(plan, move, below, merged=True)
    return pieces._replace(dst=pieces.dst - SHIFT, src=pieces.src - SHIFT)


def bytes_of_runs(runs: Runs) -> Int64:
    """Return the destination and the source of each byte, ``[2, bytes]``, in order of the first."""
    of_run = np.repeat(np.arange(runs.nbytes.size), runs.nbytes)
    within = np.arange(of_run.size) - np.repeat(np.cumsum(runs.nbytes) - runs.nbytes, runs.nbytes)
    ends = np.stack([runs.dst[of_run] + within, runs.src[of_run] + within])
    return np.asarray(ends[:, np.lexsort(ends[::-1])])


def bytes_of_pieces(pieces: Pieces) -> Int64:
    """Return the same for pieces, however they are folded."""
    of_piece = np.repeat(np.arange(pieces.number), pieces.height)
    row = np.arange(of_piece.size) - np.repeat(
        np.cumsum(pieces.height) - pieces.height, pieces.height
    )
    src, dst = (
        getattr(pieces, side)[of_piece] + row * getattr(pieces, f"{side}_pitch")[of_piece]
        for side in ("src", "dst")
    )
    return bytes_of_runs(Runs(src, dst, pieces.width[of_piece]))


class Ends:
    """Two buffers of bytes, and the expected result of a copy of pieces in the second."""

    def __init__(self, src: torch.Tensor, dst: torch.Tensor) -> None:
        self.src = src
        self.dst = dst
        self._source = src.cpu().numpy().copy()
        self._target = dst.cpu().numpy().copy()

    def at(self, pieces: Pieces) -> Pieces:
        """Return pieces in these buffers; the addresses of ``pieces`` count from 0."""
        src = self.src.data_ptr()
        dst = self.dst.data_ptr()
        return pieces._replace(dst=pieces.dst + dst, src=pieces.src + src)

    def judge(self, pieces: Pieces) -> None:
        """Check that exactly the pieces' bytes were copied; then reset the second buffer."""
        targets, sources = bytes_of_pieces(pieces)
        expected = self._target.copy()
        expected[targets] = self._source[sources]
        assert (self.dst.cpu().numpy() == expected).all()
        self.dst.copy_(torch.from_numpy(self._target))


@st.composite
def drawn_runs(draw: st.DrawFn) -> Runs:
    """Return runs of a loop nest with regular and irregular loops, some left out, at disjoint
    places."""
    extents = draw(st.lists(st.integers(1, 7), min_size=1, max_size=3))
    src = np.zeros(1, dtype=np.int64)
    dst = np.zeros(1, dtype=np.int64)
    spans = [draw(st.integers(1, 24)), draw(st.integers(1, 24))]
    for extent in extents:
        moved = []
        for side, base in enumerate((src, dst)):
            steps = _places(draw, extent, spans[side])
            spans[side] = int(steps.max()) + spans[side]
            moved.append((base[:, None] + steps).reshape(-1))
        src, dst = moved
    chosen = draw(st.lists(st.booleans(), min_size=src.size, max_size=src.size))
    mask = np.array(chosen) | draw(st.booleans())
    width = draw(st.integers(1, 3))
    uneven = draw(st.booleans())
    sizes = [draw(st.integers(1, width)) if uneven else width for _ in range(int(mask.sum()))]
    return runs_of((3 * src[mask]).tolist(), (3 * dst[mask]).tolist(), sizes)


def _places(draw: st.DrawFn, extent: int, apart: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Return ``extent`` distinct multiples of ``apart``, in any order or at one distance."""
    if draw(st.booleans()):
        return np.arange(extent, dtype=np.int64) * apart * draw(st.integers(1, 3))
    order = draw(st.permutations(range(2 * extent)))
    return np.array(order[:extent], dtype=np.int64) * apart
