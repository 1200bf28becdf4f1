# SPDX-License-Identifier: Apache-2.0
"""Plan the copies of a pull of weights, and carry them out with the checksums of what landed."""

from __future__ import annotations

import ctypes
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import accumulate, groupby
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.autograd.graph import increment_version

from portakv.migrate.checksum import BoxSums, Part, unit_of
from portakv.migrate.ipc import Opener
from portakv.migrate.messages import Dims
from portakv.migrate.parameters import Box, Cell, Item, Parameter, part_of
from portakv.migrate.weight_owner import Owner
from portakv.runtime.devices import inside
from portakv.runtime.streams import completion, side_stream
from portakv.runtime.transfer import Completion

_SMALL = 16 << 20  # bytes of the largest tensor that counts as small
_LISTED = 32  # small tensors that one call copies
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes
_CELLS = 4096  # the most cells of a batch
_WINDOW = 2  # batches of a device in flight


class Piece(NamedTuple):
    """A part of a cell, which is copied with one batch. ``number``: of the cell in the plan."""

    number: int
    cell: Cell
    unit: int  # bytes of a word of the cell's checksum
    copied: bool  # False: a tied name, whose memory is copied by another name


@dataclass
class Batch:
    """Pieces of about equally many bytes."""

    pieces: list[Piece]
    nbytes: int


@dataclass
class Plan:
    """The copies of a pull, for tensors and owners of one description."""

    cells: list[Cell]
    batches: list[Batch]
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.nbytes = sum(batch.nbytes for batch in self.batches)


def plan_of(
    cells: list[Cell], described: Mapping[str, Item], itemsizes: Mapping[str, int], most: int
) -> Plan:
    """Return the batches of cells, each of about ``most`` bytes. A tied tensor is copied once."""
    pieces = list[Piece]()
    for number, cell in enumerate(cells):
        size = itemsizes[cell.name]
        unit = unit_of(size, cell.box.offset, cell.box.extents)
        copied = described[cell.name].tie == cell.name
        pieces += [Piece(number, x, unit, copied) for x in _pieces(cell, max(1, most // size))]
    sizes = [prod(x.cell.box.extents) * itemsizes[x.cell.name] for x in pieces]
    ends = accumulate(max(nbytes, most // _CELLS) for nbytes in sizes)
    batches = list[Batch]()
    for _, group in groupby(zip(ends, sizes, pieces, strict=True), lambda each: each[0] // most):
        some = [*group]
        nbytes = sum(nbytes for _, nbytes, piece in some if piece.copied)
        batches.append(Batch([piece for *_, piece in some], nbytes))
    return Plan(cells, batches)


class Copies:
    """The copies of one pull, from the memory of owners, and the checksums of what landed."""

    def __init__(self, owners: Sequence[Owner], parameters: Mapping[str, Parameter]) -> None:
        self._owners = owners
        self._parameters = parameters
        self._openers = dict[torch.device, Opener]()
        self._cells = list[Cell]()
        self._sources = list[torch.Tensor]()  # of whole cells
        self._sums = BoxSums()
        # The ends of the batches in flight; streams that compute checksums after a batch's copy.
        self._in_flight = deque[list[Completion]]()
        self._streams = dict[torch.device, torch.Stream]()

    def open(self, plan: Plan) -> None:
        """Open all memory of a plan that is not open yet; raise `PeerError` if it does not fit."""
        self._cells = plan.cells
        self._sources = [self._source(cell) for cell in plan.cells]

    def _source(self, cell: Cell) -> torch.Tensor:
        """Return the source of a cell in its owner's memory."""
        tensor = self._parameters[cell.name].tensor
        return self._owners[cell.owner].publication.source(cell, tensor, self._openers)

    def copy(self, batch: Batch) -> None:
        """Copy a batch. On a device, the copies and their checksums are in flight afterwards."""
        pairs = list[tuple[torch.Tensor, torch.Tensor]]()
        parts = defaultdict[torch.device, list[Part]](list)
        for number, cell, unit, copied in batch.pieces:
            tensor = self._parameters[cell.name].tensor
            into = part_of(tensor, cell.box.start, cell.box.extents)
            parts[tensor.device].append(Part(number, into, cell.box.offset, unit))
            if copied:
                whole = cell is self._cells[number]
                pairs.append((into, self._sources[number] if whole else self._source(cell)))
        copy_pairs(pairs)
        devices = [device for device in parts if device.type != "cpu"]
        self._in_flight.append([completion(device, None) for device in devices])
        while len(self._in_flight) > _WINDOW:
            for end in self._in_flight.popleft():
                end.synchronize()
        for device, some in parts.items():
            with self._after_copies(device):
                self._sums.add(some)

    def _after_copies(self, device: torch.device) -> AbstractContextManager[object]:
        """Make a stream current that follows the copies, while the next batch is copied."""
        if device.type == "cpu":
            return nullcontext()
        current = torch.accelerator.current_stream(device.index)
        stream = self._streams[device] = side_stream(current, "weights", "checksums")
        stream.wait_stream(current)
        return inside(stream)

    def synchronize(self) -> None:
        """Wait until nothing of this pull runs on a device."""
        devices = {x.tensor.device for x in self._parameters.values() if not x.tensor.is_cpu}
        for device in devices:
            torch.accelerator.current_stream(device.index).synchronize()
        for stream in self._streams.values():
            stream.synchronize()

    def sums(self, count: int) -> list[int]:
        """Return the checksums of what landed, by the numbers of cells, after `synchronize`."""
        return self._sums.results(count)


def copy_pairs(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Copy tensors on the current stream of their device, or now on the host.

    One call copies many small tensors, as integers: on CUDA that call converts bfloat16 and float16
    to float32, which changes NaNs (torch 2.11). On the host neighbours are one copy.
    """
    runs = list[tuple[torch.Tensor, torch.Tensor]]()
    many = defaultdict[Any, tuple[list[Any], list[Any]]](lambda: ([], []))
    with torch.inference_mode():
        for into, src in pairs:
            one_run = into.is_contiguous() and src.is_contiguous()
            if one_run and into.is_cpu:
                runs.append((into, src))
                continue
            if not one_run or into.nbytes >= _SMALL or into.itemsize not in _INTEGERS:
                into.copy_(src)
                continue
            lists = many[key := (into.device, _INTEGERS[into.itemsize])]
            for some, one in zip(lists, (into, src), strict=True):
                some.append(one.view(key[1]))
            if len(lists[0]) == _LISTED:  # the device starts while the host goes on
                torch._foreach_copy_(*many.pop(key))
        for lists in many.values():
            torch._foreach_copy_(*lists)
    for run in runs_of(runs):
        ctypes.memmove(*run)  # in this thread alone
    for into, _ in runs:
        increment_version(into)  # as torch's own copies do: who publishes these tensors notices it


def runs_of(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> list[tuple[int, int, int]]:
    """Return the copies of contiguous tensors as runs of bytes, neighbours together.

    A run is the address to write, the address to read, and the bytes.
    """
    runs = [(into.data_ptr(), src.data_ptr(), into.nbytes) for into, src in pairs if into.nbytes]
    if not runs:
        return []
    table = np.array(runs, np.int64)
    table = table[np.argsort(table[:, 0])]
    ends = table[:-1, :2] + table[:-1, 2:]
    firsts = np.flatnonzero(np.r_[True, (ends != table[1:, :2]).any(axis=1)])
    table[firsts, 2] = np.add.reduceat(table[:, 2], firsts)
    return [(into, src, nbytes) for into, src, nbytes in table[firsts].tolist()]


def _pieces(cell: Cell, most: int) -> Iterator[Cell]:
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
        yield from _pieces(cell._replace(box=box, src=_shifted(cell.src, axis, at)), most)


def _shifted(start: Dims, axis: int, by: int) -> Dims:
    """Return the start of a box that is shifted along an axis."""
    return (*start[:axis], start[axis] + by, *start[axis + 1 :])
