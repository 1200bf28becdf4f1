# SPDX-License-Identifier: Apache-2.0
"""Small copies on a CUDA device: every count, order, graphs, and a large copy in flight."""

from __future__ import annotations

import gc
import platform
import threading
from typing import Any

import numpy as np
import pytest
import torch
from support.device_cases import DEVICE, LONG
from support.guarded_memory import filled, refused
from support.small_cases import INTEGERS, drawn, lacking, same_bits

from portakv import BackendUnavailable, Unsupported
from portakv.host.small import SmallCopy, choose, to_device
from portakv.runtime.transfer import copies_holding_memory

pytestmark = pytest.mark.gpu

MOST, INLINE = 32736, 65536  # bytes that go by value, and inline


@pytest.fixture(params=["inline", "value", "mapped", "copy"])
def way(request: pytest.FixtureRequest) -> str:
    """Each way that this machine has; without the extra they are two."""
    why = lacking(request.param)
    if why is not None:
        pytest.skip(why)
    return str(request.param)


@pytest.fixture
def side() -> Any:
    return torch.cuda.Stream(DEVICE)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="its pages may be the device's too")
def test_the_best_way() -> None:
    assert [choose(n, DEVICE).way for n in (0, INLINE)] == ["inline", "inline"]
    assert SmallCopy(64, torch.int64, DEVICE).way == "inline"
    longer = choose(INLINE + 1, DEVICE)
    assert longer.way == ("mapped" if lacking("mapped") is None else "copy")
    assert str(INLINE) in longer.why
    with refused(BackendUnavailable, str(INLINE)):
        choose(INLINE + 1, DEVICE, "inline")


def test_what_goes_by_value() -> None:
    why = lacking("value")
    if why is not None:
        with refused(BackendUnavailable, why):
            choose(8, DEVICE, "value")
        return
    assert [choose(n, DEVICE, "value").way for n in (0, MOST)] == ["value", "value"]
    with refused(BackendUnavailable, str(MOST)):
        choose(MOST + 1, DEVICE, "value")


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_every_count(dtype: torch.dtype, way: str) -> None:
    sender = SmallCopy(300, dtype, DEVICE, way=way)
    for count in range(301):
        values = drawn(count, dtype)
        assert same_bits(to_device(values, DEVICE, way=way), values), count
        assert same_bits(sender.send(values), values), count


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("asked", [None, "value"])
def test_counts_round_the_limits(dtype: torch.dtype, asked: str | None) -> None:
    if asked is not None and lacking(asked) is not None:
        pytest.skip(lacking(asked) or "")
    for limit in (240, 1008, 4080, 4096, MOST, 32764, INLINE, 1 << 20):
        for count in range(limit // dtype.itemsize - 2, limit // dtype.itemsize + 3):
            way = asked if count * dtype.itemsize <= MOST else None
            values = drawn(count, dtype)
            assert same_bits(to_device(values, DEVICE, way=way), values), count
            sender = SmallCopy(count, dtype, DEVICE, way=way)
            assert same_bits(sender.send(values), values), count


@pytest.mark.parametrize("offset", range(1, 17))
def test_a_target_of_any_alignment(offset: int, way: str) -> None:
    for count in (0, 1, 15, 16, 17, 64, 333, 5000):
        memory = filled((5040,), torch.uint8, device=DEVICE)
        before, values = memory.clone(), drawn(count, torch.uint8)
        to_device(values, out=memory[offset : offset + count], way=way)
        assert same_bits(memory[offset : offset + count], values)
        assert torch.equal(memory[:offset], before[:offset])
        assert torch.equal(memory[offset + count :], before[offset + count :])


def test_integers_and_bytes() -> None:
    assert to_device([3, -1, 2**40], DEVICE).tolist() == [3, -1, 2**40]
    assert to_device(b"abc", DEVICE).tolist() == [97, 98, 99]
    assert to_device(np.arange(6).reshape(2, 3), DEVICE).tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("ready", [False, True])
def test_order_behind_a_slow_stream(way: str, ready: bool, side: Any) -> None:
    """Behind what the stream holds, the values being those of the call."""
    out = torch.zeros(64, dtype=torch.int64, device=DEVICE)
    sender = SmallCopy(64, torch.int64, out=out, way=way)
    for slow in (False, True):  # the first time everything is loaded and allocated
        values = torch.arange(64)
        with torch.cuda.stream(side):
            if slow:
                torch.cuda._sleep(LONG)
            out.fill_(-1)
            if ready:
                sender.send(values)
            else:
                to_device(values, out=out, way=way)
            values.zero_()
            landed = out.clone()
            assert not (slow and side.query())
        side.synchronize()
        assert copies_holding_memory() == 0
        assert landed.tolist() == list(range(64))


def test_a_stream_that_is_passed_follows_the_current_one(way: str, side: Any) -> None:
    out = torch.zeros(8, dtype=torch.int32, device=DEVICE)
    sender = SmallCopy(8, torch.int32, out=out, way=way)
    sender.send(range(8))
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG)
    reader = out.clone()
    sender.send([7] * 8, stream=side)
    side.synchronize()
    assert out.tolist() == [7] * 8
    assert reader.tolist() == list(range(8))


def test_many_sends_under_way(way: str) -> None:
    sender = SmallCopy(16, torch.int32, DEVICE, way=way)
    sender.send([0])
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG // 4)
    results = [sender.send([nth] * 16).clone() for nth in range(100)]
    assert [one.tolist() for one in results] == [[nth] * 16 for nth in range(100)]


def test_to_device_keeps_values_until_they_were_read(side: Any) -> None:
    wanted = drawn(1 << 16, torch.int64)
    for slow in (False, True):  # the first time everything is loaded and allocated
        with torch.cuda.stream(side):
            if slow:
                torch.cuda._sleep(LONG)
            landed = [to_device(wanted + nth, DEVICE) for nth in range(4)]
            assert not (slow and side.query())
            rubbish = [torch.zeros(1 << 16, dtype=torch.int64).pin_memory() for _ in range(8)]
        side.synchronize()
        assert all(same_bits(one, wanted + nth) for nth, one in enumerate(landed))
        assert len(rubbish) == 8
        assert copies_holding_memory() == 0
        del landed, rubbish


# Graphs


def test_a_graph_keeps_what_was_sent_by_value() -> None:
    if lacking("value") is not None:
        pytest.skip(lacking("value") or "")
    sender = SmallCopy(72, torch.int32, DEVICE, way="value")
    out = torch.zeros(72, dtype=torch.int32, device=DEVICE)
    to_device(range(72), out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first = sender.send(range(72)).clone()
        second = sender.send(range(100, 172)).clone()
        to_device(range(72), out=out, way="value")
    out.zero_()
    sender.send([0] * 72)
    graph.replay()
    torch.cuda.synchronize()
    assert first.tolist() == out.tolist() == list(range(72))
    assert second.tolist() == list(range(100, 172))
    with refused(Unsupported, "way='mapped'"):
        sender.refill([1])


@pytest.mark.parametrize("count", [1, 16, 64, 72, 20_000])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64], ids=str)
def test_a_graph_reads_what_was_refilled(way: str, count: int, dtype: torch.dtype) -> None:
    if way in ("inline", "value"):
        return
    sender = SmallCopy(count, dtype, DEVICE, way=way)
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


def test_what_is_not_captured() -> None:
    gc.collect()  # a graph of an earlier test that is freed during this capture would end it
    sender = SmallCopy(4, torch.int32, DEVICE)
    graph, marker = torch.cuda.CUDAGraph(), torch.zeros(1, device=DEVICE)
    with torch.cuda.graph(graph):
        with pytest.raises(Unsupported, match="way='value'"):
            sender.send([1])
        with pytest.raises(Unsupported, match="SmallCopy"):
            to_device([1], DEVICE)
        with pytest.raises(Unsupported, match="before the capture"):
            SmallCopy(4, torch.int32, DEVICE, way="copy")
        marker.add_(1)
    graph.replay()
    torch.cuda.synchronize()
    assert marker.item() == 1


# Others at the same time


@pytest.mark.parametrize("direction", ["h2d", "d2h"])
def test_while_a_large_copy_is_in_flight(way: str, direction: str, side: Any) -> None:
    """Only what arrives, not when: benchmarks measure that."""
    host = torch.zeros(1 << 29, dtype=torch.uint8).pin_memory()
    large = torch.ones(1 << 29, dtype=torch.uint8, device=DEVICE)
    sender = SmallCopy(64, torch.int64, DEVICE, way=way)
    sender.send(range(64))
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        (large if direction == "h2d" else host).copy_(
            host if direction == "h2d" else large, non_blocking=True
        )
    results = [sender.send(range(nth, nth + 64)).clone() for nth in range(40)]
    wide = to_device(range(100_000), DEVICE)
    assert [one.tolist() for one in results] == [[*range(nth, nth + 64)] for nth in range(40)]
    assert wide.tolist() == [*range(100_000)]
    side.synchronize()
    assert int(large.max()) == int(host.max()) == (direction == "d2h")


def test_in_threads_that_never_saw_a_device(way: str) -> None:
    sender, wrong = SmallCopy(64, torch.int64, DEVICE, way=way), list[str]()

    def work(nth: int) -> None:
        try:
            for _ in range(50):
                found = to_device([nth] * 64, DEVICE, way=way).tolist()
                if found != [nth] * 64 or len(set(sender.send([nth] * 64).tolist())) != 1:
                    wrong.append(f"{nth}: {found}")
        except Exception as error:
            wrong.append(repr(error))

    threads = [threading.Thread(target=work, args=(nth,)) for nth in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_current(way: str) -> None:
    other = torch.device("cuda", 1)
    for nth in range(20):
        landed = to_device(range(nth), other, way=way)
        assert (landed.device, landed.tolist()) == (other, [*range(nth)])
    assert SmallCopy(8, torch.int8, other, way=way).send([1, 2]).tolist() == [1, 2]
    assert torch.cuda.current_device() == 0
