# SPDX-License-Identifier: Apache-2.0
"""Small copies on the simulated device: their fallback, its order, and what it holds."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.guarded_memory import refused
from support.host_copy_cases import REPEATS, _no_faults_left, device_tensor
from support.simdev_cases import DEVICE, OTHER, current, on

from portakv import BackendUnavailable, DeviceMismatch, LayoutError, Unsupported
from portakv.host import _small_ways, small
from portakv.host.small import SmallCopy, choose, to_device
from portakv.runtime.transfer import copies_holding_memory
from portakv_conformance import simdev

pytestmark = pytest.mark.simdev

__all__ = ["_no_faults_left"]


@pytest.fixture(params=["new", "ready"])
def send(request: pytest.FixtureRequest) -> Iterator[Callable[..., torch.Tensor]]:
    """A small copy of int32 to the device, by either call."""
    if request.param == "new":
        yield lambda values, **more: to_device(values, DEVICE, torch.int32, **more)
    else:
        sender = SmallCopy(400, torch.int32, DEVICE)
        yield sender.send


def test_small_copies_fall_back(send: Callable[..., torch.Tensor]) -> None:
    assert choose(64, DEVICE) == ("copy", "the CUDA driver does not serve simdev devices")
    assert SmallCopy(3, torch.int32, DEVICE).why == choose(64, DEVICE).why
    with refused(BackendUnavailable, "does not serve", "'copy'"):
        to_device([1], DEVICE, way="value")
    for count in (*range(80), 255, 256, 400):
        landed = send(range(count))
        assert (landed.device, landed.dtype, landed.shape) == (DEVICE, torch.int32, (count,))
        assert landed.tolist() == list(range(count))


def test_values_may_change_right_after_the_call(send: Callable[..., torch.Tensor]) -> None:
    simdev.delay(current(), 1)
    values = torch.arange(200, dtype=torch.int32)
    landed = send(values)
    kept = landed.clone()
    values.zero_()
    assert kept.tolist() == list(range(200))


def test_small_copies_on_another_stream(send: Callable[..., torch.Tensor]) -> None:
    for nth in range(REPEATS):
        side = torch.Stream(DEVICE)
        simdev.delay(side, 1)
        landed = send([nth, nth + 1], stream=side)
        current().wait_stream(side)
        assert landed.tolist() == [nth, nth + 1]
    with refused(DeviceMismatch, f"{DEVICE}", f"{OTHER}"):
        send([1], stream=torch.Stream(OTHER))


@pytest.mark.parametrize("ready", [False, True])
def test_a_small_copy_comes_in_its_turn(ready: bool) -> None:
    """Behind what its stream holds, and behind who still reads the target on the current one."""
    out, side = device_tensor(2), torch.Stream(DEVICE)
    torch.accelerator.synchronize(DEVICE)
    sender = SmallCopy(2, torch.int32, out=out)

    def send(values: list[int]) -> None:
        if ready:
            sender.send(values, stream=side)
        else:
            to_device(values, out=out, stream=side)

    for nth in range(REPEATS):
        with on(side):
            simdev.delay(side, 1)
            out.fill_(-1)
        send([nth, nth])
        current().wait_stream(side)
        simdev.delay(current(), 1)
        reader = out.clone()
        send([0, 0])
        side.synchronize()
        assert out.tolist() == [0, 0]
        assert reader.tolist() == [nth, nth]


def test_a_small_copy_holds_its_values() -> None:
    torch.accelerator.synchronize(DEVICE)
    assert copies_holding_memory() == 0
    to_device([1, 2], DEVICE)
    assert copies_holding_memory() == 1
    torch.accelerator.synchronize(DEVICE)
    assert copies_holding_memory() == 0


@pytest.mark.parametrize("on_side", [False, True])
def test_many_sends_under_way_keep_their_values(on_side: bool) -> None:
    sender, side = SmallCopy(4, torch.int64, DEVICE), torch.Stream(DEVICE)
    where = side if on_side else current()
    simdev.delay(where, 1)
    results = []
    for nth in range(5 * _small_ways.MOST_SLOTS):
        landed = sender.send([nth, -nth], stream=side if on_side else None)
        with on(where):
            results.append(landed.clone())
    where.synchronize()
    assert [one.tolist() for one in results] == [[nth, -nth] for nth in range(len(results))]
    ring: Any = sender._way
    assert 1 < len(ring._slots) <= _small_ways.MOST_SLOTS


def test_one_send_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the choice of a slot and its event no other thread may choose."""
    sender, inside, most = SmallCopy(4, torch.int64, DEVICE), list[int](), list[int]()
    ring: Any = sender._way
    cross = ring._issue

    def slowly(*arguments: Any) -> None:
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.01)
        cross(*arguments)
        inside.pop()

    monkeypatch.setattr(ring, "_issue", slowly)
    threads = [threading.Thread(target=sender.send, args=([1],)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1, 1]


def test_one_sender_in_several_threads() -> None:
    sender, wrong = SmallCopy(64, torch.int32, DEVICE), list[int]()

    def work(nth: int) -> None:
        for _ in range(REPEATS):
            if len(set(sender.send([nth] * 64).tolist())) != 1:
                wrong.append(nth)

    threads = [threading.Thread(target=work, args=(nth,)) for nth in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_what_a_capture_carries_changes_with_refill(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay is played by hand: the simulated device has no graphs."""
    replay: list[Callable[[], None]] = []

    def crossing(out: torch.Tensor, slot: Any, nbytes: int, stream: Any) -> None:
        replay.append(lambda: _small_ways.by_copy(out, slot, nbytes, None))

    sender = SmallCopy(4, torch.int32, DEVICE, way="copy")
    with refused(Unsupported, "never captured"):
        sender.refill([1, 2, 3])
    ring: Any = sender._way
    with monkeypatch.context() as patched:
        patched.setattr(small, "capturing", lambda device: True)
        patched.setattr(ring, "_issue", crossing)
        landed = sender.send([1, 2, 3])
    sender.send([9, 9, 9, 9])  # an eager send takes other memory
    (play,) = replay
    play()
    assert landed.tolist() == [1, 2, 3]
    sender.refill(torch.tensor([4, 5, 6]))
    play()
    assert landed.tolist() == [4, 5, 6]
    with refused(LayoutError, "3 values", "given 2"):
        sender.refill([1, 2])
    with refused(LayoutError, "position 2"):
        sender.refill([7, 8, 2**31])
    play()
    assert landed.tolist() == [4, 5, 6]
