# SPDX-License-Identifier: Apache-2.0
"""Mirrors lie as the host's rows do, or layer by layer where a device's backend takes no other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.engine_cases import leaves
from support.simdev_cases import DEVICE
from support.staging_cases import FIRST, TOKENS, moved, sides

from portakv import CopyPlan, Index, Unsupported
from portakv.backends.base import Decision
from portakv.backends.reference import Reference
from portakv.engines.staged import Staged
from portakv.engines.staging import dense_rows
from portakv.registry.registry import Choice
from portakv_conformance import simdev

pytestmark = pytest.mark.simdev


class OnlyByLayer(Reference):
    """Takes a mirror whose form is one of those that lie layer by layer."""

    takes: set[Any] = set()  # noqa: RUF012
    refused = 0

    def check(self, plan: CopyPlan) -> Decision:
        if {plan.src, plan.dst} & self.takes:
            return super().check(plan)
        OnlyByLayer.refused += 1
        return Decision(self.name, False, "it knows rows that lie layer by layer")


@pytest.mark.parametrize("downward", [True, False], ids=["d2h", "h2d"])
def test_a_backend_that_refuses_the_hosts_order_gets_the_other(downward: bool) -> None:
    rows, host = sides()
    backend = OnlyByLayer(DEVICE)
    half = Choice(backend, (Decision(backend.name, True, "chosen"),), True, backend.capabilities())
    src, dst = (rows, host) if downward else (host, rows)
    plan = CopyPlan(src.form, dst.form, int(downward), int(not downward))
    OnlyByLayer.takes, OnlyByLayer.refused = set(), 0
    with pytest.raises(Unsupported):
        Staged(DEVICE, half).prepare(plan)
    assert OnlyByLayer.refused == 2  # both were tried

    mirror = dense_rows(host.form, True)
    held = {TOKENS, *(1 << n for n in range(12))}
    room = torch.empty(mirror.nbytes(max(held)), dtype=torch.uint8, device=DEVICE)
    OnlyByLayer.takes = {mirror.view(room, each).form for each in held}
    launch = Staged(DEVICE, half).prepare(plan)
    ids = Index(torch.arange(FIRST, FIRST + TOKENS))
    indices = (ids, Index()) if downward else (Index(), ids)
    launch(src, dst, *indices, TOKENS, None, None)
    torch.accelerator.synchronize(DEVICE)
    (chunk,) = leaves(host.tensors)
    assert torch.equal(moved(rows), chunk)
    assert not simdev.take_faults()
