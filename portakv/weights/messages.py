# SPDX-License-Identifier: Apache-2.0
"""The messages about weights, and the ticket of published weights."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from msgspec import Meta

from portakv.migrate.messages import Bytes, Count, Dims, Handle, Id, Message, Name, Text, prepare
from portakv.weights.parameters import Box, Item

MOST_BOXES = 256  # of one request for checksums
MOST_SUMS = 1 << 14  # of one answer
END = 1 << 31  # behind everything that an owner lists
MOST_BOXES_OF_SLICE = 1 << 12
Buffer = Annotated[int, Meta(ge=4096, le=1 << 36)]  # bytes of a staging buffer


class WeightsTicket(Message, frozen=True):
    """The address of published weights, and their id.

    ``transport``: the only one for readers that do not map the memory; empty: any. ``device``: of
    the owner's tensors, or the host if these are on several devices. ``why``: why readers cannot
    map the memory; empty if the owner exports it. ``buffer_bytes``: of a staging buffer for readers
    that do not.
    """

    address: Text
    id: Id
    transport: Name
    device: Text
    why: Text
    buffer_bytes: Buffer


class AskWeights(Message, frozen=True):
    """Request what an owner lists, from number ``first`` on, or the checksums of ``boxes``.

    An owner lists its items, its regions, and the checksums of all boxes of all items; nothing from
    `END` on. ``boxes``: of numbered items, as they lie at the owner. ``begin``: a pull begins, so
    an update must not be in progress; checksums that are not computed yet are left out. ``again``:
    the owner's checksums are not the reader's, so the owner must not use them again.
    """

    purpose: ClassVar[str] = "Requesting weights of the process at"

    id: Id
    first: Count = 0
    boxes: Annotated[tuple[tuple[Count, Box], ...], Meta(max_length=MOST_BOXES)] = ()
    begin: bool = False
    again: bool = False


class Weights(Message, frozen=True):
    """Some of what an owner lists. ``version`` changes with the weights.

    ``total``: of items and regions. A region is memory that contains items. ``replaced``: a
    parameter that no longer has the memory of its region.
    """

    state: Literal["held", "gone", "busy", "replaced"]
    version: Annotated[int, Meta(ge=0)] = 0
    total: Annotated[int, Meta(ge=0, le=1 << 28)] = 0
    items: tuple[tuple[Text, Item], ...] = ()
    regions: tuple[Handle, ...] = ()
    sums: Annotated[tuple[int, ...], Meta(max_length=MOST_SUMS)] = ()
    replaced: Text = ""


# --- the messages of a lane, by which an owner sends weights through staging buffers


class Connect(Message, frozen=True):
    """Request a lane for the weights of a publication; its ``lane`` is a random id.

    The answer is a `Weights` without items, as that of `SendSlice`.
    """

    purpose: ClassVar[str] = "Connecting to the weights at"

    id: Id
    lane: Id
    transport: Name
    device: Text


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
    have ``nbytes`` packed bytes. The owner sends slices in
    the order of the requests; the first tag of a lane is 1, and each next tag is one more. A reader
    has at most `staged_lanes.BUFFERS` slices under way.
    """

    purpose: ClassVar[str] = "Requesting weights of the process at"

    id: Id
    lane: Id
    tag: Count
    nbytes: Bytes
    boxes: Annotated[
        tuple[tuple[Count, Dims, Dims], ...], Meta(min_length=1, max_length=MOST_BOXES_OF_SLICE)
    ]


prepare(globals())
