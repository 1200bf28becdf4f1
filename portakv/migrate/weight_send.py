# SPDX-License-Identifier: Apache-2.0
"""The owner's side of pulls of weights through staging buffers.

A worker packs slices of published tensors into the staging buffers of a lane, and a transport sends
them.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Union

import torch

from portakv.errors import LayoutError, PeerError, TransferError
from portakv.graph.graph import Graph
from portakv.graph.task import Task
from portakv.migrate.channel import Channel, Peer
from portakv.migrate.ipc import where
from portakv.migrate.messages import UNDECODABLE, Message, decoder_of
from portakv.migrate.parameters import Parameter, part_of
from portakv.migrate.staging import staging
from portakv.migrate.transports import check_transport, choose, forced
from portakv.migrate.transports.base import Moving, Transport
from portakv.migrate.weight_lanes import (
    BUFFERS,
    Connect,
    Connected,
    Leave,
    OfLane,
    SendSlice,
    pack,
    packed_bytes,
)
from portakv.runtime.streams import StreamFence

_log = logging.getLogger(__name__)
_HOST = torch.device("cpu")
#: The slices of weights that are large enough, and the bytes below which no slice is made smaller.
_SLICES = 8
_LEAST_ON_HOST = 8 << 20
_LEAST_ON_DEVICE = 64 << 20
_MOST_LANES = 16  # of one reader: it has one for each device
LEAST = BUFFERS << 12  # bytes of the staging of a lane
_PUBLICATION = "a publication"  # a channel has the lanes of one

Devices = frozenset[torch.device]


class _Buffer:
    """A staging buffer of a lane. ``free``: its last slice has crossed, so it may be packed."""

    def __init__(self, memory: torch.Tensor) -> None:
        self.memory = memory
        self.free = True

    def release(self) -> None:
        """Let the buffer be packed again."""
        self.free = True


class Lane:
    """A lane to one reader: its transport, and its staging buffers."""

    def __init__(
        self, channel: Channel, peer: Peer, transport: Transport, nbytes: int, tensors: Devices
    ) -> None:
        self.peer = peer
        #: The peer of this lane alone, because a transport has one lane for a peer.
        self.key = Peer(peer.id)
        self.transport = transport
        self.decoder = decoder_of(Union[tuple(transport.asks)])  # noqa: UP007
        self.tag = 0  # of the last slice that was requested
        self.why_broken = ""  # why a slice that was requested could not be sent
        device = transport.device
        with torch.inference_mode(False), StreamFence(device).inside():
            self.memory = staging(BUFFERS * nbytes, device, rows=_on_device(tensors))
            self.buffers = [_Buffer(part) for part in self.memory.view(BUFFERS, -1)]
            #: What the worker's streams follow: the work of the memory's earlier users.
            self.fences = [StreamFence(each) for each in {device, *tensors}]
        self.dirty = True  # the memory contains bytes of its earlier users
        self.lane = transport.lane(self.key, channel)
        self.unwatch: Callable[[], object] = lambda: None

    def clean(self) -> None:
        """Zero all memory before its first use, so that no earlier user's bytes are sent.

        The worker does so: a channel's thread must be quick. It zeros all buffers together, because
        a transport registers the whole allocation.
        """
        if self.dirty:
            self.memory.zero_()
            self.dirty = False

    def end(self) -> None:
        """End the slices in flight, and release the transport's lane."""
        self.unwatch()
        self.key.end()


def _on_device(tensors: Devices) -> torch.device | None:
    """Return a device of tensors that are not on the host; None if all are there."""
    return min((each for each in tensors if each.type != "cpu"), key=str, default=None)


def _buffer_bytes(total: int, most: int, device: torch.device) -> int:
    """Return the bytes of a staging buffer for weights of ``total`` bytes.

    Buffers are small enough that several slices are under way, and large enough that the number of
    slices costs little.
    """
    least = _LEAST_ON_HOST if device.type == "cpu" else _LEAST_ON_DEVICE
    wanted = min(total, max(least, total // _SLICES))
    return max(4096, min(-(-wanted // 4096), most // 4096) * 4096)


class Senders:
    """The lanes of an owner of weights to its readers. No call of a channel blocks.

    ``parameters`` loses its tensors when the publication is closed.
    """

    def __init__(
        self,
        channel: Channel,
        graph: Graph,
        parameters: Mapping[str, Parameter],
        nbytes: int,
        transport: str | None,
    ) -> None:
        self._channel = channel
        self._parameters = parameters
        self._tensors: Devices = frozenset(x.tensor.device for x in parameters.values())
        #: The device of all tensors, or the host.
        self.device = next(iter(self._tensors)) if len(self._tensors) == 1 else _HOST
        check_transport(transport, self.device)
        self._transport = forced(transport)
        total = packed_bytes(x.tensor.nbytes for x in parameters.values())
        self.buffer_bytes = _buffer_bytes(total, nbytes // BUFFERS, self.device)
        self._transports = dict[str, Transport]()  # by name and device
        self._lanes = dict[bytes, Lane]()
        self._lock = threading.Lock()
        # One worker: readers take turns, slice by slice.
        self._queue = graph.queue("send")

    def serve(self) -> None:
        """Answer on the channel the messages of lanes that no other object answers.

        Ends the lanes of the publication before, which the channel no longer serves.
        """
        self._channel.serve(OfLane, self._carry)
        self._channel.serve(Leave, self._leave)
        before = self._channel.replace(_PUBLICATION, self)
        if isinstance(before, Senders):
            before.close()

    @property
    def staged_bytes(self) -> int:
        """Return the bytes of all staging buffers."""
        return len(self._lanes) * BUFFERS * self.buffer_bytes

    @property
    def count(self) -> int:
        """Return the number of lanes."""
        return len(self._lanes)

    def connect(self, peer: Peer, request: Connect) -> Connected:
        """Make a lane to a reader, or describe what a lane would be made of.

        Raises `BackendUnavailable` or `InvalidTerms` for a transport that does not run here.
        """
        if not request.transport:
            return Connected(self._transport or "", where(self.device))
        device = self.device
        if request.device.partition(" ")[0] != device.type:
            device = _HOST
        if self._transport not in (None, request.transport):
            raise PeerError(
                f"Expected the owner's transport {self._transport!r}, got {request.transport!r}. "
                f"Pass both sides the same transport="
            )
        with self._lock:
            own = [one for one in self._lanes.values() if one.peer is peer]
        if len(own) >= _MOST_LANES or request.lane in self._lanes:
            raise PeerError(f"Expected at most {_MOST_LANES} lanes of a reader, got another.")

        name = f"{request.transport} {device}"
        transport = self._transports.get(name) or choose(device, request.transport)
        self._transports[name] = transport
        lane = Lane(self._channel, peer, transport, self.buffer_bytes, self._tensors)
        with self._lock:
            self._lanes[request.lane] = lane
        lane.unwatch = peer.on_gone(partial(self._end, request.lane))
        return Connected(transport.name, where(device), self.buffer_bytes)

    def send(self, peer: Peer, request: SendSlice) -> bool:
        """Have the worker pack and send a slice; return False if its buffer is not free yet.

        Raises `PeerError` for a lane that cannot send it.
        """
        lane = self._lane(peer, request.lane)
        if lane.lane.gone is not None or lane.why_broken:
            raise PeerError(lane.why_broken or str(lane.lane.gone))
        if request.tag != lane.tag + 1 or not 0 < request.nbytes <= self.buffer_bytes:
            raise PeerError(
                f"Expected slice {lane.tag + 1} of at most {self.buffer_bytes} bytes, got slice "
                f"{request.tag} of {request.nbytes}. Connect again."
            )
        buffer = lane.buffers[request.tag % BUFFERS]
        if not buffer.free:
            return False
        buffer.free = False
        lane.tag = request.tag
        task = Task(partial(self._send, lane, buffer, request), 1, queue=self._queue, name="send")
        self._queue.graph.submit([task], priority="urgent")
        return True

    def _lane(self, peer: Peer, id: bytes) -> Lane:
        """Return a lane of a reader."""
        lane = self._lanes.get(id)
        if lane is None or lane.peer is not peer:
            raise PeerError("Expected a lane of this connection, got another. Connect again.")
        return lane

    def _carry(self, peer: Peer, request: OfLane) -> Message | None:
        """Answer a message of a reader's transport by the transport here."""
        lane = self._lane(peer, request.lane)
        try:
            message = lane.decoder.decode(request.body)
        except UNDECODABLE:
            raise PeerError(
                f"Expected a message of the transport {lane.transport.name}, got another. Use one "
                f"release on both sides."
            ) from None
        return lane.transport.answer(lane.key, self._channel, message)

    def _leave(self, peer: Peer, request: Leave) -> None:
        """Release a lane that its reader has left."""
        lane = self._lanes.get(request.lane)
        if lane is not None and lane.peer is peer:
            self._end(request.lane)

    def _end(self, id: bytes) -> None:
        """Release a lane and its staging buffers; quick."""
        with self._lock:
            lane = self._lanes.pop(id, None)
        if lane is not None:
            lane.end()

    def close(self) -> None:
        """Release all lanes, and close the transports."""
        self._channel.free(_PUBLICATION, self)
        for id in [*self._lanes]:
            self._end(id)
        for transport in self._transports.values():
            transport.close()
        self._transports.clear()

    # --- in the worker

    def _send(self, lane: Lane, buffer: _Buffer, request: SendSlice, *_: object) -> None:
        """Pack a slice into its buffer, and send it.

        The reader waits for the bytes, so they are sent as zeros if the slice cannot be packed. The
        pull then fails by its checksums or because the publication has ended, and the lane sends no
        further slice.
        """
        full = buffer.memory[: request.nbytes]
        with torch.inference_mode(False), ExitStack() as streams:
            for fence in lane.fences:
                streams.enter_context(fence.inside())
            if full.device.type != "cpu":
                current = torch.accelerator.current_stream(full.device.index)
                full.record_stream(current)
            try:
                lane.clean()
                pack(full, self._parts(request))
            except Exception as error:  # whatever failed, the reader must not wait for its bytes
                _log.exception("Weights could not be packed; their reader gets an error.")
                lane.why_broken = f"The owner could not pack a slice: {error}"
                full.zero_()
            self._move(lane, buffer, full, request.tag)

    def _move(self, lane: Lane, buffer: _Buffer, full: torch.Tensor, tag: int) -> None:
        """Have the transport send a full buffer, which is free when it has crossed."""
        try:
            moving: Moving = lane.lane.move(full, tag)
        except Exception:  # such as an error of the device: the reader waits for these bytes
            _log.exception("A staging buffer could not be sent; its reader gets an error.")
            lane.lane.close(PeerError("The owner could not send a buffer; it did not cross."))
            return
        moving.on_free(buffer.release)

    def _parts(self, request: SendSlice) -> list[torch.Tensor]:
        """Return the boxes of a request; raise `LayoutError` for boxes that do not exist."""
        tensors = [x.tensor for x in [*self._parameters.values()]]
        if not tensors:
            raise TransferError("The publication was closed. Request a new ticket.")
        if any(number >= len(tensors) for number, *_ in request.boxes):
            raise LayoutError(f"Expected numbers below {len(tensors)}, got others. Pull again.")
        return [part_of(tensors[number], start, n) for number, start, n in request.boxes]
