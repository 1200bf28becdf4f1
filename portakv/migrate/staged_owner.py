# SPDX-License-Identifier: Apache-2.0
"""The owner's side of pulls through staging buffers.

Helpers gather offered rows into staging buffers, one at a time, and transports send these. They
also compute checksums of rows.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from portakv.copy.choose_encoding import (
    SAMPLE_AGAIN,
    EncodingChoice,
    Sample,
    Sampled,
    best_of,
    judged,
    packs_of,
    rated_choice,
    stays_raw,
)
from portakv.copy.rows import copy_rows
from portakv.errors import LayoutError, PeerError, PortaKVError, TransferError, Unsupported
from portakv.migrate.channel import Channel, Peer
from portakv.migrate.checksum import checksum_of
from portakv.migrate.messages import (
    Answer,
    Box,
    BoxPart,
    Choose,
    Chosen,
    ForRows,
    Gather,
    Hello,
    Message,
    Stop,
    Stopped,
    Sum,
)
from portakv.migrate.shards import Shard, overlap, slices
from portakv.migrate.staging import (
    Chunks,
    Rows,
    Slots,
    has_ended,
    part_of,
    retain,
    rows_bytes,
    staged_bytes,
    staging,
    unfit_blocks,
)
from portakv.migrate.transports import Transports
from portakv.migrate.transports.base import Lane, Moving, MovingStage, Transport
from portakv.registry import bring
from portakv.runtime.bounded import Bounded
from portakv.runtime.streams import StreamFence
from portakv.tasks import Handle, Limit, TaskGroup, Work, runtime
from portakv.view import Index, KVView

# ------------------------------------------------------------------------------------------------
# Compute the answers of an owner that take longer than its channel may: checksums of rows, and
# choices of an encoding by a sample of rows. Helpers compute them, in turn with those that send
# rows.

#: The most windows of shards whose samples are kept: those of readers that pull layer by layer are
#: single layers.
MOST_KEPT = 1024
#: Late answers that are retained together. The oldest one that no one fetched is dropped.
MOST_LATE = 64
R = TypeVar("R", Sum, Choose)
T = TypeVar("T")
_BUSY = Answer("busy", seconds=1e-3)


@dataclass
class RetainedSample:
    """The facts by which rows of a window of a shard cross packed or raw.

    Attributes:
        why: why they stay raw whatever the rate of the transport, as a sentence; empty if not.
        packing_gbps: 10^9 bytes of raw rows a second that packed copies reach at most.
        sampled: the result of a sample; None: the rates alone decided.
        left: raw bytes of requested rows until the next sample.
    """

    why: str = ""
    packing_gbps: float | None = None
    sampled: Sampled | None = None
    left: int = 0

    def choice(self, view: KVView, link_gbps: float) -> EncodingChoice | None:
        """Return the choice for a transport of so many 10^9 bytes a second; None if only a sample
        decides. Never blocks."""
        if self.why:
            return EncodingChoice(None, self.why, link_gbps)
        rated = rated_choice(view, None, link_gbps, self.packing_gbps)
        if rated.pack is None:
            return rated
        return None if self.sampled is None else judged(rated, self.sampled)


class Turn(Limit):
    """The turn of helpers that read the rows of an owner.

    Parts of an offer share their ids on a device, and only one stream is ordered after these.
    """

    def __init__(self) -> None:
        super().__init__(runtime())
        self._streams = dict[str, torch.Stream]()  # by device

    @contextmanager
    def inside(self, after: StreamFence) -> Iterator[None]:
        """Make that stream current, ordered after a fence, for the helper whose turn it is."""
        with torch.inference_mode(False), after.inside(self._streams):
            yield


class LateAnswers:
    """The answers of one owner that take longer than a channel may, such as checksums of rows.

    A peer repeats its request until the answer exists. Only the channel's thread calls the class.
    """

    def __init__(self, turn: Turn) -> None:
        self._turn = turn
        self._results = Bounded[Hashable, Handle[Any]]("late answers of an owner", MOST_LATE)
        self._kept: Bounded[tuple[bytes, int, Box], RetainedSample] = Bounded(
            "samples of pulls", MOST_KEPT
        )

    def sum(self, request: Sum, offered: OfferedRows) -> Answer:
        """Return a checksum of rows, or that it does not exist yet."""
        total = self._result_of(self._sum, request, offered)
        return _BUSY if total is None else Answer("done", digest=total)

    def choose(self, request: Choose, offered: OfferedRows) -> Answer:
        """Return the choice for rows, or that it does not exist yet.

        Raises `LayoutError` for a part of a block. A sample that fails raises `TransferError`, and
        nothing is kept of it.
        """
        part = request.part
        view = offered.shards[part.group].view
        unit = view.block_size
        if not unit or part.first % unit or part.count % unit:
            raise LayoutError(
                f"Expected a request for whole blocks of {view}, got tokens {part.first} + "
                f"{part.count}. Connect sides of one release."
            )

        # Most requests find a sample, and need no turn.
        key = request.epoch, part.group, part.box
        kept = self._kept.get(key)
        choice = None
        if kept is not None and kept.left > 0 and not request.again:
            choice = kept.choice(view, request.link_gbps)
        if kept is None or choice is None:
            kept = self._result_of(self._look, request, offered)
            if kept is None:
                return _BUSY
            self._kept[key] = kept
            kept.left = SAMPLE_AGAIN
            choice = kept.choice(view, request.link_gbps)
            assert choice is not None  # `_look` has looked at what this request needs

        layers = part.layers[1] - part.layers[0]
        kept.left -= rows_bytes(view, layers, part.count, part.heads[1] - part.heads[0])
        return Chosen(
            "done",
            choice.why[:1024],
            encoding="" if choice.pack is None else choice.pack.text,
            packing_gbps=choice.packing_gbps,
            ratio=choice.ratio,
            escapes=choice.escapes,
            fits=choice.fits,
        )

    def close(self) -> None:
        """Begin no further computation."""
        for result in self._results.values():
            result.cancel()

    def _result_of(
        self, make: Callable[[R, OfferedRows], T], request: R, offered: OfferedRows
    ) -> T | None:
        """Return the result of ``make`` and drop it here, or None if it does not exist yet.

        Raises the error of ``make``.
        """
        result = self._results.get(request)
        if result is not None and result.done():
            del self._results[request]
            made: T = result.synchronize()
            return made
        begun = [each for each in self._results.values() if not each.ended]
        if result is None and len(begun) < MOST_LATE:
            self._results[request] = runtime().start(self._turn.work(make, request, offered))
        return None

    # --- in a helper

    def _sum(self, request: Sum, offered: OfferedRows) -> int:
        with self._turn.inside(offered.after):
            view, ids = offered.rows(request.part)
            return checksum_of(view, ids, request.part)

    def _look(self, request: Choose, offered: OfferedRows) -> RetainedSample:
        """Measure the rate of packing, and take a sample if the rates do not decide already.

        The rate is that of the whole view: another measurement for each window of it would hold up
        the rows of all pulls.
        """
        view = offered.shards[request.part.group].view
        with self._turn.inside(offered.after):
            why = stays_raw(view, None, None)
            if why:
                return RetainedSample(why)
            rated = rated_choice(view, None, request.link_gbps, None)
            if rated.packing_gbps is None:
                raise TransferError(rated.why)
            if rated.pack is None:
                return RetainedSample(packing_gbps=rated.packing_gbps)

            window, ids = offered.rows(request.part, as_bytes=False)
            unit = window.form.block_size
            slots = ids.slots(request.part.count, every=unit)
            blocks = slots[slots >= 0] // unit
            if not len(blocks):
                raise TransferError("No sample was taken: the owner has none of the blocks.")
            try:
                sampled = best_of(window, Sample(window, blocks, packs_of(None)), None)
            except (PortaKVError, RuntimeError) as error:  # such as a lack of memory
                raise TransferError(f"No sample was taken: {error}") from error
            return RetainedSample(packing_gbps=rated.packing_gbps, sampled=sampled)


_log = logging.getLogger(__name__)
#: Block ids of a shard, int32, and the tokens of a block.
BlockList: TypeAlias = tuple[npt.NDArray[np.int32], int]
BUFFERS = 4  # for each reader: one is filled, two are on the wire, one is emptied
MOMENT = 1e-3  # seconds for which a helper waits for a buffer: the loop would take longer to wake
LOOK = 0.5  # seconds between two looks at a buffer that is not free
#: Requests of a reader that are not sent yet. A reader has at most one for each of its buffers.
MOST_WAITING = 16


class OfferedRows(ABC):
    """The rows of an offer, as they are sent.

    Attributes:
        shards: of the owner, when it made the offer.
        ids: of the offered blocks, for each shard.
        after: the work that wrote the rows.
        spoilt: the readers to which some of the rows could not be sent.
    """

    def __init__(
        self, shards: Sequence[Shard], ids: Sequence[BlockList], tokens: int, after: StreamFence
    ) -> None:
        self.shards = shards
        self.ids = ids
        self.tokens = tokens
        self.after = after
        self.spoilt = set[bytes]()

    @abstractmethod
    def holds(self) -> bool:
        """Return False once the offer has ended."""

    @cached_property
    def indices(self) -> Sequence[Index]:
        """Return the index of each shard. All parts of the offer share them, with their ids on a
        device."""
        return [Index(*each) for each in self.ids]

    def check(self, part: BoxPart) -> None:
        """Raise `LayoutError` if the rows of a part were not offered."""
        shard = self.shards[part.group] if part.group < len(self.shards) else None
        some = 0 < part.count <= self.tokens - part.first
        if shard is None or overlap(part.box, shard.group.box) != part.box or not some:
            raise LayoutError(
                f"Expected offered rows, got layers {part.layers} x heads {part.heads} of group "
                f"{part.group}, tokens {part.first} + {part.count}. Request offered rows."
            )

    def slots(self, gather: Gather, part: BoxPart) -> Slots | None:
        """Return how a part is packed for its reader; None: it is sent raw. Raises as
        `Slots.requested`."""
        view = self.shards[part.group].view
        return Slots.requested(view, gather.encoding, part.first, part.count)

    def size(self, gather: Gather, part: BoxPart) -> int:
        """Return the bytes of a part in a staging buffer; raise as `slots`."""
        view = self.shards[part.group].view.as_bytes()
        layers = part.layers[1] - part.layers[0]
        heads = part.heads[1] - part.heads[0]
        return rows_bytes(view, layers, part.count, heads, self.slots(gather, part))

    def rows(self, part: BoxPart, as_bytes: bool = True) -> Rows:
        """Return the rows of a part: as bytes, or with their types."""
        shard = self.shards[part.group]
        view = shard.view.as_bytes() if as_bytes else shard.view
        window = part_of(view, **slices(part.box, shard.group.box))
        return Rows(window, self.indices[part.group].shifted(part.first))


class StagingBuffer:
    """A staging buffer of one reader."""

    def __init__(self, memory: torch.Tensor, dirty: list[torch.Tensor]) -> None:
        self.memory = memory
        self.chunks = Chunks(memory)
        # Memory that contains bytes of earlier users; buffers of one allocation share the list.
        self.dirty = dirty
        self.sent: Moving | None = None

    @property
    def free(self) -> bool:
        """Return True if the reader has the bytes that were sent last."""
        return self.sent is None or self.sent.has(MovingStage.FREE)

    def clean(self) -> None:
        """Zero the memory before its first use, so that no earlier user's bytes are sent."""
        for memory in self.dirty:
            zero(memory)
        self.dirty.clear()


def zero(memory: torch.Tensor) -> None:
    """Zero memory of a buffer, ordered after the current stream's work."""
    memory.zero_()


class Sending:
    """The parts of one request, of these ``sizes`` in bytes, which cross by one lane through
    ``buffers`` staging buffers."""

    def __init__(
        self, gather: Gather, sizes: Sequence[int], offered: OfferedRows, lane: Lane, buffers: int
    ) -> None:
        self.gather = gather
        self.sizes = sizes
        self.offered = offered
        self.lane = lane
        self.buffers = buffers
        self.begun = 0  # parts that are sent, or filled to be sent
        self.parts = len(gather.parts)  # parts that are sent in all
        self.stopped = False  # the reader wants no more rows

    @property
    def over(self) -> bool:
        """Return True if no more parts are sent."""
        return self.begun >= self.parts or self.lane.gone is not None


class Line:
    """The transport on which a reader and the owner agreed, its staging buffers by number, and the
    reader's requests in order."""

    def __init__(self, peer: Peer, transport: Transport) -> None:
        self.peer = peer
        self.transport = transport
        self.buffers = dict[int, StagingBuffer]()
        self.sendings = deque[Sending]()
        self.last = 0  # tag of the last request
        self.active = False  # a coroutine sends their parts

    def current(self) -> Sending | None:
        """Return the request whose parts are sent now; drop those that are over."""
        while self.sendings and self.sendings[0].over:
            self.sendings.popleft()
        return self.sendings[0] if self.sendings else None


class Gathers:
    """The staging buffers and transports of an owner, for all of its readers. No call blocks."""

    def __init__(
        self,
        channel: Channel,
        staging_bytes: int,
        transport: str | None,
        device: torch.device,
        most_bytes: int | None = None,
    ) -> None:
        self.transports = Transports(transport, device)
        self._rows = device
        self._most_bytes = most_bytes  # of all buffers of all readers
        self._channel = channel
        self.buffer_bytes = staging_bytes // BUFFERS // 4096 * 4096
        self._lines = dict[Peer, Line]()  # of readers; each agreement makes another
        self._runtime = runtime()
        self._lock = self._runtime.lock  # a reader that is gone gets no buffer
        self._tasks = TaskGroup(
            self._runtime,
            lambda error: _log.error("An owner failed to send rows, and goes on.", exc_info=error),
        )
        self._turn = Turn()  # of readers, after as many parts as they have buffers
        self._late = LateAnswers(self._turn)

    @property
    def buffers(self) -> int:
        """Return the number of buffers in use."""
        return sum(len(line.buffers) for line in [*self._lines.values()])

    def agree(self, peer: Peer, hello: Hello, device: torch.device) -> str:
        """Choose the transport for a reader, and return its name.

        Its buffers are on the device of both sides' rows, or on the host. Raises `Unsupported` or
        `BackendUnavailable` if there is no such transport.
        """
        name = self.transports.forced or hello.transport
        if name != hello.transport:
            why = f"the reader uses {hello.transport!r}; pass both the same transport="
            raise Unsupported(f"The owner's transport {name!r}", why)
        self.forget(peer)  # the reader takes no more of the rows that were sent to it before
        transport = self.transports.choose(name, device, hello.device)
        self._lines[peer] = Line(peer, transport)
        for kind in transport.asks:
            self._channel.serve(kind, self._answer_transport)
        peer.on_gone(partial(self.forget, peer))
        return transport.name

    def _answer_transport(self, peer: Peer, request: object) -> Message | None:
        """Answer a message of a reader's transport by the transport here."""
        line = self._lines.get(peer)
        if line is None or not isinstance(request, line.transport.asks):
            raise PeerError("Expected the agreed transport, got another. Connect again.")
        return line.transport.answer(peer, self._channel, request)

    def forget(self, peer: Peer) -> None:
        """Release the buffers of a reader that is gone or needs them no more."""
        line = self._lines.pop(peer, None)
        if line is not None:
            line.transport.forget(peer)

    def send(self, peer: Peer, gather: Gather, offered: OfferedRows) -> Answer:
        """Have rows sent in parts, after earlier requests of the reader.

        Only one thread calls this method, after `OfferedRows.check` of each part.
        """
        line = self._lines.get(peer)
        if line is None or line.transport.name != gather.transport:
            return Answer("refused", f"{gather.transport} was not agreed on; connect again.")

        with self._lock:
            line.current()
            full = len(line.sendings) >= MOST_WAITING
        if full:
            return Answer("busy", "earlier requests are not sent yet", seconds=1e-3)

        # Allocate in this thread, so that the reader gets the error if there is no memory.
        sizes = [offered.size(gather, part) for part in gather.parts]
        needs = max(sizes)
        count = self._reserve(line, len(gather.parts), needs)
        if not count:
            why = "earlier pulls use its staging buffers"
            if self._most_bytes is not None:
                why = f"staging buffers of all readers have {self._most_bytes} bytes in total"
            return Answer("busy", why, seconds=1e-2)

        # The parts stay with this lane: those that the reader no longer waits for end with it.
        lane = line.transport.lane(peer, self._channel)
        with self._lock:
            line.last = gather.tag
            line.sendings.append(Sending(gather, sizes, offered, lane, count))
            begins = not line.active
            line.active = True
        if begins:  # after the answer: a helper would hold the interpreter meanwhile
            self._runtime.call_soon(self._tasks.start, self._send_all(line))
        return Answer("done")

    def stop(self, peer: Peer, stop: Stop) -> Stopped:
        """Read no more rows for a request; send only the parts that its reader waits for."""
        line = self._lines.get(peer)
        if line is None or line.last < stop.tag:  # no such request arrived
            return Stopped(0)
        with self._lock:
            for sending in line.sendings:
                if sending.gather.tag == stop.tag:
                    sending.stopped = True
                    sending.parts = min(max(sending.begun, stop.parts), sending.parts)
                    return Stopped(sending.parts)
        return Stopped(1 << 31)  # all parts were sent

    def answer(self, peer: Peer, request: ForRows, offered: OfferedRows) -> Answer:
        """Have rows sent, their checksum computed, or a sample of them taken to choose how they
        cross. The reader repeats its request until the checksum or the sample exists.

        The caller has called `OfferedRows.check` of each part. Raises as `LateAnswers.choose`.
        """
        if isinstance(request, Gather):
            return self.send(peer, request, offered)
        if isinstance(request, Sum):
            return self._late.sum(request, offered)
        return self._late.choose(request, offered)

    def _reserve(self, line: Line, parts: int, needs: int) -> int:
        """Return the number of buffers that parts may cross in: as many as the total has room for.

        A buffer that has to grow must be free.
        """
        for number in range(min(parts, BUFFERS)):
            buffer = line.buffers.get(number)
            if buffer is not None and buffer.memory.nbytes >= min(needs, self.buffer_bytes):
                continue
            grows = buffer is None or (buffer.free and not line.active)
            if not grows or not self._has_space(needs, buffer, line.transport):
                return number
            # Use a private stream: work may still use memory that was freed on a caller's stream.
            with StreamFence(line.transport.device).inside():
                self._new_buffer(line, number, needs)
        return min(parts, BUFFERS)

    def _has_space(self, needs: int, old: StagingBuffer | None, transport: Transport) -> bool:
        """Return True if one more buffer, in place of an old one, stays below the total."""
        if self._most_bytes is None:
            return True
        lines = [*self._lines.values()]
        used = sum(one.memory.nbytes for line in lines for one in line.buffers.values())
        if transport.knows_once:
            new = BUFFERS * self.buffer_bytes
        else:
            new = staged_bytes(needs, self.buffer_bytes) - (old.memory.nbytes if old else 0)
        return used + new <= self._most_bytes

    def _new_buffer(self, line: Line, number: int, needs: int) -> None:
        """Allocate a buffer, or all buffers of a reader if the transport learns them only once."""
        device = line.transport.device
        if line.transport.knows_once:
            whole = staging(BUFFERS * self.buffer_bytes, device, rows=self._rows)
            dirty = [whole]  # the library can reach all of it after the first buffer
            parts = dict(enumerate(whole.view(BUFFERS, -1)))
        else:
            memory = staging(needs, device, self.buffer_bytes, self._rows)
            dirty = [memory]
            parts = {number: memory}
        line.buffers.update({each: StagingBuffer(part, dirty) for each, part in parts.items()})

    def close(self) -> None:
        """Cancel the gathers in flight and close the transports."""
        self._lines = {}
        if not self._runtime.forked:
            self._late.close()
            self._tasks.end()
        self.transports.close()

    # --- in coroutines

    async def _send_all(self, line: Line) -> None:
        """Send all parts to a reader, in turn with other readers."""
        while line.active:
            await self._turn.acquire()
            try:
                sent = await self._send_some(line)
            finally:
                self._turn.release()
            if sent is not None and not await Work(sent.wait_for, MovingStage.FREE, MOMENT):
                await sent.seen(MovingStage.FREE, LOOK)

    async def _send_some(self, line: Line) -> Moving | None:
        """Send as many parts to a reader as it has buffers, then others have their turn.

        Returns the last transfer from the buffer of the next part if that is not free.
        """
        for _ in range(BUFFERS):
            sending = line.current()
            if sending is None or self._lines.get(line.peer) is not line:
                line.active = False
                return None
            buffer = line.buffers[sending.begun % sending.buffers]
            sent = buffer.sent
            if not buffer.free:  # it may become free at any time: one look decides
                return sent
            number = sending.begun
            sending.begun += 1
            try:
                await Work(self._bring, line, sending, number, buffer)
            except Exception:  # a reader that waits for this part would take the next in its place
                _log.exception("A staging buffer could not be sent; its reader gets an error.")
                gone = PeerError("The owner could not send a buffer; it did not cross.")
                await Work(sending.lane.close, gone)
        return None

    # --- in helpers

    def _bring(self, line: Line, sending: Sending, number: int, buffer: StagingBuffer) -> None:
        """Fill a buffer with a part of a request, by its number, and send it.

        Sends zeros in place of rows that the reader cannot commit: after an error, of which the
        offer keeps a note, after the end of the offer, and if the reader wants no more.
        """
        offered = sending.offered
        part = sending.gather.parts[number]
        full = buffer.memory[: sending.sizes[number]]
        tag = sending.gather.tag + number
        try:
            if not sending.stopped and line.peer.id not in offered.spoilt and offered.holds():
                slots = offered.slots(sending.gather, part)
                with self._turn.inside(offered.after):
                    rows = offered.rows(part, as_bytes=slots is None)
                    self._fill(buffer, full, part.count, rows, slots)
                    self._move(line, sending, buffer, full, tag)
                return
        except Exception:  # whatever failed, the reader must not wait for its bytes
            _log.exception(
                "Rows could not be gathered into a staging buffer; the reader gets an error."
            )
            offered.spoilt.add(line.peer.id)
        # Use the stream of a failed gather, whose copies may still run.
        with self._turn.inside(StreamFence(buffer.memory.device)):
            buffer.clean()
            full.zero_()  # as many bytes as the reader waits for
            self._move(line, sending, buffer, full, tag)

    def _fill(
        self,
        buffer: StagingBuffer,
        full: torch.Tensor,
        count: int,
        rows: Rows,
        slots: Slots | None,
    ) -> None:
        """Gather rows into a buffer, and pack them if they cross in slots; positions without rows,
        and padding, become zeros.

        The slots of blocks that do not fit say so to the reader.
        """
        view, ids = rows
        retain(buffer.memory)
        bring([ids], view.device)  # once: all parts of the offer share them

        buffer.clean()
        planes, into = buffer.chunks.of(view, count, slots)
        written = sum(plane.nbytes for plane in planes)
        skips = ids.check(count, view.slots, "offered")
        if skips or written < full.nbytes:
            zero(full)

        copy = copy_rows(view, into, ids, count=count)
        if buffer.memory.is_cpu:
            has_ended(copy, wait=True)
            unfit_blocks(copy)
        else:
            # The transport sends after the copy; ids were checked when they were offered.
            copy.wait()

    def _move(
        self,
        line: Line,
        sending: Sending,
        buffer: StagingBuffer,
        full: torch.Tensor,
        tag: int,
    ) -> None:
        """Have the transport send a full buffer, unless its reader is gone or connected again."""
        if self._lines.get(line.peer) is line:  # `forget` closes the lane
            buffer.sent = sending.lane.move(full, tag)
