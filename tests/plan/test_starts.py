# SPDX-License-Identifier: Apache-2.0
"""Whole blocks into a flat side that begins between two units: vectors are no wider than that."""

from __future__ import annotations

import pytest
import torch
from support.core_cases import noise
from support.guarded_memory import filled, same

from portakv import CopyPlan, Index, KVView, copy_rows


@pytest.mark.parametrize("start", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("gathers", [True, False], ids=["gather", "scatter"])
def test_a_flat_side_may_begin_at_any_token(start: int, gathers: bool) -> None:
    """A block of 8 tokens x 24 B allows vectors of 16 B, a start at the next token does not."""
    cache, rows = noise(4, 8, 12, dtype=torch.float16), filled((24, 12))
    table, begin = Index([2, 0], step=8), Index(offset=start)
    blocks = KVView(cache, "block token dim", kv=1)
    flat = KVView(rows, "token dim", kv=1)
    if gathers:
        wanted = rows.clone()
        wanted[start : start + 16] = cache[[2, 0]].view(rows.dtype).reshape(16, 12)
        assert CopyPlan(blocks.form, flat.form, 8, 0).vector == 8
        copy_rows(blocks, flat, table, begin, count=16).synchronize()
        assert same(rows, wanted)
    else:
        expected = cache.clone()
        expected[[2, 0]] = rows[start : start + 16].view(cache.dtype).reshape(2, 8, 12)
        copy_rows(flat, blocks, begin, table, count=16).synchronize()
        assert same(cache, expected)


def test_sides_that_begin_at_units_keep_wide_vectors() -> None:
    blocks = KVView(noise(4, 8, 12), "block token dim", kv=1).form
    assert CopyPlan(blocks, blocks, 8, 8).vector == 16
