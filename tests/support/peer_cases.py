# SPDX-License-Identifier: Apache-2.0
"""Two devices of one type, a backend that reads a peer's rows on any of them, and copies from one
to the other whose every byte is judged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from portakv import CopyPlan, Index, KVView, copy_rows
from portakv.backends.base import PEERS, Capabilities, Launch
from portakv.backends.reference import Reference
from portakv.copy.handle import BlockTransfer
from portakv.registry.registry import REGISTRY
from support.cuda_cases import Copy
from support.each_backend import Elsewhere

Two = tuple[torch.device, torch.device]


def two_of(device: torch.device) -> Two:
    """Return a device and the next one of its type; skip a test if there is none."""
    if torch.get_device_module(device).device_count() < 2:
        pytest.skip(f"there is one {device.type} device here, and it takes two")
    return device, torch.device(device.type, 1)


def settle_both(two: Two) -> None:
    """Let everything end that was enqueued."""
    for device in two:
        torch.accelerator.synchronize(device)


def judge(copied: Copy, two: Two, **how: Any) -> BlockTransfer:
    """Carry a copy out from the first device to the second; padding and canaries are judged too."""
    made: list[BlockTransfer] = []

    def run() -> None:
        sides = [Elsewhere(device) for device in two]
        src, dst = (x.views(y)[0] for x, y in zip(sides, (copied.src, copied.dst), strict=True))
        ids = copied.src.index(), copied.dst.index()
        made.append(copy_rows(src, dst, *ids, count=copied.count, **how))
        made[0].synchronize()
        settle_both(two)
        for side in sides:
            side.bring_back()

    copied.check(run)
    return made[0]


class ReadsPeers(Reference):
    """`reference` that reads a peer's rows, through a copy of them: for devices without kernels.
    ``wrong``: it reads nothing, without an error."""

    name = "reads-peers"
    wrong = False

    def capabilities(self) -> Capabilities:
        return replace(super().capabilities(), places=super().capabilities().places | PEERS)

    def prepare(self, plan: CopyPlan) -> Launch:
        if plan.src.place != "peer":
            return super().prepare(plan)
        own = replace(plan.src, place="device")
        there = super().prepare(CopyPlan(own, plan.dst, plan.src_step, plan.dst_step, plan.unit))

        def launch(
            src: KVView,
            dst: KVView,
            src_index: Index,
            dst_index: Index,
            count: int,
            stream: torch.Stream | None,
            status: torch.Tensor | None,
        ) -> None:
            if not self.wrong:
                there(_brought(src, dst.device), dst, src_index, dst_index, count, stream, status)

        return launch


class ReadsWrong(ReadsPeers):
    """A backend that never reads its peers' bytes."""

    wrong = True


def _brought(src: KVView, device: torch.device) -> KVView:
    """Return a peer's rows, copied to the device that reads them: from allocations in a list, or
    from one."""
    moved = [x.to(device) for x in src.owners]
    return KVView(moved if src.layout.containers else moved[0], src.layout.text)


@contextmanager
def reading(cls: type[ReadsPeers]) -> Iterator[None]:
    """Make a backend the first one that is chosen on a device without kernels."""
    REGISTRY.register(cls.name, cls)
    try:
        yield
    finally:
        REGISTRY.unregister(cls.name)


def answering(why: str) -> Callable[[torch.device, torch.device], str]:
    """Return a function that gives one answer for each pair of devices; see `peers.unmapped`."""
    return lambda owner, reader: why
