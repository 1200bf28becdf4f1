# SPDX-License-Identifier: Apache-2.0
"""Fingerprints of blocks: sums of words by head and by token, on the device that has the blocks.

A plane of a block is the rows of one layer and one kv. Its fingerprint has two kinds of sums, of 64
bits each:

- by head: the words of the head, times the keys of their token and of their place in the row;
- by segment, which is one token or a few: the words of the segment, times the keys of their head,
  of their token in the segment, and of their place in the row.

No key depends on the layer or the kv. The sum of a head does not depend on the head's number, and
that of a segment does not depend on the segment's. So equal rows have equal sums in any other
layer, head, block or rank, and after a shift by segments; that is how a fault gets its name. The
two kinds locate a difference by layer, kv, head and token.

Keys are the odd numbers of `portakv.runtime.word_sums`, multiplied axis by axis, and sums are
modulo 2^64. A word has at most 32 bits, so one changed word always changes its sums. Two unequal
parts that were not made for it have equal sums with a probability near 2^-64; it is 2^-33 at worst,
if only the highest bits of words differ. Each changed word is in two sums, which have different
keys. A name needs equal sums in all planes that differ, so that a wrong name is less likely still.
Fingerprints are no protection against an attacker, who can compute them.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import product
from math import gcd
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from portakv.copy import copy_rows
from portakv.errors import LayoutError, SlotError, Unsupported
from portakv.runtime.bounded import Bounded
from portakv.runtime.cuda import KernelDriver
from portakv.runtime.word_sums import (
    AXIS,
    WORDS,
    checked_kernel,
    driver_of,
    keys_of,
    words_text,
)
from portakv.view import Index, KVView
from portakv.view.form import Form, Step, locate

Sums: TypeAlias = npt.NDArray[np.int64]
Number = TypeVar("Number", np.int64, np.bool_)

NAME = "portakv_fingerprints"
THREADS = 256
#: The most segments of a block.
SEGMENTS = 16
#: Bytes of the widest vector of the kernel.
VECTOR = 16
#: Bytes of rows that torch's operators sum together; on a host they fit the cache of a core.
TOGETHER = 32 << 20
TOGETHER_ON_HOST = 1 << 20
# The numbers of the axes whose positions have keys.
_PLACE, _TOKEN, _IN_SEGMENT, _HEAD = range(4)
_PLANE = struct.Struct("<7q")
_BLOCKS = struct.Struct("<10q")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Geometry:
    """The sums of a block.

    A fingerprint is int64 ``[layers * kv * (heads + segments)]``: the sums of each layer, kv and
    head, then those of each layer, kv and segment.

    Attributes:
        layers, kv, heads: of the view.
        segments: of a block, or of each page or slot whose rows are not known.
        tokens: of a segment; 0 if a segment is a part of a page.
        widths: bytes of a row for each kv; of a page, those in a segment.
        unit: bytes of a word.
    """

    layers: int
    kv: int
    heads: int
    segments: int
    tokens: int
    widths: tuple[int, ...]
    unit: int

    @property
    def count(self) -> int:
        """Return the number of sums."""
        return self.layers * self.kv * (self.heads + self.segments)

    @property
    def head_sums(self) -> int:
        """Return the number of the first sums, by head: each byte of the rows is in one of them."""
        return self.layers * self.kv * self.heads

    @property
    def nbytes(self) -> int:
        """Return the bytes of the fingerprint of a block."""
        return 8 * self.count

    @property
    def block_bytes(self) -> int:
        """Return the bytes of a block's rows."""
        rows = self.segments * max(1, self.tokens)
        return self.layers * self.heads * rows * sum(self.widths)

    def by_head(self, sums: npt.NDArray[Number]) -> npt.NDArray[Number]:
        """Return sums ``[..., layers, kv, heads]`` of fingerprints ``[..., count]``."""
        return sums[..., : self.head_sums].reshape(
            *sums.shape[:-1], self.layers, self.kv, self.heads
        )

    def by_segment(self, sums: npt.NDArray[Number]) -> npt.NDArray[Number]:
        """Return sums ``[..., layers, kv, segments]`` of fingerprints ``[..., count]``."""
        return sums[..., self.head_sums :].reshape(
            *sums.shape[:-1], self.layers, self.kv, self.segments
        )


class Fingerprints:
    """Compute the fingerprints of the blocks of a view.

    Args:
        view: paged, on the host or on a device.
        kernel: for devices and the layouts that it reads; None: torch's operators compute.

    Attributes:
        view: of the blocks; packed blocks are rows of bytes.
        geometry: of a fingerprint.
        blocks: how many the view has.

    Raises:
        LayoutError: the view is not paged.
        Unsupported: the rows are in another process.
    """

    def __init__(self, view: KVView, kernel: FingerprintKernel | None) -> None:
        if not view.form.paged:
            raise LayoutError(
                f"Expected a paged view, got {view.layout.text!r}, whose rows have no blocks. Pass "
                f"a view of the engine's cache."
            )
        if view.form.place == "remote":
            why = "its rows are in another process; make the witness there"
            raise Unsupported(f"A fingerprint of {view.layout.text!r}", why)
        self.blocks = view.slots // view.form.block_size
        self.view = (view.as_slots() if view.form.encoding else view).as_bytes()
        form = self.view.form
        self._tokens = 1 if form.opaque else form.block_size  # rows of a head in a block
        self._split = _segments_of_page(form) if self._tokens == 1 else 1
        rows = self._tokens * self._split
        segments = max(n for n in range(1, SEGMENTS + 1) if rows % n == 0)
        tokens = 0 if self._split > 1 or form.opaque else rows // segments
        widths = tuple(width // self._split for width in form.widths)
        unit = unit_of(form)
        self.geometry = Geometry(form.layers, form.kv, form.heads, segments, tokens, widths, unit)
        self._keys = keys_for(self.geometry, self.view.device)
        self._rows = rows
        self._each = rows // segments
        self._tables: _Tables | None = None
        self._kernel: FingerprintKernel | None = None
        if kernel is not None and not _goes_through_tables(form):
            self._kernel = kernel
            self._tables = self._made_tables()

    @property
    def has_kernel(self) -> bool:
        """Return whether one launch computes the fingerprints of any number of blocks."""
        return self._kernel is not None

    def of(self, blocks: npt.NDArray[np.int64]) -> torch.Tensor:
        """Return the fingerprints of blocks, int64 ``[blocks, count]`` on the view's device.

        Computes on the current stream of the device; the host does not wait for it.

        Raises:
            SlotError: a block that the view does not have.
            LayoutError: the memory of a tensor was replaced.
        """
        if len(blocks) and not 0 <= blocks.min() <= blocks.max() < self.blocks:
            raise SlotError(
                f"Expected blocks from 0 to {self.blocks - 1}, got {blocks.min()} to "
                f"{blocks.max()}. Pass the engine's blocks of this view."
            )
        with torch.inference_mode():
            if self._kernel is not None and self._tables is not None and len(blocks):
                self.view.check_memory()
                return self._kernel.sums(self._tables, blocks, self.geometry)
            return self._by_torch(blocks)

    def rows(self, block: int) -> list[torch.Tensor]:
        """Return a copy of the rows of a block on the view's device.

        For each kv uint8 ``[layers, tokens, heads * width]``; of pages ``[layers, 1, width]``.
        """
        return self._gathered(np.array([block], np.int64))

    def of_rows(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the fingerprints of blocks from copies of their rows, as `rows` returns them."""
        return sums_of_rows(self.geometry, tensors, self._keys)

    def _by_torch(self, blocks: npt.NDArray[np.int64]) -> torch.Tensor:
        """Return fingerprints by torch's operators, from copies of some blocks at a time."""
        together = TOGETHER_ON_HOST if self.view.device.type == "cpu" else TOGETHER
        most = max(1, together // self.geometry.block_bytes)
        sums = [
            self.of_rows(self._gathered(blocks[at : at + most]))
            for at in range(0, len(blocks), most)
        ]
        if not sums:
            size = 0, self.geometry.count
            return torch.empty(size, dtype=torch.int64, device=self.view.device)
        return torch.cat(sums)

    def _gathered(self, blocks: npt.NDArray[np.int64]) -> list[torch.Tensor]:
        """Return a copy of the rows of blocks, as `sums_of_rows` takes them."""
        view = self.view
        form = view.form
        size = form.block_size
        count = len(blocks) * size
        rows = len(blocks) if form.opaque else count
        layout = "kv | layer block page" if form.opaque else "kv | layer token (head dim)"
        tensors = [
            torch.empty(
                (form.layers, rows, form.heads * width), dtype=torch.uint8, device=view.device
            )
            for width in form.widths
        ]
        terms: dict[str, Any] = {"heads": form.heads}
        if form.opaque:
            terms = {"block_size": size}
        dense = KVView(tensors, layout, kv=form.kv, dim=form.widths, **terms)
        copy_rows(view, dense.as_bytes(), Index(blocks, size), count=count).wait()
        return tensors

    def _made_tables(self) -> _Tables:
        """Return the addresses and offsets of rows, and the keys, on the device."""
        form = self.view.form
        geometry = self.geometry
        origins = self.view.origins
        numbers = list[int]()
        planes = list[tuple[int, ...]]()
        for kv, part in enumerate(form.parts):
            vector = _vector_of(form, geometry, origins, kv)
            columns = geometry.widths[kv] // vector
            at = [len(numbers)]
            for layer in range(form.layers):
                (entry, offset) = locate(part.table, part.offset, part.layer, layer)
                numbers.append(origins[entry] + offset)
            at.append(len(numbers))
            for token, piece in product(range(self._tokens), range(self._split)):
                (_, offset) = locate(0, 0, part.token, token)
                numbers.append(offset + piece * geometry.widths[kv])
            at.append(len(numbers))
            numbers += [locate(0, 0, part.head, head)[1] for head in range(form.heads)]
            at.append(-1)
            if not _is_one_run(part.dim):
                at[-1] = len(numbers)
                numbers += [locate(0, 0, part.dim, n * vector)[1] for n in range(columns)]
            lanes = min(THREADS, 1 << (columns - 1).bit_length())
            planes.append((vector, columns, lanes, *at))

        of = keys_for(geometry, torch.device("cpu"))
        keys = torch.cat([of.tokens, of.inside, of.heads])
        shapes = len(planes) * _PLANE.size // 8
        table = torch.empty(
            shapes + len(numbers) + len(keys), dtype=torch.int64, device=self.view.device
        )
        first = table.data_ptr() + 8 * shapes
        packed = b"".join(
            _PLANE.pack(*plane[:3], *(first + 8 * at if at >= 0 else 0 for at in plane[3:]))
            for plane in planes
        )
        shape_words = torch.frombuffer(bytearray(packed), dtype=torch.int64)
        table.copy_(torch.cat([shape_words, torch.tensor(numbers, dtype=torch.int64), keys]))
        steps = [part.block for part in form.parts]
        return _Tables(table, first + 8 * len(numbers), steps, self._rows)


@dataclass(frozen=True)
class _Tables:
    """The tables of a view for the kernel.

    Attributes:
        table: on the device: of each kv the `Plane` of the kernel's text, then what these name.
        keys_at: the address of the keys.
        blocks: for each kv the steps of the axis of blocks.
        rows: of a head in a block.
    """

    table: torch.Tensor
    keys_at: int
    blocks: Sequence[Sequence[Step]]
    rows: int


class FingerprintKernel:
    """Compute the fingerprints of blocks of one device, in one launch.

    Args:
        device: of the blocks.
        driver: of the device.

    Raises:
        RuntimeError: the compilation failed, with the compiler's log.
        TransferError: the driver rejects the kernel.
    """

    def __init__(self, device: torch.device, driver: KernelDriver) -> None:
        self.device = device
        self._driver = driver
        self._function = driver.load(kernel_text(), [NAME])[NAME]

    def sums(
        self, tables: _Tables, blocks: npt.NDArray[np.int64], geometry: Geometry
    ) -> torch.Tensor:
        """Return the fingerprints of at least one block, int64 ``[blocks, count]``."""
        driver = self._driver
        if driver.number(None) is None:
            with driver.current():
                return self.sums(tables, blocks, geometry)
        count = len(blocks)
        # Sent from pinned memory, no copy waits for the stream.
        pinned = torch.empty(
            (geometry.kv, count),
            dtype=torch.int64,
            device="cpu",
            pin_memory=self.device.type != "cpu",
        )
        offsets = pinned.numpy()
        for kv, steps in enumerate(tables.blocks):
            offsets[kv] = _offsets_of(steps, blocks)
        sent = pinned.to(self.device, non_blocking=True)
        sums = torch.empty((count, geometry.count), dtype=torch.int64, device=self.device)
        parameter = _BLOCKS.pack(
            tables.table.data_ptr(),
            sent.data_ptr(),
            sums.data_ptr(),
            tables.keys_at,
            count,
            geometry.layers,
            geometry.kv,
            tables.rows,
            geometry.heads,
            geometry.segments,
        )
        driver.launch(self._function, count * geometry.layers * geometry.kv, THREADS, parameter)
        return sums


def kernel_text() -> str:
    """Return the kernel's text."""
    text = files("portakv.witness").joinpath("fingerprint.cuh").read_text()
    return f"#define PORTAKV_SUM_THREADS {THREADS}\n{words_text()}{text}"


class Keys(NamedTuple):
    """The keys of positions, int64, on one device.

    Attributes:
        places: of the words of a row, for each kv.
        tokens: of the rows of a head in a block.
        inside: of the rows of a head in a segment.
        heads: of the heads.
    """

    places: Sequence[torch.Tensor]
    tokens: torch.Tensor
    inside: torch.Tensor
    heads: torch.Tensor


def keys_for(geometry: Geometry, device: torch.device) -> Keys:
    """Return the keys of the sums of a geometry."""
    each = max(1, geometry.tokens)
    words = [width // geometry.unit for width in geometry.widths]
    return Keys(
        [keys_of(_PLACE * AXIS, n, device) for n in words],
        keys_of(_TOKEN * AXIS, geometry.segments * each, device),
        keys_of(_IN_SEGMENT * AXIS, each, device),
        keys_of(_HEAD * AXIS, geometry.heads, device),
    )


def sums_of_rows(geometry: Geometry, tensors: Sequence[torch.Tensor], keys: Keys) -> torch.Tensor:
    """Return fingerprints, int64 ``[blocks, count]``, from the rows of blocks in order.

    ``tensors``: for each kv uint8 ``[layers, rows of all blocks, heads * width]``, contiguous.
    """
    layers = geometry.layers
    heads = geometry.heads
    segments = geometry.segments
    each = max(1, geometry.tokens)
    by_head = list[torch.Tensor]()
    by_segment = list[torch.Tensor]()
    for tensor, places in zip(tensors, keys.places, strict=True):
        words = tensor.view(WORDS[geometry.unit])
        if geometry.tokens:
            words = words.view(layers, -1, segments, each, heads, len(places))
            order = (1, 0, 4, 2, 3)
        else:  # a segment is a part of the row of a head
            words = words.view(layers, -1, heads, segments, each, len(places))
            order = (1, 0, 2, 3, 4)
        # Rows are [blocks, layers, heads, segments, tokens].
        rows = _sums_of_words(words, places).permute(order)
        by_head.append((rows * keys.tokens.view(segments, each)).sum((-1, -2)))
        by_segment.append(((rows * keys.inside).sum(-1) * keys.heads[:, None]).sum(-2))
    parts = [torch.stack(x, 2).flatten(1) for x in (by_head, by_segment)]
    return torch.cat(parts, 1)


def _sums_of_words(words: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Return the sum of the words of each row times their keys, int64."""
    if words.device.type == "cpu":  # in one thread: torch's threads would wait for each other
        sums = np.einsum("...n,n->...", words.numpy(), places.numpy())
        return torch.from_numpy(np.asarray(sums))
    return words.to(torch.int64).mul_(places).sum(-1)


def unit_of(form: Form) -> int:
    """Return the bytes of the widest words that all rows of a form begin and end with."""
    numbers = [4, form.alignment, *form.widths]
    for part in form.parts:
        numbers.append(part.offset)
        for steps in (part.layer, part.block, part.token, part.head):
            numbers += [step.stride for step in steps]
        numbers.append(_run(part.dim))
        numbers += [step.stride for step in part.dim if step.stride != 1]
    if _segments_of_page(form) > 1:
        numbers += [width // _segments_of_page(form) for width in form.widths]
    return gcd(*numbers)


def _run(steps: Sequence[Step]) -> int:
    """Return the bytes of a row that lie next to each other."""
    return steps[-1].extent if steps and steps[-1].stride == 1 else 1


def _is_one_run(steps: Sequence[Step]) -> bool:
    return len(steps) == 1 and steps[0].stride == 1


def _segments_of_page(form: Form) -> int:
    """Return the number of parts into which rows of pages are divided: 1 for rows of tokens."""
    if not (form.opaque or form.block_size == 1):
        return 1
    if not all(_is_one_run(part.dim) for part in form.parts):
        return 1
    whole = gcd(*form.widths)
    aligned = whole // VECTOR if whole % VECTOR == 0 else whole // gcd(4, whole)
    return max(n for n in range(1, SEGMENTS + 1) if aligned % n == 0)


def _goes_through_tables(form: Form) -> bool:
    """Return whether blocks, tokens, heads or places lie in tensors of their own."""
    axes = ("block", "token", "head", "dim")
    return any(step.table for part in form.parts for axis in axes for step in part.axis(axis))


def _vector_of(form: Form, geometry: Geometry, origins: Sequence[int], kv: int) -> int:
    """Return the bytes that the kernel reads of a row of a kv in one access."""
    part = form.parts[kv]
    numbers = [VECTOR, geometry.widths[kv], part.offset, _run(part.dim), *origins]
    for axis in ("layer", "block", "token", "head", "dim"):
        numbers += [step.stride for step in part.axis(axis)]
    numbers = [n for n in numbers if n != 1]
    widest = gcd(*numbers) if _run(part.dim) > 1 else 1
    return VECTOR if widest == VECTOR and geometry.unit == 4 else geometry.unit


def _offsets_of(steps: Sequence[Step], blocks: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the offset of each block in bytes."""
    offsets = np.zeros_like(blocks)
    rest = blocks
    for step in reversed(steps):
        at = rest
        if step.extent:
            (rest, at) = np.divmod(rest, step.extent)
        offsets = offsets + at * step.stride
    return offsets


# ------------------------------------------------------------------------------------------------
# The choice between the kernel and torch's operators.

_kernels: Bounded[torch.device, FingerprintKernel | None] = Bounded("kernels of fingerprints", 64)


def fingerprints_of(view: KVView) -> Fingerprints:
    """Return what computes the fingerprints of a view, with a kernel if its device has one.

    The first call for a device compiles the kernel, or reads it from disk, and compares its sums
    with those of torch. Raises as `Fingerprints`.
    """
    kernel = None
    if view.device.type != "cpu":
        device = view.device
        kernel = _kernels.get_or_make(device, lambda: load_kernel(device, driver_of))
    return Fingerprints(view, kernel)


def load_kernel(
    device: torch.device, find_driver: Callable[[torch.device], KernelDriver]
) -> FingerprintKernel | None:
    """Return the kernel of a device; None, with a log, if it cannot be used."""
    return checked_kernel(
        "Fingerprints",
        device,
        _log,
        lambda: FingerprintKernel(device, find_driver(device)),
        _agrees,
    )


def _agrees(kernel: FingerprintKernel, device: torch.device) -> bool:
    """Return whether a kernel and torch have the same sums of blocks of several layouts."""
    numbers = torch.arange(1 << 13, dtype=torch.int64) * 0x9E3779B97F4A7
    words = numbers.view(torch.int16)[: 3 * 2 * 5 * 2 * 32 * 8].to(device)
    octets = words.view(torch.int8).view(6, 5, 1, 1024)
    views = [
        KVView(words.view(3, 2, 5, 2, 32, 8), "layer kv block head token dim"),
        KVView(words.view(3, 2, 5, 2, 32, 8), "layer kv block head dim token"),
        KVView(octets[..., 1:], "layer block token dim"),
        KVView(octets.view(2, 5, 192, 16)[:, :, 1:], "layer block token dim"),
        KVView(words.view(6, 5, 512), "layer block page", block_size=16),
        KVView(
            [words[:320].view(5, 4, 16), words[:480].view(5, 4, 24)],
            "kv | block token dim",
            dim=(16, 24),
        ),
    ]
    blocks = np.array([4, 0, 3], np.int64)
    for view in views:
        if not torch.equal(
            Fingerprints(view, kernel).of(blocks), Fingerprints(view, None).of(blocks)
        ):
            return False
    return True
