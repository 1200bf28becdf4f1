# SPDX-License-Identifier: Apache-2.0
"""The transport protocol: the classes that a transport implements, and the order of the calls.

A transport carries staging buffers, below called buffers, between processes whose memory cannot be
mapped. It carries buffers from an owner to a reader in the order in which they were passed, and
converts nothing. The library calls a transport in this order:

1. `Transport.probe` decides, for a device and without side effects, whether buffers can cross.
2. The constructor creates the transport for the device. Owner and reader each have a transport of
   the same name. The owner's channel serves the messages in ``asks`` from then on.
3. `Transport.lane` returns the `Lane` to one peer, and creates the lane at the first call. The
   channel closes the lane when the peer is gone.
4. `Lane.move` queues one buffer and returns a `Moving` without blocking. Helper threads call it,
   and a reader's loop for buffers of the host. Both sides pass the buffers of one peer in one
   order.
   The reader calls `Lane.meet` first, before it requests rows from the owner.
5. `Lane.carry` runs in a thread of the lane and moves the bytes. It may send messages in ``asks``
   to the owner. The owner's channel calls `Transport.answer` for these messages.
6. `Moving` comes to `MovingStage.OVER` when the bytes have landed or the buffer has failed, and to
   `MovingStage.FREE` when, in addition, no library touches the buffer. Only then may its memory be
   used again. A lane on a device may call `Moving.issue` before, so that streams can follow the
   bytes.
7. `Transport.forget` closes the lane to one peer, and `Transport.close` closes all lanes. Buffers
   in flight end with `PeerError`. The lane calls `Lane.cut` immediately and `Lane.leave` after its
   threads have ended.

A thread of the lane turns every error of `Lane.carry` into a `PeerError` of the buffer. If the lane
is ``ordered``, the error also closes the lane. `Moving.wait` raises `TransferTimeout` if the buffer
takes longer than the transport's ``timeout``, which begins when the buffers before it have ended.

Provisional: the moment when a buffer is released, and how its end is reported, may change.
The contract suite is `portakv conform --contract transport NAME`.
"""

from __future__ import annotations

import atexit
import re
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from enum import IntEnum
from functools import cache, partial
from math import inf
from queue import SimpleQueue
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch

from portakv.backends.base import Decision
from portakv.errors import PeerError, TransferTimeout
from portakv.migrate.messages import Message
from portakv.runtime.devices import refuse_fork, this_process
from portakv.runtime.resources import start_thread
from portakv.runtime.transfer import event_pool
from portakv.tasks import End, Wait, runtime
from portakv.tasks.runtime import EXIT

if TYPE_CHECKING:
    from portakv.migrate.channel import Channel, Peer


class MovingStage(IntEnum):
    """How far a buffer in flight has come. A stage includes those before it."""

    ISSUED = 1  # a stream can follow the bytes, or the buffer has ended
    OVER = 2  # the buffer has ended
    FREE = 3  # it may be used again: no library touches its bytes


class Moving:
    """A buffer in flight. It lands or fails as a whole.

    Its ``seconds`` begin when the buffer ``before`` it has ended, whose turn comes first.

    Attributes:
        error: the reason for the failure; None if the bytes have landed.
    """

    def __init__(self, buffer: torch.Tensor, seconds: float, before: Moving | None = None) -> None:
        self.buffer = buffer
        self.seconds = seconds
        self._before = before
        self._until = monotonic() + seconds
        self.error: Exception | None = None
        self._event: torch.Event | None = None  # recorded after the bytes, if a stream orders them
        used = runtime()
        self._ends: dict[MovingStage, End[None]] = {stage: End(used) for stage in MovingStage}
        self._lock = used.lock  # guards what follows
        self._touched = False
        self._over = False

    def has(self, stage: MovingStage) -> bool:
        """Return True if the buffer has come to a stage."""
        return self._ends[stage].ended

    def wait_for(self, stage: MovingStage, timeout: float | None = None) -> bool:
        """Block the host until the buffer has come to a stage, at most ``timeout`` seconds; return
        True if it has."""
        return self._ends[stage].wait(timeout)

    @property
    def until(self) -> float:
        """Return the time, by `monotonic`, at which the buffer has failed if it has not landed."""
        before = self._before
        if before is not None:
            if not before.has(MovingStage.OVER):
                return before.until + self.seconds
            self._until = monotonic() + self.seconds  # its turn begins
            self._before = None
        return self._until

    def wait(self, timeout: float | None = None) -> bool:
        """Block the host until the buffer ends, at most ``timeout`` seconds; return True if it did.

        Raises the buffer's error: `TransferTimeout` if the time of the transport is over.
        """
        limit = inf if timeout is None else monotonic() + timeout
        over = MovingStage.OVER
        while not self.wait_for(over, max(0.0, min(limit, self.until) - monotonic())):
            now = monotonic()
            if now >= self.until:
                what = f"A buffer of {self.buffer.nbytes} B did not cross in {self.seconds:g} s."
                self.end(TransferTimeout(f"{what} Pull again, or choose another transport."))
            elif now >= limit:
                break
        if self.error is not None:
            raise self.error
        return self.has(over)

    def issue(self, event: torch.Event) -> None:
        """Let streams follow the bytes: ``event`` is recorded after them."""
        self._event = event
        self._reach(MovingStage.ISSUED)

    def follow(self, timeout: float) -> bool:
        """Order the current stream of the buffer's device after the bytes; return True if it is.

        Blocks the host at most ``timeout`` seconds, until the lane has issued the buffer; on the
        host until the buffer ends. The bytes count only if `wait` raises nothing afterwards. Raises
        as `wait`.
        """
        self.wait_for(MovingStage.ISSUED, min(timeout, max(0.0, self.until - monotonic())))
        if self._event is None or self.has(MovingStage.OVER):
            return self.wait(0.0)
        self._event.wait(torch.accelerator.current_stream(self.buffer.device.index))
        return True

    def on(self, stage: MovingStage, call: Callable[[], object]) -> None:
        """Make a call once when the buffer comes to a stage, immediately if it has.

        The call must be quick: it runs in the thread that brings the buffer there.
        """
        self._ends[stage].on_end(call)

    async def seen(self, stage: MovingStage, seconds: float) -> bool:
        """Wait in a coroutine until the buffer comes to a stage, at most some seconds; return True
        if it has.

        Raises as `wait`, except if it waits until the buffer is free.
        """
        if not self.has(stage):
            wait = Wait(until=runtime().time() + seconds)
            self.on(stage, partial(runtime().wake, wait))
            await wait
        if stage is not MovingStage.FREE:
            self.wait(0.0)
        return self.has(stage)

    def _reach(self, stage: MovingStage) -> None:
        """Bring the buffer to a stage and to those before it."""
        for each, end in self._ends.items():
            if each <= stage and not end.ended:
                end.settle(None, None)

    def poll(self, ended: Callable[[], bool]) -> None:
        """Call ``ended`` until it returns True, at growing intervals so that other threads can run.

        Raises as `wait`, also if the buffer was ended meanwhile.
        """
        began = now = monotonic()
        while not ended():
            sleep(min(max(20e-6, (now - began) / 8), 1e-3))
            now = monotonic()
            if self.has(MovingStage.OVER) or now > self.until:
                self.wait(0)

    def begin(self) -> bool:
        """Return False if the buffer has ended; else a library may touch the buffer from now on."""
        with self._lock:
            self._touched = not self._over
            return self._touched

    def end(self, error: Exception | None = None, untouched: bool = False) -> None:
        """End the buffer; the first end counts. ``untouched``: no library touches it now."""
        with self._lock:
            self._touched = self._touched and not untouched
            if not self._over:
                self.error = error
            self._over = True
            stage = MovingStage.OVER if self._touched else MovingStage.FREE
        self._before = None  # else each buffer would retain all earlier ones
        self._reach(stage)


def gone_peer(other: str | Peer) -> PeerError:
    """Return the error of buffers in flight with a peer whose connection has ended."""
    if not isinstance(other, str):
        return PeerError("The reader is gone; its buffers did not cross.")
    return PeerError(
        f"The owner at {other} is gone: its process has ended, or the connection to it broke. Not "
        f"all of its bytes have crossed. Pull from another owner, or again once it is back."
    )


def released_peer(other: str | Peer) -> PeerError:
    """Return the error of buffers in flight with a peer that this side has released."""
    if not isinstance(other, str):
        return PeerError("The owner released this reader; its buffers did not cross.")
    return PeerError(
        f"This reader released the owner at {other}, as a new handshake and `close` do. Not all of "
        f"its bytes have crossed. Pull again."
    )


class Lane(ABC):
    """The buffers between this process and one peer.

    Private threads carry the buffers, because libraries block.

    Attributes:
        width: the number of threads.
        ordered: a buffer that fails closes the lane, so no later buffer is carried.
        released: the peer is gone, or needs the lane no more.
    """

    width = 1
    ordered = False
    released = False

    def __init__(self, transport: Transport, channel: Channel, key: str | Peer) -> None:
        self.transport = transport
        self.channel = channel
        self.key = key
        self.address = key if isinstance(key, str) else ""  # the owner's; none if this is the owner
        self.gone: Exception | None = None
        self.unwatch: Callable[[], object] = lambda: None
        self._moving = set[Moving]()
        # As many as have their turns together: the next one's turn begins after the first of them.
        self._last = deque[Moving](maxlen=self.width)
        self.jobs = SimpleQueue[Any]()  # for the threads of the lane; None: the lane is closed
        self._turn = threading.Lock()
        self.order = threading.Lock()  # buffers are queued one at a time
        named: Any = {"target": self._work, "name": "portakv-transport", "daemon": True}
        self.threads = [threading.Thread(**named) for _ in range(self.width)]
        for thread in self.threads:
            start_thread(thread, PeerError)

    @abstractmethod
    def carry(self, moving: Moving, ready: torch.Event | None, tag: int) -> Iterator[None]:
        """Move the bytes of a buffer after the event ``ready``, and return when they have landed.

        Call `Moving.begin` first, and move nothing if it returns False. The generator may yield
        once: the part before the yield runs in the order of the buffers, one at a time. Raises the
        error of the library.
        """

    def meet(self, stop: Callable[[], bool] = bool) -> None:  # noqa: B027
        """Announce a reader's lane to the owner, before the reader requests rows; it may block.

        The owner then sends rows of later requests by this lane. Ends early if ``stop()`` returns
        True. Raises the errors of `Channel.ask`.
        """

    def skip(self, tags: Iterable[int]) -> None:  # noqa: B027
        """Report to the owner that the reader passes no buffers of these tags."""

    def cut(self) -> bool:
        """Abort the library's work, quickly; return True if it touches no buffer now."""
        return False

    def leave(self) -> None:  # noqa: B027
        """Release the library's resources for this lane, after its threads have ended."""

    def move(self, buffer: torch.Tensor, tag: int) -> Moving:
        """Queue a buffer, contiguous bytes, after the current stream's work and earlier buffers.

        The owner's buffer ends when the reader has it, as far as the library reports this. The
        reader's buffer ends when it has received the owner's buffer of the same ``tag``, which has
        exactly as many bytes. Both sides pass their buffers in one order. A closed lane returns a
        buffer that has failed.
        """
        ready = None if buffer.device.type == "cpu" else event_pool(buffer.device).recorded(None)
        with self.order:
            moving = self._admit(buffer)
            if self.gone is None:
                self.queue(moving, ready, tag)
        return moving

    def queue(self, moving: Moving, ready: torch.Event | None, tag: int) -> None:
        """Have a thread of the lane carry a buffer, after earlier buffers."""
        self.jobs.put((moving, ready, tag))

    def _admit(self, buffer: torch.Tensor) -> Moving:
        """Return a buffer in flight, which ends with this lane at the latest."""
        with self.transport.lock:
            full = len(self._last) == self.width
            moving = Moving(buffer, self.transport.timeout, self._last[0] if full else None)
            if self.gone is None:
                self._last.append(moving)
                self._moving.add(moving)
                return moving
        moving.end(self.gone)
        return moving

    def close(self, error: Exception) -> None:
        """End all buffers immediately with ``error``; the peer's next buffer gets a new lane.

        A thread that is still inside a library ends when the library returns.
        """
        with self.transport.lock:
            first = self.gone is None
            self.gone = self.gone or error
            left = self._moving
            self._moving = set()
            self._last.clear()
            if self.transport.lanes.get(self.key) is self:
                del self.transport.lanes[self.key]
        if first:
            self.unwatch()
            untouched = self.cut()
            for moving in left:
                moving.end(error, untouched)
            for _ in self.threads:
                self.jobs.put(None)

    def release(self, error: Exception) -> None:
        """Close the lane to a peer that is gone, or that has released it: it gets no message."""
        self.released = True
        self.close(error)

    def failure(self, moving: Moving, caught: Exception) -> PeerError:
        """Return the error of a buffer that did not cross."""
        short = re.sub(r"^\[\S*\] ", "", str(caught)).partition("\n")[0]
        nbytes = moving.buffer.nbytes
        what = f"A buffer of {nbytes} B did not cross by {self.transport.name}"
        if self.address:
            what = f"{what} from the owner at {self.address}"
        why = short.partition(". ")[0].rstrip(".") or type(caught).__name__
        return PeerError(f"{what}: {why}. Pull again, or choose another transport.")

    def forget(self, moving: Moving) -> None:
        """Drop a buffer that has ended."""
        with self.transport.lock:
            self._moving.discard(moving)
            with suppress(ValueError):  # later buffers have taken its place
                self._last.remove(moving)

    def _work(self) -> None:
        """Carry buffers until the lane is closed."""
        while self._turn.acquire() and (job := self.jobs.get()):
            moving = job[0]
            carrying = self.carry(*job)
            holds_turn = True
            try:
                next(carrying, None)
                self._turn.release()
                holds_turn = False
                next(carrying, None)
                moving.end(untouched=True)
            except Exception as caught:  # each library raises its own error classes
                error = self.failure(moving, caught)
                if self.ordered:
                    self.close(error)
                moving.end(self.gone or error, untouched=True)
            # Released only now: a lane that this buffer closed carries no later buffer.
            if holds_turn:
                self._turn.release()
            self.forget(moving)
            del job, moving, carrying
        self._turn.release()
        if threading.current_thread() is self.threads[0]:
            for other in self.threads[1:]:
                other.join()
            self.leave()


class Transport(ABC):
    """A transport for buffers on ``device``.

    A buffer fails if it has not crossed in ``timeout`` seconds. This is the last resort, because
    the channel reports the death of a peer earlier.

    Attributes:
        name: the name by which owner and reader agree on the transport.
        kind: the class of its lanes.
        asks: the messages that a reader's transport sends to the owner's, which `answer` answers.
        knows_once: a reader learns the owner's reachable memory only once, with all buffers in it.
        why: the reason why this transport was chosen.
    """

    name = ""
    kind: type[Lane]
    asks: tuple[type[Message], ...]
    knows_once = False

    def __init__(self, device: torch.device, timeout: float = 30.0) -> None:
        self.device = device
        self.timeout = timeout
        self._process = this_process()
        self.why = ""
        self.lanes = dict["str | Peer", Any]()
        self.lock = threading.Lock()
        self._threads = list[threading.Thread]()  # also of lanes that were closed
        _at_exit().add(self)

    @classmethod
    @abstractmethod
    def probe(cls, device: torch.device) -> Decision:
        """Decide, with a reason, if buffers on ``device`` can cross; start nothing."""

    @abstractmethod
    def answer(self, peer: Peer, channel: Channel, request: Any) -> Message | None:
        """Return the owner's answer to a message of a reader's transport, without blocking."""

    def lane(self, other: str | Peer, channel: Channel) -> Any:
        """Return the lane to a peer, and create it if there is none; do not block.

        ``other`` is the address of an owner, or the connection of a reader. Raises `Unsupported` in
        a forked process.
        """
        if self._process.forked:
            raise refuse_fork(f"The transport {self.name}")
        with self.lock:
            if (lane := self.lanes.get(other)) is not None:
                return lane
            lane = self.lanes[other] = self.kind(self, channel, other)
            self._threads = [x for x in self._threads if x.is_alive()] + lane.threads
        gone = partial(lane.release, gone_peer(other))
        try:
            if isinstance(other, str):
                lane.unwatch = channel.watch(other, gone)
            else:
                lane.unwatch = other.on_gone(gone)
        except BaseException:  # also an interrupt: no caller has the lane yet
            gone()
            raise
        return lane

    def forget(self, other: str | Peer, error: PeerError | None = None) -> None:
        """End the buffers in flight with a peer and release its lane; never block.

        ``error``: of these buffers; None: that this side released the peer.
        """
        if lane := self.lanes.get(other):
            lane.release(error or released_peer(other))

    def close(self, patience: float = 1.0) -> None:
        """Close all lanes, and wait ``patience`` seconds for each thread.

        It also runs at exit, with more patience: a thread that a library releases later would abort
        the process.
        """
        if self._process.forked:  # it has no thread, and perhaps a lock that no thread releases
            return
        for lane in [*self.lanes.values()]:
            lane.release(released_peer(lane.key))
        for thread in self._threads:
            thread.join(patience)


@cache
def _at_exit() -> WeakSet[Transport]:
    """Return the transports that are closed at exit. The threads of a lane retain its transport."""
    transports = WeakSet[Transport]()

    def close() -> None:
        for transport in [*transports]:
            transport.close(EXIT)

    atexit.register(close)
    return transports
