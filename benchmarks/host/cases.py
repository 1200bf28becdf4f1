# SPDX-License-Identifier: Apache-2.0
"""Cases of the host benchmarks: layouts on the device and the host, payloads, memory and checks.

All cases share a region on the device and a region on the host, since pinning is slow. Plain
indexing on the device checks every byte; a plain copy brings the host's bytes there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any, NamedTuple

import torch

from portakv import Index, KVView
from portakv.cli.sides import Shape
from portakv.host import pinned
from portakv_benchmarks.shared.shapes import POISON, fill, in_words, moved, planes, sizes

#: Names of directions: from the device to the host, and from the host to the device.
DIRECTIONS = ("d2h", "h2d")

LAYER_FIRST = "layer | kv block token head dim"  # paged, each layer a separate allocation
BLOCK_FIRST = "block layer kv token head dim"  # the bytes of a block are contiguous
POOL_BY_LAYER = "layer kv block token head dim"
CHUNK = "kv layer token (head dim)"

_LAYERS = 32
_KV = 2
_DIM = 128
_BLOCK = 16
_ITEM = 2  # bytes of an element
#: Slots of the device's cache for each moved token: a cache is sparse while a model runs. Then
#: blocks of the host's pool for each moved block.
_POOL = 4
_HOST_POOL = 2


@dataclass(frozen=True, slots=True)
class Scene:
    """Layouts and ids of both sides."""

    run: int  # bytes that are contiguous on both sides
    heads: int  # of 128 elements of 2 bytes; the heads make a row
    cache: str  # the device's layout
    by: str  # the index of rows: random ``slots``, or random ``blocks`` of 16 tokens
    host: str  # the host's layout
    order: str  # of its block ids, ``consecutive`` or ``random``; ``dense`` is a chunk

    @property
    def row(self) -> int:
        """Return the bytes of one token in one plane."""
        return self.heads * _DIM * _ITEM

    @property
    def side(self) -> str:
        """Return the name of the host's side: ``dense``, ``block-first random``."""
        where = {CHUNK: "", BLOCK_FIRST: "block-first ", POOL_BY_LAYER: "layer-first "}[self.host]
        return f"{where}{self.order}"

    @property
    def name(self) -> str:
        """Return the name: ``2 KB runs, block-first random``."""
        return f"{in_words(self.run)} runs, {self.side}"


@dataclass(frozen=True, slots=True)
class Case:
    """A scene with a payload; ``layers`` is 32, or fewer if the payload is small."""

    scene: Scene
    layers: int
    tokens: int

    @property
    def payload(self) -> int:
        """Return the bytes that a copy moves."""
        return self.layers * _KV * self.tokens * self.scene.row

    @property
    def runs(self) -> int:
        """Return the number of runs that are contiguous on both sides."""
        return self.payload // self.scene.run

    @property
    def name(self) -> str:
        return f"{self.scene.name}, {in_words(self.payload)}"

    @property
    def on_device(self) -> Shape:
        return self._shape(self.scene.cache, _BLOCK if self.scene.by == "blocks" else 1, _POOL)

    @property
    def on_host(self) -> Shape:
        pool = 1 if self.scene.order == "dense" else _HOST_POOL
        return self._shape(self.scene.host, _BLOCK, pool)

    def _shape(self, layout: str, block_size: int, pool: int) -> Shape:
        return Shape(
            self.name,
            "none",
            "benchmarks/host/cases.py",
            layout,
            CHUNK,
            self.layers,
            _DIM,
            "float16",
            block_size,
            self.tokens,
            _KV,
            self.scene.heads,
            pool,
        )


def _scenes(host: str, order: str) -> list[Scene]:
    """Return the scenes of a host side: runs of a row by slots, and of a block in a plane."""
    rows = [Scene(256 * n, n, LAYER_FIRST, "slots", host, order) for n in (1, 8, 32)]
    return [*rows, Scene(_BLOCK * 2048, 8, LAYER_FIRST, "blocks", host, order)]


#: The common host sides come first, since time may run out; then runs of a whole block.
SCENES: tuple[Scene, ...] = (
    *_scenes(CHUNK, "dense"),
    *_scenes(BLOCK_FIRST, "consecutive"),
    *_scenes(BLOCK_FIRST, "random"),
    *(
        Scene(_LAYERS * _KV * _BLOCK * 2048, 8, BLOCK_FIRST, "blocks", BLOCK_FIRST, order)
        for order in ("consecutive", "random")
    ),
    *_scenes(POOL_BY_LAYER, "random"),
)


def scene(run: int, host: str = CHUNK, order: str = "dense") -> Scene:
    """Return the scene of the grid with these runs and this host side."""
    return next(s for s in SCENES if (s.run, s.host, s.order) == (run, host, order))


def case_of(scene: Scene, payload: int) -> Case | None:
    """Return the case of exactly that payload; None if no number of tokens or blocks gives it."""
    unit = 1 if (scene.by, scene.order) == ("slots", "dense") else _BLOCK
    # If a whole block is contiguous, fewer layers would make its runs shorter.
    for layers in (32,) if scene.cache == BLOCK_FIRST else (32, 16, 8, 4, 2, 1):
        each = layers * _KV * scene.row
        if payload % (unit * each) == 0:
            return Case(scene, layers, payload // each)
    return None


def cases(scenes: Sequence[Scene], payloads: Sequence[int]) -> list[Case]:
    """Return a case for each payload of each scene, if the payload is possible."""
    return [case for pair in product(scenes, payloads) if (case := case_of(*pair)) is not None]


_SEED = 20261121
_GAP = 4096  # layers have irregular distances, as separate allocations have
_COPIES = 5  # of the payload on the device: the cache, and the memory of a plain copy


class Region(NamedTuple):
    """Bytes on the device and on the host, uint8, one dimension."""

    device: torch.Tensor
    host: torch.Tensor  # pinned or pageable
    scratch: torch.Tensor  # on the device, as large as ``host``: the host's bytes are compared here

    @classmethod
    def reserve(cls, device: torch.device, payload: int, *, pageable: bool = False) -> Region:
        """Return memory for any case up to a payload, on a device and on the host."""
        host = (torch.zeros if pageable else pinned.empty)(2 * payload, dtype=torch.uint8)
        largest = _COPIES * payload + 64 * 8 * _GAP
        there = torch.empty(largest, dtype=torch.uint8, device=device)
        return cls(there, host, torch.empty_like(host, device=device))

    def halves(self) -> tuple[Region, Region]:
        """Return two regions, for two directions at the same time."""
        first, second = zip(*(tensor.view(2, -1).unbind() for tensor in self), strict=True)
        return Region(*first), Region(*second)


#: Ids of blocks or slots, as `copy_blocks` takes them.
Ids = Index | torch.Tensor
BothIds = tuple[Ids, Ids | None]  # of the device and of the host
#: Block and place in the block of each token; 0 for the only block of a chunk.
Places = int | tuple[torch.Tensor, torch.Tensor]


class Arguments(NamedTuple):
    """The positional arguments of `copy_blocks`."""

    src: KVView
    dst: KVView
    src_ids: Any  # an `Index`, a tensor, or None
    dst_ids: Any


class Sides:
    """A case in a region that is large enough: views and ids of both sides, for either direction.

    Attributes:
        caches: the device's tensors, in the shape of its layout.
        chunk: the host's tensor, in the shape of its layout.
        dense, flat: memory of the device and of the host that a plain copy moves, as int64.
    """

    def __init__(self, case: Case, region: Region) -> None:
        self.case = case
        self._region = region
        device = case.on_device
        host = case.on_host
        self.caches, end = _caches(device, region.device)
        self.chunk = _tensor(region.host, 0, _host_sizes(host), host)
        self._cache_bytes = region.device[:end]

        # A plain copy moves as many bytes; on the host the start of the same memory.
        self.dense = _words(region.device[end : end + case.payload])
        self.flat = _words(region.host[: case.payload])
        device_ids, host_ids = self._ids = _ids(case)
        self.device_view = KVView(self.caches, device.cache)
        if host.cache == CHUNK:
            self.host_view = KVView(self.chunk, host.cache, kv=host.kv, heads=host.heads)
        else:
            self.host_view = KVView(self.chunk, host.cache)
        self.device_index = Index(device_ids, step=device.block_size)
        self.host_index = None if host_ids is None else Index(host_ids, step=host.block_size)

    @property
    def slots(self) -> torch.Tensor:
        """Return the device's slot of each token, int64 on the host."""
        size = self.case.on_device.block_size
        device_ids, _ = self._ids
        return (device_ids[:, None] * size + torch.arange(size)).flatten()

    @property
    def _host_bytes(self) -> int:
        return self.chunk.nbytes

    def settle(self) -> None:
        """Place the ids and addresses that strategies need on the device, once for all calls."""
        for index in (self.device_index, self.host_index):
            if index is not None:
                index.placed(self.dense.device, frozenset({torch.int64}))
        if len(self.device_view.origins) > 1:
            self.device_view.table.size()

    def arguments(self, direction: str, ids: BothIds | None = None) -> Arguments:
        """Return the arguments of `copy_blocks` for a direction.

        ``ids`` of the device and the host replace the indices of this case.
        """
        device_ids, host_ids = (self.device_index, self.host_index) if ids is None else ids
        if direction == "d2h":
            return Arguments(self.device_view, self.host_view, device_ids, host_ids)
        return Arguments(self.host_view, self.device_view, host_ids, device_ids)

    def fresh_ids(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the same ids in new tensors, which the library has not seen."""
        device_ids, host_ids = self._ids
        return device_ids.clone(), None if host_ids is None else host_ids.clone()

    def fill(self, direction: str) -> None:
        """Fill the source of a copy, plain or not, with bytes that name their places."""
        fill(_words(self._region.device), 1)
        if direction == "h2d":
            scratch = self._region.scratch[: self._host_bytes]
            fill(_words(scratch), 3)
            self._region.host[: self._host_bytes].copy_(scratch)
        self._synchronise()

    def poison(self, direction: str, plain: bool = False) -> None:
        """Overwrite the destination of a copy in a direction, or of a plain copy."""
        self._synchronise()
        nbytes = self.case.payload if plain else self._host_bytes
        if direction == "d2h":
            self._region.host[:nbytes].copy_(self._region.scratch[:nbytes].fill_(POISON))
        else:
            (self.dense.view(torch.uint8) if plain else self._cache_bytes).fill_(POISON)
        self._synchronise()

    def plain_right(self) -> bool:
        """Return whether a plain copy's bytes are those of its source."""
        self._synchronise()
        scratch = _words(self._region.scratch[: self.case.payload]).copy_(self.flat)
        return torch.equal(scratch, self.dense)

    def right(self, direction: str) -> bool:
        """Return whether the destination has the source's rows, and poison in every other byte.

        Overwrites those rows on the device.
        """
        self._synchronise()
        device = self.case.on_device
        host = self.case.on_host
        scratch = self._region.scratch[: self._host_bytes]
        scratch.copy_(self._region.host[: self._host_bytes])
        copied = _tensor(scratch, 0, _host_sizes(host), host)
        # The places come from the host: a wrong copy may have overwritten those on the device.
        here = planes(self.caches, device.cache, device), self._places(device, self._ids[0])
        there = planes(copied, host.cache, host), self._places(host, self._ids[1])
        if direction == "d2h":
            return bool(moved(*here, *there) & (scratch == POISON).all())
        return bool(moved(*there, *here) & (self._cache_bytes == POISON).all())

    def _places(self, shape: Shape, ids: torch.Tensor | None) -> Places:
        """Return the block of each token and its place there, on the device; 0 for a chunk."""
        if ids is None:
            return 0
        at = torch.arange(shape.block_size).repeat(ids.numel())
        blocks = ids.repeat_interleave(shape.block_size)
        return blocks.to(self.dense.device), at.to(self.dense.device)

    def _synchronise(self) -> None:
        torch.get_device_module(self.dense.device).synchronize()


def _ids(case: Case) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the ids of the device's side and of the host's side, int64 on the host."""
    generator = torch.Generator().manual_seed(_SEED)
    device = case.on_device
    host = case.on_host
    device_ids = torch.randperm(device.blocks, generator=generator)[
        : case.tokens // device.block_size
    ]
    wanted = case.tokens // host.block_size
    host_ids = {
        "dense": None,
        "consecutive": torch.arange(1, 1 + wanted),
        "random": torch.randperm(host.blocks, generator=generator)[:wanted],
    }
    return device_ids, host_ids[case.scene.order]


def _caches(shape: Shape, memory: torch.Tensor) -> tuple[Any, int]:
    """Return the device's tensors, and the number of bytes that they span."""
    extents = sizes(shape.cache, shape, shape.blocks, shape.block_size)
    at = 0
    tensors = []
    for layer in range(shape.layers if shape.layered else 1):
        tensors.append(_tensor(memory, at, extents, shape))
        at += -(-tensors[-1].nbytes // 512) * 512 + (layer * layer % 7) * _GAP
    return (tensors, at) if shape.layered else (tensors[0], at)


def _host_sizes(shape: Shape) -> tuple[int, ...]:
    tokens = shape.tokens if shape.cache == CHUNK else shape.block_size
    return sizes(shape.cache, shape, shape.blocks, tokens)


def _tensor(memory: torch.Tensor, at: int, extents: tuple[int, ...], shape: Shape) -> torch.Tensor:
    dtype = shape.torch_dtype
    return memory[at : at + prod(extents) * dtype.itemsize].view(dtype).view(extents)


def _words(memory: torch.Tensor) -> torch.Tensor:
    return memory.view(torch.int64)
