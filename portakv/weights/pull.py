# SPDX-License-Identifier: Apache-2.0
"""Pull a model's weights from processes that serve it, whatever TP and PP either side has.

`publish` makes tensors available; `pull_weights` fills the tensors of another process. Memory that
a pull opened stays open for the next pull, until the connection to the owner ends.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from operator import sub
from secrets import token_bytes
from typing import Literal, TypeAlias, TypeVar, overload

import torch
from msgspec import msgpack
from torch.autograd.graph import increment_version

from portakv.arguments import flag, instance, invalid, rate, seconds
from portakv.errors import (
    BackendUnavailable,
    LayoutError,
    OfferGone,
    PeerError,
    PortaKVError,
    TransferCancelled,
    TransferError,
    TransferTimeout,
    Unsupported,
)
from portakv.graph.trace import Figures, Spent, histograms
from portakv.migrate.channel import Channel
from portakv.migrate.checksum import BoxSums, SummedPart
from portakv.migrate.connections import Staging, StagingBuffer
from portakv.migrate.described import strided
from portakv.migrate.messages import Message, Refused, listed, unsealed
from portakv.migrate.pull import PartTransfer, known
from portakv.migrate.shared_memory import Opener, where
from portakv.migrate.staged_lanes import BUFFERS
from portakv.migrate.staged_reader import Intake
from portakv.migrate.staging import retain
from portakv.migrate.transports import check_transport, choose_between
from portakv.migrate.transports.base import Lane, Transport
from portakv.runtime import tracing
from portakv.runtime.bounded import Bounded
from portakv.runtime.devices import capturing, inside, refuse_capture
from portakv.runtime.interrupts import uninterrupted
from portakv.runtime.streams import (
    StreamFence,
    completion,
    ignoring_captures,
    own_stream,
    side_stream,
    synchronize_current,
)
from portakv.runtime.transfer import Completion, Statistics, Transfer
from portakv.tasks import Limit, Wait, Work, runtime, shared_limit
from portakv.weights.messages import (
    END,
    MOST_BOXES,
    AskWeights,
    Connect,
    Leave,
    OfLane,
    SendSlice,
    Weights,
    WeightsTicket,
)
from portakv.weights.owner import slices, unpacked
from portakv.weights.parameters import (
    Box,
    Cell,
    Item,
    Parameters,
    check_destinations,
    facts_of,
    items_of,
    named,
    part_of,
    plan,
    tensors_of,
)
from portakv.weights.plan import (
    Batch,
    Piece,
    Plan,
    TiledPieces,
    WantedSums,
    copy_pairs,
    plan_of,
    tiled_on,
    tiles_of,
)

# ------------------------------------------------------------------------------------------------
# The arguments of a pull of weights, and the tensors that it fills.

T = TypeVar("T")

# Bytes that are copied and compared together. Between two kernels of tiles the link is idle for
# some 30 us, and the checksums of the last batch are waited for.
_BATCH = 2 << 30
_PACED = 32 << 20  # the same with a rate, or on the host

_Plans: TypeAlias = Bounded[object, Plan]
# By the facts of tensors, which have passed all checks: the plans of their pulls, by the owners'
# descriptions.
_known: Bounded[object, _Plans] = Bounded("checked destinations of weights", 16)


class PullRequest:
    """The arguments of a pull, which it checks.

    Raises `InvalidTerms` or `LayoutError` for wrong ones.

    Attributes:
        tensors: of the parameters, by name.
        devices: of the tensors.
        plans: the plans of pulls into tensors with these facts.
        until: the time at which the pull ends.
        batch: the bytes of a batch.
        began: the beginning of the pull's span.
    """

    def __init__(
        self,
        channel: Channel,
        tickets: bytes | Sequence[bytes],
        parameters: Parameters,
        some: bool,
        max_gbps: float | None,
        timeout: float | None,
        transport: str | None,
        wait: bool = True,
    ) -> None:
        self.timeout = seconds("timeout", timeout, above=True, optional=True)
        self.until = time.monotonic() + self.timeout
        self.channel = instance("channel", channel, Channel)
        self.some = flag("some", some)
        self.parameters, self.tensors, self.plans = _checked_destinations(parameters)
        self.rate = None if max_gbps is None else rate("max_gbps", max_gbps)
        self.devices = frozenset({tensor.device for tensor in self.tensors.values()})
        if any(map(capturing, self.devices)):
            raise refuse_capture("Pulling weights", "processes exchange messages; do it before")
        device = next((x.device for x in self.tensors.values()), torch.device("cpu"))
        check_transport(transport, device)
        self.transport = transport
        self.tickets = listed(tickets, "Pass Published.ticket.")
        on_host = any(device.type == "cpu" for device in self.devices)
        self.batch = _PACED if self.rate or on_host else _BATCH
        self.wait = flag("wait", wait)
        self.began = tracing.begin()
        devices = [device for device in self.devices if device.type != "cpu"]
        #: The caller's, or private ones if the caller does not wait.
        self._streams = [torch.accelerator.current_stream(device.index) for device in devices]
        if not self.wait:
            current = self._streams
            self._streams = [own_stream(device) for device in devices]
            for stream, after in zip(self._streams, current, strict=True):
                stream.wait_stream(after)

    def inside(self, call: Callable[..., T], *arguments: object) -> T:
        """Make a call for which the pull's streams are current, while other threads may capture
        graphs."""
        with ExitStack() as stack:
            for stream in self._streams:
                stack.enter_context(ignoring_captures(stream.device))
                stack.enter_context(inside(stream.device))  # a context for a new thread
                stack.enter_context(inside(stream))
            return call(*arguments)

    def work(self, call: Callable[..., T], *arguments: object) -> Work[T]:
        """Return work of the pull, which may block; see `inside`."""
        return Work(self.inside, call, *arguments)


def _checked_destinations(
    parameters: Parameters,
) -> tuple[Parameters, dict[str, torch.Tensor], _Plans]:
    """Return parameters that can be filled, their tensors, and the plans of pulls into tensors with
    the same facts.

    Parameters with the facts of others that passed all checks are not checked again.
    """
    if not isinstance(parameters, Mapping):
        raise invalid("parameters", "a mapping of names to tensors", parameters)
    parameters = dict(parameters.items())  # once: another mapping may make tensors
    facts = facts_of(parameters)
    plans = None if facts is None else _known.get(facts)
    if plans is None:
        check_destinations(named("parameters", parameters))
        plans = _Plans("plans of weights", 4)
        if facts is not None:
            plans = _known.setdefault(facts, plans)
    return parameters, tensors_of(parameters), plans


# ------------------------------------------------------------------------------------------------
# The owners of a pull of weights: what a reader knows of them, and requests from them.

PAUSE = 5e-4  # seconds before the first repeat of a request to a busy owner
MOST_LISTING = 256 << 20  # the most bytes of an owner's list


_FAREWELL = 0.5  # seconds for the last message of a lane


class Receiver:
    """A lane by which one owner sends weights, and the staging buffers that it fills.

    Attributes:
        device: of the reader's tensors.
        forced: the name of the transport that the reader forces.
        id: of the lane.
        why: why the owner's memory is not mapped.
        how: the transport of the lane, and why the memory is not mapped.
        staged: the transport and the staging buffers; None before `connect` and after `drop`.
    """

    def __init__(
        self, channel: Channel, address: str, device: torch.device, forced: str | None
    ) -> None:
        self.device = device
        self.forced = forced
        self.id = b""
        self.why = ""
        self.how = ""
        self.staged: Staging | None = None
        self._channel = channel
        self._address = address
        self._turn = Limit(runtime())  # of pulls that connect it

    async def connect(self, owner: Owner) -> Staging:
        """Return the staging buffers of the lane; connect at the first call, and after `drop`.

        Raises `Unsupported` if the owner and this process have no transport.
        """
        await owner.turn(self._turn)
        try:
            return self.staged or await self._connect(owner)
        except BaseException as error:  # also a cancellation
            await Work(self.release)
            if isinstance(error, Refused | BackendUnavailable | Unsupported):
                reason = f"{self.why}; and they cannot be sent: {error}"
                raise Unsupported(f"Pulling weights of {owner.address}", reason) from error
            raise
        finally:
            self._turn.release()

    async def _connect(self, owner: Owner) -> Staging:
        """Agree on a lane with the owner, and make it."""
        ticket = owner.ticket
        name = self.forced or ticket.transport or None
        choice: Work[Transport] = owner.work(choose_between, self.device, ticket.device, name)
        transport = await choice
        why = f"{ticket.why or self.why} ({transport.why})"
        self.how = f"{transport.name} sends it through staging buffers: {why}"
        self.id = token_bytes(16)
        terms = transport, transport.device, self.device, BUFFERS, owner.channel, owner.address
        staged: Staging = await owner.work(Staging, *terms, partial(_enclosed, self.id))
        self.staged = staged
        request = Connect(owner.id, self.id, transport.name, where(transport.device))
        owner.judge(await owner.ask_once(request))
        await owner.work(self._meet, owner, staged)
        return staged

    def _meet(self, owner: Owner, staged: Staging) -> None:
        """Make the lane, and the memory of the staging buffers."""
        lane = staged.lane()
        lane.meet(stop=lambda: owner.left <= 0.0)
        nbytes = owner.ticket.buffer_bytes
        with torch.inference_mode(False), StreamFence(staged.device).inside():
            for buffer in staged.buffers:
                buffer.prepare(nbytes, nbytes)
            synchronize_current([staged.device])  # the work of earlier users of the memory
        staged.met = lane

    def release(self) -> None:
        """Release the lane on both sides; its slices in flight end with an error."""
        if self.drop():
            with suppress(PortaKVError):  # the owner may be gone
                self._channel.tell(self._address, Leave(self.id), _FAREWELL)

    def drop(self, gone: bool = False) -> bool:
        """Release the lane here; quick, for the thread that notices the end of a connection.

        Returns False if it was released before.
        """
        staged = self.staged
        self.staged = None
        if staged is None:
            return False
        staged.release(gone)
        return True


def _enclosed(lane: bytes, message: Message) -> OfLane:
    """Return a message of a transport in an envelope that names its lane, because a channel has one
    answer for each kind of message."""
    return OfLane(lane, msgpack.encode(message))


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
            receiver.drop(gone=True)
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


# ------------------------------------------------------------------------------------------------
# Carry out the copies of a pull of weights, with the checksums of what landed.

_ASK = 1.0  # seconds of waiting for slices after which a pull requests the version
_WINDOW = 2  # batches of a device in flight
#: What a copy writes, and what it reads.
Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(eq=False)
class BoxSlice:
    """Boxes of an owner that cross in one staging buffer.

    Attributes:
        into: the parts of tensors that the boxes fill.
        then: called after the copies of the boxes.
        accepted: the owner sends the slice.
    """

    owner: Owner
    receiver: Receiver
    cells: list[Cell]
    nbytes: int
    into: Sequence[torch.Tensor] = ()
    then: list[Callable[[], object]] = field(default_factory=list)
    accepted: bool = False


class Copies(Intake[BoxSlice]):
    """The copies of one pull, and the checksums of what landed.

    The bytes come from the memory of owners or, if it cannot be mapped, through staging buffers.

    Attributes:
        owners: of the weights.
        plan: of the pull.
        measures: no slice measures the rate of its transport.
    """

    measures = False

    def __init__(self, pull: PullRequest, owners: Sequence[Owner], plan: Plan) -> None:
        super().__init__()
        self.owners = owners
        self.plan = plan
        self._pull = pull
        self._tensors = pull.tensors
        self._devices = pull.devices
        self._tiled = any(map(tiled_on, pull.devices))
        self._sources = dict[int, torch.Tensor]()  # in mapped memory, by the numbers of cells
        self._receivers = dict[int, Receiver]()  # by the number of an owner that is not mapped
        self._stages = dict[int, Staging]()  # of the receivers
        self._ended = False
        self._asked = time.monotonic()  # when the owners had the last request
        self._sums = BoxSums()
        # The ends of the batches in flight; streams that compute checksums after a batch's copy.
        self._running = deque[list[Completion]]()
        self._streams = dict[torch.device, torch.Stream]()

    async def open(self) -> None:
        """Map the memory of each owner, or connect to an owner that sends its weights.

        Raises `PeerError` if an owner's memory does not fit, and `Unsupported` if it can neither be
        mapped nor sent.
        """
        for number, owner in enumerate(self.owners):
            cells = self.plan.numbers[number]
            known = owner.publication
            try:
                opened = known.sources.get((self.plan, number)) or await self._pull.work(
                    known.open, self.plan, number, self._tensors
                )
                self._sources.update(zip(cells, opened, strict=True))
            except Unsupported as error:
                terms = self._pull.channel, self._device(cells), self._pull.transport
                receiver = self._receivers[number] = known.receiver(*terms)
                receiver.why = str(error)
                self._stages[number] = await receiver.connect(owner)

    def _device(self, cells: Sequence[int]) -> torch.device:
        """Return the device of all tensors of these cells, or the host."""
        devices = {self._tensors[self.plan.cells[n].name].device for n in cells}
        return devices.pop() if len(devices) == 1 else torch.device("cpu")

    def explain(self) -> str:
        """Return a line for each owner: how its weights cross, and why."""
        lines = list[str]()
        for number, owner in enumerate(self.owners):
            receiver = self._receivers.get(number)
            how = "its memory is mapped" if receiver is None else receiver.how
            lines.append(f"{owner.address}: {how}.")
        return "\n".join(lines)

    async def copy(self, batch: Batch) -> None:
        """Copy a batch. The copies and their checksums may be in flight afterwards."""
        sent = defaultdict[int, list[Cell]](list)
        for piece in batch.pieces if self._receivers else ():
            if piece.copied and piece.cell.owner in self._receivers:
                sent[piece.cell.owner].append(piece.cell)
        for number, some in sent.items():
            await self._take_cells(number, some)
        await self._pull.work(self._copy_mapped, batch)

    def _copy_mapped(self, batch: Batch) -> None:
        """Copy the pieces of a batch that lie in mapped memory; compare it after its slices."""
        # With owners that send, tiles of the mapped ones would be a plan for each mixture.
        rest = batch.pieces if self._receivers else self._copy_tiles(batch)
        mapped = [x for x in rest if x.copied and x.cell.owner not in self._receivers]
        copy_pairs([self._pair(piece) for piece in mapped])
        compare = partial(self._compare, batch)
        if self._in_flight:
            self._in_flight[-1].part.then.append(compare)
        else:
            compare()

    async def finish(self) -> None:
        """Copy all slices, and wait until their bytes have landed. Raises the error of a slice."""
        await self._scatter_all()
        await self._settle(wait=True)

    async def end(self) -> None:
        """Leave all lanes."""
        self._ended = True
        for stage in self._stages.values():
            stage.takers.discard(self)
        await self._release()

    def _pair(self, piece: Piece) -> Pair:
        """Return what a piece writes, and what it reads."""
        cell = piece.cell
        tensor = self._tensors[cell.name]
        if piece.of_tensor:
            into = tensor.detach() if tensor.requires_grad else tensor
        else:
            into = part_of(tensor, cell.box.start, cell.box.extents)
        src = self._sources[piece.number]
        if not piece.of_cell:
            start = map(sub, cell.src, self.plan.cells[piece.number].src)
            src = part_of(src, tuple(start), cell.box.extents)
        return into, src

    def _copy_tiles(self, batch: Batch) -> Sequence[Piece]:
        """Copy the pieces of a batch that tiles copy, and return the others."""
        pieces = [piece for piece in batch.pieces if piece.copied]
        if not self._tiled:
            return pieces
        read_at = [self._sources[piece.number].data_ptr() for piece in pieces]
        tiled = batch.tiled
        if tiled is None or tiled.read_at != read_at:
            tiles, left = tiles_of([self._pair(piece) for piece in pieces])
            rest = [pieces[number] for number in left]
            names = {piece.cell.name for piece in {*pieces}.difference(rest)}
            tiled = batch.tiled = TiledPieces(read_at, tiles, names, rest)
        for each in tiled.tiles:
            each.issue()
        # As torch's own copies do: who publishes these tensors notices it.
        increment_version([self._tensors[name] for name in tiled.names])
        return tiled.rest

    def _compare(self, batch: Batch) -> None:
        """Compute checksums of a batch after its copies, and wait for an earlier batch."""
        devices = [device for device in self._devices if device.type != "cpu"]
        self._running.append([completion(device, None) for device in devices])
        while len(self._running) > _WINDOW:
            for end in self._running.popleft():
                end.synchronize()
        for device in self._devices:
            with self._after_copies(device):
                if not self._sums.again(device, batch.tables):
                    self._sums.add(self._parts(batch, device), batch.tables)

    def _parts(self, batch: Batch, device: torch.device) -> list[SummedPart]:
        """Return what landed on a device with a batch, tied names too."""
        parts = list[SummedPart]()
        for piece in batch.pieces:
            tensor = self._tensors[piece.cell.name]
            if tensor.device == device:
                (offset, start, extents) = piece.cell.box
                into = part_of(tensor, start, extents)
                parts.append(SummedPart(piece.number, into, offset, piece.unit))
        return parts

    def _after_copies(self, device: torch.device) -> AbstractContextManager[object]:
        """Make a stream current that follows the copies, while the next batch is copied."""
        if device.type == "cpu":
            return nullcontext()
        current = torch.accelerator.current_stream(device.index)
        stream = self._streams[device] = side_stream(current, "weights", "checksums")
        stream.wait_stream(current)
        return inside(stream)

    def wait_for_bytes(self) -> None:
        """Wait until no copy reads an owner's memory; checksums may still be computed."""
        synchronize_current(self._devices)

    def synchronize(self) -> None:
        """Wait until nothing of this pull runs on a device."""
        self.wait_for_bytes()
        for stream in self._streams.values():
            stream.synchronize()

    def sums(self, count: int) -> list[int]:
        """Return the checksums of what landed, by the numbers of cells, after `wait_for_bytes`."""
        self.synchronize()
        return self._sums.results(count)

    # --- slices through staging buffers

    @property
    def over(self) -> bool:
        return self._ended or time.monotonic() >= self._pull.until

    async def _take_cells(self, number: int, cells: Sequence[Cell]) -> None:
        """Take cells of an owner, in as many slices as they need."""
        owner = self.owners[number]
        stage = self._stages[number]
        stage.takers.add(self)
        itemsizes = [self._tensors[cell.name].itemsize for cell in cells]
        for some, nbytes in await Work(slices, cells, itemsizes, owner.ticket.buffer_bytes):
            await self._take(stage, [BoxSlice(owner, self._receivers[number], some, nbytes)])

    def _size(self, part: BoxSlice) -> tuple[int, int]:
        return part.nbytes, part.owner.ticket.buffer_bytes

    async def _request(self, stage: Staging, batch: Sequence[BoxSlice], tag: int) -> None:
        (part,) = batch
        numbers = part.owner.publication.numbers
        boxes = tuple((numbers[x.name], x.src, x.box.extents) for x in part.cells)
        request = SendSlice(part.owner.id, part.receiver.id, tag, part.nbytes, boxes)

        def ask() -> Weights:  # no cancellation hides the answer
            answer: Weights = runtime().run(part.owner.ask_once, request)
            part.accepted = answer.state == "held"
            part.into = [
                part_of(self._tensors[x.name], x.box.start, x.box.extents) for x in part.cells
            ]
            return answer

        part.owner.judge(await Work(ask))
        self._asked = time.monotonic()

    async def stop(
        self, stage: Staging, lane: Lane, batch: Sequence[BoxSlice], tag: int, posted: int
    ) -> None:
        """Receive a slice that the owner sends. Release the lane if it may send one: the next pull
        would take it."""
        (part,) = batch
        try:
            if part.accepted and not posted:
                await Work(self._inside, lambda: lane.move(stage.spare(part.nbytes), tag))
        except Exception:  # such as no memory
            part.accepted = False
        if not part.accepted:
            await Work(part.receiver.release)

    def _scattering(self, part: BoxSlice, buffer: StagingBuffer) -> Callable[[], Transfer]:
        def issue() -> Transfer:
            memory = buffer.memory[: part.nbytes]
            retain(memory)
            packed = unpacked(memory, [(each.dtype, each.shape) for each in part.into])
            copy_pairs([*zip(part.into, packed, strict=True)])
            end = completion(memory.device, None)
            for call in part.then:
                call()
            return Transfer([end])

        return issue

    def _inside(self, work: Callable[[], T]) -> T:
        with torch.inference_mode(False):
            return self._pull.inside(work)

    async def _check(self, until: float) -> None:
        """Raise if the time of the pull is over, or if weights have changed meanwhile."""
        owners = [self.owners[number] for number in self._stages]
        for owner in owners:
            owner.check()
        if time.monotonic() - self._asked > _ASK:
            for owner in owners:
                await owner.confirm()
            self._asked = time.monotonic()


# ------------------------------------------------------------------------------------------------
# Carry out a pull of weights, in the thread that calls.


async def pull(request: PullRequest) -> int:
    """Pull weights, and return the bytes.

    The caller's thread runs this coroutine. With ``wait=False`` the loop runs it, and helpers do
    what blocks. The steps:

    - `opened`: all owners begin together. Each names the version of its weights, and lists what is
      not known here. Memory is mapped, or an owner that sends its weights is connected.
    - `Copies.copy`, for each batch at its rate: request slices, copy what is mapped, and begin the
      checksums.
    - `Copies.finish` and `end`: copy the last slices, and leave the lanes.
    - `Owner.sums` and `Owner.confirm`: request checksums while the devices copy, and ask each owner
      after the last byte if its weights have changed.
    - Compare the checksums; the error names each parameter whose checksums differ.
    """
    copies = await opened(request)
    planned = copies.plan
    owners = copies.owners
    pace = Limit(runtime(), gbps=request.rate)
    try:
        try:
            for batch in planned.batches:
                await owners[batch.pieces[0].cell.owner].turn(pace, batch.nbytes)
                pace.release()
                await copies.copy(batch)
            await copies.finish()
        finally:
            await copies.end()
        # While the devices copy. A change that comes after the answers is noticed at the end.
        answers = [await owner.sums(sums) for owner, sums in zip(owners, planned.sums, strict=True)]
        await request.work(copies.wait_for_bytes)
        # Nothing is read there any more. The last checksums are computed while the owners answer.
        await runtime().together([owner.confirm() for owner in owners])
        here = await request.work(copies.sums, len(planned.cells))
    except BaseException as error:
        await request.work(copies.synchronize)
        if isinstance(error, PeerError):
            for owner in owners:
                await owner.confirm()  # the end of a publication is the better reason
        raise

    wrong = list[str]()
    for numbers, there, owner in zip(planned.numbers, answers, owners, strict=True):
        if there != [here[n] for n in numbers]:
            differs = [n for n, sum in zip(numbers, there, strict=True) if here[n] != sum]
            wrong += [planned.cells[n].name for n in differs]
            await owner.confirm(again=True)
    if wrong:
        names = ", ".join(dict.fromkeys(wrong))
        raise TransferError(
            f"Expected the owners' checksums of {len(request.tensors)} weights, got others of "
            f"{names}. Do not use any of the weights; pull again."
        )
    return planned.nbytes


async def opened(request: PullRequest) -> Copies:
    """Return the copies of a pull, for which all owners are open."""
    owners = [Owner(request, ticket) for ticket in request.tickets]
    await runtime().together([owner.open() for owner in owners])
    # By the facts of both sides.
    digests = tuple(owner.publication.digest for owner in owners)
    key = digests, request.some, request.batch
    planned = request.plans.get(key)
    if planned is None:
        made = await request.work(_make_plan, request, owners)
        planned = request.plans.setdefault(key, made)
    copies = Copies(request, owners, planned)
    await copies.open()
    return copies


def _make_plan(request: PullRequest, owners: Sequence[Owner]) -> Plan:
    described = items_of(named("parameters", request.parameters))
    cells = plan(described, [x.publication.items for x in owners], request.some)
    itemsizes = {name: tensor.itemsize for name, tensor in request.tensors.items()}
    wanted_sums = [owner.publication.wanted_sums for owner in owners]
    return plan_of(cells, described, itemsizes, request.batch, wanted_sums)


_AT_ONCE = 4  # pulls at the same time whose callers do not wait


class WeightCounts:
    """What pulls of weights have brought to this process."""

    def __init__(self) -> None:
        self._nbytes = 0
        self._spent = {"done": Spent(), "failed": Spent()}

    async def pull(self, request: PullRequest) -> int:
        """Return the bytes of a pull, after counting it."""
        start = time.perf_counter()
        nbytes = 0
        result = "failed"
        try:
            nbytes = await pull(request)
            result = "done"
        finally:
            self._nbytes += nbytes
            self._spent[result].add(time.perf_counter() - start)
            error = sys.exc_info()[1]
            with runtime().released():
                tracing.end("portakv weights", request.began, {"pull.size": nbytes}, error)
        return nbytes

    def figures(self) -> Figures:
        """Return the bytes and the seconds."""
        with runtime().lock:
            return {
                "weight_bytes_total": [{"value": self._nbytes}],
                **histograms("weight_pull_seconds", self._spent),
            }


_counts = WeightCounts()


def count_weights() -> WeightCounts:
    """Return what the pulls of weights of this process have brought, for `Collector` and
    `observe`."""
    return _counts


async def _in_turn(request: PullRequest) -> int:
    """Pull weights after earlier pulls whose callers do not wait."""
    turn = shared_limit("pulls of weights", _AT_ONCE)
    await turn.acquire()
    try:
        return await _counts.pull(request)
    finally:
        turn.release()


class WeightsPull(PartTransfer):
    """A pull of weights in flight, which `pull_weights` returns with ``wait=False``.

    The tensors are valid after `synchronize` or `done` returned without an error, which raise the
    errors of `pull_weights`, and `TransferCancelled`. Until then they must not be read or written.
    """

    _what = "The pull of weights"
    _if_cancelled = "The pull of weights was cancelled. Do not use the weights."

    def __init__(self, request: PullRequest) -> None:
        self._cancelled = False
        self._pull = uninterrupted(
            lambda: runtime().start(_in_turn(request)), undo=lambda handle: handle.cancel()
        )
        super().__init__([self._pull])
        self.carried = "weights", "tensors are filled by name"
        self._began = time.perf_counter()
        self._ended: float | None = None
        self._pull.on_end(self._note_end)

    def _note_end(self) -> None:
        self._ended = time.perf_counter()

    @property
    def statistics(self) -> Statistics:
        """Return the progress so far; never block or raise.

        Bytes count after the end. Weights have no blocks.
        """
        seconds = None if self._ended is None else self._ended - self._began
        cancelled = isinstance(self.error, TransferCancelled)
        return Statistics(self.nbytes, 0, 0, *self.carried, seconds, int(self.ended), cancelled)

    @property
    def nbytes(self) -> int:
        """Return the bytes that were pulled; 0 before the end and after an error."""
        return self._pull.value or 0

    @property
    def ended(self) -> bool:
        """Return True if the pull has ended, with or without an error; never block or raise."""
        return self._pull.ended

    @property
    def error(self) -> PortaKVError | None:
        """Return the error of a pull that has ended; never block or raise."""
        error = self._pull.error
        return None if error is None else known(error, self._what, self._if_cancelled)

    def cancel(self) -> bool:
        """Copy no further batch; return False if the pull has ended."""
        if self._cancelled:  # a second time would end the first one's clean-up
            return not self.ended
        self._cancelled = True
        return self._pull.cancel()


@overload
def pull_weights(
    channel: Channel,
    tickets: bytes | Sequence[bytes],
    parameters: Parameters,
    *,
    some: bool = False,
    max_gbps: float | None = None,
    timeout: float | None = 600.0,
    transport: str | None = None,
    wait: Literal[True] = True,
) -> int: ...
@overload
def pull_weights(
    channel: Channel,
    tickets: bytes | Sequence[bytes],
    parameters: Parameters,
    *,
    some: bool = False,
    max_gbps: float | None = None,
    timeout: float | None = 600.0,
    transport: str | None = None,
    wait: Literal[False],
) -> WeightsPull: ...
def pull_weights(
    channel: Channel,
    tickets: bytes | Sequence[bytes],
    parameters: Parameters,
    *,
    some: bool = False,
    max_gbps: float | None = None,
    timeout: float | None = 600.0,
    transport: str | None = None,
    wait: bool = True,
) -> int | WeightsPull:
    """Fill tensors from owners that publish the same names, and return the bytes.

    Blocks until checksums agree, or with ``wait=False`` returns a `WeightsPull` immediately. Copies
    on the current stream, or then on a separate stream that is ordered after it. The memory of
    owners on this host is mapped, and stays open for the next pull. Other owners send the weights
    by a transport.

    Args:
        tickets: preferred owners first.
        some: owners have further parameters (the reader is one stage of a pipeline).
        max_gbps: the most 10^9 bytes in a second.
        timeout: seconds for the whole pull; None for no limit.
        transport: the name of the transport for memory that cannot be mapped. None: the transport
            that the owner names, else the first that runs here.
        wait: block until the end.

    Raises `LayoutError`, which lists all differences, and `InvalidTerms`, before it writes a byte.
    After any other error the tensors are undefined until a pull succeeds: `OfferGone`, `PeerError`,
    `TransferTimeout`, `Unsupported` if an owner's memory can neither be mapped nor sent,
    `TransferError` if weights changed meanwhile, or with the names whose checksums differ.
    """
    request = PullRequest(channel, tickets, parameters, some, max_gbps, timeout, transport, wait)
    if request.wait:
        return runtime().run(_counts.pull, request)
    return WeightsPull(request)


def prepare_weights(
    channel: Channel,
    tickets: bytes | Sequence[bytes],
    parameters: Parameters,
    *,
    some: bool = False,
    timeout: float | None = 600.0,
    transport: str | None = None,
) -> str:
    """Open the owners' memory, or connect to those whose memory cannot be mapped, and plan the
    copies, so that `pull_weights` does not have to.

    Returns a line for each owner: how its weights cross, and why. Writes nothing. Takes the
    arguments, and raises the errors, of `pull_weights`.
    """
    request = PullRequest(channel, tickets, parameters, some, None, timeout, transport)
    return runtime().run(_explained, request)


async def _explained(request: PullRequest) -> str:
    copies = await opened(request)
    return copies.explain()
