# SPDX-License-Identifier: Apache-2.0
"""Ask the owner of published weights, and open its memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from hashlib import blake2b
from typing import NamedTuple, TypeAlias, TypeVar

import torch
from msgspec import msgpack

from portakv.errors import (
    BackendUnavailable,
    LayoutError,
    OfferGone,
    PeerError,
    TransferCancelled,
    TransferError,
    TransferTimeout,
    Unsupported,
)
from portakv.migrate.channel import Channel
from portakv.migrate.described import strided
from portakv.migrate.ipc import Opener
from portakv.migrate.messages import Message, Refused, unsealed
from portakv.migrate.parameters import Box, Cell, Item, part_of
from portakv.migrate.published import MOST_BOXES, AskWeights, Weights, WeightsTicket
from portakv.migrate.weight_lanes import Connect, Connected, SendSlice
from portakv.migrate.weight_plan import Plan
from portakv.migrate.weight_receiver import Receiver, Terms
from portakv.runtime.bounded import Bounded
from portakv.runtime.interrupts import abandoned, uninterrupted

T = TypeVar("T")
MOST_LISTING = 256 << 20  # the most bytes of an owner's list


class WantedSums(NamedTuple):
    """The checksums that a plan needs of an owner.

    Attributes:
        whole: some are those of whole boxes, which the owner lists together.
        boxes: numbers of items, and the other boxes.
        places: of the checksum of each cell, in the list of whole boxes followed by the others.
    """

    whole: bool
    boxes: tuple[tuple[int, Box], ...]
    places: list[int]


class _Planned:
    """What a publication caches for a plan: its sources in mapped memory, and its checksums."""

    sources: list[torch.Tensor] | None = None
    sums: WantedSums | None = None


#: The call that waits for the answer to a request that was sent before.
Reply: TypeAlias = Callable[[], Weights]


class Publication:
    """What this process knows of an owner's weights, and the owner's memory that it has opened."""

    def __init__(self, address: str, items: dict[str, Item], handles: list[bytes]) -> None:
        self.address = address
        self.items = items
        self.unwatch: Callable[[], object] = lambda: None
        #: Equal for publications that differ at most in their handles.
        self.digest = blake2b(msgpack.encode([*items.items()]), digest_size=16).digest()
        self.numbers = {name: number for number, name in enumerate(items)}
        #: The numbers of whole boxes, in the order in which the owner lists their checksums.
        self.boxes = dict[tuple[str, Box], int]()
        for name, item in items.items():
            for box in item.boxes:
                self.boxes.setdefault((name, box), len(self.boxes))
        self._handles = handles
        self._regions = dict[tuple[int, torch.device], torch.Tensor]()
        self._tensors = dict[tuple[str, torch.device], torch.Tensor]()
        # By plan, and the owner's number in it. A plan is of tensors of one description.
        self._planned = Bounded[tuple[Plan, int], _Planned]("sources of weights", 8)
        self._connecting = threading.Lock()
        #: By the device of the reader's tensors, and the transport that the reader forces.
        self._receivers = dict[tuple[torch.device, str | None], Receiver]()

    def tensor(
        self, name: str, like: torch.Tensor, openers: dict[torch.device, Opener]
    ) -> torch.Tensor:
        """Return an owner's tensor for a device of this process, and open its region if necessary.

        Raises `PeerError` for a place outside of the owner's regions, and `Unsupported` if the
        memory cannot be mapped.
        """
        item = self.items[name]
        key = item.tie, like.device
        if key in self._tensors:
            return self._tensors[key]
        if item.place is None and not self._handles:
            why = "their owner does not export its memory"
            raise Unsupported("Opening the weights", f"{why}; use a transport")
        if item.place is None or item.place[0] >= len(self._handles):
            raise self.wrong(name)
        (number, offset) = item.place
        region = self._regions.get((number, like.device))
        if region is None:
            if like.device not in openers:
                openers[like.device] = Opener(like.device, descriptors=False)
            region = openers[like.device].open(self._handles[number])
            if region.dtype != torch.uint8 or region.ndim != 1:
                raise self.wrong(name)
            self._regions[number, like.device] = region
        try:
            tensor = strided(region, offset, like.dtype, item.local, item.strides)
        except (LayoutError, RuntimeError):
            raise self.wrong(name) from None
        self._tensors[key] = tensor
        return tensor

    def source(
        self, cell: Cell, like: torch.Tensor, openers: dict[torch.device, Opener]
    ) -> torch.Tensor:
        """Return the source of a cell in the owner's memory; raise the errors of `tensor`."""
        tensor = self.tensor(cell.name, like, openers)
        try:
            return part_of(tensor, cell.src, cell.box.extents)
        except LayoutError:
            raise self.wrong(cell.name) from None

    def sources(
        self,
        plan: Plan,
        number: int,
        tensors: Mapping[str, torch.Tensor],
        openers: dict[torch.device, Opener],
    ) -> list[torch.Tensor]:
        """Return the sources of an owner's cells of a plan; raise the errors of `tensor`."""
        planned = self._planned.get_or_make((plan, number), _Planned)
        if planned.sources is None:
            cells = [plan.cells[n] for n in plan.numbers[number]]
            planned.sources = [self.source(x, tensors[x.name], openers) for x in cells]
        return planned.sources

    def sums_of(self, plan: Plan, number: int) -> WantedSums:
        """Return which checksums a plan needs of the owner that has this number in it."""
        planned = self._planned.get_or_make((plan, number), _Planned)
        if planned.sums is None:
            planned.sums = self._wanted_sums(plan, number)
        return planned.sums

    @property
    def compares_whole(self) -> bool:
        """Return True if a plan needed the checksums of whole boxes, so the next may need them."""
        return any(x.sums is not None and x.sums.whole for x in [*self._planned.values()])

    def _wanted_sums(self, plan: Plan, number: int) -> WantedSums:
        boxes = dict[tuple[str, Box], int]()
        places = list[int]()
        listed = False
        pairs = list[tuple[str, Box]]()
        for cell in (plan.cells[n] for n in plan.numbers[number]):
            pairs.append((cell.name, cell.box._replace(start=cell.src)))
            listed = listed or pairs[-1] in self.boxes
        first = len(self.boxes) if listed else 0
        for pair in pairs:
            place = self.boxes.get(pair)
            if place is None:
                place = first + boxes.setdefault(pair, len(boxes))
            places.append(place)
        numbered = tuple((self.numbers[name], box) for name, box in boxes)
        return WantedSums(listed, numbered, places)

    def receiver(self, owner: Owner, terms: Terms) -> Receiver:
        """Return the lane by which the owner sends weights to a device; connect at the first call.

        Raises `Unsupported` if the owner and this process have no transport.
        """
        receiver = self._receivers.get(terms[:2])
        if receiver is not None and receiver.usable:
            return receiver
        return uninterrupted(partial(self._receiver, owner, terms))

    def _receiver(self, owner: Owner, terms: Terms) -> Receiver:
        """Connect, unless another pull does."""
        while not self._connecting.acquire(timeout=0.05):
            owner.check()
        try:
            receiver = self._receivers.get(terms[:2])
            if receiver is not None and receiver.usable:
                return receiver
            if receiver is not None:
                receiver.release()
            receiver = self._receivers[terms[:2]] = _connected(owner, terms)
            return receiver
        finally:
            self._connecting.release()

    def close(self) -> None:
        """Release the lanes; quick, for the thread that notices the end of a connection."""
        for receiver in [*self._receivers.values()]:
            receiver.drop()
        self._receivers.clear()

    def wrong(self, name: str) -> PeerError:
        """Return the error of an owner whose description does not fit its memory."""
        return PeerError(
            f"Expected {name} as {self.address} described it, got other memory. Pull from another "
            f"owner."
        )


#: Publications by channel, address and id. The end of the connection to the owner removes them.
publications: Bounded[tuple[bytes, str, bytes], Publication] = Bounded("open publications", 64)


def _forget(key: tuple[bytes, str, bytes]) -> None:
    """Release the memory of a publication, as soon as no pull uses it."""
    publication = publications.pop(key, None)
    if publication is not None:
        publication.unwatch()
        publication.close()


def _connected(owner: Owner, terms: Terms) -> Receiver:
    """Connect to an owner that sends weights."""
    try:
        return Receiver(owner, terms)
    except (Refused, BackendUnavailable, Unsupported) as error:
        reason = f"{terms.why}; and they cannot be sent: {error}"
        raise Unsupported(f"Pulling weights of {owner.address}", reason) from error


def begin_all(channel: Channel, tickets: Iterable[bytes], timeout: float) -> dict[bytes, Reply]:
    """Ask the owners whose weights are known here for the begin of a pull, and return what waits
    for the answers, by tickets."""
    seconds = min(timeout, channel.timeout)
    begun = dict[bytes, Reply]()
    for ticket in {*tickets}:
        decoded = unsealed(ticket, WeightsTicket)
        known = decoded and publications.get((channel.id, decoded.address, decoded.id))
        if decoded and known:
            request = _begin(decoded.id, known)
            begun[ticket] = channel.begin_to_ask(decoded.address, request, Weights, seconds)
    return begun


def _begin(id: bytes, known: Publication) -> AskWeights:
    """Return the request at the begin of a pull of weights that are known here."""
    if known.compares_whole:
        return AskWeights(id, what="sums", begin=True)
    return AskWeights(id, len(known.items), begin=True)


class Owner:
    """An owner of weights, for one pull that ends at the time ``until``.

    ``begun``: of `begin_all`.
    """

    def __init__(
        self,
        channel: Channel,
        ticket: bytes,
        timeout: float,
        until: float,
        stopped: Callable[[], bool],
        begun: Reply | None = None,
    ) -> None:
        decoded = unsealed(ticket, WeightsTicket)
        if decoded is None:
            raise PeerError(
                "Expected tickets to be the bytes of `Published.ticket`, got bytes that are "
                "not a ticket of weights of this release. Carry them unchanged."
            )
        self.channel = channel
        self.timeout = timeout
        self.until = until
        self.address = decoded.address
        self.id = decoded.id
        self.version: int | None = None
        self._listed: Sequence[int] = ()  # checksums that came with the answer to the begin
        self._stopped = stopped
        self._key = channel.id, decoded.address, decoded.id
        known = publications.get(self._key)
        if known is None:
            self.publication = self._list()
            return
        self.publication = known
        self._listed = self.ask(_begin(self.id, known), begun).sums

    def _list(self) -> Publication:
        """Request all items and regions, and keep them until the connection ends."""
        request = AskWeights(self.id, begin=True)
        pairs = self._all("weights", request, lambda page: page.items, lambda pair: pair[0])
        handles = self._all(
            "regions", AskWeights(self.id, what="regions"), lambda page: page.regions
        )
        # A channel publishes once, so what it published before is gone.
        for key in [key for key in [*publications] if key[:2] == self._key[:2]]:
            if key != self._key:
                _forget(key)
        made = Publication(self.address, dict(pairs), handles)
        publication = publications.setdefault(self._key, made)
        if publication is not made:  # another pull was quicker, and may have a lane
            return publication
        try:
            publication.unwatch = self.channel.watch(self.address, partial(_forget, self._key))
        except BaseException:
            publications.pop(self._key, None)
            raise
        return publication

    def _all(
        self,
        what: str,
        request: AskWeights,
        of: Callable[[Weights], Sequence[T]],
        name: Callable[[T], object] | None = None,
        total: int | None = None,
    ) -> list[T]:
        """Request a list in pages; raise `PeerError` if its length is not the announced one.

        ``name``: of an object, which the list has once. ``total``: the length, if it is known.
        """
        listed = list[T]()
        names = set[object]()
        nbytes = 0
        while total is None or len(listed) < total:
            first = len(listed)
            begin = request.begin and not first
            page = self.ask(AskWeights(request.id, first, what=request.what, begin=begin))
            some = of(page)
            listed += some
            names.update(map(name, some) if name else ())
            nbytes += len(msgpack.encode(page))
            total = page.total if total is None else total
            stuck = not some and len(listed) < total
            twice = name is not None and len(names) < len(listed)
            long = len(listed) > total or nbytes > MOST_LISTING
            if page.total != total or stuck or twice or long:
                raise PeerError(
                    f"Expected {total} {what} from {self.address}, got {len(listed)}, or some "
                    f"twice. Pull from another owner."
                )
        return listed

    def ask(self, request: AskWeights, reply: Reply | None = None) -> Weights:
        """Return the owner's answer, after the owner has one. ``reply``: the request was sent."""
        pause = 5e-4
        while True:
            answer = self.once(request, reply)
            if answer.state == "held":
                return answer
            reply = None
            self.pause(pause)
            pause = min(2 * pause, 0.05)

    def pause(self, seconds: float) -> None:
        """Wait before the next request to a busy owner, but not past the time of the pull."""
        time.sleep(min(seconds, max(0.0, self.until - time.monotonic())))

    def once(self, request: AskWeights, reply: Reply | None = None) -> Weights:
        """Return the owner's answer, which may be busy; raise if its weights changed."""
        self.check()
        answer = self._in_time(reply) if reply else self._ask(request, Weights)
        self.judge(answer)
        return answer

    def request_slice(self, request: SendSlice) -> Weights:
        """Return the owner's answer, which may be busy. After an error the owner may send it."""
        return self._ask(request, Weights)

    def judge(self, answer: Weights) -> None:
        """Raise if an answer says that the weights have changed, or are gone."""
        if answer.state == "gone":
            raise self._gone()
        if answer.state == "held" and self.version is None:
            self.version = answer.version
        if self.version not in (None, answer.version):
            raise TransferError(
                f"The weights at {self.address} changed while they were pulled. Do not use any of "
                f"them; pull again."
            )
        if answer.state == "replaced":
            raise PeerError(
                f"Expected {answer.replaced} at {self.address} in the memory that was published, "
                f"got other memory. Have its process publish the weights again."
            )

    def _ask(self, request: Message, kind: type[T]) -> T:
        """Return the owner's answer to a message, in the time of the pull."""
        ask = partial(self.channel.ask, self.address, request, kind, self._left)
        return self._in_time(ask)

    def _in_time(self, ask: Callable[[], T]) -> T:
        """Return the result of a request; raise the error of a pull whose time is over."""
        try:
            return ask()
        except TransferTimeout:
            if time.monotonic() < self.until:
                raise
            raise self.late() from None

    @property
    def _left(self) -> float:
        """Return the seconds in which the owner has to answer."""
        left = max(0.0, self.until - time.monotonic())
        return min(left, self.channel.timeout)

    def _gone(self) -> OfferGone:
        """Forget the publication, and return the error of one that was closed."""
        _forget(self._key)
        return OfferGone(
            f"The weights at {self.address} are no longer published; request a new ticket."
        )

    def connect(self, request: Connect) -> Connected:
        """Return the owner's answer to a request for a lane."""
        self.check()
        answer = self._ask(request, Connected)
        if answer.gone:
            raise self._gone()
        return answer

    def receiver(self, terms: Terms) -> Receiver:
        """Return the lane by which the owner sends weights; see `Publication.receiver`."""
        return self.publication.receiver(self, terms)

    def number(self, name: str) -> int:
        """Return the number of an item of the owner."""
        return self.publication.numbers[name]

    def check(self) -> None:
        """Raise the error of a pull that was cancelled or whose time is over."""
        if self._stopped() or abandoned():
            raise TransferCancelled("The pull of weights was cancelled. Do not use the weights.")
        if time.monotonic() >= self.until:
            raise self.late()

    def late(self) -> TransferTimeout:
        """Return the error of a pull whose time is over."""
        return TransferTimeout(
            f"The pull of weights from {self.address} timed out after {self.timeout:g} s. Do not "
            f"use the weights; pull again with a longer timeout."
        )

    def begin_to_confirm(self) -> Callable[[], object]:
        """Ask whether the weights have changed since they were listed, and return the call that
        waits for the answer and raises `TransferError` if they have."""
        self.check()
        request = AskWeights(self.id, len(self.publication.items))
        reply = self.channel.begin_to_ask(self.address, request, Weights, self._left)
        return partial(self.ask, request, reply)

    def confirm(self) -> None:
        """Raise `TransferError` if the weights have changed since they were listed."""
        self.ask(AskWeights(self.id, len(self.publication.items)))

    def refuse(self) -> None:
        """Report checksums that differ, so that the owner does not use them again."""
        self.once(AskWeights(self.id, len(self.publication.items), again=True))

    def sums(self, plan: Plan, number: int) -> list[int]:
        """Return the owner's checksums of its cells of a plan, in which it has this number."""
        wanted = self.publication.sums_of(plan, number)
        listed = list[int]()
        if wanted.whole and len(self._listed) == len(self.publication.boxes):
            listed += self._listed
        elif wanted.whole:
            request = AskWeights(self.id, what="sums")
            total = len(self.publication.boxes)
            listed = self._all("checksums", request, lambda page: page.sums, total=total)
        for first in range(0, len(wanted.boxes), MOST_BOXES):
            some = wanted.boxes[first : first + MOST_BOXES]
            answer = self.ask(AskWeights(self.id, boxes=some)).sums
            self._check_number(len(some), len(answer))
            listed += answer
        return [listed[place] for place in wanted.places]

    def _check_number(self, expected: int, got: int) -> None:
        if got != expected:
            raise PeerError(
                f"Expected {expected} checksums from {self.address}, got {got}. Do not use the "
                f"weights; pull from another owner."
            )
