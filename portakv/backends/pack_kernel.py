# SPDX-License-Identifier: Apache-2.0
"""The text and arguments of the kernels that pack and unpack, for a plan.

Values that a model fixes become template parameters of ``native/cuda/pack.cuh``. Values that a
request changes become the argument ``PackOf``, packed here as that file declares it.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch

from portakv.backends.base import Capabilities, Decision, PackLaunch
from portakv.backends.rows_kernel import (
    MAX_INNER,
    MAX_OUTER,
    MAX_UNITS,
    REQUEST,
    SPAN,
    SPAN_AT,
    TABLES_AT,
    RowsBackend,
    RowsDriver,
    SideWords,
    extents,
    kernel_text,
)
from portakv.layout.packing import (
    COUNTS_AT,
    FLAG_AT,
    OVERFLOW,
    PACK,
    PACKED,
    SEGMENT,
    TOTAL_AT,
    VECTOR,
    PackedPlane,
    sampled,
)
from portakv.plan.loops import Loop
from portakv.plan.move import Move
from portakv.plan.packing import PackNest, PackPlan
from portakv.runtime.cuda import ArgumentLists
from portakv.view.form import Step, Steps
from portakv.view.index import Index
from portakv.view.view import KVView

# ------------------------------------------------------------------------------------------------
# `pack` in plain torch: planes of bf16 values to slots and back, on any torch device.

_EXPONENTS = 256


class Packed(NamedTuple):
    """Packed planes.

    Attributes:
        slots: uint8 ``[planes, slot_bytes]``.
        overflow: bool ``[planes]``, True for planes whose escapes do not fit.
        escapes: int64 ``[planes]``, the number of escapes.
    """

    slots: torch.Tensor
    overflow: torch.Tensor
    escapes: torch.Tensor


def pack_planes(values: torch.Tensor, plane: PackedPlane) -> Packed:
    """Pack planes of bf16 bits, int16 ``[planes, values]``."""
    bits = values.to(torch.int32) & 0xFFFF
    exponents = bits >> 7 & 0xFF
    table, codes_of = _tables(exponents, plane)
    codes = codes_of.gather(1, exponents.to(torch.int64))
    escaped = codes == plane.table_entries
    escapes = escaped.sum(1)
    overflow = escapes > plane.most_escapes

    slots = torch.zeros((len(values), plane.slot_bytes), dtype=torch.uint8, device=values.device)
    slots[:, : plane.codes_at] = bits >> 8 & 0x80 | bits & 0x7F
    slots[:, plane.codes_at : plane.head_at] = _join_codes(codes, plane.code_bits)
    head = slots[:, plane.head_at : plane.escapes_at]
    head[:, : table.shape[1]] = table
    _write_counts(head, escaped, plane)
    _write_escapes(slots[:, plane.escapes_at :], exponents, escaped & ~overflow[:, None])

    # Only the flag of a plane that overflows is kept.
    slots.masked_fill_(overflow[:, None], 0)
    slots[:, plane.head_at + FLAG_AT] = overflow.to(torch.uint8) * OVERFLOW
    return Packed(slots, overflow, escapes)


def unpack_planes(slots: torch.Tensor, plane: PackedPlane) -> tuple[torch.Tensor, torch.Tensor]:
    """Unpack slots, uint8 ``[planes, slot_bytes]``.

    Returns:
        The bf16 bits, int16 ``[planes, values]``, and for each plane True if its slot has the flag
        of a plane that did not fit; its values are then undefined.
    """
    places = slots[:, : plane.codes_at].to(torch.int32)
    joined = slots[:, plane.codes_at : plane.head_at]
    codes = _split_codes(joined, plane.code_bits).to(torch.int64)
    head = slots[:, plane.head_at : plane.escapes_at].to(torch.int32)
    escaped = codes == plane.table_entries

    # The table has no entry for the escape's code; its values follow from their ranks.
    table = torch.nn.functional.pad(head[:, : plane.table_entries], (0, 1))
    rank = (escaped.cumsum(1) - 1).clamp_(0, plane.most_escapes - 1)
    stored = slots[:, plane.escapes_at :].gather(1, rank).to(torch.int32)
    exponents = torch.where(escaped, stored, table.gather(1, codes))

    bits = (places & 0x80) << 8 | exponents << 7 | places & 0x7F
    return bits.to(torch.int16), head[:, FLAG_AT] != PACKED


def _tables(exponents: torch.Tensor, plane: PackedPlane) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the exponents with codes, int64 ``[planes, entries]``, and the code of each exponent,
    int64 ``[planes, 256]``."""
    device = exponents.device
    planes = len(exponents)
    entries = plane.table_entries
    counted = exponents
    if plane.sample == VECTOR:
        counted = exponents[:, _sampled_places(plane.values, device)]
    row = torch.arange(planes, dtype=torch.int64, device=device)[:, None] * _EXPONENTS
    bins = (row + counted).reshape(-1).bincount(minlength=planes * _EXPONENTS)
    counts = bins.view(planes, _EXPONENTS)

    # The exponent decides between equal counts, so all keys differ.
    every = torch.arange(_EXPONENTS, dtype=torch.int64, device=device)
    keys = (counts * _EXPONENTS + every).topk(entries, 1, sorted=True).values
    chosen = keys % _EXPONENTS
    counted_once = keys >= _EXPONENTS
    numbers = torch.arange(entries, dtype=torch.int64, device=device).expand(planes, entries)
    codes = torch.where(counted_once, numbers, entries)
    codes_of = torch.full((planes, _EXPONENTS), entries, dtype=torch.int64, device=device)
    codes_of.scatter_(1, chosen, codes)
    return chosen * counted_once, codes_of


def _sampled_places(values: int, device: torch.device) -> torch.Tensor:
    """Return the places of the values that count for the table, one of each vector."""
    return torch.tensor(_places(values), dtype=torch.int64, device=device)


@lru_cache(maxsize=64)
def _places(values: int) -> tuple[int, ...]:
    return tuple(q * VECTOR + sampled(q) for q in range(values // VECTOR))


def _write_counts(head: torch.Tensor, escaped: torch.Tensor, plane: PackedPlane) -> None:
    """Write the number of escapes, and the number before each segment except the first."""
    padding = plane.segments * SEGMENT - plane.values
    padded = torch.nn.functional.pad(escaped.to(torch.int32), (0, padding))
    totals = padded.view(len(escaped), plane.segments, SEGMENT).sum(2).cumsum(1)
    numbers = torch.cat([totals[:, -1:], totals[:, :-1]], 1)
    assert TOTAL_AT + 2 == COUNTS_AT
    for nth in range(plane.segments):
        at = TOTAL_AT + 2 * nth
        head[:, at] = numbers[:, nth] & 0xFF
        head[:, at + 1] = numbers[:, nth] >> 8 & 0xFF


def _write_escapes(area: torch.Tensor, exponents: torch.Tensor, escaped: torch.Tensor) -> None:
    """Write the exponents of escaped values one after the other, in the order of the values."""
    rank = escaped.cumsum(1) - 1
    where = escaped.nonzero(as_tuple=True)
    area[where[0], rank[where]] = exponents[where].to(torch.uint8)


def _join_codes(codes: torch.Tensor, code_bits: int) -> torch.Tensor:
    """Return the bytes of codes: two a byte, or eight in three bytes."""
    if code_bits == 4:
        return codes[:, ::2] | codes[:, 1::2] << 4
    groups = codes.view(len(codes), -1, 8)
    shifts = torch.arange(0, 24, 3, dtype=torch.int64, device=codes.device)
    joined = (groups << shifts).sum(2)
    return torch.stack([joined >> at & 0xFF for at in (0, 8, 16)], 2).flatten(1)


def _split_codes(joined: torch.Tensor, code_bits: int) -> torch.Tensor:
    """Return the codes in bytes that `_join_codes` returned."""
    if code_bits == 4:
        return torch.stack([joined & 15, joined >> 4], 2).flatten(1)
    groups = joined.to(torch.int32).view(len(joined), -1, 3)
    whole = groups[..., 0] | groups[..., 1] << 8 | groups[..., 2] << 16
    return torch.stack([whole >> at & 7 for at in range(0, 24, 3)], 2).flatten(1)


#: The names of the entries in a kernel's text: one packs, the other unpacks.
PACKS = "portakv_pack"
UNPACKS = "portakv_unpack"
#: Bytes of a vector of 8 values, the only access to raw rows.
ALIGNMENT = 16
#: Threads of one launch, of which HIP takes fewer than 2^32; a larger copy is split.
MAX_THREADS = 2**32 - 1024
#: Planes of a thread block, if a warp takes a plane.
_PLANES = 4
#: Threads of a multiprocessor for which it has 64 registers each.
_THREADS = 1024
#: Directions (True: packs) and thread blocks for which the compiler plans registers by itself.
_BY_COMPILER = frozenset({(False, 128), (False, 160), (False, 576), (True, 160)})


def refusal(nest: PackNest) -> str | None:
    """Return why the kernels do not take a nest, as a sentence; None if they do."""
    if nest.raw_vector < ALIGNMENT or nest.packed_vector < ALIGNMENT:
        width = min(nest.raw_vector, nest.packed_vector)
        return f"it needs {ALIGNMENT} B alignment and the plan allows {width} B"
    if any(step.table for step in (*nest.tokens, *nest.dim)):
        return "the tokens of a block lie in separate allocations"
    inner, _ = raw_steps(nest)
    units = max(len(nest.src.units), len(nest.dst.units))
    if len(nest.loops) > MAX_OUTER or len(inner) > MAX_INNER or units > MAX_UNITS:
        return (
            f"it takes {MAX_OUTER} loops over planes and {MAX_INNER} inside, and the plan has "
            f"{len(nest.loops)} and {len(inner)}"
        )
    return None


def raw_steps(nest: PackNest) -> tuple[Steps, int]:
    """Return the steps through the raw values of a plane, outermost first, and the bytes of a run
    without a gap."""
    outer = [*nest.tokens, *nest.dim]
    run = outer.pop().extent
    while outer and outer[-1].stride == run:
        run *= outer.pop().extent
    return tuple(outer), run


class PackKernel:
    """One nest of a plan: its instance of the kernel, and the packing of its arguments.

    Attributes:
        planes: planes of a unit.
        threads: of a thread block.
    """

    def __init__(self, nest: PackNest, plan: PackPlan) -> None:
        self._nest = nest
        self._packs = plan.packs
        self.unit = plan.unit
        self.planes = prod(loop.extent for loop in nest.loops)
        warps = nest.plane.segments
        self._planes = _PLANES if warps == 1 else 1
        self.threads = 32 * warps * self._planes
        self._steps, self._run = raw_steps(nest)
        raw = [_raw_loop(step) for step in self._steps]
        inner = (raw, []) if plan.packs else ([], raw)
        self.src = SideWords(nest, plan, "src", nest.loops, inner[0])
        self.dst = SideWords(nest, plan, "dst", nest.loops, inner[1])
        self._dst_table_at = TABLES_AT + 8 * max(1, self.src.entries)
        self._overflow_at = self._dst_table_at + 8 * max(1, self.dst.entries)

    @property
    def name(self) -> str:
        """The name of the entry."""
        return PACKS if self._packs else UNPACKS

    @property
    def names(self) -> Mapping[int, str]:
        """The names of its entries, as `RowsKernel` has them."""
        return {1: self.name}

    @property
    def fixed(self) -> bytes:
        """The argument with all values that do not change."""
        tables = max(1, self.src.entries) + max(1, self.dst.entries)
        return bytes(REQUEST.size) + self.src.fixed + self.dst.fixed + bytes(8 * tables + 8)

    @property
    def source(self) -> str:
        """The kernel's whole text; nests of one shape have one text."""
        plane = self._nest.plane
        raw, slots = ("Src", "Dst") if self._packs else ("Dst", "Src")
        inner = extents([step.extent for step in self._steps])
        function = "pack_planes" if self._packs else "unpack_planes"
        threads = self.threads
        # 0: the compiler plans its registers for no number of thread blocks.
        by_compiler = (self._packs, threads) in _BY_COMPILER
        blocks = 0 if by_compiler else max(1, round(_THREADS / threads))
        return "\n".join(
            [
                kernel_text("cuda/pack.cuh"),
                "using namespace portakv;",
                f"typedef {extents([loop.extent for loop in self._nest.loops])} Outer;",
                f"typedef {self.src.shape} Src;",
                f"typedef {self.dst.shape} Dst;",
                f"typedef pack::Format<{plane.code_bits}, {plane.values}, {plane.slot_bytes}> F;",
                f"typedef pack::Raw<{raw}, {self._run // ALIGNMENT}, {inner}> R;",
                "typedef pack::PackOf<Src, Dst> Argument;",
                f'extern "C" __global__ void PORTAKV_BOUNDS({threads}, {blocks}) {self.name}('
                f"const PORTAKV_CONSTANT Argument argument) {{",
                f"    pack::{function}<F, R, {slots}, Outer, {self._planes}>(argument);",
                "}\n",
            ]
        )

    def grid(self, units: int) -> int:
        """Return the thread blocks of a launch of so many units."""
        return -(-units * self.planes // self._planes)

    def pack(self, buffer: bytearray, move: Move, status: int, overflow: int) -> None:
        """Pack a request's addresses and counts into the argument; `pack_span` completes it.

        ``status`` and ``overflow`` are the addresses of the status word and of the overflow words.
        """
        src = self.src.request(move.src, move.src_index)
        dst = self.dst.request(move.dst, move.dst_index)
        REQUEST.pack_into(buffer, 0, *src, *dst, 0, 0, self.unit, 0, status)
        if self.src.entries:
            table = self.src.table(move.src)
            buffer[TABLES_AT : TABLES_AT + len(table)] = table
        if self.dst.entries:
            table = self.dst.table(move.dst)
            buffer[self._dst_table_at : self._dst_table_at + len(table)] = table
        struct.pack_into("<q", buffer, self._overflow_at, overflow)

    def spans(self, units: int) -> list[tuple[int, int]]:
        """Return (first unit, units) of each launch."""
        of_plane = self.threads // self._planes
        most = max(1, MAX_THREADS // of_plane // self.planes)
        return [(start, min(most, units - start)) for start in range(0, units, most)]

    def pack_span(self, buffer: bytearray, start: int, units: int) -> None:
        """Pack the units that this launch moves."""
        SPAN.pack_into(buffer, SPAN_AT, units, start)


def _raw_loop(step: Step) -> Loop:
    """Return a loop of which only the raw side's stride is read."""
    return Loop(("token",), step.extent, 0, step.stride, 0, step.stride)


# ------------------------------------------------------------------------------------------------
# Load and launch the kernels that pack and unpack on any device, through its driver.


class PackingRowsBackend(RowsBackend):
    """A backend that also packs and unpacks rows of its own device, by the kernels of
    `pack_kernel`."""

    def capabilities(self) -> Capabilities:
        return replace(super().capabilities(), encodings=frozenset({PACK}))

    def check_pack(self, plan: PackPlan) -> Decision:
        decision = super().check_pack(plan)
        whys = (refusal(nest) for nest in plan.nests)
        why = next((why for why in whys if why is not None), None)
        if plan.src.place == "peer":
            why = "it packs rows of its own device only"
        if decision.accepted and why is not None:
            return Decision(self.name, False, why)
        return decision

    def prepare_pack(self, plan: PackPlan) -> PackLaunch:
        kernels = [PackKernel(nest, plan) for nest in plan.nests]
        functions = [entries[1] for entries in self._kernels.functions(kernels)]
        return KernelPackLaunch(kernels, functions, self._driver)


class KernelPackLaunch:
    """The launch of a plan that packs or unpacks; see `base.PackLaunch`.

    Words for blocks that do not fit may also be on the device.

    Args:
        kernels: one for each nest.
        functions: the entry of each kernel, loaded.
        driver: of the device that the kernels are loaded on.
    """

    overflow_on_host = True

    def __init__(
        self, kernels: Sequence[PackKernel], functions: Sequence[object], driver: RowsDriver
    ) -> None:
        self._parts = list(zip(kernels, functions, strict=True))
        self._unit = kernels[0].unit
        self._driver = driver
        kinds = zip(*((kernel.src.kind, kernel.dst.kind) for kernel in kernels), strict=True)
        self.tables = tuple("UNITS" in side for side in kinds)
        self._arguments = ArgumentLists([kernel.fixed for kernel in kernels], driver.current)

    def __call__(
        self,
        src: KVView,
        dst: KVView,
        src_index: Index,
        dst_index: Index,
        count: int,
        stream: torch.Stream | None,
        status: torch.Tensor | None,
        overflow: torch.Tensor,
    ) -> None:
        """Order a copy on a stream; see `base.PackLaunch`."""
        if not count:
            return
        move = Move(src, dst, src_index, dst_index, count)
        handle = self._driver.handle(stream)
        if handle is None:
            with self._driver.current():
                self._enqueue(move, self._driver.handle(stream), status, overflow)
            return
        self._enqueue(move, handle, status, overflow)

    def _enqueue(
        self, move: Move, handle: object, status: torch.Tensor | None, overflow: torch.Tensor
    ) -> None:
        driver = self._driver
        units = move.count // self._unit
        word = 0 if status is None else driver.word(status.data_ptr())
        words = overflow.data_ptr()
        if overflow.is_cpu:
            words = driver.word(words)
        arguments = self._arguments
        for at, (kernel, function) in enumerate(self._parts):
            buffer = arguments.buffers[at]
            address = arguments.addresses[at]
            kernel.pack(buffer, move, word, words)
            for start, span in kernel.spans(units):
                kernel.pack_span(buffer, start, span)
                blocks = kernel.grid(span)
                threads = kernel.threads
                result = driver.launch(function, blocks, 1, 1, threads, 1, 1, 0, handle, address, 0)
                if result != driver.success:
                    driver.check(result, "The launch")
