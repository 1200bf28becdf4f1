# SPDX-License-Identifier: Apache-2.0
"""Take rows from owners through staging buffers.

An `Intake` takes slices of rows or of weights. While one slice crosses, the owner fills the buffer
of the next, and the reader empties the buffer of the one before. A `StagedReceiver` takes all rows
of one offer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from math import inf
from time import monotonic
from typing import Any, Generic, TypeAlias, TypeVar

import torch
from msgspec.structs import replace

from portakv.arguments import first_few
from portakv.copy.choose_encoding import EncodingChoice
from portakv.copy.handle import BlockTransfer
from portakv.copy.inside import copy_checked
from portakv.errors import (
    PackOverflow,
    PeerError,
    PortaKVError,
    TransferCancelled,
    TransferError,
    TransferTimeout,
    Unsupported,
)
from portakv.graph.trace import Ran, Trace
from portakv.layout.encodings import PACK, PACKED_DTYPE, Pack
from portakv.migrate.checksum import checksum_of
from portakv.migrate.connections import Source, Staging, StagingBuffer
from portakv.migrate.messages import (
    Answer,
    Choose,
    Chosen,
    ForRows,
    Gather,
    Refused,
    Stop,
    Stopped,
    Sum,
)
from portakv.migrate.plan import Slice, Step
from portakv.migrate.pull import CANCELLED, Pull, known
from portakv.migrate.staging import Chunks, Slots, has_ended, part_of, rows_bytes, unfit_blocks
from portakv.migrate.transports.base import Lane, Moving, MovingStage
from portakv.runtime.streams import StreamFence
from portakv.runtime.transfer import Transfer
from portakv.runtime.word_sums import MODULUS
from portakv.tasks import End, Handle, Rate, Wait, Work, blocking, runtime
from portakv.view import Index, KVView

T = TypeVar("T")

# ------------------------------------------------------------------------------------------------
# Decide how the rows of a step cross in staging buffers: raw, or as slots of `pack`.
#
# The owner packs inside the gather into its staging buffer, and the reader unpacks inside the
# scatter from its own. Slots have the owner's blocks. Tokens outside of whole blocks cross raw.

#: A step, or a part of one, and the slots that it crosses in; None: it crosses raw.
Crossing: TypeAlias = tuple[Step, Slots | None]


def crossings(step: Step, pack: Pack | None) -> tuple[list[Crossing], str]:
    """Return the parts of a step with how each crosses, and why a part crosses raw although
    ``pack`` was requested (empty if none does).

    ``pack``: what the caller requested; None: raw rows, unless a side is packed.

    Raises `InvalidTerms` for parameters that the rows' planes cannot have.
    """
    if step.cut.packed:
        return [(step, _slots_of_sides(step))], ""
    if pack is None:
        return [(step, None)], ""
    slots = _slots(step, pack)
    if isinstance(slots, str):
        return [(step, None)], slots

    # Whole blocks of the owner are packed; what stands before and after them crosses raw.
    unit = slots.unit
    before = min(-step.src_index.offset % unit, step.tokens)
    whole = (step.tokens - before) // unit * unit
    after = step.tokens - before - whole
    layers = range(step.cut.dst.layers)
    ends = ((0, before, None), (before, whole, slots), (before + whole, after, None))
    made = [(step.part(layers, at, n), how) for at, n, how in ends if n]
    why = ""
    if before or after:
        why = f"a part of a block of {unit} tokens cannot be packed"
    return made, why


def _slots(step: Step, pack: Pack) -> Slots | str:
    """Return the slots for the owner's blocks of raw rows, or why there are none, as a clause."""
    dst = step.cut.dst
    described = step.owner.handshake.described[step.cut.group]
    unit = described.block_size
    numbers = {*described.group.numbers, *dst.form.dtypes}
    if described.group.page:
        return f"{PACK!r} takes rows, not opaque pages"
    if numbers != {PACKED_DTYPE} or not (described.group.numbers and dst.form.dtypes):
        return f"{PACK!r} takes rows of {PACKED_DTYPE} alone"
    if not unit:
        return "the owner's view has no blocks"
    if step.ticket.steps[step.cut.group] != unit:
        return f"the offer does not name blocks of {unit} tokens"
    slots = Slots(pack, unit)
    try:
        planes = slots.planes(dst)
    except Unsupported as error:
        return error.why
    if any(plane.slot_bytes >= plane.raw_bytes for plane in planes):
        return "its slots are not smaller than its rows"
    # A buffer has space for the raw rows of its blocks, because some may not fit into slots.
    if rows_bytes(dst, 1, unit, dst.heads) > step.owner.handshake.slot_bytes:
        return f"a staging buffer holds no block of {unit} tokens of a layer"
    return slots


def _slots_of_sides(step: Step) -> Slots:
    """Return the slots of packed sides."""
    form = step.cut.dst.form
    described = step.owner.handshake.described[step.cut.group]
    text = described.group.encoding
    if form.encoding and not text:
        raise Unsupported(
            f"Pulling raw rows of {step.owner.address} into a packed view through staging",
            "blocks that do not fit would be lost; pull into a raw view, and pack them there",
        )
    slots = Slots(Pack.of_text(text), described.block_size)
    large = any(plane.slot_bytes > plane.raw_bytes for plane in slots.planes(step.cut.dst))
    if large and not form.encoding:  # slices are cut by the bytes of the reader's rows
        what = f"Pulling packed blocks of {step.owner.address} through staging into a raw view"
        raise Unsupported(what, "its slots are larger than its rows; pull into a packed view")
    return slots


def scattered(src: KVView, dst: KVView, dst_index: Index, count: int) -> BlockTransfer:
    """Copy a packed chunk to a reader's rows, raw or packed.

    If the rows have other blocks, they are unpacked into memory between.
    """
    size = src.form.block_size
    alike = dst.form.block_size in (0, size) and dst_index.plan_step in (0, size)
    if alike and dst_index.offset % size == 0:
        return copy_checked(src, dst, None, dst_index, count)
    rows = _dense(dst, count)
    unpacked = copy_checked(src, rows, None, None, count)
    return BlockTransfer.together([unpacked, copy_checked(rows, dst, None, dst_index, count)])


def _dense(view: KVView, count: int) -> KVView:
    """Return new memory for ``count`` tokens of a view, on its device."""
    with torch.inference_mode(False):
        made = [
            torch.empty(
                (view.layers, count, view.heads * width // 2),
                dtype=torch.bfloat16,
                device=view.device,
            )
            for width in view.widths
        ]
    return KVView(made, "kv | layer token (head dim)", kv=view.kv, heads=view.heads)


def runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield the runs of sorted numbers, as the first and how many."""
    first = 0
    for at, number in enumerate(numbers):
        if at + 1 == len(numbers) or numbers[at + 1] != number + 1:
            yield numbers[first], at + 1 - first
            first = at + 1


def flagged(step: Step, positions: Sequence[int]) -> PackOverflow:
    """Return the error of packed blocks of a step that hold no rows, by their sorted positions."""
    size = step.page
    count = (positions[-1] + 1) * size
    numbers = []
    for index in (step.src_index, step.dst_index):
        slots = index.to_host().slots(count, size)
        numbers.append(tuple([int(slots[at]) // size for at in positions]))
    return PackOverflow(
        f"Expected packed blocks, got {len(positions)} that did not fit into slots of {PACK!r}, "
        f"blocks {first_few(numbers[0])} of {step.owner.address}. Pull these blocks from a raw "
        f"view.",
        *numbers,
    )


# ------------------------------------------------------------------------------------------------
# Receive slices through staging buffers, for rows and for weights.

PATIENCE = 30.0  # seconds for which a pull waits for a buffer, and for a busy owner
LOOK = 0.05  # seconds between two looks at a pull that waits
STOPPING = 0.5  # seconds for the answer of an owner that is to stop, and for its last slices
SOON = 0.02  # seconds for which a helper waits for bytes: by the loop they would come later
MOMENT = 1e-3  # seconds for which a pull waits for its turn before it empties a buffer


OneSlice = TypeVar("OneSlice")


@dataclass(frozen=True, eq=False)
class InFlight(Generic[OneSlice]):
    """A slice on its way into a staging buffer."""

    part: OneSlice
    stage: Staging
    buffer: StagingBuffer
    moving: Moving
    lane: Lane


class Intake(ABC, Generic[OneSlice]):
    """The slices that one pull takes from owners, in the order of its requests.

    Each is copied from its staging buffer after its bytes have come. No host waits between the
    slices of a device: streams order all copies.
    """

    def __init__(self) -> None:
        self._in_flight = deque[InFlight[OneSlice]]()
        #: With the copy from the buffer.
        self._scattered = deque[tuple[InFlight[OneSlice], Transfer]]()
        self._posted = 0  # slices of the present request that have a receive

    # --- what differs between rows and weights

    @property
    @abstractmethod
    def over(self) -> bool:
        """Return True if the pull waits for no slice any more."""

    @abstractmethod
    async def _check(self, until: float) -> None:
        """Raise if the pull waits no longer for something that did not come until ``until``."""

    @abstractmethod
    def _inside(self, work: Callable[[], T]) -> T:
        """Do work on streams after the caller's."""

    @abstractmethod
    def _size(self, part: OneSlice) -> tuple[int, int]:
        """Return the bytes of a slice in a staging buffer, and the most bytes of a buffer of its
        owner."""

    @abstractmethod
    async def _request(self, stage: Staging, batch: Sequence[OneSlice], tag: int) -> None:
        """Have the owner send slices under the tags from ``tag`` on."""

    @abstractmethod
    async def stop(
        self, stage: Staging, lane: Lane, batch: Sequence[OneSlice], tag: int, posted: int
    ) -> None:
        """Stop a request of which ``posted`` slices have a receive: both sides stay in step, or the
        lane is closed."""

    @abstractmethod
    def _scattering(self, part: OneSlice, buffer: StagingBuffer) -> Callable[[], Transfer]:
        """Do the host's part of the copy of a slice from its buffer while the bytes arrive; return
        a function that issues the copy on the streams that are current then."""

    def _landed(self, part: OneSlice, placing: Transfer) -> None:
        """Note a slice whose bytes and copy have ended."""

    # --- in the coroutine of the pull

    async def _take(self, stage: Staging, batch: Sequence[OneSlice]) -> None:
        """Request slices, and post the transport's receives for all of them in their order."""
        await self._take_turn(stage)
        try:
            lane = await self._lane(stage)
            tag = stage.tag + 1
            stage.tag += len(batch)
            self._posted = 0
            try:
                await self._request(stage, batch, tag)
                for number, part in enumerate(batch):
                    buffer = await self._free_buffer(stage, lane, self._size(part)[0])
                    try:
                        await self._post(part, stage, buffer, lane, tag + number)
                    except BaseException:
                        if self._posted == number:
                            stage.give_back(buffer)
                        raise
            except BaseException:
                await self.stop(stage, lane, batch, tag, self._posted)
                raise
        finally:
            stage.turn.release()

    async def _take_turn(self, stage: Staging) -> None:
        """Wait for the owner's turn; empty the buffers of this pull meanwhile, which others may
        need."""
        until = monotonic() + PATIENCE
        time = runtime().time
        while not await stage.turn.acquire(until=time() + (MOMENT if self._in_flight else LOOK)):
            if self._in_flight:
                await self._scatter()
            await self._check(until)

    async def _lane(self, stage: Staging) -> Lane:
        """Return the lane to an owner, which knows it."""
        with runtime().released():
            lane = stage.lane()
        if lane is not stage.met:
            await Work(lane.meet, lambda: self.over)
            stage.met = lane
        return lane

    async def _free_buffer(self, stage: Staging, lane: Lane, nbytes: int) -> StagingBuffer:
        """Return a free staging buffer; empty the oldest of this pull if there is none."""
        until = monotonic() + PATIENCE
        while not stage.buffers:
            if self._in_flight:
                await self._scatter()
            else:
                await stage.freed.wait_for(lambda: stage.buffers, runtime().time() + LOOK)
            await self._check(until)
        buffer = stage.buffers.pop()
        try:
            if buffer.moving is not None and buffer.must_be_free(lane, nbytes):
                await self._until(buffer.moving, MovingStage.FREE)
        except BaseException:
            stage.give_back(buffer)
            raise
        return buffer

    async def _post(
        self, part: OneSlice, stage: Staging, buffer: StagingBuffer, lane: Lane, tag: int
    ) -> None:
        """Have the transport bring the bytes of a slice into a buffer."""
        nbytes, most_bytes = self._size(part)

        def post() -> None:
            buffer.prepare(nbytes, most_bytes)
            moving = lane.move(buffer.memory[:nbytes], tag)
            buffer.moving = moving
            buffer.lane = lane
            self._in_flight.append(InFlight(part, stage, buffer, moving, lane))
            self._posted += 1

        if stage.device.type == "cpu" and nbytes <= buffer.memory.nbytes:
            with runtime().released():
                self._inside(post)
        else:
            await blocking().work(self._inside, post)

    async def _scatter(self) -> None:
        """Issue the copy of the oldest slice from its staging buffer, after its bytes."""
        flying = self._in_flight[0]
        buffer = flying.buffer
        moving = flying.moving
        issue = self._scattering(flying.part, buffer)

        def copy() -> bool:
            if not moving.wait_for(MovingStage.ISSUED, SOON):
                return False
            moving.follow(0.0)
            placing = issue()
            self._scattered.append((flying, placing))
            if buffer.memory.device.type == "cpu":  # no stream orders the next bytes after the copy
                has_ended(placing, wait=True)
            buffer.copy = placing
            self._in_flight.popleft()
            flying.stage.give_back(buffer)
            return True

        while not await blocking().work(self._inside, copy):
            await self._until(moving, MovingStage.ISSUED)
        await self._settle(wait=False)

    async def _scatter_all(self) -> None:
        """Issue the copies of all slices, and wait until their bytes have come."""
        while self._in_flight:
            await self._scatter()
        for flying, _ in self._scattered:
            await self._until(flying.moving, MovingStage.OVER)

    async def _settle(self, wait: bool) -> None:
        """Note the slices whose bytes and copies have ended, or wait for all."""
        while self._scattered:
            flying, placing = self._scattered[0]
            if not wait and not flying.moving.has(MovingStage.OVER):
                return
            await self._until(flying.moving, MovingStage.OVER)
            if not has_ended(placing, wait=False):
                if not wait:
                    return
                await blocking().work(has_ended, placing, True)
            self._landed(flying.part, placing)
            self._scattered.popleft()

    async def _until(self, moving: Moving, stage: MovingStage) -> None:
        """Wait until a buffer in flight comes to a stage, as long as the pull waits."""
        until = monotonic() + PATIENCE
        while not await moving.seen(stage, LOOK):
            await self._check(until)

    async def _release(self) -> None:
        """Return the buffers of slices in flight, and wait for the copies, so that nothing is
        written afterwards.

        Bytes that do not come in time end with their lane, unless another pull needs the lane.
        """
        for each in self._in_flight:
            each.stage.give_back(each.buffer)
        until = monotonic() + STOPPING
        for flying, placing in self._scattered:
            await self._end(flying, placing, until)
        self._in_flight.clear()
        self._scattered.clear()

    async def _end(self, flying: InFlight[OneSlice], placing: Transfer, until: float) -> None:
        """Wait for a copy that follows bytes on their way; see `_release`."""
        with suppress(PortaKVError):  # the pull has an error before
            while not placing.done():
                takers = flying.stage.takers
                if monotonic() < until or not all(taker.over for taker in takers):
                    await Wait(until=runtime().time() + MOMENT)
                    continue
                ended = PeerError("Its pull ended before the buffers had crossed.")
                await Work(flying.lane.close, ended)
                await Work(placing.synchronize)


# ------------------------------------------------------------------------------------------------
# The slices in which the rows of a pull arrive in staging buffers.

PACED = 0.1  # seconds of a slice at a limited rate: a larger slice would be a burst
#: The slices of a pull that is large enough: one is filled while another crosses. On devices each
#: slice costs the host 0.5 ms, more than the wire of 128 MiB (benchmarks/notes/migration.md).
SLICES_ON_HOST = 8
SLICES_ON_DEVICE = 4
#: The bytes below which slices are not made smaller: each has its cost on both sides.
LEAST_ON_HOST = 32 << 20
LEAST_ON_DEVICE = 128 << 20


class Arrival(End[None]):
    """The end of a slice of a step, for a pull and its layers.

    Attributes:
        staged_bytes: of the slice in a staging buffer.
        slots: how the slice is packed there; None: it crosses raw.
        again: the slices that bring its blocks that did not fit, raw. It ends after these.
        unfit: the positions in the step of its blocks that hold no rows anywhere.
    """

    again: Sequence[Arrival] = ()
    unfit: Sequence[int] = ()

    def __init__(self, step: Step, part: Slice, slots: Slots | None = None) -> None:
        super().__init__(runtime())
        self.step = step
        self.part = part
        self.cross_in(slots)

    def scattering(self, chunks: Chunks) -> Callable[[], BlockTransfer]:
        """Return a function that copies the rows of the slice from a staging buffer, after the work
        of the stream that is current then."""
        layers, first, tokens = self.part
        dst_index = self.step.dst_index.shifted(first)
        window = slice(layers.start, layers.stop)
        if self.slots is not None:
            dst = part_of(self.step.cut.dst, window)
            packed = chunks.of(dst, tokens, self.slots)[1]
            return partial(scattered, packed, dst, dst_index, tokens)
        dst = part_of(self.step.cut.dst.as_bytes(), window)
        src = chunks.of(dst, tokens)[1]
        return partial(copy_checked, src, dst, None, dst_index, tokens)

    @property
    def encoding(self) -> str:
        """Return the encoding that the owner's messages name; empty: raw rows."""
        return "" if self.slots is None else self.slots.pack.text

    @property
    def packed_blocks(self) -> int:
        """Return the number of blocks that cross in slots; 0 for a raw slice."""
        return 0 if self.slots is None else self.part.tokens // self.slots.unit

    def cross_in(self, slots: Slots | None) -> None:
        """Have the slice, which was not requested yet, cross in slots, or raw."""
        view = self.step.cut.dst.as_bytes()
        layers, _, tokens = self.part
        self.slots = slots
        self.staged_bytes = rows_bytes(view, len(layers), tokens, view.heads, slots)

    def end_with(self, copy: Transfer) -> int:
        """End the slice by its copy, which has ended; return the number of blocks that did not fit.

        The slices that bring them raw are then in `again`. If no raw rows of them exist,
        `end_unfit` ends the slice.
        """
        unfit = unfit_blocks(copy)
        if unfit and self.slots is not None:
            if self.step.cut.packed:
                before = self.part.first // self.slots.unit
                self.unfit = [before + at for at in unfit]
                return 0
            self.again = [*self._raw_slices(unfit, self.slots.unit)]
            return len(unfit)
        self.end()
        return 0

    def _raw_slices(self, blocks: Sequence[int], unit: int) -> Iterator[Arrival]:
        """Yield slices that bring blocks of this one raw, by their positions in it."""
        layers, first, _ = self.part
        for start, count in runs(blocks):
            yield Arrival(self.step, Slice(layers, first + start * unit, count * unit))

    def end(self, error: BaseException | None = None) -> None:
        """End the slice, unless it has ended."""
        if not self.ended:
            self.settle(None, error)


def end_unfit(taken: Sequence[Arrival], errors: list[PackOverflow]) -> None:
    """End the slices with blocks that hold no rows, after all slices of an offer were taken.

    ``errors`` first gets an error for each step, which names such blocks of all of its slices. The
    error of a slice names those of its layers.
    """
    spoilt = [each for each in taken if each.unfit]
    steps = {id(each.step): each.step for each in spoilt}
    of_step = defaultdict[int, set[int]](set)
    of_layers = defaultdict[tuple[int, range], set[int]](set)
    for each in spoilt:
        of_step[id(each.step)].update(each.unfit)
        of_layers[id(each.step), each.part.layers].update(each.unfit)

    errors += [flagged(step, sorted(of_step[number])) for number, step in steps.items()]
    for each in spoilt:
        each.end(flagged(each.step, sorted(of_layers[id(each.step), each.part.layers])))


def arrivals(
    steps: Sequence[Step], max_gbps: float, pack: Pack | None
) -> tuple[list[Arrival], str]:
    """Return the slices of steps, packed slices first, and why rows cross raw although ``pack`` was
    requested (empty if none do).

    They are small enough that several are under way, large enough that their number costs little,
    and not longer than a moment at a limited rate.
    """
    parts = list[Crossing]()
    reasons = list[str]()
    for step in steps:
        some, why = crossings(step, pack)
        parts += some
        reasons.append(why)
    nbytes = sum(step.nbytes for step in steps)
    on_host = steps[0].cut.dst.device.type == "cpu"
    slices = SLICES_ON_HOST if on_host else SLICES_ON_DEVICE
    most = max(LEAST_ON_HOST if on_host else LEAST_ON_DEVICE, -(-int(nbytes) // slices))
    if max_gbps < inf:
        most = min(most, int(PACED * 1e9 * max_gbps))
    # Slices are cut by their raw bytes, so that a buffer has space for blocks that do not fit.
    made = [
        Arrival(step, part, slots)
        for step, slots in parts
        for part in step.slices(most, 1 if slots is None else slots.unit)
    ]
    if any(slots for _, slots in parts):
        made.sort(key=lambda each: each.slots is None)  # slices of one encoding are one request
    return made, next(filter(None, reasons), "")


# ------------------------------------------------------------------------------------------------
# Send the requests of a pull to its owners: for rows, for checksums, and for the choice of an
# encoding.


async def ask(
    source: Source,
    request: ForRows,
    pull: Pull,
    patience: float = PATIENCE,
    by: Callable[..., Awaitable[Any]] | None = None,
) -> Answer:
    """Return an owner's answer to a request for rows; ask again while the owner is busy.

    ``by``: `Channel.answer` of the owner's channel, or of the channel of an agreement with it.
    """
    until = monotonic() + patience
    owner = source.owner
    asks = by or owner.channel.answer
    chooses = isinstance(request, Choose)
    kind: Any = Answer | Chosen if chooses else Answer
    while not pull.over:
        try:
            answer: Answer = await asks(owner.address, request, kind, stop=lambda: pull.over)
        except TransferTimeout:
            if pull.over:
                break
            raise
        if answer.state == "done":
            return answer
        if answer.state == "gone":
            raise source.ticket.gone(answer.why)
        if answer.state != "busy" or monotonic() > until:
            left_out = "chose no encoding" if chooses else "sent no rows"
            raise Refused(f"{owner.address} {left_out}: {answer.why or 'it is busy.'}")
        pause = answer.seconds if answer.seconds > 0 else 1e-3
        # At most this long, because the pull may end meanwhile.
        await Wait(until=runtime().time() + min(pause, 0.05))
    raise TransferCancelled(CANCELLED)


async def verified(step: Step, pull: Pull) -> None:
    """Compare the rows that a step copied with the owner's rows, by checksums."""
    whole = step.owner_part(range(step.cut.dst.layers), 0, step.tokens)
    source = Source(step.ticket, step.owner)
    local = 0
    remote = 0
    for start, end in step.runs():
        part = replace(whole, first=whole.first + start, count=end - start)
        dst_index = step.dst_index.shifted(start)
        local += await blocking().work(checksum_of, step.cut.dst, dst_index, part)
        request = Sum(step.ticket.epoch, step.ticket.offer, part)
        remote += (await ask(source, request, pull, inf)).digest
    if (local - remote) % MODULUS:
        raise TransferError(
            f"Expected the bytes of the rows of {step.owner.address}, got others (checksums "
            f"{local:x} and {remote:x}); no rows were committed. Pull again, or by another "
            f"transport."
        )


# --- the choice of an encoding


async def leave_to_owner(
    arrivals: list[Arrival], pull: Pull, most_gbps: float
) -> list[EncodingChoice]:
    """Have the owner choose how the slices cross that were made for packed rows; return its
    choices, one for each step.

    ``arrivals``: all slices of an offer, which get their slots, or none. ``most_gbps``: the rate
    that the caller allows.
    """
    choices = list[EncodingChoice]()
    steps = {id(each.step): each.step for each in arrivals if each.slots is not None}
    for step in steps.values():
        choice = await _choice_of(step, pull, most_gbps)
        choices.append(choice)
        if choice.pack is None:  # it concerns more rows than a reason for parts of blocks
            pull.raw_because = _clause(choice.why)
        for each in arrivals:
            if each.step is step and each.slots is not None:
                unit = each.slots.unit
                each.cross_in(None if choice.pack is None else Slots(choice.pack, unit))
    arrivals.sort(key=lambda each: each.slots is None)  # slices of one encoding are one request
    return choices


async def _choice_of(step: Step, pull: Pull, most_gbps: float) -> EncodingChoice:
    """Return the owner's choice for the whole blocks of a step, at the rate of its transport.

    The rows cross raw as long as the rate is not known, and if the owner makes no choice that this
    release knows.
    """
    source = Source(step.ticket, step.owner)
    history = step.owner.staging.history
    link = min(history.gbps, most_gbps)
    if link == inf:
        name = step.owner.staging.transport.name
        return EncodingChoice(None, f"No recent pull has measured the rate of {name}.")

    part = step.owner_part(range(step.cut.dst.layers), 0, step.tokens)
    terms = part, link, history.needs_sample(step.window)
    request = Choose(step.ticket.epoch, step.ticket.offer, *terms)
    try:
        answer = await ask(source, request, pull)
    except Refused as error:  # it stays busy, or is of a release that does not know the request
        return EncodingChoice(None, f"The owner made no choice: {error}", link)
    if not isinstance(answer, Chosen):
        return EncodingChoice(None, "The owner made no choice: its answer has none.", link)

    pack = None
    if answer.encoding:
        try:
            pack = Pack.of_text(answer.encoding)
            slots = _slots(step, pack)
        except PortaKVError as error:  # also the format of a later release
            slots = str(error)
        if isinstance(slots, str):
            return EncodingChoice(None, f"The owner chose {answer.encoding!r}: {slots}", link)
    figures = answer.packing_gbps, answer.ratio, answer.escapes, answer.fits
    return EncodingChoice(pack, answer.why or "The owner gave no reason.", link, *figures)


def _clause(sentence: str) -> str:
    """Return a sentence as a clause."""
    return f"{sentence[:1].lower()}{sentence[1:]}".rstrip(".")


#: Slices of a request, after which another pull of the owner's rows gets a turn; fewer at a limited
#: rate.
BATCH = 16
MOST_PACED = 8


class StagedReceiver(Intake[Arrival]):
    """Takes the rows of one offer for a pull.

    A helper that does a part of the work has a stream after that of the caller.

    Attributes:
        arrivals: the ends of the slices.
        crossed: ends when all bytes have left the owner's memory.
    """

    def __init__(
        self,
        trace: Trace,
        steps: Sequence[Step],
        pull: Pull,
        max_gbps: float,
        pack: Pack | None,
        auto: bool,
    ) -> None:
        super().__init__()
        first = steps[0]
        self._runtime = runtime()
        self._trace = trace
        self._auto = auto
        self._most_gbps = max_gbps
        self._source = Source(first.ticket, first.owner)
        self._stage = first.owner.staging
        self._pull = pull
        if pull.after is None:
            pull.after = StreamFence(first.cut.dst.device)
        self._after = pull.after
        self._rate = Rate(max_gbps, self._runtime.time)
        self.arrivals, why = arrivals(steps, max_gbps, pack)
        pull.raw_because = pull.raw_because or why
        self._packed = False  # some slices were requested packed
        self.crossed = End[None](self._runtime)
        self._last = False  # all slices were requested

    def begin(self) -> None:
        """Begin to take the slices. Any thread may call it."""
        steps = Handle(self._runtime, self._run())
        steps.on_end(self._cross)
        self._pull.crossing.append(self.crossed)
        self._pull.slices.append(steps)  # its copies have ended, too
        steps.begin()

    @property
    def measures(self) -> bool:
        """Return True if the slices cross raw, and as fast as the transport takes them."""
        return self._most_gbps == inf and not self._packed

    @property
    def over(self) -> bool:
        return self._pull.over

    # --- in the coroutine

    async def _run(self) -> None:
        """Take all slices, after earlier pulls of the owner's rows."""
        await self._stage.places.acquire()
        try:
            await self._take_or_stop()
        finally:
            self._stage.places.release()

    async def _take_or_stop(self) -> None:
        """Take all slices; end after the last copy, with or without an error."""
        began = monotonic()
        stage = self._stage
        stage.takers.add(self)
        number = len(stage.takers)
        error: BaseException | None = None
        try:
            await self._check(inf)
            await self._take_all()
        except BaseException as caught:
            error = caught
            # The others of the pull need not go on, and no mark is waited for.
            self._pull.stop(known(caught))
            raise
        finally:
            stage.takers.discard(self)
            await self._release()
            for arrival in self.arrivals:
                arrival.end(error)
            queue = f"take:{self._source.owner.number}"
            what = len(self._trace.ran) + 1, "take", 1, 0, ()
            self._trace.add("take", Ran(queue, number, began, monotonic(), *what))

    async def _take_all(self) -> None:
        """Take all slices."""
        if self._auto:
            choices = await leave_to_owner(self.arrivals, self._pull, self._most_gbps)
            self._pull.choices += choices
            for choice in choices:
                self._trace.note("encoding", monotonic(), choice.figures())
        start = self._stage.history.begin()
        await self._take_each(self.arrivals)
        if not self._last:
            await self._settle(wait=True)  # only then it is known which blocks did not fit
            end_unfit(self.arrivals, self._pull.unfit)
            self._last = True
            await self._take_each([x for each in self.arrivals for x in each.again])
        await self._scatter_all()
        self._look_at_bytes()
        await self._settle(wait=True)
        takers = [*self._stage.takers]  # of all pulls, since they share the transport
        if start is not None and all(taker.measures for taker in takers):
            self._stage.history.end(start)

    async def _take_each(self, some: Sequence[Arrival]) -> None:
        """Take slices by requests for some of them, and issue their copies."""
        for encoding, alike in groupby(some, lambda each: each.encoding):
            listed = [*alike]
            if encoding:
                self._packed = True
                self._pull.packed = True
            batch = BATCH if self._most_gbps == inf else MOST_PACED
            for start in range(0, len(listed), batch):
                await self._take(self._stage, listed[start : start + batch])
        self._last = self._last or not self._packed
        while self._in_flight:
            await self._scatter()

    async def _free_buffer(self, stage: Staging, lane: Lane, nbytes: int) -> StagingBuffer:
        await self._pace(nbytes)
        await self._check(inf)
        return await super()._free_buffer(stage, lane, nbytes)

    def _size(self, part: Arrival) -> tuple[int, int]:
        return part.staged_bytes, part.step.owner.handshake.slot_bytes

    async def _request(self, stage: Staging, batch: Sequence[Arrival], tag: int) -> None:
        ticket = self._source.ticket
        parts = tuple(each.step.owner_part(*each.part) for each in batch)
        name = stage.transport.name
        encoding = batch[0].encoding
        gather = Gather(ticket.epoch, ticket.offer, parts, name, tag, encoding)
        await ask(self._source, gather, self._pull, PATIENCE, stage.channel.answer)

    def _scattering(self, part: Arrival, buffer: StagingBuffer) -> Callable[[], Transfer]:
        copy = part.scattering(buffer.chunks)

        def issue() -> Transfer:
            self._look_at_bytes()
            return copy()

        return issue

    def _inside(self, work: Callable[[], T]) -> T:
        with torch.inference_mode(False), self._after.inside():
            return work()

    def _look_at_bytes(self) -> None:
        """Let the pull ask about its offer if all bytes have left the owner's memory."""
        flying = [*self._in_flight, *(each for each, _ in self._scattered)]
        if self._last and all(each.moving.has(MovingStage.OVER) for each in flying):
            self._cross()

    def _cross(self) -> None:
        """Note that all bytes have left the owner's memory, or that no more will."""
        if not self.crossed.ended:
            self.crossed.settle(None, None)
        self._pull.go_on()

    def _landed(self, part: Arrival, placing: Transfer) -> None:
        """End a slice; count it, and its blocks that did not fit."""
        unfit = part.end_with(placing)
        nbytes = part.staged_bytes
        history = self._stage.history
        self._pull.wire_nbytes += nbytes
        self._pull.blocks_raw += unfit
        if part.slots is None:
            history.count(nbytes, limited=self._most_gbps < inf)
        else:
            history.count_packed(nbytes, part.step.window, part.packed_blocks, unfit)

    async def stop(
        self, stage: Staging, lane: Lane, batch: Sequence[Arrival], tag: int, posted: int
    ) -> None:
        """Stop a request: the owner sends no more slices than it says, and this side receives
        them."""
        owner = self._source.owner
        if owner.gone or lane.gone is not None:
            return
        why = "The owner did not stop; its buffers did not cross."
        try:
            stop = Stop(tag, posted)
            answer = await stage.channel.answer(owner.address, stop, Stopped, STOPPING)
            rest = batch[posted : answer.parts]
            if len(rest) > owner.handshake.slots:  # it has no buffers for so many
                why = "The owner sent too many slices; its buffers did not cross."
                raise PeerError(why)
            why = "A pull did not receive all slices that its owner sent."

            def receive() -> None:
                for number, arrival in enumerate(rest, posted):
                    lane.move(stage.spare(arrival.staged_bytes), tag + number)

            await Work(self._inside, receive)
        except Exception:  # such as no memory: the next pull would take these slices for its own
            await Work(lane.close, PeerError(why))
            await Work(lane.skip, range(tag + posted, tag + len(batch)))

    async def _pace(self, nbytes: int) -> None:
        """Wait for the turn of a slice at the pull's rate."""
        while (left := self._rate.left()) and not self._pull.over:
            in_flight = self._in_flight
            if in_flight and in_flight[0].moving.has(MovingStage.OVER):
                await self._scatter()
            else:
                await Wait(until=self._runtime.time() + min(left, 0.01))
        self._rate.start(nbytes)

    async def _check(self, until: float) -> None:
        if self._pull.over:
            raise TransferCancelled(CANCELLED)
        if monotonic() > until:
            raise TransferTimeout(
                f"No staging buffer was free for {PATIENCE:g} s. Pull again later."
            )
