# SPDX-License-Identifier: Apache-2.0
"""Calibration on the simulated device: real strategies, bytes and timers, and times that mean
nothing; and `portakv calibrate`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from pkgutil import resolve_name
from time import sleep
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from support.command_line import run, run_json
from support.simdev_cases import DEVICE, NAME

from portakv import CopyPlan, PortaKVError
from portakv.backends.base import Pending
from portakv.interconnect import calibration, choose
from portakv.interconnect.batched_memcpy import BatchedMemcpy
from portakv.interconnect.calibration import DELAYED, IDLE, Grid, Timed, Timer, calibrate
from portakv.interconnect.choose import Host, HostLaunch
from portakv.interconnect.costs import DIRECTIONS
from portakv.interconnect.staged import Staged
from portakv.interconnect.strategy import Strategy
from portakv.registry.registry import BUILT_IN
from portakv_conformance import simdev

pytestmark = pytest.mark.simdev

SMALL = Grid((256, 4096), (4096, 32768), most_runs=64, repeats=1, short=0, pageable=8192)
#: Seconds that a calibration may take, on a machine that does other work.
PATIENCE = 600
ONE_POINT = Grid((4096,), (4096,), repeats=3, short=0, pageable=4096)
HERE = __name__
FAKES = "support.host_choice_cases"


@pytest.fixture(autouse=True)
def _small(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Use a small grid, and check that no faults are left."""
    monkeypatch.setattr(calibration, "GRID", SMALL)
    yield
    torch.accelerator.synchronize(DEVICE)
    assert not simdev.take_faults()


def replaced(monkeypatch: pytest.MonkeyPatch, **targets: str) -> None:
    names = BUILT_IN | targets
    monkeypatch.setattr(choose, "strategy_class", lambda name: resolve_name(names[name]))


def altered(strategy: type[Strategy], launched: Callable[..., Any]) -> type[Strategy]:
    """Return a strategy that passes its launches to a function, with their arguments."""

    def prepare(self: Strategy, plan: CopyPlan) -> Any:
        return partial(launched, strategy.prepare(self, plan))

    return type("Altered", (strategy,), {"prepare": prepare})


def fail(launch: Any, *arguments: Any) -> Any:
    """Fail with many runs."""
    if arguments[4] > 16:
        raise RuntimeError("the driver failed")
    return launch(*arguments)


def be_late(launch: Any, *arguments: Any) -> Any:
    """Stay pending until the caller waits."""
    launch(*arguments)
    return SimpleNamespace(done=lambda: False, wait=waited)


waited = Mock(side_effect=lambda: torch.accelerator.synchronize(DEVICE))
Failing = altered(BatchedMemcpy, fail)
Late = altered(Staged, be_late)


def runs_of(points: Any) -> list[tuple[int, int]]:
    return [(size, point.runs) for size, column in points.items() for point in column]


def test_every_strategy_that_serves_the_device_is_measured() -> None:
    table = calibrate(DEVICE, PATIENCE)
    strategies = {strategy for strategy, _ in table.points}
    assert strategies == {"staged", "batched_memcpy", "pageable"}
    assert table.left_out == {"zero_copy": f"the CUDA driver does not serve {NAME} devices"}
    assert (table.emulated, table.whole) == (True, True)
    assert "which is emulated" in table.origin
    assert 0 < table.took < PATIENCE
    for direction in DIRECTIONS:
        for strategy in ("staged", "batched_memcpy"):
            points = table.points[strategy, direction]
            assert runs_of(points) == [(256, 16), (256, 64), (4096, 1), (4096, 8)]
        assert runs_of(table.points["pageable", direction]) == [(256, 16), (4096, 1)]
    for columns in table.points.values():
        for column in columns.values():
            assert all(point.seconds > 0 and 0 < point.host_seconds < PATIENCE for point in column)
    rows = calibration.by_point(table)
    assert list(rows)[:2] == [("d2h", 256, 16), ("d2h", 256, 64)]
    assert list(rows["h2d", 4096, 1]) == ["staged", "batched_memcpy", "pageable"]


class Pretending(Timer):
    def __init__(self, times: list[float]) -> None:
        self.name = "pretended"
        self.times = times
        self.at = 0
        self.hidden: list[float] = []

    def time(self, call: Callable[[], Pending | None], host_seconds: float = 0.0) -> Timed:
        call()
        self.at += 1
        self.hidden.append(host_seconds)
        return Timed(self.times[self.at % len(self.times)], 1e-6)


def test_the_median_of_what_the_timer_tells_is_kept() -> None:
    timer = Pretending([3.0, 1.0, 2.0])
    table = calibrate(DEVICE, PATIENCE, ONE_POINT, timer)
    assert {p.seconds for columns in table.points.values() for p in columns[4096]} == {2.0}
    assert table.timer == "pretended"
    # What `pageable` does first cannot be hidden, as it waits for the device in between.
    strategies = [strategy for strategy, direction in table.points if direction == "d2h"]
    assert strategies == ["staged", "batched_memcpy", "pageable"]
    both = 2 * ONE_POINT.repeats
    assert len(timer.hidden) == 3 * both
    assert all(0 < hidden < 1 for hidden in timer.hidden[: 2 * both])
    assert timer.hidden[2 * both :] == [0.0] * both


def test_short_copies_are_timed_more_often() -> None:
    timer = Pretending([1.0])
    grid = Grid((4096,), (4096, 8192), repeats=2, short=4096, pageable=4096)
    calibrate(DEVICE, 3600, grid, timer)
    assert (grid.times(4096), grid.times(4097)) == (2 * calibration.OFTEN, 2)
    # Three strategies, both directions; `pageable` has the shorter one alone.
    assert timer.at == 2 * (3 * grid.times(4096) + 2 * grid.times(8192))


def test_lists_are_sent_once_and_not_while_a_copy_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two lists of a point, by each of three strategies and in both directions."""
    launch_by = HostLaunch.launch_by
    met = set[tuple[Any, ...]]()

    def noted(self: HostLaunch, *arguments: Any) -> Any:
        met.add(arguments[1][2:4])
        return launch_by(self, *arguments)

    monkeypatch.setattr(HostLaunch, "launch_by", noted)
    calibrate(DEVICE, PATIENCE, ONE_POINT, Pretending([1e-5]))
    assert len(met) == 3 * 2
    assert not any(index.temporary for pair in met for index in pair)


def test_it_ends_when_its_time_is_over() -> None:
    timer = Pretending([1e-5])
    table = calibrate(DEVICE, 10, SMALL, timer, clock=count(1.0, 1.0).__next__)
    assert not table.whole
    assert timer.at == 9  # the first look at the clock is the beginning
    # The ends of the grid first, by every strategy, so that a part of it spans all.
    for strategy in ("staged", "batched_memcpy"):
        for direction in DIRECTIONS:
            assert runs_of(table.points[strategy, direction]) == [(256, 16), (256, 64)]
    assert runs_of(table.points["pageable", "d2h"]) == [(256, 16)]
    assert len(table.points) == 5


def test_a_point_that_would_take_too_long_is_left_out_and_smaller_ones_are_not() -> None:
    """A copy that took a second for 16 runs takes longer for 64."""
    table = calibrate(
        DEVICE,
        60,
        Grid((256,), (4096, 16384), repeats=9, short=0, pageable=4096),
        Pretending([5.0]),
        clock=count(0.001, 0.001).__next__,
    )
    assert not table.whole
    assert runs_of(table.points["staged", "d2h"]) == [(256, 16)]


def test_too_little_time_for_anything_is_an_error() -> None:
    with pytest.raises(PortaKVError, match=r"1 s are too few for the first point|zero_copy: "):
        calibrate(DEVICE, 1, SMALL, clock=count(2.0, 2.0).__next__)


@pytest.mark.parametrize(
    ("fake", "why"),
    [
        (f"{FAKES}:BatchedMemcpy", "its bytes were wrong"),  # it moves nothing
        (f"{HERE}:Failing", "RuntimeError at 64 runs of 256 B: the driver failed"),
    ],
)
def test_a_strategy_that_is_wrong_or_fails_is_left_out_with_all_its_points(
    fake: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    replaced(monkeypatch, batched_memcpy=fake)
    table = calibrate(DEVICE, PATIENCE)
    assert why in table.left_out["batched_memcpy"]
    assert {strategy for strategy, _ in table.points} == {"staged", "pageable"}


def test_pending_work_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = f"{FAKES}:Absent"
    replaced(monkeypatch, staged=f"{HERE}:Late", batched_memcpy=absent, pageable=absent)
    waited.reset_mock()
    calibrate(DEVICE, PATIENCE, ONE_POINT)
    assert waited.call_count == 2 * (1 + 2 + 3)  # each direction: proved, called, timed


def test_the_grid_leaves_room_between_blocks() -> None:
    work = calibration.Work(DEVICE, SMALL, Timer(DEVICE), Host(DEVICE))
    blocks = work.blocks("pinned", 4096, 8)
    assert blocks.is_pinned()
    assert (tuple(blocks.shape), blocks.stride(0)) == ((8, 1, 4096), 4096 + calibration.GAP)
    assert work.blocks("device", 256, 64).device == DEVICE


# Timers


SOME = 10  # tries, of which a machine that stands still now and then spoils not all


def test_the_timer_sees_the_work_of_the_stream() -> None:
    timer = Timer(DEVICE)
    assert timer.name == IDLE  # it has no kernel that sleeps

    def work() -> None:
        simdev.delay(torch.accelerator.current_stream(DEVICE), 30)

    taken = [timer.time(work) for _ in range(SOME)]
    assert all(0.025 < timed.seconds < 60 for timed in taken)
    assert any(timed.host_seconds < 0.025 for timed in taken)


@pytest.fixture
def delays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Give a device without it a kernel that does nothing: 1000 cycles are 1 ms. Return how long
    the delays were, in ms."""
    module = torch.get_device_module(DEVICE)
    durations = list[int]()

    def sleep(cycles: int) -> None:
        durations.append(cycles // 1000)
        simdev.delay(torch.accelerator.current_stream(DEVICE), cycles // 1000)

    monkeypatch.setattr(module, "_sleep", sleep, raising=False)
    cache = SimpleNamespace(L2_cache_size=1 << 16)
    monkeypatch.setattr(module, "get_device_properties", lambda device: cache, raising=False)
    monkeypatch.setattr(calibration, "CYCLES", 20_000)
    return durations


def test_a_delay_hides_the_host_s_work(delays: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "SEEN", 0.2)
    timer = Timer(DEVICE)
    assert timer.name == DELAYED
    delays.clear()

    def work() -> None:
        sleep(0.05)
        simdev.delay(torch.accelerator.current_stream(DEVICE), 20)

    seen = timer.time(work)  # nothing is known of it: nothing is hidden
    assert not delays
    assert seen.seconds > 0.065

    def hides() -> bool:
        delays.clear()
        hidden = timer.time(work, 0.1)
        assert hidden.seconds > 0.015
        assert hidden.host_seconds > 0.045
        return len(delays) == 1 and hidden.seconds < 0.035

    assert any(hides() for _ in range(SOME))
    delays.clear()
    timer.time(work, 30.0)  # longer than what is worth hiding
    monkeypatch.setattr(calibration, "SEEN", 0.02)
    timer.time(work, 30.0)  # most of its time, however loaded the machine is
    assert not delays
    timer.time(work, 0.03)  # the device takes longer
    assert delays


def test_a_delay_that_was_too_short_is_made_longer(delays: list[int]) -> None:
    timer = Timer(DEVICE)
    calls = list[int]()
    delays.clear()

    def late() -> None:
        calls.append(len(calls))
        sleep(0.03 if len(calls) < 3 else 0.0)

    timer.time(late, 1e-3)
    assert len(delays) >= 3
    assert len(calls) - len(delays) in (0, 1)  # of a machine that was late each time
    assert delays == sorted(delays)
    delays.clear()
    always = Mock(side_effect=lambda: sleep(0.1), return_value=None)
    timer.time(always, 1e-3)
    # The last one might have waited for a delay.
    assert always.call_count == len(delays) + 1 == calibration.TRIES + 1


# The command


def test_calibrate_and_then_explain(folder: Path) -> None:
    code, out, err = run("calibrate", "--device", str(DEVICE), "--seconds", str(PATIENCE))
    assert (code, err) == (0, "")
    (path,) = folder.iterdir()
    flat = " ".join(out.split())
    assert "The device is emulated: these times do not apply to any hardware." in flat
    assert f"stored in {path}".replace(" ", "") in out.replace("\n", "").replace(" ", "")
    assert "zero_copy was not measured: the CUDA driver does not serve" in flat
    assert out.count("h2d") == 4
    explained = run_json("explain", "--host", "--blocks", "20", "--device", str(DEVICE))
    assert explained["measured"]
    assert "which is emulated" in explained["origin"]
    assert explained["note"] == f"On {DEVICE}."
    by_name = {one["engine"]: one for one in explained["engines"]}
    assert by_name["zero_copy"]["refused"] == f"the CUDA driver does not serve {NAME} devices"
    assert by_name["staged"]["measured"]


def test_calibrate_as_json_and_no_table(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = run_json("calibrate", "--device", NAME, "--seconds", "30")
    path = Path(report.pop("file"))
    assert path.parent == folder
    assert report == json.loads(path.read_text())
    assert report["emulated"]
    assert sorted(report["engines"]) == ["batched_memcpy", "pageable", "staged"]
    assert run("calibrate", "--device", str(DEVICE), "--seconds", "1e-4")[:2] == (1, "")
    absent = f"{FAKES}:Absent"
    replaced(monkeypatch, staged=absent, batched_memcpy=f"{FAKES}:Breaking", pageable=absent)
    code, out, err = run("calibrate", "--device", str(DEVICE), "--seconds", str(PATIENCE))
    assert (code, out) == (1, "")
    assert "No strategy could be measured" in err
    assert "the compiler crashed" in err


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_measured(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.parent.write_text("a file")
    monkeypatch.setattr(calibration, "calibrate", None)
    code, out, err = run("calibrate", "--device", str(DEVICE), "--seconds", str(PATIENCE))
    assert (code, out) == (1, "")
    assert "Set PORTAKV_CACHE_DIR to a folder" in err
