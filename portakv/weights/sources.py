# SPDX-License-Identifier: Apache-2.0
"""The owners of a pull of weights: what a reader knows of them, and requests from them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from hashlib import blake2b
from secrets import token_bytes
from typing import cast

import torch
from msgspec import msgpack

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
from portakv.migrate.channel import Channel
from portakv.migrate.described import strided
from portakv.migrate.messages import Message, Refused, unsealed
from portakv.migrate.shared_memory import Opener, where
from portakv.migrate.staging import staging
from portakv.migrate.transport_channel import TransportChannel
from portakv.migrate.transports import choose_between
from portakv.migrate.transports.base import Lane, Transport
from portakv.runtime.bounded import Bounded
from portakv.runtime.streams import StreamFence, synchronize_current
from portakv.tasks import Limit, Wait, Work, runtime
from portakv.weights.messages import (
    BUFFERS,
    END,
    MOST_BOXES,
    AskWeights,
    Connect,
    Leave,
    OfLane,
    Weights,
    WeightsTicket,
)
from portakv.weights.parameters import Box, Cell, Item, part_of
from portakv.weights.plan import Plan, WantedSums
from portakv.weights.request import PullRequest

PAUSE = 5e-4  # seconds before the first repeat of a request to a busy owner
MOST_LISTING = 256 << 20  # the most bytes of an owner's list


_FAREWELL = 0.5  # seconds for the last message of a lane


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


class Receiver:
    """A lane by which one owner sends weights, and the staging buffers that it fills.

    Attributes:
        device: of the reader's tensors.
        forced: the name of the transport that the reader forces.
        why: why the owner's memory is not mapped.
        turn: one pull at a time uses the lane, or connects it.
        tag: of the last slice that the owner has accepted.
        how: the transport of the lane, and why the memory is not mapped.
    """

    buffers: list[torch.Tensor]

    def __init__(
        self, channel: Channel, address: str, device: torch.device, forced: str | None
    ) -> None:
        self.device = device
        self.forced = forced
        self.why = ""
        self.turn = Limit(runtime())
        self.id = b""
        self.tag = 0
        self.how = ""
        self.lane: Lane | None = None  # the last one that was connected
        self._channel = channel
        self._address = address
        self._transport: Transport | None = None  # of a lane that is not released

    @property
    def usable(self) -> bool:
        """Return True if a pull may use the lane."""
        return self.lane is not None and self.lane.gone is None

    async def acquire(self, owner: Owner) -> None:
        """Wait for the turn of a pull; connect at the first call, and after the end of the lane.

        Raises `Unsupported` if the owner and this process have no transport.
        """
        await owner.turn(self.turn)
        try:
            if not self.usable:
                self.lane = None
                await Work(self.release)
                await self._connect(owner)
        except BaseException as error:  # also a cancellation
            await Work(self.release)
            self.turn.release()
            if isinstance(error, Refused | BackendUnavailable | Unsupported):
                reason = f"{self.why}; and they cannot be sent: {error}"
                raise Unsupported(f"Pulling weights of {owner.address}", reason) from error
            raise

    async def _connect(self, owner: Owner) -> None:
        """Agree on a lane with the owner, and make it."""
        ticket = owner.ticket
        name = self.forced or ticket.transport or None
        choice: Work[Transport] = owner.work(choose_between, self.device, ticket.device, name)
        transport = self._transport = await choice
        why = f"{ticket.why or self.why} ({transport.why})"
        self.how = f"{transport.name} sends it through staging buffers: {why}"
        self.id = token_bytes(16)
        self.tag = 0
        request = Connect(owner.id, self.id, transport.name, where(transport.device))
        owner.judge(await owner.ask_once(request))
        await owner.work(self._meet, owner, transport)

    def _meet(self, owner: Owner, transport: Transport) -> None:
        """Make the lane, and the staging buffers."""
        channel = cast("Channel", LaneChannel(owner.channel, self.id))
        lane: Lane = transport.lane(owner.address, channel)
        lane.meet(stop=lambda: owner.left <= 0.0)
        device = transport.device
        # In inference mode, buffers would be views without a common base, which transports
        # register.
        with torch.inference_mode(False), StreamFence(device).inside():
            memory = staging(BUFFERS * owner.ticket.buffer_bytes, device, rows=self.device)
            synchronize_current([device])  # the work of earlier users of the memory
            self.buffers = [*memory.view(BUFFERS, -1)]
        self.lane = lane

    def release(self) -> None:
        """Release the lane on both sides; its slices in flight end with an error."""
        if self.drop():
            with suppress(PortaKVError):  # the owner may be gone
                self._channel.tell(self._address, Leave(self.id), _FAREWELL)

    def drop(self) -> bool:
        """Release the lane here; quick, for the thread that notices the end of a connection.

        Returns False if it was released before.
        """
        transport = self._transport
        self._transport = None
        if transport is None:
            return False
        transport.close(0.0)
        return True


class Publication:
    """What this process knows of an owner's weights, and the owner's memory that it has opened.

    Attributes:
        listed: the number of items and regions.
        numbers: of the items.
        boxes: the numbers of whole boxes, in the order in which the owner lists their checksums.
        whole: how many checksums the owner lists.
        digest: equal for publications that differ at most in their handles.
        sources: by plan, and the owner's number in it. A plan is of tensors of one description.
    """

    def __init__(self, address: str, items: dict[str, Item], handles: list[bytes]) -> None:
        self.address = address
        self.items = items
        self.listed = len(items) + len(handles)
        self.unwatch: Callable[[], object] = lambda: None
        self.digest = blake2b(msgpack.encode([*items.items()]), digest_size=16).digest()
        self.numbers = {name: number for number, name in enumerate(items)}
        boxes = [(name, box) for name, item in items.items() for box in item.boxes]
        self.boxes = {pair: number for number, pair in enumerate(boxes)}
        self.whole = len(boxes)
        self.sources = Bounded[tuple[Plan, int], list[torch.Tensor]]("sources of weights", 8)
        self._handles = handles
        self._regions = dict[tuple[int, torch.device], torch.Tensor]()
        #: By the device of the reader's tensors, and the transport that the reader forces.
        self._receivers = dict[tuple[torch.device, str | None], Receiver]()

    def open(
        self, plan: Plan, number: int, tensors: Mapping[str, torch.Tensor]
    ) -> list[torch.Tensor]:
        """Return the sources of an owner's cells of a plan, in memory that is opened if necessary.

        ``tensors``: the reader's, by name. Raises `PeerError` for a place outside of the owner's
        regions, and `Unsupported` if the memory cannot be mapped.
        """
        cells = [plan.cells[n] for n in plan.numbers[number]]
        if cells and not self._handles:
            why = "their owner does not export its memory"
            raise Unsupported("Opening the weights", f"{why}; use a transport")
        openers = dict[torch.device, Opener]()
        opened = [self._source(cell, tensors[cell.name], openers) for cell in cells]
        return self.sources.setdefault((plan, number), opened)

    def _source(
        self, cell: Cell, like: torch.Tensor, openers: dict[torch.device, Opener]
    ) -> torch.Tensor:
        """Return the source of a cell for a device of this process."""
        item = self.items[cell.name]
        if item.place is None or item.place[0] >= len(self._handles):
            raise self._wrong(cell.name)
        (number, offset) = item.place
        region = self._regions.get((number, like.device))
        if region is None:
            if like.device not in openers:  # which looks at the owner's process once
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

    def _wrong(self, name: str) -> PeerError:
        """Return the error of an owner whose description does not fit its memory."""
        return PeerError(
            f"Expected {name} as {self.address} described it, got other memory. Pull from another "
            f"owner."
        )

    def wanted_sums(self, cells: Iterable[Cell]) -> WantedSums:
        """Return which checksums a plan needs for its cells of this owner."""
        others = dict[tuple[str, Box], int]()
        places = list[int]()
        for cell in cells:
            pair = cell.name, cell.box._replace(start=cell.src)
            place = self.boxes.get(pair)
            if place is None:
                place = self.whole + others.setdefault(pair, len(others))
            places.append(place)
        return WantedSums(places, [(self.numbers[name], box) for name, box in others])

    def receiver(self, channel: Channel, device: torch.device, transport: str | None) -> Receiver:
        """Return the lane by which the owner sends weights to a device, by any transport or by the
        one that the reader forces."""
        made = Receiver(channel, self.address, device, transport)
        return self._receivers.setdefault((device, transport), made)

    def close(self) -> None:
        """Release the lanes; quick, for the thread that notices the end of a connection."""
        self.unwatch()
        for receiver in [*self._receivers.values()]:
            receiver.drop()
        self._receivers.clear()


#: Publications by channel, address and id. The end of the connection to the owner removes them.
publications: Bounded[tuple[bytes, str, bytes], Publication] = Bounded("open publications", 64)


def _forget(key: tuple[bytes, str, bytes]) -> None:
    """Release the memory of a publication, as soon as no pull uses it."""
    publication = publications.pop(key, None)
    if publication is not None:
        publication.close()


class Owner:
    """An owner of weights, for one pull.

    Attributes:
        version: of the weights at the begin of the pull; None before its answer.
        publication: set by `open`.
        work: returns work of the pull, which may block.
    """

    publication: Publication

    def __init__(self, request: PullRequest, ticket: bytes) -> None:
        decoded = unsealed(ticket, WeightsTicket)
        if decoded is None:
            raise PeerError(
                "Expected tickets to be the bytes of `Published.ticket`, got bytes that are "
                "not a ticket of weights of this release. Carry them unchanged."
            )
        self.channel = request.channel
        self.work = request.work
        self.until = request.until
        self._timeout = request.timeout
        self.ticket = decoded
        self.address = decoded.address
        self.id = decoded.id
        self.version: int | None = None
        self._sums: tuple[int, ...] = ()  # the first checksums that the owner lists
        self._key = request.channel.id, decoded.address, decoded.id

    # --- begin

    async def open(self) -> None:
        """Begin the pull, and list the weights unless they are known here."""
        known = publications.get(self._key)
        if known is None:
            known = await self._list()
        else:
            self._sums = (await self.ask(AskWeights(self.id, known.listed, begin=True))).sums
        self.publication = known

    async def _list(self) -> Publication:
        """Request all items and regions in pages, and keep them until the connection ends.

        Raises `PeerError` if they are not as many as the owner announces, or not all different.
        """
        items = dict[str, Item]()
        handles = list[bytes]()
        nbytes = 0
        count = 0
        total = 1
        while count < total:
            page = await self.ask(AskWeights(self.id, count, begin=not count))
            if not count:
                total = page.total
            some = len(page.items) + len(page.regions)
            count += some
            nbytes += len(msgpack.encode(page))
            items.update(page.items)
            handles += page.regions
            unlike = page.total != total or len(items) + len(handles) != count
            if unlike or not some or count > total or nbytes > MOST_LISTING:
                raise PeerError(
                    f"Expected {total} weights from {self.address}, got {count}, or some twice. "
                    f"Pull from another owner."
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

    # --- requests

    async def ask(self, request: AskWeights) -> Weights:
        """Return the owner's answer, after the owner has one; raise if its weights changed."""
        pause = PAUSE
        while True:
            answer = await self.ask_once(request)
            self.judge(answer)
            if answer.state == "held":
                return answer
            await Wait(until=min(time.monotonic() + pause, self.until))
            pause = min(2 * pause, 0.05)

    async def ask_once(self, request: Message) -> Weights:
        """Return the owner's answer to a message, in the time of the pull; it may be busy."""
        self.check()
        try:
            return await self.channel.answer(self.address, request, Weights, self.left)
        except TransferTimeout:
            self.check()  # the better reason, if the time of the pull is over
            raise

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

    def _gone(self) -> OfferGone:
        """Forget the publication, and return the error of one that was closed."""
        _forget(self._key)
        return OfferGone(
            f"The weights at {self.address} are no longer published; request a new ticket."
        )

    async def confirm(self, again: bool = False) -> None:
        """Raise `TransferError` if the weights have changed since they were listed.

        ``again``: report checksums that differ, so that the owner does not use them again.
        """
        await self.ask(AskWeights(self.id, END, again=again))

    async def sums(self, wanted: WantedSums) -> list[int]:
        """Return the owner's checksums of its cells of a plan."""
        publication = self.publication
        whole = publication.whole
        sums = [*self._sums]
        some: tuple[int, ...] = (0,)
        if any(place < whole for place in wanted.places):
            while some and len(sums) < whole:
                some = (await self.ask(AskWeights(self.id, publication.listed + len(sums)))).sums
                sums += some
        else:
            sums = [0] * whole  # not needed
        for first in range(0, len(wanted.boxes), MOST_BOXES):
            boxes = tuple(wanted.boxes[first : first + MOST_BOXES])
            sums += (await self.ask(AskWeights(self.id, boxes=boxes))).sums
        count = whole + len(wanted.boxes)
        if len(sums) != count:
            raise PeerError(
                f"Expected {count} checksums from {self.address}, got {len(sums)}. Do not use the "
                f"weights; pull from another owner."
            )
        return [sums[place] for place in wanted.places]

    # --- the time of the pull

    @property
    def left(self) -> float:
        """Return the seconds in which the owner has to answer."""
        return min(max(0.0, self.until - time.monotonic()), self.channel.timeout)

    async def turn(self, limit: Limit, nbytes: int = 0) -> None:
        """Acquire a place of a limit in the time of the pull."""
        if not await limit.acquire(nbytes, until=self.until):
            raise self._late()

    def check(self) -> None:
        """Raise the error of a pull whose time is over."""
        if time.monotonic() >= self.until:
            raise self._late()

    def _late(self) -> TransferTimeout:
        return TransferTimeout(
            f"The pull of weights from {self.address} timed out after {self._timeout:g} s. Do "
            f"not use the weights; pull again with a longer timeout."
        )
