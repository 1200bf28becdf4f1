# SPDX-License-Identifier: Apache-2.0
"""Small copies to a device at work: order, values that change, graphs, and a large copy in flight.

The simulated device has the method ``copy``; each method of a CUDA device is requested by its name.
"""

from __future__ import annotations

import gc
import platform
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from support.device_cases import DEVICE, current, delay, on, settle
from support.guarded_memory import refused
from support.simdev_cases import DEVICE as SIMDEV
from support.simdev_cases import OTHER
from support.small_cases import METHODS, Place, drawn, same_bits, small_copy

from portakv import BackendUnavailable, DeviceMismatch, LayoutError, Unsupported
from portakv.host import small
from portakv.host.small import SmallCopy, choose, to_device
from portakv.runtime.transfer import copies_holding_memory

INLINE = 65536  # bytes
each_method = pytest.mark.parametrize("place", METHODS, indirect=True)


@pytest.fixture
def side(place: Place) -> torch.Stream:
    return torch.Stream(place.device)


@pytest.mark.simdev
def test_the_simulated_device_has_one_way() -> None:
    name = torch.zeros(0, device=SIMDEV).device.type
    assert choose(64, SIMDEV) == ("copy", f"the CUDA driver does not serve {name} devices")
    assert SmallCopy(3, torch.int32, SIMDEV).why == choose(64, SIMDEV).why
    with refused(BackendUnavailable, "does not serve", "'copy'"):
        to_device([1], SIMDEV, method="value")


@pytest.mark.simdev
def test_a_device_that_is_not_current_or_named_without_a_number() -> None:
    sender = SmallCopy(16, torch.int32, OTHER)
    delay(current(OTHER))
    landed = [sender.send([nth] * 16).clone() for nth in range(5 * small.MOST_SLOTS)]
    assert [one.tolist() for one in landed] == [[nth] * 16 for nth in range(len(landed))]
    for device in (SIMDEV, OTHER):
        with torch.get_device_module(device).device(device):
            assert to_device([1], device.type).device == device
        settle(device)


@pytest.mark.gpu
@pytest.mark.skipif(platform.machine() != "x86_64", reason="its pages may be the device's too")
def test_the_best_way() -> None:
    assert [choose(n, DEVICE).method for n in (0, INLINE)] == ["inline", "inline"]
    assert SmallCopy(64, torch.int64, DEVICE).method == "inline"
    longer = choose(INLINE + 1, DEVICE)
    assert longer.method in ("mapped", "copy")
    assert str(INLINE) in longer.why


@each_method
@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("count", [1, 64, INLINE // 8])
def test_values_may_change_right_after_the_call(
    place: Place, send: Callable[..., torch.Tensor], count: int, pinned: bool, side: torch.Stream
) -> None:
    """It is ordered after the work of the stream, and the host does not wait."""
    if count * 8 > place.most:
        pytest.skip("fewer bytes go that way")
    out = torch.zeros(count, dtype=torch.int64, device=place.device)
    for slow in (False, True):  # the first time everything is loaded and allocated
        values = torch.arange(1, count + 1)
        values = values.pin_memory() if pinned else values
        settle(place.device)
        with on(side):
            if slow:
                delay(side)
            out.fill_(-1)
            send(values, out)
            values.zero_()
            landed = out.clone()
            assert not (slow and side.query())
        side.synchronize()
        assert copies_holding_memory() == 0
        assert landed.tolist() == list(range(1, count + 1))


@each_method
def test_a_stream_that_is_passed_comes_in_its_turn(
    place: Place, send: Callable[..., torch.Tensor], side: torch.Stream
) -> None:
    """It follows the stream's work, and reads of the target on the current stream."""
    device = place.device
    out = torch.zeros(2, dtype=torch.int32, device=device)
    send([0, 0], out)
    for nth in range(20 if device.type != "cuda" else 2):
        settle(device)
        with on(side):
            delay(side)
            out.fill_(-1)
        send([nth, nth + 1], out, stream=side)
        current(device).wait_stream(side)
        delay(current(device))
        reader = out.clone()
        send([0, 0], out, stream=side)
        side.synchronize()
        assert out.tolist() == [0, 0]
        assert reader.tolist() == [nth, nth + 1]
    if torch.get_device_module(device).device_count() > 1:
        other = torch.device(device.type, 1)
        with refused(DeviceMismatch, str(device), str(other), watch=out):
            send([1, 1], out, stream=torch.Stream(other))


@each_method
@pytest.mark.parametrize("on_side", [False, True])
def test_many_sends_under_way(place: Place, on_side: bool, side: torch.Stream) -> None:
    """Copies by ``inline`` share one memory of the host, which has other values by then."""
    out = torch.zeros(16, dtype=torch.int32, device=place.device)
    where = side if on_side else current(place.device)
    for call in ("new", "ready"):
        send = small_copy(call, place.method)
        send([0] * 16, out)
        settle(place.device)
        delay(where)
        results = []
        for nth in range(5 * small.MOST_SLOTS):
            landed = send([nth] * 16, out, stream=side if on_side else None)
            with on(where):
                results.append(landed.clone())
        where.synchronize()
        assert [one.tolist() for one in results] == [[nth] * 16 for nth in range(len(results))]


@each_method
@pytest.mark.parametrize("call", ["new", "ready"])
def test_values_are_kept_until_they_were_read(place: Place, call: str, side: torch.Stream) -> None:
    """Though the sender is dropped."""
    wanted = drawn(500, torch.int64)
    landed = [torch.empty_like(wanted, device=place.device) for _ in range(4)]
    for slow in (False, True):  # the first time everything is loaded and allocated
        settle(place.device)
        with on(side):
            if slow:
                delay(side)
            for nth, out in enumerate(landed):
                small_copy(call, place.method)(wanted + nth, out.zero_())
            assert not (slow and side.query())
            if slow:
                # torch's allocator knows of a copy from a separate slot.
                retained = (
                    4 if place.method == "mapped" or (place.method, call) == ("copy", "new") else 0
                )
                assert copies_holding_memory() == retained
            gc.collect()
            rubbish = [torch.zeros(500, dtype=torch.int64, pin_memory=True) for _ in range(32)]
        settle(place.device)
        assert all(same_bits(one, wanted + nth) for nth, one in enumerate(landed))
        assert len(rubbish) == 32
        assert copies_holding_memory() == 0


@pytest.mark.simdev
def test_what_a_capture_carries_changes_with_refill(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay is played by hand: the simulated device has no graphs."""
    replay: list[Callable[[], None]] = []

    by_copy = small.by_copy

    def crossing(out: torch.Tensor, slot: Any, nbytes: int, stream: Any) -> None:
        replay.append(partial(by_copy, out, slot, nbytes, None))

    monkeypatch.setattr(small, "by_copy", crossing)
    sender = SmallCopy(4, torch.int32, SIMDEV, method="copy")
    with refused(Unsupported, "never captured"):
        sender.refill([1, 2, 3])
    with monkeypatch.context() as patched:
        patched.setattr(small, "capturing", lambda device: True)
        landed = sender.send([1, 2, 3])
    sender.send([9, 9, 9, 9])  # an eager send takes other memory
    play = replay[0]
    play()
    assert landed.tolist() == [1, 2, 3]
    sender.refill(torch.tensor([4, 5, 6]))
    play()
    assert landed.tolist() == [4, 5, 6]
    with refused(LayoutError, "3 values", "got 2"):
        sender.refill([1, 2])
    with refused(LayoutError, "position 2"):
        sender.refill([7, 8, 2**31])
    play()
    assert landed.tolist() == [4, 5, 6]


def skip_without(method: str) -> None:
    """Skip the test if the CUDA device does not have a method."""
    try:
        choose(8, DEVICE, method)
    except BackendUnavailable as error:
        pytest.skip(str(error))


@pytest.mark.gpu
def test_a_graph_keeps_what_was_sent_by_value() -> None:
    skip_without("value")
    sender = SmallCopy(72, torch.int32, DEVICE, method="value")
    out = torch.zeros(72, dtype=torch.int32, device=DEVICE)
    to_device(range(72), out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first = sender.send(range(72)).clone()
        second = sender.send(range(100, 172)).clone()
        to_device(range(72), out=out, method="value")
    out.zero_()
    sender.send([0] * 72)
    graph.replay()
    torch.cuda.synchronize()
    assert first.tolist() == out.tolist() == list(range(72))
    assert second.tolist() == list(range(100, 172))
    with refused(Unsupported, "method='mapped'"):
        sender.refill([1])


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["mapped", "copy"])
@pytest.mark.parametrize("count", [1, 16, 64, 72, 20_000])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64], ids=str)
def test_a_graph_reads_what_was_refilled(method: str, count: int, dtype: torch.dtype) -> None:
    skip_without(method)
    sender = SmallCopy(count, dtype, DEVICE, method=method)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        landed = sender.send(drawn(count, dtype)).clone()
    graph.replay()
    torch.cuda.synchronize()
    assert same_bits(landed, drawn(count, dtype))
    for nth in range(5):
        values = drawn(count + nth, dtype)[:count].contiguous()
        sender.refill(values)
        sender.send(values.flip(0).contiguous())  # takes other memory
        graph.replay()
        torch.cuda.synchronize()
        assert same_bits(landed, values)


@pytest.mark.gpu
def test_what_is_not_captured() -> None:
    gc.collect()  # a graph of an earlier test that is freed during this capture would end it
    out = torch.zeros(5, dtype=torch.int32, device=DEVICE)
    side = torch.cuda.Stream(DEVICE)
    calls = [small_copy(call, method) for call in ("new", "ready") for method in (None, "inline")]
    for call in calls:
        call([0] * 5, out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for stream in (None, side):  # which is not drawn into the capture either
            for call in calls:
                with refused(Unsupported, "method='value'"):
                    call([1, 2, 3, 4, 5], out, stream=stream)
        with pytest.raises(Unsupported, match="before the capture"):
            SmallCopy(4, torch.int32, DEVICE, method="copy")
        out.add_(1)
    graph.replay()
    torch.cuda.synchronize()
    assert out.tolist() == [1] * 5
    assert calls[-1]([1, 2, 3, 4, 5], out).tolist() == [1, 2, 3, 4, 5]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("method", "count"),
    [("inline", 64), ("inline", INLINE // 8), ("value", 64), ("mapped", 64), ("copy", 64)],
)
def test_while_a_large_copy_is_in_flight(method: str, count: int) -> None:
    """It lands before that ends by ``inline``, of which the driver does not promise it."""
    skip_without(method)
    host = torch.zeros(1 << 30, dtype=torch.uint8).pin_memory()
    large = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
    out = torch.zeros(count, dtype=torch.int64, device=DEVICE)
    side = torch.cuda.Stream(DEVICE)
    other = torch.cuda.Stream(DEVICE)
    ended = torch.cuda.Event()
    for nth in range(6):
        values = np.arange(nth, nth + count)
        torch.cuda.synchronize()
        if nth:  # the first time everything is loaded
            with torch.cuda.stream(other):
                large.copy_(host, non_blocking=True)
                ended.record()
            time.sleep(1e-3)  # so that it has surely begun
        with torch.cuda.stream(side):
            to_device(values, out=out, method=method)
        side.synchronize()
        overtook = not ended.query()
        assert overtook or not nth or method != "inline"
        assert out.tolist() == values.tolist()
