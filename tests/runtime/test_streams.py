# SPDX-License-Identifier: Apache-2.0
"""Streams of the library's own: each has one owner. By a stand-in for CUDA, and on a device."""

from __future__ import annotations

import gc
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from typing import Any
from unittest.mock import Mock, call

import pytest
import torch
from support.block_cases import PATIENCE, copies_in_slices, large, numbered, until
from support.device_cases import DEVICE, LONG, current, delay
from support.fake_libcuda import FakeLibrary
from support.guarded_memory import refused
from support.threads import run_threads

from portakv import KVView, TransferError, copy_blocks
from portakv.copy import submit
from portakv.host.small import to_device
from portakv.registry.prepared import bring
from portakv.runtime import cuda
from portakv.runtime import streams as _streams
from portakv.runtime.devices import inside
from portakv.runtime.streams import awaited_asleep, on_one_core, on_stream, own_stream
from portakv.runtime.transfer import Completion, Transfer

CARD = torch.device("cuda", 0)


class Stream:
    """Torch's, as far as it can be had without a device."""

    def __init__(self, handle: int, device: torch.device) -> None:
        self.handle = handle
        self.device = device

    __del__ = _streams.OwnStream.__del__


@pytest.fixture
def driver(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    library = FakeLibrary(tmp_path_factory.getbasetemp(), None).library
    monkeypatch.setattr(cuda, "library", lambda: library)
    monkeypatch.setattr(cuda, "no_cuda", lambda device: None)
    monkeypatch.setattr(cuda, "adopt", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(_streams, "OwnStream", Stream)
    monkeypatch.setattr(_streams, "free_handles", defaultdict(list))
    cuda.stream_maker.cache_clear()
    yield
    cuda.stream_maker.cache_clear()


@pytest.mark.usefixtures("driver")
def test_those_that_live_are_apart_and_one_that_ends_comes_back() -> None:
    streams: list[Any] = [own_stream(CARD) for _ in range(100)]
    assert len({stream.handle for stream in streams}) == 100
    last = streams[50].handle
    first = streams[7].handle
    del streams[50], streams[7]
    # Each is forgotten immediately.
    assert [own_stream(CARD).handle for _ in range(3)] == [first] * 3
    again = [own_stream(CARD) for _ in range(2)]
    assert [stream.handle for stream in again] == [first, last]
    assert own_stream(CARD).handle not in {stream.handle for stream in (*streams, *again)}


@pytest.mark.usefixtures("driver")
def test_each_device_and_priority_has_its_own_or_the_driver_s_word() -> None:
    other = torch.device("cuda", 1)
    handle = own_stream(CARD).handle
    assert own_stream(other).handle != handle
    assert own_stream(CARD, -1).handle != handle
    assert own_stream(CARD).handle == handle
    with refused(TransferError, "a new stream of cuda:0", "CUDA_ERROR_INVALID_VALUE"):
        own_stream(CARD, -6)


def test_elsewhere_they_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Mock()
    monkeypatch.setattr(torch, "get_device_module", lambda device: made)
    npu = torch.device("meta", 0)
    assert own_stream(npu) is own_stream(npu, -1) is made.Stream.return_value
    assert made.Stream.mock_calls == [call(npu), call(npu, priority=-1)]


@pytest.mark.usefixtures("driver")
def test_without_the_drivers_library_they_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda.stream_maker.cache_clear()
    monkeypatch.setattr(cuda, "library", Mock(side_effect=OSError("libcuda.so.1")))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: "torch's")
    assert own_stream(CARD) == "torch's"


# On a device


@pytest.mark.parametrize("priority", [0, -1])
@pytest.mark.gpu
def test_torch_gives_them_to_nobody_and_one_that_is_forgotten_serves_again(priority: int) -> None:
    own = [own_stream(DEVICE, priority) for _ in range(50)]
    handles = [stream.cuda_stream for stream in own]
    assert len({*handles}) == 50
    assert all((stream.device, stream.priority) == (DEVICE, priority) for stream in own)
    of_torch = {torch.cuda.Stream(DEVICE, priority=priority).cuda_stream for _ in range(100)}
    assert not {*handles} & {*of_torch, 0}
    del own[20]
    gc.collect()
    later = [own_stream(DEVICE, priority) for _ in range(60)]
    assert later[0].cuda_stream == handles[20]
    assert len({stream.cuda_stream for stream in (*own, *later)}) == 109


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [lambda: torch.cuda.Stream(DEVICE), lambda: own_stream(DEVICE)])
def test_a_stream_is_current_inside_and_the_former_one_again_after_an_error(
    kind: Callable[[], torch.Stream],
) -> None:
    outer = kind()
    inner = kind()
    before = torch.cuda.current_stream(DEVICE)
    with on_stream(outer):
        assert torch.cuda.current_stream(DEVICE) == outer
        with suppress(KeyError), on_stream(inner):
            assert torch.cuda.current_stream(DEVICE) == inner
            raise KeyError
        assert torch.cuda.current_stream(DEVICE) == outer
    assert torch.cuda.current_stream(DEVICE) == before
    with on_stream(None):
        assert torch.cuda.current_stream(DEVICE) == before


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_stream_of_another_device_makes_that_device_current() -> None:
    other = torch.device("cuda", 1)
    theirs = torch.cuda.Stream(other)
    mine = torch.cuda.Stream(DEVICE)
    with on_stream(mine):
        there = torch.cuda.current_stream(other)
        with on_stream(theirs):
            assert torch.cuda.current_device() == 1
            assert torch.cuda.current_stream(other) == theirs
            assert torch.cuda.current_stream(DEVICE) == mine
        assert torch.cuda.current_device() == 0
        assert torch.cuda.current_stream(other) == there
        assert torch.cuda.current_stream(DEVICE) == mine


@pytest.mark.gpu
def test_transfers_in_slices_share_no_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those under way have each their own; once they have ended these serve the next ones."""
    full, src = large(16, 1, DEVICE)
    _, dst = large(16, 1, "cpu")
    numbered(full)
    handed_out: list[int] = []
    all_began = threading.Event()

    def noted(device: torch.device) -> Any:
        stream = own_stream(device)
        handed_out.append(stream.cuda_stream)
        return stream

    def bring_together(*args: Any) -> None:  # none ends before the last one begins
        assert all_began.wait(PATIENCE)
        bring(*args)

    monkeypatch.setattr(submit, "own_stream", noted)
    monkeypatch.setattr(submit, "bring", bring_together)
    rounds = []
    for _ in range(3):
        handed_out.clear()
        all_began.clear()
        moves = [copy_blocks(src, dst, [n], [n], cancellable=True) for n in range(4)]
        all_began.set()
        for move in moves:
            move.synchronize()
        del moves, move
        until(lambda: not copies_in_slices())  # a copy holds its stream until it has ended
        gc.collect()
        assert len(set(handed_out)) == 4
        rounds.append(set(handed_out))
    assert rounds[0] == rounds[1] == rounds[2]


@pytest.mark.parametrize("priority", [0, -1])
@pytest.mark.gpu
def test_they_wait_for_no_default_stream(priority: int) -> None:
    stream = own_stream(DEVICE, priority)
    with torch.cuda.stream(stream):  # memory for a new stream is got from a device at rest
        torch.zeros(1, device=DEVICE)
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG)
    with torch.cuda.stream(stream):
        torch.zeros(1, device=DEVICE)
    stream.synchronize()
    assert not torch.cuda.default_stream(DEVICE).query()
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_the_allocator_knows_them() -> None:
    """The allocator does not reuse memory of the current stream while one of them reads it."""
    stream = own_stream(DEVICE)
    size = 1 << 20
    tensor = torch.full((size,), 3, dtype=torch.uint8, device=DEVICE)
    out = torch.zeros(size, dtype=torch.uint8, device=DEVICE)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LONG)
        out.copy_(tensor)
    tensor.record_stream(stream)
    at = tensor.data_ptr()
    del tensor
    other = torch.zeros(size, dtype=torch.uint8, device=DEVICE)
    assert other.data_ptr() != at
    stream.synchronize()
    assert int(out.min()) == 3


@pytest.mark.parametrize("mode", ["global", "thread_local"])
@pytest.mark.gpu
def test_while_another_thread_captures(mode: str) -> None:
    """A stream that is made, and values that go inline, end no capture of another thread's."""
    gc.collect()
    values = range(64)
    graph = torch.cuda.CUDAGraph()
    marker = torch.zeros(1, device=DEVICE)
    out = torch.zeros(64, dtype=torch.int64, device=DEVICE)
    to_device(values, out=out)
    side = own_stream(DEVICE)  # torch may give the stream of the capture again, as its 33rd
    torch.cuda.synchronize()

    def work(streams: int) -> list[Any]:
        with torch.cuda.stream(side):
            to_device([n + 1 for n in values], out=out)
            return [own_stream(DEVICE) for _ in range(streams)]

    with torch.cuda.graph(graph, capture_error_mode=mode):
        marker.add_(1)
        run_threads(work, [100])  # more than had been made
    graph.replay()
    torch.cuda.synchronize()
    assert (marker.item(), out.tolist()) == (1, [n + 1 for n in values])


def test_a_worker_waits_for_a_device_asleep(monkeypatch: pytest.MonkeyPatch) -> None:
    event = Mock()
    made = Mock(return_value=event)
    monkeypatch.setattr(torch.cuda, "Event", made)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: ("current", device))
    with on_one_core(torch.device("cpu")):
        pass
    made.assert_not_called()
    with on_one_core(CARD):
        made.assert_not_called()
    made.assert_called_once_with(blocking=True)
    assert event.mock_calls == [call.record(("current", CARD)), call.synchronize()]


def test_a_worker_waits_for_a_slice_asleep(monkeypatch: pytest.MonkeyPatch) -> None:
    """First for an event that lets the thread sleep, then for what the transfer had itself."""
    order = Mock()
    monkeypatch.setattr(torch.cuda, "Event", Mock(return_value=order.event))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "current")
    transfer = Transfer([Completion(pendings=(order.own,))], carried=("by", "way"))
    assert awaited_asleep(transfer, torch.device("cpu")) is transfer
    asleep = awaited_asleep(transfer, CARD)
    assert asleep.carried == transfer.carried
    asleep.synchronize()
    waits = [call.event.record("current"), call.event.synchronize(), call.own.wait()]
    assert order.mock_calls == waits


@pytest.mark.gpu
def test_a_copy_in_slices_waits_asleep(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []
    kind: Any = torch.cuda.Event

    def event(**terms: Any) -> Any:
        made.append(terms)
        return kind(**terms)

    monkeypatch.setattr(torch.cuda, "Event", event)
    layout = "block token dim"
    source = torch.arange(8 * 16 * 64, dtype=torch.float32, device=CARD).view(8, 16, 64)
    target = torch.zeros(8, 16, 64, pin_memory=True)
    views = KVView(source, layout), KVView(target, layout)
    copy_blocks(*views, range(8), range(8), cancellable=True).synchronize()
    assert torch.equal(target, source.cpu())
    assert {"blocking": True} in made


@pytest.mark.gpu
def test_a_wait_asleep_ends_after_the_work_of_the_current_stream() -> None:
    stream = own_stream(CARD)
    with inside(stream):
        with on_one_core(CARD):
            delay(current(CARD))
            assert not stream.query(), "the work has ended before the wait"
        assert stream.query()
