# SPDX-License-Identifier: Apache-2.0
"""Small values inline on a CUDA device: taken during the call, and behind no copy engine."""

from __future__ import annotations

import gc
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch
from support.device_cases import DEVICE, LONG
from support.guarded_memory import filled, refused
from support.small_cases import INTEGERS, drawn, lacking, same_bits

from portakv import Unsupported
from portakv.host.small import SmallCopy, to_device

pytestmark = pytest.mark.gpu

INLINE = 65536


@pytest.fixture(autouse=True)
def _had_here() -> None:
    why = lacking("inline")
    if why is not None:
        pytest.skip(why)


@pytest.fixture(params=["default", "other"])
def stream(request: pytest.FixtureRequest) -> Any:
    """The default stream, and one of its own."""
    if request.param == "default":
        return torch.cuda.default_stream(DEVICE)
    return torch.cuda.Stream(DEVICE)


@pytest.mark.parametrize("count", [0, 1, 64, 8192])
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_every_dtype(dtype: torch.dtype, count: int, stream: Any) -> None:
    values = drawn(count, dtype)
    with torch.cuda.stream(stream):
        sender = SmallCopy(count, dtype, DEVICE, way="inline")
        assert same_bits(sender.send(values), values)
        assert same_bits(to_device(values, DEVICE, way="inline"), values)
        assert same_bits(to_device(values, DEVICE), values)


@pytest.mark.parametrize("offset", [1, 2, 3, 7, 13, 4097])
def test_as_many_bytes_as_go_to_any_address(offset: int) -> None:
    memory = filled((INLINE + 5000,), torch.uint8, device=DEVICE)
    before, values = memory.clone(), drawn(INLINE, torch.uint8)
    out = memory[offset : offset + INLINE]
    assert out.data_ptr() % 2 == offset % 2
    for way in ("inline", None):
        memory.copy_(before)
        to_device(values, out=out, way=way)
        assert same_bits(out, values)
        assert torch.equal(memory[:offset], before[:offset])
        assert torch.equal(memory[offset + INLINE :], before[offset + INLINE :])


def test_many_in_a_row_behind_a_busy_stream(stream: Any) -> None:
    """All leave the same memory of the host, which holds other values by the time they land."""
    outs = [torch.zeros(64, dtype=torch.int64, device=DEVICE) for _ in range(64)]
    with torch.cuda.stream(stream):
        to_device(range(64), out=outs[0], way="inline")
        torch.cuda.synchronize()
        torch.cuda._sleep(LONG)
        for nth, out in enumerate(outs):
            to_device(np.arange(64) * 1001 + nth, out=out, way="inline")
        assert not stream.query()  # the host did not wait
    stream.synchronize()
    for nth, out in enumerate(outs):
        assert out.tolist() == [n * 1001 + nth for n in range(64)]


@pytest.mark.parametrize("ready", [False, True])
@pytest.mark.parametrize("count", [1, 64, INLINE // 8])
def test_pinned_values_may_change_right_after_the_call(
    count: int, ready: bool, stream: Any
) -> None:
    out = torch.zeros(count, dtype=torch.int64, device=DEVICE)
    sender = SmallCopy(count, torch.int64, out=out, way="inline")
    values = torch.arange(1, count + 1).pin_memory()
    assert values.is_pinned()
    with torch.cuda.stream(stream):
        sender.send([0] * count)
        to_device([0] * count, out=out, way="inline")
        torch.cuda.synchronize()
        torch.cuda._sleep(LONG)
        if ready:
            sender.send(values)
        else:
            to_device(values, out=out, way="inline")
        values.fill_(-1)
        assert not stream.query()  # the host did not wait
    stream.synchronize()
    assert out.tolist() == [*range(1, count + 1)]


def test_a_thread_that_never_saw_a_device(stream: Any) -> None:
    sender, found = SmallCopy(64, torch.int64, DEVICE, way="inline"), list[Any]()

    def work() -> None:
        try:
            sender.send(range(64), stream=stream)
            stream.synchronize()
            found.append(sender.out.tolist())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [[*range(64)]]


def test_a_capture_refuses_it_and_goes_on() -> None:
    gc.collect()  # a graph of an earlier test that is freed during this capture would end it
    out = torch.zeros(4, dtype=torch.int32, device=DEVICE)
    sender = SmallCopy(4, torch.int32, out=out, way="inline")
    side, marker = torch.cuda.Stream(DEVICE), torch.zeros(1, device=DEVICE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for stream in (None, side):  # which is not drawn into the capture either
            with refused(Unsupported, "way='inline'", "way='value'", "way='mapped'"):
                sender.send([1, 2, 3, 4], stream=stream)
            with refused(Unsupported, "way='value'", "way='mapped'"):
                to_device([1, 2, 3, 4], out=out, way="inline", stream=stream)
        marker.add_(1)
    graph.replay()
    torch.cuda.synchronize()
    assert (marker.item(), out.tolist()) == (1, [0, 0, 0, 0])
    assert sender.send([1, 2, 3, 4]).tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("count", [64, INLINE // 8])
def test_it_lands_before_a_large_copy_ends(count: int) -> None:
    """Which the driver does not promise."""
    host = torch.zeros(1 << 30, dtype=torch.uint8).pin_memory()
    large = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
    out = torch.zeros(count, dtype=torch.int64, device=DEVICE)
    side, other, ended = torch.cuda.Stream(DEVICE), torch.cuda.Stream(DEVICE), torch.cuda.Event()
    for nth in range(6):
        values = np.arange(nth, nth + count)
        torch.cuda.synchronize()
        if nth:  # the first time everything is loaded
            with torch.cuda.stream(other):
                large.copy_(host, non_blocking=True)
                ended.record()
            time.sleep(1e-3)  # so that it has surely begun
        with torch.cuda.stream(side):
            to_device(values, out=out, way="inline")
        side.synchronize()
        overtook = not ended.query()
        assert overtook or not nth
        assert out.tolist() == values.tolist()
