# SPDX-License-Identifier: Apache-2.0
"""The transport by torch.distributed: buffers cross by gloo, nccl or a vendor's backend.

Each pair of processes has a separate group, so that its end affects no other pair. gloo and nccl
open sockets for the data, neither encrypted nor authenticated (`GLOO_SOCKET_IFNAME`,
`NCCL_SOCKET_IFNAME`): keep them on an isolated network.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from secrets import token_hex
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from portakv.backends.base import Decision
from portakv.errors import PeerError, TransferError, TransferTimeout
from portakv.migrate.messages import Answer, Message, Name
from portakv.migrate.rendezvous import ChannelStore, Meet, pair
from portakv.migrate.transports.base import Lane, Moving, Transport
from portakv.runtime.devices import inside
from portakv.runtime.worker import EXIT_SECONDS

if TYPE_CHECKING:
    from portakv.migrate.channel import Channel, Peer

#: After its own timeout NCCL's watchdog ends the process; here a group is aborted long before.
NEVER = 86400.0
#: gloo waits this many times a group's timeout for a peer that connects (`waitUntil`, tcp/pair.h),
#: also for a dead peer; torch has no call that ends the wait.
RELAXED = 5


class Join(Message, frozen=True):
    """A reader makes a group with an owner; ``name`` is random and belongs to the group alone."""

    name: Name


class Pair(Lane):
    """The group of two processes, which the first buffer makes.

    A buffer after a failed one would take its bytes, so a failure closes the group. On a device no
    length precedes a buffer: NCCL takes the size that it gets, and both sides know it from one
    `Gather`.
    """

    ordered = True

    def __init__(self, transport: Transport, channel: Channel, key: str | Peer) -> None:
        self.name = ""
        self.named = threading.Event()
        self.group: dist.ProcessGroup | None = None  # until the first buffer
        self.stream = None if transport.device.type == "cpu" else torch.Stream(transport.device)
        # one buffer waits while another crosses
        self.broken = False
        self.width = 1 if self.stream is None else 2
        super().__init__(transport, channel, key)
        self.store = ChannelStore(channel, self.address or None, Meet)  # by which both meet

    def carry(self, moving: Moving, ready: torch.Event | None, tag: int) -> Iterator[None]:
        group = self.group = self.group or self._join()
        if self.gone or not moving.begin():  # after the line above, because `cut` reads the group
            raise self.gone or TransferTimeout("its turn came too late")
        buffer = moving.buffer.view(-1).view(torch.uint8)
        other = 0 if self.address else 1
        call = group.recv if self.address else group.send
        if self.stream is None:
            self._by_gloo(moving, buffer, lambda x: call([x], other, tag))
            return
        with inside(self.stream):
            if ready is not None:
                ready.wait(self.stream)
            call([buffer], other, tag).wait()  # only this thread's stream waits
            ended = self.stream.record_event()
            yield
            try:
                moving.poll(ended.query)
                if self.broken:
                    raise TransferError("another buffer of its pair failed")
            except Exception:  # whatever failed, the group must not wait for the peer
                if not self.broken:
                    self.broken = True
                    group.abort()  # otherwise it waits for the peer as long as the device runs
                until = time.monotonic() + EXIT_SECONDS
                while not ended.query() and time.monotonic() < until:
                    time.sleep(1e-3)
                raise

    def _join(self) -> dist.ProcessGroup:
        if self.address:
            self.name = token_hex(16)
            self.channel.ask(self.address, Join(self.name), Answer)
        elif not self.named.wait(self.transport.timeout):
            raise TransferTimeout("the reader has not joined")
        seconds = self.transport.timeout / RELAXED if self.stream is None else NEVER
        return pair(
            self.store, int(bool(self.address)), 2, self.transport.device, seconds, self.name
        )

    def _by_gloo(self, moving: Moving, buffer: torch.Tensor, call: Callable[[Any], Any]) -> None:
        """Move the length, then the bytes.

        gloo ends the process if more bytes arrive than it expects, so the length is checked before
        the receive. gloo accepts fewer bytes without an error.
        """
        head = torch.tensor([buffer.nbytes], dtype=torch.int64, device="cpu")
        for each in (head.view(torch.uint8), buffer):
            left = moving.until - time.monotonic()
            call(each).wait(timedelta(seconds=max(left, 0.001)))
            if (came := int(head)) != buffer.nbytes:
                raise TransferError(f"expected {buffer.nbytes} B, got {came}")

    def cut(self) -> bool:
        """End a receive of gloo, which has no call for that.

        A receive that times out closes the pair's connection immediately, also in the middle of a
        message. gloo's thread ends with its own timeout.
        """
        self.store.over = True
        self.named.set()
        if self.stream is None and self.group is not None:
            with suppress(RuntimeError):  # of gloo: the receive timed out
                late = torch.empty(1, dtype=torch.uint8, device="cpu")
                other = 0 if self.address else 1
                self.group.recv([late], other, 0x7FFFFFFF).wait(timedelta(milliseconds=1))
        return self.stream is None


class Distributed(Transport):
    """Move buffers by a group of two processes for each peer, apart from the default group."""

    name = "distributed"
    kind = Pair
    asks = (Join, Meet)

    @classmethod
    def probe(cls, device: torch.device) -> Decision:
        made = {"cpu": dist.is_gloo_available, "cuda": dist.is_nccl_available}
        by = dist.Backend.default_device_backend_map.get(device.type)
        if by is None or not made.get(device.type, lambda: True)():
            return Decision(cls.name, False, f"torch.distributed has no backend for {device.type}")
        return Decision(cls.name, True, f"a group of two by {by}")

    def answer(self, peer: Peer, channel: Channel, request: Any) -> Message:
        lane: Pair = self.lane(peer, channel)
        if isinstance(request, Meet):
            return lane.store.do(request)
        if lane.named.is_set():  # the reader has lost the group
            lane.close(PeerError("The reader makes a new group, which replaces this one."))
            lane = self.lane(peer, channel)
        lane.name = request.name
        lane.named.set()
        return Answer("done")
