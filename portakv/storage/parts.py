# SPDX-License-Identifier: Apache-2.0
"""The parts of a block that lie in tiers, the stages in which they cross into a view, and the sizes
of the tasks that move them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from portakv.graph import Lease, Mask, Task
from portakv.storage.form import BlockForm, Slices
from portakv.storage.rows import Crossing
from portakv.storage.tier import TierStore as TierStore
from portakv.view import KVView

#: Bytes of a task of a save, and of a load, unless a block is larger. A load in 16 MiB pieces left
#: a disk's queue too short on an H200 machine: 1.6 GB/s, by 32 MiB 2.1. An urgent load waits for
#: one piece of a save.
SAVED = 16 << 20
LOADED = 32 << 20
#: Bytes of a long task of a save, which no tier stores. Each task takes the host some 0.1 ms if its
#: copy was issued. One that packs takes 0.85 ms; 16 MiB of raw rows cross at 23 GB/s, 128 at 52.
LONG = 128 << 20
#: Bytes of a task whose copy is issued by itself, before the next task takes rows.
APART = 64 << 20
#: Bytes up to which tasks share no work of a call.
SHARED = 1 << 20
#: Blocks of a task at most: the end of a task takes the graph's lock for 4 us a block, and urgent
#: work waits for it.
BLOCKS = 256
#: Blocks of a call that are planned before others may take the graph's lock.
SLICE = 256
#: Bytes of a block below which a read keeps the interpreter more than the disk.
SMALL = 64 << 10
PARTS = 8  # of the device's stage by layer, if blocks are read as a whole


class Stage(NamedTuple):
    """The rows that cross together between rows and a view.

    ``layers`` of the view, their segment (None: the image), and both sides of the copy.
    """

    layers: range
    segment: int | None
    inner: KVView
    outer: KVView


@dataclass(eq=False)
class Part:
    """Blocks of one form, and the rectangle that they share with the store's form.

    ``cells`` has a bit for each head of each layer of the rectangle. ``part_slices`` and
    ``own_slices`` are the rectangle in a view of this form and in a view of the store's form.
    """

    form: BlockForm
    tier_stores: list[TierStore]
    part_slices: Slices
    own_slices: Slices
    rows: KVView  # that rectangle of all rows of the store
    cells: int

    def name(self, key: bytes) -> bytes:
        """Return the name of this part of a block among the rows."""
        return self.form.digest + key

    def names(self, keys: Sequence[bytes]) -> list[bytes]:
        """Return the name of this part of each block among the rows."""
        digest = self.form.digest
        return [digest + key for key in keys]

    def stages(self, view: KVView, by_layer: bool) -> list[Stage]:
        """Return the stages between rows and a view, in order of their layers."""
        first = self.part_slices["layers"].start
        past = self.part_slices["layers"].stop
        segmented = by_layer and len(self.form.segments) > 1
        outer = view.slice(**self.own_slices)
        if segmented:
            ends = [0, *(segment.past_layer for segment in self.form.segments)]
        else:
            many = min(PARTS, past - first) if by_layer else 1
            ends = np.linspace(first, past, 1 + many, dtype=int).tolist()
        result = list[Stage]()
        to = self.own_slices["layers"].start
        for number, (a, b) in enumerate(pairwise(min(max(x, first), past) - first for x in ends)):
            if a < b:
                sides = self.rows.slice(layers=slice(a, b)), outer.slice(layers=slice(a, b))
                result.append(Stage(range(to + a, to + b), number if segmented else None, *sides))
        return result


class Arrival(NamedTuple):
    """Blocks ``at`` of a call that arrive in ``rows`` of a lease.

    They are complete for stage n after the tasks ``ends[n]`` have ended.
    """

    lease: Lease
    ends: dict[int, list[Task]]
    at: Sequence[int]
    rows: Sequence[int]

    def cross(self, crossing: Crossing, stage: Stage, _: Task, mask: Mask) -> None:
        """Copy the blocks of a mask from their rows into the view, as the task of a stage."""
        left = np.flatnonzero(mask)
        items = np.array(self.lease.items)[np.array(self.rows)[left]]
        crossing.copy(stage.inner, stage.outer, items, np.array(self.at)[left])


def parts_of(
    form: BlockForm,
    forms: Iterable[BlockForm],
    tier_stores: Sequence[TierStore],
    rows: torch.Tensor,
) -> list[Part]:
    """Return the parts of blocks of a form that lie in tiers and in rows of a tensor.

    The form itself comes first, then the others by their first cell, the largest first among
    equals.
    """
    parts = list[Part]()
    across = form.heads[1] - form.heads[0]
    for other in forms:
        if slices := form.part_of(other):
            stores = [tier_store for tier_store in tier_stores if tier_store.form == other]
            layers = slices[1]["layers"]
            heads = slices[1]["heads"]
            cells = sum(1 << n for n in range(heads.start, heads.stop))
            cells = sum(cells << across * n for n in range(layers.start, layers.stop))
            parts.append(Part(other, stores, *slices, other.view(rows).slice(**slices[0]), cells))
    return parts[:1] + sorted(parts[1:], key=lambda x: (x.cells & -x.cells, -x.cells.bit_count()))


def task_blocks(
    blocks: list[int], size: int, nbytes: int, rows: int, least: int, widths: Sequence[int]
) -> list[list[int]]:
    """Return the blocks of each task, at most ``nbytes`` and ``rows`` of them.

    At least ``least`` tasks share the blocks, or all workers of a queue of some width. Few bytes
    are one task, unless the workers share them, as each task costs its steps.
    """
    if len(blocks) * size <= SHARED:
        least = 1
    share = -(-len(blocks) // max([least, *widths]))
    most = max(1, min(rows, nbytes // size, share, BLOCKS))
    return [blocks[first : first + most] for first in range(0, len(blocks), most)]
