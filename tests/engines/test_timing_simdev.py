# SPDX-License-Identifier: Apache-2.0
"""Timers of copies on the simulated device: what a delay hides, and what it does not."""

from __future__ import annotations

from time import sleep
from types import SimpleNamespace

import pytest
import torch
from support.simdev_cases import DEVICE

from portakv.engines import calibration as timing
from portakv.engines.calibration import SEEN, TRIES, DelayTimer, EventTimer, timer_for
from portakv_conformance import simdev

pytestmark = pytest.mark.simdev


def test_the_timer_sees_the_work_of_the_stream() -> None:
    timer = EventTimer(DEVICE)

    def work() -> None:
        simdev.delay(torch.accelerator.current_stream(DEVICE), 30)

    timed = timer.time(work)
    assert 0.025 < timed.seconds < 10
    assert timed.host_seconds < 0.025


@pytest.fixture
def delays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A kernel that does nothing, on a device that has none: 1000 cycles are 1 ms. How long the
    delays were, in ms."""
    module, asked = torch.get_device_module(DEVICE), list[int]()

    def sleep(cycles: int) -> None:
        asked.append(cycles // 1000)
        simdev.delay(torch.accelerator.current_stream(DEVICE), cycles // 1000)

    monkeypatch.setattr(module, "_sleep", sleep, raising=False)
    cache = SimpleNamespace(L2_cache_size=1 << 16)
    monkeypatch.setattr(module, "get_device_properties", lambda device: cache, raising=False)
    monkeypatch.setattr(timing, "_CYCLES", 20_000)
    return asked


def test_a_delay_hides_what_the_host_does_first(
    delays: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "SEEN", 0.2)
    timer = timer_for(DEVICE)
    assert isinstance(timer, DelayTimer)
    delays.clear()

    def work() -> None:
        sleep(0.05)
        simdev.delay(torch.accelerator.current_stream(DEVICE), 20)

    seen = timer.time(work)  # nothing is known of it: nothing is hidden
    assert not delays
    assert seen.seconds > 0.065
    hidden = timer.time(work, 0.1)
    assert len(delays) == 1
    assert 0.015 < hidden.seconds < 0.05
    assert hidden.host_seconds > 0.045
    timer.time(work, 0.3)  # longer than what is worth hiding
    assert len(delays) == 1
    monkeypatch.setattr(timing, "SEEN", 0.02)
    timer.time(work, 0.06)  # most of its 0.07 s
    assert len(delays) == 1
    timer.time(work, 0.03)  # the device takes longer
    assert len(delays) == 2


def test_a_delay_that_was_too_short_is_made_longer(delays: list[int]) -> None:
    timer, calls = DelayTimer(DEVICE), list[int]()
    delays.clear()

    def late() -> None:
        calls.append(len(calls))
        sleep(0.03 if len(calls) < 3 else 0.0)

    timer.time(late, 1e-3)
    assert len(calls) == len(delays) == 3
    assert delays == sorted(delays)
    calls.clear()

    def always() -> None:
        calls.append(len(calls))
        sleep(0.1)

    timed = timer.time(always, 1e-3)
    assert len(calls) == TRIES + 1  # the last one without a delay, which it might have waited for
    assert timed.host_seconds < 0.15


def test_a_device_without_a_delay_is_timed_as_it_is() -> None:
    timer = timer_for(DEVICE)
    assert type(timer) is EventTimer
    assert "idle" in timer.name
    assert f"{SEEN * 1e3:g} ms" in DelayTimer.name
