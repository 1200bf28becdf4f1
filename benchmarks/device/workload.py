# SPDX-License-Identifier: Apache-2.0
"""What is moved: caches, memory objects and index lists for a shape, and whether bytes are right.

Bytes are judged by plain indexing of the tensors that were built here; nothing of PortaKV is asked.
"""

from __future__ import annotations

import re
from math import prod
from typing import Any

import torch

from portakv_benchmarks.device.shapes import Shape

#: How the layers lie: each in an allocation of its own, or all in one.
ARRANGEMENTS = ("apart", "together")

_POISON = 0xA5
_SEED = 20261120
# An integer for each width: floats are compared as bits, and fp8 cannot be indexed.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


class Workload:
    """Memory for one shape: caches to read and to write, memory objects to read and to write.

    Args:
        shape: what to move.
        arrangement: one of `ARRANGEMENTS`; ``apart`` only for layouts with a list over layers.
        device: where everything lies.
        objects: how many memory objects there are of each kind; timed calls take turns with them.

    Attributes:
        source, target: caches as the shape's layout wants them; ``target`` is poisoned.
        loaded, stored: memory objects that are read (bytes of their own), and written (poisoned).
    """

    def __init__(
        self, shape: Shape, arrangement: str, device: torch.device, objects: int = 3
    ) -> None:
        if arrangement not in ARRANGEMENTS or (arrangement == "apart" and not shape.layered):
            raise ValueError(
                f"Shape {shape.name!r} was asked for with layers {arrangement!r}; expected one of "
                f"{ARRANGEMENTS}, and 'apart' only for a list over layers."
            )
        self.shape, self.arrangement, self.device = shape, arrangement, device
        self.source = self._caches(1)
        self.target = self._caches(None)
        self.loaded = [self._chunk(2 + i) for i in range(objects)]
        self.stored = [self._chunk(None) for _ in range(objects)]
        self._ids = _index_lists(shape)

    def ids(self, index: str) -> torch.Tensor:
        """The index list of a kind, int64 on the host: slots, or for ``blocks`` block ids."""
        return self._ids[index]

    def slots(self, index: str) -> torch.Tensor:
        """The slot of each token, int64 on the host, whatever the kind of the index list."""
        ids, size = self._ids[index], self.shape.block_size
        if index != "blocks":
            return ids
        return (ids[:, None] * size + torch.arange(size)).flatten()

    def poison_stored(self, i: int) -> None:
        """Overwrite memory object ``i`` of those that are written."""
        self.stored[i].view(torch.uint8).fill_(_POISON)

    def poison_target(self) -> None:
        """Overwrite the caches that are written."""
        for tensor in self.target if isinstance(self.target, list) else [self.target]:
            tensor.view(torch.uint8).fill_(_POISON)

    def stored_right(self, i: int, index: str) -> bool:
        """Whether memory object ``i`` holds the source's rows, every byte."""
        block, token = self._places(index)
        chunk = planes(self.stored[i], self.shape.chunk, self.shape)
        cache = planes(self.source, self.shape.cache, self.shape)
        same = [(c[0] == p[block, token]).all() for c, p in zip(chunk, cache, strict=True)]
        return bool(torch.stack(same).all())

    def copied_right(self, i: int) -> bool:
        """Whether memory object ``i`` that is written equals the one that is read."""
        return torch.equal(self.stored[i].view(torch.uint8), self.loaded[i].view(torch.uint8))

    def target_right(self, i: int, index: str) -> bool:
        """Whether the target holds the rows of object ``i`` and poison elsewhere, every byte.

        Overwrites those rows.
        """
        block, token = self._places(index)
        chunk = planes(self.loaded[i], self.shape.chunk, self.shape)
        cache = planes(self.target, self.shape.cache, self.shape)
        same = []
        for c, p in zip(chunk, cache, strict=True):
            poison = int.from_bytes([_POISON] * p.element_size(), "big", signed=p.dtype.is_signed)
            same.append((c[0] == p[block, token]).all())
            p[block, token] = poison
            same.append((p == poison).all())
        return bool(torch.stack(same).all())

    def _places(self, index: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Block and place in the block of each token."""
        slots, size = self.slots(index).to(self.device), self.shape.block_size
        return slots // size, slots % size

    def _caches(self, salt: int | None) -> Any:
        shape = self.shape
        sizes = _sizes(shape.cache, shape, shape.blocks, shape.block_size)
        if not shape.layered:
            return self._tensor(sizes, salt)
        if self.arrangement == "together":
            return list(self._tensor((shape.layers, *sizes), salt))
        salts = [None if salt is None else salt + 1000 * (k + 1) for k in range(shape.layers)]
        return [self._tensor(sizes, of_layer) for of_layer in salts]

    def _chunk(self, salt: int | None) -> torch.Tensor:
        return self._tensor(_sizes(self.shape.chunk, self.shape, 1, self.shape.tokens), salt)

    def _tensor(self, sizes: tuple[int, ...], salt: int | None) -> torch.Tensor:
        dtype = self.shape.torch_dtype
        count = prod(sizes) * dtype.itemsize
        words = -(-count // 8)
        if salt is None:
            held = torch.empty(words, dtype=torch.int64, device=self.device)
            held.view(torch.uint8).fill_(_POISON)
        else:
            # A counter times an odd number: every 8 bytes differ, and so do the salts.
            held = torch.arange(words, dtype=torch.int64, device=self.device)
            held.mul_(-0x61C8864680B583EB).add_(salt * 0x2545F4914F6CDD1D % (1 << 62))
        return held.view(torch.uint8)[:count].view(dtype).view(sizes)


def planes(tensors: Any, layout: str, shape: Shape) -> list[torch.Tensor]:
    """Each plane, layers outermost, as integers ``[blocks, tokens, heads, dim]``; a chunk: 1 block.

    Only for layouts without split axes, and with no container but a list over layers.
    """
    left, _, right = layout.rpartition("|")
    found = []
    for layer in range(shape.layers):
        tensor, at_layer = (tensors[layer], None) if left.strip() else (tensors, layer)
        tensor = tensor.view(_BITS[tensor.element_size()])
        names = re.findall(r"\w+", right)
        for at, group in enumerate(re.findall(r"\(.+?\)|\w+", right)):
            if group.startswith("("):
                sizes = [_axis(name, shape, 1, shape.tokens) for name in group[1:-1].split()]
                tensor = tensor.unflatten(at, sizes)
        for kv in range(shape.kv):
            plane, left_over = tensor, list(names)
            for name, position in (("layer", at_layer), ("kv", kv)):
                if name in left_over:
                    plane = plane.select(left_over.index(name), position or 0)
                    left_over.remove(name)
            for at, name in enumerate(("block", "token", "head", "dim")):
                if name not in left_over:
                    plane = plane.unsqueeze(at)
                    left_over.insert(at, name)
            order = [left_over.index(name) for name in ("block", "token", "head", "dim")]
            found.append(plane.permute(order))
    return found


def _sizes(layout: str, shape: Shape, blocks: int, tokens: int) -> tuple[int, ...]:
    """The size of each dimension right of the containers."""
    groups = re.findall(r"\(.+?\)|\w+", layout.rpartition("|")[2])
    return tuple(
        prod(_axis(name, shape, blocks, tokens) for name in group.strip("()").split())
        for group in groups
    )


def _axis(name: str, shape: Shape, blocks: int, tokens: int) -> int:
    return {
        "layer": shape.layers, "kv": shape.kv, "block": blocks, "token": tokens,
        "head": shape.heads, "dim": shape.dim,
    }[name]  # fmt: skip


def _index_lists(shape: Shape) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(_SEED)
    slots = torch.randperm(shape.slots, generator=generator)
    blocks = torch.randperm(shape.blocks, generator=generator)
    first = shape.block_size if shape.pool > 1 else 0
    return {
        "random": slots[: shape.tokens],
        "contiguous": torch.arange(first, first + shape.tokens),
        "blocks": blocks[: shape.tokens // shape.block_size],
    }
