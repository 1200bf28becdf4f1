# SPDX-License-Identifier: Apache-2.0
"""Transfers by the engine that is picked, on devices: every byte, ids where a kernel reads them, a
device without room; which engine there is for which terms, and what is told of it."""

from __future__ import annotations

import gc
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.device_cases import on
from support.guarded_memory import filled
from support.simdev_cases import DEVICE

from portakv import CopyPlan, Index, KVView, copy_blocks
from portakv.backends.base import Capabilities
from portakv.engines import choose as chosen
from portakv.engines import costs, staging
from portakv.engines.choose import ORDER, Host, across
from portakv.engines.costs import DIRECTIONS
from portakv.engines.engine import PINNED, Engine, Terms
from portakv.plan.plan import Move
from portakv.registry.registry import BUILT_IN, choose
from portakv.runtime.bounded import Bounded

SIZE, ALL = 4, 200


@pytest.fixture(autouse=True)
def no_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No device was measured."""
    monkeypatch.setattr(costs, "path_for", lambda device: tmp_path / "table.json")
    monkeypatch.setattr(costs, "_known", Bounded("tables", 4))


class Scene:
    """Planes on a device and blocks on the host, ``number`` of which are moved."""

    def __init__(
        self, device: torch.device, direction: str, number: int = 5, pinned: bool = True
    ) -> None:
        blocks, wide = (ALL, 2048) if device.type == "cuda" else (40, 96)
        number = min(number, blocks)
        planes = (2, blocks, SIZE, wide)
        self.layers = [filled(planes, torch.int16, device=device) for _ in range(3)]
        memory = torch.empty((blocks, 2, 3, SIZE, wide), dtype=torch.int16, pin_memory=pinned)
        self.host = memory.copy_(filled(tuple(memory.shape), torch.int16))
        self.before, self.down = self.host.clone(), direction == "d2h"
        order = torch.randperm(blocks, generator=torch.Generator().manual_seed(number))
        self.there, self.here = order[:number], order.flip(0)[:number]
        sides = [(KVView(self.layers, "layer | kv block token dim"), self.there),
                 (KVView(self.host, "block kv layer token dim"), self.here)]  # fmt: skip
        (src, mine), (dst, theirs) = sides if self.down else sides[::-1]
        self.move = Move(src, dst, Index(mine, SIZE), Index(theirs, SIZE), number * SIZE)
        self.plan = CopyPlan(src.form, dst.form, SIZE, SIZE)
        torch.accelerator.synchronize(device)

    def judge(self) -> None:
        torch.accelerator.synchronize(self.layers[0].device)
        stacked = torch.stack([layer.cpu() for layer in self.layers])
        rows = stacked.permute(2, 1, 0, 3, 4)[self.there]
        if self.down:
            self.before[self.here] = rows
            assert torch.equal(self.host, self.before)
        else:
            assert torch.equal(rows, self.before[self.here])


@pytest.mark.parametrize("side", [False, True])
@pytest.mark.parametrize("how", ["compute", "idle", "pageable", "staged", "descriptors", "direct"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("number", [1, 7, 150])
def test_whatever_carries_it_out_moves_the_right_bytes(
    accelerator: torch.device, direction: str, how: str, number: int, side: bool
) -> None:
    """What is picked under either policy and for pageable memory, and each engine by its name."""
    scene = Scene(accelerator, direction, number, how != "pageable")
    stream = torch.Stream(accelerator) if side else None
    terms = Terms("idle" if how == "idle" else "compute")
    launch = Host(accelerator, terms=terms).prepare(scene.plan)
    assert (launch.pick(scene.move).engine == "ring") == (how == "pageable")
    if how in launch.out:
        pytest.skip(launch.out[how])
    if how in ORDER:
        launch.launch_by(how, scene.move, stream)
    else:
        launch(*scene.move, stream, None)
    scene.judge()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_device_without_room_for_staging_copies_all_the_same(
    accelerator: torch.device, direction: str, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """By another engine, of which the launch tells, and the log once."""
    caplog.set_level(logging.INFO, "portakv.engines")
    scene = Scene(accelerator, direction, ALL)
    launch = Host(accelerator).prepare(scene.plan)
    assert launch.carried is None
    launch(*scene.move, None, None)
    picked = launch.pick(scene.move)
    assert launch.carried == (picked.engine, picked.why)

    def full(self: staging.Staging, nbytes: int, buffers: int) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(staging.Staging, "reserve", full)
    with pytest.raises(torch.OutOfMemoryError):  # by name, it is told
        launch.launch_by("staged", scene.move, None)
    only = SimpleNamespace(engine="staged", why="asked")
    monkeypatch.setattr(launch, "pick", lambda move: only)
    scene = Scene(accelerator, direction, ALL)
    for _ in range(2):
        launch(*scene.move, None, None)
        assert launch.carried is not None
        assert launch.carried[0] == "descriptors"
        assert "no memory left" in launch.carried[1]
    scene.judge()
    told = [record.getMessage().partition(", ")[0] for record in caplog.records]
    assert told == list(
        dict.fromkeys(f"{accelerator}: engine {name}" for name in (picked.engine, "descriptors"))
    )


class ReadsIds(Engine):
    """Reads its ids on the device, late."""

    name = "direct"
    seen: list[tuple[torch.device, torch.Tensor]] = []  # noqa: RUF012

    def capabilities(self) -> Capabilities:
        return Capabilities(places=PINNED, index_dtypes=frozenset({torch.int32}))

    def prepare(self, plan: CopyPlan) -> Any:
        def launched(src: KVView, dst: KVView, mine: Index, *rest: Any) -> None:
            assert mine.ids is not None
            assert mine.ids.dtype == torch.int32
            with on(rest[2] or torch.accelerator.current_stream(mine.ids.device.index)):
                ReadsIds.seen.append((mine.ids.device, mine.ids + 1000))

        return launched


class Kernel:
    """A launch with an engine that reads ids."""

    def __init__(self, device: torch.device) -> None:
        self.device, scene = device, Scene(device, "d2h")
        self._move = scene.move._replace(count=2 * SIZE)
        self._launch = Host(device, terms=Terms("idle")).prepare(scene.plan)

    def run(self, mine: Index, theirs: Index, stream: torch.Stream | None) -> None:
        move = self._move._replace(src_index=mine, dst_index=theirs)
        self._launch.launch_by("direct", move, stream)

    def read(self) -> list[list[int]]:
        """What the kernels read, once whatever is given memory of ids that were freed too early has
        written into it."""
        for _ in range(4):
            torch.zeros(2, dtype=torch.int32, device=self.device)
        torch.accelerator.synchronize(self.device)
        assert {device for device, _ in ReadsIds.seen} == {self.device}
        return [ids.tolist() for _, ids in ReadsIds.seen]


@pytest.fixture
def kernel(accelerator: torch.device, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(chosen, "BUILT_IN", BUILT_IN | {"direct": f"{__name__}:ReadsIds"})
    ReadsIds.seen.clear()
    return Kernel(accelerator)


@pytest.mark.parametrize("side", [False, True])
def test_a_kernels_ids_live_as_long_as_it_reads_them(kernel: Kernel, side: bool) -> None:
    stream = torch.Stream(kernel.device) if side else None
    for first in range(5):
        kernel.run(Index([first, first + 7], SIZE), Index([8, 2], SIZE), stream)
        torch.zeros(2, dtype=torch.int32, device=kernel.device)
    assert kernel.read() == [[1000 + first, 1007 + first] for first in range(5)]


def test_ids_that_are_kept_serve_every_stream(kernel: Kernel) -> None:
    mine, theirs = Index([5, 6], SIZE), Index([8, 2], SIZE)
    for stream in (None, torch.Stream(kernel.device), torch.Stream(kernel.device)):
        kernel.run(mine, theirs, stream)
    del mine, theirs
    assert kernel.read() == [[1005, 1006]] * 3


def test_ids_on_the_device_are_brought_into_their_dtype_in_time(kernel: Kernel) -> None:
    ids, stream = torch.tensor([5, 6], device=kernel.device), torch.Stream(kernel.device)
    stream.wait_stream(torch.accelerator.current_stream(kernel.device.index))
    kernel.run(Index(ids, SIZE), Index(ids, SIZE), stream)
    assert kernel.read() == [[1005, 1006]]


# Engines for terms


def engines() -> int:
    """Engines that are held by anything."""
    gc.collect()
    return sum(issubclass(type(each), Engine) for each in gc.get_objects())


@pytest.mark.simdev
@pytest.mark.parametrize("named", [{}, {"backend": "staged"}], ids=["picked", "staged"])
def test_thirty_rates_leave_no_thirty_engines(named: dict[str, str]) -> None:
    scene, blocks = Scene(DEVICE, "d2h"), [3, 1, 2]
    src, dst = scene.move[:2]
    copy_blocks(src, dst, blocks, blocks, max_gbps=9.0, **named).synchronize()  # type: ignore[arg-type]
    before, kinds = engines(), len(chosen._made)
    for nth in range(30):
        asked: dict[str, Any] = {"max_gbps": 10 + nth / 7, **named}
        copy_blocks(src, dst, blocks, blocks, **asked).synchronize()
    assert engines() == before
    assert len(chosen._made) == kinds


@pytest.mark.simdev
def test_an_engine_is_another_one_by_what_makes_it_different() -> None:
    half = choose(DEVICE)
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
