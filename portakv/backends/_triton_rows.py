# SPDX-License-Identifier: Apache-2.0
"""What the Triton kernel is given for a plan: constants that a model fixes, arguments that a
request changes. Imports torch only."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from portakv.backends.rows_kernel import split_loops
from portakv.errors import Unsupported
from portakv.plan.plan import CopyPlan, Nest, Side

if TYPE_CHECKING:
    from portakv.view.index import Index
    from portakv.view.view import KVView

MAX_PLANES = 65535  # programs along y
# Vectors of one launch are counted in 32 bits, the last program's included; a larger copy is split.
MAX_VECTORS = 2**31 - 2**16
# Steps travel in tuples of these lengths, longer only where a plan needs it: a launcher is built
# for each combination of lengths, so that nearly all plans share one.
_LEAST_STEPS = {"units": 3, "outer": 4, "inner": 4}


class Tile(NamedTuple):
    """How a launch is cut: vectors that a program moves, and the warps that move them."""

    vectors: int
    warps: int


# For each vector width in bytes. A warp may be 64 wide: at least 64 vectors for each warp keep a
# whole vector to every thread.
TILES = {
    16: Tile(256, 4),
    8: Tile(512, 4),
    4: Tile(1024, 4),
    2: Tile(1024, 4),
    1: Tile(1024, 4),
}


class SideArguments(NamedTuple):
    """What a request says of one side; in the kernel each is an int64.

    Attributes:
        base: an address, or the bytes behind the table's addresses.
        table: where the table of addresses lies; 0 where none is used.
        ids: where the ids lie; 0 without ids.
        wide: 1 for int64 ids, 0 for int32.
        first: number of the unit at position 0.
        limit: units in the view.
        past: the least id whose first unit is past the end.
        units, outer, inner: byte strides, outermost first.
    """

    base: Any
    table: Any
    ids: Any
    wide: Any
    first: Any
    limit: Any
    past: Any
    units: Any
    outer: Any
    inner: Any


class SideShape:
    """What a plan fixes about one side of a nest."""

    def __init__(self, side: Side, plan: CopyPlan, step: int, nest: Nest, name: str) -> None:
        outer, inner = split_loops(nest.loops)
        self._side, self._unit = side, plan.unit
        self.per_id = step // plan.unit
        self._flat = len(side.units) == 1 and not side.units[0].table
        self.unit_entries = tuple(x.table for x in side.units)
        self.outer_entries = tuple(getattr(x, f"{name}_table") for x in outer)
        self.table = 2 if any(self.unit_entries) else 1 if any(self.outer_entries) else 0
        self.extents = tuple(x.extent for x in side.units[1:])
        self._strides = (
            _padded("units", [x.stride for x in side.units]),
            _padded("outer", [getattr(x, f"{name}_stride") for x in outer]),
            _padded("inner", [getattr(x, f"{name}_stride") for x in inner]),
        )

    @property
    def offset(self) -> int:
        """Bytes from an address to the first plane of the nest."""
        return self._side.offset

    def signature(self) -> SideArguments:
        """The types of this side's arguments."""
        steps = (tuple("i64" for _ in strides) for strides in self._strides)
        return SideArguments("i64", "i64", "i64", "i64", "i64", "i64", "i64", *steps)

    def arguments(self, view: KVView, index: Index) -> SideArguments:
        """The values of this side's arguments."""
        side, unit = self._side, self._unit
        if self.table:
            table, base = view.table.data_ptr() + 8 * side.table, side.offset
        else:
            table, base = 0, view.origins[side.table] + side.offset
        first, rest = divmod(index.offset, unit)
        limit = view.slots // unit
        if self.per_id:
            ids = index.ids_on(view.device)
            past = -(-limit // self.per_id)
            wide = ids.dtype.itemsize == 8
            return SideArguments(
                base, table, ids.data_ptr(), int(wide), first, limit, past, *self._strides
            )
        if rest and self._flat:
            # Without ids a flat side may start anywhere, also between two units.
            base += rest * (side.units[0].stride // unit)
        return SideArguments(base, table, 0, 0, first, limit, 0, *self._strides)


class NestKernel:
    """One nest: the constants of its kernel, and the arguments of its launches.

    Args:
        nest: the loop nest.
        plan: the plan that it belongs to.

    Attributes:
        constants: the kernel's constants but for the element.
        key: equal for nests that share a kernel.
        tile: how its launches are cut.
        planes: programs along y.

    Raises:
        Unsupported: more planes, or larger units, than a launch can count.
    """

    def __init__(self, nest: Nest, plan: CopyPlan) -> None:
        outer, inner = split_loops(nest.loops)
        self.src = SideShape(nest.src, plan, plan.src_step, nest, "src")
        self.dst = SideShape(nest.dst, plan, plan.dst_step, nest, "dst")
        self.tile = TILES[nest.vector]
        self.planes = prod(x.extent for x in outer)
        run = nest.run // nest.vector
        self._unit, self._row = plan.unit, prod(x.extent for x in inner) * run
        if self.planes > MAX_PLANES or self._row > MAX_VECTORS:
            raise Unsupported(
                f"A nest of {self.planes} planes with {nest.unit_bytes} bytes in a unit",
                f"the kernel takes {MAX_PLANES} planes and {MAX_VECTORS} vectors in a unit and "
                f"plane; use backend 'reference'",
            )
        self.constants: dict[str, Any] = {
            "VECTOR": nest.vector,
            "LANES": 2 if nest.vector == 16 else 1,
            "TILE": self.tile.vectors,
            "RUN": run,
            "ROW": self._row,
            "OUTER": tuple(x.extent for x in outer),
            "INNER": tuple(x.extent for x in inner),
        }
        for name, side in (("SRC", self.src), ("DST", self.dst)):
            self.constants[f"{name}_PER_ID"] = side.per_id
            self.constants[f"{name}_UNITS"] = side.extents
            self.constants[f"{name}_TABLE"] = side.table
            self.constants[f"{name}_UNIT_ENTRIES"] = side.unit_entries
            self.constants[f"{name}_OUTER_ENTRIES"] = side.outer_entries

        self.key = (*self.constants.values(), self.tile.warps, str(self.signature()))

    @property
    def element_bits(self) -> int:
        """Bits of the integer that the kernel loads and stores; 16-byte vectors are two."""
        return 8 * min(8, int(self.constants["VECTOR"]))

    def signature(self) -> dict[str, Any]:
        """The types of the kernel's arguments, constants included, in its order."""
        arguments = {
            "src": self.src.signature(),
            "dst": self.dst.signature(),
            "units": "i32",
            "start": "i64",
            "tokens": "i64",
            "status": "i64",
        }
        return {**arguments, **dict.fromkeys(self.constants, "constexpr")}

    @property
    def most_units(self) -> int:
        """The most units of one launch; launchers multiply the programs of both axes in 32 bits."""
        return min(MAX_VECTORS, MAX_VECTORS // self.planes * self.tile.vectors) // self._row or 1

    def programs(self, units: int) -> int:
        """Programs along x that move so many units."""
        return -(-units * self._row // self.tile.vectors)

    def launches(
        self, src: KVView, dst: KVView, src_index: Index, dst_index: Index, units: int, status: int
    ) -> list[tuple[int, tuple[Any, ...]]]:
        """(programs along x, arguments before the constants) of each launch."""
        mine, theirs = self.src.arguments(src, src_index), self.dst.arguments(dst, dst_index)
        unit, most = self._unit, self.most_units
        return [
            (
                self.programs(min(most, units - start)),
                (mine, theirs, min(most, units - start), start, unit, status),
            )
            for start in range(0, units, most)
        ]


def _padded(kind: str, strides: list[int]) -> tuple[int, ...]:
    return (*strides, *[0] * (_LEAST_STEPS[kind] - len(strides)))
