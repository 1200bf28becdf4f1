# SPDX-License-Identifier: Apache-2.0
"""The messages by which an owner sends weights through staging buffers, and the slices it sends.

A lane is what a reader and an owner agreed on: a transport, and staging buffers on both sides. A
slice is some boxes of the owner's tensors, packed one after another into a staging buffer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, cast

import torch
from msgspec import Meta, msgpack

from portakv.errors import LayoutError
from portakv.migrate.messages import Bytes, Count, Dims, Id, Message, Name, Text, prepare
from portakv.migrate.transport_channel import TransportChannel
from portakv.migrate.weight_pairs import copy_pairs

if TYPE_CHECKING:
    from portakv.migrate.channel import Channel

BUFFERS = 4  # of a lane, on each side: one is packed, two are on the wire, one is emptied
MOST_BOXES = 1024  # of a slice
MOST_BOX_BYTES = 48 << 10  # of the encoded boxes of a slice: a message has at most 64 KiB
_ALIGNED = 16  # bytes; each box begins at a multiple, as the widest dtype needs


class Connect(Message, frozen=True):
    """Request a lane for the weights of a publication; its ``lane`` is a random id.

    Without a ``transport`` the message only requests the transport and the device of the owner.
    """

    purpose: ClassVar[str] = "Connecting to the weights at"

    id: Id
    lane: Id
    transport: Name = ""
    device: Text = ""


class Connected(Message, frozen=True):
    """The answer to `Connect`. A lane has `BUFFERS` staging buffers of ``buffer_bytes`` bytes.

    ``transport``: the transport of the lane, or that the owner names. ``device``: of the owner's
    tensors, or the host if these are on several devices. ``gone``: the publication has ended.
    ``why``: why readers cannot map the memory; empty if the owner exports it.
    """

    transport: Name = ""
    device: Text = ""
    buffer_bytes: Bytes = 0
    gone: bool = False
    why: Text = ""


class OfLane(Message, frozen=True):
    """A message of a reader's transport for the owner's transport of one lane."""

    purpose: ClassVar[str] = "Receiving weights of"

    lane: Id
    body: Annotated[bytes, Meta(max_length=60 << 10)]


class Leave(Message, frozen=True):
    """One-way: a reader releases a lane, and the owner's staging buffers of it."""

    purpose: ClassVar[str] = "Leaving the weights at"

    lane: Id


class SendSlice(Message, frozen=True):
    """Request boxes of the owner's items, packed into one staging buffer of a lane.

    A box is the number of an item, its start in the owner's tensor, and its extents; together they
    have ``nbytes`` packed bytes. The answer is a `Weights` without items. The owner sends slices in
    the order of the requests; the first tag of a lane is 1, and each next tag is one more.
    """

    purpose: ClassVar[str] = "Requesting weights of the process at"

    id: Id
    lane: Id
    tag: Count
    nbytes: Bytes
    boxes: Annotated[
        tuple[tuple[Count, Dims, Dims], ...], Meta(min_length=1, max_length=MOST_BOXES)
    ]


def box_bytes(axes: int) -> int:
    """Return the most bytes of an encoded box of so many axes in a `SendSlice`."""
    return 16 + 18 * axes


def packed_bytes(sizes: Iterable[int]) -> int:
    """Return the bytes of boxes of these sizes in bytes, packed one after another."""
    return sum(-(-nbytes // _ALIGNED) * _ALIGNED for nbytes in sizes)


def unpacked(
    buffer: torch.Tensor, boxes: Sequence[tuple[torch.dtype, Sequence[int]]]
) -> list[torch.Tensor]:
    """Return the boxes that lie packed in a staging buffer, uint8 ``[nbytes]``, as contiguous
    tensors. A box is its dtype and its extents; all together have at most ``nbytes`` bytes."""
    typed = dict[torch.dtype, torch.Tensor]()
    made = list[torch.Tensor]()
    start = 0
    for dtype, extents in boxes:
        if dtype not in typed:
            typed[dtype] = buffer.view(dtype)
        strides = list[int]()
        count = 1
        for extent in reversed(extents):
            strides.insert(0, count)
            count *= extent
        # One operator: to cut, to view as a dtype and as a shape takes three times as long.
        first = typed[dtype].storage_offset() + start // dtype.itemsize
        made.append(typed[dtype].as_strided(extents, strides, first))
        start += -(-count * dtype.itemsize // _ALIGNED) * _ALIGNED
    return made


def pack(full: torch.Tensor, parts: Sequence[torch.Tensor]) -> None:
    """Copy parts of tensors into a staging buffer, one after another, on the current streams.

    Raises `LayoutError` if the parts have another number of bytes than the buffer.
    """
    nbytes = packed_bytes(part.nbytes for part in parts)
    if nbytes != full.nbytes:
        raise LayoutError(f"Expected boxes of {full.nbytes} bytes, got {nbytes}. Pull again.")
    boxes = unpacked(full, [(part.dtype, part.shape) for part in parts])
    copy_pairs([*zip(boxes, parts, strict=True)])


class LaneChannel(TransportChannel):
    """A channel for the transport of one lane, which a `Reader` and other lanes use as well.

    It carries the transport's messages in an envelope that names the lane, because a channel has
    one answer for each kind of message.
    """

    def __init__(self, channel: Channel, lane: bytes) -> None:
        super().__init__(channel)
        self.lane = lane

    def enclosed(self, message: Message) -> OfLane:
        return OfLane(self.lane, msgpack.encode(message))


def lane_channel(channel: Channel, lane: bytes) -> Any:
    """Return a `LaneChannel` as the `Channel` that transports expect."""
    return cast("Channel", LaneChannel(channel, lane))


prepare(globals())
