# SPDX-License-Identifier: Apache-2.0
"""What a mover is, for owners and readers whose memory cannot be mapped: it carries staged slots
from an owner to a reader, in the order in which they were given, and converts nothing."""

from __future__ import annotations

import atexit
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from importlib import import_module
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from portakv.backends.base import Decision
from portakv.errors import BackendUnavailable, InvalidTerms, PeerError, TransferTimeout
from portakv.runtime.devices import refuse_fork, this_process
from portakv.runtime.transfer import event_pool
from portakv.runtime.worker import EXIT_SECONDS

if TYPE_CHECKING:
    from portakv.migrate.channel import Channel, Peer

#: An owner by its address, as readers know it; a reader by its `Peer`, as owners do.
Other: TypeAlias = "str | Peer"
Key: TypeAlias = "str | bytes"  # that address, or the id of the reader's channel
#: As they are asked; Mooncake only by name, since who reaches its port can write into slots.
MOVERS = {
    "distributed": "portakv.migrate.movers.distributed:Distributed",
    "nixl": "portakv.migrate.movers.onesided:Nixl",
    "mooncake": "portakv.migrate.movers.onesided:Mooncake",
}
ONLY_ASKED, ENVIRONMENT = ("mooncake",), "PORTAKV_MOVER"


class Moving:
    """A slot on its way: a `Pending` whose end may be an error, always of the whole slot.

    Attributes:
        error: what went wrong; the bytes have landed if it ended and this is None.
        loose: it failed, and the bytes may still be read or written: leave the slot alone.
    """

    def __init__(self, slot: torch.Tensor) -> None:
        self.slot, self.until, self.loose = slot, 0.0, False
        self.error: Exception | None = None
        self._over, self._lock = threading.Event(), threading.Lock()

    def done(self) -> bool:
        """True once it ended, error or not; never blocks or raises."""
        return self._over.is_set()

    def wait(self, timeout: float | None = None) -> None:
        """Block the host until it ended; raises its error, or `TransferTimeout`."""
        if not self._over.wait(timeout):
            raise TransferTimeout(f"{self.slot.nbytes} B did not cross in {timeout:g} s; they may.")
        if self.error is not None:
            raise self.error

    def begin(self) -> bool:
        """Whether it is still to be carried; if so, from now on a library may touch the slot."""
        with self._lock:
            self.loose = not self._over.is_set()
            return self.loose

    def end(self, error: Exception | None = None) -> None:
        """End it; the first end counts."""
        with self._lock:
            if not self._over.is_set():
                self.error = error
                self._over.set()


class Lane(ABC):
    """The slots between this process and one peer. Threads of its own carry them, since libraries
    block; ``address``: the owner's, empty if this is the owner."""

    def __init__(self, mover: Mover, channel: Channel, key: Key, threads: int = 1) -> None:
        self.mover, self.channel = mover, channel
        self.address = key if isinstance(key, str) else ""
        self.gone: Exception | None = None
        self.unwatch: Callable[[], object] = lambda: None
        self._moving, self._lock = set[Moving](), threading.Lock()
        self._jobs: SimpleQueue[Any] = SimpleQueue()
        named: Any = {"target": self._work, "name": "portakv-mover", "daemon": True}
        self.threads = [threading.Thread(**named) for _ in range(threads)]
        for thread in self.threads:
            thread.start()

    @abstractmethod
    def carry(self, moving: Moving, ready: torch.Event | None, tag: int, giving: bool) -> None:
        """Move a slot's bytes behind an event, unless `Moving.begin` says that it ended, and return
        when they landed; raises what went wrong."""

    def cut(self) -> bool:
        """End what a library does, quickly; True if from now on it touches no slot."""
        return False

    def check(self, moving: Moving, what: str) -> None:
        """Raise what ends a wait."""
        if self.gone is not None:
            raise self.gone
        if time.monotonic() > moving.until:
            raise TransferTimeout(f"A slot was not {what} in {self.mover.timeout:g} s")

    def put(self, slot: torch.Tensor, tag: int, giving: bool) -> Moving:
        """Carry a slot, contiguous bytes, behind those that were put before it."""
        moving = Moving(slot)
        ready = None if slot.device.type == "cpu" else event_pool(slot.device).recorded(None)
        with self._lock:
            if self.gone is None:
                self._moving.add(moving)
                self._jobs.put((moving, ready, tag, giving))
                return moving
        moving.end(self.gone)
        return moving

    def close(self, error: Exception) -> None:
        """End all at once; a thread that a library still holds ends after it."""
        with self._lock:
            left, first, self._moving, self.gone = self._moving, not self.gone, set(), error
        if first:
            clean = self.cut()
            for moving in left:
                moving.loose = moving.loose and not clean
                moving.end(error)
            for _ in self.threads:
                self._jobs.put(None)

    def _work(self) -> None:
        while job := self._jobs.get():
            moving = job[0]
            moving.until = time.monotonic() + self.mover.timeout
            try:
                self.carry(*job)
            except Exception as error:
                moving.end(error)
            moving.loose = False
            moving.end()
            with self._lock:
                self._moving.discard(moving)
            del job, moving


class Mover(ABC):
    """One way across, for slots on ``device``. A slot that did not cross in ``timeout`` seconds has
    failed: the last resort, since the channel tells of a peer's death."""

    name: str = ""

    def __init__(self, device: torch.device, timeout: float = 30.0) -> None:
        self.device, self.timeout, self._process = device, timeout, this_process()
        self.lanes, self._lock = dict[Key, Lane](), threading.Lock()
        self._threads = list[threading.Thread]()  # also of lanes that were dropped
        atexit.register(self.close, EXIT_SECONDS)

    @classmethod
    @abstractmethod
    def probe(cls, device: torch.device) -> Decision:
        """Whether slots on ``device`` can cross by it, or the reason why not; starts nothing."""

    @abstractmethod
    def lane(self, channel: Channel, key: Key) -> Lane:
        """The lane of a peer; quick."""

    @abstractmethod
    def serve(self, channel: Channel) -> None:
        """Have an owner's channel answer what readers' movers ask."""

    def connect(self, other: Other, channel: Channel) -> None:
        """Make ready for a peer, unless that is done, and again after an error. Quick: an owner
        calls it before each `give`, a reader, once the owner has answered, before each `take`."""
        key = other if isinstance(other, str) else other.id
        with self._lock:
            if key in self.lanes:
                return
            lane = self.lanes[key] = self.lane(channel, key)
            self._threads = [x for x in self._threads if x.is_alive()] + lane.threads
        gone = partial(self.drop, lane, PeerError("The peer is gone; its slots did not cross."))
        try:
            if not isinstance(other, str):
                self.serve(channel)
                lane.unwatch = other.on_gone(gone)
            else:
                lane.unwatch = channel.watch(other, gone)
        except BaseException:
            gone()
            raise

    def give(self, other: Other, slot: torch.Tensor, tag: int) -> Moving:
        """An owner's slot, ready behind the current stream; it ends when the reader has it."""
        return self._lane(other).put(slot, tag, True)

    def take(self, other: Other, into: torch.Tensor, tag: int) -> Moving:
        """Fetch what the owner gives under ``tag``, exactly as many bytes as ``into`` has. Gives
        and takes of one pair are made in one order, two at a time."""
        return self._lane(other).put(into, tag, False)

    def _lane(self, other: Other) -> Lane:
        if self._process.forked:
            raise refuse_fork(f"The mover {self.name}")
        lane = self.lanes.get(other if isinstance(other, str) else other.id)
        if lane is None:
            raise PeerError(f"{self.name} has no pair with this peer (any more); connect it.")
        return lane

    def drop(self, lane: Lane, error: Exception) -> None:
        """End what is under way in a lane; `connect` makes another one."""
        with self._lock:
            self.lanes = {key: one for key, one in self.lanes.items() if one is not lane}
        lane.unwatch()
        lane.close(error)

    def forget(self, other: Other) -> None:
        """End what is under way with a peer, and free what it had; never blocks."""
        if lane := self.lanes.get(other if isinstance(other, str) else other.id):
            self.drop(lane, PeerError("The peer was let go; its slots did not cross."))

    def close(self, patience: float = 1.0) -> None:
        """Forget all peers. At exit, too, and then with more patience: a thread that a library lets
        go of later would abort the process."""
        if not self._process.forked:
            for lane in [*self.lanes.values()]:
                self.drop(lane, PeerError("The mover was closed; its slots did not cross."))
            for thread in self._threads:
                thread.join(patience)
        if not any(thread.is_alive() for thread in self._threads):
            atexit.unregister(self.close)


def choose(device: torch.device, name: str | None = None) -> tuple[Mover, list[Decision]]:
    """The first mover that can carry slots of ``device``, or the one that ``PORTAKV_MOVER`` or else
    ``name`` forces, and what each that was asked said.

    Raises:
        InvalidTerms: there is no mover of that name.
        BackendUnavailable: the forced one cannot run here, or none can; ``trace`` tells why.
    """
    asked, said = os.environ.get(ENVIRONMENT) or name, list[Decision]()
    if asked not in (None, *MOVERS):
        raise InvalidTerms(f"Mover {asked!r} was asked for; expected {', '.join(MOVERS)}.")
    for each in (asked,) if asked else MOVERS:
        if not asked and each in ONLY_ASKED:
            said.append(Decision(each, False, "it is used only if it is asked for by name"))
            continue
        module, _, kind = MOVERS[each].partition(":")
        mover: type[Mover] = getattr(import_module(module), kind)
        said.append(mover.probe(device))
        if said[-1].accepted:
            return mover(device), said
    what = f"Mover {asked!r} was" if asked else "A mover was"
    found = "; ".join(map(str, said))
    error = BackendUnavailable(f"{what} asked for {device}: {found}. Install it, or another.")
    error.trace = tuple(said)
    raise error
