# SPDX-License-Identifier: Apache-2.0
"""Owners as a reader knows them: each is greeted once, refused if its rows are others, and mapped
if its memory can be; otherwise both sides agree upon a transport."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from math import inf
from queue import LifoQueue
from time import monotonic
from typing import Any, cast

import torch

from portakv import arguments
from portakv.arguments import FOREVER
from portakv.errors import (
    BackendUnavailable,
    LayoutError,
    PeerError,
    PortaKVError,
    TransferTimeout,
    Unsupported,
)
from portakv.migrate import ipc
from portakv.migrate.channel import Channel, Refused
from portakv.migrate.chunks import staging
from portakv.migrate.described import rebuild, reserve
from portakv.migrate.messages import Answer, Bye, Hello, Ticket, Welcome, is_signed, no_ticket
from portakv.migrate.shards import Shard, device_of, unlike
from portakv.migrate.transports import check_transport, choose, forced
from portakv.migrate.transports import renamed as renamed
from portakv.migrate.transports.base import Moving, Transport
from portakv.runtime.bounded import Bounded
from portakv.runtime.interrupts import uninterrupted

_HOST = torch.device("cpu")
FAREWELL = 0.5  # seconds for the last message to all owners
MOST_SLOTS = 64  # of an owner, which each are a worker here


class Paired:
    """An owner: its welcome, and its shards and events if its memory is mapped."""

    def __init__(self, channel: Channel, address: str, welcome: Welcome) -> None:
        self.channel = channel
        self.address = address
        self.welcome = welcome
        self.shards = list[Shard]()
        self.events = list[Any]()
        # why it is not mapped, and what carries then
        self.why = ""
        self.transport = cast(Any, None)
        # slots are taken in the order of gathers
        self.turn = threading.Lock()
        self.tag = 0
        self.number = 0  # of those that are known now: workers are kept by it
        #: Slots with their numbers, and what was moved into them last.
        self.slots: LifoQueue[tuple[int, torch.Tensor, Moving | None]] = LifoQueue()
        self.unwatch: Callable[[], object] = lambda: None
        #: For the epochs of this and of others the cuts of a pull, if all have all positions.
        self.cuts: Bounded[tuple[bytes, ...], Any] = Bounded("cuts of pulls", 16)


class Pairings:
    """The owners of one reader; see `Reader` for its arguments."""

    def __init__(
        self, channel: Channel, shards: Sequence[Shard], model: str, transport: str | None
    ) -> None:
        self.channel = channel
        self.shards = shards
        self.device = device_of(shards)
        check_transport(transport, self.device)
        self._model = model
        self._asked = forced(transport)
        self._transports = dict[str, Transport]()
        self._owners = dict[tuple[str, bytes], Paired]()
        self._lock = threading.Lock()

    def told(
        self, tickets: bytes | Sequence[bytes], until: float = inf
    ) -> list[tuple[Ticket, Paired]]:
        """Return tickets, and the owner of each, by the time ``until``; raise as `of`, and
        `PeerError` for what is not a ticket."""
        if isinstance(tickets, bytes):
            packed = [tickets]
        else:
            packed = arguments.items("tickets", tickets, "the bytes of offers' tickets")
        for number, one in enumerate(packed):
            if not isinstance(one, bytes):
                raise arguments.invalid(f"tickets[{number}]", "bytes", one, "Pass Offer.ticket.")
        packed = list(dict.fromkeys(packed))
        if not packed:
            raise arguments.invalid("tickets", "one ticket or more", tickets, "Pass Offer.ticket.")
        read = [Ticket.read(data) for data in packed]
        try:
            owned = [(ticket, self.of(ticket, until)) for ticket in read]
        except PeerError as error:
            if monotonic() < until:
                raise
            raise TransferTimeout(
                f"The pull had not paired in its time; no rows were published. Increase timeout, "
                f"or ask another owner: {error}"
            ) from error
        for data, (_, owner) in zip(packed, owned, strict=True):
            if not is_signed(data, owner.welcome.key):
                raise no_ticket()
        return owned

    def of(self, ticket: Ticket, until: float = inf) -> Paired:
        """Return the owner of a ticket.

        Raises:
            TransferTimeout: the pairing had not ended by the time ``until``.
            PeerError, OfferGone: it is gone, or was restarted since.
            LayoutError: its rows cannot become this reader's.
            Unsupported: its memory can neither be mapped nor moved.
        """
        key = ticket.address, ticket.epoch
        if (owner := self._owners.get(key)) is not None:
            return owner
        return uninterrupted(partial(self._pair, ticket, key, until))

    def _pair(self, ticket: Ticket, key: tuple[str, bytes], until: float) -> Paired:
        """Pair with the owner of a ticket, unless another thread has."""
        wait = min(max(0.0, until - monotonic()), FOREVER)
        if not self._lock.acquire(timeout=wait):
            raise TransferTimeout(
                f"Pairing with {ticket.address} waited for another owner's, and its time was over. "
                f"Pull again, with a longer timeout."
            )
        try:
            if (owner := self._owners.get(key)) is not None:
                return owner
            owner = Paired(self.channel, ticket.address, self._greet(ticket, until))
            for old in [x for x in [*self._owners.values()] if x.address == owner.address]:
                self._forget(old)
            owner.why = self._mapped(owner)
            if owner.why:
                try:
                    self._agree(owner, ticket, until)
                except PortaKVError as error:
                    peer = isinstance(error, PeerError | TransferTimeout)
                    if peer and not isinstance(error, Refused):
                        raise
                    why = f"{owner.why}; and they cannot be moved: {error}"
                    raise Unsupported(f"Pulling rows of {ticket.address}", why) from error
            used = {one.number for one in [*self._owners.values()]}
            owner.number = min({*range(len(used) + 1)} - used)
            self._owners[key] = owner
            owner.unwatch = self.channel.watch(ticket.address, partial(self._forget, owner))
        finally:
            self._lock.release()
        return owner

    def close(self) -> None:
        """Let go of all owners."""
        uninterrupted(self._close)

    def _close(self) -> None:
        """Do what `close` promises."""
        until = monotonic() + min(FAREWELL, self.channel.timeout)
        for owner in [*self._owners.values()]:
            with suppress(PortaKVError):
                left = max(0.0, until - monotonic())
                self.channel.tell(owner.address, Bye(), left)
            self._forget(owner)
        for transport in self._transports.values():
            transport.close()

    def _greet(
        self, ticket: Ticket, until: float, transport: str = "", slots: torch.device = _HOST
    ) -> Welcome:
        kind: Any = Welcome | Answer
        hello = Hello(self._model, ipc.where(slots), transport)
        seconds = min(self.channel.timeout, max(0.0, until - monotonic()))
        welcome = self.channel.ask(ticket.address, hello, kind, seconds)
        if not isinstance(welcome, Answer):
            mine = [shard.group for shard in self.shards]
            why = unlike(mine, [one.group for one in welcome.described])
        elif welcome.state == "gone":
            raise ticket.gone(welcome.why)
        else:
            why = welcome.why or "it says nothing but that"
        if why:
            raise LayoutError(
                f"{ticket.address} was asked for its rows, and they cannot become this reader's: "
                f"{why}. Pair shards of one model, by one release."
            )
        if welcome.epoch != ticket.epoch:
            raise ticket.gone("its owner was restarted, or has other memory, since then")
        return cast(Welcome, welcome)

    def _mapped(self, owner: Paired) -> str:
        """Map an owner's memory; or why it cannot be."""
        welcome = owner.welcome
        _check(owner.address, welcome)  # before anything is mapped
        if missing := [region.why for region in welcome.regions if not region.handle]:
            return f"its owner does not share it: {missing[0]}"
        try:
            *flat, told = [
                ipc.open_shared(x.handle, "cpu" if x.device.startswith("cpu ") else self.device)
                for x in welcome.regions
            ]
            read = (told ^ 0).cpu()  # by a kernel, as rows are
            if not torch.equal(read, ipc.proof_of(welcome.epoch)):
                return "what is read through the mapping is not what its owner has there"
            shards = [rebuild(one, flat) for one in welcome.described]
            theirs = welcome.regions[0].device
            if theirs != ipc.where(self.device) and not theirs.startswith("cpu "):
                # Another device's memory, which counts as this one's: its kernels are to know.
                shards = [
                    Shard(x.view.as_peer(self.device), x.group.layers, x.group.heads)
                    for x in shards
                ]
            events = [ipc.open_event(one, self.device) for one in welcome.events]
        except PortaKVError as error:
            return str(error)
        # Last: an owner that has shards is read, and without its events it would be read before its
        # stream has written the rows.
        owner.events = events
        owner.shards = shards
        return ""

    def _agree(self, owner: Paired, ticket: Ticket, until: float) -> None:
        """Agree with an owner on a transport. Its slots are where both sides' rows are or, if it
        serves no slots there, on the host."""
        # Which one this reader was told to use, or the owner.
        theirs = owner.welcome.regions[0].device
        name = self._asked or owner.welcome.transport or None
        # Another device of the same type: NCCL does not serve two processes on one.
        same = theirs.partition(" ")[0] == self.device.type and theirs != ipc.where(self.device)
        device = self.device if same else _HOST
        try:
            transport = choose(device, name)
        except BackendUnavailable:
            device = _HOST
            transport = choose(device, name)
        owner.transport = self._transports.setdefault(f"{transport.name} {device}", transport)
        if owner.transport is not transport:
            transport.close()
        agreed = self._greet(ticket, until, transport.name, device)
        same_rows = agreed.described == owner.welcome.described
        if not (same_rows and 1 <= agreed.slots <= MOST_SLOTS):
            raise PeerError(
                f"Expected 1 to {MOST_SLOTS} staging buffers and the rows that it described before "
                f"from {owner.address}, got {agreed.slots} or others. Pull from another owner."
            )
        owner.welcome = agreed
        for number in range(owner.welcome.slots):
            owner.slots.put((number, staging(0, device), None))

    def _forget(self, owner: Paired) -> None:
        """Let go of an owner; what is still read of it keeps its memory until then."""
        self._owners.pop((owner.address, owner.welcome.epoch), None)
        for one in [*self._owners.values()]:
            one.cuts.clear()  # those with it have its memory
        owner.unwatch()
        if owner.transport:
            owner.transport.forget(owner.address)


def _check(address: str, welcome: Welcome) -> None:
    """Raise `PeerError` if views cannot be rebuilt on regions as an owner describes them."""
    try:
        regions = [reserve(region.nbytes) for region in welcome.regions]
    except (OSError, OverflowError, ValueError) as error:
        raise PeerError(
            f"Expected regions of memory that this process has addresses for from {address}, got "
            f"others ({error}). Pull from another owner."
        ) from None
    for described in welcome.described:
        rebuild(described, regions)
