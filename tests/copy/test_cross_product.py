# SPDX-License-Identifier: Apache-2.0
"""Every kind of preset as source and as destination, judged by the oracle byte by byte.

Where both can hold the rows the copy is exact and canaries stay whole; where they cannot, the right
error is raised and not one byte has changed. Whether a pair can is decided by `presets_cases.meet`
from the engines' shapes, without asking the library. An ordinary run makes a third of the pairs,
`.ci/full` all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from support.guarded_memory import untouched
from support.presets_cases import KINDS, meet, side

from portakv import Index, KVView, LayoutError, Unsupported, copy_rows
from portakv_conformance.draw.arrangement import Case, Side


def _index(side: Side, step: int, seed: int) -> torch.Tensor:
    """Half of the ids, shuffled, every fourth a hole."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randperm(side.slots // step, generator=random)[: side.slots // step // 2]
    ids[3::4] = -1
    return ids


def _views(names: tuple[str, str], case: Case) -> Iterator[KVView]:
    for name, own in zip(names, (case.src, case.dst), strict=True):
        yield KVView(own.tensors, name, reinterpret=case.src.reinterpret, **own.extents)


@pytest.mark.parametrize("third", [0, *(pytest.param(n, marks=pytest.mark.full) for n in (1, 2))])
@pytest.mark.parametrize("source", KINDS)
def test_every_destination(source: str, third: int) -> None:
    first, copied = KINDS.index(source), 0
    for at, destination in enumerate(KINDS):
        if (first + at) % 3 != third and at != first:
            continue
        held, names = meet(source, destination), (source, destination)
        sides = side(source, held), side(destination, held, source=False)
        if held is None:
            _refuses(names, Case(*sides, 1))
        else:
            _copies(names, *sides)
            copied += 1
    assert copied, f"{source} could be copied to nothing"


def _copies(names: tuple[str, str], src: Side, dst: Side) -> None:
    step = src.block_size or 1 if src.opaque else 1
    mine, theirs = _index(src, step, 0), _index(dst, step, 1)
    sides = replace(src, ids=mine, step=step), replace(dst, ids=theirs, step=step)
    case = Case(*sides, len(mine) * step)
    first, second = _views(names, case)
    indices = Index(mine, step), Index(theirs, step)
    case.check(lambda: copy_rows(first, second, *indices).synchronize())


def _refuses(names: tuple[str, str], case: Case) -> None:
    opaque = case.src.opaque, case.dst.opaque
    step = case.src.block_size or 1 if all(opaque) else 1
    # Where extents differ as well, a plan between a page and rows may say that first.
    expected = (LayoutError, Unsupported) if opaque[0] != opaque[1] else LayoutError
    first, second = _views(names, case)
    with untouched(case.src.tensors, case.dst.tensors), pytest.raises(expected):
        copy_rows(first, second, Index([0], step=step), Index([0], step=step))
