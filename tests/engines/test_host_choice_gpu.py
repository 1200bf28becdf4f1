# SPDX-License-Identifier: Apache-2.0
"""The choice among engines on a CUDA device: measured within its time, and right whatever goes."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from time import perf_counter, sleep

import pytest
import torch
from support.guarded_memory import filled

from portakv import CopyPlan, Index, KVView
from portakv.engines import costs as table
from portakv.engines.calibration import SECONDS, DelayTimer, by_point, calibrate, timer_for
from portakv.engines.choose import ORDER, Host
from portakv.engines.costs import DIRECTIONS, Table, costs_of, store
from portakv.engines.engine import Terms
from portakv.host import pinned
from portakv.plan.move import Move
from portakv.runtime import cuda as _cuda_driver
from portakv.runtime import kernel_cache as _kernel_cache
from portakv.runtime.bounded import Bounded

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda", 0)
BLOCKS, SIZE, WIDE = 200, 16, 512


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where tables go; kernels stay where they are kept."""
    why = _cuda_driver.why_not(DEVICE)
    if why is not None:
        pytest.skip(why)
    found = tmp_path / "tables"
    monkeypatch.setattr(table, "path_for", lambda device: found / "table.json")
    monkeypatch.setattr(table, "_known", Bounded("tables", 4))
    return found


@cache
def measured() -> tuple[Table, float]:
    began = perf_counter()
    found = calibrate(DEVICE)
    return found, perf_counter() - began


def test_every_engine_is_measured_in_time() -> None:
    found, took = measured()
    assert took < SECONDS + 2  # with what is prepared before the clock can be looked at
    assert not found.left_out
    assert not found.emulated
    assert set(found.points) == {(name, way) for name in ORDER for way in DIRECTIONS}
    assert found.device["model"]
    assert found.device["driver"]
    assert found.timer == DelayTimer.name


def test_what_the_host_does_first_is_hidden() -> None:
    source, target = torch.zeros(8 << 20, device=DEVICE), pinned.empty((8 << 20,), torch.float32)
    timer = timer_for(DEVICE)

    def late() -> None:
        sleep(1e-3)
        target.copy_(source, non_blocking=True)  # 32 MiB: 0.6 ms on a fast link

    seen, hidden = timer.time(late), timer.time(late, 1e-3)
    assert seen.host_seconds > 1e-3
    assert hidden.host_seconds > 1e-3
    assert 1e-4 < hidden.seconds < seen.seconds - 0.8e-3


def test_rates_are_those_of_a_link() -> None:
    found, _ = measured()
    for (_, size, runs), engines in by_point(found).items():
        for point in engines.values():
            assert 0 < size * runs / point.seconds < 1e12
    for way in DIRECTIONS:
        longest = found.points["staged", way][2 << 20][-1]
        assert longest.runs * (2 << 20) / longest.seconds > 5e9


def test_the_table_is_kept_and_decides(folder: Path) -> None:
    store(measured()[0])
    costs = costs_of(DEVICE)
    assert costs.measured
    for way in DIRECTIONS:
        for engine in ORDER:
            assert costs.seconds(engine, way, 32 << 10, 1000)


def sides(place: str) -> tuple[KVView, KVView, list[torch.Tensor], torch.Tensor]:
    layers = [filled((2, BLOCKS, SIZE, WIDE), torch.float16, device=DEVICE) for _ in range(4)]
    shape = (BLOCKS, 4, 2, SIZE, WIDE)
    host = pinned.empty(shape, torch.float16) if place == "pinned" else torch.empty(shape).half()
    host.copy_(filled(shape, torch.float16))
    return (
        KVView(layers, "layer | kv block token dim"),
        KVView(host, "block layer kv token dim"),
        layers,
        host,
    )


@pytest.mark.parametrize("side", [False, True])
@pytest.mark.parametrize("number", [1, 3, 150])
@pytest.mark.parametrize("how", ["compute", "idle", "pageable", "staged", "descriptors", "direct"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_whatever_carries_it_out_moves_the_right_bytes(
    direction: str, how: str, number: int, side: bool
) -> None:
    """What is picked under either policy and for pageable memory, and each engine by its name."""
    device_view, host_view, layers, host = sides("pageable" if how == "pageable" else "pinned")
    order = torch.randperm(BLOCKS, generator=torch.Generator().manual_seed(number))
    there, here = order[:number], order.flip(0)[:number]
    down = direction == "d2h"
    src, dst = (device_view, host_view) if down else (host_view, device_view)
    mine, theirs = (Index(ids, SIZE) for ids in ((there, here) if down else (here, there)))
    terms = Terms("idle" if how == "idle" else "compute")
    launch = Host(DEVICE, terms=terms).prepare(CopyPlan(src.form, dst.form, SIZE, SIZE))
    count = number * SIZE
    picked = launch.pick(Move(src, dst, mine, theirs, count)).engine
    assert (picked == "ring") == (how == "pageable")
    before = host.clone()
    stream = torch.cuda.Stream(DEVICE) if side else None
    torch.accelerator.synchronize(DEVICE)
    if how in ORDER:
        launch.launch_by(how, Move(src, dst, mine, theirs, count), stream)
    else:
        launch(src, dst, mine, theirs, count, stream, None)
    torch.accelerator.synchronize(DEVICE)
    rows = torch.stack([layer.cpu() for layer in layers]).permute(2, 0, 1, 3, 4)[there]
    if down:
        before[here] = rows
        assert torch.equal(host.view(torch.int16), before.view(torch.int16))
    else:
        assert torch.equal(rows.view(torch.int16), before[here].view(torch.int16))


def test_the_folder_of_kernels_is_not_touched(folder: Path) -> None:
    store(measured()[0])
    assert folder != _kernel_cache.directory()
    assert [entry.name for entry in folder.iterdir()] == ["table.json"]
