# SPDX-License-Identifier: Apache-2.0
"""Every preset as source x every preset as destination, judged by the oracle byte by byte.

Where both can hold the rows the copy is exact and canaries stay whole; where they cannot, the right
error is raised and not one byte has changed. Whether a pair can is decided by `presets_cases.meet`
from the engines' shapes, without asking the library.
"""

from __future__ import annotations

import pytest
import torch
from support.presets_cases import GUARD, HANDED, Case, build, meet

from portakv import Index, KVView, LayoutError, Unsupported, copy_rows
from portakv.layout.presets import PRESETS
from portakv_conformance.judge import oracle
from portakv_conformance.judge.memory import Memory

_GUARD = 16  # bytes


def _index(slots: int, step: int, seed: int) -> list[int]:
    """Half of the ids, shuffled, every fourth a hole."""
    order = torch.randperm(slots // step, generator=torch.Generator().manual_seed(seed)).tolist()
    ids = order[: max(1, len(order) // 2)]
    return [-1 if i % 4 == 3 else slot for i, slot in enumerate(ids)]


def _guards_whole(case: Case) -> bool:
    return all(
        bool((buffer[:_GUARD] == GUARD).all() and (buffer[-_GUARD:] == GUARD).all())
        for buffer in case.buffers
    )


@pytest.mark.parametrize("source", HANDED)
def test_every_destination(source: str) -> None:
    copied = refused = 0
    for destination in HANDED:
        held = meet(source, destination)
        src = build(source, held, seed=1, guard=_GUARD)
        dst = build(destination, held, seed=2, guard=_GUARD)
        views = [
            KVView(case.tensors, name, reinterpret=src.dtype != dst.dtype, **case.extents)
            for case, name in ((src, source), (dst, destination))
        ]
        if held is None:
            _refuses(src, dst, views[0], views[1], f"{source} -> {destination}")
            refused += 1
        else:
            _copies(source, destination, src, dst, views[0], views[1])
            copied += 1
    assert copied, f"{source} could be copied to nothing"
    assert copied + refused == len(PRESETS)


def _copies(
    source: str, destination: str, src: Case, dst: Case, mine: KVView, theirs: KVView
) -> None:
    step = src.geometry.block_size if src.traits.opaque else 1
    src_index = Index(_index(mine.slots, step, 3), step=step)
    dst_index = Index(_index(theirs.slots, step, 4)[: src_index.ids.numel()], step=step)  # type: ignore[union-attr]
    count = dst_index.length
    assert count is not None
    layouts = PRESETS[source].layout, PRESETS[destination].layout
    oracle.check_copy(
        src.tensors,
        layouts[0],
        src.declared,
        dst.tensors,
        layouts[1],
        dst.declared,
        src_index.slots(count),
        dst_index.slots(count),
        lambda: copy_rows(mine, theirs, src_index, dst_index, count=count).synchronize(),
    )
    assert _guards_whole(src), f"{source} -> {destination}"
    assert _guards_whole(dst), f"{source} -> {destination}"


def _refuses(src: Case, dst: Case, mine: KVView, theirs: KVView, pair: str) -> None:
    before = Memory.snapshot(src.tensors, dst.tensors)
    opaque = src.traits.opaque, dst.traits.opaque
    step = src.geometry.block_size if all(opaque) else 1
    # Where extents differ as well, a plan between a page and rows may say that first.
    expected = (LayoutError, Unsupported) if opaque[0] != opaque[1] else LayoutError
    with pytest.raises(expected):
        copy_rows(mine, theirs, Index([0], step=step), Index([0], step=step))
    after = Memory.snapshot(src.tensors, dst.tensors)
    for old, new in zip(before.regions, after.regions, strict=True):
        assert (old.content == new.content).all(), f"{pair} wrote before it refused"
