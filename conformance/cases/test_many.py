# SPDX-License-Identifier: Apache-2.0
"""More than fits: units under two lists of ids, and tensors in one table of addresses."""

from __future__ import annotations

import pytest
import torch

from portakv_conformance.cases import BOTH, Bench, Case, Shape

pytestmark = pytest.mark.area("corners")


@pytest.mark.parametrize("units", ["tokens", "blocks"])
def test_more_than_a_grid_holds_under_two_lists(bench: Bench, units: str) -> None:
    """Nothing is clipped either where both sides have ids, and each is an id for many."""
    count, step = (140_000, 1) if units == "tokens" else (70_000, 2)
    shape = Shape(1, 1, (2, 2), block_size=2, blocks=count * step // 2 + 1)
    ids = torch.randperm(count, generator=torch.Generator().manual_seed(bench.seed))
    target = bench.cache(shape, ids.flip(0), step=step, source=False)
    bench.copy(Case(bench.cache(shape, ids, step=step), target, count * step))


@BOTH
@pytest.mark.parametrize("layout", ["layer kv | block token head dim", "block | layer token dim"])
def test_more_tensors_than_a_table_holds(bench: Bench, layout: str, direction: str) -> None:
    """520 tensors on one side, of layers and kv or of blocks, are all distinguished."""
    if layout.startswith("layer"):
        shape = Shape(layers=260, heads=1, widths=(8, 8), block_size=2, blocks=2)
        bench.copy(bench.move(direction, shape, [3, 0], layout=layout))
        return
    shape = Shape(layers=2, heads=1, widths=(8,), block_size=2, blocks=520)
    bench.copy(bench.some(direction, shape, 600, 5, layout=layout))
    bench.copy(bench.some(direction, shape, 300, 5, step=2, layout=layout))
