# SPDX-License-Identifier: Apache-2.0
"""`PackPlan`: plan a copy that packs rows, or unpacks them, before any address or index is known.

One side is raw, in any layout; the other side is packed, so that each plane of a block is one slot.
A unit is one block. For each unit and each step of the loops there is one plane to pack or unpack.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from portakv.core.plan import Refused, pack_words
from portakv.errors import LayoutError, Unsupported
from portakv.layout.encodings import DTYPES, PACK, PackedPlane
from portakv.plan.plan import Move as Move
from portakv.plan.plan import TwoSides, WordReader, check_extents, lines_of, refusal_of
from portakv.view.form import Form, Steps


@dataclass(frozen=True, slots=True)
class PackNest(TwoSides):
    """The planes of one unit, or those of one kv if the kv differ.

    Attributes:
        src, dst: the location of the units of each side. A unit is a block.
        loops: the planes of a unit; both sides take each step together.
        plane: the geometry of a slot.
        tokens: the steps of the raw side through the tokens of a plane, outermost first.
        dim: the steps of the raw side through the bytes of a token, outermost first.
        raw_vector, packed_vector: the widest access of each side in bytes, a power of two up to 16.
    """

    plane: PackedPlane
    tokens: Steps
    dim: Steps
    raw_vector: int
    packed_vector: int


class PackPlan:
    """The plan of a copy between raw and packed rows.

    Args:
        src, dst: forms, of which exactly one is packed.
        src_step, dst_step: tokens for each entry of that side's index: ``block_size``, or 0 for a
            side without ids.
        unit: tokens of a block, or None.

    Attributes:
        unit: tokens of a block of the packed side.
        packs: True from raw to packed, False from packed to raw.
        raw, packed: the form of each side.
        nests: one `PackNest`, or one for each kv.

    Raises:
        LayoutError: extents that differ between the forms.
        Unsupported: rows that the encoding does not take, other block sizes, a part of a block, or
            another encoding than `pack`.
    """

    def __init__(
        self,
        src: Form,
        dst: Form,
        src_step: int = 0,
        dst_step: int = 0,
        unit: int | None = None,
    ) -> None:
        self.src = src
        self.dst = dst
        self.src_step = src_step
        self.dst_step = dst_step
        self.packs = not src.encoding
        self.raw, self.packed = (src, dst) if self.packs else (dst, src)
        self.unit = self.packed.block_size
        check_sides(self.raw, self.packed, "pack" if self.packs else "unpack")
        if self.encoding != PACK:
            why = "no backend carries it out; copy_blocks does, by operations of torch"
            raise Unsupported(f"A plan of the encoding {self.encoding!r}", why)
        for step in (src_step, dst_step, unit or 0):
            if step not in (0, self.unit):
                raise _in_part(f"{step} tokens for each id", self.unit)
        equal_planes = len(set(self.packed.encoding)) == 1
        try:
            words = pack_words(self.raw.address, self.packed.address, self.packs, equal_planes)
        except Refused as refused:
            raise refusal_of(refused) from None
        #: The words of the plan, which `native/core/plan.h` lists.
        self.words = words

    @cached_property
    def nests(self) -> tuple[PackNest, ...]:
        """Return one `PackNest`, or one for each kv."""
        reader = WordReader(self.words)
        reader.word()  # the unit
        reader.word()  # the direction
        return tuple(
            [
                PackNest(
                    reader.side(),
                    reader.side(),
                    reader.loops(),
                    self.packed.encoding[kv],
                    reader.steps(),
                    reader.steps(),
                    reader.word(),
                    reader.word(),
                )
                for kv in range(reader.word())
            ]
        )

    @property
    def encoding(self) -> str:
        """Return the name of the encoding, as `Capabilities.encodings` has it."""
        return str(self.packed.encoding[0].encoding)

    @property
    def token_bytes(self) -> int:
        """Return the bytes of one token's raw rows."""
        return self.raw.token_bytes

    @cached_property
    def tabled(self) -> bool:
        """Return True if a side needs its address table."""
        return any(nest.src_tabled or nest.dst_tabled for nest in self.nests)

    def split(self, move: Move) -> list[tuple[int, int, int]]:
        """Return the one section of a copy, (0, its tokens, tokens of a block).

        Raises:
            Unsupported: a part of a block.
        """
        for tokens in (move.count, move.src_index.offset, move.dst_index.offset):
            if tokens % self.unit:
                raise _in_part(f"{tokens} tokens", self.unit)
        return [(0, move.count, self.unit)]

    def __str__(self) -> str:
        verb = "pack" if self.packs else "unpack"

        def work(nest: PackNest) -> str:
            plane = nest.plane
            return (
                f"{verb} {plane.values} values, {plane.raw_bytes} B raw, in a slot of "
                f"{plane.slot_bytes} B with codes of {plane.code_bits} bits and at most "
                f"{plane.most_escapes} escapes"
            )

        head = f"{verb} ({self.encoding}) in units of one block of {self.unit} tokens"
        return "\n".join([head, *lines_of(self.nests, work)])


def _in_part(what: str, unit: int) -> Unsupported:
    """Return the error for a copy that does not consist of whole blocks."""
    return Unsupported(
        f"A copy of {what} between packed and other rows",
        f"a packed block moves only whole; ask for whole blocks of {unit} tokens, by copy_blocks",
    )


def check_sides(raw: Form, packed: Form, verb: str) -> None:
    """Raise unless the rows of a raw form are the values of an encoded form.

    ``verb``: what a copy would do with the rows, for the errors.

    Raises:
        LayoutError: extents that differ.
        Unsupported: rows that the encoding does not take, or other block sizes.
    """
    if raw.encoding:
        raise Unsupported(
            "A copy between rows packed with different parameters",
            "they are copied as they are; unpack the rows to a raw view and pack them again",
        )
    encoding = packed.encoding[0].encoding
    taken = DTYPES[encoding]
    what = f"A copy that would {verb} rows"
    if raw.opaque:
        raise Unsupported(what, f"{encoding!r} takes rows of {', '.join(taken)}, not opaque pages")
    check_extents(raw, packed, "raw rows", "packed side")
    size = packed.block_size
    if raw.paged and raw.block_size != size:
        raise Unsupported(
            f"{what} in blocks of {raw.block_size} tokens",
            f"the packed side has blocks of {size}; make the block sizes equal",
        )
    for kv, plane in enumerate(packed.encoding):
        dtype = raw.dtypes[kv] if raw.dtypes else "uint8"
        if dtype not in taken:
            raise Unsupported(
                f"{what} of {dtype}",
                f"{encoding!r} takes {', '.join(taken)} only; leave these rows raw",
            )
        values = raw.widths[kv] // int(getattr(torch, dtype).itemsize)
        if size * values != plane.values:
            raise LayoutError(
                f"Expected raw rows of kv {kv} with {plane.values // size} values for each head "
                f"like the packed side, got {values}. Declare dim alike."
            )
