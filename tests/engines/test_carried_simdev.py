# SPDX-License-Identifier: Apache-2.0
"""Which engine there is for which terms, and what is remembered of the one that carried a copy."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from support.simdev_cases import DEVICE

from portakv import Index, KVView, copy_blocks
from portakv.engines import choose
from portakv.engines.choose import Host, HostLaunch, across
from portakv.engines.engine import Engine, Terms
from portakv.plan.move import Move
from portakv.plan.plan import CopyPlan
from portakv.registry.registry import choose as chosen
from portakv_conformance import simdev

pytestmark = pytest.mark.simdev

LAYOUT = "block kv layer token head dim"
SHAPE = (16, 2, 2, 4, 1, 64)


def views() -> tuple[KVView, KVView]:
    rows = torch.arange(16384 * 2).to(torch.uint8)[:16384].view(SHAPE).to(DEVICE)
    return KVView(rows, LAYOUT), KVView(torch.zeros(SHAPE, dtype=torch.uint8).pin_memory(), LAYOUT)


def engines() -> int:
    """Engines that are held by anything."""
    gc.collect()
    return sum(issubclass(type(each), Engine) for each in gc.get_objects())


def test_thirty_rates_leave_no_thirty_engines() -> None:
    src, dst = views()
    blocks = [3, 1, 2]
    copy_blocks(src, dst, blocks, blocks, max_gbps=9.0).synchronize()
    before, kinds = engines(), len(choose._made)
    for nth in range(30):
        copy_blocks(src, dst, blocks, blocks, max_gbps=10 + nth / 7).synchronize()
    assert engines() == before
    assert len(choose._made) == kinds
    assert torch.equal(dst.tensors[blocks], src.tensors.cpu()[blocks])
    assert not simdev.take_faults()


def test_thirty_rates_of_one_forced_engine_leave_no_thirty_engines() -> None:
    src, dst = views()
    copy_blocks(src, dst, [1], [1], backend="staged", max_gbps=9.0).synchronize()
    before = engines()
    for nth in range(30):
        rate = 10 + nth / 7
        copy_blocks(src, dst, [1], [1], backend="staged", max_gbps=rate).synchronize()
    assert engines() == before


def test_an_engine_is_another_one_by_what_makes_it_different() -> None:
    half = chosen(DEVICE)
    plain = across(half)
    assert across(half, Terms()) is plain
    limited = across(half, Terms(max_gbps=3.0))
    assert across(half, Terms(max_gbps=4.0)) is limited
    kinds = [plain, limited]
    kinds += [across(half, Terms(**terms)) for terms in (
        dict[str, Any](overlap="idle"), {"detached": True}, {"max_thread_blocks": 2},
        {"max_thread_blocks": 3},
    )]  # fmt: skip
    assert len({id(kind) for kind in kinds}) == len(kinds)


def test_what_carried_a_copy_out_is_told_after_another_engine_took_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    src, dst = views()
    index = Index([5, 0, 9], step=4)
    launch = Host(DEVICE).prepare(CopyPlan(src.form, dst.form, 4, 4))
    assert launch.carried is None
    arguments = src, dst, index, index, 12, None, None
    launch(*arguments)
    picked = launch.pick(Move(src, dst, index, index, 12))
    assert launch.carried == (picked.engine, picked.why)

    launch_by = HostLaunch.launch_by

    def full(self: HostLaunch, engine: str, *asked: Any) -> Any:
        if engine == "staged":
            raise torch.OutOfMemoryError("the device is full")
        return launch_by(self, engine, *asked)

    monkeypatch.setattr(HostLaunch, "launch_by", full)
    assert picked.engine == "staged"
    launch(*arguments)
    assert launch.carried is not None
    assert launch.carried[0] == "descriptors"
    assert "no memory left" in launch.carried[1]
    torch.accelerator.synchronize(DEVICE)
    assert torch.equal(dst.tensors[[5, 0, 9]], src.tensors.cpu()[[5, 0, 9]])
