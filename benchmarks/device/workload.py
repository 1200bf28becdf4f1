# SPDX-License-Identifier: Apache-2.0
"""Build caches, memory objects and index lists for a shape, and check the moved bytes.

Plain indexing of the tensors that were built here judges the bytes, without code of PortaKV.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch

from portakv.cli.sides import Shape
from portakv_benchmarks.shared.shapes import POISON, fill, moved, planes, sizes

_SEED = 20261120


class Workload:
    """Memory for one shape: caches to read (``source``) and to write (``target``), as its layout
    wants them, and some memory objects to read (``loaded``) and to write (``stored``). Layers are
    ``together`` in one allocation, or ``apart``, which is only for layouts with a list over layers.
    Sources have distinct bytes, targets are poisoned."""

    def __init__(
        self, shape: Shape, arrangement: str, device: torch.device, objects: int = 3
    ) -> None:
        self.shape = shape
        self.arrangement = arrangement
        self.device = device
        self.source = self._caches(1)
        self.target = self._caches(None)
        self.loaded = [self._chunk(2 + i) for i in range(objects)]
        self.stored = [self._chunk(None) for _ in range(objects)]
        generator = torch.Generator().manual_seed(_SEED)
        slots = torch.randperm(shape.slots, generator=generator)
        blocks = torch.randperm(shape.blocks, generator=generator)
        first = shape.block_size if shape.pool > 1 else 0
        self._ids = {
            "random": slots[: shape.tokens],
            "contiguous": torch.arange(first, first + shape.tokens),
            "blocks": blocks[: shape.tokens // shape.block_size],
        }

    def ids(self, index: str) -> torch.Tensor:
        """Return the index list of a kind, int64 on the host.

        It holds slots, or block ids for the kind ``blocks``.
        """
        return self._ids[index]

    def slots(self, index: str) -> torch.Tensor:
        """Return the slot of each token, int64 on the host, whatever the kind of the index list."""
        ids = self._ids[index]
        size = self.shape.block_size
        if index != "blocks":
            return ids
        return (ids[:, None] * size + torch.arange(size)).flatten()

    def poison_stored(self, i: int) -> None:
        """Overwrite memory object ``i`` of those that are written."""
        self.stored[i].view(torch.uint8).fill_(POISON)

    def poison_target(self) -> None:
        """Overwrite the caches that are written."""
        for tensor in self._targets():
            tensor.fill_(POISON)

    def _targets(self) -> list[torch.Tensor]:
        tensors = self.target if isinstance(self.target, list) else [self.target]
        return [tensor.view(torch.uint8) for tensor in tensors]

    def stored_right(self, i: int, index: str) -> bool:
        """Return whether memory object ``i`` holds the source's rows, every byte."""
        cached, chunks, at = self._rows(self.source, self.stored[i], index)
        pairs = zip(cached, chunks, strict=True)
        return bool(torch.stack([(chunk[0] == cache[at]).all() for cache, chunk in pairs]).all())

    def copied_right(self, i: int) -> bool:
        """Return whether the written memory object ``i`` equals the one that was read."""
        return torch.equal(self.stored[i].view(torch.uint8), self.loaded[i].view(torch.uint8))

    def target_right(self, i: int, index: str) -> bool:
        """Return whether the target holds the rows of object ``i`` and poison elsewhere.

        Compare every byte, and overwrite those rows."""
        cached, chunks, places = self._rows(self.target, self.loaded[i], index)
        right = moved(chunks, 0, cached, places)
        return bool(right & torch.stack([(one == POISON).all() for one in self._targets()]).all())

    def _rows(self, caches: Any, chunk: torch.Tensor, index: str) -> tuple[Any, Any, Any]:
        """Return the planes of caches and of a chunk, and block and place in it of each token."""
        slots = self.slots(index).to(self.device)
        shape = self.shape
        places = slots // shape.block_size, slots % shape.block_size
        return planes(caches, shape.cache, shape), planes(chunk, shape.chunk, shape), places

    def _caches(self, salt: int | None) -> Any:
        shape = self.shape
        extents = sizes(shape.cache, shape, shape.blocks, shape.block_size)
        if not shape.layered:
            return self._tensor(extents, salt)
        if self.arrangement == "together":
            return list(self._tensor((shape.layers, *extents), salt))
        salts = [None if salt is None else salt + 1000 * (k + 1) for k in range(shape.layers)]
        return [self._tensor(extents, of_layer) for of_layer in salts]

    def _chunk(self, salt: int | None) -> torch.Tensor:
        return self._tensor(sizes(self.shape.chunk, self.shape, 1, self.shape.tokens), salt)

    def _tensor(self, extents: tuple[int, ...], salt: int | None) -> torch.Tensor:
        dtype = self.shape.torch_dtype
        count = prod(extents) * dtype.itemsize
        words = torch.empty(-(-count // 8), dtype=torch.int64, device=self.device)
        if salt is None:
            words.view(torch.uint8).fill_(POISON)
        else:
            fill(words, salt)
        return words.view(torch.uint8)[:count].view(dtype).view(extents)
