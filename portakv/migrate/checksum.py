# SPDX-License-Identifier: Apache-2.0
"""Checksums by which both sides of a pull compare their bytes.

A checksum is a sum, modulo 2^64, of words. Each word is multiplied by the key of its position in
the whole model. Checksums of parts therefore add up to the checksum of the whole, for any layout
and any sharding.

The key of a position is the product of one odd number for each axis, so the sum is computed axis by
axis. A word has at most half of the bits of the modulus, so its highest bits change the sum too.
"""

from __future__ import annotations

import logging
import struct
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from functools import partial
from importlib.resources import files
from itertools import product
from math import gcd, prod
from typing import NamedTuple, TypeAlias

import numpy as np
import torch

from portakv.copy import copy_rows
from portakv.migrate.messages import Box
from portakv.migrate.messages import BoxPart as Rows
from portakv.migrate.staging import chunk, page_of, rows_bytes, staging
from portakv.runtime.bounded import Bounded
from portakv.runtime.cuda import KernelDriver
from portakv.runtime.word_sums import (
    AXIS,
    MODULUS,
    STEP,
    WORDS,
    checked_kernel,
    driver_of,
    key_of,
    keys_of,
    signed,
    words_text,
)
from portakv.view import Index, KVView

# ------------------------------------------------------------------------------------------------
# The words of parts of tensors, and the keys of their positions.


class SummedPart(NamedTuple):
    """A part of a tensor, whose checksum is added to the sum of a number."""

    number: int
    tensor: torch.Tensor
    start: tuple[int, ...]  # of its first element in the whole tensor
    unit: int = 4  # the most bytes of a word: sums of a larger part's pieces have one width


def unit_of(itemsize: int, start: Sequence[int], extents: Sequence[int]) -> int:
    """Return the bytes of the widest words that a part of a tensor allows."""
    if not start:
        return gcd(4, itemsize)
    return gcd(4, itemsize * start[-1], itemsize * extents[-1])


def words_of(
    part: torch.Tensor, start: tuple[int, ...], most: int
) -> tuple[torch.Tensor, Sequence[int]]:
    """Return a part as words of at most so many bytes, and the position of its first word in the
    whole. Axes before those of ``start`` are several parts."""
    if not start:
        part = part[..., None]
        start = (0,)
    size = part.element_size()
    unit = gcd(most, unit_of(size, start, part.shape))

    # A view as wider words needs a contiguous last axis and aligned steps; a kernel's loads need
    # an aligned address.
    if size != unit:
        *steps, last = part.stride()
        places = *(x * size for x in (*steps, part.storage_offset())), part.data_ptr()
        if last != 1 or any(place % unit for place in places):
            part = part.clone(memory_format=torch.contiguous_format)
    return part.view(WORDS[unit]), (*start[:-1], start[-1] * size // unit)


# ------------------------------------------------------------------------------------------------
# The kernel for checksums on devices that torch calls ``cuda``: one launch sums many parts.

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

    def __init__(self, device: torch.device, driver: KernelDriver, cut: Cut = CUT) -> None:
        self.device = device
        self._driver = driver
        self._cut = cut
        self._function = driver.load(kernel_text(cut), [NAME])[NAME]
        self._pieces = Bounded[object, list[Piece]]("shapes of checksums", 4096)

    def sum_parts(
        self, parts: Iterable[SummedPart], cached: CachedTables | None = None
    ) -> tuple[list[int], torch.Tensor]:
        """Return numbers of parts, and sums that add up to the checksums of these numbers.

        One launch on the device's current stream computes the sums, or a few if many parts have
        to be copied first. Empty parts have none. ``cached``: gets the table of the parts, for
        `sum_table`, if it can be launched again.
        """
        numbers = list[int]()
        sums = list[torch.Tensor]()
        for table in self.tables(parts):
            numbers += table.numbers
            sums.append(self._launch(table))
        if len(sums) > 1:
            return numbers, torch.cat(sums)
        if cached is not None and not table.copied:  # else the table retains copies
            cached[self] = table
        return numbers, sums[0]

    def sum_table(self, table: Table) -> tuple[list[int], torch.Tensor]:
        """Return what `sum_parts` returned, for parts that lie where they lay."""
        return table.numbers, self._launch(table)

    def tables(self, parts: Iterable[SummedPart]) -> Iterator[Table]:
        """Yield tables that have all parts. A table is launched before the next is begun."""
        table = Table()
        for number, tensor, start, unit in parts:
            if not tensor.numel():
                continue
            address = tensor.data_ptr()
            key = tensor.shape, tensor.stride(), tensor.dtype, start, unit, address % VECTOR
            places = table.places.get(key)
            if places is None:
                words, first = words_of(tensor, start, unit)
                at = words.data_ptr()
                kind = words.shape, words.stride(), words.dtype, first, at % VECTOR
                make = partial(_pieces_of, words, first, self._cut)
                places = table.add(self._pieces.get_or_make(kind, make))
                if at == address:
                    table.places[key] = places
                else:
                    table.retain(words)
                    address = at
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
            return torch.empty(0, dtype=torch.int64, device=self.device)
        driver = self._driver
        if driver.number(None) is None:
            with driver.current():
                return self._launch(table)
        sent = table.sent_to(self.device)
        shapes = sent.data_ptr()
        parts = shapes + 8 * table.parts_at
        tiles = shapes + 8 * table.tiles_at
        parameter = _ARGUMENTS.pack(shapes, parts, tiles)
        driver.launch(self._function, table.blocks, self._cut.threads, parameter)
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

    def retain(self, copy: torch.Tensor) -> None:
        """Retain the copy of a part."""
        self._copies.append(copy)
        self.copied += copy.nbytes

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


#: The table that each kernel launches again, for parts that stay where they are.
CachedTables: TypeAlias = dict[SumKernel, Table]


def kernel_text(cut: Cut) -> str:
    """Return the kernel's text for a division of parts."""
    text = files("portakv.migrate").joinpath("checksum.cuh").read_text()
    sizes = {"THREADS": cut.threads, "ROWS": cut.rows, "AXES": AXES}
    head = "".join(f"#define PORTAKV_SUM_{name} {size}\n" for name, size in sizes.items())
    return head + words_text() + text


def _pieces_of(words: torch.Tensor, first: Sequence[int], cut: Cut) -> list[Piece]:
    """Return the pieces of words: one for each position of too many axes.

    ``first``: the position of the first word.
    """
    unit = words.element_size()
    axes = [
        Axis(extent, stride * unit, number * AXIS + at)
        for number, (extent, stride, at) in enumerate(
            zip(words.shape, words.stride(), first, strict=True)
        )
    ]
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
        address = words.data_ptr() + offset
        shape, tiles = _shape(rows, columns, unit, address, cut, signed(factor * keys))
        pieces.append(Piece(offset, shape, tiles))
    return pieces


def _shape(
    rows: Sequence[Axis], columns: Axis, unit: int, address: int, cut: Cut, factor: int
) -> tuple[bytes, int]:
    """Return `Shape` in the kernel's text, with the widest vectors that the kernel can read, and
    the number of its tiles."""
    nbytes = unit
    step = columns.stride
    ends = gcd(address, columns.extent * unit, *(x.stride for x in rows))
    if unit == step == 4 and not ends % VECTOR:
        nbytes = step = VECTOR
    length = columns.extent * unit // nbytes

    count = prod(x.extent for x in rows)
    flat = count < FEW
    if flat:
        lanes = cut.threads
        tile_rows = count
    else:
        lanes = min(cut.threads, 1 << (length - 1).bit_length())
        tile_rows = min(count, cut.rows, cut.each * cut.threads // lanes)
    tile_columns = lanes * max(1, cut.each * cut.threads // lanes // tile_rows)
    across = -(-length // tile_columns)
    numbers = [nbytes, factor, count, length, step, columns.first, lanes]
    numbers += [tile_rows, tile_columns, across, flat, len(rows)]
    for axis in rows:
        numbers += axis
    numbers += [0] * 3 * (AXES - len(rows))
    return _SHAPE.pack(*numbers), across * -(-count // tile_rows)


_log = logging.getLogger(__name__)


class _Batch(NamedTuple):
    """The size of one step of the computation."""

    words: int  # words that are multiplied together
    nbytes: int  # bytes of rows that are gathered together


# On a host, a batch fits the cache of a core, and torch uses one thread, as for all operations of
# less than 2^15 elements: several threads of several processes waited longer than they summed. On a
# device, a batch takes longer than its launches.
_HOST = _Batch((1 << 15) - 1, 2 << 20)
_DEVICE = _Batch(1 << 23, 32 << 20)


def _batch_of(device: torch.device) -> _Batch:
    return _HOST if device.type == "cpu" else _DEVICE


class _Mixer:
    """Sums words of one device, in a private buffer for the words that are multiplied together."""

    def __init__(self, device: torch.device) -> None:
        self.batch = _batch_of(device)
        self.buffer = torch.empty(self.batch.words, dtype=torch.int64, device=device)
        self.keys = Bounded[tuple[int, int], torch.Tensor]("keys of checksums", 16)

    def sum(self, words: torch.Tensor, starts: Sequence[int]) -> torch.Tensor:
        """Return the sum of words times their keys, without a wait for a device.

        ``starts``: the first position of each axis. Words with one more axis, the first, are
        several parts; the result has a sum of each.
        """
        if words.numel() > self.batch.words:
            return self._sum_in_parts(words, starts)

        # Axes before those of the starts are several parts of one shape.
        axes = words.shape[words.ndim - len(starts) :]
        for first, n in reversed([*zip(starts, axes, strict=True)]):
            key = self.keys.get_or_make((first, n), partial(keys_of, first, n, words.device))
            product = self.buffer[: words.numel()].view(words.shape)
            words = torch.mul(words, key, out=product).sum(-1)
        return words

    def sum_parts(
        self, parts: Iterable[SummedPart], cached: object = None
    ) -> tuple[list[int], torch.Tensor]:
        """Return numbers of parts, and sums that add up to the checksums of these numbers.

        Small parts of one shape are summed together. Empty parts have no sums.
        """
        alike = defaultdict[Hashable, list[SummedPart]](list)
        for part in parts:
            tensor = part.tensor
            alike[tensor.shape, tensor.stride(), tensor.dtype, part.start, part.unit].append(part)
        numbers = list[int]()
        sums = list[torch.Tensor]()
        for group in alike.values():
            if group[0].tensor.numel():
                numbers += [part.number for part in group]
                sums += self._sums_of(group)
        return numbers, torch.cat([*sums, self.buffer[:0]])

    def _sums_of(self, group: Sequence[SummedPart]) -> Iterator[torch.Tensor]:
        """Yield sums of parts of one shape and position."""
        _, tensor, start, unit = group[0]
        width = gcd(unit, unit_of(tensor.element_size(), start, tensor.shape))
        most = max(1, self.batch.words * width // tensor.nbytes)
        for at in range(0, len(group), most):
            some = [part.tensor for part in group[at : at + most]]
            together = some[0] if len(some) == 1 else torch.stack(some)
            (words, positions) = words_of(together, start, unit)
            starts = [axis * AXIS + x for axis, x in enumerate(positions)]
            yield self.sum(words, starts).view(len(some))

    def _sum_in_parts(self, words: torch.Tensor, starts: Sequence[int]) -> torch.Tensor:
        """Split the words along their first axis that is longer than 1, and add up the parts."""
        axis = next(axis for axis, n in enumerate(words.shape) if n > 1)
        n = max(1, self.batch.words * words.shape[axis] // words.numel())
        sums = list[torch.Tensor]()
        for number, part in enumerate(words.split(n, axis)):
            part_starts = [*starts]
            part_starts[axis] += number * n
            sums.append(self.sum(part, part_starts))
        return torch.stack(sums).sum()


def checksum(view: KVView, index: Index, count: int, window: Box, first: int = 0) -> int:
    """Return the checksum of ``count`` positions of an index; skipped positions do not count.

    Opaque pages count whole.

    Args:
        window: the layers and heads of the model that the view contains.
        first: the token of the first position.
    """
    (layers, heads) = window
    size = page_of(view)
    unit = gcd(4, *view.widths)
    sums = BoxSums()

    batch = max(1, _batch_of(view.device).nbytes // view.form.token_bytes) * size
    buffer = staging(rows_bytes(view, view.layers, min(count, batch), view.heads), view.device)
    for start in range(0, count, batch):
        n = min(batch, count - start)
        part = index.part(start, n)
        (tensors, rows) = chunk(view, n, buffer)
        if part.ids is not None:  # the copy writes no row of a skipped position
            buffer.zero_()
        copy_rows(view.as_bytes(), rows, part, count=n).wait()

        for kv, tensor in enumerate(tensors):
            words = tensor.view(WORDS[unit])
            # The words of each kv have an axis of their own.
            inner = kv * AXIS + heads[0] * words.shape[2] // view.heads
            starts = layers[0], (first + start) // size, inner
            sums.add([SummedPart(0, words, starts, unit)])
    return sums.results(1)[0]


def checksum_of(view: KVView, index: Index, part: Rows) -> int:
    """Return the checksum of a part of an offer; packed blocks count as slots.

    ``index``: of the part's first position on.
    """
    if not view.form.encoding:
        return checksum(view, index, part.count, part.box, part.first)
    size = view.form.block_size
    blocks = part.count // size
    return checksum(view.as_slots(), index.of_blocks(size), blocks, part.box, part.first // size)


def box_checksums(boxes: Iterable[tuple[torch.Tensor, Sequence[int]]]) -> list[int]:
    """Return the checksums of parts of tensors.

    Each part comes with its first element's position in the whole tensor. Words are as wide as the
    ends of a part allow. Checksums of parts add up if their words have one width.
    """
    sums = BoxSums()
    parts = [SummedPart(number, part, (*start,)) for number, (part, start) in enumerate(boxes)]
    sums.add(parts)
    return sums.results(len(parts))


class BoxSums:
    """Adds up checksums of parts of tensors by numbers, on the devices of the parts.

    Only `results` waits for a device, once for each. The first part on a device also waits, while
    `kernel_of` loads and checks a kernel.

    Args:
        kernel: computes the checksums on its device.
    """

    def __init__(self, kernel: SumKernel | None = None) -> None:
        self._summers = dict[torch.device, SumKernel | _Mixer]()
        if kernel is not None:
            self._summers[kernel.device] = kernel
        self._numbers = defaultdict[torch.device, list[int]](list)
        self._sums = defaultdict[torch.device, list[torch.Tensor]](list)

    def add(self, parts: Iterable[SummedPart], cached: CachedTables | None = None) -> None:
        """Compute the checksums of parts on the current stream of their device.

        ``cached``: gets the table of the parts, for `again`, if it can be launched again.
        """
        by_device = defaultdict[torch.device, list[SummedPart]](list)
        for part in parts:
            by_device[part.tensor.device].append(part)
        for device, some in by_device.items():
            with torch.inference_mode():
                self._add(device, *self._summer(device).sum_parts(some, cached))

    def again(self, device: torch.device, cached: CachedTables) -> bool:
        """Compute the checksums of the parts on a device that `add` has put into ``cached``, which
        lie where they lay; return False if it has put none there."""
        summer = self._summer(device)
        if not isinstance(summer, SumKernel) or summer not in cached:
            return False
        with torch.inference_mode():
            self._add(device, *summer.sum_table(cached[summer]))
        return True

    def _summer(self, device: torch.device) -> SumKernel | _Mixer:
        """Return what computes checksums on a device."""
        if device not in self._summers:
            self._summers[device] = kernel_of(device) or _Mixer(device)
        return self._summers[device]

    def _add(self, device: torch.device, numbers: list[int], sums: torch.Tensor) -> None:
        self._numbers[device] += numbers
        self._sums[device].append(sums)

    def results(self, count: int) -> list[int]:
        """Return the checksums of the numbers below ``count``."""
        totals = [0] * count
        for device, sums in self._sums.items():
            with torch.inference_mode():
                values = torch.cat(sums).tolist()
            for number, value in zip(self._numbers[device], values, strict=True):
                totals[number] += value
        return [total % MODULUS for total in totals]


_kernels: Bounded[torch.device, SumKernel | None] = Bounded("kernels of checksums", 64)


def kernel_of(device: torch.device) -> SumKernel | None:
    """Return the kernel for checksums on a device; None if torch's operators compute them there.

    The first call for a device compiles the kernel, or reads it from disk, and compares its sums
    with those of the host.
    """
    if device.type == "cpu":
        return None
    return _kernels.get_or_make(device, lambda: load_kernel(device, driver_of))


def load_kernel(
    device: torch.device, find_driver: Callable[[torch.device], KernelDriver]
) -> SumKernel | None:
    """Return the kernel for checksums on a device; None, with a log, if it cannot be used."""
    return checked_kernel(
        "Checksums", device, _log, lambda: SumKernel(device, find_driver(device)), _agrees
    )


def _agrees(kernel: SumKernel, device: torch.device) -> bool:
    """Return True if a kernel and the host have the same sums of examples of every word."""
    with torch.inference_mode():
        examples = torch.arange(1 << 12, dtype=torch.int64, device="cpu") * STEP
        expected = BoxSums()
        expected.add(_parts_of(examples))
        actual = BoxSums(kernel)
        actual.add(_parts_of(examples.to(device)))
        count = len(_parts_of(examples))
        return actual.results(count) == expected.results(count)


def _parts_of(examples: torch.Tensor) -> list[SummedPart]:
    """Return parts with whole and odd rows, few and many, of words of each width."""
    tensors = list[torch.Tensor]()
    for dtype in WORDS.values():
        row = examples.view(dtype)
        rows = row.view(64, -1)[:61]
        tensors += [row, row[1:], rows, rows[:, None, 1:], rows[:3].T]
    return [SummedPart(number, x, (1,) * x.ndim) for number, x in enumerate(tensors)]
