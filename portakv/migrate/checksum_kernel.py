# SPDX-License-Identifier: Apache-2.0
"""The kernel for checksums on devices that torch calls ``cuda``: one launch sums many parts.

NVRTC or hipRTC compiles the text, `checksum.cuh`, at run time. A launch has one table, which is
made and sent as a whole:

- shapes: each shape of parts, and its division into tiles;
- parts: an address, the number of a shape, and a sum, which the kernel adds to;
- tiles: for each thread block a part, and a tile of it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from importlib.resources import files
from itertools import product
from math import gcd, prod
from typing import NamedTuple, TypeAlias

import numpy as np
import torch

from portakv.backends.rows_launch import RowsDriver
from portakv.errors import Unsupported
from portakv.migrate.checksum_words import AXIS, Part, key_of, signed, unit_of
from portakv.runtime import cuda as _cuda_driver
from portakv.runtime import hip as _hip_driver
from portakv.runtime.bounded import Bounded
from portakv.runtime.cuda import ArgumentLists

NAME = "portakv_sums"
AXES = 4  # of rows; a part with more axes is several parts for the kernel
VECTOR = 16  # bytes of the widest vector
FEW = 4  # rows; a part of fewer rows is summed along its rows
MOST_COPIED = 256 << 20  # bytes of parts that are copied for one launch
_PART = 3  # numbers of `Part` in the kernel's text
_SHAPE = struct.Struct(f"<{12 + 3 * AXES}q")
_ARGUMENTS = struct.Struct("<3q")


class Cut(NamedTuple):
    """The division of parts among threads."""

    threads: int = 256  # of a block: a power of 2
    rows: int = 512  # the most rows of a tile: 16 bytes of shared memory each
    each: int = 32  # vectors of a tile that a thread sums


CUT = Cut()


class Vector(NamedTuple):
    """Words that a thread reads together."""

    nbytes: int
    length: int  # of a row, in vectors
    step: int  # bytes from one to the next


class Axis(NamedTuple):
    """An axis of words: its positions, the bytes from one to the next, and the first position's
    number."""

    extent: int
    stride: int
    first: int


class Piece(NamedTuple):
    """A part of a part, which the kernel sums as one."""

    offset: int  # bytes from the address of the whole part
    shape: bytes  # `Shape` in the kernel's text
    tiles: int


class SumKernel:
    """Compute checksums of parts of tensors of one device.

    Args:
        device: of the tensors.
        driver: of the device.
        cut: the division of parts among threads.

    Raises:
        RuntimeError: the compilation failed, with the compiler's log.
        TransferError: the driver rejects the kernel.
    """

    def __init__(self, device: torch.device, driver: RowsDriver, cut: Cut = CUT) -> None:
        self._device = device
        self._driver = driver
        self._cut = cut
        self._function = driver.load(kernel_text(cut), [NAME])[NAME]
        self._arguments = ArgumentLists([bytes(_ARGUMENTS.size)], driver.current)
        self._pieces = Bounded[object, list[Piece]]("shapes of checksums", 4096)

    def sum_parts(self, parts: Iterable[Part]) -> tuple[list[int], torch.Tensor]:
        """Return numbers of parts, and sums that add up to the checksums of these numbers.

        One launch on the device's current stream computes the sums, or a few if many parts have
        to be copied first. Empty parts have none.
        """
        return self.sum_tables(self.tables(parts))

    def sum_tables(self, tables: Iterable[Table]) -> tuple[list[int], torch.Tensor]:
        """Return what `sum_parts` returns, for tables of the parts."""
        numbers = list[int]()
        sums = list[torch.Tensor]()
        for table in tables:
            numbers += table.numbers
            sums.append(self._launch(table))
        return numbers, sums[0] if len(sums) == 1 else torch.cat(sums)

    def tables(self, parts: Iterable[Part]) -> Iterator[Table]:
        """Yield tables that have all parts. A table is launched before the next is begun."""
        table = Table()
        for part in parts:
            number, tensor, start, unit = part
            address = tensor.data_ptr()
            key = tensor.shape, tensor.stride(), tensor.dtype, start, unit, address % VECTOR
            places = table.places.get(key)
            if places is None:
                if not _has_words(tensor, start, unit):
                    tensor = table.copy(tensor)
                    address = tensor.data_ptr()
                    key = tensor.shape, tensor.stride(), tensor.dtype, start, unit, address % VECTOR
                made = self._pieces.get_or_make(key, partial(_pieces_of, tensor, part, self._cut))
                places = table.places[key] = table.add(made)
            for offset, shape in places:
                table.numbers.append(number)
                table.addresses.append(address + offset)
                table.shape_of.append(shape)
            if table.copied >= MOST_COPIED:
                yield table
                table = Table()
        yield table

    def _launch(self, table: Table) -> torch.Tensor:
        """Send a table, launch the kernel, and return the sums of the table's parts."""
        if not table.numbers:
            return torch.empty(0, dtype=torch.int64, device=self._device)
        driver = self._driver
        handle = driver.handle(None)
        if handle is None:
            with driver.current():
                return self._launch(table)
        sent = table.sent_to(self._device)
        shapes = sent.data_ptr()
        parts = shapes + 8 * table.parts_at
        tiles = shapes + 8 * table.tiles_at
        _ARGUMENTS.pack_into(self._arguments.buffers[0], 0, shapes, parts, tiles)
        blocks = table.blocks
        threads = self._cut.threads
        arguments = self._arguments.addresses[0]
        result = driver.launch(self._function, blocks, 1, 1, threads, 1, 1, 0, handle, arguments, 0)
        if result != driver.success:
            driver.check(result, "The launch")
        return sent[table.parts_at : table.tiles_at].view(-1, _PART)[:, -1]


class Table:
    """The parts of a launch. It can be launched again while the parts stay where they are, unless
    some had to be ``copied``."""

    def __init__(self) -> None:
        # Of each part.
        self.numbers = list[int]()
        self.addresses = list[int]()
        self.shape_of = list[int]()
        # Parts that had to be copied. A launch precedes all later work of its stream, which may
        # reuse their memory.
        self.copied = 0  # bytes
        self._copies = list[torch.Tensor]()
        # Of each kind of parts: the offsets and the numbers of their shapes.
        self.places = dict[object, list[tuple[int, int]]]()
        # Of each shape.
        self._shapes = list[bytes]()
        self._tiles = list[int]()
        # Places in the table, in numbers, and thread blocks; `sent_to` sets them.
        self.parts_at = 0
        self.tiles_at = 0
        self.blocks = 0
        self._pinned: torch.Tensor | None = None  # set by the first `sent_to`; only read then

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a contiguous copy of a tensor, which the table retains."""
        copy = tensor.clone(memory_format=torch.contiguous_format)
        self._copies.append(copy)
        self.copied += copy.nbytes
        return copy

    def add(self, pieces: Sequence[Piece]) -> list[tuple[int, int]]:
        """Add the shapes of pieces, and return the offset and the shape's number of each."""
        first = len(self._shapes)
        self._shapes += [piece.shape for piece in pieces]
        self._tiles += [piece.tiles for piece in pieces]
        return [(piece.offset, first + nth) for nth, piece in enumerate(pieces)]

    def sent_to(self, device: torch.device) -> torch.Tensor:
        """Return the table on a device, sent on the device's current stream."""
        if self._pinned is None:
            self._pinned = self._made(device)
        return self._pinned.to(device, non_blocking=True, copy=True)

    def _made(self, device: torch.device) -> torch.Tensor:
        """Return the table in host memory from which a device copies it, with sums of 0."""
        count = len(self.numbers)
        shape_of = np.array(self.shape_of, np.int64)
        tiles = np.array(self._tiles, np.int64)[shape_of]
        self.blocks = int(tiles.sum())
        shapes = np.frombuffer(b"".join(self._shapes), np.int64)
        self.parts_at = len(shapes)
        self.tiles_at = self.parts_at + count * _PART

        # Sent from pinned memory, no copy waits for the stream.
        pinned = torch.empty(
            self.tiles_at + self.blocks,
            dtype=torch.int64,
            device="cpu",
            pin_memory=device.type != "cpu",
        )
        numbers = pinned.numpy()
        numbers[: self.parts_at] = shapes
        parts = numbers[self.parts_at : self.tiles_at].reshape(-1, _PART)
        parts[:, 0] = self.addresses
        parts[:, 1] = shape_of
        parts[:, 2] = 0
        firsts = np.cumsum(tiles) - tiles
        each = np.arange(count, dtype=np.int64)
        numbers[self.tiles_at :] = np.arange(self.blocks) + np.repeat((each << 32) - firsts, tiles)
        return pinned


#: The tables that each kernel launches again, for parts that stay where they are.
CachedTables: TypeAlias = dict[SumKernel, list[Table]]


def kernel_text(cut: Cut) -> str:
    """Return the kernel's text for a division of parts."""
    text = files("portakv.migrate").joinpath("checksum.cuh").read_text()
    sizes = {"THREADS": cut.threads, "ROWS": cut.rows, "AXES": AXES}
    return "".join(f"#define PORTAKV_SUM_{name} {size}\n" for name, size in sizes.items()) + text


def driver_of(device: torch.device) -> RowsDriver:
    """Return the driver that loads and launches the kernel on a device.

    Raises:
        Unsupported: the device has no such driver; the text has the reason.
    """
    if device.type == "cuda" and torch.version.hip is not None:
        try:
            return _hip_driver.Card(device, _hip_driver.driver())
        except (_hip_driver.DriverMissing, RuntimeError) as error:
            raise _refused(device, str(error)) from error
    why = _cuda_driver.why_not(device) or _cuda_driver.device_too_old(device)
    if why is not None:
        raise _refused(device, why)
    return _cuda_driver.CudaDriver(device)


def _refused(device: torch.device, why: str) -> Unsupported:
    return Unsupported(f"The checksum kernel on {device}", why)


def _has_words(tensor: torch.Tensor, start: tuple[int, ...], most: int) -> bool:
    """Return True if the words of a part lie in memory as the part does."""
    size = tensor.element_size()
    unit = gcd(most, unit_of(size, start, tensor.shape))
    if size == unit or not start:
        return True
    *steps, last = tensor.stride()
    return last == 1 and not any(x * size % unit for x in steps) and not tensor.data_ptr() % unit


def _pieces_of(tensor: torch.Tensor, part: Part, cut: Cut) -> list[Piece]:
    """Return the pieces of a part, whose words lie as the elements of ``tensor`` do."""
    if not tensor.numel():
        return []
    size = tensor.element_size()
    unit = gcd(part.unit, unit_of(size, part.start, tensor.shape))
    start = part.start or (0,)
    extents = tensor.shape if part.start else (1,)
    strides = tensor.stride() if part.start else (1,)
    axes = [
        Axis(extent, stride * size, number * AXIS + at)
        for number, (extent, stride, at) in enumerate(zip(extents, strides, start, strict=True))
    ]
    last = axes[-1]
    if size != unit:
        number = (len(axes) - 1) * AXIS
        axes[-1] = Axis(last.extent * size // unit, unit, number + start[-1] * size // unit)
    return _divided(axes, unit, tensor.data_ptr(), cut)


def _divided(axes: Sequence[Axis], unit: int, address: int, cut: Cut) -> list[Piece]:
    """Return the pieces of words of ``unit`` bytes: one for each position of too many axes."""
    # The keys are a product, so that the order of axes is free. Neighbours in memory are columns.
    longer = sorted((x for x in axes if x.extent > 1), key=lambda x: -x.stride) or [axes[-1]]
    columns = longer.pop()
    factor = prod(key_of(x.first) for x in axes if x.extent == 1 and x is not columns)
    outer = longer[: max(0, len(longer) - AXES)]
    rows = longer[len(outer) :]
    pieces = list[Piece]()
    for positions in product(*(range(x.extent) for x in outer)):
        moves = [*zip(outer, positions, strict=True)]
        offset = sum(x.stride * position for x, position in moves)
        keys = prod(key_of(x.first + position) for x, position in moves)
        vector = _vector(rows, columns, unit, address + offset)
        shape, tiles = _shape(rows, columns, vector, cut, signed(factor * keys))
        pieces.append(Piece(offset, shape, tiles))
    return pieces


def _vector(rows: Sequence[Axis], columns: Axis, unit: int, address: int) -> Vector:
    """Return the widest vectors that the kernel can read."""
    contiguous = unit == 4 and columns.stride == unit
    ends = gcd(address, columns.extent * unit, *(x.stride for x in rows))
    if contiguous and not ends % VECTOR:
        return Vector(VECTOR, columns.extent * unit // VECTOR, VECTOR)
    return Vector(unit, columns.extent, columns.stride)


def _shape(
    rows: Sequence[Axis], columns: Axis, vector: Vector, cut: Cut, factor: int
) -> tuple[bytes, int]:
    """Return `Shape` in the kernel's text, and the number of its tiles."""
    count = prod(x.extent for x in rows)
    flat = count < FEW
    if flat:
        lanes = cut.threads
        tile_rows = count
    else:
        lanes = min(cut.threads, 1 << (vector.length - 1).bit_length())
        tile_rows = min(count, cut.rows, cut.each * cut.threads // lanes)
    tile_columns = lanes * max(1, cut.each * cut.threads // lanes // tile_rows)
    across = -(-vector.length // tile_columns)
    numbers = [vector.nbytes, factor, count, vector.length, vector.step, columns.first, lanes]
    numbers += [tile_rows, tile_columns, across, flat, len(rows)]
    for axis in rows:
        numbers += axis
    numbers += [0] * 3 * (AXES - len(rows))
    return _SHAPE.pack(*numbers), across * -(-count // tile_rows)
