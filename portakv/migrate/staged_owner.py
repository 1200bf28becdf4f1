# SPDX-License-Identifier: Apache-2.0
"""The owner's side of pulls of rows through staging buffers.

Helpers gather offered rows into staging buffers. They also compute checksums of rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TypeAlias

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
from portakv.errors import LayoutError, PeerError, PortaKVError, TransferError
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
from portakv.migrate.staged_lanes import (
    BUFFERS,
    MOST_WAITING,
    Line,
    Lines,
    Sending,
    StagingBuffer,
    Turn,
    zero,
)
from portakv.migrate.staging import (
    Rows,
    Slots,
    has_ended,
    part_of,
    rows_bytes,
    staged_bytes,
    unfit_blocks,
)
from portakv.registry import bring
from portakv.runtime.bounded import Bounded
from portakv.runtime.streams import StreamFence
from portakv.view import Index, KVView

# ------------------------------------------------------------------------------------------------
# Compute the answers of an owner that take longer than its channel may: checksums of rows, and
# choices of an encoding by a sample of rows. Helpers compute them, in turn with those that send
# rows.

#: The most windows of shards whose samples are kept: those of readers that pull layer by layer are
#: single layers.
MOST_KEPT = 1024
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


class LateAnswers:
    """The answers of one owner that take longer than a channel may, such as checksums of rows.

    A peer repeats its request until the answer exists. Only the channel's thread calls the class.
    """

    def __init__(self, turn: Turn) -> None:
        self._turn = turn
        self._kept: Bounded[tuple[bytes, int, Box], RetainedSample] = Bounded(
            "samples of pulls", MOST_KEPT
        )

    def sum(self, request: Sum, offered: OfferedRows) -> Answer:
        """Return a checksum of rows, or that it does not exist yet."""
        total = self._turn.result_of(request, self._sum, request, offered)
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
            kept = self._turn.result_of(request, self._look, request, offered)
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


#: Block ids of a shard, int32, and the tokens of a block.
BlockList: TypeAlias = tuple[npt.NDArray[np.int32], int]


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


class Gathers(Lines):
    """The staging buffers and transports of an owner of rows, for all of its readers. No call
    blocks."""

    def __init__(
        self,
        channel: Channel,
        staging_bytes: int,
        transport: str | None,
        device: torch.device,
        most_bytes: int | None = None,
    ) -> None:
        super().__init__(channel, transport, [device])
        self.buffer_bytes = staging_bytes // BUFFERS // 4096 * 4096
        self._most_bytes = most_bytes  # of all buffers of all readers
        self._late = LateAnswers(self._turn)

    @property
    def buffers(self) -> int:
        """Return the number of buffers in use."""
        return sum(len(line.buffers) for line in [*self._lines.values()])

    def agree(self, peer: Peer, hello: Hello, device: torch.device) -> str:
        """Choose the transport for a reader, and return its name; raise as `_choose`."""
        self.forget(peer)  # the reader takes no more of the rows that were sent to it before
        transport = self._choose(hello.transport, device, hello.device)
        for kind in transport.asks:
            self._channel.serve(kind, self._answer_transport)
        self._add(Line(peer, transport), peer)
        return transport.name

    def _answer_transport(self, peer: Peer, request: object) -> Message | None:
        """Answer a message of a reader's transport by the transport here."""
        line = self._lines.get((peer, b""))
        if line is None or not isinstance(request, line.transport.asks):
            raise PeerError("Expected the agreed transport, got another. Connect again.")
        return line.transport.answer(peer, self._channel, request)

    def send(self, peer: Peer, gather: Gather, offered: OfferedRows) -> Answer:
        """Have rows sent in parts, after earlier requests of the reader.

        The reader gets zeros in place of rows that it cannot commit: after the end of the offer,
        and after an error, of which the offer keeps a note. Only one thread calls this method,
        after `OfferedRows.check` of each part.
        """
        line = self._lines.get((peer, b""))
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

        sending = Sending(
            gather.tag,
            sizes,
            # The parts stay with this lane: those that the reader no longer waits for end with it.
            lane=line.transport.lane(peer, self._channel),
            buffers=count,
            after=[offered.after],
            fill=partial(_gather, gather, offered),
            wanted=lambda: peer.id not in offered.spoilt and offered.holds(),
            fail=partial(offered.spoilt.add, peer.id),
        )
        self._queue(line, sending)
        return Answer("done")

    def stop(self, peer: Peer, stop: Stop) -> Stopped:
        """Read no more rows for a request; send only the parts that its reader waits for."""
        line = self._lines.get((peer, b""))
        if line is None or line.last < stop.tag:  # no such request arrived
            return Stopped(0)
        with self._lock:
            for sending in line.sendings:
                if sending.tag == stop.tag:
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
            # All buffers of a reader at once if the transport learns them only once.
            nbytes = staged_bytes(needs, self.buffer_bytes)
            numbers = [number]
            if line.transport.knows_once:
                nbytes = BUFFERS * self.buffer_bytes
                numbers = [*range(BUFFERS)]
            if not grows or not self._has_space(nbytes, buffer):
                return number
            self._allocate(line, nbytes, *numbers)
        return min(parts, BUFFERS)

    def _has_space(self, nbytes: int, old: StagingBuffer | None) -> bool:
        """Return True if more memory, in place of an old buffer's, stays below the total."""
        if self._most_bytes is None:
            return True
        lines = [*self._lines.values()]
        used = sum(one.memory.nbytes for line in lines for one in line.buffers.values())
        return used + nbytes - (old.memory.nbytes if old else 0) <= self._most_bytes


def _gather(
    gather: Gather, offered: OfferedRows, number: int, buffer: StagingBuffer, full: torch.Tensor
) -> None:
    """Gather a part of a request into a buffer, and pack it if it crosses in slots; positions
    without rows, and padding, become zeros.

    The slots of blocks that do not fit say so to the reader.
    """
    part = gather.parts[number]
    slots = offered.slots(gather, part)
    view, ids = offered.rows(part, as_bytes=slots is None)
    bring([ids], view.device)  # once: all parts of the offer share them

    planes, into = buffer.chunks.of(view, part.count, slots)
    written = sum(plane.nbytes for plane in planes)
    skips = ids.check(part.count, view.slots, "offered")
    if skips or written < full.nbytes:
        zero(full)

    copy = copy_rows(view, into, ids, count=part.count)
    if buffer.memory.is_cpu:
        has_ended(copy, wait=True)
        unfit_blocks(copy)
    else:
        # The transport sends after the copy; ids were checked when they were offered.
        copy.wait()
