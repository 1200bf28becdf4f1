# SPDX-License-Identifier: Apache-2.0
"""What a block transfer costs the host, on the simulated device: ids of one call cross at once and
keep no host waiting, and clocks use their events again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.block_cases import SIZE, WAYS, block_first, layered, wanted
from support.block_moves import DST, ORDERED, SRC, _no_faults_left, settled, way
from support.simdev_cases import DEVICE, current

from portakv import Index, copy_blocks
from portakv.host import small
from portakv.registry import prepared
from portakv_conformance import simdev

pytestmark = pytest.mark.simdev

__all__ = ["_no_faults_left", "way"]


@pytest.mark.parametrize("side", [False, True])
@pytest.mark.parametrize("store", [False, True])
def test_ids_of_one_call_cross_together_and_keep_no_host_waiting(
    store: bool, side: bool, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on devices that are sent ids by a kernel."""
    monkeypatch.setattr(prepared, "AT_ONCE", frozenset({DEVICE.type}))
    sent: list[int] = []
    real = small.to_device

    def noted(values: Any, *rest: Any) -> torch.Tensor:
        sent.append(len(values))
        return real(values, *rest)

    monkeypatch.setattr(small, "to_device", noted)
    for _ in range(2):
        src, dst = layered(DEVICE), block_first(DEVICE)
        (src, dst) = (src, dst) if store else (dst, src)
        settled()
        expected = wanted(src, dst, SRC, DST)
        stream = torch.Stream(DEVICE) if side else None
        sent.clear()
        simdev.delay(current(), 50)
        moved = copy_blocks(src.view, dst.view, SRC, torch.tensor(DST), stream=stream, **WAYS[way])
        if way in ORDERED:
            assert sent == [10]
            assert not moved.done(), "the host waited for the stream"
        moved.synchronize()
        assert torch.equal(dst.rows(), expected)
        assert sum(sent) == 10


def test_an_index_that_is_kept_is_not_sent_behind_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be used on another stream next, which does not wait for this one."""
    monkeypatch.setattr(prepared, "AT_ONCE", frozenset({DEVICE.type}))
    monkeypatch.setattr(small, "to_device", lambda *rest: pytest.fail("it was sent"))
    src, dst = layered(DEVICE), block_first(DEVICE)
    settled()
    expected = wanted(src, dst, SRC, DST)
    mine, theirs = Index(SRC, step=SIZE), Index(DST, step=SIZE)
    assert not prepared.bring((mine, theirs), DEVICE, frozenset({torch.int64}))
    for stream in (None, torch.Stream(DEVICE)):
        copy_blocks(src.view, dst.view, mine, theirs, stream=stream).synchronize()
        assert torch.equal(dst.rows(), expected)
