# SPDX-License-Identifier: Apache-2.0
"""The staging buffers of a reader for one owner whose memory is not mapped."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, cast

import torch

from portakv.copy.handle import BlockTransfer
from portakv.errors import PeerError
from portakv.migrate.pull_history import PullHistory
from portakv.migrate.staging import Chunks, has_ended, staging
from portakv.migrate.transport_channel import TransportChannel
from portakv.migrate.transports.base import Lane, Moving, Transport, gone_peer, released_peer
from portakv.tasks import Limit, Signal, runtime

if TYPE_CHECKING:
    from portakv.migrate.channel import Channel


class StagingBuffer:
    """A staging buffer of a reader, and the last transfers into it and from it.

    ``rows``: the device of the reader's rows.
    """

    def __init__(self, memory: torch.Tensor, rows: torch.device) -> None:
        self.memory = memory
        self.chunks = Chunks(memory)
        self._rows = rows
        self.moving: Moving | None = None
        self.lane: Lane | None = None  # of the last transfer into it
        #: The copy that follows the bytes; None if their pull ended before.
        self.copy: BlockTransfer | None = None

    def must_be_free(self, lane: Lane, nbytes: int) -> bool:
        """Return True if the last transfer into the buffer must be free before `prepare`.

        No stream orders a buffer that grows to ``nbytes``, has another lane, or is of a pull that
        ended early.
        """
        grows = nbytes > self.memory.nbytes
        return self.moving is not None and (self.copy is None or grows or self.lane is not lane)

    def prepare(self, nbytes: int, most: int) -> None:
        """Order the current stream after the last use of the buffer; let it grow to ``nbytes``.

        Its memory has at most ``most`` bytes. The host waits for a copy from host memory, since
        transports write that in no stream's order.
        """
        copy = self.copy
        grows = nbytes > self.memory.nbytes
        if copy is not None:
            if grows or self.memory.device.type == "cpu":
                has_ended(copy, wait=True)
            else:
                copy.wait()
            self.copy = None
        if grows:
            self.memory = staging(nbytes, self.memory.device, most, self._rows)
            self.chunks = Chunks(self.memory)


class Taker(Protocol):
    """A coroutine that takes the rows of an offer for a pull, in slices."""

    @property
    def has_crossed(self) -> bool:
        """Return True if all bytes have left the owner's memory."""

    def done(self) -> bool:
        """Return True once nothing of this is in flight."""

    @property
    def over(self) -> bool:
        """Return True if the pull waits for no slice any more."""

    @property
    def measures(self) -> bool:
        """Return True if the slices cross raw, and as fast as the transport takes them."""


class Staging:
    """The transport for an owner, and the staging buffers that it fills.

    It belongs to one agreement with the owner. `release` ends it before the next handshake.

    Args:
        device: of the buffers.
        rows: the device of the reader's rows.
        count: the number of buffers.
    """

    def __init__(
        self,
        transport: Transport,
        device: torch.device,
        rows: torch.device,
        count: int,
        channel: Channel,
        address: str,
    ) -> None:
        self.transport = transport
        self.device = device
        self._runtime = runtime()
        #: For requests for rows, and for the lane: it sends nothing after `release`.
        self.channel = TransportChannel(channel, self._ended)
        self._address = address
        #: Makes the error of what is in flight, or comes later, from `release` on.
        self._over: Callable[[str], PeerError] | None = None
        self._lock = threading.RLock()  # a connection that ends inside of `lane` calls `release`
        #: Of pulls that take slices at the same time, as many as there are buffers.
        self.places = Limit(self._runtime, count)
        #: Of pulls that request slices: buffers are filled in the order of the requests for them.
        self.turn = Limit(self._runtime)
        self.met: Lane | None = None  # the lane that the owner knows
        self.tag = 0  # of the last slice that was requested
        #: What takes slices of this owner now; see `staged_reader.StagedReceiver`.
        self.takers = set[Taker]()
        self.history = PullHistory()
        #: The free buffers; the last used is taken first. Steps change them.
        self.buffers = [StagingBuffer(staging(0, device), rows) for _ in range(count)]
        self._freed = Signal(self._runtime)

    def lane(self) -> Lane:
        """Return the lane to the owner; raise `PeerError` after `release`."""
        with self._lock:
            if ended := self._ended():
                raise ended
            lane: Lane = self.transport.lane(self._address, cast("Channel", self.channel))
            return lane

    async def has_free(self, until: float) -> bool:
        """Wait for a free buffer; return False if there is none at ``until``."""
        return await self._freed.wait_for(lambda: self.buffers, until)

    def give_back(self, buffer: StagingBuffer) -> None:
        """Let the next pull have a buffer. Any thread may call it."""
        with self._runtime.lock:
            self.buffers.append(buffer)
            self._freed.notify()

    def release(self, gone: bool = False) -> None:
        """End the agreement: its lane, and all messages that are not sent yet. Does not block.

        ``gone``: because the connection to the owner has ended.
        """
        with self._lock:
            self._over = self._over or (gone_peer if gone else released_peer)
            self.transport.forget(self._address, self._over(self._address))

    def _ended(self) -> PeerError | None:
        return None if self._over is None else self._over(self._address)

    def spare(self, nbytes: int) -> torch.Tensor:
        """Return memory for bytes that no pull wants."""
        return staging(nbytes, self.device)
