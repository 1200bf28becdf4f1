# SPDX-License-Identifier: Apache-2.0
"""The library's streams on a CUDA device are nobody else's."""

from __future__ import annotations

import gc

import pytest
import torch
from block_cases import large, numbered
from device_cases import DEVICE, LONG

from portakv import copy_blocks
from portakv.host import _streams
from portakv.host._streams import own_stream

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
    handles = [stream.cuda_stream for stream in (kept, *later)]
    assert handle in handles
    assert len(set(handles)) == len(handles)


def test_transfers_in_slices_share_no_stream() -> None:
    """Those under way have each their own; once they have ended these serve the next ones."""
    full, src = large(16, 1, DEVICE)
    _, dst = large(16, 1, "cpu")
    numbered(full)
    made: list[int] = []
    for _ in range(3):
        moves = [copy_blocks(src, dst, [n], [n], cancellable=True) for n in range(4)]
        for move in moves:
            move.synchronize()
        del moves, move
        gc.collect()
        free = _streams._free[DEVICE, 0]
        assert len(set(free)) == len(free)
        made.append(len(free))
    assert made[0] == made[1] == made[2]


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
