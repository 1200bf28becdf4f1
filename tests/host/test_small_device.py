# SPDX-License-Identifier: Apache-2.0
"""Small copies to a device at work: order, values that change, graphs, and a large copy in flight.

The simulated device has no commands that take values; both methods of a CUDA device are tested.
"""

from __future__ import annotations

import gc
import platform
import time

import numpy as np
import pytest
import torch
from support.device_cases import DEVICE, current, delay, on, settle
from support.guarded_memory import refused
from support.simdev_cases import DEVICE as SIMDEV
from support.simdev_cases import OTHER
from support.small_cases import DEVICES, Place, drawn, same_bits

from portakv import DeviceMismatch, Unsupported
from portakv.host.small import COMMAND_BYTES, MOST_INLINE, inline_copy, to_device
from portakv.runtime.transfer import copies_holding_memory

each_method = pytest.mark.parametrize("place", DEVICES, indirect=True)


@pytest.fixture
def side(place: Place) -> torch.Stream:
    return torch.Stream(place.device)


@pytest.mark.simdev
def test_a_device_that_is_not_current_or_named_without_a_number() -> None:
    out = torch.zeros(16, dtype=torch.int32, device=OTHER)
    delay(current(OTHER))
    landed = [to_device([nth] * 16, out=out).clone() for nth in range(80)]
    assert [one.tolist() for one in landed] == [[nth] * 16 for nth in range(len(landed))]
    for device in (SIMDEV, OTHER):
        with torch.get_device_module(device).device(device):
            assert to_device([1], device.type).device == device
        settle(device)


@pytest.mark.gpu
@pytest.mark.skipif(platform.machine() != "x86_64", reason="its pages may be the device's too")
def test_the_driver_takes_values_along() -> None:
    assert inline_copy(DEVICE) is not None


@each_method
@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("count", [1, 64, COMMAND_BYTES // 8])
def test_values_may_change_right_after_the_call(
    place: Place, count: int, pinned: bool, side: torch.Stream
) -> None:
    """It is ordered after the work of the stream, and the host does not wait."""
    out = torch.zeros(count, dtype=torch.int64, device=place.device)
    for slow in (False, True):  # the first time everything is loaded and allocated
        values = torch.arange(1, count + 1)
        values = values.pin_memory() if pinned else values
        settle(place.device)
        with on(side):
            if slow:
                delay(side)
            out.fill_(-1)
            to_device(values, out=out)
            values.zero_()
            landed = out.clone()
            assert not (slow and side.query())
        side.synchronize()
        assert copies_holding_memory() == 0
        assert landed.tolist() == list(range(1, count + 1))


@each_method
def test_a_stream_that_is_passed_comes_in_its_turn(place: Place, side: torch.Stream) -> None:
    """It follows the stream's work, and reads of the target on the current stream."""
    device = place.device
    out = torch.zeros(2, dtype=torch.int32, device=device)
    to_device([0, 0], out=out)
    for nth in range(20 if device.type != "cuda" else 2):
        settle(device)
        with on(side):
            delay(side)
            out.fill_(-1)
        to_device([nth, nth + 1], out=out, stream=side)
        current(device).wait_stream(side)
        delay(current(device))
        reader = out.clone()
        to_device([0, 0], out=out, stream=side)
        side.synchronize()
        assert out.tolist() == [0, 0]
        assert reader.tolist() == [nth, nth + 1]
    if torch.get_device_module(device).device_count() > 1:
        other = torch.device(device.type, 1)
        with refused(DeviceMismatch, str(device), str(other), watch=out):
            to_device([1, 1], out=out, stream=torch.Stream(other))


@each_method
@pytest.mark.parametrize("on_side", [False, True])
def test_many_sends_under_way(place: Place, on_side: bool, side: torch.Stream) -> None:
    """Copies in commands share one memory of the host, which has other values by then."""
    out = torch.zeros(16, dtype=torch.int32, device=place.device)
    where = side if on_side else current(place.device)
    to_device([0] * 16, out=out)
    settle(place.device)
    delay(where)
    results = []
    for nth in range(80):
        landed = to_device([nth] * 16, out=out, stream=side if on_side else None)
        with on(where):
            results.append(landed.clone())
    where.synchronize()
    assert [one.tolist() for one in results] == [[nth] * 16 for nth in range(len(results))]


@each_method
def test_values_are_kept_until_they_were_read(place: Place, side: torch.Stream) -> None:
    wanted = drawn(500, torch.int64)
    landed = [torch.empty_like(wanted, device=place.device) for _ in range(4)]
    for slow in (False, True):  # the first time everything is loaded and allocated
        settle(place.device)
        with on(side):
            if slow:
                delay(side)
            for nth, out in enumerate(landed):
                to_device(wanted + nth, out=out.zero_())
            assert not (slow and side.query())
            if slow:
                assert copies_holding_memory() == (4 if place.method == "pinned" else 0)
            gc.collect()
            rubbish = [torch.zeros(500, dtype=torch.int64, pin_memory=True) for _ in range(32)]
        settle(place.device)
        assert all(same_bits(one, wanted + nth) for nth, one in enumerate(landed))
        assert len(rubbish) == 32
        assert copies_holding_memory() == 0


@pytest.mark.gpu
def test_what_is_not_captured() -> None:
    gc.collect()  # a graph of an earlier test that is freed during this capture would end it
    out = torch.zeros(5, dtype=torch.int32, device=DEVICE)
    side = torch.cuda.Stream(DEVICE)
    to_device([0] * 5, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for stream in (None, side):  # which is not drawn into the capture either
            with refused(Unsupported, "before the capture"):
                to_device([1, 2, 3, 4, 5], out=out, stream=stream)
        out.add_(1)
    graph.replay()
    torch.cuda.synchronize()
    assert out.tolist() == [1] * 5
    assert to_device([1, 2, 3, 4, 5], out=out).tolist() == [1, 2, 3, 4, 5]


@pytest.mark.gpu
@pytest.mark.parametrize("nbytes", [512, COMMAND_BYTES, MOST_INLINE])
def test_while_a_large_copy_is_in_flight(nbytes: int) -> None:
    """It lands before that ends, of which the driver does not promise it, nor that other processes
    leave the device in time: most of five."""
    if inline_copy(DEVICE) is None:
        pytest.skip("this device takes no values along with a command")
    count = nbytes // 8
    host = torch.zeros(1 << 30, dtype=torch.uint8).pin_memory()
    large = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
    out = torch.zeros(count, dtype=torch.int64, device=DEVICE)
    side = torch.cuda.Stream(DEVICE)
    other = torch.cuda.Stream(DEVICE)
    ended = torch.cuda.Event()
    overtook = 0
    for nth in range(6):
        values = np.arange(nth, nth + count)
        torch.cuda.synchronize()
        if nth:  # the first time everything is loaded
            with torch.cuda.stream(other):
                large.copy_(host, non_blocking=True)
                ended.record()
            time.sleep(1e-3)  # so that it has surely begun
        with torch.cuda.stream(side):
            to_device(values, out=out)
        side.synchronize()
        overtook += bool(nth) and not ended.query()
        assert out.tolist() == values.tolist()
    assert overtook >= 3
