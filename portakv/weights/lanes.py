# SPDX-License-Identifier: Apache-2.0
"""Send weights through staging buffers to readers that cannot map them: the owner's side.

A lane belongs to one publication, and to one device of one reader. The reader requests slices, one
by one: boxes of the owner's tensors, which the owner packs into a staging buffer. A transport
carries the buffer, and the reader copies the boxes into its tensors. Both sides pass their buffers
in the order of the requests.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from math import prod
from typing import Union

import torch

from portakv.errors import LayoutError, PeerError
from portakv.migrate.channel import Channel, Peer
from portakv.migrate.messages import UNDECODABLE, Message, decoder_of
from portakv.migrate.staging import retain, staging
from portakv.migrate.transports import Transports
from portakv.migrate.transports.base import Moving, MovingStage, Transport
from portakv.runtime.devices import inside
from portakv.runtime.streams import StreamFence, ignoring_captures, own_stream
from portakv.tasks import Limit, TaskGroup, Work, runtime
from portakv.weights.messages import BUFFERS, Connect, Leave, OfLane, SendSlice
from portakv.weights.parameters import Cell, part_of
from portakv.weights.plan import copy_pairs, split
from portakv.weights.versions import Versioned

_HOST = torch.device("cpu")


# ------------------------------------------------------------------------------------------------
# The boxes of a slice.

MOST_BOX_BYTES = 48 << 10  # of the encoded boxes of a slice: a message has at most 64 KiB
_ALIGNED = 16  # bytes; each box begins at a multiple, as the widest dtype needs


def slices(
    cells: Sequence[Cell], itemsizes: Sequence[int], most: int
) -> list[tuple[list[Cell], int]]:
    """Return cells in slices, each with its packed bytes, which are at most ``most``; split larger
    cells. ``itemsizes``: the bytes of an element of each cell."""
    made = list[tuple[list[Cell], int]]()
    some = list[Cell]()
    nbytes = 0
    encoded = 0  # bytes of the encoded boxes, at most
    for cell, itemsize in zip(cells, itemsizes, strict=True):
        for part in split(cell, most // itemsize):
            extents = part.box.extents
            size = packed_bytes([prod(extents) * itemsize])
            message = 16 + 18 * len(extents)
            if some and (nbytes + size > most or encoded + message > MOST_BOX_BYTES):
                made.append((some, nbytes))
                some = []
                nbytes = 0
                encoded = 0
            some.append(part)
            nbytes += size
            encoded += message
    return [*made, (some, nbytes)]


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
        start += packed_bytes([count * dtype.itemsize])
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


# ------------------------------------------------------------------------------------------------
# Streams and buffers.


def follower(device: torch.device) -> torch.Stream:
    """Return a private stream that follows the current work of a device's current stream."""
    stream: torch.Stream = own_stream(device)
    stream.wait_stream(torch.accelerator.current_stream(device.index))
    return stream


@contextmanager
def on_streams(streams: Iterable[torch.Stream]) -> Iterator[None]:
    """Make streams current for this thread, while others may capture graphs."""
    with ExitStack() as stack:
        for stream in streams:
            stack.enter_context(ignoring_captures(stream.device))
            stack.enter_context(inside(stream.device))  # a context for a new thread
            stack.enter_context(inside(stream))
        yield


# ------------------------------------------------------------------------------------------------
# The owner's side.

_log = logging.getLogger(__name__)
#: The slices of weights that are large enough, and the bytes below which no slice is made smaller.
_SLICES = 8
_LEAST_ON_HOST = 8 << 20
_LEAST_ON_DEVICE = 64 << 20
_MOST_LANES = 16  # of one reader: it has one for each device
_LOOK = 0.5  # seconds between two looks at a buffer that is not free


class Lane:
    """A lane to one reader: its transport, and its staging buffers."""

    def __init__(
        self,
        channel: Channel,
        peer: Peer,
        transport: Transport,
        nbytes: int,
        tensors: Iterable[torch.device],
    ) -> None:
        self.peer = peer
        #: The peer of this lane alone, because a transport has one lane for a peer.
        self.key = Peer(peer.id)
        self.transport = transport
        self.tag = 0  # of the last slice that was requested
        self.packed = 0  # tag of the last slice that was packed
        self.why_broken = ""  # why a slice that was requested could not be sent
        self.turn = Limit(runtime())  # slices are sent in the order of their requests
        self.sent = dict[int, Moving]()  # by the number of the buffer
        device = transport.device
        accelerators = [each for each in tensors if each.type != "cpu"]
        with torch.inference_mode(False), StreamFence(device).inside():
            rows = min(accelerators, key=str, default=None)
            self.memory = staging(BUFFERS * nbytes, device, rows=rows)
            self.buffers = [*self.memory.view(BUFFERS, -1)]
            #: They follow the work of the memory's earlier users.
            self.streams = [
                follower(each) for each in {device, *accelerators} if each.type != "cpu"
            ]
        self.dirty = True  # the memory contains bytes of its earlier users
        self.lane = transport.lane(self.key, channel)
        self.unwatch: Callable[[], object] = lambda: None

    def clean(self) -> None:
        """Zero all memory before its first use, so that no earlier user's bytes are sent.

        A helper does so: a channel's thread must be quick. It zeros all buffers together, because
        a transport registers the whole allocation.
        """
        if self.dirty:
            self.memory.zero_()
            self.dirty = False


class Lanes:
    """The lanes of published weights to readers. Only the channel's thread calls it.

    Args:
        transport: the name of the only transport for readers; None: any.
        staging: the most bytes of the staging buffers of a reader.
        tasks: of the publication.

    Attributes:
        device: of all tensors, or the host if these are on several devices.
        buffer_bytes: of a staging buffer.
    """

    def __init__(
        self,
        channel: Channel,
        weights: Versioned,
        transport: str | None,
        staging: int,
        tasks: TaskGroup,
    ) -> None:
        tensors = [x.tensor for x in weights.parameters.values()]
        self._devices = {tensor.device for tensor in tensors}
        self.device = next(iter(self._devices)) if len(self._devices) == 1 else _HOST
        self.transports = Transports(transport, self.device)
        # Buffers are small enough that several slices are under way, and large enough that the
        # number of slices costs little.
        total = packed_bytes(tensor.nbytes for tensor in tensors)
        least = _LEAST_ON_HOST if self.device.type == "cpu" else _LEAST_ON_DEVICE
        wanted = min(total, max(least, total // _SLICES))
        pages = min(-(-wanted // 4096), staging // BUFFERS // 4096)
        self.buffer_bytes = max(1, pages) * 4096
        self._channel = channel
        self._weights = weights
        self._tasks = tasks
        self._turn = Limit(runtime())  # readers take turns, slice by slice
        self._lanes = dict[bytes, Lane]()

    def connect(self, peer: Peer, request: Connect) -> None:
        """Make a lane to a reader.

        Raises `BackendUnavailable` or `InvalidTerms` for a transport that does not run here.
        """
        forced = self.transports.forced
        if forced not in (None, request.transport):
            raise PeerError(
                f"Expected the owner's transport {forced!r}, got {request.transport!r}. "
                f"Pass both sides the same transport="
            )
        own = [one for one in [*self._lanes.values()] if one.peer is peer]
        if len(own) >= _MOST_LANES or request.lane in self._lanes:
            raise PeerError(f"Expected at most {_MOST_LANES} lanes of a reader, got another.")

        transport = self.transports.choose(request.transport, self.device, request.device)
        lane = Lane(self._channel, peer, transport, self.buffer_bytes, self._devices)
        self._lanes[request.lane] = lane
        lane.unwatch = peer.on_gone(partial(self._end, request.lane))

    def send(self, peer: Peer, request: SendSlice) -> None:
        """Have a helper pack and send a slice, once its buffer is free.

        Raises `PeerError` for a lane that cannot send it.
        """
        lane = self._lane(peer, request.lane)
        if lane.lane.gone is not None or lane.why_broken:
            raise PeerError(lane.why_broken or str(lane.lane.gone))
        in_turn = request.tag == lane.tag + 1 <= lane.packed + BUFFERS
        if not in_turn or not 0 < request.nbytes <= self.buffer_bytes:
            raise PeerError(
                f"Expected slice {lane.tag + 1} of at most {self.buffer_bytes} bytes, got slice "
                f"{request.tag} of {request.nbytes}. Connect again."
            )
        lane.tag = request.tag
        self._tasks.start(self._send(lane, request))

    async def _send(self, lane: Lane, request: SendSlice) -> None:
        """Pack and send a slice, after those that the reader requested before."""
        await lane.turn.acquire()
        try:
            before = lane.sent.get(request.tag % BUFFERS)
            while before is not None and lane.lane.gone is None:
                if await before.seen(MovingStage.FREE, _LOOK):
                    break
            await self._turn.work(self._pack, lane, request)
        except Exception:  # such as an error of the device: the reader waits for these bytes
            _log.exception("A staging buffer could not be sent; its reader gets an error.")
            gone = PeerError("The owner could not send a buffer; it did not cross.")
            await Work(lane.lane.close, gone)
        finally:
            lane.turn.release()

    def _pack(self, lane: Lane, request: SendSlice) -> None:
        """Pack a slice into its buffer, and send it.

        The reader waits for the bytes, so they are sent as zeros if the slice cannot be packed. The
        pull then fails by its checksums or because the publication has ended, and the lane sends no
        further slice.
        """
        number = request.tag % BUFFERS
        full = lane.buffers[number][: request.nbytes]
        with torch.inference_mode(False), on_streams(lane.streams):
            retain(full)
            try:
                lane.clean()
                tensors = self._weights.numbered(number for number, *_ in request.boxes)
                boxes = zip(tensors, request.boxes, strict=True)
                pack(full, [part_of(tensor, *box) for tensor, (_, *box) in boxes])
            except Exception as error:  # whatever failed, the reader must not wait for its bytes
                _log.exception("Weights could not be packed; their reader gets an error.")
                lane.why_broken = f"The owner could not pack a slice: {error}"
                full.zero_()
            lane.packed = request.tag  # before the reader can have it, and requests another
            lane.sent[number] = lane.lane.move(full, request.tag)

    def carry(self, peer: Peer, request: OfLane) -> Message | None:
        """Answer a message of a reader's transport by the transport here."""
        lane = self._lane(peer, request.lane)
        transport = lane.transport
        try:
            message = decoder_of(Union[tuple(transport.asks)]).decode(request.body)  # noqa: UP007
        except UNDECODABLE:
            raise PeerError(
                f"Expected a message of the transport {transport.name}, got another. Use one "
                f"release on both sides."
            ) from None
        return transport.answer(lane.key, self._channel, message)

    def leave(self, peer: Peer, request: Leave) -> None:
        """Release a lane that its reader has left."""
        with suppress(PeerError):  # it has ended
            self._lane(peer, request.lane)
            self._end(request.lane)

    def _lane(self, peer: Peer, id: bytes) -> Lane:
        """Return a lane of a reader."""
        lane = self._lanes.get(id)
        if lane is None or lane.peer is not peer:
            raise PeerError("Expected a lane of this connection, got another. Connect again.")
        return lane

    def _end(self, id: bytes) -> None:
        """End the slices in flight of a lane, and release its staging buffers; quick."""
        lane = self._lanes.pop(id, None)
        if lane is not None:
            lane.unwatch()
            lane.key.end()

    def close(self) -> None:
        """Release all lanes, and close the transports. Any thread may call it."""
        for id in [*self._lanes]:
            self._end(id)
        self.transports.close()

    def statistics(self) -> dict[str, int]:
        """Return the number of lanes, and the bytes of all their staging buffers."""
        lanes = len(self._lanes)
        return {"lanes": lanes, "staging": lanes * BUFFERS * self.buffer_bytes}
