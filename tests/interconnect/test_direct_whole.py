# SPDX-License-Identifier: Apache-2.0
"""Copies by `zero_copy` that the core makes by one call each: its kernel reads the ids of both
sides, whichever way a caller passes them."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.direct_on_cpu import CPU, Loads, Stores, installed, why_not
from support.host_choice_cases import put
from support.whole_copies import needs_whole_copies

from portakv import CopyPlan, KVView
from portakv.copy.inside import open_view
from portakv.core.call import SKIPS, TOKENS, CopyEnd, OpenedView, Watch
from portakv.interconnect.strategy import StrategyLaunch

pytestmark = [
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
    needs_whole_copies,
]

SIZE = 4
BLOCKS = 9
KINDS = ["list", "int64", "int32", "apart"]


def as_passed(kind: str, ids: list[int]) -> Any:
    """Return ids as a caller may pass them."""
    if kind == "list":
        return ids
    if kind == "apart":
        return torch.tensor([[each, -1] for each in ids])[:, 0]
    return torch.tensor(ids, dtype=getattr(torch, kind))


def views(downward: bool) -> tuple[KVView, KVView]:
    """Return blocks of a "device", layer by layer, and blocks of the host, with other numbers."""
    numbers = torch.arange(2 * BLOCKS * SIZE * 16, dtype=torch.int32)
    rows = KVView(numbers.view(2, BLOCKS, SIZE, 16).clone(), "layer block token dim")
    host = KVView(-1 - numbers.view(BLOCKS, 2, SIZE, 16), "block layer token dim")
    return put(rows, "device"), put(host, "pinned")


def version_of(view: KVView) -> int:
    return int(view.tensors._version)


def opened_at(view: KVView, device: int) -> OpenedView:
    """Return a view for the core, as one of the device of this number of DLPack."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "__dlpack_device__", lambda _: (device, 0))
        return open_view(view, Watch(view.owners))


@given(
    downward=st.booleans(),
    kinds=st.tuples(st.sampled_from(KINDS), st.sampled_from(KINDS)),
    read=st.permutations(range(-2, BLOCKS)),
    written=st.permutations(range(-2, BLOCKS)),
    count=st.integers(1, BLOCKS),
)
@settings(deadline=None, max_examples=40)
def test_bytes_are_those_of_numpy(
    downward: bool, kinds: tuple[str, str], read: list[int], written: list[int], count: int
) -> None:
    rows, host = views(downward)
    src, dst = (rows, host) if downward else (host, rows)
    blocks = {rows: rows.tensors.transpose(0, 1), host: host.tensors}
    expected = blocks[dst].clone()
    pairs = [*zip(read[:count], written[:count], strict=True)]
    for source, target in pairs:
        if source >= 0 and target >= 0:
            expected[target] = blocks[src][source]
    ids = [as_passed(*each) for each in zip(kinds, (read[:count], written[:count]), strict=True)]
    with installed() as driver:
        launch = (Stores if downward else Loads)(CPU).prepare(
            CopyPlan(src.form, dst.form, SIZE, SIZE)
        )
        assert isinstance(launch, StrategyLaunch)
        whole = launch.whole
        assert whole is not None
        end = CopyEnd()
        opened = [opened_at(view, 2 if view is rows else 1) for view in (src, dst)]
        sides = *[each.address for each in opened], *ids, SIZE, SIZE, 0, 0, count * SIZE
        before = version_of(dst)
        sides = *sides, *launch.terms(host, True)
        result = whole.copy(rows, host, sides, ctypes.addressof(end), 7)
    assert result >> TOKENS == count * SIZE
    assert bool(result & SKIPS) == any(min(pair) < 0 for pair in pairs)
    assert torch.equal(blocks[dst], expected)
    assert version_of(dst) == before + 1
    assert {stream for _, _, stream in driver.launches} == {7}
