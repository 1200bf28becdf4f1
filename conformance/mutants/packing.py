# SPDX-License-Identifier: Apache-2.0
"""Mutants that pack or unpack wrongly: escapes, tables, codes, flags and reports."""

from __future__ import annotations

import numpy as np

from portakv.layout.encodings import PackedPlane
from portakv_conformance.mutants.base import Int64, Values
from portakv_conformance.mutants.base_pack import PackCall, PackRows


@PackRows.mutate("escapes")
def EscapesReversed(right: PackRows, exponents: Values) -> Values:
    """The escapes of a plane are written last to first."""
    return right.escapes(exponents)[::-1]


@PackRows.mutate("escapes")
def LastEscapeLost(right: PackRows, exponents: Values) -> Values:
    """The last escape of a plane is not written."""
    return right.escapes(exponents)[:-1]


@PackRows.mutate("stored")
def FirstEscapeTwice(right: PackRows, slot: Values, plane: PackedPlane, count: int) -> Values:
    """The rank of an escape is read one too low, so that the first one is read twice."""
    stored = right.stored(slot, plane, count)
    return np.concatenate([stored[:1], stored[:-1]])


@PackRows.mutate("places")
def SignOfZeroLost(right: PackRows, values: Values) -> Values:
    """The sign is that of a comparison with zero, so negative zero becomes zero."""
    return np.where(values == 0x8000, 0, right.places(values))


@PackRows.mutate("places")
def NanQuieted(right: PackRows, values: Values) -> Values:
    """A NaN passes through arithmetic, which sets the top bit of its mantissa."""
    nan = (values & 0x7F80 == 0x7F80) & (values & 0x7F != 0)
    return np.where(nan, right.places(values) | 0x40, right.places(values))


@PackRows.mutate("exponent_table")
def TableOfAnotherBlock(
    right: PackRows, exponents: Values, plane: PackedPlane, call: PackCall
) -> Values:
    """The first plane of a launch makes the table, and all other planes use it for their codes."""
    table = right.exponent_table(exponents, plane, call)
    return np.asarray(right.state.setdefault(id(call.overflow), table))


@PackRows.mutate("order")
def TiesByLowerExponent(right: PackRows, counts: Int64) -> Int64:
    """Of two equally frequent exponents the smaller one comes first in the table."""
    return np.argsort(-counts * 256 + np.arange(256))


@PackRows.mutate("counted")
def EveryValueCounted(right: PackRows, exponents: Values, plane: PackedPlane) -> Values:
    """The table of a large plane counts all of its values, not one in eight."""
    return exponents


@PackRows.mutate("counted")
def SampleInOneColumn(right: PackRows, exponents: Values, plane: PackedPlane) -> Values:
    """The table of a large plane counts the first value of each vector, always in one place."""
    return right.counted(exponents, plane) if plane.sample == 1 else exponents[:: plane.sample]


@PackRows.mutate("join")
def HighHalfFirst(right: PackRows, codes: Values, code_bits: int) -> Values:
    """The code of an even value is in the high half of its byte."""
    pairs = codes.reshape(-1, 2)[:, ::-1].reshape(-1) if code_bits == 4 else codes
    return right.join(pairs, code_bits)


@PackRows.mutate("before_segments")
def SegmentCountsItself(right: PackRows, escaped: Int64, plane: PackedPlane) -> list[int]:
    """The number of escapes before a segment includes those of the segment."""
    return [*right.before_segments(escaped, plane)[1:], len(escaped)]


@PackRows.mutate("fits")
def LastPlaceUnused(right: PackRows, escapes: int, plane: PackedPlane) -> bool:
    """A plane with exactly as many escapes as fit is flagged."""
    return escapes < plane.most_escapes


@PackRows.mutate("fits")
def OneTooMany(right: PackRows, escapes: int, plane: PackedPlane) -> bool:
    """A plane with one escape more than fits is packed without its last one."""
    return escapes <= plane.most_escapes + 1


@PackRows.mutate("blank")
def StaleSlots(right: PackRows, plane: PackedPlane) -> Values:
    """The bytes of a slot after its escapes are not cleared."""
    return np.full(plane.slot_bytes, 0xA5, dtype=np.uint8)


@PackRows.mutate("report")
def OverflowUnreported(right: PackRows, block: int, call: PackCall) -> None:
    """The slot of a plane that does not fit is flagged, and its block is not reported."""


@PackRows.mutate("report")
def NextBlockReported(right: PackRows, block: int, call: PackCall) -> None:
    """The block after the one that does not fit is reported."""
    right.report((block + 1) % len(call.overflow), call)


@PackRows.mutate("flagged")
def FlagIgnored(right: PackRows, slot: Values, plane: PackedPlane) -> bool:
    """A slot is unpacked although it has the flag of a plane that did not fit."""
    return False
