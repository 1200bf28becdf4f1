# SPDX-License-Identifier: Apache-2.0
"""A transport over PortaKV's own channel: the smallest transport that keeps the contract.

    portakv conform --contract transport portakv_examples.channel_transport:ChannelTransport

The command needs the extras conformance, storage and migrate.

The reader requests the bytes of each staging buffer piece by piece, and the owner's channel
answers. A real transport moves the bytes by a library, and its messages say where they lie.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
from msgspec import Meta

from portakv.ext import Bytes, Count, Decision, Lane, Message, Moving, TransferError, Transport

if TYPE_CHECKING:
    from portakv.ext import Channel, Peer

#: Bytes of an answer: a channel sends 1 MiB at most.
PIECE = 512 << 10
#: Seconds until a reader requests a staging buffer again that the owner has not passed yet.
PAUSE = 1e-3


class RequestPiece(Message, frozen=True):
    """Request the bytes of the staging buffer of a tag from ``start`` on."""

    tag: Count
    start: Bytes


class Piece(Message, frozen=True):
    """Bytes of a staging buffer of ``nbytes`` bytes; not ``ready``: it was not passed yet."""

    ready: bool
    nbytes: Bytes = 0
    data: Annotated[bytes, Meta(max_length=PIECE)] = b""


class PiecesTaken(Message, frozen=True):
    """One-way: the reader has read the staging buffer of a tag, or will not."""

    tag: Count


def _bytes_of(buffer: torch.Tensor) -> npt.NDArray[np.uint8]:
    """Return the bytes of a staging buffer, without a copy."""
    array: npt.NDArray[np.uint8] = buffer.view(-1).view(torch.uint8).numpy()
    return array


class ChannelLane(Lane):
    """The staging buffers between this process and one peer, one after another."""

    def __init__(self, transport: Transport, channel: Channel, key: str | Peer) -> None:
        self.passed: dict[int, Moving] = {}  # the owner's buffer that a reader may request, by tag
        super().__init__(transport, channel, key)

    def carry(self, moving: Moving, ready: torch.Event | None, tag: int) -> Iterator[None]:
        """Send a staging buffer if this side is the owner, else receive it."""
        if self.address:  # of the owner, so this side is the reader
            self._receive(moving, tag)
        else:
            self.passed[tag] = moving
            moving.wait()  # `PiecesTaken` ends it
        yield

    def _receive(self, moving: Moving, tag: int) -> None:
        into = _bytes_of(moving.buffer)
        start = 0
        try:
            while True:
                piece = self.channel.ask(self.address, RequestPiece(tag, start), Piece)
                if not piece.ready:
                    moving.wait(PAUSE)  # raises if the buffer has failed meanwhile
                    continue
                if piece.nbytes != into.nbytes:
                    raise TransferError(f"expected {into.nbytes} B, got {piece.nbytes}")
                if not moving.begin():  # its time is over, so its memory may be used again
                    moving.wait(0)
                into[start : start + len(piece.data)] = np.frombuffer(piece.data, np.uint8)
                start += len(piece.data)
                if start == into.nbytes:
                    return
        finally:
            if self.gone is None:
                self.channel.tell(self.address, PiecesTaken(tag))


class ChannelTransport(Transport):
    """Move staging buffers on the host by messages of the channel, which encrypts them."""

    name = "channel"
    kind = ChannelLane
    asks = (RequestPiece, PiecesTaken)

    @classmethod
    def probe(cls, device: torch.device) -> Decision:
        """Accept host memory only."""
        if device.type != "cpu":
            return Decision(cls.name, False, f"it moves host memory, not {device.type} memory")
        return Decision(cls.name, True, "a channel carries any bytes of the host")

    def answer(self, peer: Peer, channel: Channel, request: Any) -> Message | None:
        """Return a piece of the buffer that the owner passed; after the last one, end it."""
        lane: ChannelLane = self.lane(peer, channel)
        if isinstance(request, PiecesTaken):
            taken = lane.passed.pop(request.tag, None)
            if taken is not None:
                taken.end()
            return None
        moving = lane.passed.get(request.tag)
        if moving is None:
            return Piece(ready=False)
        moving.wait(0)  # raises the error that ended it
        data = _bytes_of(moving.buffer)[request.start : request.start + PIECE]
        return Piece(ready=True, nbytes=moving.buffer.nbytes, data=data.tobytes())
