# SPDX-License-Identifier: Apache-2.0
"""More than fits: units under two lists of ids, and tensors behind one table of addresses."""

from __future__ import annotations

import pytest
import torch

from portakv_conformance.draw.arrangement import Case
from portakv_conformance.draw.by_hand import DIRECTIONS, Shape, Workshop
from portakv_conformance.judge.judging import Judge

pytestmark = pytest.mark.area("corners")


@pytest.mark.parametrize("units", ["tokens", "blocks"])
def test_more_than_a_grid_holds_under_two_lists(judge: Judge, home: Workshop, units: str) -> None:
    """Nothing is clipped either where both sides have ids, and each is an id for many."""
    count = 140_000 if units == "tokens" else 70_000
    step = 1 if units == "tokens" else 2
    shape = Shape(layers=1, heads=1, widths=(2, 2), block_size=2, blocks=count * step // 2 + 1)
    ids = [
        torch.randperm(count, generator=torch.Generator().manual_seed(home.seed)) for _ in range(2)
    ]
    ids[1] = ids[1].flip(0)
    sides = [home.cache(shape, ids[n], step=step, source=n == 0) for n in range(2)]
    judge.copy(Case(sides[0], sides[1], count * step))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("layout", ["layer kv | block token head dim", "block | layer token dim"])
def test_more_tensors_than_a_table_holds(
    judge: Judge, home: Workshop, layout: str, direction: str
) -> None:
    """520 tensors on one side, layers with keys and values apart or a list of blocks, are all told
    apart: a deep model has 256, and tables that travel in arguments have an end."""
    if layout.startswith("layer"):
        shape = Shape(layers=260, heads=1, widths=(8, 8), block_size=2, blocks=2)
        judge.copy(home.move(direction, shape, [3, 0], layout=layout))
        return
    shape = Shape(layers=2, heads=1, widths=(8,), block_size=2, blocks=520)
    judge.copy(home.move(direction, shape, home.shuffled(shape.slots, 600, 5), layout=layout))
    blocks = home.shuffled(shape.blocks, 300, 5)
    judge.copy(home.move(direction, shape, blocks, step=2, layout=layout))
