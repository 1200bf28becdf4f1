# SPDX-License-Identifier: Apache-2.0
"""The library's streams on a CUDA device are nobody else's."""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest
import torch
from support.block_cases import PATIENCE, large, numbered
from support.device_cases import DEVICE, LONG

from portakv import copy_blocks
from portakv.blocks import block_slices
from portakv.host.small import SmallCopy
from portakv.registry.prepared import bring
from portakv.runtime.streams import own_stream

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("priority", [0, -1])
def test_torch_gives_them_to_nobody(priority: int) -> None:
    own = [own_stream(DEVICE, priority) for _ in range(50)]
    handles = {stream.cuda_stream for stream in own}
    assert len(handles) == 50
    assert all(stream.device == DEVICE for stream in own)
    theirs = {torch.cuda.Stream(DEVICE, priority=priority).cuda_stream for _ in range(100)}
    assert not handles & {*theirs, 0}


def test_one_that_is_forgotten_serves_again() -> None:
    kept, gone = own_stream(DEVICE), own_stream(DEVICE)
    handle = gone.cuda_stream
    del gone
    gc.collect()
    later = [own_stream(DEVICE) for _ in range(60)]
    assert later[0].cuda_stream == handle
    assert len({stream.cuda_stream for stream in (kept, *later)}) == 61


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

    def held(*args: Any) -> None:  # none ends before the last one begins
        assert all_began.wait(PATIENCE)
        bring(*args)

    monkeypatch.setattr(block_slices, "own_stream", noted)
    monkeypatch.setattr(block_slices, "bring", held)
    rounds = []
    for _ in range(3):
        handed_out.clear()
        all_began.clear()
        moves = [copy_blocks(src, dst, [n], [n], cancellable=True) for n in range(4)]
        all_began.set()
        for move in moves:
            move.synchronize()
        del moves, move
        gc.collect()
        assert len(set(handed_out)) == 4
        rounds.append(set(handed_out))
    assert rounds[0] == rounds[1] == rounds[2]


def test_they_have_their_priority_and_wait_for_no_default_stream() -> None:
    for priority in (0, -1):
        stream = own_stream(DEVICE, priority)
        assert stream.priority == priority
        with torch.cuda.stream(stream):  # memory for a new stream is got from a device at rest
            torch.zeros(1, device=DEVICE)
        torch.cuda.synchronize()
        torch.cuda._sleep(LONG)
        with torch.cuda.stream(stream):
            torch.zeros(1, device=DEVICE)
        stream.synchronize()
        assert not torch.cuda.default_stream(DEVICE).query()
    torch.cuda.synchronize()


def test_the_allocator_knows_them() -> None:
    """Memory of the current stream that one of them still reads is given to nobody."""
    stream, size = own_stream(DEVICE), 1 << 20
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
def test_while_another_thread_captures(mode: str) -> None:
    """A stream that is made, and values that go inline, end no capture of another thread's."""
    gc.collect()
    values, graph, marker = range(64), torch.cuda.CUDAGraph(), torch.zeros(1, device=DEVICE)
    sender = SmallCopy(64, torch.int64, DEVICE, way="inline")
    sender.send(values)
    side = torch.cuda.Stream(DEVICE)
    torch.cuda.synchronize()
    failed: list[Exception] = []
    kept: list[Any] = []

    def work() -> None:
        try:
            with torch.cuda.stream(side):
                kept.extend(own_stream(DEVICE) for _ in range(100))  # more than had been made
                sender.send([n + 1 for n in values])
        except Exception as error:
            failed.append(error)

    with torch.cuda.graph(graph, capture_error_mode=mode):
        marker.add_(1)
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    graph.replay()
    torch.cuda.synchronize()
    assert not failed
    assert (marker.item(), sender.out.tolist()) == (1, [n + 1 for n in values])
