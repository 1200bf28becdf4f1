# SPDX-License-Identifier: Apache-2.0
"""Mutants that move the wrong bytes of a row: vector width, tails, padding, and what bytes mean."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from portakv.plan.plan import CopyPlan, Nest
from portakv.view.form import widest_vector
from portakv_conformance.mutants.base import Call, HostRows, Int64, Runs, Values, store

#: Bytes that memory reads and writes together.
_SECTOR = 32


@HostRows.mutate("length")
def CutToEight(right: HostRows, run: int, vector: int) -> int:
    """Rows are moved in units of 8 bytes; what is left of a row of 132 bytes is not moved."""
    return run // 8 * 8 or run


@HostRows.mutate("length")
def RoundedToEight(right: HostRows, run: int, vector: int) -> int:
    """The size of a row is rounded up to 8 bytes, so the bytes after it are overwritten."""
    return -(-run // 8) * 8 if run > 8 else run


@HostRows.mutate("length")
def LastVectorDropped(right: HostRows, run: int, vector: int) -> int:
    """Rows are moved four vectors at a time; those left over at the end are not."""
    return run // (4 * vector) * 4 * vector or run


@HostRows.mutate("length")
def ThreadsClipped(right: HostRows, run: int, vector: int) -> int:
    """One thread for each vector of a row, and never more than 1024: the others are not moved."""
    return min(run, 1024 * vector)


def _whole_sectors_only(right: HostRows, runs: Runs, call: Call, begins: Int64) -> None:
    """Move rows by one thread for each place of a row's sectors, if a quarter more places than
    vectors suffices; a vector has the place at which it lies in a sector, as ``begins`` says."""
    row = runs.nbytes // runs.vector
    each = _SECTOR // runs.vector
    places = -(-row // each) * each
    if places == row or 4 * places > 5 * row:
        right.move(runs, call)
        return
    first = begins % _SECTOR // runs.vector
    for place in np.unique(first).tolist():
        moved = min(row, places - place)
        right.move(replace(runs.at(first == place), nbytes=moved * runs.vector), call)


@HostRows.mutate("move")
def PlacesFromASectorOn(right: HostRows, runs: Runs, call: Call) -> None:
    """Rows at ids of the destination have places for whole sectors alone, so rows of words that
    begin inside a sector lose their last vectors."""
    if call.dst_index.ids is None or runs.vector == 1:
        right.move(runs, call)
    else:
        _whole_sectors_only(right, runs, call, runs.dst)


@HostRows.mutate("move")
def SourcePlacesFromASectorOn(right: HostRows, runs: Runs, call: Call) -> None:
    """Rows at ids of the source have places for whole sectors alone, so rows of words that begin
    inside a sector lose their last vectors."""
    if call.src_index.ids is None or runs.vector == 1:
        right.move(runs, call)
    else:
        _whole_sectors_only(right, runs, call, runs.src)


@HostRows.mutate("move")
def TailOverrun(right: HostRows, runs: Runs, call: Call) -> None:
    """The last thread of the last row has no bounds check and stores one vector too many."""
    right.move(runs, call)
    if len(runs.dst):
        store(call.dst, runs.dst[-1:] + runs.nbytes, right.load(runs, call)[-1:, -1:])


@HostRows.mutate("vector")
def VectorOfRowAlone(right: HostRows, nest: Nest, plan: CopyPlan) -> int:
    """The vector is chosen from the bytes of a row, whatever addresses and strides allow."""
    return widest_vector([nest.run])


@HostRows.mutate("vector")
def VectorWithoutBase(right: HostRows, nest: Nest, plan: CopyPlan) -> int:
    """The vector is chosen from row and strides; that the tensors begin unaligned is not seen."""
    return widest_vector([nest.run, nest.src.offset, nest.dst.offset, *_strides(nest)])


@HostRows.mutate("vector")
def VectorWithoutStrides(right: HostRows, nest: Nest, plan: CopyPlan) -> int:
    """The vector is chosen from row and base address; the first row is aligned, later ones not."""
    bases = [nest.src.offset, nest.dst.offset, plan.src.alignment, plan.dst.alignment]
    return widest_vector([nest.run, *bases])


@HostRows.mutate("vector")
def VectorWithoutStart(right: HostRows, nest: Nest, plan: CopyPlan) -> int:
    """The vector ignores the offset at which the values follow the keys in one row."""
    return widest_vector([nest.run, plan.src.alignment, plan.dst.alignment, *_strides(nest)])


def _strides(nest: Nest) -> list[int]:
    loops = [x for loop in nest.loops for x in (loop.src_stride, loop.dst_stride)]
    return [step.stride for step in nest.src.units + nest.dst.units] + loops


@HostRows.mutate("pieces")
def PaddingOverwritten(right: HostRows, call: Call) -> list[Runs]:
    """Pages are written whole: the padding between their rows is filled with zeros."""
    pieces = right.pieces(call)
    for nest, runs in zip(call.plan.nests, pieces, strict=True):
        padding = nest.dst.units[-1].stride - nest.run
        # Only where all that lies between two rows is padding.
        if padding > 0 and len(pieces) == 1 and not any(x.dst_stride for x in nest.loops):
            store(call.dst, runs.dst + nest.run, np.zeros((len(runs.dst), padding), np.uint8))
    return pieces


@HostRows.mutate("load")
def NansCanonical(right: HostRows, runs: Runs, call: Call) -> Values:
    """Rows pass through float registers, which make every NaN of 32 bits the same one."""
    return _as_floats(right.load(runs, call), np.isnan, 0x7FC00000)


@HostRows.mutate("load")
def DenormalsFlushed(right: HostRows, runs: Runs, call: Call) -> Values:
    """Rows pass through float registers that flush denormal numbers of 32 bits to zero."""
    tiny = float(np.finfo(np.float32).tiny)
    return _as_floats(right.load(runs, call), lambda x: np.abs(x) < tiny, 0)


def _as_floats(values: Values, hit: Any, becomes: int) -> Values:
    if values.dtype.itemsize % 4 == 0:
        words = values.view(np.uint32)
        with np.errstate(all="ignore"):
            words[hit(words.view(np.float32))] = becomes
    return values
