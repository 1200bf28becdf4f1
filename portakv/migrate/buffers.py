# SPDX-License-Identifier: Apache-2.0
"""The staging buffers of a reader for one owner whose memory is not mapped, and what earlier pulls
from that owner have measured."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from math import inf
from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeAlias, cast

import torch

from portakv.copy.choose_encoding import is_out_of_date
from portakv.copy.handle import BlockTransfer
from portakv.errors import PeerError
from portakv.migrate.messages import Box
from portakv.migrate.staging import Chunks, has_ended, staging
from portakv.migrate.transport_channel import TransportChannel
from portakv.migrate.transports.base import Lane, Moving, Transport, gone_peer, released_peer
from portakv.runtime.bounded import Bounded
from portakv.tasks import Limit, Signal, runtime

if TYPE_CHECKING:
    from portakv.migrate.channel import Channel


# ------------------------------------------------------------------------------------------------
# Figures of earlier pulls from an owner: the rate of its transport, and how many blocks did not fit
# into slots.

#: Bytes that cross packed until the rate counts as unknown, so that the next pull measures it.
AGAIN = 8 << 30
#: A smaller or a shorter pull measures no rate: requests have a larger share of its time.
LEAST_NBYTES = 16 << 20
LEAST_SECONDS = 5e-3
#: The rate is the highest of so many measured pulls: all that disturbs a pull, such as work that
#: was queued before it, makes the transport seem slower. If it seems too fast, rows cross raw.
RATES = 5
#: The most windows whose misfits are counted, as many as owners keep samples of.
MOST_KEPT = 1024

#: The group of rows, and their layers and heads: the rows that one sample of an owner is for.
Window: TypeAlias = tuple[int, Box]


class Start(NamedTuple):
    """The beginning of a pull that measures the rate: what had crossed before, and the time."""

    nbytes: int
    other_nbytes: int
    at: float


class PullHistory:
    """The figures of pulls from one owner, by one agreement on a transport.

    Several threads may call it without a lock: a count that is lost changes no row.
    """

    def __init__(self) -> None:
        self._nbytes = 0  # of all slices
        self._packed_nbytes = 0  # of packed slices
        self._other_nbytes = 0  # of slices that measure no rate: packed, or of a limited pull
        self._measured_at = 0  # of `_packed_nbytes`, when a rate was measured last
        self._rates = deque[float](maxlen=RATES)
        # The blocks that crossed packed since the last look at misfits, and how many did not fit.
        self._packed: Bounded[Window, tuple[int, int]] = Bounded("misfits of pulls", MOST_KEPT)

    @property
    def gbps(self) -> float:
        """Return the rate of raw rows, in 10^9 bytes a second; infinite if it is not known."""
        if self._packed_nbytes - self._measured_at >= AGAIN or not self._rates:
            return inf
        return max([*self._rates])

    def count(self, nbytes: int, limited: bool = False) -> None:
        """Count a raw slice of so many bytes that has crossed; ``limited``: its pull has a limited
        rate."""
        self._nbytes += nbytes
        if limited:
            self._other_nbytes += nbytes

    def count_packed(self, nbytes: int, window: Window, blocks: int, misfits: int) -> None:
        """Count a packed slice of so many bytes that has crossed, its blocks, and how many of these
        did not fit."""
        self._nbytes += nbytes
        self._other_nbytes += nbytes
        self._packed_nbytes += nbytes
        before, unfit = self._packed.get(window, (0, 0))
        self._packed[window] = before + blocks, unfit + misfits

    def begin(self) -> Start | None:
        """Return the beginning of a pull; None if nothing has crossed before, since both sides then
        connect first."""
        if not self._nbytes:
            return None
        return Start(self._nbytes, self._other_nbytes, perf_counter())

    def end(self, start: Start) -> None:
        """Add the rate of a pull whose slices have all crossed.

        Slices of other pulls count, since they share the transport. Nothing is added if some slices
        were packed meanwhile, or belong to a pull with a limited rate: packing or the limit may
        have been slower than the transport.
        """
        seconds = perf_counter() - start.at
        nbytes = self._nbytes - start.nbytes
        long_enough = seconds >= LEAST_SECONDS and nbytes >= LEAST_NBYTES
        if not long_enough or self._other_nbytes != start.other_nbytes:
            return
        self._rates.append(nbytes / seconds / 1e9)
        self._measured_at = self._packed_nbytes

    def needs_sample(self, window: Window) -> bool:
        """Return True, once, if too many of the latest packed blocks of a window did not fit."""
        answer = is_out_of_date(*self._packed.get(window, (0, 0)))
        if answer is not None:
            self._packed.pop(window, None)
        return bool(answer)


# ------------------------------------------------------------------------------------------------
# The buffers of one agreement with an owner.


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
        #: What takes slices of this owner now.
        self.takers = set[Taker]()
        self.history = PullHistory()
        #: The free buffers; the last used is taken first. Steps change them.
        self.buffers = [StagingBuffer(staging(0, device), rows) for _ in range(count)]
        #: Notified when a buffer becomes free.
        self.freed = Signal(self._runtime)

    def lane(self) -> Lane:
        """Return the lane to the owner; raise `PeerError` after `release`."""
        with self._lock:
            if ended := self._ended():
                raise ended
            lane: Lane = self.transport.lane(self._address, cast("Channel", self.channel))
            return lane

    def give_back(self, buffer: StagingBuffer) -> None:
        """Let the next pull have a buffer. Any thread may call it."""
        with self._runtime.lock:
            self.buffers.append(buffer)
            self.freed.notify()

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
