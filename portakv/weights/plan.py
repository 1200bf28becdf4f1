# SPDX-License-Identifier: Apache-2.0
"""Copy many tensors of a device by one launch for each size of tile.

The addresses of the tiles are a table, which the first pull makes and the next ones launch again.
So a pull of weights that were pulled before describes no tensor again.
"""

from __future__ import annotations

import ctypes
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, groupby
from math import prod
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.autograd.graph import increment_version

from portakv.copy import CopyOptions, copy_rows
from portakv.errors import BackendUnavailable, Unsupported
from portakv.migrate.checksum import CachedTables, unit_of
from portakv.migrate.messages import Dims
from portakv.view.view import KVView
from portakv.weights.parameters import Box, Cell, Item

# ------------------------------------------------------------------------------------------------
# Copy many tensors by few calls.

#: Bytes of the smallest tensor that counts as large. Large ones go to the copy engine, which leaves
#: the multiprocessors to the checksums: 32 of 117 MiB took 13.0 ms in tiles and 11.7 ms without.
LARGE = 16 << 20
_LISTED = 32  # small tensors that one call copies
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


def copy_pairs(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Copy tensors on the current stream of their device, or now if one side is on the host.

    One call copies many small tensors, as integers: on CUDA that call converts bfloat16 and float16
    to float32, which changes NaNs (torch 2.11). On the host this thread alone copies.
    """
    moved = list[torch.Tensor]()
    many = defaultdict[Any, tuple[list[Any], list[Any]]](lambda: ([], []))
    with torch.inference_mode():
        for into, src in pairs:
            one_run = into.is_contiguous() and src.is_contiguous()
            if one_run and into.is_cpu and src.is_cpu:
                ctypes.memmove(into.data_ptr(), src.data_ptr(), into.nbytes)
                moved.append(into)
                continue
            integers = _INTEGERS.get(into.itemsize)
            if not one_run or integers is None or into.nbytes >= LARGE:
                into.copy_(src)
                continue
            key = into.device, integers
            listed, sources = many[key]
            listed.append(into.view(integers))
            sources.append(src.view(integers))
            if len(listed) == _LISTED:  # the device starts while the host goes on
                torch._foreach_copy_(listed, sources)
                del many[key]
        for lists in many.values():
            torch._foreach_copy_(*lists)
    increment_version(moved)  # as torch's own copies do: who publishes these tensors notices it


#: Bytes of the tiles. A tensor is cut into as many of the first as it has, its rest into the next.
TILES = (64 << 10, 4 << 10, 512)
_ALIGNED = 16  # bytes, so that kernels move whole vectors
_LAYOUT = "block | token dim"
# A pull is waited for, so its kernels take as much of the device as they can use.
_OPTIONS = CopyOptions(overlap="idle")
_Int64 = npt.NDArray[np.int64]


class Tiles:
    """The tiles of contiguous tensors, as copies from addresses to addresses of one device.

    It retains no memory. The caller keeps the tensors, and makes it again when one has moved. What
    is read counts as a peer's memory, also if another process of the same device shares it.

    Args:
        pairs: tensors that `fits_tiles` accepts, all on one device: what is written, what is read.

    Raises `BackendUnavailable` or `Unsupported` if no backend copies between addresses of this
    device.
    """

    def __init__(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        device = pairs[0][0].device
        runs = [(into.data_ptr(), src.data_ptr(), into.nbytes) for into, src in pairs]
        self._copies = list[tuple[KVView, KVView]]()
        for size, into, src in cut(np.array(runs, np.int64)):
            read = _tiles(src, size, device)
            if device.type != "cpu":
                read = read.as_peer(device)
            written = _tiles(into, size, device)
            copy_rows(read, written, count=0, options=_OPTIONS)  # finds a backend
            self._copies.append((written, read))

    def issue(self) -> None:
        """Copy all tiles on the current stream of their device."""
        for into, src in self._copies:
            copy_rows(src, into, options=_OPTIONS)


def tiled_on(device: torch.device) -> bool:
    """Return whether tiles copy weights on a device; on the host a copy is one call anyway."""
    return device.type != "cpu"


def fits_tiles(into: torch.Tensor, src: torch.Tensor) -> bool:
    """Return whether tiles can copy a tensor to another one of the same type and shape."""
    return (
        into.device == src.device
        and 0 < into.nbytes < LARGE
        and into.is_contiguous()
        and src.is_contiguous()
        and not into.nbytes % TILES[-1]
        and not (into.data_ptr() | src.data_ptr()) % _ALIGNED
    )


def tiles_of(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> tuple[list[Tiles], list[int]]:
    """Return the tiles that copy pairs of tensors, and the numbers of the pairs that none copies:
    those that do not fit, and those of a device whose backends copy no addresses."""
    fitting = defaultdict[torch.device, list[int]](list)
    rest = list[int]()
    for number, (into, src) in enumerate(pairs):
        fits = tiled_on(into.device) and fits_tiles(into, src)
        (fitting[into.device] if fits else rest).append(number)
    tiles = list[Tiles]()
    for numbers in fitting.values():
        try:
            tiles.append(Tiles([pairs[number] for number in numbers]))
        except (BackendUnavailable, Unsupported):
            rest += numbers
    return tiles, rest


def cut(runs: _Int64) -> list[tuple[int, _Int64, _Int64]]:
    """Return for each size of tile that occurs where its tiles are written and read."""
    tiles = list[tuple[int, _Int64, _Int64]]()
    begun = np.zeros(len(runs), np.int64)  # bytes of each run in larger tiles
    for size in TILES:
        count = (runs[:, 2] - begun) // size
        total = int(count.sum())
        if total:
            within = np.arange(total) - np.repeat(np.cumsum(count) - count, count)
            into, src = (np.repeat(runs[:, side] + begun, count) + within * size for side in (0, 1))
            tiles.append((size, into, src))
            begun += count * size
    return tiles


def _tiles(addresses: _Int64, size: int, device: torch.device) -> KVView:
    """Return a view of tiles at addresses of a device."""
    table = torch.from_numpy(addresses)
    return KVView.at(table, _LAYOUT, shape=(1, size), dtype=torch.uint8, device=device)


# ------------------------------------------------------------------------------------------------
# Plan the copies of a pull of weights: cells in pieces, and pieces in batches.

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
    names: set[str]
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


class WantedSums(NamedTuple):
    """The checksums that a plan needs of an owner.

    Attributes:
        places: of the checksum of each cell, in the list of whole boxes followed by the others.
        boxes: numbers of items, and the other boxes.
    """

    places: list[int]
    boxes: list[tuple[int, Box]]


@dataclass(eq=False)  # a plan is a key of what an owner's publication caches
class Plan:
    """The copies of a pull, for tensors and owners of one description.

    Attributes:
        numbers: of the cells of each owner.
        sums: the checksums that are needed of each owner.
    """

    cells: list[Cell]
    batches: list[Batch]
    numbers: list[list[int]]
    nbytes: int
    sums: list[WantedSums]


def plan_of(
    cells: list[Cell],
    described: Mapping[str, Item],
    itemsizes: Mapping[str, int],
    most: int,
    wanted_sums: Sequence[Callable[[Iterable[Cell]], WantedSums]],
) -> Plan:
    """Return the batches of cells, each of about ``most`` bytes. A tied tensor is copied once.

    ``wanted_sums``: for each owner, returns the checksums that are needed for its cells.
    """
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
    numbers = [list[int]() for _ in wanted_sums]
    for number, cell in enumerate(cells):
        numbers[cell.owner].append(number)
    sums = [want(cells[n] for n in some) for want, some in zip(wanted_sums, numbers, strict=True)]
    return Plan(cells, batches, numbers, sum(batch.nbytes for batch in batches), sums)


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
