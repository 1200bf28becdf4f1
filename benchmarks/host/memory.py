# SPDX-License-Identifier: Apache-2.0
"""Memory for cases of the host benchmarks, and whether every byte of a destination is right.

One region on the device and one on the host serve all cases, since pinning takes its time. Bytes
are judged by plain indexing on the device; the host's come there by one plain copy.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch

from portakv import Index, KVView
from portakv.host import pinned
from portakv_benchmarks.host.cases import CHUNK, Case
from portakv_benchmarks.shared.shapes import POISON, Shape, fill, planes, sizes

_POISON_WORD = int.from_bytes([POISON] * 8, "big", signed=True)
_SEED = 20261121
_UNIT = 256  # bytes, of which rows and the distances between them are multiples
_GAP = 4096  # layers lie at odd distances, as separate allocations do
_COPIES = 5  # of the payload on the device: the cache, and what a plain copy reads or writes


class Region:
    """Bytes on the device and on the host.

    Args:
        device, host: uint8, one dimension; ``host`` is pinned or pageable.
        scratch: uint8 on the device, as large as ``host``: what the host's bytes are compared in.
    """

    def __init__(self, device: torch.Tensor, host: torch.Tensor, scratch: torch.Tensor) -> None:
        self.device, self.host, self.scratch = device, host, scratch

    @classmethod
    def reserve(cls, device: torch.device, payload: int, *, pageable: bool = False) -> Region:
        """Memory for any case of up to so many bytes, on a device and on the host."""
        on_host = 2 * payload
        layers = 64 * 8 * _GAP
        host = (
            torch.zeros(on_host, dtype=torch.uint8)
            if pageable
            else pinned.empty(on_host, torch.uint8)
        )
        there = torch.empty(_COPIES * payload + layers, dtype=torch.uint8, device=device)
        return cls(there, host, torch.empty(on_host, dtype=torch.uint8, device=device))

    def halves(self) -> tuple[Region, Region]:
        """Two regions, for two directions at once."""
        parts = [tensor.view(2, -1).unbind() for tensor in (self.device, self.host, self.scratch)]
        first, second = zip(*parts, strict=True)
        return Region(*first), Region(*second)


class Sides:
    """A case in a region: the views and ids of both sides, for either direction.

    Args:
        case: what is moved.
        region: large enough for it.

    Attributes:
        caches: the device's tensors, as their layout wants them.
        dense: int64 on the device, as many bytes as are moved: a plain copy's other side.
        flat: int64 on the host, likewise; the beginning of the same memory that engines use.
    """

    def __init__(self, case: Case, region: Region) -> None:
        self.case, self._region = case, region
        device, host = case.on_device, case.on_host
        self.caches, self._spread = _caches(device, region.device)
        self._host_bytes = _bytes(_host_sizes(host))
        end = _aligned(self._spread)
        self.dense = _words(region.device[end : end + case.payload])
        self.flat = _words(region.host[: case.payload])
        self._device_ids, self._host_ids = _ids(case)
        _check(self._device_ids, device, "device")
        _check(self._host_ids, host, "host")
        self.device_view = KVView(self.caches, device.cache)
        self.host_view = self._view_on_host(region.host)
        self.device_index = Index(self._device_ids, step=device.block_size)
        if self._host_ids is None:
            self.host_index: Index | None = None
        else:
            self.host_index = Index(self._host_ids, step=host.block_size)
        self._places = _places(device, self._device_ids)
        tensors = _tensors(host, region.host)
        self._rows = (
            _rows(self.caches, device, self._places).to(self.device),
            _rows(tensors, host, _places(host, self._host_ids)).to(self.device),
        )
        for rows, nbytes in zip(self._rows, (self._spread, self._host_bytes), strict=True):
            if int(rows.min()) < 0 or int(rows.max()) >= nbytes // _UNIT:
                raise ValueError(f"{case.name}: rows outside of the {nbytes} bytes of their side")
        self._sums = [int(rows.sum()) for rows in self._rows]

    def settle(self) -> None:
        """Have what every engine needs on the device, ids and addresses, made once and kept."""
        self.device_index.placed(self.device, frozenset({torch.int64}))
        if self.host_index is not None:
            self.host_index.placed(self.device, frozenset({torch.int64}))
        if len(self.device_view.origins) > 1:
            self.device_view.table.size()

    @property
    def device(self) -> torch.device:
        """The device."""
        return self.dense.device

    def slots(self) -> torch.Tensor:
        """The device's slot of each token, int64 on the host."""
        block, token = self._places
        return block * self.case.on_device.block_size + token

    def chunk(self) -> torch.Tensor:
        """The host's memory as a chunk, of a scene that is dense."""
        return _tensors(self.case.on_host, self._region.host)

    def arguments(self, direction: str, ids: Any = None) -> tuple[Any, Any, Any, Any]:
        """What `copy_blocks` takes, for a direction; ``ids`` stand in for both sides' own."""
        mine, theirs = (self.device_index, self.host_index) if ids is None else ids
        if direction == "d2h":
            return self.device_view, self.host_view, mine, theirs
        return self.host_view, self.device_view, theirs, mine

    def fresh_ids(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The same ids as tensors that are new to the library."""
        theirs = None if self._host_ids is None else self._host_ids.clone()
        return self._device_ids.clone(), theirs

    def fill(self, direction: str) -> None:
        """Write bytes that name their places to the source of a direction, and of plain copies."""
        fill(_words(self._region.device), 1)
        if direction == "h2d":
            scratch = self._region.scratch[: self._host_bytes]
            fill(_words(scratch), 3)
            self._region.host[: self._host_bytes].copy_(scratch)
        self._synchronise()

    def poison(self, direction: str) -> None:
        """Overwrite everything that a copy in a direction may write."""
        self._synchronise()
        if direction == "h2d":
            _words(self._region.device[: _aligned(self._spread)]).fill_(_POISON_WORD)
        else:
            scratch = self._region.scratch[: self._host_bytes]
            _words(scratch).fill_(_POISON_WORD)
            self._region.host[: self._host_bytes].copy_(scratch)
        self._synchronise()

    def poison_plain(self, direction: str) -> None:
        """Overwrite what a plain copy writes."""
        self._synchronise()
        if direction == "h2d":
            self.dense.fill_(_POISON_WORD)
        else:
            scratch = _words(self._region.scratch[: self.case.payload]).fill_(_POISON_WORD)
            self.flat.copy_(scratch)
        self._synchronise()

    def plain_right(self, direction: str) -> bool:
        """Whether a plain copy's bytes are those of its source."""
        self._synchronise()
        scratch = _words(self._region.scratch[: self.case.payload])
        scratch.copy_(self.flat)
        return torch.equal(scratch, self.dense)

    def right(self, direction: str) -> bool:
        """Whether the destination holds the source's rows and poison elsewhere, every byte.

        Overwrites those rows where they are on the device.
        """
        self._synchronise()
        if [int(rows.sum()) for rows in self._rows] != self._sums:  # indexing would end the process
            raise RuntimeError("the places of the rows were overwritten on the device by something")
        scratch = self._region.scratch[: self._host_bytes]
        scratch.copy_(self._region.host[: self._host_bytes])
        on_device = _units(self._region.device[: _aligned(self._spread)])
        on_host = _units(scratch)
        here, there = self._rows
        if direction == "d2h":
            written, into, read, out_of = on_host, there, on_device, here
        else:
            written, into, read, out_of = on_device, here, on_host, there
        moved = (written[into] == read[out_of]).all()
        written[into] = _POISON_WORD
        return bool(moved & (written == _POISON_WORD).all())

    def _view_on_host(self, memory: torch.Tensor) -> KVView:
        shape = self.case.on_host
        tensor = _tensors(shape, memory)
        if shape.cache == CHUNK:
            return KVView(tensor, CHUNK, kv=shape.kv, heads=shape.heads)
        return KVView(tensor, shape.cache)

    def _synchronise(self) -> None:
        torch.get_device_module(self.device).synchronize()


def _ids(case: Case) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Ids of the device's side and of the host's, int64 on the host."""
    generator = torch.Generator().manual_seed(_SEED)
    device, host = case.on_device, case.on_host
    mine = torch.randperm(device.blocks, generator=generator)[: case.tokens // device.block_size]
    if case.scene.order == "dense":
        return mine, None
    wanted = case.tokens // host.block_size
    if case.scene.order == "consecutive":
        return mine, torch.arange(1, 1 + wanted)
    return mine, torch.randperm(host.blocks, generator=generator)[:wanted]


def _check(ids: torch.Tensor | None, shape: Shape, side: str) -> None:
    """Raise `ValueError` unless a side's ids are blocks of its pool, each once."""
    if ids is not None and (
        int(ids.min()) < 0 or int(ids.max()) >= shape.blocks or ids.unique().numel() < ids.numel()
    ):
        raise ValueError(f"{shape.name}: the {side}'s ids are no {ids.numel()} blocks of "
                         f"{shape.blocks}")  # fmt: skip


def _places(shape: Shape, ids: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Block and place in the block of each token; of a chunk, block 0."""
    if ids is None:
        return torch.zeros(shape.tokens, dtype=torch.int64), torch.arange(shape.tokens)
    at = torch.arange(shape.block_size).repeat(ids.numel())
    return ids.repeat_interleave(shape.block_size), at


def _rows(tensors: Any, shape: Shape, places: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """The units of all rows, planes outermost, counted from the first tensor's first byte."""
    block, token = places
    first = tensors[0] if isinstance(tensors, list) else tensors
    found = []
    for plane in planes(tensors, shape.cache, shape):
        at, width = plane.data_ptr() - first.data_ptr(), plane.element_size()
        found.append((at + (block * plane.stride(0) + token * plane.stride(1)) * width) // _UNIT)
    each = torch.arange(shape.row_bytes // _UNIT)
    return (torch.stack(found).flatten()[:, None] + each).flatten()


def _units(memory: torch.Tensor) -> torch.Tensor:
    """Bytes as int64 words, a unit in each row."""
    return _words(memory).view(-1, _UNIT // 8)


def _caches(shape: Shape, memory: torch.Tensor) -> tuple[Any, int]:
    """The device's tensors, and how many bytes they are spread over."""
    extents = sizes(shape.cache, shape, shape.blocks, shape.block_size)
    if not shape.layered:
        return _tensor(memory, 0, extents, shape), _bytes(extents)
    at, found = 0, []
    for layer in range(shape.layers):
        found.append(_tensor(memory, at, extents, shape))
        at += _aligned(_bytes(extents)) + (layer * layer % 7) * _GAP
    return found, at


def _tensors(shape: Shape, memory: torch.Tensor) -> torch.Tensor:
    return _tensor(memory, 0, _host_sizes(shape), shape)


def _host_sizes(shape: Shape) -> tuple[int, ...]:
    tokens = shape.tokens if shape.cache == CHUNK else shape.block_size
    return sizes(shape.cache, shape, shape.blocks, tokens)


def _tensor(memory: torch.Tensor, at: int, extents: tuple[int, ...], shape: Shape) -> torch.Tensor:
    return memory[at : at + _bytes(extents)].view(shape.torch_dtype).view(extents)


def _bytes(extents: tuple[int, ...]) -> int:
    return 2 * prod(extents)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // 512) * 512


def _words(memory: torch.Tensor) -> torch.Tensor:
    return memory.view(torch.int64)
