# SPDX-License-Identifier: Apache-2.0
"""Share settings, cases and memory among the parts of the benchmark of encodings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from portakv import Index, KVView, Pack
from portakv.host import pinned
from portakv.layout.encodings import PackedPlane
from portakv_benchmarks.host.suite import HOST_PRESETS, KB, MB, Bench
from portakv_benchmarks.shared import harness
from portakv_benchmarks.shared.harness import Timer
from portakv_benchmarks.shared.shapes import POISON

_SEED = 20261126
#: Values that repeat.
_PART = 1 << 22


@dataclass(frozen=True, slots=True)
class Case:
    """Blocks of rows, and how they are packed."""

    name: str
    tokens: int  # of a block
    dim: int
    layout: str
    bits: int = 4  # of a code
    layers: int = 32
    kv: int = 2
    heads: int = 8
    consecutive: bool = False  # the blocks, on both sides; else they are in random order

    def block_order(self, blocks: int, seed: int) -> torch.Tensor:
        """Return the ids of so many blocks, in the order in which they are moved."""
        if self.consecutive:
            return torch.arange(blocks, device="cpu")
        return torch.randperm(blocks, generator=torch.Generator().manual_seed(seed), device="cpu")

    @property
    def plane(self) -> PackedPlane:
        """Return the geometry of a slot."""
        return Pack(self.bits).plane(self.tokens * self.dim)

    @property
    def planes(self) -> int:
        """Return the planes of a block."""
        return self.layers * self.kv * self.heads

    @property
    def block_bytes(self) -> int:
        """Return the raw bytes of a block."""
        return self.planes * self.plane.raw_bytes

    @property
    def block_axis(self) -> int:
        """Return the place of the blocks in the layout."""
        return self.layout.split().index("block")

    def extents(self, blocks: int) -> list[int]:
        """Return the extents of the layout's tensor."""
        sizes = {"layer": self.layers, "kv": self.kv, "block": blocks, "head": self.heads}
        sizes |= {"token": self.tokens, "dim": self.dim}
        return [sizes[axis] for axis in self.layout.split()]

    def view(self, rows: torch.Tensor) -> KVView:
        """Return the view of rows in the layout."""
        return KVView(rows, self.layout, kv=self.kv)

    def dense(self, blocks: int, memory: torch.Tensor) -> torch.Tensor:
        """Return rows whose blocks are contiguous, from the start of bytes."""
        extents = self.extents(blocks)
        extents.insert(0, extents.pop(self.block_axis))
        rows = memory[: blocks * self.block_bytes].view(torch.bfloat16)
        return rows.view(extents)

    def dense_view(self, rows: torch.Tensor) -> KVView:
        """Return the view of such rows."""
        others = [axis for axis in self.layout.split() if axis != "block"]
        return KVView(rows, " ".join(["block", *others]), kv=self.kv)

    def slots(self, blocks: int, memory: torch.Tensor) -> KVView:
        """Return the view of packed blocks, from the start of bytes."""
        extents = (blocks, self.layers, self.kv, self.heads, self.plane.slot_bytes)
        nbytes = blocks * self.planes * self.plane.slot_bytes
        return KVView(
            memory[:nbytes].view(extents),
            "block layer kv head page",
            kv=self.kv,
            block_size=self.tokens,
            dim=self.dim,
            encoding=Pack(self.bits),
        )

    def by_block(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the bits of rows in the layout, ``[blocks, ...]``."""
        return rows.view(torch.int16).movedim(self.block_axis, 0)


NHD = "layer kv block token head dim"
HND = "layer kv block head token dim"
LATENT = "layer block token dim"
CASES = (
    Case("2,048 values", 16, 128, NHD),
    Case("2,048 values, 3 bits", 16, 128, NHD, 3),
    Case("8,192 values", 64, 128, NHD),
    Case("MLA, 9,216 values", 16, 576, LATENT, layers=61, kv=1, heads=1),
    Case("2,048 values, HND", 16, 128, HND),
    Case("8,192 values, 3 bits", 64, 128, NHD, 3),
    Case("8,192 values, HND", 64, 128, HND),
    Case("MLA, 36,864 values", 64, 576, LATENT, layers=61, kv=1, heads=1),
)
DENSE = (
    Case("2,048 values, dense", 16, 128, NHD, consecutive=True),
    Case("8,192 values, HND, dense", 64, 128, HND, consecutive=True),
)
#: For tests: few planes of a block.
TINY = (
    Case("2,048 values", 16, 128, NHD, layers=2, heads=2),
    Case("MLA, 1,024 values, 3 bits", 16, 64, LATENT, 3, layers=2, kv=1, heads=1, consecutive=True),
)


@dataclass(frozen=True, slots=True)
class EncodingPreset:
    """Set the amount of measurement; payloads in bytes of raw rows."""

    inside: tuple[int, ...]  # inside a device
    across: tuple[int, ...]  # over the link
    both: tuple[int, ...]  # of each direction, for both at the same time
    sent: tuple[int, ...]  # by transports
    cases: tuple[Case, ...]
    linked: tuple[Case, ...]  # over the link
    rounds: int
    seconds: float  # bound the rounds of one measurement
    alongside: int  # payload of a copy alongside a loop of compute
    loops: str  # the sizes of these loops, a preset of the host link's benchmark


ENCODING_PRESETS: Mapping[str, EncodingPreset] = {
    "full": EncodingPreset(
        inside=(64 * MB, 256 * MB, 1024 * MB),
        across=(16 * MB, 32 * MB, 64 * MB, 128 * MB, 256 * MB, 1024 * MB),
        both=(128 * MB, 512 * MB),
        sent=(128 * MB, 512 * MB),
        cases=(*CASES, *DENSE),
        linked=(*CASES[:4], DENSE[0]),
        rounds=9,
        seconds=1.0,
        alongside=256 * MB,
        loops="full",
    ),
    # For tests: it runs everywhere in seconds, and its figures mean nothing.
    "tiny": EncodingPreset(
        inside=(64 * KB,),
        across=(64 * KB, 128 * KB),
        both=(64 * KB,),
        sent=(64 * KB,),
        cases=TINY,
        linked=TINY[:1],
        rounds=1,
        seconds=0.0,
        alongside=64 * KB,
        loops="tiny",
    ),
}


class EncodingBench(Bench):
    """The device, and what times copies inside of it."""

    def __init__(self, device: torch.device, preset: EncodingPreset) -> None:
        super().__init__(device, HOST_PRESETS[preset.loops])
        self.sizes = preset
        if device.type == "cpu":
            self.absent = {}  # no strategy is measured

    @cached_property
    def inside(self) -> Timer:
        """What times copies inside the device."""
        if self.device.type != "cuda":
            return self.host_timer
        return harness.DeviceTimer(self.device)


class Memory:
    """Rows on a device: blocks to read, and poisoned ones to write.

    Attributes:
        rows: normally distributed values; with 4 bits every channel has its own scale.
        written: as many rows.
    """

    def __init__(self, case: Case, payload: int, device: torch.device) -> None:
        self.case = case
        self.blocks = payload // case.block_bytes
        self.rows = torch.empty(case.extents(self.blocks), dtype=torch.bfloat16, device=device)
        self.written = torch.empty_like(self.rows)
        _fill(self.rows, case)
        self.order = case.block_order(self.blocks, _SEED)
        self.placed = self.order.to(device)

    def index(self, blocks: int) -> Index:
        """Return the ids of so many blocks."""
        return Index(self.order[:blocks], step=self.case.tokens)

    def read(self, blocks: int) -> torch.Tensor:
        """Return the bits of the blocks that `index` names, in its order."""
        return self.case.by_block(self.rows)[self.placed[:blocks]]

    def poison(self) -> None:
        """Overwrite the rows that are written."""
        poison(self.written)

    def right(self, blocks: int, first: int = 0) -> bool:
        """Return True if the blocks of `index` from ``first`` on were written, and no others."""
        at = self.placed[first:blocks]
        moved = self.case.by_block(self.written)
        same = torch.equal(moved[at], self.case.by_block(self.rows)[at])
        others = torch.cat([self.placed[:first], self.placed[blocks:]])
        unchanged = moved[others].contiguous().view(torch.uint8) == POISON
        return same and bool(unchanged.all())


def host_memory(nbytes: int) -> torch.Tensor:
    """Return pinned bytes."""
    return pinned.empty(nbytes, dtype=torch.uint8)


def poison(memory: torch.Tensor) -> None:
    """Overwrite every byte."""
    memory.view(torch.uint8).fill_(POISON)


def _fill(rows: torch.Tensor, case: Case) -> None:
    """Fill rows with values as they occur in caches, in parts that repeat; equal in every run."""
    random = torch.Generator().manual_seed(_SEED)
    values = torch.randn(_PART // case.dim, case.dim, device="cpu", generator=random)
    if case.bits == 4:
        values *= torch.randn(case.dim, device="cpu", generator=random).exp()
    part = values.to(torch.bfloat16).to(rows.device)
    for some in rows.view(-1, case.dim).split(len(part)):
        some.copy_(part[: len(some)])
