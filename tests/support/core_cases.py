# SPDX-License-Identifier: Apache-2.0
"""Shared by the tests of the core: addresses from a form, bytes moved run by run, and layouts
whose rows the oracle reads."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch

from portakv import CopyPlan, Index, KVView, copy_rows
from portakv.plan import Move
from portakv.view.form import locate as step_to
from portakv_conformance.draw.arrangement import side_of
from portakv_conformance.draw.by_hand import Shape, arranged
from portakv_conformance.judge.memory import Memory
from portakv_conformance.judge.oracle import locate

LAYERS, KV, HEADS, DIM, SLOTS = 2, 2, 2, 4, 12
GIB = 1 << 30
_MAP_NORESERVE = 0x4000  # Linux; not named by every Python's mmap


def address(view: KVView, kv: int = 0, layer: int = 0, slot: int = 0, head: int = 0) -> int:
    """The address of the first byte of a row, by the view's form and table alone."""
    form, part = view.form, view.form.parts[kv]
    table, offset = step_to(part.table, part.offset, part.layer, layer)
    if form.paged:
        table, offset = step_to(table, offset, part.block, slot // form.block_size)
        slot %= form.block_size
    table, offset = step_to(table, offset, part.token, slot)
    table, offset = step_to(table, offset, part.head, head)
    return int(view.addresses[table]) + offset


def move(runs: Iterable[Any]) -> None:
    """Carry runs out, one memmove each."""
    for source, target, nbytes in zip(*(column.tolist() for column in runs), strict=True):
        ctypes.memmove(target, source, nbytes)


Mover = Callable[..., None]


def by_backend(src: KVView, dst: KVView, mine: Any, theirs: Any, count: int | None = None) -> None:
    """Copy by the library's choice of backend."""
    copy_rows(src, dst, mine, theirs, count=count).synchronize()


def by_runs(src: KVView, dst: KVView, mine: Any, theirs: Any, count: int | None = None) -> None:
    """Copy run by run, as a copy engine would."""
    indices = Index.of(mine), Index.of(theirs)
    lengths = [x.length for x in indices if x.length is not None]
    count = min(lengths or [src.slots, dst.slots]) if count is None else count
    dst.check_writable()
    for plan, part in sections(Move(src, dst, *indices, count)):
        move(plan.runs(*part))


def sections(whole: Move) -> Iterator[tuple[CopyPlan, Move]]:
    """A copy as the library cuts it: whole units, and head and tail by tokens, each with a plan."""
    forms = whole.src.form, whole.dst.form
    for first, tokens, unit in CopyPlan(*forms, *whole.steps).split(whole):
        yield CopyPlan(*forms, *whole.steps, unit), whole.part(first, tokens)


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
    """A layout, tensors for it by the kit, and its rows ``[kv, layer, slot, head, dim]`` as the
    oracle reads them; ``block`` is the tokens of a block, 0 if it is not paged."""

    layout: str
    block: int

    def make(self, seed: int) -> Any:
        size = self.block or 1
        shape = Shape(LAYERS, HEADS, (2 * DIM,) * KV, size, SLOTS // size)
        return side_of(arranged(self.layout, shape, torch.int16, seed=seed, tokens=SLOTS)).tensors

    def view(self, tensors: Any) -> KVView:
        block = self.block or None
        return KVView(tensors, self.layout, block_size=block, heads=HEADS, layers=LAYERS)

    def rows(self, tensors: Any) -> torch.Tensor:
        extents = {"heads": HEADS, "layers": LAYERS, "block_size": self.block or None}
        memory, rows = Memory.snapshot(tensors), locate(tensors, self.layout, extents)
        found = [
            [rows.row_addresses(kv, layer, range(SLOTS)) for layer in range(LAYERS)]
            for kv in range(KV)
        ]
        return torch.from_numpy(memory.read(np.array(found))).view(torch.int16)


_BLOCKS = {
    "layer | kv block token head dim": 4,
    "layer | block kv token head dim": 2,
    "layer | kv block head token dim": 4,
    "layer | block head token (kv dim)": 4,
    "layer | block head (kv token dim)": 4,
    "kv layer | (block token) head dim": 4,
    "(kv layer) | (block token) head dim": 1,
    "layer kv | block token head dim": 6,
    "block layer kv token head dim": 4,
    "layer kv block token head dim": 2,
    "kv | block layer head token dim": 4,
    "block head layer kv token dim": 4,
    "layer kv | block head dim/2 token dim%2": 4,
    "kv layer token (head dim)": 0,
    "token kv layer head dim": 0,
    "head layer kv token dim": 0,
    "token | kv layer (head dim)": 0,
    "block | kv layer token (head dim)": 4,
}
HANDS = tuple(Hand(layout, block) for layout, block in _BLOCKS.items())
