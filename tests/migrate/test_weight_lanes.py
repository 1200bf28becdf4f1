# SPDX-License-Identifier: Apache-2.0
"""Lanes of weights: what owners refuse, lanes that are left out of step, and packed boxes."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from secrets import token_bytes

import pytest
import torch
from msgspec import msgpack
from msgspec.structs import replace
from support.waits import LIMIT
from support.weight_cases import Channels, make_channels

from portakv.errors import PeerError
from portakv.migrate.channel import Channel
from portakv.migrate.messages import unsealed
from portakv.migrate.staged_lanes import MOST_WAITING
from portakv.weights import owner as owners
from portakv.weights import publish
from portakv.weights.messages import Connect, OfLane, SendSlice, Weights, WeightsTicket
from portakv.weights.owner import pack, packed_bytes, unpacked

channels = pytest.fixture(make_channels)

LITTLE = 1 << 16  # bytes of staging: buffers of 16 KiB
SLICE = LITTLE // 4


def test_what_a_strange_reader_sends_is_refused(channels: Channels) -> None:
    """Lanes of others, slices out of turn or too large, boxes that do not exist."""
    tensors = {f"{n}": torch.zeros(SLICE // 4, dtype=torch.int32) for n in range(2)}
    owner = publish(channels(), tensors, staging=LITTLE)
    ticket = unsealed(owner.ticket, WeightsTicket)
    assert ticket is not None
    id = ticket.id
    address = ticket.address
    lane = token_bytes(16)
    one = channels()
    with pytest.raises(PeerError, match="Expected a lane"):
        one.ask(address, SendSlice(id, lane, 1, 16, ((0, (0,), (4,)),)), Weights)
    assert ticket.buffer_bytes == SLICE
    gone = one.ask(address, Connect(token_bytes(16), lane, "distributed", "cpu x"), Weights)
    assert gone.state == "gone"
    one.ask(address, Connect(id, lane, "distributed", "cpu x"), Weights)
    with pytest.raises(PeerError, match="lanes of a reader"):
        one.ask(address, Connect(id, lane, "distributed", "cpu x"), Weights)
    for tag, nbytes in ((0, 16), (2, 16), (1, 0), (1, SLICE + 1)):
        with pytest.raises(PeerError, match="Expected slice 1"):
            one.ask(address, SendSlice(id, lane, tag, nbytes, ((0, (0,), (4,)),)), Weights)
    with pytest.raises(PeerError, match="Expected a lane"):
        channels().ask(address, SendSlice(id, lane, 1, 16, ((0, (0,), (4,)),)), Weights)
    for body in (b"", b"\xc1", msgpack.encode({"type": "No"})):
        with pytest.raises(PeerError, match="message of the transport"):
            one.ask(address, OfLane(lane, body), Weights)
    for boxes in (((5, (0,), (4,)),), ((0, (SLICE // 4 - 1,), (4,)),), ((0, (0,), (5,)),)):
        lane = token_bytes(16)
        one = channels()
        one.ask(address, Connect(id, lane, "distributed", "cpu x"), Weights)
        assert one.ask(address, SendSlice(id, lane, 1, 16, boxes), Weights).state == "held"
        with pytest.raises(PeerError, match="could not pack"):
            ask_until_refused(one, address, SendSlice(id, lane, 2, 16, boxes))
    owner.close()


def test_a_reader_has_only_some_slices_that_wait(
    channels: Channels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The owner takes no further request until it has packed one, so no reader fills its memory."""
    go_on = threading.Event()

    def hang(full: torch.Tensor, parts: Sequence[torch.Tensor]) -> None:
        go_on.wait(LIMIT)
        pack(full, parts)

    monkeypatch.setattr(owners, "pack", hang)
    owner = publish(channels(), {"w": torch.zeros(SLICE // 4, dtype=torch.int32)}, staging=LITTLE)
    ticket = unsealed(owner.ticket, WeightsTicket)
    assert ticket is not None
    lane = token_bytes(16)
    one = channels()
    one.ask(ticket.address, Connect(ticket.id, lane, "distributed", "cpu x"), Weights)
    for tag in range(1, MOST_WAITING + 1):
        request = SendSlice(ticket.id, lane, tag, 16, ((0, (0,), (4,)),))
        assert one.ask(ticket.address, request, Weights).state == "held"
    tag = MOST_WAITING + 1
    with pytest.raises(PeerError, match=f"Expected slice {tag}"):
        one.ask(ticket.address, replace(request, tag=tag), Weights)
    go_on.set()
    owner.close()


def ask_until_refused(channel: Channel, address: str, request: SendSlice) -> None:
    """Request slices until the owner refuses one; it takes some at a time."""
    for tag in range(request.tag, request.tag + 3):
        channel.ask(address, replace(request, tag=tag), Weights)
        time.sleep(0.3)


def test_packed_boxes_are_aligned() -> None:
    assert packed_bytes([]) == 0
    assert packed_bytes([1, 16, 17]) == 64


def test_boxes_of_any_dtype_and_shape_are_unpacked_as_they_were_packed() -> None:
    """In a buffer that is a part of an allocation; gaps between boxes stay."""
    parts = [
        torch.arange(5, dtype=torch.uint8),
        torch.tensor(2.5, dtype=torch.float64),
        torch.arange(30, dtype=torch.int16).view(5, 6)[:, ::2],
        torch.arange(24, dtype=torch.float32).view(2, 3, 4).permute(2, 0, 1),
        torch.complex(torch.arange(3.0), torch.ones(3)).to(torch.complex128),
        torch.tensor([True, False, True]),
    ]
    whole = torch.full((4096,), 0x5A, dtype=torch.uint8)
    buffer = whole[1024 : 1024 + packed_bytes(part.nbytes for part in parts)]
    pack(buffer, parts)
    boxes = unpacked(buffer, [(part.dtype, part.shape) for part in parts])
    for box, part in zip(boxes, parts, strict=True):
        assert torch.equal(box, part)
        assert box.is_contiguous()
    assert bool((buffer[5:16] == 0x5A).all())
    assert bool((whole[:1024] == 0x5A).all())
    assert bool((whole[1024 + buffer.nbytes :] == 0x5A).all())
