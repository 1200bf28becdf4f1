# SPDX-License-Identifier: Apache-2.0
"""Every kind of preset as source and as destination, judged by the oracle byte by byte.

Where both can hold the rows the copy is exact and canaries stay whole; where they cannot, the right
error is raised and not one byte has changed. Whether a pair can is decided by `presets_cases.meet`
from the engines' shapes, without asking the library.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.presets_cases import KINDS, meet, side

from portakv import Index, KVView, LayoutError, Unsupported, copy_rows
from portakv_conformance.draw.arrangement import Case, Side
from portakv_conformance.judge.memory import Memory


def _index(side: Side, step: int, seed: int) -> torch.Tensor:
    """Half of the ids, shuffled, every fourth a hole."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randperm(side.slots // step, generator=random)[: side.slots // step // 2]
    ids[3::4] = -1
    return ids


def _views(names: tuple[str, str], case: Case) -> tuple[KVView, KVView]:
    src, dst, bits = case.src, case.dst, case.src.reinterpret
    mine = KVView(src.tensors, names[0], reinterpret=bits, **src.extents)
    return mine, KVView(dst.tensors, names[1], reinterpret=bits, **dst.extents)


@pytest.mark.parametrize("source", KINDS)
def test_every_destination(source: str) -> None:
    copied = refused = 0
    for destination in KINDS:
        held, names = meet(source, destination), (source, destination)
        sides = side(source, held), side(destination, held, source=False)
        if held is None:
            _refuses(names, Case(*sides, 1))
            refused += 1
        else:
            _copies(names, *sides)
            copied += 1
    assert copied, f"{source} could be copied to nothing"
    assert copied + refused == len(KINDS)


def _copies(names: tuple[str, str], src: Side, dst: Side) -> None:
    step = src.block_size or 1 if src.opaque else 1
    mine, theirs = _index(src, step, 0), _index(dst, step, 1)
    sides = replace(src, ids=mine, step=step), replace(dst, ids=theirs, step=step)
    case = Case(*sides, len(mine) * step)
    views = _views(names, case)
    case.check(lambda: copy_rows(*views, Index(mine, step), Index(theirs, step)).synchronize())


def _refuses(names: tuple[str, str], case: Case) -> None:
    before = Memory.snapshot(case.src.tensors, case.dst.tensors)
    opaque = case.src.opaque, case.dst.opaque
    step = case.src.block_size or 1 if all(opaque) else 1
    # Where extents differ as well, a plan between a page and rows may say that first.
    expected = (LayoutError, Unsupported) if opaque[0] != opaque[1] else LayoutError
    with pytest.raises(expected):
        copy_rows(*_views(names, case), Index([0], step=step), Index([0], step=step))
    after = Memory.snapshot(case.src.tensors, case.dst.tensors)
    for old, new in zip(before.regions, after.regions, strict=True):
        assert (old.content == new.content).all(), f"{names} wrote before it refused"
