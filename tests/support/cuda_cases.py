# SPDX-License-Identifier: Apache-2.0
"""A fixed table of copies, among them every shape that a kernel can take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from portakv import CopyPlan, Index, KVView
from portakv.backends import rows_kernel
from portakv_conformance.judge.oracle import compare, expand, expected_copy
from support.guarded_memory import filled

NHD = "layer | kv block token head dim"
HND = "layer | kv block head token dim"
CHUNK = "kv layer token (head dim)"
SLOTS = [11, 0, -1, 6, 5, 3, 9]


@dataclass
class End:
    """One side of a copy: its tensors, how they are read, and its index."""

    tensors: Any
    layout: str
    extents: dict[str, Any] = field(default_factory=dict)
    ids: list[int] | None = None
    step: int = 1
    offset: int = 0
    dtype: torch.dtype = torch.int64

    def view(self) -> KVView:
        return KVView(self.tensors, self.layout, **self.extents)

    def index(self) -> Index:
        ids = None if self.ids is None else torch.tensor(self.ids, dtype=self.dtype)
        return Index(ids, step=self.step, offset=self.offset)

    def slots(self, count: int) -> Any:
        """Return the slot of each position; negative also for an id past the end."""
        expanded = expand(self.ids, self.step, self.offset, count)
        return np.where(expanded < self.view().slots, expanded, -1)


@dataclass
class Copy:
    """A copy of ``count`` positions."""

    src: End
    dst: End
    count: int

    def plan(self) -> CopyPlan:
        steps = (self.src.index().plan_step, self.dst.index().plan_step)
        return CopyPlan(self.src.view().form, self.dst.view().form, *steps)

    def check(self, copy: Callable[[], object]) -> None:
        """Run ``copy``, judge every byte by the oracle."""
        src = self.src
        dst = self.dst
        expected = expected_copy(
            src.tensors,
            src.layout,
            src.extents,
            dst.tensors,
            dst.layout,
            dst.extents,
            src.slots(self.count),
            dst.slots(self.count),
        )
        copy()
        verdict = compare(expected, dst.tensors, src.tensors)
        assert verdict is None, verdict


def pool(layout: str = NHD, layers: int = 3, blocks: int = 3, dim: int = 8, **ids: Any) -> End:
    """Return layers ``[kv, block, token (4), head (2), dim]``; some have heads before tokens."""
    inner = (2, 4) if layout == HND else (4, 2)
    return End([filled((2, blocks, *inner, dim)) for _ in range(layers)], layout, **ids)


def chunk(tokens: int, layers: int = 3, dim: int = 8, **ids: Any) -> End:
    return End(filled((2, layers, tokens, 2 * dim)), CHUNK, {"heads": 2}, **ids)


def rows(width: int, shift: int = 0) -> tuple[End, End]:
    """Return layers of rows of ``width`` bytes, ``shift`` bytes after an aligned address; a
    chunk."""
    caches = [filled((shift + 12 * width,), torch.uint8) for _ in range(2)]
    shifted = [cache[shift:].view(3, 4, width) for cache in caches]
    landed = End(filled((2, 7, width), torch.uint8), "layer token dim")
    return End(shifted, "layer | block token dim"), landed


def by(end: End, ids: list[int] | None, step: int = 1, **more: Any) -> End:
    """Return the same memory with another index."""
    return End(end.tensors, end.layout, end.extents, ids, step, **more)


def objects(count: int = 3) -> End:
    """Return memory objects of four tokens each: the number of a block chooses the address."""
    made = [filled((2, 3, 4, 16)) for _ in range(count)]
    return End(made, "block | kv layer token (head dim)", {"heads": 2})


def gathered(width: int, shift: int = 0) -> Copy:
    cache, landed = rows(width, shift)
    return Copy(by(cache, SLOTS), landed, 7)


def scattered(width: int, shift: int = 0) -> Copy:
    cache, landed = rows(width, shift)
    return Copy(landed, by(cache, SLOTS, dtype=torch.int32), 7)


def joined(layout: str) -> End:
    """Return all layers in one allocation."""
    whole = filled((3, 2, 3, 4, 2, 8) if layout == NHD else (3, 2, 3, 2, 4, 8))
    return End(list(whole), layout)


def unequal() -> Copy:
    caches = [filled((3, 2, 4, 24)) for _ in range(2)]
    parts = [filled((2, 7, 2, 16)), filled((2, 7, 2, 8))]
    paged = End(caches, "layer | block head token (kv dim)", {"dim": (16, 8)}, SLOTS)
    return Copy(paged, End(parts, "kv | layer token head dim", {"dim": (16, 8)}), 7)


def split_tokens() -> End:
    """Return a side whose token numbers walk through three steps."""
    return End(filled((3, 2, 2, 2, 2, 8)), "block kv token/2 head token%2 dim")


def universal(**ids: Any) -> End:
    """Return a side that stores a head's rows of all layers together."""
    return End(filled((3, 2, 3, 2, 4, 8)), "block head layer kv token dim", **ids)


def nz(**ids: Any) -> End:
    made = [[filled((3, 2, 2, 4, 4)) for _ in range(2)] for _ in range(3)]
    return End(made, "layer kv | block head dim/4 token dim%4", **ids)


def holed() -> End:
    """Return rows with padding after each head, each token and each block."""
    wide = [filled((2, 4, 5, 3, 12)) for _ in range(3)]
    return End([t[:, :3, :4, :2, :8] for t in wide], NHD)


def opaque() -> Copy:
    pages = [[filled((3, 40), torch.uint8) for _ in range(2)] for _ in range(2)]
    src, dst = [End(side, "layer | block page", {"block_size": 4}) for side in pages]
    return Copy(by(src, [2, 0], 4), by(dst, [1, 2], 4), 8)


#: Every copy is made anew for each test, so that no test sees what another wrote.
COPIES: dict[str, Callable[[], Copy]] = {
    "gather": lambda: Copy(by(pool(), SLOTS), chunk(7), 7),
    "scatter": lambda: Copy(chunk(7), by(pool(), SLOTS), 7),
    "gather int32": lambda: Copy(by(pool(), SLOTS, dtype=torch.int32), chunk(7), 7),
    "pool to pool": lambda: Copy(by(pool(), SLOTS), by(pool(HND), SLOTS[::-1]), 7),
    "chunk to chunk": lambda: Copy(
        chunk(7), End(filled((7, 2, 3, 2, 8)), "token kv layer head dim"), 7
    ),
    "gather of 656 B rows": lambda: gathered(656),
    **{f"gather of {width} B rows": partial(gathered, width) for width in (48, 40, 12, 6, 3)},
    **{f"scatter to {width} B rows": partial(scattered, width) for width in (48, 40, 12, 6, 3)},
    # Rows that end inside a sector, which their lanes follow.
    **{f"scatter to {width} B rows": partial(scattered, width) for width in (656, 272, 144, 132)},
    "scatter to 656 B rows that begin inside a sector": lambda: scattered(656, shift=48),
    # Rows whose places, if they end at a sector, are fewer than a row that begins inside one needs.
    **{
        f"scatter to {width} B rows at an odd address": partial(scattered, width, shift=1)
        for width in (28, 157)
    },
    "scatter of 656 B rows to slots": lambda: Copy(
        by(rows(656, 16)[0], SLOTS[::-1]), by(rows(656, 80)[0], SLOTS), 7
    ),
    "rows at an odd address": lambda: gathered(64, shift=1),
    "rows to an odd address": lambda: scattered(64, shift=2),
    "one plane": lambda: Copy(
        End(filled((3, 4, 16)), "block token dim", ids=SLOTS), End(filled((7, 16)), "token dim"), 7
    ),
    "layers in one allocation": lambda: Copy(by(joined(NHD), SLOTS), chunk(7), 7),
    "scatter to one allocation": lambda: Copy(chunk(7), by(joined(HND), SLOTS), 7),
    "blocks": lambda: Copy(by(pool(), [2, -1, 0], 4), chunk(12), 12),
    "blocks of heads": lambda: Copy(by(pool(HND), [2, -1, 0], 4), chunk(12), 12),
    "blocks of heads to blocks of tokens": lambda: Copy(
        by(pool(HND), [2, 0], 4), by(pool(), [0, 1], 4, dtype=torch.int32), 8
    ),
    "several units of an id": lambda: Copy(
        by(pool(), [2, -1, 0, 1], 4), by(pool(blocks=4), [1, 0], 8), 16
    ),
    "slots of an id": lambda: Copy(by(pool(HND), [2, 0], 4), by(pool(), SLOTS), 7),
    "slots to an id": lambda: Copy(by(pool(), SLOTS), by(pool(HND), [1, 2], 4, offset=1), 7),
    "split tokens": lambda: Copy(by(split_tokens(), SLOTS), chunk_of_one_layer(7), 7),
    "split tokens both sides": lambda: Copy(
        by(split_tokens(), SLOTS), by(split_tokens(), SLOTS[::-1]), 7
    ),
    "memory objects, gathered": lambda: Copy(by(pool(), SLOTS), objects(), 7),
    "memory objects, scattered": lambda: Copy(
        End(objects().tensors, objects().layout, {"heads": 2}, offset=2), by(pool(), SLOTS), 7
    ),
    "memory objects, blocks": lambda: Copy(by(objects(), [2, 0], 4), by(pool(), [1, 2], 4), 8),
    "tokens in a list": lambda: Copy(
        by(pool(), SLOTS),
        End([filled((2, 3, 16)) for _ in range(7)], "token | kv layer (head dim)", {"heads": 2}),
        7,
    ),
    "more planes than the arguments hold": lambda: Copy(
        by(pool(layers=200, dim=2), SLOTS), chunk(7, layers=200, dim=2), 7
    ),
    "two nests": unequal,
    "heads first": lambda: Copy(universal(ids=[2, 0], step=4), chunk(8), 8),
    "to heads first": lambda: Copy(chunk(7), universal(ids=SLOTS), 7),
    "both heads first, by slots": lambda: Copy(universal(ids=SLOTS), pool(HND, ids=SLOTS), 7),
    "NZ": lambda: Copy(nz(ids=SLOTS), chunk(7), 7),
    "NZ blocks": lambda: Copy(chunk(12), nz(ids=[1, -1, 0], step=4), 12),
    "NZ blocks to padding": lambda: Copy(
        nz(ids=[1, 0], step=4), by(holed(), [0, 2], 4, dtype=torch.int32), 8
    ),
    "padding": lambda: Copy(by(holed(), SLOTS), chunk(7), 7),
    "to padding": lambda: Copy(chunk(12), by(holed(), [0, 2, 1], 4), 12),
    "opaque pages": opaque,
    "from between two units": lambda: Copy(by(pool(), [2, 0], 4), chunk(16, offset=3), 8),
    "a head, a body and a tail": lambda: Copy(
        by(pool(), [2, 1, 0], 4, offset=2), chunk(12, offset=1), 9
    ),
}


def chunk_of_one_layer(tokens: int) -> End:
    return End(filled((2, tokens, 16)), "kv token (head dim)", {"heads": 2})


def seed_bug(
    monkeypatch: pytest.MonkeyPatch, bug: tuple[str, str, str], file: str = "cuda/rows.cuh"
) -> tuple[Copy, int]:
    """Put a bug, (what stands in a kernel's text, what replaces it, a copy that shows it), in its
    last place in the file; the copy, and what its status word should tell."""
    right, wrong, name = bug
    text = rows_kernel.kernel_text(file)
    assert right in text, "the kernel's text has changed: seed the bug anew"
    monkeypatch.setattr(rows_kernel, "kernel_text", lambda *_: wrong.join(text.rsplit(right, 1)))
    if name == "past the end":
        return Copy(by(pool(), [3, 1, 12, 11]), chunk(4), 4), 3
    return COPIES[name](), 0
