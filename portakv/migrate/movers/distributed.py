# SPDX-License-Identifier: Apache-2.0
"""The mover by torch.distributed, for slots that cross by gloo, nccl or what a vendor registered.

Each pair of processes has a group of its own, so that its end hurts no other. gloo and nccl open
sockets for the data, neither encrypted nor authenticated (`GLOO_SOCKET_IFNAME`,
`NCCL_SOCKET_IFNAME`): keep them on an isolated network.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from secrets import token_hex
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist

from portakv.backends.base import Decision
from portakv.errors import PeerError, TransferError, TransferTimeout
from portakv.migrate.messages import Answer, Message, Name
from portakv.migrate.movers.base import Key, Lane, Mover, Moving
from portakv.runtime.devices import inside
from portakv.runtime.worker import EXIT_SECONDS

if TYPE_CHECKING:
    from portakv.migrate.channel import Channel, Peer

#: A store kept here and served by a channel, or (address) kept by the channel there.
Stores = Callable[["Channel", "str | None"], Any]
#: A rendezvous keeps a bounded number of keys, and each pair a few of them for good: then another.
KEYS = 8192
#: Past its own timeout NCCL's watchdog ends the process; here a group is aborted long before.
NEVER = 86400.0
#: gloo gives a peer that connects this many times a group's timeout (`waitUntil`, tcp/pair.h), also
#: one that has died; torch has no call that ends it before.
RELAXED = 5


class Join(Message, frozen=True):
    """A reader makes a pair group with an owner; ``name`` is random, the group's alone."""

    name: Name


class Pair(Lane):
    """The group of two, made by the first slot that crosses."""

    def __init__(self, mover: Distributed, channel: Channel, key: Key) -> None:
        self.ours, self.name, self.named = mover, "", threading.Event()
        self.over = set[str]()  # of the store by which both meet
        self.group: Any = None
        self.stream = None if mover.device.type == "cpu" else torch.Stream(mover.device)
        super().__init__(mover, channel, key)

    def carry(self, moving: Moving, ready: torch.Event | None, tag: int, giving: bool) -> None:
        if not moving.begin():
            return
        try:
            self.group = self.group or self._join()
            if self.gone:  # looked at behind the line before, as `cut` looks at the group
                raise self.gone
            with inside(self.stream):
                if ready is not None:
                    ready.wait(self.stream)
                self._cross(moving, tag, giving)
        except Exception as error:  # what comes behind it would be taken for it
            short = re.sub(r"^\[\S*\] ", "", str(error)).partition("\n")[0].partition(". ")[0]
            what = f"A slot of {moving.slot.nbytes} B did not cross by torch.distributed"
            why = self.gone or PeerError(f"{what}: {short}. Connect and pull again.")
            self.mover.drop(self, why)
            raise why from error

    def _join(self) -> Any:
        if self.address:
            self.name = token_hex(16)
            answer = self.channel.ask(self.address, Join(self.name), Answer)
            if answer.state != "done":
                raise PeerError(answer.why)
        elif not self.named.wait(self.mover.timeout) or self.gone:
            raise self.gone or TransferTimeout("the reader has not joined")
        mover, rank = self.ours, int(bool(self.address))
        seconds = mover.timeout / RELAXED if self.stream is None else NEVER
        store = mover.stores(self.channel, self.address) if rank else mover.store
        over = self.over = getattr(store, "over", self.over)
        try:
            if self.gone:  # looked at behind the line before, as `cut` adds to it
                raise self.gone
            return mover.pair(store, rank, 2, mover.device, seconds, self.name)
        finally:
            self.over = set()
            over.discard(self.name)

    def _cross(self, moving: Moving, tag: int, giving: bool) -> None:
        """The length, then the bytes. gloo ends the process if more come than it was told to
        receive, so that it is told nothing before the length was seen; fewer it takes for all."""
        host, slot = self.stream is None, moving.slot.view(-1).view(torch.uint8)
        head = torch.tensor([slot.nbytes], dtype=torch.int64, device=self.mover.device)
        call, other = (self.group.send, 1) if giving else (self.group.recv, 0)
        for each in (head.view(torch.uint8), slot):
            work = call([each], other, tag)
            if host:
                work.wait(timedelta(seconds=max(moving.until - time.monotonic(), 0.001)))
            else:
                work.wait()  # only this thread's stream does
            if host or each is slot:
                self._await(moving)
                if not giving and int(head) != slot.nbytes:
                    raise TransferError(f"{int(head)} B came, {slot.nbytes} were asked for")

    def _await(self, moving: Moving) -> None:
        """Block the host until the stream is empty; a group that does not end is aborted."""
        ended = self.stream and self.stream.record_event()
        try:
            while ended and not ended.query():
                self.check(moving, "moved")
                time.sleep(50e-6)
        except Exception:
            self.group.abort()  # else it waits for the peer as long as the device runs
            until = time.monotonic() + EXIT_SECONDS
            while ended and not ended.query() and time.monotonic() < until:
                time.sleep(1e-3)
            raise

    def cut(self) -> bool:
        """gloo has no call that ends a receive, but one that times out closes the pair's connection
        at once, also in the middle of a message; its thread ends with its own timeout."""
        self.named.set()
        if self.group is None:
            self.over.add(self.name)
        if self.stream is None and self.group is not None:
            with suppress(RuntimeError):
                late = torch.empty(1, dtype=torch.uint8, device="cpu")
                other = 0 if self.address else 1
                self.group.recv([late], other, 0x7FFFFFFF).wait(timedelta(milliseconds=1))
        return self.stream is None


class Distributed(Mover):
    """By a group of two processes for each peer, apart from the default group."""

    name = "distributed"

    def __init__(
        self, device: torch.device, timeout: float = 30.0, stores: Stores | None = None
    ) -> None:
        from portakv.migrate.rendezvous import pair, rendezvous  # a torch may be without it

        super().__init__(device, timeout)
        self.pair, stores = pair, stores or rendezvous
        self.stores, self.store = stores, cast(Any, None)  # of an owner's channel

    @classmethod
    def probe(cls, device: torch.device) -> Decision:
        if not dist.is_available():
            return Decision(cls.name, False, "this torch was built without torch.distributed")
        made = {"cpu": dist.is_gloo_available, "cuda": dist.is_nccl_available}
        by = dist.Backend.default_device_backend_map.get(device.type)
        if by is None or not made.get(device.type, lambda: True)():
            return Decision(cls.name, False, f"torch.distributed has no backend for {device.type}")
        return Decision(cls.name, True, f"a group of two by {by}")

    def lane(self, channel: Channel, key: Key) -> Lane:
        return Pair(self, channel, key)

    def serve(self, channel: Channel) -> None:
        channel.serve(Join, self._joined)
        if self.store is None or self.store.num_keys() > KEYS:
            self.store = self.stores(channel, None)

    def _joined(self, peer: Peer, join: Join) -> Answer:
        lane = self.lanes.get(peer.id)
        if isinstance(lane, Pair) and lane.named.is_set():  # the reader lost the group
            self.drop(lane, PeerError("The reader makes a new group; the old one carries no more."))
            self.connect(peer, lane.channel)
            lane = self.lanes.get(peer.id)
        if not isinstance(lane, Pair):
            return Answer("refused", "the reader has not shaken hands with this owner")
        lane.name = join.name
        lane.named.set()
        return Answer("done")
