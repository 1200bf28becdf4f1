# SPDX-License-Identifier: Apache-2.0
"""Plan the copies of a pull of weights: cells in pieces, and pieces in batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate, groupby
from math import prod
from typing import NamedTuple

from portakv.migrate.checksum import unit_of
from portakv.migrate.checksum_kernel import CachedTables
from portakv.migrate.messages import Dims
from portakv.migrate.parameters import Box, Cell, Item
from portakv.migrate.weight_tiles import Tiles

_CELLS = 4096  # the most cells of a batch


class Piece(NamedTuple):
    """A part of a cell, which is copied with one batch. ``number``: of the cell in the plan."""

    number: int
    cell: Cell
    unit: int  # bytes of a word of the cell's checksum
    copied: bool  # False: a tied name, whose memory is copied by another name
    of_cell: bool  # it is all of its cell
    of_tensor: bool  # it is all of the reader's tensor


class TiledPieces(NamedTuple):
    """Copies of pieces that lie where they lay at the first pull.

    Attributes:
        read_at: the addresses of the sources of all pieces that are copied.
        tiles: the copies, of each device.
        names: the reader's tensors that they write.
        rest: the pieces that they leave out.
    """

    read_at: list[int]
    tiles: list[Tiles]
    names: list[str]
    rest: list[Piece]


@dataclass
class Batch:
    """Pieces of about equally many bytes.

    ``tables``: of the kernels that compute its checksums, made by the first pull.
    ``tiled``: copies of some of its pieces from mapped memory, made by the first pull too.
    """

    pieces: list[Piece]
    nbytes: int
    tables: CachedTables = field(default_factory=dict)
    tiled: TiledPieces | None = None


@dataclass(eq=False)  # a plan is a key of what an owner's publication caches
class Plan:
    """The copies of a pull, for tensors and owners of one description.

    ``numbers``: of the cells of each owner.
    """

    cells: list[Cell]
    batches: list[Batch]
    numbers: list[list[int]]
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.nbytes = sum(batch.nbytes for batch in self.batches)


def plan_of(
    cells: list[Cell],
    described: Mapping[str, Item],
    itemsizes: Mapping[str, int],
    most: int,
    owners: int,
) -> Plan:
    """Return the batches of cells, each of about ``most`` bytes. A tied tensor is copied once."""
    pieces = list[Piece]()
    for number, cell in enumerate(cells):
        size = itemsizes[cell.name]
        unit = unit_of(size, cell.box.offset, cell.box.extents)
        item = described[cell.name]
        copied = item.tie == cell.name
        for x in split(cell, max(1, most // size)):
            all_of_it = x.box.extents == item.local
            pieces.append(Piece(number, x, unit, copied, x is cell, all_of_it))
    sizes = [prod(x.cell.box.extents) * itemsizes[x.cell.name] for x in pieces]
    ends = accumulate(max(nbytes, most // _CELLS) for nbytes in sizes)
    batches = list[Batch]()
    for _, group in groupby(zip(ends, sizes, pieces, strict=True), lambda each: each[0] // most):
        some = [*group]
        nbytes = sum(nbytes for _, nbytes, piece in some if piece.copied)
        batches.append(Batch([piece for *_, piece in some], nbytes))
    numbers = [list[int]() for _ in range(owners)]
    for number, cell in enumerate(cells):
        numbers[cell.owner].append(number)
    return Plan(cells, batches, numbers)


def split(cell: Cell, most: int) -> Iterator[Cell]:
    """Yield a cell in pieces of about ``most`` elements, so that a pull can end in time."""
    offset, start, extents = cell.box
    total = prod(extents)
    axis = next((axis for axis, extent in enumerate(extents) if extent > 1), None)
    if total <= most or axis is None:
        yield cell
        return
    step = max(1, most * extents[axis] // total)
    if axis == len(extents) - 1:
        step = max(4, step // 4 * 4)  # checksums then use words of four bytes
    for at in range(0, extents[axis], step):
        size = min(step, extents[axis] - at)
        part = (*extents[:axis], size, *extents[axis + 1 :])
        box = Box(_shifted(offset, axis, at), _shifted(start, axis, at), part)
        yield from split(cell._replace(box=box, src=_shifted(cell.src, axis, at)), most)


def _shifted(start: Dims, axis: int, by: int) -> Dims:
    """Return the start of a box that is shifted along an axis."""
    return (*start[:axis], start[axis] + by, *start[axis + 1 :])
