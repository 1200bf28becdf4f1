# SPDX-License-Identifier: Apache-2.0
"""Cases of the host benchmarks: where the bytes lie on the device and on the host, how many of them
are moved, the memory for them, and whether every byte of a destination is right.

One region on the device and one on the host serve all cases, since pinning takes its time. Bytes
are judged by plain indexing on the device; the host's come there by one plain copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any, NamedTuple

import torch

from portakv import Index, KVView
from portakv.host import pinned
from portakv_benchmarks.shared.shapes import POISON, Shape, fill, in_words, moved, planes, sizes

#: A directions' name, as everywhere: from the device to the host, and back.
DIRECTIONS = ("d2h", "h2d")

LAYER_FIRST = "layer | kv block token head dim"  # paged, each layer an allocation of its own
BLOCK_FIRST = "block layer kv token head dim"  # all that a block holds lies together
POOL_BY_LAYER = "layer kv block token head dim"
CHUNK = "kv layer token (head dim)"

_LAYERS = 32
_KV = 2
_DIM = 128
_BLOCK = 16
_ITEM = 2  # bytes of an element
#: Slots of the device's cache for each token moved: sparse, as it is while a model runs; and blocks
#: of the host's pool for each block moved.
_POOL = 4
_HOST_POOL = 2


@dataclass(frozen=True, slots=True)
class Scene:
    """Layouts and ids of both sides."""

    run: int  # bytes that lie together on both sides
    heads: int  # of 128 elements of 2 bytes, which make a row
    cache: str  # the device's layout
    by: str  # how its rows are named: ``slots``, or ``blocks`` of 16 tokens, at random
    host: str  # the host's layout
    order: str  # of its block ids, ``consecutive`` or ``random``; ``dense`` is a chunk

    @property
    def row(self) -> int:
        """Bytes of one token in one plane."""
        return self.heads * _DIM * _ITEM

    @property
    def side(self) -> str:
        """The host's side: ``dense``, ``block-first random``."""
        where = {CHUNK: "", BLOCK_FIRST: "block-first ", POOL_BY_LAYER: "layer-first "}[self.host]
        return f"{where}{self.order}"

    @property
    def name(self) -> str:
        """``2 KB runs, block-first random``."""
        return f"{in_words(self.run)} runs, {self.side}"


@dataclass(frozen=True, slots=True)
class Case:
    """A scene with so many bytes; ``layers`` is 32, or less where the payload is small."""

    scene: Scene
    layers: int
    tokens: int

    @property
    def payload(self) -> int:
        """Bytes moved."""
        return self.layers * _KV * self.tokens * self.scene.row

    @property
    def runs(self) -> int:
        """Pieces that lie together on both sides."""
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
    """The scenes of a host side: runs of one row, by random slots; and of one block in a plane."""
    rows = [Scene(256 * n, n, LAYER_FIRST, "slots", host, order) for n in (1, 8, 32)]
    return [*rows, Scene(_BLOCK * 2048, 8, LAYER_FIRST, "blocks", host, order)]


#: The host sides that caches have first, since time may run out; then runs of a whole block.
SCENES: tuple[Scene, ...] = (
    *_scenes(CHUNK, "dense"), *_scenes(BLOCK_FIRST, "consecutive"), *_scenes(BLOCK_FIRST, "random"),
    *(Scene(_LAYERS * _KV * _BLOCK * 2048, 8, BLOCK_FIRST, "blocks", BLOCK_FIRST, order)
      for order in ("consecutive", "random")),
    *_scenes(POOL_BY_LAYER, "random"),
)  # fmt: skip


def scene(run: int, host: str = CHUNK, order: str = "dense") -> Scene:
    """The scene of the grid with these runs and this host side."""
    return next(s for s in SCENES if (s.run, s.host, s.order) == (run, host, order))


def case_of(scene: Scene, payload: int) -> Case | None:
    """The case of exactly so many bytes; None if whole tokens or blocks do not make them."""
    unit = 1 if (scene.by, scene.order) == ("slots", "dense") else _BLOCK
    # Where all of a block lies together, fewer layers would make its runs shorter.
    for layers in (32,) if scene.cache == BLOCK_FIRST else (32, 16, 8, 4, 2, 1):
        each = layers * _KV * scene.row
        if payload % (unit * each) == 0:
            return Case(scene, layers, payload // each)
    return None


def cases(scenes: Sequence[Scene], payloads: Sequence[int]) -> list[Case]:
    """Every payload of every scene that there is."""
    return [case for pair in product(scenes, payloads) if (case := case_of(*pair)) is not None]


_SEED = 20261121
_GAP = 4096  # layers lie at odd distances, as separate allocations do
_COPIES = 5  # of the payload on the device: the cache, and what a plain copy reads or writes


class Region(NamedTuple):
    """Bytes on the device and on the host, uint8, one dimension."""

    device: torch.Tensor
    host: torch.Tensor  # pinned or pageable
    scratch: torch.Tensor  # on the device, as large: what the host's bytes are compared in

    @classmethod
    def reserve(cls, device: torch.device, payload: int, *, pageable: bool = False) -> Region:
        """Memory for any case of up to so many bytes, on a device and on the host."""
        host = (torch.zeros if pageable else pinned.empty)(2 * payload, dtype=torch.uint8)
        largest = _COPIES * payload + 64 * 8 * _GAP
        there = torch.empty(largest, dtype=torch.uint8, device=device)
        return cls(there, host, torch.empty_like(host, device=device))

    def halves(self) -> tuple[Region, Region]:
        """Two regions, for two directions at once."""
        first, second = zip(*(tensor.view(2, -1).unbind() for tensor in self), strict=True)
        return Region(*first), Region(*second)


class Sides:
    """A case in a region that is large enough: views and ids of both sides, for either direction;
    ``caches`` and ``chunk`` are the memory of both as their layouts want it."""

    def __init__(self, case: Case, region: Region) -> None:
        self.case = case
        self._region = region
        device = case.on_device
        host = case.on_host
        self.caches, end = _caches(device, region.device)
        self.chunk = _tensor(region.host, 0, _host_sizes(host), host)
        self._cache_bytes = region.device[:end]
        self._host_bytes = self.chunk.nbytes
        # What a plain copy moves, as many int64: on the host the beginning of the same memory.
        self.dense = _words(region.device[end : end + case.payload])
        self.flat = _words(region.host[: case.payload])
        mine, theirs = self._ids = _ids(case)
        # The device's slot of each token, int64 on the host.
        self.slots = (mine[:, None] * device.block_size + torch.arange(device.block_size)).flatten()
        self.device_view = KVView(self.caches, device.cache)
        extents: Any = {"kv": host.kv, "heads": host.heads} if host.cache == CHUNK else {}
        self.host_view = KVView(self.chunk, host.cache, **extents)
        self.device_index = Index(mine, step=device.block_size)
        self.host_index = None if theirs is None else Index(theirs, step=host.block_size)

    def settle(self) -> None:
        """Have what every engine needs on the device, ids and addresses, made once and kept."""
        for index in (self.device_index, self.host_index):
            if index is not None:
                index.placed(self.dense.device, frozenset({torch.int64}))
        if len(self.device_view.origins) > 1:
            self.device_view.table.size()

    def arguments(self, direction: str, ids: Any = None) -> tuple[Any, Any, Any, Any]:
        """What `copy_blocks` takes, for a direction; ``ids`` stand in for both sides' own."""
        mine, theirs = (self.device_index, self.host_index) if ids is None else ids
        if direction == "d2h":
            return self.device_view, self.host_view, mine, theirs
        return self.host_view, self.device_view, theirs, mine

    def fresh_ids(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The same ids as tensors that are new to the library."""
        mine, theirs = self._ids
        return mine.clone(), None if theirs is None else theirs.clone()

    def fill(self, direction: str) -> None:
        """Write bytes that name their places to the source of a direction, and of plain copies."""
        fill(_words(self._region.device), 1)
        if direction == "h2d":
            scratch = self._region.scratch[: self._host_bytes]
            fill(_words(scratch), 3)
            self._region.host[: self._host_bytes].copy_(scratch)
        self._synchronise()

    def poison(self, direction: str, plain: bool = False) -> None:
        """Overwrite everything that a copy in a direction may write, or what a plain one writes."""
        self._synchronise()
        nbytes = self.case.payload if plain else self._host_bytes
        if direction == "d2h":
            self._region.host[:nbytes].copy_(self._region.scratch[:nbytes].fill_(POISON))
        else:
            (self.dense.view(torch.uint8) if plain else self._cache_bytes).fill_(POISON)
        self._synchronise()

    def plain_right(self) -> bool:
        """Whether a plain copy's bytes are those of its source."""
        self._synchronise()
        scratch = _words(self._region.scratch[: self.case.payload]).copy_(self.flat)
        return torch.equal(scratch, self.dense)

    def right(self, direction: str) -> bool:
        """Whether the destination holds the source's rows and poison elsewhere, every byte.
        Overwrites those rows where they are on the device."""
        self._synchronise()
        device = self.case.on_device
        host = self.case.on_host
        scratch = self._region.scratch[: self._host_bytes]
        scratch.copy_(self._region.host[: self._host_bytes])
        copied = _tensor(scratch, 0, _host_sizes(host), host)
        # The places come from the host: a copy that went wrong may have overwritten the device's.
        here = planes(self.caches, device.cache, device), self._places(device, self._ids[0])
        there = planes(copied, host.cache, host), self._places(host, self._ids[1])
        if direction == "d2h":
            return bool(moved(*here, *there) & (scratch == POISON).all())
        return bool(moved(*there, *here) & (self._cache_bytes == POISON).all())

    def _places(self, shape: Shape, ids: torch.Tensor | None) -> Any:
        """Block and place in the block of each token, on the device; of a chunk, its only block."""
        if ids is None:
            return 0
        at = torch.arange(shape.block_size).repeat(ids.numel())
        blocks = ids.repeat_interleave(shape.block_size)
        return blocks.to(self.dense.device), at.to(self.dense.device)

    def _synchronise(self) -> None:
        torch.get_device_module(self.dense.device).synchronize()


def _ids(case: Case) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Ids of the device's side and of the host's, int64 on the host."""
    generator = torch.Generator().manual_seed(_SEED)
    device = case.on_device
    host = case.on_host
    mine = torch.randperm(device.blocks, generator=generator)[: case.tokens // device.block_size]
    wanted = case.tokens // host.block_size
    theirs = {
        "dense": None,
        "consecutive": torch.arange(1, 1 + wanted),
        "random": torch.randperm(host.blocks, generator=generator)[:wanted],
    }
    return mine, theirs[case.scene.order]


def _caches(shape: Shape, memory: torch.Tensor) -> tuple[Any, int]:
    """The device's tensors, and how many bytes they are spread over."""
    extents = sizes(shape.cache, shape, shape.blocks, shape.block_size)
    at = 0
    found = []
    for layer in range(shape.layers if shape.layered else 1):
        found.append(_tensor(memory, at, extents, shape))
        at += -(-found[-1].nbytes // 512) * 512 + (layer * layer % 7) * _GAP
    return (found, at) if shape.layered else (found[0], at)


def _host_sizes(shape: Shape) -> tuple[int, ...]:
    tokens = shape.tokens if shape.cache == CHUNK else shape.block_size
    return sizes(shape.cache, shape, shape.blocks, tokens)


def _tensor(memory: torch.Tensor, at: int, extents: tuple[int, ...], shape: Shape) -> torch.Tensor:
    dtype = shape.torch_dtype
    return memory[at : at + prod(extents) * dtype.itemsize].view(dtype).view(extents)


def _words(memory: torch.Tensor) -> torch.Tensor:
    return memory.view(torch.int64)
