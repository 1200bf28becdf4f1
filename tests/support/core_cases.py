# SPDX-License-Identifier: Apache-2.0
"""Shared by the tests of the core: addresses from a form, bytes moved run by run, and layouts
that a person can index with plain torch."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import torch

from portakv import CopyPlan, Index, KVView, copy_rows
from portakv.view.form import locate

LAYERS, KV, HEADS, DIM, SLOTS = 2, 2, 2, 4, 12
GIB = 1 << 30
_MAP_NORESERVE = 0x4000  # Linux; not named by every Python's mmap


def address(view: KVView, kv: int = 0, layer: int = 0, slot: int = 0, head: int = 0) -> int:
    """The address of the first byte of a row, by the view's form and table alone."""
    form, part = view.form, view.form.parts[kv]
    table, offset = locate(part.table, part.offset, part.layer, layer)
    if form.paged:
        table, offset = locate(table, offset, part.block, slot // form.block_size)
        slot %= form.block_size
    table, offset = locate(table, offset, part.token, slot)
    table, offset = locate(table, offset, part.head, head)
    return int(view.addresses[table]) + offset


def move(runs: Iterable[Any]) -> None:
    """Carry runs out, one memmove each."""
    for source, target, nbytes in zip(*(column.tolist() for column in runs), strict=True):
        ctypes.memmove(target, source, nbytes)


Mover = Callable[[KVView, KVView, Any, Any], None]


def by_backend(src: KVView, dst: KVView, mine: Any, theirs: Any) -> None:
    """Copy by the library's choice of backend."""
    copy_rows(src, dst, mine, theirs).synchronize()


def by_runs(src: KVView, dst: KVView, mine: Any, theirs: Any) -> None:
    """Copy run by run, as a copy engine would: in the plan's units, head and tail by token."""
    first, second = Index.of(mine), Index.of(theirs)
    lengths = [x.length for x in (first, second) if x.length is not None]
    count = min(lengths or [src.slots, dst.slots])
    dst.check_writable()
    plan = CopyPlan(src.form, dst.form, first.plan_step, second.plan_step)
    if count % plan.unit or first.offset % plan.unit or second.offset % plan.unit:
        plan = CopyPlan(src.form, dst.form, first.plan_step, second.plan_step, unit=1)
    move(plan.runs(src, dst, first, second, count))


def noise(*shape: int, dtype: torch.dtype = torch.int16, seed: int = 0) -> torch.Tensor:
    """Random bits of any dtype, always the same."""
    count = prod(shape) * dtype.itemsize
    random = np.random.default_rng([seed, *shape]).integers(0, 256, count, dtype=np.uint8)
    return torch.from_numpy(random).view(dtype).view(shape)


def lazy(nbytes: int) -> torch.Tensor:
    """``nbytes`` of zeros of which only the pages that are touched take memory."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    return torch.frombuffer(mmap.mmap(-1, nbytes, flags=flags), dtype=torch.uint8)


@dataclass
class Hand:
    """A layout, tensors for it, and its rows ``[kv, layer, slot, head, dim]`` by plain torch."""

    layout: str
    make: Callable[[int], Any]  # a seed -> tensors
    rows: Callable[[Any], torch.Tensor]
    extents: dict[str, Any] = field(default_factory=dict)
    block: int = 0  # tokens of a block; 0 = not paged

    def view(self, tensors: Any) -> KVView:
        return KVView(tensors, self.layout, **self.extents)


def _listed(n: int, *shape: int) -> Callable[[int], list[torch.Tensor]]:
    return lambda seed: [noise(*shape, seed=seed * 100 + i) for i in range(n)]


def _nested(*shape: int) -> Callable[[int], list[list[torch.Tensor]]]:
    return lambda seed: [_listed(2, *shape)(seed * 10 + i) for i in range(2)]


def _one(*shape: int) -> Callable[[int], torch.Tensor]:
    return lambda seed: noise(*shape, seed=seed)


def _turn(*order: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Permute to [kv, layer, (block,) token, head, dim] and flatten to slots."""
    return lambda t: t.permute(order).reshape(KV, LAYERS, SLOTS, HEADS, DIM)


def _stacked(*order: int) -> Callable[[list[torch.Tensor]], torch.Tensor]:
    return lambda t: _turn(*order)(torch.stack(t))


def _grid(*order: int) -> Callable[[list[list[torch.Tensor]]], torch.Tensor]:
    return lambda t: _turn(*order)(torch.stack([torch.stack(inner) for inner in t]))


def _in_block(t: list[torch.Tensor]) -> torch.Tensor:
    """[layer, block, head, (kv token dim)]: a head's keys before its values."""
    return _turn(3, 0, 1, 4, 2, 5)(torch.stack(t).unflatten(3, (2, 4, DIM)))


HANDS = (
    Hand("layer | kv block token head dim", _listed(2, 2, 3, 4, 2, 4), _stacked(1, 0, 2, 3, 4, 5),
         block=4),
    Hand("layer | block kv token head dim", _listed(2, 6, 2, 2, 2, 4), _stacked(2, 0, 1, 3, 4, 5),
         block=2),
    Hand("layer | kv block head token dim", _listed(2, 2, 3, 2, 4, 4), _stacked(1, 0, 2, 4, 3, 5),
         block=4),
    Hand("layer | block head token (kv dim)", _listed(2, 3, 2, 4, 8),
         lambda t: _turn(4, 0, 1, 3, 2, 5)(torch.stack(t).unflatten(4, (2, 4))), block=4),
    Hand("layer | block head (kv token dim)", _listed(2, 3, 2, 32), _in_block, {"block_size": 4},
         block=4),
    Hand("kv layer | (block token) head dim", _nested(12, 2, 4), _grid(0, 1, 2, 3, 4),
         {"block_size": 4}, block=4),
    Hand("(kv layer) | (block token) head dim", _listed(4, 12, 2, 4),
         lambda t: _turn(0, 1, 2, 3, 4)(torch.stack(t).unflatten(0, (2, 2))),
         {"block_size": 1, "layers": 2}, block=1),
    Hand("layer kv | block token head dim", _nested(2, 6, 2, 4), _grid(1, 0, 2, 3, 4, 5), block=6),
    Hand("block layer kv token head dim", _one(3, 2, 2, 4, 2, 4), _turn(2, 1, 0, 3, 4, 5), block=4),
    Hand("layer kv block token head dim", _one(2, 2, 6, 2, 2, 4), _turn(1, 0, 2, 3, 4, 5), block=2),
    Hand("kv | block layer head token dim", _listed(2, 3, 2, 2, 4, 4), _stacked(0, 2, 1, 4, 3, 5),
         block=4),
    Hand("block head layer kv token dim", _one(3, 2, 2, 2, 4, 4), _turn(3, 2, 0, 4, 1, 5), block=4),
    Hand("layer kv | block head dim/2 token dim%2", _nested(3, 2, 2, 4, 2),
         lambda t: _grid(1, 0, 2, 5, 3, 4, 6)(t), block=4),
    Hand("kv layer token (head dim)", _one(2, 2, 12, 8),
         lambda t: _turn(0, 1, 2, 3, 4)(t.unflatten(3, (2, 4)))),
    Hand("token kv layer head dim", _one(12, 2, 2, 2, 4), _turn(1, 2, 0, 3, 4)),
    Hand("head layer kv token dim", _one(2, 2, 2, 12, 4), _turn(2, 1, 3, 0, 4)),
    Hand("token | kv layer (head dim)", _listed(12, 2, 2, 8),
         lambda t: _turn(1, 2, 0, 3, 4)(torch.stack(t).unflatten(3, (2, 4)))),
    Hand("block | kv layer token (head dim)", _listed(3, 2, 2, 4, 8),
         lambda t: _turn(1, 2, 0, 3, 4, 5)(torch.stack(t).unflatten(4, (2, 4))),
         {"heads": 2}, block=4),
)  # fmt: skip
for _hand in HANDS:
    if "(head dim)" in _hand.layout:
        _hand.extents = {**_hand.extents, "heads": HEADS}
