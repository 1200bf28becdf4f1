# SPDX-License-Identifier: Apache-2.0
"""Transfers by the engine that is picked, on the simulated device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.guarded_memory import filled
from support.simdev_cases import DEVICE, OTHER, on

from portakv import CopyPlan, Index, KVView
from portakv.backends.base import Capabilities
from portakv.engines import choose as chosen
from portakv.engines import costs as table
from portakv.engines import staging
from portakv.engines.choose import Host, HostLaunch
from portakv.engines.costs import DIRECTIONS
from portakv.engines.engine import PINNED, Engine, Terms
from portakv.plan.move import Move
from portakv.registry.registry import BUILT_IN
from portakv.runtime import kernel_cache as _kernel_cache
from portakv.runtime.bounded import Bounded
from portakv_conformance import simdev

pytestmark = pytest.mark.simdev


@pytest.fixture(autouse=True)
def no_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache directory of one's own, and no faults left behind."""
    monkeypatch.setenv(_kernel_cache.ENVIRONMENT, str(tmp_path / "cache"))
    monkeypatch.setattr(table, "_known", Bounded("tables", 4))
    yield
    for device in (DEVICE, OTHER):
        torch.accelerator.synchronize(device)
    assert not simdev.take_faults()


class ReadsIds(Engine):
    """Reads its ids on the device, late."""

    name = "direct"
    seen: list[tuple[torch.device, torch.Tensor]] = []  # noqa: RUF012

    def capabilities(self) -> Capabilities:
        return Capabilities(places=PINNED, index_dtypes=frozenset({torch.int32}))

    def prepare(self, plan: CopyPlan) -> Any:
        def launched(
            src: KVView, dst: KVView, mine: Index, theirs: Index, count: int,
            stream: torch.Stream | None, status: torch.Tensor | None,
        ) -> None:  # fmt: skip
            assert mine.ids is not None
            assert mine.ids.dtype == torch.int32
            with on(stream or torch.accelerator.current_stream(DEVICE)):
                ReadsIds.seen.append((mine.ids.device, mine.ids + 1000))

        return launched


BLOCKS, SIZE, WIDE = 40, 4, 96


def pinned_blocks() -> torch.Tensor:
    memory = torch.empty(BLOCKS, 2, 3, SIZE, WIDE, dtype=torch.int16, pin_memory=True)
    return memory.copy_(filled(memory.shape, torch.int16))


def planes() -> list[torch.Tensor]:
    return [filled((2, BLOCKS, SIZE, WIDE), torch.int16, device=DEVICE) for _ in range(3)]


def rows(layers: list[torch.Tensor], blocks: torch.Tensor) -> torch.Tensor:
    """Blocks ``[block, kv, layer, token, dim]`` of the planes, on the host."""
    stacked = torch.stack([layer.cpu() for layer in layers])
    return stacked.permute(2, 1, 0, 3, 4)[blocks]


def views(layers: list[torch.Tensor], host: torch.Tensor) -> tuple[KVView, KVView]:
    return KVView(layers, "layer | kv block token dim"), KVView(host, "block kv layer token dim")


@pytest.mark.parametrize("side", [False, True])
@pytest.mark.parametrize("pageable", [False, True])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("number", [1, 7, 30])
def test_whatever_is_picked_moves_the_right_bytes(
    direction: str, number: int, pageable: bool, side: bool
) -> None:
    layers, host = planes(), pinned_blocks()
    if pageable:
        host = host.clone()
        assert not host.is_pinned()
    device_view, host_view = views(layers, host)
    order = torch.randperm(BLOCKS, generator=torch.Generator().manual_seed(number))
    there, here = order[:number], order.flip(0)[:number]
    before = host.clone()
    stream = torch.Stream(DEVICE) if side else None
    down = direction == "d2h"
    src, dst = (device_view, host_view) if down else (host_view, device_view)
    mine, theirs = (there, here) if down else (here, there)
    launch = Host(DEVICE).prepare(CopyPlan(src.form, dst.form, SIZE, SIZE))
    if stream is not None:
        stream.wait_stream(torch.accelerator.current_stream(DEVICE))
    indices = Index(mine, SIZE), Index(theirs, SIZE)
    count = number * SIZE
    assert launch.pick(Move(src, dst, *indices, count)).engine in (
        ("ring",) if pageable else ("staged", "descriptors")
    )
    launch(src, dst, *indices, count, stream, None)
    torch.accelerator.synchronize(DEVICE)
    if down:
        before[here] = rows(layers, there)
        assert torch.equal(host, before)
    else:
        assert torch.equal(rows(layers, there), before[here])


def test_engines_agree() -> None:
    layers = planes()
    found = []
    for engine in ("staged", "descriptors"):
        host = pinned_blocks().zero_()
        src, dst = views(layers, host)
        launch = Host(DEVICE).prepare(CopyPlan(src.form, dst.form, SIZE, SIZE))
        index = Index([3, 1, 4, 15, 9], SIZE)
        launch.launch_by(engine, Move(src, dst, index, index, 5 * SIZE), None)
        torch.accelerator.synchronize(DEVICE)
        found.append(host)
    assert torch.equal(*found)
    assert found[0].any()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_device_without_room_for_staging_copies_all_the_same(
    direction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers, host = planes(), pinned_blocks()
    before, index, blocks = host.clone(), Index(range(BLOCKS), SIZE), torch.arange(BLOCKS)
    src, dst = views(layers, host) if direction == "d2h" else views(layers, host)[::-1]
    launch = Host(DEVICE).prepare(CopyPlan(src.form, dst.form, SIZE, SIZE))

    def full(self: staging.Staging, nbytes: int, mirrors: int) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(staging.Staging, "reserve", full)
    with pytest.raises(torch.OutOfMemoryError):  # by name, it is told
        launch.launch_by("staged", Move(src, dst, index, index, BLOCKS * SIZE), None)
    monkeypatch.setattr(
        launch, "pick", lambda *asked: SimpleNamespace(engine="staged", why="asked")
    )
    launch(src, dst, index, index, BLOCKS * SIZE, None, None)
    torch.accelerator.synchronize(DEVICE)
    assert torch.equal(rows(layers, blocks), host)
    assert torch.equal(host, before) == (direction == "h2d")


def kernel_launch(monkeypatch: pytest.MonkeyPatch) -> tuple[HostLaunch, KVView, KVView]:
    monkeypatch.setattr(chosen, "BUILT_IN", BUILT_IN | {"direct": f"{__name__}:ReadsIds"})
    ReadsIds.seen.clear()
    src, dst = views(planes(), pinned_blocks())
    host = Host(DEVICE, terms=Terms("idle"))
    return host.prepare(CopyPlan(src.form, dst.form, SIZE, SIZE)), src, dst


@pytest.mark.parametrize("side", [False, True])
def test_a_kernels_ids_are_on_the_device_and_live_as_long_as_it_reads_them(
    side: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch, src, dst = kernel_launch(monkeypatch)
    stream = torch.Stream(DEVICE) if side else None
    for first in range(5):
        mine = Index([first, first + 7], SIZE)
        launch.launch_by("direct", Move(src, dst, mine, Index([8, 2], SIZE), 2 * SIZE), stream)
        del mine
        # Whoever is given the memory of ids that were freed too early writes into it.
        torch.zeros(2, dtype=torch.int32, device=DEVICE)
    torch.accelerator.synchronize(DEVICE)
    assert [device for device, _ in ReadsIds.seen] == [DEVICE] * 5
    assert [read.tolist() for _, read in ReadsIds.seen] == [
        [1000 + first, 1007 + first] for first in range(5)
    ]


def test_ids_that_are_kept_serve_every_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    launch, src, dst = kernel_launch(monkeypatch)
    mine, theirs = Index([5, 6], SIZE), Index([8, 2], SIZE)
    streams = [None, torch.Stream(DEVICE), torch.Stream(DEVICE)]
    for stream in streams:
        launch.launch_by("direct", Move(src, dst, mine, theirs, 2 * SIZE), stream)
    del mine, theirs
    for _ in range(4):
        torch.zeros(2, dtype=torch.int32, device=DEVICE)
    torch.accelerator.synchronize(DEVICE)
    assert [read.tolist() for _, read in ReadsIds.seen] == [[1005, 1006]] * 3


def test_ids_on_the_device_are_brought_into_their_dtype_in_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launch, src, dst = kernel_launch(monkeypatch)
    ids = torch.tensor([5, 6], device=DEVICE)
    stream = torch.Stream(DEVICE)
    stream.wait_stream(torch.accelerator.current_stream(DEVICE))
    launch.launch_by("direct", Move(src, dst, Index(ids, SIZE), Index(ids, SIZE), 2 * SIZE), stream)
    stream.synchronize()
    ((_, read),) = ReadsIds.seen
    with on(stream):
        assert read.tolist() == [1005, 1006]
