# SPDX-License-Identifier: Apache-2.0
"""Publish a model's weights, and send them; a reader's connections to owners of weights."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from hashlib import blake2b
from secrets import token_bytes
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    TypeVar,
    Union,
    cast,
    get_args,
)

import torch
from msgspec import Meta, msgpack

from portakv.arguments import instance, invalid, nbytes, one_of
from portakv.errors import (
    BackendUnavailable,
    LayoutError,
    OfferGone,
    PeerError,
    PortaKVError,
    TransferError,
    TransferTimeout,
    Unsupported,
)
from portakv.migrate.channel import Channel, Peer
from portakv.migrate.described import strided
from portakv.migrate.figures import Figures, published_figures
from portakv.migrate.messages import (
    UNDECODABLE,
    Bytes,
    Count,
    Dims,
    Handle,
    Id,
    Message,
    Name,
    Refused,
    Text,
    decoder_of,
    prepare,
    sealed,
    unsealed,
)
from portakv.migrate.shared_memory import Held, Opener, where
from portakv.migrate.staging import staging
from portakv.migrate.transport_channel import TransportChannel
from portakv.migrate.transports import check_transport, choose, forced
from portakv.migrate.transports.base import Lane as TransportLane
from portakv.migrate.transports.base import Moving, Transport
from portakv.runtime.bounded import Bounded
from portakv.runtime.devices import inside
from portakv.runtime.interrupts import uninterrupted
from portakv.runtime.streams import StreamFence, ignoring_captures, own_stream
from portakv.tasks import Limit, TaskGroup, Wait, Work, runtime
from portakv.tasks.runtime import EXIT
from portakv.weights.parameters import (
    Box,
    Cell,
    Item,
    Parameters,
    export_items,
    items_of,
    named,
    part_of,
)
from portakv.weights.plan import Plan, WantedSums, copy_pairs
from portakv.weights.versions import Checksums, Update, Versioned

if TYPE_CHECKING:
    from portakv.migrate.channel import Channel


# ------------------------------------------------------------------------------------------------
# The messages by which an owner sends weights through staging buffers, and the slices it sends.

BUFFERS = 4  # of a lane, on each side: one is packed, two are on the wire, one is emptied
MOST_BOXES_OF_SLICE = 1024  # of a slice
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
        tuple[tuple[Count, Dims, Dims], ...], Meta(min_length=1, max_length=MOST_BOXES_OF_SLICE)
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


prepare(globals())


# ------------------------------------------------------------------------------------------------
# The owner's side of pulls of weights through staging buffers.

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
            self.buffers = [*self.memory.view(BUFFERS, -1)]
            #: They follow the work of the memory's earlier users.
            self.streams = [follower(each) for each in {device, *tensors} if each.type != "cpu"]
        self.full = set[int]()  # numbers of buffers whose last slice has not crossed
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


# ------------------------------------------------------------------------------------------------
# Publish a model's weights for other processes, and answer their requests.

T = TypeVar("T")
_PAGE = 40 << 10  # bytes of items, or of regions, in an answer
MOST_ITEMS = 1 << 18  # of a publisher
MOST_BOXES = 256  # of one request
MOST_SUMS = 1 << 14  # of one answer
STAGING = 256 << 20  # bytes of the staging buffers of one reader
Expose = Literal["mapped", "staging"]


class WeightsTicket(Message, frozen=True):
    """The address of published weights, and their id."""

    address: Text
    id: Id


class AskWeights(Message, frozen=True):
    """Request items, regions or checksums of items, each from number ``first`` on.

    With ``boxes``: the checksums of these boxes of numbered items, as they lie at the owner.
    ``begin``: a pull begins, so an update must not be in progress; checksums that are not computed
    yet are left out. ``again``: the owner's checksums are not the reader's, so the owner must not
    use them again.
    """

    purpose: ClassVar[str] = "Requesting weights of the process at"

    id: Id
    first: Count = 0
    boxes: Annotated[tuple[tuple[Count, Box], ...], Meta(max_length=MOST_BOXES)] = ()
    what: Literal["items", "regions", "sums"] = "items"
    begin: bool = False
    again: bool = False


class Weights(Message, frozen=True):
    """Some of the ``total`` items, regions or checksums. ``version`` changes with the weights.

    A region is memory that contains items; checksums are of all boxes of all items, in their order.
    ``replaced``: a parameter that no longer has the memory of its region.
    """

    state: Literal["held", "gone", "busy", "replaced"]
    total: Annotated[int, Meta(ge=0, le=1 << 28)] = 0
    items: tuple[tuple[Text, Item], ...] = ()
    sums: Annotated[tuple[int, ...], Meta(max_length=MOST_SUMS)] = ()
    version: Annotated[int, Meta(ge=0)] = 0
    regions: tuple[Handle, ...] = ()
    replaced: Text = ""


class Published:
    """The result of `publish`: ``ticket``, for any process that may pull, `update`, `changed`,
    `close`.

    Attributes:
        why_not_mapped: why readers cannot map the memory, so that it crosses by a transport; empty
            if readers of this host map it.
    """

    def __init__(
        self,
        channel: Channel,
        parameters: Parameters,
        *,
        staging: int = STAGING,
        expose: Expose = "mapped",
        transport: str | None = None,
    ) -> None:
        instance("channel", channel, Channel)
        staging = nbytes("staging", staging, LEAST)
        one_of("expose", expose, get_args(Expose))
        channel.check_open()
        tensors = named("parameters", parameters)
        if not tensors:
            raise invalid("parameters", "a mapping of one tensor or more", parameters)
        if len(tensors) > MOST_ITEMS:
            raise invalid("parameters", f"at most {MOST_ITEMS} tensors", len(tensors))
        items = items_of(tensors)
        self._weights = Versioned(tensors, items)
        self._id = secrets.token_bytes(16)
        self._runtime = runtime()
        self._tasks = TaskGroup(self._runtime, _log_failure)
        self._sending = Limit(self._runtime)  # readers take turns, slice by slice
        self._closed = False
        self._channel = channel
        self._devices: Devices = frozenset(x.tensor.device for x in tensors.values())
        # The device of all tensors, or the host.
        self._device = next(iter(self._devices)) if len(self._devices) == 1 else _HOST
        check_transport(transport, self._device)
        self._transport = forced(transport)
        total = packed_bytes(x.tensor.nbytes for x in tensors.values())
        self._buffer_bytes = _buffer_bytes(total, staging // BUFFERS, self._device)
        self._transports = dict[str, Transport]()  # by name and device
        self._lanes = dict[bytes, Lane]()
        self._synchronize()
        self._regions = list[Held]()
        self.why_not_mapped = ""
        try:
            self._export(expose)
        except Unsupported as error:
            self.why_not_mapped = str(error)
        self._sums = Checksums(self._weights, self._tasks)
        self.ticket = sealed(WeightsTicket(channel.address, self._id))
        uninterrupted(self._serve)

    def _serve(self) -> None:
        """Answer on the channel, and end the lanes of the publication before, which no longer
        answers."""
        self._sums.all(self._weights.version())  # a helper begins
        channel = self._channel
        channel.serve(AskWeights, self._answer)
        channel.serve(Connect, self._connect)
        channel.serve(SendSlice, self._send)
        channel.serve(OfLane, self._carry)
        channel.serve(Leave, self._leave)
        before = channel.replace(_PUBLICATION, self)
        if isinstance(before, Published):
            before._end_lanes()

    def _export(self, expose: Expose) -> None:
        """Let readers map the memory; raise `Unsupported` if they cannot."""
        if expose != "mapped":
            raise Unsupported("Mapping weights", "their owner exposes staging buffers alone")
        items = self._weights.items
        tensors = {name: x.tensor for name, x in self._weights.parameters.items()}
        self._regions, placed = export_items(tensors, items, "Publishing parameters")
        items.update(placed)

    @contextmanager
    def update(self) -> Iterator[None]:
        """Let this block change the weights; put each optimizer's step inside one.

        A pull that overlaps the block fails with `TransferError` and must be repeated. A pull that
        starts inside the block waits for its end. On a device the end of the block waits for the
        current stream: write on that stream.
        """
        token = Update()
        updates = self._weights.updates
        try:
            uninterrupted(partial(self._note_change, updates.add, token))
            yield
            self._synchronize()
        except BaseException:  # of the block: its writes may still run
            self._synchronize()
            raise
        finally:
            uninterrupted(partial(self._note_change, updates.discard, token))

    def _note_change(self, note: Callable[[Update], object], token: Update) -> None:
        """Note the begin or the end of an update: pulls wait for it, and those it overlaps fail."""
        with self._runtime.lock:
            note(token)
            self._weights.changes += 1

    def changed(self) -> None:
        """Report that weights have changed; pulls in progress fail with `TransferError`.

        Use `update` for a change of several tensors: a pull that ended before this call, during the
        change, has brought some old and some new values.
        """
        with self.update():
            pass

    def _synchronize(self) -> None:
        """Wait for the current stream of each device, which has written the weights."""
        tensors = [x.tensor for x in self._weights.parameters.values()]
        for device in {tensor.device for tensor in tensors if tensor.device.type != "cpu"}:
            torch.accelerator.current_stream(device.index).synchronize()

    def _is_gone(self, id: bytes) -> bool:
        """Return True for the id of another publication, and after `close`."""
        return id != self._id or self._closed

    def _answer(self, _: Peer, request: AskWeights) -> Weights:
        version = self._weights.version()
        first = request.first
        if self._is_gone(request.id):
            return Weights("gone")
        if request.again:
            self._sums.forget()
        items = self._weights.items
        sums = bool(request.boxes) or request.what == "sums"
        # Torch counts no replacement. The end of a pull decides; the request for checksums finds
        # most replacements earlier, while the reader's devices copy.
        if sums or first >= len(items):
            replaced = self._weights.replaced()
            if replaced is not None:
                return Weights("replaced", version=version, replaced=replaced)
        if request.begin and self._weights.updates:
            return Weights("busy", version=version)
        if request.begin:
            self._sums.all(version)  # a helper begins, unless they are there
        if sums:
            return self._answer_sums(request, version)
        if request.what == "regions":
            regions = [region.handle for region in self._regions[first:]]
            handles = tuple(_page(regions))
            return Weights("held", len(self._regions), regions=handles, version=version)
        page = tuple(_page([*items.items()][first:]))
        return Weights("held", len(items), page, version=version)

    def _connect(self, peer: Peer, request: Connect) -> Connected:
        """Make a lane to a reader, or describe what a lane would be made of.

        Raises `BackendUnavailable` or `InvalidTerms` for a transport that does not run here.
        """
        if self._is_gone(request.id):
            return Connected(gone=True)
        why = self.why_not_mapped[:1024]
        device = self._device
        if not request.transport:
            return Connected(self._transport or "", where(device), why=why)
        if request.device.partition(" ")[0] != device.type:
            device = _HOST
        if self._transport not in (None, request.transport):
            raise PeerError(
                f"Expected the owner's transport {self._transport!r}, got {request.transport!r}. "
                f"Pass both sides the same transport="
            )
        own = [one for one in [*self._lanes.values()] if one.peer is peer]
        if len(own) >= _MOST_LANES or request.lane in self._lanes:
            raise PeerError(f"Expected at most {_MOST_LANES} lanes of a reader, got another.")

        name = f"{request.transport} {device}"
        transport = self._transports.get(name) or choose(device, request.transport)
        self._transports[name] = transport
        lane = Lane(self._channel, peer, transport, self._buffer_bytes, self._devices)
        self._lanes[request.lane] = lane
        lane.unwatch = peer.on_gone(partial(self._end_lane, request.lane))
        return Connected(transport.name, where(device), self._buffer_bytes, why=why)

    def _send(self, peer: Peer, request: SendSlice) -> Weights:
        """Have a helper pack and send a slice, unless its buffer is not free yet.

        Raises `PeerError` for a lane that cannot send it.
        """
        if self._is_gone(request.id):
            return Weights("gone")
        lane = self._lane(peer, request.lane)
        if lane.lane.gone is not None or lane.why_broken:
            raise PeerError(lane.why_broken or str(lane.lane.gone))
        if request.tag != lane.tag + 1 or not 0 < request.nbytes <= self._buffer_bytes:
            raise PeerError(
                f"Expected slice {lane.tag + 1} of at most {self._buffer_bytes} bytes, got slice "
                f"{request.tag} of {request.nbytes}. Connect again."
            )
        version = self._weights.version()
        buffer = request.tag % BUFFERS
        if buffer in lane.full:
            return Weights("busy", version=version)
        lane.full.add(buffer)
        lane.tag = request.tag
        self._tasks.start(self._send_in_turn(lane, request))
        return Weights("held", version=version)

    async def _send_in_turn(self, lane: Lane, request: SendSlice) -> None:
        await self._sending.acquire()
        try:
            await Work(self._pack, lane, request)
        finally:
            self._sending.release()

    def statistics(self) -> dict[str, int]:
        """Return the lanes to readers that do not map the memory (``lanes``), and the bytes of all
        their staging buffers here (``staging``)."""
        lanes = len(self._lanes)
        return {"lanes": lanes, "staging": lanes * BUFFERS * self._buffer_bytes}

    def figures(self) -> Figures:
        """Return figures by the names of metrics, in the form of `Graph.statistics`."""
        return published_figures(self.statistics())

    def _answer_sums(self, request: AskWeights, version: int) -> Weights:
        whole = not request.boxes
        sums = self._sums.all(version) if whole else self._sums.of(request.boxes, version)
        if sums is None:
            # A pull that begins copies meanwhile, and requests the checksums later.
            return Weights("held" if request.begin else "busy", version=version)
        if not whole:
            return Weights("held", sums=tuple(sums), version=version)
        some = tuple(sums[request.first : request.first + MOST_SUMS])
        return Weights("held", len(sums), sums=some, version=version)

    def close(self) -> None:
        """Release the tensors; pulls in progress get `OfferGone`.

        Readers that mapped the memory release it at their next pull, or when the connection ends.
        """
        uninterrupted(self._close)

    def _close(self) -> None:
        self._closed = True
        if not self._runtime.forked:
            ended = self._runtime.start(self._tasks.close())
            with suppress(TransferTimeout):  # work hangs
                ended.wait(0.0 if self._runtime.runs_here else EXIT)
        self._end_lanes()
        for region in self._regions:
            region.close()
        self._weights.parameters.clear()

    # --- the lanes

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
            self._end_lane(request.lane)

    def _end_lane(self, id: bytes) -> None:
        """Release a lane and its staging buffers; quick."""
        lane = self._lanes.pop(id, None)
        if lane is not None:
            lane.end()

    def _end_lanes(self) -> None:
        """Release all lanes, and close the transports."""
        self._channel.free(_PUBLICATION, self)
        for id in [*self._lanes]:
            self._end_lane(id)
        for transport in self._transports.values():
            transport.close()
        self._transports.clear()

    # --- in a helper

    def _pack(self, lane: Lane, request: SendSlice) -> None:
        """Pack a slice into its buffer, and send it.

        The reader waits for the bytes, so they are sent as zeros if the slice cannot be packed. The
        pull then fails by its checksums or because the publication has ended, and the lane sends no
        further slice.
        """
        buffer = request.tag % BUFFERS
        full = lane.buffers[buffer][: request.nbytes]
        with torch.inference_mode(False), on_streams(lane.streams):
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
            try:
                moving: Moving = lane.lane.move(full, request.tag)
            except Exception:  # such as an error of the device: the reader waits for these bytes
                _log.exception("A staging buffer could not be sent; its reader gets an error.")
                lane.lane.close(PeerError("The owner could not send a buffer; it did not cross."))
                return
            moving.on(moving.free, partial(lane.full.discard, buffer))

    def _parts(self, request: SendSlice) -> list[torch.Tensor]:
        """Return the boxes of a request; raise `LayoutError` for boxes that do not exist."""
        if not self._weights.parameters:
            raise TransferError("The publication was closed. Request a new ticket.")
        tensors = self._weights.numbered([number for number, *_ in request.boxes])
        boxes = zip(tensors, request.boxes, strict=True)
        return [part_of(tensor, start, extents) for tensor, (_, start, extents) in boxes]


def _log_failure(error: BaseException) -> None:
    """Log the error of a coroutine of a publication."""
    _log.error("A publication failed at a request, and goes on.", exc_info=error)


def _page(some: Sequence[T]) -> Iterator[T]:
    """Yield the first objects of about `_PAGE` bytes, at least one."""
    left = _PAGE
    for number, each in enumerate(some):
        left -= len(msgpack.encode(each))
        if left < 0 and number:
            return
        yield each


def publish(
    channel: Channel,
    parameters: Parameters,
    *,
    staging: int = STAGING,
    expose: Expose = "mapped",
    transport: str | None = None,
) -> Published:
    """Let other processes pull these tensors, until `Published.close`.

    A channel publishes the parameters of the last call. Change them inside ``with
    published.update():`` only, else a pull may mix old and new values without an error. After a
    tensor gets other memory (``tensor.data = ...``), pulls fail with `PeerError` until the next
    call. Readers of this host map the memory, with the whole allocation around it; other readers
    get the weights by a transport. Readers map host memory only if it was shared before
    (``tensor.share_memory_()``); `Published.why_not_mapped` says why they do not.

    A helper thread computes the checksums of all tensors now, and again when a pull begins after a
    change.

    Args:
        staging: the most bytes of the staging buffers of one reader that does not map, on either
            side. Both sides have them from its first pull until its connection ends.
        expose: "mapped": readers on this host may map the memory, to be read and written;
            "staging": all readers get copies by a transport.
        transport: the name of the transport for readers that do not map; None: the reader's.

    Raises `InvalidTerms` and `LayoutError` for arguments other than a mapping of names to plain
    tensors, and `BackendUnavailable` for a ``transport`` that does not run here.
    """
    return Published(channel, parameters, staging=staging, expose=expose, transport=transport)


prepare(globals())


# ------------------------------------------------------------------------------------------------
# A reader's lane to an owner that sends weights: the transport, and the staging buffers here.

PAUSE = 5e-4  # seconds before the first repeat of a request to a busy owner
_FAREWELL = 0.5  # seconds for the last message of a lane
_LEAST = 4096  # bytes of a staging buffer, which the owner chooses
_MOST = 1 << 36


class Terms(NamedTuple):
    """What a pull needs a lane for.

    Attributes:
        device: of the reader's tensors.
        transport: the name of the transport that the reader forces.
        why: why the owner's memory is not mapped.
    """

    device: torch.device
    transport: str | None
    why: str


class Receiver:
    """A lane by which one owner sends weights, and the staging buffers that it fills.

    Attributes:
        turn: one pull at a time uses the lane.
        gone: the lane was released, so another pull needs another.
        tag: of the last slice that the owner has accepted.
        why: why the memory is not mapped, and why this transport was chosen.
    """

    transport: Transport
    lane: TransportLane
    buffer_bytes: int
    buffers: list[torch.Tensor]

    def __init__(self, owner: Owner) -> None:
        self.id = token_bytes(16)
        self.turn = Limit(runtime())
        self.gone = False
        self.tag = 0
        self.why = ""
        self._owner = owner.address
        self._channel = owner.channel

    async def connect(self, owner: Owner, terms: Terms) -> None:
        """Agree on a transport with the owner, and on the lane."""
        described = await owner.connect(Connect(owner.id, bytes(16)))
        device: torch.device = await owner.work(self._choose, described, terms)
        self.why = f"{described.why or terms.why} ({self.transport.why})"
        try:
            request = Connect(owner.id, self.id, self.transport.name, where(device))
            answer = await owner.connect(request)
            self.buffer_bytes = _checked(answer, request, owner.address)
            await owner.work(self._meet, owner, device, terms)
        except BaseException:  # also a cancellation: no caller has the lane
            await Work(self.release)
            raise

    def _choose(self, described: Connected, terms: Terms) -> torch.device:
        """Choose the transport, and return the device of its buffers."""
        device = terms.device
        # Another device of the same type: NCCL does not serve two processes on one.
        same = described.device.partition(" ")[0] == device.type
        if not same or described.device == where(device):
            device = _HOST
        name = forced(terms.transport) or described.transport or None
        try:
            self.transport = choose(device, name)
        except BackendUnavailable:
            device = _HOST
            self.transport = choose(device, name)
        return device

    def _meet(self, owner: Owner, device: torch.device, terms: Terms) -> None:
        """Make the lane, and the staging buffers."""
        channel = cast("Channel", LaneChannel(owner.channel, self.id))
        self.lane = self.transport.lane(owner.address, channel)
        self.lane.meet(stop=lambda: owner.left <= 0.0)
        self.buffers = _buffers(self.buffer_bytes, device, terms.device)

    @property
    def usable(self) -> bool:
        """Return True if a pull may use the lane."""
        return not self.gone and self.lane.gone is None

    def release(self) -> None:
        """Release the lane on both sides; its slices in flight end with an error."""
        if not self.gone:
            self.drop()
            with suppress(PortaKVError):  # the owner may be gone
                self._channel.tell(self._owner, Leave(self.id), _FAREWELL)

    def drop(self) -> None:
        """Release the lane here; quick, for the thread that notices the end of a connection."""
        self.gone = True
        self.transport.close(0.0)


def _checked(answer: Connected, request: Connect, address: str) -> int:
    """Return the bytes of a staging buffer; raise `PeerError` for an answer that differs."""
    if answer.transport != request.transport or not _LEAST <= answer.buffer_bytes <= _MOST:
        raise PeerError(
            f"Expected staging buffers of {_LEAST} to {_MOST} bytes by {request.transport} from "
            f"{address}, got {answer.buffer_bytes} by {answer.transport or 'none'}. Pull from "
            f"another owner."
        )
    return answer.buffer_bytes


def _buffers(nbytes: int, device: torch.device, tensors: torch.device) -> list[torch.Tensor]:
    """Return the staging buffers of a lane on a device, uint8 ``[nbytes]`` each, for any stream.

    ``tensors``: the device of the reader's tensors.
    """
    # In inference mode, buffers would be views without a common base, which transports register.
    with torch.inference_mode(False), StreamFence(device).inside():
        memory = staging(BUFFERS * nbytes, device, rows=tensors)
        if device.type != "cpu":  # the work of earlier users of the memory
            torch.accelerator.current_stream(device.index).synchronize()
        return [*memory.view(BUFFERS, -1)]


MOST_LISTING = 256 << 20  # the most bytes of an owner's list


class Publication:
    """What this process knows of an owner's weights, and the owner's memory that it has opened."""

    def __init__(self, address: str, items: dict[str, Item], handles: list[bytes]) -> None:
        self.address = address
        self.items = items
        self.unwatch: Callable[[], object] = lambda: None
        #: Equal for publications that differ at most in their handles.
        self.digest = blake2b(msgpack.encode([*items.items()]), digest_size=16).digest()
        self.numbers = {name: number for number, name in enumerate(items)}
        #: The numbers of whole boxes, in the order in which the owner lists their checksums.
        self.boxes = dict[tuple[str, Box], int]()
        for name, item in items.items():
            for box in item.boxes:
                self.boxes.setdefault((name, box), len(self.boxes))
        self._handles = handles
        self._regions = dict[tuple[int, torch.device], torch.Tensor]()
        #: A pull compared checksums of whole boxes, so the next may.
        self.compares_whole = False
        # By plan, and the owner's number in it. A plan is of tensors of one description.
        self.sources = Bounded[tuple[Plan, int], list[torch.Tensor]]("sources of weights", 8)
        self._connecting = Limit(runtime())
        #: By the device of the reader's tensors, and the transport that the reader forces.
        self._receivers = dict[tuple[torch.device, str | None], Receiver]()

    def open(
        self, plan: Plan, number: int, tensors: Mapping[str, torch.Tensor]
    ) -> list[torch.Tensor]:
        """Return the sources of an owner's cells of a plan, in memory that is opened if necessary.

        ``tensors``: the reader's, by name. Raises `PeerError` for a place outside of the owner's
        regions, and `Unsupported` if the memory cannot be mapped.
        """
        openers = dict[torch.device, Opener]()
        cells = [plan.cells[n] for n in plan.numbers[number]]
        opened = [self._source(cell, tensors[cell.name], openers) for cell in cells]
        return self.sources.setdefault((plan, number), opened)

    def _source(
        self, cell: Cell, like: torch.Tensor, openers: dict[torch.device, Opener]
    ) -> torch.Tensor:
        """Return the source of a cell for a device of this process."""
        item = self.items[cell.name]
        if item.place is None and not self._handles:
            why = "their owner does not export its memory"
            raise Unsupported("Opening the weights", f"{why}; use a transport")
        if item.place is None or item.place[0] >= len(self._handles):
            raise self._wrong(cell.name)
        (number, offset) = item.place
        region = self._regions.get((number, like.device))
        if region is None:
            if like.device not in openers:
                openers[like.device] = Opener(like.device, descriptors=False)
            region = openers[like.device].open(self._handles[number])
            if region.dtype != torch.uint8 or region.ndim != 1:
                raise self._wrong(cell.name)
            self._regions[number, like.device] = region
        try:
            tensor = strided(region, offset, like.dtype, item.local, item.strides)
            return part_of(tensor, cell.src, cell.box.extents)
        except (LayoutError, RuntimeError):
            raise self._wrong(cell.name) from None

    def wanted_sums(self, cells: Iterable[Cell]) -> WantedSums:
        """Return which checksums a plan needs for its cells of this owner."""
        boxes = dict[tuple[str, Box], int]()
        places = list[int]()
        pairs = [(cell.name, cell.box._replace(start=cell.src)) for cell in cells]
        whole = any(pair in self.boxes for pair in pairs)
        first = len(self.boxes) if whole else 0
        for pair in pairs:
            place = self.boxes.get(pair)
            if place is None:
                place = first + boxes.setdefault(pair, len(boxes))
            places.append(place)
        numbered = tuple((self.numbers[name], box) for name, box in boxes)
        return WantedSums(whole, numbered, places)

    async def receiver(self, owner: Owner, terms: Terms) -> Receiver:
        """Return the lane by which the owner sends weights to a device; connect at the first call.

        Raises `Unsupported` if the owner and this process have no transport.
        """
        await owner.turn(self._connecting)
        try:
            receiver = self._receivers.get(terms[:2])
            if receiver is not None and receiver.usable:
                return receiver
            if receiver is not None:
                await Work(receiver.release)
            receiver = Receiver(owner)
            await receiver.connect(owner, terms)
            self._receivers[terms[:2]] = receiver
            return receiver
        except (Refused, BackendUnavailable, Unsupported) as error:
            reason = f"{terms.why}; and they cannot be sent: {error}"
            raise Unsupported(f"Pulling weights of {owner.address}", reason) from error
        finally:
            self._connecting.release()

    def close(self) -> None:
        """Release the lanes; quick, for the thread that notices the end of a connection."""
        for receiver in [*self._receivers.values()]:
            receiver.drop()
        self._receivers.clear()

    def _wrong(self, name: str) -> PeerError:
        """Return the error of an owner whose description does not fit its memory."""
        return PeerError(
            f"Expected {name} as {self.address} described it, got other memory. Pull from another "
            f"owner."
        )


#: Publications by channel, address and id. The end of the connection to the owner removes them.
publications: Bounded[tuple[bytes, str, bytes], Publication] = Bounded("open publications", 64)


def _forget(key: tuple[bytes, str, bytes]) -> None:
    """Release the memory of a publication, as soon as no pull uses it."""
    publication = publications.pop(key, None)
    if publication is not None:
        publication.unwatch()
        publication.close()


class Owner:
    """An owner of weights, for one pull that ends at the time ``until``.

    Attributes:
        version: of the weights at the begin of the pull; None before its answer.
        publication: set by `open`.
        work: returns work of the pull, which may block.
    """

    publication: Publication

    def __init__(
        self,
        channel: Channel,
        timeout: float,
        until: float,
        work: Callable[..., Work[Any]],
        ticket: bytes,
    ) -> None:
        decoded = unsealed(ticket, WeightsTicket)
        if decoded is None:
            raise PeerError(
                "Expected tickets to be the bytes of `Published.ticket`, got bytes that are "
                "not a ticket of weights of this release. Carry them unchanged."
            )
        self.channel = channel
        self.timeout = timeout
        self.until = until
        self.work = work
        self.address = decoded.address
        self.id = decoded.id
        self.version: int | None = None
        self._listed: Sequence[int] = ()  # checksums that came with the answer to the begin
        self._key = channel.id, decoded.address, decoded.id

    async def open(self) -> None:
        """Begin the pull, and list the weights unless they are known here."""
        known = publications.get(self._key)
        if known is None:
            self.publication = await self._list()
            return
        self.publication = known
        request = AskWeights(self.id, len(known.items), begin=True)
        if known.compares_whole:
            request = AskWeights(self.id, what="sums", begin=True)
        self._listed = (await self.ask(request)).sums

    async def _list(self) -> Publication:
        """Request all items and regions, and keep them until the connection ends."""
        request = AskWeights(self.id, begin=True)
        pairs = await self._all("weights", request, lambda page: page.items)
        items = dict(pairs)
        if len(items) < len(pairs):
            raise self._wrong_list("weights", len(pairs), len(pairs))
        handles = await self._all(
            "regions", AskWeights(self.id, what="regions"), lambda page: page.regions
        )
        publication: Publication = await Work(self._keep, items, handles)
        return publication

    def _keep(self, items: dict[str, Item], handles: list[bytes]) -> Publication:
        """Keep a publication until the connection ends."""
        # A channel publishes once, so what it published before is gone.
        for key in [key for key in [*publications] if key[:2] == self._key[:2]]:
            if key != self._key:
                _forget(key)
        made = Publication(self.address, items, handles)
        publication = publications.setdefault(self._key, made)
        if publication is not made:  # another pull was quicker, and may have a lane
            return publication
        try:
            publication.unwatch = self.channel.watch(self.address, partial(_forget, self._key))
        except BaseException:
            publications.pop(self._key, None)
            raise
        return publication

    async def _all(
        self,
        what: str,
        request: AskWeights,
        of: Callable[[Weights], Sequence[T]],
        total: int | None = None,
    ) -> list[T]:
        """Request a list in pages; raise `PeerError` if its length is not the announced one.

        ``total``: the length, if it is known.
        """
        listed = list[T]()
        nbytes = 0
        while total is None or len(listed) < total:
            first = len(listed)
            begin = request.begin and not first
            page = await self.ask(AskWeights(request.id, first, what=request.what, begin=begin))
            some = of(page)
            listed += some
            nbytes += len(msgpack.encode(page))
            total = page.total if total is None else total
            stuck = not some and len(listed) < total
            long = len(listed) > total or nbytes > MOST_LISTING
            if page.total != total or stuck or long:
                raise self._wrong_list(what, total, len(listed))
        return listed

    def _wrong_list(self, what: str, total: int, got: int) -> PeerError:
        """Return the error of a list that is not as the owner announced it."""
        return PeerError(
            f"Expected {total} {what} from {self.address}, got {got}, or some twice. Pull from "
            f"another owner."
        )

    async def ask(self, request: AskWeights) -> Weights:
        """Return the owner's answer, after the owner has one; raise if its weights changed."""
        pause = PAUSE
        while True:
            answer = await self.ask_once(request, Weights)
            self.judge(answer)
            if answer.state == "held":
                return answer
            pause = await self.pause(pause)

    async def pause(self, seconds: float) -> float:
        """Wait before the next request to a busy owner, but not past the time of the pull; return
        the seconds to wait before the request after that."""
        await Wait(until=min(time.monotonic() + seconds, self.until))
        return min(2 * seconds, 0.05)

    async def turn(self, limit: Limit, nbytes: int = 0) -> None:
        """Acquire a place of a limit in the time of the pull."""
        while not await limit.acquire(nbytes, until=self.until):
            await Wait(until=self.until)
            self.check()

    def judge(self, answer: Weights) -> None:
        """Raise if an answer says that the weights have changed, or are gone."""
        if answer.state == "gone":
            raise self._gone()
        if answer.state == "held" and self.version is None:
            self.version = answer.version
        if self.version not in (None, answer.version):
            raise TransferError(
                f"The weights at {self.address} changed while they were pulled. Do not use any of "
                f"them; pull again."
            )
        if answer.state == "replaced":
            raise PeerError(
                f"Expected {answer.replaced} at {self.address} in the memory that was published, "
                f"got other memory. Have its process publish the weights again."
            )

    async def ask_once(self, request: Message, kind: type[T]) -> T:
        """Return the owner's answer to a message, in the time of the pull; it may be busy."""
        self.check()
        try:
            return await self.channel.answer(self.address, request, kind, self.left)
        except TransferTimeout:
            self.check()  # the better reason, if the time of the pull is over
            raise

    @property
    def left(self) -> float:
        """Return the seconds in which the owner has to answer."""
        left = max(0.0, self.until - time.monotonic())
        return min(left, self.channel.timeout)

    def _gone(self) -> OfferGone:
        """Forget the publication, and return the error of one that was closed."""
        _forget(self._key)
        return OfferGone(
            f"The weights at {self.address} are no longer published; request a new ticket."
        )

    async def connect(self, request: Connect) -> Connected:
        """Return the owner's answer to a request for a lane."""
        answer = await self.ask_once(request, Connected)
        if answer.gone:
            raise self._gone()
        return answer

    def check(self) -> None:
        """Raise the error of a pull whose time is over."""
        if time.monotonic() >= self.until:
            raise TransferTimeout(
                f"The pull of weights from {self.address} timed out after {self.timeout:g} s. Do "
                f"not use the weights; pull again with a longer timeout."
            )

    async def confirm(self, again: bool = False) -> None:
        """Raise `TransferError` if the weights have changed since they were listed.

        ``again``: report checksums that differ, so that the owner does not use them again.
        """
        await self.ask(AskWeights(self.id, len(self.publication.items), again=again))

    async def sums(self, wanted: WantedSums) -> list[int]:
        """Return the owner's checksums of its cells of a plan."""
        self.publication.compares_whole |= wanted.whole
        listed = list[int]()
        if wanted.whole and len(self._listed) == len(self.publication.boxes):
            listed += self._listed
        elif wanted.whole:
            request = AskWeights(self.id, what="sums")
            total = len(self.publication.boxes)
            listed = await self._all("checksums", request, lambda page: page.sums, total=total)
        for first in range(0, len(wanted.boxes), MOST_BOXES):
            some = wanted.boxes[first : first + MOST_BOXES]
            answer = (await self.ask(AskWeights(self.id, boxes=some))).sums
            if len(answer) != len(some):
                raise PeerError(
                    f"Expected {len(some)} checksums from {self.address}, got {len(answer)}. Do "
                    f"not use the weights; pull from another owner."
                )
            listed += answer
        return [listed[place] for place in wanted.places]
