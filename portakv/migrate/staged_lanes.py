# SPDX-License-Identifier: Apache-2.0
"""The owner's side of staged lanes, for rows and for weights.

Readers that cannot map an owner's memory get it through staging buffers. Helpers fill the buffers
of all readers in turn, one at a time, and transports send them.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch

from portakv.errors import PeerError, Unsupported
from portakv.migrate.channel import Channel, Peer
from portakv.migrate.staging import Chunks, retain, staging
from portakv.migrate.transports import check_transport, choose, forced
from portakv.migrate.transports.base import Lane, Moving, MovingStage, Transport
from portakv.runtime.bounded import Bounded
from portakv.runtime.streams import StreamFence
from portakv.tasks import Handle, Limit, TaskGroup, Work, runtime

_log = logging.getLogger(__name__)
BUFFERS = 4  # for each reader: one is filled, two are on the wire, one is emptied
MOMENT = 1e-3  # seconds for which a helper waits for a buffer: the loop would take longer to wake
LOOK = 0.5  # seconds between two looks at a buffer that is not free
#: Requests of a reader that are not sent yet. A reader has at most one for each of its buffers.
MOST_WAITING = 16
#: Late results that are kept together. The oldest one is dropped.
MOST_LATE = 256
T = TypeVar("T")


class Turn(Limit):
    """The turn of helpers that read the memory of an owner, and the results that take them longer
    than a channel may, such as checksums.

    Parts of an offer share their ids on a device, and only one stream is ordered after these.
    """

    def __init__(self) -> None:
        super().__init__(runtime())
        self._streams = dict[str, torch.Stream]()  # by device
        self._results = Bounded[Hashable, Handle[Any]]("late results of an owner", MOST_LATE)

    def result_of(
        self, key: Hashable, make: Callable[..., T], *arguments: object, keep: bool = False
    ) -> T | None:
        """Return the result of ``make``, which a helper computes; None: it does not exist yet.

        Peers repeat their requests until it does. Raises the error of ``make``. One thread at a
        time calls this method.

        Args:
            keep: later calls with the same key return the same result.
        """
        result = self._results.get(key)
        if result is None:
            begun = [each for each in self._results.values() if not each.ended]
            if len(begun) < MOST_LATE:
                self._results[key] = runtime().start(self.work(make, *arguments))
        elif result.done():
            if not keep or result.error is not None:
                del self._results[key]
            made: T = result.synchronize()
            return made
        return None

    def forget_results(self) -> None:
        """Begin no further computation, and keep no result of those that have begun."""
        for result in self._results.values():
            result.cancel()
        self._results.clear()

    @contextmanager
    def inside(self, *after: StreamFence) -> Iterator[None]:
        """Make the stream of each fence's device current, ordered after the fence, for the helper
        whose turn it is."""
        with torch.inference_mode(False), ExitStack() as stack:
            for fence in after:
                stack.enter_context(fence.inside(self._streams))
            yield


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


@dataclass(eq=False)
class Sending:
    """The parts of one request, which cross by one lane.

    Attributes:
        tag: of the first part; each next part has the next tag.
        sizes: of the parts, in bytes.
        lane: the parts end with it.
        buffers: the number of staging buffers that the parts use in turn.
        after: the work that wrote what the parts contain, for each device.
        fill: fills a buffer with a part, by its number, in helpers, on streams after that work. It
            gets the buffer, and the bytes of it that are sent.
        wanted: returns False if the reader cannot use the bytes, and gets zeros in place of them.
        fail: called after an error of ``fill``; the reader then gets zeros.
        begun: parts that are sent, or filled to be sent.
        stopped: the reader wants no more parts than those that it waits for.
    """

    tag: int
    sizes: Sequence[int]
    lane: Lane
    buffers: int
    after: Sequence[StreamFence]
    fill: Callable[[int, StagingBuffer, torch.Tensor], object]
    wanted: Callable[[], bool]
    fail: Callable[[], object] = bool
    begun: int = 0
    stopped: bool = False

    def __post_init__(self) -> None:
        self.parts = len(self.sizes)  # parts that are sent in all

    @property
    def over(self) -> bool:
        """Return True if no more parts are sent."""
        return self.begun >= self.parts or self.lane.gone is not None


class Line:
    """The transport on which a reader and the owner agreed, its staging buffers by number, and the
    reader's requests in order.

    Attributes:
        peer: the key of the transport's lane.
        last: the tag of the last part that was requested.
        active: a coroutine sends the parts of the requests.
        released: the reader is gone, or needs the buffers no more.
        after: the work of earlier users of the buffers' memory, for each device.
        error: the text of the error by which a part could not be filled; empty: all were.
    """

    def __init__(self, peer: Peer, transport: Transport) -> None:
        self.peer = peer
        self.transport = transport
        self.buffers = dict[int, StagingBuffer]()
        self.sendings = deque[Sending]()
        self.last = 0
        self.active = False
        self.released = False
        self.after = list[StreamFence]()
        self.error = ""
        self.unwatch: Callable[[], object] = lambda: None

    def current(self) -> Sending | None:
        """Return the request whose parts are sent now; drop those that are over."""
        while self.sendings and self.sendings[0].over:
            self.sendings.popleft()
        return self.sendings[0] if self.sendings else None


class Lines:
    """The staging buffers and transports of an owner, for all of its readers. No call blocks.

    Args:
        transport: the name of the only transport for readers; None: any.
        devices: of what the owner sends.

    Raises `InvalidTerms` or `BackendUnavailable` for a transport that does not run here.

    Attributes:
        device: of all that the owner sends, or the host if that is on several devices.
        forced: the name of the only transport, also if the environment forces it; None: any.
        buffer_bytes: the most bytes of a staging buffer; a subclass sets it.
    """

    buffer_bytes: int

    def __init__(
        self, channel: Channel, transport: str | None, devices: Collection[torch.device]
    ) -> None:
        self._devices = {*devices}
        (first, *others) = devices
        self.device = torch.device("cpu") if others else first
        check_transport(transport, self.device)
        self.forced = forced(transport)
        self._transports = dict[str, Transport]()  # each made once, for a device or the host
        #: Buffers on the host are pinned for it.
        accelerators = [each for each in devices if each.type != "cpu"]
        self._accelerator = min(accelerators, key=str, default=None)
        self._channel = channel
        #: By reader and lane; a reader of rows has one lane, whose id is empty.
        self._lines = dict[tuple[Peer, bytes], Line]()
        self._runtime = runtime()
        self._lock = self._runtime.lock  # a reader that is gone gets no buffer
        self._tasks = TaskGroup(self._runtime, _log_failure)
        self._turn = Turn()  # of readers, after as many parts as they have buffers

    def forget(self, peer: Peer, id: bytes = b"") -> None:
        """Release the buffers of a lane whose reader is gone or needs them no more."""
        line = self._lines.pop((peer, id), None)
        if line is not None:
            line.released = True
            line.unwatch()
            line.transport.forget(line.peer)

    def close(self) -> None:
        """Cancel what is in flight and close the transports. Any thread may call it."""
        if not self._runtime.process.forked:
            for key in [*self._lines]:
                self.forget(*key)
            self._turn.forget_results()
            self._tasks.end()
        for transport in self._transports.values():
            transport.close()
        self._transports.clear()

    def _choose(self, name: str, device: torch.device, remote: str) -> Transport:
        """Return the transport that a reader requests, for buffers on the device of both sides or
        on the host; ``remote``: the reader's device.

        Raises `Unsupported` or `BackendUnavailable` if there is no such transport.
        """
        if self.forced not in (None, name):
            why = f"the reader uses {name!r}; pass both the same transport="
            raise Unsupported(f"The owner's transport {self.forced!r}", why)
        if remote.partition(" ")[0] != device.type:
            device = torch.device("cpu")
        key = f"{name} {device}"
        transport = self._transports[key] = self._transports.get(key) or choose(device, name)
        return transport

    def _add(self, line: Line, peer: Peer, id: bytes = b"") -> None:
        """Keep the line of an agreement until `forget`, or until the reader is gone."""
        self._lines[peer, id] = line
        line.unwatch = peer.on_gone(partial(self.forget, peer, id))

    def _allocate(self, line: Line, nbytes: int, *numbers: int) -> None:
        """Allocate memory for buffers of these numbers, of equal size."""
        device = line.transport.device
        # Use a private stream: work may still use memory that was freed on a caller's stream.
        with torch.inference_mode(False), StreamFence(device).inside():
            memory = staging(nbytes, device, rows=self._accelerator)
            line.after = [StreamFence(each) for each in {device, *self._devices}]
            dirty = [memory]  # a library can reach all of it after the first buffer
            for number, part in zip(numbers, memory.view(len(numbers), -1), strict=True):
                line.buffers[number] = StagingBuffer(part, dirty)

    def _queue(self, line: Line, sending: Sending) -> None:
        """Send the parts of a request after earlier ones of the reader, and after the answer."""
        with self._lock:
            line.last = sending.tag + sending.parts - 1
            line.sendings.append(sending)
            begins = not line.active
            line.active = True
        if begins:  # after the answer: a helper would hold the interpreter meanwhile
            self._runtime.call_soon(self._tasks.start, self._send_all(line))

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
            if sending is None or line.released:
                line.active = False
                return None
            tag = sending.tag + sending.begun
            buffer = line.buffers[tag % sending.buffers]
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

        Sends zeros in place of bytes that the reader cannot use: after an error, of which the
        request keeps a note, and if they are not wanted.
        """
        full = buffer.memory[: sending.sizes[number]]
        tag = sending.tag + number
        try:
            if not sending.stopped and sending.wanted():
                with self._turn.inside(*sending.after):
                    buffer.clean()
                    sending.fill(number, buffer, full)
                    self._move(line, sending, buffer, full, tag)
                return
        except Exception as error:  # whatever failed, the reader must not wait for its bytes
            _log.exception("A staging buffer could not be filled; its reader gets an error.")
            line.error = str(error) or repr(error)
            sending.fail()
        # Use the stream of a failed copy, which may still run.
        with self._turn.inside(StreamFence(buffer.memory.device)):
            buffer.clean()
            full.zero_()  # as many bytes as the reader waits for
            self._move(line, sending, buffer, full, tag)

    def _move(
        self,
        line: Line,
        sending: Sending,
        buffer: StagingBuffer,
        full: torch.Tensor,
        tag: int,
    ) -> None:
        """Have the transport send a full buffer, unless its reader is gone or connected again."""
        retain(buffer.memory)
        if not line.released:  # `forget` closes the lane
            buffer.sent = sending.lane.move(full, tag)


def _log_failure(error: BaseException) -> None:
    """Log the error of a coroutine of an owner."""
    _log.error("An owner failed to send staging buffers, and goes on.", exc_info=error)
