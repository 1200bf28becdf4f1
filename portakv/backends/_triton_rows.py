# SPDX-License-Identifier: Apache-2.0
"""The constants and arguments of the Triton kernel for a plan. Does not import triton.

A model fixes the constants; a request changes the arguments.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple, TypeAlias

import torch

from portakv.backends._sides import SideArguments
from portakv.errors import Unsupported
from portakv.plan.plan import CopyPlan, Loop, Move, Nest
from portakv.view.index import Index
from portakv.view.view import KVView

MAX_PLANES = 65535  # programs along y
# Vectors of one launch are counted in 32 bits, the last program's included; a larger copy is split.
MAX_VECTORS = 2**31 - 2**16
# Steps travel in tuples of these lengths, longer only if a plan needs it. A launcher is built for
# each combination of lengths; nearly all plans share one.
_LEAST_STEPS = 3, 4, 4  # of units, outer and inner loops


#: A value of an argument, or its type in the kernel's signature.
Value: TypeAlias = int | str
Values: TypeAlias = tuple[Value, ...]


class Tile(NamedTuple):
    """The cut of a launch."""

    vectors: int  # that a program moves
    warps: int  # that move them


# For each vector width in bytes. A warp may be 64 wide: at least 64 vectors for each warp give
# every thread a whole vector.
TILES = {16: Tile(256, 4), 8: Tile(512, 4), **dict.fromkeys((4, 2, 1), Tile(1024, 4))}


class Side(NamedTuple):
    """The values that a request has for one side; in the kernel each is an int64.

    Attributes:
        base, table, ids, wide, first, limit: as `SideArguments.request` returns them.
        past: the least id whose first unit is past the end.
        units, outer, inner: byte strides, outermost first.
    """

    base: Value
    table: Value
    ids: Value
    wide: Value
    first: Value
    limit: Value
    past: Value
    units: Values
    outer: Values
    inner: Values


class _Side(SideArguments):
    """The values that a plan fixes for one side of a nest.

    Attributes:
        constants: the side's constants of the kernel.
        looks_up: the source of addresses: 0, one address; 1, a table by plane; 2, a table by unit.
    """

    def __init__(
        self, nest: Nest, plan: CopyPlan, name: str, outer: list[Loop], inner: list[Loop]
    ) -> None:
        super().__init__(nest, plan, name, outer, inner)
        units = self.side.units
        walks = self.walks
        if getattr(plan, name).table_on_device:
            self.tabled = True  # also a single address, which the host does not know
        self.looks_up = 2 if self.side.tabled else int(self.tabled)
        strides = [x.stride for x in units], [stride for _, stride in walks], self.strides
        units_steps, outer_steps, inner_steps = (
            (*x, *[0] * (least - len(x))) for x, least in zip(strides, _LEAST_STEPS, strict=True)
        )
        self._steps = units_steps, outer_steps, inner_steps
        self.constants: dict[str, object] = {
            f"{name}_PER_ID".upper(): self.per_id,
            f"{name}_UNITS".upper(): tuple(x.extent for x in units[1:]),
            f"{name}_TABLE".upper(): self.looks_up,
            f"{name}_UNIT_ENTRIES".upper(): tuple(x.table for x in units),
            f"{name}_OUTER_ENTRIES".upper(): tuple(table for table, _ in walks),
        }

    def signature(self) -> Side:
        """Return the types of this side's arguments."""
        i64 = "i64"
        units, outer, inner = (tuple(i64 for _ in steps) for steps in self._steps)
        return Side(i64, i64, i64, i64, i64, i64, i64, units, outer, inner)

    def arguments(self, view: KVView, index: Index) -> Side:
        """Return the values of this side's arguments."""
        base, table, ids, wide, first, limit = self.request(view, index)
        past = -(-limit // self.per_id) if self.per_id else 0
        return Side(base, table, ids, int(wide), first, limit, past, *self._steps)


class NestKernel:
    """One nest of a plan: the constants of its kernel, and the arguments of its launches.

    Attributes:
        constants: the kernel's constants, without the element.
        key: equal for nests that share a kernel.
        tile, planes: the cut of its launches, and their programs along y.

    Raises:
        Unsupported: more planes, or larger units, than a launch can count.
    """

    def __init__(self, nest: Nest, plan: CopyPlan) -> None:
        # Blocks walk along y through the planes.
        outer = [x for x in nest.loops if x.tabled or x.over_planes]
        inner = [x for x in nest.loops if x not in outer]
        self.src, self.dst = (_Side(nest, plan, x, outer, inner) for x in ("src", "dst"))
        self.tile = TILES[nest.vector]
        self.planes = prod(x.extent for x in outer)
        run = nest.run // nest.vector
        self._unit = plan.unit
        self._vector = nest.vector
        self._row = prod(x.extent for x in inner) * run
        if self.planes > MAX_PLANES or self._row > MAX_VECTORS:
            raise Unsupported(
                f"A nest of {self.planes} planes with {nest.unit_bytes} bytes in a unit",
                f"the kernel takes {MAX_PLANES} planes and {MAX_VECTORS} vectors in a unit and "
                f"plane; use backend 'reference'",
            )
        self.constants: dict[str, object] = {
            "VECTOR": nest.vector,
            "LANES": 2 if nest.vector == 16 else 1,
            "TILE": self.tile.vectors,
            "RUN": run,
            "ROW": self._row,
            "OUTER": tuple(x.extent for x in outer),
            "INNER": tuple(x.extent for x in inner),
            **self.src.constants,
            **self.dst.constants,
        }
        self.key = (*self.constants.values(), self.tile.warps, str(self.signature()))
        # The most units of one launch: launchers multiply the programs of both axes in 32 bits.
        vectors = min(MAX_VECTORS, MAX_VECTORS // self.planes * self.tile.vectors)
        self._most_units = vectors // self._row or 1

    @property
    def element_bits(self) -> int:
        """The bits of the integer that the kernel loads and stores; 16-byte vectors are two."""
        return 8 * min(8, self._vector)

    def signature(self) -> dict[str, object]:
        """Return the types of the kernel's arguments, constants included, in its order."""
        sides = {"src": self.src.signature(), "dst": self.dst.signature()}
        numbers = {"units": "i32", "start": "i64", "tokens": "i64", "status": "i64"}
        return {**sides, **numbers, **dict.fromkeys(self.constants, "constexpr")}

    def programs(self, units: int) -> int:
        """Return the programs along x that move so many units."""
        return -(-units * self._row // self.tile.vectors)

    def launches(
        self, move: Move, status: torch.Tensor | None
    ) -> list[tuple[int, tuple[object, ...]]]:
        """Return (programs along x, arguments before the constants) of each launch."""
        src = self.src.arguments(move.src, move.src_index)
        dst = self.dst.arguments(move.dst, move.dst_index)
        word = 0 if status is None else status.data_ptr()
        unit = self._unit
        most = self._most_units
        units = move.count // unit
        if units <= most:
            return [(self.programs(units), (src, dst, units, 0, unit, word))]
        spans = [(start, min(most, units - start)) for start in range(0, units, most)]
        return [(self.programs(n), (src, dst, n, start, unit, word)) for start, n in spans]
