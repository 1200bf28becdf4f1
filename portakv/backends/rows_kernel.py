# SPDX-License-Identifier: Apache-2.0
"""The row kernel's source text for a plan and the cut of its launches, for every compiler.

Values that a model fixes become template parameters of ``native/cuda/rows.cuh``. The core packs the
values that a request changes, and launches (`native/core/rows.h`).
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Mapping, Sequence
from importlib.resources import files
from posixpath import normpath
from typing import NamedTuple

from portakv.core.plan import Refused
from portakv.core.rows import LOOPS, RowsShape, SideShape, describe
from portakv.errors import Unsupported
from portakv.plan.packing import PackPlan
from portakv.plan.plan import CopyPlan

#: Threads of a block, unless a device needs another number.
THREADS = 128
#: Names of the entries in a kernel's text, by the vectors that one thread moves.
NAMES = {1: "portakv_rows", 2: "portakv_rows_2"}
#: Addresses that travel in the arguments: with both sides below the classic limit of 4 KiB.
MAX_ENTRIES = 192
#: Vectors of one launch are counted in 32 bits; a larger copy is split.
MAX_VECTORS = 2**31
#: How a side finds the address of a plane, as ``native/cuda/rows.cuh`` names it.
LOOKUPS = ("NONE", "PLANES", "UNITS")


class Tuning(NamedTuple):
    """The cut of a launch of some size; measured on H200s (benchmarks/notes/copies.md)."""

    payload: int  # the least bytes that the tuning is for
    each: int  # vectors that one thread moves
    ahead: int  # bytes to prefetch ahead in copy order


TUNING = (
    Tuning(3 << 29, 2, 1 << 20),
    Tuning(256 << 20, 1, 2 << 20),
    Tuning(64 << 20, 1, 1 << 20),
    Tuning(4 << 20, 1, 512 << 10),
    Tuning(0, 1, 0),
)


#: Rows of a peer, at any size. A prefetch into L2 transfers them over the link a second time:
#: 6 GB/s with it, 375 without, between two H200.
PEER_TUNING = (Tuning(0, 1, 0),)


_INCLUDE = re.compile(r'^#include "(.+)"\n', re.MULTILINE)


def kernel_text(name: str = "cuda/rows.cuh") -> str:
    """Return a file of ``native``, as the wheel contains it, with its includes of ``native``
    expanded.

    Compilers at run time have no folder to look in.
    """
    folder, _, file = name.rpartition("/")
    text = files("portakv_native").joinpath(folder).joinpath(file).read_text()
    return _INCLUDE.sub(lambda include: kernel_text(normpath(f"{folder}/{include[1]}")), text)


class RowsKernel:
    """One nest of a plan: its instance of the kernel, and the cut of its launches.

    Args:
        nest: the number of the nest.
        threads: of a block.
        tunings: the cuts of launches, by their size; None: `TUNING`. A peer's rows always use
            `PEER_TUNING`.

    Attributes:
        words: what the plan fixes, as the core describes it.
        shape: the same.
        most_units: the most units of one launch.

    Raises:
        Unsupported: more loops than the kernel's arguments hold.
    """

    #: The file of ``native`` that its text begins with, and the names of its entries.
    file = "cuda/rows.cuh"
    names: Mapping[int, str] = NAMES
    #: The planes follow the source's order, not the destination's.
    by_source = False

    def __init__(
        self,
        plan: CopyPlan,
        nest: int = 0,
        threads: int = THREADS,
        tunings: tuple[Tuning, ...] | None = None,
    ) -> None:
        peer = PEER_TUNING if plan.src.place == "peer" else None
        self.threads = threads
        self.tunings = peer or tunings or TUNING
        try:
            self.words = describe(plan.words, nest, options_of(plan, self.by_source))
        except Refused as refused:
            if refused.code != LOOPS:
                raise
            loops, planes = refused.values[:2]
            raise Unsupported(
                f"A nest of {loops} loops over {planes} planes",
                "the kernel takes 4 loops over planes, 6 inside a unit and 65535 planes; use "
                "backend 'reference'",
            ) from None
        self.shape = RowsShape.of(self.words)
        self.most_units = max(1, (MAX_VECTORS - 1) // self.shape.lanes)

    @property
    def source(self) -> str:
        """The kernel's whole text; nests of one shape have one text."""
        return "\n".join(
            [
                kernel_text(self.file),
                "using namespace portakv;",
                f"typedef {extents(self.shape.inner)} Inner;",
                f"typedef {extents(self.shape.outer)} Outer;",
                f"typedef {side_text(self.shape.src)} Src;",
                f"typedef {side_text(self.shape.dst)} Dst;",
                "typedef CarryingOf<Src, Dst> Argument;",
                *(self.entry(each, name) for each, name in self.names.items()),
            ]
        )

    def entry(self, each: int, name: str) -> str:
        """Return the definition of one entry, which follows the types of its shape."""
        sizes = self.shape.vector, self.shape.run, self.shape.lanes, each
        call = f"copy_rows<{', '.join(map(str, sizes))}, Inner, Outer, Src, Dst>"
        argument = "const PORTAKV_CONSTANT Argument copy"
        return f'extern "C" __global__ void {name}({argument}) {{ {call}(copy); }}\n'

    @property
    def cut(self) -> list[int]:
        """The words by which the core cuts launches; `portakv_kernels_add` has their order."""
        tunings = [number for tuning in self.tunings for number in tuning]
        return [self.threads, self.most_units, 0, len(self.tunings), *tunings]


def kernels_of(
    plan: CopyPlan, threads: int = THREADS, tunings: tuple[Tuning, ...] | None = None
) -> list[RowsKernel]:
    """Return the kernel of each nest of a plan; raise `Unsupported` as `RowsKernel` does."""
    return [RowsKernel(plan, nest, threads, tunings) for nest in range(plan.words[1])]


def options_of(plan: CopyPlan | PackPlan, by_source: bool = False) -> array[int]:
    """Return the words of `RowsOptions` in ``native/core/rows.h``."""
    on_device = plan.src.table_on_device, plan.dst.table_on_device
    return array("q", [plan.src_step, plan.dst_step, *on_device, by_source])


def extents(numbers: Sequence[int]) -> str:
    """Return loops of these extents as a type in a kernel's text."""
    return f"Extents<{', '.join(map(str, numbers))}>"


def side_text(side: SideShape) -> str:
    """Return the type of a side in a kernel's text."""
    ids = str(side.ids).lower()
    lookup = LOOKUPS[side.lookup]
    return f"SideShape<{ids}, {side.per_id}, {lookup}, {side.entries}, {extents(side.bounded)}>"
