# SPDX-License-Identifier: Apache-2.0
"""Mutants that move the wrong bytes of a row: vector width, tails, padding, and what bytes mean."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from portakv.plan.loops import widest_vector
from portakv.plan.plan import CopyPlan, Nest
from portakv_conformance.mutants.base import Call, HostRows, Runs, store


class _OfAnotherLength(HostRows):
    def move(self, runs: Runs, call: Call) -> None:
        super().move(replace(runs, nbytes=self.length(runs) or runs.nbytes), call)

    def length(self, runs: Runs) -> int:
        """How many bytes of each run are moved; 0: all of them."""
        raise NotImplementedError


class CutToEight(_OfAnotherLength):
    """Rows are moved in units of 8 bytes; what is left of a row of 132 bytes is not moved."""

    def length(self, runs: Runs) -> int:
        return runs.nbytes // 8 * 8


class RoundedToEight(_OfAnotherLength):
    """The size of a row is rounded up to 8 bytes, so the bytes behind it are overwritten."""

    def length(self, runs: Runs) -> int:
        return -(-runs.nbytes // 8) * 8 if runs.nbytes > 8 else 0


class LastVectorDropped(_OfAnotherLength):
    """Rows are moved four vectors at a time; those left over at the end are not."""

    def length(self, runs: Runs) -> int:
        return runs.nbytes // (4 * runs.vector) * 4 * runs.vector


class ThreadsClipped(_OfAnotherLength):
    """One thread for each vector of a row, and never more than 1024: the others are not moved."""

    def length(self, runs: Runs) -> int:
        return min(runs.nbytes, 1024 * runs.vector)


class TailOverrun(HostRows):
    """The last thread of the last row has no bounds check and stores one vector too many."""

    def move(self, runs: Runs, call: Call) -> None:
        super().move(runs, call)
        if len(runs.dst):
            store(call.dst, runs.dst[-1:] + runs.nbytes, self.load(runs, call)[-1:, -1:])


class VectorOfRowAlone(HostRows):
    """The vector is chosen from the bytes of a row, whatever addresses and strides allow."""

    def vector(self, nest: Nest, plan: CopyPlan) -> int:
        return widest_vector([nest.run])


class VectorWithoutBase(HostRows):
    """The vector is chosen from row and strides; that the tensors begin unaligned is not seen."""

    def vector(self, nest: Nest, plan: CopyPlan) -> int:
        return widest_vector([nest.run, nest.src.offset, nest.dst.offset, *_strides(nest)])


class VectorWithoutStrides(HostRows):
    """The vector is chosen from row and base address; the first row is aligned, later ones not."""

    def vector(self, nest: Nest, plan: CopyPlan) -> int:
        bases = [nest.src.offset, nest.dst.offset, plan.src.alignment, plan.dst.alignment]
        return widest_vector([nest.run, *bases])


class VectorWithoutStart(HostRows):
    """The vector does not heed where the values begin behind the keys in one row."""

    def vector(self, nest: Nest, plan: CopyPlan) -> int:
        return widest_vector([nest.run, plan.src.alignment, plan.dst.alignment, *_strides(nest)])


def _strides(nest: Nest) -> list[int]:
    loops = [x for loop in nest.loops for x in (loop.src_stride, loop.dst_stride)]
    return [step.stride for step in nest.src.units + nest.dst.units] + loops


class PaddingOverwritten(HostRows):
    """Pages are written whole: the padding between their rows is filled with zeros."""

    def pieces(self, call: Call) -> list[Runs]:
        found = super().pieces(call)
        for nest, runs in zip(call.plan.nests, found, strict=True):
            padding = nest.dst.units[-1].stride - nest.run
            # Only where all that lies between two rows is padding.
            if padding > 0 and len(found) == 1 and not any(x.dst_stride for x in nest.loops):
                zeros = np.zeros((len(runs.dst), padding), dtype=np.uint8)
                store(call.dst, runs.dst + nest.run, zeros)
        return found


class NansCanonical(HostRows):
    """Rows pass through float registers, which make every NaN of 32 bits the same one."""

    def load(self, runs: Runs, call: Call) -> npt.NDArray[Any]:
        return _as_floats(super().load(runs, call), np.isnan, 0x7FC00000)


class DenormalsFlushed(HostRows):
    """Rows pass through float registers that flush denormal numbers of 32 bits to zero."""

    def load(self, runs: Runs, call: Call) -> npt.NDArray[Any]:
        tiny = float(np.finfo(np.float32).tiny)
        return _as_floats(super().load(runs, call), lambda x: np.abs(x) < tiny, 0)


def _as_floats(values: npt.NDArray[Any], hit: Any, becomes: int) -> npt.NDArray[Any]:
    if values.dtype.itemsize % 4 == 0:
        words = values.view(np.uint32)
        with np.errstate(all="ignore"):
            words[hit(words.view(np.float32))] = becomes
    return values
