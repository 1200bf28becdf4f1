# SPDX-License-Identifier: Apache-2.0
"""The library's streams on a CUDA device are nobody else's."""

from __future__ import annotations

import pytest
import torch
from device_cases import DEVICE, LONG

from portakv.host import _streams
from portakv.host._streams import own_stream

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("priority", [0, -1])
def test_torch_gives_them_to_nobody(priority: int) -> None:
    own = [own_stream(DEVICE, priority) for _ in range(2 * _streams._MOST)]
    handles = {stream.cuda_stream for stream in own}
    assert len(handles) == _streams._MOST
    assert all(stream.device == DEVICE for stream in own)
    theirs = {torch.cuda.Stream(DEVICE, priority=priority).cuda_stream for _ in range(100)}
    assert not handles & {*theirs, 0}


def test_they_have_their_priority_and_wait_for_no_default_stream() -> None:
    for priority in (0, -1):
        stream = own_stream(DEVICE, priority)
        assert stream.priority == priority
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
