# SPDX-License-Identifier: Apache-2.0
"""The transport protocol: a transport carries staging buffers between processes.

It serves owners and readers whose memory cannot be mapped. It carries buffers from an owner to a
reader in the order in which they were passed, and converts nothing."""

from __future__ import annotations

import atexit
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from queue import SimpleQueue
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any

import torch

from portakv.backends.base import Decision
from portakv.errors import PeerError, TransferTimeout
from portakv.migrate.messages import Message
from portakv.runtime.devices import refuse_fork, this_process
from portakv.runtime.transfer import event_pool
from portakv.runtime.worker import EXIT_SECONDS

if TYPE_CHECKING:
    from portakv.migrate.channel import Channel, Peer


class Moving:
    """A slot on its way, whose end may be an error, always of the whole slot.

    Attributes:
        over: set once it ended; ``error``: what went wrong then, None if the bytes have landed.
        free: set once the slot may be used again: it ended, and no library touches the bytes.
    """

    def __init__(self, slot: torch.Tensor, seconds: float) -> None:
        self.slot = slot
        self.seconds = seconds
        self.until = monotonic() + seconds
        self.error: Exception | None = None
        self.over = threading.Event()
        self.free = threading.Event()
        self._touched = False
        self._lock = threading.Lock()

    def wait(self, timeout: float | None = None) -> bool:
        """Block the host until it ended, at most so many seconds; whether it did. Raises its error,
        which is `TransferTimeout` if its own time is over."""
        left = self.until - monotonic()
        last = timeout is None or timeout >= left
        if not self.over.wait(left if last else timeout) and last:
            what = f"A slot of {self.slot.nbytes} B did not cross in {self.seconds:g} s."
            self.end(TransferTimeout(f"{what} Pull again, or choose another transport."))
        if self.error is not None:
            raise self.error
        return self.over.is_set()

    def poll(self, ended: Callable[[], bool]) -> None:
        """Ask a library for its end until it has, less and less often, so that others get the
        interpreter; raises as `wait`, and also if it was ended meanwhile."""
        began = now = monotonic()
        while not ended():
            sleep(min(max(20e-6, (now - began) / 8), 1e-3))
            if self.over.is_set() or (now := monotonic()) > self.until:
                self.wait(0)

    def begin(self) -> bool:
        """Whether it is still to be carried; if so, from now on a library may touch the slot."""
        with self._lock:
            self._touched = not self.over.is_set()
            return self._touched

    def end(self, error: Exception | None = None, let_go: bool = False) -> None:
        """End it; the first end counts. ``let_go``: no library touches the slot any more."""
        with self._lock:
            self._touched = self._touched and not let_go
            if not self._touched:
                self.free.set()
            if not self.over.is_set():
                self.error = error
                self.over.set()


class Lane(ABC):
    """The slots between this process and one peer. Threads of its own carry them, since libraries
    block: ``width`` of them. If they are ``ordered``, nothing is carried behind one that failed."""

    width = 1
    ordered = False

    def __init__(self, transport: Transport, channel: Channel, key: str | Peer) -> None:
        self.transport = transport
        self.channel = channel
        self.key = key
        self.address = key if isinstance(key, str) else ""  # the owner's; none if this is the owner
        self.gone: Exception | None = None
        self.unwatch: Callable[[], object] = lambda: None
        self._moving = set[Moving]()
        self._jobs = SimpleQueue[Any]()
        self._turn = threading.Lock()
        named: Any = {"target": self._work, "name": "portakv-transport", "daemon": True}
        self.threads = [threading.Thread(**named) for _ in range(self.width)]
        for thread in self.threads:
            thread.start()

    @abstractmethod
    def carry(self, moving: Moving, ready: torch.Event | None, tag: int) -> Iterator[None]:
        """Move a slot's bytes behind an event, unless `Moving.begin` says that it ended, and return
        when they landed; raises what went wrong. It may yield once: what is before that is done in
        the order of slots, one behind the other."""

    def cut(self) -> bool:
        """End what a library does, quickly; True if from now on it touches no slot."""
        return False

    def leave(self) -> None:  # noqa: B027
        """Let go of what a library has for this lane, whose threads have ended."""

    def move(self, slot: torch.Tensor, tag: int) -> Moving:
        """Carry a slot, contiguous bytes, behind what the current stream holds and behind slots
        that were given before it. An owner's ends when the reader has it; a reader's when it has
        what the owner gives under the tag, exactly as many bytes. Both make theirs in one order."""
        moving = Moving(slot, self.transport.timeout)
        ready = None if slot.device.type == "cpu" else event_pool(slot.device).recorded(None)
        with self.transport.lock:
            if self.gone is None:
                self._moving.add(moving)
                self._jobs.put((moving, ready, tag))
                return moving
        moving.end(self.gone)
        return moving

    def close(self, error: Exception) -> None:
        """End all at once; the peer's next slot has another lane. A thread that a library still
        holds ends after it."""
        with self.transport.lock:
            first = self.gone is None
            self.gone = self.gone or error
            left = self._moving
            self._moving = set()
            if self.transport.lanes.get(self.key) is self:
                del self.transport.lanes[self.key]
        if first:
            self.unwatch()
            let_go = self.cut()
            for moving in left:
                moving.end(error, let_go)
            for _ in self.threads:
                self._jobs.put(None)

    def _work(self) -> None:
        while self._turn.acquire() and (job := self._jobs.get()):
            moving = job[0]
            carrying = self.carry(*job)
            held = True
            try:
                next(carrying, None)
                self._turn.release()
                held = False
                next(carrying, None)
                moving.end(let_go=True)
            except Exception as caught:  # each library has errors of its own
                short = re.sub(r"^\[\S*\] ", "", str(caught)).partition("\n")[0]
                what = f"A slot of {moving.slot.nbytes} B did not cross by {self.transport.name}"
                why = short.partition(". ")[0].rstrip(".") or type(caught).__name__
                error = PeerError(f"{what}: {why}. Pull again, or choose another transport.")
                if self.ordered:
                    self.close(error)
                moving.end(self.gone or error, let_go=True)
            if held:  # only now: a lane that was closed carries nothing more
                self._turn.release()
            with self.transport.lock:
                self._moving.discard(moving)
            del job, moving, carrying
        self._turn.release()
        if threading.current_thread() is self.threads[0]:
            for other in self.threads[1:]:
                other.join()
            self.leave()


class Transport(ABC):
    """One way across, for slots on ``device``. A slot that did not cross in ``timeout`` seconds has
    failed: the last resort, since the channel tells of a peer's death.

    Attributes:
        asks: what a reader's transport asks an owner's, which has to `answer`.
        knows_once: a reader learns but once what memory of an owner can be reached, all slots.
        why: why it was chosen.
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
        atexit.register(self.close, EXIT_SECONDS)

    @classmethod
    @abstractmethod
    def probe(cls, device: torch.device) -> Decision:
        """Whether slots on ``device`` can cross by it, or the reason why not; starts nothing."""

    @abstractmethod
    def answer(self, peer: Peer, channel: Channel, asked: Any) -> Message | None:
        """What an owner's channel answers a reader's transport; quick."""

    def lane(self, other: str | Peer, channel: Channel) -> Any:
        """The lane of a peer: of an owner by its address, of a reader by its connection. It is made
        if there is none; quick. Raises `Unsupported` in a forked process."""
        if self._process.forked:
            raise refuse_fork(f"The transport {self.name}")
        with self.lock:
            if (lane := self.lanes.get(other)) is not None:
                return lane
            lane = self.lanes[other] = self.kind(self, channel, other)
            self._threads = [x for x in self._threads if x.is_alive()] + lane.threads
        gone = partial(lane.close, PeerError("The peer is gone; its slots did not cross."))
        try:
            if isinstance(other, str):
                lane.unwatch = channel.watch(other, gone)
            else:
                lane.unwatch = other.on_gone(gone)
        except BaseException:
            gone()
            raise
        return lane

    def forget(self, other: str | Peer) -> None:
        """End what is under way with a peer, and free what it had; never blocks."""
        if lane := self.lanes.get(other):
            lane.close(PeerError("The peer was let go; its slots did not cross."))

    def close(self, patience: float = 1.0) -> None:
        """Forget all peers. At exit, too, and then with more patience: a thread that a library lets
        go of later would abort the process."""
        if not self._process.forked:
            for lane in [*self.lanes.values()]:
                lane.close(PeerError("The transport was closed; its slots did not cross."))
            for thread in self._threads:
                thread.join(patience)
        if not any(thread.is_alive() for thread in self._threads):
            atexit.unregister(self.close)
