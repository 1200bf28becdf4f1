# SPDX-License-Identifier: Apache-2.0
"""Publish a model's weights for other processes, and answer their requests."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import compress
from math import prod
from operator import attrgetter, ne
from typing import TypeVar, Union, get_args
from weakref import WeakSet

import torch
from msgspec import msgpack

from portakv.arguments import instance, invalid, nbytes, one_of
from portakv.errors import LayoutError, PeerError, Unsupported
from portakv.graph.trace import Figures
from portakv.migrate.channel import Channel, Peer
from portakv.migrate.checksum import box_checksums
from portakv.migrate.messages import UNDECODABLE, Message, decoder_of, sealed
from portakv.migrate.owner import Expose
from portakv.migrate.shared_memory import Held, where
from portakv.migrate.staged_lanes import (
    BUFFERS,
    MOST_WAITING,
    Line,
    Lines,
    Sending,
    StagingBuffer,
    Turn,
)
from portakv.runtime.interrupts import uninterrupted
from portakv.runtime.streams import synchronize_current
from portakv.tasks import runtime
from portakv.weights.messages import (
    END,
    MOST_SUMS,
    AskWeights,
    Connect,
    Leave,
    OfLane,
    SendSlice,
    Weights,
    WeightsTicket,
)
from portakv.weights.parameters import (
    Box,
    Cell,
    Item,
    Parameter,
    Parameters,
    export_items,
    forms_of,
    items_of,
    named,
    part_of,
)
from portakv.weights.plan import copy_pairs, split

T = TypeVar("T")
OfReader = TypeVar("OfReader", Connect, SendSlice)
_PUBLICATION = "a publication"  # a channel has one, and its lanes
_PAGE = 40 << 10  # bytes of items and regions in an answer
MOST_ITEMS = 1 << 18  # of a publisher
STAGING = 256 << 20  # bytes of the staging buffers of one reader


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
        staging = nbytes("staging", staging, BUFFERS << 12)
        one_of("expose", expose, get_args(Expose))
        channel.check_open()
        tensors = named("parameters", parameters)
        if not tensors:
            raise invalid("parameters", "a mapping of one tensor or more", parameters)
        if len(tensors) > MOST_ITEMS:
            raise invalid("parameters", f"at most {MOST_ITEMS} tensors", len(tensors))
        self._weights = Versioned(tensors, items_of(tensors))
        self._id = secrets.token_bytes(16)
        self._closed = False
        self._channel = channel
        self._lanes = Lanes(channel, self._weights, transport, staging)
        self._synchronize()
        self._regions = list[Held]()
        self.why_not_mapped = ""
        try:
            self._export(expose)
        except Unsupported as error:
            self.why_not_mapped = str(error)
        #: What readers list, before checksums.
        self._listed = [*self._weights.items.items(), *(x.handle for x in self._regions)]
        self.ticket = sealed(
            WeightsTicket(
                channel.address,
                self._id,
                self._lanes.forced or "",
                where(self._lanes.device),
                self.why_not_mapped[:1024],
                self._lanes.buffer_bytes,
            )
        )
        uninterrupted(self._serve)

    def _serve(self) -> None:
        """Answer on the channel, and end the lanes of the publication before, which no longer
        answers."""
        self._weights.sums(self._weights.version())  # a helper begins
        channel = self._channel
        channel.serve(AskWeights, self._answer)
        channel.serve(Connect, partial(self._answer_reader, self._lanes.connect))
        channel.serve(SendSlice, partial(self._answer_reader, self._lanes.send))
        channel.serve(OfLane, self._lanes.carry)
        channel.serve(Leave, self._lanes.leave)
        before = channel.claim(_PUBLICATION, self, replaces=True)
        if isinstance(before, Published):
            before._lanes.close()

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
        with runtime().lock:
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
        synchronize_current({x.tensor.device for x in self._weights.parameters.values()})

    def _is_gone(self, id: bytes) -> bool:
        """Return True for the id of another publication, and after `close`."""
        return id != self._id or self._closed

    def _answer(self, _: Peer, request: AskWeights) -> Weights:
        if self._is_gone(request.id):
            return Weights("gone")
        if request.again:
            self._weights.forget_sums()
        version = self._weights.version()
        first = request.first - len(self._listed)
        # Torch counts no replacement. The end of a pull decides; the request for checksums finds
        # most replacements earlier, while the reader's devices copy.
        if request.boxes or first >= 0:
            replaced = self._weights.replaced()
            if replaced is not None:
                return Weights("replaced", version, replaced=replaced)
        if request.begin and self._weights.updates:
            return Weights("busy", version)
        if request.first == END:
            return Weights("held", version)

        # At the begin a helper begins to compute them, unless they are there.
        sums: Sequence[int] | None = ()
        if request.begin or request.boxes or first >= 0:
            sums = self._weights.sums(version, request.boxes)
        if sums is None and not request.begin:
            return Weights("busy", version)
        if first < 0 and not request.boxes:
            page = [*_page(self._listed[request.first :])]
            items = tuple(each for each in page if isinstance(each, tuple))
            regions = tuple(each for each in page if isinstance(each, bytes))
            return Weights("held", version, len(self._listed), items, regions)
        # A pull that begins copies before there are checksums, and requests them later.
        some = sums or ()
        if not request.boxes:
            some = some[first : first + MOST_SUMS]
        return Weights("held", version, sums=tuple(some))

    def _answer_reader(
        self, do: Callable[[Peer, OfReader], object], peer: Peer, request: OfReader
    ) -> Weights:
        """Do what a reader requests of its lane."""
        if self._is_gone(request.id):
            return Weights("gone")
        version = self._weights.version()
        do(peer, request)
        return Weights("held", version)

    def statistics(self) -> dict[str, int]:
        """Return the lanes to readers that do not map the memory (``lanes``), and the bytes of all
        their staging buffers here (``staging``)."""
        return self._lanes.statistics()

    def figures(self) -> Figures:
        """Return figures by the names of metrics."""
        counts = self.statistics()
        return {
            "weight_lanes": [{"value": counts["lanes"]}],
            "weight_staging_bytes": [{"value": counts["staging"]}],
        }

    def close(self) -> None:
        """Release the tensors; pulls in progress get `OfferGone`.

        Readers that mapped the memory release it at their next pull, or when the connection ends.
        """
        uninterrupted(self._close)

    def _close(self) -> None:
        self._closed = True
        self._weights.forget_sums()
        self._channel.free(_PUBLICATION, self)
        self._lanes.close()
        for region in self._regions:
            region.close()
        self._weights.parameters.clear()


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


# ------------------------------------------------------------------------------------------------
# Send weights through staging buffers to readers that cannot map them: the owner's side.
#
# A lane belongs to one publication, and to one device of one reader. The reader requests slices,
# one by one: boxes of the owner's tensors, which the owner packs into a staging buffer. A
# transport carries the buffer, and the reader copies the boxes into its tensors. Both sides pass
# their buffers in the order of the requests.

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
# The owner's side.


#: The slices of weights that are large enough, and the bytes below which no slice is made smaller.
_SLICES = 8
_LEAST_ON_HOST = 8 << 20
_LEAST_ON_DEVICE = 64 << 20
_MOST_LANES = 16  # of one reader: it has one for each device


class Lanes(Lines):
    """The lanes of published weights to readers. Only the channel's thread calls it.

    A reader that waits for a slice that cannot be packed gets zeros. Its pull then fails by its
    checksums or because the publication has ended, and the lane takes no further slice.

    Args:
        transport: the name of the only transport for readers; None: any.
        staging: the most bytes of the staging buffers of a reader.
    """

    def __init__(
        self, channel: Channel, weights: Versioned, transport: str | None, staging: int
    ) -> None:
        tensors = [x.tensor for x in weights.parameters.values()]
        super().__init__(channel, transport, {tensor.device for tensor in tensors})
        # Buffers are small enough that several slices are under way, and large enough that the
        # number of slices costs little.
        total = packed_bytes(tensor.nbytes for tensor in tensors)
        least = _LEAST_ON_HOST if self.device.type == "cpu" else _LEAST_ON_DEVICE
        wanted = min(total, max(least, total // _SLICES))
        pages = min(-(-wanted // 4096), staging // BUFFERS // 4096)
        self.buffer_bytes = max(1, pages) * 4096
        self._weights = weights

    def connect(self, peer: Peer, request: Connect) -> None:
        """Make a lane to a reader; raise as `_choose`."""
        transport = self._choose(request.transport, self.device, request.device)
        lanes = [lane for reader, lane in self._lines if reader is peer]
        if len(lanes) >= _MOST_LANES or request.lane in lanes:
            raise PeerError(f"Expected at most {_MOST_LANES} lanes of a reader, got another.")

        line = Line(Peer(peer.id), transport)  # a transport has one lane for a peer
        self._allocate(line, BUFFERS * self.buffer_bytes, *range(BUFFERS))
        self._add(line, peer, request.lane)

    def send(self, peer: Peer, request: SendSlice) -> None:
        """Have a helper pack and send a slice, once its buffer is free.

        Raises `PeerError` for a lane that cannot send it.
        """
        line = self._line(peer, request.lane)
        if line.error:
            raise PeerError(f"The owner could not pack a slice: {line.error}")
        in_turn = request.tag == line.last + 1 and len(line.sendings) < MOST_WAITING
        if not in_turn or not 0 < request.nbytes <= self.buffer_bytes:
            raise PeerError(
                f"Expected slice {line.last + 1} of at most {self.buffer_bytes} bytes, got slice "
                f"{request.tag} of {request.nbytes}. Connect again."
            )
        sending = Sending(
            request.tag,
            [request.nbytes],
            lane=line.transport.lane(line.peer, self._channel),
            buffers=BUFFERS,
            after=line.after,
            fill=partial(self._pack, request),
            wanted=lambda: not line.error,
        )
        self._queue(line, sending)

    def _pack(self, request: SendSlice, _: int, buffer: StagingBuffer, full: torch.Tensor) -> None:
        """Copy the boxes of a slice into a staging buffer."""
        tensors = self._weights.numbered(number for number, *_ in request.boxes)
        boxes = zip(tensors, request.boxes, strict=True)
        pack(full, [part_of(tensor, *box) for tensor, (_, *box) in boxes])

    def carry(self, peer: Peer, request: OfLane) -> Message | None:
        """Answer a message of a reader's transport by the transport here."""
        line = self._line(peer, request.lane)
        transport = line.transport
        try:
            message = decoder_of(Union[tuple(transport.asks)]).decode(request.body)  # noqa: UP007
        except UNDECODABLE:
            raise PeerError(
                f"Expected a message of the transport {transport.name}, got another. Use one "
                f"release on both sides."
            ) from None
        return transport.answer(line.peer, self._channel, message)

    def leave(self, peer: Peer, request: Leave) -> None:
        """Release a lane that its reader has left."""
        self.forget(peer, request.lane)

    def _line(self, peer: Peer, id: bytes) -> Line:
        """Return a lane of a reader."""
        line = self._lines.get((peer, id))
        if line is None:
            raise PeerError("Expected a lane of this connection, got another. Connect again.")
        return line

    def statistics(self) -> dict[str, int]:
        """Return the number of lanes, and the bytes of all their staging buffers."""
        lanes = len(self._lines)
        return {"lanes": lanes, "staging": lanes * BUFFERS * self.buffer_bytes}


# ------------------------------------------------------------------------------------------------
# Published tensors, the number of their version, and their checksums.

_version_of: Callable[[torch.Tensor], int] = attrgetter("_version")


class Update:
    """An update of published weights in progress."""


class Versioned:
    """Published tensors with their descriptions, the number of their version, and checksums."""

    def __init__(self, parameters: dict[str, Parameter], items: dict[str, Item]) -> None:
        self.parameters = parameters
        self.items = items
        self.changes = 0
        # `parameters` retains the tensors, which may get other memory.
        self._memory = forms_of(self._tensors())
        # Updates in progress; weak, because the end of an update may be interrupted.
        self.updates = WeakSet[Update]()
        self._turn = Turn()  # one computation of checksums at a time

    def _tensors(self) -> list[torch.Tensor]:
        """Return the tensors; none once the publication was closed."""
        return [x.tensor for x in [*self.parameters.values()]]

    def version(self) -> int:
        """Return a number that grows with each change that this process can notice."""
        tensors = self._tensors()
        try:
            counts = [*map(_version_of, tensors)]
        except RuntimeError:  # inference tensors have no counter
            counts = [x._version for x in tensors if not x.is_inference()]
        return self.changes + sum(counts)

    def replaced(self) -> str | None:
        """Return the name of a tensor that has other memory than when it was published."""
        memory = forms_of(self._tensors())
        if memory == self._memory or not memory[0]:  # or the publication was closed
            return None
        now = zip(*memory, strict=True)
        then = zip(*self._memory, strict=True)
        return next(compress(self.items, map(ne, now, then)), None)

    def boxes(
        self, numbered: Sequence[tuple[int, Box]] = ()
    ) -> Iterator[tuple[str, torch.Tensor, Box]]:
        """Yield boxes of numbered items, each with the first name of its memory and its tensor.

        Without a number: each box of each item, in order. Raises as `numbered`.
        """
        items = [*self.items.values()]
        if not numbered and self.parameters:  # else the publication was closed
            numbered = [(n, box) for n, item in enumerate(items) for box in item.boxes]
        tensors = self.numbered(number for number, _ in numbered)
        for (number, box), tensor in zip(numbered, tensors, strict=True):
            yield items[number].tie, tensor, box

    def numbered(self, numbers: Iterable[int]) -> list[torch.Tensor]:
        """Return the tensors of numbered items; raise `LayoutError` for a wrong number."""
        tensors = self._tensors()
        try:
            return [tensors[number] for number in numbers]
        except IndexError:
            what = f"Expected numbers below {len(tensors)}, got others. Pull again."
            raise LayoutError(what) from None

    def sums(self, version: int, numbered: Sequence[tuple[int, Box]] = ()) -> list[int] | None:
        """Return the checksums of boxes of numbered items, or of all boxes of all items in order.

        Helpers compute them once for each version. One thread at a time calls this method.

        None: a helper computes them, or the weights have changed meanwhile. Raises the error of the
        computation, such as `LayoutError` for a wrong number.
        """
        key = version, msgpack.encode(numbered)
        return self._turn.result_of(key, self._compute, version, numbered, keep=True) or None

    def _compute(self, version: int, numbered: Sequence[tuple[int, Box]]) -> list[int]:
        """Return checksums, each memory's computed once; none if no pull can use them."""
        if self.version() != version:
            return []
        places = list[int]()
        numbers = dict[object, int]()
        boxes = list[tuple[torch.Tensor, Box]]()
        for tie, tensor, box in self.boxes(numbered):
            number = numbers.setdefault((tie, box), len(boxes))
            places.append(number)
            if number == len(boxes):
                boxes.append((tensor, box))
        sums = checksums(boxes)
        return [sums[number] for number in places]

    def forget_sums(self) -> None:
        """Compute all checksums anew when they are next requested."""
        self._turn.forget_results()


def checksums(boxes: Sequence[tuple[torch.Tensor, Box]]) -> list[int]:
    """Return the checksums of boxes of tensors, by their place in the whole tensor."""
    return box_checksums((part_of(x, box.start, box.extents), box.offset) for x, box in boxes)
