# SPDX-License-Identifier: Apache-2.0
"""The row kernel's text and arguments for a plan, whatever compiles and launches it.

What a model fixes becomes template parameters of ``native/cuda/rows.cuh``; what a request changes
becomes the argument ``Copy``, packed here as that file declares it.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from itertools import chain
from math import prod
from posixpath import normpath
from typing import NamedTuple

from portakv.backends._sides import Request as Request
from portakv.backends._sides import SideArguments, split_loops
from portakv.errors import Unsupported
from portakv.plan.loops import Loop
from portakv.plan.plan import CopyPlan, Move, Nest
from portakv.runtime.bounded import Bounded
from portakv.view.index import Index
from portakv.view.view import KVView

#: Threads of a block unless a device wants others.
THREADS = 128
#: Names of the entries in a kernel's text, by the vectors that one thread moves.
NAMES = {1: "portakv_rows", 2: "portakv_rows_2"}
# array lengths in `Side`
MAX_UNITS = 3
MAX_OUTER = 4
MAX_INNER = 6
MAX_PLANES = 65535  # blocks along y
# Addresses that travel in the arguments: with both sides below the classic limit of 4 KiB.
MAX_ENTRIES = 192
# `Copy` up to its sides: two requests; units, start, unit, ahead; status.
_REQUEST = struct.Struct("<12q4Iq")
_SPAN = struct.Struct("<2I")
_SPAN_AT = 12 * 8
_SIDE_BYTES = 16 * MAX_UNITS + 16 * MAX_OUTER + 8 * MAX_INNER
_TABLES_AT = _REQUEST.size + 2 * _SIDE_BYTES
# Vectors of one launch are counted in 32 bits; a larger copy is split.
MAX_VECTORS = 2**31
MAX_NUMBERS = 2**32  # of units in a view: the kernel counts them in 32 bits


class Tuning(NamedTuple):
    """How a launch of some size is cut; measured on an H200 (benchmarks/NOTES.md, section 6)."""

    payload: int  # bytes, from which on
    each: int  # vectors that one thread moves
    ahead: int  # bytes to prefetch ahead in copy order


TUNING = (
    Tuning(3 << 29, 2, 1 << 20),
    Tuning(256 << 20, 1, 2 << 20),
    Tuning(64 << 20, 1, 1 << 20),
    Tuning(8 << 20, 1, 512 << 10),
    Tuning(0, 1, 0),
)


#: Rows of a peer, at any size. A prefetch into L2 asks for them over the link a second time: 6 GB/s
#: with it, 375 without, between two H200.
PEER_TUNING = (Tuning(0, 1, 0),)


_INCLUDE = re.compile(r'^#include "(.+)"\n', re.MULTILINE)
_texts: Bounded[str, str] = Bounded("kernel texts", 8)


def kernel_text(name: str = "cuda/rows.cuh") -> str:
    """A file of ``native``, as it travels in the wheel, with what it includes of ``native`` in its
    place: compilers at run time have no folder to look in."""
    return _texts.get_or_make(name, lambda: _read(name))


def _read(name: str) -> str:
    folder, _, file = name.rpartition("/")
    text = files("portakv_native").joinpath(folder).joinpath(file).read_text()
    return _INCLUDE.sub(lambda found: kernel_text(normpath(f"{folder}/{found[1]}")), text)


class RowsKernel:
    """One nest of a plan: its instance of the kernel and how its arguments are packed.

    Args:
        threads: of a block.
        tunings: how launches are cut, by their size; None: `TUNING`. Of a peer's rows it is always
            `PEER_TUNING`.

    Attributes:
        row: vectors of one unit in one plane.
        planes: blocks along y.

    Raises:
        Unsupported: more loops than the kernel's arguments hold.
    """

    #: The file of ``native`` that its text begins with, and the names of its entries.
    file = "cuda/rows.cuh"
    names: Mapping[int, str] = NAMES

    def __init__(
        self,
        nest: Nest,
        plan: CopyPlan,
        threads: int = THREADS,
        tunings: tuple[Tuning, ...] | None = None,
    ) -> None:
        peer = PEER_TUNING if plan.src.place == "peer" else None
        self.threads = threads
        self._tunings = peer or tunings or TUNING
        self.unit = plan.unit
        self.vector = nest.vector
        outer, inner = split_loops(nest.loops)
        self.row = prod(x.extent for x in inner) * (nest.run // nest.vector)
        self.planes = prod(x.extent for x in outer)
        if (
            len(outer) > MAX_OUTER
            or len(inner) > MAX_INNER
            or max(len(nest.src.units), len(nest.dst.units)) > MAX_UNITS
            or self.planes > MAX_PLANES
            or self.row >= MAX_VECTORS
        ):
            raise Unsupported(
                f"A nest of {len(nest.loops)} loops over {self.planes} planes",
                f"the kernel takes {MAX_OUTER} loops over planes, {MAX_INNER} inside a unit and "
                f"{MAX_PLANES} planes; use backend 'reference'",
            )
        self.src, self.dst = (_SideWords(nest, plan, x, outer, inner) for x in ("src", "dst"))
        self._dst_table_at = _TABLES_AT + 8 * max(1, self.src.entries)
        self._unit_bytes = self.row * self.planes * self.vector
        #: The most units of one launch.
        self.most_units = max(1, (MAX_VECTORS - 1) // self.row)
        self.run = nest.run
        self.outer, self.inner = [[x.extent for x in loops] for loops in (outer, inner)]
        tables = max(1, self.src.entries) + max(1, self.dst.entries)
        #: The argument with everything in it that does not change.
        self.fixed = bytes(_REQUEST.size) + self.src.fixed + self.dst.fixed + bytes(8 * tables)

    @property
    def source(self) -> str:
        """The kernel's whole text; nests of one shape have one text."""
        return "\n".join(
            [
                kernel_text(self.file),
                "using namespace portakv;",
                f"typedef {_extents(self.inner)} Inner;",
                f"typedef {_extents(self.outer)} Outer;",
                f"typedef {self.src.shape} Src;",
                f"typedef {self.dst.shape} Dst;",
                "typedef CopyOf<Src, Dst> Argument;",
                *(self.entry(each, name) for each, name in self.names.items()),
            ]
        )

    def entry(self, each: int, name: str) -> str:
        """The definition of one entry, behind the types of its shape."""
        call = (
            f"copy_rows<{self.vector}, {self.run // self.vector}, {each}, Inner, Outer, Src, Dst>"
        )
        argument = "const PORTAKV_CONSTANT Argument copy"
        return f'extern "C" __global__ void {name}({argument}) {{ {call}(copy); }}\n'

    def tuned(self, units: int) -> tuple[int, int]:
        """(vectors that one thread moves, vectors to prefetch ahead) for so many units."""
        payload = units * self._unit_bytes
        for tuning in self._tunings:
            if payload >= tuning.payload:
                return tuning.each, tuning.ahead // self.vector
        raise AssertionError("the last tuning is for any payload")

    @property
    def small(self) -> int:
        """Below so many units a thread moves one vector and nothing is fetched ahead."""
        others = [x.payload for x in self._tunings if (x.each, x.ahead) != (1, 0)]
        return -(-min(others, default=0) // self._unit_bytes)

    def grid(self, units: int, each: int) -> tuple[int, int]:
        """Blocks along x and y of a launch of so many units."""
        return -(-units * self.row // (self.threads * each)), self.planes

    def pack(self, buffer: bytearray, move: Move, status: int, ahead: int) -> None:
        """Put a request's addresses and counts into the argument; `pack_span` completes it."""
        mine, theirs = self.requests(move)
        _REQUEST.pack_into(buffer, 0, *mine, *theirs, 0, 0, self.unit, ahead, status)
        if self.src.entries:
            table = self.src.table(move.src)
            buffer[_TABLES_AT : _TABLES_AT + len(table)] = table
        if self.dst.entries:
            table = self.dst.table(move.dst)
            buffer[self._dst_table_at : self._dst_table_at + len(table)] = table

    def requests(self, move: Move) -> tuple[Request, Request]:
        """What a request adds to each side; see `SideArguments.request`."""
        src, dst, src_index, dst_index, _ = move
        return self.src.request(src, src_index), self.dst.request(dst, dst_index)

    def packer(
        self, move: Move
    ) -> Callable[[bytearray, int, int, int, int, int, int], None] | None:
        """`pack` and `pack_span` of one launch with everything settled but (addresses of the source
        and of the destination, as `base.Again` has them, first id, units, vectors to prefetch
        ahead, status word); None if a side without ids is not one tensor."""
        sides = (self.src, move.src_index), (self.dst, move.dst_index)
        if self.unit != 1 or any(x.kind != "NONE" and y.ids is None for x, y in sides):
            return None
        (mine, theirs) = map(_settled, self.requests(move), sides)
        pack = _REQUEST.pack_into
        return lambda buffer, src, dst, first, units, ahead, status: pack(
            buffer, 0, *mine(src, first), *theirs(dst, first), units, 0, 1, ahead, status
        )

    def spans(self, units: int) -> list[tuple[int, int]]:
        """(first unit, units) of each launch."""
        most = self.most_units
        if 0 < units <= most:
            return [(0, units)]
        return [(start, min(most, units - start)) for start in range(0, units, most)]

    def pack_span(self, buffer: bytearray, start: int, units: int) -> None:
        """Which units this launch moves."""
        _SPAN.pack_into(buffer, _SPAN_AT, units, start)


def _settled(request: Request, side: tuple[SideArguments, Index]) -> Callable[[int, int], Request]:
    """A side's request by the address of its ids and the first of them, or of its tensor."""
    base, table, _, wide, _, limit = request
    if side[1].ids is not None:
        return lambda ids, first: (base, table, ids, wide, first, limit)
    behind = side[0].side.offset
    return lambda address, first: (address + behind, 0, 0, 0, 0, 0)


def _extents(numbers: list[int]) -> str:
    return f"Extents<{', '.join(map(str, numbers))}>"


class _SideWords(SideArguments):
    """A side of the rows kernel.

    Attributes:
        kind: also ``PLANES``, a table of ``entries`` that travels with the arguments.
        ids: whether it has ids.
        fixed: what a plan fixes, as the kernel's text declares it.
    """

    def __init__(
        self, nest: Nest, plan: CopyPlan, name: str, outer: Sequence[Loop], inner: Sequence[Loop]
    ) -> None:
        super().__init__(nest, plan, name, outer, inner)
        self.ids = self.per_id > 0
        self.entries = 0
        self.countable = MAX_NUMBERS
        loops = zip(outer, self.walks, strict=True)
        entries = 1 + sum((x.extent - 1) * table for x, (table, _) in loops)
        if getattr(plan, name).table_on_device:
            self.kind = "UNITS"  # also a single address: the host has none to put into arguments
        elif self.kind == "UNITS" and not self.side.tabled and entries <= MAX_ENTRIES:
            self.kind = "PLANES"
            self.entries = entries
        walks = [(x.table, x.stride) for x in self.side.units]
        walks += [(0, 0)] * (MAX_UNITS - len(walks)) + self.walks
        walks += [(0, 0)] * (MAX_OUTER - len(self.walks))
        numbers = [*chain(*walks), *self.strides, *[0] * (MAX_INNER - len(self.strides))]
        self.fixed = struct.pack(f"<{len(numbers)}q", *numbers)

    @property
    def shape(self) -> str:
        """Its type in the kernel's text."""
        bounded = _extents([x.extent for x in self.side.units[1:]])
        ids = str(self.ids).lower()
        return f"SideShape<{ids}, {self.per_id or 1}, {self.kind}, {self.entries}, {bounded}>"

    def table(self, view: KVView) -> bytes:
        """The entries that travel in the arguments."""
        kept: bytes | None = view.derived.get(self)
        if kept is None:
            entries = view.origins[self.side.table :][: self.entries]
            kept = view.derived[self] = struct.pack(f"<{self.entries}q", *entries)
        return kept
